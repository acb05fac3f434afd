"""Units of reconstruction: finding them, calling them, moving their data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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

  Returns:
    Every unit once, at its first call.
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


def module_kinds(
  apply: Callable[..., Any], variables: Any, args: Sequence[Any]
) -> set[str]:
  """Class names of all modules that a network runs; runs nothing."""
  kinds: set[str] = set()

  def interceptor(call, args, kwargs, context):
    kinds.add(type(context.module).__name__)
    return call(*args, **kwargs)

  with nn.intercept_methods(interceptor):
    jax.eval_shape(apply, variables, *args)
  return kinds


class Streams:
  """Keeps both streams and moves their rows to where units run.

  Arrays of both streams are stacked: rows 0 .. N - 1 are those of full
  precision, rows N .. 2 N - 1 those of the network quantized so far.

  Attributes:
    samples: N.
    chunk: rows of one forward of a unit.
    split: sharding of rows that are computed with, over local devices.
    whole: sharding of everything else: a copy on each of them.
    home: where the stacked arrays are kept.
    beside_home: where arrays are that are combined with them.
    default_device: of what runs between the units; None is JAX's own.
  """

  def __init__(
    self,
    samples: int,
    chunk: int,
    batch_sizes: Sequence[int],
    on_host: bool = False,
    devices: int | None = None,
  ):
    """Takes as many local devices as divide all the sizes.

    Args:
      samples: N.
      chunk: most rows of one forward.
      batch_sizes: rows of one iteration, of every phase.
      on_host: keeps stacked arrays in host memory.
      devices: most devices; None is all.
    """
    self.samples = samples
    self.chunk = min(chunk, samples)
    sizes = (2 * samples, self.chunk, *batch_sizes)
    local = jax.local_devices()[:devices]
    count = max(
      n for n in range(1, len(local) + 1) if all(s % n == 0 for s in sizes)
    )
    mesh = Mesh(np.asarray(local[:count]), ('data',))
    self.split = NamedSharding(mesh, PartitionSpec('data'))
    self.whole = NamedSharding(mesh, PartitionSpec())
    self.on_host = on_host
    self.home: jax.sharding.Sharding = self.split
    self.beside_home: jax.sharding.Sharding = self.whole
    self.default_device: jax.Device | None = None
    if on_host:
      host = self.default_device = jax.local_devices(backend='cpu')[0]
      self.home = self.beside_home = jax.sharding.SingleDeviceSharding(host)

  @property
  def num_devices(self) -> int:
    return self.split.mesh.size

  @property
  def on_cpu(self) -> bool:
    return self.split.mesh.devices.flat[0].platform == 'cpu'

  def loops(self, wanted: bool | None) -> bool:
    """Whether iterations run in compiled loops, see `Settings.loop`."""
    return not self.on_cpu if wanted is None else wanted

  @property
  def place_of_half(self) -> jax.sharding.Sharding:
    """Of one stream's rows, when the other stays at home."""
    divides = self.samples % self.num_devices == 0
    return self.split if divides else self.whole

  def fetch(self, tree: Any) -> Any:
    """A copy for every device. Commits arrays: programs are cached by that."""
    return jax.device_put(tree, self.whole)

  def stack(self, x: Any) -> Array:
    """The same rows for both streams, stacked, at home."""
    return jax.device_put(np.concatenate([x, x]), self.home)

  def pick(self, batch: Any, rows: Any) -> Any:
    """Rows of stacked arrays, split over the devices."""
    if not self.on_host:
      return take_rows(batch, rows, self.split)
    return jax.device_put(take_rows(batch, rows, None), self.split)

  def to_learn_from(self, batch: Any, first: int) -> tuple[Any, int]:
    """One stream's rows on the devices, and which row is its first there."""
    if not self.on_host:
      return batch, first
    half = jax.tree.map(lambda x: x[first : first + self.samples], batch)
    return jax.device_put(half, self.place_of_half), 0

  def chunks(
    self, first: int, count: int, size: int | None = None
  ) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers of one chunk, and how many of its first ones are repeated.

    All chunks have one size, so the last may begin before the end of the one
    before it.
    """
    size = min(size or self.chunk, count)
    for done in range(0, count, size):
      start = min(done, count - size)
      yield first + np.arange(start, start + size), done - start

  def map(
    self,
    fn: Callable[[Any], Any],
    batch: Sequence[Array],
    first: int,
    count: int,
    out: Any = None,
    chunk: int | None = None,
  ) -> Any:
    """Puts `fn` of some rows into the same rows of `out`, chunk by chunk.

    Args:
      fn: rows of arrays -> pytree of arrays with as many rows.
      batch: stacked arrays.
      first: number of the first row.
      count: rows.
      out: result of an earlier call, used up; None for new arrays.
      chunk: rows at a time, if not the usual number.

    Returns:
      Stacked arrays with 2 N rows.
    """
    for rows, _ in self.chunks(first, count, chunk):
      piece = jax.device_put(fn(self.pick(batch, rows)), self.home)
      if out is None:
        out = jax.tree.map(self._empty_like, piece)
      out = _put_rows(out, piece, rows)
    return out

  def _empty_like(self, piece: Array) -> Array:
    shape = (2 * self.samples, *piece.shape[1:])
    return jnp.zeros(shape, piece.dtype, device=self.home)


@functools.partial(jax.jit, static_argnames='sharding')
def take_rows(
  batch: Any, rows: Array, sharding: jax.sharding.Sharding | None
) -> Any:
  """`x[rows]` of every array; with a sharding, laid out like that."""

  def take(x):
    x = jnp.take(x, rows, axis=0, mode='clip')
    if sharding is None:
      return x
    return jax.lax.with_sharding_constraint(x, sharding)

  return jax.tree.map(take, batch)


@functools.partial(jax.jit, donate_argnames='out')
def _put_rows(out: Any, piece: Any, rows: Array) -> Any:
  return jax.tree.map(lambda x, y: x.at[rows].set(y), out, piece)
