"""What a quantized network costs: bytes of its layers, bit operations.

Two countings of bit operations (BOPs), both of one forward, a multiplication
and its addition being two operations:

  exact: every multiplication of a layer, times the bits of its weights, times
    the bits of its inputs; 32 for a side in floating point.
  released: that of the released code of the paper (TaylorJocelyn/D2-DPM,
    quant_scripts/brecq_quant_layer.py). Only layers that are quantized count,
    all at the same bits, first and last layers too; a linear layer counts once,
    whatever the number of its tokens; the batch does not count.

Docs: docs/cost.md compares both with the paper.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import traverse_util
from jax.extend import core

from d2dpm_jax.quantization import packing
from d2dpm_jax.quantization.policy import LayerBits, Policy
from d2dpm_jax.quantization.transform import Layer

FLOAT_BITS = 32
# As `transform.state_to_arrays` stores them.
_GRID_BYTES = 4 + 2  # A scale, float32, and a zero point, int16.
_NUMBER_BYTES = 4  # Bits of weights, bits of inputs, input channels.
# Arrays that are called 'weight' in PyTorch; biases and numbers are not.
_WEIGHTS = ('kernel', 'scale', 'embedding')


@dataclasses.dataclass(frozen=True)
class LayerCost:
  """Cost of one layer at some bits.

  Attributes:
    bytes: of its kernel and of its grids; not of its bias.
    bops: exact bit operations.
  """

  bytes: int
  bops: int


def macs(layer: Layer) -> int:
  """Multiplications of a layer: output positions times kernel elements.

  Positions beyond the border of an image, which are zeros, count as others do.
  """
  return math.prod(layer.output_shape[:-1]) * math.prod(layer.kernel_shape)


def released_macs(layer: Layer) -> int:
  """The same by the released code: no batch, and no tokens."""
  positions = 1
  if layer.kind == 'conv':
    positions = math.prod(layer.output_shape[1:-1])
  return positions * math.prod(layer.kernel_shape)


def bops(count: int, w: int | None, a: int | None) -> int:
  """Bit operations of `count` multiplications; None is floating point."""
  return 2 * count * (w or FLOAT_BITS) * (a or FLOAT_BITS)


def layer_cost(
  layer: Layer, bits: LayerBits | None, per_channel: bool
) -> LayerCost:
  """Exact cost of one layer.

  Args:
    layer: see `transform.list_layers`.
    bits: of its weights and its input; None for floating point.
    per_channel: one weight grid per output channel instead of one in all.

  Returns:
    Its cost, codes being packed at their bits.
  """
  w, a = (bits.w, bits.a) if bits is not None else (None, None)
  size = math.prod(layer.kernel_shape) * FLOAT_BITS // 8
  if w is not None:
    grids = layer.kernel_shape[-1] if per_channel else 1
    size = packing.packed_bytes(layer.kernel_shape, w)
    size += grids * _GRID_BYTES + 2 * _NUMBER_BYTES
  if a is not None:
    size += _GRID_BYTES + _NUMBER_BYTES
  return LayerCost(size, bops(macs(layer), w, a))


def released_bops(
  layers: Iterable[Layer], policy: Policy, w: int | None, a: int | None
) -> int:
  """BOPs of the layers that `policy` quantizes, by the released code.

  Args:
    layers: see `transform.list_layers`.
    policy: which layers count; their own bits do not matter.
    w: bits of all weights, None for floating point.
    a: bits of all inputs, None for floating point.
  """
  quantized = [x for x in layers if policy[x.path] is not None]
  return bops(sum(map(released_macs, quantized)), w, a)


def array_bytes(params: Any) -> int:
  """Bytes of all arrays (or `jax.ShapeDtypeStruct`s) of a tree."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def network_bytes(
  params: Mapping[str, Any],
  layers: Iterable[Layer],
  policy: Policy,
  per_channel: bool,
  float_bytes: int = FLOAT_BITS // 8,
) -> int:
  """Bytes of a quantized network: codes, grids, and all that stays float.

  Args:
    params: of the network, arrays or shapes; float32.
    layers: see `transform.list_layers`.
    policy: path -> bits.
    per_channel: see `layer_cost`.
    float_bytes: of each number that stays float, if anything is quantized.
  """
  quantized = [x for x in layers if policy[x.path] is not None]
  if not quantized:
    return array_bytes(params)
  kernels = sum(
    math.prod(x.kernel_shape)
    for x in quantized
    if (bits := policy[x.path]) is not None and bits.w is not None
  )
  kept = array_bytes(params) // 4 - kernels
  total = kept * float_bytes
  for layer in quantized:
    bits = policy[layer.path]
    total += layer_cost(layer, bits, per_channel).bytes
    if bits is not None and bits.w is None:  # Its kernel is counted above.
      total -= 4 * math.prod(layer.kernel_shape)
  return total


def released_bytes(params: Mapping[str, Any], w: int | None) -> int:
  """Bytes of a model by the released code, scripts/calc_size.py.

  Every array that PyTorch calls 'weight' (kernels, scales of norms, embeddings
  and codebooks) has `w` bits, also where it is not quantized; the others stay.
  Grids do not count.

  Args:
    params: of the whole model, arrays or shapes; float32.
    w: bits of all weights, None for floating point.
  """
  total = 0
  for name, x in traverse_util.flatten_dict(params).items():
    bits = (w or FLOAT_BITS) if name[-1] in _WEIGHTS else FLOAT_BITS
    total += math.ceil(x.size * bits / 8)
  return total


def count_macs(fn: Callable[..., Any], *args: Any) -> int:
  """Multiplications of every convolution and matrix product in a function.

  Those of attention are no layer's: they are what this finds more than the sum
  of `macs` over the layers.

  Args:
    fn: traced, not run. The body of a `while` counts once, that of a `scan` as
      often as it runs, and all branches of a `cond` count.
    *args: arrays or `jax.ShapeDtypeStruct`s.
  """
  return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    shapes = [getattr(v.aval, 'shape', ()) for v in eqn.invars]
    out = math.prod(getattr(eqn.outvars[0].aval, 'shape', ()))
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      total += out * math.prod(shapes[0][i] for i in contracted)
    elif eqn.primitive.name == 'conv_general_dilated':
      features = shapes[1][eqn.params['dimension_numbers'].rhs_spec[0]]
      total += out * math.prod(shapes[1]) // features
    else:
      inner = sum(map(_count, _inner(eqn.params)))
      times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
      total += times * inner
  return total


def _inner(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  """Programs within the parameters of an equation."""
  for value in jax.tree.leaves(list(params.values())):
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
