"""Random damage to small files of every format: one kind of error, or none."""

import pathlib
import random
import time
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from d2dpm_jax.convert.torch_reader import CheckpointError
from torch_files import pickle_weights, write_zip

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
_ROUNDS = 400


def _fuzz_sources(tmp_path):
  """Small files of every format, and a raw pickle to put into a zip."""
  safetensors.numpy.save_file(
    {'a': np.ones((2, 3), np.float32), 'b': np.zeros(4, bool)},
    tmp_path / 'a.safetensors',
    {'key': 'value'},
  )
  lightning = _GOLDEN / 'torch_lightning.ckpt'
  for name, method in (('stored', 0), ('deflated', zipfile.ZIP_DEFLATED)):
    with zipfile.ZipFile(tmp_path / f'{name}.zip', 'w', method) as file:
      file.write(lightning, 'model.ckpt')
  with zipfile.ZipFile(_GOLDEN / 'torch_views.pt') as file:
    views = {n.split('/', 1)[1]: file.read(n) for n in file.namelist()}
  deflated = write_zip(
    tmp_path / 'b.pt', pickle_weights(), None, zipfile.ZIP_DEFLATED
  )
  return {
    'zip': (_GOLDEN / 'torch_views.pt').read_bytes(),
    'compressed': deflated.read_bytes(),
    'legacy': (_GOLDEN / 'torch_lightning_legacy.ckpt').read_bytes(),
    'legacy_views': (_GOLDEN / 'torch_views_legacy.pt').read_bytes(),
    'stored_zip': (tmp_path / 'stored.zip').read_bytes(),
    'deflated_zip': (tmp_path / 'deflated.zip').read_bytes(),
    'safetensors': (tmp_path / 'a.safetensors').read_bytes(),
    'pickle': views['data.pkl'],
  }, {k[5:]: v for k, v in views.items() if k.startswith('data/')}


def _damage(data, rng):
  """Flips bits, overwrites, cuts, repeats or drops a few bytes."""
  data = bytearray(data)
  at = rng.randrange(len(data))
  match rng.randrange(5):
    case 0:
      data[at] ^= 1 << rng.randrange(8)
    case 1:
      data[at : at + 4] = rng.randbytes(4)
    case 2:
      del data[at:]
    case 3:
      data[at:at] = data[at : at + rng.randrange(1, 40)]
    case 4:
      del data[at : at + rng.randrange(1, 40)]
  return bytes(data)


# Text opcodes with a stray backslash, within pickletools.
@pytest.mark.filterwarnings('ignore:invalid escape sequence')
@pytest.mark.parametrize(
  'kind',
  'zip compressed legacy legacy_views stored_zip deflated_zip safetensors '
  'pickle'.split(),
)
def test_random_damage_ends_in_one_error_or_none(tmp_path, witness, kind):
  sources, storages = _fuzz_sources(tmp_path)
  rng = random.Random(kind)
  failures = 0
  start = time.monotonic()
  path = tmp_path / 'fuzzed.pt'
  for _ in range(_ROUNDS):
    damaged = _damage(sources[kind], rng)
    if kind == 'pickle':
      write_zip(path, damaged, storages)
    else:
      path.write_bytes(damaged)
    try:
      with witness.open(path) as checkpoint:
        for tensor in checkpoint.values():
          assert tensor.read().nbytes < 2**20
    except CheckpointError:
      failures += 1
    assert witness.seen == []
  assert 0 < failures
  assert time.monotonic() - start < 60
