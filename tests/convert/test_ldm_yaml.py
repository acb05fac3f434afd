"""The YAML of the LDM authors: any size of the families, nothing else.

The values under test are the arguments that the original constructors got when
the golden arrays were made.
"""

import json

import pytest
import yaml
from d2dpm_jax.convert import ldm_yaml
from ldm_files import family

from d2dpm_jax.models import latent_diffusion

_FAMILIES = ('imagenet', 'lsun_bedrooms', 'lsun_churches')


def _edited(name='imagenet', **changes):
  """The YAML of a family, with 'a.b.c' = value set (None removes)."""
  content = yaml.safe_load(family(name).yaml())
  for path, value in changes.items():
    *keys, last = path.split('__')
    node = content['model']['params']
    for key in keys:
      node = node[key]
    if value is None:
      node.pop(last, None)
    else:
      node[last] = value
  return yaml.safe_dump(content)


@pytest.mark.parametrize('name', _FAMILIES)
def test_sizes_are_those_of_the_original_arguments(name):
  model = latent_diffusion.from_config(ldm_yaml.parse(_edited(name)).model)
  arguments = json.loads(str(family(name).unet['config']))
  assert arguments.pop('in_channels') == model.latent_shape[-1]
  for key, value in arguments.items():
    value = tuple(value) if isinstance(value, list) else value
    assert getattr(model.unet, key) == value, key
  first_stage = json.loads(str(family(name).first_stage['config']))
  coder = first_stage.pop('ddconfig')
  assert coder.pop('double_z') == (model.first_stage.kind == 'kl')
  for key, value in (first_stage | coder).items():
    value = tuple(value) if isinstance(value, list) else value
    assert getattr(model.first_stage, key) == value, key
  assert (model.beta_start, model.beta_end) == (0.0015, 0.0195)
  assert model.image_size == 32
  if name == 'imagenet':
    assert model.cond_stage.num_classes == 11
    assert model.cond_stage.embed_dim == 24
  else:
    assert model.cond_stage is None


def test_defaults_are_those_of_the_original_constructors():
  read = ldm_yaml.parse(
    _edited(
      linear_start=None,
      linear_end=None,
      timesteps=None,
      unet_config__params__channel_mult=None,
      cond_stage_config__params__n_classes=None,
    )
  ).model
  assert read['schedule'] == dict(
    num_timesteps=1000, beta_start=1e-4, beta_end=2e-2
  )
  assert read['unet']['channel_mult'] == (1, 2, 4, 8)
  assert read['cond_stage']['num_classes'] == 1000


def test_head_channels_count_more_than_heads():
  text = _edited(
    'lsun_bedrooms',
    unet_config__params__num_heads=8,
    unet_config__params__num_head_channels=16,
  )
  unet = ldm_yaml.parse(text).model['unet']
  assert (unet['num_heads'], unet['num_head_channels']) == (-1, 16)


def test_scale_factor():
  assert ldm_yaml.parse(_edited()).scale_factor == 1
  assert ldm_yaml.parse(_edited(scale_factor=0.18215)).scale_factor == 0.18215
  assert ldm_yaml.parse(_edited(scale_by_std=True)).scale_factor is None
  # YAML 1.1 takes numbers without a dot for text; OmegaConf does not.
  assert ldm_yaml.parse(_edited(scale_factor='2e-1')).scale_factor == 0.2


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      dict(unet_config__target='ldm.modules.diffusionmodules.other.UNet'),
      'unet_config.target .*other.UNet.*supported are .*openaimodel.UNetModel',
    ),
    (
      dict(first_stage_config__target='ldm.models.autoencoder.VQModel'),
      'first_stage_config.target .*VQModelInterface, .*AutoencoderKL',
    ),
    (
      dict(
        cond_stage_config__target='ldm.modules.encoders.modules.BERTEmbedder'
      ),
      'BERTEmbedder.*__is_unconditional__.*ClassEmbedder',
    ),
    (dict(cond_stage_config='__is_first_stage__'), '__is_first_stage__'),
    (dict(conditioning_key='concat'), "conditioning_key is 'concat'"),
    (dict(conditioning_key=None), 'conditioning_key is None'),
    (dict(parameterization='x0'), "parameterization: 'x0'.*only 'eps' works"),
    (dict(beta_schedule='cosine'), "beta_schedule: 'cosine'"),
    (dict(new_option=3), 'model: new_option: 3 is unknown'),
    (dict(image_size=None), 'image_size is missing'),
    (dict(image_size='64'), "image_size: '64' is not int"),
    (dict(linear_start='${a.b}'), 'linear_start: .* is not float'),
    (dict(unet_config__params__in_channels=6), 'in_channels is 6'),
    (dict(unet_config__params__use_new_attention_order=True), 'use_new_atten'),
    (dict(unet_config__params__channel_mult=[1, 1.5]), 'list of integers'),
    (dict(unet_config__params__num_heads=None), 'neither num_heads nor'),
    (dict(first_stage_config__params__ddconfig__double_z=True), 'double_z'),
    (dict(first_stage_config__params__remap='a.npy'), 'remap'),
    (dict(first_stage_config__params__n_embed=None), 'n_embed is missing'),
    (dict(first_stage_config__params__ddconfig=None), 'ddconfig is None'),
  ],
)
def test_what_is_not_supported_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    ldm_yaml.parse(_edited(**changes))


def test_files_that_are_no_model(tmp_path):
  with pytest.raises(FileNotFoundError, match='ldm_yaml: no file'):
    ldm_yaml.read(tmp_path / 'a.yaml')
  for content, message in (
    (b'a: [', 'not valid YAML'),
    (b'- 1', 'the file is'),
    (b'a: 1', 'model is None'),
    (b'model: {target: torch.nn.Linear}', 'model.target is .*LatentDiffusion'),
    (b'\xff\xfe\x00', 'decode'),
    (b'!!python/object/apply:os.system ["touch ran"]', 'not valid YAML'),
  ):
    path = tmp_path / 'a.yaml'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
      ldm_yaml.read(path)
    assert str(path) in str(caught.value)


def test_small_files_that_describe_huge_values():
  names = 'abcdefghijklmnopqrst'
  lines = ['a: &a [x, x, x, x, x, x, x, x, x]']
  for last, name in zip(names, names[1:], strict=False):
    lines.append(f'{name}: &{name} [{", ".join([f"*{last}"] * 9)}]')
  with pytest.raises(ValueError, match='model is'):
    ldm_yaml.parse('\n'.join([*lines, 'model: *t']))
