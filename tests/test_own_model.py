"""examples/own_model.py, smaller: a network that is not of this package."""

import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest

from d2dpm_jax.denoising import statistics
from d2dpm_jax.quantization import integer, transform

_ROOT = pathlib.Path(__file__).parents[1]
_DEPTH = 1
_IMAGES = 16


@pytest.fixture(scope='module')
def example():
  path = _ROOT / 'examples' / 'own_model.py'
  spec = importlib.util.spec_from_file_location('own_model', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def settings(example):
  return example.Settings(
    train_steps=100,
    weight_bits=3,
    depth=_DEPTH,
    iters=4,
    calibration_images=_IMAGES,
    trial_images=8,
    images=_IMAGES,
    sampling_steps=4,
  )


@pytest.fixture(scope='module')
def problem(example, settings):
  return example.trained(settings)


@pytest.fixture(scope='module')
def quantized(problem, settings):
  return problem.quantize(settings, settings.iters)


def test_the_correction_brings_back_what_quantization_took(
  example, problem, quantized, settings
):
  found = example.compare(problem, quantized[1], settings)
  assert list(found) == ['none', 'd-d2', 'auto', 'integers']
  assert np.isfinite(list(found.values())).all()  # None is full precision.
  assert 10 < found['none'] < 40
  assert found['d-d2'] > found['none'] + 0.5
  assert found['auto'] > found['none'] + 1
  # The same numbers in another order of roundings.
  assert found['integers'] == pytest.approx(found['none'], abs=0.1)


def test_every_layer_runs_on_integers(problem, quantized):
  table, state = quantized
  # Patches, two of time, output; of a block modulation, qkv, proj and MLP.
  assert len(table) == 4 + 5 * _DEPTH
  layers = integer.prepare(state)
  assert list(layers) == list(table)
  assert all(isinstance(x, integer.IntegerLayer) for x in layers.values())
  bits = {path: (q.w, q.a) for path, q in table.items()}
  edge = {path for path, pair in bits.items() if pair == (8, 8)}
  assert edge == {'patches', 'time_0', 'out'}
  assert set(bits.values()) == {(8, 8), (3, 8)}


def test_some_kernels_are_not_rounded_to_nearest(problem, quantized):
  table, state = quantized
  nearest = transform.init_state(problem.variables, table)
  moved = {
    path
    for path, layer in state.items()
    if (layer['weight'].codes != nearest[path]['weight'].codes).any()
  }
  assert moved and not moved & {'patches', 'time_0', 'out'}


def test_errors_are_those_of_both_networks(example, problem, quantized):
  """Means and variances again, from the two networks one by one."""
  _, state = quantized
  evaluate = jax.jit(problem.quantized(state))
  found = problem.fit_errors(state, _IMAGES)
  np.testing.assert_array_equal(
    found.error_models['tensor'].timesteps, problem.rows.t
  )
  label = np.arange(_IMAGES) % example.CLASSES
  _, x = problem.sample(
    problem.full_precision, 0, _IMAGES, collect=lambda step: step.x
  )
  for row, t in enumerate(problem.rows.t):
    at = x[row], np.full(_IMAGES, t, np.int32), label
    eps_q = np.asarray(evaluate(*at), np.float64)
    d = eps_q - np.asarray(problem.full_precision(*at), np.float64)
    kept = np.abs(d - d.mean()) <= 4 * d.std()
    model = found.error_models['tensor']
    # Another program adds up in another order: a rounding flips here or there.
    assert model.var_d[row] == pytest.approx(d[kept].var(), rel=0.02)
    assert model.mean_q[row] == pytest.approx(eps_q[kept].mean(), abs=1e-3)
    assert model.var_q[row] == pytest.approx(eps_q[kept].var(), rel=1e-3)


def test_arrays_and_chunks_give_the_same_statistics():
  rng = np.random.default_rng(0)
  x, eps, d = rng.normal(size=(3, 2, 6, 4, 4, 2))
  eps_q = eps + 0.1 * d + 0.2 * x
  found = statistics.fit_arrays([7, 3], x, eps, eps_q, settings={'a': 1})

  def points(t):
    row = [7, 3].index(t)
    for rows in (slice(0, 4), slice(4, 6)):
      yield eps_q[row, rows], eps[row, rows], x[row, rows]

  want = statistics.fit([7, 3], points, settings={'a': 1})
  for group in statistics.GROUPS:
    model = found.error_models[group]
    assert model.settings == {'a': 1}
    assert model.channel_wise == (group == 'channel')
    for name in model.names():
      np.testing.assert_allclose(
        getattr(model, name),
        getattr(want.error_models[group], name),
        rtol=1e-10,
        atol=1e-12,
      )
  # The error is mostly a multiple of x, which the linear map alone knows.
  assert (found.held_out.choice() >= 5).all()
  assert found.rows('none', [7, 3]) is None
  assert found.rows('d-d2', [7, 3]).scale.shape == (2, 1, 1, 1)
  assert found.rows('d-d2', [3], channel_wise=True).scale.shape == (1, 1, 1, 2)
  assert found.rows('auto', [7, 3]).weights.shape == (2, 4, 2)


@pytest.mark.parametrize(
  'shapes',
  [
    ((2, 6, 4, 4, 1),) * 2 + ((2, 5, 4, 4, 1),),
    ((3, 6, 4, 4, 1),) * 3,
    ((2, 6, 4, 4),) * 3,
  ],
)
def test_arrays_that_do_not_fit_are_refused(shapes):
  with pytest.raises(ValueError, match=r'\[2, N, H, W, C\]'):
    statistics.fit_arrays([7, 3], *map(np.ones, shapes))


def test_the_page_shows_the_example_as_it_is():
  """Code of docs/extend.md is code of the example."""
  text = (_ROOT / 'docs' / 'extend.md').read_text()
  source = (_ROOT / 'examples' / 'own_model.py').read_text()
  shown = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert len(shown) >= 5
  lines = {re.sub(r'\s+', ' ', line).strip() for line in source.splitlines()}
  for block in shown:
    for line in block.splitlines():
      plain = re.sub(r'\s+', ' ', line).strip()
      assert not plain or plain == '…' or plain in lines, line
