"""The layout of a work directory, and writes that are never half done."""

import contextlib
import dataclasses
import json
import lzma
import os
import pathlib
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

try:
  import fcntl
except ImportError:  # Windows: nothing keeps two processes apart there.
  fcntl = None  # type: ignore[assignment]

_TEMPORARY = '.unfinished'

# What reading a damaged .npz raises. RuntimeError: a flag says that it is
# encrypted, or compressed in a way that zipfile lacks. The last four: headers
# of arrays are Python.
DAMAGE = (
  OSError,
  ValueError,
  EOFError,
  KeyError,
  RuntimeError,
  zipfile.BadZipFile,
  zlib.error,
  lzma.LZMAError,
  SyntaxError,
  tokenize.TokenError,
  TypeError,
  OverflowError,
)


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Every path below one run's directory; no other module joins them."""

  root: pathlib.Path

  @classmethod
  def at(cls, root: str | os.PathLike[str]) -> 'Workdir':
    """Names a directory; it need not be there yet.

    Raises:
      ValueError: there is something else.
    """
    path = pathlib.Path(root).absolute()
    if path.exists() and not path.is_dir():
      raise ValueError(f'--workdir {path} is a file, not a directory.')
    return cls(path)

  @property
  def config(self) -> pathlib.Path:
    return self.root / 'config.json'

  @property
  def runs(self) -> pathlib.Path:
    """The commands that made what is here."""
    return self.root / 'runs.json'

  @property
  def report(self) -> pathlib.Path:
    """All of it on one page."""
    return self.root / 'report.html'

  @property
  def params(self) -> pathlib.Path:
    return self.root / 'params'

  def conversion(self, suffix: str) -> pathlib.Path:
    """What --mode convert reports: '.json' for programs, '.txt' for people."""
    return self.root / f'conversion{suffix}'

  @property
  def quantized(self) -> pathlib.Path:
    return self.root / 'quantized'

  @property
  def calibration(self) -> pathlib.Path:
    return self.root / 'calibration'

  @property
  def handed_over(self) -> pathlib.Path:
    """Quantizers, from the process that learned them to the others."""
    return self.calibration / 'quantizers'

  @property
  def layer_table(self) -> pathlib.Path:
    """Bits of every layer."""
    return self.calibration / 'layers.txt'

  @property
  def unit_table(self) -> pathlib.Path:
    """Loss of every unit before and after its reconstruction."""
    return self.calibration / 'units.txt'

  @property
  def unit_plot(self) -> pathlib.Path:
    return self.calibration / 'units.png'

  @property
  def unit_summary(self) -> pathlib.Path:
    """Signal-to-noise ratio of the quantized network, and what went wrong."""
    return self.calibration / 'units.json'

  @property
  def trajectories(self) -> pathlib.Path:
    return self.calibration / 'trajectories'

  def error_model(self, kind: str) -> pathlib.Path:
    """Of the 'tensor' or 'channel' statistics."""
    return self.root / f'error_model_{kind}.npz'

  @property
  def held_out(self) -> pathlib.Path:
    """How the corrections did on images that they were not fitted on."""
    return self.root / 'held_out.npz'

  @property
  def held_out_table(self) -> pathlib.Path:
    """The same for people."""
    return self.calibration / 'held_out.txt'

  @property
  def error_plot(self) -> pathlib.Path:
    """Statistics of the errors by timestep."""
    return self.calibration / 'errors.png'

  @property
  def error_joint_plot(self) -> pathlib.Path:
    """Histograms of estimates and errors at a few timesteps."""
    return self.calibration / 'error_joint.png'

  @property
  def error_left_plot(self) -> pathlib.Path:
    """What corrections leave of the errors."""
    return self.calibration / 'error_left.png'

  @property
  def samples(self) -> pathlib.Path:
    return self.root / 'samples'

  @property
  def comparison(self) -> pathlib.Path:
    """Images of several samplers from the same noise."""
    return self.samples / 'compare' / 'images.npz'

  @property
  def all_samples(self) -> pathlib.Path:
    """All images in one file."""
    return self.samples / 'samples.npz'

  @property
  def shards(self) -> pathlib.Path:
    """Finished batches of images."""
    return self.samples / 'shards'

  @property
  def metrics(self) -> pathlib.Path:
    return self.root / 'metrics.json'

  def benchmark(self, name: str) -> pathlib.Path:
    """What --mode benchmark writes, such as 'cost.json'."""
    return self.root / 'benchmark' / name

  def experiment(self, name: str = '') -> pathlib.Path:
    """What --mode experiment keeps and writes, such as 'results.md'."""
    return self.root / 'experiment' / name

  @property
  def training(self) -> pathlib.Path:
    return self.root / 'training'


@contextlib.contextmanager
def atomic_write(
  path: str | os.PathLike[str], mode: str = 'wb'
) -> Iterator[IO[Any]]:
  """Yields a file that appears under `path` whole or not at all.

  Written beside the target, synced to disk, then renamed. If the body raises,
  the temporary file is removed and an older `path` stays as it was.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, temporary = tempfile.mkstemp(
    dir=path.parent, prefix=f'.{path.name}.', suffix=_TEMPORARY
  )
  try:
    with os.fdopen(descriptor, mode) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o666 & ~_umask())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise


def is_writable(path: pathlib.Path) -> bool:
  """Whether something can be written there, or it can be made."""
  there = next(p for p in (path, *path.parents) if p.exists())
  return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _umask() -> int:
  value = os.umask(0)
  os.umask(value)
  return value


@contextlib.contextmanager
def claimed(directory: pathlib.Path) -> Iterator[None]:
  """Keeps a directory to this process; others are refused, none waits.

  A process that is killed lets go. What it was writing, there or beside the
  directory, is removed.

  Raises:
    ValueError: another process has it, or it cannot be written to.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / '.lock', 'w')
  except PermissionError as error:
    raise ValueError(
      f'{directory} cannot be written to; choose another --workdir.'
    ) from error
  with lock as file:
    if fcntl is not None:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        raise ValueError(
          f'Another process writes into {directory}. Wait for it, or choose '
          'another --workdir.'
        ) from error
    pattern = f'.*{_TEMPORARY}'
    for path in (*directory.rglob(pattern), *directory.parent.glob(pattern)):
      path.unlink(missing_ok=True)
    yield


_CHECK = b'crc32'  # Before the checksum, behind everything else.


@contextlib.contextmanager
def checked_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """As `atomic_write`, with a checksum behind what is written.

  Readers of .npy and .npz do not look at it; `is_intact` does.
  """
  with atomic_write(path, 'w+b') as file:
    yield file
    size = file.seek(0, os.SEEK_END)
    checksum = _crc32(file, size)
    file.seek(size)
    file.write(_CHECK + checksum.to_bytes(4, 'big'))


def is_intact(path: str | os.PathLike[str]) -> bool:
  """Whether a file is as `checked_write` left it."""
  try:
    with open(path, 'rb') as file:
      size = file.seek(0, os.SEEK_END) - len(_CHECK) - 4
      if size < 0:
        return False
      checksum = _crc32(file, size)
      return file.read() == _CHECK + checksum.to_bytes(4, 'big')
  except OSError:
    return False


def _crc32(file: IO[bytes], size: int) -> int:
  """Checksum of the first bytes of a file, which is left behind them."""
  value = 0
  file.seek(0)
  while size > 0 and (block := file.read(min(size, 1 << 20))):
    value, size = zlib.crc32(block, value), size - len(block)
  return value


def save_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
  """Writes an .npy file with a checksum."""
  with checked_write(path) as file:
    np.save(file, np.ascontiguousarray(array))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
  """Writes JSON aside, then renames it into place."""
  with atomic_write(path, 'w') as file:
    json.dump(content, file, indent=2, sort_keys=True)
    file.write('\n')


def read_json(path: str | os.PathLike[str]) -> Any:
  """Reads a JSON file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not JSON; the message names the file.
  """
  path = pathlib.Path(path)
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(
      f'{path} is not valid JSON ({error}): delete it, and run the command '
      'that made it again.'
    ) from error


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'


def differences(
  saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ''
) -> list[str]:
  """Names every setting in which two nested mappings differ, both values."""
  lines = []
  for key in sorted(set(saved) | set(wanted)):
    a, b = saved.get(key), wanted.get(key)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f'{prefix}{key}.')
    elif json.dumps(a, default=list) != json.dumps(b, default=list):
      lines.append(f'{prefix}{key}: saved {_short(a)}, now {_short(b)}')
  return lines
