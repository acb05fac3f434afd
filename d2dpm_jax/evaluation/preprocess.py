"""How models' authors made square images of photographs of any size.

A reference has to be made as the training images were, or FID does not compare:
it sees how photographs were cut and shrunk.
"""

from collections.abc import Callable

from PIL import Image


def adm(image: Image.Image, size: int) -> Image.Image:
  """Shrinks the shorter side to `size`, then cuts out the middle.

  As long as the shorter side is at least twice too long, both are halved, by
  means of blocks (a filter of PIL, BOX); the rest is bicubic. Images that are
  too small grow. So ImageNet's images were made for ADM and others.

  Source: `center_crop_arr` in openai/guided-diffusion,
  guided_diffusion/image_datasets.py.

  Args:
    image: of any size.
    size: height and width of the result, in pixels.
  """
  while min(image.size) >= 2 * size:
    half = (image.width // 2, image.height // 2)
    image = image.resize(half, Image.Resampling.BOX)
  factor = size / min(image.size)
  scaled = (round(image.width * factor), round(image.height * factor))
  return _cut(image.resize(scaled, Image.Resampling.BICUBIC), size)


def ldm(image: Image.Image, size: int) -> Image.Image:
  """Cuts out the largest square in the middle, then shrinks it, bicubic.

  So LSUN's images were made for latent diffusion.

  Source: `LSUNBase` in CompVis/latent-diffusion, ldm/data/lsun.py, without its
  random mirroring.

  Args:
    image: of any size.
    size: height and width of the result, in pixels.
  """
  square = _cut(image, min(image.size))
  return square.resize((size, size), Image.Resampling.BICUBIC)


# Names for `config.evaluate.preprocess`.
PREPROCESS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
  'adm': adm,
  'ldm': ldm,
}


def _cut(image: Image.Image, size: int) -> Image.Image:
  """The square of `size` pixels in the middle; up and left of it if odd."""
  left, top = (image.width - size) // 2, (image.height - size) // 2
  return image.crop((left, top, left + size, top + size))
