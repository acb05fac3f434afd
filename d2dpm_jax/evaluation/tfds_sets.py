"""Data sets of tensorflow-datasets as sets of images, read as a stream.

Files are taken as they are in the data set and decoded by PIL, as the authors
of the models did: TensorFlow's decoder of JPEG gives other pixels.
"""

import importlib.util
import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from d2dpm_jax.evaluation import pictures
from d2dpm_jax.evaluation.image_sets import ImageSet

_log = logging.getLogger(__name__)
_PREFIX = 'tfds:'
# name[/config][:version]:split, as in tfds:lsun/bedroom:train[:50000]
_NAME = re.compile(r'tfds:([\w/]+(?::\d[\w.*]*)?):(\w+(?:\[[^\[\]]*\])?)')
# Modules that tfds asks for only when it writes a data set, after hours of
# downloading: of all data sets, and of some.
_TO_PREPARE = {'': ('importlib_resources',), 'lsun': ('tensorflow_io',)}
_SIZE = 32  # MNIST's images, 28 x 28, get a black border, as in training.


def is_name(name: str) -> bool:
  """Does this name a data set, perhaps wrongly?"""
  return name.startswith(_PREFIX)


def from_name(name: str, square: pictures.Square | None = None) -> ImageSet:
  """Part of a data set; no labels.

  What is not on disk is downloaded first, where that is possible.

  Args:
    name: 'tfds:<data set>:<split>', such as tfds:imagenet2012:validation.
    square: how to make images of one size; None if they have one size already.

  Raises:
    ValueError: bad names, nothing to read it with, it has to be downloaded by
      hand, or it has no images.
  """
  match = _NAME.fullmatch(name)
  if match is None:
    raise ValueError(
      f'{name!r} names no data set; expected such as '
      'tfds:imagenet2012:validation or tfds:lsun/bedroom:train[:50000].'
    )
  title, split = match.groups()
  library = _library()
  builder = _builder(library, title)
  if 'image' not in builder.info.features:
    raise ValueError(
      f"{name}: the data set has no feature 'image', only "
      f'{sorted(builder.info.features)}.'
    )
  try:
    count = int(builder.info.splits[split].num_examples)
  except (KeyError, ValueError) as error:
    raise ValueError(
      f'{name}: there is no such split; {title} has '
      f'{sorted(builder.info.splits)}.'
    ) from error
  if not count:
    raise ValueError(f'{name} has no images.')
  border = square is None and title.split(':')[0] == 'mnist'

  def items() -> Iterator[tuple[str, bytes]]:
    stream = builder.as_dataset(
      split=split,
      shuffle_files=False,
      decoders={'image': library.decode.SkipDecoding()},
    )
    for k, example in enumerate(library.as_numpy(stream)):
      yield f'{name}, image {k},', bytes(example['image'])

  if square is None:
    label, first = next(items())
    shape = pictures.shape_of(label, first)
  else:
    shape = (square.size, square.size, square.channels)

  def batches(size: int) -> Iterator[np.ndarray]:
    for batch in pictures.decode(items(), shape, square, size):
      yield _bordered(batch) if border else batch

  if not border:
    return ImageSet(name, (count, *shape), None, batches)
  return ImageSet(name, (count, _SIZE, _SIZE, shape[2]), None, batches)


def _library() -> Any:
  """The module, if it can be used."""
  try:
    import tensorflow  # noqa: F401 - else tfds notices after its first output.
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ValueError(
      'Reading data sets through tensorflow-datasets needs TensorFlow: '
      'pip install tensorflow tensorflow-datasets, or give a folder of '
      'pictures.'
    ) from error
  return tfds


def _builder(library: Any, title: str) -> Any:
  """The data set, on disk and ready to be read."""
  try:
    builder = library.builder(title)
  except Exception as error:  # Of tfds, of its registry, of the file system.
    reason = str(error).strip().partition('\n')[0].rstrip('.')
    raise ValueError(
      f'tensorflow-datasets does not know {title!r}: {reason}.'
    ) from error
  if builder.is_prepared():
    return builder
  if missing := _missing(title):
    raise ValueError(
      f'To prepare {title}, tensorflow-datasets needs what is not installed: '
      f'pip install {" ".join(missing)}.'
    )
  _log.info(
    'Preparing %s (%s to download) in %s; this is done once.',
    title,
    builder.info.download_size,
    builder.data_dir,
  )
  try:
    builder.download_and_prepare()
  except AssertionError as error:  # The folder for manual downloads is empty.
    raise ValueError(
      f'{title} has to be downloaded by hand. {" ".join(str(error).split())}'
    ) from error
  except Exception as error:  # Of tfds, of the network, of the file system.
    raise ValueError(
      f'tensorflow-datasets cannot prepare {title}: '
      f'{" ".join(str(error).split())}'
    ) from error
  return builder


def _missing(title: str) -> list[str]:
  """Modules that are not there but needed to prepare a data set."""
  family = re.split('[/:]', title)[0]
  needed = (*_TO_PREPARE[''], *_TO_PREPARE.get(family, ()))
  return [name for name in needed if importlib.util.find_spec(name) is None]


def _bordered(batch: np.ndarray) -> np.ndarray:
  """uint8[B,28,28,1] -> uint8[B,32,32,1]."""
  side = (_SIZE - batch.shape[1]) // 2
  return np.pad(batch, [(0, 0), (side, side), (side, side), (0, 0)])
