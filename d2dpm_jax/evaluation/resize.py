"""The bilinear resize of TensorFlow 1, with its places of pixels."""

import jax
import jax.numpy as jnp
import numpy as np


def resize_bilinear_tf1(
  images: jax.Array, height: int, width: int
) -> jax.Array:
  """Resizes as `tf.image.resize_bilinear(align_corners=False)` did.

  Output pixel i lies at i * old / new: pixels have no half-pixel centres, the
  image moves towards the top left, and nothing is averaged when it shrinks.
  `jax.image.resize` and today's PyTorch and TensorFlow do otherwise.

  Source: `LegacyScaler` in tensorflow/tensorflow,
  tensorflow/core/util/image_resizer_state.h, and `compute_lerp` in
  tensorflow/core/kernels/image/resize_bilinear_op.cc; positions are float32
  there and here.

  Args:
    images: uint8 or float32[B,H,W,C].
    height: of the result.
    width: of the result.

  Returns:
    float32[B,height,width,C] in the range of `images`.
  """
  x = images.astype(jnp.float32)
  x = _interpolate(x, width, axis=2)
  return _interpolate(x, height, axis=1)


def _interpolate(x: jax.Array, size: int, axis: int) -> jax.Array:
  """Resamples one axis of float32[B,H,W,C]."""
  old = x.shape[axis]
  scale = np.float32(old) / np.float32(size)
  position = np.arange(size, dtype=np.float32) * scale
  low = np.floor(position).astype(np.int32)
  high = np.minimum(low + 1, old - 1)
  shape = [1, 1, 1, 1]
  shape[axis] = size
  fraction = (position - low.astype(np.float32)).reshape(shape)
  a = jnp.take(x, low, axis=axis, mode='clip')
  b = jnp.take(x, high, axis=axis, mode='clip')
  return a + (b - a) * fraction
