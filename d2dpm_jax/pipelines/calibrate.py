"""`--mode calibrate`: quantizes the network and fits its error model."""

import logging
import pathlib
from typing import Any

import jax
import ml_collections

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
from d2dpm_jax.runtime import files, progress

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
  after an interruption goes on there.

  Raises:
    ValueError: bad settings, `paths` holds a calibration made with others, or
      another process is at work there.
  """
  check(model)
  with files.claimed(paths.calibration):
    trajectories.claim(paths.calibration, settings(model))
    setup.begin(model.config, paths)
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
      max(config.calibration.num_samples, config.statistics.num_samples),
      config.calibration.batch_size,
      config.sample.microbatch,
      spool_at,
      config.calibration.balanced_labels,
    )
  if qstate is None:
    with times.phase('quantization'):
      # Off the device that learned it: sampling runs on all of them.
      qstate = jax.device_get(quantize.quantize(model, spool, paths))
      qstate = transform.pack_state(qstate)
  with times.phase('statistics'):
    errors = statistics.fit_errors(model, qstate, spool, paths)
  quantized = artifacts.Quantized(model, qstate, *errors)
  artifacts.save(quantized, paths)
  artifacts.log_sizes(quantized)
  for line in times.lines():
    _log.info(line)
  return quantized


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
