"""Figures of error statistics: what was fitted, and what it is good for.

Delta = eps_q - eps, the error of the quantized network. Its unit is that of
eps: the noise, of standard deviation 1. Steps go from left to right in the
order of sampling, that is, by falling timestep.

Letters: `S` timesteps, `K` candidates of `selection`, `C` channels.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import axis as mpl_axis
from matplotlib import colors, figure, ticker

from d2dpm_jax.denoising import gaussian, selection

# Of M. Okabe and K. Ito's palette: told apart by all kinds of eyes.
_BLACK, _GREY, _BLUE, _SKY = '#000000', '#6b7780', '#0072b2', '#56b4e9'
_ORANGE, _VERMILLION, _GREEN, _PINK = '#e69f00', '#d55e00', '#009e73', '#cc79a7'
_CHANNELS = (_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _VERMILLION)
_STYLES = {
  'none': (_GREY, '-'),
  'tensor bias': (_SKY, '--'),
  'tensor gain+bias': (_BLUE, '-'),
  'channel bias': (_ORANGE, '--'),
  'channel gain+bias': (_VERMILLION, '-'),
  'linear': (_PINK, '--'),
  'linear+place': (_GREEN, '-'),
}
_UNIT = '[std of noise]'
_BANDS = 2.0  # Standard errors.
_ELLIPSES = (1.0, 2.0, 3.0)  # Standard deviations.
_MAX_TICKS = 8
_HARM = 25.0  # Percent: so much of it is shown, or twice what is gained.
_MARKED = 50  # Up to so many steps get markers.
_BINS = 100
# What is seen of eps_q, in standard deviations, and of Delta: in multiples of
# its limits, or in standard deviations where it has none.
_SEEN_Q, _SEEN_LIMITS, _SEEN_D = 4.5, 1.3, 6.0


class Joint(NamedTuple):
  """Histogram of (eps_q, Delta) at one timestep."""

  timestep: int
  counts: np.ndarray  # int64[X, Y]
  edges_q: np.ndarray  # float64[X + 1]
  edges_d: np.ndarray  # float64[Y + 1]
  limits: np.ndarray  # float64[2], see `outlier_limits`.
  seen: int  # Elements in all,
  beyond: int  # of these, beyond the limits,
  outside: int  # and outside of the histogram.


def error_power(held_out: selection.HeldOut) -> np.ndarray:
  """Mean square of Delta of all elements, float64[S, C].

  Its variance is that which 'none' left. Of its mean that without outliers is
  known, and they hardly move it.
  """
  none, bias = (selection.CANDIDATES.index(n) for n in ('none', 'channel bias'))
  return held_out.left_variance[:, none] + np.square(held_out.bias[:, bias])


def left_rms(held_out: selection.HeldOut) -> np.ndarray:
  """Root mean square of Delta - prediction, held out; float64[S, K]."""
  power = error_power(held_out).mean(1, keepdims=True)
  return np.sqrt(np.maximum(power * (1 - held_out.r2), 0.0))


def outlier_limits(
  held_out: selection.HeldOut, outlier_std: float
) -> np.ndarray:
  """Delta beyond these was left out of the tensor-wise fit; float64[S, 2]."""
  power = error_power(held_out).mean(1)
  mean = held_out.bias[:, selection.CANDIDATES.index('channel bias')].mean(1)
  std = np.sqrt(np.maximum(power - np.square(mean), 0.0))
  return np.stack([mean - outlier_std * std, mean + outlier_std * std], 1)


def shown_timesteps(timesteps: Sequence[int] | np.ndarray) -> list[int]:
  """The first, those after each quarter of sampling, and the last."""
  ordered = _sampling_order(timesteps)
  where = np.linspace(0, len(ordered) - 1, 5).round().astype(int)
  return ordered[np.unique(where)].tolist()


def ellipse(
  mean: Sequence[float], cov: np.ndarray, std: float, points: int = 200
) -> np.ndarray:
  """Where a Gaussian of two variables is `std` standard deviations off.

  Args:
    mean: float[2].
    cov: float[2, 2].
    std: Mahalanobis distance.
    points: P.

  Returns:
    float64[P, 2], closed.
  """
  angle = np.linspace(0, 2 * np.pi, points)
  std_x = np.sqrt(cov[0, 0])
  slope = cov[0, 1] / std_x if std_x > 0 else 0.0
  rest = np.sqrt(max(cov[1, 1] - slope**2, 0.0))
  x, y = std * np.cos(angle), std * np.sin(angle)
  return np.stack([mean[0] + std_x * x, mean[1] + slope * x + rest * y], 1)


def count_joint(
  timestep: int,
  pairs: gaussian.Pairs,
  tensor: gaussian.ErrorModel,
  held_out: selection.HeldOut,
  outlier_std: float,
  most: int = 200_000,
) -> Joint:
  """Counts (eps_q, Delta) of whole images, evenly taken from all of them.

  Args:
    timestep: of the pairs.
    pairs: as for `gaussian.fit_timestep`; called twice.
    tensor: fitted on them, tensor-wise.
    held_out: likewise.
    outlier_std: as for the fit.
    most: elements that are looked at, unless one image has more.
  """
  shapes = [np.shape(eps_q) for eps_q, *_ in pairs()]
  images = sum(shape[0] for shape in shapes)
  every = -(-images // max(1, most // math.prod(shapes[0][1:])))
  row = tensor.rows_of([timestep])[0]
  limits = outlier_limits(held_out, outlier_std)
  limits = limits[held_out.rows_of([timestep])[0]]
  std_q, std_d = np.sqrt(tensor.var_q[row]), np.sqrt(tensor.var_d[row])
  reach = _SEEN_D * std_d
  if np.isfinite(limits).all():
    reach = _SEEN_LIMITS * (limits[1] - limits[0]) / 2
  edges_q = _edges(tensor.mean_q[row], _SEEN_Q * std_q)
  edges_d = _edges(tensor.mean_d[row], reach)
  counts = np.zeros((_BINS, _BINS), np.int64)
  seen = beyond = 0
  for q, d in gaussian.elements(functools.partial(_thinned, pairs, every)):
    q, d = q.ravel(), d.ravel()
    found, *_ = np.histogram2d(q, d, (edges_q, edges_d))
    counts += found.astype(np.int64)
    seen += d.size
    beyond += int(((d < limits[0]) | (d > limits[1])).sum())
  return Joint(
    timestep,
    counts,
    edges_q,
    edges_d,
    limits,
    seen,
    beyond,
    outside=seen - int(counts.sum()),
  )


def errors(
  error_models: Mapping[str, gaussian.ErrorModel], held_out: selection.HeldOut
) -> figure.Figure:
  """Moments of the error at each step, and how much of it is predicted.

  Moments, and the power of eps, are without the fit's outliers; the power of
  Delta in the signal-to-error ratio is with them.

  Args:
    error_models: 'tensor' and 'channel' -> statistics of the same timesteps.
    held_out: of these.
  """
  timesteps = _sampling_order(held_out.timesteps)
  held = held_out.rows_of(timesteps)
  power = error_power(held_out)[held]
  drawn = figure.Figure(figsize=(12.5, 10), layout='constrained')
  grid = drawn.subplots(3, 2, sharex=True)
  titles = (
    'Mean of the error Δ',
    'Standard deviation of the error Δ',
    'Correlation ρ of $ε_q$ and Δ',
    'Signal (ε) to error (Δ)',
  )
  labels = (f'mean {_UNIT}', f'std {_UNIT}', 'ρ', 'power ratio [dB]')
  for kind in ('channel', 'tensor'):  # The tensor's lines on top.
    model = error_models[kind]
    rows = model.rows_of(timesteps)
    if kind == 'channel' and power.shape[1] == 1:
      continue  # The same again.
    noise = power if kind == 'channel' else power.mean(1)
    signal = (model.var_eps + np.square(model.mean_eps))[rows]
    shown = (
      model.mean_d[rows],
      np.sqrt(model.var_d[rows]),
      model.rho[rows],
      _decibel(signal, noise),
    )
    for ax, values in zip(grid.flat, shown, strict=False):
      _lines(ax, values, kind)
  for ax, title, label in zip(grid.flat, titles, labels, strict=False):
    ax.set_title(title, fontsize=11)
    ax.set_ylabel(label)
  for ax in (grid[0, 0], grid[1, 0]):
    ax.axhline(0, color=_GREY, linewidth=0.8, zorder=0)
  grid[0, 1].set_ylim(bottom=0)

  ax = grid[2, 0]
  shown_candidates = _shown_candidates(held_out)
  r2, band = held_out.r2[held], _BANDS * held_out.standard_error[held]
  _candidates(
    ax, 100 * r2, 100 * (r2 - band), 100 * (r2 + band), shown_candidates
  )
  ax.set_title(
    'Prediction of Δ on held-out images (±2 standard errors)',
    fontsize=11,
  )
  ax.set_ylabel("predicted share of Δ's power, $R^2$ [%]")
  _choices(grid[2, 1], held_out, held)
  grid[2, 1].set_title('Candidate that auto chose', fontsize=11)
  _legend(grid[0, 0])
  _legend(ax)
  _step_axes(grid, timesteps)
  return drawn


def joint(
  counted: Sequence[Joint], tensor: gaussian.ErrorModel, outlier_std: float
) -> figure.Figure:
  """Histograms of (eps_q, Delta) with the Gaussian that was fitted.

  Args:
    counted: of `count_joint`, in the order of sampling.
    tensor: their statistics, tensor-wise.
    outlier_std: as for the fit.
  """
  columns = min(3, len(counted) + 1)
  lines = -(-(len(counted) + 1) // columns)
  drawn = figure.Figure(
    figsize=(4.6 * columns, 4.1 * lines), layout='constrained'
  )
  *grid, key = drawn.subplots(lines, columns, squeeze=False).flat[
    : len(counted) + 1
  ]
  for ax in drawn.axes[len(counted) + 1 :]:
    ax.remove()
  highest = max(2, *(int(one.counts.max()) for one in counted))
  norm = colors.LogNorm(1, highest)
  shades = colors.ListedColormap(  # A single element is to be seen, too.
    matplotlib.colormaps['Blues'](np.linspace(0.25, 1, 256))
  )
  order = _sampling_order(tensor.timesteps).tolist()
  image = None
  for ax, one in zip(grid, counted, strict=True):
    image = ax.pcolormesh(
      one.edges_q,
      one.edges_d,
      np.ma.masked_equal(one.counts.T, 0),
      norm=norm,
      cmap=shades,
      rasterized=True,
    )
    _fitted(ax, one, tensor, outlier_std)
    told = f'{one.beyond:,} of {one.seen:,} beyond ±{outlier_std:g} σ'
    if one.outside:
      told += f'; {one.outside:,} not shown'
    ax.set_title(
      f't = {one.timestep}, step {order.index(one.timestep) + 1} of '
      f'{len(order)}\n{told}',
      fontsize=10,
    )
    ax.set_xlabel(f'$ε_q$ {_UNIT}')
    ax.set_ylabel(f'Δ {_UNIT}')
  key.axis('off')
  key.legend(
    *grid[0].get_legend_handles_labels(), loc='upper center', frameon=False
  )
  if image is not None:
    bar = drawn.colorbar(
      image,
      cax=key.inset_axes((0.1, 0.45, 0.8, 0.06)),
      orientation='horizontal',
    )
    _plain_log_ticks(bar.ax.xaxis, (1, 2, 5))
    bar.set_label('elements per bin (log scale)')
  return drawn


def left(held_out: selection.HeldOut) -> figure.Figure:
  """Error per step before and after each candidate, on held-out images."""
  timesteps = _sampling_order(held_out.timesteps)
  rows = held_out.rows_of(timesteps)
  drawn = figure.Figure(figsize=(12.5, 4.6), layout='constrained')
  grid = drawn.subplots(1, 2, sharex=True, squeeze=False)
  before_after, off = grid[0]
  rms = left_rms(held_out)[rows]
  rms = np.where(rms > 0, rms, np.nan)  # A gap: there is no logarithm.
  r2, error = held_out.r2[rows], held_out.standard_error[rows]
  for k in _shown_candidates(held_out):
    name = selection.CANDIDATES[k]
    colour, style = _STYLES[name]
    label = f'after {name}' if k else 'uncorrected'
    before_after.plot(
      rms[:, k], style, color=colour, label=label, **_marker(len(rms))
    )
  chosen = _chosen(held_out)[rows]
  best = np.take_along_axis(rms, chosen[:, None], 1)[:, 0]
  before_after.plot(
    best,
    ':',
    color=_BLACK,
    linewidth=1,
    marker='o' if len(best) <= _MARKED else '',
    markersize=7,
    markerfacecolor='none',
    markeredgewidth=0.8,
    label='what auto chose',
  )
  before_after.set_yscale('log')
  _plain_log_ticks(before_after.yaxis, (1, 2, 3, 5, 7))
  before_after.set_ylabel(f'RMS of what is left of Δ {_UNIT}')
  before_after.set_title('Error of a step, on held-out images', fontsize=11)

  def taken(share):
    return 100 * (1 - np.sqrt(np.maximum(1 - share, 0.0)))

  band = _BANDS * error
  bounds = taken(r2 - band), taken(r2 + band)
  _candidates(off, taken(r2), *bounds, _shown_candidates(held_out))
  off.set_ylabel("taken off Δ's RMS [%]")
  off.set_title('What a correction takes off (±2 standard errors)', fontsize=11)
  _legend(before_after)
  _legend(off)
  _step_axes(grid, timesteps)
  return drawn


# ---- Pieces of the figures.


def _sampling_order(timesteps: Sequence[int] | np.ndarray) -> np.ndarray:
  return np.sort(np.asarray(timesteps))[::-1]


def _edges(middle: float, reach: float) -> np.ndarray:
  """Of the bins; something to see even where nothing varies."""
  reach = max(float(reach), 1e-6 * max(1.0, abs(float(middle))))
  return np.linspace(middle - reach, middle + reach, _BINS + 1)


def _thinned(
  pairs: gaussian.Pairs, every: int
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
  """The pairs of the first of each `every` images."""
  first = 0
  for eps_q, eps, *_ in pairs():
    start = -first % every
    first += len(eps_q)
    if start < len(eps_q):
      yield eps_q[start::every], eps[start::every]


def _decibel(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
  """NaN, a gap in a line, where there is no noise or no signal."""
  known = (signal > 0) & (noise > 0)
  ratio = np.divide(signal, noise, out=np.ones_like(noise), where=known)
  return np.where(known, 10 * np.log10(ratio), np.nan)


def _marker(steps: int) -> dict[str, Any]:
  """How lines over so many steps are drawn."""
  if steps > _MARKED:
    return {'linewidth': 1.2}
  return {'linewidth': 1.5, 'marker': '.', 'markersize': 6}


def _plain_log_ticks(axis: mpl_axis.Axis, places: Sequence[float]) -> None:
  """0.1, 0.2, 0.5, 1, ... instead of powers."""
  axis.set_major_locator(ticker.LogLocator(subs=places))
  axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:g}'))
  axis.set_minor_formatter(ticker.NullFormatter())


def _lines(ax: mpl_axes.Axes, values: np.ndarray, kind: str) -> None:
  """Over steps: float64[S] of the tensor, or [S, C] of channels."""
  style = _marker(len(values))
  if values.ndim == 1:
    style['linewidth'] *= 1.5
    ax.plot(values, color=_BLACK, label=kind, **style)
    return
  for c in range(values.shape[1]):
    colour = _CHANNELS[c % len(_CHANNELS)]
    ax.plot(values[:, c], color=colour, label=f'{kind} {c}', **style)


def _shown_candidates(held_out: selection.HeldOut) -> list[int]:
  """With a single channel, its candidates are those of the tensor."""
  single = held_out.bias.shape[2] == 1
  return [
    k
    for k, name in enumerate(selection.CANDIDATES)
    if not (single and name.startswith('channel'))
  ]


def _chosen(held_out: selection.HeldOut) -> np.ndarray:
  """Of the candidates that are shown, int64[S]."""
  shown = _shown_candidates(held_out)
  alike = [
    selection.CANDIDATES.index(name.replace('channel', 'tensor'))
    for name in selection.CANDIDATES
  ]
  chosen = held_out.choice()
  return np.where(np.isin(chosen, shown), chosen, np.take(alike, chosen))


def _candidates(
  ax: mpl_axes.Axes,
  values: np.ndarray,
  low: np.ndarray,
  high: np.ndarray,
  shown: Sequence[int],
) -> None:
  """Lines over steps with bands, each float64[S, K]; 'none' is 0."""
  ax.axhline(0, color=_GREY, linewidth=0.8, zorder=0)
  for k in shown:
    name = selection.CANDIDATES[k]
    if name == 'none':
      continue
    colour, style = _STYLES[name]
    ax.fill_between(
      range(len(values)),
      low[:, k],
      high[:, k],
      color=colour,
      alpha=0.15,
      linewidth=0,
    )
    ax.plot(
      values[:, k], style, color=colour, label=name, **_marker(len(values))
    )
  bottom, top = ax.get_ylim()
  # What does great harm would leave no room for the others.
  ax.set_ylim(bottom=max(bottom, -max(_HARM, 2 * top)))


def _choices(
  ax: mpl_axes.Axes, held_out: selection.HeldOut, rows: np.ndarray
) -> None:
  """A mark per step in the line of its candidate."""
  shown, chosen = _shown_candidates(held_out), _chosen(held_out)[rows]
  for place, k in enumerate(shown):
    name = selection.CANDIDATES[k]
    where = np.flatnonzero(chosen == k)
    ax.plot(
      where,
      np.full(len(where), place),
      's',
      color=_STYLES[name][0],
      markersize=8 if len(rows) <= _MARKED else 4,
      label=name,
    )
  names = [selection.CANDIDATES[k] for k in shown]
  ax.set_yticks(range(len(shown)), names)
  ax.set_ylim(len(shown) - 0.5, -0.5)


def _legend(ax: mpl_axes.Axes) -> None:
  ax.legend(fontsize=8, framealpha=0.8)


def _step_axes(grid: np.ndarray, timesteps: np.ndarray) -> None:
  """Timesteps below each column of axes, numbers of steps above it."""
  last = len(timesteps) - 1
  stride = max(1, -(-last // _MAX_TICKS))
  where = np.arange(0, last + 1, stride)
  if last - where[-1] < 0.7 * stride and last:
    where = where[:-1]  # Its number would touch the last one's.
  where = np.append(where, last)
  margin = max(0.5, 0.02 * last)
  for ax in grid.flat:
    ax.set_xticks(where, timesteps[where].tolist())
    ax.set_xlim(-margin, last + margin)
    ax.grid(alpha=0.3)
  for ax in grid[-1]:
    ax.set_xlabel('timestep t, in the order of sampling')
  for ax in grid[0]:
    top = ax.secondary_xaxis('top')
    top.set_xticks(where, (where + 1).tolist())
    top.set_xlabel('sampling step')


def _fitted(
  ax: mpl_axes.Axes,
  one: Joint,
  tensor: gaussian.ErrorModel,
  outlier_std: float,
) -> None:
  """The Gaussian of one timestep over its histogram."""
  row = tensor.rows_of([one.timestep])[0]
  given = tensor.conditional()
  cov = np.array(
    [
      [tensor.var_q[row], tensor.cov[row]],
      [tensor.cov[row], tensor.var_d[row]],
    ]
  )
  for std in _ELLIPSES:
    points = ellipse((tensor.mean_q[row], tensor.mean_d[row]), cov, std)
    ax.plot(
      *points.T,
      color=_VERMILLION,
      linewidth=1.3,
      label='fitted Gaussian: 1, 2, 3 σ' if std == 1 else None,
    )
  ends = one.edges_q[[0, -1]]
  ax.plot(
    ends,
    given.gain[row] * ends + given.bias[row],
    '--',
    color=_BLACK,
    linewidth=1.3,
    label='mean of Δ given $ε_q$',
  )
  if np.isfinite(one.limits).all():
    for limit in one.limits:
      ax.axhline(
        limit,
        linestyle=':',
        color=_GREEN,
        linewidth=1.6,
        label=f'outliers: ±{outlier_std:g} σ of Δ'
        if limit == one.limits[0]
        else None,
      )
  ax.set_xlim(*ends)
  ax.set_ylim(*one.edges_d[[0, -1]])
  ax.set_axisbelow(True)
  ax.grid(alpha=0.2)
