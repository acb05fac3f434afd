"""Sections of the report on images: themselves, and how they are judged."""

import markupsafe

from d2dpm_jax.reporting import metrics_table, page, tables
from d2dpm_jax.reporting.contents import Contents, Section
from d2dpm_jax.runtime import files


def images(work: Contents) -> Section | None:
  """Rows of all samplers, or what was sampled last."""
  if (found := work.comparison) is not None:
    told = (
      'Every column begins with the same noise and label; distances are to '
      'full precision. Choose an image to lay two samplers over each other.'
    )
    if not found.exact:
      told += (
        ' Images are compressed here; samples/compare.png has them as they are.'
      )
    return {'texts': [told], 'comparison': found}
  grid = work.paths.samples / 'grid.png'
  if grid.is_file():
    return {'figures': [page.figure(grid, 'The first samples.')]}
  return None


def metrics(work: Contents) -> Section | None:
  """The table of --mode evaluate."""
  if not work.paths.metrics.is_file():
    return None
  result = files.read_json(work.paths.metrics)
  columns = list(metrics_table.texts(result).values())
  rows = [
    [name or 'N', *(column[name].removeprefix('N = ') for column in columns)]
    for name in columns[0]
  ]
  return {'tables': [page.Table((), rows)]}


def experiment(work: Contents) -> Section | None:
  """Tables and the figure of --mode experiment."""
  path = work.paths.experiment('results.json')
  if not path.is_file():
    return None
  results = files.read_json(path)
  made = []
  for sampler, quantizer, bits, rows in tables.groups(results):
    header, *lines = tables.cells(rows, markupsafe.Markup('<b>{}</b>').format)
    title = f'{sampler}, {bits}, {quantizer}'
    made.append(page.Table(header, lines, title))
    if differences := tables.difference_cells(rows):
      header, *lines = differences
      header[0] = 'minus no correction'
      made.append(page.Table(header, lines, f'{title}: differences'))
  drawn = []
  if (figure := work.paths.experiment('results.png')).is_file():
    drawn.append(page.figure(figure, 'Mean and deviation over seeds.'))
  told = (
    f'{results["num_images"]} images per seed, {len(results["seeds"])} seeds; '
    f'judged by {results["network"]} against {results["num_reference"]} images '
    f'of {results["reference"]}, sampled on {tables.origin(results)}.'
  )
  legend = tables.LEGEND.replace('**', '').replace('`', '').replace('\n', ' ')
  return {'texts': [told, legend], 'tables': made, 'figures': drawn}
