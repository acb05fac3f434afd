"""The error model: how eps_q and its error are distributed at each timestep.

eps is the noise estimate of the full-precision network, eps_q that of the
quantized one, both after guidance, and d = eps_q - eps the quantization error
(written Delta in arXiv:2501.08180). A timestep's elements are samples of one
joint Gaussian of (eps_q, d), or of one per latent channel. All arithmetic is
float64 on the host; batches stream by, twice, and are never held together.

Letters: `N` images of a chunk, `H W` space, `C` channels, `S` timesteps; `G` is
C for a channel-wise model and absent for a tensor-wise one.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, ClassVar, NamedTuple

import numpy as np

from d2dpm_jax.denoising.table import Table

RHO_MAX = 0.9999  # Bound of |rho|, as in TaylorJocelyn/D2-DPM.

# Called once per pass: yields (eps_q, eps), each float[N, H, W, C]; what else
# there may be, is for others.
Pairs = Callable[[], Iterable[tuple[Any, ...]]]


class Moments(NamedTuple):
  """Mergeable sums over elements, one entry per channel or per tensor."""

  count: Any  # int64
  mean_q: np.ndarray  # float64, mean of eps_q.
  mean_d: np.ndarray  # float64, mean of d.
  sum_qq: np.ndarray  # float64, sum of (eps_q - mean_q)**2.
  sum_dd: np.ndarray  # float64, sum of (d - mean_d)**2.
  sum_qd: np.ndarray  # float64, sum of (eps_q - mean_q) * (d - mean_d).


class Conditional(NamedTuple):
  """d given eps_q: N(gain * eps_q + bias, variance); float64[S] or [S, C]."""

  gain: np.ndarray
  bias: np.ndarray
  variance: np.ndarray


class Fit(NamedTuple):
  """Statistics of one timestep; see `ErrorModel` for the fields."""

  mean_q: np.ndarray
  mean_d: np.ndarray
  var_q: np.ndarray
  var_d: np.ndarray
  cov: np.ndarray
  count: Any
  outlier_share: np.ndarray
  channel_mean_q: np.ndarray
  channel_mean_d: np.ndarray


def _moments(q: np.ndarray, d: np.ndarray, keep: np.ndarray) -> Moments:
  """Moments per channel of float64[n, C] arrays where bool[n, C] `keep` is."""
  count = keep.sum(0)
  n = np.maximum(count, 1)
  mean_q = np.where(keep, q, 0.0).sum(0) / n
  mean_d = np.where(keep, d, 0.0).sum(0) / n
  dev_q = np.where(keep, q - mean_q, 0.0)
  dev_d = np.where(keep, d - mean_d, 0.0)
  sums = (
    (dev_q * dev_q).sum(0),
    (dev_d * dev_d).sum(0),
    (dev_q * dev_d).sum(0),
  )
  return Moments(count, mean_q, mean_d, *sums)


def merge(a: Moments, b: Moments) -> Moments:
  """Moments of two disjoint sets of elements together.

  Source: Chan, Golub and LeVeque, 'Updating Formulae and a Pairwise Algorithm
  for Computing Sample Variances' (1979), Eq. 2.1.
  """
  count = a.count + b.count
  n = np.maximum(count, 1)
  step_q, step_d = b.mean_q - a.mean_q, b.mean_d - a.mean_d
  weight = a.count * (b.count / n)
  return Moments(
    count,
    a.mean_q + step_q * (b.count / n),
    a.mean_d + step_d * (b.count / n),
    a.sum_qq + b.sum_qq + weight * step_q * step_q,
    a.sum_dd + b.sum_dd + weight * step_d * step_d,
    a.sum_qd + b.sum_qd + weight * step_q * step_d,
  )


def _pool(m: Moments) -> Moments:
  """Moments per channel [C] to those of the whole tensor []."""
  pooled = Moments(*(x[0] for x in m))
  for c in range(1, len(m.count)):
    pooled = merge(pooled, Moments(*(x[c] for x in m)))
  return Moments(*map(np.asarray, pooled))


def elements(pairs: Pairs) -> Iterable[tuple[np.ndarray, np.ndarray]]:
  """Chunks as (eps_q, d), float64[N, H * W, C] each, checked.

  Raises:
    ValueError: shapes differ, or a value is not finite.
  """
  channels = None
  for eps_q, eps, *_ in pairs():
    q, e = np.asarray(eps_q, np.float64), np.asarray(eps, np.float64)
    if q.shape != e.shape or q.ndim != 4:
      raise ValueError(
        f'eps_q {q.shape} and eps {e.shape}: expected one shape [N, H, W, C].'
      )
    if channels not in (None, q.shape[-1]):
      raise ValueError(f'Chunks of {channels} and of {q.shape[-1]} channels.')
    channels = q.shape[-1]
    if not (np.isfinite(q).all() and np.isfinite(e).all()):
      raise ValueError('eps_q or eps holds values that are not finite.')
    shape = (len(q), q.shape[1] * q.shape[2], channels)
    q, d = (_by_channel(x.reshape(shape)) for x in (q, q - e))
    yield q, d


def _by_channel(x: np.ndarray) -> np.ndarray:
  """The same array, each channel in one piece: sums over it are fast."""
  return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1)


def _accumulate(
  pairs: Pairs, is_kept: Callable[[np.ndarray], np.ndarray]
) -> tuple[Moments, int]:
  """Moments per channel of what is kept, and how much there was in all."""
  total, seen = None, 0
  for q, d in elements(pairs):
    q, d = q.reshape(-1, q.shape[-1]), d.reshape(-1, d.shape[-1])
    part = _moments(q, d, is_kept(d))
    total = part if total is None else merge(total, part)
    seen += d.size
  if total is None:
    raise ValueError('No pairs of (eps_q, eps) were given.')
  return total, seen


def fit_timestep(
  pairs: Pairs, channel_wise: bool = False, outlier_std: float = 4.0
) -> Fit:
  """Fits the joint Gaussian of (eps_q, d) to the pairs of one timestep.

  The first pass finds mean and standard deviation of d; the second leaves out
  elements with |d - mean| > outlier_std * std. Both are of the whole tensor, or
  of the channel if `channel_wise`. Variances have ddof 1, the standard
  deviation of the threshold ddof 0: same numbers as TaylorJocelyn/D2-DPM,
  quant_scripts/gaussian_modeling.py, but for its float32 means.

  Args:
    pairs: called twice; yields chunks (eps_q, eps) of float[N, H, W, C].
    channel_wise: one Gaussian per channel.
    outlier_std: threshold; float('inf') keeps everything.

  Returns:
    Fit of float64 [] or [C].

  Raises:
    ValueError: there are no pairs, shapes differ, a value is not finite,
      `outlier_std` is not positive, the passes differ in length, or a channel
      has fewer than 2 elements left.
  """
  if not outlier_std > 0:
    raise ValueError(f'outlier_std is {outlier_std}: expected > 0.')
  every, seen = _accumulate(pairs, lambda d: np.ones(d.shape, bool))
  group = every if channel_wise else _pool(every)
  limit = np.inf
  if np.isfinite(outlier_std):
    limit = outlier_std * np.sqrt(group.sum_dd / group.count)
  kept, again = _accumulate(pairs, lambda d: np.abs(d - group.mean_d) <= limit)
  if again != seen:
    raise ValueError(f'The pairs had {seen} elements, then {again}.')
  if kept.count.min() < 2:
    raise ValueError(
      f'Elements left per channel: {kept.count.tolist()}; at least 2 each are '
      'needed.'
    )
  m = kept if channel_wise else _pool(kept)
  return Fit(
    mean_q=m.mean_q,
    mean_d=m.mean_d,
    var_q=m.sum_qq / (m.count - 1),
    var_d=m.sum_dd / (m.count - 1),
    cov=m.sum_qd / (m.count - 1),
    count=m.count,
    outlier_share=1.0 - m.count / group.count,
    channel_mean_q=kept.mean_q,
    channel_mean_d=kept.mean_d,
  )


def _rho(stats: 'Fit | ErrorModel') -> np.ndarray:
  """Correlation of eps_q and d, 0 where one of them is constant."""
  scale = np.sqrt(stats.var_q * stats.var_d)
  return np.divide(
    stats.cov, scale, out=np.zeros_like(stats.cov), where=scale > 0
  )


def conditional(stats: 'Fit | ErrorModel') -> Conditional:
  """Mean and variance of d given eps_q, |rho| at most RHO_MAX.

  Source: arXiv:2501.08180, the conditional of a bivariate Gaussian.
  """
  rho = np.clip(_rho(stats), -RHO_MAX, RHO_MAX)
  ratio = np.divide(
    stats.var_d, stats.var_q, out=np.zeros_like(rho), where=stats.var_q > 0
  )
  gain = rho * np.sqrt(ratio)
  bias = stats.mean_d - gain * stats.mean_q
  return Conditional(gain, bias, stats.var_d * (1 - rho**2))


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorModel(Table):
  """Statistics of all timesteps.

  Attributes:
    timesteps: int64[S], distinct, in any order.
    mean_q: float64[S] tensor-wise or [S, C] channel-wise, mean of eps_q.
    mean_d: same shape, mean of the error d.
    var_q: same shape, variance of eps_q.
    var_d: same shape, variance of d.
    cov: same shape, covariance of eps_q and d.
    count: int64, same shape, elements that these were computed of.
    outlier_share: float64, same shape, share of elements left out before.
    channel_mean_q: float64[S, C], mean of eps_q per channel in either case.
    channel_mean_d: float64[S, C], likewise of d.
    settings: what the model depends on (bits, step count, ...), JSON values.
  """

  NAME: ClassVar[str] = 'error model'
  FORMAT: ClassVar[str] = 'd2dpm_jax.error_model'
  VERSION: ClassVar[int] = 1
  INTEGERS: ClassVar[tuple[str, ...]] = ('timesteps', 'count')

  timesteps: np.ndarray
  mean_q: np.ndarray
  mean_d: np.ndarray
  var_q: np.ndarray
  var_d: np.ndarray
  cov: np.ndarray
  count: np.ndarray
  outlier_share: np.ndarray
  channel_mean_q: np.ndarray
  channel_mean_d: np.ndarray
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self._freeze()
    steps = len(self.timesteps)
    per_channel = self.channel_mean_q.shape
    if len(per_channel) != 2 or per_channel[0] != steps:
      raise ValueError(f'channel_mean_q {per_channel}: expected [{steps}, C].')
    group = self.mean_q.shape
    if group not in ((steps,), per_channel):
      raise ValueError(f'mean_q {group}: expected {(steps,)} or {per_channel}.')
    for name in Fit._fields:
      self._check_shape(
        name, per_channel if name.startswith('channel') else group
      )
    for name in ('var_q', 'var_d'):
      if (getattr(self, name) < 0).any():
        raise ValueError(f'{name} is negative.')
    # Room for the rounding of statistics that were once kept in float32.
    limit = np.sqrt(self.var_q * self.var_d) * (1 + 1e-5)
    bad = np.any((np.abs(self.cov) > limit).reshape(steps, -1), axis=1)
    if bad.any():
      raise ValueError(
        '|cov| exceeds the product of standard deviations at timesteps '
        f'{self.timesteps[bad].tolist()}.'
      )

  @property
  def channel_wise(self) -> bool:
    """Whether there is one Gaussian per channel."""
    return self.mean_q.ndim == 2

  @property
  def rho(self) -> np.ndarray:
    """Correlation of eps_q and d, 0 where one of them is constant."""
    return _rho(self)

  @property
  def mean_eps(self) -> np.ndarray:
    """Mean of eps = eps_q - d."""
    return self.mean_q - self.mean_d

  @property
  def var_eps(self) -> np.ndarray:
    """Variance of eps."""
    return np.maximum(self.var_q - 2 * self.cov + self.var_d, 0.0)

  @property
  def cov_eps(self) -> np.ndarray:
    """Covariance of eps and d."""
    return self.cov - self.var_d

  def conditional(self) -> Conditional:
    """See the function of this name."""
    return conditional(self)


def fit_of(model: ErrorModel, timestep: int) -> Fit:
  """The statistics of one timestep again."""
  (row,) = model.rows_of([timestep])
  return Fit(*(getattr(model, name)[row] for name in Fit._fields))


def stack(
  timesteps: Sequence[int],
  fits: Sequence[Fit],
  settings: Mapping[str, Any] | None = None,
) -> ErrorModel:
  """Makes an error model of one `Fit` per timestep.

  Args:
    timesteps: S of them, distinct.
    fits: S of them, in the same order.
    settings: what they depend on, see `ErrorModel`.

  Returns:
    The statistics stacked to [S] or [S, C].

  Raises:
    ValueError: their numbers differ, or some fits are channel-wise and some
      are not.
  """
  if len(timesteps) != len(fits):
    raise ValueError(f'{len(timesteps)} timesteps, but {len(fits)} fits.')
  shapes = {np.shape(fit.mean_q) for fit in fits}
  if len(shapes) > 1:
    raise ValueError(f'Fits have different shapes: {sorted(shapes)}.')
  if not fits:
    raise ValueError('No timesteps were given.')
  columns = {
    name: np.stack([getattr(fit, name) for fit in fits]) for name in Fit._fields
  }
  return ErrorModel(np.asarray(timesteps), **columns, settings=settings or {})


def over_timesteps(
  fn: Callable[[int], Any], timesteps: Sequence[int]
) -> list[Any]:
  """`fn` of each timestep, in threads: NumPy's arithmetic runs beside itself.

  Raises:
    ValueError: `fn` did; the message names the timestep.
  """

  def named(t: int) -> Any:
    try:
      return fn(t)
    except ValueError as e:
      raise ValueError(f'Timestep {t}: {e}') from e

  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(named, timesteps))


def fit(
  timesteps: Sequence[int],
  pairs: Callable[[int], Iterable[tuple[Any, ...]]],
  channel_wise: bool = False,
  outlier_std: float = 4.0,
  settings: Mapping[str, Any] | None = None,
) -> ErrorModel:
  """Fits all timesteps, several at a time.

  Args:
    timesteps: S of them.
    pairs: called twice per timestep, with it, from several threads; yields
      (eps_q, eps) as in `fit_timestep`.
    channel_wise: see `fit_timestep`.
    outlier_std: see `fit_timestep`.
    settings: what the result depends on, see `ErrorModel`.

  Returns:
    Statistics of all timesteps.

  Raises:
    ValueError: names the timestep whose pairs cannot be used.
  """

  def one(t: int) -> Fit:
    return fit_timestep(functools.partial(pairs, t), channel_wise, outlier_std)

  return stack(timesteps, over_timesteps(one, timesteps), settings)
