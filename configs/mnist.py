r"""Class-conditional LDM on MNIST, 32x32, VQ-f4: the embedded default.

Small enough for two CPU cores, built of the same parts as LDM-4 on ImageNet
(configs/imagenet.py): VQ-f4 first stage, class embedding with a null class,
cross-attention U-Net. Weights come with the package.

  python main.py --config configs/mnist.py --mode calibrate
  python main.py --config configs/mnist.py --mode sample

These calibrate shortly, to suit a laptop, for guidance 3, eta 0 and 20 steps.
`configs/mnist.py:full` runs all of the iterations, which is for an accelerator;
`:paper_w4a8` and `:paper_w8a8` do so with one range per weight tensor, as the
paper's released scripts. The paper's other samplers are words too, as in
`configs/mnist.py:paper_w4a8,s1.5_eta1_250`; it has no numbers for MNIST. Those
of all of its settings, as tables (an accelerator; see docs/experiment.md):

  python main.py --config configs/mnist.py:full --mode experiment \
      --config.sample.microbatch=250

Training it anew (an accelerator, minutes; see the model card in
d2dpm_jax/pretrained/README.md):

  python main.py --config configs/mnist.py --mode train --workdir out/train \
      --config.train.data=mnist.npz
"""

import ml_collections

from configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """`arg` is that of `common.base_config`; 'fast' is what '' means here."""
  config = common.base_config(arg, 'fast', sampler='s3_eta0_20')
  config.checkpoint.path = 'pretrained:mnist'
  config.model = ml_collections.ConfigDict(
    dict(
      image_size=32,
      latent_shape=(8, 8, 3),
      dtype='float32',  # compute dtype: 'float32' or 'bfloat16'
      schedule=dict(num_timesteps=1000, beta_start=0.0015, beta_end=0.0195),
      unet=dict(
        out_channels=3,
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_heads=1,
        use_spatial_transformer=True,
        context_dim=64,
      ),
      first_stage=dict(
        kind='vq',
        resolution=32,
        in_channels=1,
        out_ch=1,
        ch=32,
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        z_channels=3,
        embed_dim=3,
        n_embed=512,
      ),
      cond_stage=dict(num_classes=11, embed_dim=64),  # 10 is the null class
    )
  )
  config.train = ml_collections.ConfigDict(
    dict(
      data='tfds',  # or the path of an .npz with x_train, y_train, ...
      classifier=dict(steps=4_000, batch_size=256, learning_rate=2e-3),
      first_stage=dict(steps=10_000, batch_size=128, learning_rate=1e-3),
      diffusion=dict(
        steps=36_000,
        batch_size=512,
        learning_rate=1e-3,
        label_dropout=0.1,
        ema_decay=0.9995,
      ),
    )
  )
  config.evaluate.update(
    network='digits', reference='pretrained:mnist', batch_size=500
  )
  return config
