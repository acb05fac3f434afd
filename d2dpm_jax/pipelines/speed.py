"""`benchmark.what=sampling`: how fast images come, at which precision."""

import concurrent.futures
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from d2dpm_jax.diffusion import noise
from d2dpm_jax.pipelines import (
  artifacts,
  experiment_grid,
  generation,
  layer_bits,
  setup,
)
from d2dpm_jax.quantization import affine, cost, packing, transform
from d2dpm_jax.runtime import devices, files, microbatches, timing

_log = logging.getLogger(__name__)

_RUN = re.compile(
  r'(?:w(?P<w>\d)a(?P<a>\d)(?P<simulated>-simulated)?(?P<wide>-float32)?'
  r'|(?P<dtype>float32|bfloat16))'
)
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Run:
  """One kind of network.

  Attributes:
    name: as in `config.benchmark.runs`.
    dtype: what it computes in between quantized layers.
    bits: of weights and inputs; None is full precision.
    execution: of quantized layers.
  """

  name: str
  dtype: str
  bits: tuple[int, int] | None = None
  execution: str = 'integer'

  @property
  def peak(self) -> str:
    """The key of `timing.peaks` that it can reach at best."""
    integers = self.bits is not None and self.execution == 'integer'
    return 'int8' if integers else self.dtype


def parse(name: str) -> Run:
  """Reads 'float32', 'bfloat16', 'w8a8', 'w4a8-simulated', 'w4a8-float32'.

  Raises:
    ValueError: it is none of these.
  """
  match = _RUN.fullmatch(name)
  if match is None:
    raise ValueError(
      f'benchmark.runs: {name!r} is neither float32, bfloat16 nor like w8a8, '
      'w8a8-simulated, w8a8-float32, w8a8-simulated-float32.'
    )
  if match['dtype']:
    return Run(name, match['dtype'])
  bits = (
    affine.check_bits(int(match['w'])),
    affine.check_bits(int(match['a'])),
  )
  return Run(
    name,
    'float32' if match['wide'] else 'bfloat16',
    bits,
    'simulated' if match['simulated'] else 'integer',
  )


def check(settings: ml_collections.ConfigDict) -> None:
  """Raises ValueError for settings that cannot be measured."""
  for name in ('repeats', 'max_seconds'):
    if not settings[name] > 0:
      raise ValueError(f'benchmark.{name} is {settings[name]}; expected > 0.')
  if not settings.runs or not settings.batch_sizes:
    raise ValueError(
      'benchmark.runs and benchmark.batch_sizes are to be given.'
    )
  if min(settings.batch_sizes) < 1:
    raise ValueError(f'benchmark.batch_sizes {settings.batch_sizes}: below 1.')
  for name in experiment_grid.split(settings.runs):
    parse(name)


def report(config: ml_collections.ConfigDict, paths: files.Workdir) -> None:
  """Prints a line per run as it is done; keeps all of them in sampling.json."""
  check(config.benchmark)
  target = paths.benchmark('sampling.json')
  for result in measure(config):
    if not result['runs']:
      print(heading(result), flush=True)
    else:
      print(line(result['runs'][-1], result['peaks']), flush=True)
    files.write_json(target, result)
  _log.info('Wrote %s', target)


def measure(config: ml_collections.ConfigDict) -> Iterator[dict[str, Any]]:
  """What sampling.json holds, anew after every run; without runs at first."""
  settings = config.benchmark
  begin = time.perf_counter()
  result: dict[str, Any] = {
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'jax': jax.__version__,
    'config': {
      name: setup.plain(config[name])
      for name in ('model', 'sampler', 'quant', 'benchmark')
    },
    'peaks': timing.peaks(),
    'runs': [],
  }
  model = setup.load(config)
  result['operations'] = operations(model)
  result['config']['model'] = setup.plain(model.config.model)
  yield result
  decoding: dict[tuple[str, int], dict[str, float]] = {}
  quantizers: dict[tuple[int, int], transform.QuantState] = {}
  for batch in settings.batch_sizes:
    for name in experiment_grid.split(settings.runs):
      gone = time.perf_counter() - begin
      if gone > settings.max_seconds:
        _log.warning(
          'Left out, as benchmark.max_seconds are over: %s, batch %d',
          name,
          batch,
        )
        continue
      run = parse(name)
      if run.bits is not None and run.bits not in quantizers:
        quantizers[run.bits] = uncalibrated(configured(model, run))
      qstate = quantizers[run.bits] if run.bits is not None else {}
      found = _measure_run(model, run, qstate, batch, settings, decoding)
      result['runs'].append(found)
      result['seconds'] = time.perf_counter() - begin
      yield result


def configured(model: setup.Model, run: Run) -> setup.Model:
  """The model as a run wants it."""
  config = model.config.copy_and_resolve_references()
  config.model.dtype = run.dtype
  config.quant.execution = run.execution
  if run.bits is not None:
    config.quant.weight_bits, config.quant.act_bits = run.bits
  return dataclasses.replace(model, config=config, ldm=setup.build(config))


def uncalibrated(model: setup.Model) -> transform.QuantState:
  """Quantizers for timings: weights to the nearest code, inputs on [-2, 6].

  Neither calibration nor a forward: that would take longer than what is
  measured. Zero points are other than the middle, as those of real ones.
  """
  table, _ = layer_bits.layer_policy(model)
  quant = model.config.quant

  def quantizers(path: str) -> transform.LayerState:
    bits = table[path]
    assert bits is not None
    weight = act = None
    if bits.w is not None:
      kernel = transform.get_kernel(model.params['unet'], path)
      weight = nearest_on_host(np.asarray(kernel), bits.w, quant.per_channel)
    if bits.a is not None:
      act = grid(bits.a)
    return transform.LayerState(weight=weight, act=act)

  found = [path for path, bits in table.items() if bits is not None]
  with concurrent.futures.ThreadPoolExecutor() as pool:  # NumPy lets go.
    return dict(zip(found, pool.map(quantizers, found), strict=True))


def grid(bits: int) -> affine.QParams:
  """That of inputs for timings, see `uncalibrated`."""
  top = np.float32(2**bits - 1)
  scale: Any = np.float32(8 / top)
  zero_point: Any = np.round(top / 4)
  return affine.QParams(scale, zero_point, bits)


def nearest_on_host(
  kernel: np.ndarray, bits: int, per_channel: bool
) -> packing.Weight:
  """As `affine.nearest_weight` by 'max', without a program per shape."""
  top = np.float32(2**bits - 1)
  axes = tuple(range(kernel.ndim - 1)) if per_channel else None
  low = np.minimum(kernel.min(axes, keepdims=per_channel), 0)
  high = np.maximum(kernel.max(axes, keepdims=per_channel), 0)
  high = np.where(high > low, high, low + 1).astype(np.float32)
  scale = np.asarray((high - low) / top)
  zero_point = np.asarray(np.round(-low / scale))
  codes = np.clip(np.round(kernel / scale) + zero_point, 0, top)
  weight: Any = affine.QWeight
  return packing.pack(weight(codes.astype(np.uint8), scale, zero_point, bits))


def operations(model: setup.Model) -> dict[str, int]:
  """Operations for one image, two per multiplication, of the plain network.

  Returns:
    'step', both halves of guidance; 'decode'; 'image', all of them.
  """
  shapes = dataclasses.replace(model, params=jax.tree.map(_shape, model.params))
  step = 2 * cost.count_macs(
    model.ldm.unet.apply, *layer_bits.example_arguments(shapes)
  )
  if model.ldm.cond_stage is not None and model.sampler.guidance_scale != 1:
    step *= 2
  z = jax.ShapeDtypeStruct((1, *model.ldm.latent_shape), np.float32)
  decode = 2 * cost.count_macs(model.ldm.decode, shapes.params, z)
  steps = len(generation.rows_of(model.ldm, model.sampler).t)
  return {'step': step, 'decode': decode, 'image': steps * step + decode}


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _measure_run(
  model: setup.Model,
  run: Run,
  qstate: transform.QuantState,
  batch: int,
  settings: ml_collections.ConfigDict,
  decoding: dict[tuple[str, int], dict[str, float]],
) -> dict[str, Any]:
  """A row of `measure`; `decoding` remembers times of the first stage."""
  model = configured(model, run)
  quantized = artifacts.Quantized(model, qstate, {})
  inputs = devices.replicate(
    generation.Inputs(
      quantized.network_params(),
      quantized.executable(),
      None,
      noise.seed_key(model.config.seed),
      model.sampler.scale,
    )
  )
  total = batch * jax.device_count()
  index = np.arange(total, dtype=np.int32)
  labels = index % max(1, model.num_classes)
  program = generation.sample_program(model.ldm, model.sampler, 'none', batch)
  compiled, compiling = _compile(program, inputs, index, labels)
  times, out = _times(compiled, inputs, (index, labels), settings.repeats)
  if (run.dtype, batch) not in decoding:
    decode = generation.decode_program(model.ldm, batch)
    latents = np.asarray(out['latents'])
    small = inputs._replace(params={**inputs.params, 'unet': {}}, qstate={})
    ready, _ = _compile(decode, small, latents)
    spent, _ = _times(ready, small, (latents,), settings.repeats)
    decoding[run.dtype, batch] = timing.summary(spent)
  whole = timing.summary(times)
  decode_seconds = decoding[run.dtype, batch]
  steps = len(generation.rows_of(model.ldm, model.sampler).t)
  stats = jax.local_devices()[0].memory_stats() or {}
  memory = compiled.memory_analysis()
  per_image = operations(model)['image']
  return {
    'run': run.name,
    'peak': run.peak,
    'batch_per_device': batch,
    'images': total,
    'seconds': whole,
    'decode_seconds': decode_seconds,
    'step_seconds': (whole['median'] - decode_seconds['median']) / steps,
    'images_per_second': total / whole['median'],
    'operations_per_second': per_image * batch / whole['median'],
    'compile': compiling,
    'parameter_bytes': cost.array_bytes((inputs.params, inputs.qstate)),
    'program_bytes': {
      'arguments': getattr(memory, 'argument_size_in_bytes', None),
      'temporary': getattr(memory, 'temp_size_in_bytes', None),
    },
    # Of the process until now: a device does not forget it between runs.
    'peak_bytes': stats.get('peak_bytes_in_use'),
    'finite': bool(np.isfinite(np.asarray(out['latents'])).all()),
  }


def _compile(
  program: microbatches.Program, inputs: Any, *arrays: np.ndarray
) -> tuple[Any, dict[str, float]]:
  """The program for these shapes, and the seconds that making it took.

  With a compilation cache that knows it, 'compile' is the time to read it.
  """
  start = time.perf_counter()
  lowered = program.lower(inputs, *arrays)
  middle = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  return compiled, {'trace': middle - start, 'compile': end - middle}


def _times(
  compiled: Callable[..., Any],
  inputs: Any,
  arrays: tuple[np.ndarray, ...],
  repeats: int,
) -> tuple[list[float], Any]:
  """Seconds until the results are on the host, and the results."""
  out: list[Any] = []
  given = microbatches.arguments(inputs)

  def run() -> Any:
    out[:] = [jax.device_get(compiled(given, np.int32(1), arrays))]
    return out[0]

  times = timing.seconds(run, repeats)
  return times, out[0]


_COLUMNS = (
  ('run', 24),
  ('batch', 5),
  ('img/s', 8),
  ('(least..most)', 19),
  ('ms/step', 8),
  ('decode ms', 9),
  ('TOP/s', 7),
  ('of peak', 7),
  ('compile s', 9),
  ('GiB', 6),
)


def _row(cells: tuple[str, ...]) -> str:
  sizes = (size for _, size in _COLUMNS)
  return '  '.join(
    c.rjust(n) if i else c.ljust(n)
    for i, (c, n) in enumerate(zip(cells, sizes, strict=True))
  )


def heading(result: Mapping[str, Any]) -> str:
  """What comes before the lines: the device, its peaks, names of columns."""
  found = result['peaks']
  peaks = ', '.join(
    f'{name} {found[name] / 1e12:.4g}'
    for name in ('float32', 'bfloat16', 'int8')
  )
  return (
    f'{result["devices"]} x {result["device"]}, measured peaks: {peaks} TOP/s, '
    f'{found["bytes"] / 1e9:.4g} GB/s; '
    f'{result["operations"]["image"] / 1e12:.4g} TOP per image\n'
    + _row(tuple(name for name, _ in _COLUMNS))
  )


def line(run: Mapping[str, Any], peaks: Mapping[str, float]) -> str:
  """A run in one line."""
  seconds, images = run['seconds'], run['images']
  rate = run['operations_per_second']
  memory = run['program_bytes']
  used = run['peak_bytes'] or sum(memory[k] or 0 for k in memory)
  spread = f'({images / seconds["most"]:.2f}..{images / seconds["least"]:.2f})'
  return _row(
    (
      run['run'],
      str(run['batch_per_device']),
      f'{run["images_per_second"]:.2f}',
      spread,
      f'{1e3 * run["step_seconds"]:.2f}',
      f'{1e3 * run["decode_seconds"]["median"]:.1f}',
      f'{rate / 1e12:.4g}',
      f'{rate / peaks[run["peak"]]:.1%}',
      f'{sum(run["compile"].values()):.1f}',
      f'{used / _GIB:.2f}',
    )
  )
