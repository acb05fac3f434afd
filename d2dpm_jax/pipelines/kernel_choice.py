"""Which kernels run which layers; all compute the same sums.

See `integer.prepare`. `config.quant.kernels` is

- 'fused': those of `quantization/kernels`, where a layer fits them;
- 'int8': XLA's for int8;
- a layers.json that `benchmark.what=layers` has measured on the device: XLA's
  for int8 or for bfloat16, whichever took less time;
- 'auto': 'fused' on NVIDIA Hopper. On other GPUs int8 or bfloat16 by a rule,
  elsewhere int8.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from d2dpm_jax.pipelines import layer_bits, setup
from d2dpm_jax.quantization import fused, transform
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
_HOPPER = '9.0'  # Compute capability.


class Kernels(NamedTuple):
  """What `integer.prepare` is told.

  Attributes:
    in_bfloat16: paths of layers to be run in bfloat16.
    fused: whether others are run by `quantization/kernels` where they fit.
  """

  in_bfloat16: frozenset[str]
  fused: bool


def has_fused() -> bool:
  """Whether the devices run the kernels of `quantization/kernels`."""
  return (
    jax.default_backend() == 'gpu'
    and str(getattr(jax.devices()[0], 'compute_capability', '')) == _HOPPER
  )


def choose(model: setup.Model) -> Kernels:
  """What `config.quant.kernels` says for these devices.

  Raises:
    FileNotFoundError: `quant.kernels` names no file.
    ValueError: the file is not one of `benchmark.what=layers`, it lacks a layer
      of this model, or the devices have no fused kernels.
  """
  kernels = model.config.quant.kernels
  narrow = model.config.model.dtype == 'bfloat16'
  can = kernels in ('auto', 'fused') and narrow and has_fused()
  if kernels == 'fused' and not narrow:
    raise ValueError(
      '--config.quant.kernels=fused is for --config.model.dtype=bfloat16, not '
      f"{model.config.model.dtype}: set that, or take 'auto'."
    )
  if kernels == 'fused' and not can:
    raise ValueError(
      '--config.quant.kernels=fused needs an NVIDIA GPU of compute capability '
      f"{_HOPPER}, and this is {jax.devices()[0].device_kind}: take 'auto'."
    )
  if kernels == 'int8' or (
    kernels == 'auto' and jax.default_backend() != 'gpu'
  ):
    return Kernels(frozenset(), False)
  layers = layer_bits.list_layers(model)
  if kernels in ('auto', 'fused'):
    slow = [
      x.path for x in layers if _slow_in_int8(x) and not (can and _fits(x))
    ]
    return Kernels(frozenset(slow), can)
  return Kernels(_faster_in_bfloat16(kernels, layers), False)


def _faster_in_bfloat16(
  kernels: str, layers: Sequence[transform.Layer]
) -> frozenset[str]:
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


def _fits(layer: transform.Layer) -> bool:
  """Whether the fused kernels take it, given enough images."""
  same = layer.input_shape[1:-1] == layer.output_shape[1:-1]
  return same and fused.takes(layer.kernel_shape)


def _measured(path: pathlib.Path) -> Mapping[str, Mapping[str, Any]]:
  """Seconds by kernel, by `key`."""
  if not path.is_file():
    raise FileNotFoundError(
      f"--config.quant.kernels={path}: expected 'auto', 'fused', 'int8' or a "
      'layers.json of --mode benchmark --config.benchmark.what=layers.'
    )
  try:
    rows = files.read_json(path)['layers']
    return {row['key']: row['seconds'] for row in rows}
  except (KeyError, TypeError) as error:
    raise ValueError(f'{path} is no layers.json: {error!r}.') from error
