"""Structure of the U-Net; its numbers are held in test_ldm_parity.py."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from d2dpm_jax.models import attention, layers, unet

# With test_ldm_parity.py, which has the third family, all kinds of blocks.
SMALL = {
  'imagenet': dict(
    out_channels=3,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_heads=2,
    use_spatial_transformer=True,
    context_dim=16,
  ),
  'lsun_churches': dict(
    out_channels=4,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_heads=4,
    use_scale_shift_norm=True,
    resblock_updown=True,
  ),
}


def _inputs(config, batch=2, size=8):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch, size, size, config['out_channels']))
  t = np.linspace(1, 951, batch).astype(np.int32)
  context = None
  if config.get('context_dim'):
    context = rng.normal(size=(batch, 1, config['context_dim']))
    context = context.astype(np.float32)
  return x.astype(np.float32), t, context


@functools.cache
def _model(family):
  model = unet.UNet(**SMALL[family])
  inputs = _inputs(SMALL[family])
  return model, random_params(model, *inputs)['params'], inputs


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  'want,size,context,config',
  [
    # arXiv:2112.10752, Tables 15, 13: 400 M, 274 M and 295 M.
    (400_920_579, 64, 512, dict(
      out_channels=3, model_channels=192, channel_mult=(1, 2, 3, 5),
      attention_resolutions=(8, 4, 2), num_heads=1, context_dim=512,
      use_spatial_transformer=True)),
    (274_056_163, 64, None, dict(
      out_channels=3, model_channels=224, channel_mult=(1, 2, 3, 4),
      attention_resolutions=(8, 4, 2), num_head_channels=32)),
    (294_966_916, 32, None, dict(
      out_channels=4, model_channels=192, channel_mult=(1, 2, 2, 4, 4),
      attention_resolutions=(1, 2, 4, 8), num_heads=8,
      use_scale_shift_norm=True, resblock_updown=True)),
  ],
)  # fmt: skip
def test_parameter_count_of_published_models(want, size, context, config):
  model = unet.UNet(num_res_blocks=2, **config)
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jnp.zeros([1, size, size, config['out_channels']]),
    jnp.zeros([1], jnp.int32),
    context and jnp.zeros([1, 1, context]),
  )
  assert _count(shapes) == want


def test_parameter_paths_are_those_of_the_checkpoints():
  _, params, _ = _model('imagenet')
  assert {
    'time_embed_0', 'time_embed_2', 'input_blocks_0_0', 'input_blocks_1_0',
    'input_blocks_2_0', 'input_blocks_3_0', 'input_blocks_3_1',
    'middle_block_0', 'middle_block_1', 'middle_block_2', 'output_blocks_0_0',
    'output_blocks_0_1', 'output_blocks_1_0', 'output_blocks_1_1',
    'output_blocks_1_2', 'output_blocks_2_0', 'output_blocks_3_0',
    'out_0', 'out_2',
  } == set(params)  # fmt: skip
  assert set(params['input_blocks_2_0']) == {'op'}
  assert set(params['output_blocks_1_2']) == {'conv'}
  assert set(params['input_blocks_3_0']) == {
    'in_layers_0', 'in_layers_2', 'emb_layers_1', 'out_layers_0',
    'out_layers_3', 'skip_connection',
  }  # fmt: skip
  block = params['input_blocks_3_1']['transformer_blocks_0']
  assert set(block) == {'attn1', 'attn2', 'ff', 'norm1', 'norm2', 'norm3'}
  assert set(block['attn1']) == {'to_q', 'to_k', 'to_v', 'to_out_0'}
  assert set(block['ff']) == {'net_0', 'net_2'}
  assert set(block['ff']['net_0']['proj']) == {'kernel', 'bias'}
  assert set(block['attn1']['to_q']) == {'kernel'}


@functools.cache
def _eps(family):
  model, params, inputs = _model(family)
  apply = jax.jit(model.apply)
  return apply, apply({'params': params}, *inputs)


@pytest.mark.parametrize('family', ['imagenet', 'lsun_churches'])
def test_images_of_a_batch_do_not_mix(family):
  _, params, (x, t, context) = _model(family)
  apply, eps = _eps(family)
  assert eps.shape == x.shape and eps.dtype == jnp.float32
  swapped = None if context is None else context[::-1]
  got = apply({'params': params}, x[::-1], t[::-1], swapped)
  np.testing.assert_allclose(got[::-1], eps, rtol=0, atol=1e-5)
  assert np.abs(eps[0] - eps[1]).max() > 0.1


@pytest.mark.parametrize('family', ['imagenet', 'lsun_churches'])
def test_bfloat16_is_close_and_keeps_float32_outside(family):
  model, params, inputs = _model(family)
  low = model.clone(dtype=jnp.bfloat16)
  _, want = _eps(family)
  got = jax.jit(low.apply)({'params': params}, *inputs)
  assert got.dtype == jnp.float32
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert 1e-4 < error < 0.05  # bfloat16 has 8 bits; 0 would mean it is unused.
  shapes = jax.eval_shape(low.init, jax.random.key(0), *inputs)
  assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


def test_units_applied_alone_equal_units_in_the_network():
  model, params, inputs = _model('imagenet')
  calls = []

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if isinstance(
      context.module, unet.ResBlock | attention.BasicTransformerBlock
    ):
      assert not kwargs
      unit = context.module.clone(parent=None, name=None)
      calls.append((context.module.path, unit, args, out))
    return out

  with nn.intercept_methods(record):
    model.apply({'params': params}, *inputs)
  assert {type(unit).__name__ for _, unit, _, _ in calls} == {
    'ResBlock', 'BasicTransformerBlock',
  }  # fmt: skip
  for path, unit, args, out in calls:
    subtree = functools.reduce(lambda tree, key: tree[key], path, params)
    alone = unit.apply({'params': subtree}, *args)
    np.testing.assert_array_equal(alone, out)
  assert len({unit for _, unit, _, _ in calls}) < len(calls)  # Equal ones are.


@pytest.mark.parametrize(
  'module',
  [
    unet.ResBlock(32),
    unet.ResBlock(32, use_scale_shift_norm=True),
    unet.AttentionBlock(num_heads=2),
    attention.SpatialTransformer(num_heads=2),
  ],
)
def test_residual_branches_start_at_zero(module):
  x = np.random.default_rng(0).normal(size=(1, 2, 2, 32)).astype(np.float32)
  args = (x, x[:, 0, 0]) if isinstance(module, unet.ResBlock) else (x,)
  got, variables = jax.jit(module.init_with_output)(jax.random.key(0), *args)
  np.testing.assert_array_equal(got, x)
  kernels = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    if path[-1].key == 'kernel'
  ]
  assert sum(not np.asarray(k).any() for k in kernels) == 1


@pytest.mark.parametrize('resample,size', [('up', 8), ('down', 2), ('', 4)])
def test_res_block_resamples(resample, size):
  block = unet.ResBlock(32, resample=resample)
  x = np.arange(4 * 4 * 32, dtype=np.float32).reshape(1, 4, 4, 32)
  params = random_params(block, x, x[:, 0, 0])
  params['params']['out_layers_3'] = {
    'kernel': np.zeros((3, 3, 32, 32)),
    'bias': np.zeros(32),
  }
  got = jax.jit(block.apply)(params, x, x[:, 0, 0])
  want = {
    'up': x.repeat(2, 1).repeat(2, 2),
    'down': (x[:, ::2] + x[:, 1::2])[:, :, ::2] / 4
    + (x[:, ::2] + x[:, 1::2])[:, :, 1::2] / 4,
    '': x,
  }[resample]
  assert got.shape == (1, size, size, 32)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_transformer_depth_adds_blocks():
  config = SMALL['imagenet'] | dict(transformer_depth=2)
  model = unet.UNet(**config)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *_inputs(config))
  assert 'transformer_blocks_1' in shapes['params']['middle_block_1']


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(num_heads=-1), 'Exactly one'),
    (dict(num_head_channels=8), 'Exactly one'),
    (dict(context_dim=None), 'context_dim'),
    (dict(use_spatial_transformer=False), 'context_dim'),
    (dict(context_dim=8), 'context of width 16'),
    (dict(num_heads=3), 'do not divide'),
    (dict(channel_mult=(1, 1, 1, 1, 1)), 'multiples of 16'),
  ],
)
def test_impossible_settings_are_refused(change, message):
  config = SMALL['imagenet'] | change
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      unet.UNet(**config).init,
      jax.random.key(0),
      *_inputs(SMALL['imagenet']),
    )


@pytest.mark.parametrize('features', [6, 7])
def test_timestep_embedding_against_scalar_reference(features):
  got = layers.timestep_embedding(jnp.array([0, 1, 999]), features)
  half = features // 2
  for row, t in zip(np.asarray(got), [0, 1, 999], strict=True):
    angles = [t * 10000 ** (-i / half) for i in range(half)]
    want = [*np.cos(angles), *np.sin(angles)] + [0] * (features % 2)
    np.testing.assert_allclose(row, want, atol=1e-4)  # float32 angles to 999.


def test_group_norm_survives_a_large_mean():
  x = np.random.default_rng(0).normal(size=(1, 8, 8, 32)) + 3000
  got, _ = layers.GroupNorm32().init_with_output(
    jax.random.key(0), x.astype(np.float32)
  )
  x = x.astype(np.float32).astype(np.float64)
  want = (x - x.mean((1, 2))) / np.sqrt(x.var((1, 2)) + 1e-5)
  # The mean's own rounding, 3000 * 2^-24; E[x²] − E[x]² would be off by 1.
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize('mean', [0, 30])
@pytest.mark.parametrize('shape', [(2, 6, 5, 64), (3, 7, 96), (2, 1, 1, 32)])
def test_group_norm_in_one_pass_equals_two(shape, mean):
  """Also where E[x²] − E[x]² would have lost its digits, as float64 tells."""
  rng = np.random.default_rng(0)
  x = (rng.normal(mean, 1, shape) + rng.normal(size=shape[-1])).astype('f4')
  scale, bias = rng.normal(size=(2, shape[-1])).astype('f4')
  norm = layers.GroupNorm32()
  got = norm.apply({'params': {'scale': scale, 'bias': bias}}, x)
  groups = np.float64(x).reshape(shape[0], -1, 32, shape[-1] // 32)
  centred = groups - groups.mean((1, 3), keepdims=True)
  variance = np.square(centred).mean((1, 3), keepdims=True)
  want = (centred / np.sqrt(variance + 1e-5)).reshape(shape) * scale + bias
  plain = nn.GroupNorm(32, epsilon=1e-5, use_fast_variance=False)
  other = plain.apply({'params': {'scale': scale, 'bias': bias}}, x)
  size = np.abs(want).max()
  assert np.abs(got - want).max() <= 1e-6 * (1 + mean) * size
  assert np.abs(got - other).max() <= 1e-6 * (1 + mean) * size


def test_group_norm_of_a_sum_that_is_not_made():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 6, 5, 64)).astype('f4')
  offset = rng.normal(size=(2, 1, 1, 64)).astype('f4')
  scale, bias = rng.normal(size=(2, 64)).astype('f4')
  apply = layers.GroupNorm32().apply
  params = {'params': {'scale': scale, 'bias': bias}}
  want = apply(params, x + offset)
  np.testing.assert_allclose(apply(params, x, offset), want, atol=3e-6)
  assert np.abs(want - apply(params, x)).max() > 0.1


def test_group_norm_of_bfloat16_is_rounded_by_who_takes_it():
  x = np.random.default_rng(0).normal(size=(2, 6, 5, 64))
  x = jnp.asarray(x, jnp.bfloat16)
  got, variables = layers.GroupNorm32().init_with_output(jax.random.key(0), x)
  want = layers.GroupNorm32().apply(variables, x.astype(jnp.float32))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_gelu_is_that_of_pytorch():
  x = np.linspace(-8, 8, 1001)
  want = [a * 0.5 * (1 + math.erf(a / math.sqrt(2))) for a in x]
  got = layers.gelu(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(got, want, atol=1e-6)
