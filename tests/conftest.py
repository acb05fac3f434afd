"""Eight simulated devices for every test, and a tiny calibrated model.

Must run before JAX starts.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_FLAG = '--xla_force_host_platform_device_count=8'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'.strip()

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
def quick():
  """Compiles with few optimizations: half the time, other last bits."""
  import jax

  jax.config.update('jax_disable_most_optimizations', True)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def quick_compile():
  with quick():
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


@pytest.fixture(scope='session')
def few(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Work directory of --mode calibrate on few layers; to be copied."""
  from d2dpm_jax.command import main

  target = tmp_path_factory.mktemp('few') / 'work'
  config = pathlib.Path(__file__).parent / 'tiny_config.py'
  argv = [
    'main.py', '--config', f'{config}:few', '--mode', 'calibrate',
    f'--config.checkpoint.path={tiny.weights}', '--workdir', str(target),
  ]  # fmt: skip
  with quick():
    assert main.main(argv) == 0
  return target


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
  from d2dpm_jax.pipelines import calibrate
  from d2dpm_jax.runtime import files

  paths = files.Workdir.at(tmp_path_factory.mktemp('calibrated') / 'work')
  with quick():
    return Calibrated(paths, calibrate.calibrate(tiny.model, paths))
