"""Images of several samplers from the same noise, with their distances."""

import pathlib

import numpy as np

from d2dpm_jax.reporting import page

_IMAGES = 16  # Columns, at most.


def read(path: pathlib.Path) -> page.Comparison:
  """What --mode sample wrote, for the page.

  Args:
    path: an .npz of `images` uint8[K,N,H,W,C], those of full precision first,
      `names` of the K samplers, and `labels` int[N] where there are classes.

  Raises:
    ValueError: it is damaged.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      pictures = file['images'][:, :_IMAGES]
      names = file['names'].tolist()
      labels = file['labels'][:_IMAGES].tolist() if 'labels' in file else None
  except (OSError, ValueError, KeyError, EOFError) as error:
    raise ValueError(
      f'{path} cannot be read ({error}): make it again with --mode '
      'sample --config.sample.compare=True.'
    ) from error
  count = pictures.shape[1]
  return page.Comparison(
    rows=[
      page.Row(
        name,
        distance_text(pictures[0], row) if number else '',
        [page.image_url(image) for image in row],
        [
          distance_text(first, image) if number else ''
          for first, image in zip(pictures[0], row, strict=True)
        ],
      )
      for number, (name, row) in enumerate(zip(names, pictures, strict=True))
    ],
    columns=[
      f'image {k}' if labels is None else f'image {k}, class {labels[k]}'
      for k in range(count)
    ],
    heads=[
      str(k) if labels is None else f'class {labels[k]}' for k in range(count)
    ],
    size=pictures.shape[2],
    exact=page.is_exact(pictures.shape[2]),
  )


def distance_text(reference: np.ndarray, other: np.ndarray) -> str:
  """PSNR of uint8 images to those of full precision, in words."""
  if reference is other:
    return ''
  error = np.square(reference.astype(float) - other.astype(float)).mean()
  return f'{10 * np.log10(255**2 / error):.2f} dB PSNR' if error else 'equal'
