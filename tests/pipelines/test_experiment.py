"""An experiment: its grid, its numbers, and what a second run takes over."""

import contextlib
import dataclasses
import re
import shutil
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from d2dpm_jax.configs import imagenet, lsun_churches, mnist
from helpers import assert_trees_equal, contents

from d2dpm_jax.evaluation import features
from d2dpm_jax.models import latent_diffusion
from d2dpm_jax.pipelines import (
  artifacts,
  experiment,
  experiment_grid,
  judges,
  sample,
  setup,
  statistics,
)
from d2dpm_jax.quantization import affine
from d2dpm_jax.reporting import plots
from d2dpm_jax.runtime import files, runs

_SEEDS = (0, 5)
_SAMPLERS = ('s3_eta0_2', 's1.5_eta1_2')
_IMAGES = 6


def _config(reference='', **settings):
  """A small grid."""
  config = tiny_config.get_config()
  config.calibration.update(num_samples=8, batch_size=8)
  config.statistics.update(num_samples=8, folds=2)
  config.quant.update(weight_range='max', act_range='max', float_layers='')
  config.quant.execution = 'simulated'
  config.sample.microbatch = 1
  config.evaluate.update(reference=str(reference), batch_size=8)
  config.experiment.update(
    quantizers=('nearest',),
    bits=('W4A8',),
    corrections=('none', 'd-d2'),
    channel_wise=(False,),
    samplers=_SAMPLERS,
    seeds=_SEEDS,
    num_images=_IMAGES,
    batch_size=4,  # The last batch overlaps.
  )
  config.experiment.update(settings)
  return config


class _Net(nn.Module):
  """In the U-Net's place: four layers, compiled in no time."""

  out_channels: int = 3
  context_dim: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, t, context):
    t = jnp.stack([jnp.sin(t / 300), jnp.cos(t / 300)], -1)
    told = nn.Dense(8, name='time_embed_0')(t)
    told += nn.Dense(8, name='context')(context[:, 0])
    h = nn.Conv(8, (3, 3), name='input_blocks_0_0')(x)
    h = nn.Conv(8, (3, 3), name='middle')(nn.silu(h + told[:, None, None]))
    return nn.Conv(self.out_channels, (3, 3), name='out_2')(nn.silu(h))


class _Latents(latent_diffusion.LatentDiffusion):
  """Shows latents, each twice as high and wide, in place of a decoder."""

  def decode(self, params, z):
    return z[..., :1].repeat(2, 1).repeat(2, 2)


def _model():
  config = tiny_config.get_config()
  ldm = setup.build(config)
  fields = {f.name: getattr(ldm, f.name) for f in dataclasses.fields(ldm)}
  ldm = _Latents(**{**fields, 'unet': _Net()})
  key, label = jax.random.key(0), jnp.zeros([1], jnp.int32)
  condition = ldm.cond_stage.init(key, label)['params']
  params = {'cond_stage': condition}
  x, context = jnp.zeros([1, *ldm.latent_shape]), ldm.context(params, label)
  params['unet'] = ldm.unet.init(key, x, label, context)['params']
  return setup.Model(config, ldm, jax.tree.map(np.asarray, params), 'toy')


def _apply(params, images):
  x = images.astype(jnp.float32) / 255
  flat = x.reshape(len(x), -1)
  return features.Activations(
    jnp.tanh(flat @ params['features']),
    x.reshape(len(x), 4, 2, 4, 2, 1).mean((2, 4)),
    flat @ params['logits'],
  )


@pytest.fixture(scope='module', autouse=True)
def small_networks():
  """The model above, and a judge of images of 8x8 with four classes."""
  rng = np.random.default_rng(7)
  params = {
    name: rng.normal(size=(64, size)).astype(np.float32)
    for name, size in (('features', 5), ('logits', 4))
  }
  net = features.FeatureNet('digits', 'small', (8, 8, 1), 4, params, _apply)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(judges, 'digit_net', lambda: net)
    model = _model()
    patch.setattr(
      setup,
      'load',
      lambda config, paths=None: dataclasses.replace(model, config=config),
    )
    patch.setattr(statistics, '_draw', lambda *_: None)  # Takes a while.
    yield net


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """A few images, so that precision and recall take no time."""
  path = tmp_path_factory.mktemp('reference') / 'images.npz'
  images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
  np.savez(path, arr_0=images)
  return path


class Finished(NamedTuple):
  """A whole experiment; not to be written to."""

  paths: files.Workdir
  config: object
  results: dict
  sampled: dict  # Cell -> images and latents, as they were sampled.


@contextlib.contextmanager
def _watched():
  """Yields what is sampled within it: cell -> images and latents."""
  sampled = {}
  sample_cell = experiment._sample

  def watch(bench, quantized, cell, cells):
    sampled[cell] = sample_cell(bench, quantized, cell, cells)
    return sampled[cell]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(experiment, '_sample', watch)
    yield sampled


@pytest.fixture(scope='module')
def finished(small_networks, reference, tmp_path_factory):
  config = _config(reference)
  paths = files.Workdir.at(tmp_path_factory.mktemp('experiment') / 'work')
  with _watched() as sampled:
    experiment.run(config, str(paths.root))
  results = files.read_json(paths.experiment('results.json'))
  return Finished(paths, config, results, sampled)


def _cells(paths):
  """Cells on disk by name."""
  return {
    path.stem: files.read_json(path)
    for path in paths.experiment('cells').glob('*.json')
  }


@pytest.fixture
def copy(finished, tmp_path):
  """A copy of the finished work directory, to be damaged."""
  shutil.copytree(finished.paths.root, tmp_path / 'copy')
  return files.Workdir.at(tmp_path / 'copy')


_TIMES = ('seconds', 'compile_seconds', 'images_per_second')


def _numbers(cells):
  """Without times, which differ from run to run."""
  return {
    name: {k: v for k, v in cell['values'].items() if k not in _TIMES}
    for name, cell in cells.items()
  }


# ---- What it measures.


def test_every_cell_of_the_grid_is_there(finished):
  paths, results = finished.paths, finished.results
  names = [
    f'{network}-seed{seed}'
    for sampler in _SAMPLERS
    for network in (
      f'fp-{sampler}',
      f'nearest-W4A8-{sampler}-none',
      f'nearest-W4A8-{sampler}-d-d2-tensor',
    )
    for seed in _SEEDS
  ]
  cells = _cells(paths)
  assert sorted(cells) == sorted(names)
  assert len(results['rows']) == len(names) / len(_SEEDS)
  for cell in cells.values():
    assert cell['num_images'] == _IMAGES and cell['num_reference'] == 8
    values = cell['values']
    assert values['fid'] > 0 and values['sfid'] > 0
    assert 1 <= values['inception_score'] <= 4
    for name in ('precision', 'recall', 'label_agreement'):
      assert 0 <= values[name] <= 1
    assert ('psnr' in values) == (cell['quantizer'] != '')
    assert values['images_per_second'] > 0


def _plain(paths, cell):
  """Arrays of the full-precision network, as they are on disk."""
  folder = paths.experiment(f'full_precision/{cell.sampler}-seed{cell.seed}')
  return np.load(folder / 'images.npy'), np.load(folder / 'latents.npy')


def test_distances_are_those_of_the_arrays(finished):
  """To what is on disk, in NumPy."""
  cells = _cells(finished.paths)
  assert {cell.name for cell in finished.sampled} == set(cells)
  for cell, sampled in finished.sampled.items():
    images, latents = _plain(finished.paths, cell)
    assert images.shape == (_IMAGES, 8, 8, 1) and images.dtype == np.uint8
    if not cell.quantizer:
      np.testing.assert_array_equal(sampled.images, images)
      np.testing.assert_array_equal(sampled.latents, latents)
      continue
    error = np.square(sampled.images.astype(float) - images.astype(float))
    changed = [e.mean() for e in error if e.any()]
    by_image = 10 * np.log10(255**2 / np.array(changed))
    latent = np.square(sampled.latents.astype(float) - latents.astype(float))
    values = cells[cell.name]['values']
    want = {
      'psnr': 10 * np.log10(255**2 / error.mean()),
      'psnr_mean': np.sum(by_image) / len(changed),
      'psnr_median': np.median(by_image),
      'identical': (_IMAGES - len(changed)) / _IMAGES,
      'latent_mse': latent.mean(),
    }
    for name, value in want.items():
      np.testing.assert_allclose(values[name], value, rtol=1e-9, err_msg=name)


def test_images_are_those_of_mode_sample(finished):
  """Image k of seed s, from the work directory of the calibration."""
  cell = experiment_grid.Cell(
    _SAMPLERS[1], 5, 'nearest', 'W4A8', 'd-d2', 'tensor'
  )
  config = experiment_grid.configured(
    finished.config, cell.sampler, 'nearest', 'W4A8'
  )
  where = finished.paths.experiment(f'calibrated/nearest-W4A8-{cell.sampler}')
  config.seed = cell.seed
  config.sample.update(num_images=_IMAGES, batch_size=_IMAGES)
  config.sample.correction = 'd-d2'
  paths = files.Workdir.at(where)
  model = setup.load(config)
  images, _ = sample.generate(
    artifacts.load(model, paths),
    np.arange(_IMAGES),
    sample.labels_of(model, config.sample, np.arange(_IMAGES)),
    correction='d-d2',
    channel_wise=False,
    absorb=False,
    batch_size=_IMAGES,
    microbatch=config.sample.microbatch,
    seed=cell.seed,
  )
  np.testing.assert_array_equal(finished.sampled[cell].images, images)


def test_seeds_and_settings_differ(finished):
  """No two cells hold the same images."""
  arrays = [sampled.latents for sampled in finished.sampled.values()]
  for i, a in enumerate(arrays):
    assert not any(np.array_equal(a, b) for b in arrays[:i])
    assert len(np.unique(a.reshape(_IMAGES, -1), axis=0)) == _IMAGES


def test_quantizers_are_those_of_the_first_sampler(finished):
  """The second has statistics of its own."""
  found = []
  for sampler in _SAMPLERS:
    where = finished.paths.experiment(f'calibrated/nearest-W4A8-{sampler}')
    config = experiment_grid.configured(
      finished.config, sampler, 'nearest', 'W4A8'
    )
    found.append(artifacts.load(setup.load(config), files.Workdir.at(where)))
    assert (where / 'calibration' / 'units').is_dir() == (
      sampler == _SAMPLERS[0]
    )
  assert_trees_equal(found[0].qstate, found[1].qstate)
  spread = [q.error_models['tensor'].var_d for q in found]
  assert not np.array_equal(*spread)


def test_a_sampler_and_a_correction_are_compiled_once(finished):
  """A new seed is nothing new, nor are simulated weights of other bits."""
  for name, cell in _cells(finished.paths).items():
    seconds = cell['values']['compile_seconds']
    assert (seconds > 0) == name.endswith(f'seed{_SEEDS[0]}'), name
  where = finished.paths.experiment(f'calibrated/nearest-W4A8-{_SAMPLERS[0]}')
  config = experiment_grid.configured(
    finished.config, _SAMPLERS[0], 'nearest', 'W4A8'
  )
  four = artifacts.load(setup.load(config), files.Workdir.at(where))
  eight = dataclasses.replace(
    four,
    qstate={
      path: {
        **layer,
        'weight': affine.QWeight(
          layer['weight'].codes,
          layer['weight'].scale,
          layer['weight'].zero_point,
          8,
        ),
      }
      for path, layer in four.qstate.items()
    },
  )
  cell = experiment_grid.Cell(_SAMPLERS[0], 9, 'nearest', 'W8A8', 'd-d2')
  bench = experiment._prepare(four.model, finished.paths)
  for kind in ('tensor', 'channel'):
    sampled = experiment._sample(
      bench,
      experiment._on_device(experiment._executable(eight)),
      dataclasses.replace(cell, statistics=kind),
      _NoProgress(),
    )
    assert sampled.timing.compile_seconds == 0


class _NoProgress:
  def update(self, cell, images):
    del cell, images


# ---- What it shows.


def _sections(text):
  """Heading -> first cell -> the numbers of the row, of Markdown tables."""
  found = {}
  for block in text.split('\n## ')[1:]:
    heading, table, differences = block.strip().split('\n\n')
    assert differences.startswith('| minus `none` |')
    lines = table.splitlines()
    rows = [
      [part.strip() for part in line.strip('|').split('|')]
      for line in lines
      if line.startswith('|')
    ]
    names = rows[0]
    found[heading] = {
      row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in rows[2:]
    }
  return found


def test_the_tables_are_those_of_the_cells(finished):
  """Every number of results.md, computed from the cells by hand."""
  text = finished.paths.experiment('results.md').read_text()
  assert f'{_IMAGES} images per seed, 2 seed(s) (0, 5)' in text
  sections = _sections(text)
  assert list(sections) == [f'{s}, W4A8, nearest' for s in _SAMPLERS]
  columns = {
    'FID': ('fid', 1, 3),
    'sFID': ('sfid', 1, 3),
    'IS': ('inception_score', 1, 3),
    'precision %': ('precision', 100, 2),
    'recall %': ('recall', 100, 2),
    'labels %': ('label_agreement', 100, 2),
    'PSNR dB': ('psnr', 1, 2),
    'mean dB': ('psnr_mean', 1, 2),
    'median dB': ('psnr_median', 1, 2),
    'identical %': ('identical', 100, 2),
    'latent MSE': ('latent_mse', 1, 6),
    'img/s': ('images_per_second', 1, 1),
  }
  cells = _cells(finished.paths)
  for sampler in _SAMPLERS:
    rows = {
      'full precision': f'fp-{sampler}',
      'none': f'nearest-W4A8-{sampler}-none',
      'd-d2, tensor': f'nearest-W4A8-{sampler}-d-d2-tensor',
    }
    table = sections[f'{sampler}, W4A8, nearest']
    assert list(table) == list(rows)
    for name, stem in rows.items():
      assert sorted(table[name]) == sorted(columns)
      for column, (key, unit, digits) in columns.items():
        values = [
          cells[f'{stem}-seed{seed}']['values'].get(key) for seed in _SEEDS
        ]
        if None in values:
          assert table[name][column] == '-' and name == 'full precision'
          continue
        mean = unit * np.mean(values)
        std = unit * np.std(values, ddof=1)
        found = table[name][column].strip('*')
        assert found == f'{mean:.{digits}f} ± {std:.{digits}f}', (name, column)


def test_cells_keep_the_commit_and_the_day(finished, copy):
  for cell in _cells(finished.paths).values():
    assert cell['commit'] == runs.commit()
    assert re.fullmatch(r'\d{4}-\d\d-\d\d', cell['date'])
  assert finished.results['dates'] and finished.results['dates'][0] in (
    finished.paths.experiment('results.md').read_text()
  )
  for path in copy.experiment('cells').glob('*.json'):  # Cells of before.
    cell = files.read_json(path)
    del cell['commit'], cell['date']
    files.write_json(path, cell)
  with _watched() as sampled:
    experiment.run(finished.config, str(copy.root))
  assert not sampled
  results = files.read_json(copy.experiment('results.json'))
  assert results['commits'] == results['dates'] == []


def test_the_plot_shows_mean_and_spread(finished):
  drawn = plots.experiment(finished.results)
  assert len(drawn.axes) == 4  # FID and PSNR of two samplers.
  axes = drawn.axes[1]
  plain, none, corrected = (
    row['values']['fid']
    for row in finished.results['rows']
    if row['sampler'] == _SAMPLERS[1]
  )
  assert axes.lines[0].get_ydata()[0] == plain['mean']
  for container, want in zip(axes.containers, (none, corrected), strict=True):
    points, _, (bars,) = container
    assert points.get_ydata().tolist() == [want['mean']]
    ends = bars.get_segments()[0][:, 1]
    np.testing.assert_allclose(
      ends, [want['mean'] - want['std'], want['mean'] + want['std']]
    )
  path = finished.paths.experiment('results.png')
  assert path.read_bytes().startswith(b'\x89PNG')


# ---- What it takes over.


def test_a_second_run_makes_nothing(finished, copy):
  with _watched() as sampled:
    experiment.run(finished.config, str(copy.root))
  assert not sampled
  before, after = contents(finished.paths.root), contents(copy.root)
  assert {k for k in before if before[k] != after[k]} <= {'config.json'}
  assert set(before) == set(after)


def test_a_missing_cell_is_made_again(finished, copy):
  name = f'nearest-W4A8-{_SAMPLERS[0]}-d-d2-tensor-seed5'
  copy.experiment(f'cells/{name}.json').unlink()
  with _watched() as sampled:
    experiment.run(finished.config, str(copy.root))
  assert [cell.name for cell in sampled] == [name]
  assert _numbers(_cells(copy)) == _numbers(_cells(finished.paths))


def test_damaged_images_are_made_again(finished, copy):
  """They are needed for a cell that is missing."""
  name = f'nearest-W4A8-{_SAMPLERS[1]}-none-seed0'
  copy.experiment(f'cells/{name}.json').unlink()
  folder = copy.experiment(f'full_precision/{_SAMPLERS[1]}-seed0')
  data = (folder / 'latents.npy').read_bytes()
  (folder / 'latents.npy').write_bytes(data[:-100])
  with _watched() as sampled:
    experiment.run(finished.config, str(copy.root))
  assert [c.name for c in sampled] == [f'fp-{_SAMPLERS[1]}-seed0', name]
  assert (folder / 'latents.npy').read_bytes() == data
  assert _numbers(_cells(copy)) == _numbers(_cells(finished.paths))


def test_an_interrupted_run_goes_on(finished, copy, monkeypatch):
  """Stopped in its third cell; that and what follows is made later."""
  shutil.rmtree(copy.experiment('cells'))
  for name in ('results.json', 'results.md', 'results.png'):
    copy.experiment(name).unlink()
  write, count = experiment._write, []

  def interrupted(bench, cell, *args):
    count.append(cell)
    if len(count) == 3:
      raise KeyboardInterrupt
    write(bench, cell, *args)

  with monkeypatch.context() as patch:
    patch.setattr(experiment, '_write', interrupted)
    with pytest.raises(KeyboardInterrupt):
      experiment.run(finished.config, str(copy.root))
  assert sorted(_cells(copy)) == sorted(cell.name for cell in count[:2])
  assert not copy.experiment('results.json').exists()
  with _watched() as sampled:
    experiment.run(finished.config, str(copy.root))
  # Images in full precision were there.
  assert [c.name for c in sampled] == [
    c.name for c in finished.sampled if c.quantizer
  ]
  assert _numbers(_cells(copy)) == _numbers(_cells(finished.paths))
  names = [r['correction'] for r in finished.results['rows']]
  results = files.read_json(copy.experiment('results.json'))
  assert [r['correction'] for r in results['rows']] == names


def test_a_new_seed_joins_those_that_are_there(finished, copy):
  config = _config(finished.config.evaluate.reference, seeds=(0, 5, 7))
  with _watched() as sampled:
    experiment.run(config, str(copy.root))
  assert {cell.seed for cell in sampled} == {7} and len(sampled) == 6
  old, new = _numbers(_cells(finished.paths)), _numbers(_cells(copy))
  assert {name: new[name] for name in old} == old and len(new) == 18


def test_quantizers_learn_on_a_sampler_that_has_no_cells(
  finished, reference, tmp_path
):
  config = _config(
    reference, samplers=_SAMPLERS[1:], learn_on=_SAMPLERS[0], seeds=(5,)
  )
  experiment.run(config, str(tmp_path))
  paths = files.Workdir.at(tmp_path)
  old, new = _numbers(_cells(finished.paths)), _numbers(_cells(paths))
  assert new == {name: old[name] for name in new} and len(new) == 3


@pytest.mark.parametrize(
  ('name', 'value', 'part'),
  [
    ('experiment.num_images', 7, 'num_images: saved 6, now 7'),
    ('quant.per_channel', False, 'quant.per_channel: saved True, now False'),
    ('evaluate.neighbours', 2, 'neighbours: saved 3, now 2'),
    ('experiment.samplers', _SAMPLERS[::-1], 'quantized_on.eta: saved 0.0'),
  ],
)
def test_cells_of_other_settings_are_refused(finished, name, value, part):
  config = _config(finished.config.evaluate.reference)
  config.update_from_flattened_dict({name: value})
  before = contents(finished.paths.root)
  with pytest.raises(ValueError, match=re.escape(part)) as error:
    experiment.run(config, str(finished.paths.root))
  assert str(finished.paths.experiment()) in str(error.value)
  assert contents(finished.paths.root) == before


# ---- Which cells there are.


@pytest.mark.parametrize(
  ('config', 'samplers'), [(mnist, 4), (imagenet, 4), (lsun_churches, 2)]
)
def test_the_grid_has_no_two_cells_of_one_meaning(config, samplers):
  config = config.get_config()
  conditional = config.model.cond_stage is not None
  grid = experiment_grid.read(config, conditional)
  cells = grid.cells()
  # none and auto once, five corrections by tensor and by channel.
  assert len(cells) == samplers * 3 * (1 + 2 * (2 + 5 * 2))
  assert len({cell.name for cell in cells}) == len(cells)
  kinds = {(c.correction, c.statistics) for c in cells if c.quantizer}
  assert {k for c, k in kinds if c in ('none', 'auto')} == {''}
  assert {k for c, k in kinds if c == 'ptqd'} == {'tensor', 'channel'}


def test_words_with_commas_are_several(reference):
  config = _config(reference, corrections=('none,d-d2',), bits=('W4A8, W2A6',))
  grid = experiment_grid.read(config, True)
  assert grid.corrections == ('none', 'd-d2') and grid.bits == ('W4A8', 'W2A6')
  config = experiment_grid.configured(
    config, 's1.5_eta1_250', 'brecq-qdrop', 'W2A6'
  )
  assert (config.quant.weight_bits, config.quant.act_bits) == (2, 6)
  assert config.quant.reconstruction.drop_prob == 0.5
  assert config.sampler.steps == 250


@pytest.mark.parametrize(
  ('settings', 'part'),
  [
    ({'quantizers': ('gptq',)}, "experiment.quantizers has 'gptq'"),
    ({'bits': ('W9A8',)}, "experiment.bits has 'W9A8'"),
    ({'corrections': ('dd2',)}, "experiment.corrections has 'dd2'"),
    ({'samplers': ('eta0_20',)}, "experiment.samplers has 'eta0_20'"),
    ({'samplers': ('s3_eta0_2', 's3.0_eta0_2')}, 'is there more than once'),
    ({'samplers': ('s3_eta0_2000',)}, '2000'),
    ({'learn_on': 'eta0_20'}, "experiment.learn_on has 'eta0_20'"),
    ({'learn_on': 's3_eta0_2000'}, '2000'),
    ({'seeds': ()}, 'experiment.seeds is empty'),
    ({'corrections': ()}, 'experiment.corrections is empty'),
    ({'seeds': (0, 1, 0)}, 'experiment.seeds: 0 is there more than once'),
    ({'seeds': (-1,)}, 'experiment.seeds has -1'),
    ({'seeds': (0.5,)}, 'experiment.seeds has 0.5'),
    ({'channel_wise': (0,)}, 'experiment.channel_wise has 0'),
    ({'num_images': 1}, 'experiment.num_images has 1; expected >= 2'),
    ({'batch_size': 0}, 'experiment.batch_size has 0'),
  ],
)
def test_bad_settings_leave_nothing_behind(reference, tmp_path, settings, part):
  with pytest.raises(ValueError, match=re.escape(part)):
    experiment.run(_config(reference, **settings), str(tmp_path / 'work'))
  assert not (tmp_path / 'work').exists()


def test_what_cannot_be_judged(
  small_networks, reference, tmp_path, monkeypatch
):
  config = _config('')
  with pytest.raises(ValueError, match='evaluate.reference is not set'):
    experiment.run(config, str(tmp_path / 'work'))
  other = dataclasses.replace(small_networks, image_shape=(32, 32, 1))
  monkeypatch.setattr(judges, 'digit_net', lambda: other)
  with pytest.raises(ValueError, match=re.escape('takes [32, 32, 1]')):
    experiment.run(_config(reference), str(tmp_path / 'work'))
  assert not (tmp_path / 'work').exists()
