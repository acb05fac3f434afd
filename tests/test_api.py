"""The notebook interface: the documented three lines, and its errors."""

import importlib.resources
import shutil

import numpy as np
import pytest
import tiny_config
from flax import traverse_util
from helpers import assert_error_models_equal, assert_trees_equal, contents

import d2dpm_jax as d2
from d2dpm_jax.evaluation import digits
from d2dpm_jax.pipelines import sample as sampling
from d2dpm_jax.pipelines import setup
from d2dpm_jax.runtime import weights
from d2dpm_jax.training import data


@pytest.fixture(scope='module')
def overrides(tiny):
  """What makes configs/mnist.py the tiny model, by dotted names."""
  config = setup.plain(tiny_config.get_config('few'))
  flat = traverse_util.flatten_dict(config, sep='.')
  flat = {k: v for k, v in flat.items() if not k.startswith('train.')}
  return {**flat, 'checkpoint.path': str(tiny.weights)}


@pytest.fixture(scope='module')
def model(overrides):
  return d2.load('mnist', overrides)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp('api') / 'work'


@pytest.fixture(scope='module')
def quantized(model, workdir):
  return d2.calibrate(model, weight_bits=4, act_bits=8, workdir=workdir)


def test_the_three_lines(model, quantized, workdir):
  again = d2.calibrate(model, weight_bits=4, act_bits=8)  # Keeps nothing.
  images = d2.sample(again, labels=[3] * 8, correction='d-d2')
  assert images.dtype == np.uint8 and images.shape == (8, 8, 8, 1)
  assert len(np.unique(images.reshape(8, -1), axis=0)) == 8
  # With a work directory it is the same calibration, and can be loaded.
  for other in (quantized, d2.load_quantized(model, workdir)):
    assert_trees_equal(other.qstate, again.qstate)
    assert_error_models_equal(other.error_models, again.error_models)
    np.testing.assert_array_equal(d2.sample(other, labels=[3] * 8), images)


def test_bits_are_those_asked_for_or_the_configs(model, quantized):
  bits = {path: s['weight'].bits for path, s in quantized.qstate.items()}
  assert bits['middle_block_0/in_layers_2'] == 4
  assert quantized.model.config.quant.weight_bits == 4
  with pytest.raises(ValueError, match='11'):  # Of the config, when not given.
    d2.calibrate(model, overrides={'quant.weight_bits': 11})


def test_sampling_options_act(quantized):
  def latents(**options):
    return d2.sample(quantized, [0, 1, 2, 3], **options)

  first = latents()
  np.testing.assert_array_equal(latents(batch_size=3), first)
  np.testing.assert_array_equal(
    d2.sample(quantized, [2, 3], first_index=2), first[2:]
  )
  assert (latents(seed=1) != first).any()
  assert (d2.sample(quantized, [1, 2, 3, 0]) != first).any()


def test_calibration_and_sampling_share_their_program(model, quantized):
  config = model.config
  run = sampling.batch_runner(
    quantized, 'auto', False, False, config.sample.microbatch, seed=0
  )
  compiled = run.program._sharded._cache_size()
  assert compiled
  for count in (1, 5, 8):
    labels = np.arange(count) % 4
    d2.sample(quantized, labels, batch_size=config.calibration.batch_size)
  assert run.program._sharded._cache_size() == compiled


def test_no_labels_is_one_of_each_class(quantized):
  np.testing.assert_array_equal(
    d2.sample(quantized), d2.sample(quantized, labels=[0, 1, 2, 3])
  )


def test_full_precision_is_sampled_without_correction(model, quantized):
  plain = d2.sample(model, labels=[0, 1])
  assert plain.shape == (2, 8, 8, 1)
  np.testing.assert_array_equal(
    plain, d2.sample(model, labels=[0, 1], correction='none')
  )
  assert (plain != d2.sample(quantized, labels=[0, 1])).any()


def test_a_calibration_is_found_whatever_ran_last(
  overrides, quantized, workdir, tmp_path
):
  """config.json is that of the latest command, perhaps with other steps."""
  shutil.copytree(workdir, tmp_path / 'work')
  (tmp_path / 'work' / 'config.json').write_text('{}')
  other = d2.load(
    'mnist', {**overrides, 'sampler.steps': 50, 'quant.weight_bits': 8}
  )
  found = d2.load_quantized(other, tmp_path / 'work')
  assert found.model.sampler.steps == 4
  assert found.model.config.quant.weight_bits == 4
  assert other.config.sampler.steps == 50  # Left as it was.
  assert_trees_equal(found.qstate, quantized.qstate)


def test_calibrate_leaves_the_model_as_it_was(model):
  before = setup.plain(model.config)
  with pytest.raises(ValueError):
    d2.calibrate(model, weight_bits=1)
  assert setup.plain(model.config) == before


def test_a_work_directory_is_gone_on_with_or_refused(model, quantized, workdir):
  before = contents(workdir / 'calibration')
  again = d2.calibrate(model, workdir=workdir)
  assert contents(workdir / 'calibration') == before
  assert_trees_equal(again.qstate, quantized.qstate)
  with pytest.raises(ValueError, match='quant.weight_bits: saved 4, now 8'):
    d2.calibrate(model, weight_bits=8, workdir=workdir)
  assert contents(workdir / 'calibration') == before


@pytest.mark.parametrize('name', ['minst', 'common', '', 'mnist.py', 'a.b'])
def test_unknown_config(name):
  with pytest.raises(ValueError, match='There is no config'):
    d2.load(name)


def test_unknown_argument_of_a_config():
  with pytest.raises(ValueError, match="'quick'"):
    d2.load('mnist:quick')


@pytest.mark.parametrize(
  'field',
  ['sampler.stepps', 'nothing', 'nothing.at_all', 'sampler.steps.more'],
)
def test_unknown_override(field):
  with pytest.raises(ValueError, match='Overrides'):
    d2.load('mnist', {field: 3})


def test_override_of_another_type():
  with pytest.raises(ValueError, match='Overrides'):
    d2.load('mnist', {'sampler.steps': 'many'})


def test_weights_that_are_not_there(overrides):
  with pytest.raises(FileNotFoundError, match='No weights at none'):
    d2.load('mnist', {**overrides, 'checkpoint.path': 'none.safetensors'})


@pytest.mark.parametrize('bits', [0, 1, 9])
def test_bits_out_of_range(model, bits):
  with pytest.raises(ValueError, match=str(bits)):
    d2.calibrate(model, act_bits=bits)


def test_unknown_override_of_a_calibration(model):
  with pytest.raises(ValueError, match='Overrides'):
    d2.calibrate(model, overrides={'quant.iters': 3})


@pytest.mark.parametrize('labels', [[4], [-1], [0, 99]])
def test_labels_out_of_range(quantized, labels):
  with pytest.raises(ValueError, match='has the classes 0..3'):
    d2.sample(quantized, labels)


def test_nothing_to_sample(quantized):
  with pytest.raises(ValueError, match='expected at least 1'):
    d2.sample(quantized, [])
  with pytest.raises(ValueError, match='expected at least 1'):
    d2.sample(quantized, [1], batch_size=0)


def test_unknown_correction(quantized):
  with pytest.raises(ValueError, match="'d-d3': expected one of"):
    d2.sample(quantized, [1], correction='d-d3')


def test_no_calibration(model, tmp_path):
  with pytest.raises(FileNotFoundError, match='--mode calibrate'):
    d2.load_quantized(model, tmp_path / 'none')


def test_unknown_name_of_the_package():
  with pytest.raises(AttributeError, match="no attribute 'samples'"):
    d2.samples  # noqa: B018
  assert sorted(d2.__all__) == ['calibrate', 'load', 'load_quantized', 'sample']


def test_the_embedded_model_draws_the_digits_it_is_asked_for():
  """Half the usual steps; the embedded classifier is the judge."""
  labels = np.tile(np.arange(10), 3)
  model = d2.load('mnist', {'sampler.steps': 10})
  images = d2.sample(model, labels)
  assert images.shape == (30, 32, 32, 1)
  path = importlib.resources.files('d2dpm_jax') / 'pretrained'
  params, _ = weights.load_safetensors(path / 'mnist_classifier.safetensors')
  logits = digits.DigitClassifier().apply(
    {'params': params}, data.to_float(images)
  )['logits']
  assert np.mean(np.argmax(logits, -1) == labels) >= 0.9
