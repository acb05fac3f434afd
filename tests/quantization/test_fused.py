"""Which layers fused kernels take."""

import jax.numpy as jnp
import numpy as np
from fused_layers import layers_of, random_variables

from d2dpm_jax.models.unet import ResBlock
from d2dpm_jax.quantization import (
  affine,
  fused,
  integer,
  integer_model,
  transform,
)
from d2dpm_jax.quantization.kernels import products


def test_layers_that_no_kernel_takes_stay_with_xla():
  rng = np.random.default_rng(2)

  def ready(shape, zero_point=100.0):
    kernel = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    act = affine.QParams(np.float32(0.1), np.float32(zero_point), 8)
    weight = affine.nearest_weight(kernel, 8)
    state = {'': transform.LayerState(weight=weight, act=act)}
    return integer_model.ready(integer.prepare(state, fused=True))['']

  assert isinstance(ready((64, 128)), fused.FusedLayer)
  assert isinstance(ready((3, 3, 64, 3)), fused.FusedLayer)
  assert len(ready((3, 3, 64, 3)).kernel) == products.LEAST_CHANNELS
  assert isinstance(ready((32, 128)), integer.IntegerLayer)
  assert isinstance(ready((5, 5, 64, 64)), integer.IntegerLayer)
  assert isinstance(ready((64, 100)), integer.IntegerLayer)
  # Zero is no code, so that images cannot be padded with it.
  assert isinstance(ready((64, 128), 300.0), integer.IntegerLayer)
  layer = ready((64, 128))
  assert integer_model.plain({'': layer})[''] is layer.plain


def test_float32_networks_do_not_use_them():
  """What is compared with simulated execution stays exact."""
  model = ResBlock(64)
  x, emb = jnp.ones((16, 4, 4, 64)), jnp.ones((16, 8))
  variables = random_variables(model, x, emb)
  state = layers_of(model, variables, 8, x, emb)
  out = [
    integer_model.apply(model.apply)(
      variables, integer_model.ready(integer.prepare(state, fused=f)), x, emb
    )
    for f in (False, True)
  ]
  np.testing.assert_array_equal(*out)
