"""Programs over batches of any size, on every device.

A batch is split over the devices of the mesh, and on each device into
microbatches of a fixed size that run one after another. Sums of floats depend
in their last bit on the shape of the compiled program, and a quantized network
amplifies that bit; with a fixed microbatch an image is the same in any batch.
"""

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from d2dpm_jax.runtime import devices

Array = jax.Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Empty:
  """An array without elements; no argument of a program."""

  shape: tuple[int, ...]
  dtype: np.dtype


def arguments(tree: Any) -> Any:
  """`tree` without its empty arrays, which stand for dropped kernels.

  Programs make them themselves: XLA of jaxlib 0.11 crashes on empty arguments
  of a program for several devices.
  """
  return jax.tree.map(
    lambda x: x if np.size(x) else _Empty(np.shape(x), x.dtype), tree
  )


def _complete(tree: Any) -> Any:
  """Inverse of `arguments`, inside a program."""

  def one(x):
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, _Empty) else x

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, _Empty))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
  """Traces are many small objects, of which hardly any is garbage.

  Looking for that took a third of the time to trace a large network.
  """
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


class Launched:
  """A batch that the devices compute, or have computed.

  Attributes:
    shape: devices, rows of each that there is room for, rows of each that are
      computed.
    count: images that were asked for.
  """

  def __init__(self, out: Any, shape: tuple[int, int, int], count: int):
    self._out = out
    self.shape = shape
    self.count = count

  def wait(self) -> None:
    """Waits, and leaves the batch where it is."""
    jax.block_until_ready(self._out)

  def fetch(self, *names: str) -> Any:
    """Waits, and brings the batch to the host.

    Args:
      *names: of the arrays, where there are several; without any, all.

    Returns:
      Arrays of `count` rows, in the structure of what the program returns.
    """
    out = {name: self._out[name] for name in names} if names else self._out
    over, room, used = self.shape

    def trimmed(a: Array) -> np.ndarray:
      host = np.asarray(a)
      if used < room:
        host = host.reshape(over, room, *host.shape[1:])[:, :used]
        host = host.reshape(-1, *host.shape[2:])
      return host[: self.count]

    return jax.tree.map(trimmed, out)


class Program:
  """jit of `fn(inputs, *arrays)` over microbatches, split over devices."""

  def __init__(self, microbatch: int, fn: Callable[..., Any]):
    self._microbatch = microbatch
    mesh = devices.mesh()
    self._devices = mesh.size

    @jax.jit  # Traced once for shapes and values.
    def one(inputs, *arrays):
      return fn(_complete(inputs), *arrays)

    def local(inputs, steps, *arrays):
      parts = [a.reshape(-1, microbatch, *a.shape[1:]) for a in arrays]

      def add(i, out):
        part = one(inputs, *(a[i] for a in parts))
        return jax.tree.map(lambda all_, one: all_.at[i].set(one), out, part)

      room = len(parts[0])
      out = jax.tree.map(
        lambda like: jnp.zeros((room, *like.shape), like.dtype),
        jax.eval_shape(one, inputs, *(a[0] for a in parts)),
      )
      out = jax.lax.fori_loop(0, steps, add, out)
      return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)

    @functools.partial(jax.jit, static_argnames='number')
    def sharded(inputs, steps, arrays, number):
      split = P(devices.DATA_AXIS)
      return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(), *[split] * number),
        out_specs=split,
        # The loop begins with zeros, which are the same on all devices.
        check_vma=False,
      )(inputs, steps, *arrays)

    self._sharded = sharded

  @property
  def unit(self) -> int:
    """Images of one microbatch on every device."""
    return self._microbatch * self._devices

  def launch(
    self,
    inputs: Any,
    *arrays: np.ndarray,
    room: int = 0,
  ) -> Launched:
    """Begins with a batch and does not wait for it.

    Args:
      inputs: the same for every image.
      *arrays: a row for every image.
      room: images that the compiled program has room for, if more than these.
        Whole microbatches without images cost no time: one program serves
        batches of all sizes.
    """
    shape, filled = self._fill(arrays, room)
    steps = np.int32(shape[2] // self._microbatch)
    with _uncollected():  # The first call traces.
      out = self._sharded(arguments(inputs), steps, filled, len(arrays))
    return Launched(out, shape, len(arrays[0]))

  def lower(self, inputs: Any, *arrays: np.ndarray) -> Any:
    """Traces for a batch of whole microbatches on all devices.

    Returns:
      What `compile()` makes a function of: (`arguments(inputs)`, steps, arrays)
      -> results, steps being int32[], the microbatches of a device.
    """
    _, filled = self._fill(arrays, 0)
    with _uncollected():
      return self._sharded.lower(
        arguments(inputs), np.int32(1), filled, len(arrays)
      )

  def _fill(
    self, arrays: tuple[np.ndarray, ...], room: int
  ) -> tuple[tuple[int, int, int], tuple[np.ndarray, ...]]:
    """`Launched.shape`, and the arrays with rows for all of it."""
    count = len(arrays[0])
    used = -(-count // self.unit) * self._microbatch
    shape = (self._devices, max(used, -(-room // self.unit) * self._microbatch))

    def padded(a: np.ndarray) -> np.ndarray:
      """Every device gets its part of the rows, with room behind them."""
      missing = self._devices * used - count
      a = np.concatenate([a, np.repeat(a[-1:], missing, 0)])
      if used < shape[1]:
        a = a.reshape(self._devices, used, *a.shape[1:])
        behind = np.repeat(a[:, -1:], shape[1] - used, 1)
        a = np.concatenate([a, behind], 1).reshape(-1, *a.shape[2:])
      return a

    return (*shape, used), tuple(map(padded, arrays))

  def __call__(self, inputs: Any, *arrays: np.ndarray, room: int = 0) -> Any:
    """Runs a batch of any size; see `launch`."""
    return self.launch(inputs, *arrays, room=room).fetch()
