"""What follows a sum of integers: corrections, scale, bias, residual."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def rescale(
  total: Array,
  scale: Array,
  bias: Array,
  sums: Array | None = None,
  shift: Array | None = None,
  correction: Array | None = None,
  residual: Array | None = None,
) -> Array:
  """`(total + sums * shift + correction) * scale + bias + residual`.

  In int32 until the scale, in float32 from there on.

  Args:
    total: int32[.., N].
    scale: float32, broadcasts to `total`, as all that follow.
    bias: float32.
    sums: int32, sums of inputs; with `shift` only.
    shift: int32, B of `integer`.
    correction: int32.
    residual: float.

  Returns:
    float32[.., N].
  """
  if sums is not None and shift is not None:
    total += sums * shift
  if correction is not None:
    total += correction
  y = total.astype(jnp.float32) * scale + bias
  return y if residual is None else y + residual.astype(jnp.float32)
