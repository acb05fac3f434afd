"""Every experiment builds, and nothing in it is without effect."""

import importlib
import pathlib
import re

import pytest
from d2dpm_jax.configs import common

from d2dpm_jax.pipelines import generation, layer_bits, quantize, setup

_ROOT = pathlib.Path(__file__).parents[1]
_NAMES = sorted(
  path.stem
  for path in (_ROOT / 'configs').glob('*.py')
  if path.stem not in ('__init__', 'common')
)
# Sections that are handed over as a whole, to what refuses unknown fields.
_WHOLE = ('sampler.', 'quant.reconstruction.')


def test_experiments_are_found():
  assert {'mnist', 'imagenet', 'lsun_bedrooms', 'lsun_churches'} <= set(_NAMES)


@pytest.mark.parametrize('name', _NAMES)
def test_rules_fit_the_network(name):
  """Each rule matches a layer, first and last layers get their own bits."""
  config = importlib.import_module(f'd2dpm_jax.configs.{name}').get_config()
  model = setup.outline(config)
  table, layers = layer_bits.layer_policy(model)
  assert [layer.path for layer in layers] == list(table)
  quant = config.quant
  edges = {
    'time_embed_0': 'dense', 'input_blocks_0_0': 'conv', 'out_2': 'conv'
  }  # fmt: skip
  kinds = {layer.path: layer.kind for layer in layers}
  for path, bits in table.items():
    if path in edges:
      assert (bits.w, bits.a, bits.reconstruct) == (8, 8, False)
      assert kinds[path] == edges[path]
    elif re.fullmatch(r'(.*/)?(skip_connection|op)', path):
      assert bits is None
    elif bits is not None:
      assert (bits.w, bits.a) == (quant.weight_bits, quant.act_bits)
      assert bits.reconstruct
  assert edges.keys() < table.keys()
  quantized = [bits for bits in table.values() if bits is not None]
  assert len(quantized) > 0.8 * len(table)
  # The sampler can be built, and reconstruction takes its settings.
  rows = generation.rows_of(model.ldm, model.sampler)
  assert len(rows.t) == config.sampler.steps
  quantize.reconstruction_settings(quant)


@pytest.mark.parametrize('name', _NAMES)
@pytest.mark.parametrize('words', ['', 'full', 'fast', 'paper_w8a8'])
def test_words_of_the_argument_are_independent(name, words):
  """A sampler word changes the sampler alone, in any place."""
  get_config = importlib.import_module(f'd2dpm_jax.configs.{name}').get_config
  want = setup.plain(get_config(words))
  conditional = want['model']['cond_stage'] is not None
  word = 's1.5_eta0.5_250' if conditional else 'eta0.5_250'
  want['sampler'] = {
    'steps': 250,
    'eta': 0.5,
    'guidance_scale': 1.5 if conditional else 1.0,
  }
  for order in ([words, word], [word, words]):
    found = get_config(','.join(filter(None, order)))
    assert setup.plain(found) == want
    found.sampler.eta = 1.0  # Stays a float field.


def test_words_of_the_paper():
  """What they stand for, as numbers."""
  config = importlib.import_module('d2dpm_jax.configs.imagenet').get_config(
    'paper_w8a8,s1.5_eta1_250'
  )
  assert setup.plain(config.sampler) == {
    'steps': 250, 'eta': 1.0, 'guidance_scale': 1.5
  }  # fmt: skip
  assert config.quant.weight_bits == 8 and not config.quant.per_channel
  config = importlib.import_module(
    'd2dpm_jax.configs.lsun_bedrooms'
  ).get_config('eta0_200,paper_w4a8')
  assert config.sampler.eta == 0 and config.sampler.guidance_scale == 1
  assert config.quant.float_layers == common.PAPER_FLOAT_LAYERS_LSUN
  assert config.quant.weight_bits == 4
  mnist = importlib.import_module('d2dpm_jax.configs.mnist')
  assert mnist.get_config('s3_eta1_20').calibration.num_samples == 128


@pytest.mark.parametrize(
  ('name', 'arg', 'parts'),
  [
    ('imagenet', 'quick', ("'quick' is unknown", 'paper_w4a8', 's3_eta0_20')),
    ('imagenet', 'fast,', ("'' is unknown",)),
    ('imagenet', 'eta1_200', ("'eta1_200' is unknown", 's3_eta0_20')),
    ('imagenet', 's3_eta1_0', ("'s3_eta1_0' is unknown",)),
    ('imagenet', 's3_eta1_20_', ('is unknown',)),
    ('imagenet', 's-3_eta1_20', ('is unknown',)),
    ('imagenet', 'fast,full', ('fast and full contradict', 'at most one')),
    ('imagenet', 's3_eta0_20,s3_eta1_20', ('s3_eta0_20 and s3_eta1_20',)),
    ('lsun_churches', 's3_eta0_20', ("'s3_eta0_20' is unknown", 'eta1_200')),
    ('lsun_churches', 'eta0_200,eta1_200', ('contradict',)),
  ],
)
def test_words_that_are_none(name, arg, parts):
  with pytest.raises(ValueError) as error:
    importlib.import_module(f'd2dpm_jax.configs.{name}').get_config(arg)
  for part in (repr(arg), *parts):
    assert part in str(error.value)


def test_every_field_is_read():
  """A field that no pipeline names would be a switch that does nothing."""
  source = '\n'.join(
    path.read_text()
    for path in (_ROOT / 'd2dpm_jax' / 'pipelines').glob('*.py')
  )
  unread = []

  def walk(config, prefix=''):
    for name, value in config.items():
      if hasattr(value, 'items'):
        walk(value, f'{prefix}{name}.')
      elif not f'{prefix}{name}'.startswith(_WHOLE):
        if not re.search(rf"\.{name}\b|'{name}'", source):
          unread.append(f'{prefix}{name}')

  walk(setup.plain(common.base_config()))
  assert not unread
