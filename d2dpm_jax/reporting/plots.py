"""Figures of what calibration and experiments found, without a display."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure

from d2dpm_jax.quantization.reports import PHASES, UnitReport
from d2dpm_jax.reporting import tables
from d2dpm_jax.runtime import files

_TITLES = {
  'weight': 'weights: nearest rounding → learned',
  'act': 'layer inputs: searched ranges → learned steps',
}
_BEFORE, _AFTER = '#9aa5b1', '#0b69a3'


def save(drawn: figure.Figure, path: pathlib.Path) -> None:
  """Writes a .png."""
  with files.atomic_write(path) as file:
    drawn.savefig(file, format='png', dpi=110, bbox_inches='tight')


def units(
  reports: Sequence[UnitReport], snr_db: Mapping[str, float]
) -> figure.Figure:
  """Loss of every unit over its signal, before and after learning.

  Args:
    reports: of all units and phases, in order.
    snr_db: of the network's output after each phase.
  """
  phases = [phase for phase in PHASES if any(r.phase == phase for r in reports)]
  names = list(dict.fromkeys(r.unit.path for r in reports))
  drawn = figure.Figure(figsize=(4 + 4 * len(phases), 1.5 + 0.17 * len(names)))
  axes = drawn.subplots(1, len(phases), sharey=True, squeeze=False)[0]
  for ax, phase in zip(axes, phases, strict=True):
    chosen = [r for r in reports if r.phase == phase and r.signal > 0]
    rows = np.array([names.index(r.unit.path) for r in chosen])
    before = np.array([r.loss_before / r.signal for r in chosen])
    after = np.array([r.loss_after / r.signal for r in chosen])
    ax.hlines(rows, after, before, color=_BEFORE, linewidth=1.5)
    ax.plot(before, rows, 'o', color=_BEFORE, markersize=4, label='before')
    ax.plot(after, rows, 'o', color=_AFTER, markersize=4, label='after')
    ax.set_xscale('log')
    ax.set_xlabel('loss / signal')
    noise = snr_db.get(phase)
    extra = '' if noise is None else f'\noutput SNR {noise:.1f} dB'
    ax.set_title(_TITLES[phase] + extra, fontsize=10)
    ax.grid(axis='x', alpha=0.3)
  axes[0].set_yticks(range(len(names)), names, fontsize=7)
  axes[0].set_ylim(len(names) - 0.3, -0.7)
  axes[-1].legend(fontsize=8)
  return drawn


# What an experiment's figure shows, a row of axes each.
_SHOWN = ('fid', 'psnr')
_KINDS = {'': '#52606d', 'tensor': '#0b69a3', 'channel': '#de911d'}


def experiment(results: Mapping[str, Any]) -> figure.Figure:
  """FID and PSNR of every correction: mean and spread over seeds.

  Args:
    results: of `tables.aggregate`.
  """
  groups = list(tables.groups(results))
  drawn = figure.Figure(figsize=(1.5 + 3.2 * len(groups), 5.5))
  grid = drawn.subplots(len(_SHOWN), len(groups), sharex='col', squeeze=False)
  for column, (sampler, quantizer, bits, rows) in enumerate(groups):
    for line, name in enumerate(_SHOWN):
      ax = grid[line, column]
      _corrections(ax, rows, name)
      if not column:
        ax.set_ylabel(f'{tables.COLUMNS[name].name} ± std')
    grid[0, column].set_title(f'{sampler}\n{bits}, {quantizer}', fontsize=10)
    grid[-1, column].tick_params(axis='x', rotation=60)
  grid[0, -1].legend(fontsize=7)
  drawn.suptitle(
    f'{results["num_images"]} images per seed, {len(results["seeds"])} seed(s)',
    fontsize=10,
  )
  drawn.tight_layout()
  return drawn


def _corrections(
  ax: mpl_axes.Axes, rows: Sequence[Mapping[str, Any]], name: str
) -> None:
  """One value of a table, full precision as a line."""
  plain, *quantized = rows
  places = list(dict.fromkeys(row['correction'] for row in quantized))
  value = plain['values'].get(name)
  if value and value['mean'] is not None:
    ax.axhline(
      value['mean'], color='black', linewidth=1, label='full precision'
    )
    spread = value['std'] or 0.0
    band = (value['mean'] - spread, value['mean'] + spread)
    ax.axhspan(*band, color='black', alpha=0.1, linewidth=0)
  for kind, colour in _KINDS.items():
    chosen = [
      (places.index(row['correction']), row['values'][name])
      for row in quantized
      if row['statistics'] == kind and row['values'][name]['mean'] is not None
    ]
    if not chosen:
      continue
    shift = {'tensor': -0.12, 'channel': 0.12}.get(kind, 0.0)
    ax.errorbar(
      [place + shift for place, _ in chosen],
      [value['mean'] for _, value in chosen],
      [value['std'] or 0.0 for _, value in chosen],
      fmt='o',
      markersize=4,
      capsize=3,
      color=colour,
      label=kind or None,
    )
  ax.set_xticks(range(len(places)), places, fontsize=8)
  ax.set_xlim(-0.5, len(places) - 0.5)
  ax.grid(axis='y', alpha=0.3)
