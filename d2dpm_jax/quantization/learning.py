"""The compiled programs of reconstruction: forwards of a unit and its steps.

Units of equal form share programs: everything but the form of a unit, its
bits and a few settings is an argument. Paths are those within the unit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2dpm_jax.quantization import adaround, affine, transform
from d2dpm_jax.quantization.adaround import Settings
from d2dpm_jax.quantization.policy import LayerBits
from d2dpm_jax.quantization.units import Call, take_rows

Array = jax.Array
Grids = dict[str, affine.QParams]
Weights = dict[str, affine.QWeight]


# ---- Forwards ---------------------------------------------------------------


def _quantized_call(call: Call, variables, grids: Grids, batch, whole) -> Any:
  with transform.intercept_inputs(
    lambda path, x: affine.fake_quant(x, grids[path]), grids
  ):
    return call(variables, batch, whole)


@functools.partial(jax.jit, static_argnames='call')
def forward(
  call: Call, variables: Any, grids: Grids, batch: Any, whole: Any
) -> Any:
  """Output of a unit; inputs of the layers in `grids` are quantized.

  Args:
    call: form of the call.
    variables: of the unit.
    grids: path within the unit -> grid of the layer's input.
    batch: arrays with a sample per row.
    whole: the other arrays.

  Returns:
    What the unit returns, a pytree with a sample per row.
  """
  return _quantized_call(call, variables, grids, batch, whole)


# (path within the unit, bits, reach), see `LayerBits`.
Inputs = tuple[tuple[str, int, float], ...]


def quantized_inputs(layers: Mapping[str, LayerBits]) -> Inputs:
  """All that a search depends on; bits of kernels are not a part of it."""
  return tuple(
    (path, bits.a, bits.reach)
    for path, bits in layers.items()
    if bits.a is not None
  )


@functools.partial(jax.jit, static_argnames=('call', 'inputs', 'method'))
def search_grids(
  call: Call,
  inputs: Inputs,
  method: str,
  variables: Any,
  batch: Any,
  whole: Any,
) -> Grids:
  """Ranges of the layers' inputs, each with those before it quantized.

  Args:
    call: form of the call of a unit.
    inputs: of `quantized_inputs`.
    method: a key of `affine.RANGE_METHODS`.
    variables: of the unit.
    batch: arrays with a sample per row.
    whole: the other arrays.

  Returns:
    Path -> grid, one per tensor.
  """
  wanted = {path: rest for path, *rest in inputs}
  found: Grids = {}

  def change(path, x):
    if path not in found:
      bits, reach = wanted[path]
      found[path] = affine.range_method(method)(x, bits)
      if reach:
        found[path] = affine.widen(found[path], reach)
    return affine.fake_quant(x, found[path])

  with transform.intercept_inputs(change, wanted):
    call(variables, batch, whole)
  return found


def _lp_loss(
  pred: Any, target: Any, p: Array | float, importance: Any = None
) -> Array:
  """`adaround.lp_loss`, summed over the outputs of a unit with several."""
  losses = jax.tree.map(
    lambda a, b, *w: adaround.lp_loss(a, b, p, *w),
    *((pred, target) if importance is None else (pred, target, importance)),
  )
  return jnp.sum(jnp.stack(jax.tree.leaves(losses)), axis=0)


@jax.jit
def measure(
  pred: Any, target: Any, p: Array | float, importance: Any = None
) -> tuple[Array, Array]:
  """L_p loss of each row, and the same norm of its target; float32[rows]."""
  zero = jax.tree.map(jnp.zeros_like, target)
  return (
    _lp_loss(pred, target, p, importance),
    _lp_loss(zero, target, p, importance),
  )


dequantize = jax.jit(affine.dequantize, static_argnames='dtype')
init_alpha = jax.jit(adaround.init_alpha)


@jax.jit
def harden(
  kernel: Array, alpha: Array, nearest: affine.QWeight
) -> tuple[affine.QWeight, Array]:
  """Learned codes, and how many of them are not the nearest.

  Args:
    kernel: float[..., O].
    alpha: float[..., O], see `adaround.hard_weight`.
    nearest: codes of the kernel by nearest rounding.

  Returns:
    Codes on the same grid; int32[].
  """
  weight = adaround.hard_weight(kernel, alpha, nearest.qparams)
  return weight, jnp.sum(weight.codes != nearest.codes)


# ---- Steps ------------------------------------------------------------------


class Knobs(NamedTuple):
  """Numbers of `adaround.Settings` as arguments: no program depends on them."""

  lr: Any
  rounding_weight: Any
  warmup: Any
  beta_start: Any
  beta_end: Any
  zeta: Any
  gamma: Any
  drop_prob: Any
  act_lr: Any


def knobs(settings: Settings) -> Knobs:
  """The numbers as float32[]."""
  return Knobs(*(np.float32(getattr(settings, n)) for n in Knobs._fields))


class Task(NamedTuple):
  """What a unit learns from.

  Attributes:
    variables: of the unit. Kernels whose rounding is learned are those of full
      precision, all other kernels of quantized layers lie on their grids.
    grids: of layer inputs. For rounding: those with QDrop, else empty. For
      step sizes: those that are not learned.
    initial: of what is learned: grids of kernels, or of layer inputs.
    batch: arrays with a sample per row; those to learn from follow `first`.
    first: int32[].
    target: full-precision output; row 0 belongs to row `first` of `batch`.
    importance: like `target`, weights of the loss, or None.
    whole: other arrays.
    rows: from `draw_rows`.
    key: of the unit and phase.
    iters: int32[], iterations in all.
    knobs: see `knobs`.
  """

  variables: Any
  grids: Grids
  initial: Grids
  batch: Any
  first: Any
  target: Any
  importance: Any
  whole: Any
  rows: Array
  key: Array
  iters: Any
  knobs: Knobs


class Progress(NamedTuple):
  """What iterations change: variables by layer, state of Adam, summed loss."""

  learned: Any
  adam: Any
  loss: Any


def start(learned: dict[str, Array]) -> Progress:
  """Nothing learned yet."""
  state = jax.eval_shape(optax.scale_by_adam().init, learned)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  return Progress(learned, zeros, np.zeros([], np.float32))


@functools.partial(jax.jit, static_argnames=('total', 'batch_size', 'iters'))
def draw_rows(key: Array, total: int, batch_size: int, iters: int) -> Array:
  """Samples of every iteration: shuffled epochs, cut into batches.

  A program of its own, as sorting takes half a second to compile.

  Args:
    key: of the unit and phase.
    total: number of samples.
    batch_size: samples per iteration; `total` or more takes all, in order.
    iters: iterations.

  Returns:
    int32[iters, min(batch_size, total)]; each sample occurs equally often,
    give or take one.
  """
  if batch_size >= total:
    return jnp.tile(jnp.arange(total), (iters, 1))
  epochs = -(-iters * batch_size // total)
  keys = jax.random.split(key, epochs)
  rows = jax.vmap(lambda key: jax.random.permutation(key, total))(keys)
  return rows.reshape(-1)[: iters * batch_size].reshape(iters, batch_size)


class _Sample(NamedTuple):
  """One iteration: its number, batch, target and weights of the loss."""

  step: Array
  batch: Any
  target: Any
  importance: Any


# Of one phase: what is learned, a sample -> (loss, reconstruction loss).
_Loss = Callable[[Any, _Sample], tuple[Array, Array]]
# What is learned, updates of Adam, step -> what is learned then.
_Update = Callable[[Any, Any, Array], Any]


def _rounding(call: Call, p: float, task: Task) -> tuple[_Loss, _Update]:
  """AdaRound: α by layer is learned; with QDrop if there are grids."""
  s = task.knobs
  order = {path: i for i, path in enumerate(task.grids)}
  kernels = {
    path: transform.get_kernel(task.variables['params'], path)
    for path in task.initial
  }

  def loss_fn(alphas, sample):
    soft = {
      path: adaround.soft_kernel(
        kernels[path], alphas[path], q, s.zeta, s.gamma
      )
      for path, q in task.initial.items()
    }
    drop_key = jax.random.fold_in(jax.random.fold_in(task.key, sample.step), 1)

    def change(path, x):
      key = jax.random.fold_in(drop_key, order[path])
      keep = jax.random.bernoulli(key, s.drop_prob, x.shape)
      return jnp.where(keep, x, affine.fake_quant(x, task.grids[path]))

    with transform.intercept_inputs(change, task.grids):
      variables = transform.replace_kernels(task.variables, soft)
      out = call(variables, sample.batch, task.whole)
    loss = jnp.mean(_lp_loss(out, sample.target, p, sample.importance))
    beta, weight = adaround.beta_schedule(sample.step + 1, task.iters, s)
    extra = adaround.regularizer(alphas.values(), beta, s.zeta, s.gamma)
    return loss + weight * extra, loss

  def update(alphas, updates, step):
    del step
    return jax.tree.map(lambda a, u: a - s.lr * u, alphas, updates)

  return loss_fn, update


def _step_sizes(call: Call, p: float, task: Task) -> tuple[_Loss, _Update]:
  """Scales of layer inputs are learned; zero points do not move.

  Scales stay above a thousandth of where they began.
  """
  s = task.knobs

  def loss_fn(scales, sample):
    grids = {
      path: affine.QParams(scales[path], q.zero_point, q.bits)
      for path, q in task.initial.items()
    }
    out = _quantized_call(
      call, task.variables, task.grids | grids, sample.batch, task.whole
    )
    loss = jnp.mean(_lp_loss(out, sample.target, p, sample.importance))
    return loss, loss

  def update(scales, updates, step):
    share = jnp.float32(step) / jnp.float32(task.iters)
    lr = s.act_lr * 0.5 * (1 + jnp.cos(jnp.pi * share))
    return {
      path: jnp.maximum(
        scale - lr * updates[path], 1e-3 * task.initial[path].scale
      )
      for path, scale in scales.items()
    }

  return loss_fn, update


_PHASES = {'weight': _rounding, 'act': _step_sizes}


@functools.partial(
  jax.jit,
  static_argnames=('phase', 'call', 'p', 'count', 'sharding'),
  donate_argnames='progress',
)
def steps(
  phase: str,
  call: Call,
  p: float,
  count: int,
  sharding: jax.sharding.Sharding,
  progress: Progress,
  first: Array,
  task: Task,
) -> Progress:
  """Some iterations of a phase.

  Args:
    phase: 'weight' learns rounding, 'act' step sizes.
    call: the unit.
    p: norm of the loss.
    count: iterations.
    sharding: of a batch.
    progress: what is learned, by layer; used up.
    first: int32[], number of the first iteration.
    task: what to learn from.

  Returns:
    The new progress; the loss is the reconstruction loss alone.
  """
  loss_fn, update = _PHASES[phase](call, p, task)
  adam = optax.scale_by_adam()

  def body(i, progress):
    step = first + i
    rows = task.rows[step]
    sample = _Sample(
      step,
      take_rows(task.batch, task.first + rows, sharding),
      take_rows(task.target, rows, sharding),
      take_rows(task.importance, rows, sharding),
    )
    learned, state, total = progress
    grads, loss = jax.grad(loss_fn, has_aux=True)(learned, sample)
    updates, state = adam.update(grads, state)
    return Progress(update(learned, updates, step), state, total + loss)

  # The number of iterations is static: a loop that asks for its end in each
  # iteration waits for the host.
  return (
    jax.lax.fori_loop(0, count, body, progress)
    if count > 1
    else body(0, progress)
  )


def size_of(phase: str, settings: Settings) -> tuple[int, int]:
  """Iterations of a phase, and their batch size."""
  if phase == 'weight':
    return settings.iters, settings.batch_size
  return settings.act_iters, settings.act_batch_size


def parts_of(iters: int, reports: int, loop: bool) -> tuple[int, int]:
  """Iterations of one call, and of one report; see `run_steps`."""
  parts = max(n for n in range(1, min(reports, iters) + 1) if iters % n == 0)
  size = iters // parts
  return size if loop else 1, size


def run_steps(
  run: Callable[[int, Progress, Any], Progress],
  progress: Progress,
  iters: int,
  loop: bool,
  reports: int,
  report: Callable[[int, float], None],
) -> dict[str, Array]:
  """All iterations, in equal parts with a report after each.

  Args:
    run: `steps` of (count, progress, first).
    progress: from `start`.
    iters: above 0.
    loop: whether a part is one call. XLA's CPU backend is some 40 times slower
      at gradients of convolutions within a loop. One call per iteration is as
      fast there as a loop over convolutions that are written as matrix
      products, or up to 1.7 times faster.
    reports: most parts. It is lowered to a divisor of `iters`: parts of
      another length are programs of their own.
    report: called with iterations done and their mean loss since.

  Returns:
    What was learned, by layer.
  """
  count, size = parts_of(iters, reports, loop)
  for done in range(0, iters, size):
    for first in range(done, done + size, count):
      progress = run(count, progress, np.int32(first))
    report(done + size, float(progress.loss) / size)
    progress = progress._replace(loss=jnp.zeros_like(progress.loss))
  return progress.learned
