"""Layers of a quantized network on integers: int8 x int8, one rescale.

  layers = integer.prepare(state)  # Once, from quantizers of `transform`.
  apply_i = jax.jit(integer.apply(model.apply))  # Wrap first, then jit.
  y = apply_i(integer.without_kernels(variables, layers), layers, x)

This is what `transform.quantize(model.apply)` computes, but for the order of
roundings. With `x = sx (q - zx)` and `w = sw (c - zw)`, codes q and c, int8
operands `a = q - ox` and `k = c - ow`, `A = ox - zx` and `B = ow - zw`:

  sum x w = sx sw (sum a k  +  B sum a  +  A sum (c - zw)),

every sum going over the positions of the kernel that lie on the image, because
padding is zeros, and they come after quantization. So a and k are padded with
plain zeros, whatever the zero points, and

  sum a k         is one convolution of int8;
  sum a           is a box sum of channel sums; left out where B is 0;
  sum (c - zw)    depends on the position at the border only. Per kernel
                  position it is summed beforehand, and the few distinct cases
                  of top, middle, bottom, left, right are added up from that in
                  the program, [H, W, O] without a batch; left out where A is 0.

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

from collections.abc import Callable, Mapping
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
    codes: uint8, packed codes of the kernel; see `packing.pack_codes`.
    weight_offset: int32[] or int32[O], ow.
    weight_shift: int32[] or int32[O], B; None if it is 0.
    act: grid of the input, per tensor.
    act_offset: int32[], ox.
    correction: int32[KH, KW, O] or int32[O], A sum (c - zw) over the input
      channels; None if A is 0.
    scale: float32[O], sx sw.
    bits: of the weights.
    inputs: I.
  """

  codes: Array
  weight_offset: Array
  weight_shift: Array | None
  act: affine.QParams
  act_offset: Array
  correction: Array | None
  scale: Array
  bits: int = flax.struct.field(pytree_node=False)
  inputs: int = flax.struct.field(pytree_node=False)


# Path -> layer; quantizers as in `transform` for layers that do not run on
# integers. A pytree.
IntegerState = dict[str, IntegerLayer | transform.LayerState]


def prepare(state: transform.QuantState) -> IntegerState:
  """Layers ready to run on integers, computed on the host.

  Args:
    state: quantizers; concrete arrays.

  Returns:
    Of every layer an `IntegerLayer`, or its quantizers, weights packed, if one
    side is in floating point, the input has one grid per channel, zero points
    are not whole, or sums could reach 2**31.
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
    result[path] = found or transform.LayerState(weight=weight, act=act)
  return result


def _integer_layer(
  weight: packing.PackedWeight, act: affine.QParams
) -> IntegerLayer | None:
  """The layer, or None if it cannot be exact; see `prepare`."""
  zeros = [np.asarray(q.zero_point, np.float64) for q in (weight, act)]
  if act.scale.ndim or any((z != np.round(z)).any() for z in zeros):
    return None
  zw, zx = zeros
  ow, ox = _offset(zw, weight.bits), _offset(zx, act.bits)
  codes = np.asarray(weight.codes)
  over_inputs = codes.sum(-2, dtype=np.int64) - codes.shape[-2] * zw.reshape(-1)
  shift_w, shift_x = ow - zw, ox - zx
  correction = shift_x * over_inputs  # float64[.., O], whole numbers.
  count = int(np.prod(codes.shape[:-1]))
  bound = count * _INT8 * (_INT8 + np.abs(shift_w).max())
  taps = tuple(range(correction.ndim - 1))
  if bound + np.abs(correction).sum(taps).max() >= _INT32:
    return None
  steps = np.asarray(weight.scale, np.float32).reshape(-1)
  scale: Any = np.float32(act.scale) * steps
  if scale.size == 1:
    scale = np.tile(scale, codes.shape[-1])  # XLA folds scalars badly on GPUs.

  def whole(value):
    return value.astype(np.int32).reshape(-1 if value.ndim else ())

  return IntegerLayer(
    codes=weight.data,
    weight_offset=whole(ow),
    weight_shift=whole(shift_w) if shift_w.any() else None,
    act=act,
    act_offset=whole(ox),
    correction=correction.astype(np.int32) if shift_x.any() else None,
    scale=scale,
    bits=weight.bits,
    inputs=weight.inputs,
  )


def _offset(zero_point: np.ndarray, bits: int) -> np.ndarray:
  """The number nearest to a zero point for which codes minus it are int8."""
  return np.clip(zero_point, 2.0**bits - _INT8, _INT8)


def _to_int8(codes: Array, offset: Array) -> Array:
  return (codes.astype(jnp.int32) - offset).astype(jnp.int8)


def kernel_operand(layer: IntegerLayer) -> Array:
  """int8 with the shape of the kernel: codes minus `weight_offset`."""
  codes = packing.unpack_codes(layer.codes, layer.bits, layer.inputs)
  return _to_int8(codes, layer.weight_offset)


def input_operand(layer: IntegerLayer, x: Array) -> Array:
  """int8 with the shape of `x`: codes of the input minus `act_offset`.

  The codes are those of `affine.quantize`, bit for bit.
  """
  return _to_int8(affine.quantize(x, layer.act).codes, layer.act_offset)


def _conv_result() -> Any:
  """Type of a convolution of int8; see the top of this file."""
  return jnp.float32 if jax.default_backend() == 'gpu' else jnp.int32


def _corrected(products: Array, corrections: list[Array]) -> Array:
  if not corrections:
    return products
  return products + sum(corrections[1:], corrections[0]).astype(products.dtype)


def dense(layer: IntegerLayer, x: Array) -> Array:
  """`sum (q - zx)(c - zw)` of a linear layer.

  Args:
    layer: with a kernel [I, O].
    x: float[.., I], its input in floating point.

  Returns:
    int32[.., O], exact.

  Raises:
    ValueError: `x` does not fit the kernel.
  """
  return _matmul(layer, input_operand(layer, x), kernel_operand(layer))


def _matmul(layer: IntegerLayer, a: Array, k: Array) -> Array:
  """int32[.., O] of int8[.., I] and int8[I, O]."""
  if a.shape[-1] != k.shape[0]:
    raise ValueError(f'An input of shape {a.shape} and a kernel {k.shape}.')
  products = jax.lax.dot_general(
    a,
    k,
    (((a.ndim - 1,), (0,)), ((), ())),
    preferred_element_type=jnp.int32,
  )
  corrections = []
  if layer.weight_shift is not None:
    sums = jnp.sum(a, axis=-1, keepdims=True, dtype=jnp.int32)
    corrections.append(sums * layer.weight_shift)
  if layer.correction is not None:
    corrections.append(layer.correction.reshape(-1))
  return _corrected(products, corrections)


def conv(
  layer: IntegerLayer,
  x: Array,
  strides: tuple[int, int] = (1, 1),
  padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
) -> Array:
  """`sum (q - zx)(c - zw)` of a convolution, padding being exact zeros.

  Args:
    layer: with a kernel [KH, KW, I, O].
    x: float[B, H, W, I], its input in floating point.
    strides: rows and columns between outputs.
    padding: rows before and after, columns before and after; >= 0.

  Returns:
    int32[B, H', W', O], exact; on GPUs float32, see the top of this file.

  Raises:
    ValueError: `x` does not fit the kernel.
  """
  k = kernel_operand(layer)
  if x.ndim != 4 or x.shape[-1] != layer.inputs:
    raise ValueError(f'An input of shape {x.shape} and a kernel {k.shape}.')
  a = input_operand(layer, x)
  height, width = k.shape[:2]
  no_padding = not any(map(any, padding))
  if (height, width) == (1, 1) and no_padding and set(strides) == {1}:
    return _matmul(layer, a, k[0, 0])
  products = jax.lax.conv_general_dilated(
    a,
    k,
    strides,
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    preferred_element_type=_conv_result(),
  )
  corrections = []
  if layer.weight_shift is not None:
    sums = jax.lax.reduce_window(
      jnp.sum(a, axis=-1, keepdims=True, dtype=jnp.int32),
      jnp.int32(0),
      jax.lax.add,
      (1, height, width, 1),
      (1, *strides, 1),
      ((0, 0), *padding, (0, 0)),
    )
    corrections.append(sums * layer.weight_shift)
  if layer.correction is not None:
    corrections.append(
      border_map(layer.correction, (x.shape[1], x.shape[2]), strides, padding)
    )
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


def _geometry(
  module: nn.Conv, path: str, shape: tuple[int, ...]
) -> tuple[Any, Any]:
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
      f'{path!r}: only convolutions of [B, H, W, C], without groups, dilation '
      'or masks, run on integers.'
    )
  strides = pair(module.strides)
  padding = nn.linear.canonicalize_padding(module.padding, 2)
  if isinstance(padding, str):
    if padding not in ('SAME', 'VALID'):
      raise ValueError(f'{path!r}: padding {padding!r} is not supported.')
    padding = jax.lax.padtype_to_pads(shape[1:3], size, strides, padding)
  return strides, tuple(map(tuple, padding))


def run_layer(
  module: nn.Conv | nn.Dense, layer: IntegerLayer, x: Array
) -> Array:
  """What a bound nn.Conv or nn.Dense returns for `x`, on integers.

  Raises:
    ValueError: the module has what integer execution does not know, or `x`
      does not fit.
  """
  path = transform.path_of(module)
  try:
    if isinstance(module, nn.Conv):
      total = conv(layer, x, *_geometry(module, path, x.shape))
    else:
      total = dense(layer, x)
  except ValueError as error:
    raise ValueError(f'Layer {path!r} on integers: {error}') from error
  bias = module.variables.get('params', {}).get('bias')
  dtype = module.dtype or jnp.result_type(x.dtype, module.param_dtype)
  return rescale(layer, total, bias, dtype)


def apply(model_apply: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a Linen `apply` so that its layers run on integers.

  Args:
    model_apply: plain (not jitted) `model.apply`.

  Returns:
    `integer_apply(variables, layers, *args, **kwargs)`: like `model_apply`.
    Layers of which there is an `IntegerLayer` do not look at their kernels,
    see `without_kernels`. Others in `layers` run as in `transform.quantize`.
  """

  def integer_apply(
    variables: Mapping[str, Any],
    layers: IntegerState,
    *args: Any,
    **kwargs: Any,
  ) -> Any:
    integers = {
      path: layer
      for path, layer in layers.items()
      if isinstance(layer, IntegerLayer)
    }
    rest: transform.QuantState = {
      path: layer
      for path, layer in layers.items()
      if not isinstance(layer, IntegerLayer)
    }

    def interceptor(call, args, kwargs, context):
      path = transform.path_of(context.module)
      if context.method_name != '__call__' or path not in integers:
        return call(*args, **kwargs)
      x = args[0] if args else kwargs['inputs']
      return run_layer(context.module, integers[path], x)

    with nn.intercept_methods(interceptor):
      return transform.quantize(model_apply)(variables, rest, *args, **kwargs)

  return integer_apply


def without_kernels(
  variables: Mapping[str, Any], layers: IntegerState | transform.QuantState
) -> dict[str, Any]:
  """`variables` without the kernels that are in `layers` as codes."""
  return transform.drop_kernels(
    variables,
    [
      path
      for path, layer in layers.items()
      if isinstance(layer, IntegerLayer) or layer['weight'] is not None
    ],
  )
