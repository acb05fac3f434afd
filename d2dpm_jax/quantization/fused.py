"""Layers on integers by kernels that do more than one layer at once.

Between integer layers lie norms, SiLU, gates, residuals and quantization, all
bound by memory. Here a product rescales, adds its residual and writes bfloat16,
or codes if a gate follows; a norm writes the padded codes of the convolution
behind it. The layers say what they do together (`layers.Conv.after_norm`,
..), and these are the same steps in fewer kernels; numbers differ from them in
how often they are rounded to bfloat16, and in last bits of exp and division.

Kernels: `d2dpm_jax/quantization/kernels`, for NVIDIA Hopper, where layers
compute in bfloat16, on shapes that fit tiles. All else falls back to `integer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from d2dpm_jax.models import layers as modules
from d2dpm_jax.quantization import integer, transform
from d2dpm_jax.quantization.integer import IntegerLayer
from d2dpm_jax.quantization.kernels import norm, products

Array = jax.Array


@flax.struct.dataclass
class FusedLayer:
  """A layer as kernels take it.

  Attributes:
    plain: the same layer for XLA, where a shape does not fit.
    kernel: int8[O, K], k of `integer`, K = KH KW I.
    shift: int32[O], B, or None.
    correction: int32[O], or None.
    grid: float32[4] of the input, see `norm.grid_numbers`.
  """

  plain: IntegerLayer
  kernel: Array
  shift: Array | None
  correction: Array | None
  grid: Array

  @property
  def is_3x3(self) -> bool:
    return self.plain.kernel.ndim == 4 and self.plain.kernel.shape[0] == 3


def ready(layer: IntegerLayer) -> FusedLayer | IntegerLayer:
  """From what `integer.ready` returns; that itself, if no kernel takes it."""
  kernel = layer.kernel
  if layer.floats or (layer.corrected and not layer.zero_code):
    return layer
  if kernel.ndim == 4 and kernel.shape[:2] not in ((1, 1), (3, 3)):
    return layer
  if not products.fit(products.LEAST_ROWS, layer.inputs, kernel.shape[-1]):
    return layer
  shift, correction = layer.shift, layer.correction
  if shift is not None:
    shift = jnp.broadcast_to(shift.astype(jnp.int32), kernel.shape[-1:])
  offset = integer.act_offset(layer)
  act = layer.act
  return FusedLayer(
    plain=layer,
    kernel=products.kernel_layout(kernel),
    shift=shift,
    correction=None if correction is None else correction.reshape(-1),
    grid=norm.grid_numbers(1 / act.scale, act.zero_point, offset, act.bits),
  )


def _interpreted() -> bool:
  """Kernels run on CPUs in tests only, and there they are interpreted."""
  return jax.default_backend() == 'cpu'


def _interpret() -> Any:
  return plgpu.InterpretGPUParams() if _interpreted() else None


def run(
  module: nn.Module,
  method: str,
  layers: Mapping[str, IntegerLayer | FusedLayer],
  *args: Any,
  **kwargs: Any,
) -> Array | None:
  """A method of `layers.Conv` or `layers.Dense`; None if no kernel does it.

  Args:
    module: bound; its layer is a FusedLayer.
    method: its name.
    layers: of the network, by path.
    *args: of the method.
    **kwargs: of the method.
  """
  layer = layers[transform.path_of(module)]
  assert isinstance(layer, FusedLayer)
  if module.dtype != jnp.bfloat16 or method not in _METHODS:
    return None
  if method == 'after_gate':
    return _after_gate(module, layer, layers, *args, **kwargs)
  return _METHODS[method](module, layer, *args, **kwargs)


def _plus(
  module: nn.Module, layer: FusedLayer, x: Array, residual: Array | None = None
) -> Array | None:
  """The layer itself, with a residual or without."""
  if not _fits(module, layer, x.shape, residual):
    return None
  a = integer.input_operand(layer.plain, x)
  if layer.is_3x3:
    ends = [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)]
    zero = (-integer.act_shift(layer.plain)).astype(jnp.int8)
    a = jax.lax.pad(a, zero, ends)
  return _product(module, layer, a, residual)


def _after_norm(
  module: nn.Module,
  layer: FusedLayer,
  group_norm: modules.GroupNorm32,
  x: Array,
  offset: Array | float = 0.0,
  *,
  silu: bool = True,
  residual: Array | None = None,
) -> Array | None:
  if (
    x.ndim != 4
    or not layer.plain.zero_code
    or not _fits(module, layer, x.shape, residual)
  ):
    return None
  params = group_norm.variables['params']
  offset = jnp.asarray(offset, jnp.float32)
  mean, variance = modules.group_moments(x, group_norm.num_groups, offset)
  gain = jax.lax.rsqrt(variance + group_norm.epsilon) * params['scale']
  start = params['bias'] - (mean - offset) * gain
  a = norm.norm_silu_quantize(
    x,
    gain.reshape(-1, x.shape[-1]),
    start.reshape(-1, x.shape[-1]),
    layer.grid,
    silu=silu,
    padding=1 if layer.is_3x3 else 0,
    interpret=_interpreted(),
  )
  return _product(module, layer, a, residual)


def _after_gate(
  module: nn.Module,
  layer: FusedLayer,
  layers: Mapping[str, IntegerLayer | FusedLayer],
  gate: nn.Module,
  x: Array,
  residual: Array,
) -> Array | None:
  path = f'{transform.path_of(gate)}/proj'
  first = layers.get(path)
  inner = (*x.shape[:-1], layer.plain.inputs)
  if (
    not isinstance(first, FusedLayer)
    or not products.fit_gated(
      math.prod(x.shape[:-1]), x.shape[-1], len(first.kernel)
    )
    or not _fits(module, layer, inner, residual)
  ):
    return None
  a = integer.input_operand(first.plain, x)
  bias = gate.variables['params']['proj'].get('bias')
  epilogue = _epilogue(first, bias)._replace(grid=layer.grid)
  codes = products.gated(
    a.reshape(-1, x.shape[-1]),
    first.kernel,
    epilogue,
    interpret=_interpret(),
  )
  return _product(module, layer, codes.reshape(inner), residual)


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
  if residual is not None and residual.dtype != jnp.bfloat16:
    return False
  if isinstance(module, nn.Conv):
    padding = ((1, 1), (1, 1)) if layer.is_3x3 else ((0, 0), (0, 0))
    if integer.geometry(module, shape) != ((1, 1), padding):
      return False
  if layer.is_3x3:
    return products.fit_conv(shape[:-1], inputs, outputs)
  return products.fit(math.prod(shape[:-1]), inputs, outputs)


def _epilogue(
  layer: FusedLayer, bias: Array | None, residual: Array | None = None
) -> products.Epilogue:
  return products.Epilogue(
    scale=layer.plain.scale,
    bias=bias,
    shift=layer.shift,
    correction=layer.correction,
    residual=residual,
  )


def _product(
  module: nn.Module, layer: FusedLayer, a: Array, residual: Array | None
) -> Array:
  """The layer of codes, which are padded for a 3x3 convolution."""
  bias = module.variables.get('params', {}).get('bias')
  if layer.is_3x3:
    epilogue = _epilogue(layer, bias, residual)
    return products.conv(a, layer.kernel, epilogue, interpret=_interpret())
  shape = (*a.shape[:-1], len(layer.kernel))
  if residual is not None:
    residual = residual.reshape(-1, shape[-1])
  epilogue = _epilogue(layer, bias, residual)
  rows = a.reshape(-1, a.shape[-1])
  y = products.linear(rows, layer.kernel, epilogue, interpret=_interpret())
  return y.reshape(shape)


_METHODS: dict[str, Any] = {
  '__call__': _plus,
  'plus': _plus,
  'after_norm': _after_norm,
  'after_gate': _after_gate,
}
