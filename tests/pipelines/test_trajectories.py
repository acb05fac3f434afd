"""Full-precision trajectories on disk: made once, the same when made again."""

import logging
import shutil

import jax
import numpy as np
import pytest
from helpers import contents

from d2dpm_jax.diffusion import noise
from d2dpm_jax.pipelines import generation, statistics, trajectories


def _collect(model, directory):
  config = model.config
  return trajectories.collect(
    model,
    statistics.num_trajectories(config),
    config.calibration.batch_size,
    config.sample.microbatch,
    directory,
  )


@pytest.fixture
def spool(calibrated, tmp_path):
  """A copy of the trajectories of the calibration: 8 and 7 images."""
  shutil.copytree(calibrated.paths.trajectories, tmp_path / 'spool')
  return tmp_path / 'spool'


def test_what_is_stored(calibrated, tiny):
  found = list(_collect(tiny.model, calibrated.paths.trajectories))
  assert [len(batch.x) for batch in found] == [8, 7]
  for batch in found:
    assert batch.x.shape == batch.eps.shape == (len(batch.x), 4, 4, 4, 3)
    assert batch.x.dtype == batch.eps.dtype == np.float32
    assert batch.labels.dtype == np.int32
  labels = np.concatenate([batch.labels for batch in found])
  assert sorted(np.bincount(labels)) == [3, 4, 4, 4]


def test_calibration_noise_is_not_that_of_samples(calibrated, tiny):
  x_first = _collect(tiny.model, calibrated.paths.trajectories).batch(0).x[:, 0]
  shape = tiny.model.ldm.latent_shape
  sampled = noise.initial_noise(noise.seed_key(0), np.arange(8), shape)
  assert np.abs(x_first - sampled).max(axis=(1, 2, 3)).min() > 0.1
  key = jax.random.fold_in(noise.seed_key(0), 0xCA1)
  np.testing.assert_array_equal(
    x_first, noise.initial_noise(key, np.arange(8), shape)
  )


@pytest.mark.parametrize('name', ['000000.x', '000000.labels', '000008.eps'])
def test_a_missing_file_is_made_again(spool, tiny, name):
  before = contents(spool)
  (spool / f'{name}.npy').unlink()
  _collect(tiny.model, spool)
  assert contents(spool) == before


def test_what_is_there_is_not_made_again(spool, tiny, monkeypatch):
  def program(*_, **__):
    raise AssertionError('the network was run')

  monkeypatch.setattr(generation, 'trajectory_program', lambda *_: program)
  before = contents(spool)
  _collect(tiny.model, spool)
  assert contents(spool) == before


def test_a_damaged_file_is_made_again(spool, tiny, caplog):
  before = contents(spool)
  path = spool / '000008.x.npy'
  path.write_bytes(path.read_bytes()[:-100])
  with caplog.at_level(logging.WARNING, 'd2dpm_jax'):
    found = _collect(tiny.model, spool)
  assert '000008.x.npy is damaged' in caplog.text
  assert contents(spool) == before
  # Damaged after it was looked at.
  path.write_bytes(path.read_bytes()[:-100])
  found.batch(0)
  with pytest.raises(ValueError, match='000008.x.npy is damaged'):
    found.batch(8)


def test_pickles_are_refused(tmp_path):
  array = np.array([{'a': 1}], dtype=object)
  np.save(tmp_path / 'x.npy', array, allow_pickle=True)
  with pytest.raises(ValueError, match='x.npy is damaged'):
    trajectories.read_array(tmp_path, 'x')


def test_other_settings_are_refused_with_both_values(spool, tiny):
  before = contents(spool)
  other = tiny.with_config(sampler__guidance_scale=1.5, seed=7)
  with pytest.raises(ValueError) as error:
    _collect(other, spool)
  for part in (
    str(spool),
    'sampler.guidance_scale: saved 3.0, now 1.5',
    'seed: saved 0, now 7',
  ):
    assert part in str(error.value)
  assert contents(spool) == before


def test_claim_marks_once_and_then_compares(tmp_path):
  trajectories.claim(tmp_path / 'a', {'n': 1, 'sizes': (1, 2)})
  before = contents(tmp_path)
  trajectories.claim(tmp_path / 'a', {'n': 1, 'sizes': (1, 2)})
  with pytest.raises(ValueError, match='n: saved 1, now 2'):
    trajectories.claim(tmp_path / 'a', {'n': 2, 'sizes': (1, 2)})
  assert contents(tmp_path) == before and list(before) == ['a/settings.json']


# ---- Inputs of calibration, drawn from trajectories that tell where they are.


class _Spool(list):
  """Batches whose x is 100 * image + step, with label image % 4."""

  def __init__(self, sizes, steps=4):
    first = 0
    for size in sizes:
      number = np.arange(first, first + size)
      x = 100 * number[:, None] + np.arange(steps)
      x = np.broadcast_to(x[..., None, None, None], (*x.shape, 2, 2, 3))
      labels = (number % 4).astype(np.int32)
      self.append(trajectories.Batch(x.astype(np.float32), x, labels))
      first += size


_TIMESTEPS = np.array([751, 501, 251, 1])


def _inputs(tiny, sizes=(8, 8, 8), count=24, seed=0, distribution='uniform'):
  return trajectories.network_inputs(
    _Spool(sizes), count, tiny.model, _TIMESTEPS, seed, distribution
  )


def test_inputs_belong_together(tiny):
  """x, t and label of a row are of the same image and step."""
  x, t, labels = _inputs(tiny)
  assert x.shape == (24, 2, 2, 3) and t.dtype == labels.dtype == np.int32
  number, step = np.divmod(x[:, 0, 0, 0].astype(int), 100)
  np.testing.assert_array_equal(number, np.arange(24))
  np.testing.assert_array_equal(t, _TIMESTEPS[step])
  null = labels == 4
  np.testing.assert_array_equal(labels[~null], number[~null] % 4)
  assert null.sum() == 12  # With guidance the network sees both, half each.


def test_uniform_inputs_see_every_step_equally_often(tiny):
  _, t, _ = _inputs(tiny)
  values, counts = np.unique(t, return_counts=True)
  np.testing.assert_array_equal(values, np.sort(_TIMESTEPS))
  np.testing.assert_array_equal(counts, [6, 6, 6, 6])


def test_uniform_inputs_do_not_depend_on_batches(tiny):
  """More steps than a batch has images, and a batch of one."""
  for sizes in ((24,), (1,) * 24, (3,) * 8, (30,)):
    _, t, labels = _inputs(tiny, sizes, 24)
    np.testing.assert_array_equal(np.unique(t, return_counts=True)[1], [6] * 4)
    assert (labels == 4).sum() == 12


def test_normal_inputs_gather_around_a_share_of_the_steps(tiny):
  """Clipped N(0.4, 0.4) * S from the clean end, against a large sample."""
  _, t, _ = _inputs(tiny, (4000,), 4000, distribution='normal')
  shares = [(t == value).mean() for value in (1, 251, 501, 751)]
  drawn = np.random.default_rng(1).normal(0.4, 0.4, 10**6) * 4
  index = np.clip(drawn, 0, 3).astype(int)
  want = np.bincount(index) / len(index)
  np.testing.assert_allclose(shares, want, atol=0.03)
  assert abs(shares[0] - 0.25) > 0.05  # Not uniform.


def test_inputs_are_the_seeds_choice(tiny):
  first, again, other = _inputs(tiny), _inputs(tiny), _inputs(tiny, seed=1)
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a, b)
  assert (first[1] != other[1]).any() and (first[2] != other[2]).any()


def test_fewer_inputs_than_trajectories(tiny):
  x, t, labels = _inputs(tiny, count=10)
  assert len(x) == len(t) == len(labels) == 10


def test_without_guidance_no_label_is_dropped(tiny):
  plain = tiny.with_config(sampler__guidance_scale=1.0)
  _, _, labels = trajectories.network_inputs(
    _Spool([8]), 8, plain, _TIMESTEPS, 0, 'uniform'
  )
  np.testing.assert_array_equal(labels, np.arange(8) % 4)


def test_unknown_distribution(tiny):
  with pytest.raises(ValueError, match="'unifrom': expected one of"):
    _inputs(tiny, distribution='unifrom')
