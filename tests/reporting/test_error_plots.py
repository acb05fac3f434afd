"""The numbers behind the figures of errors: against plain NumPy."""

import functools
import io

import numpy as np
import pytest
from matplotlib import path as mpl_path

from d2dpm_jax.denoising import gaussian, selection
from d2dpm_jax.reporting import error_plots

_T = [1, 251, 501, 751]  # Figures begin with the last.
_IMAGES = 40


@functools.cache
def _arrays(t, channels=3, images=_IMAGES):
  """eps_q and eps, float64[N, 4, 4, C]."""
  rng = np.random.default_rng(t)
  eps_q = rng.normal(size=(images, 4, 4, channels)) + 0.1
  d = (0.2 + t / 2000) * eps_q + 0.1 * rng.normal(size=eps_q.shape)
  return eps_q, eps_q - d - 0.05 * np.arange(channels)


def _points(t, **sizes):
  eps_q, eps = _arrays(t, **sizes)
  x = np.random.default_rng(9).normal(size=eps.shape)  # It tells nothing.
  for i in range(0, len(eps), 7):
    yield tuple(array[i : i + 7] for array in (eps_q, eps, x))


def _statistics(timesteps, outlier_std=np.inf, folds=4, **sizes):
  points = functools.partial(_points, **sizes)
  models = {
    kind: gaussian.fit(timesteps, points, kind == 'channel', outlier_std)
    for kind in ('tensor', 'channel')
  }
  return models, selection.evaluate(
    *models.values(), points, folds, outlier_std
  )


@pytest.fixture(scope='module')
def fitted():
  return _statistics(_T)


def _lines(ax):
  """Label -> y-data of what has a label of its own."""
  return {
    line.get_label(): np.asarray(line.get_ydata())
    for line in ax.get_lines()
    if not line.get_label().startswith('_')
  }


def _errors():
  """Delta of each step, in the order of sampling; float64[S, n, C]."""
  arrays = [_arrays(t) for t in reversed(_T)]
  return np.stack([(q - e).reshape(-1, 3) for q, e in arrays])


def test_moments_by_step(fitted):
  mean, std, rho, ratio, *_ = error_plots.errors(*fitted).axes
  q = np.stack([_arrays(t)[0].reshape(-1, 3) for t in reversed(_T)])
  d = _errors()
  assert sorted(_lines(mean)) == [
    'channel 0',
    'channel 1',
    'channel 2',
    'tensor',
  ]
  groups = {f'channel {c}': np.s_[:, :, c] for c in range(3)}
  for name, group in {**groups, 'tensor': np.s_[:]}.items():
    a, b = (x[group].reshape(len(_T), -1) for x in (q, d))
    want = {
      mean: b.mean(1),
      std: b.std(1, ddof=1),
      rho: [np.corrcoef(*rows)[0, 1] for rows in zip(a, b, strict=True)],
      ratio: 10 * np.log10(np.square(a - b).mean(1) / np.square(b).mean(1)),
    }
    for ax, values in want.items():
      # Variances have ddof 1, which the power of the signal is not to have.
      tolerance = {'atol': 0.01} if ax is ratio else {'rtol': 1e-9}
      np.testing.assert_allclose(_lines(ax)[name], values, **tolerance)


def test_predictions_and_choices_by_step(fitted):
  held_out = fitted[1]
  *_, predicted, chosen = error_plots.errors(*fitted).axes
  r2, error = 100 * held_out.r2[::-1], 100 * held_out.standard_error[::-1]
  lines = _lines(predicted)
  assert [*lines] == [*selection.CANDIDATES[1:]]
  for k, (line, band) in enumerate(
    zip(lines.values(), predicted.collections, strict=True), 1
  ):
    np.testing.assert_allclose(line, r2[:, k])
    corners = band.get_paths()[0].vertices
    for step in range(len(_T)):
      ends = corners[corners[:, 0] == step, 1]
      want = r2[step, k] + 2 * error[step, k] * np.array([-1, 1])
      np.testing.assert_allclose([ends.min(), ends.max()], want)
  marks = {line.get_label(): line.get_xdata() for line in chosen.get_lines()}
  choice = held_out.choice()[::-1]
  assert choice.any()
  for k, name in enumerate(selection.CANDIDATES):
    np.testing.assert_array_equal(marks[name], np.flatnonzero(choice == k))


def test_steps_are_named_in_the_order_of_sampling(fitted):
  for drawn in (error_plots.errors(*fitted), error_plots.left(fitted[1])):
    for ax in drawn.axes[-2:]:
      names = [label.get_text() for label in ax.get_xticklabels()]
      assert names == ['751', '501', '251', '1']
      np.testing.assert_array_equal(ax.get_xticks(), range(4))
    for line in drawn.axes[0].get_lines()[:3]:
      np.testing.assert_array_equal(line.get_xdata(), range(4))


def test_what_is_left(fitted):
  """Fitted without a fold, tried on it, as in `selection`: in plain NumPy."""
  before_after, off = error_plots.left(fitted[1]).axes
  d = _errors()
  rms = np.sqrt(np.square(d).mean((1, 2)))
  lines = _lines(before_after)
  np.testing.assert_allclose(lines['uncorrected'], rms, rtol=1e-9)
  d = d.reshape(len(_T), _IMAGES, -1, 3)
  fold = np.arange(_IMAGES) % 4
  left = np.stack(
    [
      d[:, fold == f] - d[:, fold != f].mean((1, 2), keepdims=True)
      for f in range(4)
    ]
  )
  after = np.sqrt(np.square(left).mean((0, 2, 3, 4)))
  np.testing.assert_allclose(lines['after channel bias'], after, rtol=1e-9)
  np.testing.assert_allclose(
    _lines(off)['channel bias'], 100 * (1 - after / rms), rtol=1e-6
  )
  # Here the error is predicted well, and per channel best.
  best = lines['what auto chose']
  names = [f'after {name}' for name in selection.CANDIDATES[1:]]
  np.testing.assert_array_equal(best, np.min([lines[n] for n in names], 0))
  np.testing.assert_allclose(best, lines['after channel gain+bias'], rtol=0.01)
  np.testing.assert_allclose(best, 0.1, rtol=0.1)


def test_limits_are_those_of_the_fit():
  models, held_out = _statistics(_T, outlier_std=2.0)
  limits = error_plots.outlier_limits(held_out, 2.0)
  for t, (low, high) in zip(_T, limits, strict=True):
    d = -np.subtract(*_arrays(t)[::-1])
    want = d.mean() + 2 * d.std() * np.array([-1, 1])
    # The mean is that without the outliers.
    np.testing.assert_allclose([low, high], want, atol=0.05 * d.std())
    one = error_plots.count_joint(
      t, functools.partial(_points, t), models['tensor'], held_out, 2.0
    )
    assert one.beyond == ((d < low) | (d > high)).sum() > 0
  assert np.isinf(error_plots.outlier_limits(held_out, np.inf)).all()


def test_histogram_is_of_whole_images_from_all(fitted):
  models, held_out = fitted
  points = functools.partial(_points, 501)
  count = functools.partial(
    error_plots.count_joint, 501, points, models['tensor'], held_out, 4.0
  )
  q, eps = _arrays(501)
  for most, every in ((10**6, 1), (q.size // 3, 4), (48, _IMAGES)):
    one = count(most=most)
    a, b = q[::every].ravel(), (q - eps)[::every].ravel()
    want, *_ = np.histogram2d(a, b, (one.edges_q, one.edges_d))
    np.testing.assert_array_equal(one.counts, want)
    assert one.seen == a.size <= most
    assert one.outside == a.size - want.sum()


def test_joint_figure(fitted):
  models, held_out = fitted
  model = models['tensor']
  counted = [
    error_plots.count_joint(
      t, functools.partial(_points, t), model, held_out, 1.5
    )
    for t in (751, 1)
  ]
  drawn = error_plots.joint(counted, model, 1.5)
  for ax, one, step in zip(drawn.axes, counted, (1, 4), strict=False):
    q, d = _arrays(one.timestep)
    q, d = q.ravel(), (q - d).ravel()
    title = ax.get_title()
    assert f't = {one.timestep}, step {step} of 4' in title
    assert f'{one.beyond} of 1,920 beyond ±1.5 σ' in title
    assert one.beyond > 0
    shown = ax.collections[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(shown, 0), one.counts.T)
    lines = {line.get_label(): line for line in ax.get_lines()}
    x, y = lines['mean of Δ given $ε_q$'].get_data()
    np.testing.assert_allclose(y, np.polyval(np.polyfit(q, d, 1), x), atol=1e-9)
    limits = [
      line.get_ydata()[0] for line in ax.get_lines() if line.get_ls() == ':'
    ]
    np.testing.assert_array_equal(limits, one.limits)
    ellipse = mpl_path.Path(lines['fitted Gaussian: 1, 2, 3 σ'].get_xydata())
    inside = ellipse.contains_points(np.stack([q, d], 1))
    np.testing.assert_allclose(inside.mean(), 1 - np.exp(-0.5), atol=0.04)


@pytest.mark.parametrize('std', [1.0, 2.0, 3.0])
def test_ellipses_hold_what_they_should(std):
  mean, cov = [0.3, -2.0], np.array([[4.0, -0.9], [-0.9, 0.3]])
  points = np.random.default_rng(0).multivariate_normal(mean, cov, 20_000)
  inside = mpl_path.Path(error_plots.ellipse(mean, cov, std)).contains_points(
    points
  )
  # Chi-square of two degrees of freedom: 39.3, 86.5 and 98.9 %. Four standard
  # errors of the share.
  share = 1 - np.exp(-(std**2) / 2)
  tolerance = 4 * np.sqrt(share * (1 - share) / len(points))
  assert abs(inside.mean() - share) < tolerance


def test_shown_timesteps():
  shown = error_plots.shown_timesteps
  assert shown([1, 501]) == [501, 1]
  assert shown(range(0, 1000, 4)) == [996, 748, 500, 248, 0]
  assert shown([7]) == [7]


def _draw_all(timesteps, outlier_std, folds=4, **sizes):
  models, held_out = _statistics(timesteps, outlier_std, folds, **sizes)
  counted = [
    error_plots.count_joint(
      t,
      functools.partial(_points, t, **sizes),
      models['tensor'],
      held_out,
      outlier_std,
    )
    for t in error_plots.shown_timesteps(timesteps)
  ]
  drawn = (
    error_plots.errors(models, held_out),
    error_plots.joint(counted, models['tensor'], outlier_std),
    error_plots.left(held_out),
  )
  for one in drawn:
    one.savefig(io.BytesIO(), format='png', dpi=30)
  return drawn


def test_two_steps_of_one_channel():
  errors, joint, left = _draw_all([1, 501], np.inf, channels=1)
  # A channel is the tensor: it is shown once, and nothing is its own choice.
  assert [*_lines(errors.axes[0])] == ['tensor']
  names = [n for n in selection.CANDIDATES if not n.startswith('channel')]
  chosen = errors.axes[5]
  assert [label.get_text() for label in chosen.get_yticklabels()] == names
  assert sum(len(line.get_xdata()) for line in chosen.get_lines()) == 2
  assert len(_lines(left.axes[0])) == len(names) + 1
  assert sum('step' in ax.get_title() for ax in joint.axes) == 2


def test_250_steps_of_four_channels():
  timesteps = [*range(996, -1, -4)]
  errors, joint, left = _draw_all(timesteps, 4.0, 2, channels=4, images=4)
  assert len(_lines(errors.axes[0])) == 5
  assert all(len(y) == 250 for y in _lines(left.axes[1]).values())
  names = [label.get_text() for label in left.axes[0].get_xticklabels()]
  assert names[0] == '996' and names[-1] == '0' and len(names) < 12
  assert sum('step' in ax.get_title() for ax in joint.axes) == 5


def test_without_any_error():
  """A network that is not quantized at all: gaps, and no warnings."""
  eps_q = np.random.default_rng(0).normal(size=(4, 2, 2, 3))

  def points(t):
    del t
    yield eps_q, eps_q, eps_q

  models = {
    kind: gaussian.fit([5, 3], points, kind == 'channel')
    for kind in ('tensor', 'channel')
  }
  held_out = selection.evaluate(*models.values(), points)
  one = error_plots.count_joint(
    5, functools.partial(points, 5), models['tensor'], held_out, 4.0
  )
  assert (one.counts.sum(), one.beyond) == (eps_q.size, 0)
  drawn = (
    error_plots.errors(models, held_out),
    error_plots.joint([one], models['tensor'], 4.0),
    error_plots.left(held_out),
  )
  for figure in drawn:
    figure.savefig(io.BytesIO(), format='png', dpi=30)
  assert np.isnan(_lines(drawn[0].axes[3])['tensor']).all()
