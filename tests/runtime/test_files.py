"""Writes that are never half done, and settings compared by value."""

import json
import os
import pathlib
import stat

import numpy as np
import pytest

from d2dpm_jax.denoising import table
from d2dpm_jax.pipelines import shards
from d2dpm_jax.runtime import files


def test_atomic_write_makes_folders_and_leaves_only_the_file(tmp_path):
  path = tmp_path / 'a' / 'b' / 'x.bin'
  with files.atomic_write(path) as file:
    file.write(b'12')
    assert not path.exists()  # Not before it is whole.
  assert path.read_bytes() == b'12'
  assert os.listdir(path.parent) == ['x.bin']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_on_an_error(tmp_path, error):
  path = tmp_path / 'x.bin'
  path.write_bytes(b'old')
  with pytest.raises(error):
    with files.atomic_write(path) as file:
      file.write(b'new, but')
      raise error
  assert path.read_bytes() == b'old'
  assert os.listdir(tmp_path) == ['x.bin']


def test_atomic_write_leaves_nothing_where_nothing_was(tmp_path):
  with pytest.raises(RuntimeError):
    with files.atomic_write(tmp_path / 'x.bin'):
      raise RuntimeError
  assert not os.listdir(tmp_path)


def test_atomic_write_gives_the_usual_permissions(tmp_path):
  old = os.umask(0o027)
  try:
    with files.atomic_write(tmp_path / 'x') as file:
      file.write(b'')
  finally:
    os.umask(old)
  assert stat.S_IMODE((tmp_path / 'x').stat().st_mode) == 0o640


def test_json_round_trip(tmp_path):
  content = {'b': [1, 2.5, None], 'a': {'c': 'é'}}
  files.write_json(tmp_path / 'x.json', content)
  assert files.read_json(tmp_path / 'x.json') == content
  # Sorted, so that equal contents are equal files.
  assert list(json.loads((tmp_path / 'x.json').read_text())) == ['a', 'b']


@pytest.mark.parametrize('content', [b'{"a": 1', b'\xff\xfe\x00', b''])
def test_read_json_names_the_file_that_is_none(tmp_path, content):
  path = tmp_path / 'broken.json'
  path.write_bytes(content)
  with pytest.raises(ValueError, match='broken.json is not valid JSON'):
    files.read_json(path)


def test_write_json_of_something_else_leaves_the_old_file(tmp_path):
  path = tmp_path / 'x.json'
  files.write_json(path, {'a': 1})
  with pytest.raises(TypeError):
    files.write_json(path, {'a': 1, 'b': object()})
  assert files.read_json(path) == {'a': 1}
  assert os.listdir(tmp_path) == ['x.json']


def test_differences_name_each_setting_with_both_values():
  saved = {'quant': {'weight_bits': 4, 'act_bits': 8}, 'seed': 0, 'old': 1}
  now = {'quant': {'weight_bits': 8, 'act_bits': 8}, 'seed': 0, 'new': 'x'}
  assert files.differences(saved, now) == [
    "new: saved None, now 'x'",
    'old: saved 1, now None',
    'quant.weight_bits: saved 4, now 8',
  ]


def test_differences_see_a_tuple_and_its_json_as_equal():
  saved = json.loads(json.dumps({'a': (1, (2, 3)), 'b': {'c': 1.0}}))
  assert not files.differences(saved, {'a': (1, (2, 3)), 'b': {'c': 1.0}})
  assert files.differences(saved, {'a': (1, (2, 4)), 'b': {'c': 1.0}})


def test_differences_see_a_mapping_in_place_of_a_value():
  assert files.differences({'a': {'b': 1}}, {'a': 1}) == [
    "a: saved {'b': 1}, now 1"
  ]


def test_workdir_is_absolute_and_stays_where_it_was(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  paths = files.Workdir.at('run')
  monkeypatch.chdir('/')
  assert paths.root == tmp_path / 'run'
  assert not paths.root.exists()  # Naming is not making.
  assert paths.trajectories.is_relative_to(paths.calibration)
  assert paths.error_model('tensor') != paths.error_model('channel')


def test_workdir_refuses_a_file(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='file is a file, not a directory'):
    files.Workdir.at(tmp_path / 'file')


def test_every_path_is_below_the_root(tmp_path):
  paths = files.Workdir.at(tmp_path)
  properties = [
    name for name, p in vars(files.Workdir).items() if isinstance(p, property)
  ]
  found = [getattr(paths, name) for name in properties]
  assert len(set(found)) == len(found) >= 8
  assert all(p.is_relative_to(tmp_path) and p != tmp_path for p in found)
  assert all(isinstance(p, pathlib.Path) for p in found)


@pytest.mark.parametrize('kind', ['npy', 'npz'])
def test_any_changed_byte_is_noticed(tmp_path, kind):
  """In the header too: readers raise all kinds of errors there, or none."""
  path = tmp_path / f'x.{kind}'
  x = np.arange(6, dtype=np.float32)
  if kind == 'npy':
    files.save_array(path, x)
    found = np.load(path)
  else:
    with files.checked_write(path) as file:
      np.savez(file, x=x)
    with np.load(path) as stored:
      found = stored['x']
  np.testing.assert_array_equal(found, x)
  assert files.is_intact(path)
  whole = path.read_bytes()
  for place in range(len(whole)):
    changed = bytearray(whole)
    changed[place] ^= 1 << (place % 8)
    path.write_bytes(changed)
    assert not files.is_intact(path), place
  for size in (0, 5, len(whole) - 1):
    path.write_bytes(whole[:size])
    assert not files.is_intact(path)
  assert not files.is_intact(tmp_path / 'missing')


def test_damage_is_the_same_in_the_room_without_files():
  assert table._DAMAGE == files.DAMAGE


def test_any_damaged_bit_of_a_shard_is_noticed(tmp_path):
  """As an error that names the file, or nothing that is read is damaged."""
  directory, rng = shards.Shards(tmp_path), np.random.default_rng(0)
  which = shards.Range(0, 2)
  images = rng.integers(0, 256, (2, 4, 4, 1), np.uint8)
  directory.write(0, images, np.zeros(2, np.int32))
  path = directory.path(which)
  whole, refused = path.read_bytes(), 0
  for place in range(len(whole)):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    assert not files.is_intact(path)
    try:
      found = directory.read(which)
    except ValueError as error:
      assert str(path) in str(error)
      refused += 1
    else:
      np.testing.assert_array_equal(found.images, images)
  assert refused > len(whole) // 3
