"""Visits to units: what flows into one, and runs of it in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from d2dpm_jax.quantization import ahead, learning, transform, units
from d2dpm_jax.quantization.policy import LayerBits
from d2dpm_jax.quantization.units import Unit

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Visit:
  """A unit with what flows into it, during one phase.

  Attributes:
    unit: which.
    call: its form.
    variables: of the unit, at full precision, on the devices.
    layers: bits of its quantized layers, by path within it.
    batch: stacked inputs of both streams.
    whole: other arrays, on the devices.
    out: stacked outputs; those of full precision are there.
  """

  unit: Unit
  call: units.Call
  variables: Any
  layers: dict[str, LayerBits]
  batch: list[Array]
  whole: list[Array]
  out: Any

  def full_path(self, path: str) -> str:
    return '/'.join(p for p in (self.unit.path, path) if p)

  def kernel(self, path: str) -> Array:
    return transform.get_kernel(self.variables['params'], path)

  def with_weights(self, weights: learning.Weights) -> Any:
    """Variables of the unit with these kernels on their grids."""
    kernels = {
      path: learning.dequantize(weight, dtype=self.kernel(path).dtype)
      for path, weight in weights.items()
    }
    return transform.replace_kernels(self.variables, kernels)


@dataclasses.dataclass(frozen=True)
class Runner:
  """Runs units and other modules compiled, over all rows of their inputs.

  Attributes:
    walker: knows the bits of layers.
    streams: say where the rows are, and how many go at once.
    programs: that were compiled ahead.
  """

  walker: units.Walker
  streams: units.Streams
  programs: ahead.Ahead

  def forward(
    self, call: units.Call, variables: Any, grids: Any, whole: Any
  ) -> Callable[[Any], Any]:
    """rows of a unit's inputs -> its output."""
    variables, grids, whole = self.streams.fetch((variables, grids, whole))
    return lambda rows: self.programs.call(
      learning.forward, call, variables, grids, rows, whole
    )

  def visit(self, unit: Unit, module: Any, args: Any, kwargs: Any) -> Visit:
    """Runs the unit at full precision.

    Raises:
      ValueError: it is called in a way that cannot be compiled, or without
        samples.
    """
    form, batch, whole = units.take_apart(
      module, args, kwargs, 2 * self.streams.samples
    )
    if not form.is_hashable:
      raise ValueError(
        f'{unit.path!r}: a unit needs hashable fields and static arguments.'
      )
    if not batch:
      raise ValueError(f'{unit.path!r} has no input with samples on axis 0.')
    variables, whole = self.streams.fetch((module.variables, whole))
    layers = {
      units.relative(unit.path, path): self.walker.policy[path]
      for path in unit.layers
    }
    out = self.streams.map(
      self.forward(form, variables, {}, whole), batch, 0, self.streams.samples
    )
    return Visit(unit, form, variables, layers, batch, whole, out)

  def run_float(self, module, call, args, kwargs) -> Any:
    """Runs a module without quantized layers compiled and in chunks."""
    form, batch, whole = units.take_apart(
      module, args, kwargs, 2 * self.streams.samples
    )
    if not batch or not form.is_hashable:
      return call(*args, **kwargs)
    return self.streams.map(
      self.forward(form, module.variables, {}, whole),
      batch,
      0,
      2 * self.streams.samples,
    )
