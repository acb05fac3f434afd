"""Progress is shown, and closed whatever happens."""

import time

import pytest

from d2dpm_jax.runtime import progress


def test_lines_where_there_is_no_terminal(capsys):
  with progress.progress('work', 3, 'image') as bar:
    bar.update(2)
    bar.update(1, 'loss 0.5')
  text = capsys.readouterr().err
  assert 'work: 3/3 image' in text and 'loss 0.5' in text
  assert '\r' not in text.strip()  # A log, not a moving bar.


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
  times = {}
  with progress.timed(times, 'a'):
    pass
  assert times == {'a': 2.5}
  with pytest.raises(RuntimeError):
    with progress.timed(times, 'a'):
      raise RuntimeError
  assert times == {'a': 6.5}


def test_peak_memory_is_in_bytes():
  """This process has JAX in it: more than 50 MB, less than 100 GB."""
  assert 50e6 < progress.peak_memory() < 100e9
