"""How far images are from others of the same noise, one by one.

Unlike FID this needs no reference set and is exact for any number of images:
what quantization does to an image, and what a correction gives back.
"""

from typing import NamedTuple

import numpy as np


class Psnr(NamedTuple):
  """Of N images to others; see `Distance`."""

  psnr: float | None
  psnr_mean: float | None
  psnr_median: float | None
  identical: float


class Distance(NamedTuple):
  """Of N images to theirs in full precision; None where nothing is known."""

  psnr: float | None  # dB, of the squared error of all images together.
  psnr_mean: float | None  # dB, mean over the images that are not identical.
  psnr_median: float | None  # dB, median over these.
  identical: float  # Share of images that are the same in every pixel.
  latent_mse: float  # Squared error of the latents before decoding.


def distance(
  images: np.ndarray,
  latents: np.ndarray,
  reference_images: np.ndarray,
  reference_latents: np.ndarray,
) -> Distance:
  """Distance of images and latents to others, in order.

  An identical image has no PSNR; it would be infinite. So they are counted, and
  the mean and the median are those of the others.

  Args:
    images: uint8[N,H,W,C].
    latents: float32[N,h,w,c].
    reference_images: uint8[N,H,W,C].
    reference_latents: float32[N,h,w,c].

  Raises:
    ValueError: shapes differ, or there are no images.
  """
  pairs = ((images, reference_images), (latents, reference_latents))
  for found, wanted in pairs:
    if found.shape != wanted.shape or not len(found):
      raise ValueError(
        f'Distance of {list(found.shape)} to {list(wanted.shape)}: expected '
        'the same shape, and at least one image.'
      )
  pixel, latent = (squared_errors(*pair) for pair in pairs)
  return Distance(**psnr(pixel)._asdict(), latent_mse=float(latent.mean()))


def psnr(errors: np.ndarray) -> Psnr:
  """PSNR from what `squared_errors` says of at least one image."""
  changed = errors[errors > 0]
  by_image = _psnr(changed)
  return Psnr(
    psnr=float(_psnr(errors.mean())) if changed.size else None,
    psnr_mean=float(by_image.mean()) if changed.size else None,
    psnr_median=float(np.median(by_image)) if changed.size else None,
    identical=1 - changed.size / len(errors),
  )


def squared_errors(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Mean squared error of each image, float64[N]."""
  errors = np.empty(len(found))
  for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
    errors[k] = np.square(a.astype(np.float64) - b).mean()
  return errors


def _psnr(squared_error: np.ndarray) -> np.ndarray:
  """dB, of pixels in 0..255."""
  return 10 * np.log10(255**2 / squared_error)
