"""Products of int8 that rescale before they write; Pallas, Mosaic GPU, Hopper.

One warpgroup copies tiles of the operands to shared memory, as far ahead as
there is room, and two multiply them (WGMMA) and write the result. Blocks stay
for many tiles, so that the operands of the next tile are on their way while
one is written. Residuals are copied to where the result will be staged, during
the products.

Where the rows of a tile lie, the caller says (`products`): in a matrix, or for
a convolution in lines of pixels, which move from one position of its kernel to
the next.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array = jax.Array


class Rows(NamedTuple):
  """Where tiles of rows lie, in parts of equal length that are copied at once.

  Attributes:
    total: number of rows.
    parts: of the rows of a warpgroup.
    operand: (reference to `a`, first row of a warpgroup's tile, step) ->
      references to its parts, [.., k] each.
    outcome: (reference to the residual or the result, first row, columns) ->
      references to its parts, [.., columns] each.
    shape: of the result without its columns, and of the residual.
  """

  total: int
  parts: int
  operand: Callable[[Any, Any, Any], list[Any]]
  outcome: Callable[[Any, Any, Any], list[Any]]
  shape: tuple[int, ...]


WARPGROUPS = 2  # That multiply.
_ONES = 8  # Columns of ones that sum up rows; the least that WGMMA takes.
_REGISTERS = (40, 232)  # Of a thread that copies, and one that multiplies.
_MULTIPROCESSORS = 132
# Added to a float32 of size up to 2**22, this rounds it half to even, and
# leaves the whole number in the low bits.
ROUND = np.float32(1.5 * 2**23)
# x P(x^2) is the normal distribution function less 1/2, for |x| <= 4.5, and 1/2
# at the end; of all P of ten numbers the one whose x^2 P(x^2) is closest.
_NORMAL_END = np.float32(4.5)
_NORMAL = (
  *(3.98827463e-1, -6.62171021e-2, 9.74620413e-3, -1.09203288e-3),
  *(9.18069782e-5, -5.64468019e-6, 2.43398489e-7, -6.89904889e-9),
  *(1.14489571e-10, -8.37294698e-13),
)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of a tile.

  Attributes:
    rows: of one warpgroup; a multiple of 64. A block has two.
    n: columns; divides N; a multiple of 32, at most 256.
    k: products added up at a time; divides K; a multiple of 64.
    stages: tiles of operands that shared memory has room for.
    band: tiles of columns that are visited before the next rows.
    blocks: that run at a time.
  """

  rows: int = 64
  n: int = 192
  k: int = 128
  stages: int = 4
  band: int = 1
  blocks: int = _MULTIPROCESSORS

  @property
  def height(self) -> int:
    """Rows of a block."""
    return WARPGROUPS * self.rows


class Epilogue(NamedTuple):
  """What becomes of sums of products. All but `scale` may be None.

  Attributes:
    scale: float32[N].
    bias: float[N], or float[G, N], of G equal parts of the rows.
    shift: int32[N], times the sum of the row of `a`; see B of `integer`.
    row_sums: int32[M], those sums, if they are there already and the rows of a
      tile follow each other in memory.
    correction: int32[N], added to the sums.
    residual: bfloat16[M, N], added in the end.
    grid: float32[4], see `norm.grid_numbers`. With it the first half of the
      columns is multiplied with GELU of the second, and quantized.
  """

  scale: Array
  bias: Array | None = None
  shift: Array | None = None
  row_sums: Array | None = None
  correction: Array | None = None
  residual: Array | None = None
  grid: Array | None = None


def product(
  a: Array,
  k: Array,
  epilogue: Epilogue,
  rows: Rows,
  tiles: Tiles,
  *,
  name: str,
  dtype: Any = jnp.bfloat16,
  interpret: Any = None,
) -> Array:
  """`((a k' + sum(a) shift + correction) scale + bias) + residual`.

  Args:
    a: int8, as `rows` knows it.
    k: int8[N, K].
    epilogue: see there; M rows are `rows.shape`.
    rows: see there.
    tiles: see there.
    name: of the kernel.
    dtype: of the result, bfloat16 or float32, if it has no grid.
    interpret: what `plgpu.kernel` takes.

  Returns:
    dtype[*rows.shape, N]; with a grid int8[*rows.shape, N / 2], codes minus
    their offset.

  Raises:
    ValueError: shapes do not fit the tiles.
  """
  n, depth = k.shape
  if n % tiles.n or depth % tiles.k or rows.total % tiles.height:
    raise ValueError(
      f'{rows.total} rows, a kernel {k.shape} and {tiles} do not fit.'
    )
  if tiles.stages < 2:
    raise ValueError(f'{tiles} leave no room to copy while others multiply.')
  _check(epilogue, n, dtype, rows, tiles)
  given = {key: x for key, x in epilogue._asdict().items() if x is not None}
  if 'shift' not in given:
    given.pop('row_sums', None)
  elif 'row_sums' not in given:
    given['ones'] = jnp.ones((_ONES, tiles.k), jnp.int8)
  dtype = jnp.int8 if epilogue.grid is not None else dtype
  plan = _Plan(tiles, rows, n, depth, dtype, frozenset(given))
  scratch = plan.scratch()
  names = ('a', 'k', *given, 'y', *scratch)

  def body(*refs):
    tile = _Block(plan, dict(zip(names, refs, strict=True)))
    warpgroup = lax.axis_index('warpgroup')

    @pl.when(warpgroup == WARPGROUPS)
    def _():
      plgpu.set_max_registers(_REGISTERS[0], action='decrease')
      tile.copy_operands()

    @pl.when(warpgroup < WARPGROUPS)
    def _():
      plgpu.set_max_registers(_REGISTERS[1], action='increase')
      tile.multiply(warpgroup)

  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((*rows.shape, plan.columns), plan.dtype),
    scratch_types=list(scratch.values()),
    grid=(plan.blocks,),
    grid_names=('block',),
    num_threads=WARPGROUPS + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    interpret=interpret,
    kernel_name=name,
  )(a, k, *given.values())


def _check(
  epilogue: Epilogue, n: int, dtype: Any, rows: Rows, tiles: Tiles
) -> None:
  """Raises ValueError for what would be read out of bounds, or wrongly."""
  for name in ('scale', 'bias', 'shift', 'correction'):
    x = getattr(epilogue, name)
    if x is None or x.shape == (n,):
      continue
    if name != 'bias' or x.ndim != 2 or x.shape[1] != n:
      raise ValueError(f'{name} {x.shape} of {n} outputs.')
    if rows.total % (len(x) * tiles.rows):
      raise ValueError(f'A bias {x.shape} of {rows.total} rows and {tiles}.')
  sums = epilogue.row_sums
  if sums is not None and sums.shape != (rows.total,):
    raise ValueError(f'Sums {sums.shape} of {rows.total} rows.')
  if epilogue.residual is not None:
    if epilogue.grid is not None:
      raise ValueError('A gated layer has no residual.')
    if epilogue.residual.dtype != dtype:
      raise ValueError(f'A residual {epilogue.residual.dtype} and {dtype}.')


class _Plan(NamedTuple):
  """Sizes that follow from shapes."""

  tiles: Tiles
  rows: Rows
  n: int
  depth: int
  dtype: Any
  given: frozenset[str]

  @property
  def gated(self) -> bool:
    return 'grid' in self.given

  @property
  def columns(self) -> int:
    """Of the result."""
    return self.n // 2 if self.gated else self.n

  @property
  def written(self) -> int:
    """Columns of the result in a tile."""
    return self.tiles.n // 2 if self.gated else self.tiles.n

  @property
  def grid(self) -> tuple[int, int]:
    """Tiles of rows and of columns."""
    return self.rows.total // self.tiles.height, self.n // self.tiles.n

  @property
  def blocks(self) -> int:
    return min(self.tiles.blocks, self.grid[0] * self.grid[1])

  @property
  def steps(self) -> int:
    return self.depth // self.tiles.k

  def parts_of(self, ref: Any) -> list[Any]:
    """Rows of one warpgroup's tile in shared memory, as they are copied."""
    if self.rows.parts == 1:
      return [ref]
    part = self.tiles.rows // self.rows.parts
    return [ref.at[pl.ds(j * part, part)] for j in range(self.rows.parts)]

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers."""
    t = self.tiles
    operands = _swizzled(t.k, 8)
    copies = WARPGROUPS * self.rows.parts + (2 if self.gated else 1)
    result = {
      'a_tiles': plgpu.SMEM(
        (t.stages, WARPGROUPS, t.rows, t.k), jnp.int8, transforms=operands
      ),
      'k_tiles': plgpu.SMEM(
        (t.stages, t.n, t.k), jnp.int8, transforms=operands
      ),
      'staged': plgpu.SMEM(
        (WARPGROUPS, t.rows, self.written),
        self.dtype,
        transforms=_swizzled(self.written, 8 * jnp.dtype(self.dtype).itemsize),
      ),
      'full': plgpu.Barrier(num_arrivals=copies, num_barriers=t.stages),
      'empty': plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=t.stages),
    }
    if 'residual' in self.given:
      result['arrived'] = plgpu.Barrier(
        num_arrivals=self.rows.parts, num_barriers=WARPGROUPS
      )
    if 'ones' in self.given:
      result['ones_tiles'] = plgpu.SMEM(
        (WARPGROUPS, _ONES, t.k), jnp.int8, transforms=operands
      )
      result['ones_there'] = plgpu.Barrier(num_barriers=WARPGROUPS)
    return result


class _Block:
  """What the warpgroups of one block do."""

  def __init__(self, plan: _Plan, refs: dict[str, Any]):
    self._plan = plan
    self._refs = refs
    self._block = lax.axis_index('block')
    total = plan.grid[0] * plan.grid[1]
    self._count = lax.div(
      jnp.int32(total + plan.blocks - 1) - self._block, jnp.int32(plan.blocks)
    )

  def _place(self, i: Array) -> tuple[Array, Array]:
    """Tile of rows and tile of columns of the i-th tile of this block."""
    return plgpu.planar_snake(
      self._block + i * self._plan.blocks,
      self._plan.grid,
      1,
      self._plan.tiles.band,
    )

  def _slot(self, i: Array) -> Array:
    return lax.rem(i, jnp.int32(self._plan.tiles.stages))

  def copy_operands(self) -> None:
    """Of all tiles of the block, as soon as there is room."""
    plan, refs, t = self._plan, self._refs, self._plan.tiles

    def copy(i, _):
      slot = self._slot(i)
      tile, step = divide(i, plan.steps)
      row, column = self._place(tile)

      @pl.when(i >= t.stages)
      def _():
        plgpu.barrier_wait(refs['empty'].at[slot])

      for half in range(WARPGROUPS):
        first = row * t.height + half * t.rows
        sources = plan.rows.operand(refs['a'], first, step)
        targets = plan.parts_of(refs['a_tiles'].at[slot, half])
        for source, target in zip(sources, targets, strict=True):
          plgpu.copy_gmem_to_smem(source, target, refs['full'].at[slot])
      here = pl.ds(step * t.k, t.k)
      for j in range(2 if plan.gated else 1):
        target = refs['k_tiles'].at[slot]
        if plan.gated:
          target = target.at[pl.ds(j * plan.written, plan.written)]
        lines = pl.ds(j * plan.columns + column * plan.written, plan.written)
        plgpu.copy_gmem_to_smem(
          refs['k'].at[lines, here], target, refs['full'].at[slot]
        )
      return ()

    count = self._count * plan.steps
    lax.fori_loop(0, count, copy, ())

    def see_off(i, _):
      plgpu.barrier_wait(refs['empty'].at[self._slot(i)])
      return ()

    lax.fori_loop(jnp.maximum(count - t.stages, 0), count, see_off, ())

  def multiply(self, warpgroup: Array) -> None:
    """The products of one warpgroup, and what follows."""
    plan, refs = self._plan, self._refs
    if 'ones' in plan.given:
      there = refs['ones_there'].at[warpgroup]
      plgpu.copy_gmem_to_smem(
        refs['ones'], refs['ones_tiles'].at[warpgroup], there
      )
      plgpu.barrier_wait(there)

    def one_tile(i, _):
      row, column = self._place(i)
      first = row * plan.tiles.height + warpgroup * plan.tiles.rows
      columns = pl.ds(column * plan.written, plan.written)
      staged = refs['staged'].at[warpgroup]

      def clear():
        """Sees the last result off, and has the residual copied there."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if 'residual' not in plan.given:
          return
        sources = plan.rows.outcome(refs['residual'], first, columns)
        for source, target in zip(sources, plan.parts_of(staged), strict=True):
          arrived = refs['arrived'].at[warpgroup]
          plgpu.copy_gmem_to_smem(source, target, arrived)

      total, *sums = self._sum_up(i, warpgroup, clear)
      if 'residual' in plan.given:
        plgpu.barrier_wait(refs['arrived'].at[warpgroup])
      row_sums = None
      if sums:
        row_sums = jnp.max(sums[0], axis=1)
      elif 'row_sums' in plan.given:
        ref = refs['row_sums'].at[pl.ds(first, plan.tiles.rows)]
        row_sums = _load(ref, plgpu.Layout.WGMMA.reduce(1))
      self._write(total, row_sums, first, column, staged)
      plgpu.commit_smem()
      targets = plan.rows.outcome(refs['y'], first, columns)
      for source, target in zip(plan.parts_of(staged), targets, strict=True):
        plgpu.copy_smem_to_gmem(source, target)
      return ()

    lax.fori_loop(0, self._count, one_tile, ())
    plgpu.wait_smem_to_gmem(0)

  def _sum_up(
    self, i: Array, warpgroup: Array, meanwhile: Callable[[], None]
  ) -> tuple[Array, ...]:
    """int32[rows, n] and, if they are needed, sums of rows in every column.

    Calls `meanwhile` once tensor cores have work.
    """
    plan, refs, t = self._plan, self._refs, self._plan.tiles

    def multiply(*totals):
      def step(s, _):
        j = i * plan.steps + s
        slot = self._slot(j)
        plgpu.barrier_wait(refs['full'].at[slot])
        rows = refs['a_tiles'].at[slot, warpgroup]
        plgpu.wgmma(totals[0], rows, refs['k_tiles'].at[slot].T)
        for ref in totals[1:]:
          plgpu.wgmma(ref, rows, refs['ones_tiles'].at[warpgroup].T)
        pl.when(s == min(1, plan.steps - 1))(meanwhile)
        # The products of the last step are done, those of this one go on.
        plgpu.wgmma_wait(len(totals))

        @pl.when(s > 0)
        def _():
          plgpu.barrier_arrive(refs['empty'].at[self._slot(j - 1)])

        return ()

      lax.fori_loop(0, plan.steps, step, ())
      return tuple(ref[...] for ref in totals)

    accumulators = [plgpu.ACC((t.rows, t.n), jnp.int32)]
    if 'ones' in plan.given:
      accumulators.append(plgpu.ACC((t.rows, _ONES), jnp.int32))
    result = pl.run_scoped(multiply, *accumulators)
    last = self._slot((i + 1) * plan.steps - 1)
    plgpu.barrier_arrive(refs['empty'].at[last])
    return result

  def _write(
    self,
    total: Array,
    row_sums: Array | None,
    first: Array,
    column: Array,
    staged: Any,
  ) -> None:
    """The result of a tile, from its first row on, to shared memory."""
    plan, refs = self._plan, self._refs

    def rescaled(half):
      start = half * plan.columns + column * plan.written
      begin = half * plan.written
      part = total[:, begin : begin + plan.written]
      return self._rescaled(part, row_sums, first, pl.ds(start, plan.written))

    y = rescaled(0)
    if 'residual' in plan.given:
      y += staged[...].astype(jnp.float32)
    if plan.gated:
      y *= _gelu(rescaled(1))
      numbers = refs['grid']
      y = jnp.minimum(jnp.maximum(y * numbers[0], numbers[1]), numbers[2])
      # Rounds, and leaves whole numbers in the low bits.
      y = lax.bitcast_convert_type(y + (ROUND + numbers[3]), jnp.int32)
    staged[...] = y.astype(plan.dtype)

  def _rescaled(
    self, total: Array, row_sums: Array | None, first: Array, here: Any
  ) -> Array:
    """float32[rows, columns] of sums of integers."""
    plan, refs = self._plan, self._refs

    def columns(name):
      ref = refs[name]
      if len(ref.shape) == 2:
        part, _ = divide(first, plan.rows.total // ref.shape[0])
        ref = ref.at[part]
      values = _load(ref.at[here], plgpu.Layout.WGMMA.reduce(0))
      return lax.broadcast_in_dim(values, total.shape, (1,))

    if row_sums is not None:
      rows = lax.broadcast_in_dim(row_sums, total.shape, (0,))
      total += rows * columns('shift')
    if 'correction' in plan.given:
      total += columns('correction')
    y = total.astype(jnp.float32) * columns('scale')
    if 'bias' in plan.given:
      y += columns('bias').astype(jnp.float32)
    return y


def divide(x: Array, by: int) -> tuple[Array, Array]:
  """Quotient and remainder of int32 that are not negative.

  `//` and `%` look after signs, and kernels cannot be made of that.
  """
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


def _gelu(x: Array) -> Array:
  """x times the normal distribution function, to 6e-5 or 1e-5 |x|.

  A polynomial, because multiprocessors compute eight of its steps while they
  compute an exponential or a root.
  """
  z = jnp.clip(x, -_NORMAL_END, _NORMAL_END)
  square = z * z
  y = jnp.full_like(x, _NORMAL[-1])
  for factor in _NORMAL[-2::-1]:
    y = y * square + np.float32(factor)
  return x * (z * y + np.float32(0.5))
