"""How much of the data is left at each training timestep."""

import numpy as np


def linear_schedule(
  num_timesteps: int, beta_start: float, beta_end: float
) -> np.ndarray:
  """Products of (1 - beta) of the schedule that LDM calls 'linear'.

  It is linear in the square roots: betas are linspace(sqrt(beta_start),
  sqrt(beta_end), T)**2. Same numbers as make_beta_schedule('linear') in
  CompVis/latent-diffusion, ldm/modules/diffusionmodules/util.py.

  Args:
    num_timesteps: T, the number of training timesteps.
    beta_start: variance added at timestep 0.
    beta_end: variance added at timestep T - 1.

  Returns:
    float64[T], alpha_bar: decreasing, in (0, 1).

  Raises:
    ValueError: fewer than 1 timestep, or not 0 < beta_start <= beta_end < 1.
  """
  if num_timesteps < 1:
    raise ValueError(f'num_timesteps is {num_timesteps}: expected >= 1.')
  if not 0.0 < beta_start <= beta_end < 1.0:
    raise ValueError(
      f'beta_start {beta_start} and beta_end {beta_end}: expected '
      '0 < beta_start <= beta_end < 1.'
    )
  roots = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps)
  return np.cumprod(1.0 - np.square(roots))
