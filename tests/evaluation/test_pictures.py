"""Folders of pictures, and how photographs become square, against plain PIL."""

import threading

import numpy as np
import pytest
from PIL import Image

from d2dpm_jax.evaluation import pictures, preprocess


def _pixels(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _smooth(height, width):
  """A photograph in the small: slow waves, so that resizing means something."""
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / 7 + c) + np.cos(y / 5 - c) for c in range(3)]
  return (127 + 60 * np.stack(waves, -1)).astype(np.uint8)


def _folder(tmp_path, count=7, shape=(6, 5, 3)):
  """Pictures in folders; the images in the order of their paths."""
  images = _pixels((count, *shape))
  names = sorted(f'{k % 2}/{k:02}.png' for k in range(count))
  for name, image in zip(names, images, strict=True):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.fromarray(image.squeeze()).save(tmp_path / name)
  return images


@pytest.mark.parametrize('shape', [(6, 5, 3), (6, 5, 1)])
@pytest.mark.parametrize('size', [1, 3, 100])
def test_batches_of_a_folder_are_its_pictures(tmp_path, shape, size):
  images = _folder(tmp_path, shape=shape)
  (tmp_path / '.hidden').write_text('does not count')
  found = pictures.from_folder(tmp_path)
  assert found.shape == images.shape and found.labels is None
  for _ in range(2):  # It can be read again.
    batches = list(found.batches(size))
    assert {len(b) for b in batches[:-1]} <= {size}
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_formats_and_capitals(tmp_path):
  image = Image.fromarray(_smooth(16, 16))
  image.save(tmp_path / 'a.PNG')
  image.save(tmp_path / 'b.JPEG', quality=95)
  image.save(tmp_path / 'c.webp', quality=95)
  found = np.concatenate(list(pictures.from_folder(tmp_path).batches(2)))
  assert np.ptp(found.astype(float), axis=0).max() < 40
  np.testing.assert_array_equal(found[0], np.asarray(image))


def test_only_two_batches_are_held():
  """Items are taken when they are needed, so a data set need not fit."""
  taken = []

  def items():
    for k in range(1000):
      taken.append(k)
      yield k

  read = pictures._in_threads(lambda k: np.full(1, k), items(), 8)
  assert [int(next(read)[0]) for _ in range(5)] == list(range(5))
  assert len(taken) <= 5 + 8
  read.close()
  assert len(taken) <= 5 + 8 and threading.active_count() < 50


def _adm(pixels, size):
  """ADM's rule in its own words; halving as a mean where sides are even."""
  image = pixels.astype(np.float64)
  while min(image.shape[:2]) >= 2 * size:
    height, width = image.shape[:2]
    assert height % 2 == width % 2 == 0
    # PIL rounds after each axis.
    image = np.floor((image[:, ::2] + image[:, 1::2]) / 2 + 0.5)
    image = np.floor((image[::2] + image[1::2]) / 2 + 0.5)
  height, width = image.shape[:2]
  scale = size / min(height, width)
  new = round(height * scale), round(width * scale)
  image = np.asarray(
    Image.fromarray(image.astype(np.uint8)).resize(new[::-1], Image.BICUBIC)
  )
  top, left = (new[0] - size) // 2, (new[1] - size) // 2
  return image[top:, left:][:size, :size]


@pytest.mark.parametrize(
  'shape', [(96, 128), (64, 64), (256, 200), (40, 100), (32, 32), (20, 33)]
)
def test_adm_is_its_rule(shape):
  pixels = _smooth(*shape)
  found = np.asarray(preprocess.adm(Image.fromarray(pixels), 32))
  assert found.shape == (32, 32, 3)
  np.testing.assert_array_equal(found, _adm(pixels, 32))


def _bicubic_matrix(old, new):
  """Keys' cubic with a = -0.5, widened when it shrinks, as in PIL."""
  scale = max(old / new, 1.0)
  centre = (np.arange(new)[:, None] + 0.5) * old / new
  x = np.abs((np.arange(old) + 0.5 - centre) / scale)
  near = 1.5 * x**3 - 2.5 * x**2 + 1
  far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  weights = np.where(x < 1, near, np.where(x < 2, far, 0))
  return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize('shape', [(48, 71), (90, 60), (32, 32), (20, 21)])
def test_ldm_is_its_rule(shape):
  pixels = _smooth(*shape)
  found = np.asarray(preprocess.ldm(Image.fromarray(pixels), 32)).astype(int)
  side = min(shape)
  top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
  square = pixels[top : top + side, left : left + side].astype(float)
  matrix = _bicubic_matrix(side, 32)
  want = np.einsum('ih,hwc,jw->ijc', matrix, square, matrix)
  # PIL rounds after each axis, and to its own fixed-point weights.
  assert np.abs(found - want).max() < 1.6
  if side == 32:
    np.testing.assert_array_equal(found, square)


def test_the_two_rules_differ():
  image = Image.fromarray(_smooth(150, 200))
  rules = [np.asarray(f(image, 32)) for f in preprocess.PREPROCESS.values()]
  assert np.abs(rules[0].astype(int) - rules[1]).max() > 2


@pytest.mark.parametrize('channels', [1, 3])
def test_photographs_become_one_size_and_kind(tmp_path, channels):
  sources = [
    Image.fromarray(_smooth(40, 50)),
    Image.fromarray(_smooth(70, 33)[..., 0]),
    Image.fromarray(_smooth(30, 30)).convert('P'),
    Image.fromarray(_smooth(64, 64)).convert('CMYK'),
  ]
  for k, image in enumerate(sources):
    kind = 'jpg' if image.mode == 'CMYK' else 'png'
    image.save(tmp_path / f'{k}.{kind}')
  square = pictures.Square('adm', 24, channels)
  found = pictures.from_folder(tmp_path, square)
  assert found.shape == (4, 24, 24, channels)
  got = np.concatenate(list(found.batches(3)))
  mode = 'L' if channels == 1 else 'RGB'
  for k in (0, 1):
    want = preprocess.adm(sources[k].convert(mode), 24)
    np.testing.assert_array_equal(got[k].squeeze(), np.asarray(want))


def _save(path, array, mode=None):
  image = Image.fromarray(array)
  (image.convert(mode) if mode else image).save(path)


_BAD = {
  'another size': (lambda p: _save(p, _pixels((5, 6, 3))), '6 x 5 .* 5 x 6 '),
  'grey among RGB': (lambda p: _save(p, _pixels((6, 5))), 'of grey.* of RGB'),
  'transparent': (lambda p: _save(p, _pixels((6, 5, 4))), 'of kind RGBA'),
  'palette': (lambda p: _save(p, _pixels((6, 5, 3)), 'P'), 'of kind P '),
  '16 bits': (
    lambda p: _save(p, _pixels((6, 5)).astype(np.uint16)),
    'of kind I;16',
  ),
  'no picture': (lambda p: p.write_text('text'), 'no readable picture'),
  'empty': (lambda p: p.write_bytes(b''), 'no readable picture'),
}


@pytest.mark.parametrize('kind', _BAD)
def test_bad_pictures_are_refused_by_name(tmp_path, kind):
  write, message = _BAD[kind]
  _folder(tmp_path)
  for name in ('x.png', 'y.png'):
    write(tmp_path / '1' / name)
  with pytest.raises(ValueError, match=message) as error:
    pictures.from_folder(tmp_path)
  assert '1/x.png' in str(error.value)
  assert '\n' not in str(error.value)


def test_other_files_are_refused_by_name(tmp_path):
  with pytest.raises(ValueError, match='has no .npz files and no pictures'):
    pictures.from_folder(tmp_path)
  _folder(tmp_path)
  (tmp_path / '0' / 'notes.txt').write_text('text')
  (tmp_path / '1' / 'labels.csv').write_text('text')
  with pytest.raises(ValueError, match='0/notes.txt is no picture') as error:
    pictures.from_folder(tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('square', [None, pictures.Square('ldm', 8)])
def test_damage_is_found_while_reading(tmp_path, square):
  _folder(tmp_path, shape=(30, 30, 3))
  path = tmp_path / '1' / '03.png'
  path.write_bytes(path.read_bytes()[:-300])
  found = pictures.from_folder(tmp_path, square)
  with pytest.raises(ValueError, match='1/03.png is no readable picture'):
    list(found.batches(2))


def test_16_bits_are_not_cut_off(tmp_path):
  _save(tmp_path / 'x.png', _pixels((6, 5)).astype(np.uint16))
  found = pictures.from_folder(tmp_path, pictures.Square('adm', 4))
  with pytest.raises(ValueError, match='x.png is .* I;16'):
    list(found.batches(2))


@pytest.mark.parametrize(
  'settings, message',
  [(('crop', 8), r"'crop'.*'none', 'adm', 'ldm'"), (('adm', 0), '0 pixels')],
)
def test_bad_settings_of_squares(settings, message):
  with pytest.raises(ValueError, match=message):
    pictures.Square(*settings)
