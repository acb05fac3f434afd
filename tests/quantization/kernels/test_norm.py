"""Norms that quantize against plain JAX, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
  got = norm.norm_silu_quantize(
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
  difference = np.abs(got.astype(jnp.int32) - want)
  # Elsewhere SiLU has another last bit.
  assert difference.max() <= 1 and np.mean(difference != 0) < 1e-3
  if not silu:
    assert difference.max() == 0


def test_layer_norm_and_quantization_are_those_of_plain_jax():
  rng = np.random.default_rng(5)
  depth = 48
  x = 3 + _floats(rng, (16, depth), jnp.bfloat16)
  gain, shift = _floats(rng, depth), _floats(rng, depth)
  step = np.float32(2.0**-5)
  got, sums = norm.layer_norm_quantize(
    x, gain, shift, norm.grid_numbers(1 / step, 120.0, 128), interpret=True
  )
  y = x.astype(jnp.float32)
  y -= y.mean(1, keepdims=True)
  y *= jax.lax.rsqrt(jnp.mean(y * y, 1, keepdims=True) + 1e-5)
  grid = affine.QParams(step, np.float32(120), 8)
  want = affine.quantize(y * gain + shift, grid).codes.astype(jnp.int32) - 128
  difference = np.abs(got.astype(jnp.int32) - want)
  assert difference.max() <= 1 and np.mean(difference != 0) < 5e-3
  np.testing.assert_array_equal(sums, jnp.sum(got, 1, dtype=jnp.int32))
