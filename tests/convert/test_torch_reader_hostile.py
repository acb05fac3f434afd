"""Checkpoints that try to run code: none of it runs, the message says why.

The pickles are written by `pickle` or opcode by opcode, in torch_files.py.
"""

import builtins
import functools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from d2dpm_jax.convert.torch_reader import (
  CheckpointError,
  Opaque,
  open_checkpoint,
)
from torch_files import (
  Call,
  pickle_weights,
  push,
  push_global,
  push_tensor,
  write_zip,
)


def test_the_builder_of_these_tests_builds_good_files(tmp_path):
  path = write_zip(tmp_path / 'a.ckpt', pickle_weights(epoch=push(3)))
  with open_checkpoint(path) as checkpoint:
    np.testing.assert_array_equal(
      checkpoint['w'].read(), np.arange(6, dtype=np.float32).reshape(2, 3)
    )
    assert checkpoint.contents == {'state_dict': {}, 'epoch': 3}


def _attacks(sentinel):
  """Objects whose unpickling would create the file `sentinel`."""
  shell = f'touch {sentinel}'
  code = f'open({str(sentinel)!r}, "w")'
  opener = functools.partial(open, sentinel, 'w')
  return {
    'os.system': Call(os.system, shell),
    'eval': Call(eval, code),
    'exec': Call(exec, code),
    'open': Call(open, sentinel, 'w'),
    'import': Call(builtins.__import__, 'antigravity'),
    'popen': Call(subprocess.Popen, ['touch', str(sentinel)]),
    'partial': Call(opener),
    'nested': Call(
      Call(getattr, Call(builtins.__import__, 'os'), 'system'), shell
    ),
    'map': Call(list, Call(map, eval, [code])),
    'key': {Call(os.system, shell): 1},
    'state': [{'deep': (1, [Call(os.system, shell)])}],
  }


@pytest.mark.parametrize('place', ['top', 'weights', 'beside', 'legacy'])
@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('attack', _attacks('x'))
def test_calls_are_refused_and_not_made(
  tmp_path, witness, attack, protocol, place
):
  sentinel = tmp_path / 'sentinel'
  value = _attacks(sentinel)[attack]
  path = tmp_path / 'model.ckpt'
  if place == 'legacy':
    path.write_bytes(pickle.dumps(value, protocol))
  else:
    content = {
      'top': value,
      'weights': {'state_dict': {'w': value}},
      'beside': {'state_dict': {'w': 1}, 'callbacks': value},
    }
    write_zip(path, pickle.dumps(content[place], protocol))
  witness.refuses(path, "model.ckpt: refused, .* Python's standard library")
  assert not sentinel.exists()


_GLOBALS = {
  'posix.system': 'standard library',
  'builtins.getattr': 'standard library',
  '__builtin__.eval': 'standard library',
  'commands.getoutput': 'standard library',
  'copyreg.add_extension': 'standard library',
  'importlib.import_module': 'standard library',
  'functools.partial': 'standard library',
  'operator.attrgetter': 'standard library',
  'numpy.testing._private.utils.runstring': 'loads or runs code',
  'torch.load': 'loads or runs code',
  'torch.hub.load': 'loads or runs code',
  'torch.jit.frontend.parse': 'loads or runs code',
  'pip.main': 'loads or runs code',
  'dill._dill._create_function': 'loads or runs code',
  'some.library.__builtins__': 'internal of Python objects',
  'some.__globals__.thing': 'internal of Python objects',
  'some.library.eval': 'can run code',
}


@pytest.mark.parametrize('path', _GLOBALS)
def test_dangerous_names_are_refused_even_if_not_called(
  tmp_path, witness, path
):
  file = write_zip(
    tmp_path / 'a.pt', pickle_weights(callbacks=push_global(path))
  )
  witness.refuses(file, f'refers to .{path}., .*{_GLOBALS[path]}')


@pytest.mark.parametrize(
  'opcodes',
  {
    'inst': b'(S"x"\niposix\nsystem\n',
    'obj': b'(cposix\nsystem\nS"x"\no',
    'newobj': b'cposix\nsystem\nU\x01x\x85\x81',
    'stack_global': b'\x8c\x05posix\x8c\x06system\x93',
    'dotted': b'\x8c\x05numpy\x8c\x09os.system\x93',
    'build': b'}cposix\nsystem\nb',
  }.values(),
)
def test_every_way_to_name_a_function(tmp_path, witness, opcodes):
  path = write_zip(tmp_path / 'a.pt', pickle_weights(callbacks=opcodes))
  witness.refuses(path, 'refused, .*(standard library|can run code)')


@pytest.mark.parametrize(
  'opcodes',
  {
    'extension': b'\x82\x01',
    'buffer': b'\x97',
    'persistent': b'(U\x06module(tQ',
    'call of a dict': b'}\x29R',
    'call of a tensor': push_tensor() + b'\x29R',
    'call of a type': push_global('torch.FloatStorage') + b'\x29R',
    'state of a function': push_global('collections.OrderedDict') + b'}b',
    'items of a number': b'K\x01(K\x02e',
    'keys of a list': b'](K\x01K\x02u',
    'memo not written': b'h\x07',
    'stack too short': b'0' * 9,
    'codec': b'c_codecs\nencode\n(U\x01xU\x03zipt' + b'R',
  }.values(),
)
def test_misused_opcodes(tmp_path, witness, opcodes):
  path = write_zip(tmp_path / 'a.pt', pickle_weights(callbacks=opcodes))
  witness.refuses(path, 'damaged|refused here|not described as torch does')


def test_a_module_that_acts_when_imported_is_not_imported(
  tmp_path, witness, monkeypatch
):
  """Classes of libraries load as placeholders, whatever is done to them."""
  (tmp_path / 'evil_library.py').write_text(
    f'open({str(tmp_path / "sentinel")!r}, "w")\nclass Payload: pass'
  )
  monkeypatch.syspath_prepend(tmp_path)
  name = push_global('evil_library.Payload')
  state = push({'__class__': 1, '__setstate__': 2})
  items = name + b'\x29\x81' + state + b'b(K\x01K\x02u(K\x01e'
  path = write_zip(
    tmp_path / 'a.ckpt', pickle_weights(callbacks=items, kind=name)
  )
  with witness.open(path) as checkpoint:
    made, kind = checkpoint.contents['callbacks'], checkpoint.contents['kind']
    assert isinstance(made, Opaque) and made.name == 'evil_library.Payload'
    assert vars(made) == {'name': 'evil_library.Payload'} == vars(kind)
  assert witness.seen == []
  assert 'evil_library' not in sys.modules
  assert not (tmp_path / 'sentinel').exists()


@pytest.mark.parametrize(
  'weight',
  [
    push_global('some.library.make_tensor') + b'(K\x01tR',
    push_global('torch._utils._rebuild_qtensor') + b'(K\x01tR',
    b'](}(U\x01a' + push_global('some.library.Thing') + b'ue',
    push_global('torch._utils._rebuild_tensor_v2'),
  ],
)
def test_placeholders_among_the_weights_are_refused(tmp_path, witness, weight):
  path = write_zip(tmp_path / 'a.pt', pickle_weights({'conv.weight': weight}))
  witness.refuses(path, "refused: 'conv.weight' among its weights is no tens")


@pytest.mark.parametrize('content', [[1, 2], 'text', {'model': {}}, {}, None])
def test_objects_that_are_no_weights(tmp_path, content):
  path = write_zip(tmp_path / 'a.pt', pickle.dumps(content, 2))
  with pytest.raises(CheckpointError, match='holds (an object|no tensors)'):
    open_checkpoint(path)


def test_a_whole_module_is_named(tmp_path):
  pickled = b'\x80\x02' + push_global('my.model.Net') + b'\x29\x81}b.'
  path = write_zip(tmp_path / 'a.pt', pickled)
  with pytest.raises(CheckpointError, match=r'class my.model.Net.*state_dict'):
    open_checkpoint(path)
