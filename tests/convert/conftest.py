"""The witness of code that runs, for the tests of this folder."""

import sys

import pytest
from d2dpm_jax.convert.torch_reader import CheckpointError, open_checkpoint
from torch_files import pickle_weights, write_zip

_RUNS_CODE = frozenset(
  'code.__new__ compile ctypes.dlopen exec import marshal.loads os.exec '
  'os.fork os.forkpty os.posix_spawn os.remove os.spawn os.system '
  'pickle.find_class shutil.rmtree socket.connect subprocess.Popen'.split()
)


class Witness:
  """Collects the interpreter's own reports of code that runs (PEP 578)."""

  def __init__(self):
    self.watching = False
    self.seen = []
    sys.addaudithook(self._hear)

  def _hear(self, event, args):
    if self.watching and event in _RUNS_CODE:
      self.seen.append((event, args))

  def open(self, path):
    self.seen, self.watching = [], True
    try:
      return open_checkpoint(path)
    finally:
      self.watching = False

  def refuses(self, path, message):
    """The file is refused with this message, and nothing of it ran."""
    with pytest.raises(CheckpointError, match=message):
      self.open(path).close()
    assert self.seen == []


@pytest.fixture(scope='session')
def witness(tmp_path_factory):
  made = Witness()
  path = tmp_path_factory.mktemp('warm') / 'model.pt'
  # Codecs are imported when first used.
  made.open(write_zip(path, pickle_weights())).close()
  b'x'.decode('raw_unicode_escape')
  made.watching = True
  exec('pass')  # The witness can hear.
  made.watching = False
  assert made.seen
  return made
