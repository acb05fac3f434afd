"""Eight simulated devices: copies, splits, and where programs are kept."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.runtime import devices


def test_mesh_has_every_device():
  assert devices.mesh().size == len(jax.devices()) == 8
  assert devices.mesh().axis_names == (devices.DATA_AXIS,)


def test_replicate_copies_and_split_batch_splits():
  x = devices.replicate({'x': np.arange(32.0).reshape(16, 2)})['x']
  assert {s.data.shape for s in x.addressable_shards} == {(16, 2)}
  y = jax.jit(lambda x: devices.split_batch({'x': 2 * x})['x'])(x)
  assert len(y.addressable_shards) == 8
  assert {s.data.shape for s in y.addressable_shards} == {(2, 2)}
  np.testing.assert_array_equal(y, 2 * np.arange(32.0).reshape(16, 2))


def test_compilation_cache_is_below_the_users_cache(tmp_path, monkeypatch):
  calls = {}
  monkeypatch.setattr(jax.config, 'update', calls.__setitem__)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  devices.use_compilation_cache()
  assert calls['jax_compilation_cache_dir'].startswith(str(tmp_path))


def test_compilation_cache_is_the_users_choice(monkeypatch):
  calls = {}
  monkeypatch.setattr(jax.config, 'update', calls.__setitem__)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')  # Means none.
  devices.use_compilation_cache()
  assert not calls


def test_flags_of_the_user_are_kept(monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_autotune_level=2')
  devices.configure()
  flags = os.environ['XLA_FLAGS'].split()
  assert flags == [
    '--xla_gpu_autotune_level=2',
    '--xla_gpu_enable_triton_gemm=false',
    '--xla_gpu_shard_autotuning=false',
  ]
  devices.configure()
  assert os.environ['XLA_FLAGS'].split() == flags
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_enable_triton_gemm=true')
  devices.configure()
  flags = os.environ['XLA_FLAGS'].split()
  assert flags[0] == '--xla_gpu_enable_triton_gemm=true' and len(flags) == 2


def test_a_batch_that_does_not_divide_keeps_every_row():
  x = jnp.arange(18.0).reshape(9, 2)
  y = jax.jit(lambda x: devices.split_batch(x) + 1)(x)
  np.testing.assert_array_equal(y, np.arange(18.0).reshape(9, 2) + 1)
