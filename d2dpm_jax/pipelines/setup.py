"""What every mode does first: build the model, find its weights, log both."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from d2dpm_jax.models import latent_diffusion
from d2dpm_jax.models.latent_diffusion import LatentDiffusion
from d2dpm_jax.runtime import files

_PRETRAINED = 'pretrained:'


def plain(config: Any) -> Any:
  """ConfigDict -> nested dicts and tuples, as JSON and dataclasses take."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {k: plain(v) for k, v in config.items()}
  if isinstance(config, (list, tuple)):
    return tuple(plain(v) for v in config)
  return config


def begin(config: ml_collections.ConfigDict, paths: files.Workdir) -> None:
  """Makes the work directory and records the resolved config in it."""
  if paths.root.exists() and not paths.root.is_dir():
    raise ValueError(f'--workdir {paths.root} is a file, not a directory.')
  paths.root.mkdir(parents=True, exist_ok=True)
  files.write_json(paths.config, plain(config))


def build(config: ml_collections.ConfigDict) -> LatentDiffusion:
  """The architecture that `config.model` describes."""
  return latent_diffusion.from_config(plain(config.model))
