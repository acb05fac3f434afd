"""3x3 convolutions of int8 that rescale before they write; Pallas, Triton."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from d2dpm_jax.quantization.kernels import epilogue, matmul

Array = jax.Array

_SIDE = 3  # Of a kernel.
_GROUP = 8  # Tiles of pixels that share tiles of channels in the cache.


def kernel_layout(k: Array) -> Array:
  """int8[9, O, I] of a kernel int8[3, 3, I, O]; once per kernel."""
  return jnp.swapaxes(k.reshape(_SIDE**2, *k.shape[2:]), 1, 2)


def conv3x3_rescale(
  a: Array,
  k: Array,
  scale: Array,
  bias: Array,
  *,
  shift: Array | None = None,
  window_sums: Array | None = None,
  correction: Array | None = None,
  residual: Array | None = None,
  moments: bool = False,
  dtype: Any = jnp.bfloat16,
  tiles: matmul.Tiles = matmul.TILES,
  interpret: bool = False,
) -> Any:
  """`(conv(a, k) + window_sums shift + correction) scale + bias + residual`.

  Args:
    a: int8[B, H + 2, W + 2, I], padded already.
    k: int8[9, O, I], see `kernel_layout`.
    scale: float32[O].
    bias: float32[O], or float32[B, O], one per image.
    shift: int32[O], B of `integer`; None is 0.
    window_sums: int32[B, H, W], sums of `a` over a window and all channels.
    correction: int32[O].
    residual: bfloat16[B, H, W, O].
    moments: also return what a group norm needs of the result.
    dtype: of the result.
    tiles: m is pixels in a row of all images, n output channels, k input
      channels; m divides H W or is a multiple of it.
    interpret: run on any device, slowly.

  Returns:
    dtype[B, H, W, O]. With `moments` also float32[T, 2, O], sums and sums of
    squares over tiles of m pixels, before the result is rounded.

  Raises:
    ValueError: shapes do not fit each other or the tiles.
  """
  b, height, width, depth = a.shape
  height, width = height - 2, width - 2
  n = k.shape[1]
  pixels, per_image = b * height * width, height * width
  if (
    k.shape != (_SIDE**2, n, depth)
    or depth % tiles.k
    or pixels % tiles.m
    or (per_image % tiles.m and tiles.m % per_image)
  ):
    raise ValueError(f'{a.shape}, {k.shape} and {tiles} do not fit.')
  sums = jnp.zeros(()) if window_sums is None else window_sums
  if shift is not None and sums.shape != (b, height, width):
    raise ValueError('A shift needs sums over windows.')
  optional = {
    'shift': shift,
    'sums': None if shift is None else sums.reshape(-1),
    'correction': correction,
    'residual': None if residual is None else residual.reshape(pixels, n),
  }
  given = {name: x for name, x in optional.items() if x is not None}
  rows_of, columns_of = pixels // tiles.m, pl.cdiv(n, tiles.n)
  inside = n % tiles.n == 0
  chunks = depth // tiles.k
  line = width + 2  # Pixels from one line of the padded image to the next.

  def load(ref, index, mask):
    if inside:
      return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=mask, other=0)

  def kernel(a_ref, k_ref, scale_ref, bias_ref, *refs):
    more = dict(zip(given, refs[: len(given)], strict=True))
    y_ref, *moment_refs = refs[len(given) :]
    which = pl.program_id(0)
    band, within = epilogue.divide(which, _GROUP * columns_of)
    first = band * _GROUP
    tall = jnp.minimum(rows_of - first, _GROUP)
    row = first + jax.lax.rem(within, tall)
    column = jax.lax.div(within, tall)
    rows = row * tiles.m + jnp.arange(tiles.m)
    columns = column * tiles.n + jnp.arange(tiles.n)
    mask = columns < n
    read = columns if inside else jnp.where(mask, columns, 0)
    image, place = epilogue.divide(rows, per_image)
    y, x = epilogue.divide(place, width)
    corner = (image * (height + 2) + y) * line + x

    def step(i, total):
      tap, chunk = epilogue.divide(i, chunks)
      down, right = epilogue.divide(tap, _SIDE)
      depths = (chunk * tiles.k + jnp.arange(tiles.k))[None]
      moved = corner + down * line + right
      a_tile = plgpu.load(a_ref.at[moved[:, None], depths])
      k_tile = plgpu.load(k_ref.at[(tap * n + read)[:, None], depths])
      return total + matmul.dot(a_tile, k_tile)

    total = jax.lax.fori_loop(
      0,
      _SIDE**2 * chunks,
      step,
      jnp.zeros((tiles.m, tiles.n), jnp.int32),
    )
    square = (rows[:, None], columns[None])
    wide = jnp.broadcast_to(mask[None], (tiles.m, tiles.n))

    def per_column(ref):
      return load(ref, columns, mask)[None]

    values: dict[str, Array] = {}
    if shift is not None:
      values['shift'] = per_column(more['shift'])
      values['sums'] = plgpu.load(more['sums'].at[rows])[:, None]
    if correction is not None:
      values['correction'] = per_column(more['correction'])
    if residual is not None:
      values['residual'] = load(more['residual'], square, wide)
    if bias.ndim == 1:
      added = per_column(bias_ref)
    elif per_image % tiles.m == 0:  # A tile is of one image.
      one = epilogue.divide(jnp.full(tiles.n, row * tiles.m), per_image)[0]
      added = load(bias_ref, (one, columns), mask)[None]
    else:
      added = load(bias_ref, (image[:, None], columns[None]), wide)
    y = epilogue.rescale(total, per_column(scale_ref), added, **values)
    plgpu.store(
      y_ref.at[square], y.astype(dtype), mask=None if inside else wide
    )
    for power, ref in enumerate(moment_refs, 1):
      plgpu.store(
        ref.at[jnp.full(tiles.n, row), columns],
        jnp.sum(y if power == 1 else y * y, axis=0),
        mask=None if inside else mask,
      )

  shapes = [jax.ShapeDtypeStruct((pixels, n), dtype)]
  if moments:
    shapes += [jax.ShapeDtypeStruct((rows_of, n), jnp.float32)] * 2
  y, *sums = pl.pallas_call(
    kernel,
    grid=(rows_of * columns_of,),
    out_shape=shapes,
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.warps, num_stages=tiles.stages
    ),
    interpret=interpret,
    name='conv3x3_rescale',
  )(
    a.reshape(-1, depth),
    k.reshape(-1, depth),
    scale,
    bias,
    *given.values(),
  )
  y = y.reshape(b, height, width, n)
  return (y, jnp.stack(sums, 1)) if moments else y


def window_sums(sums: Array) -> Array:
  """int32[B, H, W], sums over 3x3 windows of int32[B, H + 2, W + 2]."""
  height, width = sums.shape[1] - 2, sums.shape[2] - 2
  lines, total = jnp.int32(0), jnp.int32(0)
  for i in range(_SIDE):
    lines += sums[:, i : i + height]
  for i in range(_SIDE):
    total += lines[:, :, i : i + width]
  return total
