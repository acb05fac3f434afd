"""What several test files need."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np


def main_process(*args, call=subprocess.run, **options):
  """Runs main.py as users do: in a process of its own, on one device."""
  flags = os.environ.get('XLA_FLAGS', '').split()
  env = {
    **os.environ,
    'XLA_FLAGS': ' '.join(f for f in flags if 'device_count' not in f),
  }
  if call is subprocess.run:
    options.update(capture_output=True, text=True)
  root = pathlib.Path(__file__).parents[1]
  return call(
    [sys.executable, 'main.py', *map(str, args)], cwd=root, env=env, **options
  )


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Every file below a folder, by name; {} if there is no such folder."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def assert_trees_equal(found, want) -> None:
  """Same structure, static fields (bits) included, and the same bits."""
  assert jax.tree.structure(found) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def assert_error_models_equal(found, want) -> None:
  """Error models by kind: all arrays and settings equal."""
  assert sorted(found) == sorted(want) == ['channel', 'tensor']
  for kind, model in found.items():
    for name, value in vars(model).items():
      other = getattr(want[kind], name)
      if name == 'settings':
        assert value == other
      else:
        np.testing.assert_array_equal(value, other, err_msg=name)
