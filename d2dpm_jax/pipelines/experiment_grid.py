"""Which cells the tables of `--mode experiment` have."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import ml_collections

from d2dpm_jax.configs import common
from d2dpm_jax.denoising import correction as corrections
from d2dpm_jax.pipelines.generation import SamplerSettings

# Quantizer -> fields of config.quant.reconstruction that make it.
QUANTIZERS: dict[str, dict[str, Any]] = {
  'nearest': dict(iters=0, act_iters=0),
  'brecq': dict(drop_prob=0.0),
  'brecq-qdrop': dict(drop_prob=0.5),
}
_BITS = re.compile(r'W([2-8])A([2-8])')
# Corrections for which statistics per tensor and per channel are the same.
_ONE_KIND = ('none', 'auto')


@dataclasses.dataclass(frozen=True)
class Cell:
  """One set of images to sample and measure.

  Attributes:
    sampler: a word, 's3_eta0_20'.
    seed: of the noise.
    quantizer: a key of QUANTIZERS; '' is the full-precision network.
    bits: 'W4A8'; '' in full precision.
    correction: a key of `denoising.correction.CORRECTIONS`.
    statistics: 'tensor' or 'channel'; '' where that makes no difference.
  """

  sampler: str
  seed: int
  quantizer: str = ''
  bits: str = ''
  correction: str = 'none'
  statistics: str = ''

  @property
  def name(self) -> str:
    """Of its file; no two cells of a grid have the same."""
    parts = [self.quantizer or 'fp', self.bits, self.sampler]
    if self.quantizer:
      parts += [self.correction, self.statistics]
    return '-'.join([*filter(None, parts), f'seed{self.seed}'])


@dataclasses.dataclass(frozen=True)
class Grid:
  """The settings of an experiment, checked; see configs/common.py."""

  quantizers: tuple[str, ...]
  bits: tuple[str, ...]
  corrections: tuple[str, ...]
  channel_wise: tuple[bool, ...]
  samplers: tuple[str, ...]
  learn_on: str  # The sampler on whose trajectories quantizers learn.
  seeds: tuple[int, ...]
  num_images: int
  batch_size: int

  def all_samplers(self) -> list[str]:
    """Those of the cells, and the one that quantizers learn on."""
    return list(dict.fromkeys((self.learn_on, *self.samplers)))

  def full_precision(self, sampler: str) -> list[Cell]:
    return [Cell(sampler, seed) for seed in self.seeds]

  def quantized(self, sampler: str, quantizer: str, bits: str) -> list[Cell]:
    """All corrections and seeds; each correction once if it has one kind."""
    kinds = ['channel' if wise else 'tensor' for wise in self.channel_wise]
    return [
      Cell(sampler, seed, quantizer, bits, correction, kind)
      for correction in self.corrections
      for kind in ([''] if correction in _ONE_KIND else kinds)
      for seed in self.seeds
    ]

  def networks(self) -> list[tuple[str, str]]:
    """All (quantizer, bits)."""
    return [(q, bits) for q in self.quantizers for bits in self.bits]

  def cells(self) -> list[Cell]:
    """All of them, in the order in which they are made."""
    found = []
    for sampler in self.samplers:
      found += self.full_precision(sampler)
      for network in self.networks():
        found += self.quantized(sampler, *network)
    return found


def read(config: ml_collections.ConfigDict, conditional: bool) -> Grid:
  """Reads and checks `config.experiment`.

  Words may also be given as one string with commas.

  Args:
    config: an experiment.
    conditional: whether the model has classes, and samplers a guidance scale.

  Raises:
    ValueError: unknown words, nothing at all, the same twice, or too few
      images.
  """
  settings = config.experiment
  words = {
    name: split(settings[name])
    for name in ('quantizers', 'bits', 'corrections', 'samplers')
  }
  grid = Grid(
    **words,
    channel_wise=tuple(settings.channel_wise),
    learn_on=settings.learn_on or next(iter(words['samplers']), ''),
    seeds=tuple(settings.seeds),
    num_images=settings.num_images,
    batch_size=settings.batch_size,
  )
  _check_words('quantizers', grid.quantizers, list(QUANTIZERS))
  _check_words('corrections', grid.corrections, list(corrections.CORRECTIONS))
  for bits in grid.bits:
    if not _BITS.fullmatch(bits):
      _fail('bits', bits, 'W2A2 to W8A8, such as W4A8')
  form = 's3_eta0_20' if conditional else 'eta1_200'
  for word in grid.samplers:
    if not common.is_sampler(word, conditional):
      _fail('samplers', word, f'a word such as {form}')
  if grid.samplers and not common.is_sampler(grid.learn_on, conditional):
    _fail('learn_on', grid.learn_on, f'a word such as {form}')
  for wise in grid.channel_wise:
    if not isinstance(wise, bool):
      _fail('channel_wise', wise, 'False or True')
  for seed in grid.seeds:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
      _fail('seeds', seed, 'whole numbers >= 0')
  for name, minimum in (('num_images', 2), ('batch_size', 1)):
    if settings[name] < minimum:
      _fail(name, settings[name], f'>= {minimum}')
  for field in dataclasses.fields(grid):
    values = getattr(grid, field.name)
    if isinstance(values, tuple):
      _check_distinct(field.name, values)
  _check_distinct('samplers', [sampler_of(word) for word in grid.samplers])
  return grid


def sampler_of(word: str) -> SamplerSettings:
  """What the word of a sampler stands for."""
  return SamplerSettings(**common.sampler_fields(word))


def configured(
  config: ml_collections.ConfigDict,
  sampler: str,
  quantizer: str = '',
  bits: str = '',
) -> ml_collections.ConfigDict:
  """The config with which a sampler and a quantizer are made."""
  config = config.copy_and_resolve_references()
  config.sampler.update(common.sampler_fields(sampler))
  if quantizer:
    match = _BITS.fullmatch(bits)
    assert match is not None  # `read` saw to it.
    config.quant.update(weight_bits=int(match[1]), act_bits=int(match[2]))
    config.quant.reconstruction.update(QUANTIZERS[quantizer])
  return config


def split(words: Sequence[str]) -> tuple[str, ...]:
  """Words of a list that is written as one of them: `--config.x=a,b`."""
  return tuple(part.strip() for word in words for part in word.split(','))


def _check_words(name: str, words: Sequence[str], known: Sequence[str]) -> None:
  for word in words:
    if word not in known:
      _fail(name, word, f'one of {list(known)}')


def _check_distinct(name: str, values: Sequence[Any]) -> None:
  if not values:
    raise ValueError(f'experiment.{name} is empty; expected at least one.')
  for value in values:
    if values.count(value) > 1:
      raise ValueError(f'experiment.{name}: {value!r} is there more than once.')


def _fail(name: str, value: Any, expected: str) -> None:
  raise ValueError(f'experiment.{name} has {value!r}; expected {expected}.')
