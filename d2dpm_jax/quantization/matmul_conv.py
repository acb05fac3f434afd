"""Convolutions as matrix products, where the compiler's own are slow.

XLA's CPU backend runs the gradient of a convolution that stands in a loop 20
to 40 times slower than the same gradient outside of one (JAX 0.10 and 0.11).
The optimisation loops of reconstruction consist of such gradients. As shifted
slices and one product, which is all that a convolution is, they run at full
speed. Numbers differ by the order of summation only.
"""

import contextlib
import itertools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def conv(
  x: Array,
  kernel: Array,
  strides: tuple[int, int],
  padding: tuple[tuple[int, int], tuple[int, int]],
) -> Array:
  """2-d convolution as one matrix product.

  Args:
    x: float[B,H,W,I].
    kernel: float[h,w,I,O].
    strides: of rows and columns.
    padding: zeros before and after, of rows and columns.

  Returns:
    float[B,H',W',O], as `lax.conv_general_dilated` gives in NHWC.
  """
  h, w, channels, out = kernel.shape
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  rows = (x.shape[1] - h) // strides[0] + 1
  columns = (x.shape[2] - w) // strides[1] + 1
  patches = [
    x[
      :,
      i : i + (rows - 1) * strides[0] + 1 : strides[0],
      j : j + (columns - 1) * strides[1] + 1 : strides[1],
    ]
    for i, j in itertools.product(range(h), range(w))
  ]
  patches = jnp.concatenate(patches, -1)
  y = patches.reshape(-1, h * w * channels) @ kernel.reshape(-1, out)
  return y.reshape(x.shape[0], rows, columns, out)


def _pairs(padding: object) -> tuple[tuple[int, int], ...] | None:
  """Explicit 2-d padding as pairs of ints, or None for any other kind."""
  if not isinstance(padding, list | tuple) or len(padding) != 2:
    return None
  pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
  return tuple(pairs)


def _ones(values: int | tuple[int, ...] | None) -> bool:
  values = (values,) if isinstance(values, int | None) else values
  return all(v in (None, 1) for v in values)


@contextlib.contextmanager
def fast_gradients() -> Iterator[None]:
  """Within this context nn.Conv suits a loop of gradients on this backend.

  To be entered before other interceptors, so that it is the innermost of them.
  Convolutions that are not plain (groups, dilation, 'SAME' padding) stay.
  """
  if jax.default_backend() != 'cpu':
    yield
    return

  def interceptor(call, args, kwargs, context):
    module = context.module
    if type(module) is not nn.Conv or context.method_name != '__call__':
      return call(*args, **kwargs)
    padding = _pairs(module.padding)
    kernel = module.variables['params']['kernel']
    plain = (
      module.feature_group_count == 1
      and _ones(module.input_dilation)
      and _ones(module.kernel_dilation)
    )
    if padding is None or kernel.ndim != 4 or not plain or kwargs:
      return call(*args, **kwargs)
    strides = module.strides or 1
    strides = (strides,) * 2 if isinstance(strides, int) else strides
    x = args[0].astype(module.dtype or kernel.dtype)
    y = conv(x, kernel.astype(x.dtype), strides, padding)
    if module.use_bias:
      y = y + module.variables['params']['bias'].astype(y.dtype)
    return y

  with nn.intercept_methods(interceptor):
    yield
