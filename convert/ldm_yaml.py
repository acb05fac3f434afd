"""The YAML of the latent diffusion authors as our model config.

Covers the `LatentDiffusion` models whose U-Net is unconditional or told a
class, in any size; what their PyTorch code would do differently is refused by
name, never passed over.

Source of keys and defaults: CompVis/latent-diffusion, the constructors in
ldm/models/diffusion/ddpm.py, ldm/models/autoencoder.py,
ldm/modules/diffusionmodules/openaimodel.py and model.py, and
ldm/modules/encoders/modules.py.
"""

import dataclasses
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

import yaml

_MODEL = 'ldm.models.diffusion.ddpm.LatentDiffusion'
_UNET = 'ldm.modules.diffusionmodules.openaimodel.UNetModel'
_FIRST_STAGES = {
  'ldm.models.autoencoder.VQModelInterface': 'vq',
  'ldm.models.autoencoder.AutoencoderKL': 'kl',
}
_CLASS_EMBEDDER = 'ldm.modules.encoders.modules.ClassEmbedder'
_UNCONDITIONAL = '__is_unconditional__'

_ANY = object()  # A key that images do not depend on.
_REQUIRED = object()
_SIZES = 'a list of integers'

# Key -> (kind of its value, default).
_UNET_FIELDS = dict(
  model_channels=(int, _REQUIRED),
  out_channels=(int, _REQUIRED),
  num_res_blocks=(int, _REQUIRED),
  attention_resolutions=(_SIZES, _REQUIRED),
  channel_mult=(_SIZES, [1, 2, 4, 8]),
  num_heads=(int, -1),
  num_head_channels=(int, -1),
  use_spatial_transformer=(bool, False),
  transformer_depth=(int, 1),
  context_dim=(int, None),
  use_scale_shift_norm=(bool, False),
  resblock_updown=(bool, False),
)
# Key -> the one value that is supported.
_UNET_FIXED = dict(
  image_size=_ANY,
  dropout=_ANY,
  use_checkpoint=_ANY,
  use_fp16=_ANY,
  legacy=_ANY,  # Another formula for the same number of heads.
  in_channels=_ANY,  # Compared with the latents.
  dims=2,
  conv_resample=True,
  num_classes=None,
  num_heads_upsample=-1,
  use_new_attention_order=False,
  n_embed=None,
)
_CODER_FIELDS = dict(
  ch=(int, _REQUIRED),
  ch_mult=(_SIZES, [1, 2, 4, 8]),
  num_res_blocks=(int, _REQUIRED),
  attn_resolutions=(_SIZES, _REQUIRED),
  in_channels=(int, _REQUIRED),
  out_ch=(int, _REQUIRED),
  resolution=(int, _REQUIRED),
  z_channels=(int, _REQUIRED),
)
_CODER_FIXED = dict(
  dropout=_ANY,
  resamp_with_conv=True,
  give_pre_end=False,
  tanh_out=False,
  use_linear_attn=False,
  attn_type='vanilla',
)
_FIRST_STAGE_FIXED = dict(
  dict.fromkeys(
    [
      'ckpt_path', 'ignore_keys', 'image_key', 'monitor', 'lossconfig',
      'scheduler_config', 'lr_g_factor', 'batch_resize_range',
      'colorize_nlabels', 'use_ema', 'sane_index_shape', 'ddconfig',
    ],
    _ANY,
  ),
  remap=None,
)  # fmt: skip
_DIFFUSION_FIELDS = dict(
  image_size=(int, _REQUIRED),
  channels=(int, 3),
  timesteps=(int, 1000),
  linear_start=(float, 1e-4),
  linear_end=(float, 2e-2),
  scale_factor=(float, 1.0),
  scale_by_std=(bool, False),
)
_DIFFUSION_FIXED = dict(
  dict.fromkeys(
    [
      'first_stage_key', 'cond_stage_key', 'cond_stage_trainable', 'monitor',
      'use_ema', 'log_every_t', 'loss_type', 'clip_denoised', 'v_posterior',
      'original_elbo_weight', 'l_simple_weight', 'scheduler_config',
      'learn_logvar', 'logvar_init', 'cosine_s', 'ckpt_path', 'ignore_keys',
      'load_only_unet', 'concat_mode', 'conditioning_key', 'unet_config',
      'first_stage_config', 'cond_stage_config',
    ],
    _ANY,
  ),
  num_timesteps_cond=1,
  beta_schedule='linear',
  parameterization='eps',
  given_betas=None,
  cond_stage_forward=None,
  use_positional_encodings=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LdmYaml:
  """What a YAML file says.

  Attributes:
    model: a config for `models.latent_diffusion.from_config`.
    scale_factor: for a checkpoint that holds none; None if it has to hold it.
  """

  model: dict[str, Any]
  scale_factor: float | None


def read(path: str | pathlib.Path) -> LdmYaml:
  """Reads a YAML file of the latent diffusion authors.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no YAML, or describes what this project does not have; the
      message names key and value.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'--config.checkpoint.ldm_yaml: no file {path}.')
  try:
    return parse(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def parse(text: str) -> LdmYaml:
  """Reads the text of such a file.

  Raises:
    ValueError: see `read`.
  """
  try:
    content = yaml.safe_load(text)
  except yaml.YAMLError as error:
    raise ValueError(f'not valid YAML: {error}') from error
  section = _mapping(content, 'the file').get('model')
  params = _params(section, 'model', [_MODEL])[1]
  values = _fields(params, 'model', _DIFFUSION_FIELDS, _DIFFUSION_FIXED)
  size, channels = values['image_size'], values['channels']
  cond_stage = _cond_stage(params)
  model = dict(
    latent_shape=(size, size, channels),
    schedule=dict(
      num_timesteps=values['timesteps'],
      beta_start=values['linear_start'],
      beta_end=values['linear_end'],
    ),
    unet=_unet(params, channels),
    first_stage=_first_stage(params),
    cond_stage=cond_stage,
  )
  if values['scale_by_std']:
    return LdmYaml(model, None)
  return LdmYaml(model, values['scale_factor'])


def _unet(params: Mapping[str, Any], channels: int) -> dict[str, Any]:
  where = 'unet_config'
  _, section = _params(params.get(where), where, [_UNET])
  unet = _fields(section, where, _UNET_FIELDS, _UNET_FIXED)
  found = section.get('in_channels')
  if found != channels:
    raise ValueError(
      f'{where}.in_channels is {_short(found)}, the latents have {channels}: '
      'conditions that are concatenated to the latents are not supported.'
    )
  if unet['num_head_channels'] != -1:  # LDM prefers it if both are given.
    unet['num_heads'] = -1
  elif unet['num_heads'] == -1:
    raise ValueError(f'{where}: neither num_heads nor num_head_channels.')
  return unet


def _first_stage(params: Mapping[str, Any]) -> dict[str, Any]:
  where = 'first_stage_config'
  target, section = _params(params.get(where), where, list(_FIRST_STAGES))
  kind = _FIRST_STAGES[target]
  fields: dict[str, Any] = dict(embed_dim=(int, _REQUIRED))
  if kind == 'vq':
    fields['n_embed'] = (int, _REQUIRED)
  own = _fields(section, where, fields, _FIRST_STAGE_FIXED)
  where += '.ddconfig'
  coder = _mapping(section.get('ddconfig'), where)
  fixed = dict(_CODER_FIXED, double_z=kind == 'kl')
  # Absent, `double_z` is True.
  coder = {'double_z': True, **coder}
  return dict(kind=kind, **own, **_fields(coder, where, _CODER_FIELDS, fixed))


def _cond_stage(params: Mapping[str, Any]) -> dict[str, Any] | None:
  where = 'cond_stage_config'
  section = params.get(where)
  if section == _UNCONDITIONAL:
    return None
  key = params.get('conditioning_key')
  if isinstance(section, str):
    raise ValueError(f'{where} is {_short(section)}; {_known_conditions()}.')
  _, section = _params(section, where, [_CLASS_EMBEDDER], _known_conditions())
  if key not in ('crossattn', None) or (
    key is None and params.get('concat_mode', True)
  ):
    raise ValueError(
      f"conditioning_key is {_short(key)}; classes need 'crossattn'."
    )
  fields = dict(n_classes=(int, 1000), embed_dim=(int, _REQUIRED))
  values = _fields(section, where, fields, dict(key=_ANY))
  return dict(num_classes=values['n_classes'], embed_dim=values['embed_dim'])


def _known_conditions() -> str:
  return f'supported are {_UNCONDITIONAL!r} and {_CLASS_EMBEDDER}'


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
  if not isinstance(value, dict):
    raise ValueError(f'{where} is {_short(value)}; expected keys and values.')
  return value


def _params(
  section: Any, where: str, supported: list[str], known: str = ''
) -> tuple[str, Mapping[str, Any]]:
  """Target and params of a section; the target is one of `supported`."""
  section = _mapping(section, where)
  target = section.get('target')
  if not isinstance(target, str) or target not in supported:
    known = known or f'supported are {", ".join(supported)}'
    raise ValueError(f'{where}.target is {_short(target)}; {known}.')
  return target, _mapping(section.get('params'), f'{where}.params')


def _fields(
  section: Mapping[str, Any],
  where: str,
  fields: Mapping[str, tuple[Any, Any]],
  fixed: Mapping[str, Any],
) -> dict[str, Any]:
  """Values of `fields`, checked; any other key has its one supported value."""
  problems = []
  for key, value in section.items():
    if key in fields:
      continue
    if key not in fixed:
      problems.append(f'{key}: {_short(value)} is unknown')
    elif fixed[key] is not _ANY and value != fixed[key]:
      problems.append(
        f'{key}: {_short(value)}, where only {fixed[key]!r} works'
      )
  values = {}
  for key, (kind, default) in fields.items():
    value = section.get(key, default)
    if value is _REQUIRED:
      problems.append(f'{key} is missing')
    elif not (value is default or _is(value, kind)):
      kind = kind if isinstance(kind, str) else kind.__name__
      problems.append(f'{key}: {_short(value)} is not {kind}')
    else:
      values[key] = _convert(value, kind)
  if problems:
    raise ValueError(f'{where}: {"; ".join(problems)}.')
  return values


def _short(value: Any) -> str:
  """A value for a message; YAML can describe huge ones in a few lines."""
  shortener = reprlib.Repr()
  shortener.maxstring = shortener.maxother = 80
  return shortener.repr(value)


def _is(value: Any, kind: Any) -> bool:
  if kind == _SIZES:
    return isinstance(value, list) and all(type(v) is int for v in value)
  if kind is float:  # YAML 1.1 reads 1e-4 as text.
    return type(value) in (int, float) or _is_number(value)
  return type(value) is kind


def _is_number(value: Any) -> bool:
  try:
    return isinstance(value, str) and bool(float(value))
  except ValueError:
    return False


def _convert(value: Any, kind: Any) -> Any:
  if kind == _SIZES:
    return tuple(value)
  return float(value) if kind is float else value
