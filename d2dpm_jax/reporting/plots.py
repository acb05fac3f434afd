"""Figures of what calibration found, made without a display."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import figure

from d2dpm_jax.quantization.reports import PHASES, UnitReport
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
  axes[0].invert_yaxis()
  axes[-1].legend(fontsize=8)
  return drawn
