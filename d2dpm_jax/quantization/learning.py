"""The compiled programs of reconstruction: forwards of a unit and its steps.

Units of equal form share programs: everything but the form of a unit, its
bits and a few settings is an argument. Paths are those within the unit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2dpm_jax.quantization import adaround, affine, transform
from d2dpm_jax.quantization.adaround import Settings
from d2dpm_jax.quantization.policy import LayerBits
from d2dpm_jax.quantization.units import Call

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
  """Output of a unit; inputs of the layers in `grids` are quantized."""
  return _quantized_call(call, variables, grids, batch, whole)


@functools.partial(jax.jit, static_argnames=('call', 'layers', 'method'))
def search_grids(
  call: Call,
  layers: tuple[tuple[str, LayerBits], ...],
  method: str,
  variables: Any,
  batch: Any,
  whole: Any,
) -> Grids:
  """Ranges of the layers' inputs, each with those before it quantized."""
  bits = {path: bits.a for path, bits in layers if bits.a is not None}
  found: Grids = {}

  def change(path, x):
    if path not in found:
      found[path] = affine.range_method(method)(x, bits[path])
    return affine.fake_quant(x, found[path])

  with transform.intercept_inputs(change, bits):
    call(variables, batch, whole)
  return found


def _lp_loss(pred: Any, target: Any, p: Array | float) -> Array:
  """`adaround.lp_loss`, summed over the outputs of a unit with several."""
  pairs = zip(jax.tree.leaves(pred), jax.tree.leaves(target), strict=True)
  losses = [adaround.lp_loss(a, b, p) for a, b in pairs]
  return jnp.sum(jnp.stack(losses))


@jax.jit
def loss_and_signal(
  pred: Any, target: Any, p: Array | float
) -> tuple[Array, Array]:
  """L_p loss, and the same norm of the target itself."""
  zero = jax.tree.map(jnp.zeros_like, target)
  return _lp_loss(pred, target, p), _lp_loss(zero, target, p)


dequantize = jax.jit(affine.dequantize, static_argnames='dtype')
init_alpha = jax.jit(adaround.init_alpha)


@jax.jit
def harden(
  kernel: Array, alpha: Array, nearest: affine.QWeight
) -> tuple[affine.QWeight, Array]:
  """Learned codes, and how many of them are not the nearest."""
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
    batch: arrays with a sample per row.
    whole: other arrays.
    target: full-precision output.
    rows: from `draw_rows`; None takes all samples in every iteration.
    key: of the unit and phase.
    iters: int32[], iterations in all.
    knobs: see `knobs`.
  """

  variables: Any
  grids: Grids
  batch: Any
  whole: Any
  target: Any
  rows: Array | None
  key: Array
  iters: Array
  knobs: Knobs


class Progress(NamedTuple):
  """What iterations change: variables by layer, state of Adam, summed loss."""

  learned: Any
  adam: Any
  loss: Any


def start(learned: dict[str, Array]) -> Progress:
  """Nothing learned yet. The arrays are copied: steps overwrite theirs."""
  state = jax.eval_shape(optax.scale_by_adam().init, learned)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  copies = {path: np.asarray(x) for path, x in learned.items()}
  return Progress(copies, zeros, np.zeros([], np.float32))


@functools.partial(jax.jit, static_argnames=('total', 'batch_size', 'iters'))
def draw_rows(key: Array, total: int, batch_size: int, iters: int) -> Array:
  """Samples of every iteration: shuffled epochs, cut into batches.

  A program of its own, as sorting takes half a second to compile.

  Args:
    key: of the unit and phase.
    total: number of samples.
    batch_size: samples per iteration.
    iters: iterations.

  Returns:
    int32[iters, batch_size]; each sample occurs equally often, give or take
    one.
  """
  epochs = -(-iters * batch_size // total)
  keys = jax.random.split(key, epochs)
  rows = jax.vmap(lambda key: jax.random.permutation(key, total))(keys)
  return rows.reshape(-1)[: iters * batch_size].reshape(iters, batch_size)


def _sample(task: Task, step: Array) -> tuple[Any, Any]:
  """Batch and target of one iteration."""
  data = task.batch, task.target
  if task.rows is None:
    return data
  rows = task.rows[step]
  return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), data)


def _iterate(
  body: Callable[[Array, Progress], Progress],
  progress: Progress,
  first: Array,
  stop: Array,
  loop: bool,
) -> Progress:
  """`body` for first .. stop - 1; without `loop`, only for `first`."""
  if not loop:
    return body(first, progress)
  return jax.lax.fori_loop(first, stop, body, progress)


@functools.partial(
  jax.jit,
  static_argnames=('call', 'p', 'loop'),
  donate_argnames='progress',
)
def rounding_steps(
  call: Call,
  p: float,
  loop: bool,
  progress: Progress,
  first: Array,
  stop: Array,
  task: Task,
  weight_grids: Grids,
) -> Progress:
  """Iterations of AdaRound.

  Args:
    call: the unit.
    p: norm of the loss.
    loop: False runs the iteration `first` alone.
    progress: α by layer.
    first: int32[].
    stop: int32[], end of the iterations.
    task: what to learn from.
    weight_grids: grids of the kernels that learn.

  Returns:
    The new progress; the loss is the reconstruction loss alone.
  """
  s = task.knobs
  adam = optax.scale_by_adam()
  kernels = {
    path: transform.get_kernel(task.variables['params'], path)
    for path in weight_grids
  }

  def loss_fn(alphas, step):
    batch, target = _sample(task, step)
    soft = {
      path: adaround.soft_kernel(
        kernels[path], alphas[path], weight_grids[path], s.zeta, s.gamma
      )
      for path in weight_grids
    }
    drop_key = jax.random.fold_in(jax.random.fold_in(task.key, step), 1)
    order = {path: i for i, path in enumerate(task.grids)}

    def change(path, x):
      key = jax.random.fold_in(drop_key, order[path])
      keep = jax.random.bernoulli(key, s.drop_prob, x.shape)
      return jnp.where(keep, x, affine.fake_quant(x, task.grids[path]))

    with transform.intercept_inputs(change, task.grids):
      variables = transform.replace_kernels(task.variables, soft)
      out = call(variables, batch, task.whole)
    loss = _lp_loss(out, target, p)
    beta, weight = adaround.beta_schedule(step + 1, task.iters, s)
    extra = adaround.regularizer(alphas.values(), beta, s.zeta, s.gamma)
    return loss + weight * extra, loss

  def body(step, progress):
    alphas, state, total = progress
    grads, loss = jax.grad(loss_fn, has_aux=True)(alphas, step)
    updates, state = adam.update(grads, state)
    alphas = jax.tree.map(lambda a, u: a - s.lr * u, alphas, updates)
    return Progress(alphas, state, total + loss)

  return _iterate(body, progress, first, stop, loop)


@functools.partial(
  jax.jit,
  static_argnames=('call', 'p', 'loop'),
  donate_argnames='progress',
)
def scale_steps(
  call: Call,
  p: float,
  loop: bool,
  progress: Progress,
  first: Array,
  stop: Array,
  task: Task,
  initial: Grids,
) -> Progress:
  """Iterations of step sizes; zero points do not move.

  Scales stay above a thousandth of where they began.

  Args:
    call: the unit.
    p: norm of the loss.
    loop: False runs the iteration `first` alone.
    progress: scales by layer.
    first: int32[].
    stop: int32[], end of the iterations.
    task: what to learn from.
    initial: searched grids of the layers that learn.

  Returns:
    The new progress.
  """
  s = task.knobs
  adam = optax.scale_by_adam()

  def loss_fn(scales, step):
    batch, target = _sample(task, step)
    grids = {
      path: affine.QParams(scales[path], q.zero_point, q.bits)
      for path, q in initial.items()
    }
    out = _quantized_call(
      call, task.variables, task.grids | grids, batch, task.whole
    )
    return _lp_loss(out, target, p)

  def body(step, progress):
    scales, state, total = progress
    loss, grads = jax.value_and_grad(loss_fn)(scales, step)
    updates: Any
    updates, state = adam.update(grads, state)
    share = jnp.float32(step) / jnp.float32(task.iters)
    lr = s.act_lr * 0.5 * (1 + jnp.cos(jnp.pi * share))
    scales = {
      path: jnp.maximum(scale - lr * updates[path], 1e-3 * initial[path].scale)
      for path, scale in scales.items()
    }
    return Progress(scales, state, total + loss)

  return _iterate(body, progress, first, stop, loop)


def run_steps(
  steps: Callable[[Progress, Any, Any], Progress],
  progress: Progress,
  iters: int,
  loop: bool,
  reports: int,
  report: Callable[[int, float], None],
) -> dict[str, Array]:
  """All iterations, in a few parts with a report after each.

  Args:
    steps: `rounding_steps` or `scale_steps` of (progress, first, stop).
    progress: from `start`.
    iters: above 0.
    loop: whether `steps` runs many iterations in one call. XLA's CPU backend
      is some 40 times slower at gradients of convolutions within a loop. One
      call each is as fast there as a loop over convolutions that are written
      as matrix products, or up to 1.7 times faster.
    reports: number of parts.
    report: called with iterations done and their mean loss since.

  Returns:
    What was learned, by layer.
  """
  done = 0
  parts = min(reports, iters)
  for stop in [iters * (i + 1) // parts for i in range(parts)]:
    ranges = [(done, stop)] if loop else [(i, i + 1) for i in range(done, stop)]
    for a, b in ranges:
      progress = steps(progress, np.int32(a), np.int32(b))
    report(stop, float(progress.loss) / (stop - done))
    progress = progress._replace(loss=jnp.zeros_like(progress.loss))
    done = stop
  return progress.learned
