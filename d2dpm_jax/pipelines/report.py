"""`--mode report`: what is in a work directory, on one page, report.html.

Every section is made of what is there, and left out where nothing is.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from d2dpm_jax.pipelines import artifacts, cost, setup
from d2dpm_jax.reporting import (
  network_sections,
  page,
  result_sections,
  run_sections,
  summary,
)
from d2dpm_jax.reporting.contents import Contents, Section
from d2dpm_jax.runtime import files, runs

_log = logging.getLogger(__name__)

_SECTIONS: dict[str, tuple[str, Callable[[Contents], Section | None]]] = {
  'images': ('Images from the same noise', result_sections.images),
  'metrics': ('Metrics', result_sections.metrics),
  'experiment': ('Experiment', result_sections.experiment),
  'errors': ('Errors of the quantized network', network_sections.errors),
  'units': ('Reconstruction', network_sections.units),
  'layers': ('Bits and sizes', network_sections.layers),
  'speed': ('Time and memory', run_sections.speed),
  'settings': ('Settings', run_sections.settings),
  'again': ('Commands and environment', run_sections.environment),
  'next': ('What else can be shown', run_sections.missing),
}


def run(config: ml_collections.ConfigDict | None, workdir: str) -> None:
  """Writes report.html.

  Args:
    config: not used: the work directory says what was run in it.
    workdir: of the runs.

  Raises:
    ValueError: there is nothing, or a file is damaged; names it.
  """
  del config
  paths = files.Workdir.at(workdir)
  if not paths.root.is_dir():
    raise ValueError(
      f'--workdir {workdir}: there is no such directory. Make it with --mode '
      'calibrate, or name that of an earlier run.'
    )
  text = html(paths)
  with files.atomic_write(paths.report, 'w') as file:
    file.write(text)
  _log.info('Wrote %s', paths.report)


def html(paths: files.Workdir) -> str:
  """The page, see `run`."""
  work = _contents(paths)
  sections = [
    {
      'key': key,
      'title': title,
      'texts': [],
      'figures': [],
      'tables': [],
      'comparison': None,
      'commands': [],
      **made,
    }
    for key, (title, make) in _SECTIONS.items()
    if (made := make(work))
  ]
  if not sections:
    raise ValueError(
      f'{paths.root} holds nothing to report. Start with --mode calibrate, or '
      'name the --workdir of an earlier run.'
    )
  return page.render(
    title=summary.title(work),
    summary=summary.sentence(work),
    facts=summary.facts(work),
    sections=sections,
  )


def _contents(paths: files.Workdir) -> Contents:
  """Reads what several sections are made of."""
  history = runs.read(paths)
  config = files.read_json(paths.config) if paths.config.is_file() else {}
  try:
    quant = artifacts.saved_settings(paths)['quant']
  except FileNotFoundError:
    quant = None
  return Contents(paths, config, history, quant, _costs(paths, config, quant))


def _costs(
  paths: files.Workdir,
  config: Mapping[str, Any],
  quant: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
  """Sizes of the calibrated network; None if there is none."""
  if quant is None or 'model' not in config:
    return None
  merged = {**config, 'quant': {**config['quant'], **quant}}
  wanted = {name: setup.plain(merged[name]) for name in ('model', 'quant')}
  path = paths.benchmark('cost.json')
  if path.is_file():
    found = files.read_json(path)
    kept = {name: found.get(name, {}) for name in wanted}
    if not files.differences(kept, wanted):
      return found
  # Tuples, where JSON has lists: the architecture is hashed.
  return cost.measure(ml_collections.ConfigDict(setup.plain(merged)))
