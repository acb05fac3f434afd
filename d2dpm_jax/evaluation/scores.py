"""What follows from class scores alone: inception score, label agreement."""

import numpy as np


def inception_score(
  logits: np.ndarray, split_size: int = 5000, seed: int | None = 0
) -> float:
  """exp(E KL(p(y|x) || p(y))), averaged over splits.

  Source: arXiv:1606.03498, Sec. 4. Same number as `compute_inception_score` in
  openai/guided-diffusion, evaluations/evaluator.py, with `seed=None`. p(y) is
  estimated within a split, so files that are sorted by class need shuffling.

  Args:
    logits: float[N,K].
    split_size: images per split; the last one may have fewer.
    seed: of the shuffling before splitting; None keeps the file's order.

  Returns:
    The mean over splits, 1 to K.

  Raises:
    ValueError: no images, a split size below 1, or NaN.
  """
  if split_size < 1 or not len(logits):
    raise ValueError(
      f'Inception score of {len(logits)} images in splits of {split_size}: '
      'both must be at least 1.'
    )
  if not np.isfinite(logits).all():
    raise ValueError('Inception score of logits with NaN or infinity.')
  order = np.arange(len(logits))
  if seed is not None:
    order = np.random.default_rng(seed).permutation(order)
  splits = [
    order[start : start + split_size]
    for start in range(0, len(order), split_size)
  ]
  return float(np.mean([_split_score(logits[rows]) for rows in splits]))


def _split_score(logits: np.ndarray) -> float:
  """exp(E KL(p(y|x) || p(y))) of all of float[N,K]."""
  log_p = logits.astype(np.float64)
  log_p -= log_p.max(-1, keepdims=True)
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  p = np.exp(log_p)
  # Where a class has probability 0, p is 0 as well and so is the term.
  log_mean = np.log(np.maximum(p.mean(0), np.finfo(float).tiny))
  return float(np.exp((p * (log_p - log_mean)).sum(-1).mean()))


def label_agreement(logits: np.ndarray, labels: np.ndarray) -> float:
  """Share of images whose best class is the one they were asked for.

  Args:
    logits: float[N,K].
    labels: int[N].

  Raises:
    ValueError: other than one label per image, or labels outside 0..K-1.
  """
  labels = np.asarray(labels)
  if labels.shape != logits.shape[:1] or not len(labels):
    raise ValueError(
      f'{len(logits)} images but labels of shape {list(labels.shape)}.'
    )
  check_labels('The set', labels, logits.shape[1])
  return float(np.mean(logits.argmax(-1) == labels))


def check_labels(name: str, labels: np.ndarray, classes: int) -> None:
  """Raises ValueError if a label of int[N] is not in 0..classes-1.

  Args:
    name: of the set of images, for the message.
    labels: what was asked for.
    classes: how many the network knows that judges them.
  """
  if labels.min() < 0 or labels.max() >= classes:
    raise ValueError(
      f'{name} has labels from {labels.min()} to {labels.max()}, but the '
      f'network that judges it knows the classes 0..{classes - 1}. Without '
      'arr_1 images are judged without labels.'
    )
