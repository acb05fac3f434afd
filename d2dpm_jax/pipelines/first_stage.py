"""Images as the first stage of a model gives them back."""

import dataclasses

import jax
import numpy as np

from d2dpm_jax.evaluation import image_sets
from d2dpm_jax.pipelines import setup
from d2dpm_jax.runtime import images
from d2dpm_jax.training import data


def reconstructed(
  samples: image_sets.ImageSet, model: setup.Model
) -> image_sets.ImageSet:
  """The same images, encoded and decoded again.

  Raises:
    ValueError: they have not the size that the model was made for.
  """
  ldm = model.ldm
  if samples.shape[1] != ldm.image_size:
    raise ValueError(
      f'{samples.name} holds images of {samples.shape[1]} pixels, the first '
      f'stage takes {ldm.image_size}.'
    )

  @jax.jit
  def reconstruct(params, batch):
    latents = ldm.encode(params, data.to_float(batch))
    return images.to_uint8(ldm.decode(params, latents))

  params = jax.device_put(model.params)

  def batches(size):
    for batch in samples.batches(size):
      yield np.asarray(reconstruct(params, batch))

  return dataclasses.replace(
    samples, name=f'{samples.name}, reconstructed', batches=batches
  )
