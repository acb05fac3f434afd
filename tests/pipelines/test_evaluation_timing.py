import collections
import json
import shutil

import numpy as np
import pytest
from d2dpm_jax.configs import mnist

from d2dpm_jax.pipelines import benchmark, evaluation_timing
from d2dpm_jax.runtime import files


@pytest.fixture
def config():
  found = mnist.get_config()
  found.benchmark.update(what='evaluation', num_samples=30, num_reference=20)
  found.evaluate.batch_size = 16
  return found


def test_every_part_is_timed_and_nothing_is_left(config, tmp_path, capsys):
  config.lock()
  benchmark.run(config, str(tmp_path))
  written = json.loads((tmp_path / 'benchmark/evaluation.json').read_text())
  assert (written['num_samples'], written['num_reference']) == (30, 20)
  assert written['image_shape'] == [32, 32, 1]
  assert written['network'] == 'digits'
  parts = {
    'reference',
    'features',
    'FID',
    'sFID',
    'inception score',
    'precision and recall',
  }
  assert set(written['seconds']) == parts
  assert 0 < sum(written['seconds'].values()) <= written['total_s']
  assert written['reading_alone_s'] > 0
  printed = capsys.readouterr().out
  assert printed.startswith('30 images of 32 x 32 x 1, 20 of the reference')
  assert all(part in printed for part in parts)
  assert [p.name for p in (tmp_path / 'benchmark').iterdir()] == [
    'evaluation.json'
  ]
  # The config goes on to mean what it meant.
  assert config.evaluate.reference == 'pretrained:mnist'


def test_inception_without_weights_is_random(config, tmp_path, monkeypatch):
  config.evaluate.network = 'inception'
  seen = []

  def stop(config, paths, times):
    seen.append(dict(config.evaluate))
    with np.load(config.evaluate.samples) as file:
      seen.append(file['arr_0'].shape)
    raise ValueError('seen')

  monkeypatch.setattr(evaluation_timing.evaluate, 'evaluate', stop)
  with pytest.raises(ValueError, match='seen'):
    benchmark.run(config, str(tmp_path))
  assert seen[0]['inception'] == 'random:0'
  assert seen[1] == (30, 32, 32, 3)
  assert not list((tmp_path / 'benchmark').iterdir())


def test_images_are_written_as_numpy_reads_them(tmp_path):
  path, shape = tmp_path / 'x.npz', (70, 20, 12, 3)
  evaluation_timing.write_images(path, shape, 3)
  with np.load(path) as file:
    images = file['arr_0']
  assert images.shape == shape and images.dtype == np.uint8
  assert len({image.tobytes() for image in images}) == 70
  assert path.stat().st_size > images.nbytes
  evaluation_timing.write_images(tmp_path / 'y.npz', shape, 3)
  with np.load(tmp_path / 'y.npz') as file:
    np.testing.assert_array_equal(file['arr_0'], images)


def test_too_few_images_and_too_small_a_disk(config, tmp_path, monkeypatch):
  paths = files.Workdir.at(tmp_path)
  config.benchmark.num_reference = 1
  with pytest.raises(ValueError, match='1 images as reference'):
    evaluation_timing.measure(config, paths)
  config.benchmark.num_reference = 20
  usage = collections.namedtuple('usage', 'free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(50 * 1024))
  with pytest.raises(ValueError, match='choose another --workdir'):
    evaluation_timing.measure(config, paths)
