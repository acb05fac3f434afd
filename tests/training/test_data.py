"""MNIST from a file: padded right, and refused when it is something else."""

import numpy as np
import pytest

from d2dpm_jax.runtime import images
from d2dpm_jax.training import data


def _arrays(**changes):
  rng = np.random.default_rng(0)
  arrays = dict(
    x_train=rng.integers(0, 256, (6, 28, 28)).astype(np.uint8),
    y_train=np.array([0, 1, 2, 9, 4, 5]),
    x_test=rng.integers(0, 256, (3, 28, 28)).astype(np.uint8),
    y_test=np.array([7, 8, 9], np.uint8),
  )
  arrays.update(changes)
  return {k: v for k, v in arrays.items() if v is not None}


def _saved(path, **changes):
  np.savez(path, **_arrays(**changes))
  return str(path)


def test_padding_is_two_black_pixels_on_every_side(tmp_path):
  digits = data.load_mnist(_saved(tmp_path / 'm.npz'))
  raw = _arrays()
  for split in ('train', 'test'):
    found = getattr(digits, f'{split}_images')
    assert found.dtype == np.uint8
    assert found.shape == (len(raw[f'x_{split}']), 32, 32, 1)
    np.testing.assert_array_equal(found[:, 2:30, 2:30, 0], raw[f'x_{split}'])
    frame = found.copy()
    frame[:, 2:30, 2:30] = 0
    assert not frame.any()
    labels = getattr(digits, f'{split}_labels')
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, raw[f'y_{split}'])


def test_floats_are_undone_by_pixels():
  values = np.arange(256, dtype=np.uint8)
  floats = data.to_float(values)
  assert floats.dtype == np.float32
  assert floats[0] == -1 and floats[-1] == 1
  np.testing.assert_array_equal(images.to_uint8(floats), values)


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    ({'x_train': np.zeros((6, 28, 28), np.float32)}, r'x_train is float32\[6'),
    ({'x_train': np.zeros((6, 32, 32), np.uint8)}, r'uint8\[6, 32, 32\]'),
    ({'x_test': np.zeros((4, 28, 28), np.uint8)}, r'expected\s+uint8\[3, 28'),
    ({'y_train': np.array([0, 1, 2, 10, 4, 5])}, 'y_train has labels outside'),
    ({'y_test': np.array([-1, 0, 0])}, 'y_test has labels outside 0..9'),
    ({'y_test': None}, 'y_test'),
    ({'x_train': None}, 'x_train'),
    ({'x_train': np.zeros((6, 28, 28), object)}, 'm.npz is not an .npz with'),
  ],
)
def test_wrong_arrays_are_named(tmp_path, changes, text):
  with pytest.raises(ValueError, match=text) as error:
    data.load_mnist(_saved(tmp_path / 'm.npz', **changes))
  assert 'm.npz' in str(error.value)


@pytest.mark.parametrize('content', [b'', b'not an archive', b'PK\x03\x04'])
def test_a_file_that_is_no_npz(tmp_path, content):
  path = tmp_path / 'm.npz'
  path.write_bytes(content)
  with pytest.raises(ValueError, match='m.npz is not an .npz with x_train'):
    data.load_mnist(str(path))


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='none.npz.*--config.train.data'):
    data.load_mnist(str(tmp_path / 'none.npz'))
