"""First stages of latent diffusion: images to latents and back.

Source: `VQModelInterface`, `AutoencoderKL` in CompVis/latent-diffusion,
ldm/models/autoencoder.py, and `Encoder`, `Decoder` in
ldm/modules/diffusionmodules/model.py; module names are those of the PyTorch
state dict with `.N` written `_N`.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from d2dpm_jax.models import layers

# The first stage has 1e-6 where the U-Net's group norms have 1e-5.
_norm = functools.partial(layers.GroupNorm32, epsilon=1e-6)


class ResnetBlock(nn.Module):
  """Two convolutions and a residual."""

  out_channels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to float[B, H, W, out_channels]."""
    conv = functools.partial(layers.conv, self.out_channels, dtype=self.dtype)
    h = conv(name='conv1')(nn.silu(_norm(name='norm1')(x)))
    h = conv(name='conv2')(nn.silu(_norm(name='norm2')(h)))
    if x.shape[-1] != self.out_channels:
      x = conv(1, name='nin_shortcut')(x)
    return x + h


class AttnBlock(nn.Module):
  """Self-attention over pixels with one head."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to the same shape."""
    b, h, w, c = x.shape
    conv = functools.partial(layers.conv, c, 1, dtype=self.dtype)
    y = _norm(name='norm')(x)
    q, k, v = (conv(name=n)(y).reshape(b, h * w, 1, c) for n in 'qkv')
    y = layers.attend(q, k, v).reshape(x.shape)
    return x + conv(name='proj_out')(y)


class Middle(nn.Module):
  """What encoder and decoder have at the lowest resolution."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = x.shape[-1]
    x = ResnetBlock(c, self.dtype, name='block_1')(x)
    x = AttnBlock(self.dtype, name='attn_1')(x)
    return ResnetBlock(c, self.dtype, name='block_2')(x)


class Downsample(nn.Module):
  """A 3 x 3 convolution of stride 2, padded on the right and bottom only."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to float[B, H/2, W/2, C]."""
    conv = layers.conv(
      x.shape[-1], stride=2, padding=(0, 1), dtype=self.dtype, name='conv'
    )
    return conv(x)


class Upsample(nn.Module):
  """Nearest-neighbour doubling, then a 3 x 3 convolution."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to float[B, 2H, 2W, C]."""
    x = layers.upsample_nearest(x)
    return layers.conv(x.shape[-1], dtype=self.dtype, name='conv')(x)


class Level(nn.Module):
  """Blocks of one resolution, then the change to the next one."""

  out_channels: int
  num_blocks: int
  attention: bool
  resample: str  # 'up', 'down' or '' at the last level.
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.num_blocks):
      x = ResnetBlock(self.out_channels, self.dtype, name=f'block_{i}')(x)
      if self.attention:
        x = AttnBlock(self.dtype, name=f'attn_{i}')(x)
    if self.resample == 'down':
      x = Downsample(self.dtype, name='downsample')(x)
    elif self.resample == 'up':
      x = Upsample(self.dtype, name='upsample')(x)
    return x


class Encoder(nn.Module):
  """Image to features of the lowest resolution."""

  ch: int
  ch_mult: tuple[int, ...]
  num_res_blocks: int
  attn_resolutions: tuple[int, ...]
  resolution: int
  out_channels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, 3] to float32[B, h, w, out_channels]."""
    h = layers.conv(self.ch, dtype=self.dtype, name='conv_in')(x)
    last = len(self.ch_mult) - 1
    for i, mult in enumerate(self.ch_mult):
      level = Level(
        self.ch * mult,
        self.num_res_blocks,
        attention=self.resolution // 2**i in self.attn_resolutions,
        resample='down' if i < last else '',
        dtype=self.dtype,
        name=f'down_{i}',
      )
      h = level(h)
    h = Middle(self.dtype, name='mid')(h)
    h = nn.silu(_norm(name='norm_out')(h))
    return layers.conv(self.out_channels, name='conv_out')(h)


class Decoder(nn.Module):
  """Features of the lowest resolution to image."""

  ch: int
  ch_mult: tuple[int, ...]
  num_res_blocks: int
  attn_resolutions: tuple[int, ...]
  resolution: int
  out_channels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Maps float[B, h, w, C] to float32[B, H, W, out_channels]."""
    width = self.ch * self.ch_mult[-1]
    h = layers.conv(width, dtype=self.dtype, name='conv_in')(z)
    h = Middle(self.dtype, name='mid')(h)
    for i, mult in reversed(list(enumerate(self.ch_mult))):
      level = Level(
        self.ch * mult,
        self.num_res_blocks + 1,
        attention=self.resolution // 2**i in self.attn_resolutions,
        resample='up' if i else '',
        dtype=self.dtype,
        name=f'up_{i}',
      )
      h = level(h)
    h = nn.silu(_norm(name='norm_out')(h))
    return layers.conv(self.out_channels, name='conv_out')(h)


class Quantized(NamedTuple):
  """A latent snapped to its codebook."""

  z_q: jax.Array  # float32[B, h, w, C]; its gradient is that of the input.
  indices: jax.Array  # int32[B, h, w]
  loss: jax.Array  # float32[]: codebook loss + 0.25 commitment loss.


class VectorQuantizer(nn.Module):
  """Replaces every vector by the nearest of `n_embed` codes.

  Source: arXiv:1711.00937, Sec. 3; distances are expanded as in
  `VectorQuantizer2` of CompVis/taming-transformers, so near ties fall alike.
  """

  n_embed: int
  embed_dim: int

  @nn.compact
  def __call__(self, z: jax.Array) -> Quantized:
    """Quantizes float[B, h, w, embed_dim]."""
    limit = 1 / self.n_embed
    embed = nn.Embed(
      self.n_embed,
      self.embed_dim,
      embedding_init=lambda key, shape, dtype: jax.random.uniform(
        key, shape, dtype, -limit, limit
      ),
      name='embedding',
    )
    codes = embed.embedding
    norms = jnp.sum(codes**2, axis=-1)
    z = z.astype(jnp.float32)

    def nearest(row):  # float[B, w, C]
      # Few products each: without a matrix, sums and the search are one loop.
      dot = sum(row[..., i, None] * codes[:, i] for i in range(self.embed_dim))
      square = jnp.sum(row**2, axis=-1, keepdims=True)
      return jnp.argmin(square + norms - 2 * dot, axis=-1)

    # Row by row: all distances of one 64 x 64 latent to 8192 codes are 128 MiB.
    # Over rows and not over images, so that a sharded batch stays sharded.
    indices = jax.lax.map(nearest, jnp.moveaxis(z, 1, 0))
    indices = jnp.moveaxis(indices, 0, 1).astype(jnp.int32)
    found = embed(indices)
    stop = jax.lax.stop_gradient
    loss = jnp.mean((found - stop(z)) ** 2)
    loss += 0.25 * jnp.mean((stop(found) - z) ** 2)
    return Quantized(z + stop(found - z), indices, loss)


class Autoencoder(nn.Module):
  """A VQ ('vq') or KL ('kl') first stage.

  Images are in [-1, 1], latents as they are before `scale_factor`. Encoder and
  decoder end in float32 whatever `dtype` is.
  """

  kind: str
  ch: int
  ch_mult: tuple[int, ...]
  num_res_blocks: int
  z_channels: int
  embed_dim: int
  resolution: int  # Of the images; says where `attn_resolutions` are met.
  out_ch: int = 3
  in_channels: int = 3
  attn_resolutions: tuple[int, ...] = ()
  n_embed: int | None = None  # Size of the codebook; VQ only.
  dtype: Any = jnp.float32

  def setup(self):
    if self.kind not in ('vq', 'kl'):
      raise ValueError(f"kind {self.kind!r}: expected 'vq' or 'kl'.")
    if (self.kind == 'vq') != (self.n_embed is not None):
      raise ValueError(f'n_embed={self.n_embed} with kind {self.kind!r}.')
    moments = 2 if self.kind == 'kl' else 1  # A mean, and a log variance.
    coder: dict[str, Any] = dict(
      ch=self.ch,
      ch_mult=self.ch_mult,
      num_res_blocks=self.num_res_blocks,
      attn_resolutions=self.attn_resolutions,
      resolution=self.resolution,
      dtype=self.dtype,
    )
    self.encoder = Encoder(out_channels=moments * self.z_channels, **coder)
    self.decoder = Decoder(out_channels=self.out_ch, **coder)
    self.quant_conv = nn.Conv(moments * self.embed_dim, (1, 1))
    self.post_quant_conv = nn.Conv(self.z_channels, (1, 1))
    if self.n_embed is not None:
      self.quantizer = VectorQuantizer(
        self.n_embed, self.embed_dim, name='quantize'
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Encodes and decodes float[B, H, W, 3]; visits every parameter."""
    return self.decode(self.encode(x))

  @property
  def downsampling(self) -> int:
    """Pixels per latent, along each side."""
    return 2 ** (len(self.ch_mult) - 1)

  def _encode(self, x: jax.Array) -> jax.Array:
    step = self.downsampling
    if x.shape[1] % step or x.shape[2] % step:
      raise ValueError(f'images {x.shape}: H, W must be multiples of {step}.')
    return self.quant_conv(self.encoder(x))

  def encode(self, x: jax.Array) -> jax.Array:
    """Images to latents without noise or quantization.

    Args:
      x: float[B, H, W, 3] in [-1, 1].

    Returns:
      float32[B, h, w, embed_dim]; for KL the mode of the posterior.
    """
    h = self._encode(x)
    return h if self.kind == 'vq' else h[..., : self.embed_dim]

  def encode_moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images to the posterior's mean and log variance (KL only).

    Args:
      x: float[B, H, W, 3] in [-1, 1].

    Returns:
      Two float32[B, h, w, embed_dim]; the log variance lies in [-30, 20].

    Raises:
      ValueError: the first stage is a VQ one.
    """
    if self.kind != 'kl':
      raise ValueError("encode_moments is for kind 'kl'.")
    mean, logvar = jnp.split(self._encode(x), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def quantize(self, z: jax.Array) -> Quantized:
    """Snaps float[B, h, w, embed_dim] to the nearest codes (VQ only).

    Raises:
      ValueError: the first stage is a KL one.
    """
    if self.kind != 'vq':
      raise ValueError("quantize is for kind 'vq'.")
    return self.quantizer(z)

  def decode(self, z: jax.Array) -> jax.Array:
    """Latents to images.

    Args:
      z: float[B, h, w, embed_dim]; VQ snaps it to its nearest codes first.

    Returns:
      float32[B, H, W, out_ch], about [-1, 1], not clipped.
    """
    if self.kind == 'vq':
      z = self.quantize(z).z_q
    return self.decoder(self.post_quant_conv(z))
