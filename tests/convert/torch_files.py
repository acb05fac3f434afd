"""Makes small files of torch.save's formats, opcode by opcode, for tests."""

import pickle
import zipfile

import numpy as np


def push(value):
  """The opcodes that push a value, of protocol 2."""
  return pickle.dumps(value, 2)[2:-1]


def push_global(path):
  """The opcodes that push what `path`, 'module.name', refers to."""
  module, name = path.rsplit('.', 1)
  return f'c{module}\n{name}\n'.encode()


def push_storage(key='0', size=6, kind='torch.FloatStorage', tail=b''):
  """The opcodes that push a storage by its persistent id."""
  parts = push('storage'), push_global(kind), push(key), push('cpu'), push(size)
  return b'(' + b''.join(parts) + tail + b'tQ'


def push_tensor(
  storage=None,
  offset=0,
  shape=(2, 3),
  stride=(3, 1),
  call='torch._utils._rebuild_tensor_v2',
):
  """The opcodes that push a tensor, by default float32[2, 3] of storage 0."""
  args = b''.join(map(push, (offset, shape, stride, False, {})))
  return push_global(call) + b'(' + (storage or push_storage()) + args + b'tR'


def pickle_weights(weights=None, **more):
  """A pickle of {'state_dict': {'w': tensor, …}, …} from opcodes."""
  items = {'w': push_tensor(), **(weights or {})}
  inner = b''.join(push(key) + item for key, item in items.items())
  outer = b''.join(push(key) + item for key, item in more.items())
  return (
    b'\x80\x02}(' + push('state_dict') + b'}(' + inner + b'u' + outer + b'u.'
  )


def write_zip(path, pickled, storages=None, method=zipfile.ZIP_STORED):
  """Writes a file of torch.save; storage 0 holds 0 to 5 as float32."""
  data = np.arange(6, dtype='<f4').tobytes()
  with zipfile.ZipFile(path, 'w', method) as file:
    file.writestr('m/data.pkl', pickled)
    for key, value in (storages or {'0': data}).items():
      file.writestr(f'm/data/{key}', value)
  return path


class Call:
  """Is pickled as a call of a function."""

  def __init__(self, function, *args):
    self.call = (function, args)

  def __reduce__(self):
    return self.call

  def __call__(self):
    raise AssertionError('only there so that pickle takes it for a function')
