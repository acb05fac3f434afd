"""How much of the error a correction predicts on images it was not fitted on.

The error d = eps_q - eps is predicted by one of seven candidates: nothing at
all; bias alone or gain and bias of the joint Gaussian (`gaussian`), each per
tensor or per channel; and a linear map of all channels of eps_q and x_t
(`linear`), with a bias per channel or one for each place in the latent. Images
are dealt out to folds; what is fitted on all other folds is tried on the one
left out, so each image is tried once, by fits that never saw it. In sample a
richer candidate always looks better, here it does not.

The best prediction of each step's error need not be the best for all steps in a
row. Least squares shrinks what it cannot tell from noise, the signal as well:
at large t, eps_q - x_t is both, and taking a part of it off in every step adds
up, where errors of single steps average out. So `settle` has whole trajectories
say up to which t the maps that see x_t, the Gaussians, or none, are of use.

Letters: `N` images, `S` timesteps, `K` candidates, `C` channels, `H W` space;
`Z` is 2C, the channels of eps_q and those of x_t.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from d2dpm_jax.denoising import gaussian, linear
from d2dpm_jax.denoising.table import Table

CANDIDATES = (
  'none',
  'tensor bias',
  'tensor gain+bias',
  'channel bias',
  'channel gain+bias',
  'linear',
  'linear+place',
)
_GAUSSIANS = CANDIDATES.index('linear')  # Those before it do not see x_t.

# Called once per pass: yields (eps_q, eps, x_t), each float[N, H, W, C].
Points = Callable[[], Iterable[tuple[Any, Any, Any]]]

# A candidate is preferred to none if its R2 is so many standard errors above 0.
_STANDARD_ERRORS = 2.0


class _Trial(NamedTuple):
  """The candidates of one timestep, and what they leave of its errors."""

  weights: np.ndarray  # float64[K, Z, C]
  bias: np.ndarray  # float64[K, C]
  place: np.ndarray  # float64[H, W, C]
  left_variance: np.ndarray  # float64[K, C]
  r2: np.ndarray  # float64[K]
  standard_error: np.ndarray  # float64[K]


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut(Table):
  """The candidates at each timestep, and how they did on held-out images.

  The prediction of d is (eps_q, x_t) @ weights + bias, fitted on all images;
  that of the last candidate has `place` added.

  Attributes:
    timesteps: int64[S], distinct.
    weights: float64[S, K, Z, C].
    bias: float64[S, K, C].
    place: float64[S, H, W, C], of mean 0 over H and W.
    left_variance: float64[S, K, C], variance of d - prediction, held out.
    r2: float64[S, K], 1 - E[(d - prediction)**2] / E[d**2], held out; that of
      'none' is 0. Negative where a candidate does harm.
    standard_error: float64[S, K], of `r2`, over held-out images; how much fits
      to other images would differ is not in it.
    allowed: int64[S, K], 1 for candidates that may be chosen, see `settle`;
      'none' always may.
    settings: what the statistics depend on, as in `gaussian.ErrorModel`.
  """

  NAME: ClassVar[str] = 'table of held-out errors'
  FORMAT: ClassVar[str] = 'd2dpm_jax.held_out'
  VERSION: ClassVar[int] = 4
  INTEGERS: ClassVar[tuple[str, ...]] = ('timesteps', 'allowed')

  timesteps: np.ndarray
  weights: np.ndarray
  bias: np.ndarray
  place: np.ndarray
  left_variance: np.ndarray
  r2: np.ndarray
  standard_error: np.ndarray
  allowed: np.ndarray
  settings: Any = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self._freeze()
    rows = (len(self.timesteps), len(CANDIDATES))
    if self.bias.shape[:2] != rows or self.bias.ndim != 3:
      raise ValueError(f'bias has shape {self.bias.shape}: expected {rows}, C.')
    channels = self.bias.shape[2]
    self._check_shape('weights', (*rows, 2 * channels, channels))
    self._check_shape('left_variance', self.bias.shape)
    place = self.place.shape
    if len(place) != 4 or (place[0], place[3]) != (rows[0], channels):
      raise ValueError(
        f'place has shape {place}: expected {rows[0]}, H, W, {channels}.'
      )
    for name in ('r2', 'standard_error', 'allowed'):
      self._check_shape(name, rows)
    for name in ('left_variance', 'standard_error'):
      if (getattr(self, name) < 0).any():
        raise ValueError(f'{name} is negative.')

  def choice(self) -> np.ndarray:
    """Which of CANDIDATES to use at each timestep, int64[S].

    The best one that is allowed, if it beats 'none' by more than two standard
    errors.
    """
    best = np.argmax(np.where(self.allowed, self.r2, -np.inf), axis=1)
    r2, error = (
      np.take_along_axis(x, best[:, None], 1)[:, 0]
      for x in (self.r2, self.standard_error)
    )
    return np.where(r2 > _STANDARD_ERRORS * error, best, 0)


def _elements(points: Points) -> Iterable[tuple[np.ndarray, np.ndarray]]:
  """Chunks as ((eps_q, x_t), d), float64[N, H * W, Z] and [N, H * W, C].

  Raises:
    ValueError: shapes differ, or a value is not finite.
  """
  for eps_q, eps, x in points():
    pair = [(eps_q, eps)]
    ((q, d),) = gaussian.elements(functools.partial(iter, pair))
    x = np.asarray(x, np.float64)
    if x.shape != np.shape(eps_q):
      raise ValueError(f'x_t {x.shape} and eps_q {np.shape(eps_q)} differ.')
    if not np.isfinite(x).all():
      raise ValueError('x_t holds values that are not finite.')
    yield np.concatenate([q, x.reshape(q.shape)], -1), d


def _select(
  points: Points, fold: int, folds: int, inside: bool
) -> Iterable[tuple[Any, ...]]:
  """The points of the images of one fold, or those of all other images."""
  first = 0
  for chunk in points():
    index = np.arange(first, first + len(chunk[0]))
    first += len(index)
    chosen = (index % folds == fold) == inside
    if chosen.any():
      yield tuple(np.asarray(part)[chosen] for part in chunk)


def _maps(
  tensor: gaussian.Fit, channel: gaussian.Fit, sums: linear.Sums
) -> list[linear.Map]:
  """The candidates, fitted to the images of all three."""
  channels = len(channel.channel_mean_d)
  biased = functools.partial(linear.diagonal, channels=channels)
  maps = [biased(0.0, 0.0)]
  for stats in (tensor, channel):
    given = gaussian.conditional(stats)
    maps += [biased(0.0, stats.mean_d), biased(given.gain, given.bias)]
  return [*maps, *(linear.fit(sums, by_place) for by_place in (False, True))]


def _held_out_maps(
  points: Points, sums: Sequence[linear.Sums], fold: int, outlier_std: float
) -> list[linear.Map]:
  """The candidates, fitted to all folds but one."""
  rest = functools.partial(_select, points, fold, len(sums), False)
  tensor, channel = (
    gaussian.fit_timestep(rest, channel_wise, outlier_std)
    for channel_wise in (False, True)
  )
  return _maps(tensor, channel, linear.add([*sums[:fold], *sums[fold + 1 :]]))


def _try(
  tensor: gaussian.Fit,
  channel: gaussian.Fit,
  points: Points,
  folds: int,
  outlier_std: float,
) -> _Trial:
  """Fits the candidates without each fold in turn, tries them on it.

  Args:
    tensor: fitted to all points.
    channel: likewise, channel-wise.
    points: of one timestep.
    folds: at most as many as there are images.
    outlier_std: see `evaluate`.
  """
  inside = [
    functools.partial(_select, points, fold, folds, True)
    for fold in range(folds)
  ]
  sums = [
    linear.add(linear.sums(*chunk) for chunk in _elements(chosen))
    for chosen in inside
  ]
  squares, totals = [], []  # Of what is left, [K, n, C] per chunk of n images.
  elements = 0
  for fold, chosen in enumerate(inside):
    maps = _held_out_maps(points, sums, fold, outlier_std)
    for known, d in _elements(chosen):
      left = linear.left(maps, known, d)
      squares.append(np.square(left).sum(2))
      totals.append(left.sum(2))
      elements += d.shape[0] * d.shape[1]
  square, total = np.concatenate(squares, 1), np.concatenate(totals, 1)
  mean_square, mean = square.sum(1) / elements, total.sum(1) / elements
  by_image = square.sum(2)
  r2, error = _r2(by_image, by_image[0])
  maps = _maps(tensor, channel, linear.add(sums))
  bias = np.stack([m.offset.mean(0) for m in maps])
  shape = np.shape(next(iter(points()))[0])[1:]
  return _Trial(
    np.stack([m.weights for m in maps]),
    bias,
    (maps[-1].offset - bias[-1]).reshape(shape),
    np.maximum(mean_square - np.square(mean), 0.0),
    r2,
    error,
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
  points: Callable[[int], Iterable[tuple[Any, Any, Any]]],
  folds: int = 4,
  outlier_std: float = 4.0,
) -> HeldOut:
  """Tries the candidates timestep by timestep.

  Args:
    tensor: fitted to eps_q and eps of all points.
    channel: likewise, channel-wise.
    points: called with a timestep, several times; yields (eps_q, eps, x_t),
      each float[N, H, W, C], the images in the same order each time.
    folds: at least 2; there are as many as images, at most.
    outlier_std: as for `gaussian.fit`; the linear maps leave nothing out, and
      held-out errors are all counted.

  Returns:
    The candidates, fitted to all images, with their held-out errors.

  Raises:
    ValueError: there are fewer than 2 folds or images; or as `gaussian.fit`.
  """
  if folds < 2:
    raise ValueError(f'folds is {folds}: expected >= 2.')

  def one(t: int) -> _Trial:
    at = functools.partial(points, t)
    images = sum(len(chunk[0]) for chunk in at())
    if images < 2:
      raise ValueError(f'{images} images; 2 can be held out.')
    fits = gaussian.fit_of(tensor, t), gaussian.fit_of(channel, t)
    return _try(*fits, at, min(folds, images), outlier_std)

  trials = gaussian.over_timesteps(one, tensor.timesteps.tolist())
  columns = {
    name: np.stack([getattr(trial, name) for trial in trials])
    for name in _Trial._fields
  }
  return HeldOut(
    tensor.timesteps,
    **columns,
    allowed=np.ones(columns['r2'].shape, np.int64),
    settings=tensor.settings,
  )


def restricted(held_out: HeldOut) -> dict[str, HeldOut]:
  """What `settle` tries, by name, from everything to nothing.

  The maps that see x_t are allowed in all steps, in the last three quarters of
  them, half, a quarter, or none; last, no candidate is.
  """
  steps = len(held_out.timesteps)
  order = np.argsort(np.argsort(held_out.timesteps))  # 0 is the smallest t.
  found = {}
  for quarters in (4, 3, 2, 1, 0):
    allowed = np.array(held_out.allowed)
    allowed[order >= steps * quarters // 4, _GAUSSIANS:] = 0
    name = f'x_t in {quarters}/4' if quarters else 'Gaussians'
    found[name] = dataclasses.replace(held_out, allowed=allowed)
  nothing = np.zeros_like(held_out.allowed)
  nothing[:, 0] = 1
  found['none'] = dataclasses.replace(held_out, allowed=nothing)
  return found


def settle(
  held_out: HeldOut, distance: Callable[[HeldOut], float]
) -> tuple[HeldOut, dict[str, float]]:
  """Keeps of the candidates what helps over whole trajectories.

  Args:
    held_out: of `evaluate`.
    distance: how far the sampler, corrected by `auto` with what it is given,
      ends from full precision with the same noise, on images that nothing was
      fitted to. Called once for all that choose the same.

  Returns:
    The one of `restricted` with the smallest distance, the first of equals;
    and the distance of each, by name.
  """
  menus = restricted(held_out)
  known: dict[bytes, float] = {}
  found = {}
  for name, menu in menus.items():
    choice = menu.choice().tobytes()
    if choice not in known:
      known[choice] = float(distance(menu))
    found[name] = known[choice]
  return menus[min(found, key=found.__getitem__)], found


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
