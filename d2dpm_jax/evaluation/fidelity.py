"""How close images are to others that were made from the same noise.

Images are compared one by one, in order: by their pixels, and by what a feature
network sees in them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from d2dpm_jax.evaluation import distance
from d2dpm_jax.evaluation.features import FeatureNet
from d2dpm_jax.evaluation.image_sets import ImageSet
from d2dpm_jax.runtime import devices

_EPSILON = 1e-10


class Fidelity(NamedTuple):
  """Of N images to theirs; PSNR as in `distance.Distance`.

  The feature distance is that of `feature_distances`, its mean and median over
  all images.
  """

  psnr: float | None
  psnr_mean: float | None
  psnr_median: float | None
  identical: float
  feature_distance: float
  feature_distance_median: float


def check(samples: ImageSet, others: ImageSet) -> None:
  """Raises ValueError if two sets cannot be compared one by one."""
  if samples.shape != others.shape:
    raise ValueError(
      f'{samples.name} holds {list(samples.shape)} images, but {others.name} '
      f'{list(others.shape)}: fidelity compares them one by one.'
    )
  if samples.labels is None or others.labels is None:
    return
  different = np.flatnonzero(samples.labels != others.labels)
  if different.size:
    k = int(different[0])
    raise ValueError(
      f'Image {k} is of class {samples.labels[k]} in {samples.name} and of '
      f'class {others.labels[k]} in {others.name}: fidelity compares samples '
      'of the same seed and labels.'
    )


def fidelity(
  samples: ImageSet,
  others: ImageSet,
  net: FeatureNet,
  batch_size: int,
  progress: Callable[[int], None] = lambda n: None,
) -> Fidelity:
  """Compares two sets of images one by one.

  Args:
    samples: what is judged.
    others: what they should be, in the same order.
    net: what sees features.
    batch_size: how many pairs at a time.
    progress: called with the number of images of each batch when it is done.

  Raises:
    ValueError: see `check`.
  """
  check(samples, others)
  measure = _measure(net, batch_size)
  errors, distances = [], []
  pairs = zip(
    _even(samples.batches(batch_size), batch_size),
    _even(others.batches(batch_size), batch_size),
    strict=True,
  )
  for found, wanted in pairs:
    errors.append(distance.squared_errors(found, wanted))
    # Of identical images, rounding alone would be left.
    distances.append(measure(found, wanted) * (errors[-1] > 0))
    progress(len(found))
  seen = np.concatenate(distances).astype(np.float64)
  return Fidelity(
    **distance.psnr(np.concatenate(errors))._asdict(),
    feature_distance=float(seen.mean()),
    feature_distance_median=float(np.median(seen)),
  )


def feature_distances(
  net: FeatureNet, params: object, found: jax.Array, wanted: jax.Array
) -> jax.Array:
  """Squared distance of features of length 1, for each pair of images.

  At every place of every layer the channels are scaled to length 1; squared
  distances of these are averaged over places, then over layers. So did LPIPS
  (arXiv:1801.03924, Eq. 1) begin; but there are no learned weights here, and
  the network is the one that judges the images, so numbers do not compare.
  Layers are those of `FeatureNet.layers`, else the features alone.

  Args:
    net: what sees features.
    params: its parameters.
    found: uint8[B,H,W,C].
    wanted: uint8[B,H,W,C].

  Returns:
    float32[B], 0 to 4; 0 to 2 if features are never below 0.
  """

  def layers(images):
    if net.layers is not None:
      return net.layers(params, images)
    return [net.apply(params, images).features]

  total = jnp.zeros(len(found))
  sides = layers(found), layers(wanted)
  for a, b in zip(*sides, strict=True):
    a, b = (x.reshape(len(x), -1, x.shape[-1]) for x in (a, b))
    a, b = (
      x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + _EPSILON)
      for x in (a, b)
    )
    total += jnp.square(a - b).sum(-1).mean(-1)
  return total / len(sides[0])


def _measure(
  net: FeatureNet, batch_size: int
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Compiles `feature_distances`, split over all devices."""
  mesh = devices.mesh()
  size = -(-batch_size // mesh.size) * mesh.size
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(devices.DATA_AXIS))
  params = devices.replicate(net.params)
  program = jax.jit(
    lambda params, a, b: feature_distances(net, params, a, b),
    in_shardings=(whole, split, split),
    out_shardings=split,
  )

  def measure(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    rest = [(0, size - len(found)), (0, 0), (0, 0), (0, 0)]
    out = program(params, np.pad(found, rest), np.pad(wanted, rest))
    return np.asarray(out)[: len(found)]

  return measure


def _even(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
  """The same images, `size` at a time but at the end."""
  rest: np.ndarray | None = None
  for batch in batches:
    rest = batch if rest is None else np.concatenate([rest, batch])
    while len(rest) >= size:
      yield rest[:size]
      rest = rest[size:]
  if rest is not None and len(rest):
    yield rest
