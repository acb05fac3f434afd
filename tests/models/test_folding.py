"""Constants of a sampling run: the same numbers as the plain network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from random_params import random_params
from small_unets import UNETS

from d2dpm_jax.models import folding
from d2dpm_jax.quantization import (
  affine,
  integer,
  integer_model,
  policy,
  transform,
)

_T = (901, 401, 1)


def _inputs(net, tokens=1):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
  if not net.context_dim:
    return x, None
  context = rng.normal(size=(2, tokens, net.context_dim))
  return x, jnp.asarray(context, jnp.float32)


def _row(constants, step):
  by_step = jax.tree.map(lambda a: a[step], constants.by_step)
  return constants._replace(by_step=by_step)


def _distance(found, want):
  return np.linalg.norm(found - want) / np.linalg.norm(want)


@functools.cache
def _variables(name):
  net = UNETS[name]
  x, context = _inputs(net)
  return random_params(net, x, jnp.zeros([2]), context)


@pytest.mark.parametrize('name', ['imagenet', 'churches'])
def test_equals_the_plain_network(name):
  net, variables = UNETS[name], _variables(name)
  x, context = _inputs(net)
  network = functools.partial(net.apply, variables)

  @jax.jit
  def both(x, context):
    t = jnp.asarray(_T)
    constants = folding.compute(network, x.shape[1:], t, context)
    unused = None if context is None else 0 * context
    pairs = []
    for step, number in enumerate(_T):
      want = network(x, jnp.full([2], number), context)
      row = _row(constants, step)
      found = folding.apply(network, row, x, jnp.full([2], -1), unused)
      pairs.append((found, want))
    return pairs, constants

  pairs, constants = both(x, context)
  for found, want in pairs:
    assert _distance(found, want) <= 1e-6
  blocks = [k for k in constants.by_step if k.endswith('emb_layers_1')]
  kernels = jax.tree_util.tree_leaves_with_path(variables['params'])
  names = [jax.tree_util.keystr(path) for path, _ in kernels]
  assert len(blocks) == sum(
    'emb_layers_1' in name and 'kernel' in name for name in names
  )
  attention = sum('attn2' in n and 'to_v' in n for n in names)
  assert len(constants.by_image) == attention
  assert bool(attention) == (name == 'imagenet')


def test_longer_contexts_are_attended_to():
  net, variables = UNETS['imagenet'], _variables('imagenet')
  x, context = _inputs(net, tokens=2)
  network = functools.partial(net.apply, variables)
  t = jnp.asarray(_T)
  constants = jax.eval_shape(
    lambda: folding.compute(network, x.shape[1:], t, context)
  )
  assert constants.by_step and not constants.by_image
  plain = folding.Constants({}, {})
  got = folding.apply(network, plain, x, t[:1].repeat(len(x)), context)
  np.testing.assert_array_equal(got, network(x, t[:1].repeat(len(x)), context))


@pytest.mark.parametrize('execution', ['integer', 'simulated'])
def test_quantized_layers_give_the_same_numbers(execution):
  """Layer by layer, on integers to the last bit."""
  net, variables = UNETS['imagenet'], _variables('imagenet')
  x, context = _inputs(net)
  layers = transform.list_layers(
    net.apply, variables, x, jnp.zeros([2]), context
  )
  table = policy.build_policy(layers, [('.*', dict(w=4, a=8))])
  state = transform.init_state(variables, table)
  for layer in state.values():
    layer['act'] = affine.QParams(np.float32(0.03), np.float32(120), 8)
  if execution == 'integer':
    state = integer.prepare(state)
  network = functools.partial(integer_model.apply(net.apply), variables, state)
  seen = {}

  def record(call, args, kwargs, at):
    out = call(*args, **kwargs)
    seen['/'.join(at.module.path)] = out
    return out

  @jax.jit
  def both(x, context):
    t = jnp.full([2], _T[1])
    with nn.intercept_methods(record):
      network(x, t, context)
    return folding.compute(network, x.shape[1:], t, context), {**seen}

  constants, want = both(x, context)
  found = {
    **{path: row[1] for path, row in constants.by_step.items()},
    **constants.by_image,
  }
  assert len(found) > len(constants.by_step) > 0
  for path, value in found.items():
    value = jnp.broadcast_to(value, want[path].shape)
    # Sums of floats depend on how many rows a product has.
    tolerance = 0 if execution == 'integer' else 1e-6
    assert _distance(value, want[path]) <= tolerance, path


def test_rounds_what_layers_round():
  """In bfloat16 the same bits, from kernels of half the size."""
  net = UNETS['imagenet'].clone(dtype=jnp.bfloat16)
  variables = _variables('imagenet')
  x, context = _inputs(net)
  args = (x, jnp.full([2], 401), context)
  rounded = folding.round_parameters(net.apply, variables, *args)
  flat = traverse_util.flatten_dict(rounded['params'], sep='/')
  wide = {path for path, a in flat.items() if a.dtype == jnp.float32}
  assert 'input_blocks_0_0/kernel' not in wide
  # Norms, the timestep embedding and the last layer compute in float32.
  assert {'time_embed_0/kernel', 'out_2/kernel', 'out_0/scale'} <= wide
  assert not any(p.endswith('in_layers_2/kernel') for p in wide)
  np.testing.assert_array_equal(
    net.apply(rounded, *args), net.apply(variables, *args)
  )
