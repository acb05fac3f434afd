import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from d2dpm_jax.configs import imagenet, lsun_bedrooms, lsun_churches, mnist

from d2dpm_jax.evaluation import features, references
from d2dpm_jax.pipelines import evaluate, judges
from d2dpm_jax.reporting import metrics_table
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


def _apply(params, images):
  x = images.astype(jnp.float32) / 255
  flat = x.reshape(len(x), -1)
  return features.Activations(
    jnp.tanh(flat @ params['features']),
    x.reshape(len(x), 4, 2, 4, 2, 3).mean((2, 4)),
    flat @ params['logits'],
  )


def _small_net(path='', image_shape=(8, 8, 3)):
  """In Inception's place: 5 features, 48 spatial ones, 6 classes."""
  rng = np.random.default_rng(7)
  params = {
    name: rng.normal(size=(192, size)).astype(np.float32) / 8
    for name, size in (('features', 5), ('logits', 6))
  }
  return features.FeatureNet(
    'inception', f'small{path}', image_shape, 6, params, _apply
  )


@pytest.fixture
def photographs(tmp_path, monkeypatch):
  """Files of small RGB images, and their config with a small network."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(judges.inception, 'inception_net', _small_net)
  rng = np.random.default_rng(3)
  fake = rng.integers(30, 220, (24, 8, 8, 3), np.uint8)
  real = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
  # These labels are no classes of the network.
  np.savez('fake.npz', arr_0=fake, arr_1=np.arange(24) + 900)
  np.savez('real.npz', arr_0=real)
  np.savez('some.npz', arr_0=real[:15])
  config = imagenet.get_config()
  config.evaluate.update(
    samples='fake.npz', reference='real.npz', batch_size=16
  )
  return config


def _reference_batch():
  """The arrays of a reference batch: of real.npz, with images of some.npz."""
  with np.load('real.npz') as file:
    out = _small_net().apply(_small_net().params, file['arr_0'])
  values = np.asarray(out.features, np.float64)
  spatial = np.asarray(out.spatial, np.float64).reshape(len(values), -1)
  with np.load('some.npz') as file:
    return dict(
      mu=values.mean(0),
      sigma=np.cov(values, rowvar=False),
      mu_s=spatial.mean(0),
      sigma_s=np.cov(spatial, rowvar=False),
      arr_0=file['arr_0'],
    )


def _result(config, **settings):
  config.evaluate.update(settings)
  return evaluate.evaluate(config, files.Workdir.at('run'))


def test_reference_batch_counts_as_the_images_that_it_is_of(photographs):
  np.savez('batch.npz', **_reference_batch())
  whole = _result(photographs, reference='real.npz')
  some = _result(photographs, reference='some.npz')
  batch = _result(photographs, reference='batch.npz')
  assert whole['num_reference'] == 40
  assert batch['num_reference'] == 15
  assert whole['fid'] > 0.01 and abs(whole['fid'] / some['fid'] - 1) > 0.01
  for name in ('fid', 'sfid'):
    np.testing.assert_allclose(batch[name], whole[name], rtol=1e-5)
  for name in ('precision', 'recall'):
    assert batch[name] == some[name]
  assert some['recall'] != whole['recall']
  # As a set of samples it is its images.
  images = _result(photographs, samples='batch.npz', reference='some.npz')
  assert images['num_samples'] == 15 and images['fid'] < 1e-3


@pytest.mark.parametrize(
  'names, message',
  [
    (['mu'], r'lacks mu \(for FID\)\.'),
    (
      ['sigma', 'mu_s', 'sigma_s'],
      r'lacks sigma \(for FID\), mu_s \(for sFID\), sigma_s \(for sFID\)\.',
    ),
    (['arr_0'], r'lacks arr_0 \(for precision and recall\)\.'),
  ],
)
def test_reference_batch_without_arrays_is_refused(photographs, names, message):
  arrays = _reference_batch()
  for name in names:
    del arrays[name]
  np.savez('batch.npz', **arrays)
  with pytest.raises(ValueError, match='batch.npz ' + message):
    _result(photographs, reference='batch.npz')


@pytest.mark.parametrize(
  'arrays, message',
  [
    (dict(mu=np.zeros(4)), r'mu as float64\[4\].*float\[5\]'),
    (dict(sigma_s=np.zeros(48)), r'sigma_s as .*float\[48, 48\]'),
    (dict(mu=np.zeros(5, int)), 'mu as int64'),
    (dict(mu=np.full(5, np.nan)), 'NaN or infinity in mu'),
    (dict(mu=np.array([{}] * 5)), 'batch.npz is damaged'),
    (dict(sigma=np.tri(5)), 'holds a sigma that is no covariance'),
    (dict(sigma_s=-np.eye(48)), 'holds a sigma_s that is no covariance'),
    (dict(arr_0=np.zeros((9, 4, 4, 3), np.uint8)), r'\[4, 4, 3\].*\[8, 8, 3\]'),
    (dict(arr_0=np.zeros((9, 8, 8, 3))), r'float64.*uint8'),
  ],
)
def test_reference_batch_of_something_else_is_refused(
  photographs, arrays, message
):
  np.savez('batch.npz', **_reference_batch() | arrays)
  with pytest.raises(ValueError, match=message):
    _result(photographs, reference='batch.npz')


def test_network_is_made_for_the_weights_and_the_images(photographs):
  result = _result(photographs, inception='weights.pth')
  assert result['network'] == 'inception'
  assert result['network_digest'] == 'smallweights.pth'
  assert result['num_samples'] == 24
  # The file has labels, but this network's classes are others.
  assert result['label_agreement'] is None
  assert 1 <= result['inception_score'] <= 6


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(network='vgg'), r"'vgg'; expected one of \['digits', 'inception'\]"),
    (dict(network='digits'), r"\[8, 8, 3\].*'digits' takes \[32, 32, 1\]"),
    (dict(samples='gray.npz'), '1 channel, but .* takes RGB'),
    (dict(samples='mnist:test'), 'train.data, which this config has not'),
    (dict(reference='mnist:test'), 'train.data, which this config has not'),
    (dict(reference='pretrained:mnist'), "of the network 'digits'"),
    (dict(reference=''), 'reference is not set'),
  ],
)
def test_what_does_not_suit_the_network_is_refused(
  photographs, settings, message
):
  np.savez('gray.npz', arr_0=_strokes(3))
  with pytest.raises(ValueError, match=message):
    _result(photographs, **settings)


def test_missing_weights_of_inception_are_named(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  np.savez(tmp_path / 'x.npz', arr_0=np.zeros((4, 8, 8, 3), np.uint8))
  config = imagenet.get_config()
  config.evaluate.samples = str(tmp_path / 'x.npz')
  with pytest.raises(FileNotFoundError, match='pt_inception-2015-12-05'):
    evaluate.evaluate(config, files.Workdir.at(tmp_path))


def test_every_config_names_its_network():
  assert mnist.get_config().evaluate.network == 'digits'
  for config in (imagenet, lsun_bedrooms, lsun_churches):
    assert config.get_config().evaluate.network == 'inception'


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


def test_images_can_be_reconstructed_first(tmp_path):
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
  assert 'label agreement  -\n' in metrics_table.table(result)


@pytest.mark.parametrize('place', ['samples', 'reference'])
def test_one_image_is_named_before_work_begins(photographs, place, monkeypatch):
  np.savez(
    'one.npz',
    **_reference_batch() | dict(arr_0=_reference_batch()['arr_0'][:1]),
  )
  monkeypatch.setattr(features, 'activations', None)
  if place == 'reference':
    photographs.evaluate.samples = 'fake.npz'
  with pytest.raises(ValueError, match='one.npz holds 1 image; at least 2'):
    _result(photographs, **{place: 'one.npz'})


def test_labels_of_other_classes_are_named_before_work_begins(
  tmp_path, monkeypatch
):
  path = tmp_path / 'x.npz'
  np.savez(path, arr_0=_strokes(3), arr_1=np.array([0, 17, 3]))
  monkeypatch.setattr(features, 'activations', None)
  with pytest.raises(ValueError, match='x.npz has labels from 0 to 17.*0..9'):
    evaluate.evaluate(_config(samples=str(path)), files.Workdir.at(tmp_path))


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
  net = judges.digit_net()
  path = judges.embedded('mnist_reference.npz')
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
    (dict(samples='mnist:val'), r"'mnist:val' names no images; .*mnist:test"),
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
