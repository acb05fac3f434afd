"""The page of --mode report: values and pictures in, one HTML file out."""

import base64
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

FOLD = 12  # Tables of more rows are to be folded.
_COLOURS = 256  # Of a figure; they are drawn in few.
_SMALL = 64  # Pixels of a side: up to so many, images are kept exactly.


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows below a header; texts, or numbers as they are to be shown.

  Attributes:
    header: names of the columns.
    rows: their cells.
    caption: what it shows.
    folded: shown only when it is asked for.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[Any]]
  caption: str = ''
  folded: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
  """A picture as a data: URL, with what it shows."""

  url: str
  caption: str
  width: int
  height: int


@dataclasses.dataclass(frozen=True)
class Row:
  """Images of one sampler from the same noise as those of the others.

  Attributes:
    name: of the sampler.
    note: its distance to full precision.
    urls: of its images.
    notes: likewise, image by image.
  """

  name: str
  note: str
  urls: Sequence[str]
  notes: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Rows of images; columns have the same noise and label.

  Attributes:
    rows: of the samplers.
    columns: names of the columns.
    heads: short ones, to be written above them.
    size: pixels of a side.
    exact: whether the images are as they were sampled, not compressed.
  """

  rows: Sequence[Row]
  columns: Sequence[str]
  heads: Sequence[str]
  size: int
  exact: bool

  @property
  def pixelated(self) -> bool:
    return self.size <= _SMALL


def image_url(image: np.ndarray) -> str:
  """uint8[H,W,C], C 1 or 3 -> data: URL; large ones are compressed."""
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  data = io.BytesIO()
  if is_exact(image.shape[0]):
    picture.save(data, 'PNG', optimize=True)
    return _url('image/png', data.getvalue())
  picture.save(data, 'WEBP', quality=90)
  return _url('image/webp', data.getvalue())


def is_exact(size: int) -> bool:
  """Whether `image_url` keeps images of that side as they are."""
  return size <= _SMALL


def figure(path: pathlib.Path, caption: str) -> Figure:
  """A figure that was saved as a .png.

  Raises:
    ValueError: it cannot be read.
  """
  try:
    with Image.open(path) as opened:
      picture = opened.convert('RGB')
  except OSError as error:
    raise ValueError(
      f'{path} cannot be read ({error}): delete it, and run the command that '
      'made it again.'
    ) from error
  data = io.BytesIO()
  picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(
    data, 'PNG', optimize=True
  )
  url = _url('image/png', data.getvalue())
  return Figure(url, caption, picture.width, picture.height)


def _url(kind: str, data: bytes) -> str:
  return f'data:{kind};base64,{base64.b64encode(data).decode()}'


def render(**parts: Any) -> str:
  """The page; parts that are None or empty are left out.

  Everything is escaped but the template itself.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('d2dpm_jax.reporting', 'templates'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template('report.html').render(**parts)
