"""`--mode convert`: PyTorch weights of latent diffusion become ours."""

import contextlib
import ctypes
import dataclasses
import hashlib
import logging
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from d2dpm_jax.convert import ldm, ldm_yaml
from d2dpm_jax.convert.torch_reader import CheckpointError, open_checkpoint
from d2dpm_jax.models import latent_diffusion
from d2dpm_jax.pipelines import setup
from d2dpm_jax.runtime import files, progress, weights

_log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Writes params/ and conversion.{json,txt} into the work directory.

  Raises:
    FileNotFoundError: there is no such checkpoint or YAML.
    ValueError: they cannot be read, must not be read, or do not fit; nothing
      was written then.
  """
  paths = files.Workdir.at(workdir)
  settings = config.checkpoint
  if not settings.torch_path:
    raise ValueError(
      '--config.checkpoint.torch_path is not set: name a .ckpt, or a .zip or '
      'folder that holds one.'
    )
  model = setup.build(setup.resolve(config))
  scale_factor = settings.scale_factor
  if settings.ldm_yaml:
    scale_factor = ldm_yaml.read(settings.ldm_yaml).scale_factor
  _return_freed_memory()
  with open_checkpoint(settings.torch_path) as checkpoint:
    with progress.progress('conversion', len(checkpoint), 'tensor') as bar:
      try:
        params, report = ldm.convert(
          checkpoint,
          model,
          use_ema=settings.use_ema,
          scale_factor=scale_factor,
          contents=checkpoint.contents,
          store=_store,
          on_tensor=bar.update,
        )
      except CheckpointError:
        raise
      except ValueError as error:
        raise ValueError(f'{checkpoint.path}: {error}') from error
    source = _describe(checkpoint.path)
  if settings.use_ema and report.weights == 'raw':
    _log.info('The checkpoint has no moving average (EMA) of the weights.')
  setup.begin(config, paths)
  description = {'source': source, **dataclasses.asdict(report)}
  files.write_json(paths.conversion('.json'), description)
  with files.atomic_write(paths.conversion('.txt'), 'w') as file:
    file.write(_text(source, report, params))
  weights.save_tree(
    paths.params,
    params,
    {
      'model': latent_diffusion.to_config(model),
      'source': source,
      'weights': report.weights,
    },
  )
  _log.info('%s', report.summary())
  _log.info('Wrote %s. Next: --mode calibrate', paths.params)
  if settings.path:
    _log.warning(
      'config.checkpoint.path is %r: the next mode takes that. For these '
      'weights set --config.checkpoint.path=%s',
      settings.path,
      paths.params,
    )


def _return_freed_memory() -> None:
  """Makes glibc give blocks above 1 MiB back to the system when they are freed.

  Otherwise it keeps up to 32 MiB of each for later, and the peak of a
  conversion is 1.35 times the size of the checkpoint instead of 1.25.
  """
  with contextlib.suppress(OSError, AttributeError, TypeError):
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def _store(array: np.ndarray) -> Any:
  """Keeps a parameter where Orbax can write it without copying it again."""
  try:
    return jax.device_put(array, jax.local_devices(backend='cpu')[0])
  except RuntimeError:  # JAX_PLATFORMS may name an accelerator alone.
    return array


def _describe(path: pathlib.Path) -> dict[str, Any]:
  """Which file it was."""
  with path.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  return {'file': path.name, 'bytes': path.stat().st_size, 'sha256': digest}


def _text(source: dict[str, Any], report: ldm.Report, params: Any) -> str:
  """The report for people, with every parameter and every ignored tensor."""
  overview = parameter_overview.get_parameter_overview(
    params, include_stats=False
  )
  ignored = [f'{name}: {reason}' for name, reason in report.ignored.items()]
  parts = [
    f'{source["file"]}, {source["bytes"]:,} bytes, sha256 {source["sha256"]}',
    report.summary(),
    overview,
    'Tensors that are not needed:\n' + ('\n'.join(ignored) or 'none'),
  ]
  return '\n\n'.join(parts) + '\n'
