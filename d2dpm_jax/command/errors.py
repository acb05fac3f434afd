"""One line for an error, with what to do about it."""

import errno
from collections.abc import Mapping

_EXTRAS = {
  'tensorflow': 'data',
  'tensorflow_datasets': 'data',
}
_MEMORY = ('RESOURCE_EXHAUSTED', 'Out of memory', 'out of memory')
# What makes a mode need less memory.
_SMALLER: Mapping[str, str] = {
  'calibrate': (
    'lower --config.sample.microbatch and --config.quant.reconstruction.chunk, '
    'or set --config.quant.reconstruction.host_streams=True'
  ),
  'sample': 'lower --config.sample.microbatch',
  'evaluate': 'lower --config.evaluate.batch_size',
  'experiment': (
    'lower --config.sample.microbatch and --config.evaluate.batch_size'
  ),
  'train': 'lower --config.train.diffusion.batch_size',
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def explain(error: BaseException, mode: str | None = None) -> str:
  """What went wrong and what helps, in one line.

  Args:
    error: whatever a mode raised.
    mode: which.
  """
  text = ' '.join(str(error).split())
  kind = type(error).__name__
  if isinstance(error, MemoryError):
    return (
      f'The host has not enough memory ({text or kind}): '
      f'{_SMALLER.get(mode or "", "use a smaller batch")}.'
    )
  if any(sign in text for sign in _MEMORY) and isinstance(error, RuntimeError):
    return (
      f'The device has not enough memory ({_shortened(text, 120)}): '
      f'{_SMALLER.get(mode or "", "use a smaller batch")}; or give JAX more of '
      'it with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.'
    )
  if isinstance(error, OSError) and error.errno is not None:
    return _system(error)
  if isinstance(error, ModuleNotFoundError) and error.name:
    return _missing(error.name)
  if text and isinstance(error, (ValueError, FileNotFoundError, TimeoutError)):
    return text
  shown = f'{kind}: {_shortened(text, 300)}'.removesuffix(': ')
  return f'{shown} (--debug shows where)'


def _system(error: OSError) -> str:
  """Of the operating system."""
  where = error.filename2 or error.filename
  reason = (error.strerror or str(error)).lower()
  if error.errno in _FULL:
    place = f' for {where}' if where else ''
    return (
      f'There is no space left on the disk{place}: free some, or choose '
      'another --workdir; what is finished is kept.'
    )
  if where is None:
    return f'{type(error).__name__}: {reason} (--debug shows where)'
  if error.errno in _REFUSED:
    return (
      f'{where} cannot be read or written ({reason}): change its permissions, '
      'or choose another --workdir.'
    )
  if error.errno == errno.ENOENT:
    return f'{where}: there is no such file; correct the path.'
  if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
    return f'{where}: {reason}; correct the path, or choose another --workdir.'
  return f'{where}: {reason} (--debug shows where)'


def _missing(module: str) -> str:
  """Of a package that is not installed."""
  name = module.split('.')[0]
  extra = _EXTRAS.get(name)
  what = f"'d2dpm_jax[{extra}]'" if extra else name
  return f'The package {name} is not installed: pip install {what}.'


def _shortened(text: str, length: int) -> str:
  return text if len(text) <= length else f'{text[: length - 3]}...'
