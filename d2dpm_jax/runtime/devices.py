"""Meshes and shardings: parameters replicated, batches split."""

import os
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA_AXIS = 'data'


# Options of XLA, but for those that XLA_FLAGS name.
_OPTIONS = {
  # Trying Triton's kernels for matrix products took two thirds of the time to
  # compile a transformer block and made it no faster (H100, 2026-11-22): they
  # are left to cuBLAS.
  'xla_gpu_enable_triton_gemm': 'false',
  # Processes would share out the trying of kernels and wait for each other's
  # results, but they do not compile the same programs at the same time.
  'xla_gpu_shard_autotuning': 'false',
}


def configure() -> None:
  """What JAX has to know before its first computation."""
  use_compilation_cache()
  flags = os.environ.get('XLA_FLAGS', '').split()
  for name, value in _OPTIONS.items():
    if not any(name in flag for flag in flags):
      flags.append(f'--{name}={value}')
  os.environ['XLA_FLAGS'] = ' '.join(flags)


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk, so that the next run starts at once.

  JAX_COMPILATION_CACHE_DIR names another place; set it to '' for no cache.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  directory = pathlib.Path(home) / 'd2dpm_jax' / 'compiled'
  jax.config.update('jax_compilation_cache_dir', str(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def mesh() -> Mesh:
  """A one-axis mesh over every device of this process; see `processes`."""
  return Mesh(np.asarray(jax.local_devices()), (DATA_AXIS,))


def free_memory() -> float | None:
  """Bytes that every device has left; None where devices do not tell."""
  free = []
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    if 'bytes_limit' not in stats:
      return None
    free.append(float(stats['bytes_limit'] - stats.get('bytes_in_use', 0)))
  return min(free)


def replicate(tree: Any) -> Any:
  """Puts a copy of every leaf on every device."""
  return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec()))


def split_batch(batch: Any) -> Any:
  """Inside jit: splits axis 0 of every leaf over the devices."""
  sharding = NamedSharding(mesh(), PartitionSpec(DATA_AXIS))
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(x, sharding), batch
  )
