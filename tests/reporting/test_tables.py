"""Mean and spread over seeds, and what a table makes of them."""

import pytest

from d2dpm_jax.reporting import plots, tables


def _cell(seed, quantizer='brecq', correction='none', statistics='', **values):
  return {
    'sampler': 's3_eta0_20',
    'seed': seed,
    'quantizer': quantizer,
    'bits': 'W4A8' if quantizer else '',
    'correction': correction,
    'statistics': statistics,
    'num_images': 100,
    'num_reference': 10,
    'reference': 'real',
    'network': 'digits',
    'device': '1 x cpu',
    'values': values,
  }


def _cells(corrected, none=(5.0, 5.2), precision=(25.0, 25.0)):
  """FID by seed: in full precision, quantized, corrected."""
  rows = (
    ({'quantizer': ''}, (4.0, 4.0)),
    ({}, none),
    ({'correction': 'd-d2', 'statistics': 'tensor'}, corrected),
  )
  return [
    _cell(seed, **row, fid=fid, psnr=psnr)
    for row, fids in rows
    for seed, (fid, psnr) in enumerate(zip(fids, precision, strict=True))
  ]


def _line(cells, name):
  text = tables.markdown(tables.aggregate(cells))
  found, *_ = (x for x in text.splitlines() if x.startswith(f'| {name} |'))
  return [part.strip() for part in found.strip('|').split('|')[1:]]


@pytest.mark.parametrize(
  ('corrected', 'shown'),
  [
    ((4.5, 4.7), '**4.600 ± 0.141**'),  # By 0.5, the deviations add to 0.28.
    ((4.9, 5.1), '5.000 ± 0.141'),  # By 0.1.
    ((4.0, 5.2), '4.600 ± 0.849'),  # By 0.5, but it scatters.
    ((5.5, 5.7), '5.600 ± 0.141'),  # Worse.
  ],
)
def test_bold_is_what_is_better_beyond_the_spread(corrected, shown):
  cells = _cells(corrected)
  assert _line(cells, 'd-d2, tensor')[0] == shown
  assert _line(cells, 'full precision')[0] == '4.000 ± 0.000'
  # Of a larger-is-better value that all share, none is best.
  assert _line(cells, 'd-d2, tensor')[1] == '25.00 ± 0.00'


def test_the_worse_correction_leaves_the_others_bold():
  assert _line(_cells((5.9, 6.0)), 'none')[0] == '**5.100 ± 0.141**'


def test_one_seed_has_no_spread():
  cells = [cell for cell in _cells((1.0, 1.0)) if cell['seed'] == 0]
  assert _line(cells, 'd-d2, tensor') == ['1.000', '25.00']
  assert '1 seed(s) (0)' in tables.markdown(tables.aggregate(cells))


def test_what_is_not_known_is_not_averaged():
  cells = _cells((4.9, 5.1), precision=(None, 24.0))
  assert _line(cells, 'none')[1] == '24.00 (1 of 2 seeds)'
  cells = _cells((4.9, 5.1), precision=(None, None))
  assert len(_line(cells, 'none')) == 1  # No such column.
  drawn = plots.experiment(tables.aggregate(cells))
  assert len(drawn.axes[1].containers) == 0


def test_differences_are_taken_seed_by_seed():
  """Seeds scatter by 2, but all of them gain 0.1 or 0.3."""
  cells = _cells((4.9, 6.7), none=(5.0, 7.0), precision=(None, 25.0))
  results = tables.aggregate(cells)
  plain, none, corrected = results['rows']
  assert 'paired' not in plain and 'paired' not in none
  found = corrected['paired']['fid']
  assert found['all'] == pytest.approx([-0.1, -0.3])
  assert found['std'] == pytest.approx(0.02**0.5)
  assert corrected['paired']['psnr']['all'] == [None, 0.0]
  *_, last = tables.markdown(results).strip().splitlines()
  assert last == ('| d-d2, tensor | -0.200 ± 0.141 | +0.00 (1 of 2 seeds) |')


def test_nothing_corrected_has_no_differences():
  cells = [c for c in _cells((4.9, 5.1)) if c['correction'] == 'none']
  assert 'minus' not in tables.markdown(tables.aggregate(cells))


def test_rows_keep_every_number():
  results = tables.aggregate(_cells((4.9, 5.1)))
  assert results['seeds'] == [0, 1] and results['devices'] == ['1 x cpu']
  value = results['rows'][2]['values']['fid']
  assert value['all'] == [4.9, 5.1] and value['n'] == 2
  assert value['mean'] == pytest.approx(5.0)
  assert value['std'] == pytest.approx(0.02**0.5)


def test_the_head_says_where_when_and_of_which_code():
  cells = _cells((4.9, 5.1))
  old = tables.markdown(tables.aggregate(cells))  # Of cells without them.
  assert 'Sampled on 1 x cpu.' in old and 'commit' not in old
  for cell, day in zip(cells, (23, 22, 22, 22, 22), strict=False):
    cell.update(commit='0123abcd', date=f'2026-11-{day}')
  cells[1]['commit'] = None  # Not from a repository.
  cells[2]['commit'] = '4567cdef+'
  results = tables.aggregate(cells)
  assert results['commits'] == ['0123abcd', '4567cdef+']
  assert results['dates'] == ['2026-11-22', '2026-11-23']
  assert (
    'Sampled on 1 x cpu, 2026-11-22, 2026-11-23, commit 0123abcd and 4567cdef+.'
    in tables.markdown(results)
  )
  # results.json of before.
  del results['commits'], results['dates']
  assert tables.markdown(results) == old


def test_cells_of_different_counts_are_not_mixed():
  cells = _cells((4.9, 5.1))
  cells[3]['num_images'] = 50
  with pytest.raises(ValueError, match='num_images'):
    tables.aggregate(cells)
