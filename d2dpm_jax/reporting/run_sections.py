"""Sections of the report on runs: times, settings, commands."""

import shlex
from collections.abc import Mapping

from flax import traverse_util

from d2dpm_jax.reporting import benchmark_tables, page
from d2dpm_jax.reporting.contents import Contents, Section
from d2dpm_jax.runtime import files


def speed(work: Contents) -> Section | None:
  """What took how long, and what --mode benchmark measured."""
  made = []
  if work.history:
    rows = [
      [
        run['mode'],
        run['ended'],
        f'{run["seconds"]:.1f}',
        f'{run["peak_memory_bytes"] / 1e9:.2f}',
        run['environment']['devices'],
      ]
      for run in work.history
      if {'mode', 'ended', 'seconds', 'environment'} <= set(run)
    ]
    header = ['mode', 'ended', 's', 'GB of the host', 'devices']
    made.append(page.Table(header, rows, 'Runs'))
  folder = work.paths.benchmark('')
  for path in sorted(folder.glob('*.json')):
    if path.name != 'cost.json':  # Those are in another section.
      made += benchmark_tables.measured(path.stem, files.read_json(path))
  return {'tables': made} if made else None


def settings(work: Contents) -> Section | None:
  """The config of the last run that wrote one."""
  if not work.config:
    return None
  made = []
  changed = {
    (run['mode'], name): value
    for run in work.history
    for name, value in run.get('overrides', {}).items()
  }
  if changed:
    rows = [[name, value, mode] for (mode, name), value in changed.items()]
    made.append(page.Table(['field', 'value', 'mode'], rows, 'Set by hand'))
  single = [
    [k, repr(v)] for k, v in work.config.items() if not hasattr(v, 'items')
  ]
  made.append(page.Table((), single))
  for name, group in work.config.items():
    if isinstance(group, Mapping) and group:
      rows = [
        [field, repr(value)]
        for field, value in traverse_util.flatten_dict(group, sep='.').items()
      ]
      made.append(page.Table((), rows, name, True))
  return {'tables': made}


def environment(work: Contents) -> Section | None:
  """Where the runs were made, and how to make them again."""
  if not work.history:
    return None
  found: dict[str, dict[str, None]] = {}
  for run in work.history:
    for name, value in traverse_util.flatten_dict(
      run.get('environment', {}), sep='.'
    ).items():
      if value is not None:
        found.setdefault(name.rpartition('.')[2], {})[str(value)] = None
  rows = [[name, '; '.join(values)] for name, values in found.items()]
  return {
    'texts': [
      'What was run here, in this order. A + behind a commit means that files '
      'had been changed.'
    ],
    'commands': [run['command'] for run in work.history],
    'tables': [page.Table((), rows, 'Environment')],
  }


def missing(work: Contents) -> Section | None:
  """Commands that would add what is missing."""
  known = [run for run in work.history if run.get('config')]
  if not known:
    return None
  last = known[-1]
  flags = [f'--config={last["config"]}']
  flags += [
    f'--config.{name}={value}'
    for name, value in last.get('overrides', {}).items()
    if not name.startswith(('evaluate.', 'benchmark.', 'experiment.'))
    and name not in ('sample.compare',)
  ]
  wanted = {
    ('--mode=calibrate',): work.paths.quantized,
    ('--mode=sample', '--config.sample.compare=True'): work.paths.comparison,
    ('--mode=sample',): work.paths.samples / 'samples.npz',
    ('--mode=evaluate', '--config.evaluate.bootstrap=200'): work.paths.metrics,
    ('--mode=benchmark', '--config.benchmark.what=corrections'): (
      work.paths.benchmark('corrections.json')
    ),
    ('--mode=experiment',): work.paths.experiment('results.json'),
  }
  program = last['command'].split(' --')[0]
  workdir = f'--workdir={work.paths.root}'
  lines = [
    f'{program} {shlex.join([*flags, *more, workdir])}'
    for more, path in wanted.items()
    if not path.exists()
  ]
  if not lines:
    return None
  return {'texts': ['Each adds a section to this page.'], 'commands': lines}
