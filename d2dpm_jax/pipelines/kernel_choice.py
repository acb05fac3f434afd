"""Which layers run on int8 and which on bfloat16, where both are the same sums.

See `integer.prepare`. `config.quant.kernels` is 'auto', 'int8' (all of them),
or a layers.json that `benchmark.what=layers` has measured on the device.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from d2dpm_jax.pipelines import layer_bits, setup
from d2dpm_jax.quantization import transform
from d2dpm_jax.runtime import files

# Faster is meant beyond what measuring again changes.
_MARGIN = 1.03
# Of cuDNN on one H100: 3x3 convolutions of int8 lose on many pixels with few
# channels.
_MANY_PIXELS, _FEW_CHANNELS = 64 * 64, 384
# An int8 product hands over four bytes a number, to be read again, and one of
# bfloat16 two. At 3 TB/s and 700 against 1400 TOP/s that is paid for only by
# sums of more products than this (docs/performance.md).
_FEW_PRODUCTS = 1024
_ALIGNED = 4  # Channels; int8 kernels of GPUs come in words of four.


def in_bfloat16(model: setup.Model) -> frozenset[str]:
  """Paths of layers to be run in bfloat16.

  Raises:
    FileNotFoundError: `quant.kernels` names no file.
    ValueError: the file is not one of `benchmark.what=layers`, or it lacks a
      layer of this model.
  """
  kernels = model.config.quant.kernels
  if kernels == 'int8' or (
    kernels == 'auto' and jax.default_backend() != 'gpu'
  ):
    return frozenset()
  layers = layer_bits.list_layers(model)
  if kernels == 'auto':
    return frozenset(x.path for x in layers if _slow_in_int8(x))
  times = _measured(pathlib.Path(kernels))
  missing = [x.path for x in layers if key(x) not in times]
  if missing:
    raise ValueError(
      f'{kernels} has no times of {missing[:5]}: measure this model, with '
      '--mode benchmark --config.benchmark.what=layers'
    )
  return frozenset(
    x.path
    for x in layers
    if times[key(x)]['bfloat16_codes'] * _MARGIN < times[key(x)]['int8']
  )


def key(layer: transform.Layer) -> str:
  """What layers of equal work have in common."""
  sizes = (layer.kernel_shape, layer.input_shape[1:], layer.output_shape[1:])
  return ' '.join('x'.join(map(str, size)) for size in sizes)


def _slow_in_int8(layer: transform.Layer) -> bool:
  *_, inputs, outputs = layer.kernel_shape
  if inputs % _ALIGNED or outputs % _ALIGNED:
    return True
  if math.prod(layer.kernel_shape[:-1]) < _FEW_PRODUCTS:
    return True
  return (
    math.prod(layer.output_shape[1:-1]) >= _MANY_PIXELS
    and inputs < _FEW_CHANNELS
  )


def _measured(path: pathlib.Path) -> Mapping[str, Mapping[str, Any]]:
  """Seconds by kernel, by `key`."""
  if not path.is_file():
    raise FileNotFoundError(
      f"--config.quant.kernels={path}: expected 'auto', 'int8' or a layers.json"
      ' of --mode benchmark --config.benchmark.what=layers.'
    )
  try:
    rows = files.read_json(path)['layers']
    return {row['key']: row['seconds'] for row in rows}
  except (KeyError, TypeError) as error:
    raise ValueError(f'{path} is no layers.json: {error!r}.') from error
