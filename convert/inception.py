"""Weights of FID's InceptionV3, of three projects, as parameters of ours.

The three files hold the same numbers. Every tensor of a file is used exactly
once or named in the report with the reason why it is not needed; whatever does
not fit is collected, and one error names all of it.

Source of the names: mseitzer/pytorch-fid, src/pytorch_fid/inception.py;
toshas/torch-fidelity, utils/util_convert_inception_weights.py, for those of
the graph.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import graph_def, names
from .torch_reader import TensorRef, open_checkpoint

# Name of a file that people have -> who publishes it.
PUBLISHED = {
  'pt_inception-2015-12-05-6726825d.pth': 'pytorch-fid (mseitzer/pytorch-fid)',
  'weights-inception-2015-12-05-6726825d.pth': (
    'torch-fidelity (toshas/torch-fidelity)'
  ),
  'classify_image_graph_def.pb': (
    "OpenAI's evaluator (openai/guided-diffusion, evaluations)"
  ),
}

Shapes = Mapping[str, tuple[int, ...]]

_EPSILON = 1e-3
_NORM = {
  'weight': 'scale',
  'bias': 'bias',
  'running_mean': 'mean',
  'running_var': 'var',
}
# The graph's names: of a batch norm's constants, of blocks, of convolutions.
_GRAPH_NORM = {
  'gamma': 'scale',
  'beta': 'bias',
  'moving_mean': 'mean',
  'moving_variance': 'var',
}
_GRAPH_STEM = (
  'Conv2d_1a_3x3',
  'Conv2d_2a_3x3',
  'Conv2d_2b_3x3',
  'Conv2d_3b_1x1',
  'Conv2d_4a_3x3',
)
_GRAPH_BLOCKS = '5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c'.split()
# Letter of our block class -> tower of the graph -> branches in its order.
_GRAPH_TOWERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
  'A': {
    '': ('branch1x1',),
    'tower/': ('branch5x5_1', 'branch5x5_2'),
    'tower_1/': ('branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3'),
    'tower_2/': ('branch_pool',),
  },
  'B': {
    '': ('branch3x3',),
    'tower/': ('branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3'),
  },
  'C': {
    '': ('branch1x1',),
    'tower/': ('branch7x7_1', 'branch7x7_2', 'branch7x7_3'),
    'tower_1/': tuple(f'branch7x7dbl_{i}' for i in range(1, 6)),
    'tower_2/': ('branch_pool',),
  },
  'D': {
    'tower/': ('branch3x3_1', 'branch3x3_2'),
    'tower_1/': tuple(f'branch7x7x3_{i}' for i in range(1, 5)),
  },
  'E': {
    '': ('branch1x1',),
    'tower/': ('branch3x3_1',),
    'tower/mixed/': ('branch3x3_2a', 'branch3x3_2b'),
    'tower_1/': ('branch3x3dbl_1', 'branch3x3dbl_2'),
    'tower_1/mixed/': ('branch3x3dbl_3a', 'branch3x3dbl_3b'),
    'tower_2/': ('branch_pool',),
  },
}
_NO_BIAS = 'bias of the classes: the inception score is defined without it'
# What no feature depends on: regex of the whole name -> why.
_NOT_NEEDED = (
  (r'fc\.bias|softmax/biases', _NO_BIAS),
  (r'.*\.bn\.num_batches_tracked', 'counter of training'),
)
_NOT_NEEDED_OF_GRAPH = (
  (r'softmax/biases', _NO_BIAS),
  (
    r'DecodeJpeg/contents|ExpandDims/dim|ResizeBilinear/size|Sub/y|Mul/y',
    'preparation of images, which evaluation/inception.py does',
  ),
  (
    r'mixed(_\d+)?/(.*/)?join/concat_dim|pool_3/_reshape/shape',
    'shape of an operation',
  ),
)


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of a file.

  Attributes:
    mapped: parameter path -> name of its tensor.
    ignored: name of a tensor -> why it is not needed.
  """

  mapped: dict[str, str]
  ignored: dict[str, str]


def read(path: str | Path, shapes: Shapes) -> tuple[dict[str, Any], Report]:
  """Reads the weights of one of the files of `PUBLISHED`, whatever its name.

  Args:
    path: a state dict of pytorch-fid or torch-fidelity (.pth, or the same
      tensors as .safetensors), or a frozen graph (.pb).
    shapes: path -> shape of every parameter of our network.

  Returns:
    The parameters, a nested dict of float32 arrays in our layout, and what
    became of the tensors.

  Raises:
    CheckpointError: a ValueError: the file is missing, damaged or dangerous.
    ValueError: tensors are missing, unexpected, misshapen or not finite; names
      all of them.
  """
  path = Path(path)
  if _looks_like_graph(path):
    graph = graph_def.read_graph(path)
    plan = _plan_graph(graph)
    return _assemble(path, plan, graph.constants, shapes)
  with open_checkpoint(path) as checkpoint:
    return _assemble(path, _plan_state_dict(checkpoint), checkpoint, shapes)


def _looks_like_graph(path: Path) -> bool:
  """A graph begins with a node, .safetensors with a length and a brace."""
  if not path.is_file() or path.suffix == '.safetensors':
    return False
  with path.open('rb') as file:
    head = file.read(9)
  return head.startswith(b'\n') and not head.endswith(b'{')


@dataclasses.dataclass
class _Plan:
  """Where the tensors of a file belong, by their names.

  Attributes:
    sources: (name, parameter path, layer); 'conv' and 'dense' are PyTorch's
      layouts, '' is ours.
    ignored: see `Report`.
    problems: tensors that belong nowhere, and settings of another network.
    without_scale: names of batch norm scales that the network does not use.
  """

  sources: list[tuple[str, str, str]]
  ignored: dict[str, str]
  problems: list[str]
  without_scale: frozenset[str] = frozenset()


def _plan_state_dict(tensors: Iterable[str]) -> _Plan:
  plan = _Plan([], {}, [])
  for name in tensors:
    reason = _reason_to_ignore(name, _NOT_NEEDED)
    path, leaf = names.split(name)
    if reason:
      plan.ignored[name] = reason
    elif path.endswith('/bn') and leaf in _NORM:
      plan.sources.append((name, f'{path}/{_NORM[leaf]}', ''))
    elif path.endswith('/conv') and leaf == 'weight':
      plan.sources.append((name, f'{path}/kernel', 'conv'))
    elif name == 'fc.weight':
      plan.sources.append((name, 'fc/kernel', 'dense'))
    else:
      plan.problems.append(f'unexpected: {name}')
  return plan


def _plan_graph(graph: graph_def.Graph) -> _Plan:
  wanted = {'softmax/weights': 'fc/kernel'}
  unscaled = set()
  problems = []
  for scope, path in _graph_convolutions():
    wanted[f'{scope}/conv2d_params'] = f'{path}/conv/kernel'
    for leaf, ours in _GRAPH_NORM.items():
      wanted[f'{scope}/batchnorm/{leaf}'] = f'{path}/bn/{ours}'
    norm = graph.attributes.get(f'{scope}/batchnorm', {})
    epsilon = norm.get('variance_epsilon', _EPSILON)
    if abs(epsilon - _EPSILON) > 1e-9:
      problems.append(
        f'another network: {scope}/batchnorm has epsilon {epsilon:.3g} for '
        f'{_EPSILON}'
      )
    if norm.get('scale_after_normalization') == 0:
      unscaled.add(f'{scope}/batchnorm/gamma')
  plan = _Plan([], {}, problems, frozenset(unscaled))
  for name in [*graph.constants, *graph.others]:
    reason = _reason_to_ignore(name, _NOT_NEEDED_OF_GRAPH)
    if reason:
      plan.ignored[name] = reason
    elif name in wanted and name in graph.constants:
      plan.sources.append((name, wanted[name], ''))
    elif name in wanted:
      plan.problems.append(f'not floating-point: {name}')
    else:
      plan.problems.append(f'unexpected: {name}')
  return plan


def _graph_convolutions() -> Iterator[tuple[str, str]]:
  """(scope in the graph, our module path) of every convolution."""
  for i, path in enumerate(_GRAPH_STEM):
    yield _numbered('conv', i), path
  for i, block in enumerate(_GRAPH_BLOCKS):
    kind = {'6a': 'B', '7a': 'D'}.get(block) or {'5': 'A', '6': 'C'}.get(
      block[0], 'E'
    )
    for tower, branches in _GRAPH_TOWERS[kind].items():
      for j, branch in enumerate(branches):
        scope = f'{_numbered("mixed", i)}/{tower}{_numbered("conv", j)}'
        yield scope, f'Mixed_{block}/{branch}'


def _numbered(name: str, i: int) -> str:
  """TensorFlow numbers equal names: conv, conv_1, conv_2."""
  return f'{name}_{i}' if i else name


def _reason_to_ignore(
  name: str, reasons: Iterable[tuple[str, str]]
) -> str | None:
  for pattern, reason in reasons:
    if re.fullmatch(pattern, name):
      return reason
  return None


def _assemble(
  path: Path, plan: _Plan, tensors: Mapping[str, TensorRef], shapes: Shapes
) -> tuple[dict[str, Any], Report]:
  """Reads what is planned if all of it fits."""
  mapped: dict[str, str] = {}
  problems = list(plan.problems)
  flat = {}
  for name, target, layer in plan.sources:
    if target not in shapes:
      problems.append(f'unexpected: {name}')
      continue
    if target in mapped:
      problems.append(f'repeated: {name}, {target} is {mapped[target]}')
      continue
    mapped[target] = name
    if _shape_after(tensors[name].shape, layer) != shapes[target]:
      problems.append(
        f'misshapen: {name} {tensors[name].shape} for {target} {shapes[target]}'
      )
      continue
    array: Any = tensors[name].read()
    if not np.isfinite(array.astype(np.float32)).all():
      problems.append(f'not finite: {name}')
    if name in plan.without_scale:
      array = np.ones_like(array)
    elif layer:
      array = names.to_layout(array, layer, 'kernel')
    flat[target] = np.ascontiguousarray(array, np.float32)
  problems += [f'missing: {target}' for target in shapes.keys() - mapped.keys()]
  if problems:
    raise ValueError(_complaint(path, problems))
  return names.unflatten(flat), Report(mapped, plan.ignored)


def _shape_after(shape: tuple[int, ...], layer: str) -> tuple[int, ...] | None:
  """Of a tensor in our layout; None where it is none of this layer."""
  if not layer:
    return shape
  empty = np.broadcast_to(np.float32(), shape)
  changed = names.to_layout(empty, layer, 'kernel')
  return None if changed is None else changed.shape


def _complaint(path: Path, problems: Iterable[str]) -> str:
  """All problems in one message, by kind, at most a few of each."""
  kinds: dict[str, list[str]] = {}
  for line in problems:
    kind, _, what = line.partition(': ')
    kinds.setdefault(kind, []).append(what)
  parts = [
    f'{kind} ({len(lines)}): {", ".join(sorted(lines)[:10])}'
    + (', ...' if len(lines) > 10 else '')
    for kind, lines in sorted(kinds.items())
  ]
  return (
    f"{path} does not hold the weights of FID's InceptionV3 (that of "
    f'torchvision is another network).\n' + ';\n'.join(parts) + '.'
  )
