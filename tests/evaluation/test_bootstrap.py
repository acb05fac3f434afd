"""Intervals of FID against draws that are made one by one."""

import numpy as np
import pytest
from scipy import linalg

from d2dpm_jax.evaluation import bootstrap, frechet


def _features(n, dim, seed=0):
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) / dim
  return np.maximum(mixed + 0.3, 0).astype(np.float32)


def _gaussian(vectors):
  vectors = vectors.astype(np.float64)
  return frechet.Gaussian(vectors.mean(0), np.cov(vectors, rowvar=False))


def _fid(vectors, reference):
  """As in the literature: the root of a product, complex and cut off."""
  mean, covariance = _gaussian(vectors)
  root = linalg.sqrtm(covariance @ reference.covariance)
  step = mean - reference.mean
  return step @ step + np.trace(
    covariance + reference.covariance - 2 * np.real(root)
  )


@pytest.mark.parametrize('n, dim', [(60, 6), (9, 12), (5000, 3)])
def test_draws_are_fid_of_drawn_images(n, dim):
  vectors = _features(n, dim)
  # Far away, where small numbers must not get lost.
  reference = _gaussian(_features(300, dim, 1))
  vectors += 100
  reference = reference._replace(mean=reference.mean + 100.5)
  done = []
  found = bootstrap.fid_interval(vectors, reference, 20, 5, done.append)
  rng = np.random.default_rng(5)
  draws = [_fid(vectors[rng.integers(0, n, n)], reference) for _ in range(20)]
  fid = _fid(vectors, reference)
  quantiles = np.quantile(draws, (0.025, 0.975)) - np.mean(draws) + fid
  # The literature's root loses half of the digits where a covariance is
  # singular.
  near = dict(rtol=1e-5 if n > dim else 1e-3)
  np.testing.assert_allclose(found.mean, np.mean(draws), **near)
  np.testing.assert_allclose(found.std, np.std(draws, ddof=1), rtol=1e-2)
  np.testing.assert_allclose((found.low, found.high), quantiles, **near)
  assert found.low < fid < found.high and found.resamples == sum(done) == 20


@pytest.mark.parametrize('n', [8, 40])
def test_both_ways_to_measure_agree(n):
  vectors, reference = _features(n, 20), _gaussian(_features(99, 20, 1))
  counts = np.bincount(np.random.default_rng(0).integers(0, n, n), minlength=n)
  for weights in (np.ones(n), counts.astype(float)):
    values = [
      way(vectors, reference)(weights)
      for way in (bootstrap._by_features, bootstrap._by_images)
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
  plain = frechet.frechet_distance(_gaussian(vectors), reference)
  whole = bootstrap._by_features(vectors, reference)(np.ones(n))
  np.testing.assert_allclose(whole, plain, rtol=1e-6)


def test_more_images_have_a_shorter_interval():
  reference = _gaussian(_features(3000, 8, 1))
  vectors, widths = _features(1600, 8, 2), []
  for n in (100, 1600):
    found = bootstrap.fid_interval(vectors[:n], reference, 200)
    widths.append(found.high - found.low)
  assert 2.5 < widths[0] / widths[1] < 7  # About the root of 16.


@pytest.mark.parametrize(
  'shape, resamples, message',
  [
    ((9, 4), 1, '1 draws'),
    ((9, 5), 9, r'\[9, 5\] against 4'),
    ((1, 4), 9, '1 images'),
  ],
)
def test_bad_settings(shape, resamples, message):
  reference = frechet.Gaussian(np.zeros(4), np.eye(4))
  with pytest.raises(ValueError, match=message):
    bootstrap.fid_interval(np.zeros(shape), reference, resamples)
  with pytest.raises(ValueError, match='NaN'):
    bootstrap.fid_interval(np.full((9, 4), np.nan), reference, 9)
