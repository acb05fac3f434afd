"""Gaussians of feature vectors, and the Frechet distance between two.

Letters: `N` images, `D` features.
"""

from typing import NamedTuple

import numpy as np

_ROWS = 1024


class Gaussian(NamedTuple):
  """Mean float64[D] and covariance float64[D,D]."""

  mean: np.ndarray
  covariance: np.ndarray


class Moments:
  """Mean and covariance of a stream of batches, in float64.

  Rows are gathered, then merged by deviations from their own mean (Chan, Golub
  and LeVeque 1979). So a mean that is large beside the spread does no harm,
  memory does not grow with N, and how rows come in batches has no effect.
  """

  def __init__(self, dim: int):
    self.count = 0
    self._mean = np.zeros(dim)
    self._scatter = np.zeros((dim, dim))
    # A merge goes through all of `_scatter`: not for a few rows.
    self._rows = np.empty((_ROWS, dim))
    self._merged = 0

  def update(self, batch: np.ndarray) -> None:
    """Adds float[B, ...]; what follows the first axis is flattened to D."""
    while len(batch):
      start = self.count - self._merged
      part = batch[: _ROWS - start]
      self._rows[start : start + len(part)] = part.reshape(len(part), -1)
      self.count += len(part)
      batch = batch[len(part) :]
      if self.count - self._merged == _ROWS:
        self._merge()

  def _merge(self) -> None:
    added = self.count - self._merged
    if not added:
      return
    rows = self._rows[:added]
    mean = rows.mean(0)
    rows -= mean
    step = mean - self._mean
    self._scatter += rows.T @ rows
    self._scatter += np.outer(step, step * (self._merged * added / self.count))
    self._mean = self._mean + step * (added / self.count)
    self._merged = self.count

  def gaussian(self) -> Gaussian:
    """Mean and unbiased covariance (divided by N - 1, as `numpy.cov` does).

    Raises:
      ValueError: fewer than two vectors were added.
    """
    if self.count < 2:
      raise ValueError(
        f'{self.count} images have no covariance: at least 2 are needed.'
      )
    self._merge()
    return Gaussian(self._mean, self._scatter / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
  """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), for covariances A, B.

  Source: arXiv:1706.08500, Eq. 6. Same number as `FIDStatistics` in
  openai/guided-diffusion, evaluations/evaluator.py, which takes the square root
  of the product A B. Its trace is the sum of the roots of the eigenvalues of
  A^(1/2) B A^(1/2), which is symmetric: so singular covariances (fewer images
  than features, features that are always 0) need no offset on the diagonal, and
  the result no removal of imaginary parts. Rounding errors below 0 count as 0.

  Args:
    a: one distribution.
    b: the other, of the same D.

  Returns:
    The squared distance, >= 0.

  Raises:
    ValueError: D differs, or something is not finite.
  """
  if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape:
    raise ValueError(
      f'Frechet distance of {a.mean.size} and {b.mean.size} features: both '
      'sets must have the same.'
    )
  if not all(np.isfinite(x).all() for x in (*a, *b)):
    raise ValueError('Frechet distance of features with NaN or infinity.')
  root = square_root(a.covariance)
  product = np.linalg.eigvalsh(root @ b.covariance @ root)
  difference = a.mean - b.mean
  distance = (
    difference @ difference
    + np.trace(a.covariance)
    + np.trace(b.covariance)
    - 2 * np.sqrt(np.maximum(product, 0)).sum()
  )
  return max(0.0, float(distance))


def square_root(covariance: np.ndarray) -> np.ndarray:
  """The symmetric matrix whose square this one is; float64[D,D]."""
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
