"""`--mode benchmark` for time: what it counts, chooses and writes."""

import dataclasses

import jax
import numpy as np
import pytest

from d2dpm_jax.pipelines import (
  artifacts,
  benchmark,
  kernel_choice,
  layer_bits,
  layer_speed,
  sample,
  setup,
  speed,
)
from d2dpm_jax.quantization import affine, integer, packing
from d2dpm_jax.runtime import files, timing

_PEAKS = {'float32': 1e9, 'bfloat16': 2e9, 'int8': 4e9, 'bytes': 1e9}


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch):
  monkeypatch.setattr(timing, 'peaks', lambda: _PEAKS)


@pytest.mark.parametrize(
  ('name', 'wanted'),
  [
    ('float32', ('float32', None, 'integer', 'float32')),
    ('bfloat16', ('bfloat16', None, 'integer', 'bfloat16')),
    ('w4a8', ('bfloat16', (4, 8), 'integer', 'int8')),
    ('w8a8-float32', ('float32', (8, 8), 'integer', 'int8')),
    ('w8a6-simulated', ('bfloat16', (8, 6), 'simulated', 'bfloat16')),
    ('w8a8-simulated-float32', ('float32', (8, 8), 'simulated', 'float32')),
  ],
)
def test_names_of_runs(name, wanted):
  run = speed.parse(name)
  assert (run.dtype, run.bits, run.execution, run.peak) == wanted


@pytest.mark.parametrize(
  ('field', 'value', 'text'),
  [
    ('runs', ('fp16',), "'fp16' is neither"),
    ('runs', ('w9a8',), '9 bits'),
    ('runs', (), 'to be given'),
    ('batch_sizes', (8, 0), 'below 1'),
    ('repeats', 0, 'repeats is 0'),
    ('max_seconds', -1.0, 'max_seconds is -1.0'),
  ],
)
def test_bad_settings(tiny, tmp_path, field, value, text):
  for what in ('sampling', 'layers'):
    config = tiny.config(benchmark__what=what)
    config.benchmark[field] = value
    with pytest.raises(ValueError, match=text):
      benchmark.run(config, str(tmp_path / 'work'))
  assert not (tmp_path / 'work').exists()


def test_sampling_is_timed_as_it_is_run(tiny, tmp_path, capsys, caplog):
  config = tiny.config(
    checkpoint__path='random:0',
    benchmark__what='sampling',
    benchmark__runs=('bfloat16,w4a8',),  # As of --config.benchmark.runs=a,b.
    benchmark__batch_sizes=(1,),
    benchmark__repeats=2,
  )
  benchmark.run(config, str(tmp_path))
  paths = files.Workdir.at(tmp_path)
  result = files.read_json(paths.benchmark('sampling.json'))
  assert result['peaks'] == _PEAKS
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[-2:]] == ['bfloat16', 'w4a8']
  images = jax.device_count()
  for run in result['runs']:
    seconds = run['seconds']
    assert 0 < seconds['least'] <= seconds['median'] <= seconds['most']
    assert run['images'] == images and run['finite']
    assert run['images_per_second'] == pytest.approx(images / seconds['median'])
    assert run['operations_per_second'] == pytest.approx(
      result['operations']['image'] / seconds['median']
    )
    assert run['compile']['compile'] > 0
    assert run['parameter_bytes'] < run['program_bytes']['arguments'] * 2
  floats, integers = (run['parameter_bytes'] for run in result['runs'])
  assert integers < floats


def test_no_run_begins_when_time_is_over(tiny, tmp_path, caplog):
  config = tiny.config(benchmark__what='sampling', benchmark__max_seconds=1e-9)
  benchmark.run(config, str(tmp_path))
  path = files.Workdir.at(tmp_path).benchmark('sampling.json')
  assert files.read_json(path)['runs'] == []
  assert caplog.text.count('max_seconds are over') == 12


def test_operations_of_an_image(tiny):
  """Those of the paper's model: 9.0 TFLOP with 20 guided steps."""
  found = speed.operations(tiny.model)
  steps = tiny.model.config.sampler.steps
  assert found['image'] == steps * found['step'] + found['decode']
  other = tiny.with_config(sampler__guidance_scale=1.0)
  assert speed.operations(other)['step'] * 2 == found['step']


@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('bits', [3, 4, 8])
def test_nearest_weights_on_the_host(bits, per_channel):
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(3, 3, 5, 4)).astype(np.float32)
  kernel[..., 0] = 0
  kernel[..., 1] = np.abs(kernel[..., 1])
  found = speed.nearest_on_host(kernel, bits, per_channel)
  want = packing.pack(affine.nearest_weight(kernel, bits, 'max', per_channel))
  np.testing.assert_allclose(found.scale, want.scale, rtol=1e-6)
  np.testing.assert_array_equal(found.zero_point, want.zero_point)
  assert (found.codes != want.codes).mean() < 0.02  # Ties, by a last bit.
  assert found.inputs == want.inputs and found.bits == bits


def test_uncalibrated_networks_run_on_integers(tiny):
  """Integers and floats agree, with any kernel for any layer."""
  run = speed.parse('w4a8-float32')
  model = speed.configured(tiny.model, run)
  qstate = speed.uncalibrated(model)
  table, _ = layer_bits.layer_policy(model)
  assert qstate.keys() == {path for path, bits in table.items() if bits}
  index = np.arange(2, dtype=np.int32)
  latents = {}
  for name, chosen in (('int8', ()), ('bfloat16', tuple(qstate))):
    prepared = integer.prepare(qstate, chosen)
    assert any(x.in_bfloat16 for x in prepared.values()) == bool(chosen)
    quantized = artifacts.Quantized(model, qstate, {})
    quantized = dataclasses.replace(
      quantized,
      prepared=prepared,
      model=dataclasses.replace(model, params=quantized.network_params()),
    )
    program = sample.batch_runner(quantized, 'none', False, False, 2, 0)
    latents[name] = program(index, index)['latents']
  distance = np.linalg.norm(latents['int8'] - latents['bfloat16'])
  assert distance <= 0.05 * np.linalg.norm(latents['int8'])


# ---- Layer by layer.


def _layers(tiny, path):
  config = tiny.config(
    benchmark__what='layers',
    benchmark__batch_sizes=(1,),
    benchmark__repeats=1,
  )
  benchmark.run(config, str(path))
  return files.Workdir.at(path).benchmark('layers.json')


@pytest.fixture(scope='module')
def layers_json(tiny, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timing, 'peaks', lambda: _PEAKS)
    patch.setattr(layer_speed, '_CALLS', 1)
    return _layers(tiny, tmp_path_factory.mktemp('layers'))


def test_every_layer_is_in_a_row(tiny, layers_json):
  rows = files.read_json(layers_json)['layers']
  found = {row['key']: row for row in rows}
  layers = layer_bits.list_layers(tiny.model)
  assert {kernel_choice.key(x) for x in layers} == found.keys()
  repeated = [
    x
    for x in layers
    if not any(s in x.path for s in ('attn2/', 'emb_layers', 'time_embed'))
  ]
  assert sum(row['count'] for row in rows) == len(repeated)
  for row in rows:
    for kernel, time in row['seconds'].items():
      assert time > 0 and row['roofline_seconds'][kernel] > 0


def test_slow_paths_are_told():
  rows = [
    {'example': str(i), 'count': count, 'seconds': {'int8': t, 'bfloat16': 1.0}}
    for i, (count, t) in enumerate([(1, 3.5), (1, 2.5), (0, 9.0)])
  ]
  assert layer_speed.much_slower({'layers': rows}) == ['0']


def test_rooflines(tiny):
  layers = {x.path: x for x in layer_bits.list_layers(tiny.model)}
  layer = layers['middle_block_0/in_layers_2']
  assert layer.kernel_shape == (3, 3, 32, 32)
  products = 2 * 6 * 16 * 9 * 32 * 32
  moved = 2 * 6 * (16 * 32 + 16 * 32)
  for kernel, peak, size in (
    ('bfloat16', 2e9, 2),
    ('int8', 4e9, 1),
    ('int8_packed', 4e9, 0.5),
  ):
    wanted = max(products / peak, (moved + size * 9 * 1024) / 1e9)
    found = layer_speed.roofline(layer, kernel, 6, _PEAKS)
    assert found == pytest.approx(wanted), kernel


def test_measured_times_choose_kernels(tiny, layers_json, tmp_path):
  data = files.read_json(layers_json)
  for i, row in enumerate(data['layers']):
    row['seconds'] = {'int8': 1.0, 'bfloat16_codes': 0.9 if i % 2 else 0.99}
  path = tmp_path / 'layers.json'
  files.write_json(path, data)
  model = tiny.with_config(quant__kernels=str(path))
  chosen, fused = kernel_choice.choose(model)
  assert not fused
  keys = {row['key'] for row in data['layers'][1::2]}
  layers = layer_bits.list_layers(model)
  wanted = {x.path for x in layers if kernel_choice.key(x) in keys}
  assert chosen == wanted and chosen
  with pytest.raises(FileNotFoundError, match='expected .auto.'):
    kernel_choice.choose(tiny.with_config(quant__kernels='int4'))
  del data['layers'][0]
  files.write_json(path, data)
  with pytest.raises(ValueError, match='has no times of'):
    kernel_choice.choose(model)
  files.write_json(path, {'layers': [{}]})
  with pytest.raises(ValueError, match='is no layers.json'):
    kernel_choice.choose(model)


def test_the_table_is_for_gpus(monkeypatch):
  from d2dpm_jax.configs import imagenet

  config = imagenet.get_config()
  model = setup.outline(config)
  assert not any(kernel_choice.choose(model))
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  chosen, fused = kernel_choice.choose(model)
  assert not fused
  assert {'input_blocks_0_0', 'input_blocks_1_0/in_layers_2', 'out_2'} <= chosen
  assert 'input_blocks_4_0/out_layers_3' not in chosen  # 32 x 32.
  assert 'output_blocks_9_0/in_layers_2' not in chosen  # 576 channels.
  block = 'input_blocks_4_1/transformer_blocks_0'  # Of 384 channels.
  assert f'{block}/ff/net_0/proj' in chosen
  assert f'{block}/ff/net_2' not in chosen  # Of 1536.
  config.quant.kernels = 'int8'
  assert not any(kernel_choice.choose(setup.outline(config)))


def test_fused_kernels_are_for_hopper(tiny, monkeypatch):
  from d2dpm_jax.configs import imagenet

  narrow = tiny.with_config(quant__kernels='fused', model__dtype='bfloat16')
  with pytest.raises(ValueError, match="compute capability 9.0.*take 'auto'"):
    kernel_choice.choose(narrow)
  config = imagenet.get_config()
  config.model.dtype = 'bfloat16'
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(kernel_choice, 'has_fused', lambda: True)
  for kernels in ('auto', 'fused'):
    config.quant.kernels = kernels
    # x_t has three channels; all other layers of the U-Net are taken.
    chosen = kernel_choice.choose(setup.outline(config))
    assert chosen == ({'input_blocks_0_0'}, True)
  config.quant.kernels = 'int8'
  assert not any(kernel_choice.choose(setup.outline(config)))
  # They compute in bfloat16.
  config.model.dtype = 'float32'
  config.quant.kernels = 'auto'
  chosen, fused = kernel_choice.choose(setup.outline(config))
  assert len(chosen) > 1 and not fused
  config.quant.kernels = 'fused'
  with pytest.raises(ValueError, match='for --config.model.dtype=bfloat16'):
    kernel_choice.choose(setup.outline(config))
