"""Corrections of a quantized noise estimate, all of one signature.

    correct(eps_q, x, row, noise) -> (eps, residual_variance)

`x` is what the network answered to. `row` is one step of the table that
`correction_rows` makes; `lax.scan` walks it. `residual_variance` is how much
error, at best, is left in eps: the sampler takes its share out of the noise
that it adds itself, and so ends up with the variance that the trajectory should
have. It is the Python number 0 where nothing is to be absorbed, and then costs
nothing.

With mean and variance of the error d given eps_q (`gaussian.Conditional`),
mu = gain * eps_q + bias and v:

    none           eps_q
    s-d2           eps_q - (mu + sqrt(v) * n), n ~ N(0, I); absorbs nothing, or
                   2 v (one v of d, one of n) if `absorb`
    d-d2           eps_q - mu; absorbs v
    ptqd           (eps_q - bias_c) / (1 + k); absorbs the residual's variance
    mean-only      d-d2 without absorption
    variance-only  d-d2 without its mean: eps_q; absorbs v
    auto           subtracts what predicted d best on held-out images, step by
                   step (`selection.HeldOut`): gain and bias as above or a
                   linear map of eps_q and x, and nothing where none did well;
                   absorbs the variance that was left there

Letters: `B` batch, `H W` space, `C` channels, `S` sampling steps; `G` is C, or
1 for what all channels share; `Z` is 2C, the channels of eps_q and those of x.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from d2dpm_jax.denoising import gaussian, selection

Residual = jax.Array | float


class CorrectionRow(NamedTuple):
  """eps = scale * eps_q - shift - noise_std * noise; None where not used.

  As a table the leaves are float32[S, 1, 1, G], as one step's row [1, 1, G]. In
  place of a scale 'auto' has weights, float32[S, Z, C], with which (eps_q, x)
  is subtracted, and its shift is float32[S, H, W, C].
  """

  scale: Any = None
  shift: Any = None
  noise_std: Any = None
  residual_variance: Any = None
  weights: Any = None


def none(
  eps_q: jax.Array,
  x: jax.Array,
  row: CorrectionRow | None,
  noise: jax.Array | None,
) -> tuple[jax.Array, Residual]:
  """The quantized network as it is.

  Arguments and results are those of `s_d2`; only `eps_q` is used.
  """
  del x, row, noise
  return eps_q, 0.0


def s_d2(
  eps_q: jax.Array,
  x: jax.Array,
  row: CorrectionRow,
  noise: jax.Array | None,
) -> tuple[jax.Array, Residual]:
  """Subtracts a sample of the error (S-D2, arXiv:2501.08180).

  Args:
    eps_q: float32[B, H, W, C], after guidance.
    x: not used.
    row: of `correction_rows(model, 's-d2', ...)`.
    noise: float32[B, H, W, C], standard normal, of a stream of its own.

  Returns:
    (float32[B, H, W, C], residual variance).

  Raises:
    ValueError: there is no noise.
  """
  del x
  if noise is None:
    raise ValueError('s-d2 draws a sample of the error: noise is missing.')
  eps = row.scale * eps_q - row.shift - row.noise_std * noise
  absorbed = row.residual_variance
  return eps, 0.0 if absorbed is None else absorbed


def d_d2(
  eps_q: jax.Array,
  x: jax.Array,
  row: CorrectionRow,
  noise: jax.Array | None,
) -> tuple[jax.Array, Residual]:
  """Subtracts the error's mean, absorbs its variance (D-D2, arXiv:2501.08180).

  Args:
    eps_q: float32[B, H, W, C], after guidance.
    x: not used.
    row: of `correction_rows(model, 'd-d2', ...)`.
    noise: not used.

  Returns:
    (float32[B, H, W, C], residual variance float32[1, 1, G]).
  """
  del x, noise
  return row.scale * eps_q - row.shift, row.residual_variance


def ptqd(
  eps_q: jax.Array,
  x: jax.Array,
  row: CorrectionRow,
  noise: jax.Array | None,
) -> tuple[jax.Array, Residual]:
  """The baseline PTQD (arXiv:2305.10657, Sec. 3.2 and 3.3).

  It takes the error for d = k * eps + residual: the residual's mean per channel
  is subtracted, the rest divided by 1 + k. Arguments and results are those of
  `d_d2`.
  """
  del x, noise
  return row.scale * eps_q - row.shift, row.residual_variance


def mean_only(
  eps_q: jax.Array,
  x: jax.Array,
  row: CorrectionRow,
  noise: jax.Array | None,
) -> tuple[jax.Array, Residual]:
  """Ablation: D-D2's mean, with the sampler's noise left alone.

  Arguments and results are those of `d_d2`, the residual variance being 0.
  """
  del x, noise
  return row.scale * eps_q - row.shift, 0.0


def variance_only(
  eps_q: jax.Array,
  x: jax.Array,
  row: CorrectionRow,
  noise: jax.Array | None,
) -> tuple[jax.Array, Residual]:
  """Ablation: D-D2's absorption, with eps_q left alone.

  Arguments and results are those of `d_d2`.
  """
  del x, noise
  return eps_q, row.residual_variance


def auto(
  eps_q: jax.Array,
  x: jax.Array,
  row: CorrectionRow,
  noise: jax.Array | None,
) -> tuple[jax.Array, Residual]:
  """Subtracts what was predicted best on held-out images, step by step.

  Args:
    eps_q: float32[B, H, W, C], after guidance.
    x: float32[B, H, W, C], what the network answered to.
    row: of `correction_rows(held_out, 'auto', ...)`.
    noise: not used.

  Returns:
    (float32[B, H, W, C], residual variance float32[1, 1, C]).
  """
  del noise
  predicted = row.shift
  # A few products per element, fused with what is around them and in full
  # precision: weights of eps_q and of x may be large and cancel.
  channels = [
    part[..., c : c + 1] for part in (eps_q, x) for c in range(x.shape[-1])
  ]
  for channel, weights in zip(channels, row.weights, strict=True):
    predicted = predicted + weights * channel
  return eps_q - predicted, row.residual_variance


CORRECTIONS: dict[str, Callable[..., tuple[jax.Array, Residual]]] = {
  'none': none,
  's-d2': s_d2,
  'd-d2': d_d2,
  'ptqd': ptqd,
  'mean-only': mean_only,
  'variance-only': variance_only,
  'auto': auto,
}

# Those that need noise of their own, from noise.Stream.ERROR.
DRAWS_NOISE = frozenset({'s-d2'})


def _ptqd_table(
  model: gaussian.ErrorModel,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Scale, shift and residual variance of PTQD; float64[S, G].

  k is the slope of d over eps, at least 0; one per tensor or per channel. The
  residual's mean is always per channel, so with one k per tensor the variance
  of these means, channels counted alike, is no longer part of what remains.
  """

  def columns(x):
    return x.reshape(len(x), -1)

  var_eps, cov_eps = columns(model.var_eps), columns(model.cov_eps)
  k = np.divide(cov_eps, var_eps, out=np.zeros_like(cov_eps), where=var_eps > 0)
  k = np.maximum(k, 0.0)
  mean_d, mean_q = model.channel_mean_d, model.channel_mean_q
  bias = mean_d - k * (mean_q - mean_d)
  variance = columns(model.var_d) - 2 * k * cov_eps + k**2 * var_eps
  if not model.channel_wise:
    variance = variance - np.var(bias, axis=1, keepdims=True)
  variance = np.maximum(variance, 0.0)
  return 1 / (1 + k), bias / (1 + k), variance / (1 + k) ** 2


def _auto_rows(held: selection.HeldOut, where: np.ndarray) -> CorrectionRow:
  """Those of the choices at rows `where` of the table."""
  chosen = held.choice()[where]
  weights, bias, variance = (
    x[where, chosen] for x in (held.weights, held.bias, held.left_variance)
  )
  by_place = chosen == selection.CANDIDATES.index('linear+place')
  place = held.place[where] * by_place[:, None, None, None]
  return jax.tree.map(
    np.float32,
    CorrectionRow(
      shift=place + bias[:, None, None],
      residual_variance=variance[:, None, None],
      weights=weights,
    ),
  )


def check(kind: str, absorb: bool = False) -> None:
  """Raises ValueError for an unknown kind, or an option it does not have."""
  if kind not in CORRECTIONS:
    raise ValueError(f'Correction {kind!r}: expected one of {[*CORRECTIONS]}.')
  if absorb and kind != 's-d2':
    raise ValueError(
      f'sample.absorb_variance (absorb) is an option of s-d2, not of {kind}.'
    )


def correction_rows(
  error_model: gaussian.ErrorModel | selection.HeldOut | None,
  kind: str,
  timesteps: Sequence[int] | np.ndarray,
  absorb: bool = False,
) -> CorrectionRow | None:
  """Makes the table of a correction, computed in float64.

  Args:
    error_model: may be None for the kind 'none'; HeldOut for 'auto'.
    kind: a key of CORRECTIONS.
    timesteps: int[S] in sampling order, as in `Rows.t`.
    absorb: for 's-d2': take 2 v out of the sampler's noise. This is commented
      out in TaylorJocelyn/D2-DPM, and so off by default.

  Returns:
    CorrectionRow as a table, or None for 'none'.

  Raises:
    ValueError: the kind is unknown, `absorb` is set for another kind than
      's-d2', there is no error model or not the right one, or a timestep has
      no statistics.
  """
  check(kind, absorb)
  if kind == 'none':
    return None
  if error_model is None:
    raise ValueError(f'Correction {kind!r} needs an error model.')
  if isinstance(error_model, selection.HeldOut) != (kind == 'auto'):
    raise ValueError(f'Correction {kind!r} cannot use the {error_model.NAME}.')
  where = error_model.rows_of(timesteps)
  if isinstance(error_model, selection.HeldOut):
    return _auto_rows(error_model, where)

  def table(x):
    x = x[where].reshape(len(where), 1, 1, -1)
    return x.astype(np.float32)

  def affine(scale, shift, variance):
    return CorrectionRow(
      table(scale), table(shift), residual_variance=table(variance)
    )

  if kind == 'ptqd':
    return affine(*_ptqd_table(error_model))
  gain, bias, variance = error_model.conditional()
  row = CorrectionRow(table(1 - gain), table(bias))
  if kind == 's-d2':
    absorbed = table(2 * variance) if absorb else None
    return row._replace(
      noise_std=table(np.sqrt(variance)), residual_variance=absorbed
    )
  if kind == 'd-d2':
    return row._replace(residual_variance=table(variance))
  if kind == 'variance-only':
    return CorrectionRow(residual_variance=table(variance))
  return row
