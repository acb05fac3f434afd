"""What of `auto` helps over whole trajectories: tried before it is kept."""

import dataclasses
import logging

import numpy as np

from d2dpm_jax.denoising import correction as corrections
from d2dpm_jax.denoising import selection
from d2dpm_jax.pipelines import generation, setup, trajectories
from d2dpm_jax.quantization import transform
from d2dpm_jax.runtime import devices, processes, progress

_log = logging.getLogger(__name__)


def settle(
  model: setup.Model,
  qstate: transform.QuantState,
  spool: trajectories.Trajectories,
  held_out: selection.HeldOut,
) -> selection.HeldOut:
  """`selection.settle` on the last trajectories of the spool.

  The quantized network samples from their noise and labels, corrected by each
  selection in turn. With several processes the first one does it.

  Args:
    model: whose `config.statistics.num_trials` says how many; with 0 nothing
      is tried.
    qstate: quantizers.
    spool: with `num_trials` trajectories that nothing was fitted to at its end.
    held_out: what may be chosen.
  """
  if not model.config.statistics.num_trials:
    return held_out

  def trial() -> list[list[int]]:
    found, distances = _run(model, qstate, spool, held_out)
    _log.info(
      'Distance of latents to full precision after all steps in dB, mean of %d '
      'images, with auto allowed to use\n%s',
      model.config.statistics.num_trials,
      '\n'.join(f'  {name:12} {x:.2f}' for name, x in distances.items()),
    )
    return found.allowed.tolist()

  allowed = np.array(processes.from_first('trial', trial))
  return dataclasses.replace(held_out, allowed=allowed)


def _run(
  model: setup.Model,
  qstate: transform.QuantState,
  spool: trajectories.Trajectories,
  held_out: selection.HeldOut,
) -> tuple[selection.HeldOut, dict[str, float]]:
  config = model.config
  microbatch = config.sample.microbatch
  key = trajectories.noise_key(config.seed)
  index, labels, wanted = _full_precision(model, spool)
  program = generation.sample_program(
    model.ldm, model.sampler, 'auto', microbatch
  )
  state = generation.executable(qstate, config.quant.execution)
  params = generation.network_params(
    model.params, state, config.quant.float_dtype
  )
  inputs = devices.replicate(
    generation.Inputs(params, state, None, key, model.sampler.scale)
  )
  timesteps = generation.rows_of(model.ldm, model.sampler).t
  total = len(index) * len(selection.restricted(held_out))
  with progress.progress('trial', total, 'image') as bar:

    def distance(selected: selection.HeldOut) -> float:
      rows = corrections.correction_rows(selected, 'auto', timesteps)
      launched = program.launch(
        inputs._replace(correction_rows=devices.replicate(rows)),
        index,
        labels,
        room=config.calibration.batch_size,
      )
      latents = launched.fetch('latents')['latents']
      bar.update(len(index))
      return decibels(latents, wanted)

    return selection.settle(held_out, distance)


def decibels(latents: np.ndarray, wanted: np.ndarray) -> float:
  """Mean over images of 10 log10 of their mean squared distance.

  Not of the distance of all: a few images that turn into something else would
  decide that alone.

  Args:
    latents: float[N, h, w, c].
    wanted: float[N, h, w, c].
  """
  square = np.square(np.float64(latents) - np.float64(wanted))
  by_image = square.mean(axis=(1, 2, 3))
  tiny = np.finfo(np.float32).eps ** 2  # Equal but for rounding.
  return float(10 * np.log10(np.maximum(by_image, tiny)).mean())


def _full_precision(
  model: setup.Model, spool: trajectories.Trajectories
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Numbers int32[N], labels int32[N] and latents of the trial's images.

  Trajectories end with what the last step got; that step is taken here.
  """
  microbatch = model.config.sample.microbatch
  rows = generation.rows_of(model.ldm, model.sampler)
  advance = generation.advance_program(
    model.ldm, model.sampler, 'none', microbatch
  )
  key = trajectories.noise_key(model.config.seed)
  inputs = devices.replicate(generation.Inputs({}, {}, None, key, None))
  step = generation.step_inputs(inputs, rows, len(rows.t) - 1)
  count = model.config.statistics.num_trials
  batches = [(start, spool.batch(start)) for start in spool.starts]
  index = np.concatenate([start + np.arange(len(b.x)) for start, b in batches])
  index = index[-count:].astype(np.int32)
  labels = np.concatenate([batch.labels for _, batch in batches])[-count:]
  x, eps = (
    np.concatenate([getattr(b, name)[:, -1] for _, b in batches])[-count:]
    for name in ('x', 'eps')
  )
  return index, labels, advance(step, index, x, eps)
