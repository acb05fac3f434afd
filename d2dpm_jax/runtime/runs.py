"""What made a work directory: its commands, and on which machine and code.

runs.json holds a list in the order of time, the latest of equal commands.
"""

import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

from d2dpm_jax.runtime import files

_PACKAGES = ('d2dpm_jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')


def add(paths: files.Workdir, run: Mapping[str, Any]) -> None:
  """Appends a run that has ended well.

  Args:
    paths: of the work directory.
    run: what is known of it, JSON-able, with `command`.
  """
  earlier = [one for one in read(paths) if one['command'] != run['command']]
  files.write_json(paths.runs, [*earlier, dict(run)])


def read(paths: files.Workdir) -> list[dict[str, Any]]:
  """All runs; none if nothing is recorded.

  Raises:
    ValueError: the record is damaged.
  """
  if not paths.runs.is_file():
    return []
  found = files.read_json(paths.runs)
  if not isinstance(found, list) or not all(
    isinstance(one, dict) and 'command' in one for one in found
  ):
    raise ValueError(f'{paths.runs} is no record of runs; delete it.')
  return found


def last(paths: files.Workdir, mode: str) -> dict[str, Any] | None:
  """The latest run of a mode that has ended well; None without any."""
  found = [run for run in read(paths) if run.get('mode') == mode]
  return found[-1] if found else None


def environment() -> dict[str, Any]:
  """Versions, devices and commit of this process."""
  devices = jax.devices()
  return {
    'python': platform.python_version(),
    'system': f'{platform.system()} {platform.machine()}',
    'devices': f'{len(devices)} x {devices[0].device_kind}',
    'backend': devices[0].platform,
    'packages': {name: _version(name) for name in _PACKAGES},
    'commit': commit(),
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def commit() -> str | None:
  """Of the repository that this code runs from, '+' if files were changed.

  None where it is installed, or git is not.
  """
  root = pathlib.Path(__file__).parents[2]
  top = _git(root, 'rev-parse', '--show-toplevel')
  if top is None or pathlib.Path(top) != root:
    return None
  found = _git(root, 'rev-parse', '--short=12', 'HEAD')
  changed = _git(root, 'status', '--porcelain', '--untracked-files=no')
  return found and found + ('+' if changed else '')


def _git(root: pathlib.Path, *args: str) -> str | None:
  try:
    done = subprocess.run(
      ['git', '-C', str(root), *args],
      capture_output=True,
      text=True,
      timeout=10,
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() if done.returncode == 0 else None
