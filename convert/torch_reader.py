"""Opens files of weights, PyTorch's or .safetensors, and runs nothing of them.

    with open_checkpoint('cin256/model.ckpt') as checkpoint:
      checkpoint.contents['global_step']
      for name, tensor in checkpoint.items():
        tensor.shape, tensor.dtype, tensor.read()

A `.ckpt` is a pickle from the internet. Neither PyTorch nor any class that the
file mentions is needed or imported: `restricted_unpickler` builds tensors and
plain containers, `pickle_names` tells what is refused and what becomes an inert
placeholder, `torch_storage` checks every tensor against the file. Placeholders
are accepted beside the weights (`callbacks`, `hyper_parameters`), never among
them. Tensors are read one by one, when asked for.

Formats: the zip of torch.save since 1.6, its older format, .safetensors, and a
folder or a .zip that holds one of these, as the LDM authors publish them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from . import torch_formats
from .checkpoint_files import Archive, File
from .pickle_names import CheckpointError, Opaque
from .torch_storage import TensorRef

__all__ = [
  'Checkpoint',
  'CheckpointError',
  'Opaque',
  'TensorRef',
  'open_checkpoint',
]

_SCALARS = (str, bytes, bytearray, int, float, type(None))
_SUFFIXES = ('.ckpt', '.pt', '.pth', '.safetensors')
_SAFETENSORS_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U8': np.uint8,
  'BOOL': np.bool_,
}
# First bytes of files that are taken for checkpoints, and what to do.
_IMPOSTORS = (
  (
    b'version https://git-lfs',
    'a Git LFS pointer, not the weights: run git '
    'lfs pull, or download the file itself',
  ),
  (
    b'<',
    'a web page (HTML or XML), not the weights: the link led to a page, '
    'maybe an error or a login; open it in a browser and download the file',
  ),
  (b'\x1f\x8b', 'compressed by gzip: unpack it first'),
  (b'\x89HDF', 'an HDF5 file (Keras or MATLAB), not a PyTorch checkpoint'),
)


class Checkpoint(Mapping[str, TensorRef]):
  """The tensors of a file by name, and what else it holds.

  Attributes:
    path: the file that was opened.
    contents: everything but the tensors of the mapping: dicts, lists, scalars,
      and `Opaque` where an object of some class was. The weights may lie at the
      top or in 'state_dict'; the rest of it is then in contents['state_dict'].
  """

  def __init__(
    self,
    path: Path,
    tensors: dict[str, TensorRef],
    contents: dict,
    resources: contextlib.ExitStack,
  ):
    self.path = path
    self.contents = contents
    self._tensors = tensors
    self._resources = resources

  def __getitem__(self, name: str) -> TensorRef:
    return self._tensors[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)

  def close(self) -> None:
    """Closes the file; tensors not read by then cannot be read anymore."""
    self._resources.close()

  def __enter__(self) -> 'Checkpoint':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
  """Opens a file of weights without reading the weights yet.

  Args:
    path: a file of one of this module's formats, or a folder that holds one,
      named model.ckpt or the only one of its kind.

  Returns:
    Its tensors and contents; close it after use, or use it in a `with`.

  Raises:
    CheckpointError: the file is missing, damaged, dangerous, or no checkpoint;
      the message says which and what to do.
  """
  with contextlib.ExitStack() as resources:
    try:
      found = _find(Path(path))
      tensors, contents = _open(found, resources)
    except CheckpointError as error:
      raise CheckpointError(f'{path}: {error}.') from error
    except OSError as error:
      reason = error.strerror or error
      raise CheckpointError(f'{path}: cannot be opened: {reason}.') from error
    named = {k: _named(f'{path}: {k}', tensor) for k, tensor in tensors.items()}
    return Checkpoint(found, named, contents, resources.pop_all())


def _named(name: str, tensor: TensorRef) -> TensorRef:
  """Makes errors of a late read name file and tensor."""

  def read() -> np.ndarray:
    try:
      return tensor.read()
    except (CheckpointError, OSError) as error:
      raise CheckpointError(f'{name}: {error}.') from error

  return dataclasses.replace(tensor, load=read)


def _find(path: Path) -> Path:
  """Returns the file itself, or the one to take from a folder."""
  if path.is_dir():
    names = [p.name for p in path.iterdir() if p.is_file()]
    path = path / _choose(names, 'this folder')
  if path.exists() and not path.is_file():
    raise CheckpointError('not a regular file')
  return path


def _choose(names: list[str], where: str) -> str:
  """Picks model.ckpt, or the only checkpoint among `names`."""
  candidates = [
    name
    for name in names
    if Path(name).suffix in _SUFFIXES
    and not name.startswith('__MACOSX/')
    and not Path(name).name.startswith('.')
  ]
  models = [n for n in candidates if Path(n).name == 'model.ckpt']
  choice = models or candidates
  if len(choice) == 1:
    return choice[0]
  listed = ', '.join(sorted(choice or names)[:10])[:300] or 'nothing'
  raise CheckpointError(
    f'{where} holds {"several checkpoints" if choice else "no checkpoint"} '
    f'({listed}); name one file ({", ".join(_SUFFIXES)})'
  )


def _open(
  path: Path, resources: contextlib.ExitStack
) -> tuple[dict[str, TensorRef], dict]:
  """Tells the formats apart by their first bytes."""
  file = File(resources.enter_context(path.open('rb')))
  if path.suffix == '.safetensors' or file.head[8:9] == b'{':
    _refuse_impostors(file)
    return _open_safetensors(path, resources)
  return _split(_read_torch(file, resources, path.parent))


def _read_torch(
  file: File, resources: contextlib.ExitStack, folder: Path | None
) -> Any:
  """Builds the object of a file by torch.save, or of one such in a zip.

  Args:
    file: its bytes.
    resources: keeps an unpacked file until the checkpoint is closed.
    folder: where to unpack to; None where a zip in a zip is refused.
  """
  if file.head.startswith(b'\x80'):
    return torch_formats.read_legacy(file)
  if not file.head.startswith(b'PK'):
    _refuse_impostors(file)
    raise CheckpointError(
      f'no checkpoint: {file.size} bytes that begin with {file.head[:16]!r}, '
      'neither a zip nor a pickle of torch.save nor .safetensors'
    )
  archive = Archive(file)
  pickled = torch_formats.find_pickle(archive)
  if pickled is not None:
    return torch_formats.read_zip(archive, pickled)
  if folder is None:
    raise CheckpointError('a zip within a zip: unpack the outer one')
  member = archive.members[_choose(list(archive.members), 'this zip')]
  inner = resources.enter_context(archive.unpack(member, folder))
  return _read_torch(File(inner), resources, None)


def _open_safetensors(
  path: Path, resources: contextlib.ExitStack
) -> tuple[dict[str, TensorRef], dict]:
  """Reads the header by the safetensors library; its metadata is contents."""
  try:
    handle = resources.enter_context(safetensors.safe_open(path, 'numpy'))
    tensors = {name: _safetensor(handle, name) for name in handle.keys()}
    return tensors, dict(handle.metadata() or {})
  except safetensors.SafetensorError as error:
    raise CheckpointError(
      f'a damaged or truncated .safetensors file ({str(error)[:200]}); get '
      'the file again'
    ) from error


def _safetensor(handle: Any, name: str) -> TensorRef:
  entry = handle.get_slice(name)
  dtype = _SAFETENSORS_DTYPES.get(entry.get_dtype())
  if dtype is None:
    raise CheckpointError(f'{name[:200]!r} is of type {entry.get_dtype()}')

  def read() -> np.ndarray:
    try:
      return handle.get_tensor(name)
    except safetensors.SafetensorError as error:
      raise CheckpointError(f'{name[:200]!r}: {error}') from error

  return TensorRef(tuple(entry.get_shape()), np.dtype(dtype), read)


def _split(content: Any) -> tuple[dict[str, TensorRef], dict]:
  """Separates the weights from what else the object holds."""
  weights = content
  if isinstance(content, dict):
    weights = content.get('state_dict', content)
  if not isinstance(weights, dict):
    kind = getattr(weights, 'name', type(weights).__name__)
    raise CheckpointError(
      f'holds an object of class {kind[:200]}, not named weights; load it in '
      'PyTorch and torch.save its state_dict()'
    )
  tensors = {
    name: value
    for name, value in weights.items()
    if isinstance(name, str) and isinstance(value, TensorRef)
  }
  rest = {k: v for k, v in weights.items() if k not in tensors}
  _refuse_placeholders(rest)
  if not tensors:
    names = ', '.join(map(str, list(weights)[:10]))[:300]
    raise CheckpointError(
      f'holds no tensors at its top or in state_dict, but {names or "nothing"}'
    )
  if weights is content:
    return tensors, rest
  return tensors, {**content, 'state_dict': rest}


def _refuse_placeholders(weights: dict) -> None:
  """Among the weights only tensors and plain values are understood."""
  seen: set[int] = set()
  left = [
    (key, item) for key, value in weights.items() for item in (key, value)
  ]
  while left:
    name, item = left.pop()
    if id(item) in seen:
      continue
    seen.add(id(item))
    if isinstance(item, dict):
      left += [(name, part) for pair in item.items() for part in pair]
    elif isinstance(item, list | tuple | set | frozenset):
      left += [(name, part) for part in item]
    elif not isinstance(item, (TensorRef, *_SCALARS)):
      kind = getattr(item, 'name', type(item).__name__)
      raise CheckpointError(
        f'refused: {str(name)[:200]!r} among its weights is no tensor but '
        f'{kind[:200]}, which this reader neither knows nor calls'
      )


def _refuse_impostors(file: File) -> None:
  """Stops at files that are often taken for checkpoints; says what they are."""
  if not file.size:
    raise CheckpointError('an empty file; the download failed: get it again')
  for magic, meaning in _IMPOSTORS:
    if file.head.lstrip(b'\xef\xbb\xbf \t\r\n').startswith(magic):
      raise CheckpointError(meaning)
  if file.head[257:262] == b'ustar':
    raise CheckpointError(
      'a tar archive, as PyTorch before 0.1.10 wrote: unpack it first'
    )
