"""The stored numbers by NumPy, and that every check can fail."""

import dataclasses
import itertools
import pathlib

import numpy as np
import pytest

import d2dpm_jax
from d2dpm_jax.evaluation import (
  digits,
  distance,
  frechet,
  manifold,
  pictures,
  preprocess,
  references,
  resize,
  scores,
  selfcheck,
)
from d2dpm_jax.runtime import weights

_PRETRAINED = pathlib.Path(d2dpm_jax.__file__).parent / 'pretrained'


@pytest.fixture(scope='module')
def judge():
  """The classifier, and statistics of the test set."""
  net = digits.digit_net(_PRETRAINED / 'mnist_classifier.safetensors')
  return net, references.load(_PRETRAINED / 'mnist_reference.npz', net)


def _conv(x, kernel, bias):
  """3 x 3 with a border of 0, ReLU; one shift after the other."""
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  height, width = x.shape[1:3]
  total = np.zeros((*x.shape[:3], kernel.shape[-1]))
  for i, j in itertools.product(range(3), repeat=2):
    total += padded[:, i : i + height, j : j + width] @ kernel[i, j]
  return np.maximum(total + bias, 0)


def _pool(x):
  return np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], 0)


def _fid(x, reference):
  """By the eigenvalues of the product of covariances."""
  covariance = np.cov(x, rowvar=False)
  product = np.linalg.eigvals(covariance @ reference.covariance).real
  step = x.mean(0) - reference.mean
  traces = np.trace(covariance) + np.trace(reference.covariance)
  return step @ step + traces - 2 * np.sqrt(np.maximum(product, 0)).sum()


def test_stored_numbers_are_those_of_numpy(judge):
  net, reference = judge
  flat, _ = weights.load_safetensors(
    _PRETRAINED / 'mnist_classifier.safetensors'
  )
  x = selfcheck.drawn_digits().astype(np.float64) / 127.5 - 1
  assert x.shape == (48, 32, 32, 1) and np.ptp(x) == 2
  for i in range(4):
    x = _conv(x, *(flat[f'conv_{i}'][k] for k in ('kernel', 'bias')))
    spatial = x[..., :7].reshape(len(x), -1)
    x = _pool(x) if i else x
  x = x.reshape(len(x), -1)
  dense = flat['features']
  x = np.maximum(x @ dense['kernel'].astype(float) + dense['bias'], 0)
  logits = x @ flat['logits']['kernel'].astype(float) + flat['logits']['bias']
  want = {
    'mean of features': x.mean(),
    'square of logits': np.square(logits).mean(),
    'FID to the test set': _fid(x, reference.features),
    'sFID to the test set': _fid(spatial, reference.spatial),
  }
  assert net.digest == selfcheck.DIGITS_DIGEST
  assert selfcheck.DIGITS == pytest.approx(want, rel=1e-5)
  assert len(set(logits.argmax(-1))) > 3  # They are not all alike.


def test_all_is_right_here(judge):
  checks = [*selfcheck.checks(), *selfcheck.digit_checks(*judge)]
  assert len(checks) > 20
  for check in checks:
    assert check.ok and check.line().startswith('ok '), check
    assert check.name in check.line() and '\n' not in check.line()
  assert len({check.name for check in checks}) == len(checks)


def _wrong(monkeypatch, owner, name, change):
  """Names of checks that notice when a function answers something else."""
  original = getattr(owner, name)
  monkeypatch.setattr(owner, name, lambda *a, **k: change(original(*a, **k)))
  return [check.name for check in selfcheck.checks() if not check.ok]


@pytest.mark.parametrize(
  'owner, name, change, noticed',
  [
    (frechet, 'frechet_distance', lambda x: x**0.5, 'Frechet distance'),
    (
      frechet.Moments,
      'gaussian',
      lambda x: x._replace(covariance=x.covariance * 0.999),
      'variance of a stream',
    ),
    (scores, 'inception_score', np.log, 'inception score'),
    (scores, 'label_agreement', lambda x: 1 - x, 'label agreement'),
    (
      manifold,
      'precision_recall',
      lambda x: manifold.PrecisionRecall(*x[::-1]),
      'recall, 2 of 4',
    ),
    (resize, 'resize_bilinear_tf1', lambda x: x[..., ::-1, :], 'resize'),
    (preprocess, 'adm', lambda x: x.rotate(90).crop((0, 0, 9, 9)), 'adm'),
    (preprocess, 'ldm', lambda x: x.point(lambda v: v + 1), 'ldm'),
    (pictures, 'decode', lambda x: (y + 1 for y in x), 'PNG'),
    (distance, 'squared_errors', lambda x: 2 * x, 'PSNR'),
  ],
)
def test_what_is_wrong_is_noticed(monkeypatch, owner, name, change, noticed):
  assert any(noticed in x for x in _wrong(monkeypatch, owner, name, change))


def test_other_weights_are_noticed(judge):
  net, reference = judge
  images = selfcheck.drawn_digits()
  assert images.dtype == np.uint8
  worse = dict(net.params, logits=dict(net.params['logits']))
  worse['logits']['kernel'] = worse['logits']['kernel'] * 1.1
  other = dataclasses.replace(net, params=worse, digest='x')
  wrong = [c.name for c in selfcheck.digit_checks(other, reference) if not c.ok]
  assert wrong == [
    'digits: weights are those of the numbers',
    'digits: square of logits',
  ]


def test_nan_is_wrong():
  assert not selfcheck.Check('x', np.nan, 1, 0.1).ok
  assert 'WRONG' in selfcheck.Check('x', 2, 1, 0.1).line()
