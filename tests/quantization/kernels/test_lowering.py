"""Kernels are lowered for an H100, on any machine, at the sizes of cin256."""

import jax
import jax.numpy as jnp
import pytest

from d2dpm_jax.quantization.kernels import norm, products
from d2dpm_jax.quantization.kernels.hopper import Epilogue

_S = jax.ShapeDtypeStruct
_BATCH = 128
_LEVELS = [(64, 192), (32, 384), (16, 576), (8, 960)]


def _lowered(f, *args):
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=('cuda',))
  return lowered.as_text()


def _epilogue(n, residual=None, grid=None):
  numbers = _S((n,), jnp.int32)
  return Epilogue(
    _S((n,), jnp.float32),
    bias=_S((n,), jnp.bfloat16),
    shift=numbers,
    correction=numbers,
    residual=residual,
    grid=grid,
  )


@pytest.mark.parametrize('side, channels', _LEVELS[1:3])
def test_linear_layers(side, channels):
  m = _BATCH * side**2
  assert 'custom_call' in _lowered(
    products.linear,
    _S((m, channels), jnp.int8),
    _S((channels, channels), jnp.int8),
    _epilogue(channels, _S((m, channels), jnp.bfloat16)),
  )


@pytest.mark.parametrize('side, channels', [_LEVELS[1], _LEVELS[-1]])
def test_gated_layers(side, channels):
  m, n = _BATCH * side**2, 8 * channels
  assert 'custom_call' in _lowered(
    products.gated,
    _S((m, channels), jnp.int8),
    _S((n, channels), jnp.int8),
    _epilogue(n, grid=_S((4,), jnp.float32)),
  )


@pytest.mark.parametrize('batch', [16, _BATCH])
@pytest.mark.parametrize('side, channels', [_LEVELS[0], _LEVELS[-1]])
def test_convolutions(batch, side, channels):
  assert 'custom_call' in _lowered(
    products.conv,
    _S((batch, side + 2, side + 2, channels), jnp.int8),
    _S((channels, 9 * channels), jnp.int8),
    _epilogue(channels, _S((batch, side, side, channels), jnp.bfloat16)),
  )


@pytest.mark.parametrize('side, channels', _LEVELS)
def test_norms(side, channels):
  x = _S((_BATCH, side, side, channels), jnp.bfloat16)
  every, each = (_S((*n, channels), jnp.float32) for n in ((), (_BATCH,)))
  assert 'custom_call' in _lowered(
    norm.norm_silu_quantize, x, each, each, _S((4,), jnp.float32)
  )
  assert 'custom_call' in _lowered(norm.group_affine, x, every, every, each)


@pytest.mark.parametrize('side, channels', _LEVELS[1:])
def test_layer_norms(side, channels):
  grid = _S((4,), jnp.float32)
  assert 'custom_call' in _lowered(
    norm.layer_norm_quantize,
    _S((_BATCH * side**2, channels), jnp.bfloat16),
    _S((channels,), jnp.bfloat16),
    _S((channels,), jnp.bfloat16),
    (grid, grid, grid),
  )
