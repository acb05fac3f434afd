"""The digit classifier whose features and labels judge MNIST samples."""

import flax.linen as nn
import jax
import jax.numpy as jnp

FEATURES = 128


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
    logits = nn.Dense(10, name='logits')(features)
    return {
      'features': features.astype(jnp.float32),
      'spatial': spatial.astype(jnp.float32),
      'logits': logits.astype(jnp.float32),
    }
