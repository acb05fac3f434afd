"""Tables of whatever a benchmark wrote."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from d2dpm_jax.reporting import page

_TEXT = 60  # Letters of a value, at most.
# Parts of a benchmark that say what was asked for.
_CONFIGS = ('config', 'model', 'quant')


def measured(name: str, data: Any) -> list[page.Table]:
  """Tables of any benchmark: single values, and lists or dicts of rows."""
  single: dict[str, Any] = {}
  made: list[page.Table] = []
  for key, value in data.items() if isinstance(data, Mapping) else ():
    rows: list[tuple[str, Any]] = []
    if key in _CONFIGS and isinstance(value, Mapping):
      lines = [
        [field, _short(v)]
        for field, v in traverse_util.flatten_dict(value, sep='.').items()
      ]
      made.append(page.Table((), lines, f'{name}: {key}', True))
      continue
    if isinstance(value, Mapping):
      rows = list(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
      rows = [(str(number), row) for number, row in enumerate(value, 1)]
    if not rows or not all(isinstance(row, Mapping) for _, row in rows):
      single[key] = value
      continue
    rows = [
      (label, traverse_util.flatten_dict(_medians(row), sep='.'))
      for label, row in rows
    ]
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    lines = [
      [label, *(_short(row.get(name)) for name in names)] for label, row in rows
    ]
    title = f'{name}: {key}'
    made.append(page.Table(['', *names], lines, title, len(lines) > page.FOLD))
  if single:
    lines = [
      [key, _short(value)]
      for key, value in traverse_util.flatten_dict(single, sep='.').items()
    ]
    made.insert(0, page.Table((), lines, f'benchmark {name}'))
  return made


def _medians(row: Mapping[str, Any]) -> dict[str, Any]:
  """In place of a value's distribution, its median."""
  return {
    f'{name}, median' if _is_spread(value) else name: (
      value['median'] if _is_spread(value) else value
    )
    for name, value in row.items()
  }


def _is_spread(value: Any) -> bool:
  return isinstance(value, Mapping) and 'median' in value


def _short(value: Any) -> str:
  """A value in a cell."""
  if value is None:
    return ''
  if isinstance(value, float):
    return f'{value:.4g}'
  if isinstance(value, list):
    return ', '.join(map(_short, value))
  text = str(value)
  return text if len(text) <= _TEXT else f'{text[: _TEXT - 1]}…'
