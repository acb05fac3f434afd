"""Known inputs and known answers: does this installation measure correctly?

Everything runs as for real images, on the devices that there are.
"""

import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from d2dpm_jax.evaluation import (
  bootstrap,
  distance,
  features,
  frechet,
  manifold,
  pictures,
  preprocess,
  resize,
  scores,
)


class Check(NamedTuple):
  """What came out of one check, what should have, and how close is enough."""

  name: str
  found: float
  expected: float
  tolerance: float  # Relative; absolute where 0 is expected.

  @property
  def ok(self) -> bool:
    scale = abs(self.expected) or 1.0
    return abs(self.found - self.expected) <= self.tolerance * scale

  def line(self) -> str:
    """For people."""
    return (
      f'{"ok" if self.ok else "WRONG":<6}{self.name:<46}'
      f'found {self.found:<12.7g} expected {self.expected:.7g}'
    )


def checks() -> Iterator[Check]:
  """Those that need no network; see `digit_checks`."""
  yield from _frechet()
  yield from _moments()
  yield from _scores()
  yield from _manifold()
  yield from _images()
  yield from _device()


# Of `drawn_digits` by the classifier of this digest, to MNIST's test set;
# computed in float64 by NumPy (tests/evaluation/test_selfcheck.py).
DIGITS_DIGEST = '42dbf4d4cadf2fd4'
DIGITS = {
  'mean of features': 0.646549,
  'square of logits': 6.53847,
  'FID to the test set': 1320.749,
  'sFID to the test set': 254.8594,
}


def drawn_digits(count: int = 48) -> np.ndarray:
  """Strokes at several angles, uint8[N,32,32,1]; the same everywhere."""
  k = np.arange(count)[:, None, None]
  y, x = np.mgrid[:32, :32] - 16
  # Whole numbers only, so that no rounding depends on the machine.
  across = (7 * k % 25 - 12) * x + (11 * k % 23 - 11) * y + 5 * (k % 9 - 4)
  ink = np.maximum(0, 255 - 3 * np.abs(across))
  inside = x * x + y * y < 100
  return (ink * inside).astype(np.uint8)[..., None]


def digit_checks(
  net: features.FeatureNet, reference: features.Summary
) -> Iterator[Check]:
  """The classifier of digits and its reference, as the package holds them.

  Args:
    net: the classifier.
    reference: statistics of MNIST's test set.
  """
  same = float(net.digest == DIGITS_DIGEST)
  yield Check('digits: weights are those of the numbers', same, 1, 0)
  found = features.summarize(net, [drawn_digits()], len(drawn_digits()))
  assert found.logits is not None
  # Devices that round products lose 3 digits.
  values = {
    'mean of features': found.features.mean.mean(),
    'square of logits': np.square(found.logits.astype(np.float64)).mean(),
    'FID to the test set': frechet.frechet_distance(
      found.features, reference.features
    ),
    'sFID to the test set': frechet.frechet_distance(
      found.spatial, reference.spatial
    ),
  }
  for name, value in values.items():
    yield Check(f'digits: {name}', float(value), DIGITS[name], 0.01)
  vectors = reference.vectors.astype(np.float64)
  again = frechet.Gaussian(vectors.mean(0), np.cov(vectors.T))
  yield Check(
    'digits: FID of stored features to themselves',
    frechet.frechet_distance(again, reference.features),
    0,
    1e-3,
  )


def _frechet() -> Iterator[Check]:
  def distance_of(mean, a, b):
    zero = np.zeros(len(mean))
    return frechet.frechet_distance(
      frechet.Gaussian(zero, np.array(a, float)),
      frechet.Gaussian(np.array(mean, float), np.array(b, float)),
    )

  # Along axes: |m|^2 + sum of (root a - root b)^2 = 9 + 1 + 0 + 4.
  found = distance_of([1, 2, 2], np.diag([1, 4, 9]), np.diag([4, 4, 1]))
  yield Check('Frechet distance along axes', found, 14, 1e-9)
  # The roots of the eigenvalues of AB, 2 x 2, have the sum
  # (tr AB + 2 (det AB)^(1/2))^(1/2).
  found = distance_of([0, 0], [[2, 1], [1, 2]], [[1, 0], [0, 3]])
  yield Check('Frechet distance across axes', found, 8 - 2 * 14**0.5, 1e-9)
  found = distance_of([0, 0], np.diag([1, 0]), np.diag([0, 1]))
  yield Check('Frechet distance, singular', found, 2, 1e-9)
  vectors = np.ones((4, 2), np.float32)
  reference = frechet.Gaussian(np.zeros(2), np.eye(2))
  interval = bootstrap.fid_interval(vectors, reference, 2)
  yield Check('bootstrap of equal images', interval.high, 4, 1e-9)


def _moments() -> Iterator[Check]:
  count = 1000
  index = np.arange(count)
  x = np.stack([1e6 + index, -3 * index], 1).astype(np.float32)
  moments = frechet.Moments(2)
  for start in range(0, count, 64):
    moments.update(x[start : start + 64])
  mean, covariance = moments.gaussian()
  variance = count * (count + 1) / 12
  yield Check('mean of a stream', mean[0], 1e6 + (count - 1) / 2, 1e-12)
  yield Check('variance of a stream', covariance[0, 0], variance, 1e-9)
  yield Check('covariance of a stream', covariance[0, 1], -3 * variance, 1e-9)
  direct = np.cov(x.astype(np.float64), rowvar=False)
  yield Check(
    'stream less all at once', float(np.abs(covariance - direct).max()), 0, 1e-5
  )


def _scores() -> Iterator[Check]:
  sure = 1e3 * np.tile(np.eye(10), (20, 1))
  found = scores.inception_score(sure, split_size=50, seed=None)
  yield Check('inception score, each class once', found, 10, 1e-9)
  found = scores.inception_score(sure[:, :1].repeat(10, 1))
  yield Check('inception score, no class', found, 1, 1e-9)
  found = scores.label_agreement(np.eye(4), np.array([0, 1, 2, 0]))
  yield Check('label agreement, 3 of 4', found, 0.75, 0)


def _manifold() -> Iterator[Check]:
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 8))
  for name, other, share in (('same', x, 1.0), ('far away', x + 99, 0.0)):
    found = manifold.precision_recall(x, other)
    yield Check(f'precision, {name}', found.precision, share, 0)
    yield Check(f'recall, {name}', found.recall, share, 0)
  # Radii 1 of each; 0.625, 0.625, 1, 1 and 1.25.
  found = manifold.precision_recall(
    np.array([[0.0], [1], [2], [3]]),
    np.array([[0.5], [1.125], [10], [11], [12.25]]),
    neighbours=1,
  )
  yield Check('precision, 2 of 5 points', found.precision, 0.4, 1e-6)
  yield Check('recall, 2 of 4 points', found.recall, 0.5, 1e-6)


def _images() -> Iterator[Check]:
  line = np.array([0, 10, 20], np.uint8).reshape(1, 1, 3, 1)
  found = np.asarray(
    resize.resize_bilinear_tf1(jnp.asarray(line), 1, 6)
  ).ravel()
  # 0, 5, 10, 15, 20, 20
  yield Check('resize of 3 to 6', float(found @ np.arange(6)), 250, 1e-6)
  ramp = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1)
  found = np.asarray(
    resize.resize_bilinear_tf1(jnp.asarray(ramp), 1, 299)
  ).mean()
  mean = (256 / 299 * 297 * 298 / 2 + 255) / 299  # The last one is beyond.
  yield Check('resize of 256 to 299', float(found), mean, 1e-6)
  board = np.zeros((24, 16, 3), np.uint8)
  board[::2, ::2] = board[1::2, 1::2] = 200
  found = np.asarray(preprocess.adm(Image.fromarray(board), 4))
  yield Check('preprocessing adm', float(found.mean()), 100, 0)
  sides = np.full((8, 12, 3), 70, np.uint8)
  sides[:, :2] = sides[:, -2:] = 255
  found = np.asarray(preprocess.ldm(Image.fromarray(sides), 4))
  yield Check('preprocessing ldm', float(found.mean()), 70, 0)
  file = io.BytesIO()
  Image.fromarray(board).save(file, 'PNG')
  (batch,) = pictures.decode([('image', file.getvalue())], board.shape, None, 4)
  yield Check('PNG', float(batch.sum()), 24 * 16 * 3 * 100, 0)
  errors = distance.squared_errors(batch, batch + np.uint8(1))
  decibels = distance.psnr(errors).psnr or math.nan
  yield Check('PSNR', decibels, 20 * math.log10(255), 1e-12)


def _device() -> Iterator[Check]:
  # Too long for the 8 or 11 bits of faster products.
  x = np.full((1, 4, 4, 1), 2049, np.float32)
  found = jax.jit(
    lambda x: jax.lax.conv_general_dilated(
      x,
      x[:, :1, :1],
      (1, 1),
      'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision='highest',
    )
  )(x)
  yield Check('products in float32', float(found[0, 0, 0, 0]), 2049**2, 0)
