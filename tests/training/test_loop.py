"""The training loop: it learns, averages, and goes on where it was killed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal

from d2dpm_jax.training import loop

_SETTINGS = loop.LoopSettings(
  steps=10, learning_rate=0.1, steps_per_call=2, save_every=4
)
_TRUE = np.array([1.0, -2.0, 0.5], np.float32)


def _loss(params, key, data):
  """Linear regression on a random batch."""
  x, y = data
  rows = jax.random.randint(key, (16,), 0, len(x))
  error = x[rows] @ params['w'] + params['b'] - y[rows]
  return jnp.square(error).mean(), {'rows': rows.sum().astype(jnp.float32)}


def _data():
  x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
  return x, x @ _TRUE + np.float32(0.25)


def _fit(directory, settings=_SETTINGS, seed=0, loss=_loss, **kwargs):
  params = {'w': np.zeros(3, np.float32), 'b': np.zeros((), np.float32)}
  return loop.fit(
    'test',
    loss,
    params,
    _data(),
    jax.random.key(seed),
    settings,
    directory,
    **kwargs,
  )


class _Killed(Exception):
  pass


def _kill_at(step):
  def after_call(state):
    if int(state.step) >= step:
      raise _Killed
    return state

  return after_call


def test_finds_the_solution(tmp_path):
  settings = dataclasses.replace(
    _SETTINGS, steps=400, steps_per_call=100, save_every=400
  )
  state = _fit(tmp_path, settings)
  np.testing.assert_allclose(state.params['w'], _TRUE, atol=0.01)
  np.testing.assert_allclose(state.params['b'], 0.25, atol=0.01)


def test_loss_falls(tmp_path, capsys):
  settings = dataclasses.replace(
    _SETTINGS, steps=100, steps_per_call=100, save_every=100
  )
  x, y = _data()
  state = _fit(tmp_path, settings)
  after = np.square(x @ state.params['w'] + state.params['b'] - y).mean()
  assert after < 0.1 * np.square(y).mean()
  shown = capsys.readouterr().err
  assert 'test: 100/100 step' in shown and 'loss ' in shown and 'rows ' in shown


def test_steps_are_adams(tmp_path):
  """A constant gradient moves everything by the learning rate, against it."""
  slope = np.array([3.0, -0.5, 0.01], np.float32)

  def loss(params, key, data):
    return params['w'] @ slope + 0 * params['b'], {}

  moved = []

  def after_call(state):
    moved.append(np.asarray(state.params['w']))
    return state

  settings = dataclasses.replace(_SETTINGS, steps=100, steps_per_call=1)
  _fit(tmp_path, settings, loss=loss, after_call=after_call)
  steps = np.diff([np.zeros(3), *moved], axis=0)
  # 2 % linear warm-up from 0, then a cosine to a hundredth.
  falling = np.arange(98) / 98
  rates = 0.1 * (0.01 + 0.99 * (1 + np.cos(np.pi * falling)) / 2)
  want = -np.outer([0, 0.05, *rates], np.sign(slope))
  np.testing.assert_allclose(steps, want, rtol=2e-4, atol=2e-6)


def test_average_is_the_documented_one(tmp_path):
  """By hand from the parameters after every step."""
  settings = dataclasses.replace(_SETTINGS, steps_per_call=1, ema_decay=0.3)
  seen = []

  def after_call(state):
    seen.append((np.asarray(state.params['w']), np.asarray(state.ema['w'])))
    return state

  _fit(tmp_path, settings, after_call=after_call)
  average = np.zeros(3)
  for step, (params, ema) in enumerate(seen):
    decay = min(0.3, (1 + step) / (10 + step))
    average = decay * average + (1 - decay) * params
    np.testing.assert_allclose(ema, average, rtol=1e-5, atol=1e-6)
  assert len(seen) == 10 and np.abs(seen[-1][0] - seen[-1][1]).max() > 1e-3


@pytest.mark.parametrize('kill', [2, 6, 8])
def test_killed_and_resumed_equals_undisturbed(tmp_path, kill):
  """Killed before the first checkpoint, between two, and right at one."""
  want = _fit(tmp_path / 'undisturbed')
  with pytest.raises(_Killed):
    _fit(tmp_path / 'killed', after_call=_kill_at(kill))
  found = _fit(tmp_path / 'killed')
  assert_trees_equal(jax.device_get(found), jax.device_get(want))
  assert int(found.step) == 10


def test_resumes_and_does_not_begin_again(tmp_path):
  with pytest.raises(_Killed):
    _fit(tmp_path, after_call=_kill_at(6))
  first = []

  def after_call(state):
    first.append(int(state.step))
    return state

  _fit(tmp_path, after_call=after_call)
  assert first == [6, 8, 10]  # The newest checkpoint was of step 4.


def test_a_finished_run_trains_no_more(tmp_path):
  want = _fit(tmp_path)

  def after_call(_):
    raise AssertionError('trained')

  found = _fit(tmp_path, after_call=after_call)
  assert_trees_equal(jax.device_get(found), jax.device_get(want))


def test_steps_that_do_not_divide(tmp_path):
  """7 steps in calls of 3, saved at the end."""
  settings = dataclasses.replace(_SETTINGS, steps=7, steps_per_call=3)
  assert int(_fit(tmp_path / 'a', settings).step) == 7
  one = dataclasses.replace(settings, steps_per_call=1)
  np.testing.assert_allclose(
    _fit(tmp_path / 'a', settings).params['w'],
    _fit(tmp_path / 'b', one).params['w'],
    rtol=1e-6,
  )


def test_step_i_has_the_key_fold_in_i(tmp_path):
  """Told from Adam's first moment of gradients that are the key's draw."""
  moments = []

  def loss(params, key, data):
    draw = jax.random.uniform(key, minval=-1.0)  # So that nothing is clipped.
    return draw * params['b'] + 0 * params['w'].sum(), {}

  def after_call(state):
    (moment,) = [s.mu['b'] for s in state.opt_state[1] if hasattr(s, 'mu')]
    moments.append(float(moment))
    return state

  settings = dataclasses.replace(_SETTINGS, steps_per_call=1)
  _fit(tmp_path, settings, loss=loss, after_call=after_call)
  want = 0.0
  for i, moment in enumerate(moments):
    key = jax.random.fold_in(jax.random.key(0), i)
    want = 0.9 * want + 0.1 * float(jax.random.uniform(key, minval=-1.0))
    np.testing.assert_allclose(moment, want, rtol=1e-5, atol=1e-7)
  assert len(moments) == 10


def test_the_key_decides_the_batches(tmp_path):
  a, b = _fit(tmp_path / 'a'), _fit(tmp_path / 'b', seed=1)
  assert np.abs(a.params['w'] - b.params['w']).max() > 1e-4
