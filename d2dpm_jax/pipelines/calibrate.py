"""`--mode calibrate`: quantizes the network and fits its error model."""

import logging
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from d2dpm_jax.pipelines import (
  artifacts,
  generation,
  layer_bits,
  quantize,
  setup,
  statistics,
  trajectories,
)
from d2dpm_jax.quantization import transform
from d2dpm_jax.runtime import files, processes, progress, weights

_log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Writes quantized/ and error_model_*.npz into the work directory."""
  paths = files.Workdir.at(workdir)
  model = setup.load(config, paths)
  calibrate(model, paths)
  _log.info('Wrote %s. Next: --mode sample', paths.quantized)


def calibrate(model: setup.Model, paths: files.Workdir) -> artifacts.Quantized:
  """The whole method: trajectories, quantizers, error statistics.

  Every phase keeps what it has finished in `paths.calibration`; the same call
  after an interruption goes on there. Processes of one run share the work, but
  for the quantizers, which the first one learns.

  Raises:
    ValueError: bad settings, `paths` holds a calibration made with others, or
      another process is at work there.
  """
  check(model)

  def begin() -> None:
    trajectories.claim(paths.calibration, settings(model))
    setup.begin(model.config, paths)

  with processes.claimed(paths.calibration):
    processes.from_first('begin', begin)
    return run_phases(model, paths, paths.trajectories)


def run_phases(
  model: setup.Model,
  paths: files.Workdir,
  spool_at: pathlib.Path,
  qstate: transform.QuantState | None = None,
) -> artifacts.Quantized:
  """The phases of `calibrate`, in a work directory that is claimed.

  Args:
    model: what to quantize.
    paths: where everything but the trajectories goes.
    spool_at: directory of the trajectories; calibrations can share one.
    qstate: quantizers, if there are some: then only errors are fitted.
  """
  config = model.config
  times = progress.Times()
  with times.phase('trajectories'):
    spool = trajectories.collect(
      model,
      statistics.num_trajectories(config),
      config.calibration.batch_size,
      config.sample.microbatch,
      spool_at,
      config.calibration.balanced_labels,
    )
  if qstate is None:
    with times.phase('quantization'):
      qstate = _quantizers(model, spool, paths)
  with times.phase('statistics'):
    errors = statistics.fit_errors(model, qstate, spool, paths)
  quantized = artifacts.Quantized(model, qstate, *errors)
  if processes.is_first():
    artifacts.save(quantized, paths)
    artifacts.log_sizes(quantized)
  for line in times.lines():
    _log.info(line)
  return quantized


def _quantizers(
  model: setup.Model, spool: trajectories.Trajectories, paths: files.Workdir
) -> transform.QuantState:
  """What the first process learns, on the host; the others read it."""
  several = processes.count() > 1
  if processes.is_first():
    # Off the device that learned it: sampling runs on all of them.
    qstate = jax.device_get(quantize.quantize(model, spool, paths))
    qstate = transform.pack_state(qstate)
    if several:
      tree = transform.state_to_arrays(qstate)
      # Orbax takes '/' in a name for a folder.
      tree = {path.replace('/', '.'): sides for path, sides in tree.items()}
      weights.save_tree(paths.handed_over, jax.device_get(tree), {})
  processes.wait_for_all('quantizers')
  if processes.is_first():
    return qstate
  tree, _ = weights.load_tree(paths.handed_over)
  qstate = transform.state_from_arrays(
    {path.replace('.', '/'): sides for path, sides in tree.items()}
  )
  return jax.tree.map(np.asarray, qstate)


def check(model: setup.Model) -> None:
  """Raises ValueError for bad settings, before anything is written."""
  config = model.config
  counts = {
    'calibration': ('num_samples', 'batch_size'),
    'statistics': ('num_samples',),
    'sample': ('microbatch',),
  }
  for group, names in counts.items():
    for name in names:
      if config[group][name] < 1:
        raise ValueError(
          f'{group}.{name} is {config[group][name]}; expected >= 1.'
        )
  if config.calibration.timesteps not in trajectories.DISTRIBUTIONS:
    raise ValueError(
      f'calibration.timesteps {config.calibration.timesteps!r}: expected one '
      f'of {list(trajectories.DISTRIBUTIONS)}.'
    )
  if not config.statistics.outlier_std > 0:
    raise ValueError(
      f'statistics.outlier_std is {config.statistics.outlier_std}; expected '
      '> 0.'
    )
  generation.check_execution(config.quant.execution)
  generation.float_type(config.quant.float_dtype)
  statistics.check(config)
  generation.rows_of(model.ldm, model.sampler)
  quantize.reconstruction_settings(config.quant)
  layer_bits.layer_policy(model)
  layer_bits.check_block_types(model)


# Of quant.reconstruction: where it is computed, which changes nothing else.
_PLACE = ('host_streams', 'devices', 'chunk')


def settings(model: setup.Model) -> dict[str, Any]:
  """Everything that the arrays of a calibration depend on."""
  names = ('seed', 'sampler', 'quant', 'calibration', 'statistics')
  groups = {name: setup.plain(model.config[name]) for name in names}
  for name in _PLACE:
    del groups['quant']['reconstruction'][name]
  for name in ('execution', 'kernels', 'unpack_first'):  # The same numbers.
    del groups['quant'][name]
  return {
    **artifacts.structure(model),
    **groups,
    'microbatch': model.config.sample.microbatch,
    'dtype': model.config.model.dtype,
  }
