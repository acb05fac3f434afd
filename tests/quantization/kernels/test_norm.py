"""Norms that quantize against plain JAX, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2dpm_jax.models.layers import GroupNorm32
from d2dpm_jax.quantization import affine
from d2dpm_jax.quantization.kernels import norm


def _floats(rng, shape, dtype=jnp.float32):
  return jnp.asarray(rng.standard_normal(shape), dtype)


@pytest.mark.parametrize('silu', [True, False])
@pytest.mark.parametrize(
  'bits, zero, padding', [(8, 31.0, 1), (8, 200.0, 0), (4, 3.0, 1)]
)
def test_norm_and_quantization_are_those_of_plain_jax(
  silu, bits, zero, padding
):
  rng = np.random.default_rng(3)
  b, side, depth = 2, 6, 32
  x = _floats(rng, (b, side, side, depth), jnp.bfloat16)
  gain, shift = _floats(rng, (b, depth)), _floats(rng, (b, depth))
  step = np.float32(2.0**-5 if bits == 8 else 2.0**-2)  # A product is exact.
  offset = np.clip(zero, 2.0**bits - 128, 128)
  got, sums = norm.norm_silu_quantize(
    x,
    gain,
    shift,
    norm.grid_numbers(1 / step, zero, offset, bits),
    silu=silu,
    padding=padding,
    tiles=norm.Tiles(pixels=16, channels=16),
    interpret=True,
  )
  y = x.astype(jnp.float32) * gain[:, None, None] + shift[:, None, None]
  if silu:
    y = jax.nn.silu(y)
  grid = affine.QParams(step, np.float32(zero), bits)
  codes = affine.quantize(y, grid).codes.astype(jnp.int32)
  ends = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  want = jnp.pad(codes, ends, constant_values=int(zero)) - int(offset)
  assert got.dtype == jnp.int8 and got.shape == want.shape
  np.testing.assert_array_equal(sums, jnp.sum(got, -1, dtype=jnp.int32))
  difference = np.abs(got.astype(jnp.int32) - want)
  # Elsewhere SiLU has another last bit.
  assert difference.max() <= 1 and np.mean(difference != 0) < 1e-3
  if not silu:
    assert difference.max() == 0


@pytest.mark.parametrize('side, pixels', [(4, 16), (5, 8), (26, 64)])
def test_moments_of_groups_are_those_of_the_norm(side, pixels):
  rng = np.random.default_rng(4)
  b, depth, groups = 2, 96, 16
  x = 5 + _floats(rng, (b, side, side + 1, depth), jnp.bfloat16)
  offset = _floats(rng, (b, 1, 1, depth))
  full = GroupNorm32(num_groups=groups)
  params = {'scale': _floats(rng, depth), 'bias': _floats(rng, depth)}
  gain, shift = norm.group_affine(
    x,
    **params,
    offset=offset[:, 0, 0],
    groups=groups,
    tiles=norm.Tiles(pixels=pixels, channels=32),
    interpret=True,
  )
  got = x * gain[:, None, None] + shift[:, None, None]
  want = full.apply({'params': params}, x.astype(jnp.float32), offset)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('sums', [True, False])
def test_layer_norm_and_quantization_are_those_of_plain_jax(sums):
  rng = np.random.default_rng(5)
  depth = 48
  x = 3 + _floats(rng, (16, depth), jnp.bfloat16)
  gain, shift = _floats(rng, depth), _floats(rng, depth)
  y = x.astype(jnp.float32)
  y -= y.mean(1, keepdims=True)
  y *= jax.lax.rsqrt(jnp.mean(y * y, 1, keepdims=True) + 1e-5)
  steps, zeros = (2.0**-5, 2.0**-4), (120.0, 30.0)
  found = norm.layer_norm_quantize(
    x,
    gain,
    shift,
    tuple(
      norm.grid_numbers(1 / step, zero, 128)
      for step, zero in zip(steps, zeros, strict=True)
    ),
    sums=sums,
    interpret=True,
  )
  for (got, total), step, zero in zip(found, steps, zeros, strict=True):
    grid = affine.QParams(np.float32(step), np.float32(zero), 8)
    codes = affine.quantize(y * gain + shift, grid).codes
    difference = np.abs(got.astype(jnp.int32) + 128 - codes.astype(jnp.int32))
    assert difference.max() <= 1 and np.mean(difference != 0) < 5e-3
    if sums:
      np.testing.assert_array_equal(total, jnp.sum(got, 1, dtype=jnp.int32))
    else:
      assert total is None
