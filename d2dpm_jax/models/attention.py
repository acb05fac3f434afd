"""Transformer blocks of the class-conditional U-Net.

Source: CompVis/latent-diffusion, ldm/modules/attention.py; the module names are
those of that file, with `.N` written `_N`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from d2dpm_jax.models import layers


class CrossAttention(nn.Module):
  """Multi-head attention from tokens to a context (to themselves if None)."""

  num_heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: jax.Array | None = None,
    *,
    norm: nn.Module | None = None,
    constant: jax.Array | None = None,
  ) -> jax.Array:
    """Maps float[B, L, D] and float[B, M, E] to float[B, L, D].

    Args:
      x: tokens that ask.
      context: tokens that answer, `x` if None.
      norm: what `x` goes through first, in attention to itself; then `x` is
        added to the result.
      constant: float[B, 1, D], added to that.

    Raises:
      ValueError: there is a constant and no norm.
    """
    if constant is not None and norm is None:
      raise ValueError('A constant is added where there is a norm.')
    width = x.shape[-1]
    dense = functools.partial(layers.Dense, width, dtype=self.dtype)
    to_q, to_k, to_v = (
      dense(use_bias=False, name=name) for name in ('to_q', 'to_k', 'to_v')
    )
    if norm is None:
      context = x if context is None else context
      found = [to_q(x), to_k(context), to_v(context)]
    else:
      found = to_q.all_after_norm((to_k, to_v), norm, x)
    shape = (self.num_heads, width // self.num_heads)
    q, k, v = (y.reshape(*y.shape[:2], *shape) for y in found)
    y = layers.attend(q, k, v).reshape(x.shape)
    out = dense(name='to_out_0')
    return out(y) if norm is None else out.plus(y, x, constant)


class GEGLU(nn.Module):
  """A linear layer whose one half gates the other through an exact GELU."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.Dense(2 * self.features, dtype=self.dtype, name='proj')(x)
    y, gate = jnp.split(y, 2, axis=-1)
    return y * layers.gelu(gate)  # float32, for the next layer to round.


class FeedForward(nn.Module):
  """GEGLU of a normalized input to four times the width, back, and added."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, norm: nn.Module, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    gate = GEGLU(4 * width, dtype=self.dtype, name='net_0')
    out = layers.Dense(width, dtype=self.dtype, name='net_2')
    return out.after_gate(gate, norm, x)


class BasicTransformerBlock(nn.Module):
  """Self-attention, cross-attention and feed-forward, each pre-normalized.

  Calling it depends on its arguments and parameters alone, so one block can be
  applied by itself: `block.clone(parent=None, name=None).apply(...)`.
  """

  num_heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, context: jax.Array | None = None
  ) -> jax.Array:
    """Maps tokens to tokens.

    Args:
      x: float[B, L, D].
      context: float[B, M, E], or None for attention to `x` in both places.

    Returns:
      float[B, L, D] in the compute dtype.
    """
    x = x.astype(self.dtype)
    norm = layers.LayerNorm32
    attention1 = CrossAttention(self.num_heads, self.dtype, name='attn1')
    attention2 = CrossAttention(self.num_heads, self.dtype, name='attn2')
    feed_forward = FeedForward(self.dtype, name='ff')
    x = attention1(x, norm=norm(name='norm1'))
    x = attention2(norm(name='norm2')(x), context) + x
    return feed_forward(norm(name='norm3'), x)


class SpatialTransformer(nn.Module):
  """Transformer blocks over the pixels of an image, with a residual around."""

  num_heads: int
  depth: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, context: jax.Array | None = None
  ) -> jax.Array:
    """Maps float[B, H, W, C] and float[B, M, E] to float[B, H, W, C]."""
    b, h, w, c = x.shape
    if c % self.num_heads:
      raise ValueError(f'{c} channels do not divide into {self.num_heads}.')
    # Here 1e-6, where the rest of the U-Net has 1e-5.
    norm = layers.GroupNorm32(epsilon=1e-6, name='norm')
    proj_in = layers.conv(c, 1, dtype=self.dtype, name='proj_in')
    y = proj_in.after_norm(norm, x, silu=False).reshape(b, h * w, c)
    for i in range(self.depth):
      block = BasicTransformerBlock(
        self.num_heads, self.dtype, name=f'transformer_blocks_{i}'
      )
      y = block(y, context)
    y = y.reshape(b, h, w, c)
    out = layers.conv(c, 1, zero_init=True, dtype=self.dtype, name='proj_out')
    return out.plus(y, x)
