"""Feature networks, and running one over a set of images on every device.

Letters: `B` batch, `N` images, `H W` space, `C` channels, `K` classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from d2dpm_jax.evaluation import frechet
from d2dpm_jax.runtime import devices


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
    NumPy arrays for each batch.

  Raises:
    ValueError: images of another shape or type, or features with NaN.
  """
  mesh = devices.mesh()
  size = -(-batch_size // mesh.size) * mesh.size
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(devices.DATA_AXIS))
  run = jax.jit(net.apply, in_shardings=(whole, split), out_shardings=split)
  params = devices.replicate(net.params)
  for images in batches:
    if images.shape[1:] != net.image_shape or images.dtype != np.uint8:
      wanted = ', '.join(map(str, net.image_shape))
      raise ValueError(
        f'Images are {images.dtype}{list(images.shape)}, but the feature '
        f'network {net.name!r} takes uint8[N, {wanted}].'
      )
    rest = [(0, size - len(images)), (0, 0), (0, 0), (0, 0)]
    out = jax.device_get(run(params, np.pad(images, rest)))
    out = Activations(*(np.asarray(x)[: len(images)] for x in out))
    if not all(np.isfinite(x).all() for x in out):
      raise ValueError(f'The feature network {net.name!r} returned NaN.')
    yield out


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
