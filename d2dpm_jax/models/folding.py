"""What of a U-Net is the same in every sampling step, or for every pixel.

Projections of the timestep embedding depend on the timestep alone, and a
sampler knows all of its timesteps before it begins. Cross-attention to one
token is `to_out(to_v(token))` for every query, whatever the query: a softmax
over one key is 1. Both are computed once, by the layers of the network itself,
quantized or not, and put in place of these layers afterwards; what attention
would add, the layer before it does:

  constants = folding.compute(network, latent_shape, t, context)
  eps = folding.apply(network, row, by_image, x)   # In every step.

The numbers are the same; only the order of sums in a matrix product may
depend on how many rows it has, and fused kernels round a sum of three once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from d2dpm_jax.models.attention import CrossAttention

Array = jax.Array
Network = Callable[[Array, Array, Any], Array]  # (x, t, context) -> eps

_EMB_LAYER = 'emb_layers_1'  # Of a ResBlock.
# Of a BasicTransformerBlock. The first one's output layer can add a constant.
_BEFORE, _FOLDED = 'attn1', 'attn2'


class Constants(NamedTuple):
  """Outputs of modules, by path.

  Attributes:
    by_step: float[S, D] of the layers behind the timestep embedding.
    by_image: float[B, 1, D] of cross-attention to one token.
  """

  by_step: dict[str, Array]
  by_image: dict[str, Array]


def _is_emb_layer(module: nn.Module) -> bool:
  return isinstance(module, nn.Dense) and module.name == _EMB_LAYER


def _context(module: nn.Module, args: tuple[Any, ...]) -> Array | None:
  """What a module attends to, if it is cross-attention behind `_BEFORE`."""
  if not isinstance(module, CrossAttention) or module.name != _FOLDED:
    return None
  if len(args) < 2:
    return None
  return args[1]


def round_parameters(
  apply: Callable[..., Any], variables: dict[str, Any], *args: Any
) -> dict[str, Any]:
  """Kernels and biases in the dtype that their layers compute in.

  Layers round them to it in every call, and XLA does not move that out of a
  scan: it would be done in every step, for all weights.

  Args:
    apply: plain (not jitted) Linen `apply`.
    variables: `{'params': ...}`.
    *args: the model's inputs; arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    `variables` with which `apply` returns the same.
  """
  dtypes: dict[tuple[str, ...], Any] = {}

  def record(call, args, kwargs, at):
    if isinstance(at.module, nn.Conv | nn.Dense) and at.module.dtype:
      dtypes[at.module.path] = at.module.dtype
    return call(*args, **kwargs)

  def run(variables, args):
    with nn.intercept_methods(record):
      return apply(variables, *args)

  jax.eval_shape(run, variables, args)
  params = traverse_util.flatten_dict(variables['params'])
  rounded = {
    path: x.astype(dtypes.get(path[:-1], x.dtype)) for path, x in params.items()
  }
  return {**variables, 'params': traverse_util.unflatten_dict(rounded)}


def compute(
  network: Network,
  latent_shape: tuple[int, ...],
  t: Array,
  context: Array | None,
) -> Constants:
  """Runs what is constant; the rest of the network is dead code under jit.

  Args:
    network: applies a `UNet`; not jitted, it has to run in this trace.
    latent_shape: h, w, c.
    t: int[S], timesteps.
    context: float[B, L, D] or None; folded where L is 1.
  """
  found = Constants({}, {})

  def record(call, args, kwargs, at):
    path = '/'.join(at.module.path)
    if at.method_name != '__call__':
      return call(*args, **kwargs)
    if _is_emb_layer(at.module):
      found.by_step[path] = call(*args, **kwargs)
      return found.by_step[path]
    tokens = _context(at.module, args)
    if tokens is None:
      return call(*args, **kwargs)
    x = args[0]
    if tokens.shape[1] == 1:
      query = jnp.zeros([len(tokens), 1, x.shape[-1]], x.dtype)
      found.by_image[path] = call(query, tokens)
    return jnp.zeros_like(x)  # Of S timesteps, not of B images.

  with nn.intercept_methods(record):
    network(jnp.zeros([len(t), *latent_shape]), t, context)
  return found


def apply(
  network: Network,
  constants: Constants,
  x: Array,
  t: Array,
  context: Array | None,
) -> Array:
  """The network with constants in place of what they were computed by.

  Args:
    network: that of `compute`.
    constants: one row of each `by_step`, float[D]; `by_image` of the images in
      `x`. Modules that are in neither run as ever.
    x: float[B, H, W, C].
    t: int[B]; has no effect where `by_step` holds the timestep's row.
    context: float[B, L, D] or None; likewise.

  Returns:
    eps, as the network does.
  """

  def replace(call, args, kwargs, at):
    if at.method_name != '__call__':
      return call(*args, **kwargs)
    *above, name = at.module.path or ('',)
    path = '/'.join(at.module.path)
    if path in constants.by_step:
      row = constants.by_step[path]
      return jnp.broadcast_to(row, (len(args[0]), *row.shape))
    if path in constants.by_image:
      return jnp.zeros_like(args[0])  # `_BEFORE` has added it.
    after = constants.by_image.get('/'.join([*above, _FOLDED]))
    if name == _BEFORE and after is not None:
      kwargs = {**kwargs, 'constant': after}
    return call(*args, **kwargs)

  with nn.intercept_methods(replace):
    return network(x, t, context)
