"""The error as a linear map of all that a sampling step knows.

d = eps_q - eps is predicted from every channel of eps_q and of x_t at the same
place: the conditional mean of the joint Gaussian of (eps_q, x_t, d), where
arXiv:2501.08180 has that of (eps_q, d), channel by channel at most. At large t
eps_q is close to x_t, and what the quantized network adds to it is close to a
fixed map of its input; only the two of them together tell it from noise. The
means may also differ from place to place, as quantization errors at borders do.

Letters: `N` images of a chunk, `P` places (height times width), `C` channels;
`Z` is 2C, the channels of eps_q and those of x_t.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

# Of the largest eigenvalue: smaller ones are rounding, or exact dependence.
_RANK = 1e-12


class Sums(NamedTuple):
  """Of y = (eps_q, x_t, d), float64; sums of disjoint images add up."""

  images: int
  y: np.ndarray  # [P, Z + C]
  outer: np.ndarray  # [Z + C, Z + C], of y y' over places, too.


class Map(NamedTuple):
  """d is about (eps_q, x_t) @ weights + offset."""

  weights: np.ndarray  # float64[Z, C]
  offset: np.ndarray  # float64[P, C], or [1, C] if places are alike.


def sums(known: np.ndarray, d: np.ndarray) -> Sums:
  """Of one chunk: float64[N, P, Z] and [N, P, C]."""
  y = np.concatenate([known, d], axis=-1)
  flat = y.reshape(-1, y.shape[-1])
  return Sums(len(y), y.sum(0), flat.T @ flat)


def add(parts: Iterable[Sums]) -> Sums:
  """Of all images of all parts; there is at least one."""

  def two(a: Sums, b: Sums) -> Sums:
    return Sums(a.images + b.images, a.y + b.y, a.outer + b.outer)

  return functools.reduce(two, parts)


def diagonal(gain: Any, bias: Any, channels: int) -> Map:
  """The map of one channel of eps_q each: d is about gain * eps_q + bias.

  Args:
    gain: float64[], or [C].
    bias: float64[], or [C].
    channels: C.

  Returns:
    Weights [2C, C], zero for x_t and off the diagonal; offset [1, C].
  """
  weights = np.zeros((2 * channels, channels))
  np.fill_diagonal(weights, gain)
  return Map(weights, np.broadcast_to(bias, (1, channels)))


def fit(found: Sums, by_place: bool) -> Map:
  """Least squares over all elements, outliers too.

  Args:
    found: of the images to fit to.
    by_place: an offset for each place, in place of one for all.

  Returns:
    Weights [Z, C] and offset [P, C] or [1, C], float64.
  """
  places, width = found.y.shape
  mean = found.y / found.images
  if not by_place:
    mean = mean.mean(0, keepdims=True)
  cov = found.outer / (found.images * places) - mean.T @ mean / len(mean)
  known = width // 3 * 2
  weights, *_ = np.linalg.lstsq(
    cov[:known, :known], cov[:known, known:], rcond=_RANK
  )
  return Map(weights, mean[:, known:] - mean[:, :known] @ weights)


def left(maps: Sequence[Map], known: np.ndarray, d: np.ndarray) -> np.ndarray:
  """What each map leaves of d.

  Args:
    maps: K of them.
    known: float64[N, P, Z], eps_q and x_t.
    d: float64[N, P, C].

  Returns:
    float64[K, N, P, C].
  """
  return np.stack([d - (known @ m.weights + m.offset) for m in maps])
