"""Everything that corrections know of the errors of one quantized network.

`fit` makes it of points, which may stream by; `fit_arrays` of arrays in memory.

Letters: `S` sampling steps, `N` images, `H W` space, `C` channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from d2dpm_jax.denoising import correction as corrections
from d2dpm_jax.denoising import gaussian, selection

# Timestep -> chunks (eps_q, eps, x_t), each float[N, H, W, C].
PointsAt = Callable[[int], Iterable[tuple[Any, Any, Any]]]
GROUPS = ('tensor', 'channel')


class Statistics(NamedTuple):
  """What is known of the errors of all sampling steps.

  Attributes:
    error_models: 'tensor' and 'channel' -> joint Gaussians.
    held_out: how predictions did on images that they were not fitted on.
  """

  error_models: Mapping[str, gaussian.ErrorModel]
  held_out: selection.HeldOut

  def rows(
    self,
    kind: str,
    timesteps: Sequence[int] | np.ndarray,
    channel_wise: bool = False,
    absorb: bool = False,
  ) -> corrections.CorrectionRow | None:
    """The table of a correction, for `correction_rows` of the sampler.

    Args:
      kind: a key of `correction.CORRECTIONS`.
      timesteps: int[S] in sampling order, as in `Rows.t`.
      channel_wise: one Gaussian per channel; 'auto' knows by itself.
      absorb: see `correction.correction_rows`.

    Returns:
      As `correction.correction_rows`.

    Raises:
      ValueError: as `correction.correction_rows`.
    """
    group = 'channel' if channel_wise else 'tensor'
    found = self.held_out if kind == 'auto' else self.error_models[group]
    return corrections.correction_rows(found, kind, timesteps, absorb)


def fit(
  timesteps: Sequence[int],
  points: PointsAt,
  *,
  outlier_std: float = 4.0,
  folds: int = 4,
  settings: Mapping[str, Any] | None = None,
) -> Statistics:
  """Fits the Gaussians and tries the predictions, timestep by timestep.

  Args:
    timesteps: S of them, distinct.
    points: called with a timestep, several times and from several threads;
      yields chunks of images, in the same order each time.
    outlier_std: see `gaussian.fit_timestep`.
    folds: see `selection.evaluate`.
    settings: what the result depends on, see `gaussian.ErrorModel`.

  Returns:
    Statistics of all timesteps.

  Raises:
    ValueError: as `gaussian.fit` and `selection.evaluate`.
  """
  error_models = {
    group: gaussian.fit(
      timesteps, points, group == 'channel', outlier_std, settings
    )
    for group in GROUPS
  }
  held_out = selection.evaluate(
    error_models['tensor'],
    error_models['channel'],
    points,
    folds,
    outlier_std,
  )
  return Statistics(error_models, held_out)


def fit_arrays(
  timesteps: Sequence[int] | np.ndarray,
  x: Any,
  eps: Any,
  eps_q: Any,
  *,
  outlier_std: float = 4.0,
  folds: int = 4,
  settings: Mapping[str, Any] | None = None,
) -> Statistics:
  """`fit` of arrays, as `collect` of the sampler stacks them.

  Args:
    timesteps: int[S], as in `Rows.t`.
    x: float[S, N, H, W, C], what both networks answered to.
    eps: the same shape, of the full-precision network.
    eps_q: the same shape, of the quantized network.
    outlier_std: see `gaussian.fit_timestep`.
    folds: see `selection.evaluate`.
    settings: what the result depends on, see `gaussian.ErrorModel`.

  Returns:
    Statistics of all timesteps.

  Raises:
    ValueError: the arrays differ in shape, or have not one entry per timestep;
      or as `fit`.
  """
  steps = [int(t) for t in np.asarray(timesteps)]
  arrays = [np.asarray(array) for array in (eps_q, eps, x)]
  shapes = [array.shape for array in arrays]
  if len(set(shapes)) > 1 or len(shapes[0]) != 5 or shapes[0][0] != len(steps):
    raise ValueError(
      f'eps_q, eps and x have the shapes {shapes}: expected one shape '
      f'[{len(steps)}, N, H, W, C].'
    )
  row = {t: number for number, t in enumerate(steps)}

  def points(t: int) -> Iterator[tuple[Any, Any, Any]]:
    eps_q, eps, x = (array[row[t]] for array in arrays)
    yield eps_q, eps, x

  return fit(
    steps, points, outlier_std=outlier_std, folds=folds, settings=settings
  )
