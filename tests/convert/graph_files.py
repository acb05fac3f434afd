"""Writes TensorFlow graphs in protobuf's wire format, field by field."""

import struct

import numpy as np

FLOAT, DOUBLE, INT32, STRING = 1, 2, 3, 7


def varint(value):
  """A number, 7 bits a byte, the lowest first."""
  out = bytearray()
  while value > 127:
    out.append(value & 127 | 128)
    value >>= 7
  return bytes([*out, value])


def field(number, value):
  """One field: an int, or what is preceded by its length."""
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  data = value.encode() if isinstance(value, str) else value
  return varint(number << 3 | 2) + varint(len(data)) + data


def float_field(number, value):
  return varint(number << 3 | 5) + struct.pack('<f', value)


def node(name, operation, attributes=(), inputs=()):
  """A NodeDef as a field of a GraphDef; attributes: name -> AttrValue."""
  entries = [
    field(5, field(1, key) + field(2, value))
    for key, value in dict(attributes).items()
  ]
  names = [field(3, name) for name in inputs]
  return field(
    1, field(1, name) + field(2, operation) + b''.join([*names, *entries])
  )


def shape_field(shape):
  return field(2, b''.join(field(2, field(1, size)) for size in shape))


def constant(name, shape, numbers, dtype=FLOAT):
  """A constant; `numbers` are the fields of its TensorProto that hold them."""
  tensor = field(1, dtype) + shape_field(shape) + numbers
  value = field(8, tensor)
  return node(name, 'Const', {'dtype': field(6, dtype), 'value': value})


def array(name, value):
  """A float constant of an array, as TensorFlow stores large ones."""
  value = np.asarray(value, '<f4')
  return constant(name, value.shape, field(4, value.tobytes()))


def batch_norm(name, epsilon=1e-3, scale=True):
  """The operation that the constants of a batch norm belong to."""
  attributes = {
    'variance_epsilon': float_field(4, epsilon),
    'scale_after_normalization': field(5, int(scale)),
    'T': field(6, FLOAT),
  }
  return node(name, 'BatchNormWithGlobalNormalization', attributes)
