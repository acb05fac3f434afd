"""Units of reconstruction: finding them, calling them, moving their data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.quantization import transform
from d2dpm_jax.quantization.policy import Policy

Array = jax.Array
BLOCK_TYPES = ('ResBlock', 'BasicTransformerBlock')


@dataclasses.dataclass(frozen=True)
class Unit:
  """What is reconstructed at once.

  Attributes:
    path: of the module.
    kind: its class name.
    layers: paths of the quantized layers in it, in execution order.
    learned: whether any of them is to be reconstructed.
  """

  path: str
  kind: str
  layers: tuple[str, ...]
  learned: bool


@dataclasses.dataclass(frozen=True)
class Call:
  """A call of a module with its arrays taken out. Hashable: a static argument.

  Attributes:
    module: unbound copy.
    tree: structure of `(args, kwargs)`.
    slots: per leaf 'batch', 'whole' or ('static', value).
  """

  module: nn.Module
  tree: Any
  slots: tuple[Any, ...]

  @property
  def is_hashable(self) -> bool:
    try:
      hash(self)
    except TypeError:
      return False
    return True

  def __call__(self, variables: Any, batch: Any, whole: Any) -> Any:
    batch, whole = iter(batch), iter(whole)
    leaves = []
    for slot in self.slots:
      if slot == 'batch':
        leaves.append(next(batch))
      elif slot == 'whole':
        leaves.append(next(whole))
      else:
        leaves.append(slot[1])
    args, kwargs = jax.tree.unflatten(self.tree, leaves)
    return self.module.apply(variables, *args, **kwargs)


def take_apart(
  module: nn.Module, args: Any, kwargs: Any, batch_size: int
) -> tuple[Call, list[Array], list[Array]]:
  """Splits a call into its form, its batched arrays and its other arrays.

  Args:
    module: bound module that is being called.
    args: positional arguments, any pytree.
    kwargs: keyword arguments, any pytree.
    batch_size: arrays with this length on axis 0 are taken as batched.

  Returns:
    The form; arrays with a sample per row; other arrays. Leaves that are no
    arrays (flags, strings) are part of the form.
  """
  leaves, tree = jax.tree.flatten((args, kwargs))
  batch: list[Any] = []
  whole: list[Any] = []
  slots: list[Any] = []
  for leaf in leaves:
    if not isinstance(leaf, jax.Array | np.ndarray):
      slots.append(('static', leaf))
    elif leaf.ndim and leaf.shape[0] == batch_size:
      slots.append('batch')
      batch.append(leaf)
    else:
      slots.append('whole')
      whole.append(leaf)
  call = Call(module.clone(parent=None, name=None), tree, tuple(slots))
  return call, batch, whole


def is_inside(path: str, layer: str) -> bool:
  """Whether the layer is the module at `path`, or within it."""
  return not path or layer == path or layer.startswith(f'{path}/')


def relative(path: str, layer: str) -> str:
  """Path of a layer as seen from the module at `path`."""
  return layer if not path else layer[len(path) + 1 :]


class Walker:
  """Finds units during a forward. Passes the rest through.

  Attributes:
    policy: path -> bits.
    block_types: class names of blocks.
    busy: True while a unit runs its own forwards, which are left alone.
  """

  def __init__(self, policy: Policy, block_types: Sequence[str]):
    self.policy = {p: bits for p, bits in policy.items() if bits is not None}
    self.block_types = frozenset(block_types)
    self.busy = False

  def unit_of(self, module: nn.Module) -> Unit | None:
    """The unit that `module` is, if it is one."""
    path, kind = transform.path_of(module), type(module).__name__
    if kind in self.block_types:
      layers = tuple(p for p in self.policy if is_inside(path, p))
    else:
      is_layer = transform.layer_kind(module) and path in self.policy
      layers = (path,) if is_layer else ()
    if not layers:
      return None
    learned = any(self.policy[p].reconstruct for p in layers)
    return Unit(path, kind, layers, learned)

  def is_float(self, module: nn.Module) -> bool:
    """Whether no layer within `module` is quantized."""
    path = transform.path_of(module)
    return not any(is_inside(path, p) for p in self.policy)

  def walk(
    self,
    apply: Callable[..., Any],
    variables: Any,
    args: Any,
    on_unit: Callable[..., Any],
    on_float: Callable[..., Any] | None = None,
  ) -> Any:
    """Runs `apply` and replaces the calls of units by those of `on_unit`."""

    def interceptor(call, args, kwargs, context):
      module = context.module
      if self.busy or context.method_name != '__call__':
        return call(*args, **kwargs)
      unit = self.unit_of(module)
      if unit is not None:
        handle = functools.partial(on_unit, unit)
      elif on_float is not None and self.is_float(module):
        handle = on_float
      else:
        return call(*args, **kwargs)
      self.busy = True
      try:
        return handle(module, call, args, kwargs)
      finally:
        self.busy = False

    with nn.intercept_methods(interceptor):
      return apply(variables, *args)


def list_units(
  apply: Callable[..., Any],
  variables: Any,
  policy: Policy,
  args: Sequence[Any],
  *,
  block_types: Sequence[str] = BLOCK_TYPES,
) -> tuple[Unit, ...]:
  """Units in the order in which they are reconstructed; runs nothing.

  Args:
    apply: plain (not jitted) Linen `apply`.
    variables: `{'params': ...}`; arrays or `jax.ShapeDtypeStruct`s.
    policy: path -> bits.
    args: the model's inputs; arrays or `jax.ShapeDtypeStruct`s.
    block_types: class names of modules that are reconstructed as a whole.
  """
  found: dict[str, Unit] = {}

  def on_unit(unit, module, call, args, kwargs):
    found.setdefault(unit.path, unit)
    return call(*args, **kwargs)

  walker = Walker(policy, block_types)
  jax.eval_shape(
    lambda v, a: walker.walk(apply, v, a, on_unit), variables, tuple(args)
  )
  return tuple(found.values())


class Streams:
  """Moves the two streams between where they are kept and where units run.

  Attributes:
    samples: rows of one stream; both are stacked to twice as many.
    chunk: rows of one forward of a unit.
    device: where units run.
    home: where the streams are kept.
  """

  def __init__(self, samples: int, chunk: int, on_host: bool):
    self.samples = samples
    self.chunk = min(chunk, samples)
    self.device = self.home = jax.local_devices()[0]
    if on_host:
      self.home = jax.local_devices(backend='cpu')[0]

  @property
  def on_cpu(self) -> bool:
    return self.device.platform == 'cpu'

  def fetch(self, tree: Any) -> Any:
    """To where units run. Also commits arrays: programs are cached by that."""
    return jax.device_put(tree, self.device)

  def store(self, tree: Any) -> Any:
    """To where the streams are kept."""
    return jax.device_put(tree, self.home)

  def split(self, batch: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Stacked arrays -> those of full precision, those quantized so far."""
    n = self.samples
    return [rows_of(x, 0, n) for x in batch], [rows_of(x, n, n) for x in batch]

  def stack(self, first: Any, second: Any) -> Any:
    """Both streams -> stacked arrays."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), first, second)

  def map(self, fn: Callable[[Any], Any], batch: Sequence[Array]) -> Any:
    """`fn` over all rows in chunks of one size (the last may overlap)."""
    total, size = batch[0].shape[0], self.chunk
    if total == size:
      return self.store(fn(self.fetch(batch)))
    pieces, done = [], 0
    while done < total:
      start = min(done, total - size)
      out = fn(self.fetch([rows_of(x, start, size) for x in batch]))
      skip = done - start
      if skip:
        out = jax.tree.map(lambda x, k=skip: x[k:], out)
      pieces.append(self.store(out))
      done = start + size
    return jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)


@functools.partial(jax.jit, static_argnames='size')
def rows_of(x: Array, start: Array | int, size: int) -> Array:
  """`x[start : start + size]`, one program for every `start`."""
  return jax.lax.dynamic_slice_in_dim(x, start, size)
