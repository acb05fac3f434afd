"""Eight simulated devices for every test, and a tiny calibrated model.

Must run before JAX starts.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import os
import pathlib
import pickle
import shutil
import tempfile
from collections.abc import Callable

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_FLAGS = ['--xla_force_host_platform_device_count=8']
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  # XLA's older emitters of loops: a program compiles in two thirds of the time.
  # Of this version alone, for XLA ends at flags that it does not know.
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
for _flag in _FLAGS:
  if _flag not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = (
      f'{os.environ.get("XLA_FLAGS", "")} {_flag}'.strip()
    )

# Few optimizations: half the time, other last bits; see `full_compile`.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

# Traces of programs are many small objects, of which hardly any is garbage.
gc.set_threshold(50_000, 20, 50)

# Workers of one test run share what they compile; nothing outlives the run.
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
_own_cache = None
if _CACHE not in os.environ:
  _own_cache = tempfile.mkdtemp(prefix='d2dpm_jax_tests_')
  os.environ[_CACHE] = _own_cache
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'


def pytest_unconfigure(config: pytest.Config) -> None:
  del config
  if _own_cache is not None:
    shutil.rmtree(_own_cache, ignore_errors=True)


@contextlib.contextmanager
def _optimized(full: bool):
  import jax

  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', not full)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture
def full_compile():
  """Programs optimized as those of users, where their last bits matter."""
  with _optimized(True):
    yield


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A random model of tests/tiny_config.py.

  Attributes:
    weights: its .safetensors.
    model: a `pipelines.setup.Model` with that config.
  """

  weights: pathlib.Path
  model: object

  def config(self, arg: str = '', **overrides):
    """A new config for it; 'quant__weight_bits' is quant.weight_bits."""
    import tiny_config

    config = tiny_config.get_config(arg)
    config.checkpoint.path = str(self.weights)
    config.lock()
    config.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in overrides.items()}
    )
    return config

  def with_config(self, arg: str = '', **overrides):
    """The model with another config (of the same architecture)."""
    return dataclasses.replace(self.model, config=self.config(arg, **overrides))


@pytest.fixture(scope='session')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
  import tiny_config

  from d2dpm_jax.pipelines import setup

  weights = tmp_path_factory.mktemp('tiny') / 'weights.safetensors'
  tiny_config.write_weights(weights)
  config = tiny_config.get_config()
  config.checkpoint.path = str(weights)
  return Tiny(weights, setup.load(config))


def _once(
  factory: pytest.TempPathFactory,
  name: str,
  make: Callable[[pathlib.Path], None],
) -> pathlib.Path:
  """A directory that `make` writes, in one of the workers of a test run.

  Others get a copy; who would have to wait makes it, too.
  """
  base = factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    base = base.parent
  made, target = base / f'{name}-made', factory.mktemp(name) / name
  if made.exists():
    shutil.copytree(made, target)
    return target
  make(target)
  copy = shutil.copytree(target, factory.mktemp(name) / 'copy')
  with contextlib.suppress(OSError):  # The other worker was there first.
    copy.rename(made)
  return target


@pytest.fixture(scope='session')
def few(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Work directory that main.py leaves of few layers; to be copied.

  Beside it is what was said, in a file.
  """

  def make(target: pathlib.Path) -> None:
    from helpers import main_process

    config = pathlib.Path(__file__).parent / 'tiny_config.py'
    done = main_process(
      '--config', f'{config}:few', '--mode', 'calibrate',
      f'--config.checkpoint.path={tiny.weights}', '--workdir', target / 'work',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (target / 'said').write_text(done.stdout + done.stderr)

  return _once(tmp_path_factory, 'few', make) / 'work'


@dataclasses.dataclass(frozen=True)
class Calibrated:
  """A finished calibration of `tiny` with the whole method.

  Attributes:
    paths: its work directory; not to be written to.
    quantized: what `calibrate` returned.
  """

  paths: object
  quantized: object


@pytest.fixture(scope='session')
def calibrated(
  tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Calibrated:
  from d2dpm_jax.pipelines import artifacts, calibrate
  from d2dpm_jax.runtime import files

  fields = ('qstate', 'error_models', 'held_out')

  def make(target: pathlib.Path) -> None:
    with _optimized(False):
      found = calibrate.calibrate(tiny.model, files.Workdir.at(target / 'work'))
    # Not as --mode calibrate stores it, which is what tests look at.
    data = {name: getattr(found, name) for name in fields}
    (target / 'returned').write_bytes(pickle.dumps(data))

  target = _once(tmp_path_factory, 'calibrated', make)
  returned = pickle.loads((target / 'returned').read_bytes())
  return Calibrated(
    files.Workdir.at(target / 'work'),
    artifacts.Quantized(tiny.model, **returned),
  )
