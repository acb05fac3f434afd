"""Building the model and finding its weights, or saying what is wrong."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_config
from helpers import assert_trees_equal, contents

from d2dpm_jax.pipelines import setup
from d2dpm_jax.runtime import files, weights


def test_loads_safetensors(tiny):
  model = tiny.model
  assert_trees_equal(model.params, weights.load_safetensors(tiny.weights)[0])
  assert model.num_classes == 4  # Five with the null class.
  assert model.ldm.latent_shape == (4, 4, 3)
  assert dataclasses.asdict(model.sampler) == dict(
    steps=4, eta=0.0, guidance_scale=3.0
  )


def test_loads_a_directory_and_the_work_directorys_own(tiny, tmp_path):
  """The same weights are the same model, wherever they lie."""
  paths = files.Workdir.at(tmp_path / 'work')
  weights.save_tree(paths.params, tiny.model.params, {})
  for path in ('', str(paths.params)):
    model = setup.load(tiny.config(checkpoint__path=path), paths)
    assert_trees_equal(model.params, tiny.model.params)
    assert model.identity() == tiny.model.identity()


def test_identity_tells_weights_and_architectures_apart(tiny, tmp_path):
  params = jax.tree.map(np.copy, tiny.model.params)
  params['unet']['out_2']['bias'][0] += 1e-6
  path = tmp_path / 'x.safetensors'
  weights.save_safetensors(path, params, {})
  model = setup.load(tiny.config(checkpoint__path=str(path)))
  assert model.digest != tiny.model.digest
  # Same shapes, other network: heads have none.
  model = setup.load(tiny.config(model__unet__num_heads=2))
  assert model.digest == tiny.model.digest
  assert model.identity() != tiny.model.identity()
  # The compute dtype is not part of what artifacts depend on.
  model = setup.load(tiny.config(model__dtype='bfloat16'))
  assert model.identity() == tiny.model.identity()


def test_embedded_model_is_that_of_the_config():
  from d2dpm_jax.configs import mnist

  model = setup.load(mnist.get_config())
  assert model.num_classes == 10
  leaves = jax.tree.leaves(model.params)
  assert all(np.isfinite(leaf).all() for leaf in leaves)
  assert all(leaf.dtype == np.float32 for leaf in leaves)


def _save(tiny, path, change):
  params = jax.tree.map(np.copy, tiny.model.params)
  change(params)
  weights.save_safetensors(path, params, {})
  return tiny.config(checkpoint__path=str(path))


def test_every_misfit_is_named(tiny, tmp_path):
  def change(params):
    del params['unet']['time_embed_0']['bias']
    params['unet']['time_embed_9'] = {'bias': np.zeros(3)}
    params['unet']['out_2']['bias'] = np.zeros(7)

  config = _save(tiny, tmp_path / 'x.safetensors', change)
  with pytest.raises(ValueError) as error:
    setup.load(config)
  for part in (
    str(tmp_path / 'x.safetensors'),
    'unet/time_embed_0/bias is missing',
    'unet/time_embed_9/bias is unknown',
    'unet/out_2/bias is (7,), not (3,)',
  ):
    assert part in str(error.value)


def test_another_architecture_is_refused_in_one_line(tiny):
  with pytest.raises(ValueError, match='does not fit config.model') as error:
    setup.load(tiny.config(model__unet__model_channels=64))
  text = str(error.value)
  assert 'is (3, 3, 3, 32), not (3, 3, 3, 64)' in text
  assert ' more.' in text and len(text) < 1000 and '\n' not in text


def test_weights_that_say_whose_they_are_are_believed(tiny, tmp_path):
  """Shapes alone would fit."""
  path = tmp_path / 'x.safetensors'
  described = setup.plain(tiny_config.get_config().model)
  weights.save_safetensors(path, tiny.model.params, {'model': described})
  setup.load(tiny.config(checkpoint__path=str(path)))
  other = tiny.config(
    checkpoint__path=str(path), model__schedule__beta_end=0.0155
  )
  with pytest.raises(ValueError, match='beta_end: saved 0.0195, now 0.0155'):
    setup.load(other)


@pytest.mark.parametrize(
  ('path', 'text'),
  [
    ('pretrained:cifar', 'pretrained:cifar.*no embedded model.*mnist_ldm'),
    ('no/such/place', "No weights at no/such/place.*'pretrained:mnist'"),
    ('none.safetensors', 'No weights at none.safetensors'),
  ],
)
def test_weights_that_are_not_there(tiny, path, text):
  with pytest.raises(FileNotFoundError, match=text):
    setup.load(tiny.config(checkpoint__path=path))


def test_no_path_and_no_work_directory(tiny):
  with pytest.raises(ValueError, match='checkpoint.path is not set'):
    setup.load(tiny.config(checkpoint__path=''))


def test_text_under_the_name_of_weights(tiny, tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_text('Not Found\n' * 20)
  with pytest.raises(ValueError, match='x.safetensors is damaged or no'):
    setup.load(tiny.config(checkpoint__path=str(path)))


def test_unknown_field_of_the_model(tiny):
  config = tiny.config()
  with config.unlocked():
    config.model.unet.num_layers = 3
  with pytest.raises(ValueError, match="unet: unknown keys .'num_layers'"):
    setup.load(config)


def test_guidance_without_classes_is_refused(tiny):
  config = tiny.config(model__unet__use_spatial_transformer=False)
  with config.unlocked():
    config.model.cond_stage = None
    config.model.unet.context_dim = None
  with pytest.raises(ValueError, match='guidance_scale is 3.0.*unconditional'):
    setup.load(config)


def test_begin_records_the_resolved_config(tiny, tmp_path):
  paths = files.Workdir.at(tmp_path / 'a' / 'work')
  config = tiny.config(sampler__eta=0.25)
  setup.begin(config, paths)
  assert list(contents(paths.root)) == ['config.json']
  found = files.read_json(paths.config)
  assert found['sampler'] == dict(steps=4, eta=0.25, guidance_scale=3.0)
  assert not files.differences(found, setup.plain(config))


def test_plain_leaves_no_config_dict():
  plain = setup.plain(tiny_config.get_config())

  def walk(value):
    assert type(value) in (dict, tuple, str, int, float, bool, type(None))
    for inner in value.values() if isinstance(value, dict) else ():
      walk(inner)
    for inner in value if isinstance(value, tuple) else ():
      walk(inner)

  walk(plain)
  assert plain['quant']['block_types'] == ('ResBlock', 'BasicTransformerBlock')


def test_random_weights_need_no_file(tiny, caplog):
  config = tiny.config(checkpoint__path='random:3')
  with caplog.at_level('WARNING'):
    model = setup.load(config)
  assert 'The weights are random (random:3)' in caplog.text
  assert model.digest == setup.load(config).digest
  other = setup.load(tiny.config(checkpoint__path='random:4'))
  assert other.digest != model.digest
  for path, value in jax.tree_util.tree_leaves_with_path(model.params):
    assert value.dtype == np.float32
    if path[-1].key == 'kernel':
      assert value.all(), path
      assert value.std() * np.prod(value.shape[:-1]) ** 0.5 < 1.3, path
  x = np.ones([2, *model.ldm.latent_shape], np.float32)
  eps = model.ldm.eps(
    model.params, x, np.array([1, 900]), np.ones([2, 1, 16], np.float32)
  )
  assert np.isfinite(eps).all() and 0.05 < np.std(eps) < 20


@pytest.mark.parametrize('path', ['random:', 'random:x', 'random:-1'])
def test_random_weights_take_a_seed(tiny, path):
  with pytest.raises(ValueError, match='expected a seed, as in random:0'):
    setup.load(tiny.config(checkpoint__path=path))


def test_an_outline_has_the_shapes_of_the_model(tiny):
  model = setup.outline(tiny.config(checkpoint__path='none'))
  assert model.ldm == tiny.model.ldm
  found = jax.tree.map(lambda x: (x.shape, x.dtype), model.params)
  wanted = jax.tree.map(lambda x: (x.shape, x.dtype), tiny.model.params)
  assert found == wanted
