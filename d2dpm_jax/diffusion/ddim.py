"""DDIM: which timesteps are visited, their coefficients, and one step.

Symbols are those of arXiv:2010.02502: alpha_bar is the share of signal power
(written alpha there), sigma the standard deviation of the noise that a step
adds. With x of timestep t, its noise estimate eps and z ~ N(0, I),

    x0     = (x - sqrt(1 - alpha_bar) * eps) / sqrt(alpha_bar)
    x_prev = sqrt(alpha_bar_prev) * x0
             + sqrt(1 - alpha_bar_prev - sigma**2) * eps + sigma * z.

Letters: `B` batch, `H W` space, `C` channels, `S` sampling steps, `T` training
timesteps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rows(NamedTuple):
  """Coefficients of all steps, in sampling order: t falls, index rises.

  Arrays of length S; `lax.scan` hands a step the scalars of its row. Everything
  that would cancel in float32 is computed in float64 first.
  """

  index: Any  # int32, 0..S-1: which step this is.
  t: Any  # int32, timestep shown to the network.
  alpha_bar: Any  # float32, of x.
  alpha_bar_prev: Any  # float32, of the x_prev to be made.
  sigma: Any  # float32, noise that the step adds.
  one_minus_alpha_bar: Any  # float32, noise power of x.
  direction_variance: Any  # float32, 1 - alpha_bar_prev - sigma**2.
  eps_coefficient: Any  # float32, c = d x_prev / d eps; negative.


def ddim_timesteps(steps: int, num_timesteps: int) -> np.ndarray:
  """Timesteps of LDM's 'uniform' discretization, ascending.

  They are range(0, T, T // steps) + 1, as make_ddim_timesteps does in
  CompVis/latent-diffusion, ldm/modules/diffusionmodules/util.py. Hence their
  number is `steps` only where `steps` divides T: for T = 1000, 30 gives 31.

  Args:
    steps: how many are wished for.
    num_timesteps: T.

  Returns:
    int64[S], each in 1..T-1.

  Raises:
    ValueError: `steps` is not in 1..T, or the last timestep would be T, which
      does not exist; so it is wherever T // steps divides T - 1 (for T = 1000:
      1000, 300 and some more).
  """
  if not 1 <= steps <= num_timesteps:
    raise ValueError(
      f'{steps} sampling steps: expected 1 to {num_timesteps}, the number of '
      'training timesteps.'
    )
  stride = num_timesteps // steps
  timesteps = np.arange(0, num_timesteps, stride, dtype=np.int64) + 1
  if timesteps[-1] >= num_timesteps:
    raise ValueError(
      f'{steps} sampling steps over {num_timesteps} training timesteps (stride '
      f'{stride}) would begin at timestep {timesteps[-1]}, but the last one is '
      f'{num_timesteps - 1}. Choose a step count whose stride does not divide '
      f'{num_timesteps - 1}, such as a divisor of {num_timesteps} below '
      f'{num_timesteps}.'
    )
  return timesteps


def ddim_rows(alphas_cumprod: np.ndarray, steps: int, eta: float) -> Rows:
  """Tables of a whole trajectory.

  Source: arXiv:2010.02502, Eq. 12 and 16. As in make_ddim_sampling_parameters
  of CompVis/latent-diffusion, the last step does not go to clean data but to
  timestep 0: its alpha_bar_prev is alphas_cumprod[0].

  Args:
    alphas_cumprod: float64[T], as from `schedule.linear_schedule`.
    steps: sampling steps wished for, see `ddim_timesteps`.
    eta: 0 is deterministic, 1 adds as much noise as DDPM.

  Returns:
    Rows of float32[S] and int32[S].

  Raises:
    ValueError: `steps` does not fit T, `eta` is negative, or so large that a
      step would add more noise than its x_prev may hold.
  """
  alphas_cumprod = np.asarray(alphas_cumprod, np.float64)
  if not eta >= 0:
    raise ValueError(f'eta is {eta}: expected >= 0.')
  t = ddim_timesteps(steps, len(alphas_cumprod))
  a = alphas_cumprod[t]
  prev = alphas_cumprod[np.concatenate([[0], t[:-1]])]
  variance = eta**2 * (1 - prev) / (1 - a) * (1 - a / prev)
  direction = 1 - prev - variance
  if direction.min() < 0:
    raise ValueError(
      f'eta is {eta}: at timestep {t[np.argmin(direction)]} the variance of '
      'the added noise would exceed 1 - alpha_bar_prev. Use eta <= 1.'
    )
  c = np.sqrt(direction) - np.sqrt(prev * (1 - a) / a)
  columns = (a, prev, np.sqrt(variance), 1 - a, direction, c)
  return Rows(
    np.arange(len(t), dtype=np.int32),
    t[::-1].astype(np.int32),
    *(column[::-1].astype(np.float32) for column in columns),
  )


def predict_x0(x: jax.Array, eps: jax.Array, row: Rows) -> jax.Array:
  """Clean data that `x` holds if its noise is `eps`; arXiv:2010.02502, Eq. 9.

  Args:
    x: float32[B, H, W, C] at the timestep of `row`.
    eps: float32[B, H, W, C].
    row: scalars of one step.

  Returns:
    float32[B, H, W, C].
  """
  noise = jnp.sqrt(row.one_minus_alpha_bar) * eps
  return (x - noise) / jnp.sqrt(row.alpha_bar)


def ddim_step(
  x: jax.Array,
  eps: jax.Array,
  row: Rows,
  noise: jax.Array | None = None,
  residual_variance: jax.Array | float = 0.0,
) -> jax.Array:
  """Goes from `x` to the next less noisy x_prev.

  An error of variance v in `eps` reaches x_prev as c**2 * v. That much is taken
  out of the noise that the step adds itself, as far as there is any, and goes
  to the direction: sigma'**2 = max(sigma**2 - c**2 * v, 0) replaces sigma**2 in
  both places.

  Source: arXiv:2010.02502, Eq. 12; absorption: arXiv:2501.08180 and
  arXiv:2305.10657. Same numbers as p_sample_ddim in CompVis/latent-diffusion,
  ldm/models/diffusion/ddim.py, and in TaylorJocelyn/D2-DPM, same path.

  Args:
    x: float32[B, H, W, C] at the timestep of `row`.
    eps: float32[B, H, W, C], noise estimate after guidance and correction.
    row: scalars of one step.
    noise: float32[B, H, W, C], standard normal; None adds none, which is right
      for eta = 0 only.
    residual_variance: v, a scalar or float32[1, 1, C]. The Python number 0
      leaves absorption out of the program.

  Returns:
    float32[B, H, W, C].
  """
  sigma, direction = row.sigma, row.direction_variance
  if not (isinstance(residual_variance, int | float) and not residual_variance):
    variance = jnp.square(sigma)
    absorbed = jnp.square(row.eps_coefficient) * residual_variance
    absorbed = jnp.minimum(absorbed, variance)
    sigma, direction = jnp.sqrt(variance - absorbed), direction + absorbed
  x0 = predict_x0(x, eps, row)
  x_prev = jnp.sqrt(row.alpha_bar_prev) * x0 + jnp.sqrt(direction) * eps
  return x_prev if noise is None else x_prev + sigma * noise


def classifier_free(
  network: Callable[..., jax.Array],
  guidance_scale: jax.Array | float | None,
  context: Any = None,
  null_context: Any = None,
) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
  """Makes the `eps_fn` of the sampler: eps_u + s * (eps_c - eps_u).

  Source: arXiv:2207.12598, Eq. 6, as LDM writes it. Both estimates come from
  one call on a doubled batch, in which the two halves of an image stand side by
  side: a batch that is sharded over devices stays where it is.

  Args:
    network: (x [N, H, W, C], t int32[N], context [N, ...], table) -> eps
      [N, H, W, C]; `table` is what the sampler scans over beside the rows.
    guidance_scale: s; None is no guidance, for which s = 1 stands too if it is
      a Python number.
    context: pytree of arrays [B, ...], or None for an unconditional network,
      which is called as it is, whatever the scale.
    null_context: the same pytree for 'no condition', [B, ...] or [1, ...].

  Returns:
    (x [B, H, W, C], t int32[B], table) -> eps [B, H, W, C].

  Raises:
    ValueError: guidance is wanted but `null_context` is missing.
  """
  if isinstance(guidance_scale, int | float) and guidance_scale == 1:
    guidance_scale = None
  if context is None or guidance_scale is None:

    def unguided(x, t, table=None):
      return network(x, t, context, table)

    return unguided
  if null_context is None:
    raise ValueError(f'guidance_scale {guidance_scale} needs a null_context.')

  def pair(null, given):
    null = jnp.broadcast_to(null, given.shape).astype(given.dtype)
    return jnp.stack([null, given], 1).reshape(-1, *given.shape[1:])

  both = jax.tree.map(pair, null_context, context)

  def eps_fn(x, t, table=None):
    eps = network(jnp.repeat(x, 2, 0), jnp.repeat(t, 2, 0), both, table)
    eps = eps.reshape(-1, 2, *eps.shape[1:])
    return eps[:, 0] + guidance_scale * (eps[:, 1] - eps[:, 0])

  return eps_fn
