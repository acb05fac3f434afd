"""Units as flat dicts of NumPy arrays, fit for `np.savez`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from d2dpm_jax.quantization import affine
from d2dpm_jax.quantization.reports import REPORT_FIELDS, UnitReport
from d2dpm_jax.quantization.units import Unit

# Quantizer by (path of the layer, 'weight' or 'act').
Quantizers = dict[tuple[str, str], Any]
Arrays = dict[str, Any]

_SIDES: dict[str, Any] = {'weight': affine.QWeight, 'act': affine.QParams}


def _keys(path: str, side: str) -> dict[str, str]:
  """Field of a quantizer -> name of its array."""
  names = [field.name for field in dataclasses.fields(_SIDES[side])]
  return {name: f'{path}:{side}:{name}' for name in names}


def to_arrays(quantizers: Quantizers, report: UnitReport) -> Arrays:
  """What `from_arrays` needs."""
  arrays: Arrays = {}
  for (path, side), value in quantizers.items():
    for field, key in _keys(path, side).items():
      arrays[key] = np.asarray(getattr(value, field))
  for field in REPORT_FIELDS:
    arrays[f'report:{field}'] = np.asarray(getattr(report, field))
  return arrays


def from_arrays(
  arrays: Mapping[str, Any],
  unit: Unit,
  phase: str,
  bits: Mapping[tuple[str, str], int],
  kernel_shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Quantizers, UnitReport]:
  """Takes over what `to_arrays` gave in an earlier run.

  Args:
    arrays: the stored ones.
    unit: whose they should be.
    phase: 'weight' or 'act'.
    bits: of every quantizer that should be there.
    kernel_shapes: by path of the layer.

  Raises:
    ValueError: arrays are missing or unexpected, or of other bits or shapes.
  """
  name = f'{phase}/{unit.path}'
  expected = {f'report:{field}' for field in REPORT_FIELDS}
  for path, side in bits:
    expected.update(_keys(path, side).values())
  if set(arrays) != expected:
    raise ValueError(
      f'Stored unit {name!r}: missing {sorted(expected - set(arrays))}, '
      f'unexpected {sorted(set(arrays) - expected)}.'
    )
  found: Quantizers = {}
  for (path, side), width in bits.items():
    values = {f: np.asarray(arrays[k]) for f, k in _keys(path, side).items()}
    stored = int(values.pop('bits'))
    if stored != width:
      raise ValueError(
        f'Stored unit {name!r} has {stored} bits for {side} of {path!r}; '
        f'{width} are asked for.'
      )
    if side == 'weight' and values['codes'].shape != kernel_shapes[path]:
      raise ValueError(
        f'Stored unit {name!r}: codes {values["codes"].shape} do not fit '
        f'the kernel {kernel_shapes[path]} of {path!r}.'
      )
    found[path, side] = _SIDES[side](**values, bits=width)
  facts = {f: np.asarray(arrays[f'report:{f}']).item() for f in REPORT_FIELDS}
  return found, UnitReport(unit, phase, **facts)


def names(units: Iterable[Unit], phases: Iterable[str]) -> list[str]:
  """Names of all that are stored in a run, in order."""
  paths = [unit.path for unit in units]
  return [f'{phase}/{path}' for phase in phases for path in paths]
