"""Checkpoints that are damaged or lie about themselves: one kind of error.

No lie makes the reader allocate, loop or read beyond what is in the file.
"""

import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from d2dpm_jax.convert.torch_reader import CheckpointError, open_checkpoint
from torch_files import (
  Call,
  pickle_weights,
  push,
  push_global,
  push_storage,
  push_tensor,
  write_zip,
)

_LIES = {
  'storage too small': push_tensor(push_storage(size=7)),
  'storage huge': push_tensor(push_storage(size=2**59)),
  'storage beyond int64': push_tensor(push_storage(size=2**70)),
  'storage negative': push_tensor(push_storage(size=-6)),
  'storage missing': push_tensor(push_storage(key='1')),
  'storage elsewhere': push_tensor(push_storage(key='../data.pkl')),
  'storage of a module': push_tensor(push_storage(kind='torch.nn.Module')),
  'storage untyped': push_tensor(
    push_storage(kind='torch.storage.UntypedStorage')
  ),
  'storage is a view': push_tensor(push_storage(tail=push(('0', 0, 6)))),
  'two dtypes': push_tensor()
  + b'0'
  + push_tensor(push_storage(kind='torch.IntStorage')),
  'other width': push_tensor(push_storage(kind='torch.DoubleStorage')),
  'shape beyond': push_tensor(shape=(3, 3)),
  'shape huge': push_tensor(shape=(2**40, 2**40), stride=(0, 0)),
  'shape huge and empty': push_tensor(shape=(0, 2**50), stride=(0, 0)),
  'shape negative': push_tensor(shape=(-1, 3)),
  'shape of bool': push_tensor(shape=(True, 3)),
  'shape a list': push_tensor(shape=[2, 3]),
  'shape nested': push_tensor(shape=((2,), 3)),
  'offset beyond': push_tensor(offset=1),
  'offset negative': push_tensor(offset=-1),
  'stride beyond': push_tensor(stride=(4, 1)),
  'stride negative': push_tensor(stride=(-3, 1)),
  'stride huge': push_tensor(shape=(2, 1), stride=(2**62, 1)),
  'stride missing': push_tensor(stride=(1,)),
  'rank': push_tensor(shape=(1,) * 65, stride=(0,) * 65),
  'no storage': push_global('torch._utils._rebuild_tensor_v2')
  + push((1, 0, (), ()))
  + b'R',
  'parameter': push_global('torch._utils._rebuild_parameter')
  + push((1,))
  + b'R',
}


@pytest.mark.parametrize('lie', _LIES)
def test_tensors_that_lie(tmp_path, lie):
  path = write_zip(tmp_path / 'a.pt', pickle_weights({'lie': _LIES[lie]}))
  tracemalloc.start()
  with pytest.raises(CheckpointError, match='storage|tensor|parameter'):
    open_checkpoint(path)
  assert tracemalloc.get_traced_memory()[1] < 2**20
  tracemalloc.stop()


def test_strides_of_single_axes_mean_nothing(tmp_path):
  tensor = push_tensor(shape=(2, 1, 3), stride=(3, 2**59, 1))
  swapped = push_tensor(shape=(3, 1, 2), stride=(1, 2**59, 3))
  path = write_zip(
    tmp_path / 'a.pt', pickle_weights({'a': tensor, 'b': swapped})
  )
  with open_checkpoint(path) as checkpoint:
    want = np.arange(6).reshape(2, 1, 3)
    np.testing.assert_array_equal(checkpoint['a'].read(), want)
    np.testing.assert_array_equal(checkpoint['b'].read(), want.transpose())


def test_other_bytes_than_0_and_1_are_true(tmp_path):
  tensor = push_tensor(push_storage(kind='torch.BoolStorage'))
  path = write_zip(
    tmp_path / 'a.pt', pickle_weights({'w': tensor}), {'0': b'\0\1\2\xff\0\1'}
  )
  with open_checkpoint(path) as checkpoint:
    got = checkpoint['w'].read().view(np.uint8)
  np.testing.assert_array_equal(got, [[0, 1, 1], [1, 0, 1]])


def _nested_tuple(depth):
  """A tuple of 2**depth leaves in `depth` opcodes' space."""
  return b'K\x01' + b'2\x86' * depth


_BOMBS = {
  'memo index': b'Nr\xff\xff\xff\xff',
  'text of 2**60 bytes': b'\x8d' + struct.pack('<Q', 2**60) + b'x',
  'bytes of 2**60 bytes': b'\x8e' + struct.pack('<Q', 2**60) + b'x',
  'frame of 2**60 bytes': b'\x95' + struct.pack('<Q', 2**60) + b'x',
  'integer of a million digits': b'L' + b'9' * 10**6 + b'L\n',
  'hash of a nested tuple': b'}' + _nested_tuple(60) + b'Ns',
  'set of a nested tuple': b'\x8f(' + _nested_tuple(60) + b'\x90',
  'colliding keys': b'}' + push(2**61 - 1) + b'Ns',
  'text as storage': push_tensor(
    b'(' + push('storage') + _nested_tuple(60) + b'tQ'
  ),
  'copies of text': push('x' * 10**6)
  + b'q\x010'
  + (push_global('_codecs.encode') + b'h\x01\x85R0') * 1000
  + b'N',
}


@pytest.mark.parametrize('bomb', _BOMBS)
def test_small_pickles_take_little_memory_and_time(tmp_path, bomb):
  path = write_zip(tmp_path / 'a.pt', pickle_weights(callbacks=_BOMBS[bomb]))
  size = path.stat().st_size
  start = time.monotonic()
  tracemalloc.start()
  try:
    open_checkpoint(path).close()
  except CheckpointError:
    pass
  else:
    assert bomb in ('memo index', 'frame of 2**60 bytes')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # The copies of text are stopped at 2**24 characters.
  assert peak < 2**20 + 20 * size + 2**24
  assert time.monotonic() - start < 10


def test_deep_and_shared_containers_are_walked_once(tmp_path):
  deep = b']' * 10**5 + b'a' * (10**5 - 1)
  wide = _nested_tuple(60)
  itself = b']q\x01h\x01a'
  weights = {'deep': deep, 'wide': wide, 'itself': itself}
  path = write_zip(tmp_path / 'a.pt', pickle_weights(weights))
  with open_checkpoint(path) as checkpoint:
    assert sorted(checkpoint.contents['state_dict']) == sorted(weights)


def test_archives_that_mislead(tmp_path, witness):
  good = write_zip(tmp_path / 'good.pt', pickle_weights()).read_bytes()
  path = tmp_path / 'bad.pt'

  def refuse(data, message):
    path.write_bytes(data)
    witness.refuses(path, message)

  central = good.index(b'PK\x01\x02', good.index(b'PK\x01\x02') + 1)
  offset = central + 42  # Of the local header, for m/data/0.
  refuse(
    good[:offset] + bytes(4) + good[offset + 4 :], 'no header for m/data/0'
  )
  method = central + 10
  refuse(good[:method] + b'\x0e\0' + good[method + 2 :], 'method 14')
  flags = central + 8
  refuse(good[:flags] + b'\x01\0' + good[flags + 2 :], 'encrypted')
  size = central + 24
  refuse(good[:size] + b'\xff' * 3 + good[size + 3 :], 'two sizes')
  sizes = struct.pack('<LL', 10**6, 10**6)
  refuse(good[: central + 20] + sizes + good[size + 4 :], 'beyond the end')


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_two_members_of_one_name(tmp_path, witness):
  path = write_zip(tmp_path / 'a.pt', pickle_weights())
  with zipfile.ZipFile(path, 'a') as file:
    file.writestr('m/data.pkl', pickle.dumps({}, 2))
  witness.refuses(path, 'two members of one name')
  path = write_zip(tmp_path / 'b.pt', pickle_weights())
  with zipfile.ZipFile(path, 'a') as file:
    file.writestr('other/data.pkl', pickle.dumps({}, 2))
  witness.refuses(path, '2 records data.pkl')


def test_overlapping_members(tmp_path, witness):
  """A member that lies within the data of another one."""
  inner = zipfile.ZipFile(tmp_path / 'inner.zip', 'w')
  with inner:
    inner.writestr('m/data/1', b'x' * 24)
  header_and_data = (tmp_path / 'inner.zip').read_bytes()[: 30 + 8 + 24]
  path = write_zip(
    tmp_path / 'a.pt', pickle_weights(), {'0': header_and_data, '1': b'x' * 24}
  )
  data = bytearray(path.read_bytes())
  entry = data.rindex(b'PK\x01\x02')
  begin = data.index(header_and_data)
  data[entry + 42 : entry + 46] = struct.pack('<L', begin)
  path.write_bytes(data)
  witness.refuses(path, 'members of the zip overlap')


def test_zip_bombs(tmp_path, witness):
  method = zipfile.ZIP_DEFLATED
  zeros = bytes(80 * 2**20)
  path = write_zip(tmp_path / 'a.pt', pickle_weights(), {'0': zeros}, method)
  witness.refuses(path, 'claims to unpack to 8388')
  path = write_zip(tmp_path / 'b.pt', pickle_weights(fill=push('x' * 2**24)))
  witness.refuses(path, 'data.pkl has 1677.* more than')
  with zipfile.ZipFile(tmp_path / 'c.zip', 'w', method) as file:
    file.writestr('model.ckpt', zeros)
  witness.refuses(tmp_path / 'c.zip', 'do not compress so far')
  assert sorted(os.listdir(tmp_path)) == ['a.pt', 'b.pt', 'c.zip']


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_data_does_not_fit_its_checksum(tmp_path, method):
  path = write_zip(tmp_path / 'a.pt', pickle_weights(), None, method)
  data = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as file:
    info = file.getinfo('m/data/0')
  data[info.header_offset + 30 + len(info.filename) + 5] ^= 0x10
  path.write_bytes(data)
  with open_checkpoint(path) as checkpoint:
    with pytest.raises(CheckpointError, match='checksum|is damaged'):
      checkpoint['w'].read()


def test_files_without_checksums(tmp_path):
  """torch.serialization.set_crc32_options(False) leaves them 0."""
  path = write_zip(tmp_path / 'a.pt', pickle_weights())
  data = path.read_bytes()
  with zipfile.ZipFile(path) as file:
    for info in file.infolist():
      data = data.replace(struct.pack('<L', info.CRC), bytes(4))
  path.write_bytes(data)
  with open_checkpoint(path) as checkpoint:
    np.testing.assert_array_equal(checkpoint['w'].read().ravel(), np.arange(6))


def test_legacy_files_that_lie(tmp_path, witness):
  path = tmp_path / 'legacy.pt'

  def refuse(data, message):
    path.write_bytes(data)
    witness.refuses(path, message)

  attack = pickle.dumps(Call(os.system, 'exit'), 2)
  magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
  head = magic + pickle.dumps(1001, 2)
  refuse(attack, 'standard library')
  refuse(magic + attack, 'standard library')
  refuse(head + attack, 'standard library')
  refuse(head + b'\x80\x02}.' + attack, 'standard library')
  refuse(magic + pickle.dumps(1002, 2), 'unknown version')
  top = head + b'\x80\x02}.\x80\x02}' + push('w') + push_tensor() + b's.'
  keys, size, data = pickle.dumps(['0'], 2), struct.pack('<q', 6), bytes(24)
  path.write_bytes(top + keys + size + data)
  with open_checkpoint(path) as checkpoint:
    np.testing.assert_array_equal(checkpoint['w'].read(), np.zeros((2, 3)))
  refuse(top + attack, 'standard library')
  refuse(top + keys + struct.pack('<q', 2**40) + data, 'elements but')
  refuse(top + keys + size + data[1:], 'truncated at')
  for other in ([], ['0', '0'], [['0']], {'0': 0}):
    refuse(top + pickle.dumps(other, 2) + size + data, 'do not fit')
