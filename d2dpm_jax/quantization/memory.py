"""How much memory reconstruction needs, told from shapes before it begins."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from d2dpm_jax.quantization import learning, units
from d2dpm_jax.quantization.adaround import Settings
from d2dpm_jax.quantization.policy import Policy


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes; an upper estimate, as compilers fuse operations.

  Attributes:
    weights: parameters of the network.
    streams: most that the activations of the calibration set take at a time,
      over all devices; in host memory with `host_streams`.
    unit: most that the data of one unit take of them.
    work: most that one chunk or one iteration takes beside these.
  """

  weights: int
  streams: int
  unit: int
  work: int

  def on_device(self, host_streams: bool, num_devices: int) -> int:
    """Bytes that every device needs."""
    data = self.unit if host_streams else self.streams
    return self.weights + (data + self.work) // num_devices


def predict(
  apply: Callable[..., Any],
  variables: Any,
  policy: Policy,
  inputs: Sequence[Any],
  settings: Settings,
  block_types: Sequence[str] = units.BLOCK_TYPES,
) -> Memory:
  """What `reconstruction.reconstruct` needs; runs nothing.

  The arguments are those of `reconstruct`; arrays or `jax.ShapeDtypeStruct`s.
  """
  samples = inputs[0].shape[0]
  stacked = [
    jax.ShapeDtypeStruct((2 * samples, *x.shape[1:]), x.dtype) for x in inputs
  ]
  walker = units.Walker(policy, block_types)

  def as_one_equation(*args):
    """What runs as a whole in reconstruction is one equation of the trace."""
    module, call, args, kwargs = args[-4:]
    form, batch, whole = units.take_apart(module, args, kwargs, 2 * samples)
    if not batch or not form.is_hashable:
      return call(*args, **kwargs)
    return learning.forward(form, module.variables, {}, batch, whole)

  trace = jax.make_jaxpr(
    lambda v, x: walker.walk(apply, v, x, as_one_equation, as_one_equation)
  )(variables, stacked).jaxpr
  chunk = min(settings.chunk, samples)
  batch = min(samples, max(settings.batch_size, settings.act_batch_size))
  unit = work = network = 0
  for equation in trace.eqns:
    inside = equation.params.get('jaxpr')
    if inside is None:
      continue
    size = functools.partial(_bytes, rows=2 * samples)
    data = sum(map(size, {*_variables(equation.invars), *equation.outvars}))
    every = sum(size(v) for e in inside.jaxpr.eqns for v in e.outvars)
    network += every
    peak = _peak(inside.jaxpr, 2 * samples)
    # An iteration keeps what its gradient needs: at most everything, twice.
    in_work = max(peak * chunk, 2 * every * batch) // (2 * samples)
    unit, work = max(unit, data), max(work, in_work)
  weights = sum(
    int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(variables)
  )
  streams = _peak(trace, 2 * samples)
  if settings.loss == 'fisher_diag':
    # Gradients through two networks, and weights like a unit's output.
    rows = min(settings.batch_size, samples)
    work = max(work, 4 * network * rows // (2 * samples)) + unit
    weights *= 2
  return Memory(
    weights=weights,
    streams=streams,
    unit=unit,
    work=work,
  )


_ROWS = 17  # Hardly ever the length of something else.


def peak_per_row(fn: Callable[..., Any], *args: Any) -> float:
  """Most bytes for a row of the batch that are alive at a time; runs nothing.

  Args:
    fn: what to run.
    *args: shapes; `batched` makes those that have a row for every sample.
  """
  trace = jax.make_jaxpr(fn)(*args).jaxpr
  return _peak(trace, _ROWS) / _ROWS


def batched(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
  """An argument of `peak_per_row` with the shape of one row."""
  return jax.ShapeDtypeStruct((_ROWS, *shape), dtype)


def _variables(atoms: Sequence[Any]) -> list[Any]:
  return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _bytes(variable: Any, rows: int) -> int:
  """Of an array with that many rows; others do not grow with the samples."""
  shape = getattr(variable.aval, 'shape', ())
  if not shape or shape[0] != rows:
    return 0
  return int(np.prod(shape)) * variable.aval.dtype.itemsize


def _peak(trace: Any, rows: int) -> int:
  """Most bytes that are alive at a time when equations run one by one."""
  last: dict[Any, int] = {}
  for i, equation in enumerate(trace.eqns):
    last.update({v: i for v in _variables(equation.invars)})
  last.update({v: len(trace.eqns) for v in _variables(trace.outvars)})
  ending: dict[int, list[Any]] = {}
  for variable, i in last.items():
    ending.setdefault(i, []).append(variable)
  alive = sum(_bytes(v, rows) for v in trace.invars if v in last)
  peak = alive
  for i, equation in enumerate(trace.eqns):
    alive += sum(_bytes(v, rows) for v in equation.outvars)
    peak = max(peak, alive)
    alive -= sum(_bytes(v, rows) for v in equation.outvars if v not in last)
    alive -= sum(_bytes(v, rows) for v in ending.get(i, []))
  return peak
