"""`--dry_run`: what a mode would do, need and write; nothing is loaded or run.

Everything follows from the config, from shapes, and from what is in the work
directory.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from d2dpm_jax.pipelines import (
  artifacts,
  batch_size,
  benchmark,
  calibrate,
  duration,
  evaluate,
  experiment,
  experiment_grid,
  generation,
  image_names,
  layer_bits,
  quantize,
  sample,
  setup,
  shards,
  statistics,
  train,
  trajectories,
)
from d2dpm_jax.quantization import (
  cost,
  memory,
  reconstruction,
  stored_units,
  units,
)
from d2dpm_jax.runtime import files, runs


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Lines for people.

  Attributes:
    reads: what has to be there, and whether it is.
    memory: what is needed, and of what.
    time: what it would take, and what that is based on.
    phases: what is done already, of what the mode does in parts.
    writes: files below the work directory.
  """

  reads: Sequence[str] = ()
  memory: Sequence[str] = ()
  time: Sequence[str] = ()
  phases: Sequence[str] = ()
  writes: Sequence[pathlib.Path] = ()


def describe(
  mode: str,
  config: ml_collections.ConfigDict,
  default: ml_collections.ConfigDict,
  workdir: str,
) -> str:
  """The plan of a mode, as text.

  Args:
    mode: of the command line.
    config: the experiment with its overrides.
    default: what its file gives without argument and overrides.
    workdir: of the run.

  Raises:
    ValueError: settings that the mode would refuse, as far as that can be told
      without weights.
    FileNotFoundError: a file that the settings name is not there.
  """
  paths = files.Workdir.at(workdir)
  model = setup.outline(config)
  plan = _PLANS[mode](model, paths)
  size, where = quantize.device_memory()
  device = jax.devices()[0]
  lines = [
    f'--mode {mode} in {workdir}; nothing is run.',
    '',
    'Settings that differ from those of the file:',
    *(_changes(default, config) or ['  none']),
    '',
    f'Devices: {jax.device_count()} x {device.device_kind} '
    f'({device.platform}), {_size(size)}'
    + (' of the host' if where == 'host' else ' each'),
  ]
  writes = [
    f'{pathlib.Path(workdir) / path.relative_to(paths.root)}'
    + (' (is there)' if path.exists() else '')
    for path in plan.writes
  ]
  blocks = {
    'Memory, predicted from shapes:': plan.memory,
    'Time, predicted:': plan.time,
    'Reads:': plan.reads,
    'Done already:': plan.phases,
    'Writes:': writes,
  }
  for title, block in blocks.items():
    if block:
      lines += [title, *(f'  {line}' for line in block)]
  if run := runs.last(paths, mode):
    lines += [
      f'It took {run.get("seconds", 0):.0f} s the last time in this directory:',
      f'  {run["command"]}',
    ]
  return '\n'.join(lines)


def _size(count: float) -> str:
  if count >= 1e9:
    return f'{count / 1e9:.1f} GB'
  if count >= 1e6:
    return f'{count / 1e6:.0f} MB'
  return f'{count / 1e3:.0f} kB'


def _changes(
  default: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> list[str]:
  old, new = (
    traverse_util.flatten_dict(setup.plain(c), sep='.')
    for c in (default, config)
  )
  return [
    f'  {name}={value!r} (the file: {old.get(name)!r})'
    for name, value in new.items()
    if name not in old or old[name] != value
  ]


def _weights(model: setup.Model, paths: files.Workdir) -> str:
  """Where the weights are, and whether."""
  where = model.config.checkpoint.path
  if where.startswith(('pretrained:', 'random:')):
    return f'weights {where}'
  path = pathlib.Path(where or paths.params)
  if path.exists():
    return f'weights {path}'
  return (
    f'weights {path}: MISSING; --mode convert makes them, or name others with '
    '--config.checkpoint.path'
  )


# ---- Modes.


def _calibrate(model: setup.Model, paths: files.Workdir) -> _Plan:
  config = model.config
  setup.checked(config)
  calibrate.check(model)
  _check_calibration(model, paths)
  table, _ = layer_bits.layer_policy(model)
  count = config.calibration.num_samples
  inputs = [
    jax.ShapeDtypeStruct((count, *np.shape(x)[1:]), x.dtype)
    for x in layer_bits.example_arguments(model)[1:]
    if x is not None
  ]
  apply = model.ldm.unet.apply
  variables = {'params': model.params['unet']}
  settings = quantize.reconstruction_settings(config.quant)
  block_types = tuple(config.quant.block_types)
  need = memory.predict(apply, variables, table, inputs, settings, block_types)
  listed = reconstruction.list_units(
    apply, variables, table, inputs, block_types=block_types
  )
  total = len(listed) * len(reconstruction.PHASES)
  devices = reconstruction.streams_of(count, settings).num_devices
  images = statistics.num_trajectories(config)
  batch = config.calibration.batch_size
  starts = range(0, images, batch)
  made = sum(
    min(batch, images - start)
    for start in starts
    if all(
      (paths.trajectories / f'{start:06d}.{field}.npy').is_file()
      for field in trajectories.Batch._fields
    )
  )
  stored = len(list((paths.calibration / 'units').glob('*.npz')))
  finished = artifacts.is_finished(paths)
  steps = len(generation.rows_of(model.ldm, model.sampler).t)
  latents = steps * int(np.prod(model.ldm.latent_shape))
  spool = 8 * images * latents + 4 * config.statistics.num_samples * latents
  return _Plan(
    [_weights(model, paths)],
    [
      f'{_size(need.on_device(False, devices))} on each of {devices} '
      f'device(s): weights {_size(need.weights)}, activations of {count} '
      f'samples {_size(need.streams)}, work {_size(need.work)}',
      f'{_size(need.on_device(True, devices))} with '
      '--config.quant.reconstruction.host_streams=True',
      f'{_size(spool)} of disk for trajectories',
    ],
    ['nothing is left to do']
    if finished
    else _calibration_time(model, paths, images - made, listed),
    [
      f'trajectories: {made} of {images} images',
      f'quantization: {stored} of {total} units',
      f'all of it: {"yes" if finished else "no"}',
    ],
    [
      paths.calibration,
      paths.quantized,
      *(paths.error_model(kind) for kind in ('tensor', 'channel')),
      paths.held_out,
      paths.report,
    ],
  )


def _calibration_time(
  model: setup.Model,
  paths: files.Workdir,
  images: int,
  listed: Sequence[units.Unit],
) -> list[str]:
  """Of what is left; `images` are the trajectories."""
  sampling = duration.Sampling(model, paths)
  steps = len(generation.rows_of(model.ldm, model.sampler).t)
  trajectory = steps * sampling.operations['step']
  settings = model.config.statistics
  found = []
  if images:
    what = f'{images} trajectories'
    found.append(sampling.line(what, images * trajectory, False))
  names = stored_units.names(listed, reconstruction.PHASES)
  found.append(duration.learning(model, paths, names))
  if settings.trajectory == 'fp':
    count = settings.num_samples
    what = f'errors along {count} trajectories'
    found.append(sampling.line(what, count * trajectory, True))
  else:
    found.append('errors along quantized trajectories: not told')
  if settings.num_trials:
    found.append(f'trial: up to six times {settings.num_trials} images')
  return sampling.with_hint(found)


def _check_calibration(model: setup.Model, paths: files.Workdir) -> None:
  """Raises ValueError if one was begun there with other settings."""
  marker = paths.calibration / 'settings.json'
  if not marker.is_file():
    return
  saved, wanted = files.read_json(marker), calibrate.settings(model)
  for settings in (saved, wanted):
    settings.pop('weights', None)  # They would have to be read.
  if different := files.differences(saved, wanted):
    raise ValueError(
      f'{paths.calibration} was made with other settings '
      f'({"; ".join(different)}). Choose another --workdir, or delete that '
      'directory.'
    )


def _sampling_memory(model: setup.Model) -> list[str]:
  """Of a microbatch on its way, on each device."""
  microbatch = model.config.sample.microbatch
  images = microbatch * batch_size.working(model.ldm)
  weights = cost.array_bytes(model.params)
  return [
    f'{_size(weights + images)} on each device: weights {_size(weights)}, '
    f'{microbatch} images at a time {_size(images)}'
  ]


def _image_bytes(model: setup.Model) -> int:
  return model.ldm.image_size**2 * model.ldm.first_stage.out_ch


def _sample(model: setup.Model, paths: files.Workdir) -> _Plan:
  settings = model.config.sample
  sample.check(settings)
  generation.check_execution(model.config.quant.execution)
  setup.checked(model.config)
  generation.rows_of(model.ldm, model.sampler)
  if settings.labels:
    sample.check_labels(model, np.asarray(settings.labels, np.int32))
  reads = [_weights(model, paths)]
  if settings.quantized or settings.compare:
    there = artifacts.is_finished(paths)
    missing = ': MISSING; --mode calibrate makes them'
    reads.append(f'quantizers {paths.quantized}{"" if there else missing}')
    if there and not settings.compare and ': MISSING' in reads[0]:
      reads = reads[1:]  # They are enough.
  names = ['samples.npz', 'grid.png']
  wanted = settings.num_images
  done = shards.Shards(paths.shards).count(wanted)
  phases = [f'{done} of {wanted} images']
  need = _sampling_memory(model)
  sampling = duration.Sampling(model, paths)
  if settings.compare:
    names, phases = ['compare.png', 'compare/images.npz'], []
    count = len(settings.labels) or 10
    time = [
      sampling.images(count, False, 'images of full precision'),
      sampling.images(4 * count, True, 'images of the quantized network'),
    ]
  else:
    size = 2 * wanted * _image_bytes(model)
    need.append(f'{_size(size)} of disk for images, in parts and as one file')
    time = [sampling.images(wanted - done, settings.quantized)]
    if done == wanted:
      time = ['nothing is left to do']
  return _Plan(
    reads,
    need,
    sampling.with_hint(time),
    phases,
    [*(paths.samples / name for name in names), paths.report],
  )


def _experiment(model: setup.Model, paths: files.Workdir) -> _Plan:
  setup.checked(model.config)
  grid = experiment.check(model)
  cells = grid.cells()
  done = {
    cell: files.read_json(path)
    for cell in cells
    if (path := paths.experiment(f'cells/{cell.name}.json')).is_file()
  }
  results = ('results.json', 'results.md', 'results.png')
  return _Plan(
    [
      _weights(model, paths),
      f'reference {_images(model.config.evaluate.reference) or "(not set)"}',
    ],
    _sampling_memory(model),
    _experiment_time(model, paths, grid, done),
    [f'{len(done)} of {len(cells)} cells of {grid.num_images} images'],
    [*map(paths.experiment, results), paths.report],
  )


def _experiment_time(
  model: setup.Model,
  paths: files.Workdir,
  grid: experiment_grid.Grid,
  done: Mapping[experiment_grid.Cell, Mapping[str, Any]],
) -> list[str]:
  """Of the images that are left, by sampler."""
  found = []
  for sampler in grid.samplers:
    cells = [cell for cell in grid.cells() if cell.sampler == sampler]
    config = experiment_grid.configured(model.config, sampler)
    rates: dict[bool, list[float]] = {False: [], True: []}
    left = {False: 0, True: 0}
    for cell in cells:
      quantized = bool(cell.bits)
      if cell in done:
        rate = done[cell]['values']['images_per_second']
        rates[quantized].append(rate)
      else:
        left[quantized] += grid.num_images
    sampling = duration.Sampling(
      dataclasses.replace(model, config=config), paths, rates
    )
    found += [
      sampling.images(count, quantized, f'{what}, {sampler}')
      for quantized, what in (
        (False, 'images of full precision'),
        (True, 'images of quantized networks'),
      )
      if (count := left[quantized])
    ]
  if not found:
    return ['nothing is left to do']
  networks = len(grid.networks())
  return [
    *sampling.with_hint(found),
    f'calibrating {networks} network(s) and judging the images are not in it',
  ]


def _images(names: str) -> str:
  """Sets of images, and which files of them are not there."""
  absent = [
    name
    for name in image_names.split(names)
    # Others are names of data sets.
    if ':' not in name and not pathlib.Path(name).exists()
  ]
  if not names or not absent:
    return names
  return f'{names}: MISSING; {", ".join(absent)} is not there'


def _evaluate(model: setup.Model, paths: files.Workdir) -> _Plan:
  settings = model.config.evaluate
  evaluate.check(settings)
  samples = _images(settings.samples)
  if not samples:
    there = any(paths.samples.glob('*.npz'))
    missing = ': MISSING; --mode sample makes them'
    samples = f'{paths.samples}{"" if there else missing}'
  reference = _images(settings.reference)
  reference = reference or 'MISSING; set --config.evaluate.reference'
  return _Plan(
    [f'samples {samples}', f'reference {reference}'],
    time=[duration.judging(model, paths)],
    writes=[paths.metrics, paths.report],
  )


def _benchmark(model: setup.Model, paths: files.Workdir) -> _Plan:
  settings = model.config.benchmark
  benchmark.check(settings)
  time = 'not known: that is what it measures'
  if settings.what == 'cost':
    time = 'seconds: it follows from shapes'
  elif settings.what == 'sampling':
    time = (
      f'no run begins later than {duration.text(settings.max_seconds)} '
      '(benchmark.max_seconds)'
    )
  elif settings.what == 'job':
    sampling = duration.Sampling(model, paths)
    quantized = model.config.sample.quantized
    images = sampling.images(settings.num_images, quantized)
    time = f'{images}; twice, and a trace of a few batches'
  elif settings.what == 'evaluation':
    time = duration.judging(model, paths)
  return _Plan(time=[time], writes=[paths.benchmark(f'{settings.what}.json')])


def _report(model: setup.Model, paths: files.Workdir) -> _Plan:
  del model
  return _Plan([str(paths.root)], time=['seconds'], writes=[paths.report])


def _convert(model: setup.Model, paths: files.Workdir) -> _Plan:
  source = model.config.checkpoint.torch_path
  text = f'checkpoint {source}'
  if not source:
    text = 'checkpoint: MISSING; set --config.checkpoint.torch_path'
  elif not pathlib.Path(source).exists():
    text += ': MISSING; there is no such file'
  return _Plan(
    [text],
    time=['not known; docs/convert.md has times, of half a minute and more'],
    writes=[paths.params, *map(paths.conversion, ('.json', '.txt'))],
  )


def _train(model: setup.Model, paths: files.Workdir) -> _Plan:
  names = ('mnist_classifier.safetensors', 'mnist_ldm.safetensors')
  if 'train' not in model.config:
    raise ValueError(
      'This config has no `train` section; configs/mnist.py has one.'
    )
  settings = model.config.train
  train.check(settings)
  steps = ' + '.join(
    str(settings[part].steps)
    for part in ('classifier', 'first_stage', 'diffusion')
  )
  return _Plan(
    [f'data {settings.data}'],
    time=[f'{steps} steps: not known; it shows what is left as it goes'],
    writes=[paths.training, *(paths.root / name for name in names)],
  )


_PLANS: dict[str, Callable[[setup.Model, files.Workdir], _Plan]] = {
  'calibrate': _calibrate,
  'sample': _sample,
  'evaluate': _evaluate,
  'experiment': _experiment,
  'benchmark': _benchmark,
  'report': _report,
  'convert': _convert,
  'train': _train,
}
