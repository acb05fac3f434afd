"""`--mode calibrate`: quantizes the network and fits its error model."""

import logging
import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2dpm_jax.pipelines import (
  artifacts,
  generation,
  setup,
  statistics,
  trajectories,
)
from d2dpm_jax.quantization import adaround, policy, reconstruction, transform
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
    ValueError: bad settings, or `paths` holds a calibration made with others.
  """
  config = model.config
  _check(model)
  trajectories.claim(paths.calibration, _settings(model))
  setup.begin(config, paths)
  times: dict[str, float] = {}
  with progress.timed(times, 'trajectories'):
    spool = trajectories.collect(
      model,
      max(config.calibration.num_samples, config.statistics.num_samples),
      config.calibration.batch_size,
      config.sample.microbatch,
      paths.trajectories,
    )
  with progress.timed(times, 'quantization'):
    # Off the device that learned it: sampling runs on all of them.
    qstate = jax.device_get(quantize(model, spool, paths))
  with progress.timed(times, 'statistics'):
    error_models = statistics.fit_errors(model, qstate, spool, paths)
  quantized = artifacts.Quantized(model, qstate, error_models)
  artifacts.save(quantized, paths)
  for name, seconds in times.items():
    _log.info('%-13s %7.1f s', name, seconds)
  return quantized


def _check(model: setup.Model) -> None:
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
  generation.rows_of(model.ldm, model.sampler)
  reconstruction_settings(config.quant)
  layer_policy(model)


def _settings(model: setup.Model) -> dict[str, Any]:
  """Everything that the arrays of a calibration depend on."""
  names = ('seed', 'sampler', 'quant', 'calibration', 'statistics')
  return {
    **artifacts.structure(model),
    **{name: setup.plain(model.config[name]) for name in names},
    'microbatch': model.config.sample.microbatch,
  }


def layer_policy(
  model: setup.Model,
) -> tuple[policy.Policy, tuple[transform.Layer, ...]]:
  """Bits of every layer of the U-Net, see `config.quant`, and the layers."""
  layers = list_layers(model)
  return policy.build_policy(layers, policy_rules(model.config.quant)), layers


def policy_rules(quant: ml_collections.ConfigDict) -> list[policy.Rule]:
  """Rules that `config.quant` describes; an empty regex is none."""
  edge = dict(w=quant.edge_bits, a=quant.edge_bits, reconstruct=False)
  rules: list[policy.Rule] = [
    (quant.edge_layers, edge),
    (quant.float_layers, None),
    ('.*', dict(w=quant.weight_bits, a=quant.act_bits)),
  ]
  return [rule for rule in rules if rule[0]]


def list_layers(model: setup.Model) -> tuple[transform.Layer, ...]:
  """Layers of the U-Net for one image; the model may be an outline."""
  return transform.list_layers(model.ldm.unet.apply, *example_arguments(model))


def example_arguments(model: setup.Model) -> tuple[Any, ...]:
  """Variables and inputs of the U-Net for one image."""
  context = None
  if model.ldm.cond_stage is not None:
    context = np.zeros([1, 1, model.ldm.cond_stage.embed_dim], np.float32)
  x = np.zeros([1, *model.ldm.latent_shape], np.float32)
  variables = {'params': model.params['unet']}
  return variables, x, np.zeros([1], np.int32), context


def quantize(
  model: setup.Model, spool: trajectories.Trajectories, paths: files.Workdir
) -> transform.QuantState:
  """Ranges, rounding and step sizes of the U-Net, unit by unit.

  A unit is stored when it is done; units that are there are taken over.
  """
  config = model.config
  table, layers = layer_policy(model)
  _write_table(paths.layer_table, policy.format_policy(table, layers))
  timesteps = generation.rows_of(model.ldm, model.sampler).t
  x, t, labels = trajectories.network_inputs(
    spool,
    config.calibration.num_samples,
    model,
    timesteps,
    config.seed,
    config.calibration.timesteps,
  )
  context: tuple[np.ndarray, ...] = ()
  if model.ldm.cond_stage is not None:
    context = (
      np.asarray(model.ldm.context(model.params, jnp.asarray(labels))),
    )
  variables = {'params': model.params['unet']}
  inputs = (x, t, *context)
  block_types = tuple(config.quant.block_types)
  units = reconstruction.list_units(
    model.ldm.unet.apply, variables, table, inputs, block_types=block_types
  )
  directory = paths.calibration / 'units'
  total = len(reconstruction.PHASES) * len(units)
  with progress.progress('quantization', total, 'unit') as bar:

    def on_unit_done(name: str, arrays: reconstruction.UnitState) -> None:
      with files.atomic_write(_unit_path(directory, name)) as file:
        np.savez(file, **arrays)
      before, after = arrays['report:loss_before'], arrays['report:loss_after']
      bar.update(1, f'{name}: loss {before:.3g} -> {after:.3g}')

    resume = _stored_units(directory, [unit.path for unit in units])
    bar.update(len(resume), reused=True)
    qstate, reports = reconstruction.reconstruct(
      model.ldm.unet.apply,
      variables,
      table,
      inputs,
      key=jax.random.key(config.seed),
      settings=reconstruction_settings(config.quant),
      block_types=block_types,
      on_unit_done=on_unit_done,
      resume=resume,
    )
  _write_table(paths.unit_table, reconstruction.format_reports(reports))
  return qstate


def _write_table(path: pathlib.Path, text: str) -> None:
  """Keeps a long table in a file; shows its last line and where it is."""
  with files.atomic_write(path, 'w') as file:
    file.write(f'{text}\n')
  _log.info('%s (all of it: %s)', text.splitlines()[-1], path)


def reconstruction_settings(
  quant: ml_collections.ConfigDict,
) -> adaround.Settings:
  return adaround.Settings(
    weight_range=quant.weight_range,
    act_range=quant.act_range,
    per_channel=quant.per_channel,
    **setup.plain(quant.reconstruction),
  )


def _unit_path(directory: pathlib.Path, name: str) -> pathlib.Path:
  return directory / f'{name.replace("/", ".")}.npz'


def _stored_units(
  directory: pathlib.Path, unit_paths: list[str]
) -> dict[str, dict[str, np.ndarray]]:
  """Units that an earlier run finished; a damaged file is left out."""
  found = {}
  for phase in reconstruction.PHASES:
    for unit in unit_paths:
      name = f'{phase}/{unit}'
      path = _unit_path(directory, name)
      if not path.is_file():
        continue
      try:
        with np.load(path, allow_pickle=False) as file:
          found[name] = dict(file.items())
      except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        _log.warning('%s is damaged (%s); it is made again.', path, error)
  return found
