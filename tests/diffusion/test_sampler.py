"""The scan against the original sampler, a Python loop, and itself."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

from d2dpm_jax.diffusion import ddim, noise, sampler, schedule

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden/ddim_trajectories.npz'
_LABELS = np.array([1.0, 2.0, 3.0, 4.0], np.float32)


def _network(x, t, label, table=None):
  """The network of tests/golden/make_ddim.py."""
  u = t.astype(jnp.float32)[:, None, None, None] / 1000
  label = label[:, None, None, None]
  mixed = 0.7 * x + 0.2 * jnp.roll(x, 1, 1) - 0.1 * jnp.roll(x, 1, (2, 3))
  eps = jnp.tanh(3 * u) * mixed + 0.25 * jnp.sin(0.5 * x + label + 2 * u)
  return eps if table is None else table['gain'] * eps


def _setup(steps, eta, scale=3.0):
  """eps_fn, rows, x_T and noise_fn of a golden case."""
  golden = np.load(_GOLDEN)
  rows = ddim.ddim_rows(golden['alphas_cumprod'], steps, eta)
  x_T = golden[f'steps{steps}_x_T'].astype(np.float32)
  noises = jnp.asarray(golden[f'steps{steps}_noise'], jnp.float32)
  eps_fn = ddim.classifier_free(
    _network, scale, jnp.asarray(_LABELS), jnp.zeros(1)
  )
  return eps_fn, rows, jnp.asarray(x_T), lambda i: noises[i]


class SampleTest(parameterized.TestCase):
  @parameterized.product(
    case=((20, 0.0), (20, 1.0), (250, 1.0)), scale=(1.0, 3.0)
  )
  def test_equals_the_original(self, case, scale):
    steps, eta = case
    run = jax.jit(
      functools.partial(
        sampler.sample,
        *_setup(steps, eta, scale),
        collect=lambda step: {'x': step.x, 't': step.t},
      )
    )
    x_0, seen = run()
    golden = np.load(_GOLDEN)
    key = f'steps{steps}_eta{eta:g}_scale{scale:g}'
    # float32 against float64; x reaches 29 on the way.
    want = golden[f'{key}_x']
    np.testing.assert_allclose(
      seen['x'][:: steps // 5], want, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(x_0, golden[f'{key}_x_0'], rtol=1e-5, atol=1e-5)
    times = golden[f'table_steps{steps}_eta{eta:g}_t'][::-1]
    np.testing.assert_array_equal(seen['t'], np.tile(times[:, None], (1, 4)))

  @parameterized.parameters(0.0, 1.0)
  def test_scan_equals_loop_and_jit_equals_eager(self, eta):
    eps_fn, rows, x_T, noise_fn = _setup(20, eta)
    x = x_T
    for i in range(20):
      row = ddim.Rows(*(column[i] for column in rows))
      eps = eps_fn(x, jnp.full((4,), row.t), None)
      x = ddim.ddim_step(x, eps, row, noise_fn(i))
    run = functools.partial(sampler.sample, eps_fn, rows, x_T, noise_fn)
    eager, jitted = run(), jax.jit(run)()
    # Fused and unfused float32 arithmetic over 20 steps.
    np.testing.assert_allclose(eager, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jitted, eager, rtol=1e-6, atol=1e-6)

  def test_rows_may_be_arguments(self):
    eps_fn, rows, x_T, noise_fn = _setup(20, 1.0)
    traces = []

    @jax.jit
    def run(rows, x_T):
      traces.append(1)
      return sampler.sample(eps_fn, rows, x_T, noise_fn)

    abar = schedule.linear_schedule(1000, 0.0015, 0.0195)
    for eta in (1.0, 0.5):
      rows = ddim.ddim_rows(abar, 20, eta)
      want = sampler.sample(eps_fn, rows, x_T, noise_fn)
      np.testing.assert_allclose(run(rows, x_T), want, rtol=1e-6, atol=1e-6)
    self.assertLen(traces, 1)

  def test_is_one_scan_without_the_host(self):
    text = str(jax.make_jaxpr(lambda: sampler.sample(*_setup(20, 1.0)))())
    self.assertEqual(text.count(' scan['), 1)
    self.assertNotIn('callback', text)
    self.assertNotIn('while', text)

  def test_tables_reach_the_network(self):
    eps_fn, rows, x_T, noise_fn = _setup(20, 1.0)
    gain = np.linspace(0.9, 1.1, 20, dtype=np.float32)
    got = sampler.sample(
      eps_fn, rows, x_T, noise_fn, tables={'gain': jnp.asarray(gain)}
    )
    x = x_T
    for i in range(20):
      row = ddim.Rows(*(column[i] for column in rows))
      eps = gain[i] * eps_fn(x, jnp.full((4,), row.t), None)
      x = ddim.ddim_step(x, eps, row, noise_fn(i))
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5)

  def test_collects_what_happened(self):
    eps_fn, rows, x_T, noise_fn = _setup(20, 1.0)
    errors = jnp.arange(20.0)

    def correct(eps_q, x, row, error):
      return eps_q + row['shift'] + 0 * error, 0.0

    x_0, seen = sampler.sample(
      eps_fn,
      rows,
      x_T,
      noise_fn,
      correct,
      {'shift': np.linspace(0, 0.1, 20, dtype=np.float32)},
      lambda i: errors[i],
      collect=lambda step: step,
    )
    plain = sampler.sample(eps_fn, rows, x_T, noise_fn)
    self.assertGreater(np.abs(x_0 - plain).max(), 1e-2)
    self.assertEqual(seen.x.shape, (20, 4, 2, 5, 3))
    np.testing.assert_array_equal(seen.x[0], x_T)
    np.testing.assert_array_equal(seen.x[1:], seen.x_prev[:-1])
    np.testing.assert_array_equal(seen.x_prev[-1], x_0)
    np.testing.assert_array_equal(seen.row.t, rows.t)
    shift = np.linspace(0, 0.1, 20)[:, None, None, None, None]
    np.testing.assert_allclose(
      seen.eps - seen.eps_q, shift + 0 * seen.eps, atol=1e-5
    )  # Rounding of eps up to 30.

  def test_image_does_not_depend_on_its_batch(self):
    key, shape = noise.seed_key(0), (2, 5, 3)
    rows = ddim.ddim_rows(schedule.linear_schedule(1000, 0.0015, 0.0195), 20, 1)

    @jax.jit
    def run(index):
      labels = (index % 4 + 1).astype(jnp.float32)
      return sampler.sample(
        ddim.classifier_free(_network, 3.0, labels, jnp.zeros(1)),
        rows,
        noise.initial_noise(key, index, shape),
        noise.noise_stream(key, index, shape),
      )

    full = run(jnp.arange(6))
    for batch in ([4], [0, 1, 4, 2]):
      part = run(jnp.array(batch))
      # Equal numbers go in; another batch size may be compiled otherwise.
      np.testing.assert_allclose(
        part[batch.index(4)], full[4], rtol=1e-5, atol=1e-5
      )
    self.assertGreater(np.abs(full[4] - full[0]).max(), 0.1)

  @parameterized.parameters('shard_map', 'jit')
  def test_same_images_on_eight_devices(self, how):
    key, shape = noise.seed_key(0), (2, 5, 3)
    rows = ddim.ddim_rows(schedule.linear_schedule(1000, 0.0015, 0.0195), 20, 1)

    def run(index):
      labels = (index % 4 + 1).astype(jnp.float32)
      return sampler.sample(
        ddim.classifier_free(_network, 3.0, labels, jnp.zeros(1)),
        rows,
        noise.initial_noise(key, index, shape),
        noise.noise_stream(key, index, shape),
        lambda eps, x, row, error: (eps - row * error, 0.1),
        jnp.linspace(0, 0.1, 20),
        noise.noise_stream(key, index, shape, noise.Stream.ERROR),
      )

    index = jnp.arange(16)
    want = jax.jit(run)(index)
    mesh, spec = jax.make_mesh((8,), ('data',)), PartitionSpec('data')
    sharded = run
    if how == 'shard_map':
      sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    given = jax.device_put(index, NamedSharding(mesh, spec))
    compiled = jax.jit(sharded).lower(given).compile()
    got = compiled(given)
    self.assertLen(got.sharding.device_set, 8)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # No device waits for another, doubled batch or not.
    text = compiled.as_text()
    for name in ('all-gather', 'all-reduce', 'all-to-all', 'permute('):
      self.assertNotIn(name, text)

  def test_refuses_tables_of_another_length(self):
    eps_fn, rows, x_T, noise_fn = _setup(20, 1.0)
    for kwargs in (
      {'tables': {'gain': jnp.ones(19)}},
      {'correction_rows': [np.float32(1)]},
    ):
      with self.assertRaisesRegex(
        ValueError, f'{next(iter(kwargs))}.* 20 rows'
      ):
        sampler.sample(eps_fn, rows, x_T, noise_fn, **kwargs)

  @pytest.mark.usefixtures('full_compile')
  def test_refuses_to_forget_the_noise(self):
    eps_fn, rows, x_T, _ = _setup(20, 1.0)
    with self.assertRaisesRegex(ValueError, 'noise_fn is missing'):
      sampler.sample(eps_fn, rows, x_T)
    _, rows, _, noise_fn = _setup(20, 0.0)
    np.testing.assert_allclose(
      sampler.sample(eps_fn, rows, x_T),
      sampler.sample(eps_fn, rows, x_T, noise_fn),
      rtol=1e-6,
      atol=1e-6,
    )


if __name__ == '__main__':
  absltest.main()
