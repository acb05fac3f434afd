"""The name rule and what is said about tensors that do not fit."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from d2dpm_jax.convert import names


@pytest.mark.parametrize(
  'name,want',
  [
    ('input_blocks.1.0.in_layers.2', 'input_blocks_1_0/in_layers_2'),
    (
      'input_blocks.1.1.transformer_blocks.0.attn1.to_out.0',
      'input_blocks_1_1/transformer_blocks_0/attn1/to_out_0',
    ),
    ('time_embed.0', 'time_embed_0'),
    ('decoder.up.0.block.1.conv1', 'decoder/up_0/block_1/conv1'),
    ('decoder.mid.attn_1.proj_out', 'decoder/mid/attn_1/proj_out'),
    ('quantize.embedding', 'quantize/embedding'),
  ],
)
def test_module_path(name, want):
  assert names.module_path(name) == want
  assert names.split(f'{name}.weight') == (want, 'weight')


class _Model(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(5, 4, name='embedding')(tokens)
    x = nn.Dense(6, name='qkv')(x)[:, None]
    x = nn.Conv(2, (3, 1), name='convs_0')(x)
    return nn.LayerNorm(name='norm')(x)


_TARGET = names.target_of(_Model(), jnp.zeros([1, 3], jnp.int32))


def _tensors():
  rng = np.random.default_rng(0)
  shapes = {
    'embedding.weight': (5, 4),
    'qkv.weight': (6, 4, 1),  # Conv1d of kernel 1.
    'qkv.bias': (6,),
    'convs.0.weight': (2, 6, 3, 1),
    'convs.0.bias': (2,),
    'norm.weight': (2,),
    'norm.bias': (2,),
  }
  return {k: rng.normal(size=v) for k, v in shapes.items()}


def test_layers_decide_the_layout():
  assert _TARGET.layers == {
    'embedding': 'embed', 'qkv': 'dense', 'convs_0': 'conv', 'norm': 'norm',
  }  # fmt: skip
  t = _tensors()
  params, problems = names.match(
    {f'model.{k}': v for k, v in t.items()}, _TARGET, prefix='model.'
  )
  assert problems == []
  for got, want in (
    (params['embedding']['embedding'], t['embedding.weight']),
    (params['qkv']['kernel'], t['qkv.weight'][..., 0].T),
    (params['convs_0']['kernel'], t['convs.0.weight'].transpose(2, 3, 1, 0)),
    (params['norm']['scale'], t['norm.weight']),
  ):
    np.testing.assert_array_equal(got, want.astype(np.float32))
    assert got.dtype == np.float32
  linear = t | {'qkv.weight': t['qkv.weight'][..., 0]}  # nn.Linear.
  same, _ = names.match(linear, _TARGET)
  np.testing.assert_array_equal(same['qkv']['kernel'], params['qkv']['kernel'])


def test_every_problem_is_named_at_once():
  t = _tensors()
  t['extra.0.weight'] = np.zeros((1, 2))
  t['qkv.weight_g'] = np.zeros(3)
  t['convs.0.weight'] = np.zeros((2, 6, 1, 3))
  t['embedding.weight'] = np.zeros((5, 4, 1))
  t['convs_0.bias'] = np.zeros(2)
  del t['norm.bias']
  _, problems = names.match(t, _TARGET)
  assert problems == [
    'misshapen: convs.0.weight (2, 6, 1, 3) for convs_0/kernel (3, 1, 6, 2)',
    'misshapen: embedding.weight (5, 4, 1) for embedding/embedding (5, 4)',
    'missing: norm/bias (2,)',
    'repeated: convs_0.bias, convs_0/bias is taken',
    'unexpected: extra.0.weight (1, 2)',
    'unexpected: qkv.weight_g (3,)',
  ]


def test_names_without_the_prefix_are_unexpected():
  _, problems = names.match({'qkv.bias': np.zeros(6)}, _TARGET, prefix='unet.')
  assert 'unexpected: qkv.bias (6,)' in problems
