"""MNIST, from tensorflow-datasets or from a local .npz."""

import pathlib
import zipfile
from typing import Any, NamedTuple

import numpy as np


class Digits(NamedTuple):
  """uint8[N,32,32,1] images (28x28 padded with black), int32[N] labels."""

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


def load_mnist(source: str) -> Digits:
  """Loads MNIST.

  Args:
    source: 'tfds', or the path of an .npz with the arrays x_train, y_train,
      x_test and y_test (uint8[N,28,28] and integer labels).

  Raises:
    FileNotFoundError: no such .npz.
    ValueError: the file is no such .npz, or tfds cannot be used.
  """
  raw = _from_tfds() if source == 'tfds' else _from_npz(pathlib.Path(source))
  for split in ('train', 'test'):
    images, labels = raw[f'x_{split}'], raw[f'y_{split}']
    if images.shape != (len(labels), 28, 28) or images.dtype != np.uint8:
      raise ValueError(
        f'{source}: x_{split} is {images.dtype}{list(images.shape)}; expected '
        f'uint8[{len(labels)}, 28, 28].'
      )
    if labels.min() < 0 or labels.max() > 9:
      raise ValueError(f'{source}: y_{split} has labels outside 0..9.')
  return Digits(
    _pad(raw['x_train']),
    raw['y_train'].astype(np.int32),
    _pad(raw['x_test']),
    raw['y_test'].astype(np.int32),
  )


def _from_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.is_file():
    raise FileNotFoundError(
      f'No MNIST at {path}. Give --config.train.data=<file>.npz with x_train, '
      'y_train, x_test, y_test, or --config.train.data=tfds.'
    )
  names = ('x_train', 'y_train', 'x_test', 'y_test')
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in names}
  except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path} is not an .npz with {", ".join(names)}: {error}'
    ) from error


def _from_tfds() -> dict[str, np.ndarray]:
  try:
    import tensorflow  # noqa: F401 - else tfds notices after its first output.
    import tensorflow_datasets as tfds

    splits: Any = tfds.as_numpy(
      tfds.load('mnist', split=['train', 'test'], batch_size=-1)
    )
  except ImportError as error:
    raise ValueError(
      'Reading MNIST through tensorflow-datasets needs TensorFlow: '
      'pip install tensorflow, or give --config.train.data=<file>.npz.'
    ) from error
  return {
    f'{axis}_{split}': data[key][..., 0] if key == 'image' else data[key]
    for split, data in zip(('train', 'test'), splits, strict=True)
    for axis, key in (('x', 'image'), ('y', 'label'))
  }


def _pad(images: np.ndarray) -> np.ndarray:
  return np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]


def to_float(images: Any) -> Any:
  """uint8 images -> float32 in [-1, 1]; inverse of `runtime.images`."""
  return images.astype(np.float32) / 127.5 - 1.0
