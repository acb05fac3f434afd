"""The three parts together, and building them from a configuration."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from d2dpm_jax.models import latent_diffusion

_CONFIG = dict(
  unet=dict(
    out_channels=3,
    model_channels=32,
    channel_mult=[1, 1],
    num_res_blocks=1,
    attention_resolutions=[2],
    num_heads=1,
    use_spatial_transformer=True,
    context_dim=8,
  ),
  first_stage=dict(
    kind='kl',
    ch=32,
    ch_mult=[1, 1],
    num_res_blocks=1,
    z_channels=3,
    embed_dim=3,
    resolution=8,
  ),
  cond_stage=dict(num_classes=5, embed_dim=8),
  latent_shape=[4, 4, 3],
  schedule=dict(num_timesteps=1000, beta_start=0.0015, beta_end=0.0155),
)


def _config(**changes):
  config = copy.deepcopy(_CONFIG)
  for key, value in changes.items():
    *parts, last = key.split('__')
    node = functools.reduce(lambda tree, k: tree[k], parts, config)
    if value is None and parts:
      del node[last]
    else:
      node[last] = value
  return config


def _unconditional():
  return _config(
    cond_stage=None,
    unet__use_spatial_transformer=False,
    unet__context_dim=None,
  )


def test_from_config_fills_every_field():
  model = latent_diffusion.from_config(_config(dtype='bfloat16'))
  assert model.image_size == 8 and model.latent_shape == (4, 4, 3)
  assert model.num_timesteps == 1000 and model.beta_end == 0.0155
  assert model.unet.channel_mult == (1, 1)
  assert model.unet.dtype == model.first_stage.dtype == jnp.bfloat16
  assert model.null_label == 4
  same = latent_diffusion.from_config(_config(dtype='bfloat16'))
  assert model == same and hash(model) == hash(same)
  assert model != latent_diffusion.from_config(_config())


def test_scale_factor_and_parts():
  model = latent_diffusion.from_config(_config())
  params = random_params(model)
  assert params.keys() == {'unet', 'first_stage', 'cond_stage', 'scale_factor'}
  params['scale_factor'] = jnp.float32(0.5)
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
  labels = np.array([3, 4])
  x, t = rng.normal(size=(2, 4, 4, 3)), np.array([1, 999])

  @jax.jit
  def run(params):
    first_stage = {'params': params['first_stage']}
    raw = model.first_stage.apply(first_stage, images, method='encode')
    context = model.context(params, labels)
    return dict(
      raw=raw,
      latents=model.encode(params, images),
      decoded=model.decode(params, raw * 0.5),
      raw_decoded=model.first_stage.apply(first_stage, raw, method='decode'),
      context=context,
      eps=model.eps(params, x, t, context),
      raw_eps=model.unet.apply({'params': params['unet']}, x, t, context),
    )

  out = run(params)
  np.testing.assert_array_equal(out['latents'], out['raw'] * 0.5)
  np.testing.assert_array_equal(out['decoded'], out['raw_decoded'])
  assert out['decoded'].shape == images.shape
  table = params['cond_stage']['embedding']['embedding']
  np.testing.assert_array_equal(out['context'][:, 0], table[labels])
  assert out['context'].shape == (2, 1, 8)
  np.testing.assert_allclose(out['eps'], out['raw_eps'], atol=1e-5)


def test_shapes_are_those_of_init():
  model = latent_diffusion.from_config(_unconditional())
  want = jax.eval_shape(model.init, jax.random.key(0))
  found = model.shapes()
  found.pop('unet')  # Of no effect on the next answer.
  assert model.shapes() == want


def test_unconditional_model_has_no_labels():
  model = latent_diffusion.from_config(_unconditional())
  shapes = model.shapes()
  assert shapes['cond_stage'] == {}
  eps = jax.eval_shape(
    lambda p: model.eps(p, jnp.zeros([1, 4, 4, 3]), jnp.zeros([1])), shapes
  )
  assert eps.shape == (1, 4, 4, 3)
  with pytest.raises(ValueError, match='unconditional'):
    _ = model.null_label
  with pytest.raises(ValueError, match='unconditional'):
    model.context({'cond_stage': {}}, jnp.zeros([1], jnp.int32))


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      dict(sampler={}, a=1),
      r"model: unknown keys \['a', 'sampler'\], missing keys \[\]",
    ),
    (dict(unet__channels=3), r"unet: unknown keys \['channels'\]"),
    (dict(unet__dtype='x'), r"unet: unknown keys \['dtype'\]"),
    (dict(unet__name='x'), r"unet: unknown keys \['name'\]"),
    (dict(unet__channel_mult=None), r"missing keys \['channel_mult'\]"),
    (dict(first_stage__chs=3), r"first_stage: unknown keys \['chs'\]"),
    (dict(cond_stage__key=3), r"cond_stage: unknown keys \['key'\]"),
    (dict(schedule__steps=3), r"schedule: unknown keys \['steps'\]"),
    (dict(dtype='float16'), "dtype 'float16'"),
    (dict(image_size=16), 'decode to 8 pixels'),
    (dict(latent_shape=[4, 8, 3]), 'decode to 8 pixels'),
    (dict(latent_shape=[4, 4, 4]), 'latents have 4 channels'),
    (dict(cond_stage__embed_dim=16), 'context_dim 8'),
    (dict(cond_stage=None), 'context_dim 8'),
  ],
)
def test_bad_configurations_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    latent_diffusion.from_config(_config(**changes))
