"""Costs by hand: small layers, whose numbers a reader can check."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from d2dpm_jax.quantization import cost, policy, transform

_W4A8 = policy.LayerBits(4, 8)
# Two images; 3x3 from 5 to 7 channels, 4x6 pixels.
_CONV = transform.Layer(
  'conv', 'conv', (3, 3, 5, 7), (2, 8, 12, 5), (2, 4, 6, 7)
)
# Two sequences of ten tokens.
_DENSE = transform.Layer('dense', 'dense', (5, 7), (2, 10, 5), (2, 10, 7))
_LAYERS = (_CONV, _DENSE)


def test_multiplications():
  assert cost.macs(_CONV) == 2 * (4 * 6) * (3 * 3 * 5 * 7) == 15120
  assert cost.macs(_DENSE) == 2 * 10 * (5 * 7) == 700


def test_released_counting_forgets_tokens_and_batch():
  assert cost.released_macs(_CONV) == 15120 // 2
  assert cost.released_macs(_DENSE) == 5 * 7


def test_bit_operations():
  assert cost.bops(10, 4, 8) == 2 * 10 * 4 * 8
  assert cost.bops(10, None, 8) == 2 * 10 * 32 * 8
  assert cost.bops(10, 4, None) == 2 * 10 * 4 * 32
  assert cost.bops(10, None, None) == 2 * 10 * 32 * 32


@pytest.mark.parametrize(
  ('bits', 'per_channel', 'wanted'),
  [
    (None, True, 4 * 35),
    # 5 rows of codes in 3, a grid per channel, one of the input; two numbers
    # of the weight, one of the input.
    (_W4A8, True, 21 + 7 * 6 + 8 + 6 + 4),
    (_W4A8, False, 21 + 6 + 8 + 6 + 4),
    (policy.LayerBits(8, 8), False, 35 + 6 + 8 + 6 + 4),
    (policy.LayerBits(3, None), True, 21 + 7 * 6 + 8),
    (policy.LayerBits(None, 8), True, 4 * 35 + 6 + 4),
  ],
)
def test_bytes_of_a_layer(bits, per_channel, wanted):
  assert cost.layer_cost(_DENSE, bits, per_channel).bytes == wanted


def test_bit_operations_of_a_layer_are_at_its_own_bits():
  assert cost.layer_cost(_CONV, _W4A8, True).bops == 2 * 15120 * 4 * 8
  assert cost.layer_cost(_CONV, None, True).bops == 2 * 15120 * 32 * 32


def test_released_bit_operations_are_of_quantized_layers_at_equal_bits():
  edge = policy.LayerBits(8, 8)
  both = {'conv': edge, 'dense': _W4A8}
  assert cost.released_bops(_LAYERS, both, 4, 8) == 2 * (7560 + 35) * 32
  one = {'conv': None, 'dense': edge}
  assert cost.released_bops(_LAYERS, one, None, None) == 2 * 35 * 1024


def _params():
  shapes = {
    'conv': {'kernel': (3, 3, 5, 7), 'bias': (7,)},
    'dense': {'kernel': (5, 7)},
    'norm': {'scale': (7,), 'bias': (7,)},
  }
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
    shapes,
    is_leaf=lambda s: isinstance(s, tuple),
  )


def test_bytes_of_a_network_count_what_stays_float():
  params = _params()
  assert cost.array_bytes(params) == 4 * (315 + 7 + 35 + 7 + 7)
  table = {'conv': None, 'dense': _W4A8}
  assert cost.network_bytes(params, _LAYERS, table, False) == (
    4 * (315 + 7 + 7 + 7) + (21 + 6 + 8 + 6 + 4)
  )
  assert cost.network_bytes(params, _LAYERS, table, False, 2) == (
    2 * (315 + 7 + 7 + 7) + (21 + 6 + 8 + 6 + 4)
  )
  table = {'conv': None, 'dense': policy.LayerBits(None, 8)}
  assert cost.network_bytes(params, _LAYERS, table, False, 2) == (
    2 * (315 + 7 + 7 + 7 + 35) + (6 + 4)
  )
  table['dense'] = None
  assert cost.network_bytes(params, _LAYERS, table, False, 2) == 4 * 371


def test_released_bytes_shrink_everything_called_weight():
  params = {**_params(), 'book': {'embedding': jnp.zeros([10, 3])}}
  params['scale_factor'] = jnp.ones([])
  rest = 4 * (7 + 7 + 1)
  sizes = (315, 35, 7, 30)
  assert cost.released_bytes(params, None) == rest + 4 * sum(sizes)
  assert cost.released_bytes(params, 8) == rest + sum(sizes)
  assert cost.released_bytes(params, 4) == rest + sum(-(-n // 2) for n in sizes)


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3, 3), strides=2, padding=1, feature_group_count=2)(x)
    x = nn.Dense(4)(x)  # [2, 4, 4, 4]
    tokens = x.reshape(2, 16, 4)
    return jnp.einsum('bld,bmd->blm', tokens, tokens)


def test_every_product_of_a_program_is_counted():
  net = _Net()
  x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  conv = 2 * (4 * 4) * (3 * 3 * 2 * 6)
  dense = 2 * (4 * 4) * (6 * 4)
  attention = 2 * (16 * 16) * 4
  layers = transform.list_layers(net.apply, variables, x)
  assert [cost.macs(layer) for layer in layers] == [conv, dense]
  wanted = conv + dense + attention
  assert cost.count_macs(net.apply, variables, x) == wanted
  assert cost.count_macs(jax.jit(net.apply), variables, x) == wanted


def test_products_in_a_loop_are_counted_as_often_as_it_runs():
  def step(x, _):
    return x @ x, None

  x = jnp.zeros([3, 3])
  count = cost.count_macs(lambda x: jax.lax.scan(step, x, length=5)[0], x)
  assert count == 5 * 27
