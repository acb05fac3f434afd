"""Bounded reads from files and zip archives that may be damaged or hostile.

Data is read by position into fresh memory, not through a memory map: pages of
a map count as memory of the process once they are touched, and a mapped file
that shrinks kills the process where a short read is an error with a message.
"""

import dataclasses
import logging
import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from .pickle_names import CheckpointError

_log = logging.getLogger(__name__)

_AGAIN = 'the download is incomplete or damaged: get the file again'
_ZIP_ERRORS = (
  zipfile.BadZipFile,
  zlib.error,
  struct.error,
  ArithmeticError,
  EOFError,
  LookupError,
  NotImplementedError,
  OSError,
  RuntimeError,
  ValueError,
)
_LOCAL_HEADER = struct.Struct('<4s5H3L2H')  # PKWARE APPNOTE 4.3.7.
_ENCRYPTED, _UTF8 = 0x1, 0x800  # Bits of a member's flags, APPNOTE 4.4.4.
# Weights hardly compress. An archive may grow by this factor, and by this many
# bytes on top so that a small file of zeros passes.
_MAX_GROWTH = 100
_FREE_GROWTH = 64 * 2**20


class File:
  """A file of known size that is read by position."""

  def __init__(self, handle: BinaryIO):
    self.handle = handle
    self.size = handle.seek(0, 2)
    self.head = bytes(self.read(0, min(self.size, 512)))

  def read(self, start: int, count: int) -> bytearray:
    """Returns exactly `count` bytes.

    Raises:
      CheckpointError: the file does not have them, or is closed.
    """
    if self.handle.closed:
      raise CheckpointError('the checkpoint was closed before it was read')
    if start < 0 or count < 0 or start + count > self.size:
      raise CheckpointError(f'data beyond the end of the file; {_AGAIN}')
    data = bytearray(count)
    self.handle.seek(start)
    got = cast(Any, self.handle).readinto(data)  # typeshed's lacks it.
    if got != count:
      raise CheckpointError('the file shrank while it was read')
    return data


class Window:
  """The first `limit` bytes of a file, read in order as pickletools does."""

  def __init__(self, file: File, limit: int):
    self._handle = file.handle
    self._handle.seek(0)
    self._end = min(file.size, limit)
    self._position = 0

  def tell(self) -> int:
    return self._position

  def read(self, count: int) -> bytes:
    data = self._handle.read(min(count, self._end - self._position))
    self._position += len(data)
    return data

  def readline(self) -> bytes:
    data = self._handle.readline(self._end - self._position)
    self._position += len(data)
    return data


@dataclasses.dataclass(frozen=True)
class Member:
  """One file of an archive: `size` bytes, stored at `start` or deflated."""

  info: zipfile.ZipInfo
  start: int

  @property
  def size(self) -> int:
    return self.info.file_size

  @property
  def end(self) -> int:
    return self.start + self.info.compress_size

  @property
  def deflated(self) -> bool:
    return self.info.compress_type == zipfile.ZIP_DEFLATED


class Archive:
  """A zip archive; `members` holds its files by name, checked.

  Each has a name of its own, lies within the file, overlaps no other and does
  not grow absurdly.
  """

  def __init__(self, file: File):
    self._file = file
    try:
      self._zip = zipfile.ZipFile(file.handle)
      infos = [i for i in self._zip.infolist() if not i.is_dir()]
      self.members = {info.filename: self._locate(info) for info in infos}
    except CheckpointError:
      raise
    except _ZIP_ERRORS as error:
      raise CheckpointError(
        f'a zip file of {file.size} bytes that is truncated or damaged '
        f'({error}); {_AGAIN}'
      ) from error
    if len(self.members) != len(infos):
      raise CheckpointError(f'two members of one name in the zip; {_AGAIN}')
    self._check_extents()

  def read(self, member: Member, start: int, count: int) -> bytearray:
    """Returns a part of a member; checks its CRC when it is the whole.

    Raises:
      CheckpointError: the data is damaged or missing.
    """
    if start + count > member.size:
      raise CheckpointError(f'data beyond its zip member; {_AGAIN}')
    if not member.deflated:
      data = self._file.read(member.start + start, count)
      # torch.serialization.set_crc32_options(False) writes 0 for every CRC.
      crc = member.info.CRC
      if crc and count == member.size and zlib.crc32(data) != crc:
        raise CheckpointError(
          f'{member.info.filename} does not fit its checksum; {_AGAIN}'
        )
      return data
    try:
      with self._zip.open(member.info) as stream:
        data = bytearray(stream.read(member.size))
      if len(data) != member.size:
        raise EOFError('it ends early')
    except _ZIP_ERRORS as error:
      raise CheckpointError(
        f'{member.info.filename} is damaged ({error}); {_AGAIN}'
      ) from error
    return data if count == member.size else data[start : start + count]

  def unpack(self, member: Member, folder: Path) -> BinaryIO:
    """Copies a member to a nameless file in `folder`, gone when closed.

    Raises:
      CheckpointError: there is no room for it, or it is damaged.
    """
    room = f'{member.size / 1e9:.2f} GB for {member.info.filename}'
    if shutil.disk_usage(folder).free < member.size:
      raise CheckpointError(
        f'needs {room} in {folder}, which has not as much free; unzip it '
        'elsewhere and name the unpacked file'
      )
    _log.info('Unpacking %s of the zip for the time of reading it.', room)
    try:
      target = tempfile.TemporaryFile(dir=folder)
    except OSError as error:
      raise CheckpointError(
        f'cannot write {room} to {folder} ({error.strerror}); unzip it '
        'elsewhere and name the unpacked file'
      ) from error
    try:
      with self._zip.open(member.info) as source:
        shutil.copyfileobj(source, target, 2**20)
      if target.tell() != member.size:
        raise EOFError('it ends early')
    except _ZIP_ERRORS as error:
      target.close()
      raise CheckpointError(
        f'cannot unpack {room} to {folder} ({error}); {_AGAIN}, or unzip it '
        'yourself and name the unpacked file'
      ) from error
    return target  # pyright: ignore[reportReturnType]

  def _locate(self, info: zipfile.ZipInfo) -> Member:
    """Finds the data of a member behind its local header."""
    if info.flag_bits & _ENCRYPTED:
      raise CheckpointError(f'{info.filename} in the zip is encrypted')
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise CheckpointError(
        f'{info.filename} in the zip is compressed by method '
        f'{info.compress_type}; unzip and zip it again with deflate'
      )
    header = self._file.read(info.header_offset, _LOCAL_HEADER.size)
    magic, *_, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    name_start = info.header_offset + _LOCAL_HEADER.size
    name = self._file.read(name_start, name_size)
    text = name.decode('utf-8' if info.flag_bits & _UTF8 else 'cp437')
    if magic != b'PK\x03\x04' or text != info.orig_filename:
      raise zipfile.BadZipFile(f'no header for {info.filename[:80]}')
    if info.compress_type == 0 and info.compress_size != info.file_size:
      raise zipfile.BadZipFile(f'two sizes for {info.filename[:80]}')
    return Member(info, name_start + name_size + extra_size)

  def _check_extents(self) -> None:
    position = 0
    for member in sorted(self.members.values(), key=lambda m: m.start):
      if member.info.header_offset < position:
        raise CheckpointError('members of the zip overlap: made to mislead')
      position = member.end
    if position > self._zip.start_dir:
      raise CheckpointError(f'zip members beyond the end of the file; {_AGAIN}')
    grown = sum(m.size for m in self.members.values() if m.deflated)
    if grown > _MAX_GROWTH * self._file.size + _FREE_GROWTH:
      raise CheckpointError(
        f'a zip file of {self._file.size} bytes that claims to unpack to '
        f'{grown}: weights do not compress so far'
      )
