"""Schedule, DDIM tables, one step and guidance against independent numbers."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from d2dpm_jax.diffusion import ddim, schedule

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden/ddim_trajectories.npz'
_BETAS = (0.0015, 0.0195)


def _scalar_step(x, eps, a, prev, sigma, z, v):  # Plain Python, one number.
  c = math.sqrt(1 - prev - sigma**2) - math.sqrt(prev * (1 - a) / a)
  less = max(sigma**2 - c**2 * v, 0.0)
  x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
  direction = math.sqrt(1 - prev - less) * eps
  return math.sqrt(prev) * x0 + direction + math.sqrt(less) * z


class ScheduleTest(parameterized.TestCase):
  def test_equals_product_of_a_loop(self):
    got = schedule.linear_schedule(1000, *_BETAS)
    self.assertEqual(got.dtype, np.float64)
    low, high = math.sqrt(_BETAS[0]), math.sqrt(_BETAS[1])
    product = 1.0
    for t in range(1000):
      product *= 1 - (low + (high - low) * t / 999) ** 2
      self.assertAlmostEqual(got[t], product, delta=1e-13)

  def test_equals_golden(self):
    golden = np.load(_GOLDEN)
    got = schedule.linear_schedule(1000, *_BETAS)
    np.testing.assert_allclose(got, golden['alphas_cumprod'], rtol=1e-13)

  @parameterized.parameters(
    (0, 0.1, 0.2), (10, 0.0, 0.2), (10, 0.3, 0.2), (10, 0.1, 1.0)
  )
  def test_refuses(self, *args):
    with self.assertRaisesRegex(ValueError, 'expected'):
      schedule.linear_schedule(*args)


class TablesTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 1.0), (7, 0.5), (20, 0.0), (20, 1.0), (30, 1.0), (250, 1.0)
  )
  def test_equal_the_original(self, steps, eta):
    golden = np.load(_GOLDEN)
    rows = ddim.ddim_rows(golden['alphas_cumprod'], steps, eta)
    key = f'table_steps{steps}_eta{eta:g}'
    np.testing.assert_array_equal(rows.t[::-1], golden[f'{key}_t'])
    np.testing.assert_array_equal(rows.index, np.arange(len(rows.t)))
    # One rounding to float32.
    for got, column in (
      (rows.alpha_bar, 'alphas'),
      (rows.alpha_bar_prev, 'alphas_prev'),
      (rows.sigma, 'sigmas'),
    ):
      self.assertEqual(got.dtype, np.float32)
      want = golden[f'{key}_{column}'][::-1]
      np.testing.assert_allclose(got, want, rtol=6e-8)
    a, prev, sigma = (
      golden[f'{key}_{column}'][::-1]
      for column in ('alphas', 'alphas_prev', 'sigmas')
    )
    direction = 1 - prev - sigma**2
    c = np.sqrt(direction) - np.sqrt(prev * (1 - a) / a)
    np.testing.assert_allclose(rows.one_minus_alpha_bar, 1 - a, rtol=6e-8)
    np.testing.assert_allclose(rows.direction_variance, direction, rtol=6e-8)
    np.testing.assert_allclose(rows.eps_coefficient, c, rtol=6e-8)

  def test_quirks_of_the_number_of_steps(self):
    self.assertLen(ddim.ddim_timesteps(30, 1000), 31)
    self.assertLen(ddim.ddim_timesteps(20, 1000), 20)
    np.testing.assert_array_equal(ddim.ddim_timesteps(1, 1000), [1])
    rows = ddim.ddim_rows(schedule.linear_schedule(1000, *_BETAS), 20, 0.0)
    self.assertEqual(rows.t[0], 951)
    self.assertEqual(rows.alpha_bar_prev[-1], np.float32(1 - _BETAS[0]))

  def test_refuses_exactly_what_runs_out_of_range(self):
    for steps in range(1, 1001):
      want = [t + 1 for t in range(0, 1000, 1000 // steps)]
      if want[-1] < 1000:
        self.assertEqual(ddim.ddim_timesteps(steps, 1000).tolist(), want)
      else:
        with self.assertRaisesRegex(ValueError, f'{steps} .* last one is 999'):
          ddim.ddim_timesteps(steps, 1000)

  @parameterized.parameters(0, -1, 1001)
  def test_refuses_steps(self, steps):
    with self.assertRaisesRegex(ValueError, f'{steps} sampling steps'):
      ddim.ddim_timesteps(steps, 1000)

  @parameterized.parameters(-0.1, 2.0, float('nan'))
  def test_refuses_eta(self, eta):
    with self.assertRaisesRegex(ValueError, f'eta is {eta}'):
      ddim.ddim_rows(schedule.linear_schedule(1000, *_BETAS), 20, eta)


class StepTest(parameterized.TestCase):
  @parameterized.product(
    eta=(0.0, 1.0), v=(0.0, 0.3, 50.0), index=(0, 11, 19), jit=(False, True)
  )
  def test_equals_scalar_reference(self, eta, v, index, jit):
    abar = schedule.linear_schedule(1000, *_BETAS)
    rows = ddim.ddim_rows(abar, 20, eta)
    row = ddim.Rows(*(column[index] for column in rows))
    t = int(row.t)
    a, prev = abar[t], abar[max(t - 50, 0)]
    sigma = eta * math.sqrt((1 - prev) / (1 - a) * (1 - a / prev))
    rng = np.random.default_rng(0)
    x, eps, z = rng.normal(size=(3, 2, 3, 2, 4)).astype(np.float32)
    want = np.vectorize(_scalar_step)(
      *map(np.float64, (x, eps)), a, prev, sigma, np.float64(z), v
    )
    step = jax.jit(ddim.ddim_step) if jit else ddim.ddim_step
    got = step(x, eps, row, z, jnp.full((1, 1, 4), v, jnp.float32))
    # A few float32 roundings of terms up to 10.
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6)
    if not v:
      plain = ddim.ddim_step(x, eps, row, z)
      np.testing.assert_allclose(got, plain, rtol=1e-6, atol=1e-6)
    if not eta:
      without = ddim.ddim_step(x, eps, row)
      np.testing.assert_allclose(got, without, rtol=1e-6, atol=1e-6)

  def test_python_zero_absorbs_without_operations(self):
    abar = schedule.linear_schedule(1000, *_BETAS)
    row = ddim.Rows(*(c[3] for c in ddim.ddim_rows(abar, 20, 1.0)))
    x = jnp.ones((1, 2, 2, 1))
    full = jax.make_jaxpr(ddim.ddim_step)(x, x, row, x, jnp.float32(0))
    for zero in (0, 0.0):
      plain = jax.make_jaxpr(
        lambda x, row, zero=zero: ddim.ddim_step(x, x, row, x, zero)
      )(x, row)
      self.assertLess(len(plain.eqns), len(full.eqns))
      self.assertNotIn('max', str(plain))
      self.assertNotIn('min', str(plain))


class GuidanceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.calls = []
    rng = np.random.default_rng(1)
    self.x = jnp.asarray(rng.normal(size=(3, 2, 2, 1)), jnp.float32)
    self.t = jnp.full((3,), 51, jnp.int32)
    self.context = {'c': jnp.asarray(rng.normal(size=(3, 1)), jnp.float32)}

  def network(self, x, t, context, table):
    self.calls.append(x.shape[0])
    self.assertEqual(t.shape, x.shape[:1])
    c = 0.0 if context is None else context['c'][..., None, None]
    return jnp.tanh(x + c) * t[:, None, None, None] + (table or 0.0)

  @parameterized.parameters(0.0, 1.5, 3.0)
  def test_one_doubled_batch(self, scale):
    null = {'c': jnp.full((1, 1), 0.25)}
    fn = ddim.classifier_free(self.network, scale, self.context, null)
    got = fn(self.x, self.t, 2.0)
    self.assertEqual(self.calls, [6])
    u = np.tanh(self.x + 0.25) * 51 + 2
    c = np.tanh(self.x + self.context['c'][..., None, None]) * 51 + 2
    np.testing.assert_allclose(got, u + scale * (c - u), rtol=1e-5)

  def test_null_context_per_image(self):
    null = {'c': self.context['c'] * 0 + 0.25}
    one = {'c': jnp.full((1, 1), 0.25)}
    a, b = (
      ddim.classifier_free(self.network, 2.0, self.context, n)(self.x, self.t)
      for n in (null, one)
    )
    np.testing.assert_array_equal(a, b)

  def test_does_not_double_without_need(self):
    null = {'c': jnp.zeros((1, 1))}
    plain = ddim.classifier_free(self.network, 1.0, self.context, null)
    want = self.network(self.x, self.t, self.context, None)
    np.testing.assert_array_equal(plain(self.x, self.t), want)
    free = ddim.classifier_free(self.network, 3.0)
    want = self.network(self.x, self.t, None, None)
    np.testing.assert_array_equal(free(self.x, self.t), want)
    self.assertEqual(set(self.calls), {3})

  def test_needs_a_null_context(self):
    with self.assertRaisesRegex(ValueError, 'null_context'):
      ddim.classifier_free(self.network, 3.0, self.context)


if __name__ == '__main__':
  absltest.main()
