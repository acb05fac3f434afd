"""The table of --mode evaluate."""

from collections.abc import Mapping
from typing import Any

_PUBLISHED = 50_000  # Images that published numbers are of.
# Name in metrics.json -> name in the table, and how it is written there.
ROWS = {
  'label_agreement': ('label agreement', '{:.2%}'),
  'fid': ('FID', '{:.3f}'),
  'sfid': ('sFID', '{:.3f}'),
  'inception_score': ('inception score', '{:.3f}'),
  'precision': ('precision', '{:.4f}'),
  'recall': ('recall', '{:.4f}'),
}
_FIDELITY_ROWS = {
  'psnr': ('PSNR', '{:.2f} dB'),
  'psnr_mean': ('PSNR, mean', '{:.2f} dB'),
  'psnr_median': ('PSNR, median', '{:.2f} dB'),
  'identical': ('identical', '{:.2%}'),
  'feature_distance': ('feature distance', '{:.5f}'),
  'feature_distance_median': ('median of it', '{:.5f}'),
}


def table(result: Mapping[str, Any]) -> str:
  """The metrics as text, always with the number of images.

  Args:
    result: as of `evaluate`; several sets become columns.
  """
  columns = list(texts(result).values())
  names = list(columns[0])  # All have the same rows.
  cells = [[column[name] for column in columns] for name in names]
  widths = [max(map(len, column.values())) for column in columns]
  return '\n'.join(
    ' '.join(
      [
        f'{name:<16}',
        *(f'{c:<{w}}' for c, w in zip(row, widths, strict=True)),
      ]
    ).rstrip()
    for name, row in zip(names, cells, strict=True)
  )


def texts(result: Mapping[str, Any]) -> dict[str, dict[str, str]]:
  """Set of images -> row of the table -> what is written there."""
  sets = result.get('sets', {result.get('samples', ''): result})
  return {name: _column(one) for name, one in sets.items()}


def _column(result: Mapping[str, Any]) -> dict[str, str]:
  """Row -> what is written there, of one set."""
  count, real = result['num_samples'], result['num_reference']
  unknown = result['num_reference_statistics'] is None
  hint = '' if count == _PUBLISHED else f' (papers use {_PUBLISHED})'
  column = {
    '': f'N = {count}{hint}',
    'samples': f'{count} of {result["samples"]}',
    'reference': f'{real} of {result["reference"]}'
    + ('; its statistics do not say of how many' if unknown else ''),
    'features': result['network'],
    **_written(result, ROWS),
  }
  if (interval := result['fid_bootstrap']) is not None:
    column['FID'] += ' (95 %: {low:.3f} to {high:.3f})'.format(**interval)
  if (compared := result['fidelity']) is not None:
    column['compared with'] = compared['of']
    column |= _written(compared, _FIDELITY_ROWS)
  return column


def _written(
  values: Mapping[str, Any], rows: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
  return {
    name: '-' if values[key] is None else form.format(values[key])
    for key, (name, form) in rows.items()
  }
