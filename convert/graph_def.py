"""Reads the constants of a frozen TensorFlow graph, without TensorFlow.

A `.pb` is a GraphDef in protobuf's wire format: nested runs of (field number,
kind, value). Only the few fields that lead to tensors are followed, three
levels deep; nothing is executed, and each length is checked against what is
there before anything is read or allocated.

Source of the numbers: tensorflow/tensorflow, tensorflow/core/framework/
graph.proto, node_def.proto, attr_value.proto, tensor.proto,
tensor_shape.proto, types.proto; and protobuf.dev, "Encoding".
"""

import dataclasses
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .pickle_names import CheckpointError
from .torch_storage import TensorRef

# Kinds of values on the wire.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# DataType -> (NumPy's type, field of TensorProto for its numbers one by one).
_DTYPES = {1: ('<f4', 5), 2: ('<f8', 6)}
_MAX_RANK = 32

Value = int | memoryview


@dataclasses.dataclass(frozen=True)
class Graph:
  """What a graph holds.

  Attributes:
    constants: name -> tensor, of those of type float or double.
    others: names of the constants of other types.
    attributes: name -> attribute -> number, of nodes that are not constants:
      their attributes that are an integer, a float or a truth value.
  """

  constants: dict[str, TensorRef]
  others: list[str]
  attributes: dict[str, dict[str, float]]


def read_graph(path: str | Path) -> Graph:
  """Reads the names and shapes of a graph; its numbers are read when asked for.

  Args:
    path: a GraphDef, as `classify_image_graph_def.pb`.

  Raises:
    CheckpointError: the file is missing, damaged or no graph.
  """
  try:
    data = memoryview(Path(path).read_bytes())
  except OSError as error:
    reason = error.strerror or error
    raise CheckpointError(f'{path}: cannot be opened: {reason}.') from error
  try:
    return _graph(data)
  except CheckpointError as error:
    raise CheckpointError(
      f'{path}: no TensorFlow graph, or a damaged one: {error}; get the file '
      'again.'
    ) from error


def _graph(data: memoryview) -> Graph:
  graph = Graph({}, [], {})
  seen = set()
  for field, value in _fields(data):
    if field != 1:
      continue
    name, operation, attributes = _node(_bytes(value))
    if name in seen:
      raise CheckpointError(f'two nodes named {name[:200]!r}')
    seen.add(name)
    if operation != 'Const':
      graph.attributes[name] = _numbers(attributes)
      continue
    tensor = _tensor(name, attributes)
    if tensor is None:
      graph.others.append(name)
    else:
      graph.constants[name] = tensor
  if not seen:
    raise CheckpointError('it has no nodes')
  return graph


def _node(data: memoryview) -> tuple[str, str, dict[str, memoryview]]:
  """Name, operation and attributes of a NodeDef."""
  name = operation = ''
  attributes = {}
  for field, value in _fields(data):
    if field == 1:
      name = _text(value)
    elif field == 2:
      operation = _text(value)
    elif field == 5:
      entry = dict(_fields(_bytes(value)))
      attributes[_text(entry.get(1, memoryview(b'')))] = _bytes(
        entry.get(2, memoryview(b''))
      )
  return name, operation, attributes


def _numbers(attributes: dict[str, memoryview]) -> dict[str, float]:
  """Those attributes that are one number."""
  out: dict[str, float] = {}
  for name, data in attributes.items():
    for field, value in _fields(data):
      if field in (3, 5) and isinstance(value, int):  # An int, or a bool.
        out[name] = value
      elif field == 4 and isinstance(value, memoryview) and len(value) == 4:
        out[name] = struct.unpack('<f', value)[0]
  return out


def _tensor(name: str, attributes: dict[str, memoryview]) -> TensorRef | None:
  """The value of a constant; None where it is not floating-point."""
  attribute = dict(_fields(attributes.get('value', memoryview(b''))))
  if 8 not in attribute:
    raise CheckpointError(f'the constant {name[:200]!r} has no value')
  fields = list(_fields(_bytes(attribute[8])))
  last = dict(fields)
  kind = last.get(1)
  if not isinstance(kind, int) or kind not in _DTYPES:
    return None
  dtype, one_by_one = _DTYPES[kind]
  shape = _shape(_bytes(last.get(2, memoryview(b''))), name)
  size, width = math.prod(shape), np.dtype(dtype).itemsize
  content = _bytes(last.get(4, memoryview(b'')))
  if not content:
    # Packed into runs, or each for itself; the last stands for all that follow.
    content = memoryview(
      b''.join(_bytes(value) for field, value in fields if field == one_by_one)
    )
    fits = len(content) % width == 0 and width <= len(content) <= size * width
    fits = fits or not size and not content
  else:
    fits = len(content) == size * width
  if not fits:
    raise CheckpointError(
      f'the constant {name[:200]!r} of shape {shape} has {len(content)} bytes'
    )

  def read() -> np.ndarray:
    found = np.frombuffer(content, dtype)
    out = np.empty(size, dtype[1:])
    out[: len(found)] = found
    out[len(found) :] = found[-1:]
    return out.reshape(shape)

  return TensorRef(shape, np.dtype(dtype[1:]), read)


def _shape(data: memoryview, name: str) -> tuple[int, ...]:
  shape = []
  for field, value in _fields(data):
    if field == 2:
      size = dict(_fields(_bytes(value))).get(1, 0)
      # Negative ones, which mean an unknown size, look larger than 2**63.
      if not isinstance(size, int) or size >= 2**31:
        raise CheckpointError(f'the constant {name[:200]!r} has no fixed shape')
      shape.append(size)
  if len(shape) > _MAX_RANK:
    raise CheckpointError(f'the constant {name[:200]!r} has {len(shape)} axes')
  return tuple(shape)


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
  """(field number, value) of a message: an int, or a view of bytes."""
  position = 0
  while position < len(data):
    key, position = _varint(data, position)
    kind = key & 7
    if kind == _VARINT:
      value, position = _varint(data, position)
      yield key >> 3, value
      continue
    if kind == _BYTES:
      length, position = _varint(data, position)
    elif kind in (_FIXED32, _FIXED64):
      length = 4 if kind == _FIXED32 else 8
    else:
      raise CheckpointError(f'a value of unknown kind {kind}')
    if length > len(data) - position:
      raise CheckpointError(
        f'a value of {length} bytes where {len(data) - position} are left'
      )
    yield key >> 3, data[position : position + length]
    position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
  """A number of 7 bits a byte, the lowest first, and where it ends."""
  value = 0
  for shift in range(0, 70, 7):
    if position >= len(data):
      raise CheckpointError('it ends within a number')
    byte = data[position]
    position += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, position
  raise CheckpointError('a number of more than 10 bytes')


def _bytes(value: Value) -> memoryview:
  if isinstance(value, int):
    raise CheckpointError('a number where a message is expected')
  return value


def _text(value: Value) -> str:
  try:
    return bytes(_bytes(value)).decode()
  except UnicodeDecodeError as error:
    raise CheckpointError('a name that is not UTF-8') from error
