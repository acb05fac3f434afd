"""Random numbers of image k as a function of (seed, k) alone.

Every normal number of a run is drawn with the key fold_in(fold_in(fold_in(
key(seed), k), stream), step). So neither the batch in which an image is made
nor the number of devices or hosts, nor a resumed run, changes the image; and
since each use has its own stream, neither does the order in which uses draw.
"""

import enum
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


class Stream(enum.IntEnum):
  """What noise is for; part of the numbers, so members keep their values."""

  INITIAL = 0  # x_T.
  SAMPLER = 1  # z of each DDIM step.
  ERROR = 2  # n of each S-D2 correction.


def seed_key(seed: int) -> jax.Array:
  """Root key of a run: threefry, whatever JAX's default is set to."""
  return jax.random.key(seed, impl='threefry2x32')


def noise_for(
  key: jax.Array,
  image_index: jax.Array | Sequence[int],
  step: jax.Array | int,
  shape: Sequence[int],
  stream: Stream = Stream.SAMPLER,
) -> jax.Array:
  """Standard normal numbers of each image of a batch at one step.

  Args:
    key: from `seed_key`.
    image_index: int[B], numbers of the images in the whole run, >= 0.
    step: 0..S-1 in sampling order; may be traced.
    shape: of one image, (H, W, C).
    stream: what the noise is for.

  Returns:
    float32[B, H, W, C].
  """

  def one(index):
    folded = jax.random.fold_in(jax.random.fold_in(key, index), stream)
    folded = jax.random.fold_in(folded, step)
    return jax.random.normal(folded, tuple(shape), jnp.float32)

  return jax.vmap(one)(jnp.asarray(image_index))


def initial_noise(
  key: jax.Array, image_index: jax.Array | Sequence[int], shape: Sequence[int]
) -> jax.Array:
  """x_T of each image of a batch.

  Args:
    key: from `seed_key`.
    image_index: int[B], see `noise_for`.
    shape: of one image, (H, W, C).

  Returns:
    float32[B, H, W, C], standard normal.
  """
  return noise_for(key, image_index, 0, shape, Stream.INITIAL)


def noise_stream(
  key: jax.Array,
  image_index: jax.Array | Sequence[int],
  shape: Sequence[int],
  stream: Stream = Stream.SAMPLER,
) -> Callable[[jax.Array], jax.Array]:
  """`noise_for` as the function of the step index that `sample` takes.

  Args:
    key: from `seed_key`.
    image_index: int[B], see `noise_for`.
    shape: of one image, (H, W, C).
    stream: what the noise is for; `Stream.ERROR` for `error_noise_fn`.

  Returns:
    step int[] -> float32[B, H, W, C].
  """
  return functools.partial(
    noise_for, key, image_index, shape=shape, stream=stream
  )
