"""AdaRound's formulas, and quantization against PyTorch's numbers."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from d2dpm_jax.quantization import adaround, affine, policy, reconstruction

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden/quant_reference.npz'


def _golden():
  with np.load(_GOLDEN) as file:
    return dict(file.items())


def _kernel(seed=0, shape=(3, 3, 4, 6)):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


class FormulaTest(parameterized.TestCase):
  def test_rectified_sigmoid(self):
    alpha = np.array([-9.0, -2.0, 0.0, 0.7, 2.3, 9.0])
    want = np.clip(1.2 / (1 + np.exp(-alpha)) - 0.1, 0, 1)
    np.testing.assert_allclose(
      adaround.rectified_sigmoid(jnp.asarray(alpha)), want, atol=1e-6
    )
    self.assertEqual(want[0], 0)
    self.assertEqual(want[-1], 1)

  @parameterized.parameters(True, False)
  def test_begins_at_the_kernel_and_hardens_to_the_nearest(self, per_channel):
    kernel = _kernel()
    q = affine.range_max(1.3 * kernel, 4, per_channel)  # Nothing is clipped.
    alpha = adaround.init_alpha(kernel, q)
    soft = adaround.soft_kernel(kernel, alpha, q)
    np.testing.assert_allclose(soft, kernel, atol=2e-6)
    np.testing.assert_array_equal(
      adaround.hard_weight(kernel, alpha, q).codes,
      affine.quantize(kernel, q).codes,
    )

  def test_hard_kernel_is_the_soft_one_at_the_extremes(self):
    kernel = _kernel(1)
    q = affine.range_mse(kernel, 3)
    up = jnp.asarray(np.random.default_rng(2).choice([-20, 20], kernel.shape))
    weight = adaround.hard_weight(kernel, up, q)
    soft = adaround.soft_kernel(kernel, up.astype(jnp.float32), q)
    np.testing.assert_allclose(affine.dequantize(weight), soft, atol=1e-6)
    low = np.floor(kernel / q.scale) + np.asarray(q.zero_point)
    want = np.clip(low + (np.asarray(up) > 0), 0, 7)
    np.testing.assert_array_equal(weight.codes, want)

  def test_regularizer(self):
    alphas = [_kernel(3), _kernel(4, (5, 2))]
    want = 0.0
    for alpha in alphas:
      h = np.clip(1.2 / (1 + np.exp(-np.float64(alpha))) - 0.1, 0, 1)
      want += np.sum(1 - np.abs(2 * h - 1) ** 3.5)
    np.testing.assert_allclose(
      adaround.regularizer(alphas, 3.5), want, rtol=1e-5
    )
    grad = jax.grad(lambda a: adaround.regularizer([a], 2.0))(jnp.zeros(3))
    np.testing.assert_array_equal(grad, np.zeros(3))  # Finite at h = 1/2.

  def test_schedule(self):
    settings = adaround.Settings()
    got = [
      adaround.beta_schedule(c, 1000, settings) for c in (1, 199, 200, 600)
    ]
    np.testing.assert_allclose([b for b, _ in got], [20, 20, 20, 11], rtol=1e-6)
    np.testing.assert_allclose([w for _, w in got], [0, 0, 0.01, 0.01])
    beta, _ = adaround.beta_schedule(1000, 1000, settings)
    np.testing.assert_allclose(beta, 2, rtol=1e-6)

  def test_loss_sums_over_channels_and_averages_over_the_rest(self):
    a, b = _kernel(5, (2, 3, 3, 4)), _kernel(6, (2, 3, 3, 4))
    w = np.abs(_kernel(7, (2, 3, 3, 4)))
    for p in (2.0, 2.4):
      error = np.abs(np.float64(a) - np.float64(b)) ** p
      np.testing.assert_allclose(
        adaround.lp_loss(a, b, p), error.sum((1, 2, 3)) / 9, rtol=1e-5
      )
      np.testing.assert_allclose(
        adaround.lp_loss(a, b, p, w), (w * error).sum((1, 2, 3)) / 9, rtol=1e-5
      )

  @parameterized.parameters(
    (dict(iters=-1), 'iters=-1'),
    (dict(batch_size=0), 'batch_size=0'),
    (dict(drop_prob=1.0), 'drop_prob=1.0'),
    (dict(devices=0), 'devices=0'),
    (dict(loss='kl'), "loss='kl'"),
    (dict(weight_range='l1'), "'l1'"),
    (dict(gamma=0.1), 'gamma=0.1'),
  )
  def test_bad_settings_are_errors(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      adaround.Settings(**fields)


class PyTorchTest(parameterized.TestCase):
  """Against tests/golden/make_quant.py, which shares no code with this."""

  def test_ranges(self):
    golden = _golden()
    for bits in (2, 4, 8):
      q = affine.range_mse(golden['range_x'], bits)
      np.testing.assert_allclose(
        [q.scale, q.zero_point], golden[f'range_{bits}'], rtol=1e-6
      )
    q = affine.range_mse(golden['range_kernel'], 4, per_channel=True)
    np.testing.assert_allclose(
      [q.scale.ravel(), q.zero_point.ravel()],
      golden['range_kernel_4'],
      rtol=1e-6,
    )

  def test_gradients(self):
    golden = _golden()
    x = jnp.asarray(golden['grad_x'])
    weights = jnp.sin(jnp.arange(57.0))

    def value(x, scale):
      y = affine.fake_quant(x, affine.QParams(scale, jnp.float32(6), 4))
      return jnp.sum(y * weights), y

    grads, y = jax.grad(value, (0, 1), has_aux=True)(x, jnp.float32(0.25))
    np.testing.assert_array_equal(y, golden['grad_y'])
    np.testing.assert_allclose(grads[0], golden['grad_dx'], atol=1e-6)
    np.testing.assert_allclose(grads[1], golden['grad_dscale'], rtol=1e-5)

  @parameterized.product(layer=('conv', 'dense'), grain=('tensor', 'channel'))
  def test_learned_rounding(self, layer, grain):
    golden = _golden()
    kernel = golden[f'{layer}_kernel']
    features = kernel.shape[-1]
    module = nn.Dense(features, use_bias=False)
    if layer == 'conv':
      module = nn.Conv(features, (3, 3), padding=1, use_bias=False)
    _, reports, _ = reconstruction.reconstruct(
      module.apply,
      {'params': {'kernel': jnp.asarray(kernel)}},
      {'': policy.LayerBits(3, None)},
      [golden[f'{layer}_x']],
      key=jax.random.key(0),
      settings=adaround.Settings(
        per_channel=grain == 'channel',
        iters=int(golden['iters']),
        batch_size=int(golden['batch_size']),
        devices=1,
      ),
    )
    before, after = golden[f'{layer}_loss_{grain}']
    np.testing.assert_allclose(reports[0].loss_before, before, rtol=1e-4)
    self.assertLess(reports[0].loss_after, 1.05 * after)
    self.assertLess(reports[0].loss_after, 0.7 * before)
    self.assertGreater(reports[0].flipped, 0.02)


if __name__ == '__main__':
  absltest.main()
