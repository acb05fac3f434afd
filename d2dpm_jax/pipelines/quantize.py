"""Calibration's middle phase: quantizers of the U-Net, unit by unit."""

import dataclasses
import logging
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2dpm_jax.pipelines import generation, layer_bits, setup, trajectories
from d2dpm_jax.quantization import (
  adaround,
  memory,
  policy,
  reconstruction,
  reports,
  stored_units,
  transform,
)
from d2dpm_jax.reporting import plots
from d2dpm_jax.runtime import files, metrics, progress

_log = logging.getLogger(__name__)
_SHARE = 0.9  # Of a device's memory, to be filled at most.


def quantize(
  model: setup.Model, spool: trajectories.Trajectories, paths: files.Workdir
) -> transform.QuantState:
  """Ranges, rounding and step sizes of the U-Net.

  A unit is stored when it is done; units that are there are taken over.
  Tables, a plot and metrics of the units are written beside them.

  Raises:
    ValueError: the calibration set does not fit into memory.
  """
  config = model.config
  table, found = layer_bits.layer_policy(model)
  _write_table(paths.layer_table, policy.format_policy(table, found))
  variables = {'params': model.params['unet']}
  inputs = calibration_inputs(model, spool)
  block_types = tuple(config.quant.block_types)
  settings = plan_memory(
    model.ldm.unet.apply,
    variables,
    table,
    inputs,
    reconstruction_settings(config.quant),
    block_types,
  )
  units = reconstruction.list_units(
    model.ldm.unet.apply, variables, table, inputs, block_types=block_types
  )
  names = stored_units.names(units, reconstruction.PHASES)
  directory = paths.calibration / 'units'
  with (
    progress.progress('quantization', len(names), 'unit') as bar,
    metrics.writer(paths.calibration) as write,
  ):

    def on_unit_done(name: str, arrays: stored_units.Arrays) -> None:
      with files.checked_write(_unit_path(directory, name)) as file:
        np.savez(file, **arrays)
      facts = {k: arrays[f'report:{k}'].item() for k in reports.REPORT_FIELDS}
      write(names.index(name), {'unit': name, **facts})
      before, after = facts['loss_before'], facts['loss_after']
      bar.update(1, f'{name}: loss {before:.3g} -> {after:.3g}')

    resume = _stored(directory, names)
    bar.update(len(resume), reused=True)
    result = reconstruction.reconstruct(
      model.ldm.unet.apply,
      variables,
      table,
      inputs,
      key=jax.random.key(config.seed),
      settings=settings,
      block_types=block_types,
      on_unit_done=on_unit_done,
      resume=resume,
    )
  report(result, paths)
  return result.state


def calibration_inputs(
  model: setup.Model, spool: trajectories.Trajectories
) -> tuple[np.ndarray, ...]:
  """The calibration set: x, t and, of a conditional model, the context."""
  calibration = model.config.calibration
  x, t, labels = trajectories.network_inputs(
    spool,
    calibration.num_samples,
    model,
    generation.rows_of(model.ldm, model.sampler).t,
    model.config.seed,
    calibration.timesteps,
  )
  if model.ldm.cond_stage is None:
    return x, t
  context = model.ldm.context(model.params, jnp.asarray(labels))
  return x, t, np.asarray(context)


def reconstruction_settings(
  quant: ml_collections.ConfigDict,
) -> adaround.Settings:
  return adaround.Settings(
    weight_range=quant.weight_range,
    act_range=quant.act_range,
    per_channel=quant.per_channel,
    **setup.plain(quant.reconstruction),
  )


def plan_memory(
  apply: Any,
  variables: Any,
  table: policy.Policy,
  inputs: tuple[Any, ...],
  settings: adaround.Settings,
  block_types: tuple[str, ...],
) -> adaround.Settings:
  """Logs what reconstruction needs; says where the activations are kept.

  Raises:
    ValueError: it does not fit, whatever is done.
  """
  need = memory.predict(apply, variables, table, inputs, settings, block_types)
  devices = reconstruction.streams_of(len(inputs[0]), settings).num_devices
  free, where = device_memory()
  on_host = settings.host_streams
  if on_host is None:
    on_host = need.on_device(False, devices) > _SHARE * free
    # Where the device is the host, there is nowhere else to keep them.
    on_host = on_host and where != 'host'
  on_device = need.on_device(on_host, devices)
  _log.info(
    'Memory: activations of the calibration set take up to %.2f GB (%s), '
    '%.2f GB in all on each of %d device(s), which has %.1f GB',
    need.streams / 1e9,
    'in host memory' if on_host else 'on the device',
    on_device / 1e9,
    devices,
    free / 1e9,
  )
  problem = ''
  if on_device > free:
    problem = f'{on_device / 1e9:.1f} GB of {free / 1e9:.1f} GB on a device'
  elif on_host and need.streams > (total := host_memory()):
    problem = (
      f'{need.streams / 1e9:.1f} of the {total / 1e9:.1f} GB of the host'
    )
  if problem:
    raise ValueError(
      f'Calibration needs {problem}: lower '
      f'--config.calibration.num_samples, which is {len(inputs[0])}.'
    )
  return dataclasses.replace(settings, host_streams=on_host)


def device_memory() -> tuple[float, str]:
  """Bytes of a device's memory, and 'device' or 'host'."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return float(stats['bytes_limit']), 'device'
  return host_memory(), 'host'


def host_memory() -> float:
  """Bytes; infinite where the system does not tell."""
  try:
    return float(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
  except (AttributeError, ValueError, OSError):
    return float('inf')


def _write_table(path: pathlib.Path, text: str) -> None:
  """Keeps a long table in a file; shows its last line and where it is."""
  with files.atomic_write(path, 'w') as file:
    file.write(f'{text}\n')
  _log.info('%s (all of it: %s)', text.splitlines()[-1], path)


def report(result: reconstruction.Result, paths: files.Workdir) -> None:
  """Table, plot and summary of all units; warns of those not improved."""
  text = reconstruction.format_reports(result.reports, result.snr_db)
  _write_table(paths.unit_table, text)
  plots.save(plots.units(result.reports, result.snr_db), paths.unit_plot)
  worse = [r.name for r in result.reports if not r.improved]
  if worse:
    _log.warning(
      'Learning did not improve %d unit(s) on nearest rounding or searched '
      'ranges: %s (all of them: %s)',
      len(worse),
      ', '.join(worse[:5]),
      paths.unit_summary,
    )
  metrics.rewrite(paths.calibration, map(_row, result.reports))
  summary = {
    'snr_db': metrics.finite(result.snr_db),
    'not_improved': worse,
    'units': len(result.reports) // len(reconstruction.PHASES),
  }
  files.write_json(paths.unit_summary, summary)


def _row(report: reports.UnitReport) -> dict[str, Any]:
  facts = {name: getattr(report, name) for name in reports.REPORT_FIELDS}
  return {'unit': report.name, **facts}


def _unit_path(directory: pathlib.Path, name: str) -> pathlib.Path:
  return directory / f'{name.replace("/", ".")}.npz'


def _stored(
  directory: pathlib.Path, names: list[str]
) -> dict[str, dict[str, np.ndarray]]:
  """Units that an earlier run finished; a damaged file is left out."""
  found = {}
  for name in names:
    path = _unit_path(directory, name)
    if not path.is_file():
      continue
    if not files.is_intact(path):
      _log.warning('%s is damaged; it is made again.', path)
      continue
    with np.load(path, allow_pickle=False) as file:
      found[name] = dict(file.items())
  return found
