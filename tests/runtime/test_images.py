"""Pixels from floats, and the picture of many images."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from d2dpm_jax.runtime import images


def test_every_pixel_value_survives_the_way_there_and_back():
  values = np.arange(256)
  floats = jnp.asarray(values / 127.5 - 1, jnp.float32)
  out = images.to_uint8(floats)
  assert out.dtype == jnp.uint8
  np.testing.assert_array_equal(out, values)


def test_ends_and_what_lies_outside():
  x = jnp.asarray([-1e9, -1.5, -1, 1, 1.5, 1e9, -np.inf, np.inf])
  np.testing.assert_array_equal(
    images.to_uint8(x), [0, 0, 0, 255, 255, 255, 0, 255]
  )


def test_the_tie_goes_to_the_even_value():
  """0 is the one float in [-1, 1] whose pixel, 127.5, is a tie exactly."""
  tiny = np.float32(1e-6)
  x = jnp.asarray([-tiny, 0, tiny], jnp.float32)
  np.testing.assert_array_equal(images.to_uint8(x), [127, 128, 128])
  np.testing.assert_array_equal(jax.jit(images.to_uint8)(x), [127, 128, 128])


def test_rounds_to_nearest_and_not_down():
  x = jnp.asarray([(41.4 / 127.5) - 1, (41.6 / 127.5) - 1])
  np.testing.assert_array_equal(images.to_uint8(x), [41, 42])


def _blocks(count, height=2, width=3, channels=1):
  """Image i is all i + 1."""
  shape = (count, height, width, channels)
  values = np.arange(1, count + 1).reshape(-1, 1, 1, 1)
  return np.broadcast_to(values, shape).astype(np.uint8)


def test_grid_puts_images_row_by_row():
  pixels = np.asarray(images.grid(_blocks(5), columns=2))
  assert pixels.shape == (4 + 3 * (2 + 2) + 4, 4 + 2 * (3 + 2) + 4, 3)
  # Image i at row i // 2, column i % 2; the rest is white.
  expected = np.full(pixels.shape, 255, np.uint8)
  for i in range(5):
    y, x = 4 + (i // 2) * 4, 4 + (i % 2) * 5
    expected[y : y + 2, x : x + 3] = i + 1
  np.testing.assert_array_equal(pixels, expected)


def test_grid_magnifies_whole_pixels():
  image = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
  pixels = np.asarray(images.grid(image, 1, scale=3))[4:10, 4:10]
  np.testing.assert_array_equal(pixels, image[0].repeat(3, 0).repeat(3, 1))


def test_grid_makes_room_for_names_and_writes_them():
  plain = np.asarray(images.grid(_blocks(4, 30, 30), 2))
  named = np.asarray(
    images.grid(
      _blocks(4, 30, 30), 2, row_names=('one', 'two'), column_names=('3', '7')
    )
  )
  assert named.shape[0] > plain.shape[0] and named.shape[1] > plain.shape[1]
  top = named.shape[0] - plain.shape[0]
  left = named.shape[1] - plain.shape[1]
  # The same images, moved; ink in both margins and nowhere else.
  np.testing.assert_array_equal(named[top + 4 :, left + 4 :], plain[4:, 4:])
  assert named[: top + 4, left + 4 :].min() < 128
  assert named[top + 4 :, : left + 4].min() < 128
  assert named[: top + 4, : left + 4].min() == 255


def test_png_is_what_was_drawn(tmp_path):
  picture = images.grid(_blocks(3, channels=3), 3)
  images.save_png(tmp_path / 'deep' / 'x.png', picture)
  with Image.open(tmp_path / 'deep' / 'x.png') as found:
    assert found.format == 'PNG'
    np.testing.assert_array_equal(np.asarray(found), np.asarray(picture))
