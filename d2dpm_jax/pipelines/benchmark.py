"""`--mode benchmark`: measures `config.benchmark.what`, a report per name."""

from collections.abc import Callable

import ml_collections

from d2dpm_jax.pipelines import (
  correction_cost,
  cost,
  evaluation_timing,
  layer_speed,
  speed,
  throughput,
)
from d2dpm_jax.runtime import files

REPORTS: dict[
  str, Callable[[ml_collections.ConfigDict, files.Workdir], None]
] = {
  'cost': cost.report,
  'sampling': speed.report,
  'layers': layer_speed.report,
  'corrections': correction_cost.report,
  'evaluation': evaluation_timing.report,
  'job': throughput.report,
}


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Prints a table and writes it below benchmark/ of the work directory.

  Raises:
    ValueError: there is no such report.
  """
  check(config.benchmark)
  REPORTS[config.benchmark.what](config, files.Workdir.at(workdir))


def check(settings: ml_collections.ConfigDict) -> None:
  """Raises ValueError if there is no such report."""
  what = settings.what
  if what not in REPORTS:
    raise ValueError(
      f'benchmark.what is {what!r}; expected one of {list(REPORTS)}.'
    )
