r"""Class-conditional LDM-4 on ImageNet 256x256.

Expected of 50,000 samples, arXiv:2501.08180 (precision and recall in percent).
Table 1, guidance 3.0, 20 DDIM steps:

                      IS      FID    sFID   prec.  recall
  s3_eta0_20, without more
    full precision    366.03  11.13   7.83  93.93  27.98
    PTQD  W8A8        324.64   8.46  10.12  87.68  34.64
    S-D2  W8A8        332.55   8.11   8.02  87.35  36.55
    D-D2  W8A8        333.89   8.12   7.92  88.56  36.69
    PTQD  W4A8        355.10  10.41   8.45  92.13  27.54
    S-D2  W4A8        358.14   9.75   6.60  92.25  30.21
    D-D2  W4A8        357.57   9.71   6.65  92.22  30.21
  s3_eta1_20
    full precision    361.84  13.83  20.56  92.22  19.58
    PTQD  W8A8        335.70  10.86  15.02  88.44  25.24
    S-D2  W8A8        342.71  10.57  14.81  88.58  26.02
    D-D2  W8A8        343.68  10.58  14.72  88.90  26.03
    PTQD  W4A8        353.57  13.15  17.41  91.09  20.42
    S-D2  W4A8        355.20  12.60  15.80  91.26  20.94
    D-D2  W4A8        356.39  12.65  15.47  91.44  21.36

Tables 2 and 5, guidance 1.5, 250 steps:

  s1.5_eta0_250
    full precision    213.74   3.32   5.23  83.04  53.31
    PTQD  W4A8        162.77   6.46  10.14  73.88  58.10
    D-D2  W4A8        169.03   5.56   9.45  75.20  58.14
  s1.5_eta1_250
    full precision    250.97   3.54   5.07  87.10  49.12
    PTQD  W4A8        153.01   7.90   7.87  71.75  55.15
    S-D2  W4A8        171.49   6.91   7.49  72.82  55.64
    mean only, W4A8   159.30   7.14   7.67
    D-D2  W4A8        172.13   6.81   7.42

Weights: cin256-v2, see docs/convert.md.

  python main.py --config configs/imagenet.py --mode convert \
      --config.checkpoint.torch_path=cin256-v2/model.ckpt
  python main.py --config configs/imagenet.py --mode calibrate
  python main.py --config configs/imagenet.py --mode sample

To compare, see docs/evaluate.md. The settings of a table are words in the
argument, the same in every mode, each with a work directory of its own:

  python main.py --config configs/imagenet.py:paper_w4a8,s3_eta1_20 \
      --mode calibrate --workdir out/imagenet_eta1 \
      --config.checkpoint.path=out/imagenet/params

`paper_w4a8` and `paper_w8a8` quantize as the paper's released scripts do;
without, weights have a range per output channel. All tables at once
(docs/experiment.md):

  python main.py --config configs/imagenet.py:paper_w4a8 --mode experiment \
      --config.experiment.num_images=50000 \
      --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz
"""

import ml_collections
from d2dpm_jax.configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """`arg` is that of `common.base_config`."""
  config = common.base_config(arg, sampler='s3_eta0_20')
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
  config.sample.microbatch = 32  # These models want an accelerator.
  config.evaluate.network = 'inception'
  return config
