"""The U-Net of latent diffusion (arXiv:2112.10752), all published variants.

Source: `UNetModel` in CompVis/latent-diffusion,
ldm/modules/diffusionmodules/openaimodel.py. Module names are those of the
PyTorch state dict with `.N` written `_N`, so `input_blocks.1.0.in_layers.2` is
`input_blocks_1_0/in_layers_2`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from d2dpm_jax.models import layers
from d2dpm_jax.models.attention import SpatialTransformer


class Upsample(nn.Module):
  """Nearest-neighbour doubling, then a 3 x 3 convolution."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to float[B, 2H, 2W, C]."""
    x = layers.upsample_nearest(x)
    return layers.conv(x.shape[-1], dtype=self.dtype, name='conv')(x)


class Downsample(nn.Module):
  """A 3 x 3 convolution of stride 2, padded by one on every side."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to float[B, H/2, W/2, C]."""
    op = layers.conv(x.shape[-1], stride=2, dtype=self.dtype, name='op')
    return op(x)


class ResBlock(nn.Module):
  """Two convolutions with the timestep embedding between, and a residual.

  Calling it depends on its arguments and parameters alone, so one block can be
  applied by itself: `block.clone(parent=None, name=None).apply(...)`.
  """

  out_channels: int
  use_scale_shift_norm: bool = False  # The embedding scales and shifts.
  resample: str = ''  # 'up', 'down' or '' for the same resolution.
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
    """Maps an image to an image.

    Args:
      x: float[B, H, W, C].
      emb: float[B, D] timestep embedding.

    Returns:
      float[B, H, W, out_channels] in the compute dtype; H and W are doubled or
      halved where `resample` says so.
    """
    resample = {
      '': lambda a: a,
      'up': layers.upsample_nearest,
      'down': layers.average_pool,
    }[self.resample]
    conv = functools.partial(layers.conv, self.out_channels, dtype=self.dtype)
    x = x.astype(self.dtype)

    norm = layers.GroupNorm32(name='in_layers_0')
    first = conv(name='in_layers_2')
    if self.resample:
      h = first(resample(nn.silu(norm(x))))
      x = resample(x)
    else:
      h = first.after_norm(norm, x)

    width = self.out_channels * (2 if self.use_scale_shift_norm else 1)
    emb = nn.Dense(width, dtype=self.dtype, name='emb_layers_1')(nn.silu(emb))
    emb = emb[:, None, None, :]
    norm = layers.GroupNorm32(name='out_layers_0')
    second = conv(zero_init=True, name='out_layers_3')
    if x.shape[-1] != self.out_channels:
      x = conv(1, name='skip_connection')(x)
    if self.use_scale_shift_norm:
      scale, shift = jnp.split(emb, 2, axis=-1)
      return second.plus(nn.silu(norm(h) * (1 + scale) + shift), x)
    return second.after_norm(norm, h, emb, residual=x)


class AttentionBlock(nn.Module):
  """Self-attention over pixels in the head order of LDM's legacy attention."""

  num_heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to the same shape."""
    b, h, w, c = x.shape
    if c % self.num_heads:
      raise ValueError(f'{c} channels do not divide into {self.num_heads}.')
    y = layers.GroupNorm32(name='norm')(x).reshape(b, h * w, c)
    # PyTorch has Conv1d of kernel 1 for `qkv` and `proj_out`.
    y = nn.Dense(3 * c, dtype=self.dtype, name='qkv')(y)
    # Channels are heads first, then q, k, v within each head.
    y = y.reshape(b, h * w, self.num_heads, 3, c // self.num_heads)
    y = layers.attend(y[:, :, :, 0], y[:, :, :, 1], y[:, :, :, 2])
    out = nn.Dense(
      c,
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
      name='proj_out',
    )
    return x + out(y.reshape(b, h * w, c)).reshape(x.shape)


class UNet(nn.Module):
  """Predicts the noise ε in a latent.

  The timestep embedding and the last convolution compute in float32 whatever
  `dtype` is (0.02 % of the work of cin256-v2), as in LDM's own half precision.
  """

  out_channels: int
  model_channels: int
  channel_mult: tuple[int, ...]
  num_res_blocks: int
  attention_resolutions: tuple[int, ...]  # Downsampling factors, not pixels.
  num_heads: int = -1  # Exactly one of this and the next is given.
  num_head_channels: int = -1
  use_spatial_transformer: bool = False
  transformer_depth: int = 1
  context_dim: int | None = None
  use_scale_shift_norm: bool = False
  resblock_updown: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, t: jax.Array, context: jax.Array | None = None
  ) -> jax.Array:
    """Returns the predicted noise.

    Args:
      x: float[B, H, W, C] noisy latents; H and W divide by 2 for every level
        but the last.
      t: int or float[B], timesteps 0..999.
      context: float[B, L, context_dim] where `use_spatial_transformer` is set.

    Returns:
      float32[B, H, W, out_channels].

    Raises:
      ValueError: fields that contradict each other or inputs that do not fit.
    """
    self._check(x, context)
    channels = self.model_channels
    res_block = functools.partial(
      ResBlock,
      use_scale_shift_norm=self.use_scale_shift_norm,
      dtype=self.dtype,
    )

    def attention(h, name):
      if self.num_heads != -1:
        heads = self.num_heads
      else:
        heads = h.shape[-1] // self.num_head_channels
      if not self.use_spatial_transformer:
        return AttentionBlock(heads, self.dtype, name=name)(h)
      block = SpatialTransformer(
        heads, self.transformer_depth, self.dtype, name=name
      )
      return block(h, context)

    emb = layers.timestep_embedding(t, channels)
    emb = nn.Dense(4 * channels, name='time_embed_0')(emb)
    emb = nn.Dense(4 * channels, name='time_embed_2')(nn.silu(emb))

    h = layers.conv(channels, dtype=self.dtype, name='input_blocks_0_0')(x)
    skips = [h]
    factor = 1
    for level, mult in enumerate(self.channel_mult):
      for _ in range(self.num_res_blocks):
        name = f'input_blocks_{len(skips)}'
        h = res_block(mult * channels, name=f'{name}_0')(h, emb)
        if factor in self.attention_resolutions:
          h = attention(h, f'{name}_1')
        skips.append(h)
      if level != len(self.channel_mult) - 1:
        name = f'input_blocks_{len(skips)}_0'
        if self.resblock_updown:
          h = res_block(h.shape[-1], resample='down', name=name)(h, emb)
        else:
          h = Downsample(self.dtype, name=name)(h)
        skips.append(h)
        factor *= 2

    h = res_block(h.shape[-1], name='middle_block_0')(h, emb)
    h = attention(h, 'middle_block_1')
    h = res_block(h.shape[-1], name='middle_block_2')(h, emb)

    block = 0
    for level, mult in reversed(list(enumerate(self.channel_mult))):
      for i in range(self.num_res_blocks + 1):
        name, position = f'output_blocks_{block}', 1
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = res_block(mult * channels, name=f'{name}_0')(h, emb)
        if factor in self.attention_resolutions:
          h = attention(h, f'{name}_1')
          position = 2
        if level and i == self.num_res_blocks:
          name = f'{name}_{position}'
          if self.resblock_updown:
            h = res_block(h.shape[-1], resample='up', name=name)(h, emb)
          else:
            h = Upsample(self.dtype, name=name)(h)
          factor //= 2
        block += 1

    h = nn.silu(layers.GroupNorm32(name='out_0')(h))
    return layers.conv(self.out_channels, zero_init=True, name='out_2')(h)

  @nn.nowrap
  def _check(self, x: jax.Array, context: jax.Array | None) -> None:
    """Raises ValueError for settings or shapes that no model can have."""
    if (self.num_heads == -1) == (self.num_head_channels == -1):
      raise ValueError(
        'Exactly one of num_heads and num_head_channels must be given, not '
        f'{self.num_heads} and {self.num_head_channels}.'
      )
    if self.use_spatial_transformer != (self.context_dim is not None):
      raise ValueError(
        'context_dim goes with use_spatial_transformer, not '
        f'{self.context_dim} with {self.use_spatial_transformer}.'
      )
    want = None if context is None else context.shape[-1]
    if want != self.context_dim:
      raise ValueError(
        f'context of width {want} where context_dim is {self.context_dim}.'
      )
    step = 2 ** (len(self.channel_mult) - 1)
    if x.shape[1] % step or x.shape[2] % step:
      raise ValueError(f'latents {x.shape}: H, W must be multiples of {step}.')
