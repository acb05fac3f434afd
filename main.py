r"""Quantized latent diffusion with dual denoising (D2-DPM) in JAX/Flax.

  python main.py --config configs/mnist.py --mode calibrate
  python main.py --config configs/mnist.py --mode sample

Modes:
  train      trains the embedded MNIST models (configs/mnist.py)
  convert    reads a PyTorch checkpoint of latent diffusion
  calibrate  quantizes the network and fits its error model
  sample     generates images with the quantized, corrected network
  evaluate   judges images: FID, sFID, IS, precision, recall, labels
  benchmark  measures what --config.benchmark.what names
  experiment all corrections, bits and samplers of config.experiment, in tables

Any field of a config can be set: --config.quant.weight_bits=8
A run that ends with exit code 75 was stopped by a signal: the same command
goes on.
"""

import difflib
import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

MODES = (
  'train',
  'convert',
  'calibrate',
  'sample',
  'evaluate',
  'benchmark',
  'experiment',
)
# Modes that several processes can share.
SHARED_MODES = ('calibrate', 'sample')

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'An experiment, such as configs/mnist.py.', lock_config=True
)
_MODE = flags.DEFINE_string('mode', None, f'One of {", ".join(MODES)}.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'All output goes below it. Default: out/<config name>.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'host:port of process 0, where several processes make one run; see '
  'docs/scale.md. SLURM and TPU pods are noticed without it.',
)
_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes make this run.'
)
_PROCESS = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0 on.'
)
_DEBUG = flags.DEFINE_bool(
  'debug', False, 'Shows the traceback of an error, not only one line.'
)


def _pipeline(mode: str | None):
  """Imports late: --help and flag errors need no JAX."""
  if mode is None:
    raise ValueError(f'--mode is missing; it is one of {", ".join(MODES)}.')
  if mode not in MODES:
    close = difflib.get_close_matches(mode, MODES, 1)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(f'--mode {mode!r}: expected {", ".join(MODES)}.{hint}')
  runtime = 'd2dpm_jax.runtime'
  importlib.import_module(f'{runtime}.devices').configure()
  processes = importlib.import_module(f'{runtime}.processes')
  processes.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if processes.count() > 1 and mode not in SHARED_MODES:
    raise ValueError(
      f'--mode {mode} is run by one process, and here are {processes.count()}; '
      f'several take {" or ".join(SHARED_MODES)}.'
    )
  if not processes.is_first():
    logging.getLogger('d2dpm_jax').setLevel(logging.WARNING)
  importlib.import_module(f'{runtime}.interruption').install()
  return importlib.import_module(f'd2dpm_jax.pipelines.{mode}')


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise ValueError(f'Unexpected arguments: {" ".join(argv[1:])}')
  # Ours only: libraries report every file that they write at INFO level.
  absl_logging.set_verbosity(absl_logging.WARNING)
  handler = absl_logging.get_absl_handler()
  handler.setFormatter(logging.Formatter('%(message)s'))
  for name in ('d2dpm_jax', 'convert'):
    logging.getLogger(name).setLevel(logging.INFO)
  if not flags.FLAGS['config'].present:
    raise ValueError('--config is missing; try --config configs/mnist.py.')
  flag: Any = flags.FLAGS['config']
  path = pathlib.Path(flag.config_filename.split(':')[0])  # file:argument
  if not path.is_file():
    raise ValueError(f'--config {path}: there is no such file.')
  pipeline = _pipeline(_MODE.value)
  pipeline.run(_CONFIG.value, _WORKDIR.value or f'out/{path.stem}')
  # Those who leave early would wait for the others for minutes only.
  importlib.import_module('d2dpm_jax.runtime.processes').wait_for_all('end')
  progress = importlib.import_module('d2dpm_jax.runtime.progress')
  if peak := progress.peak_memory():
    logging.getLogger('d2dpm_jax').info('Peak memory: %.2f GB', peak / 1e9)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses flags; what is wrong with one is one line, without usage."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    # Of a config file that fails, the last line of the traceback says why.
    text = str(error).strip().splitlines()[-1]
    raise ValueError(text.removeprefix('ValueError: ')) from error
  except (AttributeError, KeyError) as error:
    # An unknown field is named by a repr within a repr: 'name'\\n...
    text = str(error).replace('\\n', '. ')
    for sign in '\'"\\':
      text = text.replace(sign, '')
    kind = 'unknown field ' if text.split('.')[0].isidentifier() else ''
    raise ValueError(f'--config: {kind}{text}') from error


def _one_line(error: BaseException) -> str:
  text = ' '.join(str(error).split())
  ours = isinstance(error, FileNotFoundError) and error.errno is None
  if text and (ours or isinstance(error, ValueError)):
    return text
  return f'{type(error).__name__}: {text}'.removesuffix(': ')


def _end(code: int, message: str) -> None:
  """Says why, and ends this process, be others in the midst of work."""
  print(message, file=sys.stderr, flush=True)
  if processes := sys.modules.get('d2dpm_jax.runtime.processes'):
    processes.leave(code)
  if code == 1:
    sys.exit(code)
  sys.stdout.flush()
  os._exit(code)  # Threads still compile or compute what nobody will have.


if __name__ == '__main__':
  try:
    app.run(main, flags_parser=_parse_flags)
  # What users can cause: bad values, files that are not there or not readable,
  # unknown config fields, no memory left on a device, a missing package.
  except (
    ValueError,
    OSError,
    KeyError,
    AttributeError,
    TypeError,
    RuntimeError,
    ImportError,
  ) as error:
    if '--debug' in sys.argv:
      raise
    _end(1, f'error: {_one_line(error)}')
  except BaseException as error:
    interruption = sys.modules.get('d2dpm_jax.runtime.interruption')
    if not (interruption and isinstance(error, interruption.Interrupted)):
      raise
    _end(
      interruption.EXIT_CODE,
      f'{error}. What is finished is kept, and the same command goes on there.',
    )
