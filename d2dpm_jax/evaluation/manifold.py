"""Improved precision and recall: shares of one set inside the other's manifold.

Source: arXiv:1904.06991, Sec. 3. Same numbers as `ManifoldEstimator` in
openai/guided-diffusion, evaluations/evaluator.py, computed in float32
throughout (there, distances are float16 where those do not overflow).

Letters: `N` images, `D` features, `R` rows and `C` columns of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_ROWS = 1024
_COLUMNS = 8192


class PrecisionRecall(NamedTuple):
  precision: float  # Share of the samples inside the reference's manifold.
  recall: float  # Share of the reference inside the samples' manifold.


def precision_recall(
  reference: np.ndarray, samples: np.ndarray, neighbours: int = 3
) -> PrecisionRecall:
  """Improved precision and recall.

  The manifold of a set is the union of balls around its members, each with the
  distance to its k-th nearest other member as radius. Distances are computed in
  blocks of at most 1024 x 8192, whatever N is.

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
  columns = _blocks(x, min(_COLUMNS, len(x)))
  found = [
    _smallest(rows, columns, np.int32(len(x)), neighbours + 1)[:, -1]
    for rows in _blocks(x, min(_ROWS, len(x)))
  ]
  return np.concatenate(found)[: len(x)]


def _share_inside(
  x: np.ndarray, centres: np.ndarray, radii: np.ndarray
) -> float:
  """Share of `x` within the radius of at least one of `centres`."""
  size = min(_COLUMNS, len(centres))
  columns = _blocks(centres, size)
  # Balls of padding contain nothing.
  radii = _blocks(radii[:, None], size, -1.0)[..., 0]
  found = [
    _inside(rows, columns, radii) for rows in _blocks(x, min(_ROWS, len(x)))
  ]
  return float(np.concatenate(found)[: len(x)].mean())


def _blocks(x: np.ndarray, size: int, padding: float = 0.0) -> np.ndarray:
  """float[N,D] -> float[ceil(N / size), size, D], padded at the end."""
  rest = -len(x) % size
  x = np.pad(x, ((0, rest), (0, 0)), constant_values=padding)
  return x.reshape(-1, size, x.shape[1])


def _squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
  """float32[R,C] between float32[R,D] and float32[C,D]."""
  dot = jnp.matmul(a, b.T, precision='highest')
  squares = jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1)[None]
  return jnp.maximum(squares - 2 * dot, 0)


@functools.partial(jax.jit, static_argnums=3)
def _smallest(
  rows: jax.Array, columns: jax.Array, count: jax.Array, k: int
) -> jax.Array:
  """The k smallest squared distances, ascending, of rows to blocks of columns.

  Args:
    rows: float32[R,D].
    columns: float32[blocks,C,D].
    count: int32[], columns that are not padding.
    k: how many.
  """

  def step(best, block):
    index, columns = block
    distances = _squared_distances(rows, columns)
    valid = index * len(columns) + jnp.arange(len(columns)) < count
    distances = jnp.where(valid, distances, jnp.inf)
    # top_k is for largest numbers.
    best = jnp.concatenate([best, -distances], 1)
    return jax.lax.top_k(best, k)[0], None

  best = jnp.full((len(rows), k), -jnp.inf)
  indices = jnp.arange(len(columns), dtype=jnp.int32)
  best, _ = jax.lax.scan(step, best, (indices, columns))
  return -best


@jax.jit
def _inside(rows: jax.Array, columns: jax.Array, radii: jax.Array) -> jax.Array:
  """bool[R]: is a row within the radius of any column?

  Args:
    rows: float32[R,D].
    columns: float32[blocks,C,D].
    radii: float32[blocks,C], squared.
  """

  def step(found, block):
    columns, radii = block
    near = _squared_distances(rows, columns) <= radii
    return found | near.any(1), None

  found = jnp.zeros(len(rows), bool)
  return jax.lax.scan(step, found, (columns, radii))[0]
