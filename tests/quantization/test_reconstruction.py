"""Reconstruction of a small network with blocks, unit by unit."""

import collections
import dataclasses
import functools
import logging
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from d2dpm_jax.quantization import (
  adaround,
  affine,
  importance,
  learning,
  policy,
  reconstruction,
  transform,
  units,
)


class ResBlock(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x, emb, add_residual=True):
    h = nn.Conv(self.features, (3, 3), name='conv1')(nn.silu(x))
    h += nn.Dense(self.features, name='emb')(emb)[:, None, None]
    h = nn.Conv(self.features, (3, 3), name='conv2')(nn.silu(h))
    return x + h if add_residual else h


class Net(nn.Module):
  """Float modules, equal blocks, a concatenation."""

  @nn.compact
  def __call__(self, x, t):
    emb = nn.Dense(6, name='time')(jnp.sin(t[:, None] * jnp.arange(1.0, 5.0)))
    h = skip = nn.Conv(8, (3, 3), name='first')(x)
    h = ResBlock(8, name='block_0')(h, emb)
    h = nn.GroupNorm(4, name='norm')(h)
    h = ResBlock(8, name='block_1')(h, emb)
    h = nn.Conv(8, (1, 1), name='mix')(jnp.concatenate([h, skip], -1))
    h = nn.silu(nn.Conv(8, (3, 3), name='tail')(h))
    return nn.Conv(3, (3, 3), name='last')(h)


SAMPLES = 40
RULES = (
  ('time|first|last', dict(w=8, a=8, reconstruct=False)),
  ('.*', dict(w=3, a=4)),
)
QUICK = adaround.Settings(
  iters=400,
  act_iters=30,
  batch_size=16,
  act_batch_size=16,
  lr=1.5e-2,
  devices=1,
)


@functools.cache
def _problem():
  rng = np.random.default_rng(0)
  net = Net()
  x = jnp.asarray(rng.normal(size=(SAMPLES, 6, 6, 3)), jnp.float32)
  t = jnp.asarray(rng.integers(0, 50, SAMPLES))
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, t)

  def draw(leaf):
    scale = np.prod(leaf.shape[:-1]) ** -0.5
    return jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32)

  variables = jax.tree.map(draw, shapes)
  layers = transform.list_layers(net.apply, variables, x, t)
  table = policy.build_policy(layers, RULES)
  return net, variables, table, (x, t)


def _run(settings=QUICK, seed=0, table=None, **kwargs):
  net, variables, default, inputs = _problem()
  return reconstruction.reconstruct(
    net.apply,
    variables,
    table or default,
    inputs,
    key=jax.random.key(seed),
    settings=settings,
    **kwargs,
  )[:2]


@functools.cache
def _quick():
  """One run that several tests look at, with all it reported."""
  progress, done = [], {}
  state, reports = _run(
    progress=lambda *args: progress.append(args),
    on_unit_done=done.__setitem__,
  )
  return state, reports, progress, done


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(7, name='b')(nn.silu(nn.Dense(9, name='a')(x)))


def _run_mlp(settings):
  rng = np.random.default_rng(5)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  x = draw(SAMPLES, 4) @ draw(4, 12)
  params = {
    'a': {'kernel': draw(12, 9), 'bias': draw(9)},
    'b': {'kernel': draw(9, 7), 'bias': draw(7)},
  }
  state, *_ = reconstruction.reconstruct(
    MLP().apply,
    {'params': params},
    {'a': policy.LayerBits(3, 3), 'b': policy.LayerBits(3, 3)},
    [x],
    key=jax.random.key(0),
    settings=settings,
  )
  return state


def _weight_error(state):
  net, variables, _, inputs = _problem()
  want = net.apply(variables, *inputs)
  floating = {path: {**s, 'act': None} for path, s in state.items()}
  got = transform.quantize(net.apply)(variables, floating, *inputs)
  return float(jnp.mean((got - want) ** 2) / jnp.mean(want**2))


def _assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


UNITS = ['time', 'first', 'block_0', 'block_1', 'mix', 'tail', 'last']


class ReconstructionTest(absltest.TestCase):
  def test_units_in_order(self):
    net, variables, table, inputs = _problem()
    found = reconstruction.list_units(net.apply, variables, table, inputs)
    self.assertEqual([u.path for u in found], UNITS)
    self.assertEqual(found[2].kind, 'ResBlock')
    self.assertEqual(
      found[2].layers, ('block_0/conv1', 'block_0/emb', 'block_0/conv2')
    )
    self.assertEqual(
      [u.learned for u in found], [False, False, True, True, True, True, False]
    )
    alone = reconstruction.list_units(
      net.apply, variables, table, inputs, block_types=()
    )
    self.assertLen(alone, len(table))

  def test_no_iterations_are_nearest_rounding_and_searched_ranges(self):
    net, variables, table, inputs = _problem()
    state, reports = _run(dataclasses.replace(QUICK, iters=0, act_iters=0))
    nearest = transform.init_state(variables, table)
    _assert_equal(
      {p: s['weight'] for p, s in state.items()},
      {p: s['weight'] for p, s in nearest.items()},
    )
    self.assertEqual(list(state), list(table))

    # Ranges by hand: run the network on the first 32 samples, each layer's
    # input seen after everything before it has been quantized.
    found = {}

    def change(path, x):
      found.setdefault(path, affine.range_mse(x, table[path].a))
      return affine.fake_quant(x, found[path])

    with transform.intercept_inputs(change, table):
      net.apply(
        transform.dequantize_variables(variables, nearest),
        *(x[:32] for x in inputs),
      )
    for path, layer in state.items():
      act = layer['act']
      np.testing.assert_allclose(act.scale, found[path].scale, rtol=1e-4)
      np.testing.assert_array_equal(act.zero_point, found[path].zero_point)
    for report in reports:
      self.assertEqual(report.loss_before, report.loss_after)
      self.assertEqual(report.flipped, 0)
      self.assertTrue(report.improved and not report.learned)

  def test_learning_beats_nearest_rounding(self):
    state, reports, _, _ = _quick()
    nearest, _ = _run(dataclasses.replace(QUICK, iters=0, act_iters=0))
    # Weights alone: coarse inputs make the end of a network chaotic.
    self.assertLess(_weight_error(state), 0.7 * _weight_error(nearest))
    for r in reports:
      self.assertLessEqual(r.loss_after, r.loss_before)
      if r.phase == 'weight' and r.unit.kind == 'ResBlock':
        self.assertLess(r.loss_after, 0.8 * r.loss_before, r.unit.path)
        self.assertGreater(r.flipped, 0.01)
      if not r.unit.learned:
        self.assertEqual(r.loss_after, r.loss_before)

  def test_losses_are_those_of_the_final_network(self):
    # With symmetric inputs each unit stands alone and can be checked alone.
    net, variables, table, inputs = _problem()
    state, reports = _run(dataclasses.replace(QUICK, asymmetric=False))
    seen = {}

    def record(call, args, kwargs, context):
      out = call(*args, **kwargs)
      if context.method_name == '__call__':
        path = transform.path_of(context.module)
        seen.setdefault(path, (context.module, args, out))
      return out

    with nn.intercept_methods(record):
      net.apply(variables, *inputs)
    module, args, want = seen['block_1']
    unit = module.clone(parent=None, name=None)
    own = {p[len('block_1/') :]: s for p, s in state.items() if 'block_1' in p}
    params = {'params': variables['params']['block_1']}
    run = transform.quantize(unit.apply)
    floating = {p: {**s, 'act': None} for p, s in own.items()}
    by_name = {(r.phase, r.unit.path): r for r in reports}
    for phase, layers, p in (('weight', floating, 2.0), ('act', own, 2.4)):
      loss = jnp.mean(adaround.lp_loss(run(params, layers, *args), want, p))
      np.testing.assert_allclose(
        by_name[phase, 'block_1'].loss_after, loss, rtol=1e-4
      )
    signal = jnp.mean(adaround.lp_loss(want, jnp.zeros_like(want), 2.0))
    np.testing.assert_allclose(
      by_name['weight', 'block_1'].signal, signal, rtol=1e-5
    )

  def test_the_quantized_stream_is_the_quantized_network(self):
    # The last unit's loss with quantized inputs is that of the whole network.
    net, variables, _, inputs = _problem()
    state, reports, _, _ = _quick()
    floating = {p: {**s, 'act': None} for p, s in state.items()}
    want = net.apply(variables, *inputs)
    got = transform.quantize(net.apply)(variables, floating, *inputs)
    last = {(r.phase, r.unit.path): r for r in reports}['weight', 'last']
    np.testing.assert_allclose(
      last.loss_after, jnp.mean(adaround.lp_loss(got, want, 2.0)), rtol=1e-3
    )

  def test_a_layer_that_is_used_twice_is_one_unit(self):
    class Twice(nn.Module):
      @nn.compact
      def __call__(self, x):
        layer = nn.Dense(6, name='layer')
        return layer(nn.silu(layer(x)))

    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(SAMPLES, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
    variables = {'params': {'layer': {'kernel': kernel, 'bias': jnp.ones(6)}}}
    outer = nn.Sequential([Twice(), nn.Dense(2)])
    variables = {
      'params': {
        'layers_0': variables['params'],
        'layers_1': {'kernel': kernel[:, :2], 'bias': jnp.zeros(2)},
      }
    }
    table = {
      'layers_0/layer': policy.LayerBits(3, 4),
      'layers_1': policy.LayerBits(8, 8, reconstruct=False),
    }
    state, reports, _ = reconstruction.reconstruct(
      outer.apply,
      variables,
      table,
      [x],
      key=jax.random.key(0),
      settings=QUICK,
    )
    self.assertLen(reports, 4)
    floating = {path: {**s, 'act': None} for path, s in state.items()}
    got = transform.quantize(outer.apply)(variables, floating, x)
    loss = jnp.mean(adaround.lp_loss(got, outer.apply(variables, x), 2.0))
    np.testing.assert_allclose(reports[1].loss_after, loss, rtol=1e-4)

  def test_progress_and_reports(self):
    _, reports, progress, done = _quick()
    names = [f'{r.phase}/{r.unit.path}' for r in reports]
    want = [f'{p}/{u}' for p in reconstruction.PHASES for u in UNITS]
    self.assertEqual(names, want)
    self.assertEqual(list(done), want)
    block = [p for p in progress if p[:2] == ('block_0', 'weight')]
    self.assertEqual([p[2] for p in block], list(range(40, 401, 40)))
    self.assertEqual({p[3] for p in block}, {400})
    self.assertLess(block[-1][4], block[0][4])
    self.assertEqual({p[0] for p in progress}, set(UNITS[2:6]))
    text = reconstruction.format_reports(reports, {'act': 12.3})
    self.assertLen(text.splitlines(), 2 + len(want) + 1)  # Summary last.
    self.assertRegex(text, r'weight +time +Dense +1 .*not learned')
    self.assertRegex(text, r'act +block_0 +ResBlock +3 ')

  def test_resuming_gives_the_same_arrays(self):
    state, reports, _, done = _quick()
    half = dict(list(done.items())[:9])  # All weights, two units of 'act'.
    again = []
    state_2, reports_2 = _run(
      resume=half, on_unit_done=lambda name, _: again.append(name)
    )
    _assert_equal(state_2, state)
    self.assertEqual(again, list(done)[9:])
    for a, b in zip(reports[:9], reports_2[:9], strict=True):
      self.assertEqual(a, b)
    state_3, reports_3 = _run(resume=done)
    _assert_equal(state_3, state)
    self.assertEqual(reports_3, reports)

  def test_another_key_gives_other_rounding(self):
    state, _ = _run(seed=1)
    changed = [
      int(jnp.sum(s['weight'].codes != state[path]['weight'].codes))
      for path, s in _quick()[0].items()
    ]
    self.assertGreater(sum(changed), 0)

  def test_stored_units_that_do_not_fit_are_errors(self):
    _, _, table, _ = _problem()
    done = _quick()[3]
    with self.assertRaisesRegex(ValueError, "lacks: .'weight/block_9'"):
      _run(resume={'weight/block_9': done['weight/block_0']})
    with self.assertRaisesRegex(ValueError, 'missing .*mix:weight:codes'):
      _run(resume={'weight/time': done['weight/time'], 'weight/mix': {}})
    other = {p: dataclasses.replace(b, w=4) for p, b in table.items()}
    with self.assertRaisesRegex(ValueError, 'has 8 bits .* 4 are asked for'):
      _run(table=other, resume={'weight/time': done['weight/time']})
    bad = dict(done['weight/time'])
    bad['time:weight:codes'] = bad['time:weight:codes'][:2]
    with self.assertRaisesRegex(ValueError, 'do not fit the kernel'):
      _run(resume={'weight/time': bad})

  def test_bad_inputs_are_errors(self):
    net, variables, table, (x, t) = _problem()
    run = functools.partial(
      reconstruction.reconstruct, net.apply, variables, key=jax.random.key(0)
    )
    with self.assertRaisesRegex(ValueError, 'one length'):
      run(table, (x, t[:3]))
    with self.assertRaisesRegex(ValueError, "does not run .*'other'"):
      run({**table, 'other': policy.LayerBits(4, 4)}, (x, t))

  def test_switches_change_the_result(self):
    base = dataclasses.replace(QUICK, iters=30, act_iters=10, lr=0.1)
    want = _run_mlp(base)
    changes = dict(
      drop_prob=0.5,
      asymmetric=False,
      act_asymmetric=True,
      per_channel=False,
      weight_range='max',
      act_range='max',
      act_init_samples=8,
      iters=10,
      batch_size=8,
      lr=1e-2,
      rounding_weight=10.0,
      p=1.5,
      act_iters=5,
      act_batch_size=8,
      act_lr=4e-3,
      act_p=1.5,
    )
    for name, value in changes.items():
      state = _run_mlp(dataclasses.replace(base, **{name: value}))
      same = jax.tree.map(lambda a, b: np.array_equal(a, b), state, want)
      self.assertFalse(jax.tree.all(same), name)
    # The shape of the regularizer shows in long steps.
    base = dataclasses.replace(base, rounding_weight=1.0, lr=0.2)
    want = _run_mlp(base)
    changes = dict(
      warmup=0.9, beta_start=4.0, beta_end=19.0, zeta=1.5, gamma=-0.5
    )
    for name, value in changes.items():
      state = _run_mlp(dataclasses.replace(base, **{name: value}))
      same = jax.tree.map(lambda a, b: np.array_equal(a, b), state, want)
      self.assertFalse(jax.tree.all(same), name)

  def test_where_and_how_it_runs_does_not_matter(self):
    # Small chunks that do not divide the samples, streams kept on the host.
    state, _ = _run(dataclasses.replace(QUICK, chunk=24, host_streams=True))
    want = _quick()[0]
    for path, layer in state.items():
      codes = layer['weight'].codes == want[path]['weight'].codes
      self.assertGreater(float(jnp.mean(codes)), 0.97, path)
      np.testing.assert_allclose(
        layer['act'].scale, want[path]['act'].scale, rtol=0.05
      )

  def test_several_devices_give_the_same_result(self):
    one = dataclasses.replace(QUICK, iters=60, chunk=24)
    want, want_reports = _run(one)
    # 16 samples a batch, chunks of 24, 2 * 40 in all: eight devices fit.
    got, reports = _run(dataclasses.replace(one, devices=8))
    for path, layer in got.items():
      a, b = layer['weight'], want[path]['weight']
      np.testing.assert_array_equal(a.codes, b.codes, path)
      np.testing.assert_allclose(a.scale, b.scale, rtol=1e-5)
      a, b = layer['act'], want[path]['act']
      np.testing.assert_allclose(a.scale, b.scale, rtol=1e-5)
    for a, b in zip(reports, want_reports, strict=True):
      np.testing.assert_allclose(
        a.loss_after, b.loss_after, rtol=1e-5, atol=1e-5 * b.signal
      )

  def test_devices_that_do_not_divide_the_sizes_are_left_out(self):
    counts = {
      (40, 20, (16, 8)): 4,
      (40, 24, (16, 16)): 8,
      (1021, 128, (8, 16)): 2,
      (9, 128, (9, 9)): 3,
      (3, 128, (1, 3)): 1,
    }
    for (samples, chunk, sizes), want in counts.items():
      streams = units.Streams(samples, chunk, sizes)
      self.assertEqual(streams.num_devices, want, (samples, chunk, sizes))
    self.assertEqual(units.Streams(40, 24, (16, 16), devices=2).num_devices, 2)

  def test_fisher_weights_are_squared_gradients_of_the_output_error(self):
    net, variables, table, inputs = _problem()
    quantized = transform.dequantize_variables(
      variables,
      transform.init_state(
        variables,
        {p: b if 'block_0' in p else None for p, b in table.items()},
      ),
    )
    got = importance.squared_gradients(
      net.apply,
      table,
      reconstruction.BLOCK_TYPES,
      UNITS.index('block_0'),
      variables,
      quantized,
      inputs,
    )
    want = net.apply(variables, *inputs)
    seen = {}

    def error(shift):
      def change(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if transform.path_of(context.module) != 'block_0':
          return out
        seen['out'] = jax.lax.stop_gradient(out)
        return out + shift

      with nn.intercept_methods(change):
        return jnp.sum((net.apply(quantized, *inputs) - want) ** 2)

    zero = jnp.zeros([SAMPLES, 6, 6, 8])
    gradient = jax.grad(error)(zero)
    self.assertGreater(float(jnp.max(jnp.abs(gradient))), 1e-3)
    np.testing.assert_allclose(
      got[6, 6, 8], jnp.square(gradient), rtol=1e-3, atol=1e-7
    )

  def test_fisher_loss_is_weighted_by_them(self):
    net, variables, table, inputs = _problem()
    _, reports = _run(
      dataclasses.replace(
        QUICK, iters=0, act_iters=0, loss='fisher_diag', asymmetric=False
      )
    )
    # With symmetric inputs: block_0 alone is quantized, as for its gradient.
    quantized = transform.dequantize_variables(
      variables,
      transform.init_state(
        variables,
        {p: b if 'block_0' in p else None for p, b in table.items()},
      ),
    )
    outputs = []
    for v in (variables, quantized):
      _, seen = net.apply(
        v,
        *inputs,
        capture_intermediates=lambda module, _: module.name == 'block_0',
      )
      outputs.append(seen['intermediates']['block_0']['__call__'][0])
    squares = importance.squared_gradients(
      net.apply,
      table,
      reconstruction.BLOCK_TYPES,
      UNITS.index('block_0'),
      variables,
      quantized,
      inputs,
    )[6, 6, 8]
    error = np.square(np.float64(outputs[1]) - outputs[0])
    want = np.mean(np.sum(error * squares, -1)) / np.mean(squares)
    by_name = {r.name: r for r in reports}
    np.testing.assert_allclose(
      by_name['weight/block_0'].loss_before, want, rtol=1e-4
    )

  def test_snr_is_that_of_the_whole_network(self):
    net, variables, table, inputs = _problem()
    state, _, snr_db = reconstruction.reconstruct(
      net.apply,
      variables,
      table,
      inputs,
      key=jax.random.key(0),
      settings=dataclasses.replace(QUICK, iters=0, act_iters=0),
    )
    want = np.float64(net.apply(variables, *inputs))
    floating = {p: {**s, 'act': None} for p, s in state.items()}
    got = transform.quantize(net.apply)(variables, floating, *inputs)
    noise = np.square(np.float64(got) - want).sum()
    want_db = 10 * np.log10(np.square(want).sum() / noise)
    np.testing.assert_allclose(snr_db['weight'], want_db, atol=1e-3)
    self.assertLess(snr_db['act'], snr_db['weight'])

  def test_compiled_loop_equals_single_steps(self):
    rng = np.random.default_rng(1)
    dense = nn.Dense(5)
    x = jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)
    variables = {
      'params': {
        'kernel': jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
        'bias': jnp.zeros(5),
      }
    }
    results = []
    for loop in (False, True):
      state, *_ = reconstruction.reconstruct(
        dense.apply,
        variables,
        {'': policy.LayerBits(2, 3)},
        [x],
        key=jax.random.key(0),
        settings=dataclasses.replace(QUICK, loop=loop),
      )
      results.append(state)
    a, b = (r['']['weight'].codes for r in results)
    np.testing.assert_array_equal(a, b)
    a, b = (r['']['act'].scale for r in results)
    np.testing.assert_allclose(a, b, rtol=1e-5)

  def test_weights_only_and_inputs_only(self):
    _, _, table, _ = _problem()
    weights, reports = _run(
      dataclasses.replace(QUICK, iters=5),
      table={p: dataclasses.replace(b, a=None) for p, b in table.items()},
    )
    self.assertTrue(all(s['act'] is None for s in weights.values()))
    self.assertTrue(all(r.loss_after > 0 for r in reports))
    inputs, reports = _run(
      dataclasses.replace(QUICK, act_iters=5, drop_prob=0.5),
      table={p: dataclasses.replace(b, w=None) for p, b in table.items()},
    )
    self.assertTrue(all(s['weight'] is None for s in inputs.values()))
    self.assertTrue(all(s['act'] is not None for s in inputs.values()))
    self.assertTrue(all(r.flipped == 0 for r in reports))

  def test_worse_step_sizes_are_thrown_away(self):
    state, reports = _run(dataclasses.replace(QUICK, iters=0, act_lr=10.0))
    kept = [r for r in reports if r.kept_initial]
    self.assertNotEmpty(kept)
    for r in kept:
      self.assertEqual(r.loss_after, r.loss_before)
    searched, _ = _run(dataclasses.replace(QUICK, iters=0, act_iters=0))
    paths = kept[0].unit.layers
    _assert_equal(
      [state[p]['act'] for p in paths], [searched[p]['act'] for p in paths]
    )
    self.assertIn(
      'kept initial', reconstruction.format_reports(reports, {'act': 12.3})
    )

  def test_constant_inputs_are_survived(self):
    net, variables, table, (x, t) = _problem()
    state, *_ = reconstruction.reconstruct(
      net.apply,
      variables,
      table,
      (jnp.zeros_like(x), jnp.zeros_like(t)),
      key=jax.random.key(0),
      settings=dataclasses.replace(QUICK, iters=4, act_iters=4),
    )
    for leaf in jax.tree.leaves(state):
      self.assertTrue(bool(jnp.all(jnp.isfinite(leaf))))

  def test_batches_take_all_samples_in_turn(self):
    rows = learning.draw_rows(jax.random.key(3), 10, 4, 12)
    self.assertEqual(rows.shape, (12, 4))
    counts = np.bincount(np.asarray(rows).ravel(), minlength=10)
    self.assertEqual((counts.min(), counts.max()), (4, 5))
    self.assertLen(np.unique(rows[:2]), 8)  # Within an epoch none twice.
    other = learning.draw_rows(jax.random.key(4), 10, 4, 12)
    self.assertGreater(int(jnp.sum(rows != other)), 10)

  def test_programs_are_compiled_ahead(self):
    # In other threads, and exactly those that are called.
    compiled = {True: collections.Counter(), False: collections.Counter()}

    class Handler(logging.Handler):
      def emit(self, record):
        words = record.getMessage().split()
        if words[0] == 'Compiling':
          here = threading.current_thread() is threading.main_thread()
          compiled[here][words[1]] += 1

    ours = {'jit(forward)', 'jit(steps)', 'jit(search_grids)'}
    handler, logger = Handler(), logging.getLogger('jax')
    logger.addHandler(handler)
    jax.config.update('jax_log_compiles', True)  # In all threads.
    try:
      for changes in (
        {'chunk': 19},
        {'devices': 8, 'chunk': 16},
        {'host_streams': True, 'chunk': 11},
        {'drop_prob': 0.5, 'per_channel': False, 'chunk': 13},
      ):
        compiled[False].clear()
        # Batch sizes that no other test has: nothing is compiled already.
        sizes = dict(iters=3, act_iters=3, batch_size=32, act_batch_size=8)
        _run_mlp(dataclasses.replace(QUICK, **sizes, **changes))
        self.assertEqual(ours & set(compiled[True]), set(), changes)
        self.assertIn('jit(steps)', compiled[False])
    finally:
      jax.config.update('jax_log_compiles', False)
      logger.removeHandler(handler)

  def test_equal_units_share_programs(self):
    # Not an equality of counts only: a program per unit would take minutes.
    learning.steps.clear_cache()
    _run(dataclasses.replace(QUICK, iters=3, act_iters=3))
    # ResBlock twice, mix, tail: three forms of unit that learn, two phases.
    self.assertEqual(learning.steps._cache_size(), 6)


if __name__ == '__main__':
  absltest.main()
