"""Packed weights: two codes of up to 4 bits in a byte, wider ones in one each.

Pairs are of input channels: byte i of [.., I, O] holds channel i in its low
half and channel i + ceil(I / 2) in its high half. So output channels stay side
by side, and unpacking is two bit operations and a concatenation. An odd number
of channels leaves the high halves of the last bytes empty.
"""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.quantization import affine

Array = jax.Array

HALF = 4  # Bits of half a byte.


@flax.struct.dataclass
class PackedWeight:
  """Quantized kernel as it is stored; `affine.QWeight` with packed codes.

  Attributes:
    data: uint8[.., ceil(I / 2), O] for up to 4 bits, else uint8[.., I, O].
    scale: float[] or float[1, .., 1, O].
    zero_point: like `scale`.
    bits: 2..8.
    inputs: I.
  """

  data: Array
  scale: Array
  zero_point: Array
  bits: int = flax.struct.field(pytree_node=False)
  inputs: int = flax.struct.field(pytree_node=False)

  @property
  def codes(self) -> Array:
    """uint8[.., I, O], values 0 .. 2**bits - 1."""
    return unpack_codes(self.data, self.bits, self.inputs)

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the kernel."""
    *outer, _, outputs = self.data.shape
    return (*outer, self.inputs, outputs)


Weight = affine.QWeight | PackedWeight


def _rows(inputs: int, bits: int) -> int:
  """Bytes along the axis of the input channels."""
  return -(-inputs // 2) if bits <= HALF else inputs


def packed_bytes(shape: tuple[int, ...], bits: int) -> int:
  """Bytes that the codes of a kernel [.., I, O] take, grids not counted."""
  *outer, inputs, outputs = shape
  return math.prod(outer) * _rows(inputs, affine.check_bits(bits)) * outputs


def pack_codes(codes: Array, bits: int) -> Array:
  """Packs codes.

  Args:
    codes: uint8[.., I, O], values 0 .. 2**bits - 1; of NumPy or JAX.
    bits: 2..8.

  Returns:
    uint8[.., ceil(I / 2), O] for up to 4 bits, else `codes`.

  Raises:
    ValueError: the codes have another dtype or fewer than two axes, or `bits`
      is out of range.
  """
  affine.check_bits(bits)
  if codes.dtype != jnp.uint8 or codes.ndim < 2:
    raise ValueError(
      f'Codes {codes.dtype}{list(codes.shape)}: expected uint8[.., I, O].'
    )
  if bits > HALF:
    return codes
  numpy = np if isinstance(codes, np.ndarray) else jnp
  rows = _rows(codes.shape[-2], bits)
  low, high = codes[..., :rows, :], codes[..., rows:, :]
  missing = rows - high.shape[-2]
  high = numpy.pad(high, [*[(0, 0)] * (codes.ndim - 2), (0, missing), (0, 0)])
  return low | (high << HALF)


def unpack_codes(data: Array, bits: int, inputs: int) -> Array:
  """Inverse of `pack_codes`.

  Args:
    data: of `pack_codes`, of NumPy or JAX.
    bits: 2..8.
    inputs: I.

  Returns:
    uint8[.., I, O].

  Raises:
    ValueError: `data` holds another number of input channels.
  """
  if data.ndim < 2 or data.shape[-2] != _rows(inputs, bits):
    raise ValueError(
      f'Packed codes of shape {data.shape} do not hold {inputs} input channels '
      f'of {bits} bits.'
    )
  if bits > HALF:
    return data
  numpy = np if isinstance(data, np.ndarray) else jnp
  both = numpy.concatenate([data & (2**HALF - 1), data >> HALF], axis=-2)
  return both[..., :inputs, :]


def pack(weight: Weight) -> PackedWeight:
  """Packs a kernel; one that is packed stays as it is."""
  if isinstance(weight, PackedWeight):
    return weight
  return PackedWeight(
    pack_codes(weight.codes, weight.bits),
    weight.scale,
    weight.zero_point,
    weight.bits,
    weight.codes.shape[-2],
  )


def unpack(weight: Weight) -> affine.QWeight:
  """Inverse of `pack`."""
  if isinstance(weight, affine.QWeight):
    return weight
  return affine.QWeight(
    weight.codes, weight.scale, weight.zero_point, weight.bits
  )
