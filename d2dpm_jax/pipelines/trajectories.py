"""Full-precision trajectories on disk: made once, read by all of calibration.

Files are written whole or not at all, so a run that was killed goes on with
the batches that are missing; they are mapped into memory when read.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from d2dpm_jax.diffusion import noise
from d2dpm_jax.pipelines import generation, setup
from d2dpm_jax.runtime import devices, files, processes, progress

_log = logging.getLogger(__name__)

# Calibration noise is never that of an image which is sampled later.
_KEY = 0xCA1

DISTRIBUTIONS = ('uniform', 'normal')  # Of step indices; `network_inputs`.


class Batch(NamedTuple):
  """Trajectories of B images; S steps in sampling order."""

  x: np.ndarray  # float32[B,S,h,w,c], what the network got.
  eps: np.ndarray  # float32[B,S,h,w,c], its guided answer.
  labels: np.ndarray  # int32[B]


def write_array(directory: pathlib.Path, name: str, array: np.ndarray) -> None:
  files.save_array(directory / f'{name}.npy', array)


def has_array(directory: pathlib.Path, name: str) -> bool:
  """Whether `write_array` wrote it; a damaged one is as good as none."""
  path = directory / f'{name}.npy'
  if not path.is_file():
    return False
  intact = files.is_intact(path)
  if not intact:
    _log.warning('%s is damaged; it is made again.', path)
  return intact


def read_array(directory: pathlib.Path, name: str) -> np.ndarray:
  """Maps an array of `write_array` into memory.

  Raises:
    ValueError: the file is missing or damaged.
  """
  path = directory / f'{name}.npy'
  try:
    return np.load(path, mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise ValueError(
      f'{path} is damaged ({error}); delete it and calibrate again.'
    ) from error


@dataclasses.dataclass(frozen=True)
class Trajectories:
  """A directory of batches, named by the number of their first image."""

  directory: pathlib.Path
  starts: tuple[int, ...]

  def batch(self, start: int) -> Batch:
    names = (f'{start:06d}.{field}' for field in Batch._fields)
    return Batch(*(read_array(self.directory, name) for name in names))

  def __iter__(self) -> Iterator[Batch]:
    return (self.batch(start) for start in self.starts)


def collect(
  model: setup.Model,
  num_samples: int,
  batch_size: int,
  microbatch: int,
  directory: pathlib.Path,
  balanced: bool = True,
) -> Trajectories:
  """Runs the full-precision sampler on `num_samples` labels.

  Processes of one run make a part of the batches each.

  Args:
    model: what to run, with `model.sampler` and `model.config.seed`.
    num_samples: trajectories.
    batch_size: trajectories per file, and in flight at a time.
    microbatch: see `generation`.
    directory: where the batches go; those that are there are kept.
    balanced: see `draw_labels`.

  Raises:
    ValueError: the directory holds trajectories of other settings.
  """
  seed = model.config.seed
  settings = {
    **model.identity(),
    'sampler': setup.plain(model.config.sampler),
    'seed': seed,
    'batch_size': batch_size,
    'microbatch': microbatch,
    'balanced_labels': balanced,
    'dtype': model.config.model.dtype,
  }
  processes.from_first('trajectories', lambda: claim(directory, settings))
  program = generation.trajectory_program(model.ldm, model.sampler, microbatch)
  unit = microbatch * devices.mesh().size
  if batch_size % unit and num_samples > batch_size:
    _log.warning(
      '--config.calibration.batch_size=%d leaves devices idle: they take %d '
      'trajectories at a time.',
      batch_size,
      unit,
    )
  inputs = devices.replicate(
    generation.Inputs(
      model.params, {}, None, noise_key(seed), model.sampler.scale
    )
  )
  starts = tuple(range(0, num_samples, batch_size))
  batches = processes.own(
    [np.arange(i, min(i + batch_size, num_samples)) for i in starts]
  )
  total = sum(map(len, batches))
  with progress.progress('trajectories', total, 'image') as bar:
    for index in batches:
      processes.check()
      start = index[0]
      names = [f'{start:06d}.{field}' for field in Batch._fields]
      reused = all([has_array(directory, name) for name in names])
      if not reused:
        labels = draw_labels(seed, index, max(1, model.num_classes), balanced)
        out = program(inputs, index.astype(np.int32), labels, room=batch_size)
        batch = Batch(out['x'], out['eps'], labels)
        for name, array in zip(names, batch, strict=True):
          write_array(directory, name, array)
      bar.update(len(index), reused=reused)
  processes.wait_for_all('trajectories')
  return Trajectories(directory, starts)


def draw_labels(
  seed: int, index: np.ndarray, classes: int, balanced: bool
) -> np.ndarray:
  """Label of trajectory k, a function of (seed, k); int32[B].

  `balanced` gives each class once in a row of `classes` trajectories; else
  labels are uniformly random.
  """
  if balanced:
    return generation.balanced_labels(seed, index, classes)
  draws = [np.random.default_rng([seed, _KEY, int(k)]) for k in index]
  return np.array([rng.integers(classes) for rng in draws], np.int32)


def noise_key(seed: int) -> jax.Array:
  """Root key of all noise of calibration; see `noise.seed_key`."""
  return jax.random.fold_in(noise.seed_key(seed), _KEY)


def claim(directory: pathlib.Path, settings: dict[str, Any]) -> None:
  """Marks a directory as made with `settings`, or checks that it was.

  Raises:
    ValueError: it was made with others; the message names both values.
  """
  marker = directory / 'settings.json'
  if not marker.is_file():
    files.write_json(marker, settings)
    return
  try:
    saved = files.read_json(marker)
  except ValueError:
    saved = None
  if not isinstance(saved, dict):
    raise ValueError(
      f'{marker} is damaged: delete {directory} and run the same command again.'
    )
  different = files.differences(saved, settings)
  if different:
    raise ValueError(
      f'{directory} was made with other settings ({"; ".join(different)}). '
      'Choose another --workdir, or delete that directory.'
    )


def network_inputs(
  trajectories: Trajectories,
  count: int,
  model: setup.Model,
  timesteps: np.ndarray,
  seed: int,
  distribution: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws one input of the network from each trajectory.

  Args:
    trajectories: of the full-precision network, at least `count` of them.
    count: N.
    model: whose they are.
    timesteps: int[S] in sampling order.
    seed: of the draw.
    distribution: of the step index: 'uniform', or 'normal' for a clipped
      N(0.4, 0.4) * S counted from the clean end, as in PTQ4DM
      (arXiv:2211.15736).

  Returns:
    x float32[N,h,w,c], t int32[N] and labels int32[N]. With guidance every
    second label is the null class: the network sees both.

  Raises:
    ValueError: an unknown distribution.
  """
  steps = len(timesteps)
  rng = np.random.default_rng([seed, _KEY])
  if distribution == 'uniform':
    # Every step equally often, whatever the batches.
    where = (rng.permutation(count) * steps) // count
  elif distribution == 'normal':
    drawn = rng.normal(0.4, 0.4, count) * steps
    where = steps - 1 - np.clip(drawn, 0, steps - 1).astype(int)
  else:
    raise ValueError(
      f'calibration.timesteps {distribution!r}: expected one of '
      f'{list(DISTRIBUTIONS)}.'
    )
  guided = model.num_classes and model.sampler.guidance_scale != 1
  null = rng.permutation(count) % 2 == 0 if guided else np.zeros(count, bool)
  xs, labels = [], []
  done = 0
  for batch in trajectories:
    rows = min(len(batch.x), count - done)
    if rows <= 0:
      break
    xs.append(batch.x[np.arange(rows), where[done : done + rows]])
    labels.append(batch.labels[:rows])
    done += rows
  return (
    np.concatenate(xs),
    timesteps[where].astype(np.int32),
    np.where(null, model.num_classes, np.concatenate(labels)).astype(np.int32),
  )
