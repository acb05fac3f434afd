"""AdaRound: learned rounding of weights, and the settings of reconstruction.

Every weight lies between two grid points. A variable α per weight decides
which one it takes: h(α) in [0, 1] is added to the lower code, and a
regularizer drives h to 0 or 1 while a reconstruction loss picks the side.

Source: arXiv:2004.10568 (AdaRound), Eq. 21-25; constants as in
quant_scripts/quantize_weight*.py of TaylorJocelyn/D2-DPM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.quantization import affine

Array = jax.Array
LOSSES = ('mse', 'fisher_diag')


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a network is reconstructed; the defaults are the paper's.

  The one exception is `per_channel`: the paper's scripts use one grid per
  kernel, which is `per_channel=False`.

  Attributes:
    weight_range: range search of kernels, a key of `affine.RANGE_METHODS`.
    per_channel: one grid per output channel of a kernel, not one per kernel.
    iters: iterations of rounding per unit; 0 leaves rounding to nearest.
    batch_size: samples per iteration of rounding.
    lr: Adam step of α.
    rounding_weight: λ, the weight of the regularizer.
    warmup: share of the iterations without the regularizer.
    beta_start: exponent of the regularizer when it sets in.
    beta_end: exponent at the end; linear in between.
    zeta: upper end of the stretched sigmoid.
    gamma: lower end of the stretched sigmoid.
    p: norm of the reconstruction loss of weights.
    asymmetric: inputs of a unit come from the network quantized so far, not
      from the full-precision one; targets are full-precision in both cases.
    drop_prob: above 0, QDrop: while rounding is learned inputs of layers are
      quantized, but for each element with this probability. 0: inputs of
      layers stay in floating point until weights are done.
    act_range: range search of activations, a key of `affine.RANGE_METHODS`.
    act_init_samples: samples that the range search of activations sees.
    act_iters: iterations of step sizes per unit; 0 keeps the searched ranges.
    act_batch_size: samples per iteration of step sizes.
    act_lr: first Adam step of activation scales; cosine decay to 0.
    act_p: norm of the reconstruction loss of activations.
    act_asymmetric: as `asymmetric`, for step sizes.
    loss: 'mse', or 'fisher_diag': errors are weighted by the squared gradient
      of the network's output error with respect to the unit's output (BRECQ,
      Eq. 10), as it is while the unit's weights alone are quantized.
    chunk: most samples in one forward of a unit over the calibration set.
    host_streams: keeps the activations of the calibration set in host memory
      and runs what lies between the units there; only the data of one unit
      are on the accelerator. For data that exceed the accelerator's memory;
      None leaves it to pipelines to tell, and is False here.
    devices: most local devices that share a batch; None is all. So many are
      used as divide the batch sizes, `chunk` and twice the samples.
    loop: runs iterations in a compiled loop rather than one call each. None:
      on accelerators only, as convolutions in loops are slow on CPUs.
    reports: how often per unit and phase progress is reported.
  """

  weight_range: str = 'mse'
  per_channel: bool = True
  iters: int = 10_000
  batch_size: int = 8
  lr: float = 1e-3
  rounding_weight: float = 0.01
  warmup: float = 0.2
  beta_start: float = 20.0
  beta_end: float = 2.0
  zeta: float = 1.1
  gamma: float = -0.1
  p: float = 2.0
  asymmetric: bool = True
  drop_prob: float = 0.0
  act_range: str = 'mse'
  act_init_samples: int = 32
  act_iters: int = 5_000
  act_batch_size: int = 16
  act_lr: float = 4e-4
  act_p: float = 2.4
  act_asymmetric: bool = False
  loss: str = 'mse'
  chunk: int = 128
  host_streams: bool | None = None
  devices: int | None = None
  loop: bool | None = None
  reports: int = 10

  def __post_init__(self):
    affine.range_method(self.weight_range)
    affine.range_method(self.act_range)
    for name in ('iters', 'act_iters'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} is negative.')
    for name in (
      'batch_size',
      'act_batch_size',
      'act_init_samples',
      'chunk',
      'reports',
    ):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not positive.')
    if self.devices is not None and self.devices < 1:
      raise ValueError(f'devices={self.devices} is not positive.')
    if self.loss not in LOSSES:
      raise ValueError(f'loss={self.loss!r}: expected one of {list(LOSSES)}.')
    for name in ('warmup', 'drop_prob'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not in [0, 1).')
    positive = ('lr', 'act_lr', 'p', 'act_p', 'beta_start', 'beta_end')
    for name in (*positive, 'rounding_weight'):
      value = getattr(self, name)
      least = 0 if name == 'rounding_weight' else np.finfo(float).tiny
      if not least <= value < np.inf:
        raise ValueError(f'{name}={value} is not a positive number.')
    if not self.gamma < 0 < 1 < self.zeta:
      raise ValueError(
        f'gamma={self.gamma} and zeta={self.zeta} must enclose [0, 1].'
      )


def rectified_sigmoid(
  alpha: Array, zeta: Array | float = 1.1, gamma: Array | float = -0.1
) -> Array:
  """h(α) = clip(sigmoid(α)·(ζ - γ) + γ, 0, 1). Equation 23.

  Args:
    alpha: float[...].
    zeta: upper end of the stretched sigmoid, above 1.
    gamma: its lower end, below 0.

  Returns:
    float[...] in [0, 1].
  """
  return jnp.clip(jax.nn.sigmoid(alpha) * (zeta - gamma) + gamma, 0, 1)


def init_alpha(
  kernel: Array,
  q: affine.QParams,
  zeta: Array | float = 1.1,
  gamma: Array | float = -0.1,
) -> Array:
  """α for which h(α) is the fractional part of `kernel / scale`.

  Args:
    kernel: float[..., O].
    q: grid of the kernel.
    zeta: upper end of the stretched sigmoid.
    gamma: lower end of the stretched sigmoid.

  Returns:
    float[..., O]; the soft kernel that it stands for is the kernel itself,
    as far as the kernel lies within the range.
  """
  ratio = kernel / q.scale
  rest = ratio - jnp.floor(ratio)
  return -jnp.log((zeta - gamma) / (rest - gamma) - 1)


def soft_kernel(
  kernel: Array,
  alpha: Array,
  q: affine.QParams,
  zeta: Array | float = 1.1,
  gamma: Array | float = -0.1,
) -> Array:
  """Kernel with codes `floor(w/δ) + h(α) + z`, clipped. Equation 22.

  Args:
    kernel: float[..., O].
    alpha: float[..., O]; gradients flow into it.
    q: grid of the kernel.
    zeta: upper end of the stretched sigmoid.
    gamma: lower end of the stretched sigmoid.

  Returns:
    float[..., O].
  """
  codes = jnp.floor(kernel / q.scale) + rectified_sigmoid(alpha, zeta, gamma)
  codes = jnp.clip(codes + q.zero_point, 0, 2**q.bits - 1)
  return (codes - q.zero_point) * q.scale


def hard_weight(
  kernel: Array, alpha: Array, q: affine.QParams
) -> affine.QWeight:
  """Codes with each weight on the side that α chose.

  Args:
    kernel: float[..., O].
    alpha: float[..., O]; a weight goes up where it is 0 or above.
    q: grid of the kernel.

  Returns:
    Codes uint8[..., O] on the grid `q`.
  """
  codes = jnp.floor(kernel / q.scale) + (alpha >= 0) + q.zero_point
  codes = jnp.clip(codes, 0, 2**q.bits - 1)
  return affine.QWeight(codes.astype(jnp.uint8), q.scale, q.zero_point, q.bits)


def regularizer(
  alphas: Iterable[Array],
  beta: Array | float,
  zeta: Array | float = 1.1,
  gamma: Array | float = -0.1,
) -> Array:
  """Σ 1 - |2h(α) - 1|^β over all weights. Equation 24.

  Args:
    alphas: float[..., O] of each kernel.
    beta: β, the exponent.
    zeta: see `rectified_sigmoid`.
    gamma: see `rectified_sigmoid`.

  Returns:
    float32[]; 0 where every h(α) is 0 or 1.
  """
  total = jnp.float32(0)
  for alpha in alphas:
    h = rectified_sigmoid(alpha, zeta, gamma)
    total += jnp.sum(1 - jnp.abs(2 * h - 1) ** beta)
  return total


def beta_schedule(
  count: Array | int, iters: Array | int, settings: Any
) -> tuple[Array, Array]:
  """Exponent and weight of the regularizer.

  Args:
    count: int[], iteration counted from 1.
    iters: int[], iterations in all.
    settings: `Settings`, or its numbers `learning.Knobs`.

  Returns:
    β: float[]; stays at its start during warm-up, then falls linearly and
      reaches `beta_end` at the last iteration.
    λ: float[]; 0 during warm-up.
  """
  count, iters = jnp.float32(count), jnp.float32(iters)
  start = iters * settings.warmup
  left = 1 - (count - start) / jnp.maximum(iters - start, 1e-9)
  fall = settings.beta_start - settings.beta_end
  beta = settings.beta_end + fall * jnp.clip(left, 0, 1)
  weight = jnp.where(count < start, 0.0, settings.rounding_weight)
  return beta, weight


def lp_loss(
  pred: Array,
  target: Array,
  p: Array | float,
  importance: Array | None = None,
) -> Array:
  """|pred - target|^p summed over channels and averaged over the rest.

  Channels are the last axis, also for tokens [B, L, D]. (The paper's scripts
  sum over axis 1 there, which is tokens: the same loss times L / D.)

  Args:
    pred: float[B, ..., C].
    target: float[B, ..., C].
    p: norm.
    importance: float[B, ..., C], weights of the elements.

  Returns:
    float32[B], of each sample.
  """
  error = jnp.abs(pred.astype(jnp.float32) - target.astype(jnp.float32)) ** p
  if importance is not None:
    error = error * importance
  return jnp.mean(jnp.sum(error, axis=-1), axis=tuple(range(1, error.ndim - 1)))
