"""Errors along trajectories of the quantized network: a loop, and resumed."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_error_models_equal, contents
from PIL import Image

from d2dpm_jax.denoising import correction as corrections
from d2dpm_jax.denoising import selection
from d2dpm_jax.diffusion import noise, sampler, schedule
from d2dpm_jax.models import latent_diffusion
from d2dpm_jax.pipelines import (
  artifacts,
  generation,
  statistics,
  trajectories,
  trial,
)
from d2dpm_jax.runtime import files

_T = [751, 501, 251, 1]


def _network(np_, x, t, labels, quantized):
  """A toy of both networks, in NumPy or JAX; x [B,h,w,3], t a number."""
  labels = labels[:, None, None, None]
  eps = 0.7 * x + 0.2 * np_.sin(2 * x + labels + t / 300)
  error = np_.asarray([0.1, 0.0, -0.1]) * x + 0.1 * np_.cos(5 * x) + 0.05
  return eps + error if quantized else eps


class _Toy(latent_diffusion.LatentDiffusion):
  """Of a class of its own: programs are kept by model."""


@pytest.fixture
def toy(tiny, monkeypatch):
  """The tiny model with the toy for a network; config overrides -> model."""

  def eps_fn(ldm, inputs, labels, timesteps):
    del ldm, timesteps

    def network(x, t, table):
      del table
      quantized = bool(inputs.qstate)
      return _network(jnp, x, t[:, None, None, None], labels, quantized)

    return network, None

  monkeypatch.setattr(generation, '_eps_fn', eps_fn)
  monkeypatch.setattr(generation, 'executable', lambda qstate, *_: qstate)
  monkeypatch.setattr(generation, 'network_params', lambda params, *_: params)
  monkeypatch.setattr(statistics, '_draw', lambda *_: None)  # Takes a while.
  ldm = tiny.model.ldm
  fields = {f.name: getattr(ldm, f.name) for f in dataclasses.fields(ldm)}

  def make(**overrides):
    overrides = {
      'statistics__trajectory': 'quantized',
      'statistics__num_trials': 0,
      **overrides,
    }
    return dataclasses.replace(
      tiny.with_config('', **overrides), ldm=_Toy(**fields)
    )

  return make


def _spool(model, paths):
  config = model.config
  return trajectories.collect(
    model,
    statistics.num_trajectories(config),
    config.calibration.batch_size,
    config.sample.microbatch,
    paths.trajectories,
  )


_QSTATE = {'layer': np.zeros(1)}  # All that the toy asks is whether there is.


def _fit(model, root):
  paths = files.Workdir.at(root)
  return statistics.fit_errors(model, _QSTATE, _spool(model, paths), paths)


def _joint(q, d, axes):
  """Moments after dropping what is farther than 4 standard deviations."""
  keep = np.abs(d - d.mean(axes)) <= 4 * d.std(axes)
  q, d = (np.where(keep, a, np.nan) for a in (q, d))
  mean_q, mean_d = np.nanmean(q, axes), np.nanmean(d, axes)
  n = keep.sum(axes) - 1
  var_q = np.nansum((q - mean_q) ** 2, axes) / n
  var_d = np.nansum((d - mean_d) ** 2, axes) / n
  cov = np.nansum((q - mean_q) * (d - mean_d), axes) / n
  return dict(mean_q=mean_q, mean_d=mean_d, var_q=var_q, var_d=var_d, cov=cov)


def _loop(model, x, labels, held_out):
  """The whole method, in float64: moments by kind, and x of every step."""
  config, key = model.config, trajectories.noise_key(model.config.seed)
  alphas = schedule.linear_schedule(1000, 0.0015, 0.0195)
  x, index = np.float64(x), np.arange(len(x))
  moments, points = {'tensor': [], 'channel': []}, []

  def draw(step, stream):
    return np.float64(noise.noise_for(key, index, step, x.shape[1:], stream))

  for step, t in enumerate(_T):
    points.append(x)
    eps_q = _network(np, x, t, labels, True)
    d = eps_q - _network(np, x, t, labels, False)
    moments['tensor'].append(_joint(eps_q, d, None))
    moments['channel'].append(_joint(eps_q, d, (0, 1, 2)))
    kind = 'channel' if config.sample.channel_wise else 'tensor'
    m = moments[kind][-1]
    gain = m['cov'] / m['var_q']
    mu = m['mean_d'] + gain * (eps_q - m['mean_q'])
    left = m['var_d'] - gain * m['cov']
    if config.sample.correction == 'none':
      mu, left = 0.0, 0.0
    elif config.sample.correction == 's-d2':
      mu = mu + left**0.5 * draw(step, noise.Stream.ERROR)
      left = 0.0
    elif config.sample.correction == 'auto':
      best = held_out.choice()[step]
      known = np.concatenate([eps_q, x], -1)
      mu = known @ held_out.weights[step, best] + held_out.bias[step, best]
      if selection.CANDIDATES[best] == 'linear+place':
        mu = mu + held_out.place[step]
      left = held_out.left_variance[step, best]
    eps = eps_q - mu
    a, prev = alphas[t], alphas[_T[step + 1] if step < 3 else 0]
    eta = config.sampler.eta
    variance = eta**2 * (1 - prev) / (1 - a) * (1 - a / prev)
    c = (1 - prev - variance) ** 0.5 - (prev * (1 - a) / a) ** 0.5
    variance = np.maximum(variance - c**2 * left, 0)
    x = (prev / a) ** 0.5 * (x - (1 - a) ** 0.5 * eps)
    x = x + (1 - prev - variance) ** 0.5 * eps
    x = x + variance**0.5 * draw(step, noise.Stream.SAMPLER)
  return moments, points


@pytest.mark.parametrize(
  ('correction', 'channel_wise', 'eta'),
  [
    ('none', False, 0.0),
    ('d-d2', True, 0.5),
    ('s-d2', False, 0.0),
    ('auto', False, 0.5),
  ],
)
def test_equals_a_loop(toy, tmp_path, correction, channel_wise, eta):
  model = toy(
    sample__correction=correction,
    sample__channel_wise=channel_wise,
    sampler__eta=eta,
  )
  found = _fit(model, tmp_path)
  batches = list(_spool(model, files.Workdir.at(tmp_path)))
  x = np.concatenate([batch.x[:, 0] for batch in batches])
  labels = np.concatenate([batch.labels for batch in batches])
  moments, points = _loop(model, x, labels, found.held_out)
  # float32 against float64; x reaches 4 and has been through four steps.
  folder = tmp_path / 'calibration' / 'quantized_trajectories'
  for step, want in enumerate(points):
    for rows, name in ((slice(0, 8), '000000'), (slice(8, 12), '000008')):
      got = trajectories.read_array(folder, f'{step:03d}.{name}.x')
      np.testing.assert_allclose(got, want[rows], rtol=1e-4, atol=1e-4)
  for kind, error_model in found.error_models.items():
    np.testing.assert_array_equal(error_model.timesteps, _T)
    for name in moments[kind][0]:
      want = np.stack([m[name] for m in moments[kind]])
      got = getattr(error_model, name)
      np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5, err_msg=name)
    assert error_model.settings['statistics'] == {
      'trajectory': 'quantized',
      'correction': correction,
      'channel_wise': channel_wise,
      'absorb_variance': False,
    }
    assert error_model.settings['fit'] == {
      'trajectory': 'quantized',
      'num_samples': 12,
      'num_trials': 0,
      'outlier_std': 4.0,
      'folds': 4,
      'seed': 0,
      'microbatch': model.config.sample.microbatch,
      'execution': 'integer',
    }


def test_points_are_those_that_the_sampler_sees(toy, tmp_path):
  """With the noise of calibration, `sampler.sample` goes through them."""
  model = toy(sample__correction='d-d2', sampler__eta=0.5)
  found = _fit(model, tmp_path)
  rows = generation.rows_of(model.ldm, model.sampler)
  index, key = np.arange(12), trajectories.noise_key(model.config.seed)
  labels = generation.balanced_labels(0, index, model.num_classes)
  shape = model.ldm.latent_shape
  _, seen = sampler.sample(
    lambda x, t, _: _network(jnp, x, t[:, None, None, None], labels, True),
    rows,
    noise.initial_noise(key, index, shape),
    noise_fn=noise.noise_stream(key, index, shape),
    correct=corrections.CORRECTIONS['d-d2'],
    correction_rows=corrections.correction_rows(
      found.error_models['tensor'], 'd-d2', rows.t
    ),
    collect=lambda step: step.x,
  )
  folder = tmp_path / 'calibration' / 'quantized_trajectories'
  for step in range(4):
    x = trajectories.read_array(folder, f'{step:03d}.000000.x')
    np.testing.assert_allclose(x, seen[step, :8], rtol=2e-5, atol=2e-5)


def test_only_the_trajectory_differs_from_the_papers(toy, tmp_path):
  """Same first points, then others; every field but settings moves."""
  quantized = _fit(toy(), tmp_path / 'a').error_models['tensor']
  plain = _fit(toy(statistics__trajectory='fp'), tmp_path / 'b')
  assert plain.held_out.settings['statistics'] == {'trajectory': 'fp'}
  plain = plain.error_models['tensor']
  for name in ('mean_q', 'mean_d', 'var_q', 'var_d', 'cov'):
    a, b = getattr(quantized, name), getattr(plain, name)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5, err_msg=name)
    assert (np.abs(a[1:] / b[1:] - 1) > 1e-4).all(), name


def _assert_same(found, want):
  assert_error_models_equal(found.error_models, want.error_models)
  for name in want.held_out.names():
    np.testing.assert_array_equal(
      getattr(found.held_out, name), getattr(want.held_out, name)
    )


def test_killed_at_any_write_it_goes_on(toy, tmp_path, monkeypatch):
  """Four steps, two batches, three arrays each: 24 writes."""
  model = toy(sample__correction='s-d2', sampler__eta=0.5)
  want = _fit(model, tmp_path / 'undisturbed')
  folder = 'calibration/quantized_trajectories'
  arrays = contents(tmp_path / 'undisturbed' / folder)
  assert len(arrays) == 24 + 1  # And its settings.
  _spool(model, files.Workdir.at(tmp_path / 'killed'))
  write = trajectories.write_array
  for alive in (0, 1, 4, 8, 3):  # Writes until the next death; 16 in all.
    left = iter(range(alive))

    def dying(*args, left=left):
      if next(left, None) is None:
        raise KeyboardInterrupt
      write(*args)

    with monkeypatch.context() as patch:
      patch.setattr(trajectories, 'write_array', dying)
      with pytest.raises(KeyboardInterrupt):
        _fit(model, tmp_path / 'killed')
  _assert_same(_fit(model, tmp_path / 'killed'), want)
  assert contents(tmp_path / 'killed' / folder) == arrays
  # Damage is found.
  path = tmp_path / 'killed' / folder / '002.000008.eps_q.npy'
  path.write_bytes(path.read_bytes()[:-60] + 60 * b'0')
  _assert_same(_fit(model, tmp_path / 'killed'), want)
  # And what is there is not made again.
  with monkeypatch.context() as patch:
    patch.setattr(trajectories, 'write_array', None)
    _assert_same(_fit(model, tmp_path / 'killed'), want)


def test_another_correction_is_refused(toy, tmp_path):
  _fit(toy(), tmp_path)
  with pytest.raises(ValueError, match="correction: saved 'auto', now 'none'"):
    _fit(toy(sample__correction='none'), tmp_path)


@pytest.mark.parametrize(
  ('field', 'value', 'text'),
  [
    ('statistics__trajectory', 'float', "statistics.trajectory 'float'"),
    ('statistics__folds', 1, 'statistics.folds is 1; expected >= 2'),
    ('statistics__num_samples', 1, 'statistics.num_samples is 1; expected >='),
    ('statistics__num_trials', -1, 'statistics.num_trials is -1; expected >='),
    ('sample__correction', 'd-d3', "'d-d3': expected one of"),
    ('sample__absorb_variance', True, 'is an option of s-d2'),
  ],
)
def test_bad_settings_are_named(tiny, field, value, text):
  overrides = {'statistics__trajectory': 'quantized', field: value}
  config = tiny.config(**overrides)
  with pytest.raises(ValueError, match=text):
    statistics.check(config)


def _decibels(d):
  return np.mean([10 * np.log10(np.mean(one**2)) for one in d])


def test_one_image_does_not_decide_alone():
  near = np.full([9, 2, 2, 1], 0.1)
  off = np.concatenate([0.5 * near, np.full([1, 2, 2, 1], 3.0)])
  near = np.concatenate([near, np.full([1, 2, 2, 1], 2.0)])
  zero = np.zeros_like(off)
  assert trial.decibels(off, zero) < trial.decibels(near, zero)
  np.testing.assert_allclose(trial.decibels(off, zero), _decibels(off))
  assert -150 < trial.decibels(zero, zero) < -130


@pytest.mark.parametrize('eta', [0.0, 0.5])
def test_auto_is_what_did_best_from_end_to_end(toy, tmp_path, eta):
  """The trial against `sampler.sample` of both networks, on images 12 .. 21."""
  model = toy(
    statistics__trajectory='fp', statistics__num_trials=10, sampler__eta=eta
  )
  found = _fit(model, tmp_path).held_out
  rows = generation.rows_of(model.ldm, model.sampler)
  index, key = np.arange(12, 22), trajectories.noise_key(model.config.seed)
  labels = generation.balanced_labels(0, index, model.num_classes)
  shape = model.ldm.latent_shape

  def run(quantized, held_out=None):
    options = {}
    if held_out is not None:
      table = corrections.correction_rows(held_out, 'auto', rows.t)
      options = dict(
        correct=corrections.CORRECTIONS['auto'], correction_rows=table
      )
    return np.float64(
      sampler.sample(
        lambda x, t, _: _network(
          jnp, x, t[:, None, None, None], labels, quantized
        ),
        rows,
        noise.initial_noise(key, index, shape),
        noise_fn=noise.noise_stream(key, index, shape),
        **options,
      )
    )

  everything = dataclasses.replace(found, allowed=np.ones_like(found.allowed))
  wanted = run(False)
  errors = {
    name: _decibels(run(True, menu) - wanted)
    for name, menu in selection.restricted(everything).items()
  }
  assert min(errors.values()) < errors['none'] - 0.5, errors
  best = selection.restricted(everything)[min(errors, key=errors.get)]
  np.testing.assert_array_equal(found.choice(), best.choice())


# ---- With a network that is really quantized.


def test_both_networks_are_those_of_calibration(calibrated, tiny, tmp_path):
  """At the first step x is that of the stored trajectories: so is the rest."""
  model = tiny.with_config(statistics__trajectory='quantized')
  spool = trajectories.Trajectories(calibrated.paths.trajectories, (0, 8))
  paths = files.Workdir.at(tmp_path)
  qstate = calibrated.quantized.qstate
  found = statistics.fit_errors(model, qstate, spool, paths)
  folder = tmp_path / 'calibration' / 'quantized_trajectories'
  read = trajectories.read_array
  stored = read(calibrated.paths.calibration / 'eps_q', '000000')[:, 0]
  batch = spool.batch(0)
  np.testing.assert_array_equal(read(folder, '000.000000.x'), batch.x[:, 0])
  eps = read(folder, '000.000000.eps')
  np.testing.assert_allclose(eps, batch.eps[:, 0], atol=2e-5)
  # Another program rounds otherwise here and there, see test_calibrate.py.
  distance = np.abs(read(folder, '000.000000.eps_q') - stored)
  assert np.median(distance) < 1e-4
  assert distance.mean() < 0.1 * np.abs(stored - eps).mean()
  last = read(folder, '003.000000.x')
  assert np.abs(last - batch.x[:, 3]).mean() > 1e-3
  _are_pngs(paths)
  # It is stored, and read again.
  quantized = artifacts.Quantized(model, qstate, *found)
  artifacts.save(quantized, paths)
  again = artifacts.load(model, paths)
  _assert_same(
    statistics.Statistics(dict(again.error_models), again.held_out), found
  )


def test_the_table_is_kept_and_shown(calibrated):
  held_out = calibrated.quantized.held_out
  text = calibrated.paths.held_out_table.read_text()
  assert text == selection.format_table(held_out) + '\n'
  assert held_out.timesteps.tolist() == _T


def _are_pngs(paths):
  for path in (paths.error_plot, paths.error_joint_plot, paths.error_left_plot):
    with Image.open(path) as picture:
      assert picture.format == 'PNG'
      assert min(picture.size) > 200
      assert np.ptp(np.asarray(picture.convert('L'))) > 200


def test_errors_are_drawn(calibrated):
  _are_pngs(calibrated.paths)


def test_a_calibration_without_held_out_errors(calibrated, tiny, tmp_path):
  """Made by an earlier version: everything works but 'auto'."""
  shutil.copytree(calibrated.paths.root, tmp_path / 'old')
  paths = files.Workdir.at(tmp_path / 'old')
  paths.held_out.unlink()
  old = artifacts.load(tiny.model, paths)
  assert old.held_out is None
  assert old.statistics('d-d2', True) is old.error_models['channel']
  with pytest.raises(ValueError, match="correction 'auto': run --mode calibr"):
    old.statistics('auto', False)
