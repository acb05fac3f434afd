"""Sets of images on disk, read batch by batch.

The format is that of openai/guided-diffusion: an .npz with arr_0, uint8 images
[N,H,W,C], and, for class-conditional samples, arr_1, N integer labels. A folder
of such files is one set, in the order of their names.
"""

import contextlib
import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from d2dpm_jax.runtime.files import DAMAGE


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
  """Images that need not fit into memory.

  Attributes:
    name: where they are from, as shown to the user.
    shape: N, H, W, C.
    labels: int[N], or None.
    batches: (size) -> uint8[B,H,W,C] each, B = size but at the end of a file.
  """

  name: str
  shape: tuple[int, int, int, int]
  labels: np.ndarray | None
  batches: Callable[[int], Iterator[np.ndarray]]


def from_arrays(
  name: str, images: np.ndarray, labels: np.ndarray | None = None
) -> ImageSet:
  """A set in memory, uint8[N,H,W,C] and int[N] or None."""
  _check_images(name, images.shape, images.dtype)
  if labels is not None:
    _check_labels(name, labels, len(images))

  def batches(size):
    for start in range(0, len(images), size):
      yield images[start : start + size]

  return ImageSet(name, images.shape, labels, batches)


def from_path(path: pathlib.Path) -> ImageSet:
  """A set in one .npz, or in all of a folder.

  Raises:
    ValueError: there is nothing, it cannot be read, or it is not such a set;
      the message names the file.
  """
  if not path.exists():
    raise ValueError(f'There are no images at {path}.')
  files = sorted(path.glob('*.npz')) if path.is_dir() else [path]
  if not files:
    raise ValueError(f'The folder {path} has no .npz files.')
  headers = [_header(file) for file in files]
  labels = [
    _labels(file, count)
    for file, (count, *_) in zip(files, headers, strict=True)
  ]
  shape = headers[0][1:]
  for file, (_, *other) in zip(files, headers, strict=True):
    if tuple(other) != shape:
      raise ValueError(
        f'{path} holds images of several sizes: {list(shape)} in '
        f'{files[0].name}, but {other} in {file.name}.'
      )
  known = [x for x in labels if x is not None]
  if known and len(known) < len(files):
    raise ValueError(f'{path}: some of the files have labels and some do not.')
  count = sum(shape[0] for shape in headers)

  def batches(size):
    for file in files:
      yield from _read_batches(file, size)

  return ImageSet(
    str(path),
    (count, *shape),
    np.concatenate(known) if known else None,
    batches,
  )


def _check_images(name: str, shape: tuple[int, ...], dtype: Any) -> None:
  if len(shape) != 4 or shape[-1] not in (1, 3) or dtype != np.uint8:
    raise ValueError(
      f'{name}: the images are {dtype}{list(shape)}; expected '
      'uint8[N, H, W, C] with values 0..255 and 1 or 3 channels'
      f'{_remedy(shape, dtype)}.'
    )
  if not shape[0]:
    raise ValueError(f'{name} has no images.')


def _remedy(shape: tuple[int, ...], dtype: Any) -> str:
  """What to do about images of another kind, where that is plain."""
  if dtype.kind == 'f':
    return (
      '. Of floats from 0 to 255 and without NaN, save '
      'x.round().clip(0, 255).astype(np.uint8); of -1..1, take (x + 1) * 127.5 '
      'first'
    )
  if dtype != np.uint8:
    return '; if they are from 0 to 255, save x.astype(np.uint8)'
  if len(shape) == 3:
    return '; of grey images, save x[..., None]'
  if len(shape) == 4 and shape[1] in (1, 3):
    return '; channels come last: save x.transpose(0, 2, 3, 1)'
  return ''


def _check_labels(name: str, labels: np.ndarray, count: int) -> None:
  if labels.shape != (count,) or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'{name}: the labels are {labels.dtype}{list(labels.shape)}; expected '
      f'{count} integers.'
    )


@contextlib.contextmanager
def _member(path: pathlib.Path, name: str) -> Iterator[tuple[IO[bytes], Any]]:
  """Opens one array of an .npz: its stream after the header, (shape, dtype).

  Raises:
    ValueError: it cannot be read as numbers; nothing is ever unpickled.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      with archive.open(f'{name}.npy') as stream:
        version = np.lib.format.read_magic(stream)
        read = {
          (1, 0): np.lib.format.read_array_header_1_0,
          (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
          raise ValueError(f'{name} holds pickled objects, not numbers')
        if fortran and len(shape) > 1:
          raise ValueError(f'{name} is in Fortran order; save it in C order')
        yield stream, (shape, dtype)
  except OSError:
    raise  # It names the path, and what the system has against it.
  except DAMAGE as error:
    raise ValueError(
      f'{path} is no readable .npz: {_reason(error, path, name)}.'
    ) from error


def _reason(error: Exception, path: pathlib.Path, name: str) -> str:
  remedy = f'; images are saved by np.savez(path, {name}=images)'
  if isinstance(error, KeyError):
    with zipfile.ZipFile(path) as archive:
      found = {name.removesuffix('.npy') for name in archive.namelist()}
    if {'meta', 'mu'} <= found:
      return 'it holds statistics, which serve as reference but not as samples'
    if name not in found:
      return f'it has no array {name}, but {sorted(found)}{remedy}'
  if not zipfile.is_zipfile(path):
    return f'it is damaged or another kind of file{remedy}'
  return str(error).rstrip('.') or type(error).__name__


def _header(path: pathlib.Path) -> tuple[int, int, int, int]:
  with _member(path, 'arr_0') as (_, (shape, dtype)):
    pass
  _check_images(str(path), shape, dtype)
  return shape


def _labels(path: pathlib.Path, count: int) -> np.ndarray | None:
  with zipfile.ZipFile(path) as archive:
    if 'arr_1.npy' not in archive.namelist():
      return None
  with _member(path, 'arr_1') as (stream, (shape, dtype)):
    labels = np.frombuffer(stream.read(), dtype)
    if labels.size != np.prod(shape, dtype=int):
      raise ValueError('arr_1 is cut off')
  labels = labels.reshape(shape)
  _check_labels(str(path), labels, count)
  return labels


def _read_batches(path: pathlib.Path, size: int) -> Iterator[np.ndarray]:
  with _member(path, 'arr_0') as (stream, ((count, *image), dtype)):
    each = int(np.prod(image))
    for start in range(0, count, size):
      wanted = min(size, count - start)
      data = stream.read(wanted * each)
      if len(data) != wanted * each:
        raise ValueError(f'arr_0 is cut off at image {start}')
      yield np.frombuffer(data, dtype).reshape(wanted, *image)
