"""How PyTorch lays tensors over storages, checked and read without PyTorch.

A storage is a flat run of numbers; a tensor is (storage, offset, shape,
strides). Several tensors may share a storage, and a tensor need not be
contiguous. Every number here comes from the file and is checked against what
the file holds before anything is read or allocated.

Source of the formats: pytorch/pytorch, torch/_utils.py (`_rebuild_*`) and
torch/serialization.py (`persistent_id`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .pickle_names import CheckpointError, Known, Opaque

_DTYPES: Mapping[str, Any] = {
  'Float': np.float32,
  'Half': np.float16,
  'BFloat16': ml_dtypes.bfloat16,
  'Double': np.float64,
  'Long': np.int64,
  'Int': np.int32,
  'Short': np.int16,
  'Char': np.int8,
  'Byte': np.uint8,
  'Bool': np.bool_,
}
# Stride 0 makes a large tensor of a small storage. Such a tensor is an honest
# one up to this size; beyond, only if its storage is as large.
_MAX_EXPANDED_BYTES = 16 * 2**20
_MAX_RANK = 32


@dataclasses.dataclass(frozen=True, eq=False)
class TensorRef:
  """A tensor of a file, not yet read.

  Attributes:
    shape: as in the file, torch's order of axes.
    dtype: of the array that `read` returns, in native byte order.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray] = dataclasses.field(repr=False)

  def read(self) -> np.ndarray:
    """Reads the tensor: dtype[shape], contiguous, writable, its own memory.

    Raises:
      CheckpointError: the file changed since, or a checksum does not fit.
    """
    return self.load()


@dataclasses.dataclass(eq=False)
class Storage:
  """A flat run of `size` numbers; `read_bytes(start, count)` fetches a part."""

  dtype: np.dtype
  size: int
  big_endian: bool = False
  read_bytes: Callable[[int, int], bytearray] | None = None

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  def read(self, start: int, count: int) -> np.ndarray:
    """Returns numbers `start` to `start + count` in native byte order.

    Raises:
      CheckpointError: the data are not in the file.
    """
    if self.read_bytes is None:
      raise CheckpointError('a tensor whose data is not in the file')
    width = self.dtype.itemsize
    raw = np.frombuffer(self.read_bytes(start * width, count * width), np.uint8)
    if self.dtype == np.bool_:
      return raw != 0  # Other bytes than 0 and 1 are undefined in NumPy.
    order = '>' if self.big_endian else '<'
    integers = raw.view(f'{order}u{width}')
    return integers.astype(f'=u{width}', copy=False).view(self.dtype)


@dataclasses.dataclass(frozen=True)
class StorageType:
  """What `torch.FloatStorage` and its kin stand for in a persistent id."""

  dtype: np.dtype


def parse_persistent_id(pid: Any) -> tuple[str, np.dtype, int]:
  """Returns key, dtype and size of the storage that a persistent id names.

  Raises:
    CheckpointError: it names none, or one of a kind that is not read.
  """
  match pid:
    case ('storage', StorageType(dtype), str(key), str(_), int(size)):
      pass
    case ('storage', StorageType(dtype), str(key), str(_), int(size), None):
      pass
    case ('storage', StorageType(), str(key), *_):
      raise CheckpointError(
        f'storage {key[:80]!r} is a view of another one, as PyTorch before '
        '0.4 wrote them; load and save the file with a newer PyTorch'
      )
    case ('storage', kind, *_) if not isinstance(kind, StorageType):
      name = kind.name if isinstance(kind, Opaque) else type(kind).__name__
      raise CheckpointError(
        f'a storage of type {name[:80]}; this reader knows {", ".join(_DTYPES)}'
      )
    case _:
      raise CheckpointError('a storage that is not described as torch does')
  if not 0 <= size < 2**60:
    raise CheckpointError(f'storage {key[:80]!r} of impossible size {size}')
  return key, dtype, size


def rebuild_tensor(
  storage: Any, offset: Any, shape: Any, stride: Any, *_: Any
) -> TensorRef:
  """Lays a tensor over a storage, as torch._utils._rebuild_tensor_v2.

  Args:
    storage: the `Storage` that a persistent id gave.
    offset: number of the first element in the storage.
    shape: tuple of int.
    stride: tuple of int, in elements.

  Raises:
    CheckpointError: the tensor reaches beyond its storage or is absurd.
  """
  if not (
    isinstance(storage, Storage)
    and type(offset) is int
    and _are_sizes(shape)
    and _are_sizes(stride)
    and len(shape) == len(stride) <= _MAX_RANK
  ):
    raise CheckpointError('a tensor with damaged shape, stride or storage')
  axes = list(zip(shape, stride, strict=True))
  span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in axes)
  if offset < 0 or offset + span > storage.size:
    raise CheckpointError(
      f'a tensor of shape {shape}, stride {stride} and offset {offset} '
      f'reaches beyond its storage of {storage.size} elements'
    )
  nbytes = math.prod(n or 1 for n in shape) * storage.dtype.itemsize
  if nbytes > max(storage.nbytes, _MAX_EXPANDED_BYTES):
    raise CheckpointError(
      f'a tensor of shape {shape} claims {nbytes} bytes but its storage has '
      f'only {storage.nbytes}'
    )

  def read() -> np.ndarray:
    flat = storage.read(offset, span)
    if not span or _is_contiguous(axes):
      return flat.reshape(shape)
    steps = [s * flat.itemsize if n > 1 else 0 for n, s in axes]
    # A flat array of `span` elements holds exactly what the strides reach.
    view = np.lib.stride_tricks.as_strided(flat, shape, steps)
    return np.array(view, order='C')

  return TensorRef(shape, storage.dtype, read)


def _are_sizes(value: Any) -> bool:
  return isinstance(value, tuple) and all(
    type(n) is int and 0 <= n < 2**60 for n in value
  )


def _is_contiguous(axes: list[tuple[int, int]]) -> bool:
  """Row-major without gaps; the stride of an axis of length 1 is any."""
  step = 1
  for n, s in reversed(axes):
    if n != 1 and s != step:
      return False
    step *= n
  return True


def _rebuild_parameter(data: Any, *_: Any) -> TensorRef:
  """A torch.nn.Parameter is its tensor; gradients and hooks are dropped."""
  if not isinstance(data, TensorRef):
    raise CheckpointError('a parameter that is no tensor')
  return data


def _as_size(shape: Any = ()) -> tuple:
  """torch.Size is a tuple of integers."""
  if not isinstance(shape, tuple):
    raise TypeError('torch.Size of no tuple')
  return shape


# What the pickle of a checkpoint may call or refer to.
TORCH_NAMES: Mapping[str, Any] = {
  'torch._utils._rebuild_tensor': Known(rebuild_tensor),
  'torch._utils._rebuild_tensor_v2': Known(rebuild_tensor),
  'torch._utils._rebuild_parameter': Known(_rebuild_parameter),
  'torch._utils._rebuild_parameter_with_state': Known(_rebuild_parameter),
  'torch.Size': Known(_as_size),
  **{
    f'torch.{name}Storage': StorageType(np.dtype(dtype))
    for name, dtype in _DTYPES.items()
  },
}
