"""What can be done wrong: each is one line that says what to do about it.

Whole command lines, run in this process: starting Python takes longer.
"""

import errno
import io
import os
import pathlib
import shutil
import sys
import threading

import jax
import numpy as np
import pytest

from d2dpm_jax.command import main
from d2dpm_jax.runtime import processes

_TESTS = pathlib.Path(__file__).parents[1]
_CONFIG = str(_TESTS / 'tiny_config.py')
_TINY = ('--config', _CONFIG)
_FEW = ('--config', f'{_CONFIG}:few')


@pytest.fixture
def call(tiny, tmp_path, capfd, monkeypatch):
  """Runs a command line on the tiny model; returns the error's line."""
  monkeypatch.chdir(tmp_path)

  def run(*args, config=_TINY, workdir=None):
    argv = ['main.py', *config, *map(str, args)]
    if config and not any('checkpoint.path' in str(arg) for arg in args):
      argv.insert(3, f'--config.checkpoint.path={tiny.weights}')
    if workdir is not None:
      argv += ['--workdir', str(workdir)]
    capfd.readouterr()
    code = main.main(argv)
    said = capfd.readouterr()
    lines = [x for x in said.err.splitlines() if x.startswith('error: ')]
    assert code == 1, said.err
    assert len(lines) == 1 and said.err.rstrip().endswith(lines[0]), said.err
    assert 'Traceback' not in said.err + said.out
    assert len(lines[0]) < 600
    return lines[0]

  return run


# ---- Flags.

_FLAGS = {
  'no config': (
    ('--mode', 'sample'), (), ('--config is missing', '--config mnist')
  ),
  'config that is not there': (
    ('--mode', 'sample'), ('--config', 'none/none.py'),
    ('none/none.py: there is no such file',),
  ),
  'misspelt config': (
    ('--mode', 'sample'), ('--config', 'mnits'), ("Did you mean 'mnist'?",)
  ),
  'unknown word': (
    ('--mode', 'sample'), ('--config', 'mnist:quick'),
    ("'quick' is unknown", 'paper_w4a8'),
  ),
  'contradicting words': (
    ('--mode', 'sample'), ('--config', 'mnist:fast,full'), ('contradict',)
  ),
  'field without config': (
    ('--config.seed=1', '--mode', 'sample'), (), ('--config, which is missing',)
  ),
  'no mode': ((), _TINY, ('--mode is missing', 'calibrate, sample')),
  'misspelt mode': (
    ('--mode', 'calbrate'), _TINY, ("Did you mean 'calibrate'?",)
  ),
  'misspelt flag': (
    ('--mode', 'sample', '--confg.seed=1'), _TINY,
    ('Unknown flag --confg.seed', 'Did you mean --config.seed?'),
  ),
  'flag without value': (
    ('--mode', 'sample', '--workdir'), _TINY, ('Missing value', '--workdir')
  ),
  'word that is no flag': (
    ('--mode', 'sample', 'now'), _TINY, ('Unexpected arguments: now',)
  ),
  'misspelt field': (
    ('--mode', 'sample', '--config.sampler.stepps=3'), _TINY,
    ('unknown field stepps', 'Did you mean steps'),
  ),
  'misspelt section': (
    ('--mode', 'sample', '--config.smaple.num_images=3'), _TINY,
    ('unknown field smaple', 'Did you mean'),
  ),
  'wrong type, number': (
    ('--mode', 'sample', '--config.sampler.steps=many'), _TINY,
    ('--config.sampler.steps=many', 'invalid literal for int'),
  ),
  'wrong type, truth': (
    ('--mode', 'sample', '--config.sample.quantized=perhaps'), _TINY,
    ('--config.sample.quantized=perhaps', 'boolean'),
  ),
  'no such field to list': (
    ('--help_config', 'smaple'), _TINY, ('no field', 'smaple')
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', _FLAGS)
def test_flags(call, case, tmp_path):
  args, config, parts = _FLAGS[case]
  line = call(*args, config=config)
  for part in parts:
    assert part in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('text', 'parts'),
  [
    ('x = 1\n', ('broken.py', 'get_config')),
    ('def get_config(:\n', ('broken.py', 'invalid syntax')),
    ('import nothing_of_that_name\n', ('nothing_of_that_name',)),
    ('def get_config():\n  pass\n', ('broken.py', 'get_config')),
  ],
)
def test_config_files_that_are_none(call, tmp_path, text, parts):
  path = tmp_path / 'broken.py'
  path.write_text(text)
  line = call('--mode', 'sample', config=('--config', str(path)))
  for part in parts:
    assert part in line


# ---- Settings, refused before anything is written.

_SETTINGS = {
  'bits': (
    'calibrate', {'quant.weight_bits': 1}, ('weight', '2', '8')
  ),
  'too many bits': (
    'calibrate', {'quant.act_bits': 16}, ('2', '8', '16')
  ),
  'no steps': ('sample', {'sampler.steps': 0, 'sample.quantized': False},
               ('steps',)),
  'eta': ('calibrate', {'sampler.eta': -1.0}, ('eta',)),
  'negative seed': ('calibrate', {'seed': -1}, ('seed is -1', '>= 0')),
  'correction': (
    'sample', {'sample.correction': 'dd2'}, ("'dd2'", 'd-d2')
  ),
  'range': (
    'calibrate', {'quant.weight_range': 'median'}, ("'median'", 'mse')
  ),
  'regex': (
    'calibrate', {'quant.float_layers': '('}, ("'('", 'regex')
  ),
  'batch': (
    'calibrate', {'quant.reconstruction.batch_size': 0}, ('batch_size',)
  ),
  'no images': (
    'sample', {'sample.num_images': 0}, ('sample.num_images is 0', '>= 1')
  ),
  'no samples to judge': (
    'evaluate', {}, ('There are no samples', '--mode sample')
  ),
  'labels': (
    'sample', {'sample.labels': (7,), 'sample.quantized': False},
    ('Labels [7]', 'classes 0..3'),
  ),
  'benchmark': (
    'benchmark', {'benchmark.what': 'spede'}, ("'spede'", 'cost')
  ),
  'experiment': (
    'experiment', {'experiment.bits': ('W9A8',)}, ("'W9A8'",)
  ),
  'convert without checkpoint': (
    'convert', {}, ('torch_path is not set', '.ckpt')
  ),
  'no calibration': ('sample', {}, ('no finished calibration', 'calibrate')),
}  # fmt: skip


def _flags(overrides):
  return [f'--config.{name}={value}' for name, value in overrides.items()]


@pytest.mark.parametrize('case', _SETTINGS)
def test_settings(call, case, tmp_path):
  mode, overrides, parts = _SETTINGS[case]
  line = call('--mode', mode, *_flags(overrides), workdir=tmp_path / 'work')
  for part in parts:
    assert part in line
  assert not (tmp_path / 'work').exists()


# ---- Files.


def test_weights_that_are_not_there(call, tmp_path):
  line = call(
    '--mode', 'calibrate', f'--config.checkpoint.path={tmp_path / "none"}'
  )
  assert str(tmp_path / 'none') in line and '--mode convert' in line


def test_weights_that_are_something_else(call, tmp_path):
  path = tmp_path / 'weights.safetensors'
  path.write_text('<html>Not Found</html>\n')
  line = call('--mode', 'calibrate', f'--config.checkpoint.path={path}')
  assert f'{path} is damaged or no .safetensors file' in line


def test_weights_of_another_model(call):
  line = call('--mode', 'calibrate', '--config.model.unet.model_channels=96')
  assert 'does not fit config.model' in line or 'another model' in line


def test_a_torch_checkpoint_that_is_none(call, tmp_path):
  path = tmp_path / 'model.ckpt'
  path.write_bytes(b'not a checkpoint')
  line = call('--mode', 'convert', f'--config.checkpoint.torch_path={path}')
  assert str(path) in line


def test_inception_without_weights(call, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  images = np.zeros((4, 8, 8, 3), np.uint8)
  np.savez(tmp_path / 'some.npz', arr_0=images)
  line = call(
    '--mode', 'evaluate', '--config.evaluate.network=inception',
    f'--config.evaluate.samples={tmp_path / "some.npz"}',
  )  # fmt: skip
  assert '--config.evaluate.inception' in line


def test_samples_that_are_none(call, tmp_path):
  (tmp_path / 'some.npz').write_bytes(b'PK\x03\x04 and no more')
  line = call(
    '--mode', 'evaluate',
    f'--config.evaluate.samples={tmp_path / "some.npz"}',
  )  # fmt: skip
  assert str(tmp_path / 'some.npz') in line


def test_tensorflow_is_missing(call, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  line = call('--mode', 'train', workdir=tmp_path / 'work')
  assert 'pip install tensorflow' in line and '--config.train.data' in line


# ---- Work directories.


@pytest.fixture
def workdir(few, tmp_path):
  """A copy of a finished calibration."""
  shutil.copytree(few, tmp_path / 'work')
  return tmp_path / 'work'


def test_a_work_directory_that_is_a_file(call, tmp_path):
  (tmp_path / 'file').write_text('mine')
  line = call('--mode', 'calibrate', workdir=tmp_path / 'file')
  assert f'{tmp_path / "file"} is a file, not a directory' in line
  line = call('--mode', 'calibrate', workdir=tmp_path / 'file' / 'below')
  assert 'another --workdir' in line
  assert (tmp_path / 'file').read_text() == 'mine'


def test_a_work_directory_that_is_read_only(call, tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda *_, **__: False)
  line = call('--mode', 'sample', workdir=tmp_path / 'work')
  assert str(tmp_path / 'work') in line and 'another --workdir' in line


def test_a_file_system_that_is_read_only(call, tmp_path, monkeypatch):
  def refuse(path, *_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

  monkeypatch.setattr(pathlib.Path, 'mkdir', refuse)
  line = call('--mode', 'calibrate', workdir=tmp_path / 'work')
  assert str(tmp_path / 'work') in line and 'another --workdir' in line


def test_a_full_disk(call, tmp_path, monkeypatch):
  def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'fsync', full)
  line = call('--mode', 'calibrate', workdir=tmp_path / 'work')
  assert 'no space left on the disk' in line and '--workdir' in line


def test_a_calibration_of_other_bits(call, workdir):
  for mode in ('sample', 'calibrate'):
    line = call(
      '--mode',
      mode,
      '--config.quant.weight_bits=8',
      workdir=workdir,
      config=_FEW,
    )
    assert 'quant.weight_bits: saved 4, now 8' in line and str(workdir) in line
  line = call(
    '--mode', 'calibrate', '--config.quant.weight_bits=8', '--dry_run',
    workdir=workdir, config=_FEW,
  )  # fmt: skip
  assert 'quant.weight_bits: saved 4, now 8' in line


def test_a_calibration_of_another_sampler(call, workdir):
  line = call(
    '--mode', 'sample', '--config.sampler.eta=0.5', workdir=workdir, config=_FEW
  )
  assert 'sampler.eta: saved 0.0, now 0.5' in line


@pytest.mark.parametrize(
  'name',
  [
    'quantized/d2dpm_meta.json',
    'quantized/tree/_METADATA',
    'error_model_tensor.npz',
    'held_out.npz',
    'calibration/settings.json',
    'runs.json',
  ],
)
def test_a_damaged_file(call, workdir, name):
  path = workdir / name
  path.write_bytes(b'{"damaged')
  mode = 'calibrate' if name.startswith('calibration') else 'sample'
  overrides = () if name != 'runs.json' else ('--dry_run',)
  line = call('--mode', mode, *overrides, workdir=workdir, config=_FEW)
  assert str(path.parents[0 if '/tree' not in name else 1]) in line


def test_damaged_arrays_of_a_checkpoint(call, workdir):
  for path in (workdir / 'quantized' / 'tree').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  line = call('--mode', 'sample', workdir=workdir, config=_FEW)
  assert f'{workdir / "quantized"} cannot be read' in line


# ---- Machines.


@pytest.mark.parametrize(
  ('mode', 'module', 'function', 'fix'),
  [
    ('sample', 'sample_job', 'make', '--config.sample.microbatch'),
    ('calibrate', 'trajectories', 'collect', 'host_streams=True'),
    ('evaluate', 'judges', 'network', '--config.evaluate.batch_size'),
  ],
)
@pytest.mark.parametrize('where', ['device', 'host'])
def test_no_memory_left(
  call, tmp_path, monkeypatch, mode, module, function, fix, where
):
  found = __import__(f'd2dpm_jax.pipelines.{module}', fromlist=[function])

  def fail(*_, **__):
    if where == 'host':
      raise MemoryError('Unable to allocate 93.1 GiB for an array')
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85899345920 '
      'bytes.\nBufferAssignment OOM Debugging:\n' + 1000 * 'detail '
    )

  monkeypatch.setattr(found, function, fail)
  np.savez(tmp_path / 'some.npz', arr_0=np.zeros((4, 8, 8, 1), np.uint8))
  line = call(
    '--mode', mode, '--config.sample.quantized=False',
    f'--config.evaluate.samples={tmp_path / "some.npz"}',
    workdir=tmp_path / 'work',
  )  # fmt: skip
  assert f'The {where} has not enough memory' in line and fix in line


_PAIR = (
  '--coordinator_address=localhost:1', '--num_processes=2', '--process_id=0'
)  # fmt: skip


def test_modes_of_one_process_refuse_two(call, monkeypatch):
  """What two real ones do with an error is in tests/test_scale.py."""
  refused = '--mode evaluate is run by one process, and here are 2'
  with monkeypatch.context() as patch:  # Nobody is waited for.
    patch.setattr(jax.distributed, 'initialize', lambda **_: pytest.fail())
    assert refused in call('--mode', 'evaluate', *_PAIR)
  # A TPU pod says how many there are when all are there.
  monkeypatch.setattr(processes, 'initialize', lambda *_: None)
  monkeypatch.setattr(processes, 'count', lambda: 2)
  assert refused in call('--mode', 'evaluate')


def test_processes_that_do_not_come(call, monkeypatch):
  never = threading.Event()
  given = {}

  def wait(**arguments):
    given.update(arguments)
    never.wait(20)

  monkeypatch.setattr(jax.distributed, 'initialize', wait)
  monkeypatch.setattr(processes, 'JOIN_S', 0.2)
  line = call('--mode', 'sample', *_PAIR)
  never.set()
  assert 'for 2 processes at localhost:1, and not all have come' in line
  # Else JAX would be the first to give up, and abort.
  assert given['initialization_timeout'] > processes.JOIN_S + 30


def test_an_address_that_is_taken(call, monkeypatch):
  def fail(**_):
    raise RuntimeError('UNKNOWN: Failed to start RPC server')

  monkeypatch.setattr(jax.distributed, 'initialize', fail)
  line = call('--mode', 'sample', *_PAIR)
  assert 'localhost:1: UNKNOWN: Failed to start RPC server' in line


@pytest.mark.parametrize(
  ('mode', 'override', 'part'),
  [
    ('sample', 'sample.correction=dd2', "'dd2': expected one of"),
    ('sample', 'sample.absorb_variance=True', 'sample.absorb_variance'),
    ('sample', 'sample.labels=(7,)', 'Labels [7]'),
    ('sample', 'sampler.eta=-1.0', 'eta'),
    ('sample', 'quant.execution=fast', "quant.execution 'fast'"),
    ('sample', 'seed=-1', 'seed is -1'),
    ('calibrate', 'seed=-1', 'seed is -1'),
    ('evaluate', 'evaluate.batch_size=0', 'batch_size is 0'),
    ('experiment', 'evaluate.batch_size=0', 'batch_size is 0'),
    ('experiment', "experiment.samplers=('s3_eta0_2000',)", '2000'),
    ('benchmark', 'benchmark.what=spede', "'spede'"),
    ('train', 'train.classifier.steps=0', 'steps is 0'),
  ],
)
def test_a_plan_refuses_what_the_run_does(call, mode, override, part):
  assert part in call('--mode', mode, '--dry_run', f'--config.{override}')


def test_an_error_that_nobody_thought_of(call, monkeypatch):
  from d2dpm_jax.pipelines import setup

  def fail(*_):
    raise AssertionError('a\nb')

  monkeypatch.setattr(setup, 'load', fail)
  assert call('--mode', 'sample') == (
    'error: AssertionError: a b (--debug shows where)'
  )


def test_debug_raises(monkeypatch):
  with pytest.raises(ValueError, match='smaple'):
    main.main(['main.py', *_TINY, '--mode', 'smaple', '--debug'])
  assert isinstance(sys.stderr, io.TextIOBase)
