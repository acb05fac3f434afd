r"""Class-conditional LDM-4 on ImageNet 256x256, W4A8, 20 DDIM steps, eta 0.

Expected of 50,000 samples at guidance 3.0, arXiv:2501.08180, Table 1:

                       IS      FID    sFID   precision  recall
  full precision       366.03  11.13  7.834  93.93      27.98
  PTQD  W4A8           355.10  10.41  8.45   92.13      27.54
  S-D2  W4A8           358.14   9.75  6.60   92.25      30.21
  D-D2  W4A8           357.57   9.71  6.65   92.22      30.21
  PTQD  W8A8           324.64   8.46 10.12   87.68      34.64
  S-D2  W8A8           332.55   8.11  8.02   87.35      36.55
  D-D2  W8A8           333.89   8.12  7.92   88.56      36.69

Weights: cin256-v2, see docs/convert.md.

  python main.py --config configs/imagenet.py --mode convert \
      --config.checkpoint.torch_path=cin256-v2/model.ckpt
  python main.py --config configs/imagenet.py --mode calibrate
  python main.py --config configs/imagenet.py --mode sample

To compare, see docs/evaluate.md.

`configs/imagenet.py:paper_w4a8` and `:paper_w8a8` quantize as the paper's
released scripts do; without, weights have a range per output channel. Its other
samplers: --config.sampler.eta=1 (Table 1), or --config.sampler.steps=250
--config.sampler.guidance_scale=1.5 (Table 2).
"""

import ml_collections

from configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """`arg` is that of `common.base_config`."""
  config = common.base_config(arg)
  config.model = ml_collections.ConfigDict(
    dict(
      image_size=256,
      latent_shape=(64, 64, 3),
      dtype='float32',  # compute dtype: 'float32' or 'bfloat16'
      schedule=dict(num_timesteps=1000, beta_start=0.0015, beta_end=0.0195),
      unet=dict(
        out_channels=3,
        model_channels=192,
        channel_mult=(1, 2, 3, 5),
        num_res_blocks=2,
        attention_resolutions=(8, 4, 2),
        num_heads=1,
        use_spatial_transformer=True,
        context_dim=512,
      ),
      first_stage=common.VQ_F4,
      cond_stage=dict(num_classes=1001, embed_dim=512),  # 1000: null class
    )
  )
  config.sampler.update(steps=20, eta=0.0, guidance_scale=3.0)
  config.evaluate.network = 'inception'
  return config
