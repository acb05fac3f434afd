import numpy as np
import pytest

from d2dpm_jax.evaluation import manifold


def _by_hand(reference, samples, k):
  """Every distance in float64, sorted in full, from differences."""

  def distances(a, b):
    return np.linalg.norm(a[:, None].astype(float) - b[None], axis=-1)

  def radii(x):
    return np.sort(distances(x, x), 1)[:, k]  # Column 0 is x itself.

  across = distances(reference, samples)
  in_reference = across <= radii(reference)[:, None]
  in_samples = across <= radii(samples)[None]
  return in_reference.any(0).mean(), in_samples.any(1).mean()


def _sets(dim=6):
  rng = np.random.default_rng(0)
  reference = rng.normal(size=(150, dim)).astype(np.float32)
  samples = (0.3 + 0.7 * rng.normal(size=(90, dim))).astype(np.float32)
  return reference, samples


@pytest.mark.parametrize('k', [1, 3, 5])
def test_equal_to_all_distances_by_hand(k):
  reference, samples = _sets()
  want = _by_hand(reference, samples, k)
  assert 0.1 < min(want) < max(want) < 0.999
  assert manifold.precision_recall(reference, samples, k) == want
  swapped = manifold.precision_recall(samples, reference, k)
  assert swapped == want[::-1]


@pytest.mark.parametrize('rows, columns', [(1, 200), (16, 7), (64, 64)])
def test_blocks_do_not_change_the_result(monkeypatch, rows, columns):
  """Neither blocks nor their padding, which is no image."""
  reference, samples = _sets()
  monkeypatch.setattr(manifold, '_ROWS', rows)
  monkeypatch.setattr(manifold, '_COLUMNS', columns)
  got = manifold.precision_recall(reference, samples)
  assert got == _by_hand(reference, samples, 3)


def test_far_from_zero():
  """|a|^2 + |b|^2 - 2ab of these would have no correct digit in float32."""
  reference, samples = _sets()
  got = manifold.precision_recall(reference + 1000, samples + 1000)
  want = _by_hand(reference + 1000, samples + 1000, 3)
  np.testing.assert_allclose(got, want, atol=1e-9)


def test_known_answers():
  reference, _ = _sets()
  assert manifold.precision_recall(reference, reference) == (1, 1)
  assert manifold.precision_recall(reference, reference + 100) == (0, 0)
  # A mode that collapsed to one real image: precise, and nothing recalled.
  collapsed = np.repeat(reference[:1], 10, 0)
  got = manifold.precision_recall(reference, collapsed)
  assert got == (1, 1 / 150)


@pytest.mark.parametrize(
  'reference, samples, k, message',
  [
    (np.ones((9, 2)), np.ones((9, 3)), 3, r'\[9, 2\] and \[9, 3\]'),
    (np.ones(9), np.ones(9), 3, 'expected'),
    (np.ones((9, 2)), np.ones((3, 2)), 3, '9 and 3 images'),
    (np.ones((9, 2)), np.ones((9, 2)), 0, '0 neighbours'),
    (np.full((9, 2), np.nan), np.ones((9, 2)), 3, 'NaN'),
  ],
)
def test_bad_input_is_refused(reference, samples, k, message):
  with pytest.raises(ValueError, match=message):
    manifold.precision_recall(reference, samples, k)
