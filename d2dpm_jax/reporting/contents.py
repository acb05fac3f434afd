"""What is in a work directory, read once for all sections of its report."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from d2dpm_jax.reporting import comparison, page
from d2dpm_jax.runtime import files

# Parts of a section by name, as the template takes them; None is left out.
Section = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Contents:
  """A work directory with what the report tells of it.

  Attributes:
    paths: of its files.
    config: of the last run that wrote one; empty without.
    history: its runs in the order of time.
    quant: settings of the calibration that is there, if one is.
    costs: sizes of the calibrated network, as of `benchmark.what=cost`.
  """

  paths: files.Workdir
  config: Mapping[str, Any]
  history: Sequence[Mapping[str, Any]]
  quant: Mapping[str, Any] | None
  costs: Mapping[str, Any] | None

  @property
  def bits(self) -> str:
    """The config's own setting among those that were counted, 'W4A8'.

    Empty if it was not, or nothing was.
    """
    if self.costs is None:
      return ''
    quant = self.costs['quant']
    name = f'W{quant["weight_bits"]}A{quant["act_bits"]}'
    return name if name in self.costs['settings'] else ''

  @functools.cached_property
  def comparison(self) -> page.Comparison | None:
    """Samplers side by side, if they were sampled.

    Raises:
      ValueError: the file is damaged.
    """
    path = self.paths.comparison
    return comparison.read(path) if path.is_file() else None
