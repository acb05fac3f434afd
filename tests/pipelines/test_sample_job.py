"""Samples on disk: only what is missing is made, and nothing is lost."""

import dataclasses
import errno
import io
import json
import logging
import os
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from helpers import contents

from d2dpm_jax.pipelines import sample, sample_job, shards
from d2dpm_jax.runtime import files, interruption

_SHAPE = (4, 4, 3)


def _images(index):
  """Image k is a function of k."""
  rng = [np.random.default_rng(int(k)) for k in index]
  return np.stack([r.integers(0, 256, _SHAPE, np.uint8) for r in rng])


def _labels(index):
  return (np.asarray(index) * 7 % 5).astype(np.int32)


class _Run:
  """Counts the images that it makes."""

  def __init__(self):
    self.made = []

  def launch(self, index, labels, room=0):
    assert len(index) <= room
    np.testing.assert_array_equal(labels, _labels(index))
    self.made += index.tolist()
    return _Launched(index)


class _Launched:
  def __init__(self, index):
    self.index = index

  def fetch(self, *names):
    assert names == ('images',)
    return {'images': _images(self.index)}


def _make(paths, wanted, batch_size=8):
  """Returns the images that were not there yet."""
  run = _Run()
  sample_job.make(run, _labels, wanted, batch_size, paths)
  return run.made


@pytest.fixture
def paths(tmp_path):
  return files.Workdir.at(tmp_path / 'work')


def _shards(paths):
  return sorted(paths.shards.glob('*.npz'))


def test_the_merged_file_is_what_the_evaluator_reads(paths):
  assert _make(paths, 30) == list(range(30))
  with np.load(paths.all_samples) as file:
    assert sorted(file) == ['arr_0', 'arr_1']
    np.testing.assert_array_equal(file['arr_0'], _images(range(30)))
    np.testing.assert_array_equal(file['arr_1'], _labels(range(30)))
    assert file['arr_0'].dtype == np.uint8 and file['arr_1'].dtype == np.int32


def test_the_merged_file_does_not_depend_on_how_it_was_made(paths, tmp_path):
  _make(paths, 30, batch_size=8)
  for size in (1, 7, 30, 64):
    other = files.Workdir.at(tmp_path / str(size))
    _make(other, 13, batch_size=5)
    _make(other, 30, batch_size=size)
    assert other.all_samples.read_bytes() == paths.all_samples.read_bytes()


def test_only_holes_are_filled(paths):
  _make(paths, 40)
  whole = contents(paths.samples)
  assert _make(paths, 40) == []
  assert contents(paths.samples) == whole
  for number in (1, 3):
    _shards(paths)[number].unlink()
    assert _make(paths, 40) == list(range(8 * number, 8 * number + 8))
  assert paths.all_samples.read_bytes() == whole['samples.npz']


def test_more_images_than_before(paths):
  _make(paths, 20)
  assert _make(paths, 50) == list(range(20, 50))
  # And fewer: those beyond are left where they are.
  assert _make(paths, 10) == []
  with np.load(paths.all_samples) as file:
    np.testing.assert_array_equal(file['arr_0'], _images(range(10)))
  assert _make(paths, 50) == []


@pytest.mark.parametrize('damage', ['flip', 'cut', 'empty', 'swap'])
def test_a_damaged_shard_is_made_again(paths, caplog, damage):
  _make(paths, 40)
  whole = paths.all_samples.read_bytes()
  path = _shards(paths)[2]
  data = bytearray(path.read_bytes())
  if damage == 'flip':
    data[len(data) // 2] ^= 1
  elif damage == 'cut':
    data = data[:-100]
  elif damage == 'empty':
    data = bytearray()
  else:  # Intact, but of other images.
    data = bytearray(_shards(paths)[1].read_bytes())
  path.write_bytes(data)
  with caplog.at_level(logging.WARNING, 'd2dpm_jax'):
    assert _make(paths, 40) == list(range(16, 24))
  assert f'{path} is damaged' in caplog.text
  assert paths.all_samples.read_bytes() == whole


def test_a_shard_that_breaks_later_is_named(paths):
  _make(paths, 16)
  path = _shards(paths)[1]
  data = bytearray(path.read_bytes())
  data[300] ^= 1
  path.write_bytes(data)
  before = paths.all_samples.read_bytes()
  with pytest.raises(ValueError, match=f'{path.name} is damaged.*same command'):
    shards.Shards(paths.shards).merge(paths.all_samples, 16)
  with pytest.raises(ValueError, match=r'has no images .*start=16, stop=20'):
    shards.Shards(paths.shards).merge(paths.all_samples, 20)
  assert paths.all_samples.read_bytes() == before


def test_a_full_disk_is_one_line_and_loses_no_shard(paths, monkeypatch):
  plain, written = np.savez, []

  def savez(file, **arrays):
    plain(file, **arrays)
    written.append(file)
    if len(written) == 3:
      raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(np, 'savez', savez)
    with pytest.raises(
      OSError, match='disk is full. 16 of 40 .* kept'
    ) as error:
      _make(paths, 40)
  assert error.value.errno == errno.ENOSPC and '\n' not in str(error.value)
  assert not list(paths.root.rglob('.*.unfinished'))
  assert _make(paths, 40) == list(range(16, 40))


def test_a_disk_that_is_full_when_all_is_merged(paths, monkeypatch):
  def write_member(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(shards, '_write_member', write_member)
    with pytest.raises(OSError, match='disk is full. 20 of 20 .* kept'):
      _make(paths, 20)
  assert not paths.all_samples.exists()
  assert not list(paths.root.rglob('.*.unfinished'))
  assert _make(paths, 20) == []


def test_other_errors_of_the_writer_are_told_as_they_are(paths, monkeypatch):
  def fail(*_, **__):
    raise PermissionError(errno.EACCES, 'Permission denied')

  monkeypatch.setattr(np, 'savez', fail)
  with pytest.raises(PermissionError):
    _make(paths, 8)


def test_progress_is_in_a_file(paths):
  _make(paths, 16)
  _make(paths, 30)
  lines = (paths.samples / 'metrics.jsonl').read_text().split('\n')
  rows = [json.loads(line) for line in lines if line]
  assert [row['step'] for row in rows] == [8, 16, 24, 30]
  assert all(row['images_per_second'] > 0 for row in rows)


def test_a_signal_while_merging_leaves_the_old_file(paths, monkeypatch):
  _make(paths, 16)
  before = contents(paths.samples)
  directory = shards.Shards(paths.shards)
  directory.write(16, _images(range(16, 20)), _labels(range(16, 20)))
  plain = shards.Shards.read

  def read(self, which):
    if which.start == 8:
      raise interruption.Interrupted('SIGTERM')
    return plain(self, which)

  monkeypatch.setattr(shards.Shards, 'read', read)
  with pytest.raises(interruption.Interrupted):
    directory.merge(paths.all_samples, 20)
  found = contents(paths.samples)
  assert found.pop('shards/00000016-00000020.npz') and found == before


def test_merging_holds_one_shard_in_memory(paths):
  directory = shards.Shards(paths.shards)
  images = np.zeros((16, 256, 256, 3), np.uint8)
  for number in range(8):
    directory.write(16 * number, images + number, np.zeros(16, np.int32))
  tracemalloc.start()
  directory.merge(paths.all_samples, 128)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 2.5 * images.nbytes < 8 * images.nbytes
  with np.load(paths.all_samples) as file:
    assert file['arr_0'][:, 0, 0, 0].tolist() == sorted([*range(8)] * 16)


def test_a_merged_file_may_be_larger_than_4_gb():
  """Its members are written with sizes of 64 bits, before they are known."""
  target = io.BytesIO()
  with zipfile.ZipFile(target, 'w') as archive:
    one = np.zeros((1, 2), np.uint8)
    shards._write_member(archive, 'arr_0', (1, 2), one.dtype, [one])
  header = target.getvalue()[:30]
  assert header[18:26] == b'\xff' * 8  # Sizes are in the zip64 field.


@pytest.mark.parametrize(
  ('ranges', 'want'),
  [
    ([], [(0, 10)]),
    ([(0, 10)], []),
    ([(0, 4), (6, 20)], [(4, 6)]),
    ([(2, 3), (1, 5), (3, 4)], [(0, 1), (5, 10)]),
    ([(12, 20)], [(0, 10)]),
    ([(0, 20)], []),
  ],
)
def test_holes(ranges, want):
  assert shards.holes([shards.Range(*r) for r in ranges], 10) == want


def test_batches_cover_the_holes():
  found = shards.split([(0, 5), (8, 16)], 4)
  assert found == [(0, 4), (4, 5), (8, 12), (12, 16)]


# ---- The whole mode.


def _run(tiny, workdir, **overrides):
  config = tiny.config(sample__quantized=False, **overrides)
  sample.run(config, str(workdir))
  return (workdir / 'samples' / 'samples.npz').read_bytes()


def test_batch_size_and_restarts_leave_the_same_file(tiny, tmp_path):
  whole = _run(tiny, tmp_path / 'a')
  _run(tiny, tmp_path / 'b', sample__num_images=3, sample__batch_size=1)
  found = _run(tiny, tmp_path / 'b', sample__batch_size=5)
  assert found == whole
  names = sorted(os.listdir(tmp_path / 'b' / 'samples' / 'shards'))
  assert [n for n in names if n.endswith('npz')] == [
    '00000000-00000001.npz',
    '00000001-00000002.npz',
    '00000002-00000003.npz',
    '00000003-00000008.npz',
    '00000008-00000010.npz',
  ]


def test_two_runs_do_not_share_a_directory(tiny, paths):
  with files.claimed(paths.shards):
    with pytest.raises(ValueError, match='Another process writes into'):
      _run(tiny, paths.root)


def test_samples_of_other_settings_are_refused(tiny, tmp_path):
  workdir = tmp_path / 'a'
  _run(tiny, workdir)
  before = contents(workdir)
  for overrides, text in (
    (dict(seed=1), 'seed: saved 0, now 1'),
    (dict(sampler__steps=5), 'sampler.steps: saved 4, now 5'),
    (dict(sample__microbatch=4), 'microbatch: saved 2, now 4'),
    (dict(sample__labels=(1,)), r"labels: saved 'balanced', now \(1,\)"),
  ):
    with pytest.raises(ValueError, match=text):
      _run(tiny, workdir, **overrides)
  assert contents(workdir) == before


def test_quantized_samples_depend_on_correction_and_quantizers(calibrated):
  """What is kept with the shards tells all of them apart."""

  def settings(quantized, correction, **overrides):
    config = quantized.model.config
    config = config.copy_and_resolve_references()
    config.sample.update(correction=correction, **overrides)
    model = dataclasses.replace(quantized.model, config=config)
    quantized = dataclasses.replace(quantized, model=model)
    runner = sample.batch_runner(quantized, correction, False, False, 2, 0)
    return sample._settings_of(quantized, runner)

  first = settings(calibrated.quantized, 'd-d2')
  again = settings(calibrated.quantized, 'd-d2', num_images=7, batch_size=3)
  assert json.loads(json.dumps(first)) == json.loads(json.dumps(again))
  other = settings(calibrated.quantized, 'none')
  assert 'correction' in str(files.differences(first, other))
  learned = dataclasses.replace(
    calibrated.quantized,
    qstate=jax.tree.map(lambda x: 1.01 * x, calibrated.quantized.qstate),
  )
  changed = files.differences(first, settings(learned, 'd-d2'))
  assert len(changed) == 1 and changed[0].startswith('quantizers: saved')
