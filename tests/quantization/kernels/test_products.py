"""Kernels of Mosaic GPU against plain JAX, interpreted: barriers, copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2dpm_jax.quantization import affine
from d2dpm_jax.quantization.kernels import hopper, norm, products
from d2dpm_jax.quantization.kernels.hopper import Epilogue, Tiles


def _int8(rng, shape):
  return jnp.asarray(rng.integers(-128, 128, shape), jnp.int8)


def _floats(rng, shape, dtype=jnp.float32):
  return jnp.asarray(rng.standard_normal(shape), dtype)


def _epilogue(rng, n, shape, names):
  """What `names` say, and a scale."""
  every = {
    'bias': _floats(rng, n, jnp.bfloat16),
    'shift': jnp.asarray(rng.integers(-3, 4, n), jnp.int32),
    'row_sums': None,
    'correction': jnp.asarray(rng.integers(-(10**4), 10**4, n), jnp.int32),
    'residual': _floats(rng, (*shape, n), jnp.bfloat16),
  }
  return Epilogue(
    1e-4 * _floats(rng, n), **{name: every[name] for name in names}
  )


def _rescaled(total, sums, epilogue):
  """float32, by the formula."""
  if epilogue.shift is not None:
    total += sums * epilogue.shift
  if epilogue.correction is not None:
    total += epilogue.correction
  y = total.astype(jnp.float32) * epilogue.scale
  if epilogue.bias is not None:
    y += epilogue.bias
  return y if epilogue.residual is None else y + epilogue.residual


def _assert_equal(got, want):
  """Whether they are equal but for the last bit of bfloat16."""
  got = np.asarray(got).astype(np.float32)
  assert got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=2.0**-7, atol=1e-5)
  rounded = np.asarray(want.astype(jnp.bfloat16)).astype(np.float32)
  assert np.mean(got != rounded) < 1e-2


def _params():
  return plgpu.InterpretGPUParams(detect_races=True)


@pytest.mark.parametrize(
  'names',
  [
    (),
    ('bias', 'shift', 'residual'),
    ('bias', 'correction'),
    ('shift', 'row_sums'),
    ('row_sums',),
  ],
)
def test_a_linear_layer_is_that_of_plain_jax(names):
  rng = np.random.default_rng(0)
  m, depth, n = 384, 192, 128
  a, k = _int8(rng, (m, depth)), _int8(rng, (n, depth))
  epilogue = _epilogue(rng, n, (m,), names)
  sums = jnp.sum(a, 1, keepdims=True, dtype=jnp.int32)
  if 'row_sums' in names:
    epilogue = epilogue._replace(row_sums=sums[:, 0])
  got = products.linear(
    a,
    k,
    epilogue,
    tiles=Tiles(rows=64, n=64, k=64, stages=2, blocks=2),
    interpret=_params(),
  )
  total = a.astype(jnp.int32) @ k.T.astype(jnp.int32)
  _assert_equal(got, _rescaled(total, sums, epilogue))


def test_parts_of_the_rows_have_biases_of_their_own():
  rng = np.random.default_rng(6)
  m, depth, n = 384, 64, 64
  a, k = _int8(rng, (m, depth)), _int8(rng, (n, depth))
  bias = _floats(rng, (3, n))
  epilogue = Epilogue(1e-4 * _floats(rng, n), bias=bias)
  got = products.linear(a, k, epilogue, interpret=_params())
  total = a.astype(jnp.int32) @ k.T.astype(jnp.int32)
  rows = epilogue._replace(bias=jnp.repeat(bias, m // 3, axis=0))
  _assert_equal(got, _rescaled(total, None, rows))
  for wrong, what in (
    ({'bias': bias[:2, :32]}, 'bias'),
    ({'bias': bias.repeat(3, 0)}, 'A bias'),
    ({'scale': jnp.ones((2, n))}, 'scale'),
    ({'row_sums': jnp.ones(3, jnp.int32)}, 'Sums'),
  ):
    with pytest.raises(ValueError, match=what):
      products.linear(a, k, epilogue._replace(**wrong), interpret=_params())


@pytest.mark.parametrize(
  'images, rows, names',
  [
    (64, 64, ('bias', 'shift', 'residual')),
    (16, 64, ('bias', 'shift', 'correction', 'residual')),
    (16, 64, ('shift', 'row_sums')),
    (32, 128, ('shift', 'row_sums')),
    (32, 128, ('correction',)),
  ],
)
def test_a_convolution_is_that_of_plain_jax(images, rows, names):
  rng = np.random.default_rng(1)
  height, width, depth, n = 4, 6, 64, 64
  a = _int8(rng, (images, height + 2, width + 2, depth))
  kernel = _int8(rng, (3, 3, depth, n))
  epilogue = _epilogue(rng, n, (images, height, width), names)
  if 'row_sums' in names:
    epilogue = epilogue._replace(row_sums=jnp.sum(a, -1, dtype=jnp.int32))
  got = products.conv(
    a,
    products.kernel_layout(kernel),
    epilogue,
    tiles=Tiles(rows=rows, n=64, k=64, stages=3, blocks=3),
    interpret=_params(),
  )

  def windows(k):
    return jax.lax.conv_general_dilated(
      a,
      k,
      (1, 1),
      'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      preferred_element_type=jnp.int32,
    )

  sums = windows(jnp.ones((3, 3, depth, 1), jnp.int8))
  _assert_equal(got, _rescaled(windows(kernel), sums, epilogue))


def test_a_gated_layer_returns_codes():
  rng = np.random.default_rng(2)
  m, depth, n = 128, 128, 128
  a, k = _int8(rng, (m, depth)), _int8(rng, (2 * n, depth))
  epilogue = _epilogue(rng, 2 * n, (m,), ('bias', 'shift'))
  epilogue = epilogue._replace(scale=0.2 * epilogue.scale)
  step, zero, offset = np.float32(2.0**-6), 60.0, 128
  got = products.gated(
    a,
    k,
    epilogue._replace(grid=norm.grid_numbers(1 / step, zero, offset)),
    tiles=Tiles(rows=64, n=128, k=64, stages=2, blocks=2),
    interpret=_params(),
  )
  sums = jnp.sum(a, 1, keepdims=True, dtype=jnp.int32)
  total = a.astype(jnp.int32) @ k.T.astype(jnp.int32)
  y, gate = jnp.split(_rescaled(total, sums, epilogue), 2, -1)
  y *= jax.nn.gelu(gate, approximate=False)
  codes = affine.quantize(y, affine.QParams(step, np.float32(zero), 8)).codes
  assert np.ptp(np.asarray(codes)) > 100
  difference = np.abs(got.astype(jnp.int32) - (codes.astype(jnp.int32) - 128))
  assert difference.max() <= 1 and np.mean(difference) < 5e-3


def test_gelu_is_close_to_the_exact_one():
  x = np.linspace(-40, 40, 400_001, dtype=np.float32)
  error = np.abs(hopper._gelu(x) - jax.nn.gelu(x, approximate=False))
  assert np.all(error < np.maximum(6e-5, 1.2e-5 * np.abs(x)))
  assert error[np.abs(x) < 4].max() < 2.5e-5


def test_the_tiles_that_are_chosen_fit_shared_memory():
  for n in (64, 192, 224, 256, 384, 448, 576, 672, 768, 896, 960, 1536, 7680):
    for depth in (64, 128, 192, 448, 576, 1920):
      for rows in (128, 2048):
        assert products.fit(rows, depth, n)
        found = [products._linear_tiles(jnp.zeros((n, depth), jnp.int8))]
        found.append(products._conv_tiles(rows, depth, n))
        found.append(products._conv_tiles(rows, depth, n, size=4))
        if n % 128 == 0:
          found.append(products._gated_tiles(jnp.zeros((n, depth), jnp.int8)))
        for tiles in found:
          assert n % tiles.n == 0 and depth % tiles.k == 0
          # Results in float32, 224 columns wide, leave room for two.
          assert tiles.stages > 2 or (tiles.stages, tiles.n) == (2, 224)
          assert tiles.n % 32 == 0 and rows % tiles.height == 0
