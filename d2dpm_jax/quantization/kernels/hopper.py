"""Products of int8 that rescale before they write; Pallas, Mosaic GPU, Hopper.

One warpgroup copies tiles of the operands to shared memory, as far ahead as
there is room, and two multiply them (WGMMA) and write the result. Blocks stay
for many tiles, so that the operands of the next tile are on their way while
one is written. Residuals are copied to where the result will be staged, during
the products.

Convolutions take images as [H, W, B, C]. The rows of a tile are images at one
pixel then, so that a tile of any position of the kernel is an aligned box, and
windows need neither copies nor a table.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array

_SIDE = 3  # Of the kernel of a convolution.
_WARPGROUPS = 2  # That multiply.
_COPIES = _WARPGROUPS + 1  # Per step: rows for both of them, and columns.
_ONES = 8  # Columns of ones that sum up rows; the least that WGMMA takes.
_REGISTERS = (40, 232)  # Of a thread that copies, and one that multiplies.


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of a tile.

  Attributes:
    rows: of one warpgroup; a multiple of 64. A block has two.
    n: columns; divides N; a multiple of `columns`, at most 256.
    k: products added up at a time; divides K; a multiple of 64.
    stages: tiles of operands that shared memory has room for.
    columns: rescaled at a time; 32 or 64.
    band: tiles of columns that are visited before the next rows.
    blocks: that run at a time; 0 is one per multiprocessor of an H100.
  """

  rows: int = 64
  n: int = 192
  k: int = 128
  stages: int = 4
  columns: int = 64
  band: int = 1
  blocks: int = 0

  def shared_bytes(self, sums: bool = False) -> int:
    """Shared memory of a block, without barriers."""
    depth = self.stages * (_WARPGROUPS * self.rows + self.n) * self.k
    ones = _WARPGROUPS * _ONES * self.k if sums else 0
    return depth + ones + _WARPGROUPS * self.rows * self.n * 2


_MULTIPROCESSORS = 132
_TO_EVEN = lax.RoundingMethod.TO_NEAREST_EVEN
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def matmul_rescale(
  a: Array,
  k: Array,
  scale: Array,
  bias: Array,
  *,
  shift: Array | None = None,
  row_sums: Array | None = None,
  residual: Array | None = None,
  tiles: Tiles = Tiles(),
  interpret: Any = None,
) -> Array:
  """`(a k' + row_sums shift) scale + bias + residual`.

  Args:
    a: int8[M, K].
    k: int8[N, K], the kernel, transposed.
    scale: float32[N].
    bias: float32[N], see `add_correction`.
    shift: int32[N], B of `integer`; None is 0.
    row_sums: int32[M], sums of `a` over K. With a shift and without them, the
      kernel sums up itself.
    residual: bfloat16[M, N].
    tiles: see there.
    interpret: what `plgpu.kernel` takes.

  Returns:
    bfloat16[M, N].

  Raises:
    ValueError: shapes do not fit each other or the tiles.
  """
  m, depth = a.shape
  height = _WARPGROUPS * tiles.rows
  if k.shape[1] != depth or m % height:
    raise ValueError(f'{a.shape}, {k.shape} and {tiles} do not fit.')

  def rows_at(ref, tile, half):
    return ref.at[pl.ds(tile * height + half * tiles.rows, tiles.rows)]

  def operand(ref, tile, half, step):
    return rows_at(ref, tile, half).at[:, pl.ds(step * tiles.k, tiles.k)]

  return _product(
    a,
    k,
    scale,
    bias,
    shift,
    row_sums,
    residual,
    None,
    operand,
    rows_at,
    tiles_of_rows=m // height,
    shape=(m, k.shape[0]),
    tiles=tiles,
    interpret=interpret,
    name='matmul_rescale',
  )


def matmul_geglu_quantize(
  a: Array,
  k: Array,
  scale: Array,
  bias: Array,
  grid: Array,
  *,
  shift: Array | None = None,
  row_sums: Array | None = None,
  tiles: Tiles = Tiles(columns=32),
  interpret: Any = None,
) -> Array:
  """Codes of `y gelu(gate)`, where a linear layer returns y and the gate.

  Args:
    a: int8[M, K].
    k: int8[2 N, K], the kernel, transposed, as `geglu_layout` returns it.
    scale: float32[2 N], arranged likewise, as all that follow.
    bias: float32[2 N], see `add_correction`.
    grid: float32[4] of the next layer, see `norm.grid_numbers`.
    shift: int32[2 N], see `matmul_rescale`.
    row_sums: int32[M], see `matmul_rescale`.
    tiles: n columns of the layer make n / 2 of the result.
    interpret: what `plgpu.kernel` takes.

  Returns:
    int8[M, N], codes minus the offset.

  Raises:
    ValueError: shapes do not fit each other or the tiles.
  """
  m, depth = a.shape
  height = _WARPGROUPS * tiles.rows
  if k.shape[1] != depth or m % height:
    raise ValueError(f'{a.shape}, {k.shape} and {tiles} do not fit.')

  def rows_at(ref, tile, half):
    return ref.at[pl.ds(tile * height + half * tiles.rows, tiles.rows)]

  def operand(ref, tile, half, step):
    return rows_at(ref, tile, half).at[:, pl.ds(step * tiles.k, tiles.k)]

  return _product(
    a,
    k,
    scale,
    bias,
    shift,
    row_sums,
    None,
    grid,
    operand,
    rows_at,
    tiles_of_rows=m // height,
    shape=(m, k.shape[0] // 2),
    tiles=tiles,
    interpret=interpret,
    name='matmul_geglu_quantize',
  )


def geglu_layout(x: Array, tiles: Tiles) -> Array:
  """[2 N, ..] with y and the gate of a tile next to each other; once."""
  half = tiles.n // 2
  halves = x.reshape(2, -1, half, *x.shape[1:])
  return jnp.moveaxis(halves, 0, 1).reshape(x.shape)


def kernel_layout(k: Array) -> Array:
  """int8[O, 9 I] of a kernel int8[3, 3, I, O]; once per kernel."""
  return jnp.moveaxis(k, -1, 0).reshape(k.shape[-1], -1)


def add_correction(bias: Array, scale: Array, correction: Array) -> Array:
  """A bias with a number per channel that is added to the sums of integers."""
  return bias + correction.astype(jnp.float32) * scale


def conv3x3_rescale(
  a: Array,
  k: Array,
  scale: Array,
  bias: Array,
  *,
  shift: Array | None = None,
  window_sums: Array | None = None,
  residual: Array | None = None,
  tiles: Tiles = Tiles(),
  interpret: Any = None,
) -> Array:
  """`(conv(a, k) + window_sums shift) scale + bias + residual`.

  Args:
    a: int8[H + 2, W + 2, B, I], padded already.
    k: int8[O, 9 I], see `kernel_layout`.
    scale: float32[O].
    bias: float32[O], see `add_correction`.
    shift: int32[O], B of `integer`; None is 0.
    window_sums: int32[H, W, B], sums of `a` over a window and all channels.
      With a shift and without them, the kernel sums up itself.
    residual: bfloat16[H, W, B, O].
    tiles: both warpgroups have images of one pixel, or if `rows` is B, of two
      pixels next to each other. k divides I.
    interpret: what `plgpu.kernel` takes.

  Returns:
    bfloat16[H, W, B, O].

  Raises:
    ValueError: shapes do not fit each other or the tiles.
  """
  height, width, b, depth = a.shape
  height, width = height - 2, width - 2
  n = k.shape[0]
  line, chunks = width + 2, depth // tiles.k
  halves = b // tiles.rows  # Warpgroups that a pixel takes.
  if (
    k.shape[1] != _SIDE**2 * depth
    or depth % tiles.k
    or b % tiles.rows
    or (height * width * halves) % _WARPGROUPS
  ):
    raise ValueError(f'{a.shape}, {k.shape} and {tiles} do not fit.')

  def rows_at(ref, tile, half):
    first = (tile * _WARPGROUPS + half) * tiles.rows
    return ref.at[pl.ds(first, tiles.rows)]

  def operand(ref, tile, half, step):
    pixel, part = _divide(tile * _WARPGROUPS + half, halves)
    y, x = _divide(pixel, width)
    tap, chunk = _divide(step, chunks)
    down, right = _divide(tap, _SIDE)
    return ref.at[
      (y + down) * line + x + right,
      pl.ds(part * tiles.rows, tiles.rows),
      pl.ds(chunk * tiles.k, tiles.k),
    ]

  m = height * width * b
  y = _product(
    a.reshape(-1, b, depth),
    k,
    scale,
    bias,
    shift,
    None if window_sums is None else window_sums.reshape(m),
    None if residual is None else residual.reshape(m, n),
    None,
    operand,
    rows_at,
    tiles_of_rows=m // (_WARPGROUPS * tiles.rows),
    shape=(m, n),
    tiles=tiles,
    interpret=interpret,
    name='conv3x3_rescale',
  )
  return y.reshape(height, width, b, n)


def _divide(x: Array, by: int) -> tuple[Array, Array]:
  """Quotient and remainder of an int32 that is not negative."""
  n = jnp.int32(by)
  return lax.div(x, n), lax.rem(x, n)


# JAX 0.10 wants an index there, and 0.11 wants none.
_INDEX: tuple[Any, ...] = (
  ((),)
  if inspect.signature(plgpu.load).parameters['idx'].default is inspect._empty
  else ()
)


def _load(ref: Any, layout: Any) -> Array:
  """An array from global memory, a number to every thread that needs it."""
  return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def _swizzled(width: int, bits: int) -> tuple[Any, ...]:
  """How WGMMA wants tiles in shared memory, and TMA lays them."""
  swizzle = plgpu.find_swizzle(width * bits)
  return (
    plgpu.TilingTransform((8, swizzle * 8 // bits)),
    plgpu.SwizzleTransform(swizzle),
  )


def _product(
  a: Array,
  k: Array,
  scale: Array,
  bias: Array,
  shift: Array | None,
  sums: Array | None,
  residual: Array | None,
  grid: Array | None,
  operand: Callable[..., Any],
  rows_at: Callable[..., Any],
  tiles_of_rows: int,
  shape: tuple[int, int],
  tiles: Tiles,
  interpret: Any,
  name: str,
) -> Array:
  """The kernel of both.

  Args:
    a: int8, as `operand` knows it.
    k: int8[N, K].
    scale: float32[N].
    bias: float32[N].
    shift: int32[N] or None.
    sums: int32[M] or None.
    residual: bfloat16[M, N] or None.
    grid: float32[4] or None, see `matmul_geglu_quantize`.
    operand: (reference to a, tile of rows, warpgroup, step) -> its [rows, k].
    rows_at: (reference to [M, ..], tile of rows, warpgroup) -> its [rows, ..].
    tiles_of_rows: of both warpgroups.
    shape: M, N.
    tiles: see there.
    interpret: what `plgpu.kernel` takes.
    name: of the kernel.
  """
  n, depth = k.shape
  if n % tiles.n or depth % tiles.k:
    raise ValueError(f'A kernel {k.shape} and {tiles} do not fit.')
  steps, tiles_of_columns = depth // tiles.k, n // tiles.n
  total_tiles = tiles_of_rows * tiles_of_columns
  blocks = min(tiles.blocks or _MULTIPROCESSORS, total_tiles)
  sum_here = shift is not None and sums is None
  # Columns of the result in a tile; a gate is half of them.
  written = tiles.n if grid is None else tiles.n // 2
  if written % tiles.columns:
    raise ValueError(f'{tiles} are no multiple of {tiles.columns} columns.')
  dtype = jnp.bfloat16 if grid is None else jnp.int8
  optional = {
    'shift': shift,
    'sums': sums if shift is not None else None,
    'residual': residual,
    'grid': grid,
    'ones': jnp.ones((_ONES, tiles.k), jnp.int8) if sum_here else None,
  }
  given = {key: x for key, x in optional.items() if x is not None}

  def body(a_ref, k_ref, scale_ref, bias_ref, *refs):
    more = dict(zip(given, refs, strict=False))
    y_ref, *scratch = refs[len(given) :]
    a_tiles, k_tiles, y_tiles, full, empty, *scratch = scratch
    if residual is not None:
      arrived, *scratch = scratch
    warpgroup = lax.axis_index('warpgroup')
    block = lax.axis_index('block')
    mine = lax.div(
      jnp.int32(total_tiles + blocks - 1) - block, jnp.int32(blocks)
    )

    def place(i):
      """Tile of rows and tile of columns of the i-th tile of this block."""
      return plgpu.planar_snake(
        block + i * blocks, (tiles_of_rows, tiles_of_columns), 1, tiles.band
      )

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
      plgpu.set_max_registers(_REGISTERS[0], action='decrease')

      def copy(i, _):
        slot = lax.rem(i, jnp.int32(tiles.stages))
        tile, step = _divide(i, steps)
        row, column = place(tile)

        @pl.when(i >= tiles.stages)
        def _():
          plgpu.barrier_wait(empty.at[slot])

        for half in range(_WARPGROUPS):
          plgpu.copy_gmem_to_smem(
            operand(a_ref, row, half, step),
            a_tiles.at[slot, half],
            full.at[slot],
          )
        plgpu.copy_gmem_to_smem(
          k_ref.at[
            pl.ds(column * tiles.n, tiles.n), pl.ds(step * tiles.k, tiles.k)
          ],
          k_tiles.at[slot],
          full.at[slot],
        )
        return ()

      count = mine * steps
      lax.fori_loop(0, count, copy, ())

      def see_off(i, _):
        plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(tiles.stages))])
        return ()

      lax.fori_loop(jnp.maximum(count - tiles.stages, 0), count, see_off, ())

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
      plgpu.set_max_registers(_REGISTERS[1], action='increase')
      if sum_here:
        ones, loaded = scratch
        mine_of_ones = ones.at[warpgroup]
        plgpu.copy_gmem_to_smem(
          more['ones'], mine_of_ones, loaded.at[warpgroup]
        )
        plgpu.barrier_wait(loaded.at[warpgroup])

      def one_tile(i, _):
        row, column = place(i)
        staged = y_tiles.at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if residual is not None:
          plgpu.copy_gmem_to_smem(
            rows_at(more['residual'], row, warpgroup).at[
              :, pl.ds(column * tiles.n, tiles.n)
            ],
            staged,
            arrived.at[warpgroup],
          )

        def multiply(total, *summed):
          def step(s, _):
            j = i * steps + s
            slot = lax.rem(j, jnp.int32(tiles.stages))
            plgpu.barrier_wait(full.at[slot])
            rows = a_tiles.at[slot, warpgroup]
            plgpu.wgmma(total, rows, k_tiles.at[slot].T)
            for ref in summed:
              plgpu.wgmma(ref, rows, mine_of_ones.T)
            # The products of the last step are done, those of this one go on.
            plgpu.wgmma_wait(1 + len(summed))

            @pl.when(s > 0)
            def _():
              before = lax.rem(j - 1, jnp.int32(tiles.stages))
              plgpu.barrier_arrive(empty.at[before])

            return ()

          lax.fori_loop(0, steps, step, ())
          return tuple(ref[...] for ref in (total, *summed))

        accumulators = [plgpu.ACC((tiles.rows, tiles.n), jnp.int32)]
        if sum_here:
          accumulators.append(plgpu.ACC((tiles.rows, _ONES), jnp.int32))
        total, *summed = pl.run_scoped(multiply, *accumulators)
        last = lax.rem((i + 1) * steps - 1, jnp.int32(tiles.stages))
        plgpu.barrier_arrive(empty.at[last])

        row_sums = None
        if sum_here:
          row_sums = jnp.max(summed[0], axis=1)
        elif shift is not None:
          row_sums = _load(
            rows_at(more['sums'], row, warpgroup), plgpu.Layout.WGMMA.reduce(1)
          )
        if residual is not None:
          plgpu.barrier_wait(arrived.at[warpgroup])

        def rescaled(first):
          here = pl.ds(column * tiles.n + first, tiles.columns)
          return _rescaled(
            total[:, first : first + tiles.columns],
            row_sums,
            [
              None if ref is None else ref.at[here]
              for ref in (more.get('shift'), scale_ref, bias_ref)
            ],
          )

        for first in range(0, written, tiles.columns):
          part = slice(first, first + tiles.columns)
          y = rescaled(first)
          if residual is not None:
            y += staged[:, part].astype(jnp.float32)
          if grid is not None:
            y *= _gelu(rescaled(written + first))
            numbers = more['grid']
            y = jnp.minimum(jnp.maximum(y * numbers[0], numbers[1]), numbers[2])
            y = lax.round(y, _TO_EVEN) + numbers[3]
          staged[:, part] = y.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          staged,
          rows_at(y_ref, row, warpgroup).at[
            :, pl.ds(column * written, written)
          ],
        )
        return ()

      lax.fori_loop(0, mine, one_tile, ())
      plgpu.wait_smem_to_gmem(0)

  operands = _swizzled(tiles.k, 8)
  scratch: list[Any] = [
    plgpu.SMEM(
      (tiles.stages, _WARPGROUPS, tiles.rows, tiles.k),
      jnp.int8,
      transforms=operands,
    ),
    plgpu.SMEM((tiles.stages, tiles.n, tiles.k), jnp.int8, transforms=operands),
    plgpu.SMEM(
      (_WARPGROUPS, tiles.rows, written),
      dtype,
      transforms=_swizzled(tiles.columns, 8 * jnp.dtype(dtype).itemsize),
    ),
    plgpu.Barrier(num_arrivals=_COPIES, num_barriers=tiles.stages),
    plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=tiles.stages),
  ]
  if residual is not None:
    scratch.append(plgpu.Barrier(num_barriers=_WARPGROUPS))
  if sum_here:
    scratch.append(
      plgpu.SMEM((_WARPGROUPS, _ONES, tiles.k), jnp.int8, transforms=operands)
    )
    scratch.append(plgpu.Barrier(num_barriers=_WARPGROUPS))
  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(shape, dtype),
    scratch_types=scratch,
    grid=(blocks,),
    grid_names=('block',),
    num_threads=_WARPGROUPS + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
    kernel_name=name,
  )(a, k, scale, bias, *given.values())


def _gelu(x: Array) -> Array:
  """x times the normal distribution function, to about 1e-7.

  Source: Abramowitz and Stegun, 7.1.26.
  """
  z = jnp.abs(x) * np.float32(0.5**0.5)
  t = 1.0 / (1.0 + np.float32(0.3275911) * z)
  tail = jnp.exp2(z * z * np.float32(-np.log2(np.e)))
  series = jnp.zeros_like(x)
  for factor in _ERF[::-1]:
    series = (series + np.float32(factor)) * t
  half = 0.5 * series * tail
  return x * jnp.where(x < 0, half, 1.0 - half)


def _rescaled(total: Array, row_sums: Array | None, refs: list[Any]) -> Array:
  """float32[rows, columns]: sums of integers, corrected, scaled, with bias."""

  def columns(ref):
    values = _load(ref, plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(values, total.shape, (1,))

  shift, scale, bias = refs
  if row_sums is not None:
    rows = lax.broadcast_in_dim(row_sums, total.shape, (0,))
    total += rows * columns(shift)
  return total.astype(jnp.float32) * columns(scale) + columns(bias)
