"""Quantized latent diffusion with dual denoising (D2-DPM) in JAX/Flax."""

import os
from typing import Any

# A wheel has `configs` and `convert` in here; in a checkout they lie beside.
if not os.path.isdir(os.path.join(__path__[0], 'configs')):
  __path__.append(os.path.dirname(__path__[0]))

__version__ = '0.1.0'
__all__ = ['calibrate', 'load', 'load_quantized', 'sample']


def __getattr__(name: str) -> Any:
  """Imports the interface at its first use: parts load by themselves."""
  if name in __all__:
    from d2dpm_jax import api

    return getattr(api, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
