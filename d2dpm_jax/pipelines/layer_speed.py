"""`benchmark.what=layers`: where the time of a step goes, layer by layer."""

import collections
import functools
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2dpm_jax.pipelines import kernel_choice, layer_bits, setup, speed
from d2dpm_jax.quantization import cost, integer, policy, transform
from d2dpm_jax.runtime import files, timing

_log = logging.getLogger(__name__)

# Run once, and not in every step (models/folding.py).
_ONCE = re.compile(r'(.*/)?(time_embed_\d|emb_layers_1|attn2/.*)')
# How a layer can be run -> the peak that bounds it.
_KERNELS = {
  'bfloat16': 'bfloat16',  # The layer of the bfloat16 network.
  'int8': 'int8',  # Quantize, int8 x int8, rescale.
  'int8_packed': 'int8',  # The same from weights of 4 bits.
  'bfloat16_codes': 'bfloat16',  # The same sums by kernels for bfloat16.
}
_CALLS = 20  # In a row, for one time.
_MUCH = 3  # Times as long: more than any kernel of the right kind takes.


def report(config: ml_collections.ConfigDict, paths: files.Workdir) -> None:
  """Prints a line per kind of layer, then groups; writes layers.json."""
  speed.check(config.benchmark)
  target = paths.benchmark('layers.json')
  result: Mapping[str, Any] = {}
  for result in measure(config):
    if result['layers']:
      print(_line(result['layers'][-1]), flush=True)
    files.write_json(target, result)
  print(group_table(result))
  if jax.default_backend() == 'gpu' and (slow := much_slower(result)):
    _log.warning(
      'int8 takes more than %d times as long as bfloat16 for %s: XLA may have '
      'chosen a slow path of cuDNN (docs/performance.md).',
      _MUCH,
      ', '.join(slow),
    )
  _log.info('Wrote %s', target)


def measure(config: ml_collections.ConfigDict) -> Iterator[dict[str, Any]]:
  """What layers.json holds, anew after every kind of layer."""
  settings = config.benchmark
  begin = time.perf_counter()
  model = setup.outline(config)
  batch = settings.batch_sizes[0]
  if model.ldm.cond_stage is not None and model.sampler.guidance_scale != 1:
    batch *= 2
  kinds: dict[str, list[transform.Layer]] = collections.defaultdict(list)
  for layer in layer_bits.list_layers(model):
    kinds[kernel_choice.key(layer)].append(layer)
  result: dict[str, Any] = {
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'batch': batch,
    'peaks': timing.peaks(),
    'layers': [],
  }
  for key, layers in kinds.items():
    if time.perf_counter() - begin > settings.max_seconds:
      _log.warning('Left out, as benchmark.max_seconds are over: %s', key)
      continue
    first = layers[0]
    times = {
      name: _time(first, name, batch, settings.repeats) for name in _KERNELS
    }
    bounds = {
      name: roofline(first, name, batch, result['peaks']) for name in _KERNELS
    }
    result['layers'].append(
      {
        'key': key,
        'group': group(first),
        'example': first.path,
        # In every step; the rest runs once.
        'count': sum(not _ONCE.fullmatch(x.path) for x in layers),
        'operations': 2 * batch * cost.macs(first),
        'seconds': times,
        'roofline_seconds': bounds,
      }
    )
    yield result


def group(layer: transform.Layer) -> str:
  """Kind of layer, and the pixels or tokens that it sees."""
  taps = layer.kernel_shape[:-2]
  kind = 'x'.join(map(str, taps)) + ' conv' if taps else 'linear'
  return f'{kind}, {math.prod(layer.output_shape[1:-1])} positions'


def roofline(
  layer: transform.Layer, kernel: str, batch: int, peaks: Mapping[str, float]
) -> float:
  """Seconds below which no kernel can be: by products, or by memory.

  It reads its input once and writes its output once, both bfloat16.
  """
  numbers = math.prod(layer.input_shape) + math.prod(layer.output_shape)
  weights = math.prod(layer.kernel_shape)
  size = {'bfloat16': 2.0, 'int8_packed': 0.5}.get(kernel, 1.0)
  moved = 2 * batch * numbers + size * weights
  products = 2 * batch * cost.macs(layer)
  return max(products / peaks[_KERNELS[kernel]], moved / peaks['bytes'])


def _time(
  layer: transform.Layer, kernel: str, batch: int, repeats: int
) -> float:
  """Seconds of one call."""
  rng = np.random.default_rng(0)
  shape = layer.kernel_shape
  values = rng.standard_normal((batch, *layer.input_shape[1:]), np.float32)
  x = jnp.asarray(values, jnp.bfloat16)
  bias = jnp.zeros(shape[-1], jnp.float32)
  weight = speed.nearest_on_host(
    rng.standard_normal(shape, np.float32),
    4 if kernel == 'int8_packed' else 8,
    True,
  )
  state = {'': transform.LayerState(weight=weight, act=speed.grid(8))}
  chosen = ('',) if kernel == 'bfloat16_codes' else ()
  prepared = integer.prepare(state, chosen)['']
  assert isinstance(prepared, integer.IntegerLayer)
  geometry = _geometry(layer) if layer.kind == 'conv' else ()

  def in_floats(kernel, bias, x):
    if layer.kind == 'conv':
      y = jax.lax.conv_general_dilated(
        x, kernel, *geometry, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
    else:
      y = x @ kernel
    return y + bias.astype(x.dtype)

  def on_integers(prepared, bias, x):
    ready = integer.ready(prepared)
    if layer.kind == 'conv':
      total = integer.conv(ready, x, *geometry, x.dtype)
    else:
      total = integer.dense(ready, x, x.dtype)
    return integer.rescale(ready, total, bias, x.dtype)

  floats = kernel == 'bfloat16'
  arrays = jax.device_put(
    jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
    if floats
    else prepared
  )
  run = jax.jit(in_floats if floats else on_integers)
  return min(
    timing.seconds(functools.partial(run, arrays, bias, x), repeats, _CALLS)
  )


def _geometry(layer: transform.Layer) -> tuple[Any, Any]:
  """Strides and padding of LDM's convolutions."""
  strides = tuple(
    -(-a // b)
    for a, b in zip(
      layer.input_shape[1:-1], layer.output_shape[1:-1], strict=True
    )
  )
  return strides, tuple((k // 2, k // 2) for k in layer.kernel_shape[:-2])


def _line(row: Mapping[str, Any]) -> str:
  times = ', '.join(
    f'{name} {1e3 * t:.3f} (bound {1e3 * row["roofline_seconds"][name]:.3f})'
    for name, t in row['seconds'].items()
  )
  return f'{row["count"]} x {row["key"]} ms: {times}'


def much_slower(result: Mapping[str, Any]) -> list[str]:
  """Layers whose int8 kernel cannot be the right one."""
  return [
    row['example']
    for row in result['layers']
    if row['count']
    and row['seconds']['int8'] > _MUCH * row['seconds']['bfloat16']
  ]


def group_table(result: Mapping[str, Any]) -> str:
  """Milliseconds of a step by groups of layers, and the least possible."""
  rows: list[Sequence[str]] = [
    ('group', *(f'{name} {what}' for name in _KERNELS for what in ('ms', '%')))
  ]
  groups: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
  for row in result['layers']:
    if row['count']:
      groups[row['group']].append(row)
  for name, members in (*groups.items(), ('all', result['layers'])):
    cells = [name]
    for kernel in _KERNELS:
      spent = sum(x['count'] * x['seconds'][kernel] for x in members)
      least = sum(x['count'] * x['roofline_seconds'][kernel] for x in members)
      share = least / spent if spent else 0.0
      cells += [f'{1e3 * spent:.3f}', f'{share:.0%}']
    rows.append(cells)
  return (
    f'{policy.format_table(rows)}\n'
    f'One step of {result["batch"]} images and halves of guidance; % is the '
    'roofline of measured peaks by the time.'
  )
