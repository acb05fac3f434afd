"""Compiles the programs of reconstruction before they are needed.

Compiling takes longer than learning on a small model, and minutes on a large
one. All shapes are known from the start, so threads compile in the order of
the units while the first ones are being learned.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np

from d2dpm_jax.quantization import learning, transform, units
from d2dpm_jax.quantization.adaround import Settings
from d2dpm_jax.quantization.affine import QParams
from d2dpm_jax.quantization.policy import LayerBits

_MOST_THREADS = 4  # For GPUs, each tries kernels out, which takes memory.

# A jitted function and its arguments; arrays may be `jax.ShapeDtypeStruct`s.
Program = tuple[Callable[..., Any], tuple[Any, ...]]


class Ahead:
  """Programs that are being compiled; a context, at whose end that stops."""

  def __init__(
    self, programs: Iterator[Program], default_device: jax.Device | None
  ):
    """Begins with the first ones.

    Args:
      programs: in the order in which they will be needed.
      default_device: that of the calls, as programs depend on it.
    """
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    self._pool = futures.ThreadPoolExecutor(threads)
    self._jobs: dict[Any, futures.Future[Any]] = {}
    for fn, args in programs:
      key = _signature(fn, args)
      if key not in self._jobs:
        self._jobs[key] = self._pool.submit(_compile, fn, args, default_device)

  def __enter__(self) -> Ahead:
    return self

  def __exit__(self, *_: object) -> None:
    self._pool.shutdown(wait=False, cancel_futures=True)

  def call(self, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, after its program is there if it has been begun."""
    job = self._jobs.get(_signature(fn, args))
    if job is not None:
      futures.wait([job])  # If it failed, the call says why.
    return fn(*args)


def _compile(
  fn: Any, args: tuple[Any, ...], default_device: jax.Device | None
) -> None:
  with jax.default_device(default_device):
    fn.lower(*args).compile()


def _shape(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
  """Stands for an array there."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _signature(fn: Any, args: tuple[Any, ...]) -> Any:
  leaves, tree = jax.tree.flatten(args)
  kinds = (
    (tuple(x.shape), x.dtype) if hasattr(x, 'dtype') else x for x in leaves
  )
  return fn, tree, tuple(kinds)


# ---- Which programs there will be -------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Outline:
  """A call of a unit, or of a module in floating point, by shapes alone."""

  unit: units.Unit | None
  call: units.Call
  variables: Any
  batch: Any
  whole: Any
  out: Any


def _outlines(
  apply: Callable[..., Any], variables: Any, walker: units.Walker, inputs: Any
) -> list[_Outline]:
  """Of everything that reconstruction runs as a whole, in order."""
  found: list[_Outline] = []
  rows = inputs[0].shape[0]

  def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

  def record(unit, module, call, args, kwargs):
    out = call(*args, **kwargs)
    form, batch, whole = units.take_apart(module, args, kwargs, rows)
    if batch and form.is_hashable:
      arrays = (module.variables, batch, whole, out)
      found.append(_Outline(unit, form, *map(shapes, arrays)))
    return out

  def on_float(*args):
    return record(None, *args)

  jax.eval_shape(
    lambda v, x: walker.walk(apply, v, x, record, on_float), variables, inputs
  )
  return found


def programs(
  apply: Callable[..., Any],
  variables: Any,
  walker: units.Walker,
  inputs: Any,
  settings: Settings,
  streams: units.Streams,
  done: Mapping[str, Any],
) -> Iterator[Program]:
  """All that `reconstruction` will call, in its order.

  Args:
    apply: plain (not jitted) Linen `apply`.
    variables: of the network.
    walker: finds units.
    inputs: stacked inputs of the network.
    settings: those of the reconstruction.
    streams: where arrays are.
    done: units that will not be learned again, by 'phase/path'.
  """
  found = _outlines(apply, variables, walker, inputs)
  for phase in ('weight', 'act'):
    for outline in found:
      shapes = _Shapes(outline, walker, settings, streams)
      yield shapes.forward({})
      if outline.unit is None:
        continue
      name = f'{phase}/{outline.unit.path}'
      if phase == 'act' or settings.drop_prob:
        if name not in done and shapes.grids:
          yield shapes.search()
        yield shapes.forward(shapes.grids)
      if name not in done:
        yield from shapes.steps(phase)


class _Shapes:
  """The arguments of one unit's programs, by shapes and places."""

  def __init__(
    self,
    outline: _Outline,
    walker: units.Walker,
    settings: Settings,
    streams: units.Streams,
  ):
    self._outline, self._settings, self._streams = outline, settings, streams
    path = '' if outline.unit is None else outline.unit.path
    self._layers: dict[str, LayerBits] = {
      units.relative(path, layer): walker.policy[layer]
      for layer in (outline.unit.layers if outline.unit else ())
    }
    self._variables = self._at(outline.variables, streams.whole)
    self._whole = self._at(outline.whole, streams.whole)
    scalar = _shape((), np.float32, streams.whole)
    self.grids = {
      path: QParams(scalar, scalar, bits.a)
      for path, bits in self._layers.items()
      if bits.a is not None
    }

  def _at(self, tree: Any, place: Any, rows: int | None = None) -> Any:
    """The shapes at a place, with another number of rows if given."""
    return jax.tree.map(
      lambda x: _shape(
        x.shape if rows is None else (rows, *x.shape[1:]), x.dtype, place
      ),
      tree,
    )

  def forward(self, grids: Any) -> Program:
    streams = self._streams
    batch = self._at(self._outline.batch, streams.split, streams.chunk)
    return learning.forward, (
      self._outline.call,
      self._variables,
      grids,
      batch,
      self._whole,
    )

  def search(self) -> Program:
    streams = self._streams
    rows = min(self._settings.act_init_samples, streams.samples)
    return learning.search_grids, (
      self._outline.call,
      learning.quantized_inputs(self._layers),
      self._settings.act_range,
      self._variables,
      self._at(self._outline.batch, streams.whole, rows),
      self._whole,
    )

  def steps(self, phase: str) -> Iterator[Program]:
    """The one program of the iterations, if there are any."""
    s, streams, outline = self._settings, self._streams, self._outline
    iters, batch_size = learning.size_of(phase, s)
    learned = {
      path: self._initial(phase, path)
      for path, bits in self._layers.items()
      if bits.reconstruct and (bits.w if phase == 'weight' else bits.a)
    }
    if not iters or not learned:
      return
    initial, start = {}, {}
    for path, (grid, shape) in learned.items():
      initial[path] = grid
      start[path] = jax.ShapeDtypeStruct(shape, np.float32)
    others = {p: g for p, g in self.grids.items() if p not in initial}
    if phase == 'weight':
      others = self.grids if s.drop_prob else {}
    rows = streams.samples if streams.on_host else 2 * streams.samples
    place = streams.place_of_half if streams.on_host else streams.home
    fisher = s.loss == 'fisher_diag'
    task = learning.Task(
      variables=self._variables,
      grids=others,
      initial=initial,
      batch=self._at(outline.batch, place, rows),
      first=np.int32(0),
      target=self._at(outline.out, place, rows),
      importance=self._at(outline.out, place, rows) if fisher else None,
      whole=self._whole,
      rows=_shape(
        (iters, min(batch_size, streams.samples)), np.int32, streams.whole
      ),
      key=_shape((), jax.random.key(0).dtype, streams.whole),
      iters=np.int32(iters),
      knobs=learning.knobs(s),
    )
    progress = jax.eval_shape(learning.start, start)
    count, _ = learning.parts_of(iters, s.reports, streams.loops(s.loop))
    p = s.p if phase == 'weight' else s.act_p
    yield (
      learning.steps,
      (
        phase,
        outline.call,
        p,
        count,
        streams.split,
        self._at(progress, streams.whole),
        np.int32(0),
        task,
      ),
    )

  def _initial(self, phase: str, path: str) -> tuple[QParams, tuple[int, ...]]:
    """Grid that learning begins from, and the shape of what is learned."""
    if phase == 'act':
      return self.grids[path], ()
    kernel = transform.get_kernel(self._variables['params'], path)
    shape: tuple[int, ...] = ()
    if self._settings.per_channel:
      shape = (*[1] * (len(kernel.shape) - 1), kernel.shape[-1])
    scale = _shape(shape, np.float32, self._streams.whole)
    bits = self._layers[path].w
    assert bits is not None
    return QParams(scale, scale, bits), kernel.shape
