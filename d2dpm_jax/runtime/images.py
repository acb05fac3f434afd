"""Pixels: the one place where floats become uint8, and picture files."""

import io
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from d2dpm_jax.runtime import files

_GAP = 2


def to_uint8(images: jax.Array) -> jax.Array:
  """float[..., H, W, C] in [-1, 1] -> uint8, rounded, clipped outside."""
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def grid(
  images: np.ndarray,
  columns: int,
  scale: int = 1,
  row_names: Sequence[str] = (),
  column_names: Sequence[str] = (),
) -> Image.Image:
  """Lays images out row by row on white, with optional names.

  Args:
    images: uint8[N,H,W,C], C is 1 or 3.
    columns: images in a row.
    scale: whole-number magnification.
    row_names: written to the left of the rows.
    column_names: written above the columns.
  """
  images = images.repeat(scale, 1).repeat(scale, 2)
  if images.shape[-1] == 1:
    images = images.repeat(3, -1)
  _, h, w, _ = images.shape
  rows = -(-len(images) // columns)
  font = ImageFont.load_default(14)
  lines = [line for name in row_names for line in name.splitlines()]
  left = max((int(font.getlength(line)) for line in lines), default=-8) + 12
  top = 24 if column_names else 4
  size = (left + columns * (w + _GAP) + 4, top + rows * (h + _GAP) + 4)
  canvas = Image.new('RGB', size, 'white')
  draw = ImageDraw.Draw(canvas)
  for i, image in enumerate(images):
    row, column = divmod(i, columns)
    canvas.paste(
      Image.fromarray(image),
      (left + column * (w + _GAP), top + row * (h + _GAP)),
    )
  for i, name in enumerate(row_names):
    y = top + i * (h + _GAP) + h // 2
    draw.multiline_text((6, y), name, 'black', font, anchor='lm', spacing=6)
  for i, name in enumerate(column_names):
    x = left + i * (w + _GAP) + w // 2
    draw.text((x, top // 2), name, 'black', font, anchor='mm')
  return canvas


def save_png(path: pathlib.Path, image: Image.Image) -> None:
  """Writes an image aside, then renames it into place."""
  data = io.BytesIO()
  image.save(data, 'PNG')
  with files.atomic_write(path) as file:
    file.write(data.getvalue())
