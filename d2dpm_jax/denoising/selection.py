"""How much of the error a correction predicts on images it was not fitted on.

The error d = eps_q - eps is predicted as gain * eps_q + bias. There are five
candidates for the pair: nothing at all, and bias alone or gain and bias of the
joint Gaussian (`gaussian`), each per tensor or per channel. Images are dealt
out to folds; what is fitted on all other folds is tried on the one left out, so
each image is tried once, by fits that never saw it. In sample a richer
candidate always looks better, here it does not.

Letters: `N` images, `S` timesteps, `K` candidates, `C` channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from d2dpm_jax.denoising import gaussian
from d2dpm_jax.denoising.table import Table

CANDIDATES = (
  'none',
  'tensor bias',
  'tensor gain+bias',
  'channel bias',
  'channel gain+bias',
)
# A candidate is preferred to none if its R2 is so many standard errors above 0.
_STANDARD_ERRORS = 2.0


class _Trial(NamedTuple):
  """What the candidates leave of the errors of one timestep."""

  left_variance: np.ndarray  # float64[K, C]
  r2: np.ndarray  # float64[K]
  r2_about_mean: np.ndarray  # float64[K]
  standard_error: np.ndarray  # float64[K]


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut(Table):
  """The candidates at each timestep, and how they did on held-out images.

  Attributes:
    timesteps: int64[S], distinct.
    gain: float64[S, K, C], fitted on all images.
    bias: float64[S, K, C], likewise.
    left_variance: float64[S, K, C], variance of d - prediction, held out.
    r2: float64[S, K], 1 - E[(d - prediction)**2] / E[d**2], held out; that of
      'none' is 0. Negative where a candidate does harm.
    r2_about_mean: float64[S, K], the same over the variance of d about its mean
      in the whole tensor.
    standard_error: float64[S, K], of `r2`, over images.
    settings: what the statistics depend on, as in `gaussian.ErrorModel`.
  """

  NAME: ClassVar[str] = 'table of held-out errors'
  FORMAT: ClassVar[str] = 'd2dpm_jax.held_out'
  VERSION: ClassVar[int] = 1

  timesteps: np.ndarray
  gain: np.ndarray
  bias: np.ndarray
  left_variance: np.ndarray
  r2: np.ndarray
  r2_about_mean: np.ndarray
  standard_error: np.ndarray
  settings: Any = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self._freeze()
    rows = (len(self.timesteps), len(CANDIDATES))
    if self.gain.shape[:2] != rows or self.gain.ndim != 3:
      raise ValueError(f'gain has shape {self.gain.shape}: expected {rows}, C.')
    for name in ('bias', 'left_variance'):
      self._check_shape(name, self.gain.shape)
    for name in ('r2', 'r2_about_mean', 'standard_error'):
      self._check_shape(name, rows)
    for name in ('left_variance', 'standard_error'):
      if (getattr(self, name) < 0).any():
        raise ValueError(f'{name} is negative.')

  def choice(self) -> np.ndarray:
    """Which of CANDIDATES to use at each timestep, int64[S].

    The best one, if it beats 'none' by more than two standard errors.
    """
    best = np.argmax(self.r2, axis=1)
    r2, error = (
      np.take_along_axis(x, best[:, None], 1)[:, 0]
      for x in (self.r2, self.standard_error)
    )
    return np.where(r2 > _STANDARD_ERRORS * error, best, 0)


def _affine(
  tensor: Any, channel: Any, channels: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Gain and bias of the candidates, float64[K, *channels].

  Args:
    tensor: `gaussian.Fit` or `gaussian.ErrorModel`, tensor-wise.
    channel: the same of channels.
    channels: [C], or [S, C] of error models.
  """
  gains, biases = [np.zeros(channels)], [np.zeros(channels)]
  for stats in (tensor, channel):
    gain, bias, _ = gaussian.conditional(stats)
    gains += [np.zeros_like(gain), gain]
    biases += [stats.mean_d, bias]

  def table(rows):
    rows = [x if np.ndim(x) == len(channels) else x[..., None] for x in rows]
    return np.stack([np.broadcast_to(x, channels) for x in rows])

  return table(gains), table(biases)


def _select(
  pairs: gaussian.Pairs, fold: int, folds: int, inside: bool
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
  """The pairs of the images of one fold, or those of all other images."""
  first = 0
  for eps_q, eps in pairs():
    index = np.arange(first, first + len(eps_q))
    first += len(index)
    chosen = (index % folds == fold) == inside
    if chosen.any():
      yield np.asarray(eps_q)[chosen], np.asarray(eps)[chosen]


def _try(pairs: gaussian.Pairs, folds: int, outlier_std: float) -> _Trial:
  """Fits the candidates without each fold in turn, tries them on it."""
  squares, sums = [], []  # Of what is left, [K, n, C] per chunk of n images.
  elements = 0
  for fold in range(folds):
    rest = functools.partial(_select, pairs, fold, folds, False)
    tensor, channel = (
      gaussian.fit_timestep(rest, channel_wise, outlier_std)
      for channel_wise in (False, True)
    )
    affine = _affine(tensor, channel, channel.mean_d.shape)
    gain, bias = (x[:, None, None, :] for x in affine)
    fold_pairs = functools.partial(_select, pairs, fold, folds, True)
    for q, d in gaussian.elements(fold_pairs):
      left = d - (gain * q + bias)
      squares.append(np.square(left).sum(2))
      sums.append(left.sum(2))
      elements += d.shape[0] * d.shape[1]
  square, total = np.concatenate(squares, 1), np.concatenate(sums, 1)
  mean_square, mean = square.sum(1) / elements, total.sum(1) / elements
  by_image = square.sum(2)
  r2, error = _r2(by_image, by_image[0])
  whole = mean_square[0].mean() - np.square(mean[0].mean())
  share = np.ones(len(r2))
  if whole > 0:
    share = mean_square.mean(1) / whole
  return _Trial(
    np.maximum(mean_square - np.square(mean), 0.0), r2, 1 - share, error
  )


def _r2(left: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """1 - sum(left) / sum(error), and its standard error over images.

  That of a ratio of sums, by its linearization.

  Args:
    left: float64[K, N], squares of what is left, per image.
    error: float64[N], squares of the error.

  Returns:
    Both float64[K]; 0 where there is no error.
  """
  if not error.sum() > 0:
    return np.zeros(len(left)), np.zeros(len(left))
  ratio = left.sum(1) / error.sum()
  spread = np.square(left - ratio[:, None] * error).sum(1)
  images = len(error)
  spread *= images / (images - 1)
  return 1 - ratio, np.sqrt(spread) / error.sum()


def evaluate(
  tensor: gaussian.ErrorModel,
  channel: gaussian.ErrorModel,
  pairs: Callable[[int], Iterable[tuple[Any, Any]]],
  folds: int = 4,
  outlier_std: float = 4.0,
) -> HeldOut:
  """Tries the candidates of two error models, timestep by timestep.

  Args:
    tensor: fitted to all pairs.
    channel: likewise, channel-wise.
    pairs: as for `gaussian.fit`; called several times per timestep, and yields
      the images in the same order each time.
    folds: at least 2; there are as many as images, at most.
    outlier_std: as for `gaussian.fit`; held-out errors are all counted.

  Raises:
    ValueError: there are fewer than 2 folds or images; or as `gaussian.fit`.
  """
  if folds < 2:
    raise ValueError(f'folds is {folds}: expected >= 2.')

  def one(t: int) -> _Trial:
    at = functools.partial(pairs, t)
    images = sum(len(eps_q) for eps_q, _ in at())
    if images < 2:
      raise ValueError(f'{images} images; 2 can be held out.')
    return _try(at, min(folds, images), outlier_std)

  trials = gaussian.over_timesteps(one, tensor.timesteps.tolist())
  gain, bias = _affine(tensor, channel, channel.mean_d.shape)
  columns = {
    name: np.stack([getattr(trial, name) for trial in trials])
    for name in _Trial._fields
  }
  return HeldOut(
    timesteps=tensor.timesteps,
    gain=np.moveaxis(gain, 0, 1),
    bias=np.moveaxis(bias, 0, 1),
    **columns,
    settings=tensor.settings,
  )


def format_table(held_out: HeldOut) -> str:
  """R2 of the candidates in percent, each +- a standard error, by timestep."""
  widths = [max(13, len(name) + 2) for name in CANDIDATES[1:]]
  names = zip(CANDIDATES[1:], widths, strict=True)
  lines = ['    t' + ''.join(f'{n:>{w}}' for n, w in names) + '  best']
  for row, best in enumerate(held_out.choice()):
    cells = (
      f'{f"{100 * r2:.1f} +- {100 * error:.1f}":>{width}}'
      for r2, error, width in zip(
        held_out.r2[row, 1:],
        held_out.standard_error[row, 1:],
        widths,
        strict=True,
      )
    )
    t = held_out.timesteps[row]
    lines.append(f'{t:5d}{"".join(cells)}  {CANDIDATES[best]}')
  return '\n'.join(lines)
