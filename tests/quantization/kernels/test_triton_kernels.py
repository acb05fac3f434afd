"""Kernels of Pallas against plain JAX, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2dpm_jax.quantization import affine
from d2dpm_jax.quantization.kernels import conv, epilogue, matmul, norm


def _int8(rng, shape):
  return jnp.asarray(rng.integers(-128, 128, shape), jnp.int8)


def _floats(rng, shape, dtype=jnp.float32):
  return jnp.asarray(rng.standard_normal(shape), dtype)


def _ulps(x, y):
  """Most steps of bfloat16 between two arrays of numbers."""

  def order(v):
    bits = np.asarray(v).view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)

  return np.abs(order(x) - order(y)).max()


def _extras(rng, n, m, names):
  """Optional arguments of a product with m rows and n columns."""
  every = {
    'shift': jnp.asarray(rng.integers(-3, 4, n), jnp.int32),
    'correction': jnp.asarray(rng.integers(-(10**5), 10**5, n), jnp.int32),
    'residual': _floats(rng, (m, n), jnp.bfloat16),
  }
  return {name: every[name] for name in names}


@pytest.mark.parametrize(
  'names, columns',
  [
    (('shift',), 96),
    (('correction', 'residual'), 96),
    (('shift', 'residual'), 128),
  ],
)
def test_a_linear_layer_is_that_of_plain_jax(names, columns):
  rng = np.random.default_rng(0)
  m, depth = 128, 64
  a, k = _int8(rng, (m, depth)), _int8(rng, (columns, depth))
  scale, bias = 1e-4 * _floats(rng, columns), _floats(rng, columns)
  extras = _extras(rng, columns, m, names)
  tiles = matmul.Tiles(m=64, n=64, k=32)
  got = matmul.matmul_rescale(
    a, k, scale, bias, **extras, tiles=tiles, interpret=True
  )
  total = a.astype(jnp.int32) @ k.T.astype(jnp.int32)
  sums = jnp.sum(a, 1, dtype=jnp.int32)
  want = epilogue.rescale(total, scale, bias, sums=sums[:, None], **extras)
  assert got.dtype == jnp.bfloat16
  assert _ulps(got, want.astype(jnp.bfloat16)) <= 1
  if 'shift' in names:
    given = matmul.matmul_rescale(
      a, k, scale, bias, **extras, row_sums=sums, tiles=tiles, interpret=True
    )
    np.testing.assert_array_equal(given, got)


def test_sums_of_a_linear_layer_are_exact():
  rng = np.random.default_rng(1)
  a, k = _int8(rng, (64, 64)), _int8(rng, (64, 64))
  got = matmul.matmul_rescale(
    a,
    k,
    jnp.ones(64),
    jnp.zeros(64),
    dtype=jnp.float32,
    tiles=matmul.Tiles(m=64, n=64, k=32),
    interpret=True,
  )
  np.testing.assert_array_equal(
    got, a.astype(jnp.int32) @ k.T.astype(jnp.int32)
  )


@pytest.mark.parametrize(
  'names, side, per_image',
  [
    (('shift',), 8, False),
    (('residual',), 8, True),
    (('shift', 'correction', 'residual'), 4, True),
  ],
)
def test_a_convolution_is_that_of_plain_jax(names, side, per_image):
  rng = np.random.default_rng(2)
  b, depth, n = 4, 32, 48
  a = _int8(rng, (b, side + 2, side + 2, depth))
  kernel = _int8(rng, (3, 3, depth, n))
  scale = 1e-4 * _floats(rng, n)
  bias = _floats(rng, (b, n) if per_image else n)
  extras = _extras(rng, n, b * side**2, names)
  if 'residual' in extras:
    extras['residual'] = extras['residual'].reshape(b, side, side, n)
  sums = conv.window_sums(jnp.sum(a, -1, dtype=jnp.int32))
  got, moments = conv.conv3x3_rescale(
    a,
    conv.kernel_layout(kernel),
    scale,
    bias,
    **extras,
    window_sums=sums,
    moments=True,
    tiles=matmul.Tiles(m=32, n=32, k=16),
    interpret=True,
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

  ones = jnp.ones((3, 3, depth, 1), jnp.int8)
  np.testing.assert_array_equal(sums[..., None], windows(ones))
  want = epilogue.rescale(
    windows(kernel),
    scale,
    bias[:, None, None] if per_image else bias,
    sums=sums[..., None],
    **extras,
  )
  assert _ulps(got, want.astype(jnp.bfloat16)) <= 1
  tiled = want.reshape(-1, 32, n)
  np.testing.assert_allclose(moments[:, 0], tiled.sum(1), rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(moments[:, 1], (tiled**2).sum(1), rtol=1e-4)


@pytest.mark.parametrize('silu', [True, False])
@pytest.mark.parametrize(
  'bits, zero, padding', [(8, 31.0, 1), (8, 200.0, 0), (4, 3.0, 1)]
)
def test_norm_and_quantization_are_those_of_plain_jax(
  silu, bits, zero, padding
):
  rng = np.random.default_rng(3)
  b, side, depth = 2, 6, 32
  x = _floats(rng, (b, side, side, depth), jnp.bfloat16)
  gain, shift = _floats(rng, (b, depth)), _floats(rng, (b, depth))
  step = np.float32(2.0**-5 if bits == 8 else 2.0**-2)  # A product is exact.
  offset = np.clip(zero, 2.0**bits - 128, 128)
  got, sums = norm.norm_silu_quantize(
    x,
    gain,
    shift,
    norm.grid_numbers(1 / step, zero, offset, bits),
    silu=silu,
    padding=padding,
    tiles=norm.Tiles(pixels=16, channels=16),
    interpret=True,
  )
  y = x.astype(jnp.float32) * gain[:, None, None] + shift[:, None, None]
  if silu:
    y = jax.nn.silu(y)
  grid = affine.QParams(step, np.float32(zero), bits)
  codes = affine.quantize(y, grid).codes.astype(jnp.int32)
  ends = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  want = jnp.pad(codes, ends, constant_values=int(zero)) - int(offset)
  assert got.dtype == jnp.int8 and got.shape == want.shape
  difference = np.abs(got.astype(jnp.int32) - want)
  # Elsewhere SiLU has another last bit.
  assert difference.max() <= 1 and np.mean(difference != 0) < 1e-3
  if not silu:
    assert difference.max() == 0
  np.testing.assert_array_equal(sums, jnp.sum(got, -1, dtype=jnp.int32))


@pytest.mark.parametrize('inside', [(False, True), (True, True)])
def test_images_may_come_after_pixels(inside):
  rng = np.random.default_rng(4)
  b, depth = 3, 16
  x = _floats(rng, (b, 2, 4, depth), jnp.bfloat16)
  gain, shift = _floats(rng, (b, depth)), _floats(rng, (b, depth))
  grid = norm.grid_numbers(30.0, 31.0, 128)
  tiles = norm.Tiles(pixels=8, channels=16)

  def run(x, inside):
    return norm.norm_silu_quantize(
      x, gain, shift, grid, images_inside=inside, tiles=tiles, interpret=True
    )

  want = run(x, (False, False))
  got = run(jnp.moveaxis(x, 0, 2) if inside[0] else x, inside)
  for g, w in zip(got, want, strict=True):
    g = jnp.moveaxis(g, 2, 0) if inside[1] else g
    np.testing.assert_array_equal(g, w)


def test_layer_norm_and_quantization_are_those_of_plain_jax():
  rng = np.random.default_rng(5)
  depth = 48
  x = 3 + _floats(rng, (16, depth), jnp.bfloat16)
  gain, shift = _floats(rng, depth), _floats(rng, depth)
  step = np.float32(2.0**-5)
  got, sums = norm.layer_norm_quantize(
    x, gain, shift, norm.grid_numbers(1 / step, 120.0, 128), interpret=True
  )
  y = x.astype(jnp.float32)
  y -= y.mean(1, keepdims=True)
  y *= jax.lax.rsqrt(jnp.mean(y * y, 1, keepdims=True) + 1e-5)
  grid = affine.QParams(step, np.float32(120), 8)
  want = affine.quantize(y * gain + shift, grid).codes.astype(jnp.int32) - 128
  difference = np.abs(got.astype(jnp.int32) - want)
  assert difference.max() <= 1 and np.mean(difference != 0) < 5e-3
  np.testing.assert_array_equal(sums, jnp.sum(got, 1, dtype=jnp.int32))
