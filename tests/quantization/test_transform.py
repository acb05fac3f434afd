"""Policy and interception on a small network."""

import os
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import absltest, parameterized

from d2dpm_jax.quantization import affine, policy, transform


class ResBlock(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x, emb):
    h = nn.Conv(self.features, (3, 3), name='in_layers_2')(nn.silu(x))
    h += nn.Dense(self.features, name='emb_layers_1')(emb)[:, None, None]
    h = nn.Conv(self.features, (3, 3), name='out_layers_3')(nn.silu(h))
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1), name='skip_connection')(x)
    return x + h


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, t):
    emb = nn.Dense(8, name='time_embed_0')(t[:, None].astype(jnp.float32))
    h = nn.Conv(8, (3, 3), name='input_blocks_0_0')(x)
    h = ResBlock(8, name='input_blocks_1_0')(h, emb)
    h = nn.Conv(8, (3, 3), strides=2, name='op')(h)
    h = ResBlock(12, name='middle_block_0')(h, emb)
    return nn.Conv(3, (3, 3), name='out_2')(h)


PATHS = [
  'time_embed_0',
  'input_blocks_0_0',
  'input_blocks_1_0/in_layers_2',
  'input_blocks_1_0/emb_layers_1',
  'input_blocks_1_0/out_layers_3',
  'op',
  'middle_block_0/in_layers_2',
  'middle_block_0/emb_layers_1',
  'middle_block_0/out_layers_3',
  'middle_block_0/skip_connection',
  'out_2',
]


def _net(batch=4):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(batch, 8, 8, 3)), jnp.float32)
  t = jnp.asarray(rng.integers(0, 10, batch))
  net = Net()
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, t)

  def draw(leaf):  # Variance 1 / fan in; cheaper than compiling `init`.
    scale = np.prod(leaf.shape[:-1]) ** -0.5
    return jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32)

  return net, jax.tree.map(draw, shapes), x, t


def _with_acts(state, table, net, variables, x, t):
  """Adds one grid over its input's range to each layer that wants one."""
  inputs = {}
  with transform.intercept_inputs(
    lambda path, v: inputs.setdefault(path, v), PATHS
  ):
    net.apply(variables, x, t)
  result = {}
  for path, layer in state.items():
    bits = table[path].a
    act = None if bits is None else affine.range_max(inputs[path], bits)
    result[path] = {**layer, 'act': act}
  return result


class PolicyTest(absltest.TestCase):
  def test_ldm_rules(self):
    table = policy.build_policy(PATHS, policy.ldm_rules(4, 8))
    self.assertEqual(list(table), PATHS)  # Order is kept.
    edge = policy.LayerBits(8, 8, reconstruct=False)
    for path in ('time_embed_0', 'input_blocks_0_0', 'out_2'):
      self.assertEqual(table[path], edge)
    self.assertIsNone(table['op'])
    self.assertIsNone(table['middle_block_0/skip_connection'])
    self.assertEqual(
      table['middle_block_0/in_layers_2'], policy.LayerBits(4, 8)
    )

  def test_float_attention_and_edge_bits(self):
    paths = [*PATHS, 'middle_block_1/qkv', 'middle_block_1/proj_out']
    table = policy.build_policy(
      paths, policy.ldm_rules(3, None, edge_bits=6, float_attention=True)
    )
    self.assertIsNone(table['middle_block_1/qkv'])
    self.assertIsNone(table['middle_block_1/proj_out'])
    self.assertEqual(table['out_2'], policy.LayerBits(6, 6, False))
    self.assertEqual(
      table['middle_block_0/in_layers_2'], policy.LayerBits(3, None)
    )
    table = policy.build_policy(paths, policy.ldm_rules(3, None))
    self.assertEqual(table['middle_block_1/qkv'], policy.LayerBits(3, None))

  def test_names_must_match_in_full(self):
    paths = ['a/op_x', 'a/op', 'oped']
    rules = ((r'(.*/)?op', None), (r'.*', dict(w=4, a=4)))
    table = policy.build_policy(paths, rules)
    self.assertEqual([p for p in paths if table[p] is None], ['a/op'])

  def test_first_match_wins(self):
    rules = ((r'a.*', dict(w=2, a=2)), (r'.*', dict(w=8, a=8)))
    table = policy.build_policy(['ab', 'b'], rules)
    self.assertEqual(table['ab'].w, 2)
    self.assertEqual(table['b'].w, 8)
    table = policy.build_policy(['ab', 'b'], rules[::-1])
    self.assertEqual(table['ab'].w, 8)

  def test_mistakes_are_errors(self):
    everything = (r'.*', dict(w=4, a=8))
    cases = (
      (((r'no_such', None), everything), 'match none.*no_such'),
      (((r'a', dict(w=4, a=8)),), r"No policy rule.*\['b'\]"),
      (((r'(', None), everything), 'no regex'),
      (((r'.*', dict(w=4)),), r"missing keys \['a'\]"),
      (((r'.*', dict(w=4, a=8, s=1)),), r"unknown keys \['s'\]"),
      (((r'.*', dict(w=1, a=8)),), "'w': 1 bits: expected 2..8"),
      (((r'.*', dict(w=4, a=16)),), "'a': 16 bits: expected 2..8"),
      (((r'.*', dict(w=None, a=None)),), 'give None'),
    )
    for rules, message in cases:
      with self.assertRaisesRegex(ValueError, message):
        policy.build_policy(['a', 'b'], rules)

  def test_table_names_every_layer_and_width(self):
    net, variables, x, t = _net()
    layers = transform.list_layers(net.apply, variables, x, t)
    table = policy.build_policy(layers, policy.ldm_rules(4, 8))
    text = policy.format_policy(table, layers)
    lines = text.splitlines()
    self.assertLen(lines, 2 + len(PATHS) + 1)
    self.assertEqual(
      lines[0].split(),
      ['layer', 'kind', 'kernel', 'input', 'weight', 'act', 'learned'],
    )
    self.assertEqual(
      lines[2].split(), ['time_embed_0', 'dense', '1x8', '4x1', '8', '8', 'no']
    )
    self.assertEqual(
      lines[7].split(), ['op', 'conv', '3x3x8x8', '4x8x8x8', 'float', 'float']
    )
    self.assertEqual(lines[-1], '9 layers quantized, 2 in floating point.')
    self.assertIn('op', policy.format_policy(table))


class TransformTest(parameterized.TestCase):
  def test_layers_in_execution_order(self):
    net, variables, x, t = _net()
    layers = transform.list_layers(net.apply, variables, x, t)
    self.assertEqual([l.path for l in layers], PATHS)
    conv = layers[2]
    self.assertEqual(conv.kind, 'conv')
    self.assertEqual(conv.kernel_shape, (3, 3, 8, 8))
    self.assertEqual(conv.input_shape, (4, 8, 8, 8))
    self.assertEqual(layers[5].output_shape, (4, 4, 4, 8))
    abstract = jax.eval_shape(lambda: (variables, x, t))
    self.assertEqual(transform.list_layers(net.apply, *abstract), layers)

  def test_equals_manual_computation(self):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    kernel = rng.normal(size=(6, 3)).astype(np.float32)
    bias = rng.normal(size=(3,)).astype(np.float32)
    dense = nn.Dense(3)
    variables = {'params': {'kernel': kernel, 'bias': bias}}
    layers = transform.list_layers(dense.apply, variables, x)
    self.assertEqual([l.path for l in layers], [''])
    table = policy.build_policy(layers, (('.*', dict(w=3, a=4)),))
    state = transform.init_state(
      variables, table, method='max', per_channel=False
    )
    state['']['act'] = affine.range_max(x, 4)
    got = transform.quantize(dense.apply)(variables, state, x)

    def snap(v, bits):
      low, high = min(v.min(), 0), max(v.max(), 0)
      scale = (high - low) / np.float32(2**bits - 1)
      zero = np.round(-low / scale)
      codes = np.clip(np.round(v / scale) + zero, 0, 2**bits - 1)
      return (codes - zero) * scale

    want = snap(x, 4) @ snap(kernel, 3) + bias
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    self.assertGreater(np.abs(got - dense.apply(variables, x)).max(), 0.01)

  def test_network_equals_layer_by_layer_computation(self):
    net, variables, x, t = _net()
    table = policy.build_policy(PATHS, policy.ldm_rules(4, 6))
    state = transform.init_state(variables, table)
    state = _with_acts(state, table, net, variables, x, t)
    got = transform.quantize(net.apply)(variables, state, x, t)

    def layer(path, v, strides=1):
      p = variables['params']
      for name in path.split('/'):
        p = p[name]
      kernel = p['kernel']
      if path in state:
        kernel = affine.dequantize(state[path]['weight'])
        v = affine.fake_quant(v, state[path]['act'])
      if kernel.ndim == 2:
        return v @ kernel + p['bias']
      out = jax.lax.conv_general_dilated(
        v,
        kernel,
        (strides, strides),
        'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )
      return out + p['bias']

    def block(name, v, emb):
      h = layer(f'{name}/in_layers_2', nn.silu(v))
      h += layer(f'{name}/emb_layers_1', emb)[:, None, None]
      h = layer(f'{name}/out_layers_3', nn.silu(h))
      if name == 'middle_block_0':
        v = layer(f'{name}/skip_connection', v)
      return v + h

    emb = layer('time_embed_0', t[:, None].astype(jnp.float32))
    h = block('input_blocks_1_0', layer('input_blocks_0_0', x), emb)
    h = block('middle_block_0', layer('op', h, 2), emb)
    np.testing.assert_allclose(got, layer('out_2', h), rtol=1e-4, atol=1e-5)

  def test_jit_equals_eager_and_does_not_retrace(self):
    net, variables, x, t = _net()
    table = policy.build_policy(PATHS, policy.ldm_rules(4, None))
    state = transform.init_state(variables, table)
    traces = []

    def apply(*args):
      traces.append(1)
      return net.apply(*args)

    run = jax.jit(transform.quantize(apply))
    eager = transform.quantize(net.apply)(variables, state, x, t)
    np.testing.assert_allclose(run(variables, state, x, t), eager, atol=1e-5)
    other = jax.tree.map(lambda a: (a * 2).astype(a.dtype), state)
    changed = run(variables, other, x, t)
    self.assertGreater(np.abs(changed - eager).max(), 0.1)
    self.assertLen(traces, 1)

  @parameterized.parameters(True, False)
  def test_eight_bits_are_close_to_floating_point(self, per_channel):
    net, variables, x, t = _net(16)
    want = net.apply(variables, x, t)
    errors = []
    for bits in (8, 4):
      table = policy.build_policy(
        PATHS, policy.ldm_rules(bits, bits, edge_bits=bits)
      )
      state = transform.init_state(
        variables, table, method='max', per_channel=per_channel
      )
      state = _with_acts(state, table, net, variables, x, t)
      got = transform.quantize(net.apply)(variables, state, x, t)
      errors.append(float(np.std(got - want) / np.std(want)))
    self.assertLess(errors[0], 0.04)
    self.assertGreater(errors[1], 5 * errors[0])

  def test_empty_state_is_the_plain_model(self):
    net, variables, x, t = _net()
    np.testing.assert_array_equal(
      transform.quantize(net.apply)(variables, {}, x, t),
      net.apply(variables, x, t),
    )

  def test_keyword_inputs_are_quantized_too(self):
    class Keyword(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(2, name='d')(inputs=x)

    x = jnp.asarray([[0.3, -0.7]])
    net = Keyword()
    variables = net.init(jax.random.key(0), x)
    self.assertLen(transform.list_layers(net.apply, variables, x), 1)
    state = {'d': {'weight': None, 'act': affine.range_max(x, 2)}}
    got = transform.quantize(net.apply)(variables, state, x)
    want = net.apply(variables, affine.fake_quant(x, state['d']['act']))
    np.testing.assert_array_equal(got, want)
    self.assertGreater(np.abs(got - net.apply(variables, x)).max(), 0.01)

  def test_state_that_does_not_fit_is_an_error(self):
    net, variables, x, t = _net()
    table = policy.build_policy(PATHS, policy.ldm_rules(4, None))
    state = transform.init_state(variables, table)
    run = transform.quantize(net.apply)
    with self.assertRaisesRegex(KeyError, "'other'"):
      run(variables, {'other': state['out_2']}, x, t)
    with self.assertRaisesRegex(ValueError, "'out_2'"):
      run(variables, {'out_2': state['input_blocks_0_0']}, x, t)
    with self.assertRaisesRegex(KeyError, "'other'"):
      transform.init_state(variables, {'other': policy.LayerBits(4, 4)})

  def test_state_is_a_pytree_that_checkpoints(self):
    net, variables, x, t = _net()
    table = policy.build_policy(PATHS, policy.ldm_rules(4, 8))
    state = transform.init_state(variables, table)
    state = _with_acts(state, table, net, variables, x, t)
    state['out_2'] = {**state['out_2'], 'act': None}
    arrays = transform.state_to_arrays(state)
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'state')
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, arrays)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path)
    again = transform.state_from_arrays(restored)
    self.assertEqual(jax.tree.structure(again), jax.tree.structure(state))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    self.assertEqual(arrays['out_2']['weight']['zero_point'].dtype, np.int16)
    self.assertEqual(again['out_2']['weight'].zero_point.dtype, np.float32)
    wide = jax.tree.map(jnp.asarray, state)
    weight = wide['out_2']['weight'].replace(zero_point=jnp.float32(2**15))
    wide['out_2']['weight'] = weight
    kept = transform.state_to_arrays(wide)['out_2']['weight']['zero_point']
    self.assertEqual(kept.dtype, np.float32)
    self.assertEqual(again['time_embed_0']['weight'].bits, 8)
    bad = {'a': {'weight': {'codes': jnp.zeros(3)}}}
    with self.assertRaisesRegex(ValueError, 'expected'):
      transform.state_from_arrays(bad)
    with self.assertRaisesRegex(ValueError, 'unknown entry'):
      transform.state_from_arrays({'a': {'bias': {}}})


if __name__ == '__main__':
  absltest.main()
