"""Images against those that they should be, by NumPy."""

import numpy as np
import pytest

from d2dpm_jax.evaluation import digits, features, fidelity, image_sets
from d2dpm_jax.runtime import weights


def _net(layers=None):
  """Sees means of rows."""

  def apply(params, images):
    rows = images.astype('float32').mean((2, 3)) * params
    return features.Activations(rows, rows, rows)

  return features.FeatureNet('toy', 'a', (4, 4, 3), 4, 1.0, apply, layers)


def _set(count, seed=0, labels=None):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
  return image_sets.from_arrays(f'set {seed}', images, labels)


def _all(images):
  return np.concatenate(list(images.batches(100)))


def _unit_distance(a, b):
  a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
  return np.square(a - b).sum(-1)


@pytest.mark.parametrize('batch_size', [1, 4, 50])
def test_pairs_are_compared_in_order(tmp_path, batch_size):
  """8 devices and files of other lengths leave no trace."""
  found = _set(11)
  images = _all(_set(11, 1))
  images[[2, 7]] = _all(found)[[2, 7]]
  for name, rows in (('a', slice(3)), ('b', slice(3, 11))):
    np.savez(tmp_path / f'{name}.npz', arr_0=images[rows])
  wanted, done = image_sets.from_path(tmp_path), []
  got = fidelity.fidelity(found, wanted, _net(), batch_size, done.append)
  a, b = (x.astype(np.float64) for x in (_all(found), images))
  errors = np.square(a - b).mean((1, 2, 3))
  changed = np.delete(errors, [2, 7])
  psnr = 10 * np.log10(65025 / changed)
  distances = _unit_distance(a.mean((2, 3)), b.mean((2, 3)))
  want = fidelity.Fidelity(
    10 * np.log10(65025 / errors.mean()),
    psnr.mean(),
    np.median(psnr),
    2 / 11,
    distances.mean(),
    np.median(distances),
  )
  np.testing.assert_allclose(got, want, rtol=1e-4)
  assert sum(done) == 11


def test_layers_count_alike():
  def layers(params, images):
    x = images.astype('float32') * params
    return [x, x[:, :2, :2, :2]]

  found, wanted = _set(5), _set(5, 1)
  got = fidelity.fidelity(found, wanted, _net(layers), 5)
  a, b = (_all(x).astype(np.float64) for x in (found, wanted))
  first = _unit_distance(a, b).mean((1, 2))
  a, b = a[:, :2, :2, :2], b[:, :2, :2, :2]
  want = (first + _unit_distance(a, b).mean((1, 2))) / 2
  np.testing.assert_allclose(got.feature_distance, want.mean(), rtol=1e-5)


def test_identical_images_have_no_distance():
  got = fidelity.fidelity(_set(5), _set(5), _net(), 4)
  assert got == (None, None, None, 1, 0, 0)


def test_layers_of_the_digit_classifier(tmp_path):
  """Those after each ReLU; the last one is what sFID looks at."""
  rng = np.random.default_rng(0)
  sizes = ((1, 32), (32, 32), (32, 64), (64, 64))
  params = {
    f'conv_{i}': {
      'kernel': rng.normal(0, 0.1, (3, 3, *size)).astype(np.float32),
      'bias': rng.normal(0, 0.1, size[1:]).astype(np.float32),
    }
    for i, size in enumerate(sizes)
  }
  for name, size in (('features', (1024, 128)), ('logits', (128, 10))):
    params[name] = {
      'kernel': rng.normal(0, 0.1, size).astype(np.float32),
      'bias': np.zeros(size[1], np.float32),
    }
  weights.save_safetensors(tmp_path / 'w.safetensors', params, {})
  net = digits.digit_net(tmp_path / 'w.safetensors')
  images = rng.integers(0, 256, (2, 32, 32, 1), np.uint8)
  layers = [np.asarray(x) for x in net.layers(net.params, images)]
  assert [x.shape[1:] for x in layers] == [
    (32, 32, 32), (32, 32, 32), (16, 16, 64), (8, 8, 64)
  ]  # fmt: skip
  assert min(x.min() for x in layers) == 0
  spatial = net.apply(net.params, images).spatial
  np.testing.assert_allclose(layers[-1][..., :7], spatial, atol=1e-5)


@pytest.mark.parametrize(
  'found, wanted, message',
  [
    (_set(5), _set(4, 1), r'\[5, 4, 4, 3\].*\[4, 4, 4, 3\]'),
    (
      _set(5, 0, np.arange(5)),
      _set(5, 1, np.array([0, 1, 9, 9, 4])),
      'Image 2 is of class 2 in set 0 and of class 9 in set 1',
    ),
  ],
)
def test_what_does_not_belong_together_is_refused(found, wanted, message):
  with pytest.raises(ValueError, match=message):
    fidelity.fidelity(found, wanted, _net(), 4)
