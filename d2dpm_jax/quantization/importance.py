"""How much the elements of a unit's output matter to the network's output.

Source: arXiv:2102.05426 (BRECQ), Sec. 3.3: the Hessian of the loss with
respect to a unit's output, approximated by the diagonal of the Fisher
information. The loss here is the squared error of the network's output: a
noise estimate has no classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from d2dpm_jax.quantization import units
from d2dpm_jax.quantization.policy import LayerBits, Policy

Array = jax.Array


def squared_gradients(
  apply: Callable[..., Any],
  policy: Policy,
  block_types: Sequence[str],
  index: int,
  variables: Any,
  quantized: Any,
  inputs: Any,
) -> dict[tuple[int, ...], Array]:
  """Squared gradient of the output error with respect to a unit's output.

  One program serves all units of a network.

  Args:
    apply: plain (not jitted) Linen `apply`.
    policy: path -> bits, which says what units there are.
    block_types: class names of blocks.
    index: of the unit in `units.list_units`.
    variables: of the network at full precision.
    quantized: the same, but for the kernels of the unit.
    inputs: of the network, B samples.

  Returns:
    Shape of one sample of the unit's output -> float32[B, *shape].
  """
  table = tuple((p, bits) for p, bits in policy.items() if bits is not None)
  grads = _gradients(
    apply,
    table,
    tuple(block_types),
    variables,
    quantized,
    jnp.int32(index),
    tuple(inputs),
  )
  return {shape[1:]: jnp.square(grad) for shape, grad in grads.items()}


@functools.partial(jax.jit, static_argnames=('apply', 'table', 'block_types'))
def _gradients(
  apply: Callable[..., Any],
  table: tuple[tuple[str, LayerBits], ...],
  block_types: tuple[str, ...],
  variables: Any,
  quantized: Any,
  selected: Array,
  inputs: Any,
) -> dict[tuple[int, ...], Array]:
  """Gradients at the outputs of the unit `selected`, by their shape."""
  walker = units.Walker(dict(table), block_types)

  def run(shift: Callable[[Array], Array]) -> Any:
    """The output with `shift` of the selected unit's output added to it."""
    order: dict[str, int] = {}

    def on_unit(unit, module, call, args, kwargs):
      number = order.setdefault(unit.path, len(order))
      return jax.tree.map(
        lambda x: x + jnp.where(selected == number, shift(x), 0),
        call(*args, **kwargs),
      )

    return walker.walk(apply, quantized, inputs, on_unit)

  shapes: dict[tuple[int, ...], Any] = {}

  def record(x):
    shapes[x.shape] = x.dtype
    return jnp.zeros_like(x)

  jax.eval_shape(lambda: run(record))
  want = apply(variables, *inputs)

  def loss(shifts):
    got = run(lambda x: shifts[x.shape])
    errors = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), got, want)
    return jnp.sum(jnp.stack(jax.tree.leaves(errors)))

  return jax.grad(loss)({s: jnp.zeros(s, d) for s, d in shapes.items()})
