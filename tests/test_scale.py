"""Many images on machines that go away: real processes, killed and joined."""

import contextlib
import functools
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import contents

_ROOT = pathlib.Path(__file__).parents[1]
_IMAGES = 200
_TIMEOUT_S = 240


def _start(mode, workdir, *args, devices=1):
  """Begins with a mode of the tiny model, with random weights."""
  flags = os.environ.get('XLA_FLAGS', '').split()
  flags = [f for f in flags if 'device_count' not in f]
  env = {
    **os.environ,
    'XLA_FLAGS': ' '.join(
      [*flags, f'--xla_force_host_platform_device_count={devices}']
    ),
  }
  command = [
    sys.executable, 'main.py', '--config', 'tests/tiny_config.py:few',
    '--mode', mode, '--workdir', workdir,
    '--config.checkpoint.path=random:0', *args,
  ]  # fmt: skip
  return subprocess.Popen(
    list(map(str, command)),
    cwd=_ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _sample(workdir, *args, batch_size=8, devices=1, images=_IMAGES):
  return _start(
    'sample',
    workdir,
    '--config.sample.quantized=False',
    f'--config.sample.num_images={images}',
    f'--config.sample.batch_size={batch_size}',
    *args,
    devices=devices,
  )


def _finish(process):
  said, _ = process.communicate(timeout=_TIMEOUT_S)
  assert process.returncode == 0, said
  return said


def _merged(workdir):
  return (workdir / 'samples' / 'samples.npz').read_bytes()


def _count(workdir):
  return len(list((workdir / 'samples' / 'shards').glob('*.npz')))


def _wait_for_shards(process, workdir, count):
  while _count(workdir) < count:
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.002)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """The merged file of one process, in other batches than all others here."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  _finish(_sample(workdir, batch_size=64))
  with np.load(workdir / 'samples' / 'samples.npz') as file:
    assert file['arr_0'].shape == (_IMAGES, 8, 8, 1)
    assert len(np.unique(file['arr_0'].reshape(_IMAGES, -1), axis=0)) > 190
  return _merged(workdir)


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(undisturbed, tmp_path, kills):
  """SIGKILL, the same command again; in the end the same bytes."""
  rng = random.Random(kills)
  workdir = tmp_path / 'work'
  there = 0
  for number in range(kills):
    process = _sample(workdir, batch_size=4)
    # Every sixth in the first seconds, all others between shards.
    if number % 6 == 5:
      time.sleep(rng.uniform(0, 5))
    else:
      more = rng.randint(1, max(1, (40 - there) // (kills - number)))
      _wait_for_shards(process, workdir, min(there + more, 45))
      time.sleep(rng.uniform(0, 0.02))
    process.kill()
    process.communicate()
    assert _count(workdir) >= there  # No finished shard is lost.
    there = _count(workdir)
  assert there < _IMAGES // 4  # None of them came to the end.
  # And one byte of a finished shard.
  shard = sorted((workdir / 'samples' / 'shards').glob('*.npz'))[0]
  data = bytearray(shard.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  shard.write_bytes(data)
  said = _finish(_sample(workdir))
  assert f'{shard} is damaged' in said
  assert _merged(workdir) == undisturbed
  assert not list(workdir.rglob('.*.unfinished'))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_preempted_run_says_how_to_go_on(undisturbed, tmp_path, number):
  process = _sample(tmp_path, images=5000)
  _wait_for_shards(process, tmp_path, 2)
  process.send_signal(number)
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75, said
  last = said.strip().splitlines()[-1]
  assert last.startswith(f'Stopped by {number.name}.')
  assert last.endswith('the same command goes on there.')
  assert 'Traceback' not in said
  assert not list(tmp_path.rglob('.*.unfinished'))
  if number == signal.SIGTERM:
    _finish(_sample(tmp_path))
    assert _merged(tmp_path) == undisturbed


def test_eight_devices_write_the_file_of_one(undisturbed, tmp_path):
  """In batches that are no multiple of eight."""
  _finish(_sample(tmp_path, batch_size=27, devices=8))
  assert _merged(tmp_path) == undisturbed


# ---- Several processes.


@contextlib.contextmanager
def _pair(start, *args):
  """Two processes of one run; none is left behind."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  pair = [
    start(
      *args,
      f'--coordinator_address={address}',
      '--num_processes=2',
      f'--process_id={number}',
    )
    for number in range(2)
  ]
  try:
    yield pair
  finally:
    for process in pair:
      process.kill()
      process.communicate()


def test_two_processes_make_the_set_of_one(undisturbed, tmp_path):
  with _pair(_sample, tmp_path) as pair:
    said = [_finish(process) for process in pair]
  assert _merged(tmp_path) == undisturbed
  assert _count(tmp_path) == 25
  # The first one alone talks, of the work of both.
  assert f'Made {_IMAGES} images' in said[0] and 'sampling' not in said[1]
  # What a pair has begun, one process finishes, and the other way round.
  shard = tmp_path / 'samples' / 'shards' / '00000008-00000016.npz'
  shard.unlink()
  _finish(_sample(tmp_path, batch_size=3))
  assert _merged(tmp_path) == undisturbed and _count(tmp_path) == 27


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on(undisturbed, tmp_path):
  for count in (3, 9):  # Of 25, and then both are killed.
    with _pair(_sample, tmp_path) as pair:
      _wait_for_shards(pair[0], tmp_path, count)
  with _pair(_sample, tmp_path) as pair:
    for process in pair:
      _finish(process)
  assert _merged(tmp_path) == undisturbed


def test_who_waits_for_others_can_be_stopped(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  process = _sample(
    tmp_path, f'--coordinator_address={address}', '--num_processes=2',
    '--process_id=0',
  )  # fmt: skip
  try:
    assert (
      process.stdout.readline() == f'Waiting for 2 processes at {address}.\n'
    )
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
  finally:
    process.kill()
  assert process.returncode == 75, said
  assert said.strip().splitlines()[-1].startswith('Stopped by SIGTERM.')


@pytest.mark.parametrize('stopped', [0, 1])
def test_when_one_of_two_is_preempted_both_end_in_order(tmp_path, stopped):
  start = functools.partial(_sample, images=5000)
  with _pair(start, tmp_path) as pair:
    _wait_for_shards(pair[0], tmp_path, 2)
    pair[stopped].send_signal(signal.SIGTERM)
    for number, process in enumerate(pair):
      said, _ = process.communicate(timeout=30)
      assert process.returncode == 75, said
      who = 'Stopped by SIGTERM'
      if number != stopped:
        who = f'Process {stopped} of this run was stopped'
      assert who in said.strip().splitlines()[-1]
  assert not list(tmp_path.rglob('.*.unfinished'))


def test_what_one_of_two_refuses_ends_both(tmp_path):
  (tmp_path / 'samples' / 'shards').mkdir(parents=True)
  marker = tmp_path / 'samples' / 'shards' / 'settings.json'
  marker.write_text('{"seed": 3}')
  before = contents(tmp_path / 'samples' / 'shards')
  with _pair(_sample, tmp_path) as pair:
    for process in pair:
      said, _ = process.communicate(timeout=_TIMEOUT_S)
      assert process.returncode == 1, said
      assert 'seed: saved 3, now 0' in said.strip().splitlines()[-1]
  found = contents(tmp_path / 'samples' / 'shards')
  found.pop('.lock')
  assert found == before


@pytest.mark.slow
def test_two_processes_calibrate_as_one(tmp_path):
  """Arrays on disk are those of one process, bit for bit."""
  settings = [
    '--config.calibration.batch_size=4',
    '--config.quant.reconstruction.iters=0',
    '--config.quant.reconstruction.act_iters=0',
  ]
  with _pair(_start, 'calibrate', tmp_path / 'two', *settings) as pair:
    for process in pair:
      _finish(process)
  _finish(_start('calibrate', tmp_path / 'one', *settings))
  wanted, found = contents(tmp_path / 'one'), contents(tmp_path / 'two')
  same = [
    name
    for name in wanted
    if name.startswith(('calibration/trajectories/', 'calibration/eps_q/'))
    or name.startswith(('error_model_', 'held_out'))
  ]
  assert len(same) >= 15
  for name in same:
    assert found[name] == wanted[name], name
  folders = [
    {n for n in f if n.startswith('quantized')} for f in (wanted, found)
  ]
  assert folders[0] and folders[1]


def test_who_waits_for_others_in_vain_ends():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  done = subprocess.run(
    [sys.executable, '-c', _WAIT, address],
    cwd=_ROOT, stderr=subprocess.PIPE, text=True, timeout=60,
  )  # fmt: skip
  assert done.returncode == 1
  assert f'Waited 1 s for 2 processes at {address}' in done.stderr


_WAIT = """
import sys
from d2dpm_jax.runtime import processes

processes.JOIN_S = 1
try:
  processes.initialize(sys.argv[1], 2, 0)
except TimeoutError as error:
  print(error, file=sys.stderr, flush=True)
  processes.leave(1)
"""
