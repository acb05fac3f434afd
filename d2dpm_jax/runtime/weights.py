"""Parameter trees on disk: one .safetensors file, or an Orbax directory."""

import itertools
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from flax import traverse_util

from d2dpm_jax.runtime import files, processes

Params = dict[str, Any]

_META = 'd2dpm_meta.json'
_PIECE = 8 * 2**20  # Bytes that are compressed and written at a time.


def save_safetensors(
  path: pathlib.Path,
  params: Params,
  meta: Mapping[str, Any],
  dtype: Any = None,
) -> None:
  """Writes a nested parameter dict, atomically.

  Args:
    path: target file.
    params: nested dict of arrays; names are joined with '/'.
    meta: JSON-able facts about the weights, kept in the file's header.
    dtype: storage type of the floating-point arrays; None keeps theirs.
  """
  flat = {}
  for name, value in traverse_util.flatten_dict(params, sep='/').items():
    value = np.asarray(value)
    if dtype is not None and np.issubdtype(value.dtype, np.floating):
      value = value.astype(dtype)
    flat[name] = np.asarray(value, order='C')  # Keeps 0-d arrays 0-d.
  data = safetensors.numpy.save(flat, metadata={'meta': json.dumps(meta)})
  with files.atomic_write(path) as file:
    file.write(data)


def load_safetensors(path: pathlib.Path) -> tuple[Params, dict[str, Any]]:
  """Reads what `save_safetensors` wrote; floats of any size become float32.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not a .safetensors file of this project.
  """
  if not path.is_file():
    raise FileNotFoundError(f'No weights at {path}.')
  try:
    with safetensors.safe_open(str(path), framework='numpy') as file:
      meta = json.loads((file.metadata() or {}).get('meta', '{}'))
      flat = {name: file.get_tensor(name) for name in file.keys()}
  except (safetensors.SafetensorError, json.JSONDecodeError) as error:
    raise ValueError(
      f'{path} is damaged or no .safetensors file: {error}'
    ) from error
  flat = {
    # NumPy alone does not take bfloat16 for a float.
    k: v.astype(np.float32) if jnp.issubdtype(v.dtype, jnp.floating) else v
    for k, v in flat.items()
  }
  for name in flat:
    parents = itertools.accumulate(name.split('/')[:-1], '{}/{}'.format)
    if clash := [parent for parent in parents if parent in flat]:
      raise ValueError(
        f'{path} is no .safetensors file of this project: it holds {name} and '
        f'{clash[0]}.'
      )
  return traverse_util.unflatten_dict(flat, sep='/'), meta


def _alone() -> ocp.options.MultiprocessingOptions:
  """Orbax else waits for all processes of a run to write or read together."""
  own = processes.index()
  return ocp.options.MultiprocessingOptions(
    primary_host=own,
    active_processes={own},
    barrier_sync_key_prefix=f'process{own}',
  )


def save_tree(path: pathlib.Path, tree: Any, meta: Mapping[str, Any]) -> None:
  """Writes a pytree with Orbax and its metadata beside it.

  A directory without metadata is not a complete one, so a run that is killed
  leaves none. Leaves that are jax.Array are written without another copy in
  memory; NumPy's are copied.
  """
  (path / _META).unlink(missing_ok=True)
  if path.exists():
    shutil.rmtree(path)
  # By default Orbax holds all of it in memory once more before it writes.
  sizes = [getattr(leaf, 'nbytes', 0) for leaf in jax.tree.leaves(tree)]
  in_flight = max([_PIECE, *sizes]) + 1  # It counts in GB: may round down.
  alone = _alone()
  handler = ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=in_flight / 1e9, multiprocessing_options=alone
  )
  pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), tree)
  with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
    checkpointer.save(
      path.absolute() / 'tree',
      args=ocp.args.PyTreeSave(
        tree, save_args=pieces, ocdbt_target_data_file_size=_PIECE
      ),
    )
  files.write_json(path / _META, meta)


def is_complete(path: pathlib.Path) -> bool:
  """Whether `save_tree` has finished there."""
  return (path / _META).is_file()


def load_meta(path: pathlib.Path) -> dict[str, Any]:
  """The metadata alone of what `save_tree` wrote.

  Raises:
    FileNotFoundError: the directory is missing or was not finished.
  """
  if not is_complete(path):
    raise FileNotFoundError(f'No complete checkpoint at {path}.')
  return files.read_json(path / _META)


def load_tree(path: pathlib.Path) -> tuple[Any, dict[str, Any]]:
  """Reads what `save_tree` wrote.

  Returns:
    Nested dicts of NumPy arrays, and the metadata.

  Raises:
    FileNotFoundError: the directory is missing or was not finished.
    ValueError: what is there cannot be read.
  """
  meta = load_meta(path)
  try:
    with ocp.StandardCheckpointer(
      multiprocessing_options=_alone()
    ) as checkpointer:
      structure = checkpointer.metadata(path.absolute() / 'tree')
      like = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        structure.item_metadata.tree,
      )
      tree = checkpointer.restore(path.absolute() / 'tree', like)
  except Exception as error:  # Orbax raises many kinds for a damaged file.
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    raise ValueError(
      f'{path} cannot be read, it is damaged ({reason}): delete it, and run '
      'the command that made it again.'
    ) from error
  return tree, meta
