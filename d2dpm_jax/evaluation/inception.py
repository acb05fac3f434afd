"""The InceptionV3 of 5 December 2015, which FID, sFID and IS are defined by.

It differs from the InceptionV3 of the paper and of torchvision: averages leave
padding out, the last block pools by maximum, there are 1008 classes, and images
are resized as TensorFlow 1 did. Modules have the names of pytorch-fid's state
dict, so that `Mixed_5b.branch1x1.conv.weight` is
`Mixed_5b/branch1x1/conv/kernel`.

Why it is not the one of the package `fidjax`: see docs/evaluate.md.

Source: arXiv:1512.00567; pytorch-fid, src/pytorch_fid/inception.py, for the
blocks; openai/guided-diffusion, evaluations/evaluator.py, for the outputs.
Letters: `B` batch, `H W` space, `C` channels, `I O` kernel in and out.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from d2dpm_jax.evaluation import resize

FEATURES = 2048
CLASSES = 1008
SIZE = 299
# Channels of Mixed_6d/branch1x1 that sFID looks at: 17 * 17 * 7 = 2023 numbers.
SPATIAL_CHANNELS = 7
# Float32 on every device. The default would round products to TF32 on GPUs and
# to bfloat16 on TPUs, and features with them.
_PRECISION = 'highest'


class BatchNorm(nn.Module):
  """A batch norm of fixed statistics, as the factor and shift that it is."""

  features: int
  epsilon: float = 1e-3

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    """float32[C] each: what to multiply with, and what to add then."""
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale = self.param('scale', ones, (self.features,))
    bias = self.param('bias', zeros, (self.features,))
    mean = self.param('mean', zeros, (self.features,))
    var = self.param('var', ones, (self.features,))
    factor = scale / jnp.sqrt(var + self.epsilon)
    return factor, bias - mean * factor


class Kernel(nn.Module):
  """The kernel of a convolution or of a linear layer."""

  shape: Sequence[int]

  @nn.compact
  def __call__(self) -> jax.Array:
    """float32[..., I, O]."""
    return self.param('kernel', nn.initializers.he_normal(), self.shape)


class BasicConv2d(nn.Module):
  """Convolution without bias, batch norm, ReLU.

  Attributes:
    features: output channels.
    kernel: its height and width, or both.
    stride: step in both directions.
    padding: 'VALID', or 'SAME' for odd kernels of stride 1, where TensorFlow
      and PyTorch agree.
  """

  features: int
  kernel: int | tuple[int, int] = 1
  stride: int = 1
  padding: str = 'VALID'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float32[B,H,W,C] -> float32[B,h,w,features]."""
    size = self.kernel
    height, width = size if isinstance(size, tuple) else (size, size)
    shape = (height, width, x.shape[-1], self.features)
    kernel = Kernel(shape, name='conv')()
    factor, shift = BatchNorm(self.features, name='bn')()
    # In the kernel the factor costs nothing, and XLA fuses shift and ReLU.
    x = jax.lax.conv_general_dilated(
      x,
      kernel * factor,
      (self.stride, self.stride),
      self.padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=_PRECISION,
    )
    return nn.relu(x + shift)


def _average_pool(x: jax.Array) -> jax.Array:
  """Means over 3 x 3 pixels, of those that are inside the image."""
  total = jax.lax.reduce_window(
    x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), 'SAME'
  )
  rows, columns = (_neighbours(size) for size in x.shape[1:3])
  count = rows[:, None, None] * columns[:, None]
  return total / count


def _neighbours(size: int) -> np.ndarray:
  """How many of pixels i - 1, i and i + 1 there are, for each i."""
  return np.convolve(np.ones(size, np.float32), np.ones(3), 'same').astype(
    np.float32
  )


def _max_pool(x: jax.Array) -> jax.Array:
  """Maxima over 3 x 3 pixels; as large as before."""
  return nn.max_pool(x, (3, 3), padding='SAME')


def _reduce(x: jax.Array) -> jax.Array:
  """Maxima over 3 x 3 pixels, every second of those inside the image."""
  return nn.max_pool(x, (3, 3), (2, 2))


class InceptionA(nn.Module):
  """Of the 35 x 35 pixels; `pool_features` channels come from the average."""

  pool_features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a = _conv('branch1x1', 64)(x)
    b = _conv('branch5x5_1', 48)(x)
    b = _conv('branch5x5_2', 64, 5)(b)
    c = _conv('branch3x3dbl_1', 64)(x)
    c = _conv('branch3x3dbl_2', 96, 3)(c)
    c = _conv('branch3x3dbl_3', 96, 3)(c)
    d = _conv('branch_pool', self.pool_features)(_average_pool(x))
    return jnp.concatenate([a, b, c, d], axis=-1)


class InceptionB(nn.Module):
  """From 35 x 35 to 17 x 17 pixels."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a = _conv('branch3x3', 384, 3, stride=2)(x)
    b = _conv('branch3x3dbl_1', 64)(x)
    b = _conv('branch3x3dbl_2', 96, 3)(b)
    b = _conv('branch3x3dbl_3', 96, 3, stride=2)(b)
    return jnp.concatenate([a, b, _reduce(x)], axis=-1)


class InceptionC(nn.Module):
  """Of the 17 x 17 pixels; `inner` channels between its long kernels."""

  inner: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a = _conv('branch1x1', 192)(x)
    b = _conv('branch7x7_1', self.inner)(x)
    b = _conv('branch7x7_2', self.inner, (1, 7))(b)
    b = _conv('branch7x7_3', 192, (7, 1))(b)
    c = _conv('branch7x7dbl_1', self.inner)(x)
    c = _conv('branch7x7dbl_2', self.inner, (7, 1))(c)
    c = _conv('branch7x7dbl_3', self.inner, (1, 7))(c)
    c = _conv('branch7x7dbl_4', self.inner, (7, 1))(c)
    c = _conv('branch7x7dbl_5', 192, (1, 7))(c)
    d = _conv('branch_pool', 192)(_average_pool(x))
    return jnp.concatenate([a, b, c, d], axis=-1)


class InceptionD(nn.Module):
  """From 17 x 17 to 8 x 8 pixels."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a = _conv('branch3x3_1', 192)(x)
    a = _conv('branch3x3_2', 320, 3, stride=2)(a)
    b = _conv('branch7x7x3_1', 192)(x)
    b = _conv('branch7x7x3_2', 192, (1, 7))(b)
    b = _conv('branch7x7x3_3', 192, (7, 1))(b)
    b = _conv('branch7x7x3_4', 192, 3, stride=2)(b)
    return jnp.concatenate([a, b, _reduce(x)], axis=-1)


class InceptionE(nn.Module):
  """Of the 8 x 8 pixels; the two that there are differ in how they `pool`."""

  pool: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    a = _conv('branch1x1', 320)(x)
    b = _conv('branch3x3_1', 384)(x)
    b1 = _conv('branch3x3_2a', 384, (1, 3))(b)
    b2 = _conv('branch3x3_2b', 384, (3, 1))(b)
    c = _conv('branch3x3dbl_1', 448)(x)
    c = _conv('branch3x3dbl_2', 384, 3)(c)
    c1 = _conv('branch3x3dbl_3a', 384, (1, 3))(c)
    c2 = _conv('branch3x3dbl_3b', 384, (3, 1))(c)
    d = _conv('branch_pool', 192)(self.pool(x))
    return jnp.concatenate([a, b1, b2, c1, c2, d], axis=-1)


def _conv(
  name: str, features: int, kernel: int | tuple[int, int] = 1, stride: int = 1
) -> BasicConv2d:
  """A convolution that keeps the size if it has stride 1."""
  padding = 'SAME' if stride == 1 else 'VALID'
  return BasicConv2d(features, kernel, stride, padding, name=name)


class InceptionV3(nn.Module):
  """The feature network of FID."""

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    """Looks at images, each for itself.

    Args:
      images: uint8[B,H,W,3], RGB, of any size.

    Returns:
      'features' float32[B,2048]: the means over the last block, `pool_3` of
      OpenAI's evaluator.
      'spatial' float32[B,17,17,7]: the first channels of `mixed_6/conv`
      (Mixed_6d/branch1x1 after its ReLU); `reshape(B, 2023)` gives its order.
      'logits' float32[B,1008]: class scores without bias, as the inception
      score of the evaluator and of torch-fidelity takes them.

    Raises:
      ValueError: images of another type or shape.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise ValueError(
        f'InceptionV3 takes uint8[B, H, W, 3] from 0 to 255, not '
        f'{images.dtype}{list(images.shape)}.'
      )
    # 128, not 127.5: the whole range is -1 to 0.992.
    x = (resize.resize_bilinear_tf1(images, SIZE, SIZE) - 128) / 128
    x = BasicConv2d(32, 3, 2, name='Conv2d_1a_3x3')(x)
    x = BasicConv2d(32, 3, name='Conv2d_2a_3x3')(x)
    x = _conv('Conv2d_2b_3x3', 64, 3)(x)
    x = _reduce(x)
    x = _conv('Conv2d_3b_1x1', 80)(x)
    x = BasicConv2d(192, 3, name='Conv2d_4a_3x3')(x)
    x = _reduce(x)
    x = InceptionA(32, name='Mixed_5b')(x)
    x = InceptionA(64, name='Mixed_5c')(x)
    x = InceptionA(64, name='Mixed_5d')(x)
    x = InceptionB(name='Mixed_6a')(x)
    x = InceptionC(128, name='Mixed_6b')(x)
    x = InceptionC(160, name='Mixed_6c')(x)
    x = InceptionC(160, name='Mixed_6d')(x)
    spatial = x[..., :SPATIAL_CHANNELS]  # branch1x1 comes first.
    x = InceptionC(192, name='Mixed_6e')(x)
    x = InceptionD(name='Mixed_7a')(x)
    x = InceptionE(_average_pool, name='Mixed_7b')(x)
    x = InceptionE(_max_pool, name='Mixed_7c')(x)
    features = x.mean(axis=(1, 2))
    classes = Kernel((FEATURES, CLASSES), name='fc')()
    logits = jnp.dot(features, classes, precision=_PRECISION)
    return {'features': features, 'spatial': spatial, 'logits': logits}


def parameter_shapes() -> dict[str, tuple[int, ...]]:
  """Path -> shape of every parameter, all float32; computes nothing."""
  images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)
  variables = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)
  flat = traverse_util.flatten_dict(variables['params'], sep='/')
  return {path: leaf.shape for path, leaf in flat.items()}
