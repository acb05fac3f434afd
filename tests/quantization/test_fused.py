"""Blocks by fused kernels, interpreted, against the same layers by XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2dpm_jax.models.attention import SpatialTransformer
from d2dpm_jax.models.unet import ResBlock, Upsample
from d2dpm_jax.quantization import (
  affine,
  fused,
  integer,
  integer_model,
  transform,
)
from d2dpm_jax.quantization.kernels import norm, products

_BFLOAT16 = jnp.bfloat16
_KERNELS = {
  'linear': products,
  'gated': products,
  'conv': products,
  'norm_silu_quantize': norm,
  'layer_norm_quantize': norm,
}

interpreted = pytest.mark.skipif(
  not hasattr(plgpu, 'InterpretGPUParams'),
  reason='JAX 0.10 does not interpret what Hopper kernels do; it lowers them.',
)


def _layers(model, variables, bits, *args):
  """Grids that hold all inputs of every layer."""
  state = {}
  ranges = {}

  def look(path, x):
    ranges[path] = (jnp.min(x), jnp.max(x))
    return x

  kinds = transform.list_layers(model.apply, variables, *args)
  with transform.intercept_inputs(look, [x.path for x in kinds]):
    model.apply(variables, *args)
  for layer in kinds:
    kernel = transform.get_kernel(variables['params'], layer.path)
    low, high = (float(x) for x in ranges[layer.path])
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32((high - low) / 255)
    state[layer.path] = transform.LayerState(
      weight=affine.nearest_weight(kernel, bits),
      act=affine.QParams(step, np.float32(np.round(-low / step)), 8),
    )
  return state


def _variables(model, *args):
  """Random parameters, none of them zero or one."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *args)

  def draw(path, like):
    name = path[-1].key
    scale = {'kernel': like.size // like.shape[-1], 'scale': 25}.get(name, 4)
    x = rng.standard_normal(like.shape) / np.sqrt(scale)
    return jnp.asarray(x + (name == 'scale'), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _models(dtype):
  rng = np.random.default_rng(1)
  image = jnp.asarray(rng.standard_normal((16, 8, 8, 64)), dtype)
  emb = jnp.asarray(rng.standard_normal((16, 32)), dtype)
  return {
    # Two convolutions, and a layer for the embedding that fits no tile.
    'ResBlock': (ResBlock(128, dtype=dtype), image, emb),
    'SpatialTransformer': (SpatialTransformer(2, dtype=dtype), image),
    'Upsample': (Upsample(dtype=dtype), image[:, :4, :4]),
  }


_CALLS = {
  'ResBlock': {'conv': 2, 'norm_silu_quantize': 2, 'linear': 1},
  # Cross-attention to itself is not written as one step.
  'SpatialTransformer': {
    'linear': 11,
    'gated': 1,
    'norm_silu_quantize': 1,
    'layer_norm_quantize': 2,
  },
  'Upsample': {'conv': 1},
}


@interpreted
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('name', ['ResBlock', 'SpatialTransformer', 'Upsample'])
def test_blocks_are_those_of_xla(name, bits, monkeypatch):
  full, *args = _models(jnp.float32)[name]
  variables = _variables(full, *args)
  want = full.apply(variables, *args)
  state = _layers(full, variables, bits, *args)
  model, *args = _models(_BFLOAT16)[name]
  calls = dict.fromkeys(_KERNELS, 0)

  def count(kernel, call):
    def counted(*args, **kwargs):
      calls[kernel] += 1
      return call(*args, **kwargs)

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


def test_layers_that_no_kernel_takes_stay_with_xla():
  rng = np.random.default_rng(2)

  def ready(shape, zero_point=100.0):
    kernel = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    act = affine.QParams(np.float32(0.1), np.float32(zero_point), 8)
    weight = affine.nearest_weight(kernel, 8)
    state = {'': transform.LayerState(weight=weight, act=act)}
    return integer_model.ready(integer.prepare(state, fused=True))['']

  assert isinstance(ready((64, 128)), fused.FusedLayer)
  assert isinstance(ready((3, 3, 64, 3)), fused.FusedLayer)
  assert len(ready((3, 3, 64, 3)).kernel) == products.LEAST_CHANNELS
  assert isinstance(ready((32, 128)), integer.IntegerLayer)
  assert isinstance(ready((5, 5, 64, 64)), integer.IntegerLayer)
  assert isinstance(ready((64, 100)), integer.IntegerLayer)
  # Zero is no code, so that images cannot be padded with it.
  assert isinstance(ready((64, 128), 300.0), integer.IntegerLayer)
  layer = ready((64, 128))
  assert integer_model.plain({'': layer})[''] is layer.plain


def test_float32_networks_do_not_use_them():
  """What is compared with simulated execution stays exact."""
  model = ResBlock(64)
  x, emb = jnp.ones((16, 4, 4, 64)), jnp.ones((16, 8))
  variables = _variables(model, x, emb)
  state = _layers(model, variables, 8, x, emb)
  out = [
    integer_model.apply(model.apply)(
      variables, integer_model.ready(integer.prepare(state, fused=f)), x, emb
    )
    for f in (False, True)
  ]
  np.testing.assert_array_equal(*out)
