"""How long a mode would take, from what was measured in its work directory.

Rates are in operations of the plain network, which shapes tell, so that a rate
of one sampler says something of another. Each comes with what it is based on;
without any there is no prediction, but the command that measures one.
"""

import dataclasses
import functools
import json
import pathlib
import statistics as averages
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from d2dpm_jax.pipelines import setup, speed
from d2dpm_jax.quantization import reports
from d2dpm_jax.runtime import files

UNKNOWN = 'not known'
_MEASURE = '--mode benchmark --config.benchmark.what='


@dataclasses.dataclass(frozen=True)
class Rate:
  """Speed of the devices of this process.

  Attributes:
    per_second: operations.
    basis: what it is known from.
  """

  per_second: float
  basis: str


def text(seconds: float) -> str:
  """In a unit that suits it."""
  for unit, size in (('days', 86_400), ('h', 3_600), ('min', 60)):
    if seconds >= 2 * size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.0f} s'


def _operations(number: float) -> str:
  """In a unit that suits it."""
  for unit, size in (('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6)):
    if number >= size:
      return f'{number / size:.3g} {unit}OP'
  return f'{number:.0f} OP'


class Sampling:
  """Predicts how long images and trajectories of a model take."""

  def __init__(
    self,
    model: setup.Model,
    paths: files.Workdir,
    cells: Mapping[bool, Sequence[float]] | None = None,
  ):
    """Looks at nothing yet.

    Args:
      model: may be an outline.
      paths: where measurements are looked for.
      cells: images per second of finished cells of an experiment with this
        sampler, of quantized networks and others.
    """
    self._model, self._paths, self._cells = model, paths, cells or {}

  @functools.cached_property
  def operations(self) -> dict[str, int]:
    """See `speed.operations`."""
    return speed.operations(self._model)

  def rate(self, quantized: bool) -> Rate | None:
    """The best known one of a network; None if nothing was measured here."""
    for find in (
      self._of_cells,
      self._of_images,
      self._of_job,
      self._of_benchmark,
    ):
      found = find(quantized)
      if found is not None:
        return found
    return None

  def line(self, what: str, operations: float, quantized: bool) -> str:
    """A line of the plan: how long these operations of a network take."""
    rate = self.rate(quantized)
    if rate is None:
      return f'{what}, {_operations(operations)}: {UNKNOWN}'
    return (
      f'{what}: about {text(operations / rate.per_second)} at '
      f'{_operations(rate.per_second)}/s ({rate.basis}), and compiling'
    )

  def images(self, count: int, quantized: bool, what: str = 'images') -> str:
    """A line for whole images."""
    operations = count * self.operations['image']
    return self.line(f'{count} {what}', operations, quantized)

  def with_hint(self, lines: Sequence[str]) -> list[str]:
    """The same, and how the rate that is missing would be measured."""
    if not any(line.endswith(UNKNOWN) for line in lines):
      return [*lines]
    runs = tuple(self._run(quantized).name for quantized in (False, True))
    microbatch = self._model.config.sample.microbatch
    return [
      *lines,
      f'rates are measured by {_MEASURE}sampling '
      f'--config.benchmark.runs="{runs}" '
      f"--config.benchmark.batch_sizes='({microbatch},)' in this --workdir",
    ]

  def _run(self, quantized: bool) -> speed.Run:
    """The network, as it is named in `config.benchmark.runs`."""
    config = self._model.config
    dtype, quant = config.model.dtype, config.quant
    if not quantized:
      return speed.parse(dtype)
    name = f'w{quant.weight_bits}a{quant.act_bits}'
    if quant.execution == 'simulated':
      name += '-simulated'
    return speed.parse(name if dtype == 'bfloat16' else f'{name}-{dtype}')

  def _of_cells(self, quantized: bool) -> Rate | None:
    rates = self._cells.get(quantized)
    if not rates:
      return None
    per_second = averages.median(rates) * self.operations['image']
    return Rate(per_second, 'the cells that are there')

  def _of_images(self, quantized: bool) -> Rate | None:
    """Of those in samples/: on which machine is not written there."""
    settings = _json(self._paths.shards / 'settings.json')
    config = self._model.config
    here = {
      'dtype': config.model.dtype,
      'microbatch': config.sample.microbatch,
      'sampler': setup.plain(config.sampler),
      'quantized': quantized,
    }
    if quantized:
      here['execution'] = config.quant.execution
    if not _agree(settings, here):
      return None
    rows = _lines(self._paths.samples / 'metrics.jsonl')
    rates = [row['images_per_second'] for row in rows]
    del rates[:1]  # Programs were compiled in it.
    if not rates:
      return None
    per_second = averages.median(rates) * self.operations['image']
    return Rate(per_second, 'the images that are there')

  def _of_job(self, quantized: bool) -> Rate | None:
    path = self._paths.benchmark('job.json')
    found = _json(path)
    config = self._model.config
    here = {
      'device': jax.devices()[0].device_kind,
      'devices': jax.local_device_count(),
      'dtype': config.model.dtype,
      'sampler': setup.plain(config.sampler),
      'quantized': quantized,
    }
    if not _agree(found, here):
      return None
    per_second = found['end_to_end'] * self.operations['image']
    return Rate(per_second, _name(path))

  def _of_benchmark(self, quantized: bool) -> Rate | None:
    """That of the batch that is nearest to a microbatch."""
    path = self._paths.benchmark('sampling.json')
    found = _json(path)
    config, wanted = self._model.config, self._run(quantized).name
    runs = [run for run in found.get('runs', ()) if run['run'] == wanted]
    if not runs or found['device'] != jax.devices()[0].device_kind:
      return None
    model = setup.plain(config.model)
    if not _agree(found['config']['model'], {**model, 'dtype': None}, 'dtype'):
      return None
    run = min(
      runs,
      key=lambda r: abs(r['batch_per_device'] - config.sample.microbatch),
    )
    per_second = run['operations_per_second'] * jax.device_count()
    return Rate(
      per_second,
      f'{_name(path)}: {run["run"]}, {run["batch_per_device"]} at a time',
    )


def learning(model: setup.Model, paths: files.Workdir, names: list[str]) -> str:
  """A line: how long the units take that are not learned yet.

  Args:
    model: whose `quant.reconstruction` says how long each learns.
    paths: of the calibration.
    names: of the units, as in its metrics.jsonl.
  """
  settings = model.config.quant.reconstruction
  rows = {
    row['unit']: row['seconds']
    for row in _lines(paths.calibration / 'metrics.jsonl')
  }
  left = {phase: 0 for phase in reports.PHASES}
  seconds = 0.0
  known = True
  for phase in reports.PHASES:
    mine = [name for name in names if name.startswith(f'{phase}/')]
    done = [rows[name] for name in mine if name in rows]
    left[phase] = len(mine) - len(done)
    if done:
      seconds += left[phase] * averages.mean(done)
    known &= bool(done) or not left[phase]
  total = sum(left.values())
  what = f'learning: {total} of {len(names)} units left'
  if not total:
    return what
  what += f', {settings.iters} + {settings.act_iters} iterations each'
  if known:
    return f'{what}: about {text(seconds)}, as those that are done'
  return (
    f'{what}: {UNKNOWN} before some of both phases are done; '
    'docs/calibrate.md has times'
  )


def judging(model: setup.Model, paths: files.Workdir) -> str:
  """A line: how long --mode evaluate takes."""
  path = paths.benchmark('evaluation.json')
  found = _json(path)
  here = {
    'network': model.config.evaluate.network,
    'device': f'{len(jax.devices())} x {jax.devices()[0].device_kind}',
  }
  if not _agree(found, here):
    return f'{UNKNOWN}; {_MEASURE}evaluation measures it'
  count = found['num_samples'] + found['num_reference']
  each = found['total_s'] / count
  return (
    f'about {text(10_000 * each)} for each 10 000 images, those of the '
    f'reference included ({_name(path)}: {count} in {text(found["total_s"])})'
  )


def _agree(
  found: Mapping[str, Any], wanted: Mapping[str, Any], *but: str
) -> bool:
  """Whether `found` has the same values, as JSON has them."""
  names = wanted.keys() - set(but)
  return bool(found) and _plain({n: found.get(n) for n in names}) == _plain(
    {n: wanted[n] for n in names}
  )


def _plain(values: Mapping[str, Any]) -> Any:
  return json.loads(json.dumps(values))


def _name(path: pathlib.Path) -> str:
  return f'{path.parent.name}/{path.name}'


def _json(path: pathlib.Path) -> dict[str, Any]:
  return files.read_json(path) if path.is_file() else {}


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Those of a metrics.jsonl that are whole: a killed run leaves a part."""
  found = []
  for line in path.read_text().splitlines() if path.is_file() else ():
    try:
      found.append(json.loads(line))
    except ValueError:
      continue
  return found
