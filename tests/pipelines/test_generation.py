"""An image depends on its number and the seed, not on how it was run."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util

from d2dpm_jax.pipelines import artifacts, calibrate, generation, sample

pytestmark = pytest.mark.usefixtures('full_compile')

_TESTS = pathlib.Path(__file__).parents[1]
_MODELS = {'full_precision': 'none', 'quantized': 'd-d2'}


@pytest.fixture(scope='module')
def one_device(tiny, calibrated, tmp_path_factory):
  """What tests/pipelines/one_device.py makes, on one device."""
  target = tmp_path_factory.mktemp('one_device') / 'out.npz'
  flags = os.environ['XLA_FLAGS'].split()
  # Programs as users get them: see tests/conftest.py.
  dropped = ('device_count', 'fusion_emitters')
  kept = [f for f in flags if not any(name in f for name in dropped)]
  script = _TESTS / 'pipelines' / 'one_device.py'
  done = subprocess.run(
    [sys.executable, script, tiny.weights, calibrated.paths.root, target],
    env={
      **os.environ,
      'XLA_FLAGS': ' '.join(kept),
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
      'PYTHONPATH': f'{_TESTS.parent}{os.pathsep}{_TESTS}',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  with np.load(target) as file:
    return dict(file)


@pytest.fixture(scope='module')
def runners(tiny, calibrated):
  """(index, labels, seed=0) -> images and latents, on eight devices."""
  # Another microbatch than in other tests, whose programs are compiled with
  # fewer optimizations: these are what users get.
  sources = {
    'full_precision': artifacts.full_precision(tiny.model),
    'quantized': calibrated.quantized,
  }

  def runner(name):
    def run(index, labels, seed=0):
      batch = sample.batch_runner(
        sources[name], _MODELS[name], False, False, 4, seed
      )
      return batch(np.asarray(index, np.int32), np.asarray(labels, np.int32))

    return run

  return {name: runner(name) for name in _MODELS}


@pytest.mark.parametrize('name', _MODELS)
def test_batch_size_has_no_effect(one_device, name):
  """Not even on the last bit, which a quantized network would amplify."""
  for key in ('latents', 'images'):
    part = one_device[f'{name}/1/{key}']
    whole = one_device[f'{name}/30/{key}']
    np.testing.assert_array_equal(part, whole[: len(part)])


def test_images_are_not_trivial(one_device):
  for name in _MODELS:
    latents = one_device[f'{name}/30/latents']
    images = one_device[f'{name}/30/images']
    assert latents.shape == (30, 4, 4, 3) and np.isfinite(latents).all()
    assert images.shape == (30, 8, 8, 1) and images.dtype == np.uint8
    assert len(np.unique(images.reshape(30, -1), axis=0)) == 30
  difference = (
    one_device['quantized/30/latents'] - one_device['full_precision/30/latents']
  )
  assert np.abs(difference).min(axis=(1, 2, 3)).max() > 0
  assert np.abs(difference).max(axis=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize('name', _MODELS)
def test_eight_devices_equal_one(one_device, runners, tiny, name):
  index = np.arange(10)
  labels = generation.balanced_labels(0, index, tiny.model.num_classes)
  out = runners[name](index, labels)
  want = one_device[f'{name}/30/latents'][:10]
  # The same microbatches run the same program but for its partitioning.
  np.testing.assert_allclose(out['latents'], want, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(
    out['images'], one_device[f'{name}/30/images'][:10]
  )


@pytest.mark.parametrize('name', _MODELS)
def test_an_image_depends_on_seed_number_and_label_alone(runners, name):
  run = runners[name]
  index, labels = np.arange(10), np.arange(10) % 4
  first = run(index, labels)
  again = run(index, labels)
  for key in ('latents', 'images'):
    np.testing.assert_array_equal(first[key], again[key])
  # Other neighbours, another place in the batch, another device.
  chosen = np.array([7, 2, 9])
  some = run(chosen, labels[chosen])
  np.testing.assert_array_equal(some['latents'], first['latents'][chosen])
  changes = {
    'seed': run(index, labels, seed=1),
    'number': run(index + 100, labels),
    'label': run(index, (labels + 1) % 4),
  }
  for what, other in changes.items():
    distance = np.abs(other['latents'] - first['latents'])
    assert distance.max(axis=(1, 2, 3)).min() > 1e-3, what


@pytest.mark.parametrize('count', [1, 9, 33])
def test_a_program_with_more_room_makes_the_same_images(tiny, count):
  """8 devices, microbatches of 4: parts of one, and more than one each."""
  run = sample.batch_runner(
    artifacts.full_precision(tiny.model), 'none', False, False, 4, 0
  )
  index = np.arange(count, dtype=np.int32)
  labels = generation.balanced_labels(0, index, tiny.model.num_classes)
  launched = run.launch(index, labels, room=64)
  want = run(index, labels)
  for key, found in launched.fetch().items():
    np.testing.assert_array_equal(found, want[key])
  assert list(run.launch(index, labels, room=64).fetch('images')) == ['images']


def test_batches_of_all_sizes_share_one_program(tiny):
  run = sample.batch_runner(
    artifacts.full_precision(tiny.model), 'none', False, False, 4, 0
  )
  index = np.arange(64, dtype=np.int32)
  labels = generation.balanced_labels(0, index, tiny.model.num_classes)
  sizes = [len(run.launch(index, labels).fetch('images')['images'])]
  compiled = run.program._sharded._cache_size()
  for count in (1, 8, 63):
    launched = run.launch(index[:count], labels[:count], room=64)
    sizes.append(len(launched.fetch('images')['images']))
  assert sizes == [64, 1, 8, 63]
  assert run.program._sharded._cache_size() == compiled


@pytest.mark.parametrize('classes', [1, 4, 10])
def test_labels_are_balanced_in_every_whole_block(classes):
  labels = generation.balanced_labels(3, np.arange(6 * classes), classes)
  assert labels.dtype == np.int32
  for block in labels.reshape(6, classes):
    assert sorted(block) == list(range(classes))


def test_label_of_an_image_depends_on_its_number_alone():
  whole = generation.balanced_labels(0, np.arange(1000), 10)
  chosen = np.array([999, 3, 500, 501, 3])
  np.testing.assert_array_equal(
    generation.balanced_labels(0, chosen, 10), whole[chosen]
  )
  np.testing.assert_array_equal(
    generation.balanced_labels(0, np.arange(37, 74), 10), whole[37:74]
  )


def test_labels_are_shuffled_anew_in_every_block_and_seed():
  blocks = generation.balanced_labels(0, np.arange(200), 10).reshape(20, 10)
  assert len(np.unique(blocks, axis=0)) > 15
  other = generation.balanced_labels(1, np.arange(200), 10).reshape(20, 10)
  assert (blocks != other).any(1).sum() > 15


@pytest.mark.parametrize('execution', generation.EXECUTIONS)
def test_no_program_has_empty_arguments(tiny, calibrated, execution):
  """XLA of jaxlib 0.11 crashes on them where there are several devices."""
  model = tiny.with_config('', quant__execution=execution)
  quantized = dataclasses.replace(calibrated.quantized, model=model)
  run = sample.batch_runner(quantized, 'd-d2', False, False, 1, 0)
  kernels = [x for x in jax.tree.leaves(run.inputs.params) if not x.size]
  assert len(kernels) == len(quantized.qstate)
  index = np.arange(8, dtype=np.int32)
  lowered = run.program.lower(run.inputs, index, index % 4)
  assert all(0 not in x.shape for x in jax.tree.leaves(lowered.args_info))


def test_guidance_is_an_argument_of_programs(tiny):
  """One of them serves all scales, but for 1: the network runs once there."""
  index = np.arange(8, dtype=np.int32)
  latents, compiled, operations = [], [], []
  for scale in (1.0, 2.0, 3.0):
    model = tiny.with_config('', sampler__guidance_scale=scale)
    run = sample.batch_runner(
      artifacts.full_precision(model), 'none', False, False, 1, 0
    )
    latents.append(run(index, index % 4)['latents'])
    compiled.append(run.program._sharded._cache_size())
    lowered = run.program.lower(run.inputs, index, index % 4)
    operations.append(lowered.cost_analysis()['flops'])
  assert compiled[0] < compiled[1] == compiled[2]
  assert operations[0] < operations[1] == operations[2]
  assert (latents[1] != latents[2]).any()


def test_what_stays_float_is_rounded(tiny, calibrated):
  """Of the quantized network alone, by 2**-8 at most, and as is said."""
  want = traverse_util.flatten_dict(tiny.model.params['unet'])
  for dtype in generation.FLOAT_DTYPES:
    found = generation.network_params(
      tiny.model.params, {**calibrated.quantized.qstate}, dtype
    )
    assert found['first_stage'] is tiny.model.params['first_stage']
    for name, x in traverse_util.flatten_dict(found['unet']).items():
      if not x.size:
        assert '/'.join(name[:-1]) in calibrated.quantized.qstate
        continue
      assert x.dtype == dtype
      error = np.abs(np.float32(x) - want[name])
      bound = 2.0**-8 if dtype == 'bfloat16' else 0
      assert (error <= bound * np.abs(want[name])).all()
  same = generation.network_params(tiny.model.params, {}, 'bfloat16')
  assert same is tiny.model.params


def test_rounding_floats_changes_little(tiny):
  """Far less than quantization does; the output is still of that order."""
  apply = jax.jit(tiny.model.ldm.unet.apply)
  rng = np.random.default_rng(0)
  inputs = (
    rng.normal(size=(2, 4, 4, 3)).astype(np.float32),
    np.asarray([10, 700]),
    tiny.model.ldm.context(tiny.model.params, np.arange(2)),
  )
  params = tiny.model.params['unet']
  rounded = jax.tree.map(lambda x: x.astype('bfloat16'), params)
  want, found = (apply({'params': p}, *inputs) for p in (params, rounded))
  assert found.dtype == np.float32
  distance = np.linalg.norm(found - want) / np.linalg.norm(want)
  assert 1e-4 < distance < 1e-2


def test_unknown_type_of_floats(tiny, tmp_path):
  config = tiny.config(quant__float_dtype='float16')
  with pytest.raises(
    ValueError, match=r"quant.float_dtype 'float16': expected"
  ):
    calibrate.run(config, str(tmp_path / 'work'))
  assert not (tmp_path / 'work').exists()
