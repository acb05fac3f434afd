"""`--mode train` from data to weights that the other modes take."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from helpers import assert_trees_equal

from d2dpm_jax.evaluation.digits import DigitClassifier
from d2dpm_jax.pipelines import setup, train
from d2dpm_jax.runtime import files, weights
from d2dpm_jax.training import data, loop


@pytest.fixture
def digits():
  """Random pixels, 8x8, so that training them takes no time."""
  rng = np.random.default_rng(0)

  def split(count):
    images = rng.integers(0, 256, (count, 8, 8, 1), np.uint8)
    return images, (np.arange(count) % 4).astype(np.int32)

  return data.Digits(*split(24), *split(10))


@pytest.fixture
def config():
  config = tiny_config.get_config()
  for name in ('classifier', 'first_stage', 'diffusion'):
    config.train[name].update(steps=2, batch_size=8)
  return config


def _pretended_fit(begun, killed_at=None):
  """In place of `loop.fit`: nudges every parameter instead of training it.

  The gradient of the loss is traced, so it exists and has the right shapes;
  that training works is what tests/training is for.
  """

  def fit(name, loss_fn, params, arrays, key, settings, directory, *hooks):
    begun[name] = (jax.device_get(arrays), settings, directory)
    if name == killed_at:
      raise KeyboardInterrupt
    loss = jax.grad(loss_fn, has_aux=True)
    grads, _ = jax.eval_shape(loss, params, key, arrays)
    for a, b in zip(
      jax.tree.leaves(grads), jax.tree.leaves(params), strict=True
    ):
      assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return types.SimpleNamespace(ema=jax.tree.map(lambda p: 1.5 * p, params))

  return fit


def test_three_trainings_make_a_model(
  tiny, config, digits, tmp_path, monkeypatch
):
  paths = files.Workdir.at(tmp_path / 'work')
  monkeypatch.setattr(data, 'load_mnist', lambda _: digits)
  # Needs 32x32, and has a test of its own.
  monkeypatch.setattr(train, 'train_classifier', lambda *_: None)
  monkeypatch.setattr(train, '_MAP_BATCH', 8)
  initial = tiny.model.params
  monkeypatch.setattr(train, '_on_host', lambda *_: dict(initial))
  begun = {}
  monkeypatch.setattr(loop, 'fit', _pretended_fit(begun, 'diffusion'))
  with pytest.raises(KeyboardInterrupt):
    train.run(config, str(paths.root))
  assert list(begun) == ['first stage', 'diffusion']
  assert not list(paths.root.glob('*.safetensors'))
  monkeypatch.setattr(loop, 'fit', _pretended_fit(begun))
  train.run(config, str(paths.root))
  directories = {directory for _, _, directory in begun.values()}
  assert len(directories) == 2
  assert all(d.is_relative_to(paths.training) for d in directories)

  config.checkpoint.path = str(paths.root / 'mnist_ldm.safetensors')
  model = setup.load(config)
  for part in ('unet', 'first_stage', 'cond_stage'):
    want = jax.tree.map(lambda p: 1.5 * p, initial[part])
    for a, b in zip(
      jax.tree.leaves(model.params[part]), jax.tree.leaves(want), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)  # As float16.
  # The U-Net was trained on the scaled latents of the trained first stage.
  (latents, labels), settings, _ = begun['diffusion']
  assert abs(np.std(latents) - 1) < 1e-5 and latents.shape == (24, 4, 4, 3)
  np.testing.assert_array_equal(labels, digits.train_labels)
  assert settings.ema_decay == config.train.diffusion.ema_decay
  images = data.to_float(digits.train_images)
  found = model.ldm.encode(model.params, images)
  np.testing.assert_allclose(found, latents, atol=0.02)


def test_classifier_is_written_with_its_accuracy(config, tmp_path, monkeypatch):
  """Of a classifier that says 3, whatever it sees."""
  images = np.zeros((25, 32, 32, 1), np.uint8)
  labels = np.repeat(np.arange(5, dtype=np.int32), 5)
  shapes = jax.eval_shape(
    DigitClassifier().init, jax.random.key(0), jnp.zeros((1, 32, 32, 1))
  )
  params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), shapes)['params']
  params['logits']['bias'][3] = 1
  monkeypatch.setattr(train, '_on_host', lambda *_: params)
  monkeypatch.setattr(train, '_MAP_BATCH', 10)
  trained = types.SimpleNamespace(ema=params)
  monkeypatch.setattr(loop, 'fit', lambda *_: trained)
  train.train_classifier(
    config.train.classifier,
    data.Digits(images, labels, images, labels),
    jax.random.key(0),
    files.Workdir.at(tmp_path),
  )
  stored, meta = weights.load_safetensors(
    tmp_path / 'mnist_classifier.safetensors'
  )
  assert_trees_equal(stored, params)
  assert meta['test_accuracy'] == 0.2


def test_a_config_without_training(tiny, tmp_path):
  config = tiny.config()
  with config.unlocked():
    del config.train
  with pytest.raises(ValueError, match='has no `train` section'):
    train.run(config, str(tmp_path / 'work'))
  assert not (tmp_path / 'work').exists()


def test_no_data_leaves_nothing(config, tmp_path):
  config.train.data = str(tmp_path / 'none.npz')
  with pytest.raises(FileNotFoundError, match='none.npz'):
    train.run(config, str(tmp_path / 'work'))
  assert not (tmp_path / 'work').exists()


def test_batched_applies_to_every_row_once():
  inputs = np.arange(21.0).reshape(7, 3)
  train_batch, train._MAP_BATCH = train._MAP_BATCH, 3
  try:
    found = train.batched(lambda p, x: p * x, 2.0, inputs)
  finally:
    train._MAP_BATCH = train_batch
  assert_trees_equal(found, (2 * inputs).astype(found.dtype))
