r"""Unconditional LDM-4 on LSUN-Bedrooms 256x256.

Expected of 50,000 samples of eta1_200, the default (arXiv:2501.08180, Table 3):

                       FID    sFID   precision  recall
  full precision        3.03   7.03  64.65      47.60
  PTQD  W4A8           12.57  16.04  51.31      42.40
  S-D2  W4A8           11.26  15.60
  D-D2  W4A8           10.72  15.23
  PTQD  W8A8            9.16  12.94  51.99      44.32
  S-D2  W8A8            7.69  12.61
  D-D2  W8A8            7.55  12.56

Weights: lsun_bedrooms.zip, see docs/convert.md. Its moving average is used.

  python main.py --config configs/lsun_bedrooms.py --mode convert \
      --config.checkpoint.torch_path=lsun_bedrooms.zip
  python main.py --config configs/lsun_bedrooms.py --mode calibrate
  python main.py --config configs/lsun_bedrooms.py --mode sample

`paper_w4a8` and `paper_w8a8` quantize as the paper's released scripts do:
attention stays in floating point, and weights have one range per tensor. These
words, and those of other samplers, are the argument, the same in every mode,
each with a work directory of its own:

  python main.py --config configs/lsun_bedrooms.py:paper_w4a8,eta0_200 \
      --mode calibrate --workdir out/lsun_bedrooms_eta0 \
      --config.checkpoint.path=out/lsun_bedrooms/params

All corrections at once, judged against statistics of the data set
(docs/experiment.md, docs/evaluate.md):

  python main.py --config configs/lsun_bedrooms.py:paper_w4a8 \
      --mode experiment --config.experiment.num_images=50000 \
      --config.evaluate.reference=lsun_bedrooms.npz
"""

import ml_collections
from d2dpm_jax.configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """`arg` is that of `common.base_config`."""
  config = common.base_config(
    arg,
    sampler='eta1_200',
    paper_float_layers=common.PAPER_FLOAT_LAYERS_LSUN,
  )
  config.model = ml_collections.ConfigDict(
    dict(
      image_size=256,
      latent_shape=(64, 64, 3),
      dtype='float32',  # compute dtype: 'float32' or 'bfloat16'
      schedule=dict(num_timesteps=1000, beta_start=0.0015, beta_end=0.0195),
      unet=dict(
        out_channels=3,
        model_channels=224,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=2,
        attention_resolutions=(8, 4, 2),
        num_head_channels=32,
      ),
      first_stage=common.VQ_F4,
      cond_stage=None,
    )
  )
  config.sample.microbatch = 32  # These models want an accelerator.
  config.evaluate.network = 'inception'
  return config
