"""Improved precision and recall: shares of one set inside the other's manifold.

Source: arXiv:1904.06991, Sec. 3. Same numbers as `ManifoldEstimator` in
openai/guided-diffusion, evaluations/evaluator.py, computed in float32
throughout (there, distances are float16 where those do not overflow).

Letters: `N` images, `D` features, `R` rows and `C` columns of a block.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_ROWS = 1024
_COLUMNS = 8192


class PrecisionRecall(NamedTuple):
  """Two shares in [0, 1]."""

  precision: float  # Share of the samples inside the reference's manifold.
  recall: float  # Share of the reference inside the samples' manifold.


def precision_recall(
  reference: np.ndarray, samples: np.ndarray, neighbours: int = 3
) -> PrecisionRecall:
  """Improved precision and recall.

  The manifold of a set is the union of balls around its members, each with the
  distance to its k-th nearest other member as radius. Distances are computed in
  blocks of at most 1024 x 8192, so that memory of the device does not grow with
  N.

  Args:
    reference: float[N,D], features of real images.
    samples: float[M,D], features of generated ones.
    neighbours: k.

  Raises:
    ValueError: a set has not more than k images, D differs, or NaN.
  """
  sets = [np.asarray(x, np.float32) for x in (reference, samples)]
  if sets[0].ndim != 2 or sets[0].shape[1:] != sets[1].shape[1:]:
    raise ValueError(
      f'Precision and recall of features {list(sets[0].shape)} and '
      f'{list(sets[1].shape)}: expected [N, D] and [M, D].'
    )
  if min(map(len, sets)) <= neighbours or neighbours < 1:
    raise ValueError(
      f'Precision and recall with {neighbours} neighbours of {len(sets[0])} '
      f'and {len(sets[1])} images: more images than neighbours are needed.'
    )
  if not all(np.isfinite(x).all() for x in sets):
    raise ValueError('Precision and recall of features with NaN or infinity.')
  # Distances stay, but |a|^2 + |b|^2 - 2ab then loses fewer digits.
  centre = sets[0].mean(0, dtype=np.float64).astype(np.float32)
  sets = [x - centre for x in sets]
  radii = [_radii(x, neighbours) for x in sets]
  return PrecisionRecall(
    precision=_share_inside(sets[1], sets[0], radii[0]),
    recall=_share_inside(sets[0], sets[1], radii[1]),
  )


def _radii(x: np.ndarray, neighbours: int) -> np.ndarray:
  """Squared distance of each vector to its k-th nearest, itself not counted."""
  best = np.full((len(x), neighbours + 1), np.inf, np.float32)
  for there, columns in _blocks(x, _COLUMNS):
    columns = jax.device_put(columns)
    count = np.int32(there.stop - there.start)
    k = min(neighbours + 1, len(columns))
    for here, rows in _blocks(x, _ROWS):
      found = np.asarray(_smallest(rows, columns, count, k))
      found = np.concatenate([best[here], found[: len(best[here])]], 1)
      best[here] = np.sort(found, 1)[:, : neighbours + 1]
  return best[:, -1]


def _share_inside(
  x: np.ndarray, centres: np.ndarray, radii: np.ndarray
) -> float:
  """Share of `x` within the radius of at least one of `centres`."""
  inside = np.zeros(len(x), bool)
  # Balls of padding contain nothing.
  balls = zip(
    _blocks(centres, _COLUMNS), _blocks(radii, _COLUMNS, -1.0), strict=True
  )
  for (_, columns), (_, limits) in balls:
    columns = jax.device_put(columns)
    for here, rows in _blocks(x, _ROWS):
      found = np.asarray(_inside(rows, columns, limits))
      inside[here] |= found[: len(inside[here])]
  return float(inside.mean())


def _blocks(
  x: np.ndarray, size: int, padding: float = 0.0
) -> Iterator[tuple[slice, np.ndarray]]:
  """Where each block of float[N,...] is, and the block, padded to one size."""
  size = min(size, len(x))
  for start in range(0, len(x), size):
    part = x[start : start + size]
    rest = [(0, size - len(part))] + [(0, 0)] * (x.ndim - 1)
    where = slice(start, start + len(part))
    yield where, np.pad(part, rest, constant_values=padding)


def _squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
  """float32[R,C] between float32[R,D] and float32[C,D]."""
  dot = jnp.matmul(a, b.T, precision='highest')
  squares = jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1)[None]
  return jnp.maximum(squares - 2 * dot, 0)


@functools.partial(jax.jit, static_argnums=3)
def _smallest(
  rows: jax.Array, columns: jax.Array, count: jax.Array, k: int
) -> jax.Array:
  """float32[R,k]: the k smallest squared distances of rows to columns.

  Args:
    rows: float32[R,D].
    columns: float32[C,D].
    count: int32[], columns that are not padding.
    k: how many.
  """
  distances = _squared_distances(rows, columns)
  distances = jnp.where(jnp.arange(len(columns)) < count, distances, jnp.inf)
  return -jax.lax.top_k(-distances, k)[0]  # top_k is for the largest.


@jax.jit
def _inside(rows: jax.Array, columns: jax.Array, radii: jax.Array) -> jax.Array:
  """bool[R]: is a row within the radius, squared float32[C], of any column?"""
  return (_squared_distances(rows, columns) <= radii).any(1)
