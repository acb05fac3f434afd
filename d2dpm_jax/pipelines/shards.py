"""Samples on disk: a file for every finished batch, and one for all of them.

Below samples/ of a work directory, shards/00000064-00000128.npz holds the
images 64 to 127: `arr_0` uint8[B,H,W,C], `arr_1` int32[B], their labels, and
`range`, what the name says; a checksum is behind. Each is written whole or not
at all. Shards may have any sizes, so that other batch sizes, other numbers of
processes and more images than before fit to what is there.
"""

import dataclasses
import logging
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from d2dpm_jax.runtime import files

_log = logging.getLogger(__name__)
_NAME = re.compile(r'(\d{8,})-(\d{8,})\.npz')
_DATE = (1980, 1, 1, 0, 0, 0)  # Of every file: equal images are equal bytes.


class Range(NamedTuple):
  """Images `start` to `stop` - 1."""

  start: int
  stop: int


class Shard(NamedTuple):
  """The images of a range, uint8[B,H,W,C], and labels, int32[B]."""

  images: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shards:
  """A directory of shards."""

  directory: pathlib.Path

  def path(self, which: Range) -> pathlib.Path:
    return self.directory / f'{which.start:08d}-{which.stop:08d}.npz'

  def write(self, start: int, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes the images from number `start` on."""
    which = Range(start, start + len(images))
    with files.checked_write(self.path(which)) as file:
      np.savez(file, arr_0=images, arr_1=labels, range=np.array(which))

  def ranges(self) -> list[Range]:
    """What there is by name, in order."""
    if not self.directory.is_dir():
      return []
    names = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
    return sorted(Range(*map(int, name.groups())) for name in names if name)

  def read(self, which: Range) -> Shard:
    """Reads a shard.

    Raises:
      ValueError: it cannot be read, or is another one.
    """
    path = self.path(which)
    try:
      with np.load(path, allow_pickle=False) as file:
        if tuple(file['range']) != which:
          raise ValueError(f'it holds the images {file["range"]}')
        return Shard(file['arr_0'], file['arr_1'])
    except files.DAMAGE as error:
      raise ValueError(
        f'{path} is damaged ({error}); run the same command again.'
      ) from error

  def remove_damaged(self) -> None:
    """Removes what is not as it was written, with a warning."""
    for which in self.ranges():
      path = self.path(which)
      if not (files.is_intact(path) and self._is_itself(which)):
        _log.warning('%s is damaged; its images are made again.', path)
        path.unlink()

  def _is_itself(self, which: Range) -> bool:
    try:
      with np.load(self.path(which), allow_pickle=False) as file:
        return tuple(file['range']) == which
    except files.DAMAGE:
      return False

  def count(self, wanted: int) -> int:
    """How many of the first `wanted` images there are."""
    return wanted - sum(b - a for a, b in holes(self.ranges(), wanted))

  def merge(self, target: pathlib.Path, wanted: int) -> None:
    """Writes the first images into one .npz, as OpenAI's evaluator reads it.

    The file is the same whatever the shards are. Shards are in memory one after
    the other.

    Args:
      target: arr_0, uint8[N,H,W,C], and arr_1, int32[N].
      wanted: N.

    Raises:
      ValueError: some are missing or damaged.
    """
    missing = holes(self.ranges(), wanted)
    if missing:
      raise ValueError(f'{self.directory} has no images {missing}.')
    labels: list[np.ndarray] = []

    def images() -> Iterator[np.ndarray]:
      done = 0
      for which in self.ranges():
        if which.start >= wanted or which.stop <= done:
          continue
        shard = self.read(which)
        rows = slice(done - which.start, wanted - which.start)
        labels.append(shard.labels[rows])
        yield shard.images[rows]
        done = min(which.stop, wanted)

    _, *size = self.read(self.ranges()[0]).images.shape
    with (
      files.atomic_write(target) as file,
      zipfile.ZipFile(file, 'w') as archive,
    ):
      _write_member(archive, 'arr_0', (wanted, *size), np.uint8, images())
      _write_member(archive, 'arr_1', (wanted,), np.int32, labels)


def holes(ranges: Iterable[Range], wanted: int) -> list[Range]:
  """What is missing of the first images."""
  found, done = [], 0
  for which in (*sorted(ranges), Range(wanted, wanted)):
    if done < min(which.start, wanted):
      found.append(Range(done, min(which.start, wanted)))
    done = max(done, which.stop)
  return found


def split(ranges: Iterable[Sequence[int]], size: int) -> list[Range]:
  """Cuts ranges into batches of at most `size` images."""
  return [
    Range(first, min(first + size, stop))
    for start, stop in ranges
    for first in range(start, stop, size)
  ]


def _write_member(
  archive: zipfile.ZipFile,
  name: str,
  shape: tuple[int, ...],
  dtype: Any,
  parts: Iterable[np.ndarray],
) -> None:
  """Writes one array of an .npz part by part."""
  info = zipfile.ZipInfo(f'{name}.npy', _DATE)
  with archive.open(info, 'w', force_zip64=True) as stream:
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {'descr': descr, 'fortran_order': False, 'shape': shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for part in parts:
      stream.write(np.ascontiguousarray(part).data)
