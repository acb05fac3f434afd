"""Tables by timestep that are kept in a file: arrays, and what they depend on.

Letters: `S` timesteps.
"""

import dataclasses
import hashlib
import json
import lzma
import os
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

# What reading a damaged .npz raises. RuntimeError: a flag says that it is
# encrypted, or compressed in a way that zipfile lacks. The last four: headers
# of arrays are Python. The same tuple is in `runtime.files`, which this room
# does without.
_DAMAGE = (
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


def _canonical(settings: Mapping[str, Any]) -> str:
  return json.dumps(
    settings, sort_keys=True, separators=(',', ':'), allow_nan=False
  )


def settings_hash(settings: Mapping[str, Any]) -> str:
  """SHA-256 of `settings` as canonical JSON, in hexadecimal."""
  return hashlib.sha256(_canonical(settings).encode()).hexdigest()


class Table:
  """Base of frozen dataclasses of arrays [S, ...] and settings.

  The fields are `timesteps`, int64[S], distinct, in any order; other arrays,
  float64 unless named in INTEGERS; and `settings`: JSON values.
  """

  NAME: ClassVar[str]  # What error messages call it, after 'The'.
  FORMAT: ClassVar[str]
  VERSION: ClassVar[int]
  INTEGERS: ClassVar[tuple[str, ...]] = ('timesteps',)

  timesteps: np.ndarray
  settings: Mapping[str, Any]

  @classmethod
  def names(cls) -> tuple[str, ...]:
    """Of the arrays."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return tuple(f.name for f in fields if f.name != 'settings')

  def _freeze(self) -> None:
    """Makes all fields what they should be, never to be written again.

    Raises:
      ValueError: a value is not finite, or timesteps are not as they should be.
    """
    for name in self.names():
      dtype = np.int64 if name in self.INTEGERS else np.float64
      array = np.array(getattr(self, name), dtype)
      if not np.isfinite(array).all():
        raise ValueError(f'{name} holds values that are not finite.')
      array.setflags(write=False)
      object.__setattr__(self, name, array)
    # A round trip, so that tuples equal the lists that a file gives back.
    settings = json.loads(_canonical(dict(self.settings)))
    object.__setattr__(self, 'settings', settings)
    if self.timesteps.ndim != 1 or not self.timesteps.size:
      raise ValueError(f'timesteps has shape {self.timesteps.shape}.')
    if len(np.unique(self.timesteps)) < len(self.timesteps):
      raise ValueError(f'Timesteps repeat: {self.timesteps.tolist()}.')

  def _check_shape(self, name: str, want: tuple[int, ...]) -> None:
    found = getattr(self, name).shape
    if found != want:
      raise ValueError(f'{name} has shape {found}: expected {want}.')

  def rows_of(self, timesteps: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where the statistics of `timesteps` are, int64 of the same length.

    Raises:
      ValueError: some have none; the message names them.
    """
    where = {int(t): i for i, t in enumerate(self.timesteps)}
    wanted = [int(t) for t in np.asarray(timesteps)]
    missing = sorted(set(wanted) - set(where))
    if missing:
      raise ValueError(
        f'The {self.NAME} has no statistics of timesteps {missing}; it has '
        f'those of {sorted(where)}.'
      )
    return np.array([where[t] for t in wanted], np.int64)

  def check(self, expected: Mapping[str, Any]) -> None:
    """Refuses to be used for something else than it was made for.

    Args:
      expected: settings that must be there and equal; others are ignored.

    Raises:
      ValueError: names each setting that differs, with both values.
    """
    differences = []
    for key, value in json.loads(_canonical(dict(expected))).items():
      if key not in self.settings:
        differences.append(f'{key}: nothing, not {value!r}')
      elif self.settings[key] != value:
        differences.append(f'{key}: {self.settings[key]!r}, not {value!r}')
    if differences:
      raise ValueError(
        f'The {self.NAME} was made for {"; ".join(differences)}.'
      )

  @classmethod
  def _make(
    cls, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
  ) -> Self:
    return cls(**arrays, settings=settings)  # type: ignore[call-arg]

  @classmethod
  def join(cls, parts: Sequence[Self]) -> Self:
    """One table of the timesteps of several with the same settings."""
    columns = {
      name: np.concatenate([getattr(part, name) for part in parts])
      for name in cls.names()
    }
    return cls._make(columns, parts[0].settings)

  def save(self, path: str | os.PathLike) -> None:
    """Writes one .npz: aside first, then renamed into place.

    As `runtime.files.atomic_write`, which this room does without.
    """
    path = os.path.abspath(path)
    header = dict(
      format=self.FORMAT,
      version=self.VERSION,
      settings=self.settings,
      settings_hash=settings_hash(self.settings),
    )
    arrays: dict[str, Any] = {n: getattr(self, n) for n in self.names()}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f'{path}.{os.getpid()}.part'
    try:
      with open(aside, 'wb') as f:
        np.savez(f, header=np.array(_canonical(header)), **arrays)
        f.flush()
        os.fsync(f.fileno())
      os.replace(aside, path)
    finally:
      if os.path.exists(aside):
        os.unlink(aside)

  @classmethod
  def load(
    cls, path: str | os.PathLike, expected: Mapping[str, Any] | None = None
  ) -> Self:
    """Reads what `save` wrote; executes nothing.

    Args:
      path: of the .npz.
      expected: settings to `check`.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it is damaged, of another format or version, or made for
        other settings than `expected`.
    """
    path = os.fspath(path)
    try:
      with open(path, 'rb') as f, zipfile.ZipFile(f):  # Only an .npz is a zip.
        f.seek(0)
        with np.load(f, allow_pickle=False) as arrays:
          content = {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
      raise
    except _DAMAGE as e:
      raise ValueError(
        f'{path} is not a readable {cls.NAME} ({e}): calibrate again.'
      ) from e
    try:
      header = json.loads(str(content.pop('header')))
      kind, version = header['format'], header['version']
    except (KeyError, TypeError, ValueError) as e:
      raise ValueError(f'{path} has no header of an {cls.NAME}.') from e
    if (kind, version) != (cls.FORMAT, cls.VERSION):
      raise ValueError(
        f'{path} is {kind!r} version {version!r}: expected {cls.FORMAT!r} '
        f'version {cls.VERSION}. Fit the {cls.NAME} again.'
      )
    if sorted(content) != sorted(cls.names()):
      raise ValueError(
        f'{path} holds {sorted(content)}: expected {sorted(cls.names())}.'
      )
    settings = header.get('settings')
    if not isinstance(settings, dict) or (
      settings_hash(settings) != header.get('settings_hash')
    ):
      raise ValueError(f'{path}: settings do not match their hash.')
    try:
      table = cls._make(content, settings)
      table.check(expected or {})
    except ValueError as e:
      raise ValueError(f'{path}: {e}') from e
    return table
