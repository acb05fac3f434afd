"""`--mode evaluate`: how good samples are, and whether they are what was asked.

Sets of images are named by
  ''                      what --mode sample wrote in this work directory
  path                    an .npz with arr_0 and perhaps arr_1, or a folder
  mnist:test              the test set; --config.train.data says where it is
  mnist:train[:10000]     the first 10 000 training images
and references by these, or by statistics: 'pretrained:mnist', the path of a
file written with --config.evaluate.save_statistics, or that of a reference
batch of openai/guided-diffusion; see docs/evaluate.md.
"""

import dataclasses
import importlib.resources
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from d2dpm_jax.evaluation import (
  digits,
  features,
  frechet,
  image_sets,
  manifold,
  references,
  scores,
)
from d2dpm_jax.pipelines import inception, setup
from d2dpm_jax.runtime import files, images, progress
from d2dpm_jax.training import data

_log = logging.getLogger(__name__)

_NETWORKS = ('digits', 'inception')
_PRETRAINED = 'pretrained:'
_DATASET = re.compile(r'mnist:(train|test)(?:\[:(\d+)\])?')
# Name in metrics.json -> name in the table, and how it is written there.
_ROWS = {
  'label_agreement': ('label agreement', '{:.2%}'),
  'fid': ('FID', '{:.3f}'),
  'sfid': ('sFID', '{:.3f}'),
  'inception_score': ('inception score', '{:.3f}'),
  'precision': ('precision', '{:.4f}'),
  'recall': ('recall', '{:.4f}'),
}


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Prints a table of metrics and writes metrics.json."""
  paths = files.Workdir.at(workdir)
  result = evaluate(config, paths)
  print(table(result))
  files.write_json(paths.metrics, result)
  _log.info('Wrote %s', paths.metrics)


def evaluate(
  config: ml_collections.ConfigDict, paths: files.Workdir
) -> dict[str, Any]:
  """Judges one set of images.

  Args:
    config: an experiment; `config.evaluate` says what is compared with what.
    paths: of the run whose samples are meant by ''.

  Returns:
    What metrics.json holds: counts, names, settings, and the metrics. What
    cannot be known is None: label agreement without labels or of another
    network than 'digits', whose classes are not the labels; precision and
    recall of not more images than neighbours.

  Raises:
    FileNotFoundError: there are no weights of the network.
    ValueError: settings or images are not as they should be.
  """
  settings = config.evaluate
  _check(settings)
  samples = _image_set(settings.samples, config, paths)
  net, reference = judges(samples, config, paths)
  labels = samples.labels if settings.network == 'digits' else None
  if settings.through_first_stage:
    samples = _through_first_stage(samples, setup.load(config, paths))
  summary = _summarize(samples, net, settings.batch_size)
  result = {
    'samples': samples.name,
    'num_samples': summary.count,
    'reference': settings.reference,
    'num_reference': reference.count,
    'network': net.name,
    'network_digest': net.digest,
    'settings': {
      name: settings[name] for name in ('shuffle', 'neighbours', 'split_size')
    },
    **measure(
      summary,
      reference,
      labels,
      shuffle_seed=config.seed if settings.shuffle else None,
      neighbours=settings.neighbours,
      split_size=settings.split_size,
    ),
  }
  if settings.save_statistics:
    target = pathlib.Path(settings.save_statistics)
    references.save(target, summary, net)
    _log.info('Wrote %s', target)
  return result


def judges(
  samples: image_sets.ImageSet,
  config: ml_collections.ConfigDict,
  paths: files.Workdir,
) -> tuple[features.FeatureNet, features.Summary]:
  """The network that the config names, and what it makes of the reference.

  Args:
    samples: what is to be judged; only its name and shape matter.
    config: an experiment, as in `evaluate`.
    paths: as in `evaluate`.

  Raises:
    FileNotFoundError: there are no weights of the network.
    ValueError: bad settings, or images of another shape.
  """
  _check(config.evaluate)
  net = _network(config, samples)
  _check_images(samples, net)
  return net, _reference(config, paths, net)


def _check(settings: ml_collections.ConfigDict) -> None:
  for name in ('batch_size', 'neighbours', 'split_size'):
    if settings[name] < 1:
      raise ValueError(f'evaluate.{name} is {settings[name]}; expected >= 1.')
  if settings.network not in _NETWORKS:
    raise ValueError(
      f'evaluate.network is {settings.network!r}; expected one of '
      f'{list(_NETWORKS)}.'
    )


def measure(
  summary: features.Summary,
  reference: features.Summary,
  labels: np.ndarray | None = None,
  *,
  shuffle_seed: int | None = 0,
  neighbours: int = 3,
  split_size: int = 5000,
) -> dict[str, float | None]:
  """All metrics of a summarized set.

  Args:
    summary: of the samples, with logits.
    reference: of real images, by the same network.
    labels: int[N], what was asked for; None if nobody asked.
    shuffle_seed: see `scores.inception_score`.
    neighbours: see `manifold.precision_recall`.
    split_size: see `scores.inception_score`.

  Raises:
    ValueError: labels that the network does not know, or no logits.
  """
  if summary.logits is None:
    raise ValueError('These statistics have no logits: evaluate the images.')
  precision = recall = agreement = None
  if labels is not None:
    agreement = scores.label_agreement(summary.logits, labels)
  if min(summary.count, reference.count) > neighbours:
    precision, recall = manifold.precision_recall(
      reference.vectors, summary.vectors, neighbours
    )
  return {
    'label_agreement': agreement,
    'fid': frechet.frechet_distance(summary.features, reference.features),
    'sfid': frechet.frechet_distance(summary.spatial, reference.spatial),
    'inception_score': scores.inception_score(
      summary.logits, split_size, shuffle_seed
    ),
    'precision': precision,
    'recall': recall,
  }


def table(result: Mapping[str, Any]) -> str:
  """The metrics as text, always with the number of images."""
  rows = [
    ('samples', f'{result["num_samples"]} of {result["samples"]}'),
    ('reference', f'{result["num_reference"]} of {result["reference"]}'),
    ('features', result['network']),
  ]
  for key, (name, form) in _ROWS.items():
    value = result[key]
    rows.append((name, '-' if value is None else form.format(value)))
  return '\n'.join(f'{name:<16} {value}' for name, value in rows)


def _network(
  config: ml_collections.ConfigDict, samples: image_sets.ImageSet
) -> features.FeatureNet:
  """The feature network that the config names, for images like `samples`."""
  if config.evaluate.network == 'digits':
    return _digit_net()
  height, width, channels = samples.shape[1:]
  if channels != 3:
    raise ValueError(
      f'{samples.name} holds images of {channels} channel, but the feature '
      "network 'inception' takes RGB; for digits there is "
      '--config.evaluate.network=digits.'
    )
  return inception.inception_net(
    config.evaluate.inception, (height, width, channels)
  )


def _digit_net() -> features.FeatureNet:
  return digits.digit_net(_embedded('mnist_classifier.safetensors'))


def _embedded(name: str) -> pathlib.Path:
  folder = importlib.resources.files('d2dpm_jax') / 'pretrained'
  return pathlib.Path(str(folder)) / name


def _image_set(
  name: str, config: ml_collections.ConfigDict, paths: files.Workdir
) -> image_sets.ImageSet:
  """The set of images of that name; see the top of this file."""
  if not name:
    if not paths.samples.is_dir():
      raise ValueError(
        f'There are no samples in {paths.root}. Make them with --mode sample, '
        'or give --config.evaluate.samples=<file>.npz.'
      )
    return image_sets.from_path(paths.samples)
  match = _DATASET.fullmatch(name)
  if match is None:
    return image_sets.from_path(pathlib.Path(name))
  if 'train' not in config:
    raise ValueError(
      f'{name} is read from train.data, which this config has not; '
      'configs/mnist.py has it.'
    )
  mnist = data.load_mnist(config.train.data)._asdict()
  part, count = match.groups()
  chosen, labels = mnist[f'{part}_images'], mnist[f'{part}_labels']
  if count is not None and not 0 < int(count) <= len(chosen):
    raise ValueError(f'{name}: there are {len(chosen)} images.')
  rows = slice(None if count is None else int(count))
  return image_sets.from_arrays(name, chosen[rows], labels[rows])


def _check_images(
  samples: image_sets.ImageSet, net: features.FeatureNet
) -> None:
  if samples.shape[1:] != net.image_shape:
    raise ValueError(
      f'{samples.name} holds images of shape {list(samples.shape[1:])}, but '
      f'the feature network {net.name!r} takes {list(net.image_shape)}.'
    )


def _summarize(
  samples: image_sets.ImageSet, net: features.FeatureNet, batch_size: int
) -> features.Summary:
  with progress.progress('features', samples.shape[0], 'image') as bar:
    return features.summarize(
      net, samples.batches(batch_size), batch_size, bar.update
    )


def _reference(
  config: ml_collections.ConfigDict,
  paths: files.Workdir,
  net: features.FeatureNet,
) -> features.Summary:
  """Stored statistics, or those of the images that the config names."""
  name = config.evaluate.reference
  if not name:
    raise ValueError(
      'evaluate.reference is not set; for digits it is pretrained:mnist, for '
      'others see docs/evaluate.md.'
    )
  if name.startswith(_PRETRAINED):
    if config.evaluate.network != 'digits':
      raise ValueError(
        f"evaluate.reference {name!r} is of the network 'digits', but "
        f'evaluate.network is {config.evaluate.network!r}.'
      )
    path = _embedded(f'{name.removeprefix(_PRETRAINED)}_reference.npz')
    if not path.is_file():
      known = sorted(
        _PRETRAINED + p.name.removesuffix('_reference.npz')
        for p in path.parent.glob('*_reference.npz')
      )
      raise ValueError(f'There is no reference {name!r}; there are {known}.')
    return references.load(path, net)
  if references.holds(pathlib.Path(name)):
    return references.load(pathlib.Path(name), net)
  if references.is_batch(pathlib.Path(name)):
    return _reference_batch(pathlib.Path(name), config, net)
  images_ = _image_set(name, config, paths)
  _check_images(images_, net)
  return _summarize(images_, net, config.evaluate.batch_size)


def _reference_batch(
  path: pathlib.Path,
  config: ml_collections.ConfigDict,
  net: features.FeatureNet,
) -> features.Summary:
  """The statistics of a reference batch, and the features of its images."""
  one = jax.ShapeDtypeStruct((1, *net.image_shape), np.uint8)
  out = jax.eval_shape(net.apply, net.params, one)
  # Before the images, which take long.
  whole, spatial = references.load_batch_statistics(
    path, out.features.size, out.spatial.size
  )
  images_ = image_sets.from_path(path)
  _check_images(images_, net)
  summary = _summarize(images_, net, config.evaluate.batch_size)
  return dataclasses.replace(summary, features=whole, spatial=spatial)


def _through_first_stage(
  samples: image_sets.ImageSet, model: setup.Model
) -> image_sets.ImageSet:
  """The same images, encoded and decoded again."""
  ldm = model.ldm
  if samples.shape[1] != ldm.image_size:
    raise ValueError(
      f'{samples.name} holds images of {samples.shape[1]} pixels, the first '
      f'stage takes {ldm.image_size}.'
    )

  @jax.jit
  def reconstruct(params, batch):
    latents = ldm.encode(params, data.to_float(batch))
    return images.to_uint8(ldm.decode(params, latents))

  params = jax.device_put(model.params)

  def batches(size):
    for batch in samples.batches(size):
      yield np.asarray(reconstruct(params, batch))

  return dataclasses.replace(
    samples, name=f'{samples.name}, reconstructed', batches=batches
  )
