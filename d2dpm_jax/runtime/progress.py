"""Progress of long work: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm import tqdm

from d2dpm_jax.runtime import processes

_LINE_EVERY_S = 10.0


class Progress:
  """Counts work; shows rate, time left and the latest loss or note.

  Of several processes the first one alone shows anything.
  """

  def __init__(self, name: str, total: int, unit: str):
    self._name, self._total, self._unit = name, total, unit
    self._done, self._reused, self._shown_done, self._note = 0, 0, -1, ''
    self._start = self._shown = time.perf_counter()
    self._bar = None
    self._shows = processes.is_first()
    if self._shows and sys.stderr.isatty():
      self._bar = tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True)

  def update(self, n: int = 1, note: str = '', reused: bool = False) -> None:
    """Counts `n`; what an earlier run had done is left out of the rate."""
    self._done += n
    self._reused += n if reused else 0
    self._note = note or self._note
    if self._bar is not None:
      self._bar.set_postfix_str(self._note, refresh=False)
      self._bar.initial += n if reused else 0
      self._bar.update(n)
    elif time.perf_counter() - self._shown >= _LINE_EVERY_S:
      self._write_line()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
    elif self._shown_done != self._done:
      self._write_line()

  def _write_line(self) -> None:
    self._shown, self._shown_done = time.perf_counter(), self._done
    if not self._shows:
      return
    count = f'{self._name}: {self._done}/{self._total} {self._unit}'
    if self._reused == self._done == self._total:
      print(f'{count}, all there already', file=sys.stderr, flush=True)
      return
    gone = self._shown - self._start
    rate = (self._done - self._reused) / max(gone, 1e-9)
    left = f'{(self._total - self._done) / rate:.0f}' if rate else '?'
    parts = [
      count,
      f'{rate:.3g} {self._unit}/s',
      f'{gone:.0f} s gone',
      f'{left} s left',
      self._note,
    ]
    print(', '.join(p for p in parts if p), file=sys.stderr, flush=True)


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


class Times:
  """Wall time of phases, and how long programs were compiled in them.

  Threads compile side by side, and beside other work, so that this may be more
  than the wall time.
  """

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self.compiling: dict[str, float] = {}

  @contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Adds the seconds of its body."""
    start, compiled = time.perf_counter(), compile_seconds()
    try:
      yield
    finally:
      gone = time.perf_counter() - start
      self.seconds[name] = self.seconds.get(name, 0.0) + gone
      gone = compile_seconds() - compiled
      self.compiling[name] = self.compiling.get(name, 0.0) + gone

  def lines(self) -> list[str]:
    return [
      f'{name:20} {seconds:8.1f} s, compiling {self.compiling[name]:.1f} s'
      for name, seconds in self.seconds.items()
    ]


_COMPILING = (
  '/jax/core/compile/jaxpr_trace_duration',
  '/jax/core/compile/jaxpr_to_mlir_module_duration',
  '/jax/core/compile/backend_compile_duration',
)
_compiled: list[float] = []


def compile_seconds() -> float:
  """Seconds that JAX has traced and compiled since the first call."""
  if not _compiled:
    _compiled.append(0.0)

    def add(event: str, duration_secs: float, **_: str | int) -> None:
      if event in _COMPILING:
        _compiled[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)
  return _compiled[0]
