"""U-Net, first stage and condition as one model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from d2dpm_jax.models.autoencoder import Autoencoder
from d2dpm_jax.models.conditioning import ClassEmbedder
from d2dpm_jax.models.unet import UNet

Params = Mapping[str, Any]

_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
  """Architecture of a latent diffusion model; parameters travel beside it.

  `params` has one entry per part, `unet`, `first_stage` and `cond_stage` (empty
  for an unconditional model), each what Flax has under 'params', and
  `scale_factor`, float32[], by which latents are multiplied before diffusion.

  Raises:
    ValueError: latent and image sizes or channels do not fit the parts.
  """

  unet: UNet
  first_stage: Autoencoder
  cond_stage: ClassEmbedder | None
  latent_shape: tuple[int, int, int]  # h, w, c
  image_size: int
  num_timesteps: int = 1000
  beta_start: float = 0.0015
  beta_end: float = 0.0195

  def __post_init__(self):
    h, w, c = self.latent_shape
    size = h * self.first_stage.downsampling
    if h != w or size != self.image_size:
      raise ValueError(
        f'latents {self.latent_shape} decode to {size} pixels, not to '
        f'{self.image_size} x {self.image_size}.'
      )
    if not c == self.unet.out_channels == self.first_stage.embed_dim:
      raise ValueError(
        f'latents have {c} channels, the U-Net predicts '
        f'{self.unet.out_channels}, the first stage has '
        f'{self.first_stage.embed_dim}.'
      )
    context_dim = self.cond_stage and self.cond_stage.embed_dim
    if context_dim != self.unet.context_dim:
      raise ValueError(
        f'the U-Net has context_dim {self.unet.context_dim}, the condition '
        f'has width {context_dim}.'
      )

  @property
  def null_label(self) -> int:
    """The label that means 'no class' in classifier-free guidance.

    Raises:
      ValueError: the model is unconditional.
    """
    return self._condition().num_classes - 1

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters."""
    unet_key, first_stage_key, cond_stage_key = jax.random.split(key, 3)
    labels = jnp.zeros([1], jnp.int32)
    cond_stage = {}
    context = None
    if self.cond_stage is not None:
      cond_stage = self.cond_stage.init(cond_stage_key, labels)['params']
      context = jnp.zeros([1, 1, self.cond_stage.embed_dim])
    latents = jnp.zeros([1, *self.latent_shape])
    images = jnp.zeros(
      [1, self.image_size, self.image_size, self.first_stage.in_channels]
    )
    # Under jit the forward pass itself is dead code and never runs.
    return {
      'unet': jax.jit(self.unet.init)(unet_key, latents, labels, context)[
        'params'
      ],
      'first_stage': jax.jit(self.first_stage.init)(first_stage_key, images)[
        'params'
      ],
      'cond_stage': cond_stage,
      'scale_factor': jnp.ones([], jnp.float32),
    }

  def shapes(self) -> dict[str, Any]:
    """Of what `init` returns, with dtypes; traced once for all equal models."""
    return jax.tree.map(lambda leaf: leaf, _shapes(self))

  def eps(
    self,
    params: Params,
    x: jax.Array,
    t: jax.Array,
    context: jax.Array | None = None,
  ) -> jax.Array:
    """Predicted noise, of scaled latents; see `UNet.__call__`.

    Args:
      params: of all three networks.
      x: float32[B, H, W, C].
      t: int32[B], 0..999.
      context: float32[B, L, D] of `context`, or None.

    Returns:
      float32[B, H, W, C].
    """
    return _apply(self.unet, params['unet'], x, t, context)

  def context(self, params: Params, labels: jax.Array) -> jax.Array:
    """Maps labels int[B] to what `eps` takes, float32[B, 1, D].

    Raises:
      ValueError: the model is unconditional.
    """
    return _apply(self._condition(), params['cond_stage'], labels)

  def decode(self, params: Params, z: jax.Array) -> jax.Array:
    """Latents after scaling, float[B, h, w, c], to float32 images, ~[-1, 1]."""
    z = z / params['scale_factor']
    return _apply(self.first_stage, params['first_stage'], z, method='decode')

  def encode(self, params: Params, images: jax.Array) -> jax.Array:
    """Images in [-1, 1], float[B, H, W, C], to float32 latents, scaled."""
    z = _apply(self.first_stage, params['first_stage'], images, method='encode')
    return z * params['scale_factor']

  def _condition(self) -> ClassEmbedder:
    if self.cond_stage is None:
      raise ValueError('This model is unconditional: it has no labels.')
    return self.cond_stage


@functools.cache
def _shapes(ldm: LatentDiffusion) -> dict[str, Any]:
  return jax.eval_shape(ldm.init, jax.random.key(0))


def _apply(module: nn.Module, params: Params, *args, **kwargs) -> jax.Array:
  return cast(jax.Array, module.apply({'params': params}, *args, **kwargs))


def from_config(config: Mapping[str, Any]) -> LatentDiffusion:
  """Builds the model that a configuration describes.

  Args:
    config: nested mapping with the keys
      unet: fields of `UNet`.
      first_stage: fields of `Autoencoder`.
      cond_stage: fields of `ClassEmbedder`, or None.
      latent_shape: h, w, c.
      image_size: pixels; optional, follows from `latent_shape`.
      schedule: num_timesteps, beta_start, beta_end; optional.
      dtype: 'float32' (default) or 'bfloat16', what layers compute in.

  Returns:
    The model; lists have become tuples, so that it is hashable.

  Raises:
    ValueError: unknown or missing keys, all of them named, or bad values.
  """
  allowed = {
    'unet', 'first_stage', 'cond_stage', 'latent_shape', 'image_size',
    'schedule', 'dtype',
  }  # fmt: skip
  required = {'unet', 'first_stage', 'cond_stage', 'latent_shape'}
  _check_keys('model', config, allowed, required)
  values = dict(config)
  dtype = values.get('dtype', 'float32')
  if dtype not in _DTYPES:
    raise ValueError(f'dtype {dtype!r}: expected one of {sorted(_DTYPES)}.')
  schedule = dict(values.get('schedule') or {})
  _check_keys(
    'schedule', schedule, {'num_timesteps', 'beta_start', 'beta_end'}, set()
  )
  first_stage = _build(
    'first_stage', Autoencoder, values['first_stage'], dtype=_DTYPES[dtype]
  )
  latent_shape = tuple(values['latent_shape'])
  cond_stage = values['cond_stage']
  if cond_stage is not None:
    cond_stage = _build('cond_stage', ClassEmbedder, cond_stage)
  return LatentDiffusion(
    unet=_build('unet', UNet, values['unet'], dtype=_DTYPES[dtype]),
    first_stage=first_stage,
    cond_stage=cond_stage,
    latent_shape=latent_shape,
    image_size=values.get('image_size')
    or latent_shape[0] * first_stage.downsampling,
    **schedule,
  )


def to_config(ldm: LatentDiffusion) -> dict[str, Any]:
  """The architecture as nested dicts; what `from_config` takes, but `dtype`.

  Every field is there, also those that a config may leave out, so that equal
  models have equal descriptions.
  """
  return {
    'unet': _fields(ldm.unet),
    'first_stage': _fields(ldm.first_stage),
    'cond_stage': ldm.cond_stage and _fields(ldm.cond_stage),
    'latent_shape': ldm.latent_shape,
    'image_size': ldm.image_size,
    'schedule': {
      'num_timesteps': ldm.num_timesteps,
      'beta_start': ldm.beta_start,
      'beta_end': ldm.beta_end,
    },
  }


def _fields(module: nn.Module) -> dict[str, Any]:
  """Fields of a module but those of Linen and the compute dtype."""
  names = [f.name for f in dataclasses.fields(module)]
  return {
    name: getattr(module, name)
    for name in names
    if name not in ('parent', 'name', 'dtype')
  }


def _build(
  where: str, cls: type[nn.Module], config: Mapping[str, Any], **extra: Any
) -> Any:
  """Makes a module from a mapping of its own fields."""
  skip = {'parent', 'name', *extra}
  fields = [f for f in dataclasses.fields(cls) if f.name not in skip]
  required = {
    f.name
    for f in fields
    if f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  }
  _check_keys(where, config, {f.name for f in fields}, required)
  values = {
    k: tuple(v) if isinstance(v, list) else v for k, v in dict(config).items()
  }
  return cls(**values, **extra)


def _check_keys(
  where: str, config: Mapping[str, Any], allowed: set[str], required: set[str]
) -> None:
  unknown = sorted(set(config.keys()) - allowed)
  missing = sorted(required - set(config.keys()))
  if unknown or missing:
    raise ValueError(
      f'{where}: unknown keys {unknown}, missing keys {missing}; '
      f'known are {sorted(allowed)}.'
    )
