"""Constants of TensorFlow graphs: every way to write them, and damage."""

import graph_files as g
import numpy as np
import pytest
from d2dpm_jax.convert.graph_def import read_graph
from d2dpm_jax.convert.torch_reader import CheckpointError


def _write(tmp_path, *nodes):
  path = tmp_path / 'graph.pb'
  path.write_bytes(b''.join(nodes))
  return path


def test_numbers_in_every_way_of_writing_them(tmp_path):
  want = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5
  one_by_one = b''.join(g.float_field(5, v) for v in want.ravel())
  packed = g.field(5, want.tobytes())
  doubles = g.field(6, want.astype('<f8').tobytes())
  whole = g.field(4, want.astype('<f8').tobytes())
  graph = read_graph(
    _write(
      tmp_path,
      g.array('content', want),
      g.constant('one by one', (2, 3), one_by_one),
      g.constant('packed', (2, 3), packed),
      g.constant('filled', (2, 3), g.float_field(5, 0.5)),
      g.constant('doubles', (2, 3), doubles, g.DOUBLE),
      g.constant('whole', (2, 3), whole, g.DOUBLE),
      g.constant('scalar', (), g.float_field(5, 7.0)),
      g.constant('empty', (0, 3), b''),
    )
  )
  arrays = {name: ref.read() for name, ref in graph.constants.items()}
  for name in ('content', 'one by one', 'packed', 'doubles', 'whole'):
    np.testing.assert_array_equal(arrays[name], want)
    assert arrays[name].dtype == graph.constants[name].dtype
    assert arrays[name].flags.writeable
  assert arrays['whole'].dtype == np.float64
  np.testing.assert_array_equal(arrays['filled'], np.full((2, 3), 0.5))
  assert arrays['scalar'].shape == () and arrays['scalar'] == 7
  assert arrays['empty'].shape == (0, 3)


def test_what_is_not_a_tensor_of_numbers_is_told_apart(tmp_path):
  graph = read_graph(
    _write(
      tmp_path,
      g.constant('axis', (), g.field(7, 3), g.INT32),
      g.constant('jpeg', (), g.field(8, 'bytes'), g.STRING),
      g.node('x', 'Relu', {'T': g.field(6, 1), 'k': g.field(3, 4)}, ['y']),
      g.batch_norm('norm', epsilon=0.5, scale=False),
      g.field(4, g.field(1, 8)),  # The graph's version.
    )
  )
  assert graph.constants == {}
  assert graph.others == ['axis', 'jpeg']
  assert graph.attributes == {
    'x': {'k': 4},
    'norm': {'variance_epsilon': 0.5, 'scale_after_normalization': 0},
  }


_SIX = np.zeros(6, '<f4').tobytes()


@pytest.mark.parametrize(
  'data,message',
  [
    (b'', 'it has no nodes'),
    (b'\n', 'it ends within a number'),
    (b'\n\xff', 'it ends within a number'),
    (b'\n' + b'\xff' * 10, 'a number of more than 10 bytes'),
    (b'\n\x7fabc', 'a value of 127 bytes where 3 are left'),
    (b'\x0b', 'a value of unknown kind 3'),
    (b'\x09abc', 'a value of 8 bytes where 3 are left'),
    (g.field(1, 5), 'a number where a message is expected'),
    (g.field(1, g.field(1, b'\xff')), 'a name that is not UTF-8'),
    (g.node('a', 'Const'), "'a' has no value"),
    (g.array('a', [1]) + g.array('a', [1]), "two nodes named 'a'"),
    (g.constant('a', (2, 4), g.field(4, _SIX)), r'\(2, 4\) has 24 bytes'),
    (g.constant('a', (5,), g.field(5, _SIX)), r'\(5,\) has 24 bytes'),
    (g.constant('a', (7,), g.field(5, _SIX[:-1])), 'has 23 bytes'),
    (g.constant('a', (7,), b''), 'has 0 bytes'),
    (g.constant('a', (7,), g.field(5, 1)), 'a number where a message'),
    (g.constant('a', (2**64 - 1,), g.field(4, _SIX)), 'no fixed shape'),
    (g.constant('a', (1,) * 33, g.field(4, _SIX[:4])), '33 axes'),
    (b'\n<!DOCTYPE html><html></html>', 'a value of 60 bytes'),
  ],
)
def test_damage(tmp_path, data, message):
  with pytest.raises(CheckpointError, match=f'no TensorFlow graph.*{message}'):
    read_graph(_write(tmp_path, data))


def test_truncated_anywhere(tmp_path):
  data = g.array('a', np.ones(3)) + g.batch_norm('b')
  whole = len(g.array('a', np.ones(3)))
  for end in range(1, len(data)):
    path = _write(tmp_path, data[:end])
    if end == whole:
      assert list(read_graph(path).constants) == ['a']
    else:
      with pytest.raises(CheckpointError):
        read_graph(path)


def test_random_bytes_give_no_other_errors(tmp_path):
  rng = np.random.default_rng(0)
  data = bytearray(g.array('a', np.ones(3)) + g.batch_norm('b'))
  for _ in range(500):
    broken = data.copy()
    for place in rng.integers(0, len(data), 3):
      broken[place] = rng.integers(256)
    try:
      for ref in read_graph(_write(tmp_path, broken)).constants.values():
        ref.read()
    except CheckpointError:
      pass


def test_missing_file(tmp_path):
  with pytest.raises(CheckpointError, match='cannot be opened: No such file'):
    read_graph(tmp_path / 'x.pb')
