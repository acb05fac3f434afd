"""The sampling loop: one `lax.scan` over tables, with one correction inside.

Letters: `B` batch, `H W` space, `C` channels, `S` sampling steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.diffusion import ddim

EpsFn = Callable[[jax.Array, jax.Array, Any], jax.Array]
NoiseFn = Callable[[jax.Array], jax.Array]
# (eps_q, x, row of the correction's table, noise) -> (eps, residual_variance).
CorrectFn = Callable[..., tuple[jax.Array, jax.Array | float]]


class Step(NamedTuple):
  """What `collect` sees of one step; arrays are float32[B, H, W, C]."""

  x: jax.Array  # What the network got.
  t: jax.Array  # int32[B], likewise.
  eps_q: jax.Array  # What `eps_fn` returned.
  eps: jax.Array  # The same after correction.
  x_prev: jax.Array  # What the next step gets.
  row: ddim.Rows  # Scalars.
  table: Any  # This step's part of `tables`.


CollectFn = Callable[[Step], Any]


@overload
def sample(
  eps_fn: EpsFn,
  rows: ddim.Rows,
  x_T: jax.Array,
  noise_fn: NoiseFn | None = ...,
  correct: CorrectFn | None = ...,
  correction_rows: Any = ...,
  error_noise_fn: NoiseFn | None = ...,
  tables: Any = ...,
  collect: None = ...,
) -> jax.Array: ...


@overload
def sample(
  eps_fn: EpsFn,
  rows: ddim.Rows,
  x_T: jax.Array,
  noise_fn: NoiseFn | None = ...,
  correct: CorrectFn | None = ...,
  correction_rows: Any = ...,
  error_noise_fn: NoiseFn | None = ...,
  tables: Any = ...,
  *,
  collect: CollectFn,
) -> tuple[jax.Array, Any]: ...


def sample(
  eps_fn: EpsFn,
  rows: ddim.Rows,
  x_T: jax.Array,
  noise_fn: NoiseFn | None = None,
  correct: CorrectFn | None = None,
  correction_rows: Any = None,
  error_noise_fn: NoiseFn | None = None,
  tables: Any = None,
  collect: CollectFn | None = None,
) -> jax.Array | tuple[jax.Array, Any]:
  """Runs a DDIM trajectory from noise to data.

  Pure, to be jitted (or put under `shard_map`) together with whatever surrounds
  it. The correction's noise comes from a function of its own, so it does not
  matter which of the two is drawn first.

  Args:
    eps_fn: (x float32[B, H, W, C], t int32[B], table) -> eps [B, H, W, C],
      after guidance; see `ddim.classifier_free`.
    rows: of `ddim.ddim_rows`.
    x_T: float32[B, H, W, C], standard normal; see `noise.initial_noise`.
    noise_fn: step index int32[] -> z float32[B, H, W, C]; see
      `noise.noise_stream`. None is for eta = 0.
    correct: (eps_q, x that it answers to, row of `correction_rows`, noise) ->
      (eps, residual_variance), or None.
    correction_rows: pytree of arrays [S, ...] for `correct`, or None.
    error_noise_fn: like `noise_fn`, for a `correct` that draws; None hands it
      None.
    tables: pytree of arrays [S, ...] for `eps_fn`, or None. Activation scales
      per step are an example.
    collect: what to keep of each `Step`, for example `lambda s: {'x': s.x}`.

  Returns:
    x_0 float32[B, H, W, C]; with `collect`, (x_0, what it returned, stacked to
    [S, ...] in sampling order).

  Raises:
    ValueError: a table does not have S rows, or `noise_fn` is missing though
      sigma is not 0.
  """
  steps = np.shape(rows.t)[0]
  for name, table in (
    ('correction_rows', correction_rows),
    ('tables', tables),
  ):
    for path, leaf in jax.tree_util.tree_leaves_with_path(table):
      if np.shape(leaf)[:1] != (steps,):
        raise ValueError(
          f'{name}{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}: '
          f'expected {steps} rows, one per sampling step.'
        )
  if noise_fn is None and not isinstance(rows.sigma, jax.core.Tracer):
    if np.any(np.asarray(rows.sigma)):
      raise ValueError('eta > 0 adds noise: noise_fn is missing.')

  def step(x, scanned):
    row, correction_row, table = scanned
    t = jnp.full(x.shape[:1], row.t, jnp.int32)
    eps_q = eps_fn(x, t, table).astype(jnp.float32)
    eps, residual_variance = eps_q, 0.0
    if correct is not None:
      error = None if error_noise_fn is None else error_noise_fn(row.index)
      eps, residual_variance = correct(eps_q, x, correction_row, error)
    z = None if noise_fn is None else noise_fn(row.index)
    x_prev = ddim.ddim_step(x, eps, row, z, residual_variance)
    if collect is None:
      return x_prev, None
    seen = Step(x, t, eps_q, eps, x_prev, row, table)
    return x_prev, collect(seen)

  x_0, collected = jax.lax.scan(
    step, jnp.asarray(x_T, jnp.float32), (rows, correction_rows, tables)
  )
  return x_0 if collect is None else (x_0, collected)
