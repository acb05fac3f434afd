"""Folders of picture files as sets of images, decoded batch by batch.

Several threads decode, and at most two batches are held at a time.
"""

import collections
import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

import numpy as np
from PIL import Image

from d2dpm_jax.evaluation import preprocess
from d2dpm_jax.evaluation.image_sets import ImageSet

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')
_CHANNELS = {'L': 1, 'RGB': 3}  # Of the modes of PIL that have 8 bits.
_THREADS = min(16, os.cpu_count() or 1)

_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True)
class Square:
  """How pictures of any size become images of one size.

  Attributes:
    method: a key of `preprocess.PREPROCESS`.
    size: height and width of the images.
    channels: 3, or 1 for grey ones; pictures of other kinds are converted.
  """

  method: str
  size: int
  channels: int = 3

  def __post_init__(self) -> None:
    if self.method not in preprocess.PREPROCESS:
      raise ValueError(
        f'Preprocessing {self.method!r}: expected one of '
        f'{["none", *preprocess.PREPROCESS]}.'
      )
    if self.size < 1:
      raise ValueError(f'Images of {self.size} pixels; expected >= 1.')


def from_folder(folder: pathlib.Path, square: Square | None = None) -> ImageSet:
  """All pictures below a folder, in the order of their paths; no labels.

  Args:
    folder: where they are, perhaps in folders of it.
    square: how to make them one size; None if they have one size already.

  Raises:
    ValueError: there are none, or other files too (names that begin with a dot
      do not count); without `square`, a picture that is not as the first one.
      The message names the first such file.
  """
  paths = _find(folder)
  if square is None:
    first = shape_of(str(paths[0]), paths[0])
    for path in paths[1:]:
      if (header := shape_of(str(path), path)) != first:
        raise ValueError(
          f'{path} is {_words(header)}, but {paths[0]} is {_words(first)}: all '
          'pictures of a set must be alike. --config.evaluate.preprocess makes '
          'photographs one size.'
        )
    shape = first
  else:
    shape = (square.size, square.size, square.channels)

  def batches(size: int) -> Iterator[np.ndarray]:
    items = ((str(path), path) for path in paths)
    yield from decode(items, shape, square, size)

  return ImageSet(str(folder), (len(paths), *shape), None, batches)


def decode(
  items: Iterable[tuple[str, pathlib.Path | bytes]],
  shape: tuple[int, int, int],
  square: Square | None,
  size: int,
) -> Iterator[np.ndarray]:
  """Pictures in batches.

  Args:
    items: names for messages, and files or what is in them.
    shape: H, W, C of the images.
    square: how to make them; None if they are so.
    size: B of the batches.

  Yields:
    uint8[B,H,W,C]; the last one may be smaller.

  Raises:
    ValueError: a picture is damaged, or not of this shape; names it.
  """

  def read(item: tuple[str, pathlib.Path | bytes]) -> np.ndarray:
    return _decode(*item, shape, square)

  batch = []
  for image in _in_threads(read, items, 2 * size):
    batch.append(image)
    if len(batch) == size:
      yield np.stack(batch)
      batch = []
  if batch:
    yield np.stack(batch)


def _find(folder: pathlib.Path) -> list[pathlib.Path]:
  """Files below a folder, sorted; all of them pictures, at least one."""
  found = []
  for root, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith('.')]
    found += [
      pathlib.Path(root, name) for name in names if not name.startswith('.')
    ]
  found.sort(key=lambda path: path.relative_to(folder).parts)
  kinds = ', '.join(SUFFIXES)
  if not found:
    raise ValueError(
      f'The folder {folder} has no .npz files and no pictures ({kinds}).'
    )
  for path in found:
    if path.suffix.lower() not in SUFFIXES:
      raise ValueError(
        f'{path} is no picture ({kinds}); a folder of pictures must hold '
        'nothing else.'
      )
  return found


def shape_of(name: str, source: pathlib.Path | bytes) -> tuple[int, int, int]:
  """H, W, C of a picture; its pixels are not read.

  Args:
    name: for messages.
    source: a file, or what is in one.

  Raises:
    ValueError: it cannot be read, or is neither grey nor RGB of 8 bits.
  """
  try:
    with _open(source) as image:
      mode, (width, height) = image.mode, image.size
  except Exception as error:  # Decoders of PIL raise many kinds.
    raise _damaged(name, error) from error
  return (height, width, _channels(name, mode))


def _open(source: pathlib.Path | bytes) -> Image.Image:
  return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _decode(
  name: str,
  source: pathlib.Path | bytes,
  shape: tuple[int, int, int],
  square: Square | None,
) -> np.ndarray:
  """One picture, uint8[H,W,C]."""
  try:
    with _open(source) as image:
      image.load()
  except Exception as error:  # Decoders of PIL raise many kinds.
    raise _damaged(name, error) from error
  # PIL would cut off what is over 8 bits (I, F).
  if square is None or image.mode[0] in 'IF':
    _channels(name, image.mode)
  if square is None:
    pixels: Image.Image = image
  else:
    pixels = image.convert('L' if square.channels == 1 else 'RGB')
    pixels = preprocess.PREPROCESS[square.method](pixels, square.size)
  array = np.asarray(pixels).reshape(pixels.height, pixels.width, -1)
  if array.shape != shape:
    raise ValueError(
      f'{name} is {_words(array.shape)}; expected {_words(shape)}.'
    )
  return array


def _channels(name: str, mode: str) -> int:
  if mode not in _CHANNELS:
    raise ValueError(
      f'{name} is a picture of kind {mode} in the terms of PIL; expected '
      'grey (L) or RGB, of 8 bits and without transparency.'
    )
  return _CHANNELS[mode]


def _words(shape: tuple[int, ...]) -> str:
  height, width, channels = shape
  return f'{width} x {height} pixels of {"RGB" if channels == 3 else "grey"}'


def _damaged(name: str, error: Exception) -> ValueError:
  return ValueError(f'{name} is no readable picture: {error}.')


def _in_threads(
  read: Callable[[_T], np.ndarray], items: Iterable[_T], ahead: int
) -> Iterator[np.ndarray]:
  """`map(read, items)`, at most `ahead` items before they are asked for."""
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    pending: collections.deque[futures.Future[np.ndarray]] = collections.deque()
    try:
      for item in items:
        pending.append(pool.submit(read, item))
        if len(pending) >= ahead:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      for future in pending:
        future.cancel()
