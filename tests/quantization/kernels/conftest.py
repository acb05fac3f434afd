"""JAX 0.10 does not interpret what Hopper kernels do; it lowers them."""

import gc

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

collect_ignore = (
  []
  if hasattr(plgpu, 'InterpretGPUParams')
  else ['test_blocks.py', 'test_products.py']
)


@pytest.fixture(autouse=True)
def no_garbage_collection():
  """Threads of the interpreter wait for each other; one that collects garbage
  meanwhile waits for arrays of others.
  """
  gc.collect()
  gc.disable()
  yield
  gc.enable()
