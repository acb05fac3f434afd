"""Data sets through a library that holds them in memory; no TensorFlow."""

import builtins
import io
import types

import numpy as np
import pytest
from PIL import Image

from d2dpm_jax.evaluation import pictures, preprocess, tfds_sets


def _file(pixels, kind='PNG'):
  data = io.BytesIO()
  Image.fromarray(pixels).save(data, kind)
  return data.getvalue()


def _photographs(count):
  rng = np.random.default_rng(0)
  sizes = rng.integers(20, 60, (count, 2))
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


class _Splits(dict):
  """Also knows parts such as 'train[:3]'."""

  def __missing__(self, key):
    name, _, part = key.partition('[:')
    if name not in self:
      raise KeyError(key)
    return self[name][: int(part.rstrip(']'))]


class _Part(list):
  num_examples = property(len)

  def __getitem__(self, key):
    found = super().__getitem__(key)
    return _Part(found) if isinstance(key, slice) else found


class _Builder:
  """The part of a tfds.core.DatasetBuilder that is used."""

  data_dir = '~/tensorflow_datasets/x'

  def __init__(self, feature='image', prepared=True, error=None, **splits):
    parts = {k: _Part({feature: x} for x in v) for k, v in splits.items()}
    self.info = types.SimpleNamespace(
      features={feature: None}, splits=_Splits(parts), download_size='5 GiB'
    )
    self.prepared, self.error, self.read = prepared, error, 0

  def is_prepared(self):
    return self.prepared

  def download_and_prepare(self):
    if self.error:
      raise self.error
    self.prepared = True

  def as_dataset(self, split, shuffle_files, decoders):
    assert self.prepared and not shuffle_files
    assert decoders == {'image': 'files as they are'}
    for example in self.info.splits[split]:
      self.read += 1
      yield example


@pytest.fixture
def library(monkeypatch):
  """Data sets by name."""
  known = {}

  def builder(name):
    if name not in known:
      raise ValueError(f'{name} not found.\nDid you mean ...?\n')
    return known[name]

  fake = types.SimpleNamespace(
    builder=builder,
    as_numpy=lambda stream: stream,
    decode=types.SimpleNamespace(SkipDecoding=lambda: 'files as they are'),
  )
  monkeypatch.setattr(tfds_sets, '_library', lambda: fake)
  monkeypatch.setattr(tfds_sets.importlib.util, 'find_spec', lambda name: name)
  return known


@pytest.mark.parametrize('method', preprocess.PREPROCESS)
def test_a_part_of_a_data_set_is_its_photographs(library, method):
  photographs = _photographs(11)
  library['lsun/bedroom'] = _Builder(train=map(_file, photographs))
  square = pictures.Square(method, 16)
  found = tfds_sets.from_name('tfds:lsun/bedroom:train[:7]', square)
  assert found.shape == (7, 16, 16, 3) and found.labels is None
  rule = preprocess.PREPROCESS[method]
  want = [np.asarray(rule(Image.fromarray(x), 16)) for x in photographs[:7]]
  for _ in range(2):  # It can be read again.
    batches = list(found.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), np.stack(want))


def test_it_is_read_as_a_stream(library):
  builder = _Builder(train=map(_file, _photographs(100)))
  library['photos:1.2.*'] = builder
  square = pictures.Square('adm', 8)
  found = tfds_sets.from_name('tfds:photos:1.2.*:train', square)
  batches = found.batches(4)
  next(batches)
  assert builder.read <= 12
  batches.close()
  assert builder.read <= 12


def test_digits_get_their_border(library):
  digits = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
  library['mnist'] = _Builder(test=map(_file, digits))
  found = tfds_sets.from_name('tfds:mnist:test')
  assert found.shape == (5, 32, 32, 1)
  got = np.concatenate(list(found.batches(2)))
  np.testing.assert_array_equal(got[:, 2:-2, 2:-2, 0], digits)
  assert got.sum() == digits.sum()


def test_images_of_one_size_need_no_preprocessing(library):
  images = np.random.default_rng(0).integers(0, 256, (5, 9, 8, 3), np.uint8)
  library['small'] = _Builder(test=map(_file, images))
  found = tfds_sets.from_name('tfds:small:test')
  assert found.shape == images.shape
  np.testing.assert_array_equal(next(found.batches(9)), images)
  library['large'] = _Builder(test=map(_file, _photographs(4)))
  found = tfds_sets.from_name('tfds:large:test')
  with pytest.raises(ValueError, match='tfds:large:test, image 1, is .*pixels'):
    list(found.batches(4))


def test_what_is_missing_is_downloaded_once(library):
  builder = _Builder(prepared=False, train=map(_file, _photographs(2)))
  library['photos'] = builder
  square = pictures.Square('adm', 8)
  tfds_sets.from_name('tfds:photos:train', square)
  assert builder.prepared
  builder.error = AssertionError
  tfds_sets.from_name('tfds:photos:train', square)


_MANUAL = AssertionError(
  'Manual directory /x/manual does not exist or is empty. Create it and '
  'download/extract dataset artifacts in there using instructions:\n'
  'manual_dir should contain two files:\n ILSVRC2012_img_val.tar'
)


@pytest.mark.parametrize(
  'name, message',
  [
    ('tfds:imagenet2012', 'names no data set; expected such as'),
    ('tfds::train', 'names no data set'),
    ('tfds:photos:train[', 'names no data set'),
    ('tfds:phots:train', "does not know 'phots': phots not found[.]$"),
    ('tfds:photos:validation', r"no such split; photos has \['train'\]"),
    ('tfds:photos:train[:0]', 'has no images'),
    ('tfds:texts:train', r"no feature 'image', only \['text'\]"),
    (
      'tfds:imagenet2012:train',
      'imagenet2012 has to be downloaded by hand. Manual directory /x/manual '
      '.*should contain two files: ILSVRC2012_img_val.tar',
    ),
    ('tfds:cut:train', 'cannot prepare cut: no network$'),
    ('tfds:broken:train', 'tfds:broken:train, image 0, is no readable picture'),
  ],
)
def test_what_cannot_be_read_is_one_line(library, name, message):
  library['photos'] = _Builder(train=map(_file, _photographs(2)))
  library['texts'] = _Builder('text', train=[b'x'])
  library['imagenet2012'] = _Builder(prepared=False, error=_MANUAL)
  library['cut'] = _Builder(prepared=False, error=RuntimeError('no\nnetwork'))
  library['broken'] = _Builder(train=[b'no picture'])
  with pytest.raises(ValueError, match=message) as error:
    found = tfds_sets.from_name(name, pictures.Square('adm', 8))
    list(found.batches(2))
  assert '\n' not in str(error.value)


def test_missing_packages_are_named_before_the_download(library, monkeypatch):
  for name in ('photos', 'lsun/church_outdoor'):
    library[name] = _Builder(prepared=False, train=map(_file, _photographs(2)))
  have = {'importlib_resources'}
  find = {name: name for name in have}.get
  monkeypatch.setattr(tfds_sets.importlib.util, 'find_spec', find)
  square = pictures.Square('ldm', 8)
  assert tfds_sets.from_name('tfds:photos:train', square).shape[0] == 2
  name = 'tfds:lsun/church_outdoor:train'
  with pytest.raises(ValueError, match='pip install tensorflow_io[.]$'):
    tfds_sets.from_name(name, square)
  library['lsun/church_outdoor'].prepared = True  # Nothing is needed then.
  assert tfds_sets.from_name(name, square).shape[0] == 2


def test_missing_tensorflow_is_named(monkeypatch):
  real = builtins.__import__

  def refuse(name, *args, **kwargs):
    if name == 'tensorflow':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', refuse)
  with pytest.raises(ValueError, match='pip install tensorflow'):
    tfds_sets.from_name('tfds:mnist:test')
