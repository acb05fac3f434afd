"""Norms with what comes behind, in one pass, and moments; Pallas, Triton."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from d2dpm_jax.quantization.kernels.hopper import ROUND, divide

Array = jax.Array

_ROUND_BITS = int(ROUND.view(np.int32))
_LOG2E = float(np.log2(np.e))
_PIXELS_SUMMED = 512  # By one program, in `group_affine`.


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of a tile, powers of two, and what a program has.

  Attributes:
    pixels: of an image, which may be padded.
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
  jax.jit, static_argnames=('silu', 'sums', 'padding', 'tiles', 'interpret')
)
def norm_silu_quantize(
  x: Array,
  gain: Array,
  shift: Array,
  grid: Array,
  *,
  silu: bool = True,
  sums: bool = True,
  padding: int = 1,
  tiles: Tiles = Tiles(),
  interpret: bool = False,
) -> tuple[Array, Array | None]:
  """Quantizes `silu(x gain + shift)`, padded with the code of zero.

  Codes are those of `affine.quantize`, but where its quotient and this product
  are rounded up and down. Zero minus the offset has to be an int8.

  Args:
    x: bfloat16 or float32[B, H, W, C].
    gain: float32[B, C], of the norm: rstd scale.
    shift: float32[B, C]: bias - mean rstd scale.
    grid: float32[4], see `grid_numbers`.
    silu: whether there is one.
    sums: also return sums over channels.
    padding: pixels added at each side.
    tiles: see there.
    interpret: run on any device, slowly.

  Returns:
    int8[B, H + 2 padding, W + 2 padding, C], codes minus the offset, and
    int32[B, H + 2 padding, W + 2 padding], their sums, or None.

  Raises:
    ValueError: the channels do not divide into those of a tile.
  """
  b, height, width, depth = x.shape
  if depth % tiles.channels:
    raise ValueError(f'{depth} channels do not divide into {tiles}.')
  tall, wide = height + 2 * padding, width + 2 * padding
  area = tall * wide
  blocks = pl.cdiv(area, tiles.pixels)

  def kernel(x_ref, gain_ref, shift_ref, grid_ref, a_ref, *sums_ref):
    block, image = pl.program_id(0), pl.program_id(1)
    pixels = block * tiles.pixels + jnp.arange(tiles.pixels)
    row, column = (v - padding for v in divide(pixels, wide))
    exists = pixels < area
    interior = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    if padding == 0:
      interior = exists
    source = (image * height + row) * width + column
    source = jnp.where(interior, source, 0)
    inverse, low, high = grid_ref[0], grid_ref[1], grid_ref[2]
    border = grid_ref[3].astype(jnp.int32)
    shape = (tiles.pixels, tiles.channels)
    interior = jnp.broadcast_to(interior[:, None], shape)
    targets = image * area + pixels
    exists_here = jnp.broadcast_to(exists[:, None], shape)
    here = jnp.full(tiles.channels, image)

    def step(i, total):
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
      return total + codes if sums else total

    total = jnp.zeros(shape if sums else (), jnp.int32)
    total = jax.lax.fori_loop(0, depth // tiles.channels, step, total)
    if sums:
      plgpu.store(sums_ref[0].at[targets], jnp.sum(total, 1), mask=exists)

  shapes: list[Any] = [jax.ShapeDtypeStruct((b * area, depth), jnp.int8)]
  if sums:
    shapes.append(jax.ShapeDtypeStruct((b * area,), jnp.int32))
  a, *found = pl.pallas_call(
    kernel,
    grid=(blocks, b),
    out_shape=shapes,
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
    interpret=interpret,
    name='norm_silu_quantize',
  )(x.reshape(-1, depth), gain, shift, grid)
  a = a.reshape(b, tall, wide, depth)
  return a, found[0].reshape(b, tall, wide) if sums else None


@functools.partial(
  jax.jit, static_argnames=('groups', 'epsilon', 'tiles', 'interpret')
)
def group_affine(
  x: Array,
  scale: Array,
  bias: Array,
  offset: Array,
  *,
  groups: int = 32,
  epsilon: float = 1e-5,
  tiles: Tiles = Tiles(),
  interpret: bool = False,
) -> tuple[Array, Array]:
  """The numbers with which the group norm of `x + offset` is `x gain + shift`.

  Sums are of distances to a pixel, as in `layers.group_moments`.

  Args:
    x: bfloat16 or float32[B, H, W, C].
    scale: float[C], of the norm.
    bias: float[C], of the norm.
    offset: float32[B, C], the same for all pixels.
    groups: number of them, which divides C.
    epsilon: of the norm.
    tiles: see there.
    interpret: run on any device, slowly.

  Returns:
    gain and shift, float32[B, C].

  Raises:
    ValueError: the channels do not divide into groups, or those of a tile.
  """
  b, height, width, depth = x.shape
  if depth % tiles.channels or depth % groups:
    raise ValueError(f'{depth} channels do not divide into {groups}, {tiles}.')
  x = x.reshape(b, -1, depth)
  middle = height // 2 * width + width // 2
  first, second = _sums_of_distances(x, middle, tiles, interpret)
  each, parts = depth // groups, first.shape[1]
  # Tiles are of sizes that are powers of two.
  lanes, lines = pl.next_power_of_2(each), pl.next_power_of_2(parts)

  def kernel(
    x_ref, first_ref, second_ref, scale_ref, bias_ref, offset_ref, *to
  ):
    image, group = pl.program_id(1), pl.program_id(0)
    lane, line = jnp.arange(lanes), jnp.arange(lines)
    channels, inside = group * each + lane, lane < each
    here = jnp.full(lanes, image)
    all_inside = inside[None] & (line < parts)[:, None]

    def load(ref, *index):
      values = plgpu.load(ref.at[index], mask=inside, other=0.0)
      return values.astype(jnp.float32)

    def mean_of(ref):
      index = (here[None], line[:, None], channels[None])
      found = plgpu.load(ref.at[index], mask=all_inside, other=0.0)
      return jnp.sum(found, 0) * (1 / (height * width))

    def over_group(values):
      return jnp.sum(jnp.where(inside, values, 0.0)) * (1 / each)

    distance = mean_of(first_ref)
    inner = jnp.maximum(mean_of(second_ref) - distance * distance, 0.0)
    added = load(offset_ref, here, channels)
    origin = load(x_ref, here, jnp.full(lanes, middle), channels)
    channel = distance + origin + added
    mean = over_group(channel)
    apart = channel - mean
    variance = over_group(inner + apart * apart)
    gain = jax.lax.rsqrt(variance + epsilon) * load(scale_ref, channels)
    shift = load(bias_ref, channels) - (mean - added) * gain
    for ref, values in zip(to, (gain, shift), strict=True):
      plgpu.store(ref.at[here, channels], values, mask=inside)

  return pl.pallas_call(
    kernel,
    grid=(groups, b),
    out_shape=[jax.ShapeDtypeStruct((b, depth), jnp.float32)] * 2,
    compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
    interpret=interpret,
    name='group_affine',
  )(x, first, second, scale, bias, offset)


def _sums_of_distances(
  x: Array, middle: int, tiles: Tiles, interpret: bool
) -> tuple[Array, Array]:
  """To pixel `middle` of [B, P, C], and of squares; float32[B, parts, C]."""
  b, area, depth = x.shape
  parts = pl.cdiv(area, _PIXELS_SUMMED)
  steps = pl.cdiv(area, parts * tiles.pixels)

  def kernel(x_ref, first_ref, second_ref):
    channels = pl.program_id(0) * tiles.channels + jnp.arange(tiles.channels)
    part, image = pl.program_id(1), pl.program_id(2)
    begin = part * steps * tiles.pixels
    at = jnp.full(tiles.channels, image * area + middle)
    origin = plgpu.load(x_ref.at[at, channels]).astype(jnp.float32)[None]

    def step(i, sums):
      pixels = begin + i * tiles.pixels + jnp.arange(tiles.pixels)
      inside = jnp.broadcast_to((pixels < area)[:, None], sums[0].shape)
      values = plgpu.load(
        x_ref.at[(image * area + pixels)[:, None], channels[None]],
        mask=inside,
        other=0.0,
      )
      distance = jnp.where(inside, values.astype(jnp.float32) - origin, 0.0)
      return sums[0] + distance, sums[1] + distance * distance

    zeros = jnp.zeros((tiles.pixels, tiles.channels), jnp.float32)
    sums = jax.lax.fori_loop(0, steps, step, (zeros, zeros))
    here = jnp.full(tiles.channels, image)
    for ref, values in zip((first_ref, second_ref), sums, strict=True):
      target = ref.at[here, jnp.full(tiles.channels, part), channels]
      plgpu.store(target, jnp.sum(values, 0))

  return pl.pallas_call(
    kernel,
    grid=(depth // tiles.channels, parts, b),
    out_shape=[jax.ShapeDtypeStruct((b, parts, depth), jnp.float32)] * 2,
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
    interpret=interpret,
    name='sums_of_distances',
  )(x.reshape(-1, depth))


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
  y = jnp.minimum(jnp.maximum(y, low), high) + ROUND
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
