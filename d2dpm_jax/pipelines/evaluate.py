"""`--mode evaluate`: how good samples are, and whether they are what was asked.

Sets of images are named as in `image_names`, references by these, or by
statistics: 'pretrained:mnist', the path of a file written with
--config.evaluate.save_statistics, or that of a reference batch of
openai/guided-diffusion; see docs/evaluate.md.
"""

import dataclasses
import importlib.resources
import itertools
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from d2dpm_jax.evaluation import (
  bootstrap,
  digits,
  features,
  fidelity,
  frechet,
  image_sets,
  manifold,
  references,
  scores,
  selfcheck,
)
from d2dpm_jax.pipelines import image_names, inception, setup
from d2dpm_jax.runtime import files, images, progress
from d2dpm_jax.training import data

_log = logging.getLogger(__name__)

_NETWORKS = ('digits', 'inception')
_PRETRAINED = 'pretrained:'
_PUBLISHED = 50_000  # Images that published numbers are of.
# Name in metrics.json -> name in the table, and how it is written there.
_ROWS = {
  'label_agreement': ('label agreement', '{:.2%}'),
  'fid': ('FID', '{:.3f}'),
  'sfid': ('sFID', '{:.3f}'),
  'inception_score': ('inception score', '{:.3f}'),
  'precision': ('precision', '{:.4f}'),
  'recall': ('recall', '{:.4f}'),
}
_FIDELITY_ROWS = {
  'psnr': ('PSNR', '{:.2f} dB'),
  'psnr_mean': ('PSNR, mean', '{:.2f} dB'),
  'psnr_median': ('PSNR, median', '{:.2f} dB'),
  'identical': ('identical', '{:.2%}'),
  'feature_distance': ('feature distance', '{:.5f}'),
  'feature_distance_median': ('median of it', '{:.5f}'),
}


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Prints a table of metrics and writes metrics.json; or checks itself."""
  if config.evaluate.selfcheck:
    check_installation()
    return
  paths = files.Workdir.at(workdir)
  result = evaluate(config, paths)
  print(table(result))
  files.write_json(paths.metrics, result)
  _log.info('Wrote %s', paths.metrics)


def evaluate(
  config: ml_collections.ConfigDict, paths: files.Workdir
) -> dict[str, Any]:
  """Judges one set of images, or several.

  Args:
    config: an experiment; `config.evaluate` says what is compared with what.
    paths: of the run whose samples are meant by ''.

  Returns:
    What metrics.json holds: counts, names, settings, and the metrics. What
    cannot be known, or was not asked for, is None: label agreement without
    labels or of another network than 'digits', whose classes are not the
    labels; precision and recall of not more images than neighbours. Of several
    sets, {'sets': {name: that of one set}}, with names as in the config.

  Raises:
    FileNotFoundError: there are no weights of the network.
    ValueError: settings or images are not as they should be.
  """
  settings = config.evaluate
  _check(settings)
  names = image_names.split(settings.samples)
  if settings.save_statistics and len(names) > 1:
    raise ValueError(
      'evaluate.save_statistics keeps those of one set of images, but '
      f'evaluate.samples names {len(names)}.'
    )
  sets = [image_names.find(name, config, paths) for name in names]
  for samples in sets:
    _check_count(samples)
  others = None
  if settings.fidelity:
    others = image_names.find(settings.fidelity, config, paths)
    for samples in sets:
      fidelity.check(samples, others)
  model = setup.load(config, paths) if settings.through_first_stage else None
  net = _network(config, sets[0])
  for samples in sets:
    _check_images(samples, net)
  reference = _reference(config, paths, net)
  results = [
    _judge(samples, others, net, reference, config, model) for samples in sets
  ]
  if len(results) == 1:
    return results[0]
  return {'sets': dict(zip(names, results, strict=True))}


def _judge(
  samples: image_sets.ImageSet,
  others: image_sets.ImageSet | None,
  net: features.FeatureNet,
  reference: features.Summary,
  config: ml_collections.ConfigDict,
  model: setup.Model | None,
) -> dict[str, Any]:
  """What metrics.json holds of one set; `model` if its first stage comes in."""
  settings = config.evaluate
  labels = samples.labels if settings.network == 'digits' else None
  if model is not None:
    samples = _through_first_stage(samples, model)
  draws = settings.bootstrap
  summary = _summarize(samples, net, settings.batch_size, draws > 0)
  result = {
    'samples': samples.name,
    'num_samples': summary.count,
    'reference': settings.reference,
    'num_reference': reference.count,
    'num_reference_statistics': reference.count if reference.counted else None,
    'network': net.name,
    'network_digest': net.digest,
    'settings': {
      name: settings[name]
      for name in (
        'shuffle',
        'neighbours',
        'split_size',
        'preprocess',
        'image_size',
      )
    },
    **measure(
      summary,
      reference,
      labels,
      shuffle_seed=config.seed if settings.shuffle else None,
      neighbours=settings.neighbours,
      split_size=settings.split_size,
    ),
    'fid_bootstrap': None,
    'fidelity': None,
  }
  if summary.exact is not None:
    with progress.progress('bootstrap', draws, 'draw') as bar:
      interval = bootstrap.fid_interval(
        summary.exact, reference.features, draws, config.seed, bar.update
      )
    result['fid_bootstrap'] = interval._asdict()
  if others is not None:
    with progress.progress('fidelity', summary.count, 'image') as bar:
      compared = fidelity.fidelity(
        samples, others, net, settings.batch_size, bar.update
      )
    result['fidelity'] = {'of': others.name, **compared._asdict()}
  if settings.save_statistics:
    target = pathlib.Path(settings.save_statistics)
    references.save(target, summary, net)
    _log.info('Wrote %s', target)
  return result


def check_installation() -> None:
  """Prints known answers beside what comes out here.

  Raises:
    ValueError: one of them is wrong; names all of these.
  """
  device = jax.devices()[0]
  print(f'{len(jax.devices())} x {device.device_kind} ({device.platform})')
  net = _digit_net()
  reference = references.load(_embedded('mnist_reference.npz'), net)
  wrong, count = [], 0
  for check in itertools.chain(
    selfcheck.checks(), selfcheck.digit_checks(net, reference)
  ):
    print(check.line())
    count += 1
    if not check.ok:
      wrong.append(check.name)
  if wrong:
    raise ValueError(
      f'{len(wrong)} of {count} checks went wrong ({"; ".join(wrong)}): '
      'metrics from this installation are not to be trusted.'
    )
  print(f'All {count} checks are right.')


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
  if settings.bootstrap < 0 or settings.bootstrap == 1:
    raise ValueError(
      f'evaluate.bootstrap is {settings.bootstrap}; expected 0 or >= 2.'
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
  """The metrics as text, always with the number of images.

  Args:
    result: as of `evaluate`; several sets become columns.
  """
  sets = result['sets'].values() if 'sets' in result else [result]
  columns = [_column(one) for one in sets]
  names = list(columns[0])  # All have the same rows.
  cells = [[column[name] for column in columns] for name in names]
  widths = [max(map(len, column.values())) for column in columns]
  return '\n'.join(
    ' '.join(
      [
        f'{name:<16}',
        *(f'{c:<{w}}' for c, w in zip(row, widths, strict=True)),
      ]
    ).rstrip()
    for name, row in zip(names, cells, strict=True)
  )


def _column(result: Mapping[str, Any]) -> dict[str, str]:
  """Row -> what is written there, of one set."""
  count, real = result['num_samples'], result['num_reference']
  unknown = result['num_reference_statistics'] is None
  hint = '' if count == _PUBLISHED else f' (papers use {_PUBLISHED})'
  column = {
    '': f'N = {count}{hint}',
    'samples': f'{count} of {result["samples"]}',
    'reference': f'{real} of {result["reference"]}'
    + ('; its statistics do not say of how many' if unknown else ''),
    'features': result['network'],
    **_written(result, _ROWS),
  }
  if (interval := result['fid_bootstrap']) is not None:
    column['FID'] += ' (95 %: {low:.3f} to {high:.3f})'.format(**interval)
  if (compared := result['fidelity']) is not None:
    column['compared with'] = compared['of']
    column |= _written(compared, _FIDELITY_ROWS)
  return column


def _written(
  values: Mapping[str, Any], rows: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
  return {
    name: '-' if values[key] is None else form.format(values[key])
    for key, (name, form) in rows.items()
  }


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


def _check_count(images_: image_sets.ImageSet) -> None:
  if images_.shape[0] < 2:
    raise ValueError(f'{images_.name} holds 1 image; at least 2 are needed.')


def _check_images(
  samples: image_sets.ImageSet, net: features.FeatureNet
) -> None:
  if samples.shape[1:] != net.image_shape:
    raise ValueError(
      f'{samples.name} holds images of shape {list(samples.shape[1:])}, but '
      f'the feature network {net.name!r} takes {list(net.image_shape)}.'
    )


def _summarize(
  samples: image_sets.ImageSet,
  net: features.FeatureNet,
  batch_size: int,
  keep_exact: bool = False,
) -> features.Summary:
  with progress.progress('features', samples.shape[0], 'image') as bar:
    return features.summarize(
      net, samples.batches(batch_size), batch_size, bar.update, keep_exact
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
  images_ = image_names.find(name, config, paths)
  _check_count(images_)
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
  return dataclasses.replace(
    summary, features=whole, spatial=spatial, counted=False
  )


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
