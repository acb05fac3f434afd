"""Quantized latent diffusion with dual denoising (D2-DPM) in JAX/Flax."""

from typing import Any

__version__ = '0.1.0'
__all__ = ['calibrate', 'load', 'load_quantized', 'sample']


def __getattr__(name: str) -> Any:
  """Imports the interface at its first use: parts load by themselves."""
  if name in __all__:
    from d2dpm_jax import api

    return getattr(api, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
