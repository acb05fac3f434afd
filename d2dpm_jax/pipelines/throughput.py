"""`benchmark.what=job`: images per second, and what a whole job loses.

Three measurements with the network of `config.sample` and the devices of this
process:

  steady state   batches one after the other, whose images stay on the devices
  end to end     a job as --mode sample runs it, to the merged file
  busy           share of the time that devices compute, from a trace of XLA
                 over a few batches of such a job; not on CPUs
"""

import functools
import hashlib
import logging
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections
import numpy as np

from d2dpm_jax.pipelines import (
  artifacts,
  batch_size,
  sample,
  sample_job,
  setup,
  shards,
)
from d2dpm_jax.runtime import files, progress

_log = logging.getLogger(__name__)
_STEADY_S = 15.0
_TRACED_BATCHES = 4


def report(config: ml_collections.ConfigDict, paths: files.Workdir) -> None:
  """Prints the rates, and writes them to benchmark/job.json.

  Raises:
    ValueError: no images are asked for.
  """
  if config.benchmark.num_images < 1:
    raise ValueError(
      f'benchmark.num_images is {config.benchmark.num_images}; expected >= 1.'
    )
  result = measure(config, paths)
  print(table(result))
  target = paths.benchmark('job.json')
  files.write_json(target, result)
  _log.info('Wrote %s', target)


def measure(
  config: ml_collections.ConfigDict, paths: files.Workdir
) -> dict[str, Any]:
  """What job.json holds; rates are images per second.

  Args:
    config: an experiment; `config.sample` says what is sampled and how,
      `benchmark.num_images` how large the job is.
    paths: of the weights and the calibration; the job's images are below its
      benchmark/ for as long as this runs.
  """
  begun = time.perf_counter()
  compiled = progress.compile_seconds()
  model = setup.load(config, paths)
  settings = config.sample
  quantized = (
    artifacts.load(model, paths)
    if settings.quantized
    else artifacts.full_precision(model)
  )
  runner = sample.configured_runner(quantized)
  size = settings.batch_size or batch_size.choose(model, runner.program)
  labels = functools.partial(sample.labels_of, model, settings)
  index = np.arange(size, dtype=np.int32)
  runner.launch(index, labels(index), size).wait()
  start_up = time.perf_counter() - begun
  compiled = progress.compile_seconds() - compiled
  steady = _steady(runner, index, labels(index))
  wanted = config.benchmark.num_images
  folder = paths.benchmark('job')
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
    whole = files.Workdir.at(pathlib.Path(scratch) / 'whole')
    make = functools.partial(sample_job.make_missing, runner, labels)
    begun = time.perf_counter()
    make(wanted, size, whole)
    made = time.perf_counter() - begun
    shards.Shards(whole.shards).merge(whole.all_samples, wanted)
    merged = time.perf_counter() - begun
    with whole.all_samples.open('rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    shutil.rmtree(whole.root)
    traced = files.Workdir.at(pathlib.Path(scratch) / 'traced')
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with jax.profiler.trace(scratch, profiler_options=options):
      make(_TRACED_BATCHES * size, size, traced)
    busy = _busy(pathlib.Path(scratch))
  devices = jax.local_devices()
  return {
    'devices': len(devices),
    'device': devices[0].device_kind,
    'dtype': model.config.model.dtype,
    'sampler': setup.plain(model.config.sampler),
    'quantized': settings.quantized,
    'microbatch': settings.microbatch,
    'batch_size': size,
    'steady': steady,
    'num_images': wanted,
    'without_merging': wanted / made,
    'end_to_end': wanted / merged,
    'share': wanted / merged / steady,
    'busy': busy,
    'start_up_seconds': start_up,
    'compile_seconds': compiled,
    'sha256': digest,
  }


def _steady(
  runner: sample.Runner, index: np.ndarray, labels: np.ndarray
) -> float:
  """Images per second while nobody takes them off the devices."""
  begun, count = time.perf_counter(), 1
  before = runner.launch(index, labels, len(index))
  while time.perf_counter() - begun < _STEADY_S:
    # The devices have the next batch before they are done with this one.
    after = runner.launch(index, labels, len(index))
    before.wait()
    before, count = after, count + 1
  before.wait()
  return count * len(index) / (time.perf_counter() - begun)


def _busy(folder: pathlib.Path) -> float | None:
  """Share of the time in which the least busy device computes."""
  shares = []
  for path in folder.rglob('*.xplane.pb'):
    data = jax.profiler.ProfileData.from_file(str(path))
    for plane in data.planes:
      if not plane.name.startswith('/device:'):
        continue
      events = [
        (event.start_ns, event.start_ns + event.duration_ns)
        for line in plane.lines
        # Of GPUs and of TPUs; other lines summarize these.
        if line.name.startswith('Stream') or line.name == 'XLA Ops'
        for event in line.events
        if not event.name.startswith(('Memcpy', 'Memset'))
      ]
      if events:
        shares.append(covered(events))
  return min(shares, default=None)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
  """Share of the time from the first to the last that some interval covers."""
  ordered = sorted(intervals)
  first = end = ordered[0][0]
  total = 0.0
  for start, stop in ordered:
    total += max(0.0, stop - max(start, end))
    end = max(end, stop)
  return total / (end - first)


def table(result: dict[str, Any]) -> str:
  """The rates for people."""
  busy = result['busy']
  return '\n'.join(
    [
      f'{result["devices"]} x {result["device"]}, {result["dtype"]}, batches '
      f'of {result["batch_size"]}, microbatches of {result["microbatch"]}',
      f'steady state   {result["steady"]:.2f} images/s',
      f'end to end     {result["end_to_end"]:.2f} images/s for '
      f'{result["num_images"]} images: {result["share"]:.1%} of it; '
      f'{result["without_merging"]:.2f} images/s without merging',
      'devices busy   '
      + ('not known' if busy is None else f'{busy:.1%} of the time'),
      f'before that    {result["start_up_seconds"]:.1f} s to the first batch, '
      f'{result["compile_seconds"]:.1f} s of compiling in them',
      f'sha256         {result["sha256"]}',
    ]
  )
