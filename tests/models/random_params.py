"""Parameters for tests of structure, without compiling an initialization."""

from typing import Any

import jax
import numpy as np


def random_params(module: Any, *args: Any) -> dict[str, Any]:
  """Normal float32 parameters of variance 1/fan_in; none start at zero."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda p: (
      rng.normal(size=p.shape) / max(1, np.prod(p.shape[:-1])) ** 0.5
    ).astype(np.float32),
    shapes,
  )
