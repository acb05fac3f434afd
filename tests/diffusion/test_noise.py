"""Random numbers belong to the image, the use and the step."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

from d2dpm_jax.diffusion import noise

_SHAPE = (3, 2, 4)


class NoiseTest(parameterized.TestCase):
  @parameterized.parameters(*noise.Stream)
  def test_image_does_not_depend_on_its_batch(self, stream):
    key = noise.seed_key(3)
    full = noise.noise_for(key, jnp.arange(8), 5, _SHAPE, stream)
    for batch in ([6], [2, 6], [7, 6, 5, 4, 3]):
      part = noise.noise_for(key, batch, 5, _SHAPE, stream)
      np.testing.assert_array_equal(part[batch.index(6)], full[6])

  def test_formula(self):
    key = jax.random.key(3, impl='threefry2x32')
    for stream, number in (('INITIAL', 0), ('SAMPLER', 1), ('ERROR', 2)):
      folded = key
      for data in (1_000_003, number, 17):
        folded = jax.random.fold_in(folded, data)
      want = jax.random.normal(folded, _SHAPE, jnp.float32)
      got = noise.noise_for(
        noise.seed_key(3), [1_000_003], 17, _SHAPE, noise.Stream[stream]
      )
      np.testing.assert_array_equal(got[0], want)

  def test_seeds_images_streams_and_steps_differ(self):
    draws = [
      noise.noise_for(noise.seed_key(seed), [0, 1, 2**31 - 1], step, (4,), s)
      for seed in (0, 1)
      for step in (0, 1, 2)
      for s in noise.Stream
    ]
    numbers = np.concatenate(draws).ravel()
    self.assertLen(np.unique(numbers), numbers.size)

  def test_is_standard_normal_across_images(self):
    x = noise.initial_noise(noise.seed_key(0), jnp.arange(4000), (5, 1, 1))
    self.assertEqual(x.dtype, jnp.float32)
    flat = np.asarray(x).reshape(4000, 5)
    # Five standard errors of 20 000 numbers, and of a correlation of 4000.
    self.assertLess(abs(flat.mean()), 5 / np.sqrt(20_000))
    self.assertLess(abs(flat.var() - 1), 5 * np.sqrt(2 / 20_000))
    correlation = np.corrcoef(flat.T) - np.eye(5)
    self.assertLess(np.abs(correlation).max(), 5 / np.sqrt(4000))
    self.assertLess(abs(np.mean(flat[1:] * flat[:-1])), 5 / np.sqrt(20_000))

  def test_same_when_jitted_and_sharded(self):
    key = noise.seed_key(0)
    want = noise.noise_stream(key, jnp.arange(8), _SHAPE)(jnp.int32(2))
    mesh = jax.make_mesh((8,), ('data',))
    index = jax.device_put(
      jnp.arange(8), NamedSharding(mesh, PartitionSpec('data'))
    )
    got = jax.jit(lambda i, step: noise.noise_stream(key, i, _SHAPE)(step))(
      index, 2
    )
    # Bits are equal; the float function behind `normal` may be fused otherwise.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)

  def test_does_not_follow_the_default_generator(self):
    want = noise.initial_noise(noise.seed_key(0), [0], _SHAPE)
    with jax.default_prng_impl('rbg'):
      got = noise.initial_noise(noise.seed_key(0), [0], _SHAPE)
    np.testing.assert_array_equal(got, want)


if __name__ == '__main__':
  absltest.main()
