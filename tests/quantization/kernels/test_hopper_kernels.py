"""Kernels of Mosaic GPU against plain JAX, interpreted: barriers, copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2dpm_jax.quantization import affine
from d2dpm_jax.quantization.kernels import conv, epilogue, hopper, norm


def _int8(rng, shape):
  return jnp.asarray(rng.integers(-128, 128, shape), jnp.int8)


def _floats(rng, shape, dtype=jnp.float32):
  return jnp.asarray(rng.standard_normal(shape), dtype)


def _equal(got, want):
  """Whether they are equal but for the last bit of bfloat16."""
  got = np.asarray(got).astype(np.float32)
  np.testing.assert_allclose(got, want, rtol=2.0**-7, atol=1e-5)
  rounded = np.asarray(want.astype(jnp.bfloat16)).astype(np.float32)
  assert np.mean(got != rounded) < 1e-2


def _params():
  return plgpu.InterpretGPUParams(detect_races=True)


@pytest.mark.parametrize(
  'names', [('shift', 'row_sums'), ('shift', 'residual')]
)
def test_a_linear_layer_is_that_of_plain_jax(names):
  rng = np.random.default_rng(0)
  m, depth, n = 384, 192, 128
  a, k = _int8(rng, (m, depth)), _int8(rng, (n, depth))
  scale, bias = 1e-4 * _floats(rng, n), _floats(rng, n)
  sums = jnp.sum(a, 1, dtype=jnp.int32)
  every = {
    'shift': jnp.asarray(rng.integers(-3, 4, n), jnp.int32),
    'row_sums': sums,
    'residual': _floats(rng, (m, n), jnp.bfloat16),
  }
  got = hopper.matmul_rescale(
    a,
    k,
    scale,
    bias,
    **{name: every[name] for name in names},
    tiles=hopper.Tiles(rows=64, n=64, k=64, stages=2, blocks=2),
    interpret=_params(),
  )
  want = epilogue.rescale(
    a.astype(jnp.int32) @ k.T.astype(jnp.int32),
    scale,
    bias,
    sums=sums[:, None],
    shift=every['shift'] if 'shift' in names else None,
    residual=every['residual'] if 'residual' in names else None,
  )
  _equal(got, want)


@pytest.mark.parametrize(
  'images, names', [(128, ('shift', 'residual')), (64, ('shift', 'sums'))]
)
def test_a_convolution_is_that_of_plain_jax(images, names):
  rng = np.random.default_rng(1)
  height, width, depth, n = 2, 4, 64, 64
  a = _int8(rng, (height + 2, width + 2, images, depth))
  kernel = _int8(rng, (3, 3, depth, n))
  scale, bias = 1e-4 * _floats(rng, n), _floats(rng, n)
  correction = jnp.asarray(rng.integers(-(10**4), 10**4, n), jnp.int32)
  shift = jnp.asarray(rng.integers(-3, 4, n), jnp.int32)
  residual = _floats(rng, (height, width, images, n), jnp.bfloat16)
  # Convolutions of plain JAX have images first.
  first = jnp.moveaxis(a, 2, 0)
  sums = conv.window_sums(jnp.sum(first, -1, dtype=jnp.int32))
  sums = jnp.moveaxis(sums, 0, 2)
  got = hopper.conv3x3_rescale(
    a,
    hopper.kernel_layout(kernel),
    scale,
    hopper.add_correction(bias, scale, correction),
    shift=shift,
    window_sums=sums if 'sums' in names else None,
    residual=residual if 'residual' in names else None,
    tiles=hopper.Tiles(rows=64, n=64, k=64, stages=3, columns=32, blocks=3),
    interpret=_params(),
  )
  total = jax.lax.conv_general_dilated(
    first,
    kernel,
    (1, 1),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=jnp.int32,
  )
  want = epilogue.rescale(
    jnp.moveaxis(total, 0, 2),
    scale,
    bias,
    sums=sums[..., None],
    shift=shift,
    correction=correction,
    residual=residual if 'residual' in names else None,
  )
  assert got.shape == want.shape
  _equal(got, want)


def test_a_gated_layer_returns_codes():
  rng = np.random.default_rng(2)
  m, depth, n = 128, 128, 128
  a, k = _int8(rng, (m, depth)), _int8(rng, (2 * n, depth))
  scale, bias = 2e-5 * _floats(rng, 2 * n), _floats(rng, 2 * n)
  shift = jnp.asarray(rng.integers(-3, 4, 2 * n), jnp.int32)
  step, zero, offset = np.float32(2.0**-6), 60.0, 128
  tiles = hopper.Tiles(rows=64, n=128, k=64, stages=2, columns=32, blocks=2)
  got = hopper.matmul_geglu_quantize(
    a,
    *(hopper.geglu_layout(x, tiles) for x in (k, scale, bias)),
    norm.grid_numbers(1 / step, zero, offset),
    shift=hopper.geglu_layout(shift, tiles),
    tiles=tiles,
    interpret=_params(),
  )
  y = epilogue.rescale(
    a.astype(jnp.int32) @ k.T.astype(jnp.int32),
    scale,
    bias,
    sums=jnp.sum(a, 1, keepdims=True, dtype=jnp.int32),
    shift=shift,
  )
  y, gate = jnp.split(y, 2, -1)
  y *= jax.nn.gelu(gate, approximate=False)
  codes = affine.quantize(y, affine.QParams(step, np.float32(zero), 8)).codes
  assert np.ptp(np.asarray(codes)) > 100
  difference = np.abs(got.astype(jnp.int32) - (codes.astype(jnp.int32) - 128))
  assert difference.max() <= 1 and np.mean(difference) < 1e-3
