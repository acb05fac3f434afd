"""Checks and times `d2dpm_jax.quantization.kernels` on one NVIDIA Hopper GPU.

  PYTHONPATH=. python benchmarks/kernels_gpu.py
  PYTHONPATH=. python benchmarks/kernels_gpu.py --only conv --batch 16

A line per kernel and shape of cin256: milliseconds of a call (best of three
times twenty calls in a row), TOP/s, GB/s if everything is moved once, and the
largest difference from plain JAX in float32 for the first two images, where
outputs are about 1 in size (`off`; of codes, in codes), and how many differ
from that when it is rounded to the type of the result.
"""

import argparse
import concurrent.futures
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.quantization import affine
from d2dpm_jax.quantization.kernels import norm, products

_CALLS, _REPEATS = 20, 3
_IMAGES = 2  # That are compared.
_STEP, _ZERO, _OFFSET = 0.05, 31.0, 128
_EXACT = jax.lax.Precision.HIGHEST


class Case(NamedTuple):
  """A kernel and what it is compared with.

  Attributes:
    name: of the line.
    inputs: () -> a dict of arrays.
    kernel: dict -> array.
    plain: dict -> its first rows.
    operations: multiplications and additions.
    moved: bytes.
  """

  name: str
  inputs: Callable[[], dict[str, Any]]
  kernel: Callable[[dict[str, Any]], jax.Array]
  plain: Callable[[dict[str, Any]], jax.Array]
  operations: int
  moved: int


def _int8(key, shape):
  return jax.random.randint(key, shape, -128, 128, jnp.int8)


def _epilogue(key, n, depth, rows, options, a):
  keys = jax.random.split(key, 6)
  every = {
    # Sums have a deviation of 74 * 74 * sqrt(depth).
    'scale': jax.random.uniform(keys[0], (n,), jnp.float32, 0.5, 1)
    / (5476 * depth**0.5),
    'bias': jax.random.normal(keys[1], (n,), jnp.bfloat16),
    'shift': jax.random.randint(keys[2], (n,), -3, 4, jnp.int32),
    'correction': jax.random.randint(keys[3], (n,), -(10**4), 10**4),
    'residual': jax.random.normal(keys[4], (*rows, n), jnp.bfloat16),
    'row_sums': jnp.sum(a, -1, dtype=jnp.int32),
    'grid': norm.grid_numbers(1 / _STEP, _ZERO, _OFFSET),
  }
  names = ('scale', 'bias', 'correction', *options)
  return products.Epilogue(**{name: every[name] for name in names})


def _rescaled(total, sums, e, first):
  if e.shift is not None:
    total += sums * e.shift
  y = (total + e.correction) * e.scale + e.bias
  return y if e.residual is None else y + e.residual[:first]


def _codes(y):
  grid = affine.QParams(jnp.float32(_STEP), jnp.float32(_ZERO), 8)
  return affine.quantize(y, grid).codes.astype(jnp.float32) - _OFFSET


def conv(batch, side, depth, n, options, dtype=jnp.bfloat16):
  """A 3x3 convolution, options being fields of the epilogue."""
  rows = (batch, side, side)

  def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    a = _int8(keys[0], (batch, side + 2, side + 2, depth))
    kernel = _int8(keys[1], (3, 3, depth, n))
    return {
      'a': a,
      'kernel': kernel,
      'k': products.kernel_layout(kernel),
      'e': _epilogue(keys[2], n, 9 * depth, rows, options, a),
    }

  def plain(d):
    def windows(k):
      return jax.lax.conv_general_dilated(
        d['a'][:_IMAGES].astype(jnp.float32),
        k.astype(jnp.float32),
        (1, 1),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=_EXACT,
      )

    ones = jnp.ones((3, 3, depth, 1), jnp.int8)
    return _rescaled(windows(d['kernel']), windows(ones), d['e'], _IMAGES)

  pixels = batch * side * side
  size = jnp.dtype(dtype).itemsize + 2 * ('residual' in options)
  return Case(
    f'conv {batch}x{side}x{side} {depth} -> {n} {" ".join(options)}',
    inputs,
    lambda d: products.conv(d['a'], d['k'], d['e'], dtype=dtype),
    plain,
    2 * pixels * 9 * depth * n,
    pixels * depth + 9 * depth * n + size * pixels * n,
  )


def linear(batch, side, depth, n, options):
  """A linear layer; gated if `options` have a grid."""
  m, first = batch * side**2, _IMAGES * side**2
  gated = 'grid' in options

  def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    a = _int8(keys[0], (m, depth))
    e = _epilogue(keys[2], n, depth, (m,), options, a)
    return {'a': a, 'k': _int8(keys[1], (n, depth)), 'e': e}

  def plain(d):
    a, k = (x.astype(jnp.float32) for x in (d['a'][:first], d['k']))
    total = jnp.dot(a, k.T, precision=_EXACT)
    y = _rescaled(total, jnp.sum(a, 1, keepdims=True), d['e'], first)
    if not gated:
      return y
    y, gate = jnp.split(y, 2, -1)
    return _codes(y * jax.nn.gelu(gate, approximate=False))

  def kernel(d):
    run = products.gated if gated else products.linear
    return run(d['a'], d['k'], d['e'])

  out = m * n // 2 if gated else 2 * m * n * (1 + ('residual' in options))
  return Case(
    f'linear {m} x {depth} -> {n} {" ".join(options)}',
    inputs,
    kernel,
    plain,
    2 * m * depth * n,
    m * depth + depth * n + out,
  )


def group_norm(batch, side, depth):
  """Norm, SiLU, quantization, padding."""
  grid = norm.grid_numbers(1 / _STEP, _ZERO, _OFFSET)

  def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (batch, depth)
    return {
      'x': jax.random.normal(keys[0], (batch, side, side, depth), jnp.bfloat16),
      'gain': jax.random.uniform(keys[1], shape, jnp.float32, 0.5, 2),
      'shift': jax.random.normal(keys[2], shape, jnp.float32),
    }

  def plain(d):
    x, gain, shift = (d[name][:_IMAGES] for name in ('x', 'gain', 'shift'))
    y = jax.nn.silu(x * gain[:, None, None] + shift[:, None, None])
    ends = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jnp.pad(_codes(y), ends, constant_values=_ZERO - _OFFSET)

  return Case(
    f'group norm {batch}x{side}x{side} {depth}',
    inputs,
    lambda d: norm.norm_silu_quantize(d['x'], d['gain'], d['shift'], grid)[0],
    plain,
    0,
    3 * batch * side * side * depth,
  )


def moments(batch, side, depth):
  """The numbers of a group norm; its gain is compared."""
  ones = jnp.ones(depth, jnp.bfloat16)
  zeros = jnp.zeros((batch, depth))

  def inputs():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (batch, side, side, depth))
    size = jax.random.uniform(keys[1], (batch, 1, 1, depth), minval=0.5)
    return {'x': (3 + x * size).astype(jnp.bfloat16)}

  def plain(d):
    x = d['x'][:_IMAGES].astype(jnp.float32)
    groups = x.reshape(_IMAGES, -1, 32, depth // 32)
    gain = jax.lax.rsqrt(jnp.var(groups, (1, 3)) + 1e-5)
    return jnp.repeat(gain, depth // 32, -1)

  return Case(
    f'moments {batch}x{side}x{side} {depth}',
    inputs,
    lambda d: norm.group_affine(d['x'], ones, ones, zeros)[0],
    plain,
    0,
    2 * batch * side * side * depth,
  )


def layer_norm(batch, side, depth, count):
  """Layer norm and quantization for `count` layers."""
  m, first = batch * side**2, _IMAGES * side**2
  grid = norm.grid_numbers(1 / _STEP, _ZERO, _OFFSET)

  def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
      'x': 3 + jax.random.normal(keys[0], (m, depth), jnp.bfloat16),
      'gain': jax.random.uniform(keys[1], (depth,), jnp.float32, 0.5, 2),
      'shift': jax.random.normal(keys[2], (depth,), jnp.float32),
    }

  def kernel(d):
    found = norm.layer_norm_quantize(
      d['x'], d['gain'], d['shift'], (grid,) * count
    )
    return found[-1][0]

  def plain(d):
    x = d['x'][:first].astype(jnp.float32)
    x -= jnp.mean(x, 1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, 1, keepdims=True) + 1e-5)
    return _codes(x * d['gain'] + d['shift'])

  return Case(
    f'layer norm {m} x {depth} for {count}',
    inputs,
    kernel,
    plain,
    0,
    (2 + count) * m * depth,
  )


def cases(batch):
  """Shapes of cin256, the most telling ones first."""
  added, shifted = ('residual',), ('shift', 'residual')
  summed = ('row_sums', *shifted)
  yield conv(batch, 64, 192, 192, summed)
  yield linear(batch, 32, 384, 3072, ('shift', 'row_sums', 'grid'))
  yield conv(16, 64, 192, 192, summed)
  yield conv(batch, 64, 192, 64, ('shift', 'row_sums'), jnp.float32)
  yield conv(batch, 32, 384, 384, summed)
  yield conv(16, 8, 960, 960, summed)
  yield layer_norm(batch, 32, 384, 3)
  yield linear(batch, 32, 384, 384, ('shift', 'row_sums'))
  yield linear(batch, 32, 1536, 384, shifted)
  yield group_norm(batch, 64, 192)
  yield moments(batch, 64, 192)
  yield conv(batch, 16, 576, 576, ('shift', 'row_sums'))
  yield conv(batch, 32, 384, 384, added)
  yield conv(batch, 8, 960, 960, added)
  yield linear(batch, 32, 384, 3072, ('grid',))
  yield linear(batch, 16, 576, 4608, ('grid',))
  yield linear(batch, 8, 960, 960, added)
  yield group_norm(batch, 32, 384)
  yield layer_norm(batch, 16, 576, 1)


def _compiled(case):
  specs = jax.eval_shape(case.inputs)
  return [jax.jit(f).lower(specs).compile() for f in (case.kernel, case.plain)]


def _line(case, kernel, plain):
  data = jax.block_until_ready(jax.jit(case.inputs)())
  want = np.asarray(plain(data))
  result = kernel(data)[: len(want)]
  rounded = np.asarray(jnp.asarray(want).astype(result.dtype), np.float32)
  got = np.asarray(result.astype(jnp.float32))
  best = float('inf')
  for _ in range(_REPEATS):
    begin = time.perf_counter()
    for _ in range(_CALLS):
      y = kernel(data)
    jax.block_until_ready(y)
    best = min(best, (time.perf_counter() - begin) / _CALLS)
  return (
    f'{case.name}: {1e3 * best:.4f} ms {case.operations / best / 1e12:.0f} '
    f'TOP/s {case.moved / best / 1e9:.0f} GB/s off '
    f'{np.abs(got - want).max():.4g} ({np.mean(got != rounded):.1%} differ)'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--seconds', type=float, default=300, help='no case begins later'
  )
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--only', default='', help='cases that contain this')
  parser.add_argument('--threads', type=int, default=6, help='that compile')
  arguments = parser.parse_args()
  until = time.time() + arguments.seconds
  print(f'{jax.devices()[0].device_kind}, JAX {jax.__version__}', flush=True)
  chosen = [x for x in cases(arguments.batch) if arguments.only in x.name]
  with concurrent.futures.ThreadPoolExecutor(arguments.threads) as pool:
    # Before any is timed: XLA tries algorithms on the device meanwhile.
    ready = list(pool.map(_compiled, chosen))
  for case, compiled in zip(chosen, ready, strict=True):
    if time.time() < until:
      print(_line(case, *compiled), flush=True)


if __name__ == '__main__':
  main()
