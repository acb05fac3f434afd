"""Feature networks, and running one over a set of images on every device.

Letters: `B` batch, `N` images, `H W` space, `C` channels, `K` classes.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from d2dpm_jax.evaluation import frechet
from d2dpm_jax.runtime import devices, prefetch

# Batches that devices are given before one is waited for: enough work for the
# time in which 1024 rows are merged into the moments.
_IN_FLIGHT = 4


class Activations(NamedTuple):
  """What a feature network sees in a batch; float32."""

  features: Any  # [B,D]: FID, precision and recall.
  spatial: Any  # [B,...]: sFID.
  logits: Any  # [B,K]: inception score and label agreement.


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNet:
  """A network that judges images.

  Attributes:
    name: which one, as stored in reference statistics.
    digest: short hash of its weights; statistics of others do not compare.
    image_shape: H, W, C of the images that it takes.
    classes: K.
    params: its parameters.
    apply: (params, uint8[B,H,W,C]) -> Activations; pure, to be jitted.
    layers: (params, uint8[B,H,W,C]) -> float32[B,...,C] of several layers, for
      `fidelity.feature_distances`; None: the features alone.
  """

  name: str
  digest: str
  image_shape: tuple[int, int, int]
  classes: int
  params: Any
  apply: Callable[[Any, jax.Array], Activations]
  layers: Callable[[Any, jax.Array], Sequence[jax.Array]] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
  """All that the metrics need to know of a set of N images.

  Attributes:
    count: N; of a reference batch of openai/guided-diffusion, that of its
      images: it does not say how many its Gaussians are of.
    features: Gaussian of the features.
    spatial: Gaussian of the spatial features.
    vectors: float16[N,D], the features themselves, for precision and recall.
    logits: float32[N,K]; None in stored statistics.
    exact: float32[N,D], the features unrounded; None unless asked for.
    counted: whether N is also the number of images that the Gaussians are of.
  """

  count: int
  features: frechet.Gaussian
  spatial: frechet.Gaussian
  vectors: np.ndarray
  logits: np.ndarray | None = None
  exact: np.ndarray | None = None
  counted: bool = True


def activations(
  net: FeatureNet, batches: Iterable[np.ndarray], batch_size: int
) -> Iterator[Activations]:
  """Runs `net` over batches of at most `batch_size`, split over all devices.

  Args:
    net: what to run.
    batches: uint8[B,H,W,C] each.
    batch_size: what is compiled; smaller batches are padded.

  Yields:
    NumPy arrays for each batch, in order.

  Raises:
    ValueError: images of another shape or type, or features with NaN.
  """
  mesh = devices.mesh()
  size = -(-batch_size // mesh.size) * mesh.size
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(devices.DATA_AXIS))
  run = jax.jit(net.apply, in_shardings=(whole, split), out_shardings=split)
  params = devices.replicate(net.params)

  def placed() -> Iterator[tuple[int, jax.Array]]:
    for images in batches:
      _check(images, net)
      rest = [(0, size - len(images)), (0, 0), (0, 0), (0, 0)]
      padded = np.pad(images, rest) if len(images) < size else images
      yield len(images), jax.device_put(padded, split)

  # While a batch is computed, the next one is read by a thread and moments of
  # the last one are added up by the caller.
  running: collections.deque[tuple[int, Activations]] = collections.deque()
  with contextlib.closing(prefetch.prefetch(placed())) as reading:
    for count, images in reading:
      running.append((count, run(params, images)))
      if len(running) > _IN_FLIGHT:
        yield _fetch(*running.popleft(), net)
    while running:
      yield _fetch(*running.popleft(), net)


def _check(images: np.ndarray, net: FeatureNet) -> None:
  if images.shape[1:] != net.image_shape or images.dtype != np.uint8:
    wanted = ', '.join(map(str, net.image_shape))
    raise ValueError(
      f'Images are {images.dtype}{list(images.shape)}, but the feature '
      f'network {net.name!r} takes uint8[N, {wanted}].'
    )


def _fetch(count: int, out: Activations, net: FeatureNet) -> Activations:
  """Waits for a batch; without its padding."""
  found = Activations(*(np.asarray(x)[:count] for x in jax.device_get(out)))
  if not all(np.isfinite(x).all() for x in found):
    raise ValueError(f'The feature network {net.name!r} returned NaN.')
  return found


def summarize(
  net: FeatureNet,
  batches: Iterable[np.ndarray],
  batch_size: int,
  progress: Callable[[int], None] = lambda n: None,
  keep_exact: bool = False,
) -> Summary:
  """Gaussians, vectors and logits of a set of images.

  Args:
    net: the judge.
    batches: uint8[B,H,W,C] each.
    batch_size: see `activations`.
    progress: called with the number of images of each batch when it is done.
    keep_exact: whether to fill `Summary.exact`, of 4 N D bytes.

  Raises:
    ValueError: see `activations`; fewer than two images.
  """
  moments: list[frechet.Moments] = []
  vectors, logits, exact = [], [], []
  for out in activations(net, batches, batch_size):
    kinds = (out.features, out.spatial)
    if not moments:
      moments = [frechet.Moments(x[0].size) for x in kinds]
    for moment, values in zip(moments, kinds, strict=True):
      moment.update(values)
    vectors.append(out.features.astype(np.float16))
    logits.append(out.logits)
    if keep_exact:
      exact.append(out.features)
    progress(len(out.logits))
  if not moments or moments[0].count < 2:
    raise ValueError(
      f'{sum(map(len, logits))} images cannot be evaluated: at least 2 are '
      'needed.'
    )
  features, spatial = (m.gaussian() for m in moments)
  return Summary(
    moments[0].count,
    features,
    spatial,
    np.concatenate(vectors),
    np.concatenate(logits),
    np.concatenate(exact) if keep_exact else None,
  )
