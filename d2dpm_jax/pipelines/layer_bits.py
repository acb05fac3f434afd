"""Layers of the U-Net, and what `config.quant` makes of them."""

import dataclasses
import re
from typing import Any

import ml_collections
import numpy as np

from d2dpm_jax.pipelines import setup
from d2dpm_jax.quantization import policy, transform, units


def layer_policy(
  model: setup.Model,
) -> tuple[policy.Policy, tuple[transform.Layer, ...]]:
  """Bits of every layer of the U-Net, see `config.quant`, and the layers.

  Raises:
    ValueError: nothing is quantized, or as `policy.build_policy`.
  """
  layers, quant = list_layers(model), model.config.quant
  table = policy.build_policy(layers, policy_rules(quant))
  if not any(table.values()):
    raise ValueError(
      'No layer is quantized: quant.edge_layers and quant.float_layers leave '
      'all of them in floating point.'
    )
  return _widened(table, quant.latent_layers, quant.latent_range), layers


def check_block_types(model: setup.Model) -> None:
  """Raises ValueError for a name in quant.block_types that no module has."""
  variables, *inputs = example_arguments(model)
  kinds = units.module_kinds(model.ldm.unet.apply, variables, inputs)
  known = kinds | set(units.BLOCK_TYPES)
  unknown = sorted(set(model.config.quant.block_types) - known)
  if unknown:
    raise ValueError(
      f'quant.block_types {unknown}: the network has {sorted(kinds)}.'
    )


def _widened(table: policy.Policy, pattern: str, reach: float) -> policy.Policy:
  """Gives the inputs of some layers a range of [-reach, reach] at least.

  Raises:
    ValueError: there is no such layer, or `reach` is negative.
  """
  if not 0 <= reach < float('inf'):
    raise ValueError(f'quant.latent_range is {reach}; expected >= 0.')
  try:
    found = [path for path in table if re.fullmatch(pattern, path)]
  except re.error as error:
    raise ValueError(
      f'quant.latent_layers {pattern!r} is no regex: {error}.'
    ) from error
  if reach and not found:
    raise ValueError(f'quant.latent_layers {pattern!r} matches no layer.')
  wide = {
    path: dataclasses.replace(bits, reach=float(reach))
    for path in found
    if (bits := table[path]) is not None
  }
  return table | wide


def policy_rules(quant: ml_collections.ConfigDict) -> list[policy.Rule]:
  """Rules that `config.quant` describes; an empty regex is none.

  Raises:
    ValueError: bits that are not in 2..8.
  """
  for name in ('weight_bits', 'act_bits', 'edge_bits'):
    if not 2 <= quant[name] <= 8:
      raise ValueError(f'quant.{name} is {quant[name]}; expected 2..8.')
  edge = dict(w=quant.edge_bits, a=quant.edge_bits, reconstruct=False)
  rules: list[policy.Rule] = [
    (quant.edge_layers, edge),
    (quant.float_layers, None),
    ('.*', dict(w=quant.weight_bits, a=quant.act_bits)),
  ]
  return [rule for rule in rules if rule[0]]


def list_layers(model: setup.Model) -> tuple[transform.Layer, ...]:
  """Layers of the U-Net for one image; the model may be an outline."""
  return transform.list_layers(model.ldm.unet.apply, *example_arguments(model))


def example_arguments(model: setup.Model) -> tuple[Any, ...]:
  """Variables and inputs of the U-Net for one image."""
  context = None
  if model.ldm.cond_stage is not None:
    context = np.zeros([1, 1, model.ldm.cond_stage.embed_dim], np.float32)
  x = np.zeros([1, *model.ldm.latent_shape], np.float32)
  variables = {'params': model.params['unet']}
  return variables, x, np.zeros([1], np.int32), context
