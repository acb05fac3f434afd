"""Which room may import which: read from the source, nothing is imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_OURS = ('d2dpm_jax', 'convert', 'configs')
_ROOMS = {
  'models': set(),
  'diffusion': set(),
  'quantization': set(),
  'denoising': set(),
  'runtime': set(),
  'evaluation': {'models', 'diffusion', 'runtime'},
  'training': {'models', 'diffusion', 'evaluation', 'runtime'},
  'reporting': {'quantization', 'denoising', 'runtime'},
  'pretrained': set(),
  'command': set(),  # Pipelines too, but late and by name.
}
# What takes plain dataclasses and arrays, and runs where these are missing.
_PURE = ('models', 'diffusion', 'quantization', 'denoising')
_FRAMEWORKS = {
  'clu',
  'ml_collections',
  'tensorflow',
  'tensorflow_datasets',
  'torch',
}


def _sources(folder: str) -> list[pathlib.Path]:
  found = sorted((_ROOT / folder).rglob('*.py'))
  assert found, f'{folder} has no Python files'
  return found


def _names(node: ast.AST, package: str) -> list[str]:
  """Dotted names that one import statement may load."""
  if isinstance(node, ast.Import):
    return [alias.name for alias in node.names]
  if isinstance(node, ast.ImportFrom):
    module = node.module or ''
    if node.level:
      parents = package.split('.')
      parents = parents[: len(parents) - node.level + 1]
      module = '.'.join([*parents, *filter(None, [module])])
    return [f'{module}.{alias.name}' for alias in node.names]
  return []


def _imports(path: pathlib.Path, top_level: bool = False) -> set[str]:
  """Names that a file imports; only at module level if `top_level`."""
  tree = ast.parse(path.read_text(), str(path))
  package = '.'.join(path.relative_to(_ROOT).parts[:-1])
  found: set[str] = set()

  def visit(node):
    for child in ast.iter_child_nodes(node):
      inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
      if not (top_level and inner):
        found.update(_names(child, package))
        visit(child)

  visit(tree)
  return found


def _ours(names: set[str]) -> set[str]:
  """Rooms of the package, or top-level packages, among imported names."""
  rooms = set()
  for name in names:
    first, *rest = name.split('.')
    if first == 'd2dpm_jax':
      rooms.add(rest[0] if rest else 'd2dpm_jax')
    elif first in _OURS:
      rooms.add(first)
  return rooms


def _libraries(names: set[str]) -> set[str]:
  return {name.split('.')[0] for name in names}


def test_the_reader_sees_every_form_of_import(tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], '_ROOT', tmp_path)
  path = tmp_path / 'd2dpm_jax' / 'models' / 'x.py'
  path.parent.mkdir(parents=True)
  path.write_text(
    'import a.b as c, d\n'
    'from d2dpm_jax import quantization\n'
    'from ..diffusion import ddim\n'
    'from . import unet\n'
    'if True:\n'
    '  import e\n'
    'def f():\n'
    '  from torch import nn\n'
  )
  want = {
    'a.b',
    'd',
    'd2dpm_jax.quantization',
    'd2dpm_jax.diffusion.ddim',
    'd2dpm_jax.models.unet',
    'e',
  }
  assert _imports(path, top_level=True) == want
  assert _imports(path) == want | {'torch.nn'}
  assert _ours(_imports(path)) == {'quantization', 'diffusion', 'models'}


def test_every_room_has_a_rule():
  folders = {p.parent.name for p in (_ROOT / 'd2dpm_jax').glob('*/__init__.py')}
  assert folders == {*_ROOMS, 'pipelines'}


@pytest.mark.parametrize('room', sorted(_ROOMS))
def test_a_room_imports_only_the_rooms_below_it(room):
  for path in _sources(f'd2dpm_jax/{room}'):
    extra = _ours(_imports(path)) - _ROOMS[room] - {room}
    assert not extra, f'{path.relative_to(_ROOT)} imports {sorted(extra)}'


@pytest.mark.parametrize('room', _PURE)
def test_pure_rooms_need_no_framework(room):
  for path in _sources(f'd2dpm_jax/{room}'):
    extra = _libraries(_imports(path)) & _FRAMEWORKS
    assert not extra, f'{path.relative_to(_ROOT)} imports {sorted(extra)}'


def test_only_pipelines_import_convert():
  for path in _sources('d2dpm_jax'):
    if 'convert' in _ours(_imports(path)):
      assert path.parent.name == 'pipelines', path.relative_to(_ROOT)


def test_convert_knows_only_models_and_schedules():
  for path in _sources('convert'):
    extra = _ours(_imports(path)) - {'convert', 'models', 'diffusion'}
    assert not extra, f'{path.relative_to(_ROOT)} imports {sorted(extra)}'


def test_configs_import_of_ours_only_configs():
  for path in _sources('configs'):
    extra = _ours(_imports(path)) - {'configs'}
    assert not extra, f'{path.relative_to(_ROOT)} imports {sorted(extra)}'


def test_nobody_needs_torch_or_tensorflow_to_be_imported():
  heavy = {'torch', 'tensorflow', 'tensorflow_datasets'}
  paths = [p for folder in _OURS for p in _sources(folder)]
  for path in [*paths, _ROOT / 'main.py']:
    extra = _libraries(_imports(path, top_level=True)) & heavy
    assert not extra, f'{path.relative_to(_ROOT)} imports {sorted(extra)}'


def test_command_line_starts_without_jax():
  """Neither --help nor an error in a flag waits for JAX."""
  flags = {
    '--help': '--mode, one of',
    '--help_config': 'sample.num_images=64',
    '--config.nothing=1': 'unknown field nothing',
  }
  for flag, wanted in flags.items():
    config = ['--config', 'configs/mnist.py', flag]
    done = subprocess.run(
      [sys.executable, '-X', 'importtime', 'main.py', *config],
      cwd=_ROOT,
      capture_output=True,
      text=True,
    )
    assert wanted in done.stdout + done.stderr
    loaded = {
      line.split('|')[-1].strip().split('.')[0]
      for line in done.stderr.splitlines()
      if line.startswith('import time:')
    }
    assert 'ml_collections' in loaded  # So the list is really there.
    assert not loaded & {'jax', 'flax', 'tensorflow', 'torch', 'numpy'}
