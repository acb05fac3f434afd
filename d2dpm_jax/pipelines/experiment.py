"""`--mode experiment`: all corrections at all settings, over several seeds.

`config.experiment` spans a grid. Each of its cells is a set of images, judged
as --mode evaluate does and compared one by one with the images that the full
precision network makes of the same noise. Below experiment/ of the work
directory are

  trajectories/<sampler>/    of the full-precision network, for calibration
  calibrated/<network>-<sampler>/   work directories: --mode sample reads them
  full_precision/<sampler>-seed<k>/ images and latents, made once
  cells/<cell>.json          what was measured, with all it depends on
  results.json, .md, .png    mean and spread over seeds

Whatever is there is taken over, so a run that was killed goes on where it was.
"""

import dataclasses
import logging
import pathlib
import time
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from d2dpm_jax.evaluation import distance, features, image_sets
from d2dpm_jax.pipelines import (
  artifacts,
  calibrate,
  evaluate,
  experiment_grid,
  generation,
  judges,
  sample,
  setup,
  statistics,
  trajectories,
)
from d2dpm_jax.pipelines.experiment_grid import Cell, Grid
from d2dpm_jax.reporting import plots, tables
from d2dpm_jax.runtime import devices, files, progress, runs

_log = logging.getLogger(__name__)


class Timing(NamedTuple):
  """Of sampling."""

  seconds: float  # All of it.
  compile_seconds: float  # Of these, programs were being compiled.
  images_per_second: float  # While none were.


class Sampled(NamedTuple):
  """The images of a cell, uint8[N,H,W,C], and latents, float32[N,h,w,c]."""

  images: np.ndarray
  latents: np.ndarray
  timing: Timing


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
  """What all cells share.

  Attributes:
    model: in full precision; its config is that of the experiment.
    grid: of the cells.
    paths: of the run.
    net: looks at the images.
    reference: what they are compared with.
    commit: of the code that runs, when it began; see `runs.commit`.
  """

  model: setup.Model
  grid: Grid
  paths: files.Workdir
  net: features.FeatureNet
  reference: features.Summary
  commit: str | None

  def configured(
    self, sampler: str, quantizer: str = '', bits: str = ''
  ) -> setup.Model:
    """The model, with a sampler and a quantizer of the grid."""
    config = experiment_grid.configured(
      self.model.config, sampler, quantizer, bits
    )
    return dataclasses.replace(self.model, config=config)

  def calibration(
    self, sampler: str, quantizer: str, bits: str
  ) -> files.Workdir:
    name = f'calibrated/{quantizer}-{bits}-{sampler}'
    return files.Workdir.at(self.paths.experiment(name))

  def full_precision(self, cell: Cell) -> pathlib.Path:
    name = f'full_precision/{cell.sampler}-seed{cell.seed}'
    return self.paths.experiment(name)

  def result(self, cell: Cell) -> pathlib.Path:
    return self.paths.experiment(f'cells/{cell.name}.json')

  def labels(self, cell: Cell) -> np.ndarray:
    """int32[N], each class equally often."""
    index = np.arange(self.grid.num_images)
    classes = max(1, self.model.num_classes)
    return generation.balanced_labels(cell.seed, index, classes)


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Writes experiment/results.md, .json and .png."""
  paths = files.Workdir.at(workdir)
  config = setup.resolve(config)
  # Before the weights, which take long.
  experiment_grid.read(config, config.model.cond_stage is not None)
  experiment(setup.load(config, paths), paths)
  _log.info('Wrote %s', paths.experiment('results.md'))


def experiment(model: setup.Model, paths: files.Workdir) -> dict[str, Any]:
  """Makes the cells that are missing, and tables and a plot of all.

  Args:
    model: in full precision; `model.config.experiment` is the grid.
    paths: of the run.

  Returns:
    What results.json holds, see `tables.aggregate`.

  Raises:
    FileNotFoundError: there are no weights of the evaluation network.
    ValueError: bad settings, or something in `paths` was made with others, or
      another process is at work there.
  """
  bench = _prepare(model, paths)
  with files.claimed(paths.experiment()):
    _claim(bench)
    setup.begin(model.config, paths)
    cells = _Cells(bench)
    with cells:
      for sampler in bench.grid.samplers:
        _make_cells(bench, sampler, cells)
    found = [files.read_json(bench.result(c)) for c in bench.grid.cells()]
    results = tables.aggregate(found)
    files.write_json(paths.experiment('results.json'), results)
    with files.atomic_write(paths.experiment('results.md'), 'w') as file:
      file.write(tables.markdown(results))
    plots.save(plots.experiment(results), paths.experiment('results.png'))
  return results


def _prepare(model: setup.Model, paths: files.Workdir) -> Bench:
  """Checks everything that can be checked before work begins."""
  grid = check(model)
  size, channels = model.ldm.image_size, model.ldm.first_stage.out_ch
  samples = image_sets.from_arrays(
    'The experiment', np.zeros((1, size, size, channels), np.uint8)
  )
  net = judges.network(model.config, samples)
  reference = judges.reference(model.config, paths, net)
  return Bench(model, grid, paths, net, reference, runs.commit())


def check(model: setup.Model) -> Grid:
  """The grid of `model.config`; of the weights, only shapes are looked at.

  Raises:
    ValueError: bad settings.
  """
  grid = experiment_grid.read(model.config, bool(model.num_classes))
  for word in grid.all_samplers():
    generation.rows_of(model.ldm, experiment_grid.sampler_of(word))
  for network in grid.networks():
    config = experiment_grid.configured(model.config, grid.learn_on, *network)
    calibrate.check(dataclasses.replace(model, config=config))
  evaluate.check(model.config.evaluate)
  return grid


def _claim(bench: Bench) -> None:
  """Raises ValueError if something there was made with other settings."""
  for cell in bench.grid.cells():
    path = bench.result(cell)
    if path.is_file():
      saved = files.read_json(path)['settings']
      different = files.differences(saved, _settings(bench, cell))
      if different:
        raise ValueError(
          f'{path} was made with other settings ({"; ".join(different)}). '
          f'Choose another --workdir, or delete {path.parents[1]}.'
        )
  for sampler in bench.grid.samplers:
    for cell in bench.grid.full_precision(sampler):
      trajectories.claim(
        bench.full_precision(cell), _sampling_settings(bench, cell)
      )
  for sampler in bench.grid.all_samplers():
    for network in bench.grid.networks():
      trajectories.claim(
        bench.calibration(sampler, *network).calibration,
        _calibration_settings(bench, sampler, *network),
      )


def _sampling_settings(bench: Bench, cell: Cell) -> dict[str, Any]:
  """What the images of the full-precision network depend on."""
  return {
    **bench.model.identity(),
    'dtype': bench.model.config.model.dtype,
    'microbatch': bench.model.config.sample.microbatch,
    'sampler': dataclasses.asdict(experiment_grid.sampler_of(cell.sampler)),
    'seed': cell.seed,
    'num_images': bench.grid.num_images,
  }


def _calibration_settings(
  bench: Bench, sampler: str, quantizer: str, bits: str
) -> dict[str, Any]:
  """What quantizers and error statistics depend on."""
  model = bench.configured(sampler, quantizer, bits)
  first = experiment_grid.sampler_of(bench.grid.learn_on)
  return {
    **calibrate.settings(model),
    'dtype': model.config.model.dtype,
    'errors': statistics.collection_settings(model.config),
    'quantized_on': dataclasses.asdict(first),
  }


def _settings(bench: Bench, cell: Cell) -> dict[str, Any]:
  """Everything that the numbers of a cell depend on."""
  config = bench.model.config
  found = {
    **_sampling_settings(bench, cell),
    'evaluation': {
      'network': bench.net.name,
      'network_digest': bench.net.digest,
      'reference': config.evaluate.reference,
      'preprocess': config.evaluate.preprocess,
      'image_size': config.evaluate.image_size,
      'num_reference': bench.reference.count,
      'neighbours': config.evaluate.neighbours,
      'split_size': config.evaluate.split_size,
      'shuffle_seed': config.seed if config.evaluate.shuffle else None,
    },
  }
  if cell.quantizer:
    found['correction'] = cell.correction
    found['statistics'] = cell.statistics
    found['execution'] = config.quant.execution
    found['absorb_variance'] = _absorbs(bench, cell)
    found['calibration'] = _calibration_settings(
      bench, cell.sampler, cell.quantizer, cell.bits
    )
  return found


def _absorbs(bench: Bench, cell: Cell) -> bool:
  """`sample.absorb_variance`, which is an option of s-d2 alone."""
  return cell.correction == 's-d2' and bench.model.config.sample.absorb_variance


class _Cells:
  """Counts cells, and their work: images times steps of the sampler."""

  def __init__(self, bench: Bench):
    self._cells = bench.grid.cells()
    self._images = bench.grid.num_images
    self._numbers = {cell: n for n, cell in enumerate(self._cells, 1)}
    total = sum(self._work(cell, self._images) for cell in self._cells)
    self._bar = progress.Progress('experiment', total, 'step')

  def __enter__(self) -> '_Cells':
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.close()

  def update(self, cell: Cell, images: int) -> None:
    number = f'cell {self._numbers[cell]}/{len(self._cells)}'
    self._bar.update(self._work(cell, images), f'{number}: {cell.name}')

  def reuse(self, cell: Cell) -> None:
    self._bar.update(self._work(cell, self._images), reused=True)

  def _work(self, cell: Cell, images: int) -> int:
    return images * experiment_grid.sampler_of(cell.sampler).steps


def _make_cells(bench: Bench, sampler: str, cells: _Cells) -> None:
  """All cells of a sampler that are not there yet."""
  groups = [bench.grid.quantized(sampler, *n) for n in bench.grid.networks()]
  missing = [
    [cell for cell in group if not bench.result(cell).is_file()]
    for group in (bench.grid.full_precision(sampler), *groups)
  ]
  wanted = {cell.seed for group in missing for cell in group}
  plain = _on_device(artifacts.full_precision(bench.configured(sampler)))
  references = {}
  for cell in bench.grid.full_precision(sampler):
    if cell.seed not in wanted:
      cells.reuse(cell)
      continue
    references[cell.seed] = _full_precision(bench, plain, cell, cells)
    if cell in missing[0]:
      _write(bench, cell, references[cell.seed])
  for group, rest in zip(groups, missing[1:], strict=True):
    for cell in group:
      if cell not in rest:
        cells.reuse(cell)
    if not rest:
      continue
    quantized = _calibrated(bench, sampler, rest[0].quantizer, rest[0].bits)
    quantized = _on_device(_executable(quantized))
    for cell in rest:
      sampled = _sample(bench, quantized, cell, cells)
      _write(bench, cell, sampled, references[cell.seed])


def _full_precision(
  bench: Bench, plain: artifacts.Quantized, cell: Cell, cells: _Cells
) -> Sampled:
  """Images and latents of the full-precision network, made once."""
  directory = bench.full_precision(cell)
  timing = directory / 'timing.json'
  arrays = ('images', 'latents')
  intact = [trajectories.has_array(directory, name) for name in arrays]
  if timing.is_file() and all(intact):
    cells.reuse(cell)
  else:
    sampled = _sample(bench, plain, cell, cells)
    files.write_json(timing, sampled.timing._asdict())
    trajectories.write_array(directory, 'images', sampled.images)
    trajectories.write_array(directory, 'latents', sampled.latents)
  return Sampled(
    trajectories.read_array(directory, 'images'),
    trajectories.read_array(directory, 'latents'),
    Timing(**files.read_json(timing)),
  )


def _calibrated(
  bench: Bench, sampler: str, quantizer: str, bits: str
) -> artifacts.Quantized:
  """Quantizers and the error statistics of a sampler.

  The quantizers are those of `learn_on`.
  """
  model = bench.configured(sampler, quantizer, bits)
  paths = bench.calibration(sampler, quantizer, bits)
  try:
    return artifacts.load(model, paths)
  except FileNotFoundError:
    pass
  _log.info('Calibrates %s %s for %s', quantizer, bits, sampler)
  learn_on, qstate = bench.grid.learn_on, None
  if sampler != learn_on:
    qstate = _calibrated(bench, learn_on, quantizer, bits).qstate
  setup.begin(model.config, paths)
  spool_at = bench.paths.experiment(f'trajectories/{sampler}')
  return calibrate.run_phases(model, paths, spool_at, qstate)


def _executable(quantized: artifacts.Quantized) -> artifacts.Quantized:
  """The same network as programs take it; see `config.quant.execution`."""
  prepared = quantized.executable()
  params = quantized.network_params()
  model = dataclasses.replace(quantized.model, params=params)
  return dataclasses.replace(
    quantized, model=model, qstate={}, prepared=prepared
  )


def _on_device(quantized: artifacts.Quantized) -> artifacts.Quantized:
  """Moves the arrays there once, and not for every cell."""
  model = quantized.model
  model = dataclasses.replace(model, params=devices.replicate(model.params))
  qstate = devices.replicate(quantized.qstate)
  prepared = devices.replicate(quantized.prepared)
  return dataclasses.replace(
    quantized, model=model, qstate=qstate, prepared=prepared
  )


def _sample(
  bench: Bench, quantized: artifacts.Quantized, cell: Cell, cells: _Cells
) -> Sampled:
  """Image k of seed s is that of --mode sample with this seed."""
  count = bench.grid.num_images
  run_batch = sample.batch_runner(
    quantized,
    cell.correction,
    cell.statistics == 'channel',
    _absorbs(bench, cell),
    bench.model.config.sample.microbatch,
    cell.seed,
  )
  size = min(bench.grid.batch_size, count)
  index, labels = np.arange(count, dtype=np.int32), bench.labels(cell)
  images: list[np.ndarray] = []
  latents: list[np.ndarray] = []
  computed, compiled = 0, progress.compile_seconds()
  begin = time.perf_counter()
  for start in range(0, count, size):
    # The last batch is as large as the others: one shape, one program.
    first = min(start, count - size)
    rows = slice(first, first + size)
    out = run_batch(index[rows], labels[rows])
    images.append(out['images'][start - first :])
    latents.append(out['latents'][start - first :])
    computed += size
    cells.update(cell, len(images[-1]))
  seconds = time.perf_counter() - begin
  compiled = progress.compile_seconds() - compiled
  rate = computed / max(seconds - compiled, 1e-9)
  timing = Timing(seconds, compiled, rate)
  return Sampled(np.concatenate(images), np.concatenate(latents), timing)


def _write(
  bench: Bench, cell: Cell, sampled: Sampled, reference: Sampled | None = None
) -> None:
  """Measures a cell and keeps the numbers.

  Args:
    bench: what all cells share.
    cell: which one.
    sampled: its images.
    reference: those of full precision; None if these are they.
  """
  settings = bench.model.config.evaluate
  samples = image_sets.from_arrays(cell.name, sampled.images)
  batches = samples.batches(settings.batch_size)
  summary = features.summarize(bench.net, batches, settings.batch_size)
  # Classes of other networks are not the labels.
  labelled = bench.net.name == 'digits' and bench.model.num_classes
  values: dict[str, float | None] = evaluate.measure(
    summary,
    bench.reference,
    bench.labels(cell) if labelled else None,
    shuffle_seed=bench.model.config.seed if settings.shuffle else None,
    neighbours=settings.neighbours,
    split_size=settings.split_size,
  )
  if reference is not None:
    values |= distance.distance(
      sampled.images, sampled.latents, reference.images, reference.latents
    )._asdict()
  device = jax.devices()[0].device_kind
  files.write_json(
    bench.result(cell),
    {
      **dataclasses.asdict(cell),
      'num_images': len(sampled.images),
      'num_reference': bench.reference.count,
      'reference': settings.reference,
      'network': bench.net.name,
      'device': f'{len(jax.devices())} x {device}',
      'commit': bench.commit,
      'date': time.strftime('%Y-%m-%d', time.gmtime()),
      'values': {**values, **sampled.timing._asdict()},
      'settings': _settings(bench, cell),
    },
  )
