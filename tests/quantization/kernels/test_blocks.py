"""Blocks by fused kernels, interpreted, against the same layers by XLA."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_layers import layers_of, random_variables

from d2dpm_jax.models.attention import CrossAttention, SpatialTransformer
from d2dpm_jax.models.layers import LayerNorm32
from d2dpm_jax.models.unet import ResBlock, Upsample
from d2dpm_jax.quantization import integer, integer_model
from d2dpm_jax.quantization.kernels import norm, products

_BFLOAT16 = jnp.bfloat16
_KERNELS = {
  'linear': products,
  'gated': products,
  'conv': products,
  'norm_silu_quantize': norm,
  'group_affine': norm,
  'layer_norm_quantize': norm,
}


class Attention(nn.Module):
  """To itself, with what is the same for all tokens of an image."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, constant: jax.Array) -> jax.Array:
    attend = CrossAttention(2, dtype=self.dtype)
    return attend(x, norm=LayerNorm32(), constant=constant)


def _models(dtype):
  rng = np.random.default_rng(1)
  image = jnp.asarray(rng.standard_normal((16, 8, 8, 64)), dtype)
  emb = jnp.asarray(rng.standard_normal((16, 32)), dtype)
  few = image[:2]
  constant = jnp.asarray(rng.standard_normal((2, 1, 64)), dtype)
  return {
    'Attention': (Attention(dtype), few.reshape(2, 64, 64), constant),
    # Two convolutions, and a layer for the embedding that fits no tile.
    'ResBlock': (ResBlock(128, dtype=dtype), image, emb),
    'SpatialTransformer': (SpatialTransformer(2, dtype=dtype), few),
    'Upsample': (Upsample(dtype=dtype), image[:, :4, :4]),
  }


_CALLS = {
  'Attention': {'linear': 4, 'layer_norm_quantize': 1},
  'ResBlock': {
    'conv': 2,
    'norm_silu_quantize': 2,
    'group_affine': 2,
    'linear': 1,
  },
  # Cross-attention to itself is not written as one step.
  'SpatialTransformer': {
    'linear': 11,
    'gated': 1,
    'norm_silu_quantize': 1,
    'group_affine': 1,
    'layer_norm_quantize': 2,
  },
  'Upsample': {'conv': 1},
}


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('name', list(_CALLS))
def test_blocks_are_those_of_xla(name, bits, monkeypatch):
  full, *args = _models(jnp.float32)[name]
  variables = random_variables(full, *args)
  want = full.apply(variables, *args)
  state = layers_of(full, variables, bits, *args)
  model, *args = _models(_BFLOAT16)[name]
  calls = dict.fromkeys(_KERNELS, 0)

  def count(kernel, call):
    def counted(*args, **kwargs):
      calls[kernel] += 1
      # XLA lets 32 programs begin. Those that wait for a kernel must not be all
      # of them: its interpreter begins some, too.
      return jax.block_until_ready(call(*args, **kwargs))

    return counted

  for kernel, module in _KERNELS.items():
    wrapped = count(kernel, getattr(module, kernel))
    monkeypatch.setattr(module, kernel, wrapped)
  out = {}
  for fuse in (False, True):
    layers = integer_model.ready(integer.prepare(state, fused=fuse))
    apply = integer_model.apply(model.apply)
    out[fuse] = np.asarray(apply(variables, layers, *args), np.float32)
    expected = _CALLS[name] if fuse else {}
    assert calls == dict.fromkeys(_KERNELS, 0) | expected
  assert out[True].shape == want.shape

  def off(x):
    return np.linalg.norm(x - want) / np.linalg.norm(want)

  # Fewer roundings to bfloat16 are no further from full precision.
  assert off(out[True]) < 1.03 * off(out[False]) < 0.3
  apart = np.linalg.norm(out[True] - out[False]) / np.linalg.norm(want)
  assert apart < 0.02
