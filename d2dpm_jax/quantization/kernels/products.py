"""Linear layers and 3x3 convolutions of int8 by `hopper`, with what follows.

Each takes codes minus their offset and returns bfloat16, or codes for the next
layer. `fit` and `fit_conv` say whether shapes are among those that the kernel
takes; the tiles are those that were fastest on an H100
(docs/performance.md). Each is jitted, so that a program of many layers
has one of every shape.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from d2dpm_jax.quantization.kernels import hopper
from d2dpm_jax.quantization.kernels.hopper import Epilogue, Tiles

Array = jax.Array

_SIDE = 3  # Of the kernel of a convolution.
_SHARED_BYTES = 220_000
_STAGES = 6  # More do not help.
LEAST_ROWS = Tiles().height
LEAST_CHANNELS = 64  # Channels that a tile must be able to have.
_LINE = 8  # Rows that shared memory has together, of images in a tile.
_WIDTHS = (192, 256, 224, 128, 96, 64)  # Columns of a tile, the best first.
_EVEN_WIDTHS = (256, 128)  # Of two halves.
_FLOAT_WIDTHS = (128, 96, 64, 224)  # Of a result in float32.


def _width(n: int, widths: tuple[int, ...] = _WIDTHS) -> int:
  """Columns of a tile.

  Raises:
    ValueError: no tile divides n columns.
  """
  found = next((w for w in widths if n % w == 0), None)
  if found is None:
    raise ValueError(f'{n} outputs do not divide into tiles of {widths}.')
  return found


def _has_width(n: int, widths: tuple[int, ...] = _WIDTHS) -> bool:
  return any(n % w == 0 for w in widths)


def _deepest(depth: int) -> int:
  """Products that are added up at a time."""
  return 128 if depth % 128 == 0 else 64


def _tiles(rows: int, n: int, k: int, line: int, band: int = 1) -> Tiles:
  """With as many stages as shared memory holds beside lines of the result."""
  stage = (hopper.WARPGROUPS * rows + n) * k
  result = hopper.WARPGROUPS * rows * line
  stages = min(_STAGES, (_SHARED_BYTES - result) // stage)
  return Tiles(rows, n, k, stages, band)


def fit(rows: int, inputs: int, outputs: int) -> bool:
  """Whether `linear` takes int8[rows, inputs] to [rows, outputs]."""
  return (
    rows % LEAST_ROWS == 0
    and inputs % LEAST_CHANNELS == 0
    and _has_width(outputs)
  )


def fit_shared(rows: int) -> bool:
  """Whether so many rows after each other can have a bias of their own."""
  return rows % Tiles().rows == 0


def fit_gated(rows: int, inputs: int, outputs: int) -> bool:
  """Whether `gated` takes int8[rows, inputs] to both halves of outputs."""
  return _has_width(outputs, _EVEN_WIDTHS) and fit(rows, inputs, outputs)


def fit_conv(shape: tuple[int, ...], inputs: int, outputs: int) -> bool:
  """Whether `conv` makes [B, H, W, outputs], `shape` being B, H, W."""
  images = math.gcd(shape[0], Tiles().rows)
  return (
    fit(math.prod(shape), inputs, outputs)
    and images >= _LINE
    and math.prod(shape[1:]) % (Tiles().rows // images) == 0
  )


@functools.partial(jax.jit, static_argnames=('tiles', 'interpret'))
def linear(
  a: Array,
  k: Array,
  epilogue: Epilogue,
  *,
  tiles: Tiles | None = None,
  interpret: Any = None,
) -> Array:
  """`(a k' + ..) scale + bias + residual`, see `hopper.product`.

  Args:
    a: int8[M, K].
    k: int8[N, K], the kernel, transposed.
    epilogue: without a grid. A bias of rows is there for a multiple of
      `tiles.rows` rows.
    tiles: None chooses.
    interpret: what `plgpu.kernel` takes.

  Returns:
    bfloat16[M, N].

  Raises:
    ValueError: shapes do not fit each other or the tiles.
  """
  if epilogue.grid is not None:
    raise ValueError('With a grid it is `gated`.')
  return _matrix(a, k, epilogue, tiles or _linear_tiles(k), interpret, 'linear')


@functools.partial(jax.jit, static_argnames=('tiles', 'interpret'))
def gated(
  a: Array,
  k: Array,
  epilogue: Epilogue,
  *,
  tiles: Tiles | None = None,
  interpret: Any = None,
) -> Array:
  """Codes of `y gelu(gate)`, where a linear layer returns y and the gate.

  Args:
    a: int8[M, K].
    k: int8[2 N, K], the kernel, transposed.
    epilogue: with the grid of the next layer, without a residual.
    tiles: n columns of the layer make n / 2 of the result. None chooses.
    interpret: what `plgpu.kernel` takes.

  Returns:
    int8[M, N], codes minus the offset.

  Raises:
    ValueError: shapes do not fit each other or the tiles.
  """
  if epilogue.grid is None:
    raise ValueError('A gated layer needs the grid of the next one.')
  return _matrix(a, k, epilogue, tiles or _gated_tiles(k), interpret, 'gated')


def _linear_tiles(k: Array) -> Tiles:
  n = _width(k.shape[0], (256, *_WIDTHS) if k.shape[0] >= 2048 else _WIDTHS)
  return _tiles(64, n, _deepest(k.shape[1]), 2 * n, band=4)


def _gated_tiles(k: Array) -> Tiles:
  n = _width(k.shape[0], _EVEN_WIDTHS)
  return _tiles(64, n, _deepest(k.shape[1]), n // 2)


def _matrix(
  a: Array,
  k: Array,
  epilogue: Epilogue,
  tiles: Tiles,
  interpret: Any,
  name: str,
) -> Array:
  if k.shape[1] != a.shape[1]:
    raise ValueError(f'{a.shape} and {k.shape} do not fit.')

  def lines(ref, first, columns):
    return [ref.at[pl.ds(first, tiles.rows), columns]]

  rows = hopper.Rows(
    total=len(a),
    parts=1,
    operand=lambda ref, first, step: lines(
      ref, first, pl.ds(step * tiles.k, tiles.k)
    ),
    outcome=lines,
    shape=(len(a),),
  )
  return hopper.product(
    a, k, epilogue, rows, tiles, name=name, interpret=interpret
  )


def kernel_layout(k: Array) -> Array:
  """int8[O, KH KW I] of a kernel int8[KH, KW, I, O] or int8[I, O]."""
  return jnp.moveaxis(k, -1, 0).reshape(k.shape[-1], -1)


@functools.partial(jax.jit, static_argnames=('dtype', 'tiles', 'interpret'))
def conv(
  a: Array,
  k: Array,
  epilogue: Epilogue,
  *,
  dtype: Any = jnp.bfloat16,
  tiles: Tiles | None = None,
  interpret: Any = None,
) -> Array:
  """`(conv(a, k) + ..) scale + bias + residual` of a 3x3 convolution.

  A tile has some images at some pixels. At one position of the kernel that is
  one box for every pixel, without copies of windows.

  Args:
    a: int8[B, H + 2, W + 2, I], padded already.
    k: int8[O, 9 I], see `kernel_layout`.
    epilogue: without a grid; the residual is bfloat16[B, H, W, O]. Sums of
      rows are those of pixels here, int32[B, H + 2, W + 2], and made if they
      are needed and not there.
    dtype: of the result, bfloat16 or float32.
    tiles: k divides I. None chooses.
    interpret: what `plgpu.kernel` takes.

  Returns:
    dtype[B, H, W, O].

  Raises:
    ValueError: shapes do not fit each other or the tiles.
  """
  if epilogue.grid is not None:
    raise ValueError('A convolution has no grid.')
  b, height, width, depth = a.shape
  height, width = height - 2, width - 2
  n = k.shape[0]
  tiles = tiles or _conv_tiles(
    b * height * width, depth, n, jnp.dtype(dtype).itemsize
  )
  images = math.gcd(b, tiles.rows)
  if (
    k.shape[1] != _SIDE**2 * depth
    or depth % tiles.k
    or images < _LINE
    or (height * width) % (tiles.rows // images)
  ):
    raise ValueError(f'{a.shape}, {k.shape} and {tiles} do not fit.')
  chunks, pixels = depth // tiles.k, height * width
  parts = tiles.rows // images

  def places(first):
    """The first image, and the pixels of a tile."""
    group, pixel = hopper.divide(first, pixels * images)
    pixel, _ = hopper.divide(pixel, images)
    return pl.ds(group * images, images), [pixel + j for j in range(parts)]

  def operand(ref, first, step):
    tap, chunk = hopper.divide(step, chunks)
    down, right = hopper.divide(tap, _SIDE)
    which, at = places(first)
    lines = []
    for pixel in at:
      y, x = hopper.divide(pixel, width)
      source = (y + down) * (width + 2) + x + right
      lines.append(ref.at[which, source, pl.ds(chunk * tiles.k, tiles.k)])
    return lines

  def outcome(ref, first, columns):
    which, at = places(first)
    return [ref.at[which, pixel, columns] for pixel in at]

  sums = epilogue.row_sums
  if sums is not None and sums.shape != a.shape[:-1]:
    raise ValueError(f'Sums {sums.shape} of the pixels of {a.shape}.')
  sums = None if epilogue.shift is None else _window_sums(a, sums, images)
  epilogue = epilogue._replace(row_sums=sums)
  if epilogue.residual is not None:
    residual = epilogue.residual.reshape(b, pixels, n)
    epilogue = epilogue._replace(residual=residual)
  y = hopper.product(
    a.reshape(b, -1, depth),
    k,
    epilogue,
    hopper.Rows(b * pixels, parts, operand, outcome, (b, pixels)),
    tiles,
    name='conv',
    dtype=dtype,
    interpret=interpret,
  )
  return y.reshape(b, height, width, n)


def _window_sums(a: Array, sums: Array | None, images: int) -> Array:
  """int32[B H W] of windows, in the order of tiles: the image comes last."""
  if sums is None:
    sums = jnp.sum(a, -1, dtype=jnp.int32)
  sums = sums[:, :-2] + sums[:, 1:-1] + sums[:, 2:]
  sums = sums[:, :, :-2] + sums[:, :, 1:-1] + sums[:, :, 2:]
  sums = sums.reshape(len(sums) // images, images, -1)
  return jnp.swapaxes(sums, 1, 2).reshape(-1)


def _conv_tiles(rows: int, depth: int, n: int, size: int = 2) -> Tiles:
  columns = _width(n, _WIDTHS if size == 2 else _FLOAT_WIDTHS)
  k, tall = _deepest(depth), 128
  if k == 64 and columns <= 192 and rows % (hopper.WARPGROUPS * tall) == 0:
    return _tiles(tall, columns, k, columns * size)
  return _tiles(64, columns, k, columns * size)
