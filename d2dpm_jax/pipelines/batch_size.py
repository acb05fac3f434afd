"""How many images are in flight at a time, told from the free memory."""

import logging

import jax.numpy as jnp

from d2dpm_jax.models.latent_diffusion import LatentDiffusion
from d2dpm_jax.pipelines import setup
from d2dpm_jax.quantization import memory
from d2dpm_jax.runtime import devices, microbatches

_log = logging.getLogger(__name__)
_SHARE = 0.9  # Of the free memory, to be filled at most.
# More of them in a batch make nothing faster, and a lost batch is larger.
_MICROBATCHES = 4
_IN_FLIGHT = 3  # Batches: one is written, one waits, one is computed.
_UNKNOWN = 64  # Images, where devices do not tell of their memory, as CPUs.


def choose(model: setup.Model, program: microbatches.Program) -> int:
  """Images per call over all devices of this process.

  A device computes a microbatch at a time, whatever the batch; of more of them
  only the results take memory. Says what it chose, and warns where one
  microbatch may be too much.

  Args:
    model: with `sample.microbatch`.
    program: compiled for it; its arguments are on the devices already.
  """
  microbatch = model.config.sample.microbatch
  free = devices.free_memory()
  if free is None:
    return -(-_UNKNOWN // program.unit) * program.unit
  need = microbatch * working(model.ldm)
  results = _IN_FLIGHT * microbatch * results_bytes(model.ldm)
  number = int((_SHARE * free - need) // results)
  if number < 1:
    _log.warning(
      'A device has %.1f GB left, and --config.sample.microbatch=%d may need '
      'up to %.1f GB: if that fails, lower it.',
      free / 1e9,
      microbatch,
      (need + results) / 1e9,
    )
  size = min(max(number, 1), _MICROBATCHES) * program.unit
  _log.info(
    'Batches of %d images: a device has %.1f GB left, of which they take up to '
    '%.1f GB',
    size,
    free / 1e9,
    (need + size / program.unit * results) / 1e9,
  )
  return size


def working(ldm: LatentDiffusion) -> float:
  """Bytes for an image that is being computed, at most."""
  params = ldm.shapes()
  x = memory.batched(ldm.latent_shape, jnp.float32)
  t = memory.batched((), jnp.int32)
  network = memory.peak_per_row(
    lambda params, x, t, labels: ldm.eps(
      params,
      x,
      t,
      None if ldm.cond_stage is None else ldm.context(params, labels),
    ),
    params,
    x,
    t,
    t,
  )
  # Guidance runs the network on two rows for every image.
  decoder = memory.peak_per_row(ldm.decode, params, x)
  return max(2 * network, decoder)


def results_bytes(ldm: LatentDiffusion) -> float:
  """Bytes of a finished image and its latents."""
  h, w, c = ldm.latent_shape
  return ldm.image_size**2 * ldm.first_stage.out_ch + 4 * h * w * c
