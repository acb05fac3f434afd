import numpy as np
import pytest
import scipy.linalg

from d2dpm_jax.evaluation import frechet


def _gaussian(x: np.ndarray) -> frechet.Gaussian:
  return frechet.Gaussian(x.mean(0), np.cov(x, rowvar=False))


def _evaluators_distance(a: frechet.Gaussian, b: frechet.Gaussian) -> float:
  """The formula of OpenAI's evaluator: the root of the product itself."""
  root = scipy.linalg.sqrtm(a.covariance.dot(b.covariance))
  difference = a.mean - b.mean
  traces = np.trace(a.covariance) + np.trace(b.covariance)
  return difference.dot(difference) + traces - 2 * np.trace(root).real


def _features(seed: int, count: int, dim: int) -> np.ndarray:
  """Correlated, skewed, with a mean that is not 0."""
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim))
  return np.maximum(mixed + rng.normal(size=dim), 0)


@pytest.mark.parametrize('batch', [1, 7, 64, 1000])
def test_moments_of_a_stream_are_those_of_the_whole(batch):
  # float32 with a mean 10 000 times the spread: plain sums of squares in
  # float32 would leave no digit.
  x = (1e4 + np.random.default_rng(0).normal(size=(333, 2, 3))).astype('f')
  moments = frechet.Moments(6)
  for start in range(0, len(x), batch):
    moments.update(x[start : start + batch])
  flat = x.reshape(333, 6).astype(np.float64)
  got = moments.gaussian()
  assert moments.count == 333
  np.testing.assert_allclose(got.mean, flat.mean(0), rtol=1e-12)
  np.testing.assert_allclose(
    got.covariance, np.cov(flat, rowvar=False), rtol=1e-8, atol=1e-10
  )


def test_an_empty_batch_changes_nothing():
  moments = frechet.Moments(2)
  moments.update(np.array([[0.0, 1.0], [2.0, 3.0]]))
  moments.update(np.zeros((0, 2)))
  np.testing.assert_array_equal(moments.gaussian().mean, [1, 2])


def test_moments_of_one_image_are_refused():
  moments = frechet.Moments(2)
  moments.update(np.ones((1, 2)))
  with pytest.raises(ValueError, match='at least 2'):
    moments.gaussian()


@pytest.mark.parametrize('dim', [1, 5, 60])
def test_distance_is_that_of_the_evaluators_formula(dim):
  a, b = (_gaussian(_features(i, 500, dim)) for i in range(2))
  a, b = (
    frechet.Gaussian(np.atleast_1d(g.mean), np.atleast_2d(g.covariance))
    for g in (a, b)
  )
  want = _evaluators_distance(a, b)
  assert want > 0.1
  np.testing.assert_allclose(frechet.frechet_distance(a, b), want, rtol=1e-6)
  np.testing.assert_allclose(frechet.frechet_distance(b, a), want, rtol=1e-6)


@pytest.mark.parametrize('counts', [(20, 20), (20, 300), (49, 51)])
def test_distance_of_fewer_images_than_features_is_the_evaluators(counts):
  """It adds to the diagonal only if the root is not finite, and it is."""
  a, b = (_gaussian(_features(i, n, 50)) for i, n in enumerate(counts))
  want = _evaluators_distance(a, b)
  np.testing.assert_allclose(frechet.frechet_distance(a, b), want, rtol=1e-6)


def test_distance_of_independent_features_is_known():
  rng = np.random.default_rng(0)
  means, deviations = rng.normal(size=(2, 9)), rng.uniform(0, 3, size=(2, 9))
  want = np.square(means[0] - means[1]).sum()
  want += np.square(deviations[0] - deviations[1]).sum()
  a, b = (
    frechet.Gaussian(m, np.diag(d**2))
    for m, d in zip(means, deviations, strict=True)
  )
  np.testing.assert_allclose(frechet.frechet_distance(a, b), want, rtol=1e-12)


def test_singular_covariances_count_only_where_there_is_spread():
  """Rotating features and adding constant ones must not change distances."""
  small = [_features(i, 400, 6) for i in range(2)]
  want = _evaluators_distance(*map(_gaussian, small))
  rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(40, 40)))[0]
  large = [np.pad(x, ((0, 0), (0, 34))) @ rotation for x in small]
  got = frechet.frechet_distance(*map(_gaussian, large))
  # The root of a rounding error of 1e-16 is 1e-8, in 34 directions.
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_fewer_images_than_features():
  x = _features(0, 20, 50)
  assert frechet.frechet_distance(_gaussian(x), _gaussian(x)) < 1e-5
  moved = frechet.frechet_distance(_gaussian(x), _gaussian(x + 2))
  np.testing.assert_allclose(moved, 50 * 4, rtol=1e-6)


def test_what_cannot_be_compared_is_refused():
  a, b = (_gaussian(_features(0, 20, dim)) for dim in (3, 4))
  with pytest.raises(ValueError, match='3 and 4 features'):
    frechet.frechet_distance(a, b)
  with pytest.raises(ValueError, match='NaN'):
    frechet.frechet_distance(a, a._replace(mean=a.mean * np.nan))


def test_how_rows_come_in_batches_has_no_effect():
  x = np.random.default_rng(5).normal(size=(2500, 3)).astype(np.float32)

  def gaussian(size):
    moments = frechet.Moments(3)
    for start in range(0, len(x), size):
      moments.update(x[start : start + size])
    assert moments.count == 2500
    return moments.gaussian()

  want = gaussian(2500)
  np.testing.assert_allclose(
    want.covariance, np.cov(x.T.astype(float)), rtol=1e-12
  )
  for size in (1, 7, 1024, 1030):
    for a, b in zip(gaussian(size), want, strict=True):
      np.testing.assert_array_equal(a, b)


def test_reading_the_moments_changes_nothing():
  x = np.random.default_rng(6).normal(size=(30, 3))
  moments = frechet.Moments(3)
  for row in x:
    moments.update(row[None])
    if moments.count > 1:
      moments.gaussian()
  np.testing.assert_allclose(moments.gaussian().mean, x.mean(0), rtol=1e-12)
  np.testing.assert_allclose(
    moments.gaussian().covariance, np.cov(x.T), rtol=1e-12
  )
