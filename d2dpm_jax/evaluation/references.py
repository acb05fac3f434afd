"""Reference statistics on disk: one .npz per set of real images and network."""

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
# The names of the statistics in openai/guided-diffusion's reference batches.
_ARRAYS = ('mu', 'sigma', 'mu_s', 'sigma_s')


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
  try:
    with np.load(path, allow_pickle=False) as archive:
      return 'meta' in archive and 'mu' in archive
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    return False


def load(path: pathlib.Path, net: FeatureNet) -> Summary:
  """Reads what `save` wrote.

  Raises:
    ValueError: it is damaged, or was made with another network.
  """
  try:
    with np.load(path, allow_pickle=False) as archive:
      meta = json.loads(str(archive['meta']))
      arrays = {name: archive[name] for name in (*_ARRAYS, 'vectors')}
  except Exception as error:  # zipfile and zlib raise many kinds.
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
