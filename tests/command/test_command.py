"""Help, listings and plans of the command line."""

import importlib
import json
import pathlib
import re

import pytest

from d2dpm_jax.command import config_files, main

_TESTS = pathlib.Path(__file__).parents[1]
_CONFIG = str(_TESTS / 'tiny_config.py')
_CONFIGS = _TESTS.parent / 'configs'


def _call(capsys, *args):
  capsys.readouterr()
  code = main.main(['main.py', *map(str, args)])
  said = capsys.readouterr()
  assert code == 0, said.err
  return said.out


def test_help_is_one_screen(capsys):
  text = _call(capsys, '--help')
  assert len(text.splitlines()) < 30
  assert max(map(len, text.splitlines())) <= 80
  for mode in main.MODES:
    assert re.search(rf'^  {mode} +\w', text, re.MULTILINE)
  for name in ('mnist', 'imagenet', '--dry_run', '--help_config', '--debug'):
    assert name in text
  assert _call(capsys, '-h') == text


def test_every_mode_is_a_pipeline():
  for mode in main.MODES:
    module = importlib.import_module(f'd2dpm_jax.pipelines.{mode}')
    assert callable(module.run)


def test_help_names_the_program_as_it_was_called():
  assert '  d2dpm --config' in main.help_text('/usr/bin/d2dpm')
  assert '  python main.py --config' in main.help_text('./main.py')


# ---- Config files.


def test_names_and_paths_of_configs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_files.names() == [
    'imagenet', 'lsun_bedrooms', 'lsun_churches', 'mnist'
  ]  # fmt: skip
  for name in ('mnist', 'configs/mnist.py'):
    assert config_files.find(name).samefile(_CONFIGS / 'mnist.py')
  own = tmp_path / 'configs' / 'mnist.py'
  own.parent.mkdir()
  own.write_text('')
  assert config_files.find('configs/mnist.py').samefile(own)
  for name in ('configs', 'other/mnist.py', 'mnist.yaml', 'common'):
    with pytest.raises(ValueError, match='there is no such file'):
      config_files.find(name)


def test_options_of_a_command_line():
  argv = ['main.py', '--config=mnist:full', '--config.seed=3', '--mode=sample']
  options = main.parse(argv)
  assert options.config.seed == 3 and options.config.quant.weight_bits == 4
  assert options.config.quant.reconstruction.iters == 10_000
  assert options.source == 'mnist:full' and options.overrides == {'seed': 3}
  assert options.path.samefile(_CONFIGS / 'mnist.py')
  assert options.argv == tuple(argv)
  assert main.parse(argv[:1]).config is None


@pytest.mark.parametrize('name', ['mnist', 'imagenet', 'lsun_churches'])
def test_every_field_has_a_comment(name):
  path = _CONFIGS / f'{name}.py'
  config = importlib.import_module(f'd2dpm_jax.configs.{name}').get_config()
  said = config_files.comments(path)
  missing = [f for f in config_files.flatten(config) if not said.get(f)]
  assert not missing


def test_comments_are_those_of_the_source(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from d2dpm_jax.configs import common\n'
    'def get_config(arg=""):\n'
    '  config = common.base_config(arg)\n'
    '  # Two lines\n'
    '  # above.\n'
    '  config.first = 1  # and behind\n'
    '\n'
    '  config.part = dict(\n'
    '    one=(\n'
    '      1,\n'
    '    ),  # after its end\n'
    '    # Of two.\n'
    '    two="# no comment",\n'
    '    three=3,\n'
    '  )\n'
    '  config.made = _made()\n'
    '  return config\n'
    'def _made():\n'
    '  """What it is for.\n\n  More."""\n'
    '  made = dict()\n'
    '  made.x = 3  # of it\n'
    '  return made\n'
  )
  said = config_files.comments(path)
  assert said['first'] == 'Two lines above. and behind'
  assert said['part.one'] == 'after its end'
  assert said['part.two'] == 'Of two.'
  assert said['part.three'] == ''
  assert said['made'] == 'What it is for.' and said['made.x'] == 'of it'
  assert said['sample.num_images']  # Of configs/common.py.


def test_listing_of_fields(capsys):
  text = _call(
    capsys, '--config', 'mnist', '--config.sampler.steps=7', '--help_config'
  )
  config = importlib.import_module('d2dpm_jax.configs.mnist').get_config()
  for name in config_files.flatten(config):
    assert f'  {name}=' in text
  assert '  sampler.steps=7 ' in text
  assert 'sampler: Denoising schedule' in text
  chosen = _call(capsys, '--config', 'mnist', '--help_config', 'eta', 'seeds')
  fields = re.findall(r'^  ([a-z_.]+)=', chosen, re.MULTILINE)
  assert fields == [
    'sampler.eta', 'quant.reconstruction.beta_start',
    'quant.reconstruction.beta_end', 'experiment.seeds',
    'model.schedule.beta_start', 'model.schedule.beta_end',
  ]  # fmt: skip


# ---- Plans.


def test_plan_of_a_calibration(capsys, tiny, few, tmp_path):
  flags = (
    '--config', f'{_CONFIG}:few', '--mode', 'calibrate', '--dry_run',
    f'--config.checkpoint.path={tiny.weights}', '--workdir',
  )  # fmt: skip
  text = _call(capsys, *flags, tmp_path / 'work', '--config.seed=3')
  assert 'seed=3 (the file: 0)' in text
  assert 'quant.float_layers=' in text  # The argument's doing.
  assert 'trajectories: 0 of 15 images' in text
  assert re.search(r'quantization: 0 of \d+ units', text)
  assert re.search(r'\d+ MB on each of 1 device', text)
  assert re.search(r'\n  15 trajectories, [\d.]+ [GM]OP: not known', text)
  assert re.search(r'learning: (\d+) of \1 units left', text)
  assert 'rates are measured by --mode benchmark' in text
  assert not (tmp_path / 'work').exists()
  text = _call(capsys, *flags, few)
  assert 'trajectories: 15 of 15 images' in text and 'all of it: yes' in text
  done, total = re.search(r'quantization: (\d+) of (\d+) units', text).groups()
  assert done == total and int(total) > 0
  assert 'Time, predicted:\n  nothing is left to do' in text
  assert re.search(r'It took \d+ s the last time', text)
  sample = ['sample' if flag == 'calibrate' else flag for flag in flags]
  text = _call(capsys, *sample, few, '--config.checkpoint.path=not/there')
  assert 'quantizers ' in text and 'MISSING' not in text
  run = json.loads((few / 'runs.json').read_text())[0]
  assert run['mode'] == 'calibrate' and run['config'] == f'{_CONFIG}:few'
  assert run['command'].startswith('python main.py --config ')
  assert run['environment']['packages']['jax']
  assert run['environment']['devices'].startswith('1 x ')


def test_a_plan_waits_for_nobody(capsys, tmp_path):
  text = _call(
    capsys, '--config', _CONFIG, '--mode', 'sample', '--dry_run', '--workdir',
    tmp_path, '--coordinator_address=localhost:1', '--num_processes=2',
    '--process_id=0',
  )  # fmt: skip
  assert '0 of 10 images' in text and 'of disk for images' in text


def test_a_plan_names_missing_sets_of_images(capsys, tmp_path):
  text = _call(
    capsys, '--config', _CONFIG, '--mode', 'evaluate', '--dry_run', '--workdir',
    tmp_path, f'--config.evaluate.samples=mnist:test,{tmp_path}',
    '--config.evaluate.reference=no/such.npz',
  )  # fmt: skip
  assert f'samples mnist:test,{tmp_path}\n' in text
  assert 'reference no/such.npz: MISSING; no/such.npz is not there' in text


@pytest.mark.parametrize('mode', sorted(main.MODES))
def test_plans_load_nothing_and_write_nothing(
  capsys, tmp_path, monkeypatch, mode
):
  monkeypatch.chdir(tmp_path)
  text = _call(
    capsys, '--config', _CONFIG, '--mode', mode, '--dry_run',
    '--config.checkpoint.path=not/there',
  )  # fmt: skip
  assert 'nothing is run' in text and '\nWrites:\n  out/tiny_config' in text
  assert '\nTime, predicted:\n  ' in text
  if mode in ('calibrate', 'sample', 'experiment'):
    assert 'weights not/there: MISSING; --mode convert' in text
  assert not list(tmp_path.iterdir())
