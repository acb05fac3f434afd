"""Mean and spread over seeds of an experiment's cells, and their tables."""

import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# What tells rows of a table apart, in cells and in results.
_ROW = ('sampler', 'quantizer', 'bits', 'correction', 'statistics')
# What has to be the same in all cells.
_COMMON = ('num_images', 'num_reference', 'reference', 'network')


class Column(NamedTuple):
  """How a value is shown."""

  name: str
  digits: int
  better: int  # 1: larger, -1: smaller, 0: neither is.
  unit: float = 1.0  # Shown are multiples of it.


COLUMNS = {
  'fid': Column('FID', 3, -1),
  'sfid': Column('sFID', 3, -1),
  'inception_score': Column('IS', 3, 1),
  'precision': Column('precision %', 2, 1, 0.01),
  'recall': Column('recall %', 2, 1, 0.01),
  'label_agreement': Column('labels %', 2, 1, 0.01),
  'psnr': Column('PSNR dB', 2, 1),
  'psnr_mean': Column('mean dB', 2, 1),
  'psnr_median': Column('median dB', 2, 1),
  'identical': Column('identical %', 2, 1, 0.01),
  'latent_mse': Column('latent MSE', 6, -1),
  'images_per_second': Column('img/s', 1, 0),
}

# Of these, differences to the uncorrected network are shown.
_PAIRED = ('fid', 'sfid', 'psnr', 'latent_mse')

LEGEND = """\
Each number is the mean over seeds ± the sample standard deviation. PSNR and
latent MSE are distances to the full-precision images of the same noise: PSNR of
the squared error of all images together, mean and median over single images
that are not identical, and the share of those that are. A number is **bold** if
it beats that of every other quantized row of its table by more than both of
their deviations together; with one seed none is. A second table has the
differences to no correction (`none`): taken seed by seed, since the noise is
the same, and then averaged."""


def aggregate(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Puts the seeds of each setting together.

  Args:
    cells: as --mode experiment keeps them, in the order of the rows.

  Returns:
    What they have in common; `seeds`; `devices`, `commits` and `dates` (UTC),
    where cells know them; and `rows`, each with what tells it apart and
    `values`: name -> mean, std (sample standard deviation, None of a single
    number), n, and all: by seed, None where it is not known.
    Corrected ones have `paired`, the same of differences to correction 'none'.

  Raises:
    ValueError: they cannot stand in one table.
  """
  by_row: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
  for cell in cells:
    by_row.setdefault(tuple(cell[key] for key in _ROW), []).append(cell)
  result: dict[str, Any] = {}
  for name in _COMMON:
    found = {cell[name] for cell in cells}
    if len(found) != 1:
      raise ValueError(f'Cells differ in {name}: {sorted(found)}.')
    result[name] = found.pop()
  rows = []
  for key, group in by_row.items():
    names = dict.fromkeys(name for cell in group for name in cell['values'])
    rows.append(
      {
        **dict(zip(_ROW, key, strict=True)),
        'seeds': [cell['seed'] for cell in group],
        'values': {
          name: _spread([cell['values'].get(name) for cell in group])
          for name in names
        },
      }
    )
  _add_differences(rows)
  return {
    **result,
    'seeds': list(dict.fromkeys(cell['seed'] for cell in cells)),
    'devices': _distinct(cells, 'device'),
    # Cells of an installed package know no commit, older ones no date.
    'commits': _distinct(cells, 'commit'),
    'dates': _distinct(cells, 'date'),
    'rows': rows,
  }


def _distinct(cells: Sequence[Mapping[str, Any]], name: str) -> list[str]:
  """What cells say, without those that do not know it."""
  return sorted({cell[name] for cell in cells if cell.get(name)})


def origin(results: Mapping[str, Any]) -> str:
  """'1 x cpu, 2026-11-22, commit e637c54': where and when it was sampled."""
  commits = results.get('commits')
  parts = [*results['devices'], *results.get('dates', ())]
  if commits:
    parts.append(f'commit {" and ".join(commits)}')
  return ', '.join(parts)


def _add_differences(rows: Sequence[dict[str, Any]]) -> None:
  """To the row without correction, of the same network, sampler and seeds."""
  network = operator.itemgetter('sampler', 'quantizer', 'bits')
  plain = {
    network(row): row
    for row in rows
    if row['quantizer'] and row['correction'] == 'none'
  }
  for row in rows:
    base = plain.get(network(row))
    if base is None or base is row:
      continue
    row['paired'] = {
      name: _spread(
        [
          None if a is None or b is None else a - b
          for a, b in zip(
            row['values'][name]['all'],
            base['values'][name]['all'],
            strict=True,
          )
        ]
      )
      for name in _PAIRED
      if name in row['values'] and name in base['values']
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
  known = [value for value in values if value is not None]
  return {
    'mean': statistics.fmean(known) if known else None,
    'std': statistics.stdev(known) if len(known) > 1 else None,
    'n': len(known),
    'all': list(values),
  }


def groups(
  results: Mapping[str, Any],
) -> Iterable[tuple[str, str, str, list[Mapping[str, Any]]]]:
  """Tables of results.

  Yields:
    (sampler, quantizer, bits, rows); the first row is full precision.
  """
  rows = results['rows']
  tables: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
  for row in rows:
    if row['quantizer']:
      key = (row['sampler'], row['quantizer'], row['bits'])
      tables.setdefault(key, []).append(row)
  for (sampler, quantizer, bits), quantized in tables.items():
    plain = [
      row for row in rows if row['sampler'] == sampler and not row['quantizer']
    ]
    yield sampler, quantizer, bits, plain + quantized


def row_name(row: Mapping[str, Any]) -> str:
  """'d-d2, channel'."""
  if not row['quantizer']:
    return 'full precision'
  return ', '.join(filter(None, (row['correction'], row['statistics'])))


def markdown(results: Mapping[str, Any]) -> str:
  """All results as Markdown, one table per sampler and network."""
  seeds = ', '.join(map(str, results['seeds']))
  lines = [
    '# Experiment',
    '',
    f'{results["num_images"]} images per seed, {len(results["seeds"])} seed(s) '
    f'({seeds}). Judged by `{results["network"]}` against '
    f'{results["num_reference"]} images of `{results["reference"]}`. Sampled '
    f'on {origin(results)}.',
    '',
    LEGEND,
  ]
  for sampler, quantizer, bits, rows in groups(results):
    lines += [
      '',
      f'## {sampler}, {bits}, {quantizer}',
      '',
      *_lines(cells(rows)),
    ]
    if differences := difference_cells(rows):
      lines += ['', *_lines(differences)]
  return '\n'.join(lines) + '\n'


def _bold(text: str) -> str:
  return f'**{text}**'


def cells(
  rows: Sequence[Mapping[str, Any]], mark: Callable[[str], Any] = _bold
) -> list[list[Any]]:
  """Header and rows of a table; columns that are empty in all are left out.

  Args:
    rows: of `groups`.
    mark: what is done with a text that stands out.
  """
  columns = [
    name
    for name in COLUMNS
    if any(row['values'].get(name, {}).get('n') for row in rows)
  ]
  best = {name: _best(rows, name) for name in columns}
  lines: list[list[Any]] = [
    ['correction', *(COLUMNS[name].name for name in columns)]
  ]
  for row in rows:
    line: list[Any] = [row_name(row)]
    for name in columns:
      text = _text(row['values'].get(name), COLUMNS[name], len(row['seeds']))
      line.append(mark(text) if row is best[name] else text)
    lines.append(line)
  return lines


def difference_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """Those of the second table; none where nothing is corrected."""
  paired = [row for row in rows if 'paired' in row]
  columns = [
    name
    for name in _PAIRED
    if any(row['paired'].get(name, {}).get('n') for row in paired)
  ]
  if not columns:
    return []
  lines = [['minus `none`', *(COLUMNS[name].name for name in columns)]]
  for row in paired:
    texts = (
      _text(row['paired'].get(name), COLUMNS[name], len(row['seeds']), '+')
      for name in columns
    )
    lines.append([row_name(row), *texts])
  return lines


def _lines(table: Sequence[Sequence[str]]) -> list[str]:
  """Header and rows as Markdown."""
  header, *rows = table
  below = ['---', *['---:'] * (len(header) - 1)]
  return [f'| {" | ".join(line)} |' for line in (header, below, *rows)]


def _text(
  value: Mapping[str, Any] | None, column: Column, seeds: int, sign: str = ''
) -> str:
  """'8.120 ± 0.031'; with a sign before it if `sign` is '+'."""
  if value is None or value['mean'] is None:
    return '-'
  text = f'{value["mean"] / column.unit:{sign}.{column.digits}f}'
  if value['std'] is not None:
    text += f' ± {value["std"] / column.unit:.{column.digits}f}'
  if value['n'] < seeds:
    text += f' ({value["n"]} of {seeds} seeds)'
  return text


def _best(
  rows: Sequence[Mapping[str, Any]], name: str
) -> Mapping[str, Any] | None:
  """The quantized row that beats all others beyond the spread, if one does."""
  sign = COLUMNS[name].better
  known = [
    (sign * row['values'][name]['mean'], row['values'][name]['std'], row)
    for row in rows
    if row['quantizer'] and row['values'].get(name, {}).get('n')
  ]
  if not sign or len(known) < 2 or any(std is None for _, std, _ in known):
    return None
  known.sort(key=lambda entry: entry[0], reverse=True)
  mean, std, row = known[0]
  beaten = all(mean - other > std + spread for other, spread, _ in known[1:])
  return row if beaten else None
