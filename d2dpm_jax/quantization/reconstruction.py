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
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.quantization import (
  affine,
  ahead,
  importance,
  learning,
  packing,
  stored_units,
  transform,
  units,
)
from d2dpm_jax.quantization.adaround import Settings
from d2dpm_jax.quantization.policy import LayerBits, Policy
from d2dpm_jax.quantization.reports import PHASES, UnitReport, format_reports
from d2dpm_jax.quantization.transform import LayerState, QuantState
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

# progress(unit path, phase, iterations done, iterations, mean loss since).
Progress = Callable[[str, str, int, int, float], None]


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


@dataclasses.dataclass(frozen=True)
class _Visit:
  """A unit with what flows into it, during one phase.

  Attributes:
    unit: which.
    call: its form.
    variables: of the unit, at full precision, on the devices.
    layers: bits of its quantized layers, by path within it.
    batch: stacked inputs of both streams.
    whole: other arrays, on the devices.
    out: stacked outputs; those of full precision are there.
  """

  unit: Unit
  call: units.Call
  variables: Any
  layers: dict[str, LayerBits]
  batch: list[Array]
  whole: list[Array]
  out: Any

  def full_path(self, path: str) -> str:
    return '/'.join(p for p in (self.unit.path, path) if p)

  def kernel(self, path: str) -> Array:
    return transform.get_kernel(self.variables['params'], path)

  def with_weights(self, weights: learning.Weights) -> Any:
    """Variables of the unit with these kernels on their grids."""
    kernels = {
      path: learning.dequantize(weight, dtype=self.kernel(path).dtype)
      for path, weight in weights.items()
    }
    return transform.replace_kernels(self.variables, kernels)


class _Norm(NamedTuple):
  """What losses of a phase on a unit are measured by.

  Attributes:
    p: exponent.
    first: first row of the inputs.
    importance: weights like the stacked outputs, or None.
  """

  p: float
  first: int
  importance: Any


@dataclasses.dataclass
class _Reconstruction:
  """A run of `reconstruct`; see its arguments. `paths` are those of units."""

  apply: Callable[..., Any]
  variables: Any
  inputs: list[Array]
  paths: list[str]
  walker: units.Walker
  settings: Settings
  streams: units.Streams
  programs: ahead.Ahead
  key: Array
  progress: Progress | None
  on_unit_done: Callable[[str, stored_units.Arrays], None] | None
  resume: Mapping[str, Mapping[str, Any]]
  state: QuantState = dataclasses.field(default_factory=dict)
  reports: list[UnitReport] = dataclasses.field(default_factory=list)

  # ---- The network around the units

  def run_phase(self, phase: str) -> float:
    """Sends both streams through the network once and settles each unit.

    Returns:
      Signal-to-noise ratio of the output, in dB.
    """
    seen: list[str] = []

    def on_unit(unit, module, call, args, kwargs):
      start = time.perf_counter()
      visit = self.visit(unit, module, args, kwargs)
      if unit.path not in seen:
        self.settle(phase, visit, len(seen), start)
        seen.append(unit.path)
      weights, grids = self.quantizers(visit)
      return self.streams.map(
        self.forward(
          visit.call, visit.with_weights(weights), grids, visit.whole
        ),
        visit.batch,
        self.streams.samples,
        self.streams.samples,
        visit.out,
      )

    with jax.default_device(self.streams.default_device):
      out = self.walker.walk(
        self.apply, self.variables, self.inputs, on_unit, self.on_float
      )
    return _snr_db(out, self.streams.samples)

  def on_float(self, module, call, args, kwargs) -> Any:
    """Runs a module without quantized layers compiled and in chunks."""
    form, batch, whole = units.take_apart(
      module, args, kwargs, 2 * self.streams.samples
    )
    if not batch or not form.is_hashable:
      return call(*args, **kwargs)
    return self.streams.map(
      self.forward(form, module.variables, {}, whole),
      batch,
      0,
      2 * self.streams.samples,
    )

  def forward(
    self, call: units.Call, variables: Any, grids: Any, whole: Any
  ) -> Callable[[Any], Any]:
    """rows of a unit's inputs -> its output."""
    variables, grids, whole = self.streams.fetch((variables, grids, whole))
    return lambda rows: self.programs.call(
      learning.forward, call, variables, grids, rows, whole
    )

  def visit(self, unit: Unit, module: Any, args: Any, kwargs: Any) -> _Visit:
    """Runs the unit at full precision."""
    form, batch, whole = units.take_apart(
      module, args, kwargs, 2 * self.streams.samples
    )
    if not form.is_hashable:
      raise ValueError(
        f'{unit.path!r}: a unit needs hashable fields and static arguments.'
      )
    if not batch:
      raise ValueError(f'{unit.path!r} has no input with samples on axis 0.')
    variables, whole = self.streams.fetch((module.variables, whole))
    layers = {
      units.relative(unit.path, path): self.walker.policy[path]
      for path in unit.layers
    }
    out = self.streams.map(
      self.forward(form, variables, {}, whole), batch, 0, self.streams.samples
    )
    return _Visit(unit, form, variables, layers, batch, whole, out)

  def quantizers(
    self, visit: _Visit
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

  # ---- One unit

  def settle(self, phase: str, visit: _Visit, index: int, start: float) -> None:
    """Learns or restores the unit's quantizers and reports on it."""
    name = f'{phase}/{visit.unit.path}'
    if name in self.resume:
      self.restore(phase, visit, self.resume[name])
      return
    key = jax.random.fold_in(self.key, PHASES.index(phase))
    key = self.streams.fetch(jax.random.fold_in(key, index))
    learn = self.learn_weights if phase == 'weight' else self.learn_grids
    weights, grids, facts = learn(visit, key)
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
    self, phase: str, visit: _Visit, arrays: Mapping[str, Any]
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
      self.state[path] = self.streams.fetch(layer)
    self.reports.append(report)

  def settled(self, phase: str, visit: _Visit) -> dict[tuple[str, str], int]:
    """(path, side) -> bits of what a phase settles.

    That is weights first, then layer inputs; with QDrop, the first phase
    settles both.
    """
    found = {}
    for path, bits in visit.layers.items():
      if phase == 'weight' and bits.w is not None:
        found[visit.full_path(path), 'weight'] = bits.w
      if bits.a is not None and (phase == 'act' or self.settings.drop_prob):
        found[visit.full_path(path), 'act'] = bits.a
    return found

  def learn_weights(
    self, visit: _Visit, key: Array
  ) -> tuple[learning.Weights, learning.Grids, dict[str, Any]]:
    """Searches ranges of kernels and learns their rounding."""
    s = self.settings
    nearest = {
      path: affine.nearest_weight(
        visit.kernel(path), bits.w, s.weight_range, s.per_channel
      )
      for path, bits in visit.layers.items()
      if bits.w is not None
    }
    variables = visit.with_weights(nearest)
    grids = self.search_grids(visit, variables) if s.drop_prob else {}
    norm = self.norm(visit, s.p, s.asymmetric, nearest)
    before, signal = self.measure(visit, variables, grids, norm)
    facts = _facts(before, signal)
    learned = [p for p, b in visit.layers.items() if b.reconstruct and b.w]
    if not s.iters or not learned:
      return nearest, grids, facts
    alphas = {
      path: learning.init_alpha(
        visit.kernel(path), nearest[path].qparams, s.zeta, s.gamma
      )
      for path in learned
    }
    # Kernels that learn stay in floating point: soft rounding needs them.
    others = {p: w for p, w in nearest.items() if p not in learned}
    initial = {path: nearest[path].qparams for path in learned}
    facts['learned'] = True
    alphas, facts['ms_per_iteration'] = self.learn(
      'weight',
      visit,
      norm,
      key,
      alphas,
      initial,
      visit.with_weights(others),
      grids,
    )
    found = {
      path: learning.harden(visit.kernel(path), alphas[path], nearest[path])
      for path in learned
    }
    rounded = nearest | {path: weight for path, (weight, _) in found.items()}
    variables = visit.with_weights(rounded)
    after, _ = self.measure(visit, variables, grids, norm)
    if not after <= before:  # Also true for NaN.
      return nearest, grids, facts | {'kept_initial': True}
    moved = sum(int(count) for _, count in found.values())
    flipped = moved / sum(visit.kernel(path).size for path in learned)
    return rounded, grids, facts | {'loss_after': after, 'flipped': flipped}

  def learn_grids(
    self, visit: _Visit, key: Array
  ) -> tuple[learning.Weights, learning.Grids, dict[str, Any]]:
    """Searches ranges of layer inputs and learns their step sizes."""
    s = self.settings
    weights, _ = self.quantizers(visit)
    variables = visit.with_weights(weights)
    grids = self.search_grids(visit, variables)
    norm = self.norm(visit, s.act_p, s.act_asymmetric, weights)
    before, signal = self.measure(visit, variables, grids, norm)
    facts = _facts(before, signal)
    initial = {p: q for p, q in grids.items() if visit.layers[p].reconstruct}
    if not s.act_iters or not initial:
      return weights, grids, facts
    facts['learned'] = True
    scales, facts['ms_per_iteration'] = self.learn(
      'act',
      visit,
      norm,
      key,
      {path: q.scale for path, q in initial.items()},
      initial,
      variables,
      {path: q for path, q in grids.items() if path not in initial},
    )
    found = grids | {
      path: affine.QParams(scales[path], q.zero_point, q.bits)
      for path, q in initial.items()
    }
    after, _ = self.measure(visit, variables, found, norm)
    if not after <= before:
      return weights, grids, facts | {'kept_initial': True}
    return weights, found, facts | {'loss_after': after}

  def norm(
    self, visit: _Visit, p: float, asymmetric: bool, weights: learning.Weights
  ) -> _Norm:
    """The loss of a phase; the weights are those of the unit at its start."""
    first = self.streams.samples if asymmetric else 0
    if self.settings.loss == 'mse' or not visit.unit.learned:
      return _Norm(p, first, None)
    return _Norm(p, first, self.importance(visit, weights))

  def importance(self, visit: _Visit, weights: learning.Weights) -> Any:
    """Squared gradients at the unit's output, their mean being 1."""
    kernels = {
      visit.full_path(path): learning.dequantize(weight)
      for path, weight in weights.items()
    }
    variables = self.streams.fetch(self.variables)
    quantized = transform.replace_kernels(variables, kernels)
    samples = self.streams.samples

    def run(rows):
      squares = importance.squared_gradients(
        self.apply,
        self.walker.policy,
        tuple(self.walker.block_types),
        self.paths.index(visit.unit.path),
        variables,
        quantized,
        rows,
      )
      return jax.tree.map(lambda x: squares[x.shape[1:]], visit.out)

    found = self.streams.map(
      run, self.inputs, 0, samples, chunk=self.settings.batch_size
    )
    total = sum(float(jnp.sum(x)) for x in jax.tree.leaves(found))
    count = sum(x.size // 2 for x in jax.tree.leaves(found))
    if not total:  # Nothing was rounded.
      return None
    return jax.tree.map(lambda x: x * (count / total), found)

  def measure(
    self, visit: _Visit, variables: Any, grids: Any, norm: _Norm
  ) -> tuple[float, float]:
    """Mean loss over the calibration set, and the norm of the target."""
    total = np.zeros(2)
    forward = self.forward(visit.call, variables, grids, visit.whole)
    for rows, repeated in self.streams.chunks(0, self.streams.samples):
      target, weights = self.streams.pick((visit.out, norm.importance), rows)
      # Not one program: the forward is compiled already.
      out = forward(self.streams.pick(visit.batch, norm.first + rows))
      found = learning.measure(out, target, norm.p, weights)
      total += [np.sum(np.asarray(x, float)[repeated:]) for x in found]
    loss, signal = total / self.streams.samples
    return float(loss), float(signal)

  def search_grids(self, visit: _Visit, variables: Any) -> learning.Grids:
    if all(bits.a is None for bits in visit.layers.values()):
      return {}
    count = min(self.settings.act_init_samples, self.streams.samples)
    rows = self.streams.samples + np.arange(count)
    return self.programs.call(
      learning.search_grids,
      visit.call,
      tuple(visit.layers.items()),
      self.settings.act_range,
      self.streams.fetch(variables),
      self.streams.fetch(units.take_rows(visit.batch, rows, None)),
      visit.whole,
    )

  def learn(
    self,
    phase: str,
    visit: _Visit,
    norm: _Norm,
    key: Array,
    learned: dict[str, Array],
    initial: learning.Grids,
    variables: Any,
    grids: learning.Grids,
  ) -> tuple[dict[str, Array], float]:
    """Runs the iterations of a phase on a unit.

    Returns:
      What was learned, and milliseconds per iteration.
    """
    s = self.settings
    iters, batch_size = learning.size_of(phase, s)
    loop = self.streams.loops(s.loop)
    batch, first = self.streams.to_learn_from(visit.batch, norm.first)
    target, _ = self.streams.to_learn_from(visit.out, 0)
    weights, _ = self.streams.to_learn_from(norm.importance, 0)
    rows = learning.draw_rows(key, self.streams.samples, batch_size, iters)
    variables, grids, initial = self.streams.fetch((variables, grids, initial))
    task = learning.Task(
      variables=variables,
      grids=grids,
      initial=initial,
      batch=batch,
      first=np.int32(first),
      target=target,
      importance=weights,
      whole=visit.whole,
      rows=self.streams.fetch(rows),
      key=key,
      iters=np.int32(iters),
      knobs=learning.knobs(s),
    )

    # Devices simulated on a CPU share its threads: with many calls in flight
    # some wait for each other until XLA gives up and aborts.
    one_by_one = self.streams.on_cpu and self.streams.num_devices > 1

    def run(count, progress, begin):
      out = self.programs.call(
        learning.steps,
        phase,
        visit.call,
        norm.p,
        count,
        self.streams.split,
        progress,
        begin,
        task,
      )
      return jax.block_until_ready(out) if one_by_one else out

    marks: list[tuple[int, float]] = []

    def report(done, loss):
      marks.append((done, time.perf_counter()))
      if self.progress is not None:
        self.progress(visit.unit.path, phase, done, iters, loss)

    # Copies: steps overwrite theirs.
    progress = jax.tree.map(np.array, learning.start(learned))
    progress = self.streams.fetch(progress)
    found = learning.run_steps(run, progress, iters, loop, s.reports, report)
    (first_done, start), (last_done, end) = marks[0], marks[-1]
    rate = 1e3 * (end - start) / max(last_done - first_done, 1)
    return found, rate


def _facts(before: float, signal: float) -> dict[str, Any]:
  """Of a report on a unit that stays as it was."""
  return dict(
    loss_before=before,
    loss_after=before,
    signal=signal,
    flipped=0.0,
    learned=False,
    kept_initial=False,
  )


def _snr_db(out: Any, samples: int) -> float:
  """Of stacked outputs: power of full precision over that of the error."""
  signal = noise = 0.0
  for x in jax.tree.leaves(out):
    want, got = np.split(np.asarray(x, np.float64), [samples])
    signal += np.sum(np.square(want))
    noise += np.sum(np.square(got - want))
  with np.errstate(divide='ignore', invalid='ignore'):
    return float(10 * np.log10(signal / noise))


# ---- Interface --------------------------------------------------------------


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
    run = _Reconstruction(
      apply,
      variables,
      stacked,
      [unit.path for unit in found],
      walker,
      settings,
      streams,
      compiling,
      key,
      progress,
      on_unit_done,
      resume or {},
    )
    snr_db = {phase: run.run_phase(phase) for phase in PHASES}
  state = {path: run.state[path] for path in walker.policy}
  return Result(state, run.reports, snr_db)
