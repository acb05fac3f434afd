"""What is minimised, against its definition; networks are one line each."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2dpm_jax.diffusion import schedule
from d2dpm_jax.training import objectives

_BATCH = 64  # Everywhere the same shapes: fewer programs to compile.
_CLASSES = 4


def _ldm(eps, **changes):
  """A stand-in for a LatentDiffusion with five classes, the last one null."""
  return types.SimpleNamespace(
    num_timesteps=1000,
    beta_start=0.0015,
    beta_end=0.0195,
    null_label=_CLASSES,
    context=lambda params, labels: params['embedding'][labels][:, None],
    eps=eps,
    **changes,
  )


def _data():
  latents = np.full((_BATCH, 4, 4, 3), 0.7, np.float32)
  return latents, (np.arange(_BATCH) % _CLASSES).astype(np.int32)


def _params():
  return {'embedding': np.arange(_CLASSES + 1, dtype=np.float32)[:, None]}


def test_the_true_noise_has_no_loss():
  """For constant latents c, noise = (x - sqrt(a) c) / sqrt(1 - a)."""
  alphas = schedule.linear_schedule(1000, 0.0015, 0.0195).astype(np.float32)

  def eps(params, x, t, context):
    a = jnp.asarray(alphas)[t][:, None, None, None]
    return (x - jnp.sqrt(a) * 0.7) / jnp.sqrt(1 - a)

  loss = objectives.diffusion_loss(_ldm(eps), _BATCH, 0.1)
  value, _ = jax.jit(loss)(_params(), jax.random.key(0), _data())
  assert value < 1e-6
  # A network that says nothing is off by the noise itself, of variance 1.
  loss = objectives.diffusion_loss(
    _ldm(lambda params, x, t, context: 0 * x), _BATCH, 0.1
  )
  value, _ = jax.jit(loss)(_params(), jax.random.key(0), _data())
  assert abs(value - 1) < 4 * np.sqrt(2 / (_BATCH * 48))


def _seen(dropout, key=0):
  """Timesteps and labels that the network gets."""
  found = {}

  def eps(params, x, t, context):
    found.update(t=np.asarray(t), labels=np.asarray(context[:, 0, 0]))
    return x

  loss = objectives.diffusion_loss(_ldm(eps), _BATCH, dropout)
  loss(_params(), jax.random.key(key), _data())
  return found


def test_label_dropout_is_the_share_of_null_labels():
  assert (_seen(0.0)['labels'] < _CLASSES).all()
  assert (_seen(1.0)['labels'] == _CLASSES).all()
  share = np.mean([_seen(0.25, k)['labels'] == _CLASSES for k in range(8)])
  assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / (8 * _BATCH))


def test_labels_stay_with_their_latents():
  """Each latent is its label, so the network can see a swap."""
  latents, labels = _data()
  latents = 0 * latents + np.float32(100) * labels[:, None, None, None]

  def eps(params, x, t, context):
    a = jnp.asarray(schedule.linear_schedule(1000, 0.0015, 0.0195))[t]
    clean = x[:, 0, 0, 0] / jnp.sqrt(a)  # Plus noise far below 100.
    keep = np.asarray(a > 0.5)
    got = np.round(np.asarray(clean)[keep] / 100)
    np.testing.assert_array_equal(got, np.asarray(context[:, 0, 0])[keep])
    assert keep.sum() > 10
    return x

  loss = objectives.diffusion_loss(_ldm(eps), _BATCH, 0.0)
  loss(_params(), jax.random.key(0), (latents, labels))


def test_timesteps_are_stratified_over_all_of_them():
  t = _seen(0.1)['t']
  assert t.min() >= 0 and t.max() <= 999
  # One in each of equal parts of [0, 1000), and not always the same.
  ends = np.arange(_BATCH + 1) * 1000 / _BATCH
  assert (t >= np.floor(ends[:-1])).all() and (t <= ends[1:]).all()
  assert (t != _seen(0.1, key=1)['t']).any()


def test_classifier_loss_is_cross_entropy():
  class Fixed:
    def apply(self, variables, images):
      assert images.min() >= -1 and images.max() <= 1
      logits = jnp.tile(variables['params']['logits'], (len(images), 1))
      return {'logits': logits}

  logits = np.array([1.0, 0.0, 3.0], np.float32)
  data = np.zeros((_BATCH, 32, 32, 1), np.uint8), np.full(_BATCH, 2)
  loss = objectives.classifier_loss(Fixed(), _BATCH)
  value, metrics = loss({'logits': logits}, jax.random.key(0), data)
  want = -3 + np.log(np.exp(logits).sum())
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert metrics['accuracy'] == 1
  _, metrics = loss({'logits': -logits}, jax.random.key(0), data)
  assert metrics['accuracy'] == 0


def test_images_are_shifted_by_at_most_two_pixels():
  image = np.zeros((_BATCH, 32, 32, 1), np.uint8)
  image[:, 16, 16] = 255
  seen = []

  class Spy:
    def apply(self, variables, images):
      seen.append(np.asarray(images))
      return {'logits': jnp.zeros((len(images), 10))}

  loss = objectives.classifier_loss(Spy(), _BATCH)
  for key in range(4):
    loss({}, jax.random.key(key), (image, np.full(_BATCH, 2)))
  images = np.concatenate(seen)
  assert ((images == 1).sum(axis=(1, 2, 3)) == 1).all()  # Still one pixel.
  _, y, x, _ = np.nonzero(images == 1)
  assert set(y - 16) == set(x - 16) == {-2, -1, 0, 1, 2}
  assert len(set(zip(y, x, strict=True))) == 25


def test_first_stage_loss_is_its_three_terms():
  class Fixed:
    def apply(self, variables, value, method):
      if method == 'encode':
        return value[:, ::2, ::2]
      if method == 'decode':
        return jnp.repeat(jnp.repeat(value, 2, 1), 2, 2) + 0.5
      return types.SimpleNamespace(loss=jnp.float32(0.125))

  # Pixels in equal squares of 2x2, so that only the 0.5 is wrong.
  image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1) * 60
  image = np.tile(image.repeat(2, 1).repeat(2, 2), (8, 1, 1, 1))
  loss = objectives.first_stage_loss(Fixed(), 8)
  value, metrics = loss({}, jax.random.key(0), (image,))
  np.testing.assert_allclose(value, 0.5 + 0.25 + 0.125, rtol=1e-6)
  np.testing.assert_allclose(metrics['l1'], 0.5, rtol=1e-6)


@pytest.mark.parametrize('dropout', [0.0, 1.0])
def test_gradients_reach_the_embeddings_that_are_used(dropout):
  def eps(params, x, t, context):
    return x * context[:, :, None]

  loss = objectives.diffusion_loss(_ldm(eps), _BATCH, dropout)
  grad = jax.jit(jax.grad(loss, has_aux=True))
  grads, _ = grad(_params(), jax.random.key(0), _data())
  used = np.abs(np.asarray(grads['embedding'][:, 0])) > 0
  want = [False] * 4 + [True] if dropout else [True] * 4 + [False]
  np.testing.assert_array_equal(used, want)
