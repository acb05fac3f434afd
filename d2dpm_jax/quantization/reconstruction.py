"""Reconstruction of a quantized network unit by unit (BRECQ).

The network runs once per phase over the whole calibration set, eagerly, with
an interceptor around its modules. Two streams go through it, stacked along
the batch axis: the full-precision network and the network quantized so far.
At each unit (a block such as a ResBlock, or a layer outside of blocks) the
streams are taken apart; the unit's quantizers are learned so that from the
second stream's inputs it gives the outputs of full precision; both outputs
are stacked again and the network goes on. So all units see exact inputs, and
the data pass through the network only once, whatever its depth.

Phase 'weight' learns rounding, phase 'act' the step sizes of layer inputs.

Source: arXiv:2102.05426 (BRECQ), arXiv:2004.10568 (AdaRound),
arXiv:2203.05740 (QDrop), arXiv:1902.08153 (LSQ).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.quantization import affine, learning, transform, units
from d2dpm_jax.quantization.adaround import Settings
from d2dpm_jax.quantization.policy import LayerBits, Policy, format_table
from d2dpm_jax.quantization.transform import LayerState, QuantState
from d2dpm_jax.quantization.units import BLOCK_TYPES, Unit, list_units

__all__ = [
  'BLOCK_TYPES',
  'PHASES',
  'Progress',
  'Settings',
  'Unit',
  'UnitReport',
  'UnitState',
  'format_reports',
  'list_units',
  'reconstruct',
]

Array = jax.Array
PHASES = ('weight', 'act')

# progress(unit path, phase, iterations done, iterations, mean loss since).
Progress = Callable[[str, str, int, int, float], None]
# Flat dict of NumPy arrays, fit for `np.savez`; see `reconstruct`.
UnitState = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class UnitReport:
  """How one unit fared in one phase.

  Losses are over the whole calibration set, in the norm of the phase.

  Attributes:
    unit: which.
    phase: 'weight' or 'act'.
    loss_before: of nearest rounding, or of the searched ranges.
    loss_after: of what the unit ended with.
    signal: the same norm of the full-precision output, to compare with.
    flipped: share of the learned weights not rounded to nearest; 0 for 'act'.
    kept_initial: learning made it worse and was thrown away.
    seconds: time it took, compilation included.
  """

  unit: Unit
  phase: str
  loss_before: float
  loss_after: float
  signal: float
  flipped: float
  kept_initial: bool
  seconds: float


_REPORT_FIELDS = tuple(
  f.name
  for f in dataclasses.fields(UnitReport)
  if f.name not in ('unit', 'phase')
)


@dataclasses.dataclass(frozen=True)
class _Visit:
  """A unit with what flows into it, during one phase.

  Attributes:
    unit: which.
    call: its form.
    variables: of the unit, at full precision, on the device.
    layers: bits of its quantized layers, by path within it.
    inputs: arrays of the full-precision stream.
    inputs_q: arrays of the quantized stream.
    whole: other arrays, on the device.
    target: output of full precision.
  """

  unit: Unit
  call: units.Call
  variables: Any
  layers: dict[str, LayerBits]
  inputs: list[Array]
  inputs_q: list[Array]
  whole: list[Array]
  target: Any

  @property
  def learned(self) -> list[str]:
    return [path for path, bits in self.layers.items() if bits.reconstruct]

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


@dataclasses.dataclass
class _Reconstruction:
  """A run of `reconstruct`; see its arguments."""

  walker: units.Walker
  settings: Settings
  streams: units.Streams
  key: Array
  progress: Progress | None
  on_unit_done: Callable[[str, UnitState], None] | None
  resume: Mapping[str, Mapping[str, Any]]
  state: QuantState = dataclasses.field(default_factory=dict)
  reports: list[UnitReport] = dataclasses.field(default_factory=list)

  # ---- The network around the units

  def run_phase(
    self, phase: str, apply: Callable[..., Any], variables: Any, inputs: Any
  ) -> None:
    """Sends both streams through the network once and settles each unit."""
    seen: list[str] = []

    def on_unit(unit, module, call, args, kwargs):
      start = time.perf_counter()
      visit = self.visit(unit, module, args, kwargs)
      if unit.path not in seen:
        self.settle(phase, visit, len(seen), start)
        seen.append(unit.path)
      weights, grids = self.quantizers(visit)
      out = self.forward(
        visit, visit.with_weights(weights), grids, visit.inputs_q
      )
      return self.streams.stack(visit.target, out)

    stacked = [self.streams.stack(x, x) for x in inputs]
    with jax.default_device(self.streams.home):
      self.walker.walk(apply, variables, stacked, on_unit, self.on_float)

  def on_float(self, module, call, args, kwargs) -> Any:
    """Runs a module without quantized layers compiled and in chunks."""
    form, batch, whole = units.take_apart(
      module, args, kwargs, 2 * self.streams.samples
    )
    if not batch or not form.is_hashable:
      return call(*args, **kwargs)
    variables, whole = self.streams.fetch((module.variables, whole))
    return self.streams.map(
      lambda rows: learning.forward(form, variables, {}, rows, whole), batch
    )

  def visit(self, unit: Unit, module: Any, args: Any, kwargs: Any) -> _Visit:
    """Takes the streams apart and runs the unit at full precision."""
    form, batch, whole = units.take_apart(
      module, args, kwargs, 2 * self.streams.samples
    )
    if not form.is_hashable:
      raise ValueError(
        f'{unit.path!r}: a unit needs hashable fields and static arguments.'
      )
    if not batch:
      raise ValueError(f'{unit.path!r} has no input with samples on axis 0.')
    inputs, inputs_q = self.streams.split(batch)
    variables, whole = self.streams.fetch((module.variables, whole))
    layers = {
      units.relative(unit.path, path): self.walker.policy[path]
      for path in unit.layers
    }
    target = self.streams.map(
      lambda rows: learning.forward(form, variables, {}, rows, whole), inputs
    )
    return _Visit(
      unit, form, variables, layers, inputs, inputs_q, whole, target
    )

  def forward(
    self, visit: _Visit, variables: Any, grids: learning.Grids, inputs: Any
  ) -> Any:
    return self.streams.map(
      lambda rows: learning.forward(
        visit.call, variables, grids, rows, visit.whole
      ),
      inputs,
    )

  def quantizers(
    self, visit: _Visit
  ) -> tuple[learning.Weights, learning.Grids]:
    """What has been settled for the unit so far."""
    weights, grids = {}, {}
    for path in visit.layers:
      layer = self.state[visit.full_path(path)]
      if layer['weight'] is not None:
        weights[path] = layer['weight']
      if layer['act'] is not None:
        grids[path] = layer['act']
    return weights, grids

  # ---- One unit

  def settle(self, phase: str, visit: _Visit, index: int, start: float) -> None:
    """Learns or restores the unit's quantizers and reports on it."""
    name = f'{phase}/{visit.unit.path}'
    if name in self.resume:
      self.reports.append(self.restore(phase, visit, self.resume[name]))
      return
    key = jax.random.fold_in(self.key, PHASES.index(phase))
    key = self.streams.fetch(jax.random.fold_in(key, index))
    learn = self.learn_weights if phase == 'weight' else self.learn_grids
    facts = learn(visit, key)
    seconds = time.perf_counter() - start
    report = UnitReport(visit.unit, phase, **facts, seconds=seconds)
    self.reports.append(report)
    if self.on_unit_done is not None:
      self.on_unit_done(name, self.unit_state(phase, visit, report))

  def learn_weights(self, visit: _Visit, key: Array) -> dict[str, Any]:
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
    inputs = visit.inputs_q if s.asymmetric else visit.inputs
    before, signal = self.measure(visit, variables, grids, inputs, s.p)
    weights, after, flipped, kept = nearest, before, 0.0, False
    learned = [path for path in visit.learned if path in nearest]
    if s.iters and learned:
      alphas = {
        path: learning.init_alpha(
          visit.kernel(path), nearest[path].qparams, s.zeta, s.gamma
        )
        for path in learned
      }
      # Kernels that learn stay in floating point: soft rounding needs them.
      others = {p: w for p, w in nearest.items() if p not in learned}
      task = learning.Task(
        visit.with_weights(others),
        grids,
        inputs,
        visit.whole,
        visit.target,
        self.draw_rows(key, s.batch_size, s.iters),
        key,
        jnp.int32(s.iters),
        learning.knobs(s),
      )
      weight_grids = {path: nearest[path].qparams for path in learned}
      alphas = self.learn(
        'weight', visit, learning.rounding_steps, alphas, task, weight_grids
      )
      found = {
        path: learning.harden(visit.kernel(path), alphas[path], nearest[path])
        for path in learned
      }
      rounded = nearest | {path: weight for path, (weight, _) in found.items()}
      variables = visit.with_weights(rounded)
      after, _ = self.measure(visit, variables, grids, inputs, s.p)
      kept = not after <= before  # Also true for NaN.
      if kept:
        after = before
      else:
        weights = rounded
        moved = sum(int(count) for _, count in found.values())
        flipped = moved / sum(visit.kernel(path).size for path in learned)
    for path in visit.layers:
      self.state[visit.full_path(path)] = LayerState(
        weight=weights.get(path), act=grids.get(path)
      )
    return dict(
      loss_before=before,
      loss_after=after,
      signal=signal,
      flipped=flipped,
      kept_initial=kept,
    )

  def learn_grids(self, visit: _Visit, key: Array) -> dict[str, Any]:
    """Searches ranges of layer inputs and learns their step sizes."""
    s = self.settings
    weights, _ = self.quantizers(visit)
    variables = visit.with_weights(weights)
    grids = self.search_grids(visit, variables)
    inputs = visit.inputs_q if s.act_asymmetric else visit.inputs
    before, signal = self.measure(visit, variables, grids, inputs, s.act_p)
    after, kept = before, False
    learned = {path: grids[path] for path in visit.learned if path in grids}
    if s.act_iters and learned:
      task = learning.Task(
        variables,
        {path: q for path, q in grids.items() if path not in learned},
        inputs,
        visit.whole,
        visit.target,
        self.draw_rows(key, s.act_batch_size, s.act_iters),
        key,
        jnp.int32(s.act_iters),
        learning.knobs(s),
      )
      scales = {path: q.scale for path, q in learned.items()}
      scales = self.learn(
        'act', visit, learning.scale_steps, scales, task, learned
      )
      found = grids | {
        path: affine.QParams(scales[path], q.zero_point, q.bits)
        for path, q in learned.items()
      }
      after, _ = self.measure(visit, variables, found, inputs, s.act_p)
      kept = not after <= before
      if kept:
        after = before
      else:
        grids = found
    for path in visit.layers:
      self.state[visit.full_path(path)] = LayerState(
        weight=weights.get(path), act=grids.get(path)
      )
    return dict(
      loss_before=before,
      loss_after=after,
      signal=signal,
      flipped=0.0,
      kept_initial=kept,
    )

  def measure(
    self, visit: _Visit, variables: Any, grids: Any, inputs: Any, p: float
  ) -> tuple[float, float]:
    """Loss over the whole calibration set, and the norm of the target."""
    out = self.forward(visit, variables, grids, inputs)
    loss, signal = learning.loss_and_signal(out, visit.target, p)
    return float(loss), float(signal)

  def search_grids(self, visit: _Visit, variables: Any) -> learning.Grids:
    if all(bits.a is None for bits in visit.layers.values()):
      return {}
    count = min(self.settings.act_init_samples, self.streams.samples)
    rows = [units.rows_of(x, 0, count) for x in visit.inputs_q]
    return learning.search_grids(
      visit.call,
      tuple(visit.layers.items()),
      self.settings.act_range,
      variables,
      self.streams.fetch(rows),
      visit.whole,
    )

  def draw_rows(self, key: Array, batch_size: int, iters: int) -> Array | None:
    total = self.streams.samples
    if batch_size >= total:
      return None
    return learning.draw_rows(key, total, batch_size, iters)

  def learn(
    self,
    phase: str,
    visit: _Visit,
    steps: Callable[..., learning.Progress],
    initial: dict[str, Array],
    task: learning.Task,
    grids: learning.Grids,
  ) -> dict[str, Array]:
    """Runs the iterations of a phase on a unit; returns what was learned."""
    s = self.settings
    iters, p = (s.iters, s.p) if phase == 'weight' else (s.act_iters, s.act_p)
    loop = s.loop if s.loop is not None else not self.streams.on_cpu
    task, grids = self.streams.fetch((task, grids))

    def run(progress, first, stop):
      return steps(
        visit.call,
        p,
        loop,
        progress,
        first,
        stop,
        task,
        grids,
      )

    def report(done, loss):
      if self.progress is not None:
        self.progress(visit.unit.path, phase, done, iters, loss)

    progress = self.streams.fetch(learning.start(initial))
    return learning.run_steps(run, progress, iters, loop, s.reports, report)

  # ---- Storing a unit

  def settled(self, phase: str, visit: _Visit) -> list[tuple[str, str, int]]:
    """(path within the unit, side, bits) of what a phase settles.

    That is weights first, then layer inputs; with QDrop, the first phase
    settles both.
    """
    found = []
    for path, bits in visit.layers.items():
      if phase == 'weight' and bits.w is not None:
        found.append((path, 'weight', bits.w))
      if bits.a is not None and (phase == 'act' or self.settings.drop_prob):
        found.append((path, 'act', bits.a))
    return found

  def unit_state(
    self, phase: str, visit: _Visit, report: UnitReport
  ) -> UnitState:
    """What `restore` needs, as a flat dict of NumPy arrays."""
    arrays: UnitState = {}
    for path, side, _ in self.settled(phase, visit):
      full = visit.full_path(path)
      value = self.state[full][side]
      for field, key in _stored_keys(full, side).items():
        arrays[key] = np.asarray(getattr(value, field))
    for field in _REPORT_FIELDS:
      arrays[f'report:{field}'] = np.asarray(getattr(report, field))
    return arrays

  def restore(
    self, phase: str, visit: _Visit, arrays: Mapping[str, Any]
  ) -> UnitReport:
    """Takes over what `unit_state` gave in an earlier run."""
    name = f'{phase}/{visit.unit.path}'
    settled = self.settled(phase, visit)
    expected = {f'report:{field}' for field in _REPORT_FIELDS}
    for path, side, _ in settled:
      expected.update(_stored_keys(visit.full_path(path), side).values())
    if set(arrays) != expected:
      raise ValueError(
        f'Stored unit {name!r}: missing {sorted(expected - set(arrays))}, '
        f'unexpected {sorted(set(arrays) - expected)}.'
      )
    for path in visit.layers:
      full = visit.full_path(path)
      old = self.state[full]['weight'] if phase == 'act' else None
      self.state[full] = LayerState(weight=old, act=None)
    for path, side, bits in settled:
      full = visit.full_path(path)
      keys = _stored_keys(full, side)
      values = {field: np.asarray(arrays[key]) for field, key in keys.items()}
      stored = int(values.pop('bits'))
      if stored != bits:
        raise ValueError(
          f'Stored unit {name!r} has {stored} bits for {side} of {full!r}; '
          f'{bits} are asked for.'
        )
      shape = visit.kernel(path).shape
      if side == 'weight' and values['codes'].shape != shape:
        raise ValueError(
          f'Stored unit {name!r}: codes {values["codes"].shape} do not fit '
          f'the kernel {shape} of {full!r}.'
        )
      values = self.streams.fetch(values)
      self.state[full][side] = _SIDES[side](**values, bits=bits)
    facts = {
      field: np.asarray(arrays[f'report:{field}']).item()
      for field in _REPORT_FIELDS
    }
    return UnitReport(visit.unit, phase, **facts)


_SIDES: dict[str, Any] = {'weight': affine.QWeight, 'act': affine.QParams}


def _stored_keys(path: str, side: str) -> dict[str, str]:
  """Field of a quantizer -> name of its array in a `UnitState`."""
  names = [field.name for field in dataclasses.fields(_SIDES[side])]
  return {name: f'{path}:{side}:{name}' for name in names}


# ---- Interface --------------------------------------------------------------


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
  on_unit_done: Callable[[str, UnitState], None] | None = None,
  resume: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[QuantState, list[UnitReport]]:
  """Quantizes a network: learned rounding, then learned step sizes.

  Layers with `reconstruct=False` in the policy get nearest rounding and
  searched ranges; so do all with `iters=0` and `act_iters=0`.

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
    Quantizers of every quantized layer, in the order of the policy, and a
    report per unit and phase.

  Raises:
    ValueError: inputs of different length, a policy path that the network
      does not run, or stored units that do not fit.
  """
  settings = settings or Settings()
  inputs = [jnp.asarray(x) for x in inputs]
  lengths = {x.shape[0] if x.ndim else 0 for x in inputs}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(
      'Inputs need one length above 0 on axis 0, got the shapes '
      f'{[x.shape for x in inputs]}.'
    )
  walker = units.Walker(policy, block_types)
  found = list_units(apply, variables, policy, inputs, block_types=block_types)
  missed = sorted(set(walker.policy) - {p for u in found for p in u.layers})
  if missed:
    raise ValueError(f'The network does not run the layers {missed}.')
  names = {f'{phase}/{unit.path}' for phase in PHASES for unit in found}
  strangers = sorted(set(resume or {}) - names)
  if strangers:
    raise ValueError(f'Stored units that the network lacks: {strangers}.')
  streams = units.Streams(lengths.pop(), settings.chunk, settings.host_streams)
  run = _Reconstruction(
    walker, settings, streams, key, progress, on_unit_done, resume or {}
  )
  inputs, variables = streams.store((inputs, variables))
  for phase in PHASES:
    run.run_phase(phase, apply, variables, inputs)
  return {path: run.state[path] for path in walker.policy}, run.reports


def format_reports(reports: Sequence[UnitReport]) -> str:
  """Table of the units: losses before and after, flips, time; a summary."""
  rows: list[tuple[str, ...]] = [
    ('phase', 'unit', 'kind', 'layers', 'before', 'after', 'after/signal')
    + ('flipped', 'seconds', 'note')
  ]
  for r in reports:
    note = '' if r.unit.learned else 'not learned'
    relative = r.loss_after / r.signal if r.signal else 0.0
    rows.append(
      (
        r.phase,
        r.unit.path,
        r.unit.kind,
        str(len(r.unit.layers)),
        f'{r.loss_before:.4g}',
        f'{r.loss_after:.4g}',
        f'{relative:.2e}',
        f'{r.flipped:.1%}' if r.phase == 'weight' else '',
        f'{r.seconds:.1f}',
        'kept initial' if r.kept_initial else note,
      )
    )
  return f'{format_table(rows)}\n{_summary(reports)}'


def _summary(reports: Sequence[UnitReport]) -> str:
  """How much learning lowered the losses, in one line."""
  parts = []
  for phase in PHASES:
    ratios = [
      r.loss_after / r.loss_before
      for r in reports
      if r.phase == phase and r.unit.learned and r.loss_before > 0
    ]
    if ratios:
      mean = float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-12)))))
      parts.append(f'{phase} loss {mean:.2f} times that before')
  units = len({r.unit.path for r in reports})
  return f'{units} units: {", ".join(parts) or "nothing was learned"}.'
