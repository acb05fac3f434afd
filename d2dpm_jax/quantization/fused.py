"""Layers on integers by kernels that do more than one layer at once.

Between integer layers lie norms, SiLU, gates, residuals and quantization, all
bound by memory. Here a product rescales, adds its residual and writes bfloat16,
or codes if a gate follows; a norm writes the padded codes of the convolution
behind it. The layers say what they do together (`layers.Conv.after_norm`,
..), and these are the same steps in fewer kernels; numbers differ from them in
how often they are rounded to bfloat16, in last bits of exp and division, and by
6e-5 in GELU.

Kernels: `d2dpm_jax/quantization/kernels`, for NVIDIA Hopper, where layers
compute in bfloat16, on shapes that fit tiles. All else falls back to `integer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2dpm_jax.quantization import integer, transform
from d2dpm_jax.quantization.integer import IntegerLayer
from d2dpm_jax.quantization.kernels import norm as norms
from d2dpm_jax.quantization.kernels import products

Array = jax.Array
Layers = Mapping[str, 'IntegerLayer | FusedLayer']

_NARROW = 512  # Channels of which a program normalizes eight rows, not four.


@flax.struct.dataclass
class FusedLayer:
  """A layer as kernels take it.

  Attributes:
    plain: the same layer for XLA, where a shape does not fit.
    kernel: int8[O, K], k of `integer`, K = KH KW I. Outputs of convolutions,
      here and below, are padded to the least that a tile has.
    scale: float32[O].
    shift: int32[O], B, or None.
    correction: int32[O], or None.
    grid: float32[4] of the input, see `norms.grid_numbers`.
  """

  plain: IntegerLayer
  kernel: Array
  scale: Array
  shift: Array | None
  correction: Array | None
  grid: Array

  @property
  def is_3x3(self) -> bool:
    return self.plain.kernel.ndim == 4 and self.plain.kernel.shape[0] == 3


def takes(kernel_shape: tuple[int, ...]) -> bool:
  """Whether there are kernels for a layer, given enough rows and no strides."""
  *taps, inputs, outputs = kernel_shape
  if tuple(taps) == (3, 3):
    outputs = max(outputs, products.LEAST_CHANNELS)
  elif taps and tuple(taps) != (1, 1):
    return False
  return products.fit(products.LEAST_ROWS, inputs, outputs)


def _pad_outputs(x: Array) -> Array:
  """Zeros behind the first axis, where a tile has more outputs."""
  missing = max(products.LEAST_CHANNELS - len(x), 0)
  return jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])


def ready(layer: IntegerLayer) -> FusedLayer | IntegerLayer:
  """From what `integer.ready` returns; that itself, if no kernel takes it."""
  kernel = layer.kernel
  if layer.floats or (layer.corrected and not layer.zero_code):
    return layer
  if not takes(kernel.shape):
    return layer
  shift, correction = layer.shift, layer.correction
  if shift is not None:
    shift = jnp.broadcast_to(shift.astype(jnp.int32), kernel.shape[-1:])
    shift = _pad_outputs(shift)
  if correction is not None:
    correction = _pad_outputs(correction.reshape(-1))
  offset = integer.act_offset(layer)
  act = layer.act
  return FusedLayer(
    plain=layer,
    kernel=_pad_outputs(products.kernel_layout(kernel)),
    scale=_pad_outputs(layer.scale),
    shift=shift,
    correction=correction,
    grid=norms.grid_numbers(1 / act.scale, act.zero_point, offset, act.bits),
  )


def _interpreted() -> bool:
  """Kernels run on CPUs in tests only, and there they are interpreted.

  Raises:
    ValueError: the devices have no such kernels, and this JAX no interpreter.
  """
  backend = jax.default_backend()
  if backend not in ('cpu', 'gpu') or (
    backend == 'cpu' and not hasattr(plgpu, 'InterpretGPUParams')
  ):
    raise ValueError(
      'Fused kernels are for NVIDIA Hopper; JAX 0.11 interprets them on CPUs. '
      'Call integer.prepare without fused=True.'
    )
  return backend == 'cpu'


def _interpret() -> Any:
  # JAX 0.10 has none; `Any`, because type checkers know one version.
  found: Any = plgpu
  return found.InterpretGPUParams() if _interpreted() else None


def run(
  module: nn.Module, method: str, layers: Layers, *args: Any, **kwargs: Any
) -> Any:
  """A method of `layers.Conv` or `layers.Dense`; None if no kernel does it.

  Args:
    module: bound; its layer is a FusedLayer.
    method: its name.
    layers: of the network, by path.
    *args: of the method.
    **kwargs: of the method.
  """
  if method not in _METHODS:
    return None
  if method == '__call__' and 'inputs' in kwargs:  # As Flax names it.
    args, kwargs = (kwargs['inputs'],), {}
  return _METHODS[method](module, layers, *args, **kwargs)


def _of(module: nn.Module, layers: Layers) -> FusedLayer | None:
  found = layers.get(transform.path_of(module))
  return found if isinstance(found, FusedLayer) else None


def _plus(
  module: nn.Module,
  layers: Layers,
  x: Array,
  residual: Array | None = None,
  constant: Array | None = None,
) -> Array | None:
  """The layer itself, with a residual or without."""
  layer = _of(module, layers)
  if (
    layer is None
    or module.dtype != jnp.bfloat16
    or not _fits(module, layer, x.shape, residual)
  ):
    return None
  pixels = math.prod(x.shape[1:-1])
  shared = not layer.is_3x3 and products.fit_shared(pixels)
  if constant is not None and not shared:
    return None
  if constant is None and residual is not None and shared:
    # The kernel of layers that have one; another takes a second to compile.
    constant = jnp.zeros((len(x), 1, residual.shape[-1]))
  a = _padded(layer, _quantized(layer, x), layer.grid[3].astype(jnp.int8))
  return _product(module, layer, a, None, residual, constant)


def _quantized(layer: FusedLayer, x: Array) -> Array:
  """int8 codes of the input minus the offset, as other kernels make them."""
  inverse, low, high, zero = layer.grid
  quotient = jnp.clip(x.astype(jnp.float32) * inverse, low, high)
  return (integer.rounded(quotient) + zero.astype(jnp.int32)).astype(jnp.int8)


def _padded(layer: FusedLayer, x: Array, value: Array) -> Array:
  """[B, H, W, ..] with `value` around, if a 3x3 convolution is to see it."""
  if not layer.is_3x3:
    return x
  ends = [(1, 1, 0) if axis in (1, 2) else (0, 0, 0) for axis in range(x.ndim)]
  return jax.lax.pad(x, value, ends)


def _doubled(x: Array) -> Array:
  """Every pixel of [B, H, W, C] 2 x 2 times."""
  b, height, width, depth = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (b, height, 2, width, 2, depth))
  return x.reshape(b, 2 * height, 2 * width, depth)


def _after_upsample(
  module: nn.Module, layers: Layers, x: Array
) -> Array | None:
  """Doubles codes: a quarter of the numbers is quantized and summed up."""
  layer = _of(module, layers)
  b, height, width, depth = x.shape
  shape = (b, 2 * height, 2 * width, depth)
  if (
    layer is None
    or module.dtype != jnp.bfloat16
    or not _fits(module, layer, shape, None)
  ):
    return None
  # One pass that writes codes, without what reads them.
  codes = jax.lax.optimization_barrier(_quantized(layer, x))
  zero = layer.grid[3].astype(jnp.int8)
  a = _padded(layer, _doubled(codes), zero)
  sums = None
  if layer.shift is not None:
    sums = jnp.sum(codes, -1, dtype=jnp.int32, keepdims=True)
    sums = _padded(layer, _doubled(sums), zero * jnp.int32(depth))
    sums = sums[..., 0]
  return _product(module, layer, a, sums, None)


def _after_norm(
  module: nn.Module,
  layers: Layers,
  norm: Any,
  x: Array,
  offset: Array | float = 0.0,
  *,
  silu: bool = True,
  residual: Array | None = None,
) -> Array | None:
  layer = _of(module, layers)
  if (
    layer is None
    or x.ndim != 4
    or x.dtype != jnp.bfloat16
    or not _fits(module, layer, x.shape, residual)
  ):
    return None
  params, depth = norm.variables['params'], x.shape[-1]
  offset = jnp.broadcast_to(offset, (len(x), 1, 1, depth))
  gain, shift = norms.group_affine(
    x,
    params['scale'],
    params['bias'],
    offset.reshape(-1, depth),
    groups=norm.num_groups,
    epsilon=norm.epsilon,
    interpret=_interpreted(),
  )
  a, sums = norms.norm_silu_quantize(
    x,
    gain,
    shift,
    layer.grid,
    silu=silu,
    sums=layer.shift is not None,
    padding=1 if layer.is_3x3 else 0,
    interpret=_interpreted(),
  )
  return _product(module, layer, a, sums, residual)


def _all_after_norm(
  module: nn.Module,
  layers: Layers,
  others: tuple[nn.Module, ...],
  norm: nn.Module,
  x: Array,
) -> list[Array] | None:
  modules = (module, *others)
  found = [_of(m, layers) for m in modules]
  wanted = [layer for layer in found if layer is not None]
  if (
    len(wanted) < len(modules)
    or x.dtype != jnp.bfloat16
    or not all(
      _fits(m, layer, x.shape, None)
      for m, layer in zip(modules, wanted, strict=True)
    )
  ):
    return None
  operands = _layer_norm(norm, wanted, x)
  return [
    _product(m, layer, *operand, None)
    for m, layer, operand in zip(modules, wanted, operands, strict=True)
  ]


def _after_gate(
  module: nn.Module,
  layers: Layers,
  gate: nn.Module,
  norm: nn.Module,
  x: Array,
) -> Array | None:
  layer = _of(module, layers)
  first = layers.get(f'{transform.path_of(gate)}/proj')
  if (
    layer is None
    or x.dtype != jnp.bfloat16
    or not isinstance(first, FusedLayer)
  ):
    return None
  rows, inner = math.prod(x.shape[:-1]), (*x.shape[:-1], layer.plain.inputs)
  if not products.fit_gated(rows, x.shape[-1], len(first.kernel)) or not _fits(
    module, layer, inner, x
  ):
    return None
  [(a, sums)] = _layer_norm(norm, [first], x)
  bias = gate.variables['params']['proj'].get('bias')
  epilogue = _epilogue(first, bias, sums)._replace(grid=layer.grid)
  codes = products.gated(
    a.reshape(rows, -1), first.kernel, epilogue, interpret=_interpret()
  )
  return _product(module, layer, codes.reshape(inner), None, x)


def _layer_norm(
  module: nn.Module, layers: Sequence[FusedLayer], x: Array
) -> list[tuple[Array, Array | None]]:
  """The input of every layer, int8[.., C], and its sums int32[rows]."""
  params = module.variables['params']
  found = norms.layer_norm_quantize(
    x.reshape(-1, x.shape[-1]),
    params['scale'],
    params['bias'],
    tuple(layer.grid for layer in layers),
    epsilon=module.epsilon,
    sums=any(layer.shift is not None for layer in layers),
    rows=8 if x.shape[-1] <= _NARROW else 4,
    interpret=_interpreted(),
  )
  return [(a.reshape(x.shape), sums) for a, sums in found]


def _fits(
  module: nn.Module,
  layer: FusedLayer,
  shape: tuple[int, ...],
  residual: Array | None,
) -> bool:
  """Whether there is a kernel for an input of this shape."""
  inputs, outputs = shape[-1], len(layer.kernel)
  if inputs != layer.plain.inputs:
    return False
  narrow = module.dtype == jnp.bfloat16
  if residual is not None and (
    residual.dtype != jnp.bfloat16
    or not narrow
    or layer.plain.kernel.shape[-1] != outputs
  ):
    return False
  if not narrow and not layer.is_3x3:
    return False
  if isinstance(module, nn.Conv):
    padding = ((1, 1), (1, 1)) if layer.is_3x3 else ((0, 0), (0, 0))
    try:
      if integer.geometry(module, shape) != ((1, 1), padding):
        return False
    except ValueError:
      return False  # `integer` says what it is.
  if layer.is_3x3:
    return products.fit_conv(shape[:-1], inputs, outputs)
  return products.fit(math.prod(shape[:-1]), inputs, outputs)


def _epilogue(
  layer: FusedLayer,
  bias: Array | None,
  row_sums: Array | None = None,
  residual: Array | None = None,
) -> products.Epilogue:
  return products.Epilogue(
    scale=layer.scale,
    bias=bias,
    shift=layer.shift,
    row_sums=row_sums,
    correction=layer.correction,
    residual=residual,
  )


def _product(
  module: nn.Module,
  layer: FusedLayer,
  a: Array,
  row_sums: Array | None,
  residual: Array | None,
  constant: Array | None = None,
) -> Array:
  """The layer of codes, which are padded for a 3x3 convolution.

  Sums of rows are those of `a` over channels, one for every pixel.
  """
  bias = module.variables.get('params', {}).get('bias')
  outputs = layer.plain.kernel.shape[-1]
  if layer.is_3x3:
    if bias is not None:
      bias = _pad_outputs(bias)
    y = products.conv(
      a,
      layer.kernel,
      _epilogue(layer, bias, row_sums, residual),
      dtype=module.dtype or jnp.float32,
      interpret=_interpret(),
    )
    return y[..., :outputs]
  shape = (*a.shape[:-1], outputs)
  if row_sums is not None:
    row_sums = row_sums.reshape(-1)
  if residual is not None:
    residual = residual.reshape(-1, outputs)
  if bias is None:  # Layers with and without one share kernels.
    bias = jnp.zeros(outputs, module.dtype)
  if constant is not None:
    bias += constant.reshape(-1, outputs).astype(jnp.float32)
  epilogue = _epilogue(layer, bias, row_sums, residual)
  rows = a.reshape(-1, a.shape[-1])
  y = products.linear(rows, layer.kernel, epilogue, interpret=_interpret())
  return y.reshape(shape)


_METHODS: dict[str, Any] = {
  '__call__': _plus,
  'plus': _plus,
  'after_upsample': _after_upsample,
  'after_norm': _after_norm,
  'all_after_norm': _all_after_norm,
  'after_gate': _after_gate,
}
