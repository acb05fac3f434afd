"""`--mode sample`: images from the quantized, corrected network."""

import functools
import hashlib
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from d2dpm_jax.denoising import correction as corrections
from d2dpm_jax.diffusion import noise
from d2dpm_jax.evaluation import image_sets
from d2dpm_jax.pipelines import (
  artifacts,
  batch_size,
  generation,
  sample_job,
  setup,
  statistics,
  trajectories,
)
from d2dpm_jax.reporting import comparison
from d2dpm_jax.runtime import (
  devices,
  files,
  images,
  microbatches,
  processes,
  progress,
)

_log = logging.getLogger(__name__)
_GRID = 64  # Images shown in the picture, at most.


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Writes samples/samples.npz and samples/grid.png, or compare.png.

  What an earlier run of the same settings has made is taken over.
  """
  paths = files.Workdir.at(workdir)
  settings = config.sample
  check(settings)
  quantized = _network(config, paths)
  model = quantized.model
  if settings.compare:
    if processes.is_first():
      compare(quantized, settings, paths)
      setup.begin(config, paths)
    return
  if settings.quantized:
    _warn_of_other_points(quantized, settings)
  index = np.arange(settings.num_images)
  check_labels(model, labels_of(model, settings, index))
  runner = configured_runner(quantized)
  made_with = _settings_of(quantized, runner)

  def begin() -> None:
    trajectories.claim(paths.shards, made_with)
    setup.begin(config, paths)

  # Nothing is written before: bad settings leave nothing behind.
  with processes.claimed(paths.shards):
    processes.from_first('begin', begin)
    sample_job.make(
      runner,
      functools.partial(labels_of, model, settings),
      settings.num_images,
      settings.batch_size or batch_size.choose(model, runner.program),
      paths,
    )
    if processes.is_first():
      _draw(paths)


def _draw(paths: files.Workdir) -> None:
  """Writes a picture of the first images."""
  shown = next(image_sets.from_path(paths.all_samples).batches(_GRID))
  columns = max(1, int(np.ceil(np.sqrt(len(shown)))))
  scale = max(1, 64 // shown.shape[1])
  picture = paths.samples / 'grid.png'
  images.save_png(picture, images.grid(shown, columns, scale))
  _log.info('Wrote %s and %s', paths.all_samples, picture)


def _settings_of(
  quantized: artifacts.Quantized, runner: 'Runner'
) -> dict[str, Any]:
  """Everything that image k depends on, but k."""
  model = quantized.model
  settings = setup.plain(model.config.sample)
  found = {
    **model.identity(),
    'dtype': model.config.model.dtype,
    'microbatch': settings['microbatch'],
    'sampler': setup.plain(model.config.sampler),
    'seed': model.config.seed,
    'labels': settings['labels'] or 'balanced',
    'quantized': settings['quantized'],
  }
  if settings['quantized']:
    found |= {
      'quant': artifacts.structure(model)['quant'],
      'execution': model.config.quant.execution,
      'quantizers': _digest(quantized.qstate),
      'error_statistics': _digest(runner.inputs.correction_rows),
      **statistics.corrected_with(model.config.sample),
    }
  return found


def _digest(tree: Any) -> str:
  """Short hash of arrays."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    name = f'{jax.tree_util.keystr(path)} {array.dtype}{array.shape}'
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()[:16]


def _network(
  config: ml_collections.ConfigDict, paths: files.Workdir
) -> artifacts.Quantized:
  """What is sampled from.

  A calibration needs no checkpoint beside it, unless full precision is sampled
  too.
  """
  generation.check_execution(config.quant.execution)
  settings = config.sample
  try:
    model = setup.load(config, paths)
  except FileNotFoundError as error:
    needed = settings.compare or not settings.quantized
    if needed or not artifacts.is_finished(paths):
      raise
    _log.info('%s Samples from %s alone.', error, paths.quantized)
    return artifacts.load_alone(config, paths)
  if not (settings.quantized or settings.compare):
    return artifacts.full_precision(model)
  return artifacts.load(model, paths)


def check(settings: ml_collections.ConfigDict) -> None:
  """Raises ValueError if something in `config.sample` makes no sense."""
  for name, least in {
    'num_images': 1,
    'batch_size': 0,
    'microbatch': 1,
  }.items():
    if settings[name] < least:
      raise ValueError(
        f'sample.{name} is {settings[name]}; expected >= {least}.'
      )
  if settings.correction not in corrections.CORRECTIONS:
    raise ValueError(
      f'sample.correction {settings.correction!r}: expected one of '
      f'{list(corrections.CORRECTIONS)}.'
    )
  if not settings.compare:  # That goes through corrections of its own.
    kind = settings.correction if settings.quantized else 'none'
    corrections.check(kind, settings.absorb_variance)


def _warn_of_other_points(
  quantized: artifacts.Quantized, settings: ml_collections.ConfigDict
) -> None:
  """Statistics hold at the points that their own correction leads to."""
  errors = quantized.statistics(settings.correction, settings.channel_wise)
  collected = {} if errors is None else errors.settings.get('statistics', {})
  different = [
    f'sample.{name}={collected[name]!r}'
    for name, value in statistics.corrected_with(settings).items()
    if collected.get(name, value) != value
  ]
  if different:
    _log.warning(
      'The error statistics were collected on trajectories with %s; with other '
      'settings they are those of other points.',
      ', '.join(different),
    )


def labels_of(
  model: setup.Model, settings: ml_collections.ConfigDict, index: np.ndarray
) -> np.ndarray:
  """The labels of images: given ones in a cycle, or balanced; int32[B]."""
  if not settings.labels:
    return generation.balanced_labels(
      model.config.seed, index, max(1, model.num_classes)
    )
  given = np.asarray(settings.labels, np.int32)
  return given[index % len(given)]


def check_labels(model: setup.Model, labels: np.ndarray) -> None:
  """Raises ValueError for labels that the model does not have."""
  if labels.min() >= 0 and labels.max() < max(1, model.num_classes):
    return
  classes = (
    f'has the classes 0..{model.num_classes - 1}'
    if model.num_classes
    else 'is unconditional, its labels are 0'
  )
  raise ValueError(
    f'Labels {sorted(set(labels.tolist()))[:8]}: this model {classes}.'
  )


def generate(
  quantized: artifacts.Quantized,
  index: np.ndarray,
  labels: np.ndarray,
  *,
  correction: str,
  channel_wise: bool,
  absorb: bool,
  batch_size: int,
  microbatch: int,
  seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Generates images; image k depends on (seed, k, label) alone.

  Args:
    quantized: network and error models.
    index: int[N], image numbers.
    labels: int[N].
    correction: a key of `denoising.correction.CORRECTIONS`.
    channel_wise: which error model; has no effect on 'auto'.
    absorb: see `correction_rows`.
    batch_size: images per call.
    microbatch: see `runtime.microbatches`.
    seed: of all noise.

  Returns:
    uint8[N,H,W,C] and the labels int32[N].

  Raises:
    ValueError: labels that the model does not have; an unknown correction; no
      fitting error model.
  """
  model = quantized.model
  labels = np.asarray(labels, np.int32)
  check_labels(model, labels)
  index = np.asarray(index, np.int32)
  runner = batch_runner(
    quantized, correction, channel_wise, absorb, microbatch, seed
  )
  out = []
  with progress.progress('sampling', len(index), 'image') as bar:
    for start in range(0, len(index), batch_size):
      rows = slice(start, start + batch_size)
      launched = runner.launch(index[rows], labels[rows], batch_size)
      out.append(launched.fetch('images')['images'])
      bar.update(len(out[-1]))
  return np.concatenate(out), labels


class Runner(NamedTuple):
  """A compiled sampler with everything but image numbers and labels."""

  program: microbatches.Program
  inputs: generation.Inputs

  def __call__(self, index: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Makes the images of one batch: {'images', 'latents'}."""
    return self.program(self.inputs, index, labels)

  def launch(
    self, index: np.ndarray, labels: np.ndarray, room: int = 0
  ) -> microbatches.Launched:
    """Begins with a batch; see `microbatches.Program.launch`."""
    return self.program.launch(self.inputs, index, labels, room=room)


def configured_runner(quantized: artifacts.Quantized) -> Runner:
  """The sampler that the config of the model asks for."""
  config = quantized.model.config
  settings = config.sample
  return batch_runner(
    quantized,
    settings.correction if settings.quantized else 'none',
    settings.channel_wise,
    settings.absorb_variance,
    settings.microbatch,
    config.seed,
  )


def batch_runner(
  quantized: artifacts.Quantized,
  correction: str,
  channel_wise: bool,
  absorb: bool,
  microbatch: int,
  seed: int,
) -> Runner:
  """(index, labels) -> {'images', 'latents'} of one batch."""
  model = quantized.model
  timesteps = generation.rows_of(model.ldm, model.sampler).t
  corrections.check(correction, absorb)
  errors = quantized.statistics(correction, channel_wise)
  rows = corrections.correction_rows(errors, correction, timesteps, absorb)
  # One program for statistics per tensor and per channel.
  channels = model.ldm.latent_shape[-1]
  rows = jax.tree.map(
    lambda column: np.broadcast_to(column, (*column.shape[:-1], channels)), rows
  )
  program = generation.sample_program(
    model.ldm, model.sampler, correction, microbatch
  )
  qstate = quantized.executable()
  inputs = generation.Inputs(
    quantized.network_params(),
    qstate,
    rows,
    noise.seed_key(seed),
    model.sampler.scale,
  )
  return Runner(program, devices.replicate(inputs))


def compare(
  quantized: artifacts.Quantized,
  settings: ml_collections.ConfigDict,
  paths: files.Workdir,
) -> pathlib.Path:
  """Writes one picture: the same noise through all samplers, in rows.

  And `paths.comparison`: `images` uint8[R,N,H,W,C], `names` of the rows and
  `labels` int32[N]; those of an unconditional model are not there.
  """
  model = quantized.model
  plain_model = artifacts.full_precision(model)
  given = np.asarray(settings.labels, np.int32)
  labels = (
    given
    if given.size
    else np.arange(10, dtype=np.int32) % max(1, model.num_classes)
  )
  check_labels(model, labels)
  index = np.arange(len(labels), dtype=np.int32)
  bits = f'W{model.config.quant.weight_bits}A{model.config.quant.act_bits}'
  rows = {
    'full precision': (plain_model, 'none'),
    bits: (quantized, 'none'),
    f'{bits}, S-D2': (quantized, 's-d2'),
    f'{bits}, D-D2': (quantized, 'd-d2'),
    f'{bits}, auto': (quantized, 'auto'),
  }
  pictures, row_names = [], []
  for name, (source, correction) in rows.items():
    run_batch = batch_runner(
      source,
      correction,
      settings.channel_wise,
      False,
      settings.microbatch,
      model.config.seed,
    )
    pictures.append(run_batch(index, labels)['images'])
    distance = comparison.distance_text(pictures[0], pictures[-1])
    row_names.append(f'{name}\n{distance}'.strip())
    _log.info('%-14s %s', name, distance)
  scale = max(1, 64 // pictures[0].shape[1])
  picture = images.grid(
    np.concatenate(pictures),
    len(labels),
    scale,
    row_names=row_names,
    column_names=[str(label) for label in labels] if model.num_classes else (),
  )
  arrays: dict[str, Any] = {
    'images': np.stack(pictures),
    'names': np.array(list(rows)),
  }
  if model.num_classes:
    arrays['labels'] = labels
  with files.atomic_write(paths.comparison) as file:
    np.savez(file, **arrays)
  target = paths.samples / 'compare.png'
  images.save_png(target, picture)
  _log.info('Wrote %s', target)
  return target
