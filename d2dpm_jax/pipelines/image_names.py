"""Sets of images by name, as in `config.evaluate.samples`.

  ''                      what --mode sample wrote in this work directory
  path                    an .npz with arr_0 and perhaps arr_1, or a folder of
                          these or of pictures
  mnist:test              the test set; --config.train.data says where it is
  mnist:train[:10000]     the first 10 000 training images
  tfds:lsun/bedroom:train any data set of tensorflow-datasets, or part of it

`config.evaluate.preprocess` and `.image_size` say how pictures, and images of
tensorflow-datasets, become one size. An .npz is taken as it is.
"""

import pathlib
import re

import ml_collections

from d2dpm_jax.evaluation import image_sets, pictures, tfds_sets
from d2dpm_jax.runtime import files
from d2dpm_jax.training import data

_DATASET = re.compile(r'mnist:(train|test)(?:\[:(\d+)\])?')


def split(names: str) -> tuple[str, ...]:
  """Several names with commas between; a path that is there is one name.

  Raises:
    ValueError: a name comes twice, or one of several is empty.
  """
  if ',' not in names or pathlib.Path(names).exists():
    return (names,)
  found = tuple(name.strip() for name in names.split(','))
  if '' in found or len(set(found)) < len(found):
    raise ValueError(
      f'evaluate.samples is {names!r}; expected different names with commas '
      'between.'
    )
  return found


def find(
  name: str, config: ml_collections.ConfigDict, paths: files.Workdir
) -> image_sets.ImageSet:
  """The set of images of that name; see the top of this file.

  Args:
    name: of the set.
    config: an experiment.
    paths: of the run whose samples are meant by ''.

  Raises:
    FileNotFoundError: MNIST is not where the config says.
    ValueError: there are no such images, or they cannot be read.
  """
  square = _square(config)
  if not name:
    if not paths.samples.is_dir():
      raise ValueError(
        f'There are no samples in {paths.root}. Make them with --mode sample, '
        'or give --config.evaluate.samples=<file>.npz.'
      )
    return image_sets.from_path(paths.samples)
  if tfds_sets.is_name(name):
    return tfds_sets.from_name(name, square)
  match = _DATASET.fullmatch(name)
  if match is None and name.startswith('mnist:'):
    raise ValueError(
      f'{name!r} names no images; expected mnist:test, mnist:train or such as '
      'mnist:train[:10000].'
    )
  if match is None:
    path = pathlib.Path(name)
    inside = files.Workdir(path).samples
    if any(inside.glob('*.npz')):
      raise ValueError(f'{path} is a work directory; its samples are {inside}.')
    if path.is_dir() and not any(path.glob('*.npz')):
      return pictures.from_folder(path, square)
    return image_sets.from_path(path)
  part, count = match.groups()
  return _mnist(name, part, count, config)


def _square(config: ml_collections.ConfigDict) -> pictures.Square | None:
  settings = config.evaluate
  if settings.image_size < 0:
    raise ValueError(f'evaluate.image_size is {settings.image_size}.')
  if settings.preprocess == 'none':
    if settings.image_size:
      raise ValueError(
        f'evaluate.image_size is {settings.image_size}, but nothing changes '
        "sizes: evaluate.preprocess is 'none'; there are 'adm' and 'ldm'."
      )
    return None
  return pictures.Square(
    settings.preprocess,
    settings.image_size or config.model.image_size,
    1 if settings.network == 'digits' else 3,
  )


def _mnist(
  name: str, part: str, count: str | None, config: ml_collections.ConfigDict
) -> image_sets.ImageSet:
  """MNIST from where training takes it, with labels."""
  if 'train' not in config:
    raise ValueError(
      f'{name} is read from train.data, which this config has not; '
      'configs/mnist.py has it.'
    )
  mnist = data.load_mnist(config.train.data)._asdict()
  chosen, labels = mnist[f'{part}_images'], mnist[f'{part}_labels']
  if count is not None and not 0 < int(count) <= len(chosen):
    raise ValueError(f'{name}: there are {len(chosen)} images.')
  rows = slice(None if count is None else int(count))
  return image_sets.from_arrays(name, chosen[rows], labels[rows])
