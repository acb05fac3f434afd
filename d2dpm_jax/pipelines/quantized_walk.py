"""Trajectories of the quantized, corrected network, one step at a time.

They begin where those of full precision do, with the same labels and the same
noise on the way. Every array is written when it is there, and a step needs
those of the step before alone: a run that was killed goes on in mid-step.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from d2dpm_jax.denoising.statistics import Statistics
from d2dpm_jax.diffusion import ddim
from d2dpm_jax.pipelines import generation, setup, trajectories
from d2dpm_jax.quantization import transform
from d2dpm_jax.runtime import devices, microbatches, processes

_ARRAYS = ('x', 'eps', 'eps_q')  # Of a step: where, and what both networks say.

# (number of its first image, images to use of it, batch of full precision).
Share = tuple[int, int, trajectories.Batch]


class Folder(NamedTuple):
  """What has been computed: an array per step, batch and name."""

  directory: pathlib.Path

  def _stem(self, step: int, start: int, name: str) -> str:
    return f'{step:03d}.{start:06d}.{name}'

  def holds(self, step: int, start: int) -> bool:
    """Whether all of a batch is there; says of each array if it is damaged."""
    stems = [self._stem(step, start, name) for name in _ARRAYS]
    return all([trajectories.has_array(self.directory, s) for s in stems])

  def read(self, step: int, start: int, *names: str) -> list[np.ndarray]:
    """Maps arrays float32[B,h,w,c] of a batch into memory."""
    return [
      trajectories.read_array(self.directory, self._stem(step, start, name))
      for name in names
    ]

  def write(
    self, step: int, start: int, arrays: Mapping[str, np.ndarray]
  ) -> None:
    """Writes those of `_ARRAYS`."""
    for name in _ARRAYS:
      stem = self._stem(step, start, name)
      trajectories.write_array(self.directory, stem, arrays[name])


@dataclasses.dataclass(frozen=True)
class Walk:
  """Images on their way through the steps of the sampler.

  Attributes:
    settings: `config.sample`, whose correction they go with.
    rows: of the sampler.
    networks: `generation.pair_program`.
    advance: `generation.advance_program`.
    inputs: of both, without a correction.
    folder: of what has been computed.
  """

  settings: ml_collections.ConfigDict
  rows: ddim.Rows
  networks: microbatches.Program
  advance: microbatches.Program
  inputs: generation.Inputs
  folder: Folder

  @classmethod
  def begin(
    cls,
    model: setup.Model,
    qstate: transform.QuantState,
    directory: pathlib.Path,
    wanted: dict[str, Any],
  ) -> 'Walk':
    """A walk that goes on with what is in a directory.

    Args:
      model: at full precision.
      qstate: quantizers of its U-Net.
      directory: of its arrays.
      wanted: settings that they depend on.

    Raises:
      ValueError: there are some of other settings.
    """
    processes.from_first('claim', lambda: trajectories.claim(directory, wanted))
    config = model.config
    state = generation.executable(qstate, config.quant.execution)
    params = generation.network_params(
      model.params, state, config.quant.float_dtype
    )
    params = {**params, 'full': model.params['unet']}
    key = trajectories.noise_key(config.seed)
    return cls(
      config.sample,
      generation.rows_of(model.ldm, model.sampler),
      generation.pair_program(
        model.ldm, model.sampler, config.sample.microbatch
      ),
      generation.advance_program(
        model.ldm,
        model.sampler,
        config.sample.correction,
        config.sample.microbatch,
      ),
      devices.replicate(
        generation.Inputs(params, state, None, key, model.sampler.scale)
      ),
      Folder(directory),
    )

  def step(
    self, number: int, before: Statistics | None, shares: Sequence[Share]
  ) -> Iterator[tuple[int, bool]]:
    """Takes images to a step and lets both networks look at them there.

    Args:
      number: of the step.
      before: statistics of the step before it; None for the first one.
      shares: of the images.

    Yields:
      Of every share, its images and whether they were there already.
    """
    here = generation.step_inputs(self.inputs, self.rows, number)
    last = None if before is None else self._corrected(number - 1, before)
    for start, count, batch in shares:
      reused = self.folder.holds(number, start)
      if not reused:
        x = batch.x[:count, 0]
        if last is not None:
          index = np.arange(start, start + count, dtype=np.int32)
          there = self.folder.read(number - 1, start, 'x', 'eps_q')
          x = self.advance(last, index, *there)
        out = self.networks(here, x, batch.labels[:count])
        self.folder.write(number, start, {'x': x, **out})
      yield count, reused

  def points(
    self, number: int, starts: Iterable[int]
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Chunks (eps_q, eps, x_t) of a step, float32[N,h,w,c]."""
    for start in starts:
      eps_q, eps, x = self.folder.read(number, start, 'eps_q', 'eps', 'x')
      yield eps_q, eps, x

  def _corrected(self, number: int, found: Statistics) -> generation.StepInputs:
    """Arguments of the way out of a step, with the correction fitted there."""
    table = found.rows(
      self.settings.correction,
      [self.rows.t[number]],
      self.settings.channel_wise,
      self.settings.absorb_variance,
    )
    row = jax.tree.map(lambda column: column[0], table)
    return generation.step_inputs(self.inputs, self.rows, number, row)
