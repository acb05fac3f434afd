"""Distances against plain NumPy, and what they are where nothing changed."""

import numpy as np
import pytest

from d2dpm_jax.evaluation import distance


def _arrays(count=5, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (count, 6, 4, 3), np.uint8)
  latents = rng.normal(size=(count, 3, 2, 4)).astype(np.float32)
  return images, latents


def test_identical_images_are_counted_apart():
  images, latents = _arrays()
  other, other_latents = _arrays(seed=1)
  other[[1, 4]] = images[[1, 4]]
  found = distance.distance(other, other_latents, images, latents)
  error = np.square(other.astype(float) - images).mean((1, 2, 3))
  psnr = [10 * np.log10(65025 / error[k]) for k in (0, 2, 3)]
  np.testing.assert_allclose(found.psnr, 10 * np.log10(65025 / error.mean()))
  np.testing.assert_allclose(found.psnr_mean, sum(psnr) / 3)
  np.testing.assert_allclose(found.psnr_median, sorted(psnr)[1])
  assert found.identical == pytest.approx(2 / 5)
  want = np.square(other_latents.astype(float) - latents).mean()
  np.testing.assert_allclose(found.latent_mse, want)


def test_differences_do_not_wrap_around():
  """Those of uint8 would: 0 - 255 is 1 there."""
  dark = np.zeros((2, 1, 1, 1), np.uint8)
  latents = np.zeros((2, 1, 1, 1), np.float32)
  for images, reference in ((dark, dark + 255), (dark + 255, dark)):
    found = distance.distance(images, latents, reference, latents)
    assert found == (0.0, 0.0, 0.0, 0.0, 0.0)


def test_no_psnr_where_nothing_changed():
  images, latents = _arrays()
  found = distance.distance(images, latents, images, latents)
  assert found == (None, None, None, 1.0, 0.0)


def test_other_shapes_are_refused():
  images, latents = _arrays()
  for args in (
    (images[:4], latents, images, latents),
    (images, latents, images, latents[:, :2]),
    (images[:0], latents[:0], images[:0], latents[:0]),
  ):
    with pytest.raises(ValueError, match='same shape'):
      distance.distance(*args)
