"""One training loop: many steps per call, killed and resumed at will."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from flax import struct

from d2dpm_jax.runtime import devices, progress

PyTree = Any
# (params, batch_key, data) -> (loss, metrics)
LossFn = Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, dict]]


@struct.dataclass
class TrainState:
  """What a step of training changes; kept in checkpoints."""

  step: jax.Array
  params: PyTree
  ema: PyTree
  opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class LoopSettings:
  """How long and how fast to train.

  Attributes:
    steps: optimiser steps in all.
    learning_rate: peak of the cosine schedule with 2 % linear warm-up.
    ema_decay: decay of the parameter average; the average is warmed up as
      min(decay, (1 + step) / (10 + step)).
    weight_decay: AdamW's.
    steps_per_call: steps in one compiled `lax.scan`; also how often progress
      is shown.
    save_every: steps between checkpoints, a multiple of steps_per_call.
  """

  steps: int
  learning_rate: float
  ema_decay: float = 0.999
  weight_decay: float = 0.0
  steps_per_call: int = 100
  save_every: int = 1000


def fit(
  name: str,
  loss_fn: LossFn,
  params: PyTree,
  data: PyTree,
  key: jax.Array,
  settings: LoopSettings,
  directory: pathlib.Path,
  after_call: Callable[[TrainState], TrainState] = lambda state: state,
) -> TrainState:
  """Minimises `loss_fn`; step i draws its batch from fold_in(key, i).

  Args:
    name: shown with the progress.
    loss_fn: pure function of (params, key, data); it draws its own batch.
    params: initial parameters.
    data: pytree of arrays, kept on device, handed to `loss_fn`.
    key: PRNG key of the whole run.
    settings: see `LoopSettings`.
    directory: checkpoints live here; a run that was killed goes on from the
      newest one, with the same batches as if it had not been.
    after_call: host-side change of the state between compiled calls.

  Returns:
    The final state, with `ema` the averaged parameters.
  """
  optimizer = _optimizer(settings)
  state = TrainState(
    step=jax.numpy.zeros((), jax.numpy.int32),
    params=params,
    ema=jax.tree.map(jax.numpy.copy, params),
    opt_state=optimizer.init(params),
  )
  state, data = devices.replicate((state, data))
  run = jax.jit(
    functools.partial(_run_steps, loss_fn, optimizer, settings.ema_decay),
    static_argnums=(3,),
    donate_argnums=(0,),
  )
  options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
  with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
    latest = manager.latest_step()
    if latest is not None:
      state = manager.restore(latest, args=ocp.args.StandardRestore(state))
    with progress.progress(name, settings.steps, 'step') as bar:
      done = int(state.step)
      bar.update(done, reused=True)
      while done < settings.steps:
        n = min(settings.steps_per_call, settings.steps - done)
        state, metrics = run(state, key, data, n)
        state = after_call(state)
        done += n
        text = ' '.join(f'{k} {float(v):.4f}' for k, v in metrics.items())
        bar.update(n, text)
        if done % settings.save_every == 0 or done == settings.steps:
          manager.save(done, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
  return state


def _optimizer(settings: LoopSettings) -> optax.GradientTransformation:
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    settings.learning_rate,
    max(1, settings.steps // 50),
    settings.steps,
    0.01 * settings.learning_rate,
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, weight_decay=settings.weight_decay),
  )


def _run_steps(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  state: TrainState,
  key: jax.Array,
  data: PyTree,
  n: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """`n` optimiser steps in one scan; returns the mean of their metrics."""

  def step(state: TrainState, _):
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, jax.random.fold_in(key, state.step), data
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jax.numpy.minimum(
      ema_decay, (1.0 + state.step) / (10.0 + state.step)
    )
    ema = optax.incremental_update(params, state.ema, 1.0 - decay)
    state = TrainState(state.step + 1, params, ema, opt_state)
    return state, {'loss': loss, **metrics}

  state, metrics = jax.lax.scan(step, state, length=n)
  return state, jax.tree.map(lambda m: m.mean(), metrics)
