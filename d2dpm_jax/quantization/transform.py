"""Quantization of any Linen model from outside, by module path.

`quantize(model.apply)` is a function like `model.apply` with one argument
more: a pytree with the quantizers of the layers. Nothing in the model and
nothing global changes; the pytree can be jitted over, sharded and stored.

  layers = transform.list_layers(model.apply, variables, x)
  table = policy.build_policy(layers, rules)
  state = transform.init_state(variables, table)      # Nearest rounding.
  apply_q = jax.jit(transform.quantize(model.apply))  # Wrap first, then jit.
  y = apply_q(variables, state, x)

A function that was jitted before it is wrapped would ignore the interception
and return its cached, unquantized answer: wrap the plain `apply`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypedDict

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from d2dpm_jax.quantization import affine, packing
from d2dpm_jax.quantization.policy import Policy

Array = jax.Array
Variables = Mapping[str, Any]

LAYER_KINDS: dict[type[nn.Module], str] = {nn.Conv: 'conv', nn.Dense: 'dense'}


class LayerState(TypedDict):
  """Quantizers of one layer; None leaves that side in floating point."""

  weight: packing.Weight | None
  act: affine.QParams | None


# Path -> quantizers, for the quantized layers only. A pytree.
QuantState = dict[str, LayerState]


@dataclasses.dataclass(frozen=True)
class Layer:
  """A convolution or linear layer of a model.

  Attributes:
    path: '/'-joined module names.
    kind: 'conv' or 'dense'.
    kernel_shape: [H, W, I, O] of a convolution, [I, O] of a linear layer.
    input_shape: shape of the input at the first call.
    output_shape: shape of the output at the first call.
  """

  path: str
  kind: str
  kernel_shape: tuple[int, ...]
  input_shape: tuple[int, ...]
  output_shape: tuple[int, ...]


def layer_kind(module: nn.Module) -> str | None:
  """'conv', 'dense', or None for a module that is neither."""
  return next(
    (kind for cls, kind in LAYER_KINDS.items() if isinstance(module, cls)), None
  )


def path_of(module: nn.Module) -> str:
  """'/'-joined names from the module that was applied down to `module`."""
  return '/'.join(module.path)


def list_layers(
  apply: Callable[..., Any], variables: Variables, *args: Any, **kwargs: Any
) -> tuple[Layer, ...]:
  """Layers of a model in the order in which they run, without running it.

  Args:
    apply: plain (not jitted) Linen `apply`.
    variables: `{'params': ...}`; arrays or `jax.ShapeDtypeStruct`s.
    *args: the model's inputs; arrays or `jax.ShapeDtypeStruct`s.
    **kwargs: passed on as they are.

  Returns:
    Every nn.Conv and nn.Dense once, at its first call.
  """
  found: dict[str, Layer] = {}

  def interceptor(call, args, kwargs, context):
    out = call(*args, **kwargs)
    kind = layer_kind(context.module)
    path = path_of(context.module)
    if context.method_name == '__call__' and kind and path not in found:
      kernel = context.module.variables['params']['kernel']
      x = args[0] if args else kwargs['inputs']
      found[path] = Layer(path, kind, kernel.shape, x.shape, out.shape)
    return out

  def run(variables, args):
    with nn.intercept_methods(interceptor):
      return apply(variables, *args, **kwargs)

  jax.eval_shape(run, variables, args)
  return tuple(found.values())


def _kernel_key(path: str) -> tuple[str, ...]:
  return (*path.split('/'), 'kernel') if path else ('kernel',)


def get_kernel(params: Mapping[str, Any], path: str) -> Array:
  """Kernel of the layer at `path` ('' is the model itself).

  Raises:
    KeyError: there is no such layer.
  """
  node: Any = params
  for name in _kernel_key(path):
    if not isinstance(node, Mapping) or name not in node:
      raise KeyError(f'No kernel at {path!r} in params.')
    node = node[name]
  return node


def init_state(
  variables: Variables,
  policy: Policy,
  *,
  method: str = 'mse',
  per_channel: bool = True,
) -> QuantState:
  """Weights by nearest rounding; activations in floating point.

  Args:
    variables: `{'params': ...}`.
    policy: path -> bits.
    method: range search, a key of `affine.RANGE_METHODS`.
    per_channel: one grid per output channel instead of one per tensor.

  Returns:
    Quantizers of every layer that `policy` quantizes, 'act' being None.

  Raises:
    KeyError: a path of `policy` is not in `variables`.
    ValueError: an unknown `method`.
  """
  state: QuantState = {}
  for path, bits in policy.items():
    if bits is None:
      continue
    kernel = get_kernel(variables['params'], path)
    weight = None
    if bits.w is not None:
      weight = affine.nearest_weight(kernel, bits.w, method, per_channel)
    state[path] = LayerState(weight=weight, act=None)
  return state


def replace_kernels(
  variables: Variables, kernels: Mapping[str, Array]
) -> dict[str, Any]:
  """Copy of `variables` with other kernels at the given paths.

  Kernels that `drop_kernels` left out may be of any shape.

  Raises:
    KeyError: there is no kernel at a path.
    ValueError: a kernel has another shape.
  """
  flat: dict[tuple[str, ...], Any] = dict(
    traverse_util.flatten_dict(dict(variables['params']))
  )
  for path, kernel in kernels.items():
    key = _kernel_key(path)
    if key not in flat:
      raise KeyError(f'No kernel at {path!r} in params.')
    if flat[key].size and flat[key].shape != kernel.shape:
      raise ValueError(
        f'Quantized kernel {kernel.shape} does not fit {flat[key].shape} '
        f'of {path!r}.'
      )
    flat[key] = kernel
  return {**variables, 'params': traverse_util.unflatten_dict(flat)}


def drop_kernels(
  variables: Variables, paths: Collection[str]
) -> dict[str, Any]:
  """Copy of `variables` with float32[0] in place of some kernels.

  The structure stays the same; a model that is applied to it as it is fails.

  Raises:
    KeyError: there is no kernel at a path.
  """
  flat: dict[tuple[str, ...], Any] = dict(
    traverse_util.flatten_dict(dict(variables['params']))
  )
  for path in paths:
    get_kernel(variables['params'], path)
    flat[_kernel_key(path)] = np.zeros([0], np.float32)
  return {**variables, 'params': traverse_util.unflatten_dict(flat)}


def dequantize_variables(
  variables: Variables, state: QuantState
) -> dict[str, Any]:
  """Copy of `variables` whose kernels lie on their grids.

  Args:
    variables: `{'params': ...}`.
    state: quantizers; layers without 'weight' keep their kernel.

  Returns:
    Variables of the same structure, shapes and dtypes.

  Raises:
    KeyError: a path of `state` is not in `variables`.
    ValueError: codes and kernel differ in shape.
  """
  kernels = {}
  for path, layer in state.items():
    if layer['weight'] is not None:
      dtype = get_kernel(variables['params'], path).dtype
      weight = packing.unpack(layer['weight'])
      kernels[path] = affine.dequantize(weight, dtype)
  return replace_kernels(variables, kernels)


@contextlib.contextmanager
def intercept_inputs(
  change: Callable[[str, Array], Array], paths: Collection[str]
) -> Iterator[None]:
  """Within this context, layers at `paths` see `change(path, input)`."""

  def interceptor(call, args, kwargs, context):
    if context.method_name != '__call__' or not layer_kind(context.module):
      return call(*args, **kwargs)
    path = path_of(context.module)
    if path not in paths:
      return call(*args, **kwargs)
    if args:
      return call(change(path, args[0]), *args[1:], **kwargs)
    return call(**{**kwargs, 'inputs': change(path, kwargs['inputs'])})

  with nn.intercept_methods(interceptor):
    yield


def quantize(apply: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a Linen `apply` so that it runs with quantized layers.

  Args:
    apply: plain (not jitted) `model.apply`.

  Returns:
    `quantized_apply(variables, state, *args, **kwargs)`: like `apply`, but
    kernels of the layers in `state` are their dequantized codes and inputs of
    these layers are snapped to their grids. It can be jitted, differentiated
    and vmapped; other arrays of the same shapes do not compile again. It
    raises KeyError or ValueError for a state that does not fit `variables`.
  """

  def quantized_apply(
    variables: Variables, state: QuantState, *args: Any, **kwargs: Any
  ) -> Any:
    acts = {p: s['act'] for p, s in state.items() if s['act'] is not None}
    with intercept_inputs(lambda p, x: affine.fake_quant(x, acts[p]), acts):
      return apply(dequantize_variables(variables, state), *args, **kwargs)

  return quantized_apply


# What a side of a layer is stored as, and those of its fields that are static.
_CLASSES: dict[str, tuple[type, ...]] = {
  'weight': (affine.QWeight, packing.PackedWeight),
  'act': (affine.QParams,),
}
_STATIC = ('bits', 'inputs')
_ZERO_POINT = 'zero_point'


def pack_state(state: QuantState) -> QuantState:
  """The same quantizers with packed weights."""
  return {
    path: LayerState(
      weight=None if layer['weight'] is None else packing.pack(layer['weight']),
      act=layer['act'],
    )
    for path, layer in state.items()
  }


def state_to_arrays(state: QuantState) -> dict[str, dict[str, dict[str, Any]]]:
  """Plain nested dicts of arrays, bits included, for storing.

  Returns:
    path -> 'weight' / 'act' -> fields of `affine.QParams`, `affine.QWeight` or
    `packing.PackedWeight`; a side that is None is left out. Zero points are
    int16 where that holds them.
  """
  result = {}
  for path, layer in state.items():
    sides = {}
    for side in ('weight', 'act'):
      value = layer[side]
      if value is not None:
        fields = {f.name: getattr(value, f.name) for f in _fields(value)}
        for name in fields.keys() & set(_STATIC):
          fields[name] = np.asarray(fields[name], np.int32)
        fields[_ZERO_POINT] = _narrow(fields[_ZERO_POINT])
        sides[side] = fields
    result[path] = sides
  return result


def _narrow(zero_point: Any) -> Any:
  """The same numbers as int16, or the array itself if that is too small."""
  narrow = np.asarray(zero_point).astype(np.int16)
  return narrow if (narrow == np.asarray(zero_point)).all() else zero_point


def _fields(value: Any) -> tuple[dataclasses.Field, ...]:
  return dataclasses.fields(value)


def state_from_arrays(
  arrays: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> QuantState:
  """Inverse of `state_to_arrays`.

  Raises:
    ValueError: a side or a field is unknown or missing.
  """
  state: QuantState = {}
  for path, sides in arrays.items():
    layer: dict[str, Any] = {'weight': None, 'act': None}
    for side, value in sides.items():
      if side not in _CLASSES:
        raise ValueError(f'{path!r}: unknown entry {side!r}.')
      if value is not None:
        layer[side] = _from_fields(value, _CLASSES[side], f'{path!r}, {side!r}')
    state[path] = LayerState(weight=layer['weight'], act=layer['act'])
  return state


def _from_fields(
  value: Mapping[str, Any], classes: tuple[type, ...], where: str
) -> Any:
  """The one of some classes that has these fields."""
  names = {cls: {f.name for f in _fields(cls)} for cls in classes}
  for cls in classes:
    if set(value) == names[cls]:
      changed: dict[str, Any] = {
        k: int(v) for k, v in value.items() if k in _STATIC
      }
      affine.check_bits(changed['bits'])
      zero_point = value[_ZERO_POINT]
      if zero_point.dtype == np.int16:
        changed[_ZERO_POINT] = zero_point.astype(np.float32)
      return cls(**{**value, **changed})
  expected = ' or '.join(str(sorted(names[cls])) for cls in classes)
  raise ValueError(f'{where}: fields {sorted(value)}, expected {expected}.')
