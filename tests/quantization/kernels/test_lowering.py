"""Kernels are lowered for an H100, on any machine, at the sizes of cin256."""

import jax
import jax.numpy as jnp
import pytest

from d2dpm_jax.quantization.kernels import norm

_S = jax.ShapeDtypeStruct
_BATCH = 128
_LEVELS = [(64, 192), (32, 384), (16, 576), (8, 960)]


def _lower(f, *args):
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=('cuda',))
  assert 'custom_call' in lowered.as_text()


def _columns(n):
  return {
    'scale': _S((n,), jnp.float32),
    'bias': _S((n,), jnp.float32),
    'shift': _S((n,), jnp.int32),
  }


def _deepest(channels):
  return 128 if channels % 128 == 0 else 64


@pytest.mark.parametrize('side, channels', _LEVELS[1:3])
@pytest.mark.parametrize('module', [matmul, hopper])
def test_linear_layers(module, side, channels):
  m = _BATCH * side**2
  more = {}
  if module is hopper:
    deep = _deepest(channels)
    stages = 4 if deep == 128 else 7
    more['tiles'] = hopper.Tiles(rows=64, n=192, k=deep, stages=stages)

  def f(a, k, columns, residual):
    return module.matmul_rescale(a, k, **columns, residual=residual, **more)

  _lower(
    f,
    _S((m, channels), jnp.int8),
    _S((channels, channels), jnp.int8),
    _columns(channels),
    _S((m, channels), jnp.bfloat16),
  )


@pytest.mark.parametrize('side, channels', [_LEVELS[1], _LEVELS[-1]])
def test_gated_layers(side, channels):
  m, n = _BATCH * side**2, 8 * channels
  deep = _deepest(channels)
  stages = 4 if deep == 128 else 7
  tiles = hopper.Tiles(rows=64, n=192, k=deep, stages=stages, columns=32)

  def f(a, k, columns, grid):
    return hopper.matmul_geglu_quantize(a, k, grid=grid, **columns, tiles=tiles)

  _lower(
    f,
    _S((m, channels), jnp.int8),
    _S((n, channels), jnp.int8),
    _columns(n),
    _S((4,), jnp.float32),
  )


@pytest.mark.parametrize('side, channels', _LEVELS)
def test_convolutions(side, channels):
  def f(a, k, columns, sums, residual):
    return conv.conv3x3_rescale(
      a, k, **columns, window_sums=sums, residual=residual, moments=True
    )

  pixels = (_BATCH, side, side)
  _lower(
    f,
    _S((_BATCH, side + 2, side + 2, channels), jnp.int8),
    _S((9, channels, channels), jnp.int8),
    _columns(channels),
    _S(pixels, jnp.int32),
    _S((*pixels, channels), jnp.bfloat16),
  )


@pytest.mark.parametrize('side, channels', [_LEVELS[0], _LEVELS[-1]])
def test_convolutions_of_hopper(side, channels):
  tiles = hopper.Tiles(rows=64, n=192, k=64, stages=7)

  def f(a, k, columns, residual):
    return hopper.conv3x3_rescale(
      a, k, **columns, residual=residual, tiles=tiles
    )

  _lower(
    f,
    _S((side + 2, side + 2, _BATCH, channels), jnp.int8),
    _S((channels, 9 * channels), jnp.int8),
    _columns(channels),
    _S((side, side, _BATCH, channels), jnp.bfloat16),
  )


@pytest.mark.parametrize('side, channels', _LEVELS)
def test_norms(side, channels):
  _lower(
    norm.norm_silu_quantize,
    _S((_BATCH, side, side, channels), jnp.bfloat16),
    _S((_BATCH, channels), jnp.float32),
    _S((_BATCH, channels), jnp.float32),
    _S((4,), jnp.float32),
  )


@pytest.mark.parametrize('side, channels', _LEVELS[1:])
def test_layer_norms(side, channels):
  _lower(
    norm.layer_norm_quantize,
    _S((_BATCH * side**2, channels), jnp.bfloat16),
    _S((channels,), jnp.float32),
    _S((channels,), jnp.float32),
    _S((4,), jnp.float32),
  )
