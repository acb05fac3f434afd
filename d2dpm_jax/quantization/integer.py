"""Layers of a quantized network on integers: int8 x int8, one rescale.

`integer_model.apply` runs a model on such layers. This is what
`transform.quantize(model.apply)` computes, but for the order of roundings. With
`x = sx (q - zx)` and `w = sw (c - zw)`, codes q and c, int8 operands
`a = q - ox` and `k = c - ow`, `A = ox - zx` and `B = ow - zw`:

  sum x w = sx sw (sum a k  +  B sum a  +  A sum (c - zw)),

every sum going over the positions of the kernel that lie on the image, because
padding is zeros, and they come after quantization. Where the
zero of the input is one of its codes, images are padded with that code; then
all positions count everywhere, and

  sum a k         is one convolution of int8;
  sum a           is a box sum of channel sums; left out where B is 0;
  sum (c - zw)    is a number per output channel; left out where A is 0.

Where it is not, a and k are padded with plain zeros, and the last sum depends
on the position at the border: the few distinct cases of top, middle, bottom,
left, right are added up in the program, [H, W, O] without a batch.

Offsets are as near to the zero points as int8 operands allow: o = clip(z,
2**b - 128, 128). With 8 bits o is 128. With fewer it is nearly always the zero
point itself, and then A or B is 0.

All of this is exact in int32 while sums are below 2**31, which `prepare` sees
to. XLA has no int32 result for convolutions of int8 on GPUs: they accumulate
in int32 there, and hand the sum over as float32, exact below 2**24 and rounded
to 24 bits above, as any float32 is. With 8 bits sums of 1024 products can reach
that, but products have both signs.

Docs: docs/integer.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.quantization import affine, packing, transform

Array = jax.Array

_INT32 = 2**31
_INT8 = 128


@flax.struct.dataclass
class IntegerLayer:
  """A layer ready to run on integers. Its bias stays with the variables.

  Attributes:
    kernel: int8 with the shape of the kernel, k; of up to 4 bits uint8, packed
      codes c, see `packing.pack_codes`; or the whole numbers c - zw in floating
      point, which the layer then multiplies in.
    offset: int16[] or int16[O], ow, if `kernel` is packed, else None.
    shift: int16[] or int16[O], B; None if it is 0.
    act: grid of the input, per tensor.
    scale: float32[O], sx sw.
    correction: int32[KH, KW, O] or int32[O], A sum (c - zw) over the input
      channels and, if `zero_code`, the positions; None if A is 0, or if it is
      to be computed where it is needed, see `ready`.
    corrected: whether A is not 0.
    zero_code: whether the zero of the input is one of its codes.
    bits: of the weights.
    inputs: I.
    in_bfloat16: see `prepare`.
    unpack_first: see `prepare`.
    fused: see `prepare`.
    outputs_first: whether the last axis of `kernel` is its first, as kernels of
      `fused` want it.
  """

  kernel: Array
  offset: Array | None
  shift: Array | None
  act: affine.QParams
  scale: Array
  correction: Array | None
  corrected: bool = flax.struct.field(pytree_node=False)
  zero_code: bool = flax.struct.field(pytree_node=False)
  bits: int = flax.struct.field(pytree_node=False)
  inputs: int = flax.struct.field(pytree_node=False)
  in_bfloat16: bool = flax.struct.field(pytree_node=False, default=False)
  unpack_first: bool = flax.struct.field(pytree_node=False, default=False)
  fused: bool = flax.struct.field(pytree_node=False, default=False)
  outputs_first: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def floats(self) -> bool:
    """Whether `kernel` is in floating point."""
    return jnp.issubdtype(self.kernel.dtype, jnp.floating)


# Path -> layer; quantizers as in `transform` for layers that do not run on
# integers. A pytree.
IntegerState = dict[str, IntegerLayer | transform.LayerState]


def prepare(
  state: transform.QuantState,
  in_bfloat16: Collection[str] = (),
  unpack_first: bool = False,
  fused: bool = False,
) -> IntegerState:
  """Layers ready to run on integers, computed on the host.

  Args:
    state: quantizers; concrete arrays.
    in_bfloat16: paths of layers to be run by kernels for bfloat16, where those
      are faster. Whole numbers up to 256 are exact in it, and with zero points
      among the codes `q - zx` and `c - zw` are such: the same sums, added up
      in float32, without corrections. Other layers stay with int8.
    unpack_first: unpack codes of up to 4 bits once per program, and not in
      every call of the network; they take twice as much then.
    fused: run by the kernels of `fused` what they take.

  Returns:
    Of every layer an `IntegerLayer`, or its quantizers, weights packed, if one
    side is in floating point, the input has one grid per channel, zero points
    are not whole or not int16, or sums could reach 2**31.
  """
  result: IntegerState = {}
  for path, layer in state.items():
    weight = None
    if layer['weight'] is not None:
      weight = packing.pack(jax.tree.map(np.asarray, layer['weight']))
    act = layer['act']
    found = None
    if weight is not None and act is not None:
      found = _integer_layer(weight, jax.tree.map(np.asarray, act))
    if found is not None:
      found = dataclasses.replace(
        found,
        in_bfloat16=path in in_bfloat16 and _fits_bfloat16(layer),
        unpack_first=unpack_first,
        fused=fused and path not in in_bfloat16,
      )
      if found.fused and found.offset is None:
        kernel: Any = np.moveaxis(np.asarray(found.kernel), -1, 0).copy()
        found = dataclasses.replace(found, kernel=kernel, outputs_first=True)
    result[path] = found or transform.LayerState(weight=weight, act=act)
  return result


def simulate(state: transform.QuantState) -> IntegerState:
  """The same layers with whole numbers in float32, for any device.

  Sums are exact below 2**24, and then the layers return what those of `prepare`
  do, to the last bit.

  Args:
    state: quantizers; concrete arrays.

  Returns:
    As `prepare`. Layers of all widths are of one structure.
  """
  return {
    path: _in_floats(layer, np.float32)
    if isinstance(layer, IntegerLayer)
    else layer
    for path, layer in prepare(state).items()
  }


def _in_floats(layer: IntegerLayer, dtype: Any) -> IntegerLayer:
  """The layer with c - zw as its kernel."""
  if layer.floats:
    return layer
  kernel = kernel_operand(layer).astype(np.float32)
  if layer.shift is not None:
    kernel = kernel + layer.shift
  return IntegerLayer(
    kernel=kernel.astype(dtype),
    offset=None,
    shift=None,
    act=layer.act,
    scale=layer.scale,
    correction=None,
    corrected=False,
    zero_code=True,
    bits=affine.MAX_BITS,
    inputs=layer.inputs,
  )


def _integer_layer(
  weight: packing.PackedWeight, act: affine.QParams
) -> IntegerLayer | None:
  """The layer, or None if it cannot be exact; see `prepare`."""
  zeros = [np.asarray(q.zero_point, np.float64) for q in (weight, act)]
  if act.scale.ndim or any((z != np.round(z)).any() for z in zeros):
    return None
  if any(np.abs(z).max() >= 2**15 for z in zeros):
    return None
  zw, zx = zeros
  ow, ox = _offset(zw, weight.bits), _offset(zx, act.bits)
  shift_w, shift_x = ow - zw, ox - zx
  k = (np.asarray(weight.codes) - ow.astype(np.int16)).astype(np.int8)
  count = int(np.prod(k.shape[:-1]))
  largest = _INT8 + np.abs(shift_w).max()  # Of c - zw.
  if count * largest * (_INT8 + np.abs(shift_x)) >= _INT32:
    return None
  steps = np.asarray(weight.scale, np.float32).reshape(-1)
  scale: Any = np.float32(act.scale) * steps
  if scale.size == 1:
    scale = np.tile(scale, k.shape[-1])  # XLA folds scalars badly on GPUs.

  def whole(value):
    return value.astype(np.int16).reshape(-1 if value.ndim else ())

  packed = weight.bits <= packing.HALF
  return IntegerLayer(
    kernel=weight.data if packed else k,
    offset=whole(ow) if packed else None,
    shift=whole(shift_w) if shift_w.any() else None,
    act=act,
    scale=scale,
    correction=None,
    corrected=bool(shift_x.any()),
    zero_code=bool(0 <= zx < 2**act.bits),
    bits=weight.bits,
    inputs=weight.inputs,
  )


def _fits_bfloat16(layer: transform.LayerState) -> bool:
  """Whether all differences of codes and zero points are 256 at most."""
  return all(
    0 <= np.min(q.zero_point) and np.max(q.zero_point) < 2**q.bits
    for q in (layer['weight'], layer['act'])
    if q is not None
  )


def _offset(zero_point: Any, bits: int) -> Any:
  """The number nearest to a zero point for which codes minus it are int8."""
  numpy = np if isinstance(zero_point, np.ndarray) else jnp
  return numpy.clip(zero_point, 2.0**bits - _INT8, _INT8)


def _to_int8(codes: Array, offset: Array) -> Array:
  return (codes.astype(np.int16) - offset).astype(np.int8)


def kernel_operand(layer: IntegerLayer) -> Array:
  """int8 with the shape of the kernel, k."""
  if layer.outputs_first:
    return jnp.moveaxis(layer.kernel, 0, -1)
  if layer.offset is None:
    return layer.kernel
  codes = packing.unpack_codes(layer.kernel, layer.bits, layer.inputs)
  return _to_int8(codes, layer.offset)


def act_offset(layer: IntegerLayer) -> Array:
  """int16[], ox."""
  offset = _offset(jnp.asarray(layer.act.zero_point), layer.act.bits)
  return offset.astype(jnp.int16)


def act_shift(layer: IntegerLayer) -> Array:
  """int32[], A."""
  zero_point = jnp.asarray(layer.act.zero_point).astype(jnp.int32)
  return act_offset(layer).astype(jnp.int32) - zero_point


def _clipped(layer: IntegerLayer, x: Array) -> Array:
  """float32, (q - zx) before rounding: its ends are whole numbers."""
  low = -jnp.asarray(layer.act.zero_point)
  high = low + (2**layer.act.bits - 1)
  return jnp.clip(x.astype(jnp.float32) / layer.act.scale, low, high)


def rounded(v: Array) -> Array:
  """int32: `v`, |v| < 2**22, rounded half to even.

  A float32 near 1.5 * 2**23 has no bits for a fraction, and counts in ones from
  there. Adding takes one instruction; rounding and converting are two, for
  which GPUs have an eighth as many units.
  """
  magic = np.float32(1.5 * 2**23)
  bits = jax.lax.bitcast_convert_type(v + magic, jnp.int32)
  return bits - magic.view(np.int32)


def input_operand(layer: IntegerLayer, x: Array) -> Array:
  """int8 with the shape of `x`, a.

  The codes are those of `affine.quantize`, bit for bit.
  """
  a = (rounded(_clipped(layer, x)) - act_shift(layer)).astype(jnp.int8)
  if layer.shift is None:
    return a
  # Or its sum over channels would be fused with all that `a` is computed from.
  return jax.lax.optimization_barrier(a)


def _float_operand(layer: IntegerLayer, x: Array) -> Array:
  """q - zx in the type of the kernel."""
  return jnp.round(_clipped(layer, x)).astype(layer.kernel.dtype)


def correction(layer: IntegerLayer) -> Array:
  """What `IntegerLayer.correction` is said to be; A must not be 0."""
  if layer.correction is not None:
    return layer.correction
  k = kernel_operand(layer)
  sums = jnp.sum(k, axis=-2, dtype=jnp.int32)
  if layer.shift is not None:
    sums += layer.inputs * layer.shift.astype(jnp.int32)
  if layer.zero_code:
    sums = jnp.sum(sums, axis=tuple(range(sums.ndim - 1)))
  return act_shift(layer) * sums


def ready(layer: IntegerLayer) -> IntegerLayer:
  """Computes what follows from codes, once for many calls of a network.

  These are `IntegerLayer.correction`, kernels in bfloat16 and, where that is
  wanted, unpacked ones. Inside a program, so that they take no memory between
  its calls.
  """
  if layer.floats:
    return layer
  if layer.in_bfloat16:
    return _in_floats(layer, jnp.bfloat16)
  if layer.corrected:
    layer = dataclasses.replace(layer, correction=correction(layer))
  if layer.unpack_first or layer.fused:
    kernel = kernel_operand(layer)
    layer = dataclasses.replace(
      layer, kernel=kernel, offset=None, outputs_first=False
    )
  return layer


def _conv_result() -> Any:
  """Type of a convolution of int8; see the top of this file."""
  return jnp.float32 if jax.default_backend() == 'gpu' else jnp.int32


def _float_result(layer: IntegerLayer, result: Any) -> Any:
  """Type of sums of floats; only bfloat16 may be asked for less."""
  return result if layer.kernel.dtype == jnp.bfloat16 else jnp.float32


def _convolve(
  a: Array, k: Array, strides: Any, padding: Any, result: Any
) -> Array:
  return jax.lax.conv_general_dilated(
    a,
    k,
    strides,
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=result,
  )


def _corrected(products: Array, corrections: list[Array]) -> Array:
  """int32 sum; `products` may be whole numbers in float32."""
  return sum(corrections, products.astype(jnp.int32))


def dense(layer: IntegerLayer, x: Array, result: Any = jnp.float32) -> Array:
  """`sum (q - zx)(c - zw)` of a linear layer.

  Args:
    layer: with a kernel [I, O].
    x: float[.., I], its input in floating point.
    result: type that layers with kernels in bfloat16 return.

  Returns:
    int32[.., O], exact; with kernels in floating point float32, exact below
    2**24, or that rounded to `result`.

  Raises:
    ValueError: `x` does not fit the kernel.
  """
  if layer.in_bfloat16:
    layer = _in_floats(layer, jnp.bfloat16)
  if layer.floats:
    return jnp.dot(
      _float_operand(layer, x),
      layer.kernel,
      preferred_element_type=_float_result(layer, result),
    )
  return _matmul(layer, input_operand(layer, x), kernel_operand(layer))


def _matmul(layer: IntegerLayer, a: Array, k: Array) -> Array:
  """int32[.., O] of int8[.., I] and int8[I, O]."""
  if a.shape[-1] != k.shape[0]:
    raise ValueError(f'An input of shape {a.shape} and a kernel {k.shape}.')
  # Of two dimensions: with more, XLA transposes them on GPUs.
  products = jnp.dot(
    a.reshape(-1, a.shape[-1]), k, preferred_element_type=jnp.int32
  ).reshape(*a.shape[:-1], -1)
  corrections = []
  if layer.shift is not None:
    sums = jnp.sum(a, axis=-1, keepdims=True, dtype=jnp.int32)
    corrections.append(sums * layer.shift.astype(jnp.int32))
  if layer.corrected:
    corrections.append(correction(layer).reshape(-1))
  return _corrected(products, corrections)


def conv(
  layer: IntegerLayer,
  x: Array,
  strides: tuple[int, int] = (1, 1),
  padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
  result: Any = jnp.float32,
) -> Array:
  """`sum (q - zx)(c - zw)` of a convolution, padding being exact zeros.

  Args:
    layer: with a kernel [KH, KW, I, O].
    x: float[B, H, W, I], its input in floating point.
    strides: rows and columns between outputs.
    padding: rows before and after, columns before and after; >= 0.
    result: as in `dense`.

  Returns:
    int32[B, H', W', O], exact; see the top of this file for GPUs. Or as
    `dense` says.

  Raises:
    ValueError: `x` does not fit the kernel.
  """
  if layer.in_bfloat16:
    layer = _in_floats(layer, jnp.bfloat16)
  k = layer.kernel if layer.floats else kernel_operand(layer)
  if x.ndim != 4 or x.shape[-1] != layer.inputs:
    raise ValueError(f'An input of shape {x.shape} and a kernel {k.shape}.')
  if layer.floats:
    result = _float_result(layer, result)
    # cuDNN has no convolutions from one floating-point type to another.
    a, k = (v.astype(result) for v in (_float_operand(layer, x), k))
    return _convolve(a, k, strides, padding, result)
  a = input_operand(layer, x)
  height, width = k.shape[:2]
  no_padding = not any(map(any, padding))
  if (height, width) == (1, 1) and no_padding and set(strides) == {1}:
    return _matmul(layer, a, k[0, 0])
  size = (x.shape[1], x.shape[2])
  pads = padding
  if layer.zero_code and layer.corrected and not no_padding:
    width_of = ((0, 0), *padding, (0, 0))
    zero = (-act_shift(layer)).astype(jnp.int8)
    a = jax.lax.pad(a, zero, [(*ends, 0) for ends in width_of])
    pads = ((0, 0), (0, 0))
  products = _convolve(a, k, strides, pads, _conv_result())
  corrections = []
  if layer.shift is not None:
    sums = jax.lax.reduce_window(
      jnp.sum(a, axis=-1, keepdims=True, dtype=jnp.int32),
      jnp.int32(0),
      jax.lax.add,
      (1, height, width, 1),
      (1, *strides, 1),
      ((0, 0), *pads, (0, 0)),
    )
    corrections.append(sums * layer.shift.astype(jnp.int32))
  if layer.corrected:
    per_channel = correction(layer)
    if not layer.zero_code:
      per_channel = border_map(per_channel, size, strides, padding)
    corrections.append(per_channel)
  return _corrected(products, corrections)


def _inside(
  size: int, kernel: int, stride: int, padding: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Which positions of a kernel lie on the image, along one axis.

  Returns:
    int32[N, kernel] of zeros and ones, the distinct cases, and int[size'], the
    case of every output.
  """
  outputs = (size + sum(padding) - kernel) // stride + 1
  first = np.arange(outputs)[:, None] * stride - padding[0]
  position = first + np.arange(kernel)
  inside = (position >= 0) & (position < size)
  cases, which = np.unique(inside, axis=0, return_inverse=True)
  return cases.astype(np.int32), which.reshape(-1)


def border_map(
  values: Array,
  size: tuple[int, int],
  strides: tuple[int, int],
  padding: tuple[tuple[int, int], tuple[int, int]],
) -> Array:
  """Sums over the kernel positions that lie on the image, at every output.

  Args:
    values: int32[KH, KW, O].
    size: H, W of the input.
    strides: as in `conv`.
    padding: as in `conv`.

  Returns:
    int32[H', W', O]; int32[1, 1, O] if it is the same everywhere.
  """
  kernels = values.shape[:2]
  (rows, row), (columns, column) = (
    _inside(*axis) for axis in zip(size, kernels, strides, padding, strict=True)
  )
  chosen = rows[:, None, :, None, None] * columns[None, :, None, :, None]
  table = jnp.sum(chosen * values, axis=(2, 3), dtype=jnp.int32)
  if len(rows) == len(columns) == 1:
    return table
  return table[row][:, column]


def rescale(
  layer: IntegerLayer, total: Array, bias: Array | None, dtype: Any
) -> Array:
  """Output of a layer from its sum of integers, in float32 until the end."""
  y = total.astype(jnp.float32) * layer.scale
  if bias is not None:
    y = y + bias.astype(jnp.float32)
  return y.astype(dtype)


def geometry(module: nn.Conv, shape: tuple[int, ...]) -> tuple[Any, Any]:
  """Strides and explicit padding of a convolution of two dimensions.

  Raises:
    ValueError: it has what integer execution does not know.
  """

  def pair(value):
    if value is None or isinstance(value, int):
      return (value or 1,) * 2
    return tuple(value)

  size = module.kernel_size
  size = (size,) if isinstance(size, int) else tuple(size)
  if (
    len(size) != 2
    or len(shape) != 4
    or module.feature_group_count != 1
    or set(pair(module.kernel_dilation) + pair(module.input_dilation)) != {1}
    or module.mask is not None
  ):
    raise ValueError(
      'Only convolutions of [B, H, W, C], without groups, dilation or masks, '
      'run on integers.'
    )
  strides = pair(module.strides)
  padding = nn.linear.canonicalize_padding(module.padding, 2)
  if isinstance(padding, str):
    if padding not in ('SAME', 'VALID'):
      raise ValueError(f'Padding {padding!r} is not supported.')
    padding = jax.lax.padtype_to_pads(shape[1:3], size, strides, padding)
  return strides, tuple(map(tuple, padding))
