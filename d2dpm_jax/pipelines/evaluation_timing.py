"""`benchmark.what=evaluation`: how long all metrics of random images take."""

import logging
import pathlib
import shutil
import time
import zipfile
from typing import Any

import jax
import ml_collections
import numpy as np

from d2dpm_jax.evaluation import image_sets
from d2dpm_jax.pipelines import evaluate, judges, setup
from d2dpm_jax.runtime import files, progress

_log = logging.getLogger(__name__)

_COLOURS = 8  # Of a random image, in each direction.
_BATCH = 64


def report(config: ml_collections.ConfigDict, paths: files.Workdir) -> None:
  """Prints seconds by part and writes them to benchmark/evaluation.json."""
  result = measure(config, paths)
  print(text(result))
  target = paths.benchmark('evaluation.json')
  files.write_json(target, result)
  _log.info('Wrote %s', target)


def measure(
  config: ml_collections.ConfigDict, paths: files.Workdir
) -> dict[str, Any]:
  """Writes random images, and lets `evaluate` judge them from there.

  Nothing is left out: images are read from .npz files, and those of the
  reference are looked at as well.

  Args:
    config: an experiment; `config.benchmark` says how many images. Without
      `evaluate.inception` the weights are random.
    paths: of the run; the images are below it while they are needed.

  Returns:
    What evaluation.json holds. `total_s` is from the settings to the metrics;
    writing the images, and reading them once more alone, are not in it.

  Raises:
    ValueError: fewer than two images, or no place for them.
  """
  config = setup.resolve(config).copy_and_resolve_references()
  settings = config.evaluate
  if settings.network == 'inception' and not settings.inception:
    settings.inception = 'random:0'
  size = config.model.image_size
  shape = (size, size, 3)
  if settings.network == 'digits':
    shape = judges.digit_net().image_shape
  counts = {
    'samples': config.benchmark.num_samples,
    'reference': config.benchmark.num_reference,
  }
  folder = paths.benchmark('evaluation_images')
  folder.mkdir(parents=True, exist_ok=True)
  try:
    _check(counts, shape, folder)
    for seed, (name, count) in enumerate(counts.items()):
      settings[name] = str(folder / f'{name}.npz')
      write_images(folder / f'{name}.npz', (count, *shape), seed)
    start = time.perf_counter()
    for _ in image_sets.from_path(folder / 'samples.npz').batches(_BATCH):
      pass
    reading = time.perf_counter() - start
    times = progress.Times()
    start = time.perf_counter()
    result = evaluate.evaluate(config, paths, times)
    total = time.perf_counter() - start
  finally:
    shutil.rmtree(folder)
  return {
    'num_samples': counts['samples'],
    'num_reference': counts['reference'],
    'image_shape': shape,
    'network': result['network'],
    'batch_size': settings.batch_size,
    'device': f'{len(jax.devices())} x {jax.devices()[0].device_kind}',
    'seconds': times.seconds,
    'compiling_s': times.compiling,
    'total_s': total,
    'reading_alone_s': reading,
  }


def write_images(
  path: pathlib.Path, shape: tuple[int, int, int, int], seed: int
) -> None:
  """Writes an .npz of random images as `numpy.savez` would, batch by batch.

  Args:
    path: of the file.
    shape: N, H, W, C.
    seed: of their colours, of which every image has 8 x 8.
  """
  rng = np.random.default_rng(seed)
  count, height, width, channels = shape
  rows, columns = (np.arange(n) * _COLOURS // n for n in (height, width))
  header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
  with (
    zipfile.ZipFile(path, 'w') as archive,
    archive.open('arr_0.npy', 'w', force_zip64=True) as file,
    progress.progress('random images', count, 'image') as bar,
  ):
    np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, count, _BATCH):
      some = min(_BATCH, count - start)
      colours = rng.integers(
        0, 256, (some, _COLOURS, _COLOURS, channels), np.uint8
      )
      file.write(colours.take(columns, 2).take(rows, 1).data)
      bar.update(some)


def _check(
  counts: dict[str, int], shape: tuple[int, ...], folder: pathlib.Path
) -> None:
  for name, count in counts.items():
    if count < 2:
      raise ValueError(f'{count} images as {name}: at least 2 are needed.')
  needed = sum(counts.values()) * int(np.prod(shape))
  free = shutil.disk_usage(folder).free
  if needed > 0.95 * free:
    raise ValueError(
      f'The images need {needed / 1e9:.1f} GB at {folder}, where '
      f'{free / 1e9:.1f} GB are free: choose another --workdir, or fewer with '
      '--config.benchmark.num_samples.'
    )


def text(result: dict[str, Any]) -> str:
  """Seconds by part, with what they are of."""
  shape = ' x '.join(map(str, result['image_shape']))
  lines = [
    f'{result["num_samples"]} images of {shape}, {result["num_reference"]} of '
    f'the reference, batches of {result["batch_size"]}, {result["device"]}',
    f'features: {result["network"]}',
  ]
  for name, seconds in result['seconds'].items():
    compiling = result['compiling_s'][name]
    lines.append(f'{name:20} {seconds:8.1f} s, compiling {compiling:.1f} s')
  gigabytes = result['num_samples'] * np.prod(result['image_shape']) / 1e9
  lines += [
    f'{"total":20} {result["total_s"]:8.1f} s',
    f'Reading the {gigabytes:.2f} GB of images is part of that; alone it took '
    f'{result["reading_alone_s"]:.1f} s.',
  ]
  return '\n'.join(lines)
