"""Finding, converting and keeping the weights of InceptionV3."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from d2dpm_jax.convert import inception as conversion

from d2dpm_jax.evaluation import inception as network
from d2dpm_jax.pipelines import inception
from d2dpm_jax.runtime import weights

_KERNEL = 'Conv2d_1a_3x3.conv.weight'
_SHAPES = {'Conv2d_1a_3x3/conv/kernel': (3, 3, 3, 2), 'fc/kernel': (4, 5)}
_PUBLISHED = list(conversion.PUBLISHED)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """An empty cache, and a network of two layers."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(network, 'parameter_shapes', lambda: _SHAPES)
  return tmp_path / 'cache' / 'd2dpm_jax'


def _write(path, seed=0, **metadata):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  tensors = {
    _KERNEL: rng.normal(size=(2, 3, 3, 3)).astype(np.float32),
    'fc.weight': rng.normal(size=(5, 4)).astype(np.float32),
  }
  safetensors.numpy.save_file(tensors, path, metadata or None)
  return tensors


def _assert_ours(params, tensors):
  np.testing.assert_array_equal(params['fc']['kernel'], tensors['fc.weight'].T)
  np.testing.assert_array_equal(
    params['Conv2d_1a_3x3']['conv']['kernel'],
    tensors[_KERNEL].transpose(2, 3, 1, 0),
  )


@pytest.mark.parametrize('place', ['', 'nothing', '.'])
def test_one_message_says_which_file_to_get_and_where_to_put_it(
  place, cache, tmp_path
):
  with pytest.raises(FileNotFoundError) as caught:
    inception.load(place and tmp_path / place)
  text = str(caught.value)
  for part in (
    'pt_inception-2015-12-05-6726825d.pth, of pytorch-fid',
    'weights-inception-2015-12-05-6726825d.pth, of torch-fidelity',
    "classify_image_graph_def.pb, of OpenAI's evaluator",
    f'Put it into {cache}',
    '--config.evaluate.inception=PATH',
  ):
    assert part in text
  assert '\n' not in text


def test_converts_once(cache, tmp_path, monkeypatch):
  path = tmp_path / 'mine.safetensors'
  tensors = _write(path)
  _assert_ours(inception.load(path), tensors)
  assert len(list(cache.iterdir())) == 1
  monkeypatch.setattr(conversion, 'read', None)
  params = inception.load(path)
  _assert_ours(params, tensors)
  # Another name, the same file.
  path = path.rename(tmp_path / 'renamed.safetensors')
  _assert_ours(inception.load(path), tensors)


def test_another_file_of_that_name_is_converted_anew(cache, tmp_path):
  path = tmp_path / 'mine.safetensors'
  first = _write(path, seed=1)
  _assert_ours(inception.load(path), first)
  second = _write(path, seed=2)
  _assert_ours(inception.load(path), second)
  assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize('name', _PUBLISHED)
def test_published_names_are_found_in_folders(name, cache, tmp_path):
  tensors = _write(tmp_path / 'folder' / name)
  _assert_ours(inception.load(tmp_path / 'folder'), tensors)
  tensors = _write(cache / name, seed=1)
  _assert_ours(inception.load(), tensors)


def test_damaged_cache_is_made_again(cache, tmp_path):
  path = tmp_path / 'mine.safetensors'
  tensors = _write(path)
  inception.load(path)
  (kept,) = cache.iterdir()
  kept.write_bytes(kept.read_bytes()[:-7])
  _assert_ours(inception.load(path), tensors)
  weights.save_safetensors(kept, {'fc': {'kernel': np.zeros((4, 6))}}, {})
  _assert_ours(inception.load(path), tensors)
  assert weights.load_safetensors(kept)[0].keys() == {'Conv2d_1a_3x3', 'fc'}


def test_works_where_nothing_can_be_kept(tmp_path, monkeypatch, caplog):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  tensors = _write(tmp_path / 'mine.safetensors')
  _assert_ours(inception.load(tmp_path / 'mine.safetensors'), tensors)
  assert 'next time it is converted again' in caplog.text


def test_another_network_is_refused_and_not_kept(cache, tmp_path):
  path = tmp_path / 'mine.safetensors'
  safetensors.numpy.save_file({'fc.weight': np.zeros((4, 4), 'f4')}, path)
  with pytest.raises(ValueError, match=r'misshapen \(1\): fc.weight'):
    inception.load(path)
  assert not cache.exists()


def test_digest_is_of_the_numbers_and_not_of_the_file(tmp_path):
  paths = [tmp_path / f'{i}.safetensors' for i in range(3)]
  _write(paths[0])
  _write(paths[1], format='pt')
  _write(paths[2], seed=1)
  assert paths[0].read_bytes() != paths[1].read_bytes()
  digests = [inception.digest(inception.load(path)) for path in paths]
  assert digests[0] == digests[1] != digests[2]
  assert len(digests[0]) == 16


def test_is_a_feature_network(tmp_path):
  path = tmp_path / 'mine.safetensors'
  _write(path)
  net = inception.inception_net(path, (64, 48, 3))
  assert (net.name, net.classes) == ('inception', 1008)
  assert net.image_shape == (64, 48, 3)
  images = jax.ShapeDtypeStruct((5, *net.image_shape), np.uint8)
  variables = jax.eval_shape(
    network.InceptionV3().init, jax.random.key(0), images
  )
  out = jax.eval_shape(net.apply, variables['params'], images)
  assert out.features.shape == (5, 2048)
  assert out.spatial.shape == (5, 17, 17, 7)
  assert out.logits.shape == (5, 1008)


def test_random_weights_say_so(caplog):
  first, other, again = (
    inception.inception_net(f'random:{seed}', (8, 8, 3)) for seed in (0, 1, 0)
  )
  assert 'RANDOM weights' in first.name
  assert 'good for timings only' in caplog.text
  assert first.digest == again.digest != other.digest
  # Signals keep their size.
  kernel = first.params['Conv2d_1a_3x3']['conv']['kernel']
  assert kernel.shape == (3, 3, 3, 2) and kernel.dtype == np.float32
  assert abs(np.square(kernel).mean() * 27 / 2 - 1) < 0.5
  with pytest.raises(ValueError, match='random:x: expected a seed'):
    inception.inception_net('random:x', (8, 8, 3))
