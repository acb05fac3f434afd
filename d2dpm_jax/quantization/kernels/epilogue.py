"""What kernels share: what follows a sum of integers, and divisions."""

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


def divide(x: Array, by: int) -> tuple[Array, Array]:
  """Quotient and remainder of int32 that are not negative.

  `//` and `%` look after signs, and Triton cannot lower that.
  """
  n = jnp.asarray(by, x.dtype)
  return jax.lax.div(x, n), jax.lax.rem(x, n)
