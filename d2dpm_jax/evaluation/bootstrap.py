"""How much FID would vary with other samples of the same number.

Letters: `N` images, `D` features, `K` of the images that were drawn.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from d2dpm_jax.evaluation import frechet

_ROWS = 4096


class Bootstrap(NamedTuple):
  """Of FID, by drawing N of N samples with replacement.

  Draws repeat images, and fewer different images have a larger FID. So `low`
  and `high` are FID itself plus how far the 2.5 % and 97.5 % quantiles of the
  draws are from their mean.
  """

  resamples: int
  low: float
  high: float
  mean: float  # Of the draws, larger than FID.
  std: float  # Of the draws.


def fid_interval(
  vectors: np.ndarray,
  reference: frechet.Gaussian,
  resamples: int,
  seed: int = 0,
  progress: Callable[[int], None] = lambda n: None,
) -> Bootstrap:
  """Interval of 95 % for FID, by the samples alone; the reference stays.

  Everything is float64. A draw costs the product [D,K] x [K,D] and the
  eigenvalues of [D,D]; with fewer images than features, those of [K,K]. Beside
  `vectors`, memory does not grow with N.

  Args:
    vectors: float[N,D], features of samples.
    reference: Gaussian of features of real images.
    resamples: how many draws.
    seed: of the draws.
    progress: called with 1 after each draw.

  Raises:
    ValueError: fewer than 2 images or draws, another D, or NaN.
  """
  if resamples < 2:
    raise ValueError(f'Bootstrap of {resamples} draws: at least 2 are needed.')
  if vectors.ndim != 2 or vectors.shape[1:] != reference.mean.shape:
    raise ValueError(
      f'Bootstrap of features {list(vectors.shape)} against '
      f'{reference.mean.size}: expected [N, D] and D.'
    )
  if len(vectors) < 2:
    raise ValueError(f'Bootstrap of {len(vectors)} images: 2 are needed.')
  if not np.isfinite(vectors).all():
    raise ValueError('Bootstrap of features with NaN or infinity.')
  n, dim = vectors.shape
  distance = _by_images if n < dim else _by_features
  rng = np.random.default_rng(seed)
  measure = distance(vectors, reference)
  whole = measure(np.ones(n))
  draws = np.empty(resamples)
  for k in range(resamples):
    counts = np.bincount(rng.integers(0, n, n), minlength=n)
    draws[k] = measure(counts.astype(np.float64))
    progress(1)
  low, high = np.quantile(draws, (0.025, 0.975)) - draws.mean() + whole
  return Bootstrap(
    resamples,
    max(0.0, float(low)),
    float(high),
    float(draws.mean()),
    float(draws.std(ddof=1)),
  )


_Measure = Callable[[np.ndarray], float]


def _by_features(vectors: np.ndarray, reference: frechet.Gaussian) -> _Measure:
  """counts[N] -> FID, by covariances [D,D]."""
  n, dim = vectors.shape
  centre = vectors.mean(0, dtype=np.float64)
  root = frechet.square_root(reference.covariance)
  constant = np.trace(reference.covariance)

  def measure(counts: np.ndarray) -> float:
    total, scatter = np.zeros(dim), np.zeros((dim, dim))
    for rows, x in _chunks(vectors, centre, np.flatnonzero(counts)):
      total += counts[rows] @ x
      x *= np.sqrt(counts[rows])[:, None]
      scatter += x.T @ x
    mean = total / n
    covariance = (scatter - n * np.outer(mean, mean)) / (n - 1)
    step = centre + mean - reference.mean
    roots = _sum_of_roots(root @ covariance @ root)
    found = step @ step + np.trace(covariance) + constant - 2 * roots
    return max(0.0, float(found))

  return measure


def _by_images(vectors: np.ndarray, reference: frechet.Gaussian) -> _Measure:
  """counts[N] -> FID, by inner products [N,N].

  A covariance of N vectors x is X^T X, and its product with that of the
  reference, R, has the eigenvalues of X R X^T other than 0.
  """
  n = len(vectors)
  centre = vectors.mean(0, dtype=np.float64)
  x = vectors - centre
  inner = x @ reference.covariance @ x.T
  squares = np.square(x).sum(1)
  constant = np.trace(reference.covariance)

  def measure(counts: np.ndarray) -> float:
    mean = counts @ x / n
    trace = (counts @ squares - n * mean @ mean) / (n - 1)
    drawn = np.flatnonzero(counts)
    # Products of deviations from the mean of the draw.
    along = inner[drawn] @ counts / n
    whole = counts[drawn] @ along / n
    product = inner[np.ix_(drawn, drawn)] - along - along[:, None] + whole
    weights = np.sqrt(counts[drawn])
    product *= weights * weights[:, None] / (n - 1)
    step = centre + mean - reference.mean
    found = step @ step + trace + constant - 2 * _sum_of_roots(product)
    return max(0.0, float(found))

  return measure


def _chunks(
  vectors: np.ndarray, centre: np.ndarray, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Some rows at a time, as deviations in float64."""
  for start in range(0, len(rows), _ROWS):
    part = rows[start : start + _ROWS]
    yield part, vectors[part] - centre


def _sum_of_roots(matrix: np.ndarray) -> float:
  """Sum of the roots of the eigenvalues of a symmetric matrix >= 0."""
  values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
  return float(np.sqrt(np.maximum(values, 0)).sum())
