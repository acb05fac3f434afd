"""What `pip install .` brings; and a wheel, installed (make test-slow)."""

import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def project():
  return tomllib.loads((_ROOT / 'pyproject.toml').read_text())


def _requirements():
  lines = (_ROOT / 'requirements.txt').read_text().splitlines()
  return [line for line in lines if line and not line.startswith('#')]


def test_the_console_command_is_that_of_main_py(project):
  module, _, name = project['project']['scripts']['d2dpm'].partition(':')
  command = importlib.import_module(module)
  assert callable(getattr(command, name))
  assert 'main.run()' in (_ROOT / 'main.py').read_text()


def test_every_file_of_the_package_is_in_the_wheel(project):
  patterns = project['tool']['setuptools']['package-data']['d2dpm_jax']
  package = _ROOT / 'd2dpm_jax'
  packed = {path for pattern in patterns for path in package.glob(pattern)}
  others = {
    path
    for path in package.rglob('*')
    if path.is_file()
    and path.suffix not in ('.py', '.pyc')
    and not path.name.startswith('.')
  }
  assert others and others <= packed
  settings = project['tool']['setuptools']
  beside = {
    pathlib.Path(folder): name
    for name, folder in settings['package-dir'].items()
  }
  assert set(map(str, beside)) == {'configs', 'convert'}
  found = set()
  for folder in ('d2dpm_jax', *map(str, beside)):
    for path in (_ROOT / folder).rglob('*.py'):
      assert (path.parent / '__init__.py').is_file(), path
      inside = path.parent.relative_to(_ROOT)
      found.add(beside.get(inside, '.'.join(inside.parts)))
  assert len(set(settings['packages'])) == len(settings['packages'])
  assert found == set(settings['packages'])


def test_nothing_is_installed_under_a_common_name(project):
  for name in project['tool']['setuptools']['packages']:
    assert name.split('.')[0] == project['project']['name']


def test_folders_beside_the_package_are_imported_as_parts_of_it():
  beside = ('configs', 'convert')
  for name in beside:
    module = importlib.import_module(f'd2dpm_jax.{name}')
    (found,) = module.__path__
    assert pathlib.Path(found).samefile(_ROOT / name)
  # By their own names they are there in a checkout alone.
  alone = re.compile(rf'^ *(import|from) ({"|".join(beside)})\b', re.MULTILINE)
  for folder in ('d2dpm_jax', 'examples', *beside):
    for path in (_ROOT / folder).rglob('*.py'):
      assert not alone.search(path.read_text()), path


def test_every_requirement_has_a_range_and_extras_agree(project):
  found = {}
  extras = project['project']['optional-dependencies']
  for line in [*_requirements(), *(one for e in extras.values() for one in e)]:
    match = re.fullmatch(r'([\w-]+)(\[\w+\])?(>=.+,<.+|==.+)', line)
    assert match, line
    assert found.setdefault(match[1], match[3]) == match[3]
  assert {'cuda', 'tpu', 'data', 'dev', 'docs'} == set(extras)
  assert {'jax', 'jinja2', 'matplotlib'} <= set(found)


def test_what_is_imported_is_required():
  names = {re.split(r'[\[>=]', line)[0].lower() for line in _requirements()}
  others = {
    'absl': 'absl-py', 'PIL': 'pillow', 'yaml': 'pyyaml',
    'orbax': 'orbax-checkpoint', 'markupsafe': 'jinja2', 'ml_dtypes': 'jax',
  }  # fmt: skip
  imported = set()
  for folder in ('d2dpm_jax', 'configs', 'convert'):
    for path in (_ROOT / folder).rglob('*.py'):
      imported |= set(
        re.findall(r'^(?:import|from) (\w+)', path.read_text(), re.MULTILINE)
      )
  own = {'d2dpm_jax', 'configs', 'convert', *sys.stdlib_module_names}
  for name in imported - own:
    assert others.get(name, name).replace('_', '-').lower() in {
      n.replace('_', '-') for n in names
    }, name


def test_every_target_is_in_help():
  text = (_ROOT / 'Makefile').read_text()
  targets = re.search(r'\.PHONY: (.*)', text)[1].split()
  for target in targets:
    assert re.search(rf'^{target}:.*## [A-Z].*\.$', text, re.MULTILINE), target


@pytest.mark.slow
def test_a_wheel_in_a_bare_environment(tmp_path):
  """Needs a network; `d2dpm` from a folder that is not the checkout."""
  venv.create(tmp_path / 'venv', with_pip=True)
  folder = tmp_path / 'venv' / 'bin'
  source = tmp_path / 'source'  # Setuptools builds where the source is.
  shutil.copytree(
    _ROOT,
    source,
    ignore=shutil.ignore_patterns('.*', 'out*', 'build', '*.egg-info'),
  )

  # Perhaps of another version of XLA, which ends at flags it does not know; and
  # what lies on a path counts as installed.
  others = ('XLA_FLAGS', 'PYTHONPATH')
  env = {k: v for k, v in os.environ.items() if k not in others}

  def call(*command):
    done = subprocess.run(
      list(map(str, command)),
      cwd=tmp_path,
      env=env,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  call(folder / 'pip', 'wheel', '--no-deps', '-w', tmp_path / 'dist', source)
  (wheel,) = (tmp_path / 'dist').glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    tops = {name.split('/')[0] for name in archive.namelist()}
  assert tops == {'d2dpm_jax', wheel.name.split('-py3')[0] + '.dist-info'}
  call(folder / 'pip', 'install', wheel)
  assert 'd2dpm --config mnist' in call(folder / 'd2dpm', '--help')
  for name in ('imagenet', 'configs/imagenet.py'):
    plan = ('--mode', 'convert', '--dry_run')
    assert 'imagenet' in call(folder / 'd2dpm', '--config', name, *plan)
  call(
    folder / 'd2dpm', '--config', 'mnist', '--mode', 'sample',
    '--config.sample.quantized=False', '--config.sample.num_images=2',
    '--config.sample.microbatch=2', '--config.sampler.steps=2',
  )  # fmt: skip
  assert (tmp_path / 'out' / 'mnist' / 'samples' / 'samples.npz').is_file()
  assert (tmp_path / 'out' / 'mnist' / 'report.html').is_file()
