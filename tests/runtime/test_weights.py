"""Parameters on disk: what was written comes back, nothing else does."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from d2dpm_jax.runtime import files, weights

_TREE = {
  'unet': {
    'conv': {'kernel': np.arange(24, dtype=np.float32).reshape(2, 3, 4)}
  },
  'scale_factor': np.float32(0.7),
  'labels': np.arange(5, dtype=np.int32),
  'codes': np.arange(7, dtype=np.uint8),
}
_META = {'model': {'latent_shape': [4, 4, 3], 'dtype': 'float32'}, 'n': 1.5}


def _assert_equal(found, want):
  assert jax.tree.structure(found) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    assert np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(a, b)


def test_safetensors_round_trip(tmp_path):
  path = tmp_path / 'a' / 'x.safetensors'
  weights.save_safetensors(path, _TREE, _META)
  tree, meta = weights.load_safetensors(path)
  _assert_equal(tree, _TREE)
  assert meta == _META
  assert os.listdir(path.parent) == ['x.safetensors']


def test_safetensors_in_half_precision_come_back_as_float32(tmp_path):
  path = tmp_path / 'x.safetensors'
  tree = {'a': np.linspace(-3, 3, 50, dtype=np.float32), 'n': np.arange(3)}
  weights.save_safetensors(path, tree, {}, np.float16)
  stored = safetensors.numpy.load_file(path)
  assert stored['a'].dtype == np.float16
  assert stored['n'].dtype == np.int64  # Only floats are made smaller.
  found, meta = weights.load_safetensors(path)
  assert found['a'].dtype == np.float32 and meta == {}
  np.testing.assert_array_equal(
    found['a'], tree['a'].astype(np.float16).astype(np.float32)
  )


def test_safetensors_of_bfloat16_come_back_as_float32(tmp_path):
  path = tmp_path / 'x.safetensors'
  array = jnp.linspace(-3, 3, 50).astype(jnp.bfloat16)
  weights.save_safetensors(path, {'a': array}, {})
  found, _ = weights.load_safetensors(path)
  assert found['a'].dtype == np.float32
  np.testing.assert_array_equal(found['a'], array.astype(jnp.float32))


def test_safetensors_keep_values_of_strided_arrays(tmp_path):
  path = tmp_path / 'x.safetensors'
  array = np.arange(24, dtype=np.float32).reshape(4, 6)
  tree = {'t': array.T, 's': array[::2, ::-1], 'j': jnp.asarray(array).T}
  weights.save_safetensors(path, tree, {})
  found, _ = weights.load_safetensors(path)
  for name, value in tree.items():
    np.testing.assert_array_equal(found[name], value)


def _garbage(path, kind):
  weights.save_safetensors(path, _TREE, _META)
  data = path.read_bytes()
  if kind == 'text':
    path.write_text('These are not the weights you are looking for.\n' * 9)
  elif kind == 'empty':
    path.write_bytes(b'')
  elif kind == 'cut':
    path.write_bytes(data[: len(data) // 2])
  elif kind == 'header':
    path.write_bytes(data[:8] + b'#' + data[9:])
  elif kind == 'length':
    path.write_bytes(b'\xff' * 8 + data[8:])
  elif kind == 'zip':
    np.savez(path.with_suffix('.npz'), a=np.zeros(3))
    path.write_bytes(path.with_suffix('.npz').read_bytes())


@pytest.mark.parametrize(
  'kind', ['text', 'empty', 'cut', 'header', 'length', 'zip']
)
def test_safetensors_that_are_none_are_named(tmp_path, kind):
  path = tmp_path / 'bad.safetensors'
  _garbage(path, kind)
  with pytest.raises(ValueError, match='bad.safetensors is damaged or no'):
    weights.load_safetensors(path)


def test_safetensors_of_others_are_refused_in_one_line(tmp_path):
  """A name that is both an array and a folder is not a tree."""
  path = tmp_path / 'bad.safetensors'
  arrays = {'a': np.zeros(2, np.float32), 'a/b': np.zeros(2, np.float32)}
  safetensors.numpy.save_file(arrays, path)
  with pytest.raises(ValueError, match='bad.safetensors'):
    weights.load_safetensors(path)


def test_safetensors_that_are_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='No weights at .*none.safe'):
    weights.load_safetensors(tmp_path / 'none.safetensors')
  with pytest.raises(FileNotFoundError, match='No weights at'):
    weights.load_safetensors(tmp_path)


def test_tree_round_trip(tmp_path):
  path = tmp_path / 'params'
  weights.save_tree(path, _TREE, _META)
  tree, meta = weights.load_tree(path)
  _assert_equal(tree, _TREE)
  assert meta == _META


def test_tree_of_arrays_on_devices(tmp_path):
  path = tmp_path / 'params'
  weights.save_tree(path, jax.tree.map(jnp.asarray, _TREE), _META)
  tree, _ = weights.load_tree(path)
  _assert_equal(tree, _TREE)
  assert isinstance(tree['labels'], np.ndarray)  # Bound to no device.


def test_tree_replaces_an_older_one(tmp_path):
  path = tmp_path / 'params'
  weights.save_tree(path, {'old': np.zeros(3)}, {'n': 1})
  weights.save_tree(path, _TREE, _META)
  tree, meta = weights.load_tree(path)
  _assert_equal(tree, _TREE)
  assert meta == _META


def test_tree_that_is_not_there_or_not_finished(tmp_path):
  path = tmp_path / 'params'
  with pytest.raises(FileNotFoundError, match='No complete checkpoint'):
    weights.load_tree(path)
  weights.save_tree(path, _TREE, _META)
  (path / 'd2dpm_meta.json').unlink()  # Written last.
  with pytest.raises(FileNotFoundError, match='No complete checkpoint'):
    weights.load_tree(path)


def test_tree_that_was_killed_while_it_replaced_another(tmp_path, monkeypatch):
  """Old metadata never stand beside new arrays."""
  path = tmp_path / 'params'
  weights.save_tree(path, {'a': np.zeros(3)}, {'n': 1})

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(files, 'write_json', killed)
  with pytest.raises(KeyboardInterrupt):
    weights.save_tree(path, {'a': np.ones(3)}, {'n': 2})
  with pytest.raises(FileNotFoundError, match='No complete checkpoint'):
    weights.load_tree(path)


def test_tree_that_is_damaged_is_named(tmp_path):
  path = tmp_path / 'params'
  weights.save_tree(path, _TREE, _META)
  for file in (path / 'tree').rglob('*'):
    if file.is_file():
      file.write_bytes(b'garbage')
  with pytest.raises(ValueError, match='params cannot be read'):
    weights.load_tree(path)
