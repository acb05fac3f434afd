"""Uniform affine quantization: the grid, its range, codes and dequantization.

A grid of `b` bits with step `scale` and offset `zero_point` holds the numbers
`(q - zero_point) * scale`, `q = 0 .. 2**b - 1`. Zero points are whole numbers
kept in floating point. They may lie outside 0 .. 2**b - 1: a range that does
not contain zero (activations after an offset, say) then still gets all its
codes. The zeros that a padded convolution adds come after quantization and
are exact in either case.

Source: arXiv:1806.08342, Sec. 2.1 (affine grid, straight-through gradient);
arXiv:1911.07190 (L_p range); arXiv:1902.08153 (gradient of the step).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

MIN_BITS, MAX_BITS = 2, 8
# Range search: fractions of the full range that are tried, and the norm.
MSE_SHRINK = np.float32(1.0 - 0.01 * np.arange(80))
MSE_NORM = 2.4


@flax.struct.dataclass
class QParams:
  """Grid of a tensor. A pytree of two arrays; `bits` is static.

  Attributes:
    scale: float[] (per tensor) or float[1, .., 1, C] with the rank of the
      tensor (per channel of its last axis); above 0.
    zero_point: like `scale`; whole numbers.
    bits: 2..8.
  """

  scale: Array
  zero_point: Array
  bits: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class QWeight:
  """Quantized kernel: codes on the grid `(scale, zero_point, bits)`.

  Attributes:
    codes: uint8 with the shape of the kernel, values 0 .. 2**bits - 1.
    scale: float[] or float[1, .., 1, O].
    zero_point: like `scale`.
    bits: 2..8; codes of fewer bits than 8 can be packed.
  """

  codes: Array
  scale: Array
  zero_point: Array
  bits: int = flax.struct.field(pytree_node=False)

  @property
  def qparams(self) -> QParams:
    """Its grid."""
    return QParams(self.scale, self.zero_point, self.bits)


def check_bits(bits: int) -> int:
  """Returns `bits` as an int.

  Raises:
    ValueError: it is not a whole number, or not in 2..8.
  """
  if isinstance(bits, bool) or not isinstance(bits, int | np.integer):
    raise ValueError(f'Bits must be a whole number, got {bits!r}.')
  if not MIN_BITS <= bits <= MAX_BITS:
    raise ValueError(f'{bits} bits: expected {MIN_BITS}..{MAX_BITS}.')
  return int(bits)


def _check_rank(x: Array, q: QParams | QWeight) -> None:
  if q.scale.ndim not in (0, x.ndim):
    raise ValueError(f'scale {q.scale.shape} does not fit x {x.shape}.')


def _clip(x: Array, top: Array | float) -> Array:
  """Clips to [0, top]; the gradient is 1 at both ends, 0 outside.

  Codes are whole numbers and often equal an end. `jnp.clip` would pass half
  of their gradient there, PyTorch's `clamp` passes all of it.
  """
  return jnp.where(x < 0, 0.0, jnp.where(x > top, top, x))


def round_ste(x: Array) -> Array:
  """Rounds half to even; the gradient is that of the identity."""
  return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _snap(x: Array, scale: Array, zero_point: Array, top: Array | float):
  codes = _clip(round_ste(x / scale) + zero_point, top)
  return (codes - zero_point) * scale


def fake_quant(x: Array, q: QParams) -> Array:
  """Snaps `x` to the grid of `q`.

  The rounding is identity for gradients, so inside the range d/dx is 1 and
  d/dscale is `round(x/scale) - x/scale`; outside they are 0 and the clipped
  code minus `zero_point` (the learned step size of LSQ).

  Source: arXiv:1806.08342, Sec. 2.1. Same numbers as UniformAffineQuantizer in
  yhhhli/BRECQ, quant/quant_layer.py.

  Args:
    x: float[...]; a kernel [H, W, I, O] or an activation [B, H, W, C].
    q: grid; `q.scale` is [] (per tensor) or has the rank of `x`.

  Returns:
    float[...] with the shape and dtype of `x`; computed in the wider of the
    dtypes of `x` and the scale.

  Raises:
    ValueError: `q.scale` has neither rank 0 nor the rank of `x`.
  """
  _check_rank(x, q)
  return _snap(x, q.scale, q.zero_point, 2**q.bits - 1).astype(x.dtype)


def quantize(x: Array, q: QParams) -> QWeight:
  """Codes of the grid points nearest to `x`.

  Args:
    x: float[...].
    q: grid of `x`.

  Returns:
    Codes with the shape of `x`; `dequantize` of them equals `fake_quant`.

  Raises:
    ValueError: `q.scale` has neither rank 0 nor the rank of `x`.
  """
  _check_rank(x, q)
  codes = _clip(jnp.round(x / q.scale) + q.zero_point, 2**q.bits - 1)
  return QWeight(codes.astype(jnp.uint8), q.scale, q.zero_point, q.bits)


def dequantize(w: QWeight, dtype: jnp.dtype = jnp.float32) -> Array:
  """Kernel that the codes stand for, `(codes - zero_point) * scale`."""
  _check_rank(w.codes, w)
  kernel = (w.codes.astype(w.scale.dtype) - w.zero_point) * w.scale
  return kernel.astype(dtype)


def _ends(x: Array, per_channel: bool) -> tuple[Array, Array]:
  """Smallest and largest element; float[] or float[1, .., 1, C]."""
  if not per_channel:
    return jnp.min(x), jnp.max(x)
  axes = tuple(range(x.ndim - 1))
  return jnp.min(x, axes, keepdims=True), jnp.max(x, axes, keepdims=True)


def _grid(low: Array, high: Array, top: Array) -> tuple[Array, Array]:
  """Scale and zero point of [low, high]; `high > low` is needed."""
  scale = (high - low) / top
  return scale, jnp.round(-low / scale)


def _widen(low: Array, high: Array) -> tuple[Array, Array]:
  """Gives ranges without extent one, so that no scale is 0.

  A constant c other than 0 gets the range between 0 and c, on whose end it
  lies; a constant 0 gets [0, 1], on which it is code 0. Subnormal extents
  count as none: a scale must not underflow.
  """
  flat = (high - low) < 2.0**8 * jnp.finfo(low.dtype).tiny
  low, high = (
    jnp.where(flat, jnp.minimum(low, 0), low),
    jnp.where(flat, jnp.maximum(high, 0), high),
  )
  zero = (high - low) < 2.0**8 * jnp.finfo(low.dtype).tiny
  return jnp.where(zero, 0, low), jnp.where(zero, 1, high)


@functools.partial(jax.jit, static_argnames='per_channel')
def _range_max(x: Array, top: Array, per_channel: bool) -> tuple[Array, Array]:
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  low, high = _ends(x, per_channel)
  low, high = _widen(jnp.minimum(low, 0), jnp.maximum(high, 0))
  return _grid(low, high, top)


@functools.partial(jax.jit, static_argnames='per_channel')
def _range_mse(x: Array, top: Array, per_channel: bool) -> tuple[Array, Array]:
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  low, high = _widen(*_ends(x, per_channel))

  def step(best, shrink):
    score, best_scale, best_zero = best
    scale, zero_point = _grid(low * shrink, high * shrink, top)
    error = _snap(x, scale, zero_point, top) - x
    error = jnp.abs(error) ** MSE_NORM
    # Two means in a row: a single float32 sum over millions loses digits.
    error = jnp.mean(error, tuple(range(x.ndim - 1)), keepdims=True)
    new = error if per_channel else jnp.mean(error)
    better = new < score
    best = (
      jnp.where(better, new, score),
      jnp.where(better, scale, best_scale),
      jnp.where(better, zero_point, best_zero),
    )
    return best, None

  start = (jnp.full_like(low, jnp.inf), *_grid(low, high, top))
  (_, scale, zero_point), _ = jax.lax.scan(step, start, MSE_SHRINK)
  return scale, zero_point


def _checked(x: Array, bits: int) -> Array:
  check_bits(bits)
  if x.size == 0:
    raise ValueError(f'No range for an empty tensor of shape {x.shape}.')
  return x


def range_max(x: Array, bits: int, per_channel: bool = False) -> QParams:
  """Grid from the smallest to the largest element, zero included.

  Zero is always inside this range, so the zero point is in 0 .. 2**bits - 1.

  Args:
    x: float[..., C], not empty; constant tensors are fine.
    bits: 2..8.
    per_channel: one grid per index of the last axis instead of one in all.

  Returns:
    The grid; float32 arrays (float64 for float64 `x`).

  Raises:
    ValueError: `bits` out of range, or `x` empty.
  """
  x = _checked(x, bits)
  scale, zero_point = _range_max(x, np.float32(2**bits - 1), per_channel)
  return QParams(scale, zero_point, bits)


def range_mse(x: Array, bits: int, per_channel: bool = False) -> QParams:
  """Grid with the least L_2.4 error among 80 shrunk ranges.

  Both ends of [min, max] are multiplied by 1, 0.99, .. 0.21; the first of the
  best ones wins. Zero is not forced into the range: for `x` of one sign the
  zero point lies outside 0 .. 2**bits - 1, and more codes are of use.

  Source: arXiv:1911.07190, as in yhhhli/BRECQ, quant/quant_layer.py; constant
  tensors, which fail there, lie exactly on their grid up to float rounding.

  Args:
    x: float[..., C], not empty; constant tensors are fine.
    bits: 2..8.
    per_channel: one grid per index of the last axis instead of one in all.

  Returns:
    The grid; float32 arrays (float64 for float64 `x`).

  Raises:
    ValueError: `bits` out of range, or `x` empty.
  """
  x = _checked(x, bits)
  scale, zero_point = _range_mse(x, np.float32(2**bits - 1), per_channel)
  return QParams(scale, zero_point, bits)


def widen(q: QParams, reach: float) -> QParams:
  """The grid itself if it reaches from -reach to reach, else a wider one.

  Args:
    q: grid, per tensor or per channel.
    reach: in units of the tensor, >= 0.

  Returns:
    A grid of the same shape and bits.
  """
  top = 2**q.bits - 1
  low, high = -q.zero_point * q.scale, (top - q.zero_point) * q.scale
  scale, zero_point = _grid(
    jnp.minimum(low, -reach), jnp.maximum(high, reach), jnp.float32(top)
  )
  enough = (low <= -reach) & (high >= reach)
  return QParams(
    jnp.where(enough, q.scale, scale),
    jnp.where(enough, q.zero_point, zero_point),
    q.bits,
  )


RANGE_METHODS: dict[str, Callable[..., QParams]] = {
  'max': range_max,
  'mse': range_mse,
}


def range_method(name: str) -> Callable[..., QParams]:
  """Looks up `RANGE_METHODS`.

  Raises:
    ValueError: there is no such method; the message names the choices.
  """
  if name not in RANGE_METHODS:
    raise ValueError(
      f'Range method {name!r}: expected one of {sorted(RANGE_METHODS)}.'
    )
  return RANGE_METHODS[name]


@functools.partial(jax.jit, static_argnames=('method', 'bits', 'per_channel'))
def nearest_weight(
  kernel: Array, bits: int, method: str = 'mse', per_channel: bool = True
) -> QWeight:
  """Range search and rounding to nearest, as one program.

  Args:
    kernel: float[..., O].
    bits: 2..8.
    method: a key of `RANGE_METHODS`.
    per_channel: one grid per output channel instead of one in all.

  Returns:
    Codes and grid of the kernel.

  Raises:
    ValueError: `bits` out of range, or an unknown method.
  """
  return quantize(kernel, range_method(method)(kernel, bits, per_channel))
