"""Learning one unit: rounding of its weights, step sizes of its inputs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from d2dpm_jax.quantization import affine, learning, units
from d2dpm_jax.quantization.adaround import Settings
from d2dpm_jax.quantization.unit_losses import Losses, Norm
from d2dpm_jax.quantization.visits import Runner, Visit

Array = jax.Array

# progress(unit path, phase, iterations done, iterations, mean loss since).
Progress = Callable[[str, str, int, int, float], None]

# What was settled, and what a report says of it.
Learned = tuple[learning.Weights, learning.Grids, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Learner:
  """Learns the quantizers of one unit after the other.

  Attributes:
    settings: of the reconstruction.
    runner: of units.
    losses: of units.
    progress: told how far it is, or None.
  """

  settings: Settings
  runner: Runner
  losses: Losses
  progress: Progress | None

  def learn_weights(self, visit: Visit, key: Array) -> Learned:
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
    grids = self._search_grids(visit, variables) if s.drop_prob else {}
    norm = self.losses.norm(visit, s.p, s.asymmetric, nearest)
    before, signal = self.losses.measure(visit, variables, grids, norm)
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
    alphas, facts['ms_per_iteration'] = self._iterate(
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
    after, _ = self.losses.measure(visit, variables, grids, norm)
    if not after <= before:  # Also true for NaN.
      return nearest, grids, facts | {'kept_initial': True}
    moved = sum(int(count) for _, count in found.values())
    flipped = moved / sum(visit.kernel(path).size for path in learned)
    return rounded, grids, facts | {'loss_after': after, 'flipped': flipped}

  def learn_grids(
    self, visit: Visit, key: Array, weights: learning.Weights
  ) -> Learned:
    """Searches ranges of layer inputs and learns their step sizes.

    Args:
      visit: of the unit.
      key: of its randomness in this phase.
      weights: of the unit, settled before.
    """
    s = self.settings
    variables = visit.with_weights(weights)
    grids = self._search_grids(visit, variables)
    norm = self.losses.norm(visit, s.act_p, s.act_asymmetric, weights)
    before, signal = self.losses.measure(visit, variables, grids, norm)
    facts = _facts(before, signal)
    initial = {p: q for p, q in grids.items() if visit.layers[p].reconstruct}
    if not s.act_iters or not initial:
      return weights, grids, facts
    facts['learned'] = True
    scales, facts['ms_per_iteration'] = self._iterate(
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
    after, _ = self.losses.measure(visit, variables, found, norm)
    if not after <= before:
      return weights, grids, facts | {'kept_initial': True}
    return weights, found, facts | {'loss_after': after}

  def _search_grids(self, visit: Visit, variables: Any) -> learning.Grids:
    """Ranges of layer inputs, of the stream that is quantized so far."""
    if all(bits.a is None for bits in visit.layers.values()):
      return {}
    streams = self.runner.streams
    count = min(self.settings.act_init_samples, streams.samples)
    rows = streams.samples + np.arange(count)
    return self.runner.programs.call(
      learning.search_grids,
      visit.call,
      learning.quantized_inputs(visit.layers),
      self.settings.act_range,
      streams.fetch(variables),
      streams.fetch(units.take_rows(visit.batch, rows, None)),
      visit.whole,
    )

  def _iterate(
    self,
    phase: str,
    visit: Visit,
    norm: Norm,
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
    s, streams = self.settings, self.runner.streams
    iters, batch_size = learning.size_of(phase, s)
    loop = streams.loops(s.loop)
    batch, first = streams.to_learn_from(visit.batch, norm.first)
    target, _ = streams.to_learn_from(visit.out, 0)
    weights, _ = streams.to_learn_from(norm.importance, 0)
    rows = learning.draw_rows(key, streams.samples, batch_size, iters)
    variables, grids, initial = streams.fetch((variables, grids, initial))
    task = learning.Task(
      variables=variables,
      grids=grids,
      initial=initial,
      batch=batch,
      first=np.int32(first),
      target=target,
      importance=weights,
      whole=visit.whole,
      rows=streams.fetch(rows),
      key=key,
      iters=np.int32(iters),
      knobs=learning.knobs(s),
    )

    # Devices simulated on a CPU share its threads: with many calls in flight
    # some wait for each other until XLA gives up and aborts.
    one_by_one = streams.on_cpu and streams.num_devices > 1

    def run(count, progress, begin):
      out = self.runner.programs.call(
        learning.steps,
        phase,
        visit.call,
        norm.p,
        count,
        streams.split,
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
    progress = streams.fetch(progress)
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
