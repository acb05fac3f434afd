"""The two formats of torch.save: a zip since PyTorch 1.6, pickles before.

Source: pytorch/pytorch, torch/serialization.py (`_save`, `_legacy_save`).
"""

import io
import struct
from typing import Any

import numpy as np

from . import restricted_unpickler
from .checkpoint_files import Archive, File, Member, Window
from .pickle_names import CheckpointError
from .torch_storage import TORCH_NAMES, Storage, parse_persistent_id

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# The pickle of the largest LDM with its optimizer is below 2 MB.
_MAX_PICKLE = 16 * 2**20


def find_pickle(archive: Archive) -> Member | None:
  """Returns the record data.pkl of torch.save's zip format, if there is one.

  Raises:
    CheckpointError: there are several, or the file is a TorchScript
      program.
  """
  members = archive.members
  found = [n for n in members if n == 'data.pkl' or n.endswith('/data.pkl')]
  if len(found) > 1:
    raise CheckpointError(f'the zip holds {len(found)} records data.pkl')
  if any(name.endswith('/constants.pkl') for name in members):
    raise CheckpointError(
      'a TorchScript program, not a checkpoint; load it in PyTorch and '
      'torch.save its state_dict()'
    )
  return members[found[0]] if found else None


def read_zip(archive: Archive, pickled: Member) -> Any:
  """Builds the object of a zip file; its tensors refer to the archive.

  Raises:
    CheckpointError: the file is not what torch.save writes.
  """
  prefix = pickled.info.filename.removesuffix('data.pkl')
  order = b'little'
  if byteorder := archive.members.get(f'{prefix}byteorder'):
    order = bytes(archive.read(byteorder, 0, byteorder.size))
  if order not in (b'little', b'big'):
    raise CheckpointError(f'byte order {order[:20]!r} is unknown')
  if pickled.size > _MAX_PICKLE:
    raise CheckpointError(
      f'data.pkl has {pickled.size} bytes, more than the {_MAX_PICKLE} that '
      'the description of any known model needs'
    )
  storages: dict[str, Storage] = {}

  def persistent(pid: Any) -> Storage:
    key, dtype, size = parse_persistent_id(pid)
    if key not in storages:
      member = archive.members.get(f'{prefix}data/{key}')
      if member is None or member.size != size * dtype.itemsize:
        raise CheckpointError(
          f'storage {key[:80]!r} should have {size * dtype.itemsize} bytes but '
          f'{"is missing" if member is None else f"has {member.size}"}'
        )
      storages[key] = Storage(
        dtype,
        size,
        order == b'big',
        lambda start, count: archive.read(member, start, count),
      )
    return _same(storages[key], key, dtype, size)

  stream = io.BytesIO(archive.read(pickled, 0, pickled.size))
  return restricted_unpickler.load(stream, TORCH_NAMES, persistent)


def _same(storage: Storage, key: str, dtype: np.dtype, size: int) -> Storage:
  if (storage.dtype, storage.size) != (dtype, size):
    raise CheckpointError(f'storage {key[:80]!r} is described in two ways')
  return storage


def read_legacy(file: File) -> Any:
  """Builds the object of a file by PyTorch before 1.6.

  Five pickles (magic number, protocol, system, object, storage keys), then for
  each key its int64 size and its data, little-endian on every system.

  Raises:
    CheckpointError: the file is not what torch.save wrote.
  """
  stream = Window(file, _MAX_PICKLE)
  if restricted_unpickler.load(stream, {}) != _LEGACY_MAGIC:
    raise CheckpointError(
      'a Python pickle that torch.save did not write; save its weights by '
      'torch.save or as .safetensors'
    )
  if restricted_unpickler.load(stream, {}) != _LEGACY_PROTOCOL:
    raise CheckpointError('written by an unknown version of torch.save')
  restricted_unpickler.load(stream, {})
  storages: dict[str, Storage] = {}

  def persistent(pid: Any) -> Storage:
    key, dtype, size = parse_persistent_id(pid)
    storage = storages.setdefault(key, Storage(dtype, size))
    return _same(storage, key, dtype, size)

  content = restricted_unpickler.load(stream, TORCH_NAMES, persistent)
  keys = restricted_unpickler.load(stream, {})
  # Types first: text or hash of a nested container can take for ever.
  if (
    not isinstance(keys, list)
    or not all(isinstance(key, str) for key in keys)
    or set(keys) != set(storages)
    or len(keys) != len(storages)
  ):
    raise CheckpointError('its tensors do not fit its list of storages')
  _locate_storages(file, stream.tell(), keys, storages)
  return content


def _locate_storages(
  file: File, position: int, keys: list[str], storages: dict[str, Storage]
) -> None:
  """Gives the storages of a legacy file their data, which follows in order."""
  for key in keys:
    storage = storages[key]
    (size,) = struct.unpack('<q', file.read(position, 8))
    if size != storage.size:
      raise CheckpointError(
        f'storage {key[:80]!r} should have {storage.size} elements but has '
        f'{size}'
      )
    begin = position + 8
    position = begin + storage.nbytes
    if position > file.size:
      raise CheckpointError(
        f'truncated at {file.size} bytes, within storage {key[:80]!r}; the '
        'download is incomplete: get the file again'
      )
    storage.read_bytes = lambda start, count, begin=begin: file.read(
      begin + start, count
    )
