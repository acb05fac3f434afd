"""`--mode report`: what is in a work directory, on one page, report.html.

Every section is made of what is there, and left out where nothing is.
"""

import json
import logging
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import markupsafe
import ml_collections
import numpy as np
from flax import traverse_util

from d2dpm_jax.denoising import gaussian, selection
from d2dpm_jax.pipelines import (
  artifacts,
  cost,
  metrics_table,
  sample,
  setup,
)
from d2dpm_jax.reporting import page, tables
from d2dpm_jax.runtime import files, runs

_log = logging.getLogger(__name__)

_IMAGES = 16  # Columns of the comparison, at most.
_FOLD = 12  # Tables of more rows are folded.
_TEXT = 60  # Letters of a value in a table of settings.

Section = dict[str, Any]


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
  history = runs.read(paths)
  config = files.read_json(paths.config) if paths.config.is_file() else {}
  costs = _costs(paths, config)
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
    if (made := make(paths, config, costs, history))
  ]
  if not sections:
    raise ValueError(
      f'{paths.root} holds nothing to report. Start with --mode calibrate, or '
      'name the --workdir of an earlier run.'
    )
  return page.render(
    title=_title(paths, history),
    summary=_summary(config, paths),
    facts=_facts(paths, config, costs),
    sections=sections,
  )


# ---- The top of the page.


def _title(paths: files.Workdir, history: Sequence[Mapping[str, Any]]) -> str:
  names = [run.get('config') for run in history if run.get('config')]
  return f'{names[-1]} in {paths.root.name}' if names else paths.root.name


def _summary(config: Mapping[str, Any], paths: files.Workdir) -> str:
  """The settings that matter most, in a sentence."""
  if not config:
    return ''
  steps = config['sampler']
  text = (
    f'{config["model"]["image_size"]} x {config["model"]["image_size"]} '
    f'images by {steps["steps"]} DDIM steps, eta {steps["eta"]:g}, guidance '
    f'{steps["guidance_scale"]:g}; seed {config["seed"]}.'
  )
  if saved := _calibrated(paths):
    quant = saved['quant']
    text += (
      f' Weights of {quant["weight_bits"]} bits, layer inputs of '
      f'{quant["act_bits"]}, first and last layers of {quant["edge_bits"]}; '
      f'weight ranges per {"channel" if quant["per_channel"] else "tensor"}.'
    )
  return text


def _facts(
  paths: files.Workdir,
  config: Mapping[str, Any],
  costs: Mapping[str, Any] | None,
) -> list[dict[str, str]]:
  """Single numbers, each with what it is of."""
  facts = []
  if costs is not None and (name := _bits(costs)):
    full, own = costs['settings']['FP32'], costs['settings'][name]
    facts.append(
      {
        'name': f'U-Net, {name}',
        'value': f'{own["unet_bytes"] / 2**20:.2f} MiB',
        'note': f'{full["unet_bytes"] / own["unet_bytes"]:.2f} times less than '
        'FP32',
      }
    )
  if paths.unit_summary.is_file():
    snr = files.read_json(paths.unit_summary).get('snr_db', {}).get('act')
    if snr is not None:
      facts.append(
        {
          'name': 'Signal to quantization noise',
          'value': f'{snr:.1f} dB',
          'note': 'of the network, on the calibration set',
        }
      )
  if paths.comparison.is_file():
    rows = _comparison(paths).rows
    facts += [
      {
        'name': f'PSNR, {row.name}',
        'value': row.note.removesuffix(' PSNR'),
        'note': f'to full precision, N\u00a0=\u00a0{len(row.urls)}',
      }
      for row in rows[1:]
      if 'auto' in row.name or row is rows[1]
    ]
  if paths.metrics.is_file():
    result = files.read_json(paths.metrics)
    if result.get('fid') is not None:
      interval = result.get('fid_bootstrap')
      note = f'N = {result["num_samples"]}, {result["network"]}'
      if interval:
        note += f', 95 %: {interval["low"]:.2f} to {interval["high"]:.2f}'
      facts.append(
        {'name': 'FID', 'value': f'{result["fid"]:.2f}', 'note': note}
      )
  del config
  return facts


def _calibrated(paths: files.Workdir) -> dict[str, Any] | None:
  """Settings of the calibration that is there."""
  try:
    return artifacts.saved_settings(paths)
  except FileNotFoundError:
    return None


def _bits(costs: Mapping[str, Any]) -> str:
  """The config's own setting among those that were counted, 'W4A8'."""
  quant = costs['quant']
  name = f'W{quant["weight_bits"]}A{quant["act_bits"]}'
  return name if name in costs['settings'] else ''


def _costs(
  paths: files.Workdir, config: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Sizes of the calibrated network; None if there is none."""
  saved = _calibrated(paths)
  if saved is None or 'model' not in config:
    return None
  merged = {**config, 'quant': {**config['quant'], **saved['quant']}}
  wanted = {name: setup.plain(merged[name]) for name in ('model', 'quant')}
  path = paths.benchmark('cost.json')
  if path.is_file():
    found = files.read_json(path)
    kept = {name: found.get(name, {}) for name in wanted}
    if not files.differences(kept, wanted):
      return found
  # Tuples, where JSON has lists: the architecture is hashed.
  return cost.measure(ml_collections.ConfigDict(setup.plain(merged)))


# ---- Sections.


def _comparison(paths: files.Workdir) -> page.Comparison:
  try:
    with np.load(paths.comparison, allow_pickle=False) as file:
      pictures = file['images'][:, :_IMAGES]
      names = file['names'].tolist()
      labels = file['labels'][:_IMAGES].tolist() if 'labels' in file else None
  except (OSError, ValueError, KeyError, EOFError) as error:
    raise ValueError(
      f'{paths.comparison} cannot be read ({error}): make it again with --mode '
      'sample --config.sample.compare=True.'
    ) from error
  count = pictures.shape[1]
  return page.Comparison(
    rows=[
      page.Row(
        name,
        sample.distance_text(pictures[0], row) if number else '',
        [page.image_url(image) for image in row],
        [
          sample.distance_text(first, image) if number else ''
          for first, image in zip(pictures[0], row, strict=True)
        ],
      )
      for number, (name, row) in enumerate(zip(names, pictures, strict=True))
    ],
    columns=[
      f'image {k}' if labels is None else f'image {k}, class {labels[k]}'
      for k in range(count)
    ],
    heads=[
      str(k) if labels is None else f'class {labels[k]}' for k in range(count)
    ],
    size=pictures.shape[2],
    exact=page.is_exact(pictures.shape[2]),
  )


def _images(paths: files.Workdir, *_: Any) -> Section | None:
  """Rows of all samplers, or what was sampled last."""
  if paths.comparison.is_file():
    found = _comparison(paths)
    told = (
      'Every column begins with the same noise and label; distances are to '
      'full precision. Choose an image to lay two samplers over each other.'
    )
    if not found.exact:
      told += (
        ' Images are compressed here; samples/compare.png has them as they are.'
      )
    return {'texts': [told], 'comparison': found}
  grid = paths.samples / 'grid.png'
  if grid.is_file():
    return {'figures': [page.figure(grid, 'The first samples.')]}
  return None


def _metrics(paths: files.Workdir, *_: Any) -> Section | None:
  if not paths.metrics.is_file():
    return None
  result = files.read_json(paths.metrics)
  columns = list(metrics_table.texts(result).values())
  rows = [
    [name or 'N', *(column[name].removeprefix('N = ') for column in columns)]
    for name in columns[0]
  ]
  return {'tables': [page.Table((), rows)]}


def _errors(paths: files.Workdir, *_: Any) -> Section | None:
  """Statistics of the error by timestep."""
  captions = {
    paths.error_plot: (
      'The error Δ of the quantized network by timestep: moments, correlation '
      'with its estimate, and what corrections predict of it on held-out '
      'images.'
    ),
    paths.error_left_plot: 'What corrections leave of the error.',
    paths.error_joint_plot: 'Estimates and errors, with the Gaussian fitted.',
  }
  figures = [
    page.figure(path, text) for path, text in captions.items() if path.is_file()
  ]
  made = []
  if paths.error_model('tensor').is_file():
    model = gaussian.ErrorModel.load(paths.error_model('tensor'))
    header = ['timestep', 'mean Δ', 'std Δ', 'ρ(ε_q, Δ)', 'std ε_q']
    columns = [
      model.mean_d, np.sqrt(model.var_d), model.rho, np.sqrt(model.var_q)
    ]  # fmt: skip
    rows = [
      [str(t), *(f'{column[i]:.5f}' for column in columns)]
      for i, t in enumerate(model.timesteps.tolist())
    ]
    if paths.held_out.is_file():
      held = selection.HeldOut.load(paths.held_out)
      header += ['auto chose', 'predicted, held out']
      for row, i in zip(rows, held.rows_of(model.timesteps), strict=True):
        chosen = held.choice()[i]
        row += [selection.CANDIDATES[chosen], f'{held.r2[i, chosen]:.1%}']
    made.append(page.Table(header, rows, 'Numbers by timestep', True))
  if not figures and not made:
    return None
  return {'figures': figures, 'tables': made}


def _units(paths: files.Workdir, *_: Any) -> Section | None:
  """How reconstruction fared, unit by unit."""
  if not paths.unit_summary.is_file():
    return None
  summary = files.read_json(paths.unit_summary)
  noise = ', '.join(
    f'{db:.2f} dB after {name}'
    for phase, name in _PHASES.items()
    if (db := summary['snr_db'].get(phase)) is not None
  )
  texts = [
    f"{summary['units']} units. Signal-to-noise ratio of the network's output "
    f'over the calibration set: {noise}.'
  ]
  if worse := summary['not_improved']:
    texts.append(f'Learning did not improve {len(worse)}: {", ".join(worse)}.')
  made = []
  lines = paths.calibration / 'metrics.jsonl'
  if lines.is_file():
    made.append(_unit_table(lines))
  drawn = []
  if paths.unit_plot.is_file():
    drawn.append(
      page.figure(paths.unit_plot, 'Loss of every unit over its signal.')
    )
  return {'texts': texts, 'tables': made, 'figures': drawn}


_PHASES = {'weight': 'weights', 'act': 'layer inputs'}


def _unit_table(path: pathlib.Path) -> page.Table:
  """A row per unit: both phases."""
  units: dict[str, dict[str, Any]] = {}
  for line in path.read_text().splitlines():
    try:
      row = json.loads(line)
      phase, _, unit = row['unit'].partition('/')
    except (ValueError, KeyError, TypeError):
      continue  # A run that was killed may have ended in mid-line.
    units.setdefault(unit, {})[phase] = row
  header = ['unit']
  for name in _PHASES.values():
    header += [f'{name}: before', 'after', 's']
  rows = []
  for unit, phases in units.items():
    cells = [unit]
    for phase in _PHASES:
      row = phases.get(phase)
      if row is None:
        cells += ['', '', '']
        continue
      signal = row['signal'] or 1.0
      before, after = (row[f'loss_{k}'] / signal for k in ('before', 'after'))
      note = '' if row['learned'] else ' (not learned)'
      if row['kept_initial']:
        note = ' (kept)'
      cells += [f'{before:.2e}', f'{after:.2e}{note}', f'{row["seconds"]:.1f}']
    rows.append(cells)
  caption = 'Loss over signal, before and after learning'
  return page.Table(header, rows, caption, len(rows) > _FOLD)


def _layers(
  paths: files.Workdir,
  config: Mapping[str, Any],
  costs: Mapping[str, Any] | None,
  *_: Any,
) -> Section | None:
  """Bits and sizes, of all and of each layer."""
  del paths, config
  if costs is None or not (name := _bits(costs)):
    return None
  full, own = costs['settings']['FP32'], costs['settings'][name]
  kinds = {
    'U-Net, MiB': ('unet_bytes', 2**20),
    'all of the model, MiB': ('model_bytes', 2**20),
    'quantized layers, TBOPs': ('quantized_bops', 1e12),
    'all layers, TBOPs': ('layer_bops', 1e12),
    'network, TBOPs': ('network_bops', 1e12),
  }
  totals = [
    [text, *(f'{one[key] / unit:.4g}' for one in (full, own))]
    + [f'{full[key] / own[key]:.2f}']
    for text, (key, unit) in kinds.items()
  ]
  rows = []
  for layer in costs['layers']:
    here, before = layer['settings'][name], layer['settings']['FP32']
    rows.append(
      [
        layer['path'],
        layer['kind'],
        'x'.join(map(str, layer['kernel_shape'])),
        f'{here["w"] or "float"} / {here["a"] or "float"}',
        f'{before["bytes"] / 1024:.1f}',
        f'{here["bytes"] / 1024:.1f}',
        f'{layer["macs"] / 1e6:.2f}',
      ]
    )
  network = costs['network']
  header = [
    'layer', 'kind', 'kernel', 'bits, weight / input', 'KiB, FP32',
    f'KiB, {name}', 'million products',
  ]  # fmt: skip
  return {
    'texts': [
      f'{network["quantized_layers"]} layers are quantized, '
      f'{network["float_layers"]} are left in floating point. Bit operations '
      'are those of one forward of one image.'
    ],
    'tables': [
      page.Table(['', 'FP32', name, 'times less'], totals),
      page.Table(header, rows, 'Layers', len(rows) > _FOLD),
    ],
  }


def _experiment(paths: files.Workdir, *_: Any) -> Section | None:
  path = paths.experiment('results.json')
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
  if (figure := paths.experiment('results.png')).is_file():
    drawn.append(page.figure(figure, 'Mean and deviation over seeds.'))
  told = (
    f'{results["num_images"]} images per seed, {len(results["seeds"])} seeds; '
    f'judged by {results["network"]} against {results["num_reference"]} images '
    f'of {results["reference"]}, sampled on {tables.origin(results)}.'
  )
  legend = tables.LEGEND.replace('**', '').replace('`', '').replace('\n', ' ')
  return {'texts': [told, legend], 'tables': made, 'figures': drawn}


def _speed(
  paths: files.Workdir,
  config: Mapping[str, Any],
  costs: Mapping[str, Any] | None,
  history: Sequence[Mapping[str, Any]],
) -> Section | None:
  """What took how long, and what --mode benchmark measured."""
  del config, costs
  made = []
  if history:
    rows = [
      [
        run['mode'],
        run['ended'],
        f'{run["seconds"]:.1f}',
        f'{run["peak_memory_bytes"] / 1e9:.2f}',
        run['environment']['devices'],
      ]
      for run in history
      if {'mode', 'ended', 'seconds', 'environment'} <= set(run)
    ]
    header = ['mode', 'ended', 's', 'GB of the host', 'devices']
    made.append(page.Table(header, rows, 'Runs'))
  folder = paths.benchmark('')
  for path in sorted(folder.glob('*.json')):
    if path.name != 'cost.json':  # Those are in another section.
      made += _measured(path.stem, files.read_json(path))
  return {'tables': made} if made else None


def _measured(name: str, data: Any) -> list[page.Table]:
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
    made.append(page.Table(['', *names], lines, title, len(lines) > _FOLD))
  if single:
    lines = [
      [key, _short(value)]
      for key, value in traverse_util.flatten_dict(single, sep='.').items()
    ]
    made.insert(0, page.Table((), lines, f'benchmark {name}'))
  return made


# Parts of a benchmark that say what was asked for.
_CONFIGS = ('config', 'model', 'quant')


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


def _settings(
  paths: files.Workdir,
  config: Mapping[str, Any],
  costs: Mapping[str, Any] | None,
  history: Sequence[Mapping[str, Any]],
) -> Section | None:
  """The config of the last run that wrote one."""
  del paths, costs
  if not config:
    return None
  made = []
  changed = {
    (run['mode'], name): value
    for run in history
    for name, value in run.get('overrides', {}).items()
  }
  if changed:
    rows = [[name, value, mode] for (mode, name), value in changed.items()]
    made.append(page.Table(['field', 'value', 'mode'], rows, 'Set by hand'))
  single = [[k, repr(v)] for k, v in config.items() if not hasattr(v, 'items')]
  made.append(page.Table((), single))
  for name, group in config.items():
    if isinstance(group, Mapping) and group:
      rows = [
        [field, repr(value)]
        for field, value in traverse_util.flatten_dict(group, sep='.').items()
      ]
      made.append(page.Table((), rows, name, True))
  return {'tables': made}


def _environment(
  paths: files.Workdir,
  config: Mapping[str, Any],
  costs: Mapping[str, Any] | None,
  history: Sequence[Mapping[str, Any]],
) -> Section | None:
  """Where the runs were made, and how to make them again."""
  del paths, config, costs
  if not history:
    return None
  found: dict[str, dict[str, None]] = {}
  for run in history:
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
    'commands': [run['command'] for run in history],
    'tables': [page.Table((), rows, 'Environment')],
  }


def _next(
  paths: files.Workdir,
  config: Mapping[str, Any],
  costs: Mapping[str, Any] | None,
  history: Sequence[Mapping[str, Any]],
) -> Section | None:
  """Commands that would add what is missing."""
  del config, costs
  known = [run for run in history if run.get('config')]
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
    ('--mode=calibrate',): paths.quantized,
    ('--mode=sample', '--config.sample.compare=True'): paths.comparison,
    ('--mode=sample',): paths.samples / 'samples.npz',
    ('--mode=evaluate', '--config.evaluate.bootstrap=200'): paths.metrics,
    ('--mode=benchmark', '--config.benchmark.what=corrections'): (
      paths.benchmark('corrections.json')
    ),
    ('--mode=experiment',): paths.experiment('results.json'),
  }
  program = last['command'].split(' --')[0]
  workdir = f'--workdir={paths.root}'
  lines = [
    f'{program} {shlex.join([*flags, *more, workdir])}'
    for more, path in wanted.items()
    if not path.exists()
  ]
  if not lines:
    return None
  return {'texts': ['Each adds a section to this page.'], 'commands': lines}


_SECTIONS: dict[str, tuple[str, Callable[..., Section | None]]] = {
  'images': ('Images from the same noise', _images),
  'metrics': ('Metrics', _metrics),
  'experiment': ('Experiment', _experiment),
  'errors': ('Errors of the quantized network', _errors),
  'units': ('Reconstruction', _units),
  'layers': ('Bits and sizes', _layers),
  'speed': ('Time and memory', _speed),
  'settings': ('Settings', _settings),
  'again': ('Commands and environment', _environment),
  'next': ('What else can be shown', _next),
}
