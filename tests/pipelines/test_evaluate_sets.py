"""--mode evaluate on pictures, data sets, several sets; what goes wrong."""

import io
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from d2dpm_jax.configs import imagenet, mnist
from PIL import Image

from d2dpm_jax.evaluation import (
  bootstrap,
  features,
  fidelity,
  frechet,
  preprocess,
  selfcheck,
  tfds_sets,
)
from d2dpm_jax.pipelines import evaluate, image_names, judges
from d2dpm_jax.reporting import metrics_table
from d2dpm_jax.runtime import files


def _apply(params, images):
  x = images.astype(jnp.float32) / 255
  flat = x.reshape(len(x), -1)
  return features.Activations(
    jnp.tanh(flat @ params['features']), x, flat @ params['logits']
  )


def _small_net(path='', image_shape=(8, 8, 3)):
  """In Inception's place: 5 features, 192 spatial ones, 6 classes."""
  rng = np.random.default_rng(7)
  params = {
    name: rng.normal(size=(192, size)).astype(np.float32) / 8
    for name, size in (('features', 5), ('logits', 6))
  }
  return features.FeatureNet(
    'inception', 'small', image_shape, 6, params, _apply
  )


def _images(count, seed, shape=(8, 8, 3)):
  return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def _save_pictures(folder, images):
  folder.mkdir()
  for k, image in enumerate(images):
    Image.fromarray(image).save(folder / f'{k:03}.png')


@pytest.fixture
def config(tmp_path, monkeypatch):
  """Sets of small RGB images and a small network in Inception's place."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(judges.inception, 'inception_net', _small_net)
  for name, count in (('a', 20), ('b', 20), ('real', 40)):
    images = _images(count, count + ord(name[0]))
    np.savez(f'{name}.npz', arr_0=images, arr_1=np.arange(count) % 3)
  found = imagenet.get_config()
  found.evaluate.update(samples='a.npz', reference='real.npz', batch_size=16)
  return found


def _result(config, **settings):
  config.evaluate.update(settings)
  return evaluate.evaluate(config, files.Workdir.at('run'))


def _of(name):
  with np.load(name) as file:
    return file['arr_0']


def _numbers(result):
  return {name: result[name] for name in metrics_table.ROWS}


def test_pictures_are_judged_as_the_array_that_they_are(config, tmp_path):
  _save_pictures(tmp_path / 'fake', _of('a.npz'))
  _save_pictures(tmp_path / 'real', _of('real.npz'))
  arrays = _result(config)
  pictures = _result(config, samples='fake', reference='real')
  assert _numbers(pictures) == _numbers(arrays)
  assert (pictures['num_samples'], pictures['num_reference']) == (20, 40)
  # An .npz beside pictures, as --mode sample leaves them, is the set.
  np.savez(tmp_path / 'fake' / 'x.npz', arr_0=_of('b.npz'))
  assert _numbers(_result(config, samples='fake')) != _numbers(arrays)


@pytest.mark.parametrize('method', preprocess.PREPROCESS)
def test_photographs_are_made_square_first(config, tmp_path, method):
  photographs = [_images(1, k, (20 + k, 30 - k // 2, 3))[0] for k in range(12)]
  _save_pictures(tmp_path / 'photographs', photographs)
  rule = preprocess.PREPROCESS[method]
  squares = [np.asarray(rule(Image.fromarray(x), 8)) for x in photographs]
  np.savez('squares.npz', arr_0=np.stack(squares))
  want = _result(config, reference='squares.npz')
  settings = dict(reference='photographs', preprocess=method)
  found = _result(config, **settings, image_size=8)
  assert _numbers(found) == _numbers(want)
  assert found['settings']['preprocess'] == method
  # Without a size it is the model's; arrays are taken as they are.
  with pytest.raises(ValueError, match=r'\[256, 256, 3\].*\[8, 8, 3\]'):
    _result(config, image_size=0)


def test_data_sets_are_references_and_samples(config, monkeypatch):
  def file(image):
    data = io.BytesIO()
    Image.fromarray(image).save(data, 'PNG')
    return {'image': data.getvalue()}

  examples = [file(image) for image in _of('real.npz')]
  builder = types.SimpleNamespace(
    info=types.SimpleNamespace(
      features={'image': None},
      splits={'train[:40]': types.SimpleNamespace(num_examples=40)},
    ),
    is_prepared=lambda: True,
    as_dataset=lambda **_: iter(examples),
  )
  library = types.SimpleNamespace(
    builder={'lsun/bedroom': builder}.__getitem__,
    as_numpy=iter,
    decode=types.SimpleNamespace(SkipDecoding=lambda: None),
  )
  monkeypatch.setattr(tfds_sets, '_library', lambda: library)
  want = _result(config)
  name = 'tfds:lsun/bedroom:train[:40]'
  found = _result(
    config, reference=name, preprocess='ldm', image_size=8, bootstrap=0
  )
  assert _numbers(found) == _numbers(want)
  assert found['reference'] == name and found['num_reference'] == 40
  statistics = 'statistics.npz'
  _result(config, samples=name, save_statistics=statistics)
  again = _result(
    config, samples='a.npz', reference=statistics, save_statistics=''
  )
  np.testing.assert_allclose(again['fid'], want['fid'], rtol=1e-6)
  assert again['num_reference_statistics'] == 40


def test_several_sets_are_columns_and_entries(config, tmp_path, capsys):
  alone = [_result(config, samples=f'{name}.npz') for name in 'ab']
  config.evaluate.samples = 'a.npz, b.npz'
  evaluate.run(config, 'run')
  result = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
  assert result == {'sets': {'a.npz': alone[0], 'b.npz': alone[1]}}
  lines = capsys.readouterr().out.splitlines()
  for column in lines[0].split('N = ')[1:]:
    assert column.split() == ['20', '(papers', 'use', '50000)']
  fids = [line for line in lines if line.startswith('FID ')]
  assert [line.split()[1:] for line in fids] == [
    [f'{one["fid"]:.3f}' for one in alone]
  ]
  # A path with a comma that is there is one set.
  np.savez('a, b.npz', arr_0=_of('a.npz'))
  assert image_names.split('a, b.npz') == ('a, b.npz',)


def test_number_of_images_is_beside_every_table(config, monkeypatch):
  result = _result(config)
  table = metrics_table.table(result)
  assert table.splitlines()[0].strip() == 'N = 20 (papers use 50000)'
  assert 'reference        40 of real.npz' in table.splitlines()
  full = dict(result, num_samples=50_000)
  assert metrics_table.table(full).splitlines()[0].strip() == 'N = 50000'
  values = np.asarray(
    _apply(_small_net().params, _of('real.npz')).features, np.float64
  )
  spatial = _of('real.npz').reshape(40, -1) / 255
  np.savez(
    'batch.npz',
    arr_0=_of('b.npz'),
    mu=values.mean(0),
    sigma=np.cov(values.T),
    mu_s=spatial.mean(0),
    sigma_s=np.cov(spatial.T),
  )
  batch = _result(config, reference='batch.npz')
  assert batch['num_reference'] == 20
  assert batch['num_reference_statistics'] is None
  assert 'do not say of how many' in metrics_table.table(batch)
  np.testing.assert_allclose(batch['fid'], result['fid'], rtol=1e-5)


def test_bootstrap_is_that_of_the_unrounded_features(config):
  result = _result(config, bootstrap=30)
  net = _small_net()
  vectors, real = (
    np.asarray(net.apply(net.params, _of(name)).features, np.float64)
    for name in ('a.npz', 'real.npz')
  )
  gaussian = frechet.Gaussian(real.mean(0), np.cov(real.T))
  want = bootstrap.fid_interval(vectors, gaussian, 30, config.seed)
  assert result['fid_bootstrap'] == pytest.approx(want._asdict(), rel=1e-4)
  assert want.low < result['fid'] < want.high
  text = f'FID              {result["fid"]:.3f} (95 %: {want.low:.3f} to '
  assert text in metrics_table.table(result)
  assert _result(config, bootstrap=0)['fid_bootstrap'] is None


def test_fidelity_is_to_the_other_samples(config):
  images = _of('a.npz').copy()
  images[3:] //= 2
  np.savez('quantized.npz', arr_0=images, arr_1=np.arange(20) % 3)
  result = _result(config, samples='quantized.npz', fidelity='a.npz')
  compared = result['fidelity']
  errors = np.square(_of('a.npz')[3:].astype(float) - images[3:])
  psnr = 10 * np.log10(255**2 / errors.mean((1, 2, 3)))
  assert compared['of'] == 'a.npz'
  assert compared['identical'] == pytest.approx(3 / 20)
  assert compared['psnr_mean'] == pytest.approx(psnr.mean())
  assert compared['psnr_median'] == pytest.approx(np.median(psnr))
  assert compared['psnr'] == pytest.approx(
    10 * np.log10(255**2 * 20 / 17 / errors.mean())
  )
  assert 0 < compared['feature_distance'] < 4
  table = metrics_table.table(result)
  assert f'PSNR, mean       {psnr.mean():.2f} dB\n' in table
  assert 'identical        15.00%\n' in table
  assert 'feature distance ' in table and 'compared with    a.npz\n' in table
  assert 'LPIPS' not in table
  same = _result(config, samples='a.npz')['fidelity']
  assert set(fidelity.Fidelity._fields) < set(same)
  assert same['identical'] == 1 and same['psnr'] is None
  assert same['feature_distance'] == 0


def _float(count=4):
  return np.random.default_rng(0).uniform(-1, 1, (count, 8, 8, 3))


_BAD = {
  'floats in -1..1': (dict(arr_0=_float()), r'float64\[4, 8, 8, 3\]; expected'),
  'floats beyond 255': (dict(arr_0=300 * _float()), 'expected uint8'),
  'NaN': (dict(arr_0=np.nan * _float()), 'expected uint8'),
  'int64': (dict(arr_0=_images(4, 0).astype(int)), r'int64\[.*expected uint8'),
  'channels first': (dict(arr_0=_images(4, 0, (3, 8, 8))), '1 or 3 channels'),
  'one image': (dict(arr_0=_images(1, 0)), 'holds 1 image; at least 2'),
  'no images': (dict(arr_0=_images(0, 0)), 'has no images'),
  'another size': (
    dict(arr_0=_images(4, 0, (9, 8, 3))),
    r'\[9, 8, 3\], but it is compared with images of \[8, 8, 3\]',
  ),
  'no array': (dict(images=_images(4, 0)), 'no array arr_0'),
  'too few labels': (
    dict(arr_0=_images(4, 0), arr_1=np.arange(3)),
    'expected 4 integers',
  ),
}


@pytest.mark.parametrize('kind', _BAD)
@pytest.mark.parametrize('role', ['samples', 'reference', 'fidelity'])
def test_bad_arrays_are_one_line(config, kind, role):
  arrays, message = _BAD[kind]
  np.savez('bad.npz', **arrays)
  if role == 'samples':
    config.evaluate.samples = 'a.npz,bad.npz'
  else:
    config.evaluate[role] = 'bad.npz'
  if role == 'fidelity' and kind in ('one image', 'another size'):
    message = 'bad.npz .*: fidelity compares them one by one'
  with pytest.raises(ValueError, match=message) as error:
    evaluate.evaluate(config, files.Workdir.at('run'))
  assert '\n' not in str(error.value)
  assert 'bad.npz' in str(error.value)


def test_network_that_returns_nan(config, monkeypatch):
  def broken(path, shape):
    net = _small_net(path, shape)
    net.params['features'][:] = np.nan
    return net

  monkeypatch.setattr(judges.inception, 'inception_net', broken)
  with pytest.raises(ValueError, match="network 'inception' returned NaN"):
    _result(config)


@pytest.mark.parametrize(
  'settings, message',
  [
    (dict(bootstrap=1), 'bootstrap is 1; expected 0 or >= 2'),
    (dict(bootstrap=-5), 'bootstrap is -5'),
    (dict(preprocess='crop', image_size=8), "'crop'.*'none', 'adm', 'ldm'"),
    (dict(image_size=8), "evaluate.preprocess is 'none'"),
    (dict(preprocess='adm', image_size=-1), 'image_size is -1'),
    (dict(samples='a.npz,'), 'expected different names'),
    (dict(samples='a.npz,a.npz'), 'expected different names'),
    (dict(samples='a.npz,c.npz'), 'no images at c.npz'),
    (dict(samples='a.npz,b.npz', save_statistics='x.npz'), 'names 2'),
    (dict(save_statistics='notes'), "'notes'; expected a file"),
    (dict(save_statistics='a.npz/x.npz'), 'expected a file that can be'),
    (dict(fidelity='real.npz'), r'\[20, 8, 8, 3\].*\[40, 8, 8, 3\]'),
    (dict(fidelity='other.npz'), 'Image 0 is of class 0 in a.npz and .* 1 in'),
    (dict(samples='empty'), 'no .npz files and no pictures'),
    (dict(samples='notes'), 'notes/readme.md is no picture'),
    (dict(reference='tfds:x'), 'names no data set'),
    (dict(samples='other'), 'work directory; its samples are other/samples'),
  ],
)
def test_bad_settings_leave_nothing_behind(config, tmp_path, settings, message):
  np.savez('other.npz', arr_0=_of('b.npz'), arr_1=np.ones(20, int))
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'other' / 'samples').mkdir(parents=True)
  np.savez(tmp_path / 'other' / 'samples' / 'a.npz', arr_0=_of('a.npz'))
  _save_pictures(tmp_path / 'notes', _of('a.npz')[:2])
  (tmp_path / 'notes' / 'readme.md').write_text('text')
  config.evaluate.update(settings)
  with pytest.raises(ValueError, match=message) as error:
    evaluate.run(config, 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists() and not (tmp_path / 'x.npz').exists()


def test_grey_pictures_suit_the_digits(tmp_path):
  photographs = [_images(1, k, (40 + k, 50, 3))[0] for k in range(3)]
  _save_pictures(tmp_path / 'x', photographs)
  config = mnist.get_config()
  config.evaluate.preprocess = 'adm'
  paths = files.Workdir.at(tmp_path)
  found = image_names.find(str(tmp_path / 'x'), config, paths)
  assert found.shape == (3, 32, 32, 1)


def test_selfcheck_needs_no_samples(config, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(
    selfcheck, 'checks', lambda: [selfcheck.Check('one', 1.0, 1, 0)]
  )
  config.evaluate.update(samples='', reference='', selfcheck=True)
  evaluate.run(config, 'run')
  lines = capsys.readouterr().out.splitlines()
  assert '8 x cpu' in lines[0] and lines[1].startswith('ok    one')
  assert lines[-1] == f'All {len(lines) - 2} checks are right.'
  assert not (tmp_path / 'run').exists()
  monkeypatch.setattr(
    selfcheck, 'checks', lambda: [selfcheck.Check('two', 1.1, 1, 0.01)]
  )
  with pytest.raises(ValueError, match=r'1 of .* went wrong \(two\)'):
    evaluate.run(config, 'run')
  assert 'WRONG two' in capsys.readouterr().out
