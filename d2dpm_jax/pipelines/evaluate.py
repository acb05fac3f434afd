"""`--mode evaluate`: how good samples are, and whether they are what was asked.

Sets of images are named as in `image_names`, references as in `judges`; see
docs/evaluate.md.
"""

import logging
import os
import pathlib
from typing import Any

import ml_collections
import numpy as np

from d2dpm_jax.evaluation import (
  bootstrap,
  features,
  fidelity,
  frechet,
  image_sets,
  manifold,
  references,
  scores,
)
from d2dpm_jax.pipelines import (
  first_stage,
  image_names,
  installation,
  judges,
  setup,
)
from d2dpm_jax.reporting import metrics_table
from d2dpm_jax.runtime import files, progress

_log = logging.getLogger(__name__)

# What is kept of the settings beside the numbers.
_SETTINGS = ('shuffle', 'neighbours', 'split_size', 'preprocess', 'image_size')


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Prints a table of metrics and writes metrics.json; or checks itself."""
  if config.evaluate.selfcheck:
    installation.check()
    return
  paths = files.Workdir.at(workdir)
  times = progress.Times()
  result = evaluate(config, paths, times)
  print(metrics_table.table(result))
  files.write_json(paths.metrics, result)
  for line in times.lines():
    _log.info(line)
  _log.info('Wrote %s', paths.metrics)


def evaluate(
  config: ml_collections.ConfigDict,
  paths: files.Workdir,
  times: progress.Times | None = None,
) -> dict[str, Any]:
  """Judges one set of images, or several.

  Args:
    config: an experiment; `config.evaluate` says what is compared with what.
    paths: of the run whose samples are meant by ''.
    times: where the seconds of each part are added.

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
  times = times or progress.Times()
  config = setup.resolve(config)
  settings = config.evaluate
  check(settings)
  names = image_names.split(settings.samples)
  if settings.save_statistics:
    _check_target(settings.save_statistics, len(names))
  sets = [image_names.find(name, config, paths) for name in names]
  others = None
  if settings.fidelity:
    others = image_names.find(settings.fidelity, config, paths)
    for samples in sets:
      fidelity.check(samples, others)
  model = setup.load(config, paths) if settings.through_first_stage else None
  net = judges.network(config, sets[0])
  for samples in sets:
    judges.check(samples, net)
    labels = _labels(samples, config)
    if labels is not None:
      scores.check_labels(samples.name, labels, net.classes)
  with times.phase('reference'):
    reference = judges.reference(config, paths, net)
  results = [
    _judge(samples, others, net, reference, config, model, times)
    for samples in sets
  ]
  if len(results) == 1:
    return results[0]
  return {'sets': dict(zip(names, results, strict=True))}


def check(settings: ml_collections.ConfigDict) -> None:
  """Raises ValueError if a number of `config.evaluate` makes no sense."""
  for name in ('batch_size', 'neighbours', 'split_size'):
    if settings[name] < 1:
      raise ValueError(f'evaluate.{name} is {settings[name]}; expected >= 1.')
  if settings.bootstrap < 0 or settings.bootstrap == 1:
    raise ValueError(
      f'evaluate.bootstrap is {settings.bootstrap}; expected 0 or >= 2.'
    )


def _check_target(target: str, num_sets: int) -> None:
  """That statistics of these sets can be written there, when all is done."""
  if num_sets > 1:
    raise ValueError(
      'evaluate.save_statistics keeps those of one set of images, but '
      f'evaluate.samples names {num_sets}.'
    )
  path = pathlib.Path(target).absolute()
  there = next(parent for parent in path.parents if parent.exists())
  if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
    raise ValueError(
      f'evaluate.save_statistics is {target!r}; expected a file that can be '
      'written, such as reference.npz.'
    )


def _labels(
  samples: image_sets.ImageSet, config: ml_collections.ConfigDict
) -> np.ndarray | None:
  """Labels that the classes of the network are: Inception's are others."""
  return samples.labels if config.evaluate.network == 'digits' else None


def _judge(
  samples: image_sets.ImageSet,
  others: image_sets.ImageSet | None,
  net: features.FeatureNet,
  reference: features.Summary,
  config: ml_collections.ConfigDict,
  model: setup.Model | None,
  times: progress.Times,
) -> dict[str, Any]:
  """What metrics.json holds of one set; `model` if its first stage comes in."""
  settings = config.evaluate
  labels = _labels(samples, config)
  if model is not None:
    samples = first_stage.reconstructed(samples, model)
  with times.phase('features'):
    summary = judges.summarize(
      samples, net, settings.batch_size, settings.bootstrap > 0
    )
  result = {
    'samples': samples.name,
    'num_samples': summary.count,
    'reference': settings.reference,
    'num_reference': reference.count,
    'num_reference_statistics': reference.count if reference.counted else None,
    'network': net.name,
    'network_digest': net.digest,
    'settings': {name: settings[name] for name in _SETTINGS},
    **measure(
      summary,
      reference,
      labels,
      shuffle_seed=config.seed if settings.shuffle else None,
      neighbours=settings.neighbours,
      split_size=settings.split_size,
      times=times,
    ),
    'fid_bootstrap': _interval(summary, reference, config, times),
    'fidelity': _closeness(samples, others, net, settings.batch_size, times),
  }
  if settings.save_statistics:
    target = pathlib.Path(settings.save_statistics)
    references.save(target, summary, net)
    _log.info('Wrote %s', target)
  return result


def _interval(
  summary: features.Summary,
  reference: features.Summary,
  config: ml_collections.ConfigDict,
  times: progress.Times,
) -> dict[str, float] | None:
  """How sure FID is; None if nobody asked."""
  if summary.exact is None:
    return None
  draws = config.evaluate.bootstrap
  with (
    times.phase('bootstrap'),
    progress.progress('bootstrap', draws, 'draw') as bar,
  ):
    return bootstrap.fid_interval(
      summary.exact, reference.features, draws, config.seed, bar.update
    )._asdict()


def _closeness(
  samples: image_sets.ImageSet,
  others: image_sets.ImageSet | None,
  net: features.FeatureNet,
  batch_size: int,
  times: progress.Times,
) -> dict[str, Any] | None:
  """How far samples are from the others, one by one; None without others."""
  if others is None:
    return None
  with (
    times.phase('fidelity'),
    progress.progress('fidelity', samples.shape[0], 'image') as bar,
  ):
    compared = fidelity.fidelity(samples, others, net, batch_size, bar.update)
  return {'of': others.name, **compared._asdict()}


def measure(
  summary: features.Summary,
  reference: features.Summary,
  labels: np.ndarray | None = None,
  *,
  shuffle_seed: int | None = 0,
  neighbours: int = 3,
  split_size: int = 5000,
  times: progress.Times | None = None,
) -> dict[str, float | None]:
  """All metrics of a summarized set.

  Args:
    summary: of the samples, with logits.
    reference: of real images, by the same network.
    labels: int[N], what was asked for; None if nobody asked.
    shuffle_seed: see `scores.inception_score`.
    neighbours: see `manifold.precision_recall`.
    split_size: see `scores.inception_score`.
    times: where the seconds of each metric are added.

  Raises:
    ValueError: labels that the network does not know, or no logits.
  """
  if summary.logits is None:
    raise ValueError('These statistics have no logits: evaluate the images.')
  times = times or progress.Times()
  precision = recall = agreement = None
  if labels is not None:
    agreement = scores.label_agreement(summary.logits, labels)
  with times.phase('FID'):
    fid = frechet.frechet_distance(summary.features, reference.features)
  with times.phase('sFID'):
    sfid = frechet.frechet_distance(summary.spatial, reference.spatial)
  with times.phase('inception score'):
    inception_score = scores.inception_score(
      summary.logits, split_size, shuffle_seed
    )
  if min(summary.count, reference.count) > neighbours:
    with times.phase('precision and recall'):
      precision, recall = manifold.precision_recall(
        reference.vectors, summary.vectors, neighbours
      )
  return {
    'label_agreement': agreement,
    'fid': fid,
    'sfid': sfid,
    'inception_score': inception_score,
    'precision': precision,
    'recall': recall,
  }
