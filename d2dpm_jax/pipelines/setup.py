"""What every mode does first: build the model, find its weights, log both."""

import dataclasses
import hashlib
import importlib.resources
import logging
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from d2dpm_jax.convert import ldm_yaml
from d2dpm_jax.models import latent_diffusion
from d2dpm_jax.models.latent_diffusion import LatentDiffusion
from d2dpm_jax.pipelines.generation import SamplerSettings
from d2dpm_jax.runtime import files, weights

_log = logging.getLogger(__name__)
_PRETRAINED = 'pretrained:'
_RANDOM = 'random:'


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A full-precision model, ready to run.

  Attributes:
    config: what it was loaded with; the defaults of calibration and sampling.
    ldm: the architecture.
    params: its parameters, see `LatentDiffusion`.
    digest: short hash of the parameters.
  """

  config: ml_collections.ConfigDict
  ldm: LatentDiffusion
  params: Any
  digest: str

  @property
  def sampler(self) -> SamplerSettings:
    return SamplerSettings(**plain(self.config.sampler))

  @property
  def num_classes(self) -> int:
    """Real classes, without the null class; 0 for an unconditional model."""
    return 0 if self.ldm.cond_stage is None else self.ldm.null_label

  def identity(self) -> dict[str, Any]:
    """What artifacts made from this model depend on."""
    architecture = latent_diffusion.to_config(self.ldm)
    return {'model': architecture, 'weights': self.digest}


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
  paths.root.mkdir(parents=True, exist_ok=True)
  files.write_json(paths.config, plain(resolve(config)))


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Takes the model from `checkpoint.ldm_yaml`, if that is given.

  Every mode begins here, so the same flag works in all of them.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it describes a model that this project does not have.
  """
  if not config.checkpoint.ldm_yaml:
    return config
  model = ldm_yaml.read(config.checkpoint.ldm_yaml).model
  model |= {
    'dtype': config.model.dtype,
    'image_size': latent_diffusion.from_config(model).image_size,
  }
  resolved = config.copy_and_resolve_references()
  with resolved.unlocked():
    resolved.model = ml_collections.ConfigDict(model)
  return resolved


def build(config: ml_collections.ConfigDict) -> LatentDiffusion:
  """The architecture that `config.model` describes."""
  return latent_diffusion.from_config(plain(config.model))


def outline(config: ml_collections.ConfigDict) -> Model:
  """The model without weights: `params` holds shapes, `digest` is empty."""
  config = resolve(config)
  ldm = build(config)
  return Model(config, ldm, ldm.shapes(), '')


def load(
  config: ml_collections.ConfigDict, paths: files.Workdir | None = None
) -> Model:
  """Builds the model and reads its weights.

  Args:
    config: an experiment; `checkpoint.path` says where the weights are.
    paths: where `checkpoint.path = ''` looks.

  Raises:
    FileNotFoundError: there are no weights at that place.
    ValueError: they cannot be read or belong to another architecture, the
      sampler asks for what the model cannot do, or the seed is negative.
  """
  config, ldm = checked(config)
  where = config.checkpoint.path
  params, meta, path = _read_weights(where, paths, ldm)
  _check_model(meta, ldm, path)
  check_shapes(params, ldm, path)
  model = Model(config, ldm, jax.tree.map(np.asarray, params), _digest(params))
  count = sum(x.size for x in jax.tree.leaves(params['unet']))
  _log.info('Model: %s, U-Net of %.2f M parameters', path, count / 1e6)
  return model


def checked(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, LatentDiffusion]:
  """The resolved config, and the architecture that it describes.

  Raises:
    ValueError: the sampler asks for what the model cannot do, or the seed is
      negative.
  """
  if config.seed < 0:
    raise ValueError(f'seed is {config.seed}; expected >= 0.')
  config = resolve(config)
  ldm = build(config)
  _check_guidance(config, ldm)
  return config, ldm


def _read_weights(
  where: str, paths: files.Workdir | None, ldm: LatentDiffusion
) -> tuple[Any, dict[str, Any], pathlib.Path]:
  """Parameters, their metadata, and where they were."""
  if where.startswith(_RANDOM):
    seed = where.removeprefix(_RANDOM)
    if not seed.isdecimal():
      raise ValueError(
        f'--config.checkpoint.path={where}: expected a seed, as in random:0.'
      )
    _log.warning('The weights are random (%s): good for timings only.', where)
    return _random_weights(ldm, int(seed)), {}, pathlib.Path(where)
  if where.startswith(_PRETRAINED):
    name = f'{where.removeprefix(_PRETRAINED)}_ldm.safetensors'
    folder = importlib.resources.files('d2dpm_jax') / 'pretrained'
    path = pathlib.Path(str(folder)) / name
    if not path.is_file():
      known = sorted(p.name for p in path.parent.glob('*_ldm.safetensors'))
      raise FileNotFoundError(
        f'--config.checkpoint.path={where}: there is no embedded model of '
        f'that name; there are {known}.'
      )
    return *weights.load_safetensors(path), path
  if not where and paths is None:
    raise ValueError(
      'config.checkpoint.path is not set: name the weights, in a notebook by '
      "load(..., overrides={'checkpoint.path': 'out/imagenet/params'})."
    )
  path = pathlib.Path(where) if where or paths is None else paths.params
  if path.suffix == '.safetensors':
    return *weights.load_safetensors(path), path
  try:
    return *weights.load_tree(path), path
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f'No weights at {path}. Make them with --mode convert, or set '
      '--config.checkpoint.path to a .safetensors file or an Orbax directory, '
      "or to 'pretrained:mnist'."
    ) from error


def _random_weights(ldm: LatentDiffusion, seed: int) -> Any:
  """Parameters without training, none of the kernels zero.

  `LatentDiffusion.init` would leave the last layer of every residual branch,
  and so the output, at zero. Drawn on the host: quick, and the same everywhere.

  Args:
    ldm: the architecture.
    seed: >= 0.

  Returns:
    Normal kernels of variance 1 / fan in and normal embeddings; norms are the
    identity, biases zero, latents unscaled.
  """
  rng = np.random.default_rng(seed)
  shapes = traverse_util.flatten_dict(ldm.shapes(), sep='/')
  params = {}
  for name, wanted in sorted(shapes.items()):
    kind = name.rpartition('/')[2]
    value = np.full(wanted.shape, kind != 'bias', np.float32)
    if kind in ('kernel', 'embedding'):
      value = rng.standard_normal(wanted.shape, np.float32)
    if kind == 'kernel':
      value /= np.float32(np.prod(wanted.shape[:-1]) ** 0.5)
    params[name] = value
  return traverse_util.unflatten_dict(params, sep='/')


def _check_guidance(
  config: ml_collections.ConfigDict, ldm: LatentDiffusion
) -> None:
  scale = config.sampler.guidance_scale
  if ldm.cond_stage is None and scale != 1:
    raise ValueError(
      f'sampler.guidance_scale is {scale}, but this model is unconditional: '
      'there is nothing to guide to. Set --config.sampler.guidance_scale=1.0'
    )


def _check_model(
  meta: Mapping[str, Any], ldm: LatentDiffusion, path: pathlib.Path
) -> None:
  """Raises ValueError where weights say that they are of another model.

  Shapes alone do not tell: heads, norms and noise schedules have none.
  """
  if 'model' not in meta:
    return
  try:
    saved = latent_diffusion.from_config(meta['model'])
  except ValueError as error:
    raise ValueError(f'{path} describes no model of ours: {error}') from error
  different = files.differences(
    latent_diffusion.to_config(saved), latent_diffusion.to_config(ldm)
  )
  if different:
    raise ValueError(
      f'{path} holds the weights of another model: {"; ".join(different)}. '
      'Use the config, and the --config.checkpoint.ldm_yaml, that they were '
      'made with.'
    )


def check_shapes(
  params: Any,
  ldm: LatentDiffusion,
  path: pathlib.Path,
  absent: Collection[str] = (),
) -> None:
  """Raises ValueError naming every parameter that is not as it should be.

  Args:
    params: those of `ldm`.
    ldm: the architecture.
    path: where they are from.
    absent: '/'-joined names of parameters that need not be there.
  """
  wanted = ldm.shapes()
  have = traverse_util.flatten_dict(params, sep='/')
  want = traverse_util.flatten_dict(wanted, sep='/')
  want = {name: x for name, x in want.items() if name not in absent}
  problems = [f'{name} is missing' for name in sorted(set(want) - set(have))]
  problems += [f'{name} is unknown' for name in sorted(set(have) - set(want))]
  problems += [
    f'{name} is {np.shape(have[name])}, not {want[name].shape}'
    for name in sorted(set(have) & set(want))
    if np.shape(have[name]) != want[name].shape
  ]
  if problems:
    shown = '; '.join(problems[:5])
    more = f'; and {len(problems) - 5} more' if len(problems) > 5 else ''
    raise ValueError(f'{path} does not fit config.model: {shown}{more}.')


def _digest(params: Any) -> str:
  digest = hashlib.sha256()
  flat = traverse_util.flatten_dict(params, sep='/')
  for name in sorted(flat):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(flat[name]).data)
  return digest.hexdigest()[:16]
