"""Calibration: resumed, refused, and equal to what it is defined as."""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
  assert_error_models_equal,
  assert_trees_equal,
  contents,
)
from PIL import Image

from d2dpm_jax.denoising import gaussian
from d2dpm_jax.diffusion import noise
from d2dpm_jax.pipelines import (
  artifacts,
  calibrate,
  generation,
  layer_bits,
  quantize,
  trajectories,
)
from d2dpm_jax.quantization import (
  adaround,
  memory,
  policy,
  reconstruction,
  transform,
  units,
)
from d2dpm_jax.runtime import files, progress

# What differs from run to run.
_TIMES = ('report:seconds', 'report:ms_per_iteration')


def _units(paths):
  """Arrays of every stored unit."""
  found = {}
  for path in sorted((paths.calibration / 'units').glob('*.npz')):
    with np.load(path) as file:
      found[path.name] = {k: v for k, v in file.items() if k not in _TIMES}
  return found


def _assert_same_calibration(paths, quantized, calibrated):
  assert_trees_equal(quantized.qstate, calibrated.quantized.qstate)
  assert_error_models_equal(
    quantized.error_models, calibrated.quantized.error_models
  )
  want = _units(calibrated.paths)
  found = _units(paths)
  assert sorted(found) == sorted(want) and want
  for name, arrays in want.items():
    assert sorted(found[name]) == sorted(arrays)
    for key, array in arrays.items():
      np.testing.assert_array_equal(found[name][key], array)


@pytest.fixture
def copy(calibrated, tmp_path):
  """A copy of the finished calibration, to be damaged."""
  shutil.copytree(calibrated.paths.root, tmp_path / 'copy')
  return files.Workdir.at(tmp_path / 'copy')


# ---- What calibration is.


def test_every_layer_is_quantized_as_the_config_says(calibrated, tiny):
  quant = tiny.model.config.quant
  layers = {
    path: (state['weight'].bits, state['act'].bits)
    for path, state in calibrated.quantized.qstate.items()
  }
  edges = {'time_embed_0', 'input_blocks_0_0', 'out_2'}
  for path, bits in layers.items():
    want = (8, 8) if path in edges else (quant.weight_bits, quant.act_bits)
    assert bits == want, path
  assert edges < set(layers)
  kernels = jax.tree_util.tree_leaves_with_path(tiny.model.params['unet'])
  paths = {
    jax.tree_util.keystr(path[:-1], simple=True, separator='/')
    for path, _ in kernels
    if path[-1].key == 'kernel'
  }
  left = {p for p in paths - set(layers)}
  assert left == {p for p in paths if p.endswith('skip_connection')} != set()


def test_what_sees_the_latents_reaches_far_enough(calibrated, tiny):
  def ends(quantized):
    q = quantized['input_blocks_0_0']['act']
    low = -q.zero_point * q.scale
    return float(low), float(low + 255 * q.scale)

  low, high = ends(calibrated.quantized.qstate)
  assert low <= -4.9 and high >= 4.9
  table, _ = layer_bits.layer_policy(tiny.with_config(quant__latent_range=0.0))
  assert {bits.reach for bits in table.values() if bits} == {0.0}
  with pytest.raises(ValueError, match="latent_layers 'nothing' matches no"):
    layer_bits.layer_policy(tiny.with_config(quant__latent_layers='nothing'))


def test_learning_lowered_the_loss_of_units(calibrated):
  """Four iterations each: no unit got worse, most weights got better."""
  better = {'weight': [], 'act': []}
  for name, arrays in _units(calibrated.paths).items():
    before, after = arrays['report:loss_before'], arrays['report:loss_after']
    assert after <= before, name
    better[name.split('.')[0]].append(after < before)
  assert sum(better['weight']) >= 5 and sum(better['act']) >= 2


def _network(model, qstate):
  """Guided eps, written out: (x, t, labels) -> eps."""
  scale = model.config.sampler.guidance_scale
  apply = transform.quantize(model.ldm.unet.apply)

  @jax.jit
  def eps(params, qstate, x, t, labels):
    def one(labels):
      context = model.ldm.context(params, labels)
      return apply({'params': params['unet']}, qstate, x, t, context)

    null = one(jnp.full_like(labels, model.ldm.null_label))
    return null + scale * (one(labels) - null)

  params = generation.network_params(
    model.params, qstate, model.config.quant.float_dtype
  )
  return lambda *args: np.asarray(eps(params, qstate, *args))


@pytest.mark.parametrize('quantized', [False, True])
def test_stored_eps_is_that_of_the_network(calibrated, tiny, quantized):
  paths, model = calibrated.paths, tiny.model
  names = [f'000000.{field}' for field in trajectories.Batch._fields]
  batch = trajectories.Batch(
    *(trajectories.read_array(paths.trajectories, name) for name in names)
  )
  eps_q = trajectories.read_array(paths.calibration / 'eps_q', '000000')
  qstate = calibrated.quantized.qstate if quantized else {}
  network = _network(model, qstate)
  stored = eps_q if quantized else batch.eps
  timesteps = generation.rows_of(model.ldm, model.sampler).t
  for step in (0, 3):
    t = np.full(8, timesteps[step], np.int32)
    found = network(batch.x[:, step], t, batch.labels)
    distance = np.abs(found - stored[:, step])
    if not quantized:
      np.testing.assert_allclose(distance, 0, atol=2e-5)
    else:
      # Another program: where it rounds otherwise, an activation moves by one
      # step. That is rare and small beside the quantization error.
      error = np.abs(eps_q[:, step] - batch.eps[:, step])
      assert np.median(distance) < 1e-4 < 0.02 * np.median(error)
      assert distance.mean() < 0.1 * error.mean()


@pytest.mark.parametrize('kind', ['tensor', 'channel'])
def test_statistics_are_those_of_the_stored_arrays(calibrated, kind):
  """Against NumPy on all elements at once, outliers dropped as documented."""
  paths = calibrated.paths
  folder, names = paths.trajectories, ('000000', '000008')
  read = trajectories.read_array
  eps = np.concatenate([read(folder, f'{n}.eps') for n in names])
  eps_q = np.concatenate([read(paths.calibration / 'eps_q', n) for n in names])
  eps, eps_q = eps.astype(np.float64), eps_q.astype(np.float64)
  found = calibrated.quantized.error_models[kind]
  eps = eps[: len(eps_q)]  # Behind them are those of the trial.
  assert eps.shape == eps_q.shape == (12, 4, 4, 4, 3)
  np.testing.assert_array_equal(found.timesteps, [751, 501, 251, 1])
  for step in range(4):
    q = eps_q[:, step].reshape(-1, 3)
    d = q - eps[:, step].reshape(-1, 3)
    groups = [(q[:, c], d[:, c]) for c in range(3)]
    if kind == 'tensor':
      groups = [(q.ravel(), d.ravel())]
    for g, (q, d) in enumerate(groups):
      kept = np.abs(d - d.mean()) <= 4 * d.std()
      cov = np.cov(q[kept], d[kept])
      want = dict(
        mean_q=q[kept].mean(),
        mean_d=d[kept].mean(),
        var_q=cov[0, 0],
        var_d=cov[1, 1],
        cov=cov[0, 1],
        count=kept.sum(),
      )
      for name, value in want.items():
        row = np.atleast_1d(getattr(found, name)[step])
        np.testing.assert_allclose(row[g], value, rtol=1e-9, err_msg=name)


def test_more_bits_are_nearer_to_full_precision(tiny, tmp_path):
  """On inputs that calibration has not seen."""
  model = tiny.with_config(
    'few',
    quant__reconstruction__iters=0,
    quant__reconstruction__act_iters=0,
  )
  calibration = model.config.calibration
  spool = trajectories.collect(
    model, 12, calibration.batch_size, 2, tmp_path / 'spool'
  )
  program = generation.trajectory_program(model.ldm, model.sampler, 2)
  other = generation.Inputs(
    model.params, {}, None, noise.seed_key(99), model.sampler.scale
  )
  labels = np.arange(16, dtype=np.int32) % 4
  held_out = program(other, np.arange(16, dtype=np.int32), labels)
  ratios = {}
  for bits in (8, 3):
    model.config.quant.update(weight_bits=bits, act_bits=8)
    paths = files.Workdir.at(tmp_path / f'bits{bits}')
    qstate = jax.device_get(quantize.quantize(model, spool, paths))
    eps = generation.eps_program(model.ldm, model.sampler, 2)(
      other._replace(qstate=qstate), held_out['x'], labels
    )
    error = np.square(eps - held_out['eps']).mean()
    ratios[bits] = 10 * np.log10(np.square(held_out['eps']).mean() / error)
  assert 0 < ratios[3] < ratios[8] - 5 and ratios[8] > 25, ratios


# ---- Killed and resumed.


def test_a_finished_calibration_is_taken_over(copy, tiny, calibrated):
  before = contents(copy.calibration)
  quantized = calibrate.calibrate(tiny.model, copy)
  _assert_same_calibration(copy, quantized, calibrated)
  assert contents(copy.calibration) == before  # Nothing was made again.


def _killed_after(name, count):
  """`progress.progress`, whose bar `name` stops the run at a count."""
  plain = progress.progress

  class Bar:
    def __init__(self, bar):
      self.bar, self.done = bar, 0

    def update(self, n=1, note='', reused=False):
      self.bar.update(n, note)
      self.done += n
      if self.done >= count:
        raise KeyboardInterrupt

  @contextlib.contextmanager
  def replaced(which, *args):
    with plain(which, *args) as bar:
      yield Bar(bar) if which == name else bar

  return replaced


def test_an_interrupted_calibration_goes_on(
  tiny, calibrated, tmp_path, monkeypatch
):
  """Killed in each phase; the result is that of an undisturbed run."""
  paths = files.Workdir.at(tmp_path / 'work')
  stops = {'trajectories': 1, 'quantization': 5, 'statistics': 1}
  for name, count in stops.items():
    with monkeypatch.context() as patch:
      patch.setattr(progress, 'progress', _killed_after(name, count))
      with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(tiny.model, paths)
    assert not paths.quantized.exists(), name
    with pytest.raises(FileNotFoundError, match='no finished calibration'):
      artifacts.load(tiny.model, paths)
    if name == 'quantization':
      assert len(_units(paths)) == count
  quantized = calibrate.calibrate(tiny.model, paths)
  _assert_same_calibration(paths, quantized, calibrated)


def test_missing_and_damaged_units_are_made_again(
  copy, tiny, calibrated, caplog
):
  stored = sorted((copy.calibration / 'units').glob('*.npz'))
  stored[1].write_bytes(b'PK\x03\x04 and no more')
  stored[4].write_bytes(stored[4].read_bytes()[:-50])
  stored[-2].unlink()
  (copy.calibration / 'eps_q' / '000008.npy').unlink()
  # One bit of an array: the file is whole, and would be read without a word.
  flipped = bytearray((copy.trajectories / '000000.eps.npy').read_bytes())
  flipped[-4000] ^= 4
  (copy.trajectories / '000000.eps.npy').write_bytes(flipped)
  lines = copy.calibration / 'metrics.jsonl'
  lines.write_bytes(lines.read_bytes()[:50])
  with caplog.at_level(logging.WARNING, 'd2dpm_jax'):
    quantized = calibrate.calibrate(tiny.model, copy)
  _assert_same_calibration(copy, quantized, calibrated)
  rows = [json.loads(line) for line in lines.read_text().splitlines()]
  assert [row['step'] for row in rows] == list(range(len(_units(copy))))
  warnings = [r.getMessage() for r in caplog.records if 'damaged' in r.msg]
  assert len(warnings) == 3
  for name in (stored[1].name, stored[4].name, '000000.eps.npy'):
    assert name in ' '.join(warnings)


def test_a_full_disk_is_told_and_costs_nothing(
  tiny, calibrated, tmp_path, monkeypatch
):
  """The third unit does not fit: what was done is there, and is taken over."""
  paths = files.Workdir.at(tmp_path / 'work')
  plain, saved = np.savez, []

  def savez(file, **arrays):
    plain(file, **arrays)
    saved.append(file)
    if len(saved) == 3:
      raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(np, 'savez', savez)
    with pytest.raises(OSError, match='No space left'):
      calibrate.calibrate(tiny.model, paths)
  assert len(_units(paths)) == 2
  assert not list(paths.root.rglob('.*.unfinished'))
  quantized = calibrate.calibrate(tiny.model, paths)
  _assert_same_calibration(paths, quantized, calibrated)


def test_two_calibrations_do_not_share_a_directory(copy, tiny):
  with files.claimed(copy.calibration):
    with pytest.raises(ValueError, match='Another process writes into'):
      calibrate.calibrate(tiny.model, copy)


# ---- What is told of it.


def test_units_leave_metrics_a_plot_and_a_summary(calibrated):
  directory = calibrated.paths.calibration
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  stored = _units(calibrated.paths)
  assert [row['step'] for row in rows] == list(range(len(stored)))
  for row in rows:
    arrays = stored[f'{row["unit"].replace("/", ".")}.npz']
    assert row['loss_before'] == arrays['report:loss_before']
    assert row['loss_after'] == arrays['report:loss_after']
    assert row['seconds'] > 0
  with Image.open(calibrated.paths.unit_plot) as picture:
    picture.load()
    assert min(picture.size) > 300 and np.asarray(picture).std() > 10
  summary = files.read_json(calibrated.paths.unit_summary)
  assert summary['snr_db']['weight'] > summary['snr_db']['act'] > 0
  table = calibrated.paths.unit_table.read_text()
  assert f'{summary["snr_db"]["act"]:.2f} dB after act' in table


def test_units_that_learning_did_not_improve_are_warned_of(caplog, tmp_path):
  unit = units.Unit('block', 'ResBlock', ('block/conv',), learned=True)
  facts = dict(
    signal=1.0, flipped=0.0, learned=True, kept_initial=True, seconds=1.0
  )
  reports = [
    reconstruction.UnitReport(unit, 'weight', 0.5, 0.5, **facts),
    reconstruction.UnitReport(
      unit, 'act', 0.5, 0.4, **(facts | {'kept_initial': False})
    ),
  ]
  result = reconstruction.Result({}, reports, {'weight': 3.0, 'act': 2.0})
  paths = files.Workdir.at(tmp_path)
  with caplog.at_level(logging.WARNING, 'd2dpm_jax'):
    quantize.report(result, paths)
  (warning,) = [r.getMessage() for r in caplog.records]
  assert 'did not improve 1 unit' in warning and 'weight/block' in warning
  assert files.read_json(paths.unit_summary)['not_improved'] == ['weight/block']


def test_memory_that_is_not_there_is_told_before_the_work(tiny, monkeypatch):
  apply = tiny.model.ldm.unet.apply
  table, _ = layer_bits.layer_policy(tiny.model)
  settings = quantize.reconstruction_settings(tiny.model.config.quant)
  variables = {'params': tiny.model.params['unet']}
  inputs = (
    np.zeros([4000, 4, 4, 3], np.float32),
    np.zeros([4000], np.int32),
    np.zeros([4000, 1, 16], np.float32),
  )
  plan = functools.partial(
    quantize.plan_memory, apply, variables, table, inputs, settings
  )
  types = tuple(tiny.model.config.quant.block_types)
  need = memory.predict(apply, variables, table, inputs, settings, types)
  monkeypatch.setattr(quantize, 'host_memory', lambda: 1e12)
  found = {}
  for name, free in {
    'roomy': 100 * need.on_device(False, 1),
    'tight': 1.05 * need.on_device(True, 1),
    'small': 0.9 * need.on_device(True, 1),
  }.items():
    monkeypatch.setattr(
      quantize, 'device_memory', lambda free=free: (free, 'device')
    )
    if name == 'small':
      with pytest.raises(ValueError, match='lower --config.calibration.num_sa'):
        plan(types)
    else:
      found[name] = plan(types).host_streams
  assert found == {'roomy': False, 'tight': True}


def test_predicted_memory_is_that_of_the_arrays(tiny):
  """A network whose peak can be told by hand: two layers and a skip."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.Dense(64, name='a')(x)
      y = nn.Dense(8, name='b')(h)
      return nn.Dense(4, name='c')(jnp.concatenate([y, h], -1))

  net, x = Net(), jax.ShapeDtypeStruct((100, 16), np.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  table = {name: policy.LayerBits(4, 8) for name in 'abc'}
  need = memory.predict(
    net.apply, variables, table, (x,), adaround.Settings(chunk=10)
  )
  # Alive at the concatenation: h, y and both together.
  assert need.streams == 2 * 100 * 4 * (64 + 8 + 72)
  assert need.unit == 2 * 100 * 4 * (16 + 64)
  assert need.weights == 4 * (16 * 64 + 64 + 64 * 8 + 8 + 72 * 4 + 4)


def test_labels_of_calibration_are_balanced_or_drawn():
  index = np.arange(40)
  balanced = trajectories.draw_labels(3, index, 10, True)
  np.testing.assert_array_equal(np.bincount(balanced), [4] * 10)
  drawn = trajectories.draw_labels(3, index, 10, False)
  assert drawn.min() >= 0 and drawn.max() < 10
  assert len(set(np.bincount(drawn, minlength=10))) > 1
  np.testing.assert_array_equal(
    trajectories.draw_labels(3, index[5:9], 10, False), drawn[5:9]
  )


# ---- On disk.


def test_artifacts_round_trip(calibrated, tiny):
  found = artifacts.load(tiny.model, calibrated.paths)
  want = calibrated.quantized
  assert_trees_equal(found.qstate, want.qstate)
  assert_error_models_equal(found.error_models, want.error_models)


@pytest.mark.parametrize(
  ('field', 'value', 'text'),
  [
    ('weight_bits', 8, 'quant.weight_bits: saved 4, now 8'),
    ('act_bits', 6, 'quant.act_bits: saved 8, now 6'),
    ('edge_bits', 4, 'quant.edge_bits: saved 8, now 4'),
    ('per_channel', False, 'quant.per_channel: saved True, now False'),
  ],
)
def test_artifacts_of_other_settings_are_refused(
  calibrated, tiny, field, value, text
):
  other = tiny.with_config(**{f'quant__{field}': value})
  with pytest.raises(ValueError, match=text):
    artifacts.load(other, calibrated.paths)


def test_artifacts_of_other_weights_are_refused(calibrated, tiny):
  other = dataclasses.replace(tiny.model, digest='0' * 16)
  with pytest.raises(ValueError, match=f'saved .{tiny.model.digest}., now .00'):
    artifacts.load(other, calibrated.paths)


def test_error_model_of_another_kind_of_calibration_is_refused(copy, tiny):
  """A file from elsewhere beside the right quantizers."""
  path = copy.error_model('tensor')
  model = gaussian.ErrorModel.load(path)
  settings = {**model.settings, 'weights': 'other'}
  dataclasses.replace(model, settings=settings).save(path)
  with pytest.raises(ValueError, match='error_model_tensor.npz.*other'):
    artifacts.load(tiny.model, copy)


def test_missing_and_unfinished_calibrations(copy, tiny, tmp_path):
  nothing = files.Workdir.at(tmp_path / 'nothing')
  with pytest.raises(FileNotFoundError, match='--mode calibrate first'):
    artifacts.load(tiny.model, nothing)
  assert not nothing.root.exists()
  (copy.quantized / 'd2dpm_meta.json').unlink()
  with pytest.raises(FileNotFoundError, match='--mode calibrate first'):
    artifacts.load(tiny.model, copy)


# ---- Refused.


def test_a_directory_of_other_settings_is_left_as_it_was(copy, tiny):
  before = contents(copy.root)
  other = tiny.with_config(quant__weight_bits=8, seed=3)
  with pytest.raises(ValueError) as error:
    calibrate.calibrate(other, copy)
  for part in (
    str(copy.root),
    'quant.weight_bits: saved 4, now 8',
    'seed: saved 0, now 3',
    'Choose another --workdir',
  ):
    assert part in str(error.value)
  assert contents(copy.root) == before


@pytest.mark.parametrize(
  ('field', 'value', 'text'),
  [
    ('quant__weight_bits', 1, '1'),
    ('quant__weight_bits', 9, '9'),
    ('quant__act_bits', 1, '1'),
    ('quant__edge_bits', 16, '16'),
    ('quant__weight_range', 'maximum', "'maximum'"),
    ('quant__act_range', '', "''"),
    ('quant__edge_layers', 'time_embed_9', 'time_embed_9'),
    ('quant__latent_range', -1.0, 'latent_range'),
    ('quant__latent_range', float('nan'), 'latent_range'),
    ('quant__latent_layers', '(', "latent_layers '\\('"),
    ('quant__block_types', ('ResBlok',), "'ResBlok'.*'ResBlock'"),
    ('quant__reconstruction__lr', float('nan'), 'lr=nan'),
    ('quant__reconstruction__act_p', 0.0, 'act_p=0.0'),
    ('quant__float_layers', '(', "'\\('"),
    ('quant__reconstruction__iters', -1, 'iters'),
    ('quant__reconstruction__batch_size', 0, 'batch_size'),
    ('quant__reconstruction__drop_prob', 1.0, 'drop_prob'),
    ('sampler__steps', 0, '0'),
    ('sampler__steps', 1000, '1000'),
    ('sampler__eta', -1.0, '-1'),
    ('calibration__num_samples', 0, 'num_samples'),
    ('calibration__batch_size', 0, 'batch_size'),
    ('calibration__timesteps', 'unifrom', "'unifrom'"),
    ('statistics__num_samples', 0, 'num_samples'),
    ('statistics__outlier_std', 0.0, 'outlier_std'),
    ('sample__microbatch', 0, 'microbatch'),
  ],
)
def test_bad_settings_are_named_and_leave_nothing(
  tiny, tmp_path, field, value, text
):
  """Most of all no claim on the directory, which the next run would meet."""
  paths = files.Workdir.at(tmp_path / 'work')
  with pytest.raises(ValueError, match=text) as error:
    calibrate.calibrate(tiny.with_config(**{field: value}), paths)
  assert '\n' not in str(error.value)
  assert not paths.root.exists()
