"""Batch sizes told from free memory, and the benchmark that measures rates."""

import hashlib
import json
import logging

import pytest
from d2dpm_jax.configs import imagenet

from d2dpm_jax.pipelines import batch_size, benchmark, sample, setup, throughput
from d2dpm_jax.pipelines.artifacts import full_precision
from d2dpm_jax.runtime import devices, files


@pytest.fixture
def program(tiny):
  return sample.batch_runner(
    full_precision(tiny.model), 'none', False, False, 2, 0
  ).program


def _chosen(monkeypatch, model, program, free):
  monkeypatch.setattr(devices, 'free_memory', lambda: free)
  return batch_size.choose(model, program)


def test_devices_that_do_not_tell_get_a_constant(tiny, program, monkeypatch):
  assert devices.free_memory() is None  # CPUs.
  assert program.unit == 16  # Eight devices, microbatches of 2.
  assert batch_size.choose(tiny.model, program) == 64
  monkeypatch.setattr(program, '_devices', 100)
  assert batch_size.choose(tiny.model, program) == 200


def test_whole_microbatches_as_many_as_fit(tiny, program, monkeypatch, caplog):
  ldm = tiny.model.ldm
  # Images of 8x8 bytes, and latents of 4x4x3 floats.
  assert batch_size.results_bytes(ldm) == 8 * 8 + 4 * 4 * 3 * 4
  need = 2 * batch_size.working(ldm)
  each = 3 * 2 * batch_size.results_bytes(ldm)
  for fit in (1, 2, 3, 4):
    free = (need + (fit + 0.5) * each) / 0.9
    assert _chosen(monkeypatch, tiny.model, program, free) == 16 * fit
  assert _chosen(monkeypatch, tiny.model, program, 1e12) == 64
  assert not caplog.records
  with caplog.at_level(logging.WARNING, 'd2dpm_jax'):
    assert _chosen(monkeypatch, tiny.model, program, 0.9 * need) == 16
  assert '--config.sample.microbatch=2 may need up to' in caplog.text


def test_what_an_image_takes_is_of_the_size_of_its_activations(tiny):
  """Between its largest layer, counted by hand, and a hundred of them."""
  # 32 channels at 4x4, twice with guidance; the decoder ends with 128 at 8x8.
  channels = tiny.model.ldm.first_stage.ch
  largest = 4 * max(2 * 32 * 4 * 4, channels * 8 * 8)
  assert largest <= batch_size.working(tiny.model.ldm) < 100 * largest


def test_the_benchmark_measures_a_job(tiny, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(throughput, '_STEADY_S', 0.2)
  config = tiny.config(
    sample__quantized=False,
    benchmark__what='job',
    benchmark__num_images=20,
  )
  benchmark.run(config, str(tmp_path))
  path = files.Workdir.at(tmp_path).benchmark('job.json')
  result = json.loads(path.read_text())
  assert result['devices'] == 8 and result['num_images'] == 20
  assert result['microbatch'] == 2 and result['batch_size'] == 64
  assert result['steady'] > 0 and result['end_to_end'] > 0
  assert result['share'] == result['end_to_end'] / result['steady']
  assert result['busy'] is None  # CPUs have no trace of their own.
  # The job's images are those of --mode sample.
  sample.run(tiny.config(sample__quantized=False, sample__num_images=20),
             str(tmp_path / 'again'))  # fmt: skip
  merged = tmp_path / 'again' / 'samples' / 'samples.npz'
  assert hashlib.sha256(merged.read_bytes()).hexdigest() == result['sha256']
  assert [p.name for p in path.parent.iterdir()] == ['job.json']
  assert 'end to end' in capsys.readouterr().out
  with pytest.raises(ValueError, match='benchmark.num_images is 0'):
    config.benchmark.num_images = 0
    benchmark.run(config, str(tmp_path))


@pytest.mark.parametrize(
  ('intervals', 'share'),
  [
    ([(0, 10)], 1.0),
    ([(0, 1), (3, 4)], 0.5),
    ([(5, 6), (0, 4), (1, 2), (3, 5), (8, 10)], 0.8),
  ],
)
def test_covered_time(intervals, share):
  assert throughput.covered(intervals) == pytest.approx(share)


def test_cin256_v2_fits_into_16_gb():
  """32 images at a time, told from shapes alone."""
  model = setup.outline(imagenet.get_config())
  assert 32 * batch_size.working(model.ldm) < 0.6 * 16e9
