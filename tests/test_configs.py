"""Every experiment builds, and nothing in it is without effect."""

import importlib
import pathlib
import re

import jax
import pytest

from configs import common
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
  config = importlib.import_module(f'configs.{name}').get_config()
  ldm = setup.build(config)
  shapes = jax.eval_shape(ldm.init, jax.random.key(0))
  model = setup.Model(config, ldm, shapes, 'digest')
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
  rows = generation.rows_of(ldm, model.sampler)
  assert len(rows.t) == config.sampler.steps
  quantize.reconstruction_settings(quant)


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
