"""Pieces that the U-Net and the first stage share.

Axis letters: `B` batch, `H W` space, `C` channels, `L` tokens, `N` heads,
`D` width. Layout is NHWC, kernels are HWIO. Parameters are float32; `dtype` is
the type that convolutions and linear layers compute in.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class GroupNorm32(nn.GroupNorm):
  """Group norm in float32, as `GroupNorm32` in LDM.

  32 groups, and PyTorch's epsilon (Flax has 1e-6). Mean and variance come from
  one pass over the input, where Flax and PyTorch make two: norms are bound by
  memory on accelerators. E[x²] − E[x]² would cancel; here sums are of distances
  to a pixel from the middle of the same channel, which are of the size of the
  deviation that is looked for.
  """

  num_groups: int = 32
  epsilon: float = 1e-5

  @nn.compact
  def __call__(  # type: ignore[override]
    self, x: jax.Array, offset: jax.Array | float = 0.0
  ) -> jax.Array:
    """Normalizes `x + offset`, without making that sum.

    Args:
      x: float[B, ..., C].
      offset: float[B, 1, .., C], the same for all pixels, or a number.

    Returns:
      float32 with the shape of `x`, whatever its dtype: what comes next (SiLU,
      a layer that rounds to its own dtype) goes with the same pass.

    Raises:
      ValueError: C does not divide into the groups.
    """
    channels = x.shape[-1]
    if channels % self.num_groups:
      raise ValueError(f'{channels} channels in {self.num_groups} groups.')
    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    offset = jnp.asarray(offset, jnp.float32)
    mean, variance = group_moments(x, self.num_groups, offset)
    gain = jax.lax.rsqrt(variance + self.epsilon) * scale
    return (x - (mean - offset)) * gain + bias


def group_moments(
  x: jax.Array, groups: int, offset: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Mean and variance of every image and group of channels.

  Args:
    x: float[B, ..., C].
    groups: number of them, which divides C.
    offset: float32[B, 1, .., C] or a number, thought to be added to `x`.

  Returns:
    Two float32[B, 1, .., C], the same for all channels of a group.
  """
  b, c = x.shape[0], x.shape[-1]
  x = x.astype(jnp.float32)
  pixels = tuple(range(1, x.ndim - 1))
  middle = tuple(slice(n // 2, n // 2 + 1) for n in x.shape[1:-1])
  origin = x[(slice(None), *middle)]
  distance = x - origin
  # Two sums of one input: XLA reads it once.
  first = jnp.mean(distance, axis=pixels, keepdims=True)
  second = jnp.mean(jnp.square(distance), axis=pixels, keepdims=True)
  inner = jnp.maximum(second - jnp.square(first), 0)  # Within a channel.

  def over_group(values):
    means = values.reshape(b, groups, c // groups).mean(-1, keepdims=True)
    return jnp.repeat(means, c // groups, -1).reshape(origin.shape)

  channel = first + origin + offset
  mean = over_group(channel)
  return mean, over_group(inner + jnp.square(channel - mean))


class LayerNorm32(nn.LayerNorm):
  """Layer norm with float32 statistics and PyTorch's defaults (see above)."""

  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  use_fast_variance: bool = False

  def __call__(
    self, x: jax.Array, *, mask: jax.Array | None = None
  ) -> jax.Array:
    return super().__call__(x, mask=mask).astype(x.dtype)


class _Steps(nn.Module):
  """What a layer does together with its neighbours.

  Each is written out here as the steps it has; quantized execution has kernels
  for some of them as a whole (`d2dpm_jax/quantization/fused.py`).
  """

  def plus(
    self,
    x: jax.Array,
    residual: jax.Array,
    constant: jax.Array | None = None,
  ) -> jax.Array:
    """The layer's output, a residual, a constant float[B, 1, .., D]."""
    y = residual + self(x)
    return y if constant is None else constant + y

  def after_norm(
    self,
    norm: nn.Module,
    x: jax.Array,
    offset: jax.Array | float = 0.0,
    *,
    silu: bool = True,
    residual: jax.Array | None = None,
  ) -> jax.Array:
    """The layer of a normalized `x + offset`, with SiLU between or without.

    Args:
      norm: a `GroupNorm32`, which `x` goes through first.
      x: float[B, ..., C].
      offset: see `GroupNorm32`.
      silu: whether SiLU comes after the norm.
      residual: added in the end.

    Returns:
      float[B, ..., D].
    """
    h = norm(x, offset)
    h = nn.silu(h) if silu else h
    return self(h) if residual is None else self.plus(h, residual)

  def after_upsample(self, x: jax.Array) -> jax.Array:
    """The layer of `upsample_nearest`."""
    return self(upsample_nearest(x))

  def all_after_norm(
    self, others: tuple[nn.Module, ...], norm: nn.Module, x: jax.Array
  ) -> list[jax.Array]:
    """What this layer and others return for the same normalized `x`."""
    h = norm(x)
    return [layer(h) for layer in (self, *others)]

  def after_gate(
    self, gate: nn.Module, norm: nn.Module, x: jax.Array
  ) -> jax.Array:
    """The layer of what a `GEGLU` returns for a normalized `x`, and `x`."""
    return self.plus(gate(norm(x)), x)


class Conv(_Steps, nn.Conv):
  """A convolution that knows its neighbours."""


class Dense(_Steps, nn.Dense):
  """A linear layer that knows its neighbours."""


def conv(
  features: int,
  kernel: int = 3,
  *,
  stride: int = 1,
  padding: tuple[int, int] | None = None,
  zero_init: bool = False,
  dtype: Any = jnp.float32,
  name: str,
) -> Conv:
  """A square convolution whose padding is always explicit.

  Args:
    features: output channels.
    kernel: side of the kernel.
    stride: step in both directions.
    padding: rows (and columns) added before and after; `kernel // 2` on both
      sides if None. Flax's 'SAME' would pad a stride-2 convolution on the right
      and bottom only, where LDM's U-Net pads both sides.
    zero_init: start from zeros, for layers that end a residual branch.
    dtype: type to compute in.
    name: module name, equal to LDM's.
  """
  before, after = padding or (kernel // 2, kernel // 2)
  return Conv(
    features,
    (kernel, kernel),
    strides=(stride, stride),
    padding=((before, after), (before, after)),
    kernel_init=nn.initializers.zeros
    if zero_init
    else nn.linear.default_kernel_init,
    dtype=dtype,
    name=name,
  )


def gelu(x: jax.Array) -> jax.Array:
  """x Φ(x) in float32, by PyTorch's formula.

  `jax.nn.gelu` takes erfc, which keeps the digits of values below 1e-7 of x,
  and costs twice as much: the transformers of cin256-v2 were bound by it.

  Args:
    x: float[...].

  Returns:
    float32[...].
  """
  x = x.astype(jnp.float32)
  return x * (0.5 + 0.5 * jax.lax.erf(x * np.float32(np.sqrt(0.5))))


def timestep_embedding(t: jax.Array, features: int) -> jax.Array:
  """Sinusoids of the timestep: all cosines first, then all sines.

  Source: `timestep_embedding` in CompVis/latent-diffusion,
  ldm/modules/diffusionmodules/util.py.

  Args:
    t: int or float[B], timesteps 0..999; fractions are allowed.
    features: width of the result.

  Returns:
    float32[B, features]; an odd width ends with a zero.
  """
  half = features // 2
  exponent = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32)
  # From the host: a one-ulp change of a frequency is 1000 times that in `args`.
  frequencies = np.exp(exponent / np.float32(half)).astype(np.float32)
  args = t.astype(jnp.float32)[:, None] * frequencies
  embedding = jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)
  return jnp.pad(embedding, ((0, 0), (0, features - 2 * half)))


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Scaled dot-product attention with logits and softmax in float32.

  Args:
    q: float[B, L, N, D] queries.
    k: float[B, M, N, D] keys.
    v: float[B, M, N, D] values.

  Returns:
    float[B, L, N, D] in the dtype of `v`.
  """
  logits = jnp.einsum('blnd,bmnd->bnlm', q, k, preferred_element_type='float32')
  weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
  # Heads first: otherwise the product is made with L last, and turned.
  y = jnp.einsum('bnlm,bmnd->bnld', weights.astype(v.dtype), v)
  return jnp.swapaxes(y, 1, 2)


def upsample_nearest(x: jax.Array) -> jax.Array:
  """Repeats every pixel of float[B, H, W, C] 2 x 2 times."""
  b, h, w, c = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
  return x.reshape(b, 2 * h, 2 * w, c)


def average_pool(x: jax.Array) -> jax.Array:
  """Means over 2 x 2 pixels of float[B, H, W, C], summed in float32."""
  b, h, w, c = x.shape
  x32 = x.astype(jnp.float32).reshape(b, h // 2, 2, w // 2, 2, c)
  return x32.mean(axis=(2, 4)).astype(x.dtype)
