"""Reference statistics on disk: one .npz per set of real images and network.

Ours (`save`, `load`), or a reference batch of openai/guided-diffusion, such as
VIRTUAL_imagenet256_labeled.npz (`load_batch_statistics`): arrays mu, sigma,
mu_s and sigma_s of a whole data set, and arr_0, some of its images. A batch
does not say which weights its statistics are of; that they are those of the
network in use is up to who names it.
"""

import io
import json
import pathlib
import zipfile
from typing import Any

import numpy as np

from d2dpm_jax.evaluation import frechet
from d2dpm_jax.evaluation.features import FeatureNet, Summary
from d2dpm_jax.runtime import files

_FORMAT = 1
# A damaged header may ask for any size.
_DAMAGE = (*files.DAMAGE, MemoryError)
# The names of the statistics in openai/guided-diffusion's reference batches.
_ARRAYS = ('mu', 'sigma', 'mu_s', 'sigma_s')
_SERVES = {
  'mu': 'FID',
  'sigma': 'FID',
  'mu_s': 'sFID',
  'sigma_s': 'sFID',
  'arr_0': 'precision and recall',
}


def save(path: pathlib.Path, summary: Summary, net: FeatureNet) -> None:
  """Writes what the metrics need of a reference set, atomically.

  Arrays mu, sigma (features), mu_s, sigma_s (spatial features), float64, with
  the upper triangles of the covariances; vectors float16[N,D]; and meta, JSON:
  the format, N, and the network with a hash of its weights.
  """
  meta = {
    'format': _FORMAT,
    'count': summary.count,
    'network': net.name,
    'network_digest': net.digest,
  }
  arrays: dict[str, Any] = {}
  for suffix, gaussian in (('', summary.features), ('_s', summary.spatial)):
    upper = np.triu_indices(len(gaussian.mean))
    arrays[f'mu{suffix}'] = gaussian.mean
    arrays[f'sigma{suffix}'] = gaussian.covariance[upper]
  data = io.BytesIO()
  np.savez_compressed(
    data, meta=json.dumps(meta), vectors=summary.vectors, **arrays
  )
  with files.atomic_write(path) as file:
    file.write(data.getvalue())


def holds(path: pathlib.Path) -> bool:
  """Is this file one of ours, and not a set of images?"""
  return {'meta', 'mu'} <= _names(path)


def is_batch(path: pathlib.Path) -> bool:
  """Is this file a reference batch, perhaps with arrays missing?"""
  return not holds(path) and not _names(path).isdisjoint(_ARRAYS)


def load_batch_statistics(
  path: pathlib.Path, features: int, spatial: int
) -> tuple[frechet.Gaussian, frechet.Gaussian]:
  """Reads the statistics of a reference batch; its images stay on disk.

  Args:
    path: an .npz for which `is_batch`.
    features: D of the features of the network in use.
    spatial: D of its spatial features, flattened.

  Returns:
    Gaussians of the features and of the spatial features.

  Raises:
    ValueError: arrays are missing, damaged, not finite or of another D; names
      them. Nothing is ever unpickled.
  """
  missing = sorted(_SERVES.keys() - _names(path), key=list(_SERVES).index)
  if missing:
    needed = ', '.join(f'{name} (for {_SERVES[name]})' for name in missing)
    raise ValueError(f'The reference {path} lacks {needed}.')
  try:
    with np.load(path, allow_pickle=False) as archive:
      arrays = {name: archive[name] for name in _ARRAYS}
  except _DAMAGE as error:
    raise ValueError(f'The reference {path} is damaged: {error}') from error
  for name, array in arrays.items():
    dim = spatial if name.endswith('_s') else features
    shape = (dim,) if name.startswith('mu') else (dim, dim)
    if array.shape != shape or array.dtype.kind != 'f':
      raise ValueError(
        f'The reference {path} holds {name} as {array.dtype}'
        f'{list(array.shape)}, but the feature network makes '
        f'float{list(shape)}: it is of another network.'
      )
    if not np.isfinite(array).all():
      raise ValueError(f'The reference {path} has NaN or infinity in {name}.')
  for name in ('sigma', 'sigma_s'):
    _check_covariance(path, name, arrays[name])
  mu, sigma, mu_s, sigma_s = (
    arrays[name].astype(np.float64) for name in _ARRAYS
  )
  return frechet.Gaussian(mu, sigma), frechet.Gaussian(mu_s, sigma_s)


def _check_covariance(path: pathlib.Path, name: str, array: np.ndarray) -> None:
  """Only symmetric matrices have the square root that FID takes."""
  largest = np.abs(array).max()
  if (
    np.abs(array - array.T).max() > 1e-6 * largest or array.diagonal().min() < 0
  ):
    raise ValueError(
      f'The reference {path} holds a {name} that is no covariance: it is not '
      'symmetric, or variances are below 0.'
    )


def _names(path: pathlib.Path) -> set[str]:
  """Names of the arrays in an .npz; none if it is not one."""
  try:
    with zipfile.ZipFile(path) as archive:
      return {n[:-4] for n in archive.namelist() if n.endswith('.npy')}
  except files.DAMAGE:
    return set()


def load(path: pathlib.Path, net: FeatureNet) -> Summary:
  """Reads what `save` wrote.

  Raises:
    ValueError: it is damaged, or was made with another network.
  """
  try:
    with np.load(path, allow_pickle=False) as archive:
      meta = json.loads(str(archive['meta']))
      arrays = {name: archive[name] for name in (*_ARRAYS, 'vectors')}
  except _DAMAGE as error:
    raise ValueError(
      f'{path} is damaged or holds no reference statistics: {error}'
    ) from error
  wanted = {
    'format': _FORMAT,
    'network': net.name,
    'network_digest': net.digest,
  }
  different = files.differences({k: meta.get(k) for k in wanted}, wanted)
  if different:
    raise ValueError(
      f'{path} was made with another feature network: {"; ".join(different)}. '
      'Make it again with --config.evaluate.save_statistics.'
    )
  return Summary(
    meta['count'],
    _gaussian(arrays['mu'], arrays['sigma']),
    _gaussian(arrays['mu_s'], arrays['sigma_s']),
    arrays['vectors'],
  )


def _gaussian(mean: np.ndarray, triangle: np.ndarray) -> frechet.Gaussian:
  """A Gaussian from the upper triangle of its covariance."""
  covariance = np.zeros((len(mean), len(mean)))
  covariance[np.triu_indices(len(mean))] = triangle
  covariance += np.triu(covariance, 1).T
  return frechet.Gaussian(mean, covariance)
