"""The digit classifier whose features and labels judge MNIST samples."""

import hashlib
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from d2dpm_jax.evaluation.features import Activations, FeatureNet
from d2dpm_jax.runtime import weights

FEATURES = 128
CLASSES = 10
IMAGE_SHAPE = (32, 32, 1)


class DigitClassifier(nn.Module):
  """A small convolutional network: what Inception is to ImageNet samples."""

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    """Classifies digits.

    Args:
      images: float[B,32,32,1] in [-1, 1].

    Returns:
      'features' float[B,128] (after the last ReLU), 'spatial' float[B,8,8,7]
      (the first channels of the last but one convolution, for sFID) and
      'logits' float[B,10].
    """
    x = images
    for i, channels in enumerate((32, 32)):
      x = nn.relu(nn.Conv(channels, (3, 3), name=f'conv_{i}')(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Conv(64, (3, 3), name='conv_2')(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Conv(64, (3, 3), name='conv_3')(x))
    spatial = x[..., :7]
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    features = nn.relu(nn.Dense(FEATURES, name='features')(x))
    logits = nn.Dense(CLASSES, name='logits')(features)
    return {
      'features': features.astype(jnp.float32),
      'spatial': spatial.astype(jnp.float32),
      'logits': logits.astype(jnp.float32),
    }


def digit_net(path: pathlib.Path) -> FeatureNet:
  """The classifier as a feature network.

  Args:
    path: its weights, as --mode train writes them.

  Raises:
    FileNotFoundError: there are none.
    ValueError: they are damaged.
  """
  params, _ = weights.load_safetensors(path)

  def apply(params, images):
    images = images.astype(jnp.float32) / 127.5 - 1.0
    return Activations(**DigitClassifier().apply({'params': params}, images))

  def layers(params, images):
    images = images.astype(jnp.float32) / 127.5 - 1.0
    _, state = DigitClassifier().apply(
      {'params': params},
      images,
      capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
    )
    found = state['intermediates']
    return [nn.relu(found[f'conv_{i}']['__call__'][0]) for i in range(4)]

  digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
  return FeatureNet(
    'digits', digest, IMAGE_SHAPE, CLASSES, params, apply, layers
  )
