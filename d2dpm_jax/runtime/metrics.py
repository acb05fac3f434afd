"""Numbers over time: JSON lines always, TensorBoard where it can be."""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from d2dpm_jax.runtime import files

_LINES = 'metrics.jsonl'

# write(step, name -> number or text).
Write = Callable[[int, Mapping[str, Any]], None]


@contextlib.contextmanager
def writer(directory: pathlib.Path) -> Iterator[Write]:
  """Appends to metrics.jsonl in a directory, and to events of TensorBoard.

  The latter only where TensorFlow is installed, which clu's writer needs;
  text is left out there.
  """
  directory.mkdir(parents=True, exist_ok=True)
  try:
    from clu import metric_writers  # Imports TensorFlow.

    events = metric_writers.SummaryWriter(str(directory))
  except ImportError:
    events = None
  with (directory / _LINES).open('a') as lines:
    if lines.tell():
      lines.write('\n')  # A run that was killed may have ended in mid-line.

    def write(step: int, values: Mapping[str, Any]) -> None:
      lines.write(_line(step, values))
      lines.flush()
      if events is not None:
        numbers = {k: v for k, v in values.items() if not isinstance(v, str)}
        events.write_scalars(step, numbers)

    try:
      yield write
    finally:
      if events is not None:
        events.close()


def rewrite(directory: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Puts these lines in the place of all others, numbered from 0."""
  with files.atomic_write(directory / _LINES, 'w') as file:
    file.writelines(_line(step, values) for step, values in enumerate(rows))


def _line(step: int, values: Mapping[str, Any]) -> str:
  return f'{json.dumps({"step": step, **finite(values)})}\n'


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
  """With None for numbers that JSON does not have."""
  return {
    k: None if isinstance(v, float) and not math.isfinite(v) else v
    for k, v in values.items()
  }
