"""Error statistics: what the quantized network does along trajectories.

With `statistics.trajectory = 'fp'` these are the full-precision ones, as in the
paper. With 'quantized' all images walk as the sampler will: at each step both
networks look at the same x, the errors of the step are fitted, and its
correction takes the images to the next one. So a step's statistics are those of
the points that the corrected sampler really sees.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from d2dpm_jax.denoising import correction as corrections
from d2dpm_jax.denoising import gaussian, selection
from d2dpm_jax.denoising import statistics as errors_of
from d2dpm_jax.denoising.statistics import Statistics
from d2dpm_jax.diffusion import noise
from d2dpm_jax.pipelines import (
  artifacts,
  generation,
  quantized_walk,
  setup,
  trajectories,
  trial,
)
from d2dpm_jax.quantization import transform
from d2dpm_jax.reporting import error_plots, plots
from d2dpm_jax.runtime import devices, files, processes, progress

_log = logging.getLogger(__name__)

TRAJECTORIES = ('fp', 'quantized')
_LOGGED_ROWS = 10  # Of the table of held-out errors, at most.

# Timestep -> chunks (eps_q, eps, x_t), float32[N, h, w, c].
PointsAt = Callable[[int], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for bad `config.statistics`."""
  settings = config.statistics
  if settings.trajectory not in TRAJECTORIES:
    raise ValueError(
      f'statistics.trajectory {settings.trajectory!r}: expected one of '
      f'{list(TRAJECTORIES)}.'
    )
  for name in ('num_samples', 'folds'):
    if settings[name] < 2:
      raise ValueError(
        f'statistics.{name} is {settings[name]}; expected >= 2, to try the '
        'corrections on images that they were not fitted on.'
      )
  if settings.num_trials < 0:
    raise ValueError(
      f'statistics.num_trials is {settings.num_trials}; expected >= 0.'
    )
  corrections.check(config.sample.correction, config.sample.absorb_variance)


def num_trajectories(config: ml_collections.ConfigDict) -> int:
  """How many calibration needs: to fit on, and those of `trial` after them."""
  fitted = max(config.calibration.num_samples, config.statistics.num_samples)
  return fitted + config.statistics.num_trials


def fit_errors(
  model: setup.Model,
  qstate: transform.QuantState,
  spool: trajectories.Trajectories,
  paths: files.Workdir,
) -> Statistics:
  """Fits (eps_q, error) of all sampling steps, and tries the corrections.

  What has been computed is kept in `paths.calibration`; the same call after an
  interruption goes on there.

  Raises:
    ValueError: bad settings, or statistics there that were begun with others.
  """
  check(model.config)
  fit = (
    _fit_quantized
    if model.config.statistics.trajectory == 'quantized'
    else _fit_full_precision
  )
  found, points = fit(model, qstate, spool, paths)
  held_out = trial.settle(model, qstate, spool, found.held_out)
  found = found._replace(held_out=held_out)
  if not processes.is_first():
    return found
  table = selection.format_table(found.held_out)
  with files.atomic_write(paths.held_out_table, 'w') as file:
    file.write(f'{table}\n')
  header, *lines = table.splitlines()
  shown = lines[:: -(-len(lines) // _LOGGED_ROWS)]
  _log.info(
    'Share of the squared error that is predicted on held-out images, in '
    'percent (all timesteps: %s)\n%s',
    paths.held_out_table,
    '\n'.join([header, *shown]),
  )
  _draw(found, points, model.config.statistics.outlier_std, paths)
  return found


def _draw(
  found: Statistics, points: PointsAt, outlier_std: float, paths: files.Workdir
) -> None:
  """Writes the figures of `found`; `points` are what it was fitted on."""
  errors, held_out = found
  tensor = errors['tensor']
  counted = [
    error_plots.count_joint(
      t, functools.partial(points, t), tensor, held_out, outlier_std
    )
    for t in error_plots.shown_timesteps(tensor.timesteps)
  ]
  plots.save(error_plots.errors(errors, held_out), paths.error_plot)
  plots.save(
    error_plots.joint(counted, tensor, outlier_std), paths.error_joint_plot
  )
  plots.save(error_plots.left(held_out), paths.error_left_plot)


def settings_of(model: setup.Model) -> dict[str, Any]:
  """What error statistics depend on; kept with them."""
  return {
    **artifacts.structure(model),
    'sampler': artifacts.sampler_settings(model),
    'statistics': collection_settings(model.config),
  }


def _fit_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What else decides the numbers in a table."""
  return {
    **setup.plain(config.statistics),
    'seed': config.seed,
    'microbatch': config.sample.microbatch,
    'execution': config.quant.execution,
  }


def collection_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """At which points the errors were collected."""
  trajectory = config.statistics.trajectory
  if trajectory == 'fp':
    return {'trajectory': trajectory}
  return {'trajectory': trajectory, **corrected_with(config.sample)}


def corrected_with(settings: ml_collections.ConfigDict) -> dict[str, Any]:
  """What of `config.sample` decides where the quantized network goes."""
  kind = settings.correction
  return {
    'correction': kind,
    # The others know no difference.
    'channel_wise': settings.channel_wise and kind not in ('none', 'auto'),
    'absorb_variance': settings.absorb_variance,
  }


def _fit(
  timesteps: Sequence[int], points: PointsAt, model: setup.Model
) -> Statistics:
  config = model.config.statistics
  return errors_of.fit(
    timesteps,
    points,
    outlier_std=config.outlier_std,
    folds=config.folds,
    # The last entry is not compared: other fits serve the same network.
    settings={**settings_of(model), 'fit': _fit_settings(model.config)},
  )


def _batches(
  model: setup.Model, spool: trajectories.Trajectories
) -> Iterator[tuple[int, int, trajectories.Batch]]:
  """(number of its first image, images to use of it, batch), in order."""
  count = model.config.statistics.num_samples
  for start in spool.starts:
    if start < count:
      batch = spool.batch(start)
      yield start, min(len(batch.labels), count - start), batch


def _fit_full_precision(
  model: setup.Model,
  qstate: transform.QuantState,
  spool: trajectories.Trajectories,
  paths: files.Workdir,
) -> tuple[Statistics, PointsAt]:
  """On the trajectories as they are on disk."""
  config = model.config
  directory = paths.calibration / 'eps_q'
  program = generation.eps_program(
    model.ldm, model.sampler, config.sample.microbatch
  )
  state = generation.executable(qstate, config.quant.execution)
  params = generation.network_params(
    model.params, state, config.quant.float_dtype
  )
  inputs = devices.replicate(
    generation.Inputs(
      params, state, None, noise.seed_key(config.seed), model.sampler.scale
    )
  )
  batches = processes.own(list(_batches(model, spool)))
  total = sum(rows for _, rows, _ in batches)
  with progress.progress('statistics', total, 'image') as bar:
    for start, rows, batch in batches:
      reused = trajectories.has_array(directory, f'{start:06d}')
      if not reused:
        eps_q = program(
          inputs,
          batch.x[:rows],
          batch.labels[:rows],
          room=config.calibration.batch_size,
        )
        trajectories.write_array(directory, f'{start:06d}', eps_q)
      bar.update(rows, reused=reused)
  processes.wait_for_all('statistics')
  # Opened here: steps are fitted in threads, and Python 3.11 cannot parse the
  # headers of files in several at once.
  opened = [
    (
      trajectories.read_array(directory, f'{start:06d}'),
      batch.eps[:rows],
      batch.x[:rows],
    )
    for start, rows, batch in _batches(model, spool)
  ]
  steps = generation.rows_of(model.ldm, model.sampler).t.tolist()

  def points(t: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    step = steps.index(t)
    for eps_q, eps, x in opened:
      yield eps_q[:, step], eps[:, step], x[:, step]

  return _fit(steps, points, model), points


def _fit_quantized(
  model: setup.Model,
  qstate: transform.QuantState,
  spool: trajectories.Trajectories,
  paths: files.Workdir,
) -> tuple[Statistics, PointsAt]:
  """On trajectories of the quantized, corrected network."""
  walk = quantized_walk.Walk.begin(
    model,
    qstate,
    paths.calibration / 'quantized_trajectories',
    _walk_settings(model),
  )
  steps = walk.rows.t.tolist()

  def points(t: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    starts = (start for start, *_ in _batches(model, spool))
    return walk.points(steps.index(t), starts)

  found: list[Statistics] = []
  shares = processes.own(list(_batches(model, spool)))
  total = sum(count for _, count, _ in shares) * len(steps)
  with progress.progress('statistics', total, 'evaluation') as bar:
    for number, t in enumerate(steps):
      before = found[-1] if found else None
      for count, reused in walk.step(number, before, shares):
        bar.update(count, reused=reused)
      processes.wait_for_all('step')
      opened = list(points(t))  # Not in the threads that fit.
      there = functools.partial(lambda opened, t: iter(opened), opened)
      found.append(_fit([t], there, model))
  return _joined(found), points


def _walk_settings(model: setup.Model) -> dict[str, Any]:
  """What decides every number of the trajectories of `_fit_quantized`."""
  config = model.config
  collected = {
    **setup.plain(config.statistics),
    **collection_settings(config),
    'seed': config.seed,
    'microbatch': config.sample.microbatch,
  }
  return {**settings_of(model), 'statistics': collected}


def _joined(found: Sequence[Statistics]) -> Statistics:
  """Those of all steps, from those of each."""
  return Statistics(
    {
      kind: gaussian.ErrorModel.join([f.error_models[kind] for f in found])
      for kind in ('tensor', 'channel')
    },
    selection.HeldOut.join([f.held_out for f in found]),
  )
