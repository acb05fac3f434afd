"""Reconstruction of a quantized network unit by unit (BRECQ).

The network runs once per phase over the whole calibration set, eagerly, with
an interceptor around its modules. Two streams go through it, stacked along
the batch axis: the full-precision network and the network quantized so far.
At each unit (a block such as a ResBlock, or a layer outside of blocks) the
unit's quantizers are learned so that from the second stream's inputs it gives
the outputs of full precision; both outputs are stacked again and the network
goes on. So all units see exact inputs, and the data pass through the network
only once, whatever its depth.

Phase 'weight' learns rounding, phase 'act' the step sizes of layer inputs.

Source: arXiv:2102.05426 (BRECQ), arXiv:2004.10568 (AdaRound),
arXiv:2203.05740 (QDrop), arXiv:1902.08153 (LSQ).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from d2dpm_jax.quantization import (
  ahead,
  learning,
  packing,
  stored_units,
  unit_learning,
  unit_losses,
  units,
  visits,
)
from d2dpm_jax.quantization.adaround import Settings
from d2dpm_jax.quantization.policy import Policy
from d2dpm_jax.quantization.reports import PHASES, UnitReport, format_reports
from d2dpm_jax.quantization.transform import LayerState, QuantState
from d2dpm_jax.quantization.unit_learning import Progress
from d2dpm_jax.quantization.units import BLOCK_TYPES, Unit, list_units

__all__ = [
  'BLOCK_TYPES',
  'PHASES',
  'Progress',
  'Result',
  'Settings',
  'Unit',
  'UnitReport',
  'format_reports',
  'list_units',
  'reconstruct',
  'streams_of',
]

Array = jax.Array


class Result(NamedTuple):
  """A quantized network.

  Attributes:
    state: quantizers of every quantized layer, in the order of the policy.
    reports: one per unit and phase.
    snr_db: of the network's output over the calibration set: power of full
      precision over power of the error, after the phases 'weight' (inputs of
      layers still in floating point, but with QDrop) and 'act'.
  """

  state: QuantState
  reports: list[UnitReport]
  snr_db: dict[str, float]


@dataclasses.dataclass
class _Reconstruction:
  """Settles unit after unit; see the arguments of `reconstruct`."""

  apply: Callable[..., Any]
  variables: Any
  inputs: list[Array]
  runner: visits.Runner
  learner: unit_learning.Learner
  key: Array
  on_unit_done: Callable[[str, stored_units.Arrays], None] | None
  resume: Mapping[str, Mapping[str, Any]]
  state: QuantState = dataclasses.field(default_factory=dict)
  reports: list[UnitReport] = dataclasses.field(default_factory=list)

  def run_phase(self, phase: str) -> float:
    """Sends both streams through the network once and settles each unit.

    Returns:
      Signal-to-noise ratio of the output, in dB.
    """
    seen: list[str] = []
    runner, streams = self.runner, self.runner.streams

    def on_unit(unit, module, call, args, kwargs):
      start = time.perf_counter()
      visit = runner.visit(unit, module, args, kwargs)
      if unit.path not in seen:
        self.settle(phase, visit, len(seen), start)
        seen.append(unit.path)
      weights, grids = self.quantizers(visit)
      return streams.map(
        runner.forward(
          visit.call, visit.with_weights(weights), grids, visit.whole
        ),
        visit.batch,
        streams.samples,
        streams.samples,
        visit.out,
      )

    with jax.default_device(streams.default_device):
      out = runner.walker.walk(
        self.apply, self.variables, self.inputs, on_unit, runner.run_float
      )
    return _snr_db(out, streams.samples)

  def quantizers(
    self, visit: visits.Visit
  ) -> tuple[learning.Weights, learning.Grids]:
    """What has been settled for the unit so far."""
    weights, grids = {}, {}
    for path in visit.layers:
      layer = self.state[visit.full_path(path)]
      if layer['weight'] is not None:
        weights[path] = packing.unpack(layer['weight'])
      if layer['act'] is not None:
        grids[path] = layer['act']
    return weights, grids

  def settle(
    self, phase: str, visit: visits.Visit, index: int, start: float
  ) -> None:
    """Learns or restores the unit's quantizers and reports on it."""
    name = f'{phase}/{visit.unit.path}'
    if name in self.resume:
      self.restore(phase, visit, self.resume[name])
      return
    key = jax.random.fold_in(self.key, PHASES.index(phase))
    key = self.runner.streams.fetch(jax.random.fold_in(key, index))
    if phase == 'weight':
      learned = self.learner.learn_weights(visit, key)
    else:
      settled_weights, _ = self.quantizers(visit)
      learned = self.learner.learn_grids(visit, key, settled_weights)
    weights, grids, facts = learned
    for path in visit.layers:
      self.state[visit.full_path(path)] = LayerState(
        weight=weights.get(path), act=grids.get(path)
      )
    seconds = time.perf_counter() - start
    report = UnitReport(visit.unit, phase, **facts, seconds=seconds)
    self.reports.append(report)
    if self.on_unit_done is not None:
      settled = {
        (path, side): self.state[path][side]
        for path, side in self.settled(phase, visit)
      }
      self.on_unit_done(name, stored_units.to_arrays(settled, report))

  def restore(
    self, phase: str, visit: visits.Visit, arrays: Mapping[str, Any]
  ) -> None:
    """Takes over a unit of an earlier run."""
    shapes = {
      visit.full_path(path): visit.kernel(path).shape for path in visit.layers
    }
    found, report = stored_units.from_arrays(
      arrays, visit.unit, phase, self.settled(phase, visit), shapes
    )
    for path in shapes:
      old = self.state[path]['weight'] if phase == 'act' else None
      weight = found.get((path, 'weight'), old)
      layer = LayerState(weight=weight, act=found.get((path, 'act')))
      self.state[path] = self.runner.streams.fetch(layer)
    self.reports.append(report)

  def settled(
    self, phase: str, visit: visits.Visit
  ) -> dict[tuple[str, str], int]:
    """(path, side) -> bits of what a phase settles.

    That is weights first, then layer inputs; with QDrop, the first phase
    settles both.
    """
    found = {}
    for path, bits in visit.layers.items():
      if phase == 'weight' and bits.w is not None:
        found[visit.full_path(path), 'weight'] = bits.w
      if bits.a is not None and (
        phase == 'act' or self.learner.settings.drop_prob
      ):
        found[visit.full_path(path), 'act'] = bits.a
    return found


def _snr_db(out: Any, samples: int) -> float:
  """Of stacked outputs: power of full precision over that of the error."""
  signal = noise = 0.0
  for x in jax.tree.leaves(out):
    want, got = np.split(np.asarray(x, np.float64), [samples])
    signal += np.sum(np.square(want))
    noise += np.sum(np.square(got - want))
  with np.errstate(divide='ignore', invalid='ignore'):
    return float(10 * np.log10(signal / noise))


def streams_of(samples: int, settings: Settings) -> units.Streams:
  """Where the activations of so many samples will be kept, and computed."""
  return units.Streams(
    samples,
    settings.chunk,
    [min(n, samples) for n in (settings.batch_size, settings.act_batch_size)],
    bool(settings.host_streams),
    settings.devices,
  )


def reconstruct(
  apply: Callable[..., Any],
  variables: Any,
  policy: Policy,
  inputs: Sequence[Any],
  *,
  key: Array,
  settings: Settings | None = None,
  block_types: Sequence[str] = BLOCK_TYPES,
  progress: Progress | None = None,
  on_unit_done: Callable[[str, stored_units.Arrays], None] | None = None,
  resume: Mapping[str, Mapping[str, Any]] | None = None,
) -> Result:
  """Quantizes a network: learned rounding, then learned step sizes.

  Layers with `reconstruct=False` in the policy get nearest rounding and
  searched ranges; so do all with `iters=0` and `act_iters=0`. A batch is
  shared by local devices, see `Settings.devices`.

  Args:
    apply: plain (not jitted) Linen `apply`; deterministic, no rngs.
    variables: `{'params': ...}` at full precision.
    policy: path -> bits, see `policy.build_policy`.
    inputs: the model's positional inputs for the calibration set, all with
      the samples on axis 0. The first ones are used for the range search of
      activations: shuffle them.
    key: PRNG key; each phase and unit folds in its index.
    settings: see `adaround.Settings`.
    block_types: class names of modules that are reconstructed as a whole.
    progress: called a few times per unit and phase.
    on_unit_done: called as `on_unit_done(name, arrays)` after each unit, the
      name being 'weight/<path>' or 'act/<path>', the arrays a flat dict of
      NumPy arrays to store (`np.savez(file, **arrays)`).
    resume: name -> arrays of units done earlier, all with the same arguments.
      Their optimization is skipped; the result is the same, bit for bit.

  Returns:
    Quantizers, reports, and the output's signal-to-noise ratio.

  Raises:
    ValueError: inputs of different length, a policy path that the network
      does not run, or stored units that do not fit.
  """
  settings = settings or Settings()
  lengths = {np.shape(x)[0] if np.ndim(x) else 0 for x in inputs}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(
      'Inputs need one length above 0 on axis 0, got the shapes '
      f'{[np.shape(x) for x in inputs]}.'
    )
  samples = lengths.pop()
  walker = units.Walker(policy, block_types)
  found = list_units(apply, variables, policy, inputs, block_types=block_types)
  missed = sorted(set(walker.policy) - {p for u in found for p in u.layers})
  if missed:
    raise ValueError(f'The network does not run the layers {missed}.')
  strangers = set(resume or {}) - set(stored_units.names(found, PHASES))
  if strangers:
    raise ValueError(
      f'Stored units that the network lacks: {sorted(strangers)}.'
    )
  streams = streams_of(samples, settings)
  variables = jax.device_put(variables, streams.beside_home)
  stacked = [streams.stack(x) for x in inputs]
  programs = ahead.programs(
    apply, variables, walker, stacked, settings, streams, resume or {}
  )
  with ahead.Ahead(programs, streams.default_device) as compiling:
    runner = visits.Runner(walker, streams, compiling)
    losses = unit_losses.Losses(
      apply,
      variables,
      stacked,
      [unit.path for unit in found],
      settings,
      runner,
    )
    run = _Reconstruction(
      apply,
      variables,
      stacked,
      runner,
      unit_learning.Learner(settings, runner, losses, progress),
      key,
      on_unit_done,
      resume or {},
    )
    snr_db = {phase: run.run_phase(phase) for phase in PHASES}
  state = {path: run.state[path] for path in walker.policy}
  return Result(state, run.reports, snr_db)
