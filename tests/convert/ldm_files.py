"""Writes checkpoints and YAML as the latent diffusion authors do, for tests.

Sizes and weights are those of tests/golden/ldm_*.npz, which hold what the
original PyTorch modules compute; no PyTorch is needed here.
"""

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import torch_files
import yaml
from d2dpm_jax.convert.torch_reader import TensorRef

from d2dpm_jax.diffusion import schedule

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
_spec = importlib.util.spec_from_file_location(
  'make_ldm', GOLDEN / 'make_ldm.py'
)
_make_ldm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_make_ldm)

BETAS = (0.0015, 0.0195)
_KINDS = {
  'float32': 'Float',
  'float16': 'Half',
  'int32': 'Int',
  'int64': 'Long',
}


@dataclasses.dataclass
class Family:
  """A small model of one of the three published kinds.

  Attributes:
    unet: arrays of ldm_unet_*.npz.
    first_stage: arrays of ldm_first_stage_*.npz.
    classes: arrays of ldm_class_embedder.npz, None if unconditional.
    latent_shape: h, w, c.
  """

  unet: dict
  first_stage: dict
  classes: dict | None
  latent_shape: tuple[int, int, int]

  def tensors(self, ema=False, scale_factor=None, schedule_of=BETAS):
    """The state dict: PyTorch name -> array.

    Args:
      ema: the U-Net's golden weights are the averages, the raw ones others.
      scale_factor: is there if given.
      schedule_of: the betas whose schedule is there, None for no schedule.
    """
    unet = _weights(self.unet)
    out = {}
    if schedule_of:
      alphas = schedule.linear_schedule(1000, *schedule_of)
      out['betas'] = (1 - alphas / np.append(1, alphas[:-1])).astype(np.float32)
      out['alphas_cumprod'] = alphas.astype(np.float32)
      out['sqrt_recipm1_alphas_cumprod'] = np.float32((1 / alphas - 1) ** 0.5)
    out |= {
      f'model.diffusion_model.{k}': 2 * v + 1 if ema else v
      for k, v in unet.items()
    }
    if ema:
      out['model_ema.decay'] = np.float32(0.9999)
      out['model_ema.num_updates'] = np.int32(1000)
      out |= {
        f'model_ema.diffusion_model{k.replace(".", "")}': v
        for k, v in unet.items()
      }
    if scale_factor is not None:
      out['scale_factor'] = np.float32(scale_factor)
    for name, arrays in (
      ('first_stage_model', self.first_stage),
      ('cond_stage_model', self.classes),
    ):
      out |= {f'{name}.{k}': v for k, v in _weights(arrays or {}).items()}
    return out

  def yaml(self, **changes):
    """The text of its YAML, from the arguments that the goldens were made with.

    Args:
      **changes: of model.params.
    """
    size, _, channels = self.latent_shape
    first_stage = json.loads(str(self.first_stage['config']))
    vq = 'n_embed' in first_stage
    condition = '__is_unconditional__'
    if self.classes:
      condition = dict(
        target='ldm.modules.encoders.modules.ClassEmbedder',
        params=dict(key='label', **json.loads(str(self.classes['config']))),
      )
    params = dict(
      linear_start=BETAS[0],
      linear_end=BETAS[1],
      num_timesteps_cond=1,
      timesteps=1000,
      first_stage_key='image',
      image_size=size,
      channels=channels,
      monitor='val/loss',
      unet_config=dict(
        target='ldm.modules.diffusionmodules.openaimodel.UNetModel',
        params=dict(image_size=size, **json.loads(str(self.unet['config']))),
      ),
      first_stage_config=dict(
        target='ldm.models.autoencoder.'
        + ('VQModelInterface' if vq else 'AutoencoderKL'),
        params=dict(**first_stage, lossconfig=dict(target='torch.nn.Identity')),
      ),
      cond_stage_config=condition,
    )
    if self.classes:
      params['conditioning_key'] = 'crossattn'
    target = 'ldm.models.diffusion.ddpm.LatentDiffusion'
    model = dict(target=target, params={**params, **changes})
    return yaml.safe_dump(dict(model=model))


def _weights(arrays):
  tensors = json.loads(str(arrays['tensors'])) if arrays else []
  return {n: _make_ldm.weight(n, tuple(shape)) for n, shape in tensors}


def family(name):
  """'imagenet', 'lsun_bedrooms' or 'lsun_churches' in small."""
  kl = name == 'lsun_churches'
  return Family(
    _load(f'ldm_unet_{name}'),
    _load('ldm_first_stage_kl' if kl else 'ldm_first_stage_vq'),
    _load('ldm_class_embedder') if name == 'imagenet' else None,
    (4, 4, 4) if kl else (8, 8, 3),
  )


def _load(name):
  with np.load(GOLDEN / f'{name}.npz') as file:
    return dict(file.items())


def refs(tensors):
  """Tensors as a reader gives them, without a file."""
  arrays = {name: np.asarray(array) for name, array in tensors.items()}
  return {
    name: TensorRef(array.shape, array.dtype, array.copy)
    for name, array in arrays.items()
  }


def write_checkpoint(path, tensors, **contents):
  """Writes what torch.save does of a Lightning checkpoint."""
  items, storages = {}, {}
  for key, (name, array) in enumerate(tensors.items()):
    array = np.asarray(array)
    steps = (np.array(array.strides, int) // array.itemsize).tolist()
    kind = f'torch.{_KINDS[array.dtype.name]}Storage'
    items[name] = torch_files.push_tensor(
      torch_files.push_storage(str(key), array.size, kind),
      shape=array.shape,
      stride=tuple(steps),
    )
    storages[str(key)] = array.tobytes()
  callback = torch_files.push_global(
    'pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint'
  )
  contents = {'epoch': 7, 'global_step': 1234, **contents}
  push = torch_files.push
  pickled = b'\x80\x02}(' + push('state_dict') + b'}('
  pickled += b''.join(push(name) + item for name, item in items.items()) + b'u'
  pickled += b''.join(push(k) + push(v) for k, v in contents.items())
  pickled += push('callbacks') + b'}' + callback + b'}su.'
  return torch_files.write_zip(path, pickled, storages)
