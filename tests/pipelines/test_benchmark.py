"""`--mode benchmark`, held against what the paper and its code print."""

import functools
import math

import pytest
from d2dpm_jax.configs import imagenet, lsun_bedrooms, lsun_churches

from d2dpm_jax.pipelines import benchmark, cost, layer_bits, setup
from d2dpm_jax.runtime import files

_SETTINGS = ('FP32', 'W8A8', 'W4A8')


@functools.cache
def _imagenet():
  return cost.measure(imagenet.get_config('paper_w4a8'))


def _values(key):
  return [_imagenet()['settings'][s][key] for s in _SETTINGS]


def _tera(key, digits):
  return [f'{value / 1e12:.{digits}f}' for value in _values(key)]


def test_layers_of_cin256_v2():
  network = _imagenet()['network']
  assert network['quantized_layers'] == 265
  assert network['float_layers'] == 18
  assert network['parameters'] == 400_920_579


def test_bit_operations_by_the_released_code():
  assert _tera('released_bops', 2) == ['140.16', '8.76', '4.38']


def test_exact_bit_operations():
  assert _tera('quantized_bops', 2) == ['196.40', '12.28', '6.14']
  assert _tera('layer_bops', 1) == ['204.3', '20.2', '14.1']
  assert _tera('network_bops', 1) == ['213.5', '29.3', '23.2']


def test_first_and_last_layers_count_at_their_own_bits():
  layers = {layer['path']: layer for layer in _imagenet()['layers']}
  assert layers['out_2']['settings']['W4A8']['w'] == 8
  assert layers['time_embed_2']['settings']['W4A8']['w'] == 4
  settings = _imagenet()['settings']
  edge = sum(
    layers[path]['macs']
    for path in ('time_embed_0', 'input_blocks_0_0', 'out_2')
  )
  uniform = settings['W8A8']['quantized_bops'] // 2
  assert settings['W4A8']['quantized_bops'] == uniform + 2 * edge * 4 * 8


def test_products_of_attention():
  """Queries with keys, weights with values: twice L x M x width, by hand."""
  wanted = 0
  # Tokens, width and number of the transformer blocks, by level.
  for tokens, width, blocks in ((1024, 384, 5), (256, 576, 5), (64, 960, 6)):
    own, class_token = tokens * tokens, tokens * 1
    wanted += blocks * 2 * width * (own + class_token)
  assert _imagenet()['network']['attention_macs'] == wanted


def test_the_papers_full_precision_is_one_operation_per_mac():
  """102.20: thop's count of all layers, and 4 per element of each LayerNorm."""
  layers = _imagenet()['layers']
  queries = [x for x in layers if x['path'].endswith('attn1/to_q')]
  elements = 0
  for layer in queries:  # Its input, like that of two more per block.
    _, tokens, width = layer['input_shape']
    elements += 3 * tokens * width
  count = _imagenet()['network']['layer_macs'] + 4 * elements
  assert f'{count * 32 * 32 / 1e12:.2f}' == '102.20'


def test_the_papers_sizes():
  checkpoint = 1_827_378_153  # Bytes of cin256-v2's file.
  overhead = checkpoint - _imagenet()['settings']['FP32']['released_bytes']
  assert 0 < overhead < 0.4 * 2**20
  found = [(value + overhead) / 2**20 for value in _values('released_bytes')]
  # Files have overheads of their own, of some KiB.
  assert found == pytest.approx([1742.72, 436.79, 219.12], abs=0.011)


def test_sizes_with_everything_that_stays_float():
  layers = [x for x in _imagenet()['layers'] if x['quantized']]
  kernels = sum(math.prod(x['kernel_shape']) for x in layers)
  edges = 192 * 768 + 2 * 9 * 3 * 192  # 8 bits in either setting
  grids = 265 * (2 * 6 + 3 * 4)  # of weights and input, a range per tensor
  kept = 4 * (400_920_579 - kernels) + grids
  unet = [4 * 400_920_579, kernels + kept, (kernels + edges) / 2 + kept]
  assert _values('unet_bytes') == unet
  settings = _imagenet()['settings'].values()
  rest = {x['model_bytes'] - x['unet_bytes'] for x in settings}
  assert rest == {4 * 55_322_782 + 4 * 1001 * 512 + 4}  # VQ-f4, classes, scale


def test_sizes_by_default():
  """What stays float is half as large, and its type is a choice."""
  settings = cost.measure(imagenet.get_config())['settings']
  full = settings['FP32']['unet_bytes']
  assert settings['W8A8']['unet_bytes'] <= 0.26 * full
  assert settings['W4A8']['unet_bytes'] <= 0.14 * full
  config = imagenet.get_config()
  config.quant.float_dtype = 'float32'
  wide = cost.measure(config)['settings']
  assert wide['FP32'] == settings['FP32']
  kept = 400_920_579 - sum(
    math.prod(x['kernel_shape'])
    for x in _imagenet()['layers']
    if x['quantized']
  )
  for name in ('W8A8', 'W4A8'):
    more = wide[name]['unet_bytes'] - settings[name]['unet_bytes']
    assert more == 2 * kept


@pytest.mark.parametrize(
  ('config', 'quantized', 'kept'),
  [(lsun_bedrooms, 73, 50), (lsun_churches, 109, 59)],
)
def test_layers_of_lsun_in_the_papers_presets(config, quantized, kept):
  model = setup.outline(config.get_config('paper_w4a8'))
  table, _ = layer_bits.layer_policy(model)
  assert sum(bits is not None for bits in table.values()) == quantized
  assert sum(bits is None for bits in table.values()) == kept


def test_writes_tables_and_numbers(tiny, tmp_path, capsys):
  config = tiny.config(benchmark__what='cost', quant__weight_bits=3)
  benchmark.run(config, str(tmp_path))
  said = capsys.readouterr().out
  paths = files.Workdir.at(tmp_path)
  result = files.read_json(paths.benchmark('cost.json'))
  assert set(result['settings']) == {'FP32', 'W8A8', 'W4A8', 'W3A8'}
  table = paths.benchmark('cost.txt').read_text()
  assert said.strip() in table
  for layer in result['layers']:
    assert f'{layer["path"]} ' in table
  values = result['settings']
  for less, more in (('W3A8', 'W4A8'), ('W4A8', 'W8A8'), ('W8A8', 'FP32')):
    for key, value in values[less].items():
      # A code of 3 bits takes as many as one of 4.
      packed = key in ('unet_bytes', 'model_bytes') and less == 'W3A8'
      assert value < values[more][key] + packed, (less, key)
  for name, value in values.items():
    layers = [layer['settings'][name] for layer in result['layers']]
    assert sum(each['bops'] for each in layers) == value['layer_bops']


def test_needs_no_weights(tiny, tmp_path):
  config = tiny.config(checkpoint__path=str(tmp_path / 'none'))
  assert cost.measure(config)['network']['parameters'] > 0


def test_an_unknown_name(tiny, tmp_path):
  config = tiny.config(benchmark__what='costs')
  with pytest.raises(ValueError, match=r"'costs'; expected one of \['cost'"):
    benchmark.run(config, str(tmp_path / 'work'))
  assert not (tmp_path / 'work').exists()
