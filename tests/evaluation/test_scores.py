import math

import numpy as np
import pytest

from d2dpm_jax.evaluation import scores


def _evaluators_score(logits: np.ndarray, split_size: int) -> float:
  """The formula of OpenAI's evaluator, one number at a time."""
  results = []
  for start in range(0, len(logits), split_size):
    part = []
    for row in logits[start : start + split_size]:
      powers = [math.exp(v) for v in row]
      part.append([v / sum(powers) for v in powers])
    mean = [sum(column) / len(part) for column in zip(*part, strict=True)]
    divergences = [
      sum(
        p * (math.log(p) - math.log(q)) for p, q in zip(row, mean, strict=True)
      )
      for row in part
    ]
    results.append(math.exp(sum(divergences) / len(divergences)))
  return sum(results) / len(results)


@pytest.mark.parametrize('split_size', [7, 50, 120, 5000])
def test_score_is_that_of_the_evaluators_formula(split_size):
  logits = 3 * np.random.default_rng(0).normal(size=(120, 5))
  want = _evaluators_score(logits, split_size)
  got = scores.inception_score(logits, split_size, seed=None)
  assert 1.5 < want < 5
  np.testing.assert_allclose(got, want, rtol=1e-9)


def test_certain_scores_are_the_number_of_classes():
  """Probabilities underflow to 0 here, where x log x is 0 and not NaN."""
  logits = 1e4 * np.eye(4)[np.arange(100) % 4]
  np.testing.assert_allclose(scores.inception_score(logits), 4, rtol=1e-9)
  one_class = 1e4 * np.eye(4)[np.zeros(100, int)]
  np.testing.assert_allclose(scores.inception_score(one_class), 1, rtol=1e-9)


def test_shuffling_matters_for_files_that_are_sorted_by_class():
  logits = 1e4 * np.eye(4)[np.repeat(np.arange(4), 50)]
  in_order = scores.inception_score(logits, 50, seed=None)
  np.testing.assert_allclose(in_order, 1, rtol=1e-9)
  shuffled = scores.inception_score(logits, 50, seed=0)
  assert 3.7 < shuffled < 4
  assert shuffled == scores.inception_score(logits, 50, seed=0)
  assert shuffled != scores.inception_score(logits, 50, seed=1)


def test_bad_scores_are_refused():
  with pytest.raises(ValueError, match='at least 1'):
    scores.inception_score(np.zeros((0, 3)))
  with pytest.raises(ValueError, match='at least 1'):
    scores.inception_score(np.zeros((2, 3)), 0)
  with pytest.raises(ValueError, match='NaN'):
    scores.inception_score(np.full((2, 3), np.nan))


def test_label_agreement_counts_equal_labels():
  logits = np.eye(3)[[0, 1, 2, 2]]
  assert scores.label_agreement(logits, np.array([0, 1, 2, 0])) == 0.75


@pytest.mark.parametrize(
  'labels, message',
  [
    ([0, 1], r'3 images but labels of shape \[2\]'),
    ([[0], [1], [2]], 'labels of shape'),
    ([0, 1, 3], r'0\.\.2'),
    ([-1, 1, 2], r'0\.\.2'),
  ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
  with pytest.raises(ValueError, match=message):
    scores.label_agreement(np.eye(3), np.array(labels))
