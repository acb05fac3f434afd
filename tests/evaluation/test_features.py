import zipfile

import jax
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from d2dpm_jax.evaluation import digits, features, references
from d2dpm_jax.runtime import weights


def _toy_net(scale=1.0, digest='a'):
  def apply(params, images):
    x = images.astype('float32') * params
    means = x.mean((1, 2))
    return features.Activations(means, x[:, :2, :2, :1], means[:, :2])

  return features.FeatureNet('toy', digest, (4, 4, 3), 2, scale, apply)


def _images(count):
  return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)


@pytest.mark.parametrize('batch_size', [1, 5, 8, 30])
def test_summary_does_not_depend_on_batches(batch_size):
  """8 devices: padding to a multiple of them must leave no trace."""
  assert len(jax.devices()) == 8
  images, done = _images(21), []
  batches = (images[i : i + batch_size] for i in range(0, 21, batch_size))
  got = features.summarize(_toy_net(), batches, batch_size, done.append)
  means = images.mean((1, 2))
  corners = images[:, :2, :2, 0].reshape(21, 4).astype(float)
  assert got.count == sum(done) == 21
  np.testing.assert_allclose(got.features.mean, means.mean(0), rtol=1e-6)
  np.testing.assert_allclose(
    got.features.covariance, np.cov(means.T), rtol=1e-4
  )
  np.testing.assert_allclose(
    got.spatial.covariance, np.cov(corners.T), rtol=1e-6
  )
  np.testing.assert_allclose(got.vectors, means, rtol=1e-3)  # float16
  np.testing.assert_allclose(got.logits, means[:, :2], rtol=1e-6)


def test_bad_images_are_refused():
  net = _toy_net()
  with pytest.raises(ValueError, match='at least 2'):
    features.summarize(net, [_images(1)], 4)
  with pytest.raises(ValueError, match='0 images'):
    features.summarize(net, [], 4)
  with pytest.raises(ValueError, match=r'takes uint8\[N, 4, 4, 3\]'):
    features.summarize(net, [_images(3)[:, :3]], 4)
  with pytest.raises(ValueError, match='float32'):
    features.summarize(net, [_images(3).astype(np.float32)], 4)
  with pytest.raises(ValueError, match='returned NaN'):
    features.summarize(_toy_net(np.nan), [_images(3)], 4)


def _classify_by_hand(params, images):
  """The classifier in NumPy, from its description, float64."""

  def conv(name, x):
    kernel = params[name]['kernel'].astype(float)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = sliding_window_view(padded, (3, 3), (1, 2))
    y = np.einsum('bhwcij,ijco->bhwo', windows, kernel, optimize=True)
    return np.maximum(y + params[name]['bias'], 0)

  def pool(x):
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))

  x = pool(conv('conv_1', conv('conv_0', images / 127.5 - 1)))
  spatial = conv('conv_3', pool(conv('conv_2', x)))
  x = pool(spatial).reshape(len(images), -1)
  dense = {k: params[k] for k in ('features', 'logits')}
  vectors = x @ dense['features']['kernel'] + dense['features']['bias']
  vectors = np.maximum(vectors, 0)
  logits = vectors @ dense['logits']['kernel'] + dense['logits']['bias']
  return vectors, spatial[..., :7], logits


def test_digit_net_computes_what_it_says(tmp_path):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    digits.DigitClassifier().init,
    jax.random.key(0),
    np.zeros((1, 32, 32, 1), np.float32),
  )['params']
  params = jax.tree.map(
    lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), shapes
  )
  weights.save_safetensors(tmp_path / 'w.safetensors', params, {})
  net = digits.digit_net(tmp_path / 'w.safetensors')
  images = rng.integers(0, 256, (3, *net.image_shape), np.uint8)
  (got,) = features.activations(net, [images], 3)
  for a, b in zip(got, _classify_by_hand(params, images), strict=True):
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  assert got.logits.shape == (3, net.classes)


def test_digit_net_names_missing_weights(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    digits.digit_net(tmp_path / 'nowhere.safetensors')


def test_reference_comes_back_as_saved(tmp_path):
  net, path = _toy_net(), tmp_path / 'reference.npz'
  summary = features.summarize(net, [_images(20)], 20)
  references.save(path, summary, net)
  assert references.holds(path)
  got = references.load(path, net)
  assert got.count == 20
  for name in ('features', 'spatial'):
    for a, b in zip(getattr(got, name), getattr(summary, name), strict=True):
      assert a.dtype == np.float64
      np.testing.assert_allclose(a, b, rtol=1e-12)
  np.testing.assert_array_equal(got.vectors, summary.vectors)


def test_reference_of_another_network_is_refused(tmp_path):
  path = tmp_path / 'reference.npz'
  references.save(
    path, features.summarize(_toy_net(), [_images(5)], 5), _toy_net()
  )
  with pytest.raises(ValueError, match="network_digest: saved 'a', now 'b'"):
    references.load(path, _toy_net(digest='b'))


_HEADER = "{{'descr': '<f8', 'fortran_order': False, 'shape': ({}), }}"


@pytest.mark.parametrize(
  'header',
  [
    '((((',  # tokenize.TokenError.
    _HEADER.format('1,').replace('<f8', ','),  # SyntaxError.
    '{[]: 1}',  # TypeError.
    _HEADER.format(f'{10**23},'),  # OverflowError.
    _HEADER.format(f'{10**16},'),  # MemoryError.
    _HEADER.format('-1,'),  # ValueError.
  ],
)
def test_reference_with_a_damaged_header_is_named(tmp_path, header):
  """Under right checksums, so that NumPy gets to read it."""
  net, whole = _toy_net(), tmp_path / 'whole.npz'
  references.save(whole, features.summarize(net, [_images(5)], 5), net)
  text = header.encode()
  damaged = b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text
  path = tmp_path / 'damaged.npz'
  with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, 'w') as target:
    for name in source.namelist():
      data = damaged if name == 'mu.npy' else source.read(name)
      target.writestr(name, data)
  with pytest.raises(ValueError, match='damaged.npz is damaged'):
    references.load(path, net)
  batch = tmp_path / 'batch.npz'
  arrays = {'sigma': np.eye(2), 'mu_s': np.ones(3), 'sigma_s': np.eye(3)}
  np.savez(batch, arr_0=_images(3), **arrays)
  with zipfile.ZipFile(batch, 'a') as target:
    target.writestr('mu.npy', damaged)
  with pytest.raises(ValueError, match='batch.npz is damaged'):
    references.load_batch_statistics(batch, 2, 3)


def test_what_is_no_reference_is_refused(tmp_path):
  images = tmp_path / 'images.npz'
  np.savez(images, arr_0=_images(3))
  text = tmp_path / 'text.npz'
  text.write_text('no archive')
  cut = tmp_path / 'cut.npz'
  cut.write_bytes(images.read_bytes()[:-30])
  for path in (images, text, cut, tmp_path / 'missing.npz'):
    assert not references.holds(path)
    with pytest.raises(ValueError, match=path.name):
      references.load(path, _toy_net())
