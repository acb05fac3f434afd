"""Losses of a unit over the calibration set, and what they are weighed by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.quantization import importance, learning, transform
from d2dpm_jax.quantization.adaround import Settings
from d2dpm_jax.quantization.visits import Runner, Visit

Array = jax.Array


class Norm(NamedTuple):
  """What losses of a phase on a unit are measured by.

  Attributes:
    p: exponent.
    first: first row of the inputs.
    importance: weights like the stacked outputs, or None.
  """

  p: float
  first: int
  importance: Any


@dataclasses.dataclass(frozen=True)
class Losses:
  """Losses of the units of a network.

  Attributes:
    apply: of the network.
    variables: of it, at full precision.
    inputs: of it, both streams stacked.
    paths: of all units, in order.
    settings: of the reconstruction.
    runner: of units.
  """

  apply: Callable[..., Any]
  variables: Any
  inputs: list[Array]
  paths: list[str]
  settings: Settings
  runner: Runner

  def norm(
    self, visit: Visit, p: float, asymmetric: bool, weights: learning.Weights
  ) -> Norm:
    """The loss of a phase; the weights are those of the unit at its start."""
    first = self.runner.streams.samples if asymmetric else 0
    if self.settings.loss == 'mse' or not visit.unit.learned:
      return Norm(p, first, None)
    return Norm(p, first, self._importance(visit, weights))

  def _importance(self, visit: Visit, weights: learning.Weights) -> Any:
    """Squared gradients at the unit's output, their mean being 1."""
    streams, walker = self.runner.streams, self.runner.walker
    kernels = {
      visit.full_path(path): learning.dequantize(weight)
      for path, weight in weights.items()
    }
    variables = streams.fetch(self.variables)
    quantized = transform.replace_kernels(variables, kernels)

    def run(rows):
      squares = importance.squared_gradients(
        self.apply,
        walker.policy,
        tuple(walker.block_types),
        self.paths.index(visit.unit.path),
        variables,
        quantized,
        rows,
      )
      return jax.tree.map(lambda x: squares[x.shape[1:]], visit.out)

    found = streams.map(
      run, self.inputs, 0, streams.samples, chunk=self.settings.batch_size
    )
    total = sum(float(jnp.sum(x)) for x in jax.tree.leaves(found))
    count = sum(x.size // 2 for x in jax.tree.leaves(found))
    if not total:  # Nothing was rounded.
      return None
    return jax.tree.map(lambda x: x * (count / total), found)

  def measure(
    self, visit: Visit, variables: Any, grids: Any, norm: Norm
  ) -> tuple[float, float]:
    """Mean loss over the calibration set, and the norm of the target."""
    streams, total = self.runner.streams, np.zeros(2)
    forward = self.runner.forward(visit.call, variables, grids, visit.whole)
    for rows, repeated in streams.chunks(0, streams.samples):
      target, weights = streams.pick((visit.out, norm.importance), rows)
      # Not one program: the forward is compiled already.
      out = forward(streams.pick(visit.batch, norm.first + rows))
      found = learning.measure(out, target, norm.p, weights)
      total += [np.sum(np.asarray(x, float)[repeated:]) for x in found]
    loss, signal = total / streams.samples
    return float(loss), float(signal)
