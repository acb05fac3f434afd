"""Packed codes: nothing lost, and as small as they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal

from d2dpm_jax.quantization import affine, packing

_SHAPES = [(3, 3, 4, 5), (3, 3, 5, 2), (1, 1, 1, 3), (7, 3), (8, 1), (1, 1)]


@pytest.mark.parametrize('shape', _SHAPES)
@pytest.mark.parametrize('bits', range(2, 9))
def test_packing_loses_nothing(shape, bits):
  rng = np.random.default_rng(bits)
  codes = rng.integers(0, 2**bits, shape, np.uint8)
  codes.reshape(-1)[0] = 2**bits - 1
  data = packing.pack_codes(codes, bits)
  assert isinstance(data, np.ndarray) and data.dtype == np.uint8
  assert data.nbytes == packing.packed_bytes(shape, bits)
  per_byte = 2 if bits <= 4 else 1
  assert data.size == codes.size // shape[-2] * -(-shape[-2] // per_byte)
  pack = jax.jit(packing.pack_codes, static_argnums=1)
  np.testing.assert_array_equal(pack(codes, bits), data)
  unpack = jax.jit(packing.unpack_codes, static_argnums=(1, 2))
  for found in (
    packing.unpack_codes(data, bits, shape[-2]),
    unpack(data, bits, shape[-2]),
  ):
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, codes)


def test_layout():
  """Low halves are the first input channels, high halves the others."""
  codes = np.array([[1], [2], [3], [4], [5]], np.uint8)
  data = packing.pack_codes(codes, 3)
  np.testing.assert_array_equal(data, [[0x41], [0x52], [0x03]])


def test_a_kernel_packs_with_its_grid():
  kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 4))
  weight = affine.nearest_weight(jnp.float32(kernel), 4)
  packed = packing.pack(weight)
  assert packed.shape == kernel.shape and packed.data.shape == (3, 3, 2, 4)
  assert packing.pack(packed) is packed
  assert_trees_equal(packing.unpack(packed), weight)
  assert packing.unpack(weight) is weight
  np.testing.assert_array_equal(packed.codes, weight.codes)


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='int32.*expected uint8'):
    packing.pack_codes(np.zeros((2, 2), np.int32), 4)
  with pytest.raises(ValueError, match='expected uint8'):
    packing.pack_codes(np.zeros(2, np.uint8), 4)
  with pytest.raises(ValueError, match='9 bits'):
    packing.pack_codes(np.zeros((2, 2), np.uint8), 9)
  with pytest.raises(ValueError, match='do not hold 5 input channels of 4'):
    packing.unpack_codes(np.zeros((2, 2), np.uint8), 4, 5)
