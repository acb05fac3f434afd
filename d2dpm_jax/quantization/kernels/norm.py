"""Norm, SiLU, quantization and padding in one pass; Pallas, Triton."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from d2dpm_jax.quantization.kernels.hopper import divide

Array = jax.Array

# Added to a float32 of size up to 2**22, this rounds it half to even, and
# leaves the whole number in the low bits.
_ROUND = np.float32(1.5 * 2**23)
_ROUND_BITS = int(_ROUND.view(np.int32))
_LOG2E = float(np.log2(np.e))
_WARP = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of a tile, powers of two, and what a program has.

  Attributes:
    pixels: of a padded image.
    channels: taken at a time; divides C.
    warps: of 32 threads.
  """

  pixels: int = 32
  channels: int = 64
  warps: int = 4


def grid_numbers(
  inverse_scale: Any, zero_point: Any, offset: Any, bits: int = 8
) -> Array:
  """float32[4], what `norm_silu_quantize` takes; once per layer.

  Args:
    inverse_scale: float32[], 1 / step of the grid.
    zero_point: float32[], whole, 0 .. 2**bits - 1.
    offset: float32[] or int[], what is taken from codes to make them int8.
    bits: of the codes.
  """
  zero_point = jnp.asarray(zero_point, jnp.float32)
  return jnp.stack(
    [
      jnp.asarray(inverse_scale, jnp.float32),
      -zero_point,  # The least and the largest quotient, rounded.
      2**bits - 1 - zero_point,
      zero_point - jnp.asarray(offset, jnp.float32),  # Zero, as int8.
    ]
  )


@functools.partial(
  jax.jit, static_argnames=('silu', 'padding', 'tiles', 'interpret')
)
def norm_silu_quantize(
  x: Array,
  gain: Array,
  shift: Array,
  grid: Array,
  *,
  silu: bool = True,
  padding: int = 1,
  tiles: Tiles = Tiles(),
  interpret: bool = False,
) -> Array:
  """Quantizes `silu(x gain + shift)`, padded with the code of zero.

  Codes are those of `affine.quantize`, but where its quotient and this product
  are rounded up and down. Zero minus the offset has to be an int8.

  Args:
    x: bfloat16 or float32[B, H, W, C].
    gain: float32[B, C], of the norm: rstd scale.
    shift: float32[B, C]: bias - mean rstd scale.
    grid: float32[4], see `grid_numbers`.
    silu: whether there is one.
    padding: pixels added at each side.
    tiles: see there.
    interpret: run on any device, slowly.

  Returns:
    int8[B, H + 2 padding, W + 2 padding, C], codes minus the offset.

  Raises:
    ValueError: the channels do not divide into those of a tile.
  """
  b, height, width, depth = x.shape
  if depth % tiles.channels:
    raise ValueError(f'{depth} channels do not divide into {tiles}.')
  tall, wide = height + 2 * padding, width + 2 * padding
  total = tall * wide
  blocks = pl.cdiv(total, tiles.pixels)

  def kernel(x_ref, gain_ref, shift_ref, grid_ref, a_ref):
    block, image = pl.program_id(0), pl.program_id(1)
    pixels = block * tiles.pixels + jnp.arange(tiles.pixels)
    row, column = (v - padding for v in divide(pixels, wide))
    exists = pixels < total
    interior = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    if padding == 0:
      interior = exists
    source = (image * height + row) * width + column
    source = jnp.where(interior, source, 0)
    inverse, low, high = grid_ref[0], grid_ref[1], grid_ref[2]
    border = grid_ref[3].astype(jnp.int32)
    shape = (tiles.pixels, tiles.channels)
    interior = jnp.broadcast_to(interior[:, None], shape)
    targets = image * total + pixels
    exists_here = jnp.broadcast_to(exists[:, None], shape)
    here = jnp.full(tiles.channels, image)

    def step(i, _):
      channels = i * tiles.channels + jnp.arange(tiles.channels)
      values = plgpu.load(
        x_ref.at[source[:, None], channels[None]], mask=interior, other=0.0
      ).astype(jnp.float32)
      y = values * plgpu.load(gain_ref.at[here, channels])[None]
      y += plgpu.load(shift_ref.at[here, channels])[None]
      if silu:
        y *= _reciprocal(1.0 + jnp.exp2(y * -_LOG2E), interpret)
      codes = _rounded(y * inverse, low, high)
      codes = jnp.where(interior, codes + border, border)
      plgpu.store(
        a_ref.at[targets[:, None], channels[None]],
        codes.astype(jnp.int8),
        mask=exists_here,
      )
      return ()

    jax.lax.fori_loop(0, depth // tiles.channels, step, ())

  a = pl.pallas_call(
    kernel,
    grid=(blocks, b),
    out_shape=jax.ShapeDtypeStruct((b * total, depth), jnp.int8),
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
    interpret=interpret,
    name='norm_silu_quantize',
  )(x.reshape(-1, depth), gain, shift, grid)
  return a.reshape(b, tall, wide, depth)


@functools.partial(
  jax.jit, static_argnames=('epsilon', 'sums', 'rows', 'warps', 'interpret')
)
def layer_norm_quantize(
  x: Array,
  gain: Array,
  shift: Array,
  grids: tuple[Array, ...],
  *,
  epsilon: float = 1e-5,
  sums: bool = True,
  rows: int = 4,
  warps: int = 4,
  interpret: bool = False,
) -> list[tuple[Array, Array | None]]:
  """Quantizes the layer norm of rows, for several layers at once.

  Args:
    x: bfloat16 or float32[M, C].
    gain: float[C], the norm's scale.
    shift: float[C], the norm's bias.
    grids: of every layer float32[4], see `grid_numbers`.
    epsilon: of the norm.
    sums: also return sums over channels.
    rows: of a tile, a power of two that divides M.
    warps: of 32 threads per tile.
    interpret: run on any device, slowly.

  Returns:
    For every layer int8[M, C], codes minus the offset, and int32[M], their
    sums, or None.

  Raises:
    ValueError: the rows do not divide into tiles.
  """
  m, depth = x.shape
  if m % rows:
    raise ValueError(f'{m} rows do not divide into tiles of {rows}.')
  padded = pl.next_power_of_2(depth)
  whole = padded == depth

  def kernel(x_ref, gain_ref, shift_ref, grid_ref, *out_refs):
    line = pl.program_id(0) * rows + jnp.arange(rows)
    channels = jnp.arange(padded)
    exists = channels < depth
    square = (line[:, None], channels[None])
    inside = jnp.broadcast_to(exists[None], (rows, padded))

    def load(ref, index, mask):
      if whole:
        return plgpu.load(ref.at[index]).astype(jnp.float32)
      return plgpu.load(ref.at[index], mask=mask, other=0.0).astype(jnp.float32)

    values = load(x_ref, square, inside)
    mean = jnp.sum(values, 1, keepdims=True) * (1 / depth)
    centred = jnp.where(inside, values - mean, 0.0)
    variance = jnp.sum(centred * centred, 1, keepdims=True) * (1 / depth)
    y = centred * jax.lax.rsqrt(variance + epsilon)
    y = y * load(gain_ref, channels, exists)[None]
    y += load(shift_ref, channels, exists)[None]
    for i in range(len(grids)):
      inverse, low, high, offset = (grid_ref[4 * i + j] for j in range(4))
      codes = _rounded(y * inverse, low, high) + offset.astype(jnp.int32)
      plgpu.store(
        out_refs[i].at[square],
        codes.astype(jnp.int8),
        mask=None if whole else inside,
      )
      if sums:
        total = jnp.sum(jnp.where(inside, codes, 0), 1)
        plgpu.store(out_refs[len(grids) + i].at[line], total)

  shapes: list[Any] = [
    jax.ShapeDtypeStruct((m, depth), jnp.int8) for _ in grids
  ]
  if sums:
    shapes += [jax.ShapeDtypeStruct((m,), jnp.int32) for _ in grids]
  found = pl.pallas_call(
    kernel,
    grid=(m // rows,),
    out_shape=shapes,
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    interpret=interpret,
    name='layer_norm_quantize',
  )(x, gain, shift, jnp.concatenate(grids))
  return [
    (found[i], found[len(grids) + i] if sums else None)
    for i in range(len(grids))
  ]


def _rounded(y: Array, low: Array, high: Array) -> Array:
  """int32, clipped and then rounded half to even."""
  y = jnp.minimum(jnp.maximum(y, low), high) + _ROUND
  return jax.lax.bitcast_convert_type(y, jnp.int32) - _ROUND_BITS


def _reciprocal(x: Array, interpret: bool) -> Array:
  """1 / x to a relative error of 2**-23; infinity gives 0."""
  if interpret:
    return 1.0 / x
  [y] = plgpu.elementwise_inline_asm(
    'rcp.approx.ftz.f32 $0, $1;',
    args=[x],
    constraints='=f,f',
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
  )
  return y
