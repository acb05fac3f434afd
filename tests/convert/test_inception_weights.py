"""The published files of InceptionV3's weights, as the projects write them.

Numbers are random, names are those of tests/golden/inception_*.npz: of
torch-fidelity's network, and of its converter for the graph.
"""

import functools
import importlib.util
import json
import pathlib

import graph_files
import numpy as np
import pytest
import safetensors.numpy
from d2dpm_jax.convert import inception
from torch_files import push, push_storage, push_tensor, write_zip

from d2dpm_jax.evaluation.inception import parameter_shapes

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
_spec = importlib.util.spec_from_file_location(
  'make_inception', _GOLDEN / 'make_inception.py'
)
make_inception = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_inception)

_TF_LEAVES = {
  'gamma': 'weight',
  'beta': 'bias',
  'moving_mean': 'running_mean',
  'moving_variance': 'running_var',
}
_OUR_LEAVES = {
  'weight': 'scale',
  'bias': 'bias',
  'running_mean': 'mean',
  'running_var': 'var',
}
_shapes = functools.cache(parameter_shapes)


@functools.cache
def _stored_tensors():
  with np.load(_GOLDEN / 'inception_features.npz') as data:
    tensors = json.loads(str(data['tensors']))
  return {k: make_inception.weight(k, tuple(shape)) for k, shape in tensors}


def _tensors(counters=False):
  """The state dict; pytorch-fid's and torch-fidelity's have no counters."""
  return {
    k: v
    for k, v in _stored_tensors().items()
    if counters or not k.endswith('num_batches_tracked')
  }


def _graph_nodes(norm=graph_files.batch_norm):
  """name -> node of a graph with the same numbers."""
  with np.load(_GOLDEN / 'inception_names.npz') as data:
    names = json.loads(str(data['names']))
  tensors = _tensors()
  nodes = {
    'DecodeJpeg/contents': graph_files.constant(
      'DecodeJpeg/contents', (), graph_files.field(8, ''), graph_files.STRING
    ),
    'Sub/y': graph_files.array('Sub/y', 128.0),
    'Mul/y': graph_files.array('Mul/y', 1 / 128),
  }
  for name in (
    'ExpandDims/dim',
    'ResizeBilinear/size',
    'mixed/join/concat_dim',
    'mixed_10/join/concat_dim',
    'mixed_10/tower/mixed/join/concat_dim',
    'pool_3/_reshape/shape',
  ):
    nodes[name] = graph_files.constant(
      name, (), graph_files.field(7, 3), graph_files.INT32
    )
  for theirs, torch_name in names.items():
    if theirs.endswith('/batchnorm'):
      for leaf, torch_leaf in _TF_LEAVES.items():
        name = f'{theirs}/{leaf}'
        value = tensors.pop(f'{torch_name}.{torch_leaf}')
        nodes[name] = graph_files.array(name, value)
      nodes[theirs] = norm(theirs)
    elif theirs.endswith('/conv2d_params'):
      value = tensors.pop(f'{torch_name}.weight')
      nodes[theirs] = graph_files.array(theirs, value.transpose(2, 3, 1, 0))
    else:
      value = tensors.pop(torch_name)
      nodes[theirs] = graph_files.array(theirs, value.T)
  assert not tensors
  return nodes


def _write_graph(path, nodes):
  path.write_bytes(b''.join(nodes.values()))
  return path


def _write_state_dict(path, tensors):
  items, storages = {}, {}
  for i, (name, value) in enumerate(tensors.items()):
    kind = 'Float' if value.dtype == np.float32 else 'Long'
    storage = push_storage(str(i), value.size, f'torch.{kind}Storage')
    stride = tuple(s // value.itemsize for s in value.strides)
    items[name] = push_tensor(storage, 0, value.shape, stride)
    storages[str(i)] = value.tobytes()
  # These projects store the tensors themselves, not below 'state_dict'.
  inner = b''.join(push(name) + item for name, item in items.items())
  return write_zip(path, b'\x80\x02}(' + inner + b'u.', storages)


def _assert_ours(params, tensors):
  """The parameters are these tensors, rearranged by hand."""
  count = 0
  for name, value in tensors.items():
    *modules, leaf = name.split('.')
    if name == 'fc.bias' or leaf == 'num_batches_tracked':
      continue
    node = functools.reduce(lambda tree, key: tree[key], modules, params)
    if modules[-1] == 'bn':
      got = node[_OUR_LEAVES[leaf]]
    else:
      got = node['kernel']
      value = np.moveaxis(value, (0, 1), (-1, -2))
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, value, err_msg=name)
    count += 1
  assert count == len(_shapes())


@pytest.mark.parametrize('counters', [False, True])
def test_state_dict(tmp_path, counters):
  tensors = _tensors(counters)
  path = _write_state_dict(tmp_path / 'weights.pth', tensors)
  params, report = inception.read(path, _shapes())
  _assert_ours(params, tensors)
  assert set(report.mapped) == set(_shapes())
  used = list(report.mapped.values())
  assert len(used) == len(set(used))
  assert {*used, *report.ignored} == set(tensors)
  assert 'fc.bias' in report.ignored and all(report.ignored.values())


def test_safetensors(tmp_path):
  path = tmp_path / 'weights.safetensors'
  tensors = {k: np.ascontiguousarray(v) for k, v in _tensors().items()}
  safetensors.numpy.save_file(tensors, path)
  _assert_ours(inception.read(path, _shapes())[0], tensors)


def test_graph(tmp_path):
  nodes = _graph_nodes()
  path = _write_graph(tmp_path / 'classify_image_graph_def.pb', nodes)
  params, report = inception.read(path, _shapes())
  _assert_ours(params, _tensors())
  constants = {name for name in nodes if not name.endswith('/batchnorm')}
  assert {*report.mapped.values(), *report.ignored} == constants
  assert set(report.mapped) == set(_shapes())
  assert len(report.ignored) == 10 and all(report.ignored.values())


def test_graph_that_does_not_scale(tmp_path):
  """TensorFlow ignores gamma then, whatever it holds."""
  norm = functools.partial(graph_files.batch_norm, scale=False)
  path = _write_graph(tmp_path / 'graph.pb', _graph_nodes(norm))
  params, _ = inception.read(path, _shapes())
  tensors = _tensors()
  for name, value in tensors.items():
    if name.endswith('.bn.weight'):
      tensors[name] = np.ones_like(value)
  _assert_ours(params, tensors)


def test_graph_of_another_network(tmp_path):
  nodes = _graph_nodes(functools.partial(graph_files.batch_norm, epsilon=1e-5))
  del nodes['softmax/weights'], nodes['mixed_4/conv/conv2d_params']
  name = 'mixed_5/conv/conv2d_params'
  nodes[name] = graph_files.constant(
    name, (), graph_files.field(7, 3), graph_files.INT32
  )
  nodes['x'] = graph_files.array('x', [1])
  with pytest.raises(ValueError) as caught:
    inception.read(_write_graph(tmp_path / 'graph.pb', nodes), _shapes())
  for part in (
    'another network (94): conv/batchnorm has epsilon 1e-05 for 0.001',
    'missing (3): Mixed_6b/branch1x1/conv/kernel, '
    'Mixed_6c/branch1x1/conv/kernel, fc/kernel',
    'not floating-point (1): mixed_5/conv/conv2d_params',
    'unexpected (1): x',
    ', ...',
  ):
    assert part in str(caught.value)


def test_everything_wrong_is_named(tmp_path):
  tensors = _tensors()
  # torchvision's: other classes, a second classifier.
  tensors['fc.weight'] = tensors['fc.weight'][:1000].copy()
  tensors['AuxLogits.fc.weight'] = np.zeros((2, 2), np.float32)
  tensors['AuxLogits.conv0.conv.weight'] = np.zeros((2, 2, 1, 1), np.float32)
  tensors['AuxLogits.conv0.bn.weight'] = np.zeros(2, np.float32)
  del tensors['Mixed_7c.branch_pool.bn.running_var']
  tensors['Mixed_5b.branch1x1.bn.bias'] = np.full(64, np.nan, np.float32)
  name = 'Mixed_5b.branch1x1.conv.weight'
  tensors[name] = tensors[name][..., 0, 0].copy()
  path = _write_state_dict(tmp_path / 'weights.pth', tensors)
  with pytest.raises(ValueError) as caught:
    inception.read(path, _shapes())
  for part in (
    f"{path} does not hold the weights of FID's InceptionV3 (that of "
    'torchvision is another network)',
    'missing (1): Mixed_7c/branch_pool/bn/var',
    'misshapen (2): Mixed_5b.branch1x1.conv.weight (64, 192) for '
    'Mixed_5b/branch1x1/conv/kernel (1, 1, 192, 64), '
    'fc.weight (1000, 2048) for fc/kernel (2048, 1008)',
    'not finite (1): Mixed_5b.branch1x1.bn.bias',
    'unexpected (3): AuxLogits.conv0.bn.weight, AuxLogits.conv0.conv.weight, '
    'AuxLogits.fc.weight',
  ):
    assert part in str(caught.value)


@pytest.mark.parametrize(
  'data,message',
  [
    (b'', 'an empty file'),
    (b'<!DOCTYPE html>', 'a web page'),
    (b'\x1f\x8b\x08', 'compressed by gzip: unpack it first'),
    (b'version https://git-lfs', 'a Git LFS pointer'),
    (b'\n\x7f', 'no TensorFlow graph'),
  ],
)
def test_files_that_are_something_else(tmp_path, data, message):
  path = tmp_path / 'classify_image_graph_def.pb'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message):
    inception.read(path, _shapes())


def test_missing_file(tmp_path):
  with pytest.raises(ValueError, match='No such file'):
    inception.read(tmp_path / 'weights.pth', _shapes())
