import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import mnist
from d2dpm_jax.evaluation import references
from d2dpm_jax.pipelines import evaluate
from d2dpm_jax.runtime import files

_ROOT = pathlib.Path(__file__).parents[2]


def _config(**settings):
  config = mnist.get_config()
  config.evaluate.update(batch_size=8, **settings)
  return config


def _strokes(count, seed=0):
  """Blurry lines: images to which the classifier does not answer one class."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:32, :32] - 15.5
  angle, shift = rng.uniform(0, np.pi, count), rng.uniform(-6, 6, count)
  across = np.sin(angle) * y[..., None] + np.cos(angle) * x[..., None] - shift
  ink = 255 * np.exp(-np.square(across) / 4) * (np.hypot(x, y) < 10)[..., None]
  return np.moveaxis(ink, -1, 0)[..., None].astype(np.uint8)


def _mnist_file(path):
  """A data set in the form of MNIST's, of strokes."""
  rng = np.random.default_rng(1)
  arrays = {}
  for split, count in (('train', 12), ('test', 10)):
    arrays[f'x_{split}'] = _strokes(count, count)[:, 2:-2, 2:-2, 0]
    arrays[f'y_{split}'] = rng.integers(0, 10, count)
  np.savez(path, **arrays)


def test_run_prints_a_table_and_writes_metrics(tmp_path, capsys):
  paths = files.Workdir.at(tmp_path / 'run')
  paths.samples.mkdir(parents=True)
  labels = np.arange(12) % 10
  np.savez(paths.samples / 'samples.npz', arr_0=_strokes(12), arr_1=labels)
  evaluate.run(_config(), str(paths.root))
  result = json.loads(paths.metrics.read_text())
  printed = capsys.readouterr().out
  assert result['num_samples'] == 12
  assert result['num_reference'] == 10_000
  assert f'12 of {paths.samples}' in printed
  assert '10000 of pretrained:mnist' in printed
  assert f'{result["fid"]:.3f}' in printed
  assert result['fid'] > 100  # These are no digits.
  assert 0 <= result['label_agreement'] <= 1
  assert 1 <= result['inception_score'] <= 10
  assert [p.name for p in paths.root.iterdir() if p.is_file()] == [
    'metrics.json'
  ]


def test_a_set_compared_with_itself(tmp_path):
  _mnist_file(tmp_path / 'data.npz')
  config = _config(samples='mnist:test', reference='mnist:test')
  config.train.data = str(tmp_path / 'data.npz')
  result = evaluate.evaluate(config, files.Workdir.at(tmp_path))
  assert result['num_samples'] == result['num_reference'] == 10
  assert result['fid'] < 1e-3 > result['sfid']
  assert result['precision'] == result['recall'] == 1


def test_saved_statistics_serve_as_reference(tmp_path):
  _mnist_file(tmp_path / 'data.npz')
  target = tmp_path / 'reference.npz'
  config = _config(samples='mnist:train[:9]', reference='mnist:test')
  config.train.data = str(tmp_path / 'data.npz')
  config.evaluate.save_statistics = str(target)
  paths = files.Workdir.at(tmp_path)
  there = evaluate.evaluate(config, paths)
  config.evaluate.update(
    samples='mnist:test', reference=str(target), save_statistics=''
  )
  back = evaluate.evaluate(config, paths)
  assert (back['num_samples'], back['num_reference']) == (10, 9)
  assert there['fid'] > 1
  np.testing.assert_allclose(back['fid'], there['fid'], rtol=1e-6)
  np.testing.assert_allclose(back['sfid'], there['sfid'], rtol=1e-6)
  assert back['precision'] == there['recall']
  assert back['recall'] == there['precision']


def test_images_can_be_reconstructed_first(tmp_path, quick_compile):
  for i in range(2):
    np.savez(tmp_path / f'{i}.npz', arr_0=_strokes(5, i))
  names = [str(tmp_path / f'{i}.npz') for i in range(2)]
  paths = files.Workdir.at(tmp_path)
  result = evaluate.evaluate(
    _config(samples=names[0], reference=names[0], through_first_stage=True),
    paths,
  )
  others = evaluate.evaluate(
    _config(samples=names[1], reference=names[0]), paths
  )
  assert result['label_agreement'] is None  # There are no labels.
  assert 0 < result['fid'] < 0.5 * others['fid']
  assert result['samples'].endswith('reconstructed')
  assert 'label agreement  -\n' in evaluate.table(result)


def test_two_images_have_no_precision(tmp_path):
  np.savez(tmp_path / 'two.npz', arr_0=_strokes(2))
  config = _config(samples=str(tmp_path / 'two.npz'))
  result = evaluate.evaluate(config, files.Workdir.at(tmp_path))
  assert result['precision'] is result['recall'] is None
  assert result['fid'] > 0


def test_settings_of_the_scores_reach_them(tmp_path):
  images = _strokes(12)
  order = np.argsort(images.mean((1, 2, 3)))
  np.savez(tmp_path / 'x.npz', arr_0=images[order])
  np.savez(tmp_path / 'y.npz', arr_0=_strokes(15, 1))
  base = dict(
    samples=str(tmp_path / 'x.npz'), reference=str(tmp_path / 'y.npz')
  )
  results = [
    evaluate.evaluate(_config(**base, **more), files.Workdir.at(tmp_path))
    for more in (
      dict(split_size=3),
      dict(split_size=3, shuffle=False),
      dict(neighbours=1),
      {},
    )
  ]
  assert len({r['inception_score'] for r in results}) == 3
  assert results[2]['recall'] < results[3]['recall']


def test_shipped_reference_is_of_the_shipped_classifier():
  net = evaluate._digit_net()
  path = evaluate._embedded('mnist_reference.npz')
  reference = references.load(path, net)  # Refuses another classifier's.
  vectors = reference.vectors.astype(np.float64)
  assert vectors.shape == (10_000, 128) and reference.count == 10_000
  # float16 has 11 bits.
  largest = vectors.max()
  mean, covariance = reference.features
  np.testing.assert_allclose(vectors.mean(0), mean, atol=1e-4 * largest)
  np.testing.assert_allclose(
    np.cov(vectors.T), covariance, atol=1e-4 * covariance.max()
  )
  assert reference.spatial.covariance.shape == (448, 448)
  assert path.stat().st_size < 3e6


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(), 'no samples in'),
    (dict(samples='missing.npz'), 'no images at missing.npz'),
    (dict(samples='mnist:train[:13]'), 'there are 12 images'),
    (dict(samples='mnist:train[:0]'), 'there are 12 images'),
    (dict(samples='mnist:train[:1]'), 'at least 2'),
    (dict(samples='mnist:test', reference=''), 'reference is not set'),
    (
      dict(samples='mnist:test', reference='pretrained:cats'),
      r"\['pretrained:mnist'\]",
    ),
    (dict(samples='mnist:test', reference='missing.npz'), 'no images at'),
    (dict(samples='mnist:test', neighbours=0), 'neighbours is 0'),
    (dict(samples='mnist:test', batch_size=0), 'batch_size is 0'),
  ],
)
def test_bad_settings_leave_nothing_behind(
  tmp_path, monkeypatch, settings, message
):
  monkeypatch.chdir(tmp_path)
  _mnist_file(tmp_path / 'data.npz')
  config = _config()
  config.evaluate.update(settings)
  config.train.data = 'data.npz'
  with pytest.raises(ValueError, match=message):
    evaluate.run(config, str(tmp_path / 'run'))
  assert [p.name for p in tmp_path.iterdir()] == ['data.npz']


def test_images_of_another_size_are_refused(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, arr_0=np.zeros((4, 64, 64, 3), np.uint8))
  config = _config(samples=str(path))
  with pytest.raises(ValueError, match=r'\[64, 64, 3\].*takes \[32, 32, 1\]'):
    evaluate.evaluate(config, files.Workdir.at(tmp_path))


def test_command_line_reports_in_one_line(tmp_path):
  np.savez(tmp_path / 'x.npz', arr_0=np.array([{}] * 3))
  done = subprocess.run(
    [
      sys.executable,
      'main.py',
      *('--config', 'configs/mnist.py', '--mode', 'evaluate'),
      *('--workdir', str(tmp_path / 'run')),
      f'--config.evaluate.samples={tmp_path / "x.npz"}',
    ],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode
  assert 'pickled objects' in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()
