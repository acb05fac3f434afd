"""Times kernels of `d2dpm_jax.quantization.kernels` on one GPU, beside XLA.

  python benchmarks/kernels_gpu.py --seconds 170
  python benchmarks/kernels_gpu.py --list

Every line is one kernel, shape and configuration: milliseconds of a call (best
of three times twenty calls in a row), TOP/s, GB/s, and the largest difference
from what XLA computes (`off`), where numbers are about 1 in size. The most
informative come first. A kernel that fails is a line; a kernel that hangs is
one too, after `--patience` seconds: jobs run in a process of their own, which
is started again behind the job that stopped it.
"""

import argparse
import concurrent.futures
import functools
import os
import queue
import subprocess
import sys
import threading
import time

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_START = '@job'
_CALLS, _REPEATS = 20, 3
_AT_A_TIME = 12  # Jobs that are compiled together.
# (pixels of a side, channels).
_CONVS = ((32, 384, 384), (64, 192, 192), (16, 576, 576), (8, 960, 960))
_NORMS = ((64, 192), (32, 384), (16, 576), (8, 960))
_MATMULS = (
  (32, 384, 384),
  (32, 384, 3072),
  (32, 1536, 384),
  (16, 576, 576),
  (16, 576, 4608),
  (16, 2304, 576),
  (8, 960, 960),
  (8, 960, 7680),
  (8, 3840, 960),
)


def jobs(batch):
  """[(rank, label, reference, inputs, arguments, function, ops, bytes, view)].

  inputs: function of no arguments -> dict of arrays; one per shape.
  arguments: dict -> arguments of the function.
  view: result -> result as XLA has it.
  """
  import jax
  import jax.numpy as jnp

  from d2dpm_jax.quantization import affine
  from d2dpm_jax.quantization.kernels import (
    conv,
    epilogue,
    hopper,
    matmul,
    norm,
  )

  out = []

  def add(rank, label, shape, inputs, arguments, f, ops, size, view=None):
    out.append(
      (
        rank,
        label,
        shape,
        inputs,
        arguments,
        f,
        ops,
        size,
        view or (lambda y: y),
      )
    )

  def int8(key, shape):
    return jax.random.randint(key, shape, -128, 128, jnp.int8)

  def columns(key, n, depth):
    keys = jax.random.split(key, 4)
    return {
      # Sums have a deviation of 74 * 74 * sqrt(depth).
      'scale': jax.random.uniform(keys[0], (n,), jnp.float32, 0.5, 1)
      / (5476 * depth**0.5),
      'bias': jax.random.normal(keys[1], (n,), jnp.float32),
      'shift': jax.random.randint(keys[2], (n,), -3, 4, jnp.int32),
      'correction': jax.random.randint(keys[3], (n,), -(10**4), 10**4),
    }

  # Linear layers.
  def matmul_inputs(m, depth, n):
    keys = jax.random.split(jax.random.key(0), 4)
    d = columns(keys[0], n, depth)
    d['a'], d['k'] = int8(keys[1], (m, depth)), int8(keys[2], (n, depth))
    d['residual'] = jax.random.normal(keys[3], (m, n), jnp.bfloat16)
    d['sums'] = jnp.sum(d['a'], 1, dtype=jnp.int32)
    return d

  def matmul_xla(residual, sums):
    def f(d):
      total = jax.lax.dot_general(
        d['a'],
        d['k'],
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
      )
      more = {'residual': d['residual']} if residual else {}
      if sums:
        own = jnp.sum(d['a'], 1, keepdims=True, dtype=jnp.int32)
        more |= {'sums': own, 'shift': d['shift']}
      y = epilogue.rescale(total, d['scale'], d['bias'], **more)
      return y.astype(jnp.bfloat16)

    return f

  def matmul_kernel(module, tiles, residual, sums):
    def f(d):
      more = {'residual': d['residual']} if residual else {}
      if sums:
        more['shift'] = d['shift']
      if sums == 'given':
        more['row_sums'] = d['sums']
      return module.matmul_rescale(
        d['a'], d['k'], d['scale'], d['bias'], tiles=tiles, **more
      )

    return f

  same = lambda d: (d,)  # noqa: E731
  H, T = hopper.Tiles, matmul.Tiles
  for i, (side, depth, n) in enumerate(_MATMULS):
    m = batch * side * side
    # Wide layers and the second of a feed-forward have no residual or one.
    residual = n == depth or depth > n
    shape = f'linear {m} x {depth} -> {n}{" + residual" if residual else ""}'
    inputs = functools.partial(matmul_inputs, m, depth, n)
    ops = 2 * m * depth * n
    size = m * depth + depth * n + 2 * m * n * (1 + residual)
    line = functools.partial(add, shape=shape, inputs=inputs, arguments=same)
    line = functools.partial(line, ops=ops, size=size)
    late = 10 * i  # Later shapes are of less interest.
    deep = 128 if depth % 128 == 0 else 64
    kernel = functools.partial(matmul_kernel, residual=residual)
    line(0 + late, 'XLA', f=matmul_xla(residual, False))
    wide = 256 if n % 256 == 0 else 192
    found = [
      (1, H(64, 192, deep, 4 if deep == 128 else 7)),
      (3, H(64, 96, deep, 5 if deep == 128 else 8, 32)),
      (22, H(64, 192, 192, 2)),
      (23, H(64, wide, 64, 6, 64, 4)),
      (24, H(128, 192, 64, 4, 32)),
      (25, H(64, 192, deep, 3 if deep == 128 else 5, 64, 2)),
    ]
    for rank, tiles in found:
      if depth % tiles.k or n % tiles.n or tiles.shared_bytes() > 231000:
        continue
      line(rank + late, f'hopper {tiles}', f=kernel(hopper, tiles, sums=None))
    found = [
      (2, T(128, 128, 64, 8, 4)),
      (4, T(128, 64, 64, 4, 4)),
      (26, T(128, 128, 64, 4, 4)),
      (27, T(64, 64, 64, 4, 5)),
      (28, T(128, 128, 128, 8, 3)),
      (29, T(128, 256, 64, 8, 4)),
    ]
    for rank, tiles in found:
      if depth % tiles.k:
        continue
      line(rank + late, f'triton {tiles}', f=kernel(matmul, tiles, sums=None))
    tiles = found[0][1]
    line(35 + late, 'XLA, sums', f=matmul_xla(residual, True))
    first = H(64, 192, deep, 4 if deep == 128 else 7)
    for sums in ('own', 'given'):
      label = f'{sums} sums'
      line(36 + late, f'hopper {label}', f=kernel(hopper, first, sums=sums))
      line(37 + late, f'triton {label}', f=kernel(matmul, tiles, sums=sums))

  # The first of a feed-forward, with what follows it.
  def geglu_xla(d):
    y = matmul_xla(False, False)(d)
    y, gate = jnp.split(y, 2, -1)
    y = y * jax.nn.gelu(gate, approximate=False)
    codes = affine.quantize(
      y.astype(jnp.float32), affine.QParams(jnp.float32(0.05), 31.0, 8)
    ).codes
    return (codes.astype(jnp.int16) - 128).astype(jnp.int8)

  def geglu_kernel(tiles):
    def f(d):
      numbers = norm.grid_numbers(1 / 0.05, 31.0, 128)
      arranged = [d[f'{x}_{tiles.n}'] for x in ('k', 'scale', 'bias')]
      return hopper.matmul_geglu_quantize(
        d['a'], *arranged, numbers, tiles=tiles
      )

    return f

  def geglu_inputs(m, depth, n):
    d = matmul_inputs(m, depth, n)
    for columns in (128, 192, 256):
      if n % columns == 0:
        for x in ('k', 'scale', 'bias'):
          d[f'{x}_{columns}'] = hopper.geglu_layout(d[x], H(n=columns))
    del d['residual']
    return d

  for i, (side, depth, n) in enumerate(
    ((32, 384, 3072), (16, 576, 4608), (8, 960, 7680))
  ):
    m = batch * side * side
    line = functools.partial(
      add,
      shape=f'geglu {m} x {depth} -> {n // 2}',
      inputs=functools.partial(geglu_inputs, m, depth, n),
      arguments=same,
      ops=2 * m * depth * n,
      size=m * depth + depth * n + m * n // 2,
    )
    late = 10 * i
    line(4.6 + late, 'XLA', f=geglu_xla)
    deep = 128 if depth % 128 == 0 else 64
    for rank, tiles in (
      (4.7, H(64, 192, deep, 4 if deep == 128 else 7, 32)),
      (4.8, H(64, 256, deep, 3 if deep == 128 else 6, 64)),
      (8.8, H(64, 128, deep, 5 if deep == 128 else 8, 64)),
    ):
      if n % tiles.n == 0:
        line(rank + late, f'hopper {tiles}', f=geglu_kernel(tiles))

  # Convolutions.
  def conv_inputs(side, depth, n):
    keys = jax.random.split(jax.random.key(1), 4)
    d = columns(keys[0], n, 9 * depth)
    d['a'] = int8(keys[1], (batch, side + 2, side + 2, depth))
    d['kernel'] = int8(keys[2], (3, 3, depth, n))
    d['residual'] = jax.random.normal(
      keys[3], (batch, side, side, n), jnp.bfloat16
    )
    d['sums'] = conv.window_sums(jnp.sum(d['a'], -1, dtype=jnp.int32))
    d['k'] = conv.kernel_layout(d['kernel'])
    d['k_hopper'] = hopper.kernel_layout(d['kernel'])
    for name in ('a', 'residual', 'sums'):
      d[f'{name}_inside'] = jnp.moveaxis(d[name], 0, 2)
    return d

  def conv_xla(sums, operand=None):
    def f(d):
      a, k = d['a'], d['kernel']
      if operand is not None:
        a, k = a.astype(operand), k.astype(operand)
      total = jax.lax.conv_general_dilated(
        a,
        k,
        (1, 1),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        preferred_element_type=operand
        or (jnp.float32 if jax.default_backend() == 'gpu' else jnp.int32),
      )
      if operand is None:
        total = total.astype(jnp.int32)
      more = {}
      if sums:
        own = jnp.sum(d['a'], -1, dtype=jnp.int32)
        more = {'sums': conv.window_sums(own)[..., None], 'shift': d['shift']}
      correction = None if operand else d['correction']
      y = epilogue.rescale(
        total,
        d['scale'],
        d['bias'],
        correction=correction,
        residual=d['residual'],
        **more,
      )
      return y.astype(jnp.bfloat16)

    return f

  def conv_triton(tiles, sums=False, moments=False):
    def f(d):
      more = {}
      if sums:
        more = {'shift': d['shift'], 'window_sums': d['sums']}
      y = conv.conv3x3_rescale(
        d['a'],
        d['k'],
        d['scale'],
        d['bias'],
        correction=d['correction'],
        residual=d['residual'],
        moments=moments,
        tiles=tiles,
        **more,
      )
      return y[0] if moments else y

    return f

  def conv_hopper(tiles, sums=None):
    def f(d):
      more = {}
      if sums:
        more['shift'] = d['shift']
      if sums == 'given':
        more['window_sums'] = d['sums_inside']
      return hopper.conv3x3_rescale(
        d['a_inside'],
        d['k_hopper'],
        d['scale'],
        hopper.add_correction(d['bias'], d['scale'], d['correction']),
        residual=d['residual_inside'],
        tiles=tiles,
        **more,
      )

    return f

  first_image = lambda y: jnp.moveaxis(y, 2, 0)  # noqa: E731
  for i, (side, depth, n) in enumerate(_CONVS):
    shape = f'conv {side}x{side} {depth} -> {n} + residual'
    inputs = functools.partial(conv_inputs, side, depth, n)
    pixels = batch * side * side
    line = functools.partial(
      add,
      shape=shape,
      inputs=inputs,
      arguments=same,
      ops=2 * pixels * 9 * depth * n,
      size=pixels * depth + 9 * depth * n + 4 * pixels * n,
    )
    late = 6 * i
    line(0.5 + late, 'XLA', f=conv_xla(False))
    deep = 128 if depth % 128 == 0 else 64
    found = [
      (1.5, H(64, 192, deep, 4 if deep == 128 else 7)),
      (3.5, H(128, 192, 64, 4, 32)),
      (13.5, H(64, 192, 192, 2)),
      (14.5, H(128, 96, 64, 6, 32)),
      (15.5, H(64, 96, 64, 8, 32)),
      (16.5, H(64, 192, 64, 5)),
    ]
    for rank, tiles in found:
      if depth % tiles.k or n % tiles.n or tiles.shared_bytes() > 231000:
        continue
      line(
        rank + late, f'hopper {tiles}', f=conv_hopper(tiles), view=first_image
      )
    found = [
      (2.5, T(128, 128, 64, 8, 4) if n % 128 == 0 else T(128, 64, 64, 4, 4)),
      (4.5, T(128, 64, 64, 4, 3)),
      (17.5, T(256, 64, 64, 8, 4)),
      (18.5, T(128, 128, 128, 8, 3)),
      (19.5, T(256, 128, 64, 8, 3)),
      (20.5, T(128, 192, 64, 8, 4)),
    ]
    for rank, tiles in found:
      if depth % tiles.k or tiles.n == 192:
        continue
      line(rank + late, f'triton {tiles}', f=conv_triton(tiles))
    line(21.5 + late, 'XLA, sums', f=conv_xla(True))
    first = H(64, 192, deep, 4 if deep == 128 else 7)
    tiles = found[0][1]
    for sums in ('own', 'given'):
      line(
        22.5 + late,
        f'hopper {sums} sums',
        f=conv_hopper(first, sums),
        view=first_image,
      )
    line(23.5 + late, 'triton given sums', f=conv_triton(tiles, True))
    line(24.5 + late, 'triton moments', f=conv_triton(tiles, False, True))

  # Norm, SiLU, quantization.
  grid = {'inverse': 1 / 0.05, 'zero': 31.0, 'offset': 128}

  def norm_inputs(side, depth):
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (batch, side, side, depth), jnp.bfloat16)
    numbers = norm.grid_numbers(grid['inverse'], grid['zero'], grid['offset'])
    return {
      'x': x,
      'x_inside': jnp.moveaxis(x, 0, 2),
      'gain': jax.random.uniform(keys[1], (batch, depth), jnp.float32, 0.5, 2),
      'shift': jax.random.normal(keys[2], (batch, depth), jnp.float32),
      'grid': numbers,
    }

  def norm_xla(sums):
    def f(d):
      y = d['x'].astype(jnp.float32) * d['gain'][:, None, None]
      y = jax.nn.silu(y + d['shift'][:, None, None]).astype(jnp.bfloat16)
      q = affine.QParams(1 / d['grid'][0], jnp.float32(grid['zero']), 8)
      codes = affine.quantize(y.astype(jnp.float32), q).codes
      a = (codes.astype(jnp.int16) - grid['offset']).astype(jnp.int8)
      ends = [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)]
      zero = jnp.int8(grid['zero'] - grid['offset'])
      a = jax.lax.pad(a, zero, ends)
      return (a, jnp.sum(a, -1, dtype=jnp.int32)) if sums else a

    return f

  def norm_kernel(tiles, sums, inside):
    def f(d):
      a, own = norm.norm_silu_quantize(
        d['x_inside' if inside[0] else 'x'],
        d['gain'],
        d['shift'],
        d['grid'],
        sums=sums,
        images_inside=inside,
        tiles=tiles,
      )
      return (a, own) if sums else a

    return f

  def first_of(inside):
    def f(y):
      y = y[0] if isinstance(y, tuple) else y
      return first_image(y) if inside[1] else y

    return f

  N = norm.Tiles
  for i, (side, depth) in enumerate(_NORMS):
    numbers = batch * depth
    line = functools.partial(
      add,
      shape=f'norm {side}x{side} {depth}',
      inputs=functools.partial(norm_inputs, side, depth),
      arguments=same,
      ops=0,
      size=numbers * (2 * side**2 + (side + 2) ** 2),
    )
    late = 8 * i
    plain = first_of((False, False))
    line(0.7 + late, 'XLA', f=norm_xla(False), view=plain)
    line(10.7 + late, 'XLA, sums', f=norm_xla(True), view=plain)
    for rank, tiles, sums, inside in (
      (1.7, N(32, 64, 4), True, (False, False)),
      (2.7, N(32, 64, 4), True, (True, True)),
      (3.7, N(32, 64, 4), True, (False, True)),
      (4.7, N(16, 64, 4), True, (False, False)),
      (11.7, N(64, 64, 4), True, (False, False)),
      (12.7, N(64, 64, 8), True, (False, False)),
      (13.7, N(32, 64, 4), False, (False, False)),
      (14.7, N(16, 64, 4), True, (True, True)),
      (15.7, N(32, 64, 2), True, (False, False)),
    ):
      line(
        rank + late,
        f'triton {tiles}{" sums" * sums} images inside {inside}',
        f=norm_kernel(tiles, sums, inside),
        view=first_of(inside),
      )

  # Layer norm, quantization.
  def layer_norm_inputs(m, depth):
    keys = jax.random.split(jax.random.key(3), 3)
    return {
      'x': jax.random.normal(keys[0], (m, depth), jnp.bfloat16),
      'gain': jax.random.uniform(keys[1], (depth,), jnp.float32, 0.5, 2),
      'shift': jax.random.normal(keys[2], (depth,), jnp.float32),
      'grid': norm.grid_numbers(1 / 0.05, 120.0, 128),
    }

  def layer_norm_xla(d):
    x = d['x'].astype(jnp.float32)
    x -= jnp.mean(x, 1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, 1, keepdims=True) + 1e-5)
    y = (x * d['gain'] + d['shift']).astype(jnp.bfloat16).astype(jnp.float32)
    q = affine.QParams(1 / d['grid'][0], jnp.float32(120), 8)
    codes = affine.quantize(y, q).codes
    return (codes.astype(jnp.int16) - 128).astype(jnp.int8)

  def layer_norm_kernel(rows, warps, sums):
    def f(d):
      return norm.layer_norm_quantize(
        d['x'],
        d['gain'],
        d['shift'],
        d['grid'],
        rows=rows,
        warps=warps,
        sums=sums,
      )

    return f

  for i, (side, depth) in enumerate(_NORMS[1:]):
    m = batch * side * side
    line = functools.partial(
      add,
      shape=f'layer norm {m} x {depth}',
      inputs=functools.partial(layer_norm_inputs, m, depth),
      arguments=same,
      ops=0,
      size=3 * m * depth,
    )
    late = 10 * i
    line(4.85 + late, 'XLA', f=layer_norm_xla)
    for rank, rows, warps, sums in (
      (4.9, 4, 4, True),
      (4.95, 8, 4, True),
      (13, 2, 4, True),
      (14, 4, 4, False),
      (15, 4, 2, True),
    ):
      line(
        rank + late,
        f'triton rows {rows} warps {warps}{" sums" * sums}',
        f=layer_norm_kernel(rows, warps, sums),
        view=lambda y: y[0],
      )
  # A shape at a time within three rounds, so that inputs are made once each.
  rounds = lambda rank: sum(rank >= x for x in (5, 20, 45))  # noqa: E731
  out.sort(key=lambda job: job[0])
  order = {}
  for job in out:
    order.setdefault((rounds(job[0]), job[2]), len(order))
  out.sort(key=lambda job: (order[rounds(job[0]), job[2]], job[0]))
  return out


def work(first, until, batch, only, threads):
  """Runs jobs from the first on; a line each."""
  sys.path.insert(0, _ROOT)
  import jax
  import jax.numpy as jnp

  print(f'{jax.devices()[0].device_kind}, JAX {jax.__version__}', flush=True)

  @jax.jit
  def off(x, y):
    return jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))

  def compiled(job):
    _, _, _, inputs, arguments, f, *_ = job
    specs = arguments(jax.eval_shape(inputs))
    return jax.jit(f).lower(*specs).compile()

  every = jobs(batch)
  todo = [
    (i, job)
    for i, job in enumerate(every)
    if i >= first and (not only or only in f'{job[2]}: {job[1]}')
  ]
  references = {}  # Compiled.
  held, xla = None, {}

  def has_sums(job):
    return 'sums' in job[1] and 'norm' not in job[2]

  def reference(job):
    """What XLA computes, to compare with."""
    key = has_sums(job)
    if key not in xla:
      if (job[2], key) not in references:
        [other] = [
          x
          for x in every
          if x[2] == job[2] and x[1] == ('XLA, sums' if key else 'XLA')
        ]
        references[job[2], key] = other, compiled(other)
      other, run = references[job[2], key]
      xla[key] = jax.jit(other[-1])(run(*other[4](held[1])))
    return xla[key]

  for start in range(0, len(todo), _AT_A_TIME):
    group = todo[start : start + _AT_A_TIME]
    # XLA tries algorithms on the device while it compiles; others do not.
    ahead = {}
    if threads and time.time() < until:
      print(f'{_START} {group[0][0] - 1} compiling', flush=True)
      with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for i, job in group:
          if 'XLA' not in job[1]:
            ahead[i] = pool.submit(compiled, job)
    for i, job in group:
      _, label, shape, inputs, arguments, f, ops, size, view = job
      if time.time() > until:
        print('Time is over.', flush=True)
        return
      print(f'{_START} {i} {shape}: {label}', flush=True)
      try:
        if held is None or held[0] != shape:
          held, xla = None, {}
          held = (shape, jax.block_until_ready(jax.jit(inputs)()))
        args = arguments(held[1])
        run = ahead.pop(i).result() if i in ahead else compiled(job)
        if 'XLA' in label:
          references.setdefault((shape, has_sums(job)), (job, run))
        difference = float(off(jax.jit(view)(run(*args)), reference(job)))
        best = float('inf')
        for _ in range(_REPEATS):
          begin = time.perf_counter()
          for _ in range(_CALLS):
            y = run(*args)
          jax.block_until_ready(y)
          best = min(best, (time.perf_counter() - begin) / _CALLS)
        del y
        print(
          f'{shape}: {1e3 * best:.4f} ms '
          f'{ops / best / 1e12:.0f} TOP/s {size / best / 1e9:.0f} GB/s '
          f'off {difference:.4g}: {label}',
          flush=True,
        )
      except Exception as error:  # noqa: BLE001 - a line, and on to the next.
        text = ' '.join(str(error).split())[:300]
        print(f'{shape}: FAILED {type(error).__name__} {text}: {label}')
        sys.stdout.flush()


def watch(arguments):
  """Runs workers one after another, each until it ends or hangs."""
  until = time.time() + arguments.seconds
  first, threads = 0, arguments.threads
  while time.time() < until:
    command = [sys.executable, os.path.abspath(__file__), '--worker']
    command += ['--first', str(first), '--until', str(until)]
    command += ['--batch', str(arguments.batch), '--only', arguments.only]
    command += ['--threads', str(threads)]
    worker = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: queue.Queue = queue.Queue()

    def read(stream=worker.stdout, lines=lines):
      for line in stream:
        lines.put(line)
      lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    job, ended = None, False
    while True:
      patience = arguments.patience if job else 3 * arguments.patience
      try:
        line = lines.get(timeout=patience)
      except queue.Empty:
        print(f'HANGS after {patience} s: {job}', flush=True)
        worker.kill()
        time.sleep(2)  # Until its memory is free.
        break
      if line is None:
        ended = worker.wait() == 0
        if not ended:
          print(f'DIED with {worker.returncode}: {job}', flush=True)
        break
      if line.startswith(_START):
        _, index, job = line.rstrip().split(' ', 2)
        first = int(index) + 1
      else:
        print(line, end='', flush=True)
    worker.wait()
    if job == 'compiling':
      threads = 0
    if ended or job is None:
      break


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seconds', type=float, default=170)
  parser.add_argument('--patience', type=float, default=25)
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--threads', type=int, default=6, help='0: one by one')
  parser.add_argument('--only', default='', help='jobs that contain this')
  parser.add_argument('--list', action='store_true')
  parser.add_argument('--worker', action='store_true')
  parser.add_argument('--first', type=int, default=0)
  parser.add_argument('--until', type=float, default=0)
  arguments = parser.parse_args()
  if arguments.list:
    sys.path.insert(0, _ROOT)
    for i, job in enumerate(jobs(arguments.batch)):
      if arguments.only in f'{job[2]}: {job[1]}':
        print(i, job[0], f'{job[2]}: {job[1]}')
  elif arguments.worker:
    work(
      arguments.first,
      arguments.until,
      arguments.batch,
      arguments.only,
      arguments.threads,
    )
  else:
    watch(arguments)


if __name__ == '__main__':
  main()
