"""Run by test_generation.py in a process of its own, with one device.

  python one_device.py weights.safetensors workdir out.npz

Images 0..29 of the full-precision and of the quantized, corrected model: the
first ones in batches of 1, and all in one, whose last microbatch is not full.
"""

import pathlib
import sys

import jax
import numpy as np
import tiny_config

from d2dpm_jax.pipelines import artifacts, generation, sample, setup
from d2dpm_jax.runtime import files

COUNTS = {1: 3, 30: 30}  # Batch size -> images made in such batches.
RUNS = {'full_precision': 'none', 'quantized': 'd-d2'}


def main(weights: str, workdir: str, target: str) -> None:
  assert len(jax.devices()) == 1
  config = tiny_config.get_config()
  config.checkpoint.path = weights
  model = setup.load(config)
  models = {
    'full_precision': artifacts.full_precision(model),
    'quantized': artifacts.load(model, files.Workdir.at(workdir)),
  }
  labels = generation.balanced_labels(0, np.arange(30), model.num_classes)
  out = {}
  for name, correction in RUNS.items():
    run = sample.batch_runner(models[name], correction, False, False, 4, 0)
    for size, count in COUNTS.items():
      parts = []
      for start in range(0, count, size):
        index = np.arange(start, start + size, dtype=np.int32)
        parts.append(run(index, labels[index]))
      for key in ('latents', 'images'):
        joined = np.concatenate([part[key] for part in parts])
        out[f'{name}/{size}/{key}'] = joined
  with pathlib.Path(target).open('wb') as file:
    np.savez(file, **out)


if __name__ == '__main__':
  main(*sys.argv[1:])
