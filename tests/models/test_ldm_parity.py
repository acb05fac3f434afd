"""Our modules against the original PyTorch ones, whole models at small size.

The arrays were made by tests/golden/make_ldm.py, from PyTorch; weights are
drawn anew from their PyTorch names and go through the converter's rules.
"""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from d2dpm_jax.convert import names

from d2dpm_jax.models import autoencoder, conditioning, unet

_GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
_spec = importlib.util.spec_from_file_location(
  'make_ldm', _GOLDEN / 'make_ldm.py'
)
make_ldm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_ldm)

# Float32 sums in another order, 10 to 60 layers deep: up to 5e-6. An epsilon of
# 1e-6 for 1e-5 in LayerNorm shows as 7e-5, the tanh GELU as 9e-5.
_TOLERANCE = 2e-5

_UNET_FIELDS = dict(
  imagenet=dict(
    channel_mult=(1, 2, 3), num_res_blocks=2, attention_resolutions=(4, 2),
    num_heads=1, use_spatial_transformer=True, context_dim=24),
  lsun_bedrooms=dict(
    channel_mult=(1, 2, 3), num_res_blocks=2, attention_resolutions=(4, 2),
    num_head_channels=32),
  lsun_churches=dict(
    channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(1, 2, 4),
    num_heads=8, use_scale_shift_norm=True, resblock_updown=True),
  transformer=dict(
    channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1,),
    num_head_channels=16, use_spatial_transformer=True, transformer_depth=2,
    context_dim=24, use_scale_shift_norm=True),
)  # fmt: skip

_FIRST_STAGE_FIELDS = dict(
  vq=dict(
    kind='vq', ch_mult=(1, 2, 4), num_res_blocks=2, z_channels=3, embed_dim=3,
    n_embed=64),
  vq_attention=dict(
    kind='vq', ch_mult=(1, 2), num_res_blocks=1, z_channels=4, embed_dim=3,
    n_embed=64, attn_resolutions=(16,), in_channels=1, out_ch=1),
  kl=dict(
    kind='kl', ch_mult=(1, 2, 2, 4), num_res_blocks=1, z_channels=4,
    embed_dim=4, attn_resolutions=(8,)),
)  # fmt: skip


def _assert_close(got, want):
  error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
  assert got.dtype == np.float32 and got.shape == want.shape
  assert error <= _TOLERANCE, f'error {error:.1e} of the largest output'


def _params(module, data, *args):
  """Weights of the original, by the converter's rules; nothing is left over."""
  tensors = {
    name: make_ldm.weight(name, tuple(shape))
    for name, shape in json.loads(str(data['tensors']))
  }
  target = names.target_of(module, *args)
  params, problems = names.match(tensors, target)
  assert not problems
  return {'params': params}


@pytest.mark.parametrize('name', _UNET_FIELDS)
def test_unet(name):
  data = np.load(_GOLDEN / f'ldm_unet_{name}.npz')
  channels = data['x'].shape[-1]
  model = unet.UNet(
    out_channels=channels,
    model_channels=json.loads(str(data['config']))['model_channels'],
    **_UNET_FIELDS[name],
  )
  inputs = data['x'], data['t'], data.get('context')
  params = _params(model, data, *inputs)
  _assert_close(jax.jit(model.apply)(params, *inputs), data['eps'])


@pytest.mark.parametrize('name', _FIRST_STAGE_FIELDS)
def test_first_stage(name):
  data = np.load(_GOLDEN / f'ldm_first_stage_{name}.npz')
  model = autoencoder.Autoencoder(
    ch=32, resolution=32, **_FIRST_STAGE_FIELDS[name]
  )
  params = _params(model, data, data['images'])

  def all_outputs(params, images, latents):
    out = dict(
      latents=model.apply(params, images, method='encode'),
      decoded=model.apply(params, latents, method='decode'),
    )
    if model.kind == 'vq':
      out |= model.apply(params, latents, method='quantize')._asdict()
    else:
      moments = model.apply(params, images, method='encode_moments')
      out |= dict(zip(['mean', 'logvar'], moments, strict=True))
    return out

  out = jax.jit(all_outputs)(params, data['images'], data['latents'])
  assert out.keys() == set(data.files) - {'images', 'config', 'tensors', 'meta'}
  if 'indices' in out:
    assert len(np.unique(data['indices'])) > 10
    np.testing.assert_array_equal(out.pop('indices'), data['indices'])
  for key, value in out.items():
    _assert_close(value, data[key])


def test_class_embedder():
  data = np.load(_GOLDEN / 'ldm_class_embedder.npz')
  model = conditioning.ClassEmbedder(num_classes=11, embed_dim=24)
  params = _params(model, data, data['labels'])
  got = model.apply(params, data['labels'])
  np.testing.assert_array_equal(got, data['context'])
