import zipfile

import numpy as np
import pytest

from d2dpm_jax.evaluation import image_sets


def _images(count=7, seed=0, shape=(4, 4, 3)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, *shape), np.uint8)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('size', [1, 3, 7, 100])
def test_batches_of_a_file_are_its_images(tmp_path, save, size):
  images, labels = _images(), np.arange(7)
  save(tmp_path / 'x.npz', arr_0=images, arr_1=labels)
  found = image_sets.from_path(tmp_path / 'x.npz')
  assert found.shape == images.shape
  np.testing.assert_array_equal(found.labels, labels)
  for _ in range(2):  # It can be read again.
    batches = list(found.batches(size))
    assert {len(b) for b in batches[:-1]} <= {size}
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_a_folder_is_its_files_in_order(tmp_path):
  parts = [_images(3, 1), _images(2, 2)]
  for name, part, start in (('b', parts[1], 3), ('a', parts[0], 0)):
    labels = np.arange(start, start + len(part), dtype=np.int32)
    np.savez(tmp_path / f'{name}.npz', arr_0=part, arr_1=labels)
  (tmp_path / 'grid.png').write_bytes(b'')
  found = image_sets.from_path(tmp_path)
  assert found.shape == (5, 4, 4, 3)
  np.testing.assert_array_equal(found.labels, np.arange(5))
  got = np.concatenate(list(found.batches(2)))
  np.testing.assert_array_equal(got, np.concatenate(parts))


def test_labels_may_be_missing(tmp_path):
  np.savez(tmp_path / 'x.npz', _images())
  assert image_sets.from_path(tmp_path / 'x.npz').labels is None


def test_arrays_in_memory():
  images = _images()
  found = image_sets.from_arrays('memory', images, np.arange(7))
  np.testing.assert_array_equal(np.concatenate(list(found.batches(3))), images)


_BAD = {
  'float images': (
    dict(arr_0=np.zeros((2, 4, 4, 3))),
    r'float64\[2, 4.*save x.round\(\).clip\(0, 255\).astype\(np.uint8\)',
  ),
  'int64': (
    dict(arr_0=_images().astype(int)),
    r'int64\[7, 4.*save x.astype\(np.uint8\)',
  ),
  'three axes': (
    dict(arr_0=np.zeros((2, 4, 4), np.uint8)),
    r'expected uint8.*save x\[..., None\]',
  ),
  'channels first': (
    dict(arr_0=_images(shape=(3, 4, 4))),
    r'save x.transpose\(0, 2, 3, 1\)',
  ),
  'statistics': (
    dict(meta='{}', mu=np.zeros(3)),
    'holds statistics, which serve as reference',
  ),
  'four channels': (dict(arr_0=_images(shape=(4, 4, 4))), '1 or 3 channels'),
  'no images': (dict(arr_0=_images(0)), 'has no images'),
  'another name': (
    dict(images=_images()),
    r"no array arr_0, but \['images'\]; .* np.savez\(path, arr_0=images\)",
  ),
  'pickled images': (dict(arr_0=np.array([{}, {}])), 'pickled'),
  'pickled labels': (
    dict(arr_0=_images(), arr_1=np.array([{}] * 7)),
    'pickled',
  ),
  'few labels': (dict(arr_0=_images(), arr_1=np.arange(6)), '7 integers'),
  'float labels': (dict(arr_0=_images(), arr_1=np.ones(7)), '7 integers'),
  'Fortran order': (dict(arr_0=np.asfortranarray(_images())), 'C order'),
}


@pytest.mark.parametrize('kind', _BAD)
def test_bad_files_are_refused_by_name(tmp_path, kind):
  arrays, message = _BAD[kind]
  np.savez(tmp_path / 'bad.npz', **arrays)
  with pytest.raises(ValueError, match=message) as error:
    image_sets.from_path(tmp_path / 'bad.npz')
  assert 'bad.npz' in str(error.value)


def test_files_that_are_no_archives(tmp_path):
  with pytest.raises(ValueError, match='no images at'):
    image_sets.from_path(tmp_path / 'missing.npz')
  with pytest.raises(ValueError, match='has no .npz'):
    image_sets.from_path(tmp_path)
  (tmp_path / 'text.npz').write_text('not an archive')
  with pytest.raises(ValueError, match='text.npz is no readable'):
    image_sets.from_path(tmp_path / 'text.npz')
  np.save(tmp_path / 'array.npy', _images())
  with pytest.raises(
    ValueError, match=r'array.npy is no readable .*np.savez\(path, arr_0=images'
  ):
    image_sets.from_path(tmp_path / 'array.npy')
  with zipfile.ZipFile(tmp_path / 'zip.npz', 'w') as archive:
    archive.writestr('arr_0.npy', b'garbage')
  with pytest.raises(ValueError, match='zip.npz is no readable'):
    image_sets.from_path(tmp_path / 'zip.npz')


def test_damage_is_found_while_reading(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, arr_0=_images(50))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 255
  path.write_bytes(data)
  with pytest.raises(ValueError, match='x.npz is no readable'):
    list(image_sets.from_path(path).batches(10))


@pytest.mark.parametrize(
  'shape', ['((((', '(1, 4, 4, 3), {[]: 1}', f'({10**23}, 4, 4, 3)', '(,)']
)
def test_damaged_headers_are_named(tmp_path, shape):
  """Under right checksums, so that NumPy gets to read it."""
  header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
  size = len(header).to_bytes(2, 'little')
  path = tmp_path / 'x.npz'
  with zipfile.ZipFile(path, 'w') as archive:
    data = b'\x93NUMPY\x01\x00' + size + header.encode()
    archive.writestr('arr_0.npy', data)
  with pytest.raises(ValueError, match='x.npz') as found:
    list(image_sets.from_path(path).batches(1))
  assert '\n' not in str(found.value)


def test_an_array_shorter_than_its_header_says(tmp_path):
  path = tmp_path / 'x.npz'
  np.save(tmp_path / 'arr_0.npy', _images(4))
  data = (tmp_path / 'arr_0.npy').read_bytes()[:-5]
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('arr_0.npy', data)
  with pytest.raises(ValueError, match='cut off at image 3'):
    list(image_sets.from_path(path).batches(3))


def test_a_folder_of_unlike_files_is_refused(tmp_path):
  np.savez(tmp_path / 'a.npz', arr_0=_images(2), arr_1=np.arange(2))
  np.savez(tmp_path / 'b.npz', arr_0=_images(2))
  with pytest.raises(ValueError, match='some do not'):
    image_sets.from_path(tmp_path)
  np.savez(tmp_path / 'b.npz', arr_0=_images(2, shape=(8, 8, 3)))
  with pytest.raises(
    ValueError, match=r'several sizes: \[4, 4, 3\] in a.npz, .* in b.npz'
  ):
    image_sets.from_path(tmp_path)
