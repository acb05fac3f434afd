"""State dicts of latent diffusion: what is used, ignored, and complained of."""

import functools
import json
import math
import weakref
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from d2dpm_jax.configs import imagenet, lsun_bedrooms, lsun_churches
from d2dpm_jax.convert import ldm, ldm_yaml, names
from d2dpm_jax.convert.torch_reader import TensorRef
from ldm_files import GOLDEN, family, refs

from d2dpm_jax.models import latent_diffusion
from d2dpm_jax.pipelines import setup

_UNET = 'model.diffusion_model.'
_CONFIGS = {
  'imagenet': imagenet,
  'lsun_bedrooms': lsun_bedrooms,
  'lsun_churches': lsun_churches,
}


@pytest.fixture(scope='module', autouse=True)
def _trace_each_model_once():
  cached = functools.cache(ldm._targets)
  with mock.patch.object(ldm, '_targets', cached):
    yield


@functools.cache
def _model(name='lsun_bedrooms'):
  return latent_diffusion.from_config(ldm_yaml.parse(family(name).yaml()).model)


@functools.cache
def _stored(name='lsun_bedrooms', **options):
  return family(name).tensors(**options)


def _tensors(name='lsun_bedrooms', **options):
  return dict(_stored(name, **options))


def _convert(tensors, name='lsun_bedrooms', **options):
  return ldm.convert(refs(tensors), _model(name), **options)


def _assert_equal(params, tensors, prefix, part, name='lsun_bedrooms'):
  """`params` are the tensors below a prefix, by the rule that parity tests."""
  own = {k: v for k, v in tensors.items() if k.startswith(prefix)}
  target = ldm._targets(_model(name))[part]
  want, problems = names.match(own, target, prefix)
  assert not problems and own
  flat, wanted = _flat(params[part]), _flat(want)
  assert flat.keys() == wanted.keys()
  for path, value in flat.items():
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, wanted[path], err_msg=path)


def _flat(tree, prefix=''):
  if not isinstance(tree, dict):
    return {prefix: tree}
  out = {}
  for key, value in tree.items():
    out |= _flat(value, f'{prefix}/{key}')
  return out


def test_every_tensor_is_used_or_ignored_with_a_reason():
  tensors = _tensors('imagenet')
  params, report = _convert(tensors, 'imagenet')
  _assert_equal(params, tensors, _UNET, 'unet', 'imagenet')
  _assert_equal(
    params, tensors, 'first_stage_model.', 'first_stage', 'imagenet'
  )
  _assert_equal(params, tensors, 'cond_stage_model.', 'cond_stage', 'imagenet')
  used = list(report.mapped.values())
  assert len(used) == len(set(used))
  assert set(used) | set(report.ignored) == set(tensors)
  assert not set(used) & set(report.ignored)
  assert set(report.ignored) == {
    'betas', 'alphas_cumprod', 'sqrt_recipm1_alphas_cumprod',
  }  # fmt: skip
  assert (
    report.mapped['unet/time_embed_0/kernel'] == f'{_UNET}time_embed.0.weight'
  )
  assert report.parameters['cond_stage'] == 11 * 24
  assert sum(report.parameters.values()) == sum(
    tensors[name].size for name in used
  )
  assert report.weights == 'raw'


@pytest.mark.parametrize('name', _CONFIGS)
def test_names_of_the_published_checkpoints(name):
  """Full size, as the original classes make them; no weights."""
  with np.load(GOLDEN / 'ldm_state_dicts.npz') as file:
    shapes = json.loads(str(file[f'{name}/tensors']))
    alphas = file[f'{name}/alphas_cumprod']
  tensors = {
    k: TensorRef(
      tuple(shape),
      np.dtype('f4'),
      lambda shape=shape: np.broadcast_to(np.float32(1), shape),
    )
    for k, shape in shapes
  }
  tensors['alphas_cumprod'] = refs({'a': alphas})['a']
  config = _CONFIGS[name].get_config()
  params, report = ldm.convert(
    tensors,
    setup.build(config),
    scale_factor=config.checkpoint.scale_factor,
    store=lambda array: array.shape,
  )
  assert report.parameters['unet'] == sum(
    math.prod(shape) for k, shape in shapes if k.startswith(_UNET)
  )
  assert report.weights == ('raw' if name == 'imagenet' else 'ema')
  assert report.schedule.startswith("the config's")
  assert ('scale_factor' in report.mapped) == (name == 'lsun_churches')
  assert set(report.mapped.values()) | set(report.ignored) == set(tensors)
  assert params['unet']['input_blocks_0_0']['kernel'][:2] == (3, 3)


def test_averages_are_used_unless_raw_weights_are_asked_for():
  tensors = _tensors(ema=True)
  averaged, report = _convert(tensors)
  assert report.weights == 'ema'
  _assert_equal(averaged, _tensors(), _UNET, 'unet')
  assert set(report.mapped.values()) | set(report.ignored) == set(tensors)
  raw, report = _convert(tensors, use_ema=False)
  assert report.weights == 'raw'
  _assert_equal(raw, tensors, _UNET, 'unet')
  assert set(report.mapped.values()) | set(report.ignored) == set(tensors)
  first, other = (p['unet']['out_2']['bias'] for p in (averaged, raw))
  assert np.abs(first - other).min() > 0.5


def test_averages_that_are_not_there_are_no_error():
  _, report = _convert(_tensors(), use_ema=True)
  assert report.weights == 'raw'


def test_incomplete_averages():
  tensors = _tensors(ema=True)
  del tensors['model_ema.diffusion_modelout2bias']
  tensors['model_ema.diffusion_modelout2other'] = np.zeros(3, np.float32)
  name = 'model_ema.diffusion_modelout2weight'
  tensors[name] = tensors[name][:, :, :1]
  with pytest.raises(ValueError) as caught:
    _convert(tensors)
  text = str(caught.value)
  assert 'missing (2): model_ema.diffusion_modelout2bias, out_2/bias' in text
  assert 'unexpected (1): model_ema.diffusion_modelout2other' in text
  assert f'misshapen (1): {_UNET}out.2.weight (3, 32, 1, 3)' in text
  assert 'unet, moving average' in text


def test_two_parameters_of_one_average():
  tensors = _tensors(ema=True)
  tensors[f'{_UNET}out.2bias'] = np.zeros(3, np.float32)
  with pytest.raises(ValueError, match='repeated .*diffusion_modelout2bias'):
    _convert(tensors)


def test_all_problems_are_in_one_message():
  tensors = _tensors()
  del tensors[f'{_UNET}time_embed.0.weight']
  del tensors['first_stage_model.decoder.conv_out.bias']
  tensors['cond_stage_model.embedding.weight'] = np.zeros((5, 4), np.float32)
  tensors['optimizer.state'] = np.zeros(3, np.float32)
  tensors[f'{_UNET}input_blocks.0.0.weight'] = np.zeros((32, 4, 3, 3), 'f4')
  tensors[f'{_UNET}out.0.bias'] = np.full(32, np.nan, np.float32)
  tensors['first_stage_model.quant_conv.bias'] = np.array([1, np.inf, 2], 'f4')
  tensors[f'{_UNET}out.0.weight'] = np.ones(32, np.int64)
  with pytest.raises(ValueError) as caught:
    _convert(tensors)
  text = str(caught.value)
  for part in (
    'missing (2): decoder/conv_out/bias (3,) [first_stage], '
    'time_embed_0/kernel (32, 128) [unet]',
    'unexpected (2): cond_stage_model.embedding.weight (5, 4) [cond_stage], '
    'optimizer.state',
    f'misshapen (1): {_UNET}input_blocks.0.0.weight (32, 4, 3, 3)',
    f'not finite (2): first_stage_model.quant_conv.bias, 1 of 3 numbers, '
    f'{_UNET}out.0.bias, 32 of 32 numbers',
    f'not floating-point (1): {_UNET}out.0.weight int64',
    '--config.checkpoint.ldm_yaml',
  ):
    assert part in text


@pytest.mark.parametrize('dtype', [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floating_point_types_become_float32(dtype):
  tensors = {
    k: v.astype(dtype) if k.startswith(_UNET) else v
    for k, v in _tensors().items()
  }
  params, _ = _convert(tensors)
  _assert_equal(params, tensors, _UNET, 'unet')
  tensors[f'{_UNET}out.0.bias'] = np.full(32, np.inf, dtype)
  with pytest.raises(ValueError, match=r'not finite \(1\)'):
    _convert(tensors)


def test_losses_and_counters_are_not_needed():
  extra = (
    'first_stage_model.loss.discriminator.main.0.weight',
    'first_stage_model.loss.logvar',
    'first_stage_model.loss.perceptual_loss.lin0.model.1.weight',
    'first_stage_model.model_ema.decay',
    'first_stage_model.model_ema.encoderconv_inweight',
    'logvar',
    'lvlb_weights',
    'posterior_mean_coef1',
    'log_one_minus_alphas_cumprod',
    'model_ema.decay',
    'model_ema.num_updates',
  )
  tensors = _tensors()
  tensors |= {name: np.zeros(2, np.float32) for name in extra}
  params, report = _convert(tensors)
  assert set(extra) < set(report.ignored)
  assert all(report.ignored[name] for name in extra)
  assert report.weights == 'raw'
  _assert_equal(params, tensors, _UNET, 'unet')


def test_scale_factor_of_checkpoint_counts_more_than_default():
  params, report = _convert(_tensors(scale_factor=0.25), scale_factor=2.0)
  assert params['scale_factor'] == 0.25 and params['scale_factor'].ndim == 0
  assert report.scale_factor == (0.25, 'of the checkpoint')
  params, report = _convert(_tensors(), scale_factor=2.0)
  assert params['scale_factor'] == 2.0
  assert params['scale_factor'].dtype == np.float32


@pytest.mark.parametrize(
  'value,message',
  [
    (None, r'missing \(1\): scale_factor'),
    (np.zeros(2, 'f4'), r'misshapen \(1\): scale_factor \(2,\)'),
    (np.float32(np.nan), r'not finite \(1\): scale_factor'),
    (np.float32(0), r'not positive \(1\): scale_factor 0'),
  ],
)
def test_bad_scale_factors(value, message):
  tensors = _tensors()
  if value is not None:
    tensors['scale_factor'] = value
  with pytest.raises(ValueError, match=message):
    _convert(tensors, scale_factor=None)


def test_another_noise_schedule_is_an_error():
  tensors = _tensors(schedule_of=(0.0015, 0.0155))
  with pytest.raises(ValueError) as caught:
    _convert(tensors)
  text = str(caught.value)
  assert 'another noise schedule' in text
  assert 'from 0.0015 to 0.0155, in the config from 0.0015 to 0.0195' in text
  tensors['alphas_cumprod'] = tensors['alphas_cumprod'][:100]
  with pytest.raises(
    ValueError, match=r'alphas_cumprod \(100,\) for \(1000,\)'
  ):
    _convert(tensors)
  _, report = _convert(_tensors(schedule_of=None))
  assert 'not checked' in report.schedule
  _, report = _convert(_tensors())
  assert "the config's" in report.schedule


def test_conditional_checkpoint_needs_a_conditional_model():
  with pytest.raises(ValueError, match='unexpected .*cond_stage_model'):
    _convert(_tensors('imagenet'))


def test_report_says_what_happened():
  tensors = _tensors(ema=True, scale_factor=0.25)
  counted = []
  _, report = _convert(
    tensors,
    contents={'epoch': 7, 'global_step': 1234, 'callbacks': {}},
    on_tensor=lambda: counted.append(1),
  )
  assert len(counted) == len(tensors)
  assert report.training == {'epoch': 7, 'global_step': 1234}
  text = report.summary()
  assert 'U-Net weights: ema' in text
  assert 'scale_factor: 0.25 (of the checkpoint)' in text
  assert '2 tensors not needed: counter of the moving average' in text


def test_one_tensor_is_in_memory_at_a_time():
  alive, most = weakref.WeakSet(), 0

  class Array(np.ndarray):  # Plain arrays have neither hash nor weak reference.
    __hash__ = object.__hash__

  def track(ref):
    def load():
      nonlocal most
      array = ref.load().view(Array)
      alive.add(array)
      most = max(most, len(alive))
      return array

    return TensorRef(ref.shape, ref.dtype, load)

  tracked = {k: track(ref) for k, ref in refs(_tensors(ema=True)).items()}
  ldm.convert(tracked, _model(), store=lambda array: array.shape)
  assert 1 <= most <= 2
