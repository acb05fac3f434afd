"""Linear layers of int8 that rescale before they write; Pallas, Triton."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from d2dpm_jax.quantization.kernels import epilogue

Array = jax.Array

_ONES = 16  # Columns of ones that sum up rows; the least that a product takes.
_GROUP = 8  # Tiles of rows that share tiles of columns in the cache.


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of a tile, powers of two, and what a program has.

  Attributes:
    m: rows.
    n: columns.
    k: products added up at a time; divides K.
    warps: of 32 threads.
    stages: tiles that are on their way at a time.
  """

  m: int = 128
  n: int = 128
  k: int = 64
  warps: int = 8
  stages: int = 4


TILES = Tiles()


def matmul_rescale(
  a: Array,
  k: Array,
  scale: Array,
  bias: Array,
  *,
  shift: Array | None = None,
  row_sums: Array | None = None,
  correction: Array | None = None,
  residual: Array | None = None,
  dtype: Any = jnp.bfloat16,
  tiles: Tiles = TILES,
  interpret: bool = False,
) -> Array:
  """`(a k' + row_sums shift + correction) scale + bias + residual`.

  Args:
    a: int8[M, K].
    k: int8[N, K], the kernel, transposed.
    scale: float32[N].
    bias: float32[N].
    shift: int32[N], B of `integer`; None is 0.
    row_sums: int32[M], sums of `a` over K. With a shift and without them, the
      kernel sums up itself.
    correction: int32[N].
    residual: bfloat16[M, N].
    dtype: of the result.
    tiles: see there.
    interpret: run on any device, slowly.

  Returns:
    dtype[M, N].

  Raises:
    ValueError: shapes do not fit each other or the tiles.
  """
  m, depth = a.shape
  n = k.shape[0]
  if k.shape[1] != depth or depth % tiles.k or m % tiles.m:
    raise ValueError(f'{a.shape}, {k.shape} and {tiles} do not fit.')
  if shift is None:
    row_sums = None
  optional = {
    'shift': shift,
    'row_sums': row_sums,
    'correction': correction,
    'residual': residual,
  }
  given = {name: x for name, x in optional.items() if x is not None}
  rows_of, columns_of = m // tiles.m, pl.cdiv(n, tiles.n)
  inside = n % tiles.n == 0
  sum_here = shift is not None and row_sums is None

  def load(ref, index, mask):
    if inside:
      return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=mask, other=0)

  def kernel(a_ref, k_ref, scale_ref, bias_ref, *refs):
    *rest, y_ref = refs
    more = dict(zip(given, rest, strict=True))
    # Tiles in bands of rows, so that a band stays in the cache.
    which = pl.program_id(0)
    band, within = epilogue.divide(which, _GROUP * columns_of)
    first = band * _GROUP
    height = jnp.minimum(rows_of - first, _GROUP)
    row = first + jax.lax.rem(within, height)
    column = jax.lax.div(within, height)
    rows = row * tiles.m + jnp.arange(tiles.m)
    columns = column * tiles.n + jnp.arange(tiles.n)
    mask = columns < n
    # What is read beyond the last column is not written.
    read = columns if inside else jnp.where(mask, columns, 0)
    ones = jnp.ones((_ONES, tiles.k), jnp.int8)

    def step(i, sums):
      depths = (i * tiles.k + jnp.arange(tiles.k))[None]
      a_tile = plgpu.load(a_ref.at[rows[:, None], depths])
      k_tile = plgpu.load(k_ref.at[read[:, None], depths])
      total = sums[0] + dot(a_tile, k_tile)
      return (total, sums[1] + dot(a_tile, ones)) if sum_here else (total,)

    start = (jnp.zeros((tiles.m, tiles.n), jnp.int32),)
    if sum_here:
      start += (jnp.zeros((tiles.m, _ONES), jnp.int32),)
    total, *summed = jax.lax.fori_loop(0, depth // tiles.k, step, start)

    def per_column(ref):
      return load(ref, columns, mask)[None]

    values: dict[str, Array] = {}
    if shift is not None:
      values['shift'] = per_column(more['shift'])
      if sum_here:
        values['sums'] = jnp.max(summed[0], axis=1)[:, None]
      else:
        values['sums'] = plgpu.load(more['row_sums'].at[rows])[:, None]
    if correction is not None:
      values['correction'] = per_column(more['correction'])
    wide = jnp.broadcast_to(mask[None], (tiles.m, tiles.n))
    square = (rows[:, None], columns[None])
    if residual is not None:
      values['residual'] = load(more['residual'], square, wide)
    y = epilogue.rescale(
      total, per_column(scale_ref), per_column(bias_ref), **values
    )
    plgpu.store(
      y_ref.at[square], y.astype(dtype), mask=None if inside else wide
    )

  return pl.pallas_call(
    kernel,
    grid=(rows_of * columns_of,),
    out_shape=jax.ShapeDtypeStruct((m, n), dtype),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.warps, num_stages=tiles.stages
    ),
    interpret=interpret,
    name='matmul_rescale',
  )(a, k, scale, bias, *given.values())


def dot(a: Array, k: Array) -> Array:
  """int32[M, N] of int8[M, K] and int8[N, K]."""
  return jax.lax.dot_general(
    a, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
  )
