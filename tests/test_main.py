"""The command line, as users run it: one process per command, one device."""

import io
import json
import pathlib
import shutil
import subprocess
import time

import numpy as np
import pytest
from helpers import assert_trees_equal, contents, main_process
from PIL import Image

from d2dpm_jax.pipelines import artifacts
from d2dpm_jax.runtime import files

_CONFIG = pathlib.Path(__file__).parent / 'tiny_config.py'


@pytest.fixture(scope='module')
def command(tiny, tmp_path_factory):
  """Runs a mode on the tiny model with few quantized layers."""
  workdir = tmp_path_factory.mktemp('main') / 'work'

  def run(mode, *args, workdir=workdir, **options):
    return main_process(
      '--config', f'{_CONFIG}:few', '--mode', mode, '--workdir', workdir,
      f'--config.checkpoint.path={tiny.weights}', *args, **options,
    )  # fmt: skip

  run.workdir = workdir
  return run


@pytest.fixture(scope='module')
def finished(command, few):
  """What calibrate, sample, sample again and compare leave and say."""
  shutil.copytree(few, command.workdir)
  found = {
    'said': {'calibrate': (few.parent / 'said').read_text()},
    'files': {'calibrate': contents(command.workdir)},
  }
  steps = {
    'sample': ('sample',),
    'again': ('sample',),
    'compare': ('sample', '--config.sample.compare=True'),
  }
  for name, args in steps.items():
    done = command(*args)
    assert done.returncode == 0, done.stderr
    found['said'][name] = done.stdout + done.stderr
    found['files'][name] = contents(command.workdir)
  for text in found['said'].values():
    assert 'Traceback' not in text
  return found


def test_calibrate_leaves_quantizers_and_error_models(finished, command):
  files = finished['files']['calibrate']
  assert {
    'config.json',
    'error_model_tensor.npz',
    'error_model_channel.npz',
  } < (set(files))
  assert any(name.startswith('quantized/') for name in files)
  assert not [name for name in files if 'samples' in name]
  with np.load(command.workdir / 'error_model_tensor.npz') as model:
    assert model['timesteps'].tolist() == [751, 501, 251, 1]
    assert (model['var_d'] > 0).all() and (model['var_q'] > 0).all()


def test_calibrate_says_what_it_does(finished):
  said = finished['said']['calibrate']
  for part in ('trajectories', 'quantization', 'statistics', '--mode sample'):
    assert part in said
  assert 'Wrote' in said


def _results(found):
  """Of a calibration: what sampling reads, and stored units but for times."""
  kept = {}
  for name, data in found.items():
    if name.startswith('calibration/units/'):
      with np.load(io.BytesIO(data)) as file:
        kept[name] = {
          key: array.tobytes()
          for key, array in file.items()
          if key not in ('report:seconds', 'report:ms_per_iteration')
        }
    elif name.endswith('.npz') or '/trajectories/' in name:
      kept[name] = data
  return kept


# Files in the calibration directory at which the process is killed.
_FEW_KILLS = (6, 13)
_MANY_KILLS = (2, 3, 5, 7, 8, 9, 11, 12, 13, 14, 15, 16)


@pytest.mark.parametrize(
  'kills', [_FEW_KILLS, pytest.param(_MANY_KILLS, marks=pytest.mark.slow)]
)
def test_a_killed_calibration_ends_with_the_same_arrays(
  finished, command, tiny, tmp_path, kills
):
  """SIGKILL, the same command again, in the end the same bits."""
  workdir = tmp_path / 'work'
  for count in kills:
    process = command(
      'calibrate',
      workdir=workdir,
      call=subprocess.Popen,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    while len(contents(workdir / 'calibration')) < count:
      assert process.poll() is None, f'ended before there were {count} files'
      time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (workdir / 'quantized').exists()
  done = command('calibrate', workdir=workdir)
  assert done.returncode == 0, done.stderr
  found, want = contents(workdir), finished['files']['calibrate']
  assert _results(found) == _results(want)
  assert json.loads(found['runs.json'])[0]['mode'] == 'calibrate'
  # Nothing half-written is left: the same files, but for Orbax's own names.
  assert [n for n in found if not n.startswith('quantized')] == [
    n for n in want if not n.startswith('quantized')
  ]
  loaded = [
    artifacts.load(tiny.with_config('few'), files.Workdir.at(folder)).qstate
    for folder in (workdir, command.workdir)
  ]
  assert_trees_equal(*loaded)


def test_sample_writes_images_and_labels(finished, command):
  with np.load(command.workdir / 'samples' / 'samples.npz') as file:
    assert sorted(file) == ['arr_0', 'arr_1']
    images, labels = file['arr_0'], file['arr_1']
  assert images.dtype == np.uint8 and images.shape == (10, 8, 8, 1)
  assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
  assert labels.dtype == np.int32 and labels.shape == (10,)
  # Four classes: twice all of them, then the beginning of the next block.
  np.testing.assert_array_equal(np.bincount(labels[:8]), [2, 2, 2, 2])


def test_the_grid_shows_the_images(finished, command):
  with np.load(command.workdir / 'samples' / 'samples.npz') as file:
    images = file['arr_0']
  with Image.open(command.workdir / 'samples' / 'grid.png') as picture:
    picture.load()
    assert picture.format == 'PNG'
    pixels = np.asarray(picture)
  # Four columns, each image magnified to 64 pixels.
  first = images[0].repeat(8, 0).repeat(8, 1).repeat(3, 2)
  np.testing.assert_array_equal(pixels[4:68, 4:68], first)
  assert pixels.shape == (4 + 3 * 66 + 4, 4 + 4 * 66 + 4, 3)


def _but_for_runs(found):
  """Without what tells the time."""
  telling = ('runs.json', 'report.html')
  return {name: data for name, data in found.items() if name not in telling}


def test_sampling_twice_gives_the_same_bits(finished):
  first, second = finished['files']['sample'], finished['files']['again']
  assert _but_for_runs(first) == _but_for_runs(second)


def test_compare_draws_five_rows(finished, command):
  with Image.open(command.workdir / 'samples' / 'compare.png') as picture:
    picture.load()
    pixels = np.asarray(picture.convert('RGB'))
  # Ten columns of 64 pixels, and names to the left and above.
  assert pixels.shape[0] >= 5 * 64 + 24 and pixels.shape[1] >= 10 * 64 + 60
  said = finished['said']['compare']
  for name in ('full precision', 'W4A8', 'S-D2', 'D-D2', 'auto'):
    assert name in said
  assert said.count('dB PSNR') + said.count('equal') == 4


def test_sampling_leaves_the_calibration_as_it_was(finished):
  before, after = finished['files']['calibrate'], finished['files']['compare']
  new = {n: data for n, data in after.items() if not n.startswith('samples/')}
  changed = {n for n in before if before[n] != new[n]}
  assert set(new) == set(before) and changed <= {
    'config.json',
    'runs.json',
    'report.html',
  }


# ---- Wrong uses, as processes; many more are in tests/command.


def _assert_one_line(done, *parts):
  """One clear line on stderr, whatever was logged before it."""
  lines = done.stderr.strip().splitlines()
  assert done.returncode == 1, done.stderr
  assert lines and lines[-1].startswith('error: '), done.stderr
  assert 'Traceback' not in done.stderr
  assert len(lines[-1]) < 600
  for part in parts:
    assert part in lines[-1]
  return lines


@pytest.mark.parametrize(
  ('args', 'parts'),
  [
    (
      ('--config', _CONFIG, '--mode', 'sample', '--config.sampler.stepps=3'),
      ('unknown field stepps', 'Did you mean steps'),
    ),
    (('--mode', 'sample'), ('--config is missing', '--config mnist')),
  ],
)
def test_wrong_flags_are_one_line(args, parts, tmp_path):
  done = main_process(*args, '--workdir', tmp_path / 'work')
  assert len(_assert_one_line(done, *parts)) == 1
  assert not (tmp_path / 'work').exists()


def test_debug_shows_where(tmp_path):
  done = main_process('--config', _CONFIG, '--mode', 'smaple', '--debug')
  assert done.returncode != 0 and 'Traceback' in done.stderr
