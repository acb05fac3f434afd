"""Finds and converts the weights of InceptionV3; makes it a judge."""

import hashlib
import logging
import os
import pathlib
from typing import Any

import numpy as np
from flax import traverse_util

from d2dpm_jax.convert import inception as conversion
from d2dpm_jax.evaluation import inception
from d2dpm_jax.evaluation.features import Activations, FeatureNet
from d2dpm_jax.runtime import weights

_log = logging.getLogger(__name__)

NAME = 'inception'
_RANDOM = 'random:'
_FORMAT = 1


def inception_net(
  path: str | os.PathLike[str], image_shape: tuple[int, int, int]
) -> FeatureNet:
  """The feature network of FID, sFID and IS.

  Args:
    path: its weights, see `load`; or 'random:<seed>', good for timings only.
    image_shape: H, W, 3 of the images to come.

  Raises:
    FileNotFoundError: there are no weights; says which to get.
    ValueError: they cannot be read, or are another network's.
  """
  name = NAME
  if str(path).startswith(_RANDOM):
    name = f'{NAME} with RANDOM weights: the numbers mean nothing'
    params = _random_weights(str(path))
  else:
    params = load(path)
  network = inception.InceptionV3()

  def apply(params, images):
    return Activations(**network.apply({'params': params}, images))

  return FeatureNet(
    name, digest(params), image_shape, inception.CLASSES, params, apply
  )


def load(path: str | os.PathLike[str] = '') -> dict[str, Any]:
  """Parameters of InceptionV3, from the cache if the file was read before.

  What was converted is kept as .safetensors in `cache_folder`, under a hash of
  the file, so that a file of any name or age finds its own.

  Args:
    path: one of the published files, or a folder that holds one; '' looks into
      `cache_folder`.

  Returns:
    A nested dict of float32 arrays.

  Raises:
    FileNotFoundError: there is none; says which to get and where to put it.
    ValueError: it cannot be read, or holds another network.
  """
  source = _find(path)
  shapes = inception.parameter_shapes()
  with source.open('rb') as file:
    key = hashlib.file_digest(file, 'sha256').hexdigest()[:16]
  cached = cache_folder() / f'inception_{_FORMAT}_{key}.safetensors'
  params = _read_cache(cached, shapes)
  if params is not None:
    return params
  params, report = conversion.read(source, shapes)
  _log.info(
    'Converted %s: %d tensors, %d not needed.',
    source,
    len(report.mapped),
    len(report.ignored),
  )
  try:
    weights.save_safetensors(cached, params, {'source': source.name})
  except OSError as error:
    _log.warning(
      '%s is not kept (%s); next time it is converted again.',
      cached,
      error.strerror,
    )
  return params


def _random_weights(where: str) -> dict[str, Any]:
  """Kernels of variance 2 / fan in, which keep signals at their size."""
  seed = where.removeprefix(_RANDOM)
  if not seed.isdecimal():
    raise ValueError(
      f'--config.evaluate.inception={where}: expected a seed, as in random:0.'
    )
  _log.warning('The weights are random (%s): good for timings only.', where)
  rng = np.random.default_rng(int(seed))
  params: dict[str, Any] = {}
  for name, shape in sorted(inception.parameter_shapes().items()):
    kind = name.rpartition('/')[2]
    value = np.full(shape, kind in ('scale', 'var'), np.float32)
    if kind == 'kernel':
      value = rng.standard_normal(shape, np.float32)
      value *= np.float32((2 / np.prod(shape[:-1])) ** 0.5)
    params[name] = value
  return traverse_util.unflatten_dict(params, sep='/')


def cache_folder() -> pathlib.Path:
  """Where weights are looked for, and kept after conversion."""
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(home) / 'd2dpm_jax'


def digest(params: dict[str, Any]) -> str:
  """A short hash of the numbers, equal for all files that hold them."""
  total = hashlib.sha256()
  for name, value in sorted(_flat(params).items()):
    total.update(name.encode())
    total.update(np.ascontiguousarray(value, '<f4').data)
  return total.hexdigest()[:16]


def _find(path: str | os.PathLike[str]) -> pathlib.Path:
  """The file of weights."""
  place = pathlib.Path(path) if path else cache_folder()
  if place.is_dir():
    for name in conversion.PUBLISHED:
      if (place / name).is_file():
        return place / name
  elif place.is_file():
    return place
  projects = '; '.join(
    f'{name}, of {project}' for name, project in conversion.PUBLISHED.items()
  )
  raise FileNotFoundError(
    f'There are no weights of InceptionV3 at {place}. Get one of these files, '
    f'which hold the same numbers: {projects}. Put it into {cache_folder()}, '
    'or name it by --config.evaluate.inception=PATH.'
  )


def _read_cache(
  path: pathlib.Path, shapes: conversion.Shapes
) -> dict[str, Any] | None:
  """What was kept; None if nothing was, or if it was damaged since."""
  try:
    params, _ = weights.load_safetensors(path)
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    _log.warning('%s; it is made again.', error)
    return None
  found = {name: value.shape for name, value in _flat(params).items()}
  return params if found == shapes else None


def _flat(params: dict[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(params, sep='/')
