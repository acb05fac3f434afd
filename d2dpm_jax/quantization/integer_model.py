"""Runs a quantized network on integers.

  layers = integer.prepare(state)  # Once, from quantizers of `transform`.
  apply_i = jax.jit(integer_model.apply(model.apply))  # Wrap first, then jit.
  y = apply_i(integer_model.without_kernels(variables, layers), layers, x)

Called many times in one program, `ready(layers)` is what `apply_i` is given.
Layers are run by XLA (`integer`), or where `integer.prepare` was told so and
they fit and are `ready`, by kernels that do more than one layer at once
(`fused`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from d2dpm_jax.quantization import fused, integer, transform
from d2dpm_jax.quantization.integer import IntegerLayer, IntegerState

Array = jax.Array


def run_layer(
  module: nn.Conv | nn.Dense, layer: IntegerLayer, x: Array
) -> Array:
  """What a bound nn.Conv or nn.Dense returns for `x`, on integers by XLA.

  Raises:
    ValueError: the module has what integer execution does not know, or `x`
      does not fit.
  """
  path = transform.path_of(module)
  dtype = module.dtype or jnp.result_type(x.dtype, module.param_dtype)
  try:
    if isinstance(module, nn.Conv):
      total = integer.conv(layer, x, *integer.geometry(module, x.shape), dtype)
    else:
      total = integer.dense(layer, x, dtype)
  except ValueError as error:
    raise ValueError(f'Layer {path!r} on integers: {error}') from error
  bias = module.variables.get('params', {}).get('bias')
  return integer.rescale(layer, total, bias, dtype)


Layers = dict[str, IntegerLayer | fused.FusedLayer | transform.LayerState]


def ready(layers: IntegerState) -> Layers:
  """What follows from codes, computed once for many calls of a network.

  See `integer.ready` and `fused.ready`. Inside a program, so that it takes no
  memory between its calls.
  """

  def one(layer):
    if not isinstance(layer, IntegerLayer):
      return layer
    layer = integer.ready(layer)
    return fused.ready(layer) if layer.fused else layer

  return {path: one(layer) for path, layer in layers.items()}


def plain(layers: Layers) -> Layers:
  """The same layers for XLA alone."""
  return {
    path: layer.plain if isinstance(layer, fused.FusedLayer) else layer
    for path, layer in layers.items()
  }


def _run(
  layers: Mapping[str, IntegerLayer | fused.FusedLayer],
  call: Callable[..., Any],
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  context: nn.module.InterceptorContext,
) -> Any:
  """A method of a module in `layers`, or what it is without that."""
  module, method = context.module, context.method_name
  layer = layers.get(transform.path_of(module))
  if layer is None:
    return call(*args, **kwargs)
  if isinstance(layer, fused.FusedLayer):
    found = fused.run(module, method, layers, *args, **kwargs)
    if found is not None:
      return found
    layer = layer.plain
  if method != '__call__' or not isinstance(module, nn.Conv | nn.Dense):
    return call(*args, **kwargs)
  return run_layer(module, layer, args[0] if args else kwargs['inputs'])


def apply(model_apply: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a Linen `apply` so that its layers run on integers.

  Args:
    model_apply: plain (not jitted) `model.apply`.

  Returns:
    `integer_apply(variables, layers, *args, **kwargs)`: like `model_apply`.
    `layers` are those of `integer.prepare`, or of `ready`, which fused kernels
    ask for. Layers that run on
    integers do not look at their kernels, see `without_kernels`. Others in
    `layers` run as in `transform.quantize`.
  """

  def integer_apply(
    variables: Mapping[str, Any],
    layers: IntegerState | Layers,
    *args: Any,
    **kwargs: Any,
  ) -> Any:
    integers: dict[str, IntegerLayer | fused.FusedLayer] = {}
    rest: transform.QuantState = {}
    for path, layer in layers.items():
      if isinstance(layer, IntegerLayer | fused.FusedLayer):
        integers[path] = layer
      else:
        rest[path] = layer

    def interceptor(call, args, kwargs, context):
      return _run(integers, call, args, kwargs, context)

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
