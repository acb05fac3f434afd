"""Parameters and quantizers of single blocks, for tests of fused kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.quantization import affine, transform


def layers_of(model, variables, bits, *args):
  """Grids that hold all inputs of every layer."""
  state = {}
  ranges = {}

  def look(path, x):
    ranges[path] = (jnp.min(x), jnp.max(x))
    return x

  kinds = transform.list_layers(model.apply, variables, *args)
  with transform.intercept_inputs(look, [x.path for x in kinds]):
    model.apply(variables, *args)
  for layer in kinds:
    kernel = transform.get_kernel(variables['params'], layer.path)
    low, high = (float(x) for x in ranges[layer.path])
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32((high - low) / 255)
    state[layer.path] = transform.LayerState(
      weight=affine.nearest_weight(kernel, bits),
      act=affine.QParams(step, np.float32(np.round(-low / step)), 8),
    )
  return state


def random_variables(model, *args):
  """Random parameters, none of them zero or one."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *args)

  def draw(path, like):
    name = path[-1].key
    scale = {'kernel': like.size // like.shape[-1], 'scale': 25}.get(name, 4)
    x = rng.standard_normal(like.shape) / np.sqrt(scale)
    return jnp.asarray(x + (name == 'scale'), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)
