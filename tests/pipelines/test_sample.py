"""Sampling: every switch acts, and what cannot be done is refused."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from helpers import contents

from d2dpm_jax.denoising import correction as corrections
from d2dpm_jax.models import latent_diffusion
from d2dpm_jax.pipelines import (
  artifacts,
  correction_cost,
  generation,
  sample,
)
from d2dpm_jax.reporting import comparison

_VARIANTS = {
  **{name: (name, False, False) for name in corrections.CORRECTIONS},
  's-d2, absorbing': ('s-d2', False, True),
  's-d2 by channel': ('s-d2', True, False),
  'd-d2 by channel': ('d-d2', True, False),
}


class _NoDecoder(latent_diffusion.LatentDiffusion):
  def decode(self, params, z):
    return z


@pytest.fixture
def with_noise(tiny, calibrated, monkeypatch):
  """Statistics of the calibration, with eta 0.5, where variances matter too.

  The network is one multiplication, so that many variants compile in little
  time; what a correction does to it is all the same.
  """
  monkeypatch.setattr(
    generation, '_eps_fn', lambda *_: (lambda x, t, table: 0.9 * x, None)
  )
  ldm = tiny.model.ldm
  fields = {f.name: getattr(ldm, f.name) for f in dataclasses.fields(ldm)}
  model = dataclasses.replace(
    tiny.with_config(sampler__eta=0.5), ldm=_NoDecoder(**fields)
  )
  error_models = {
    kind: dataclasses.replace(
      error_model,
      settings={
        **error_model.settings,
        'sampler': artifacts.sampler_settings(model),
      },
    )
    for kind, error_model in calibrated.quantized.error_models.items()
  }
  held_out = dataclasses.replace(
    calibrated.quantized.held_out, settings=error_models['tensor'].settings
  )
  return artifacts.Quantized(
    model, calibrated.quantized.qstate, error_models, held_out
  )


def test_each_correction_and_option_changes_the_latents(with_noise):
  index = np.arange(4, dtype=np.int32)
  latents = {
    name: sample.batch_runner(with_noise, *variant, 2, 0)(index, index)[
      'latents'
    ]
    for name, variant in _VARIANTS.items()
  }
  for name, value in latents.items():
    assert np.isfinite(value).all(), name
  for a, b in itertools.combinations(latents, 2):
    distance = np.abs(latents[a] - latents[b]).max(axis=(1, 2, 3))
    assert distance.min() > 1e-4, f'{a} and {b} give the same'


def test_what_corrections_cost(with_noise, monkeypatch, tmp_path):
  """With a clock on which auto takes half as long again as all others."""
  now, calls = [0.0], []

  def run(runner, index, labels):
    calls.append((len(index), labels.tolist()))
    now[0] += 0.4 if runner.inputs.correction_rows is None else 0.5
    if getattr(runner.inputs.correction_rows, 'weights', None) is not None:
      now[0] += 0.1

  monkeypatch.setattr(sample.Runner, '__call__', run)
  monkeypatch.setattr(correction_cost.time, 'perf_counter', lambda: now[0])
  model = with_noise.model
  config = model.config.copy_and_resolve_references()
  config.benchmark.repeats = 3
  timed = dataclasses.replace(
    with_noise, model=dataclasses.replace(model, config=config)
  )
  result = correction_cost.measure(timed)
  unit = config.sample.microbatch * 8  # Devices.
  kinds = len(corrections.CORRECTIONS)
  assert len(calls) == kinds * 4 and {size for size, _ in calls} == {unit}
  assert result['batch_size'] == unit
  found = result['corrections']
  assert found['none']['ms_per_step'] == pytest.approx(1000 * 0.4 / 4)
  assert found['d-d2']['added_percent'] == pytest.approx(25)
  assert found['auto']['added_percent'] == pytest.approx(50)
  assert found['auto']['added_quartiles'] == pytest.approx([50] * 3)
  text = correction_cost.table(result)
  assert re.search(r'auto +150.0000 +50.00', text)
  config.benchmark.repeats = 1
  with pytest.raises(ValueError, match='benchmark.repeats is 1'):
    correction_cost.measure(timed)


def test_full_precision_needs_no_calibration_and_no_correction(tiny):
  plain = artifacts.full_precision(tiny.model)
  for correction in ('d-d2', 'auto'):
    with pytest.raises(ValueError, match='no error statistics.*calibrate'):
      sample.batch_runner(plain, correction, False, False, 2, 0)


def test_statistics_of_another_sampler_are_refused(tiny, calibrated):
  other = tiny.with_config(sampler__guidance_scale=1.5)
  quantized = dataclasses.replace(calibrated.quantized, model=other)
  text = 'sampler.guidance_scale: saved 3.0, now 1.5'
  with pytest.raises(ValueError, match=text):
    sample.batch_runner(quantized, 'd-d2', False, False, 2, 0)


def test_statistics_of_other_points_are_named(calibrated, tiny, caplog):
  """Of quantized trajectories with another correction than is sampled with."""
  collected = {'trajectory': 'quantized', 'correction': 'd-d2'}
  collected |= {'channel_wise': True, 'absorb_variance': False}
  error_models = {
    kind: dataclasses.replace(
      error_model, settings={**error_model.settings, 'statistics': collected}
    )
    for kind, error_model in calibrated.quantized.error_models.items()
  }
  quantized = dataclasses.replace(
    calibrated.quantized, error_models=error_models
  )
  said = {}
  for correction, channel_wise in (
    ('d-d2', True),
    ('d-d2', False),
    ('ptqd', True),
    ('none', False),
    ('auto', True),  # Its statistics were collected with full precision.
  ):
    settings = tiny.config(
      sample__correction=correction, sample__channel_wise=channel_wise
    ).sample
    caplog.clear()
    sample._warn_of_other_points(quantized, settings)
    said[correction, channel_wise] = caplog.text
  assert 'sample.channel_wise=True;' in said.pop(('d-d2', False))
  assert "sample.correction='d-d2';" in said.pop(('ptqd', True))
  assert not any(said.values())


@pytest.mark.parametrize('labels', [[0, 4], [-1, 2]])
def test_labels_the_model_does_not_have(calibrated, labels):
  with pytest.raises(ValueError, match='has the classes 0..3'):
    sample.generate(
      calibrated.quantized,
      np.arange(2),
      np.array(labels),
      correction='none',
      channel_wise=False,
      absorb=False,
      batch_size=2,
      microbatch=2,
      seed=0,
    )


def test_given_labels_are_cycled_and_others_balanced(tiny):
  def labels(**overrides):
    model = tiny.with_config(**overrides)
    settings = model.config.sample
    index = np.arange(settings.num_images)
    return sample.labels_of(model, settings, index).tolist()

  assert labels(sample__labels=(3, 1), sample__num_images=5) == [3, 1, 3, 1, 3]
  found = labels(sample__num_images=12)
  assert np.bincount(found).tolist() == [3, 3, 3, 3]
  assert found != labels(sample__num_images=12, seed=1)
  assert found[:7] == labels(sample__num_images=7)


def test_distance_in_words():
  a = np.zeros((2, 4, 4, 1), np.uint8)
  b = a + np.uint8(51)  # A fifth of the range.
  assert '13.98 dB' in comparison.distance_text(a, b)
  assert '13.98 dB' in comparison.distance_text(b, a)  # No wrap-around.
  assert comparison.distance_text(a, a.copy()) == 'equal'


# ---- The whole mode, refusing.

_WRONG = {
  'label too high': (
    dict(sample__labels=(0, 4)),
    r'Labels \[0, 4\]: this model has the classes 0..3',
  ),
  'label too low': (dict(sample__labels=(-1,)), 'classes 0..3'),
  'label to compare': (
    dict(sample__labels=(7,), sample__compare=True),
    'classes 0..3',
  ),
  'correction': (
    dict(sample__correction='d-d3'),
    "sample.correction 'd-d3': expected one of .*'d-d2'",
  ),
  'microbatch': (dict(sample__microbatch=0), 'sample.microbatch is 0'),
  'batch size': (dict(sample__batch_size=-1), 'sample.batch_size is -1'),
  'number': (dict(sample__num_images=0), 'sample.num_images is 0'),
  'bits': (
    dict(quant__weight_bits=8),
    'quant.weight_bits: saved 4, now 8',
  ),
  'sampler': (dict(sampler__guidance_scale=1.5), '3.0.*1.5'),
  'steps': (dict(sampler__steps=5), 'sampler.steps: saved 4, now 5'),
  'too many steps': (dict(sampler__steps=1000), '1000'),
  'absorption': (
    dict(sample__absorb_variance=True),
    'sample.absorb_variance .* is an option of s-d2, not of auto',
  ),
}


@pytest.mark.parametrize('name', _WRONG)
def test_wrong_settings_are_named_and_nothing_is_written(
  calibrated, tiny, name
):
  overrides, text = _WRONG[name]
  before = contents(calibrated.paths.root)
  with pytest.raises(ValueError, match=text) as error:
    sample.run(tiny.config(**overrides), str(calibrated.paths.root))
  assert '\n' not in str(error.value)
  assert contents(calibrated.paths.root) == before


def test_no_calibration(tiny, tmp_path):
  with pytest.raises(FileNotFoundError, match='--mode calibrate first'):
    sample.run(tiny.config(), str(tmp_path / 'none'))
  assert not (tmp_path / 'none').exists()
