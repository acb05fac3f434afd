"""`--mode train`: the three embedded MNIST models, from data to weights."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2dpm_jax.evaluation.digits import DigitClassifier
from d2dpm_jax.models.latent_diffusion import LatentDiffusion
from d2dpm_jax.pipelines import setup, trajectories
from d2dpm_jax.runtime import devices, files, weights
from d2dpm_jax.training import data, loop, objectives

_log = logging.getLogger(__name__)

_MAP_BATCH = 500


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains classifier, first stage and U-Net; writes two .safetensors files.

  A run that was killed goes on where it was.

  Raises:
    ValueError: bad settings, or training began here with others.
  """
  if 'train' not in config:
    raise ValueError(
      'This config has no `train` section; configs/mnist.py has one.'
    )
  paths = files.Workdir.at(workdir)
  config = setup.resolve(config)
  ldm = setup.build(config)
  check(config.train)
  digits = data.load_mnist(config.train.data)
  setup.begin(config, paths)
  settings = {k: setup.plain(config[k]) for k in ('model', 'train', 'seed')}
  trajectories.claim(paths.training, settings)
  keys = jax.random.split(jax.random.key(config.seed), 3)
  train_classifier(config.train.classifier, digits, keys[0], paths)
  params = _on_host(ldm.init, config.seed)
  params['first_stage'] = train_first_stage(
    config.train.first_stage, ldm, params['first_stage'], digits, keys[1], paths
  )
  params = train_diffusion(
    config.train.diffusion, ldm, params, digits, keys[2], paths
  )
  weights.save_safetensors(
    paths.root / 'mnist_ldm.safetensors',
    params,
    {'model': setup.plain(config.model)},
    np.float16,
  )
  _log.info('Wrote %s', paths.root / 'mnist_ldm.safetensors')


def check(train: ml_collections.ConfigDict) -> None:
  """Raises ValueError if a number of `config.train` makes no sense."""
  for part in ('classifier', 'first_stage', 'diffusion'):
    for name in ('steps', 'batch_size'):
      if train[part][name] < 1:
        raise ValueError(
          f'train.{part}.{name} is {train[part][name]}; expected >= 1.'
        )


def _settings(section: ml_collections.ConfigDict) -> loop.LoopSettings:
  extra = {'ema_decay': section.ema_decay} if 'ema_decay' in section else {}
  return loop.LoopSettings(section.steps, section.learning_rate, **extra)


def _on_host(init: Callable[[jax.Array], Any], seed: int) -> Any:
  """Random parameters as NumPy arrays.

  A program that only draws numbers compiles much faster for the CPU.
  """
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    return jax.device_get(jax.jit(init)(jax.random.key(seed)))


def train_classifier(
  section: ml_collections.ConfigDict,
  digits: data.Digits,
  key: jax.Array,
  paths: files.Workdir,
) -> Any:
  """Trains the judge of digits and logs its accuracy on the test set."""
  model = DigitClassifier()
  params = _on_host(
    lambda k: model.init(k, jnp.zeros((1, 32, 32, 1)))['params'], 0
  )
  state = loop.fit(
    'digit classifier',
    objectives.classifier_loss(model, section.batch_size),
    params,
    (digits.train_images, digits.train_labels),
    key,
    _settings(section),
    paths.training / 'classifier',
  )
  apply: Any = model.apply
  logits = batched(
    lambda p, x: apply({'params': p}, x)['logits'],
    state.ema,
    data.to_float(digits.test_images),
  )
  accuracy = float(np.mean(logits.argmax(-1) == digits.test_labels))
  _log.info('Classifier: test accuracy %.4f', accuracy)
  weights.save_safetensors(
    paths.root / 'mnist_classifier.safetensors',
    jax.device_get(state.ema),
    {'test_accuracy': accuracy},
    np.float16,
  )
  return state.ema


def train_first_stage(
  section: ml_collections.ConfigDict,
  ldm: LatentDiffusion,
  params: Any,
  digits: data.Digits,
  key: jax.Array,
  paths: files.Workdir,
) -> Any:
  """Trains the VQ autoencoder; codes that no latent uses are moved."""
  model = ldm.first_stage
  apply: Any = model.apply
  encode = jax.jit(
    lambda p, x: apply({'params': p}, x, method='encode').reshape(
      -1, model.embed_dim
    )
  )
  nearest = jax.jit(
    lambda p, z: apply({'params': p}, z, method='quantize').indices
  )

  def revive(state: loop.TrainState) -> loop.TrainState:
    """Moves unused codes onto random latents during the first half."""
    step = int(state.step)
    if step > section.steps // 2 or step % 500 not in (0, 100):
      return state
    rng = np.random.default_rng(step)  # The same codes in a resumed run.
    count = len(digits.train_images)
    rows = np.sort(rng.choice(count, min(1024, count), replace=False))
    z = encode(state.params, data.to_float(digits.train_images[rows]))
    used = np.unique(nearest(state.params, z[:, None, None, :]))
    codebook = np.array(state.params['quantize']['embedding']['embedding'])
    dead = np.setdiff1d(np.arange(len(codebook)), used)
    z = np.asarray(z)
    codebook[dead] = z[rng.choice(len(z), len(dead))]
    _log.info('first stage, step %d: %d codes unused', step, len(dead))

    def moved(tree):
      value = devices.replicate(codebook)
      return {**tree, 'quantize': {'embedding': {'embedding': value}}}

    return dataclasses.replace(
      state, params=moved(state.params), ema=moved(state.ema)
    )

  state = loop.fit(
    'first stage',
    objectives.first_stage_loss(model, section.batch_size),
    params,
    (digits.train_images,),
    key,
    _settings(section),
    paths.training / 'first_stage',
    revive,
  )
  return state.ema


def train_diffusion(
  section: ml_collections.ConfigDict,
  ldm: LatentDiffusion,
  params: Any,
  digits: data.Digits,
  key: jax.Array,
  paths: files.Workdir,
) -> Any:
  """Trains U-Net and class embedding on the scaled latents of the images."""
  latents = batched(
    lambda p, x: ldm.first_stage.apply({'params': p}, x, method='encode'),
    params['first_stage'],
    data.to_float(digits.train_images),
  )
  scale_factor = np.float32(1.0 / latents.std())
  _log.info('Latents: std %.4f, scale_factor %.4f', latents.std(), scale_factor)
  state = loop.fit(
    'diffusion',
    objectives.diffusion_loss(ldm, section.batch_size, section.label_dropout),
    {k: params[k] for k in ('unet', 'cond_stage')},
    (latents * scale_factor, digits.train_labels),
    key,
    _settings(section),
    paths.training / 'diffusion',
  )
  return jax.device_get({**params, **state.ema, 'scale_factor': scale_factor})


def batched(fn: Any, params: Any, inputs: np.ndarray) -> np.ndarray:
  """Applies `fn(params, batch)` over axis 0 in equal compiled batches."""
  fn = jax.jit(fn)
  outputs = []
  for start in range(0, len(inputs), _MAP_BATCH):
    batch = inputs[start : start + _MAP_BATCH]
    padded = np.pad(
      batch,
      [(0, _MAP_BATCH - len(batch))] + [(0, 0)] * (inputs.ndim - 1),
    )
    outputs.append(np.asarray(fn(params, padded))[: len(batch)])
  return np.concatenate(outputs)
