"""Reading checkpoints that PyTorch and safetensors wrote, and honest mistakes.

Files and expected arrays are PyTorch's own: tests/golden/make_torch_files.py.
Files made to do harm are in test_torch_reader_hostile.py.
"""

import os
import pathlib
import shutil
import sys
import tempfile
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from d2dpm_jax.convert.torch_reader import (
  CheckpointError,
  Opaque,
  open_checkpoint,
)

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
_DTYPES = {
  'float16': np.float16,
  'float32': np.float32,
  'float64': np.float64,
  'bfloat16': ml_dtypes.bfloat16,
  'int8': np.int8,
  'int16': np.int16,
  'int32': np.int32,
  'int64': np.int64,
  'uint8': np.uint8,
  'bool': np.bool_,
}


def _expected(stem):
  with np.load(_GOLDEN / 'torch_expected.npz') as file:
    prefix = f'{stem}/'
    return {
      name.removeprefix(prefix): file[name]
      for name in file
      if name.startswith(prefix)
    }


def _assert_equal(checkpoint, expected):
  assert sorted(checkpoint) == sorted(expected)
  for name, tensor in checkpoint.items():
    array = tensor.read()
    assert tensor.shape == array.shape == expected[name].shape, name
    assert tensor.dtype == array.dtype, name
    assert array.flags.writeable and array.flags.c_contiguous, name
    # float32 holds every bfloat16; other dtypes are compared as they are.
    if array.dtype == ml_dtypes.bfloat16:
      array = array.astype(np.float32)
    assert array.dtype == expected[name].dtype, name
    np.testing.assert_array_equal(array, expected[name], err_msg=name)


def _rezip(source, target, edit=None, **options):
  """Copies a zip member by member; `edit(name, data)` may change the data."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
    for name in old.namelist():
      data = old.read(name)
      new.writestr(name, edit(name, data) if edit else data, **options)


@pytest.mark.parametrize('legacy', ['', '_legacy'])
@pytest.mark.parametrize(
  'file', ['torch_dtypes.pt', 'torch_views.pt', 'torch_lightning.ckpt']
)
def test_reads_what_torch_wrote(file, legacy):
  stem, suffix = file.split('.')
  with open_checkpoint(_GOLDEN / f'{stem}{legacy}.{suffix}') as checkpoint:
    _assert_equal(checkpoint, _expected(stem))
  assert 'torch' not in sys.modules


@pytest.mark.parametrize('legacy', ['', '_legacy'])
def test_every_dtype_keeps_its_type(legacy):
  with open_checkpoint(_GOLDEN / f'torch_dtypes{legacy}.pt') as checkpoint:
    dtypes = {name: tensor.dtype for name, tensor in checkpoint.items()}
  assert dtypes == {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}


def test_tensors_of_one_storage_do_not_share_memory():
  with open_checkpoint(_GOLDEN / 'torch_views.pt') as checkpoint:
    tied, again = checkpoint['tied'].read(), checkpoint['tied_again'].read()
    tied[:] = -1
    np.testing.assert_array_equal(again, [0, 1, 2, 3])
    np.testing.assert_array_equal(checkpoint['tied'].read(), again)


@pytest.mark.parametrize('legacy', ['', '_legacy'])
def test_contents_beside_the_weights(legacy):
  with open_checkpoint(_GOLDEN / f'torch_lightning{legacy}.ckpt') as checkpoint:
    contents = checkpoint.contents
  assert contents['global_step'] == 178000
  assert contents['state_dict'] == {}
  assert contents['pytorch-lightning_version'] == '1.4.2'
  extra = contents['extra']
  assert extra['set'] == {1, 2}
  assert extra['tuple'] == (1, 2.5, None, True, -(2**40), 2**70)
  assert extra['bytes'] == b'\x00\xff'
  assert extra['size'] == (2, 3)
  assert extra['text'] == 'Grüße'
  assert contents['callbacks']['counts'] == {'a': 1}
  moment = contents['optimizer_states'][0]['state'][0]['exp_avg']
  assert moment.shape == (3, 2)


def test_classes_of_libraries_become_placeholders():
  with open_checkpoint(_GOLDEN / 'torch_lightning.ckpt') as checkpoint:
    contents = checkpoint.contents
  (callback,) = (k for k in contents['callbacks'] if isinstance(k, Opaque))
  module = 'pytorch_lightning.callbacks.model_checkpoint'
  assert callback.name == f'{module}.ModelCheckpoint'
  assert contents['callbacks'][callback]['monitor'] == 'val/loss'
  assert isinstance(contents['hyper_parameters'], Opaque)
  for key in ('time', 'numpy', 'dtype', 'made'):
    assert isinstance(contents['extra'][key], Opaque), key
  assert not {'pytorch_lightning', 'omegaconf', module} & set(sys.modules)


def test_big_endian_records(tmp_path):
  widths = {
    f'/data/{index}': np.dtype(dtype).itemsize
    for index, dtype in enumerate(_DTYPES.values())
  }

  def swap(name, data):
    if name.endswith('/byteorder'):
      return b'big'
    width = next((w for k, w in widths.items() if name.endswith(k)), 1)
    return np.frombuffer(data, f'u{width}').byteswap().tobytes()

  _rezip(_GOLDEN / 'torch_dtypes.pt', tmp_path / 'big.pt', swap)
  with open_checkpoint(tmp_path / 'big.pt') as checkpoint:
    _assert_equal(checkpoint, _expected('torch_dtypes'))


def test_compressed_records(tmp_path):
  options = {'compress_type': zipfile.ZIP_DEFLATED}
  _rezip(_GOLDEN / 'torch_views.pt', tmp_path / 'small.pt', **options)
  with open_checkpoint(tmp_path / 'small.pt') as checkpoint:
    _assert_equal(checkpoint, _expected('torch_views'))


def _write_large(path):
  """The views with 8 MiB of data in the storage that they share."""

  def grow(name, data):
    if name.endswith('/data/0'):
      return bytes(8 * 2**20)
    return data.replace(b'K\x18tq', b'J\x00\x00\x20\x00tq')  # 24 -> 2**21.

  _rezip(_GOLDEN / 'torch_views.pt', path, grow)


def test_views_take_their_own_memory_only(tmp_path):
  _write_large(tmp_path / 'large.pt')
  tracemalloc.start()
  with open_checkpoint(tmp_path / 'large.pt') as checkpoint:
    np.testing.assert_array_equal(checkpoint['matrix'].read(), np.zeros((4, 6)))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**20


def test_file_that_shrinks_after_opening(tmp_path):
  _write_large(tmp_path / 'large.pt')
  with open_checkpoint(tmp_path / 'large.pt') as checkpoint:
    os.truncate(tmp_path / 'large.pt', 100)
    with pytest.raises(CheckpointError, match='large.pt: step: .* shrank'):
      checkpoint['step'].read()


@pytest.mark.parametrize('compression', ['stored', 'deflated'])
@pytest.mark.parametrize('legacy', ['', '_legacy'])
def test_zip_with_a_checkpoint_as_published(tmp_path, compression, legacy):
  method = zipfile.ZIP_DEFLATED if compression == 'deflated' else 0
  with zipfile.ZipFile(tmp_path / 'lsun.zip', 'w', method) as file:
    source = _GOLDEN / f'torch_lightning{legacy}.ckpt'
    file.write(source, 'lsun/model.ckpt')
    file.writestr('lsun/config.yaml', 'model: {}')
    file.writestr('__MACOSX/lsun/model.ckpt', 'no checkpoint')
  with open_checkpoint(tmp_path / 'lsun.zip') as checkpoint:
    assert os.listdir(tmp_path) == ['lsun.zip']
    _assert_equal(checkpoint, _expected('torch_lightning'))
    assert checkpoint.contents['global_step'] == 178000
  assert os.listdir(tmp_path) == ['lsun.zip']


def test_folder_with_a_checkpoint(tmp_path):
  shutil.copy(_GOLDEN / 'torch_lightning.ckpt', tmp_path / 'model.ckpt')
  shutil.copy(_GOLDEN / 'torch_views.pt', tmp_path / 'other.pt')
  (tmp_path / 'config.yaml').touch()
  with open_checkpoint(tmp_path) as checkpoint:
    assert checkpoint.path == tmp_path / 'model.ckpt'
    _assert_equal(checkpoint, _expected('torch_lightning'))


def test_safetensors_through_the_same_door(tmp_path):
  arrays = {
    name: np.arange(6).reshape(2, 3).astype(dtype)
    for name, dtype in _DTYPES.items()
  }
  arrays['scalar'] = np.float32(3)[...]
  path = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file(arrays, path, {'format_version': '1'})
  with open_checkpoint(str(path)) as checkpoint:
    assert checkpoint.contents == {'format_version': '1'}
    assert sorted(checkpoint) == sorted(arrays)
    for name, tensor in checkpoint.items():
      assert tensor.dtype == arrays[name].dtype == tensor.read().dtype
      assert tensor.shape == arrays[name].shape
      np.testing.assert_array_equal(tensor.read(), arrays[name])
  with pytest.raises(CheckpointError, match=r'weights.safetensors: scalar: '):
    checkpoint['scalar'].read()


def test_reading_after_close_says_so():
  with open_checkpoint(_GOLDEN / 'torch_views.pt') as checkpoint:
    tensor = checkpoint['base']
  with pytest.raises(CheckpointError, match=r'views.pt: base: .* was closed'):
    tensor.read()


# Content of a file, and what the message must say.
_MISTAKES = {
  'empty': (b'', 'an empty file; the download failed'),
  'web_page': (
    b'\n<!DOCTYPE html><html>404',
    'a web page .* download the file',
  ),
  'xml': (b'<?xml version="1.0"?><Error>', 'a web page'),
  'lfs': (
    b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
    'a Git LFS pointer.*git lfs pull',
  ),
  'gzip': (b'\x1f\x8b\x08' + bytes(20), 'gzip: unpack'),
  'hdf5': (b'\x89HDF\r\n\x1a\n', 'HDF5'),
  'tar': (b'storages'.ljust(257, b'\0') + b'ustar\0', 'tar archive'),
  'noise': (b'hello world, I am text', 'no checkpoint: 22 bytes that begin'),
  'plain_pickle': (b'\x80\x02}q\x00.', 'torch.save did not write'),
  'half_zip': (b'PK\x03\x04' + bytes(40), 'truncated or damaged'),
  'empty_zip': (b'PK\x05\x06' + bytes(18), 'holds no checkpoint'),
  'safetensors': (b'\xff' + bytes(7) + b'{"a":', 'truncated .safetensors'),
}


@pytest.mark.parametrize('kind', _MISTAKES)
def test_files_that_are_no_checkpoint(tmp_path, kind):
  content, message = _MISTAKES[kind]
  path = tmp_path / 'model.ckpt'
  path.write_bytes(content)
  with pytest.raises(CheckpointError, match=rf'model.ckpt: .*{message}'):
    open_checkpoint(path)
  assert issubclass(CheckpointError, ValueError)


def test_web_page_named_safetensors(tmp_path):
  path = tmp_path / 'a.safetensors'
  path.write_bytes(b'<html>')
  with pytest.raises(CheckpointError, match='a web page'):
    open_checkpoint(path)


def test_missing_and_special_files(tmp_path):
  with pytest.raises(CheckpointError, match='No such file'):
    open_checkpoint(tmp_path / 'no.ckpt')
  os.mkfifo(tmp_path / 'pipe.ckpt')
  with pytest.raises(CheckpointError, match='not a regular file'):
    open_checkpoint(tmp_path / 'pipe.ckpt')


def test_folders_and_zips_without_one_checkpoint(tmp_path):
  with pytest.raises(CheckpointError, match='no checkpoint .nothing.'):
    open_checkpoint(tmp_path)
  (tmp_path / 'a.pt').touch()
  (tmp_path / 'b.pt').touch()
  with pytest.raises(CheckpointError, match=r'several .* \(a.pt, b.pt\)'):
    open_checkpoint(tmp_path)
  with zipfile.ZipFile(tmp_path / 'c.zip', 'w') as file:
    file.writestr('readme.txt', 'hello')
  with pytest.raises(CheckpointError, match='this zip holds no .*readme.txt'):
    open_checkpoint(tmp_path / 'c.zip')
  with zipfile.ZipFile(tmp_path / 'd.zip', 'w') as file:
    file.write(tmp_path / 'c.zip', 'model.ckpt')
  with pytest.raises(CheckpointError, match='a zip within a zip'):
    open_checkpoint(tmp_path / 'd.zip')


def test_program_instead_of_weights(tmp_path):
  shutil.copy(_GOLDEN / 'torch_views.pt', tmp_path / 'script.pt')
  with zipfile.ZipFile(tmp_path / 'script.pt', 'a') as file:
    file.writestr('torch_views/constants.pkl', b'')
  with pytest.raises(CheckpointError, match='a TorchScript program'):
    open_checkpoint(tmp_path / 'script.pt')


@pytest.mark.parametrize('keep', [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
  'file', ['torch_views.pt', 'torch_views_legacy.pt', 'a.safetensors', 'a.zip']
)
def test_truncated_downloads(tmp_path, file, keep):
  if file == 'a.zip':
    with zipfile.ZipFile(tmp_path / file, 'w') as target:
      target.write(_GOLDEN / 'torch_lightning.ckpt', 'model.ckpt')
  elif file == 'a.safetensors':
    safetensors.numpy.save_file({'a': np.ones(999)}, tmp_path / file)
  else:
    shutil.copy(_GOLDEN / file, tmp_path / file)
  path = tmp_path / file
  os.truncate(path, int(keep * path.stat().st_size))
  with pytest.raises(
    CheckpointError, match='damaged|truncated|end of the file'
  ):
    open_checkpoint(path)


def test_no_room_to_unpack(tmp_path, monkeypatch):
  with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as file:
    file.write(_GOLDEN / 'torch_lightning.ckpt', 'model.ckpt')

  def read_only(**_):
    raise OSError(30, 'Read-only file system')

  monkeypatch.setattr(tempfile, 'TemporaryFile', read_only)
  with pytest.raises(CheckpointError, match='0.00 GB .*Read-only.*unzip it'):
    open_checkpoint(tmp_path / 'a.zip')
  usage = type('Usage', (), {'free': 10})
  monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage)
  with pytest.raises(CheckpointError, match='needs 0.00 GB .* not as much'):
    open_checkpoint(tmp_path / 'a.zip')
