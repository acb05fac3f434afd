"""Which layers are quantized, to how many bits: regex rules over paths.

Rules are data, fit for a config: an ordered tuple of `(regex, bits)` where
`bits` is None (the layer stays in floating point) or a dict with

  w: bits of the weights (2..8), or None for floating point;
  a: bits of the layer's input (2..8), or None for floating point;
  reconstruct: False to leave the layer at nearest rounding and at its initial
    ranges when the rest of the network is reconstructed. True if not given.

A rule applies to the paths that its regex matches in full; the first such
rule wins. Layers quantize their input, so the output of the network is never
quantized.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from d2dpm_jax.quantization import affine

Rule = tuple[str, Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class LayerBits:
  """Bit widths of one layer; None means floating point.

  Attributes:
    w: bits of the kernel.
    a: bits of the input.
    reconstruct: whether rounding and step sizes are learned.
    reach: the range of the input is widened to [-reach, reach] at least.
  """

  w: int | None
  a: int | None
  reconstruct: bool = True
  reach: float = 0.0


# Path -> bits in execution order; None for layers left in floating point.
Policy = dict[str, LayerBits | None]


def layer_bits(bits: Mapping[str, Any] | None, where: str) -> LayerBits | None:
  """Reads the right-hand side of a rule.

  Args:
    bits: see the module docstring.
    where: names the rule in errors.

  Returns:
    The bits, or None for a layer left in floating point.

  Raises:
    ValueError: an unknown or missing key, or bits that are not supported.
  """
  if bits is None:
    return None
  unknown = sorted(set(bits) - {'w', 'a', 'reconstruct'})
  missing = sorted({'w', 'a'} - set(bits))
  if unknown or missing:
    raise ValueError(
      f'Rule {where!r}: unknown keys {unknown}, missing keys {missing}; '
      "expected 'w', 'a' and optionally 'reconstruct'."
    )
  widths: dict[str, Any] = {}
  for key in ('w', 'a'):
    try:
      widths[key] = None if bits[key] is None else affine.check_bits(bits[key])
    except ValueError as error:
      raise ValueError(f'Rule {where!r}, {key!r}: {error}') from error
  if widths['w'] is None and widths['a'] is None:
    raise ValueError(f'Rule {where!r}: give None instead of two Nones.')
  return LayerBits(**widths, reconstruct=bool(bits.get('reconstruct', True)))


def build_policy(paths: Iterable[Any], rules: Sequence[Rule]) -> Policy:
  """Applies rules to the layers of a model.

  Args:
    paths: paths, or layers with a `path` (see `transform.list_layers`), in
      execution order.
    rules: ordered `(regex, bits)`; the first full match wins.

  Returns:
    Bits of every path, in the order of `paths`.

  Raises:
    ValueError: a rule that matches no path, a path that no rule matches, a
      regex that does not compile, or bits that are not supported.
  """
  names = [p if isinstance(p, str) else p.path for p in paths]
  compiled = []
  for regex, bits in rules:
    try:
      pattern = re.compile(regex)
    except re.error as error:
      raise ValueError(f'Rule {regex!r} is no regex: {error}.') from error
    compiled.append((pattern, layer_bits(bits, regex)))
  unused = [p.pattern for p, _ in compiled if not any(map(p.fullmatch, names))]
  if unused:
    raise ValueError(
      f'Policy rules that match none of the {len(names)} layers: {unused}. '
      f'The first layers are {names[:5]}.'
    )
  policy: Policy = {}
  lost = []
  for name in names:
    for pattern, width in compiled:
      if pattern.fullmatch(name):
        policy[name] = width
        break
    else:
      lost.append(name)
  if lost:
    raise ValueError(f'No policy rule matches the layers {lost}.')
  return policy


def ldm_rules(
  w: int | None,
  a: int | None,
  *,
  edge_bits: int = 8,
  float_attention: bool = False,
) -> tuple[Rule, ...]:
  """Rules of the paper for a U-Net with the names of latent diffusion.

  First and last layers (the first linear of the time embedding, the input
  convolution, the output convolution) get `edge_bits` and are not
  reconstructed; residual `skip_connection` and down-sampling `op`
  convolutions stay in floating point; everything else gets `w`/`a`.

  Args:
    w: bits of the weights.
    a: bits of the activations.
    edge_bits: bits of weights and activations of first and last layers.
    float_attention: leaves every `qkv` and `proj_out` in floating point, as
      the paper does in models with AttentionBlock, where they are 1-d
      convolutions. Not for models with SpatialTransformer, whose `proj_out`
      is quantized in the paper.

  Returns:
    Rules for `build_policy`.
  """
  edge = dict(w=edge_bits, a=edge_bits, reconstruct=False)
  rules: list[Rule] = [
    (r'time_embed_0|input_blocks_0_0|out_2', edge),
    (r'(.*/)?(skip_connection|op)', None),
  ]
  if float_attention:
    rules.append((r'.*/(qkv|proj_out)', None))
  return (*rules, (r'.*', dict(w=w, a=a)))


def format_policy(policy: Policy, layers: Iterable[Any] = ()) -> str:
  """Table of every layer with the bits of its weights and of its input.

  Args:
    policy: path -> bits.
    layers: the model's layers (see `transform.list_layers`) for the columns
      kind, kernel and input; may be empty.

  Returns:
    Text of one line per layer, in order, and a line of counts.
  """
  known = {layer.path: layer for layer in layers}

  def shape(path, field):
    value = getattr(known.get(path), field, None)
    return '' if value is None else 'x'.join(map(str, value))

  def width(bits):
    return 'float' if bits is None else str(bits)

  rows = [('layer', 'kind', 'kernel', 'input', 'weight', 'act', 'learned')]
  for path, bits in policy.items():
    rows.append(
      (
        path,
        getattr(known.get(path), 'kind', ''),
        shape(path, 'kernel_shape'),
        shape(path, 'input_shape'),
        width(bits and bits.w),
        width(bits and bits.a),
        '' if bits is None else ('yes' if bits.reconstruct else 'no'),
      )
    )
  kept = sum(bits is None for bits in policy.values())
  return (
    f'{format_table(rows)}\n'
    f'{len(policy) - kept} layers quantized, {kept} in floating point.'
  )


def format_table(rows: Sequence[Sequence[str]]) -> str:
  """Lines up columns; the first row is the heading. Drops empty columns."""
  columns = [c for c in zip(*rows, strict=True) if any(c[1:])]
  widths = [max(map(len, column)) for column in columns]
  lines = [
    '  '.join(cell.ljust(n) for cell, n in zip(row, widths, strict=True))
    for row in zip(*columns, strict=True)
  ]
  lines.insert(1, '  '.join('-' * n for n in widths))
  return '\n'.join(line.rstrip() for line in lines)
