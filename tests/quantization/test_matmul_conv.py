"""Convolutions as matrix products equal those of the compiler."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from d2dpm_jax.quantization import matmul_conv


class MatmulConvTest(parameterized.TestCase):
  @parameterized.parameters(
    (3, 1, ((1, 1), (1, 1))),
    (3, 2, ((1, 1), (1, 1))),
    (3, 2, ((0, 1), (0, 1))),
    (1, 1, ((0, 0), (0, 0))),
  )
  def test_equals_conv_and_its_gradients(self, size, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 6, 5)).astype(np.float32)
    module = nn.Conv(7, (size, size), stride, padding)
    params = module.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + 0.1, params)

    def loss(params, x):
      y = module.apply(params, x)
      return jnp.sum(jnp.sin(y)), y

    grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
    want = jax.jit(grad)(params, x)
    with matmul_conv.fast_gradients():
      text = str(jax.make_jaxpr(loss)(params, x))
      got = grad(params, x)
    self.assertNotIn('conv_general_dilated', text)
    # Float32 sums of up to 45 products in another order.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
      got,
      want,
    )

  def test_leaves_other_convolutions_alone(self):
    x = jnp.ones((1, 4, 4, 4))
    module = nn.Conv(4, (3, 3), feature_group_count=2)
    params = module.init(jax.random.key(0), x)
    with matmul_conv.fast_gradients():
      text = str(jax.make_jaxpr(module.apply)(params, x))
    self.assertIn('conv_general_dilated', text)


if __name__ == '__main__':
  absltest.main()
