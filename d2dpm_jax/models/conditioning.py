"""What the U-Net is told besides the noisy latent."""

import flax.linen as nn
import jax


class ClassEmbedder(nn.Module):
  """One token per class label.

  Source: `ClassEmbedder` in CompVis/latent-diffusion,
  ldm/modules/encoders/modules.py.
  """

  num_classes: int  # The last one is the null class, 'no condition'.
  embed_dim: int

  @nn.compact
  def __call__(self, labels: jax.Array) -> jax.Array:
    """Maps int[B], 0..num_classes-1, to float32[B, 1, embed_dim]."""
    embed = nn.Embed(
      self.num_classes,
      self.embed_dim,
      embedding_init=nn.initializers.normal(1.0),
      name='embedding',
    )
    return embed(labels)[:, None, :]
