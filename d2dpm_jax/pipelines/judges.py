"""Who judges images: a feature network, and the reference that it has seen.

References are named as sets of images are (`image_names`), or are statistics:
'pretrained:mnist', the path of a file written with
--config.evaluate.save_statistics, or that of a reference batch of
openai/guided-diffusion; see docs/evaluate.md.
"""

import dataclasses
import importlib.resources
import pathlib

import jax
import ml_collections
import numpy as np

from d2dpm_jax.evaluation import digits, features, image_sets, references
from d2dpm_jax.pipelines import image_names, inception
from d2dpm_jax.runtime import files, progress

_NETWORKS = ('digits', 'inception')
_PRETRAINED = 'pretrained:'


def network(
  config: ml_collections.ConfigDict, samples: image_sets.ImageSet
) -> features.FeatureNet:
  """The feature network that the config names.

  Args:
    config: an experiment.
    samples: what is to be judged; only its name and shape matter.

  Raises:
    FileNotFoundError: there are no weights of the network.
    ValueError: there is no such network, or it takes other images.
  """
  name = config.evaluate.network
  if name not in _NETWORKS:
    raise ValueError(
      f'evaluate.network is {name!r}; expected one of {list(_NETWORKS)}.'
    )
  height, width, channels = samples.shape[1:]
  if name == 'digits':
    net = digit_net()
    if samples.shape[1:] != net.image_shape:
      raise ValueError(
        f'{samples.name} holds images of shape {list(samples.shape[1:])}, but '
        f"the feature network 'digits' takes {list(net.image_shape)}; for "
        'photographs there is --config.evaluate.network=inception.'
      )
    return net
  if channels != 3:
    raise ValueError(
      f'{samples.name} holds images of {channels} channel, but the feature '
      "network 'inception' takes RGB; for digits there is "
      '--config.evaluate.network=digits.'
    )
  return inception.inception_net(
    config.evaluate.inception, (height, width, channels)
  )


def digit_net() -> features.FeatureNet:
  """The classifier of digits that comes with the package."""
  return digits.digit_net(embedded('mnist_classifier.safetensors'))


def embedded(name: str) -> pathlib.Path:
  """A file that comes with the package, or would have that name."""
  folder = importlib.resources.files('d2dpm_jax') / 'pretrained'
  return pathlib.Path(str(folder)) / name


def check(images: image_sets.ImageSet, net: features.FeatureNet) -> None:
  """Raises ValueError if there are too few images, or of another size."""
  if images.shape[0] < 2:
    raise ValueError(f'{images.name} holds 1 image; at least 2 are needed.')
  if images.shape[1:] != net.image_shape:
    raise ValueError(
      f'{images.name} holds images of shape {list(images.shape[1:])}, but it '
      f'is compared with images of {list(net.image_shape)}: all sets must '
      'have one size.'
    )


def summarize(
  images: image_sets.ImageSet,
  net: features.FeatureNet,
  batch_size: int,
  keep_exact: bool = False,
) -> features.Summary:
  """`features.summarize`, with its progress."""
  with progress.progress('features', images.shape[0], 'image') as bar:
    return features.summarize(
      net, images.batches(batch_size), batch_size, bar.update, keep_exact
    )


def reference(
  config: ml_collections.ConfigDict,
  paths: files.Workdir,
  net: features.FeatureNet,
) -> features.Summary:
  """Stored statistics, or those of the images that the config names.

  Args:
    config: an experiment.
    paths: of the run whose samples are meant by a path of its own.
    net: by which network.

  Raises:
    ValueError: there is no such reference, or it does not suit the network.
  """
  name = config.evaluate.reference
  if not name:
    raise ValueError(
      'evaluate.reference is not set; for digits it is pretrained:mnist, for '
      'others see docs/evaluate.md.'
    )
  if name.startswith(_PRETRAINED):
    return _pretrained(name, net)
  path = pathlib.Path(name)
  if references.holds(path):
    return references.load(path, net)
  if references.is_batch(path):
    return _batch(path, config, net)
  images = image_names.find(name, config, paths)
  check(images, net)
  return summarize(images, net, config.evaluate.batch_size)


def _pretrained(name: str, net: features.FeatureNet) -> features.Summary:
  """Statistics that come with the package."""
  if net.name != 'digits':
    raise ValueError(
      f"evaluate.reference {name!r} is of the network 'digits', but "
      f'evaluate.network is {net.name!r}.'
    )
  path = embedded(f'{name.removeprefix(_PRETRAINED)}_reference.npz')
  if not path.is_file():
    known = sorted(
      _PRETRAINED + p.name.removesuffix('_reference.npz')
      for p in path.parent.glob('*_reference.npz')
    )
    raise ValueError(f'There is no reference {name!r}; there are {known}.')
  return references.load(path, net)


def _batch(
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
  images = image_sets.from_path(path)
  check(images, net)
  summary = summarize(images, net, config.evaluate.batch_size)
  return dataclasses.replace(
    summary, features=whole, spatial=spatial, counted=False
  )
