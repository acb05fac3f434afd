"""Sections of the report on the quantized network: errors, units, layers."""

import json
import pathlib
from typing import Any

import numpy as np

from d2dpm_jax.denoising import gaussian, selection
from d2dpm_jax.reporting import page
from d2dpm_jax.reporting.contents import Contents, Section
from d2dpm_jax.runtime import files

_PHASES = {'weight': 'weights', 'act': 'layer inputs'}


def errors(work: Contents) -> Section | None:
  """Statistics of the error by timestep."""
  paths = work.paths
  captions = {
    paths.error_plot: (
      'The error Δ of the quantized network by timestep: moments, correlation '
      'with its estimate, and what corrections predict of it on held-out '
      'images.'
    ),
    paths.error_left_plot: 'What corrections leave of the error.',
    paths.error_joint_plot: 'Estimates and errors, with the Gaussian fitted.',
  }
  figures = [
    page.figure(path, text) for path, text in captions.items() if path.is_file()
  ]
  made = []
  if paths.error_model('tensor').is_file():
    model = gaussian.ErrorModel.load(paths.error_model('tensor'))
    header = ['timestep', 'mean Δ', 'std Δ', 'ρ(ε_q, Δ)', 'std ε_q']
    columns = [
      model.mean_d, np.sqrt(model.var_d), model.rho, np.sqrt(model.var_q)
    ]  # fmt: skip
    rows = [
      [str(t), *(f'{column[i]:.5f}' for column in columns)]
      for i, t in enumerate(model.timesteps.tolist())
    ]
    if paths.held_out.is_file():
      held = selection.HeldOut.load(paths.held_out)
      header += ['auto chose', 'predicted, held out']
      for row, i in zip(rows, held.rows_of(model.timesteps), strict=True):
        chosen = held.choice()[i]
        row += [selection.CANDIDATES[chosen], f'{held.r2[i, chosen]:.1%}']
    made.append(page.Table(header, rows, 'Numbers by timestep', True))
  if not figures and not made:
    return None
  return {'figures': figures, 'tables': made}


def units(work: Contents) -> Section | None:
  """How reconstruction fared, unit by unit."""
  if not work.paths.unit_summary.is_file():
    return None
  summary = files.read_json(work.paths.unit_summary)
  noise = ', '.join(
    f'{db:.2f} dB after {name}'
    for phase, name in _PHASES.items()
    if (db := summary['snr_db'].get(phase)) is not None
  )
  texts = [
    f"{summary['units']} units. Signal-to-noise ratio of the network's output "
    f'over the calibration set: {noise}.'
  ]
  if worse := summary['not_improved']:
    texts.append(f'Learning did not improve {len(worse)}: {", ".join(worse)}.')
  made = []
  lines = work.paths.calibration / 'metrics.jsonl'
  if lines.is_file():
    made.append(_unit_table(lines))
  drawn = []
  if work.paths.unit_plot.is_file():
    drawn.append(
      page.figure(work.paths.unit_plot, 'Loss of every unit over its signal.')
    )
  return {'texts': texts, 'tables': made, 'figures': drawn}


def _unit_table(path: pathlib.Path) -> page.Table:
  """A row per unit: both phases."""
  units: dict[str, dict[str, Any]] = {}
  for line in path.read_text().splitlines():
    try:
      row = json.loads(line)
      phase, _, unit = row['unit'].partition('/')
    except (ValueError, KeyError, TypeError):
      continue  # A run that was killed may have ended in mid-line.
    units.setdefault(unit, {})[phase] = row
  header = ['unit']
  for name in _PHASES.values():
    header += [f'{name}: before', 'after', 's']
  rows = []
  for unit, phases in units.items():
    cells = [unit]
    for phase in _PHASES:
      row = phases.get(phase)
      if row is None:
        cells += ['', '', '']
        continue
      signal = row['signal'] or 1.0
      before, after = (row[f'loss_{k}'] / signal for k in ('before', 'after'))
      note = '' if row['learned'] else ' (not learned)'
      if row['kept_initial']:
        note = ' (kept)'
      cells += [f'{before:.2e}', f'{after:.2e}{note}', f'{row["seconds"]:.1f}']
    rows.append(cells)
  caption = 'Loss over signal, before and after learning'
  return page.Table(header, rows, caption, len(rows) > page.FOLD)


def layers(work: Contents) -> Section | None:
  """Bits and sizes, of all and of each layer."""
  if work.costs is None or not (name := work.bits):
    return None
  full, own = work.costs['settings']['FP32'], work.costs['settings'][name]
  kinds = {
    'U-Net, MiB': ('unet_bytes', 2**20),
    'all of the model, MiB': ('model_bytes', 2**20),
    'quantized layers, TBOPs': ('quantized_bops', 1e12),
    'all layers, TBOPs': ('layer_bops', 1e12),
    'network, TBOPs': ('network_bops', 1e12),
  }
  totals = [
    [text, *(f'{one[key] / unit:.4g}' for one in (full, own))]
    + [f'{full[key] / own[key]:.2f}']
    for text, (key, unit) in kinds.items()
  ]
  rows = []
  for layer in work.costs['layers']:
    here, before = layer['settings'][name], layer['settings']['FP32']
    rows.append(
      [
        layer['path'],
        layer['kind'],
        'x'.join(map(str, layer['kernel_shape'])),
        f'{here["w"] or "float"} / {here["a"] or "float"}',
        f'{before["bytes"] / 1024:.1f}',
        f'{here["bytes"] / 1024:.1f}',
        f'{layer["macs"] / 1e6:.2f}',
      ]
    )
  network = work.costs['network']
  header = [
    'layer', 'kind', 'kernel', 'bits, weight / input', 'KiB, FP32',
    f'KiB, {name}', 'million products',
  ]  # fmt: skip
  return {
    'texts': [
      f'{network["quantized_layers"]} layers are quantized, '
      f'{network["float_layers"]} are left in floating point. Bit operations '
      'are those of one forward of one image.'
    ],
    'tables': [
      page.Table(['', 'FP32', name, 'times less'], totals),
      page.Table(header, rows, 'Layers', len(rows) > page.FOLD),
    ],
  }
