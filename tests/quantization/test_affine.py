"""Grids, ranges and codes against plain Python and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from d2dpm_jax.quantization import affine


def _scalar_reference(v, scale, zero_point, bits):
  """Plain Python, one number; `round` is half to even."""
  code = min(max(round(v / scale) + zero_point, 0), 2**bits - 1)
  return (code - zero_point) * scale


def _brute_force_mse(x, bits):
  """Loops over the 80 candidates in float64; returns (scale, zero point)."""
  best = (np.inf, None, None)
  for i in range(80):
    low, high = x.min() * (1 - 0.01 * i), x.max() * (1 - 0.01 * i)
    scale = (high - low) / (2**bits - 1)
    zero_point = np.round(-low / scale)
    codes = np.clip(np.round(x / scale) + zero_point, 0, 2**bits - 1)
    error = np.mean(np.abs((codes - zero_point) * scale - x) ** 2.4)
    if error < best[0]:
      best = (error, scale, zero_point)
  return best[1:]


def _data(seed, shape, offset=0.0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=shape) + offset).astype(np.float32)


class FakeQuantTest(parameterized.TestCase):
  @parameterized.product(
    bits=(2, 4, 8), zero_point=(0, 3, -8, 300), jit=(False, True)
  )
  def test_equals_scalar_reference(self, bits, zero_point, jit):
    x = _data(0, (3, 3, 4, 8))
    x.ravel()[:8] = np.arange(8) * 0.25 + 0.125  # Ties go to even codes.
    q = affine.QParams(jnp.float32(0.25), jnp.float32(zero_point), bits)
    fn = jax.jit(affine.fake_quant) if jit else affine.fake_quant
    want = np.vectorize(_scalar_reference)(x, 0.25, zero_point, bits)
    np.testing.assert_array_equal(fn(x, q), want)  # Exact, not close.

  def test_per_channel_equals_each_channel_alone(self):
    x = _data(1, (3, 3, 4, 5))
    q = affine.range_mse(x, 4, per_channel=True)
    self.assertEqual(q.scale.shape, (1, 1, 1, 5))
    for c in range(5):
      one = affine.range_mse(x[..., c], 4)
      np.testing.assert_allclose(q.scale[0, 0, 0, c], one.scale, rtol=1e-6)
      np.testing.assert_array_equal(q.zero_point[0, 0, 0, c], one.zero_point)
      np.testing.assert_allclose(
        affine.fake_quant(x, q)[..., c],
        affine.fake_quant(x[..., c], one),
        rtol=1e-6,
      )

  def test_codes_stand_for_the_same_numbers(self):
    x = _data(2, (7, 6))
    for per_channel in (False, True):
      q = affine.range_mse(x, 3, per_channel)
      w = affine.quantize(x, q)
      self.assertEqual(w.codes.dtype, jnp.uint8)
      self.assertLessEqual(int(w.codes.max()), 7)
      np.testing.assert_array_equal(
        affine.dequantize(w), affine.fake_quant(x, q)
      )
      self.assertEqual(w.qparams, q)

  def test_dtype_of_the_input_is_kept(self):
    q = affine.QParams(jnp.float32(0.1), jnp.float32(8), 4)
    x = jnp.asarray([0.33, -0.2], jnp.bfloat16)
    self.assertEqual(affine.fake_quant(x, q).dtype, jnp.bfloat16)

  def test_gradients_pass_through_the_rounding(self):
    # Codes 0 and 15 are the ends; beyond them the gradient of x is 0.
    q = affine.QParams(jnp.float32(0.5), jnp.float32(4), 4)
    x = jnp.asarray([-2.0, 5.5, -2.3, 5.8, 0.6, 0.0], jnp.float32)
    dx = jax.vmap(jax.grad(lambda v: affine.fake_quant(v, q)))(x)
    np.testing.assert_array_equal(dx, [1, 1, 0, 0, 1, 1])
    ds = jax.vmap(
      jax.grad(lambda s, v: affine.fake_quant(v, q.replace(scale=s))), (None, 0)
    )(q.scale, x)
    # Inside: round(x/s) - x/s. Outside: clipped code - zero point.
    np.testing.assert_allclose(ds, [0, 0, -4, 11, 1 - 1.2, 0], atol=1e-6)

  def test_rank_mismatch_is_an_error(self):
    q = affine.QParams(jnp.ones((3,)), jnp.zeros((3,)), 4)
    with self.assertRaisesRegex(ValueError, r'scale \(3,\) does not fit'):
      affine.fake_quant(jnp.ones((2, 3)), q)
    with self.assertRaisesRegex(ValueError, r'scale \(3,\) does not fit'):
      affine.quantize(jnp.ones((2, 3)), q)


class RangeTest(parameterized.TestCase):
  @parameterized.product(bits=(2, 4, 8), offset=(0.0, 5.0, -9.0))
  def test_mse_equals_brute_force(self, bits, offset):
    x = _data(bits, (40, 9), offset)
    q = affine.range_mse(x, bits)
    scale, zero_point = _brute_force_mse(x.astype(np.float64), bits)
    np.testing.assert_allclose(q.scale, scale, rtol=1e-5)
    np.testing.assert_array_equal(q.zero_point, zero_point)

  def test_mse_per_channel_equals_brute_force(self):
    x = _data(3, (3, 3, 6, 4)) * np.float32([1, 10, 0.01, 3])
    q = affine.range_mse(x, 4, per_channel=True)
    for c in range(4):
      scale, zero_point = _brute_force_mse(x[..., c].astype(np.float64), 4)
      np.testing.assert_allclose(q.scale[..., c].item(), scale, rtol=1e-5)
      self.assertEqual(q.zero_point[..., c].item(), zero_point)

  def test_mse_is_no_worse_than_max(self):
    x = _data(4, (1000,)) ** 3  # Long tails: shrinking must help.
    errors = {}
    for name, method in affine.RANGE_METHODS.items():
      y = affine.fake_quant(x, method(x, 4))
      errors[name] = float(np.mean(np.abs(y - x) ** 2.4))
    self.assertLess(errors['mse'], 0.9 * errors['max'])

  def test_max_includes_zero_and_mse_does_not_force_it(self):
    x = np.linspace(1, 2, 50, dtype=np.float32)
    q = affine.range_max(x, 4)
    np.testing.assert_allclose(q.scale, 2 / 15, rtol=1e-6)
    self.assertEqual(float(q.zero_point), 0)
    q = affine.range_mse(x, 4)
    self.assertEqual(float(q.zero_point), -15)  # Outside 0..15.
    error = np.abs(affine.fake_quant(x, q) - x).max()
    self.assertLess(error, 0.51 / 15)
    np.testing.assert_array_equal(
      affine.dequantize(affine.quantize(x, q)), affine.fake_quant(x, q)
    )

  def test_widened_ranges_reach_as_far_as_asked(self):
    x = jnp.linspace(-3.0, 2.0, 100)
    q = affine.range_max(x, 8)
    for reach in (2.5, 5.0):
      wide = affine.widen(q, reach)
      low = -wide.zero_point * wide.scale
      high = (255 - wide.zero_point) * wide.scale
      self.assertLessEqual(float(low), -min(reach, 3.0) + float(wide.scale))
      self.assertGreaterEqual(float(high), reach - float(wide.scale))
      ends = jnp.array([-reach, reach])
      np.testing.assert_allclose(
        affine.fake_quant(ends, wide), ends, atol=float(wide.scale)
      )
    same = affine.widen(q, 1.5)
    self.assertEqual(float(same.scale), float(q.scale))
    self.assertEqual(float(same.zero_point), float(q.zero_point))

  @parameterized.product(
    method=('max', 'mse'),
    value=(0.0, 1.0, -2.5, 1e-30, 3e4),
    per_channel=(False, True),
  )
  def test_constant_tensors(self, method, value, per_channel):
    x = np.full((3, 3, 2, 4), value, np.float32)
    q = affine.RANGE_METHODS[method](x, 4, per_channel)
    self.assertTrue(np.all(np.isfinite(q.scale)) and np.all(q.scale > 0))
    np.testing.assert_allclose(affine.fake_quant(x, q), x, rtol=1e-6)
    self.assertTrue(np.all(np.isfinite(affine.fake_quant(x + 1, q))))

  def test_one_constant_channel_among_others(self):
    x = _data(5, (5, 3))
    x[:, 1] = 0
    q = affine.range_mse(x, 4, per_channel=True)
    y = affine.fake_quant(x, q)
    np.testing.assert_array_equal(y[:, 1], 0)
    self.assertLess(np.abs(y - x).max(), 0.3)

  def test_narrow_range_far_from_zero(self):
    x = np.float32(1000) + _data(6, (64,)) * np.float32(1e-3)
    for method in affine.RANGE_METHODS.values():
      y = affine.fake_quant(x, method(x, 8))
      self.assertLess(np.abs(y - x).max(), 4.0)
    y = affine.fake_quant(x, affine.range_mse(x, 8))
    self.assertLess(np.abs(y - x).max(), 1e-3)

  def test_unsupported_requests_are_errors(self):
    for bits in (1, 9, 4.0, True):
      with self.assertRaisesRegex(ValueError, '[Bb]its'):
        affine.range_mse(jnp.ones((2,)), bits)
    with self.assertRaisesRegex(ValueError, 'empty'):
      affine.range_max(jnp.ones((0, 2)), 4)
    with self.assertRaisesRegex(ValueError, "'l2'.*max.*mse"):
      affine.range_method('l2')


if __name__ == '__main__':
  absltest.main()
