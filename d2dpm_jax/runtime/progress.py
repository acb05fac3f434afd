"""Progress of long work: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Progress:
  """Counts work; shows rate, time left and the latest loss or note."""

  def __init__(self, name: str, total: int, unit: str):
    terminal = sys.stderr.isatty()
    self._bar = tqdm(
      total=total,
      desc=name,
      unit=unit,
      file=sys.stderr,
      dynamic_ncols=terminal,
      mininterval=0.2 if terminal else _LINE_EVERY_S,
      maxinterval=10 * _LINE_EVERY_S,
      ascii=not terminal,
      bar_format=None
      if terminal
      else '{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, '
      '{elapsed} gone, {remaining} left{postfix}\n',
    )

  def update(self, n: int = 1, note: str = '') -> None:
    if note:
      self._bar.set_postfix_str(note, refresh=False)
    self._bar.update(n)

  def close(self) -> None:
    self._bar.close()


@contextmanager
def progress(name: str, total: int, unit: str = 'it') -> Iterator[Progress]:
  """A `Progress` that is closed at the end, also after an error."""
  bar = Progress(name, total, unit)
  try:
    yield bar
  finally:
    bar.close()


def peak_memory() -> int:
  """Bytes of memory that this process has had at most; 0 if not known."""
  try:
    import resource  # Not on Windows.
  except ImportError:
    return 0
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak  # Linux: KiB.


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
  """Adds the wall time of its body, in seconds, to `times[name]`."""
  start = time.perf_counter()
  try:
    yield
  finally:
    times[name] = times.get(name, 0.0) + time.perf_counter() - start
