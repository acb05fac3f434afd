"""Sampling on integers, and from a calibration without a checkpoint."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from d2dpm_jax.configs import mnist
from flax import traverse_util
from helpers import assert_error_models_equal, assert_trees_equal, contents

import d2dpm_jax as d2
from d2dpm_jax import api
from d2dpm_jax.pipelines import (
  artifacts,
  cost,
  experiment,
  generation,
  sample,
  setup,
  speed,
)
from d2dpm_jax.quantization import integer, integer_model, packing
from d2dpm_jax.runtime import files, weights


@pytest.fixture
def copy(calibrated, tmp_path):
  shutil.copytree(calibrated.paths.root, tmp_path / 'copy')
  return files.Workdir.at(tmp_path / 'copy')


def _with(tiny, calibrated, execution):
  model = tiny.with_config(quant__execution=execution)
  return dataclasses.replace(calibrated.quantized, model=model)


def _sample(quantized):
  index = np.arange(4, dtype=np.int32)
  run = sample.batch_runner(quantized, 'd-d2', False, False, 2, 0)
  return run(index, index)


@pytest.fixture(scope='module')
def sampled(tiny, calibrated):
  """By execution."""
  return {
    execution: _sample(_with(tiny, calibrated, execution))
    for execution in generation.EXECUTIONS
  }


def test_integer_execution_is_the_simulated_one(sampled):
  """After all steps of a network of random weights.

  Two programs may fuse a norm in two ways; where its last bit then flips a
  code, that image differs by a part of the quantization error.
  """
  found, want = (sampled[x]['latents'] for x in ('integer', 'simulated'))
  distances = np.linalg.norm((found - want).reshape(len(want), -1), axis=1)
  distances /= np.linalg.norm(want.reshape(len(want), -1), axis=1)
  assert np.median(distances) <= 1e-3 and distances.max() <= 0.05


@pytest.mark.usefixtures('full_compile')
@pytest.mark.parametrize('run', ['w8a8-float32', 'w4a8-float32'])
def test_the_embedded_model_agrees(run):
  """One forward, integers against the same whole numbers in float32."""
  model = setup.load(mnist.get_config())
  model = speed.configured(model, speed.parse(run))
  qstate = speed.uncalibrated(model)
  rng = np.random.default_rng(0)
  inputs = (
    rng.normal(size=(4, 8, 8, 3)).astype(np.float32),
    rng.integers(0, 1000, 4),
    model.ldm.context(model.params, np.arange(4)),
  )

  @jax.jit
  def forward(params, layers, inputs):
    layers = integer_model.ready(layers)
    apply = integer_model.apply(model.ldm.unet.apply)
    return apply({'params': params['unet']}, layers, *inputs)

  found, want = (
    forward(
      generation.network_params(model.params, layers, 'bfloat16'),
      layers,
      inputs,
    )
    for layers in (integer.prepare(qstate), integer.simulate(qstate))
  )
  assert np.linalg.norm(found - want) <= 1e-3 * np.linalg.norm(want)


def test_every_layer_runs_on_integers(tiny, calibrated):
  quantized = _with(tiny, calibrated, 'integer')
  layers = quantized.executable()
  assert layers.keys() == calibrated.quantized.qstate.keys()
  for path, layer in layers.items():
    assert isinstance(layer, integer.IntegerLayer), path
    bits = calibrated.quantized.qstate[path]['weight'].bits
    assert layer.kernel.dtype == (np.uint8 if bits <= 4 else np.int8)
    assert layer.bits == bits and layer.unpack_first  # On CPUs.


def test_experiments_run_it_too(tiny, calibrated, sampled):
  quantized = _with(tiny, calibrated, 'integer')
  found = _sample(experiment._on_device(experiment._executable(quantized)))
  np.testing.assert_array_equal(found['latents'], sampled['integer']['latents'])


@pytest.mark.parametrize('execution', generation.EXECUTIONS)
def test_sampling_needs_no_checkpoint(tiny, copy, sampled, caplog, execution):
  config = tiny.config(
    checkpoint__path='gone.safetensors',
    quant__execution=execution,
    sample__labels=(0, 1, 2, 3),
    sample__num_images=4,
    sample__microbatch=2,
  )
  with caplog.at_level('INFO'):
    sample.run(config, str(copy.root))
  assert 'No weights at gone.safetensors' in caplog.text
  assert f'{copy.quantized} alone' in caplog.text
  with np.load(copy.samples / 'samples.npz') as file:
    images = file['arr_0']
  np.testing.assert_array_equal(images, sampled[execution]['images'])


def test_what_needs_full_precision_says_so(tiny, copy):
  config = tiny.config(checkpoint__path='gone.safetensors')
  before = contents(copy.root)
  for field in ({'compare': True}, {'quantized': False}):
    config.sample.update({'compare': False, 'quantized': True, **field})
    with pytest.raises(FileNotFoundError, match='No weights at gone'):
      sample.run(config, str(copy.root))
  alone = artifacts.load_alone(config, copy)
  with pytest.raises(ValueError, match='no full-precision weights'):
    d2.sample(alone.model, labels=[0])
  assert contents(copy.root) == before


def test_alone_it_is_the_same(tiny, calibrated):
  config = tiny.config(checkpoint__path='gone.safetensors')
  found = artifacts.load_alone(config, calibrated.paths)
  want = artifacts.load(tiny.model, calibrated.paths)
  assert_trees_equal(found.qstate, want.qstate)
  assert_error_models_equal(found.error_models, want.error_models)
  assert found.model.identity() == want.model.identity()
  qstate = want.qstate
  assert_trees_equal(found.model.params, want.network_params())
  for layer in qstate.values():
    assert isinstance(layer['weight'], packing.PackedWeight)


def test_notebooks_need_no_checkpoint_either(tiny, calibrated, monkeypatch):
  config = tiny.config(checkpoint__path='gone', quant__weight_bits=8)
  monkeypatch.setattr(api, '_config', lambda name, overrides: config)
  found = d2.load_quantized('tiny', calibrated.paths.root)
  assert_trees_equal(found.qstate, calibrated.quantized.qstate)
  assert found.model.config.quant.weight_bits == 4
  assert found.model.digest == tiny.model.digest


def test_another_model_is_refused(tiny, calibrated):
  config = tiny.config()
  config.model.schedule.beta_end = 0.5
  with pytest.raises(ValueError, match=r'beta_end: saved .*, now 0.5'):
    artifacts.load_alone(config, calibrated.paths)


def test_parameters_that_are_missing_are_named(tiny, copy):
  tree, meta = weights.load_tree(copy.quantized)
  del tree['params']['unet']['out_2']['bias']
  weights.save_tree(copy.quantized, tree, meta)
  with pytest.raises(ValueError, match='unet/out_2/bias is missing'):
    artifacts.load_alone(tiny.config(), copy)


def test_another_format_is_refused(tiny, copy):
  tree, meta = weights.load_tree(copy.quantized)
  weights.save_tree(copy.quantized, tree['layers'], {**meta, 'format': 1})
  text = 'has format 1, but this version reads format 3: run --mode calibrate'
  with pytest.raises(ValueError, match=text):
    artifacts.load(tiny.model, copy)
  with pytest.raises(ValueError, match=text):
    artifacts.load_alone(tiny.config(), copy)


def test_unknown_execution(tiny, calibrated, tmp_path):
  config = tiny.config(quant__execution='int8')
  with pytest.raises(ValueError, match="'int8': expected one of .'simulated'"):
    sample.run(config, str(calibrated.paths.root))


def test_sizes(tiny, calibrated, caplog):
  """Stored codes of 4 bits take half a byte; what is on disk agrees."""
  sizes = {
    execution: artifacts.unet_bytes(_with(tiny, calibrated, execution))
    for execution in generation.EXECUTIONS
  }
  unet = tiny.model.params['unet']
  assert sizes['integer']['float32'] == sum(
    x.nbytes for x in jax.tree.leaves(unet)
  )
  predicted = cost.measure(tiny.config())['settings']['W4A8']
  assert predicted['unet_bytes'] == sizes['integer']['stored']
  tree, _ = weights.load_tree(calibrated.paths.quantized)
  stored = jax.tree.leaves([tree['layers'], tree['params']['unet']])
  codes = sum(s['weight']['data'].nbytes for s in tree['layers'].values())
  for size in sizes.values():
    assert size['stored'] == sum(x.nbytes for x in stored)
    assert size['stored'] < 0.25 * size['float32']
  device = sizes['integer']['device']
  assert codes < device <= sizes['integer']['stored']
  parts = artifacts.stored_parts(calibrated.quantized)
  assert parts['codes'] == codes
  params = traverse_util.flatten_dict(tree['params']['unet'])
  assert all(x.dtype == 'bfloat16' for x in params.values())
  assert parts['kernels'] == sum(
    x.nbytes for name, x in params.items() if name[-1] == 'kernel'
  )
  assert sizes['simulated']['device'] > 0.9 * sizes['simulated']['float32']
  with caplog.at_level('INFO'):
    artifacts.log_sizes(_with(tiny, calibrated, 'integer'))
  assert 'integer execution' in caplog.text
