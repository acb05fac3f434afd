"""U-Nets of the three families, each with one residual block per level."""

from d2dpm_jax.models import unet

_COMMON = dict(model_channels=32, num_res_blocks=1, out_channels=3)
UNETS = {
  'imagenet': unet.UNet(
    channel_mult=(1,),
    attention_resolutions=(),  # In the middle there is always one.
    num_heads=2,
    use_spatial_transformer=True,
    context_dim=16,
    **_COMMON,
  ),
  'bedrooms': unet.UNet(
    channel_mult=(1, 2),
    attention_resolutions=(),
    num_head_channels=32,
    **_COMMON,
  ),
  'churches': unet.UNet(
    channel_mult=(1, 2),
    attention_resolutions=(),
    num_heads=8,
    use_scale_shift_norm=True,
    resblock_updown=True,
    **_COMMON,
  ),
}
