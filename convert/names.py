"""PyTorch state dicts of LDM as Flax parameters: names, layouts, complaints.

One rule maps names (see `module_path`); what a tensor turns into is decided by
the type of the Flax layer at that path, never by its number of dimensions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Target:
  """What a Flax module needs.

  Attributes:
    layers: module path -> 'conv', 'dense', 'norm' or 'embed'.
    shapes: parameter path -> shape.
  """

  layers: Mapping[str, str]
  shapes: Mapping[str, tuple[int, ...]]


# By layer type: our name of PyTorch's `weight` and `bias`.
_LEAVES = {
  'conv': {'weight': 'kernel', 'bias': 'bias'},
  'dense': {'weight': 'kernel', 'bias': 'bias'},
  'norm': {'weight': 'scale', 'bias': 'bias'},
  'embed': {'weight': 'embedding'},
}


def module_path(name: str) -> str:
  """Module path of a dotted PyTorch module name.

  Numbers are joined to what stands before them by `_`, everything else opens a
  new level: `input_blocks.1.0.in_layers.2` -> `input_blocks_1_0/in_layers_2`.
  """
  first, *rest = name.split('.')
  path = first
  for part in rest:
    path += ('_' if part.isdigit() else '/') + part
  return path


def split(name: str) -> tuple[str, str]:
  """`a.1.weight` -> (`a_1`, `weight`): module path and PyTorch's leaf."""
  module, _, leaf = name.rpartition('.')
  return module_path(module), leaf


def torch_to_flax(name: str, layers: Mapping[str, str]) -> str | None:
  """Parameter path of a PyTorch tensor, None where the model has no such one.

  Args:
    name: dotted name of the tensor, without the prefix of the submodel.
    layers: `Target.layers`.
  """
  path, torch_leaf = split(name)
  leaf = _LEAVES.get(layers.get(path, ''), {}).get(torch_leaf)
  return leaf and f'{path}/{leaf}'


def to_layout(array: np.ndarray, layer: str, leaf: str) -> np.ndarray | None:
  """A PyTorch tensor in the layout of a Flax layer.

  Args:
    array: the tensor.
    layer: 'conv' (OIHW -> HWIO), 'dense' (OI, or OI1 of a Conv1d with kernel
      1, -> IO), 'norm' or 'embed' (unchanged).
    leaf: 'kernel', 'bias', 'scale' or 'embedding'.

  Returns:
    The rearranged array, or None where its rank is not that of the layer.
  """
  if leaf == 'kernel':
    if layer == 'conv':
      return array.transpose(2, 3, 1, 0) if array.ndim == 4 else None
    if array.ndim == 3 and array.shape[-1] == 1:
      array = array[..., 0]
    return array.T if array.ndim == 2 else None
  return array if array.ndim == (2 if leaf == 'embedding' else 1) else None


def target_of(module: nn.Module, *args: Any) -> Target:
  """Layers and shapes of a module; costs no memory.

  Args:
    module: any Linen module whose `__call__` reaches all of its parameters.
    *args: what to call it with; arrays or `jax.ShapeDtypeStruct`.
  """
  layers = {}

  def record(call, call_args, kwargs, context):
    m = context.module
    for kind, cls in (
      ('conv', nn.Conv),
      ('dense', nn.Dense),
      ('norm', (nn.GroupNorm, nn.LayerNorm)),
      ('embed', nn.Embed),
    ):
      if isinstance(m, cls):
        layers['/'.join(m.path)] = kind
    return call(*call_args, **kwargs)

  with nn.intercept_methods(record):
    variables = jax.eval_shape(module.init, jax.random.key(0), *args)
  flat = jax.tree_util.tree_leaves_with_path(variables['params'])
  shapes = {'/'.join(k.key for k in path): leaf.shape for path, leaf in flat}
  return Target(layers, shapes)


def assign(
  shapes: Mapping[str, tuple[int, ...]], target: Target, prefix: str = ''
) -> tuple[dict[str, str], list[str]]:
  """Finds the parameter of every tensor, by names and shapes alone.

  Args:
    shapes: PyTorch name -> shape; every one has to be used.
    target: what the module needs.
    prefix: stripped from the start of names; names that lack it are
      unexpected.

  Returns:
    (paths, problems): PyTorch name -> parameter path, all of `target` if and
    only if `problems` is empty; one line per missing, unexpected, repeated or
    misshapen tensor, sorted.
  """
  paths: dict[str, str] = {}
  taken, problems = set(), []
  for name, shape in shapes.items():
    path = None
    if name.startswith(prefix):
      path = torch_to_flax(name[len(prefix) :], target.layers)
    if path is None or path not in target.shapes:
      problems.append(f'unexpected: {name} {shape}')
      continue
    if path in taken:
      problems.append(f'repeated: {name}, {path} is taken')
      continue
    taken.add(path)
    want = target.shapes[path]
    value = _arranged(np.broadcast_to(np.float32(), shape), path, target)
    if value is None or value.shape != want:
      problems.append(f'misshapen: {name} {shape} for {path} {want}')
    else:
      paths[name] = path
  for path in target.shapes.keys() - taken:
    problems.append(f'missing: {path} {target.shapes[path]}')
  return paths, sorted(problems)


def to_parameter(array: np.ndarray, path: str, target: Target) -> np.ndarray:
  """A tensor as the float32 parameter that `assign` found for it.

  Args:
    array: the PyTorch tensor.
    path: of the parameter.
    target: what the model has.

  Returns:
    float32, contiguous, in the layout of Flax.
  """
  return np.ascontiguousarray(_arranged(array, path, target), dtype=np.float32)


def _arranged(
  array: np.ndarray, path: str, target: Target
) -> np.ndarray | None:
  module, _, leaf = path.rpartition('/')
  return to_layout(array, target.layers[module], leaf)


def match(
  tensors: Mapping[str, np.ndarray], target: Target, prefix: str = ''
) -> tuple[dict[str, Any], list[str]]:
  """Turns a state dict into parameters and lists all that does not fit.

  Args:
    tensors: PyTorch name -> array; every one has to be used.
    target: what the module needs.
    prefix: see `assign`.

  Returns:
    (params, problems): a nested dict of float32 arrays, complete if and only if
    `problems` is empty; see `assign`.
  """
  shapes = {name: array.shape for name, array in tensors.items()}
  paths, problems = assign(shapes, target, prefix)
  flat = {
    path: to_parameter(tensors[name], path, target)
    for name, path in paths.items()
  }
  return unflatten(flat), problems


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Turns 'a/b/c' -> value into nested dicts."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *scopes, leaf = path.split('/')
    node = tree
    for scope in scopes:
      node = node.setdefault(scope, {})
    node[leaf] = value
  return tree
