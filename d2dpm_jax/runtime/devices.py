"""Meshes and shardings: parameters replicated, batches split."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA_AXIS = 'data'


def mesh() -> Mesh:
  """A one-axis mesh over every device of every process."""
  return Mesh(np.asarray(jax.devices()), (DATA_AXIS,))


def replicate(tree: Any) -> Any:
  """Puts a copy of every leaf on every device."""
  return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec()))


def split_batch(batch: Any) -> Any:
  """Inside jit: splits axis 0 of every leaf over the devices."""
  sharding = NamedSharding(mesh(), PartitionSpec(DATA_AXIS))
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(x, sharding), batch
  )
