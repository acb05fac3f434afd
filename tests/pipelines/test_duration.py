"""Predicted times follow from what was measured, and say from what."""

import json
import re

import jax
import pytest

from d2dpm_jax.pipelines import duration, setup
from d2dpm_jax.runtime import files

_DEVICE = 'cpu'


@pytest.fixture
def paths(tmp_path):
  return files.Workdir.at(tmp_path)


@pytest.fixture(scope='module')
def model(tiny):
  return setup.outline(tiny.config('', sample__microbatch=4))


@pytest.fixture(scope='module')
def per_image(model, tmp_path_factory):
  paths = files.Workdir.at(tmp_path_factory.mktemp('empty'))
  found = duration.Sampling(model, paths).operations
  steps = model.config.sampler.steps
  assert found['image'] == steps * found['step'] + found['decode']
  return found['image']


def _write_lines(path, rows, rest=''):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n' + rest)


def _write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, value)


def _job(model, **changes):
  return {
    'device': _DEVICE,
    'devices': jax.local_device_count(),
    'dtype': model.config.model.dtype,
    'sampler': setup.plain(model.config.sampler),
    'quantized': True,
    'end_to_end': 5.0,
    **changes,
  }


def test_units_of_time():
  seconds = (0.4, 119, 120, 7_200, 8 * 86_400)
  want = ['0 s', '119 s', '2.0 min', '2.0 h', '8.0 days']
  assert [duration.text(s) for s in seconds] == want


def test_nothing_is_known(model, paths):
  sampling = duration.Sampling(model, paths)
  assert sampling.rate(True) is sampling.rate(False) is None
  lines = [sampling.images(64, True)]
  assert re.fullmatch(r'64 images, [\d.]+ GOP: not known', lines[0])
  hint = sampling.with_hint(lines)[-1]
  assert 'benchmark.what=sampling' in hint and "'(4,)'" in hint
  runs = re.search(r'runs="(\(.*\))"', hint)[1]
  assert runs == "('float32', 'w4a8-float32')"
  assert 'benchmark.what=evaluation' in duration.judging(model, paths)


def test_rate_of_a_job(model, paths, per_image):
  _write(paths.benchmark('job.json'), _job(model))
  sampling = duration.Sampling(model, paths)
  assert sampling.rate(True).per_second == pytest.approx(5 * per_image)
  line = sampling.images(600, True)
  assert line.startswith('600 images: about 2.0 min at ')
  assert 'benchmark/job.json' in line
  assert sampling.with_hint([line]) == [line]
  assert sampling.rate(False) is None


@pytest.mark.parametrize(
  'change',
  [{'device': 'H100'}, {'devices': 3}, {'dtype': 'bfloat16'}, {'sampler': {}}],
)
def test_other_jobs_tell_nothing(model, paths, change):
  _write(paths.benchmark('job.json'), _job(model, **change))
  assert duration.Sampling(model, paths).rate(True) is None


def test_rate_of_a_benchmark(tiny, model, paths, per_image):
  rates = {1: 1e9, 8: 3e9, 64: 9e9}
  runs = [
    {'run': run, 'batch_per_device': batch, 'operations_per_second': rate}
    for run in ('float32', 'w4a8')
    for batch, rate in rates.items()
  ]
  config = {'model': setup.plain(model.config.model)}
  result = {'device': _DEVICE, 'config': config, 'runs': runs}
  _write(paths.benchmark('sampling.json'), result)
  sampling = duration.Sampling(model, paths)
  rate = sampling.rate(False)  # Of microbatches of 4, nearest to 1.
  assert rate.per_second == rates[1] * jax.device_count()
  assert rate.basis == 'benchmark/sampling.json: float32, 1 at a time'
  assert sampling.rate(True) is None  # 'w4a8' is of bfloat16.
  longer = setup.outline(
    tiny.config('', sampler__steps=40, sample__microbatch=9)
  )
  image = duration.Sampling(longer, paths).operations['image']
  assert image > 2 * per_image
  line = duration.Sampling(longer, paths).images(1000, False)
  seconds = 1000 * image / (rates[8] * jax.device_count())
  assert f'about {duration.text(seconds)} ' in line
  for change in ({'device': 'H100'}, {'config': {'model': {}}}):
    _write(paths.benchmark('sampling.json'), {**result, **change})
    assert duration.Sampling(model, paths).rate(False) is None


def test_rate_of_images_that_are_there(model, paths, per_image):
  config = model.config
  settings = {
    'dtype': config.model.dtype,
    'microbatch': 4,
    'sampler': setup.plain(config.sampler),
    'quantized': False,
    'seed': 0,
  }
  _write(paths.shards / 'settings.json', settings)
  rows = [{'images_per_second': rate} for rate in (0.1, 4, 6, 5)]
  _write_lines(paths.samples / 'metrics.jsonl', rows, '{"images_per')
  _write(paths.benchmark('job.json'), _job(model, quantized=False))
  rate = duration.Sampling(model, paths).rate(False)
  assert rate.per_second == pytest.approx(5 * per_image)
  assert rate.basis == 'the images that are there'
  _write(paths.shards / 'settings.json', {**settings, 'microbatch': 8})
  assert 'job' in duration.Sampling(model, paths).rate(False).basis
  _write(paths.shards / 'settings.json', settings)
  _write_lines(paths.samples / 'metrics.jsonl', rows[:1])  # Of compiling.
  assert 'job' in duration.Sampling(model, paths).rate(False).basis


def test_cells_come_first(model, paths, per_image):
  _write(paths.benchmark('job.json'), _job(model))
  cells = {True: [1.0, 3.0, 2.0], False: []}
  sampling = duration.Sampling(model, paths, cells)
  assert sampling.rate(True).per_second == pytest.approx(2 * per_image)
  assert sampling.rate(False) is None


def test_learning_of_units(model, paths):
  names = [f'{phase}/{unit}' for phase in ('weight', 'act') for unit in 'abcd']
  what = duration.learning(model, paths, names)
  assert what.startswith('learning: 8 of 8 units left') and 'not known' in what
  rows = [{'unit': f'weight/{unit}', 'seconds': 100.0} for unit in 'ab']
  _write_lines(paths.calibration / 'metrics.jsonl', rows)
  assert 'not known' in duration.learning(model, paths, names)
  rows.append({'unit': 'act/a', 'seconds': 300.0})
  _write_lines(paths.calibration / 'metrics.jsonl', rows)
  what = duration.learning(model, paths, names)
  seconds = 2 * 100 + 3 * 300
  assert 'learning: 5 of 8 units left' in what
  assert f'about {duration.text(seconds)}, as those that are done' in what
  assert duration.learning(model, paths, names[:2]).endswith(
    '0 of 2 units left'
  )


def test_judging(model, paths):
  result = {
    'network': model.config.evaluate.network,
    'device': f'{jax.device_count()} x {_DEVICE}',
    'num_samples': 1500,
    'num_reference': 500,
    'total_s': 50.0,
  }
  _write(paths.benchmark('evaluation.json'), result)
  line = duration.judging(model, paths)
  assert line.startswith('about 4.2 min for each 10 000 images')
  assert '2000 in 50 s' in line
  _write(paths.benchmark('evaluation.json'), {**result, 'network': 'other'})
  assert 'not known' in duration.judging(model, paths)
