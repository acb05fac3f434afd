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
from d2dpm_jax.configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """`arg` is that of `common.base_config`; 'fast' is what '' means here."""
  config = common.base_config(arg, 'fast', sampler='s3_eta0_20')
  config.checkpoint.path = 'pretrained:mnist'
  config.model = ml_collections.ConfigDict(
    dict(
      image_size=32,  # pixels of a side
      latent_shape=(8, 8, 3),  # height, width, channels
      dtype='float32',  # compute dtype: 'float32' or 'bfloat16'
      # Of the noise that the network was trained with.
      schedule=dict(
        num_timesteps=1000,  # of training
        beta_start=0.0015,  # variance of the first one's noise
        beta_end=0.0195,  # and of the last one's; roots are linear between
      ),
      # The noise estimator; fields of d2dpm_jax.models.unet.UNet.
      unet=dict(
        out_channels=3,  # those of the latents
        model_channels=64,  # width of the first level
        channel_mult=(1, 2),  # width of each level, times that
        num_res_blocks=1,  # per level
        attention_resolutions=(2,),  # levels by downsampling factor
        num_heads=1,  # of attention; or num_head_channels, the width of one
        use_spatial_transformer=True,  # with cross-attention to the context
        context_dim=64,  # width of the context
      ),
      # The autoencoder; fields of d2dpm_jax.models.autoencoder.Autoencoder.
      first_stage=dict(
        kind='vq',  # or 'kl'
        resolution=32,  # pixels of a side
        in_channels=1,  # of images that it reads
        out_ch=1,  # of images that it writes
        ch=32,  # width of the first level
        ch_mult=(1, 2, 4),  # width of each level, times that
        num_res_blocks=1,  # per level
        z_channels=3,  # between encoder and decoder
        embed_dim=3,  # channels of the latents
        n_embed=512,  # codes, of kind 'vq'
      ),
      # The class embedding; None: an unconditional model.
      cond_stage=dict(
        num_classes=11,  # with the null class, which is the last one
        embed_dim=64,  # width of the context
      ),
    )
  )
  # Of --mode train.
  config.train = ml_collections.ConfigDict(
    dict(
      data='tfds',  # or the path of an .npz with x_train, y_train, ...
      # Of the digits, for the label agreement and features.
      classifier=dict(
        steps=4_000,  # of Adam
        batch_size=256,  # images per step
        learning_rate=2e-3,  # at its highest
      ),
      # Of the images, into latents and back.
      first_stage=dict(
        steps=10_000,  # of Adam
        batch_size=128,  # images per step
        learning_rate=1e-3,  # at its highest
      ),
      # The U-Net and class embedding.
      diffusion=dict(
        steps=36_000,  # of Adam
        batch_size=512,  # images per step
        learning_rate=1e-3,  # at its highest
        label_dropout=0.1,  # share of images that get the null class
        ema_decay=0.9995,  # of the averaged weights, which are kept
      ),
    )
  )
  config.evaluate.update(
    network='digits', reference='pretrained:mnist', batch_size=500
  )
  return config
