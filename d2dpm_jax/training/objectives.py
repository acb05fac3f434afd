"""What the three embedded models minimise.

Each factory returns a loss of the form `training.loop.LossFn`: it draws its
own batch from the data on the device, so that a training step needs no host.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2dpm_jax.diffusion import schedule
from d2dpm_jax.evaluation.digits import DigitClassifier
from d2dpm_jax.models.autoencoder import Autoencoder
from d2dpm_jax.models.latent_diffusion import LatentDiffusion
from d2dpm_jax.runtime import devices
from d2dpm_jax.training.loop import LossFn


def _draw(key: jax.Array, data: Any, batch_size: int) -> Any:
  """A random batch (with replacement), split over the devices."""
  count = jax.tree.leaves(data)[0].shape[0]
  rows = jax.random.randint(key, (batch_size,), 0, count)
  return devices.split_batch(jax.tree.map(lambda x: x[rows], data))


def _to_unit(images: jax.Array) -> jax.Array:
  return images.astype(jnp.float32) / 127.5 - 1.0


def _shift(key: jax.Array, images: jax.Array, most: int) -> jax.Array:
  """Moves each image by up to `most` pixels; what leaves wraps around."""
  moves = jax.random.randint(key, (images.shape[0], 2), -most, most + 1)
  return jax.vmap(lambda x, m: jnp.roll(x, m, (0, 1)))(images, moves)


def classifier_loss(model: DigitClassifier, batch_size: int) -> LossFn:
  """Cross-entropy on images shifted by up to two pixels."""

  def loss(params, key, data):
    draw_key, shift_key = jax.random.split(key)
    images, labels = _draw(draw_key, data, batch_size)
    images = _shift(shift_key, _to_unit(images), 2)
    logits = model.apply({'params': params}, images)['logits']
    value = optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()
    return value, {'accuracy': jnp.mean(logits.argmax(-1) == labels)}

  return loss


def first_stage_loss(model: Autoencoder, batch_size: int) -> LossFn:
  """VQ-VAE objective (arXiv:1711.00937, eq. 3) with L1 + L2 reconstruction.

  LDM adds a perceptual and an adversarial term for natural images; digits at
  32x32 need neither.
  """

  def loss(params, key, data):
    images = _to_unit(_draw(key, data[0], batch_size))
    variables = {'params': params}
    z = model.apply(variables, images, method='encode')
    error = model.apply(variables, z, method='decode') - images
    codebook = model.apply(variables, z, method='quantize').loss
    l1 = jnp.abs(error).mean()
    value = l1 + jnp.square(error).mean() + codebook
    return value, {'l1': l1, 'codebook': codebook}

  return loss


def diffusion_loss(
  ldm: LatentDiffusion, batch_size: int, label_dropout: float
) -> LossFn:
  """Noise prediction, E|eps - eps_theta(x_t, t, c)|^2 (arXiv:2112.10752).

  The data are scaled latents and labels; a label is replaced by the null
  class with probability `label_dropout` (arXiv:2207.12598).
  """
  alphas_cumprod = jnp.asarray(
    schedule.linear_schedule(ldm.num_timesteps, ldm.beta_start, ldm.beta_end),
    jnp.float32,
  )

  def loss(params, key, data):
    draw_key, t_key, noise_key, drop_key = jax.random.split(key, 4)
    latents, labels = _draw(draw_key, data, batch_size)
    # Stratified timesteps: the same expectation, less variance.
    offsets = jax.random.uniform(t_key, (batch_size,))
    t = (jnp.arange(batch_size) + offsets) / batch_size * ldm.num_timesteps
    t = jnp.minimum(t.astype(jnp.int32), ldm.num_timesteps - 1)
    noise = jax.random.normal(noise_key, latents.shape)
    drop = jax.random.bernoulli(drop_key, label_dropout, labels.shape)
    labels = jnp.where(drop, ldm.null_label, labels)
    a = alphas_cumprod[t][:, None, None, None]
    x = jnp.sqrt(a) * latents + jnp.sqrt(1 - a) * noise
    eps = ldm.eps(params, x, t, ldm.context(params, labels))
    value = jnp.square(eps - noise).mean()
    return value, {}

  return loss
