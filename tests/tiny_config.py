"""configs/mnist.py with every part as small as it can be, for tests."""

import pathlib

import jax
import ml_collections
import numpy as np
from d2dpm_jax.configs import mnist


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """'' quantizes as configs/mnist.py does, 'few' only three residual blocks.

  Weights come from `write_weights`, and `--config.checkpoint.path`.
  """
  if arg not in ('', 'few'):
    raise ValueError(f'Config argument {arg!r}: expected "" or "few".')
  config = mnist.get_config()
  config.checkpoint.path = ''
  # One level: 4x4 latents, 8x8 images, one attention block in the middle.
  config.model.update(image_size=8, latent_shape=(4, 4, 3))
  config.model.unet.update(
    model_channels=32,
    channel_mult=(1,),
    attention_resolutions=(),
    context_dim=16,
  )
  config.model.first_stage.update(resolution=8, ch_mult=(1, 1), n_embed=64)
  config.model.cond_stage.update(num_classes=5, embed_dim=16)
  config.sampler.steps = 4
  config.quant.reconstruction.update(
    iters=4, act_iters=4, batch_size=8, devices=1
  )
  config.calibration.update(num_samples=12, batch_size=8)
  config.statistics.update(num_samples=12, num_trials=3)
  config.sample.update(num_images=10, microbatch=2)
  if arg == 'few':
    # Residual blocks of one shape: few programs to compile.
    config.quant.float_layers = r'(?!(middle_block_[02]|input_blocks_1_0)/).*'
  return config


def write_weights(path: pathlib.Path) -> None:
  """Saves random weights, none of them zero."""
  from d2dpm_jax.pipelines import setup
  from d2dpm_jax.runtime import weights

  shapes = setup.build(get_config()).shapes()
  rng = np.random.default_rng(0)

  def draw(keys, shape):
    fan_in = max(1, np.prod(shape.shape[:-1]))
    value = rng.normal(size=shape.shape) / fan_in**0.5
    name = jax.tree_util.keystr(keys, simple=True, separator='/')
    if name.endswith('scale'):
      value = 1 + 0.1 * value
    return value.astype(np.float32)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  weights.save_safetensors(
    path, {**params, 'scale_factor': np.float32(1.5)}, {}
  )
