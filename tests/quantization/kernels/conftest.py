"""JAX 0.10 does not interpret what Hopper kernels do; it lowers them."""

from jax.experimental.pallas import mosaic_gpu as plgpu

collect_ignore = (
  []
  if hasattr(plgpu, 'InterpretGPUParams')
  else ['test_blocks.py', 'test_products.py']
)
