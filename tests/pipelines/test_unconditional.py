"""Models without classes, as those of LSUN, through calibrate and sample."""

import jax
import numpy as np
import pytest
from d2dpm_jax.configs import lsun_churches

from d2dpm_jax.pipelines import calibrate, sample, setup
from d2dpm_jax.runtime import files, weights


def _config():
  """configs/lsun_churches.py with every part as small as it can be."""
  config = lsun_churches.get_config()
  config.model.update(image_size=8, latent_shape=(4, 4, 4))
  config.model.unet.update(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
  )
  config.model.first_stage.update(
    resolution=8, ch=32, ch_mult=(1, 1), num_res_blocks=1
  )
  config.sampler.steps = 2
  config.quant.reconstruction.update(iters=0, act_iters=0)
  config.calibration.update(num_samples=12, batch_size=8)
  config.statistics.update(num_samples=12)
  config.sample.update(num_images=5, microbatch=1)
  return config


def test_calibrate_and_sample(tmp_path):
  config, paths = _config(), files.Workdir.at(tmp_path)
  ldm = setup.build(config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: (0.1 * rng.normal(size=p.shape)).astype(np.float32),
    ldm.shapes(),
  )
  params['scale_factor'] = np.float32(0.5)
  weights.save_tree(paths.params, params, {})
  calibrate.run(config, str(tmp_path))
  sample.run(config, str(tmp_path))
  with np.load(paths.samples / 'samples.npz') as file:
    images, labels = file['arr_0'], file['arr_1']
  assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
  assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
  assert not labels.any()
  config.sample.labels = (3,)
  with pytest.raises(ValueError, match='unconditional'):
    sample.run(config, str(tmp_path))
