"""Behaviour of the first stages; their numbers are in test_ldm_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from d2dpm_jax.models import autoencoder

_FIELDS = dict(
  ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, embed_dim=3
)
_VQ = autoencoder.Autoencoder(kind='vq', n_embed=16, resolution=8, **_FIELDS)
_KL = autoencoder.Autoencoder(kind='kl', resolution=8, **_FIELDS)


@pytest.mark.parametrize(
  'want,module',
  [
    # The `first_stage_model` tensors of the published checkpoints.
    (55_322_782, autoencoder.Autoencoder(
      kind='vq', ch=128, ch_mult=(1, 2, 4), num_res_blocks=2, z_channels=3,
      embed_dim=3, n_embed=8192, resolution=256)),
    (83_653_863, autoencoder.Autoencoder(
      kind='kl', ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4,
      embed_dim=4, resolution=256)),
  ],
)  # fmt: skip
def test_parameter_count_of_published_models(want, module):
  images = jnp.zeros([1, 256, 256, 3])
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)
  assert sum(p.size for p in jax.tree.leaves(shapes)) == want


def test_parameter_paths_are_those_of_the_checkpoints():
  images = jnp.zeros([1, 8, 8, 3])
  params = jax.eval_shape(_VQ.init, jax.random.key(0), images)['params']
  assert set(params) == {
    'encoder', 'decoder', 'quant_conv', 'post_quant_conv', 'quantize',
  }  # fmt: skip
  assert params['quantize']['embedding']['embedding'].shape == (16, 3)
  assert set(params['encoder']) == {
    'conv_in', 'down_0', 'down_1', 'mid', 'norm_out', 'conv_out',
  }  # fmt: skip
  assert set(params['encoder']['down_0']) == {'block_0', 'downsample'}
  assert set(params['decoder']['up_1']) == {'block_0', 'block_1', 'upsample'}
  assert set(params['decoder']['up_0']) == {'block_0', 'block_1'}
  assert set(params['decoder']['mid']) == {'block_1', 'attn_1', 'block_2'}


def test_quantizer_against_plain_search_and_gradients():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(2, 3, 4, 3)).astype(np.float32)
  codes = rng.normal(size=(16, 3)).astype(np.float32)
  quantizer = autoencoder.VectorQuantizer(16, 3)

  def run(z, codes):
    return quantizer.apply({'params': {'embedding': {'embedding': codes}}}, z)

  got = run(z, codes)
  distances = ((z[..., None, :].astype(np.float64) - codes) ** 2).sum(-1)
  np.testing.assert_array_equal(got.indices, distances.argmin(-1))
  found = codes[distances.argmin(-1)]
  np.testing.assert_allclose(got.z_q, found, atol=1e-6)
  np.testing.assert_allclose(
    got.loss, 1.25 * np.mean((found - z) ** 2), rtol=1e-5
  )
  straight = jax.grad(lambda z: run(z, codes).z_q.sum())(z)
  np.testing.assert_array_equal(straight, np.ones_like(z))
  pull_z, pull_codes = jax.grad(lambda *a: run(*a).loss, (0, 1))(z, codes)
  np.testing.assert_allclose(
    pull_z, 0.25 * 2 * (z - found) / z.size, rtol=1e-4, atol=1e-8
  )
  want = np.zeros_like(codes)
  np.add.at(want, distances.argmin(-1), 2 * (found - z) / z.size)
  np.testing.assert_allclose(pull_codes, want, rtol=1e-4, atol=1e-8)


def test_vq_decodes_the_nearest_code():
  images = jnp.zeros([1, 8, 8, 3])
  params = random_params(_VQ, images)
  codes = params['params']['quantize']['embedding']['embedding']
  z = jnp.broadcast_to(codes[5], (1, 4, 4, 3))
  decode = jax.jit(lambda z: _VQ.apply(params, z, method='decode'))
  gap = np.sort(np.linalg.norm(codes - codes[5], axis=-1))[1]
  np.testing.assert_allclose(decode(z + 0.2 * gap), decode(z), atol=1e-5)
  assert np.abs(decode(z + 20 * gap) - decode(z)).max() > 1e-3


def test_kl_log_variance_is_clipped_and_mode_is_the_mean():
  images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3))
  params = random_params(_KL, images)['params']
  bias = jnp.array([1.0, 2.0, 3.0, -100.0, 0.0, 100.0])
  params['quant_conv']['bias'] = bias

  @jax.jit
  def run(params):
    variables = {'params': params}
    mode = _KL.apply(variables, images, method='encode')
    return mode, _KL.apply(variables, images, method='encode_moments')

  mode, (mean, logvar) = run(params)
  np.testing.assert_array_equal(mode, mean)
  np.testing.assert_array_equal(logvar[..., 0], -30)
  np.testing.assert_array_equal(logvar[..., 2], 20)
  assert np.unique(logvar[..., 1]).size > 1


def test_bfloat16_is_close_and_ends_in_float32():
  images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3))
  params = random_params(_KL, images)
  want = jax.jit(_KL.apply)(params, images)
  got = jax.jit(_KL.clone(dtype=jnp.bfloat16).apply)(params, images)
  assert got.dtype == want.dtype == jnp.float32 and got.shape == images.shape
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
  'module,size,method,message',
  [
    (_VQ, 8, 'encode_moments', 'encode_moments is for'),
    (_KL, 8, 'quantize', 'quantize is for'),
    (_KL, 9, 'encode', 'multiples of 2'),
    (_KL.clone(kind='vae'), 8, 'encode', "'vae'"),
    (_KL.clone(n_embed=4), 8, 'encode', 'n_embed=4'),
    (_VQ.clone(n_embed=None), 8, 'encode', 'n_embed=None'),
  ],
)
def test_what_cannot_be_is_refused(module, size, method, message):
  x = jnp.zeros([1, size, size, 3])
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: module.init(jax.random.key(0), x, method=method))
