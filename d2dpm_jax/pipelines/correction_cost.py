"""`benchmark.what=corrections`: what a correction adds to a sampling step."""

import logging
import statistics
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from d2dpm_jax.denoising import correction as corrections
from d2dpm_jax.pipelines import artifacts, generation, sample, setup
from d2dpm_jax.runtime import files

_log = logging.getLogger(__name__)


def report(config: ml_collections.ConfigDict, paths: files.Workdir) -> None:
  """Prints times, writes them to benchmark/corrections.json.

  Raises:
    FileNotFoundError: the work directory has no finished calibration.
    ValueError: it was made with other settings, or there are too few repeats.
  """
  result = measure(artifacts.load(setup.load(config, paths), paths))
  print(table(result))
  target = paths.benchmark('corrections.json')
  files.write_json(target, result)
  _log.info('Wrote %s', target)


def measure(quantized: artifacts.Quantized) -> dict[str, Any]:
  """Times sampling with each correction, in turns.

  Args:
    quantized: with error statistics; its config says how many images
      (`sample.batch_size`, 0 is one microbatch per device) are sampled at a
      time, and how often (`benchmark.repeats`).

  Returns:
    What corrections.json holds; ms_per_step and added_percent are medians over
    turns, the latter of the quotient to no correction in the same turn.

  Raises:
    ValueError: fewer than 2 repeats.
  """
  model = quantized.model
  config = model.config
  repeats, steps = config.benchmark.repeats, model.sampler.steps
  if repeats < 2:
    raise ValueError(f'benchmark.repeats is {repeats}; expected >= 2.')
  runs = {
    kind: sample.batch_runner(
      quantized, kind, True, False, config.sample.microbatch, config.seed
    )
    for kind in corrections.CORRECTIONS
  }
  size = config.sample.batch_size or runs['none'].program.unit
  index = np.arange(size, dtype=np.int32)
  labels = generation.balanced_labels(
    config.seed, index, max(1, model.num_classes)
  )
  for run in runs.values():
    run(index, labels)  # Compiles.
  seconds: dict[str, list[float]] = {kind: [] for kind in runs}
  for _ in range(repeats):
    for kind, run in runs.items():
      begin = time.perf_counter()
      run(index, labels)
      seconds[kind].append(time.perf_counter() - begin)

  def added(kind: str) -> list[float]:
    pairs = zip(seconds[kind], seconds['none'], strict=True)
    return [100 * (one / plain - 1) for one, plain in pairs]

  device = jax.devices()[0].device_kind
  return {
    'device': f'{len(jax.devices())} x {device}',
    'sampler': setup.plain(config.sampler),
    'batch_size': len(index),
    'microbatch': config.sample.microbatch,
    'repeats': repeats,
    'corrections': {
      kind: {
        'ms_per_step': 1000 * statistics.median(seconds[kind]) / steps,
        'added_percent': statistics.median(added(kind)),
        'added_quartiles': statistics.quantiles(added(kind), n=4),
      }
      for kind in runs
    },
  }


def table(result: dict[str, Any]) -> str:
  """For people."""
  lines = [
    f'{result["batch_size"]} images at a time on {result["device"]}, medians '
    f'of {result["repeats"]} turns',
    f'{"correction":15}{"ms per step":>12}{"added %":>9}   quartiles',
  ]
  for kind, found in result['corrections'].items():
    low, _, high = found['added_quartiles']
    lines.append(
      f'{kind:15}{found["ms_per_step"]:12.4f}{found["added_percent"]:9.2f}   '
      f'{low:.2f} .. {high:.2f}'
    )
  return '\n'.join(lines)
