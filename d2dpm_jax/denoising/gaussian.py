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
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FORMAT = 'd2dpm_jax.error_model'
VERSION = 1
RHO_MAX = 0.9999  # Bound of |rho|, as in TaylorJocelyn/D2-DPM.

# Called once per pass: yields (eps_q, eps), each float[N, H, W, C].
Pairs = Callable[[], Iterable[tuple[Any, Any]]]


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


def _elements(pairs: Pairs) -> Iterable[tuple[np.ndarray, np.ndarray]]:
  """Chunks as (eps_q, d), float64[n, C] each, checked."""
  channels = None
  for eps_q, eps in pairs():
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
    yield q.reshape(-1, channels), (q - e).reshape(-1, channels)


def _accumulate(
  pairs: Pairs, is_kept: Callable[[np.ndarray], np.ndarray]
) -> tuple[Moments, int]:
  """Moments per channel of what is kept, and how much there was in all."""
  total, seen = None, 0
  for q, d in _elements(pairs):
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


_ARRAYS = ('timesteps', *Fit._fields)  # Of an ErrorModel and its file.


def _canonical(settings: Mapping[str, Any]) -> str:
  return json.dumps(
    settings, sort_keys=True, separators=(',', ':'), allow_nan=False
  )


def settings_hash(settings: Mapping[str, Any]) -> str:
  """SHA-256 of `settings` as canonical JSON, in hexadecimal."""
  return hashlib.sha256(_canonical(settings).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorModel:
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
    integers = ('timesteps', 'count')
    for name in _ARRAYS:
      dtype = np.int64 if name in integers else np.float64
      array = np.array(getattr(self, name), dtype)
      if not np.isfinite(array).all():
        raise ValueError(f'{name} holds values that are not finite.')
      array.setflags(write=False)
      object.__setattr__(self, name, array)
    # A round trip, so that tuples equal the lists that a file gives back.
    settings = json.loads(_canonical(dict(self.settings)))
    object.__setattr__(self, 'settings', settings)
    if self.timesteps.ndim != 1 or not self.timesteps.size:
      raise ValueError(f'timesteps has shape {self.timesteps.shape}.')
    if len(np.unique(self.timesteps)) < len(self.timesteps):
      raise ValueError(f'Timesteps repeat: {self.timesteps.tolist()}.')
    steps = len(self.timesteps)
    per_channel = self.channel_mean_q.shape
    if len(per_channel) != 2 or per_channel[0] != steps:
      raise ValueError(f'channel_mean_q {per_channel}: expected [{steps}, C].')
    group = self.mean_q.shape
    if group not in ((steps,), per_channel):
      raise ValueError(f'mean_q {group}: expected {(steps,)} or {per_channel}.')
    for name in _ARRAYS[1:]:
      want = per_channel if name.startswith('channel') else group
      if getattr(self, name).shape != want:
        raise ValueError(
          f'{name} has shape {getattr(self, name).shape}: expected {want}.'
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
    return self.mean_q.ndim == 2

  @property
  def rho(self) -> np.ndarray:
    """Correlation of eps_q and d, 0 where one of them is constant."""
    scale = np.sqrt(self.var_q * self.var_d)
    return np.divide(
      self.cov, scale, out=np.zeros_like(self.cov), where=scale > 0
    )

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
    """Mean and variance of d given eps_q, |rho| at most RHO_MAX.

    Source: arXiv:2501.08180, the conditional of a bivariate Gaussian.
    """
    rho = np.clip(self.rho, -RHO_MAX, RHO_MAX)
    ratio = np.divide(
      self.var_d, self.var_q, out=np.zeros_like(rho), where=self.var_q > 0
    )
    gain = rho * np.sqrt(ratio)
    bias = self.mean_d - gain * self.mean_q
    return Conditional(gain, bias, self.var_d * (1 - rho**2))

  def rows_of(self, timesteps: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where the statistics of `timesteps` are, int64 of the same length.

    Raises:
      ValueError: some have none; the message names them.
    """
    where = {int(t): i for i, t in enumerate(self.timesteps)}
    wanted = [int(t) for t in np.asarray(timesteps)]
    missing = sorted(set(wanted) - set(where))
    if missing:
      raise ValueError(
        f'The error model has no statistics of timesteps {missing}; it has '
        f'those of {sorted(where)}.'
      )
    return np.array([where[t] for t in wanted], np.int64)

  def check(self, expected: Mapping[str, Any]) -> None:
    """Refuses to be used for something else than it was made for.

    Args:
      expected: settings that must be there and equal; others are ignored.

    Raises:
      ValueError: names each setting that differs, with both values.
    """
    differences = []
    for key, value in json.loads(_canonical(dict(expected))).items():
      if key not in self.settings:
        differences.append(f'{key}: nothing, not {value!r}')
      elif self.settings[key] != value:
        differences.append(f'{key}: {self.settings[key]!r}, not {value!r}')
    if differences:
      raise ValueError(
        f'The error model was made for {"; ".join(differences)}.'
      )

  def save(self, path: str | os.PathLike) -> None:
    """Writes one .npz: aside first, then renamed into place."""
    path = os.path.abspath(path)
    header = dict(
      format=FORMAT,
      version=VERSION,
      settings=self.settings,
      settings_hash=settings_hash(self.settings),
    )
    arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f'{path}.{os.getpid()}.part'
    try:
      with open(aside, 'wb') as f:
        np.savez(f, header=np.array(_canonical(header)), **arrays)
        f.flush()
        os.fsync(f.fileno())
      os.replace(aside, path)
    finally:
      if os.path.exists(aside):
        os.unlink(aside)

  @classmethod
  def load(
    cls, path: str | os.PathLike, expected: Mapping[str, Any] | None = None
  ) -> 'ErrorModel':
    """Reads what `save` wrote; executes nothing.

    Args:
      path: of the .npz.
      expected: settings to `check`.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it is damaged, of another format or version, or made for
        other settings than `expected`.
    """
    path = os.fspath(path)
    try:
      with open(path, 'rb') as f, zipfile.ZipFile(f):  # Only an .npz is a zip.
        f.seek(0)
        with np.load(f, allow_pickle=False) as arrays:
          content = {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
      raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
      raise ValueError(f'{path} is not a readable error model: {e}') from e
    try:
      header = json.loads(str(content.pop('header')))
      kind, version = header['format'], header['version']
    except (KeyError, TypeError, ValueError) as e:
      raise ValueError(f'{path} has no header of an error model.') from e
    if (kind, version) != (FORMAT, VERSION):
      raise ValueError(
        f'{path} is {kind!r} version {version!r}: expected {FORMAT!r} version '
        f'{VERSION}. Fit the error model again.'
      )
    if sorted(content) != sorted(_ARRAYS):
      raise ValueError(
        f'{path} holds {sorted(content)}: expected {sorted(_ARRAYS)}.'
      )
    settings = header.get('settings')
    if not isinstance(settings, dict) or (
      settings_hash(settings) != header.get('settings_hash')
    ):
      raise ValueError(f'{path}: settings do not match their hash.')
    try:
      model = cls(**content, settings=settings)
      model.check(expected or {})
    except ValueError as e:
      raise ValueError(f'{path}: {e}') from e
    return model


def stack(
  timesteps: Sequence[int],
  fits: Sequence[Fit],
  settings: Mapping[str, Any] | None = None,
) -> ErrorModel:
  """Makes an error model of one `Fit` per timestep.

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


def fit(
  timesteps: Sequence[int],
  pairs: Callable[[int], Iterable[tuple[Any, Any]]],
  channel_wise: bool = False,
  outlier_std: float = 4.0,
  settings: Mapping[str, Any] | None = None,
) -> ErrorModel:
  """Fits all timesteps, one after another.

  Args:
    timesteps: S of them.
    pairs: called twice per timestep, with it; yields (eps_q, eps) as in
      `fit_timestep`.
    channel_wise: see `fit_timestep`.
    outlier_std: see `fit_timestep`.
    settings: what the result depends on, see `ErrorModel`.

  Raises:
    ValueError: names the timestep whose pairs cannot be used.
  """
  fits = []
  for t in timesteps:
    try:
      at = functools.partial(pairs, t)
      fits.append(fit_timestep(at, channel_wise, outlier_std))
    except ValueError as e:
      raise ValueError(f'Timestep {t}: {e}') from e
  return stack(timesteps, fits, settings)


def held_out_r2(model: ErrorModel, timestep: int, pairs: Pairs) -> np.ndarray:
  """Share of the error's variance that the model predicts on other data.

  1 - E[(d - E[d | eps_q])**2] / Var[d] with the variance about the mean of the
  given data; no outliers are left out. Negative where the model does harm. In
  sample it is rho**2.

  Args:
    model: fitted on other images.
    timestep: one of its timesteps.
    pairs: called once; see `fit_timestep`.

  Returns:
    float64 [], or [C] of a channel-wise model; 0 where d is constant.

  Raises:
    ValueError: the timestep has no statistics, or as `fit_timestep`.
  """
  (row,) = model.rows_of([timestep])
  gain, bias, _ = (x[row] for x in model.conditional())
  total, squares = None, 0.0
  for q, d in _elements(pairs):
    if q.shape[-1] != model.channel_mean_q.shape[-1]:
      raise ValueError(
        f'{q.shape[-1]} channels: the error model has '
        f'{model.channel_mean_q.shape[-1]}.'
      )
    part = _moments(q, d, np.ones(d.shape, bool))
    total = part if total is None else merge(total, part)
    squares = squares + np.square(d - (gain * q + bias)).sum(0)
  if total is None:
    raise ValueError('No pairs of (eps_q, eps) were given.')
  if not model.channel_wise:
    total, squares = _pool(total), np.sum(squares)
  share = np.divide(
    squares,
    total.sum_dd,
    out=np.ones_like(total.sum_dd),
    where=total.sum_dd > 0,
  )
  return 1.0 - share
