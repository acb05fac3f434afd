"""Progress is shown, and closed whatever happens."""

import time

import jax
import jax.numpy as jnp
import pytest

from d2dpm_jax.runtime import progress


def test_lines_where_there_is_no_terminal(capsys):
  with progress.progress('work', 3, 'image') as bar:
    bar.update(2)
    bar.update(1, 'loss 0.5')
  text = capsys.readouterr().err
  assert 'work: 3/3 image' in text and 'loss 0.5' in text
  assert '\r' not in text.strip()  # A log, not a moving bar.


def test_nothing_left_to_do(capsys):
  with progress.progress('work', 3, 'image') as bar:
    bar.update(3, reused=True)
  assert capsys.readouterr().err == 'work: 3/3 image, all there already\n'


def test_closed_after_an_error(monkeypatch):
  closed = []
  monkeypatch.setattr(progress.Progress, 'close', lambda _: closed.append(1))
  with pytest.raises(RuntimeError):
    with progress.progress('work', 3):
      raise RuntimeError
  assert closed == [1]


def test_times_add_up_also_after_an_error(monkeypatch):
  clock = iter([1.0, 3.5, 10.0, 14.0])
  monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
  times = progress.Times()
  with times.phase('a'):
    pass
  assert times.seconds == {'a': 2.5}
  with pytest.raises(RuntimeError):
    with times.phase('a'):
      raise RuntimeError
  assert times.seconds == {'a': 6.5}


def test_compiling_is_told_apart():
  times = progress.Times()
  with times.phase('compiles'):
    jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x) + 3)(jnp.ones([7, 7]))
  with times.phase('sleeps'):
    time.sleep(0.05)
  assert 0 < times.compiling['compiles'] <= times.seconds['compiles']
  assert times.compiling['sleeps'] == 0
  assert 'sleeps' in times.lines()[1] and 'compiling 0.0 s' in times.lines()[1]


def test_peak_memory_is_in_bytes():
  """This process has JAX in it: more than 50 MB, less than 100 GB."""
  assert 50e6 < progress.peak_memory() < 100e9
