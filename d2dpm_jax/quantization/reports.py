"""What reconstruction says about its units, and tables of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from d2dpm_jax.quantization.policy import format_table
from d2dpm_jax.quantization.units import Unit

PHASES = ('weight', 'act')


@dataclasses.dataclass(frozen=True)
class UnitReport:
  """How one unit fared in one phase.

  Losses are over the whole calibration set, in the norm of the phase.

  Attributes:
    unit: which.
    phase: 'weight' or 'act'.
    loss_before: of nearest rounding, or of the searched ranges.
    loss_after: of what the unit ended with.
    signal: the same norm of the full-precision output, to compare with.
    flipped: share of the learned weights not rounded to nearest; 0 for 'act'.
    learned: whether there was anything to learn, and any iterations.
    kept_initial: learning made it worse and was thrown away.
    seconds: time it took, waiting for programs included.
    ms_per_iteration: of learning, without the first iterations and with them
      compilation; 0 if there were too few to tell.
  """

  unit: Unit
  phase: str
  loss_before: float
  loss_after: float
  signal: float
  flipped: float
  learned: bool
  kept_initial: bool
  seconds: float
  ms_per_iteration: float = 0.0

  @property
  def name(self) -> str:
    return f'{self.phase}/{self.unit.path}'

  @property
  def improved(self) -> bool:
    """Learning lowered the loss, or there was nothing to learn or to lower."""
    return (
      not self.learned
      or self.loss_after < self.loss_before
      or (self.loss_before == 0)
    )


REPORT_FIELDS = tuple(
  f.name
  for f in dataclasses.fields(UnitReport)
  if f.name not in ('unit', 'phase')
)


def format_reports(
  reports: Sequence[UnitReport], snr_db: Mapping[str, float]
) -> str:
  """Table of the units: losses before and after, flips, time; a summary.

  Args:
    reports: of all units and phases.
    snr_db: signal-to-noise ratio of the network's output after each phase.
  """
  rows: list[tuple[str, ...]] = [
    ('phase', 'unit', 'kind', 'layers', 'before', 'after', 'after/signal')
    + ('flipped', 'seconds', 'ms/iter', 'note')
  ]
  for r in reports:
    relative = r.loss_after / r.signal if r.signal else 0.0
    rows.append(
      (
        r.phase,
        r.unit.path,
        r.unit.kind,
        str(len(r.unit.layers)),
        f'{r.loss_before:.4g}',
        f'{r.loss_after:.4g}',
        f'{relative:.2e}',
        f'{r.flipped:.1%}' if r.phase == 'weight' else '',
        f'{r.seconds:.1f}',
        f'{r.ms_per_iteration:.2f}' if r.ms_per_iteration else '',
        _note(r),
      )
    )
  return f'{format_table(rows)}\n{_summary(reports, snr_db)}'


def _note(report: UnitReport) -> str:
  if not report.learned:
    return 'not learned'
  if report.kept_initial:
    return 'kept initial'
  return '' if report.improved else 'not improved'


def _summary(reports: Sequence[UnitReport], snr_db: Mapping[str, float]) -> str:
  """How much learning lowered the losses, and the output's SNR, in one line."""
  parts = []
  for phase in PHASES:
    ratios = [
      r.loss_after / r.loss_before
      for r in reports
      if r.phase == phase and r.learned and r.loss_before > 0
    ]
    if ratios:
      mean = float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-12)))))
      parts.append(f'{phase} loss {mean:.2f} times that before')
  units = len({r.unit.path for r in reports})
  noise = ', '.join(
    f'{db:.2f} dB after {phase}' for phase, db in snr_db.items()
  )
  return (
    f'{units} units: {", ".join(parts) or "nothing was learned"}. '
    f'SNR of the output: {noise}.'
  )
