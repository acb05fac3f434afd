"""--mode convert from file to params: equal to PyTorch, complete, or nothing.

Golden outputs: tests/golden/make_ldm.py, of the original PyTorch modules.
"""

import dataclasses
import functools
import json
import shutil
import zipfile
from unittest import mock

import jax
import numpy as np
import pytest
import yaml
from d2dpm_jax.configs import imagenet, lsun_bedrooms, lsun_churches
from d2dpm_jax.convert import ldm
from ldm_files import family, write_checkpoint
from torch_files import pickle_weights, push_global, write_zip

from d2dpm_jax.command import main
from d2dpm_jax.pipelines import convert, report, setup
from d2dpm_jax.runtime import files, weights

_CONFIGS = {
  'imagenet': imagenet,
  'lsun_bedrooms': lsun_bedrooms,
  'lsun_churches': lsun_churches,
}
# As in tests/models/test_ldm_parity.py: sums in another order.
_TOLERANCE = 2e-5


@pytest.fixture(scope='module', autouse=True)
def _trace_each_model_once():
  with mock.patch.object(ldm, '_targets', functools.cache(ldm._targets)):
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Small checkpoints of the three families with their YAML."""
  made = tmp_path_factory.mktemp('ldm')
  for name, options in (
    ('imagenet', {}),
    ('lsun_bedrooms', dict(ema=True)),
    ('lsun_churches', dict(ema=True, scale_factor=0.25)),
  ):
    model = family(name)
    write_checkpoint(made / f'{name}.ckpt', model.tensors(**options))
    (made / f'{name}.yaml').write_text(
      model.yaml(scale_by_std=name == 'lsun_churches')
    )
  return made


def _main(*args):
  """Runs the command line in this process."""
  assert main.main(['main.py', *map(str, args)]) == 0


def _config(folder, name, **fields):
  config = _CONFIGS[name].get_config()
  config.checkpoint.torch_path = str(folder / f'{name}.ckpt')
  config.checkpoint.ldm_yaml = str(folder / f'{name}.yaml')
  config.checkpoint.update(fields)
  config.lock()
  return config


def _load(config, workdir):
  return setup.load(config, files.Workdir.at(workdir))


def _assert_close(got, want):
  error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
  assert error <= _TOLERANCE, f'error {error:.1e} of the largest output'


@pytest.mark.parametrize('name', _CONFIGS)
def test_converted_checkpoint_computes_what_pytorch_does(
  name, folder, tmp_path
):
  _main(
    f'--config={_CONFIGS[name].__file__}',
    '--mode=convert',
    f'--workdir={tmp_path}',
    f'--config.checkpoint.torch_path={folder / name}.ckpt',
    f'--config.checkpoint.ldm_yaml={folder / name}.yaml',
  )
  model = _load(_config(folder, name), tmp_path)
  golden = family(name)
  inputs = (golden.unet[key] for key in ('x', 't'))
  context = golden.unet.get('context')
  eps = jax.jit(model.ldm.eps)(model.params, *inputs, context)
  _assert_close(eps, golden.unet['eps'])
  if golden.classes:
    context = model.ldm.context(model.params, golden.classes['labels'])
    np.testing.assert_array_equal(context, golden.classes['context'])


@pytest.fixture(scope='module')
def churches(folder, tmp_path_factory):
  """A work directory with the converted model, and its config."""
  workdir = tmp_path_factory.mktemp('churches')
  config = _config(folder, 'lsun_churches')
  convert.run(config, str(workdir))
  return workdir, config


def test_image_size_follows_from_the_yaml(churches):
  """What looks at images asks the config for it, and so does the report."""
  workdir, config = churches
  size = setup.resolve(config).model.image_size
  assert size == setup.outline(config).ldm.image_size < 256
  page = report.html(files.Workdir.at(workdir))
  assert f'{size} x {size} images by 200 DDIM steps' in page


def test_latents_are_scaled_by_the_factor_of_the_checkpoint(churches):
  model = _load(churches[1], churches[0])
  assert model.params['scale_factor'] == np.float32(0.25)
  golden = family('lsun_churches').first_stage

  @jax.jit
  def both(params, images, latents):
    return (
      model.ldm.encode(params, images),
      model.ldm.decode(params, latents * 0.25),
    )

  z, decoded = both(model.params, golden['images'], golden['latents'])
  _assert_close(z, 0.25 * golden['latents'])
  _assert_close(decoded, golden['decoded'])


def test_files_that_a_conversion_leaves(churches):
  workdir, config = churches
  assert sorted(p.name for p in workdir.iterdir()) == [
    'config.json', 'conversion.json', 'conversion.txt', 'params',
  ]  # fmt: skip
  report = json.loads((workdir / 'conversion.json').read_text())
  size = len(family('lsun_churches').tensors(ema=True, scale_factor=0.25))
  assert len(report['mapped']) + len(report['ignored']) == size
  assert report['source']['file'] == 'lsun_churches.ckpt'
  assert len(report['source']['sha256']) == 64
  assert report['training'] == {'epoch': 7, 'global_step': 1234}
  text = (workdir / 'conversion.txt').read_text()
  for part in (
    'U-Net weights: ema',
    'model_ema.decay: counter of the moving average',
    'unet/input_blocks_0_0/kernel',  # The parameter overview.
    f'Total: {sum(report["parameters"].values()) + 1:,}',
  ):
    assert part in text
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['model']['unet']['model_channels'] == 64
  assert saved['checkpoint']['ldm_yaml'] == config.checkpoint.ldm_yaml


def test_converted_and_embedded_weights_load_by_one_function(
  churches, tmp_path
):
  model = _load(churches[1], churches[0])
  path = tmp_path / 'churches.safetensors'
  meta = {'model': model.identity()['model']}
  weights.save_safetensors(path, model.params, meta)
  config = churches[1].copy_and_resolve_references()
  config.checkpoint.path = str(path)
  again = setup.load(config)
  assert again.identity() == model.identity()


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_folder_and_zip_as_published(kind, folder, tmp_path):
  source = tmp_path / 'lsun_bedrooms'
  source.mkdir()
  shutil.copy(folder / 'lsun_bedrooms.ckpt', source / 'model.ckpt')
  if kind == 'zip':
    with zipfile.ZipFile(tmp_path / 'lsun_bedrooms.zip', 'w') as file:
      file.write(source / 'model.ckpt', 'model.ckpt')
    source = tmp_path / 'lsun_bedrooms.zip'
  config = _config(folder, 'lsun_bedrooms', torch_path=str(source))
  convert.run(config, str(tmp_path / 'out'))
  params = _load(config, tmp_path / 'out').params
  want = family('lsun_bedrooms').tensors()['model.diffusion_model.out.2.bias']
  np.testing.assert_array_equal(params['unet']['out_2']['bias'], want)


def test_raw_weights_by_config(folder, tmp_path):
  config = _config(folder, 'lsun_bedrooms', use_ema=False)
  convert.run(config, str(tmp_path))
  params = _load(config, tmp_path).params
  stored = family('lsun_bedrooms').tensors(ema=True)
  want = stored['model.diffusion_model.out.2.bias']
  np.testing.assert_array_equal(params['unet']['out_2']['bias'], want)


def _nothing_is_left(workdir):
  return not workdir.exists() or not any(workdir.rglob('*'))


def test_checkpoint_of_another_model_leaves_nothing(folder, tmp_path):
  config = _config(
    folder, 'imagenet', ldm_yaml=str(folder / 'lsun_bedrooms.yaml')
  )
  with pytest.raises(ValueError, match='imagenet.ckpt: .*does not fit'):
    convert.run(config, str(tmp_path / 'out'))
  assert _nothing_is_left(tmp_path / 'out')


def test_damaged_numbers_leave_nothing(folder, tmp_path):
  tensors = family('lsun_bedrooms').tensors()
  name = 'first_stage_model.quantize.embedding.weight'
  tensors[name] = np.where(np.arange(3) == 1, np.nan, tensors[name])
  tensors[name] = tensors[name].astype(np.float32)
  path = write_checkpoint(tmp_path / 'model.ckpt', tensors)
  config = _config(folder, 'lsun_bedrooms', torch_path=str(path))
  with pytest.raises(ValueError, match=f'not finite .1.: {name}, 64 of 192'):
    convert.run(config, str(tmp_path / 'out'))
  assert _nothing_is_left(tmp_path / 'out')


def test_hostile_file_leaves_nothing(folder, tmp_path, witness):
  call = push_global('os.system') + b'(' + b'U\x04true' + b'tR'
  path = tmp_path / 'model.ckpt'
  write_zip(path, pickle_weights({'a': call}))
  witness.refuses(path, "refused, because it refers to 'os.system'")
  config = _config(folder, 'lsun_bedrooms', torch_path=str(path))
  with pytest.raises(ValueError, match="refers to 'os.system'"):
    convert.run(config, str(tmp_path / 'out'))
  assert _nothing_is_left(tmp_path / 'out')


def test_truncated_file_leaves_nothing(folder, tmp_path):
  path = tmp_path / 'model.ckpt'
  path.write_bytes((folder / 'imagenet.ckpt').read_bytes()[:-1000])
  config = _config(folder, 'imagenet', torch_path=str(path))
  with pytest.raises(ValueError, match='truncated or damaged'):
    convert.run(config, str(tmp_path / 'out'))
  assert _nothing_is_left(tmp_path / 'out')


def test_checkpoint_has_to_be_named(tmp_path):
  with pytest.raises(ValueError, match='torch_path is not set'):
    convert.run(imagenet.get_config(), str(tmp_path))


def test_run_that_is_killed_is_not_taken_for_complete(folder, tmp_path):
  config = _config(folder, 'lsun_bedrooms')
  write_json = files.write_json

  def killed(path, content):
    if path.parent.name == 'params':
      raise KeyboardInterrupt
    write_json(path, content)

  def killed_run():
    with mock.patch.object(files, 'write_json', killed):
      with pytest.raises(KeyboardInterrupt):
        convert.run(config, str(tmp_path))
    with pytest.raises(FileNotFoundError, match='No weights at'):
      _load(config, tmp_path)

  killed_run()
  convert.run(config, str(tmp_path))
  weights.load_tree(tmp_path / 'params')
  killed_run()  # Over a complete conversion.


def test_params_of_another_model_are_refused(churches, folder):
  workdir, config = churches
  content = yaml.safe_load((folder / 'lsun_churches.yaml').read_text())
  params = content['model']['params']
  params['linear_end'] = 0.0155
  # Heads have no parameters: shapes do not show them.
  params['unet_config']['params']['num_heads'] = 4
  other = workdir.parent / 'other.yaml'
  other.write_text(yaml.safe_dump(content))
  config = config.copy_and_resolve_references()
  config.checkpoint.ldm_yaml = str(other)
  with pytest.raises(ValueError) as caught:
    _load(config, workdir)
  text = str(caught.value)
  assert 'schedule.beta_end: saved 0.0195, now 0.0155' in text
  assert 'unet.num_heads: saved 8, now 4' in text
  config.checkpoint.ldm_yaml = ''  # Then it is the one of the config.
  with pytest.raises(
    ValueError, match='unet.model_channels: saved 64, now 192'
  ):
    _load(config, workdir)


def test_guidance_needs_classes(churches):
  config = churches[1].copy_and_resolve_references()
  config.sampler.guidance_scale = 1.5
  with pytest.raises(ValueError, match='guidance_scale is 1.5, .*uncondition'):
    _load(config, churches[0])


@pytest.mark.parametrize('name', _CONFIGS)
@pytest.mark.parametrize('arg', ['', 'paper_w4a8', 'paper_w8a8'])
def test_configs(name, arg):
  config = _CONFIGS[name].get_config(arg)
  model = setup.build(config)
  assert dataclasses.is_dataclass(model) and model.image_size == 256
  assert config.quant.weight_bits == (8 if '8a8' in arg else 4)
  assert config.quant.per_channel == (not arg)
  assert (config.sampler.guidance_scale == 1) == (name != 'imagenet')
  with pytest.raises(ValueError, match='expected'):
    _CONFIGS[name].get_config('paper')


def test_parameters_larger_than_a_piece_are_written(tmp_path):
  # A limit of exactly this size in GB is a little less in bytes.
  size = 16_588_800 // 4
  tree = {'a': {'b': jax.numpy.arange(size, dtype=np.float32)}, 'c': {}}
  weights.save_tree(tmp_path / 'params', tree, {'d': 1})
  found, meta = weights.load_tree(tmp_path / 'params')
  np.testing.assert_array_equal(found['a']['b'], np.arange(size))
  assert meta == {'d': 1}
