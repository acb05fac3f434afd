"""Integer layers: equal to 64-bit integers, and to simulated quantization."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_unets import UNETS

from d2dpm_jax.quantization import (
  affine,
  integer,
  integer_model,
  packing,
  policy,
  transform,
)

# Zero points of inputs and weights in units of the top code; beyond 0 .. 1 they
# lie outside the codes.
_ZEROS = {'inside': (0.4, 0.5), 'below': (-0.6, -0.3), 'above': (1.7, 1.2)}
_PADDINGS = {
  'none': ((0, 0), (0, 0)),
  'same': ((1, 1), (1, 1)),
  'right': ((0, 1), (0, 1)),
  'wide': ((2, 0), (1, 3)),
}


def _layer(rng, shape, w, a, zeros='inside', per_channel=True):
  """Quantizers of a random kernel, and inputs that reach beyond their grid."""
  zero_x, zero_w = (np.float32(z) for z in _ZEROS[zeros])
  grid = [1] * (len(shape) - 1) + [shape[-1]] if per_channel else []
  zero_w = np.round(zero_w * (2**w - 1)) + rng.integers(0, 2, grid)
  weight = affine.QWeight(
    rng.integers(0, 2**w, shape, np.uint8),
    rng.uniform(0.01, 0.1, grid).astype(np.float32),
    np.float32(zero_w),
    w,
  )
  zero_x = np.round(zero_x * (2**a - 1))
  act = affine.QParams(np.float32(0.05), zero_x, a)

  def inputs(*size):
    codes = rng.uniform(-0.1, 1.1, size) * 2**a
    return ((codes - zero_x) * 0.05).astype(np.float32)

  return transform.LayerState(weight=weight, act=act), inputs


def _whole(layer, x):
  """q - zx and c - zw as 64-bit integers."""
  act, weight = layer['act'], layer['weight']
  codes = np.round(x / act.scale) + act.zero_point
  q = np.clip(codes, 0, 2**act.bits - 1) - act.zero_point
  c = np.float64(weight.codes) - weight.zero_point
  return q.astype(np.int64), np.broadcast_to(c, c.shape).astype(np.int64)


def _reference(layer, x, strides, padding):
  q, c = _whole(layer, x)
  q = np.pad(q, ((0, 0), *padding, (0, 0)))  # Zeros after quantization.
  size = c.shape[:2]
  height, width = (
    (n - k) // s + 1
    for n, k, s in zip(q.shape[1:3], size, strides, strict=True)
  )
  out = np.zeros((len(q), height, width, c.shape[-1]), np.int64)
  for i in range(height):
    for j in range(width):
      rows = slice(i * strides[0], i * strides[0] + size[0])
      columns = slice(j * strides[1], j * strides[1] + size[1])
      out[:, i, j] = np.einsum('bhwi,hwio->bo', q[:, rows, columns], c)
  return out


def _conv(layer, x, strides, padding):
  run = jax.jit(integer.conv, static_argnums=(2, 3))
  found = run(integer.prepare({'': layer})[''], x, strides, padding)
  assert found.dtype == jnp.int32
  return found


@pytest.mark.parametrize('zero', [0, 77, 255, 300, -9000])
@pytest.mark.parametrize('bits', [2, 8])
def test_rounds_as_codes_do(bits, zero):
  """At ties, at both ends and far beyond them, in either dtype."""
  act = affine.QParams(np.float32(0.5), np.float32(zero), bits)
  weight = affine.QWeight(
    np.zeros([1, 1], np.uint8), np.float32(1), np.float32(0), 8
  )
  state = {'': transform.LayerState(weight=weight, act=act)}
  layer = integer.prepare(state)['']
  near = np.arange(-2, 2**bits + 2, 0.25) - zero
  x = 0.5 * np.concatenate([near, [-1e30, -3e7, 3e7, 1e30, np.inf, -np.inf]])
  for dtype in (jnp.float32, jnp.bfloat16):
    given = jnp.asarray(x, dtype)[:, None]
    codes = affine.quantize(given.astype(jnp.float32), act).codes
    whole = np.asarray(codes, np.int64) - zero
    found = jax.jit(integer.input_operand)(layer, given)
    offset = np.clip(zero, 2**bits - 128, 128)
    np.testing.assert_array_equal(found, whole + zero - offset)


@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('zeros', _ZEROS)
@pytest.mark.parametrize('bits', [(2, 8), (4, 8), (8, 8), (4, 4), (8, 4)])
def test_conv_equals_integers(bits, zeros, per_channel):
  rng = np.random.default_rng(bits)
  layer, inputs = _layer(rng, (3, 3, 5, 4), *bits, zeros, per_channel)
  x = inputs(2, 5, 6, 5)
  want = _reference(layer, x, (1, 1), _PADDINGS['same'])
  found = _conv(layer, x, (1, 1), _PADDINGS['same'])
  np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize('padding', _PADDINGS)
@pytest.mark.parametrize('strides', [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize('size', [(1, 1), (3, 3), (2, 3)])
def test_geometry_equals_integers(size, strides, padding):
  rng = np.random.default_rng(0)
  layer, inputs = _layer(rng, (*size, 4, 3), 8, 8)
  x = inputs(2, 6, 5, 4)
  want = _reference(layer, x, strides, _PADDINGS[padding])
  found = _conv(layer, x, strides, _PADDINGS[padding])
  np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize('zeros', _ZEROS)
@pytest.mark.parametrize('bits', [(3, 8), (8, 8), (8, 6)])
@pytest.mark.parametrize('batch', [(3,), (2, 4)])
def test_dense_equals_integers(bits, zeros, batch):
  rng = np.random.default_rng(bits)
  layer, inputs = _layer(rng, (7, 5), *bits, zeros)
  x = inputs(*batch, 7)
  q, c = _whole(layer, x)
  prepared = integer.prepare({'': layer})['']
  found = jax.jit(integer.dense)(prepared, x)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, q @ c)


@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('bits', [(2, 8), (4, 8), (8, 8), (8, 4)])
def test_whole_numbers_in_bfloat16_are_the_same_sums(bits, per_channel):
  rng = np.random.default_rng(3)
  layer, inputs = _layer(rng, (3, 3, 5, 4), *bits, 'inside', per_channel)
  x = inputs(2, 5, 6, 5)
  prepared = integer.prepare({'': layer}, [''])
  assert prepared[''].in_bfloat16
  ready = integer_model.ready(prepared)['']
  assert ready.correction is None
  for strides in ((1, 1), (2, 2)):
    want = _reference(layer, x, strides, _PADDINGS['same'])
    found = integer.conv(ready, x, strides, _PADDINGS['same'])
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, want)
  # Layers of a bfloat16 network have their sums written as such.
  short = integer.conv(ready, x, strides, _PADDINGS['same'], jnp.bfloat16)
  np.testing.assert_array_equal(short, jnp.asarray(want, jnp.bfloat16))
  layer, inputs = _layer(rng, (7, 5), *bits, 'inside', per_channel)
  x = inputs(2, 3, 7)
  q, c = _whole(layer, x)
  found = integer.dense(integer.prepare({'': layer}, [''])[''], x)
  np.testing.assert_array_equal(found, q @ c)


@pytest.mark.parametrize('zeros', ['below', 'above'])
def test_zero_points_beyond_the_codes_stay_with_int8(zeros):
  layer, _ = _layer(np.random.default_rng(0), (3, 3, 4, 3), 8, 8, zeros)
  assert not integer.prepare({'': layer}, [''])[''].in_bfloat16
  assert not integer.prepare({'': layer}, ['other'])[''].in_bfloat16


@pytest.mark.parametrize('zeros', _ZEROS)
@pytest.mark.parametrize('bits', [(3, 8), (8, 8)])
def test_whole_numbers_in_float32_are_the_same_sums(bits, zeros):
  rng = np.random.default_rng(4)
  layer, inputs = _layer(rng, (3, 3, 5, 4), *bits, zeros)
  x = inputs(2, 5, 6, 5)
  simulated = integer.simulate({'': layer})['']
  assert simulated.kernel.dtype == jnp.float32 and simulated.bits == 8
  want = _reference(layer, x, (1, 1), _PADDINGS['same'])
  found = integer.conv(simulated, x, padding=_PADDINGS['same'])
  np.testing.assert_array_equal(found, want)
  layer, inputs = _layer(rng, (7, 5), *bits, zeros)
  x = inputs(2, 3, 7)
  q, c = _whole(layer, x)
  found = integer.dense(integer.simulate({'': layer})[''], x)
  np.testing.assert_array_equal(found, q @ c)


def test_unpacking_first():
  rng = np.random.default_rng(5)
  layer, inputs = _layer(rng, (3, 3, 5, 4), 4, 8)
  x = inputs(2, 5, 6, 5)
  prepared = integer.prepare({'': layer}, unpack_first=True)
  assert prepared[''].kernel.shape == (3, 3, 3, 4)
  ready = integer_model.ready(prepared)['']
  assert ready.kernel.shape == (3, 3, 5, 4) and ready.kernel.dtype == jnp.int8
  want = _reference(layer, x, (1, 1), _PADDINGS['same'])
  found = integer.conv(ready, x, padding=_PADDINGS['same'])
  np.testing.assert_array_equal(found, want)


def test_sums_that_float32_does_not_hold():
  """Above 2**24, which no rounding may hide; still below 2**31."""
  rng = np.random.default_rng(0)
  layer, inputs = _layer(rng, (3, 3, 512, 2), 8, 8)
  layer['weight'] = layer['weight'].replace(
    codes=rng.integers(240, 256, (3, 3, 512, 2), np.uint8)
  )
  x = np.abs(inputs(1, 3, 3, 512))
  want = _reference(layer, x, (1, 1), _PADDINGS['same'])
  assert want.max() > 2**24
  found = _conv(layer, x, (1, 1), _PADDINGS['same'])
  np.testing.assert_array_equal(found, want)


def test_corrections_that_are_zero_are_left_out():
  rng = np.random.default_rng(0)
  for bits, zeros, shift, correction in (
    ((8, 8), 'inside', True, True),
    ((4, 8), 'inside', False, True),
    ((4, 6), 'inside', False, False),
    ((4, 4), 'above', False, False),
    ((6, 8), 'below', False, True),
    ((7, 7), 'below', True, True),
  ):
    layer, _ = _layer(rng, (3, 3, 4, 3), *bits, zeros)
    found = integer.prepare({'': layer})['']
    assert (found.shift is not None) == shift, bits
    assert found.corrected == correction, bits


@pytest.mark.parametrize('zeros', _ZEROS)
def test_corrections_once_for_many_calls(zeros):
  rng = np.random.default_rng(0)
  layer, inputs = _layer(rng, (3, 3, 5, 4), 8, 8, zeros)
  x = inputs(2, 5, 6, 5)
  prepared = integer.prepare({'': layer})
  ready = jax.jit(integer_model.ready)(prepared)['']
  # One number per channel where images can be padded with the code of zero.
  assert ready.correction.shape == ((4,) if zeros == 'inside' else (3, 3, 4))
  want = integer.conv(prepared[''], x, padding=_PADDINGS['same'])
  found = integer.conv(ready, x, padding=_PADDINGS['same'])
  np.testing.assert_array_equal(found, want)


def test_convolutions_on_gpus(monkeypatch):
  """XLA refuses int32 results there; the sums are the same."""
  rng = np.random.default_rng(0)
  layer, inputs = _layer(rng, (3, 3, 5, 4), 8, 8)
  x = inputs(2, 5, 6, 5)
  want = _reference(layer, x, (1, 1), _PADDINGS['same'])
  prepared = integer.prepare({'': layer})['']
  for backend, dtype in ('gpu', 'float32'), ('tpu', 'int32'):
    monkeypatch.setattr(jax, 'default_backend', lambda name=backend: name)
    run = functools.partial(integer.conv, padding=_PADDINGS['same'])
    text = str(jax.make_jaxpr(run)(prepared, x))
    assert f'preferred_element_type={dtype}' in text
    np.testing.assert_array_equal(run(prepared, x), want)  # Below 2**24.


# ---- Layers of Flax.


class _Layers(nn.Module):
  """Every kind of layer, each on an input of its own."""

  dtype: object = None

  @nn.compact
  def __call__(self, x, tokens, vector):
    def conv(size, **kwargs):
      return nn.Conv(6, size, dtype=self.dtype, **kwargs)

    padding = dict(strides=(2, 2), padding=((0, 1), (0, 1)))
    return (
      conv((3, 3), padding=1, name='same')(x),
      conv((3, 3), name='text')(x),
      conv((3, 3), padding='VALID', use_bias=False, name='valid')(x),
      conv((3, 3), **padding, name='down')(x),
      conv((1, 1), name='point')(inputs=x),
      nn.Dense(6, dtype=self.dtype, name='tokens')(tokens),
      nn.Dense(6, use_bias=False, dtype=self.dtype, name='vector')(vector),
    )


def _inputs_of(apply, paths, *args):
  seen = {}
  with transform.intercept_inputs(lambda p, v: seen.setdefault(p, v), paths):
    apply(*args)
  return seen


def _quantizers(variables, seen, table, per_channel=True):
  """Nearest weights, and grids over the inputs that layers see."""
  state = transform.init_state(
    variables, table, method='max', per_channel=per_channel
  )
  for path, layer in state.items():
    layer['act'] = affine.range_max(seen[path], table[path].a)
  return state


def _draw(rng, shapes):
  def draw(leaf):  # Variance 1 / fan in; no zero biases.
    value = rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
    return jnp.asarray(value, jnp.float32)

  return jax.tree.map(draw, shapes)


def _distance(found, want):
  found, want = (np.asarray(v, np.float64) for v in (found, want))
  return np.abs(found - want).max() / np.abs(want).max()


@pytest.mark.parametrize('bits', [(8, 8), (4, 8), (3, 4)])
@pytest.mark.parametrize(
  ('dtype', 'per_channel'),
  [(None, True), (None, False), (jnp.bfloat16, True)],
)
def test_layers_equal_simulated_ones(bits, dtype, per_channel):
  rng = np.random.default_rng(1)
  net = _Layers(dtype)
  args = [
    jnp.asarray(rng.normal(0.3, 1, shape), jnp.float32)
    for shape in ((2, 6, 6, 5), (2, 3, 7), (4, 8))
  ]
  shapes = jax.eval_shape(net.init, jax.random.key(0), *args)
  variables = _draw(rng, shapes)
  layers = transform.list_layers(net.apply, variables, *args)
  seen = _inputs_of(net.apply, [l.path for l in layers], variables, *args)
  table = {l.path: policy.LayerBits(*bits) for l in layers}
  state = _quantizers(variables, seen, table, per_channel)
  want = jax.jit(transform.quantize(net.apply))(variables, state, *args)
  prepared = integer.prepare(state)
  assert all(isinstance(v, integer.IntegerLayer) for v in prepared.values())
  slim = integer_model.without_kernels(variables, prepared)
  found = jax.jit(integer_model.apply(net.apply))(slim, prepared, *args)
  for layer, a, b in zip(layers, found, want, strict=True):
    assert a.dtype == b.dtype == (dtype or jnp.float32), layer.path
    assert a.shape == b.shape, layer.path
    # bfloat16 rounds inputs, kernels and outputs of simulated layers.
    tolerance = 1e-6 if dtype is None else 2e-2
    assert _distance(a, b) <= tolerance, layer.path
    assert np.asarray(a, np.float32).std() > 0.1, layer.path


def test_layers_that_do_not_run_on_integers_are_simulated():
  rng = np.random.default_rng(2)
  net = _Layers()
  args = [
    jnp.asarray(rng.normal(0.3, 1, shape), jnp.float32)
    for shape in ((2, 6, 6, 5), (2, 3, 7), (4, 8))
  ]
  variables = _draw(rng, jax.eval_shape(net.init, jax.random.key(0), *args))
  layers = transform.list_layers(net.apply, variables, *args)
  seen = _inputs_of(net.apply, [l.path for l in layers], variables, *args)
  table = {l.path: policy.LayerBits(4, 8) for l in layers}
  state = _quantizers(variables, seen, table)
  state['same']['weight'] = None
  state['text']['act'] = None
  act = state['down']['act']
  state['down']['act'] = act.replace(
    scale=jnp.full([1, 1, 1, 5], act.scale),
    zero_point=jnp.full([1, 1, 1, 5], act.zero_point),
  )
  act = state['tokens']['act']
  state['tokens']['act'] = act.replace(zero_point=act.zero_point + 0.5)
  act = state['vector']['act']
  state['vector']['act'] = act.replace(zero_point=jnp.float32(2**30))
  del state['valid']
  prepared = integer.prepare(state)
  kinds = {p: isinstance(v, integer.IntegerLayer) for p, v in prepared.items()}
  assert [p for p, found in kinds.items() if found] == ['point']
  assert isinstance(prepared['text']['weight'], packing.PackedWeight)
  want = transform.quantize(net.apply)(variables, state, *args)
  slim = integer_model.without_kernels(variables, prepared)
  kept = [p for p, v in slim['params'].items() if v['kernel'].size]
  assert sorted(kept) == ['same', 'valid']
  found = integer_model.apply(net.apply)(slim, prepared, *args)
  for layer, a, b in zip(layers, found, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=layer.path)


@pytest.mark.parametrize(
  'conv',
  [
    nn.Conv(4, (3, 3), feature_group_count=2),
    nn.Conv(4, (3, 3), kernel_dilation=2),
    nn.Conv(4, (3, 3), padding='CIRCULAR'),
    nn.Conv(4, (3,)),
  ],
)
def test_unknown_convolutions_are_refused(conv):
  rng = np.random.default_rng(0)
  shape = (*conv.kernel_size, 4 // conv.feature_group_count, 4)
  layer, inputs = _layer(rng, shape, 8, 8)
  x = inputs(*[2, 6, 6][: len(conv.kernel_size) + 1], 4)
  run = integer_model.apply(conv.apply)
  variables = {'params': {'kernel': np.zeros(0), 'bias': np.zeros(4)}}
  with pytest.raises(ValueError, match="''.*"):
    run(variables, integer.prepare({'': layer}), x)


def test_inputs_that_do_not_fit_are_refused():
  rng = np.random.default_rng(0)
  layer, inputs = _layer(rng, (3, 3, 4, 4), 8, 8)
  prepared = integer.prepare({'': layer})['']
  with pytest.raises(ValueError, match='kernel'):
    integer.conv(prepared, inputs(1, 5, 5, 3))
  layer, inputs = _layer(rng, (4, 4), 8, 8)
  with pytest.raises(ValueError, match='kernel'):
    integer.dense(integer.prepare({'': layer})[''], inputs(5, 3))


# ---- U-Nets of the three families.


def _matches(rule, layers):
  return any(re.fullmatch(rule[0], layer.path) for layer in layers)


@pytest.mark.parametrize('name', UNETS)
def test_unets_equal_simulated_ones(name):
  """Every layer on the same inputs, and the network as a whole."""
  rng = np.random.default_rng(0)
  net = UNETS[name]
  x = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
  t = jnp.asarray([10, 700])
  context = None
  if net.context_dim:
    context = jnp.asarray(rng.normal(size=(2, 1, 16)), jnp.float32)
  args = (x, t, context)
  shapes = jax.eval_shape(net.init, jax.random.key(0), *args)
  variables = _draw(rng, shapes)
  variables = jax.tree_util.tree_map_with_path(
    lambda path, v: 1 + 0.1 * v if path[-1].key == 'scale' else v, variables
  )
  layers = transform.list_layers(net.apply, variables, *args)
  rules = [rule for rule in policy.ldm_rules(4, 8) if _matches(rule, layers)]
  table = policy.build_policy(layers, rules)
  state = transform.init_state(variables, table)
  for layer in state.values():  # From -4 .. -2 to 2 .. 4, about.
    scale, zero_point = rng.uniform(0.02, 0.03), rng.integers(96, 160)
    layer['act'] = affine.QParams(np.float32(scale), np.float32(zero_point), 8)
  prepared = integer.prepare(state)
  assert all(isinstance(v, integer.IntegerLayer) for v in prepared.values())
  slim = integer_model.without_kernels(variables, prepared)
  distances = {}

  @jax.jit
  def run(variables, slim, state, prepared, args):
    def beside(call, args, kwargs, context):
      """Both kinds of layer on the input of the simulated one."""
      out = call(*args, **kwargs)
      path = transform.path_of(context.module)
      if context.method_name == '__call__' and path in prepared:
        other = integer_model.run_layer(context.module, prepared[path], *args)
        distances[path] = abs(other - out).max() / abs(out).max()
      return out

    with nn.intercept_methods(beside):
      want = transform.quantize(net.apply)(variables, state, *args)
    return {
      'want': want,
      'found': integer_model.apply(net.apply)(slim, prepared, *args),
      'distances': distances,
    }

  @jax.jit
  def run_alone(slim, layers, args):
    return integer_model.apply(net.apply)(
      slim, integer_model.ready(layers), *args
    )

  out = run(variables, slim, state, prepared, args)
  # Whole numbers in float32, in a program of their own.
  alone = run_alone(slim, prepared, args)
  simulated = run_alone(slim, integer.simulate(state), args)
  assert np.linalg.norm(alone - simulated) <= 1e-3 * np.linalg.norm(simulated)
  assert out['distances'].keys() == state.keys()
  for path, distance in out['distances'].items():
    assert distance <= 2e-6, path

  # Where a last bit decides how an input is rounded, whole steps differ in the
  # two networks from there on; with random weights that is up to 1 %.
  difference = np.linalg.norm(out['found'] - out['want'])
  assert difference <= 0.02 * np.linalg.norm(out['want'])
