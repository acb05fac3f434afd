"""The notebook interface: load, calibrate, sample; arrays in, arrays out.

  import d2dpm_jax as d2

  model = d2.load('mnist')
  quantized = d2.calibrate(model, weight_bits=4, act_bits=8)
  images = d2.sample(quantized, labels=[3] * 8, correction='auto')

It takes the models of configs; docs/extend.md has the way of any other network.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from d2dpm_jax.pipelines import artifacts, setup
from d2dpm_jax.pipelines import calibrate as calibration
from d2dpm_jax.pipelines import sample as sampling
from d2dpm_jax.pipelines.artifacts import Quantized
from d2dpm_jax.pipelines.setup import Model
from d2dpm_jax.runtime import files


def load(
  name: str = 'mnist', overrides: Mapping[str, Any] | None = None
) -> Model:
  """Loads a full-precision model.

  Args:
    name: a file of configs/, with an argument after ':' if it takes one, as
      on the command line: 'mnist', 'mnist:full'.
    overrides: config fields by dotted name, {'sampler.steps': 50}.

  Returns:
    The model, with its config.

  Raises:
    ValueError: no such config or field.
    FileNotFoundError: its weights are not there.
  """
  return setup.load(_config(name, overrides or {}))


def _config(
  name: str, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """That of a file of configs/; see `load`."""
  file, _, arg = name.partition(':')
  module = None
  if file.isidentifier() and importlib.util.find_spec(
    f'd2dpm_jax.configs.{file}'
  ):
    module = importlib.import_module(f'd2dpm_jax.configs.{file}')
  get_config = getattr(module, 'get_config', None)
  if get_config is None:
    raise ValueError(f'There is no config {file!r} in configs/.')
  config = get_config(arg)
  config.lock()
  _override(config, overrides)
  return config


def _override(
  config: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> None:
  try:
    config.update_from_flattened_dict(dict(overrides))
  except (KeyError, TypeError) as error:
    raise ValueError(f'Overrides {dict(overrides)}: {error}') from error


def calibrate(
  model: Model,
  weight_bits: int | None = None,
  act_bits: int | None = None,
  workdir: str | os.PathLike[str] | None = None,
  overrides: Mapping[str, Any] | None = None,
) -> Quantized:
  """Quantizes a model and fits its error model.

  Args:
    model: of `load`.
    weight_bits: 2..8; None takes those of the model's config.
    act_bits: likewise.
    workdir: keeps progress and result there, to go on after an interruption
      and for `load_quantized`; None keeps nothing.
    overrides: config fields by dotted name,
      {'quant.reconstruction.iters': 0}.

  Returns:
    What `sample` takes.

  Raises:
    ValueError: bad settings, or `workdir` was made with others.
  """
  config = model.config.copy_and_resolve_references()
  bits = {'quant.weight_bits': weight_bits, 'quant.act_bits': act_bits}
  given = {name: value for name, value in bits.items() if value is not None}
  _override(config, {**given, **(overrides or {})})
  model = dataclasses.replace(model, config=config)
  with contextlib.ExitStack() as stack:
    if workdir is None:
      workdir = stack.enter_context(tempfile.TemporaryDirectory())
    return calibration.calibrate(model, files.Workdir.at(workdir))


def load_quantized(
  model: Model | str, workdir: str | os.PathLike[str]
) -> Quantized:
  """Reads a calibration that the command line or `calibrate` made.

  Args:
    model: the full-precision model, or the name of a config, as in `load`:
      then its weights are taken from the work directory, and its checkpoint
      need not be there. Bits and calibration settings are always those of the
      work directory.
    workdir: where the calibration is.

  Raises:
    FileNotFoundError: there is no finished calibration.
    ValueError: it was made for another model.
  """
  paths = files.Workdir.at(workdir)
  saved = artifacts.saved_settings(paths)
  source = _config(model, {}) if isinstance(model, str) else model.config
  config = source.copy_and_resolve_references()
  config.quant.update(saved['quant'])
  config.sampler.update(saved['sampler'])
  if isinstance(model, str):
    return artifacts.load_alone(config, paths)
  return artifacts.load(dataclasses.replace(model, config=config), paths)


def sample(
  model: Model | Quantized,
  labels: Sequence[int] | np.ndarray | None = None,
  correction: str = 'auto',
  *,
  channel_wise: bool = False,
  seed: int = 0,
  first_index: int = 0,
  batch_size: int = 64,
) -> np.ndarray:
  """Generates one image per label.

  Args:
    model: quantized, or full precision (then nothing is corrected).
    labels: class of each image; None is one of each class.
    correction: 'none', 's-d2', 'd-d2', 'ptqd', 'mean-only', 'variance-only',
      'auto'.
    channel_wise: error statistics per latent channel; 'auto' knows by itself.
    seed: with the image's number it decides the noise.
    first_index: number of the first image; the others follow.
    batch_size: images per call; has no effect on the images.

  Returns:
    uint8[N, H, W, C].

  Raises:
    ValueError: an unknown correction, or labels that the model does not have.
  """
  if isinstance(model, Model):
    model, correction = artifacts.full_precision(model), 'none'
  if labels is None:
    labels = np.arange(max(1, model.model.num_classes))
  if batch_size < 1 or not len(labels):
    raise ValueError(
      f'{len(labels)} labels in batches of {batch_size}: expected at least 1.'
    )
  return sampling.generate(
    model,
    np.arange(first_index, first_index + len(labels)),
    np.asarray(labels),
    correction=correction,
    channel_wise=channel_wise,
    absorb=False,
    batch_size=batch_size,
    microbatch=model.model.config.sample.microbatch,
    seed=seed,
  )[0]
