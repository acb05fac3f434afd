r"""Unconditional LDM-8 on LSUN-Churches 256x256.

Expected of 50,000 samples of eta0_200, the default (arXiv:2501.08180, Table 4):

                       FID    sFID   precision  recall
  full precision        4.17  12.91  66.00      51.46
  PTQD  W4A8           12.96  15.42  50.23      52.80
  S-D2  W4A8           11.18  15.14
  D-D2  W4A8           11.18  15.11
  PTQD  W8A8            8.31  12.97  56.57      54.15
  S-D2  W8A8            7.82  12.52
  D-D2  W8A8            7.83  12.51

Weights: lsun_churches.zip, see docs/convert.md. Its moving average is used, and
its scale_factor: latents are divided by it before decoding.

  python main.py --config configs/lsun_churches.py --mode convert \
      --config.checkpoint.torch_path=lsun_churches.zip
  python main.py --config configs/lsun_churches.py --mode calibrate
  python main.py --config configs/lsun_churches.py --mode sample

`paper_w4a8` and `paper_w8a8` quantize as the paper's released scripts do:
attention stays in floating point, and weights have one range per tensor. These
words, and those of other samplers, are the argument, the same in every mode,
each with a work directory of its own:

  python main.py --config configs/lsun_churches.py:paper_w4a8,eta1_200 \
      --mode calibrate --workdir out/lsun_churches_eta1 \
      --config.checkpoint.path=out/lsun_churches/params

All corrections at once, judged against statistics of the data set
(docs/experiment.md, docs/evaluate.md):

  python main.py --config configs/lsun_churches.py:paper_w4a8 \
      --mode experiment --config.experiment.num_images=50000 \
      --config.evaluate.reference=lsun_churches.npz
"""

import ml_collections
from d2dpm_jax.configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """`arg` is that of `common.base_config`."""
  config = common.base_config(
    arg,
    sampler='eta0_200',
    paper_float_layers=common.PAPER_FLOAT_LAYERS_LSUN,
  )
  # Trained with latents scaled to variance 1; the checkpoint knows by how much.
  config.checkpoint.scale_factor = None
  config.model = ml_collections.ConfigDict(
    dict(
      image_size=256,
      latent_shape=(32, 32, 4),
      dtype='float32',  # compute dtype: 'float32' or 'bfloat16'
      schedule=dict(num_timesteps=1000, beta_start=0.0015, beta_end=0.0155),
      unet=dict(
        out_channels=4,
        model_channels=192,
        channel_mult=(1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(1, 2, 4, 8),
        num_heads=8,
        use_scale_shift_norm=True,  # the timestep scales and shifts
        resblock_updown=True,  # residual blocks change resolution
      ),
      first_stage=dict(  # KL-f8
        kind='kl',
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        z_channels=4,
        embed_dim=4,
      ),
      cond_stage=None,
    )
  )
  config.sample.microbatch = 32  # These models want an accelerator.
  config.evaluate.network = 'inception'
  return config
