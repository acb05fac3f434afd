"""`benchmark.what=cost`: size and bit operations, from shapes alone."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from d2dpm_jax.pipelines import generation, layer_bits, setup
from d2dpm_jax.quantization import cost, policy, transform
from d2dpm_jax.runtime import files

_log = logging.getLogger(__name__)

# Bits of weights and activations; the config's own are added if they differ.
_SETTINGS: dict[str, tuple[int | None, int | None]] = {
  'FP32': (None, None),
  'W8A8': (8, 8),
  'W4A8': (4, 8),
}
# Key of a setting's result -> its column; divided by the unit that it names.
_COLUMNS = {
  'unet_bytes': 'U-Net MiB',
  'model_bytes': 'model MiB',
  'quantized_bops': 'quantized TBOPs',
  'layer_bops': 'all layers TBOPs',
  'network_bops': 'network TBOPs',
  'released_bytes': 'released: MiB',
  'released_bops': 'released: TBOPs',
}


def report(config: ml_collections.ConfigDict, paths: files.Workdir) -> None:
  """Prints totals, writes them and every layer to benchmark/cost.*."""
  result = measure(config)
  print(totals_table(result))
  text, data = paths.benchmark('cost.txt'), paths.benchmark('cost.json')
  with files.atomic_write(text, 'w') as file:
    file.write(f'{layer_table(result)}\n\n{totals_table(result)}\n')
  files.write_json(data, result)
  _log.info('Wrote %s and %s', text, data)


def measure(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Costs of one forward of the U-Net for one image, at every setting.

  Neither reads nor makes weights.

  Args:
    config: an experiment; `config.quant` says which layers stay in floating
      point and at which bits first and last layers are.

  Returns:
    What cost.json holds; all numbers are exact integers.
      network: counts of layers, parameters and multiplications.
      settings: name -> bytes and BOPs, see `quantization.cost`.
      layers: shapes and multiplications of each, and its cost by setting.
      model, quant: what of the config it depends on.

  Raises:
    ValueError: bits that are not supported, or a regex without a match.
  """
  model = setup.outline(config)
  quant = model.config.quant
  settings = dict(_SETTINGS)
  own = (quant.weight_bits, quant.act_bits)
  if own not in settings.values():
    settings[f'W{own[0]}A{own[1]}'] = own
  layers = layer_bits.list_layers(model)
  table = policy.build_policy(layers, layer_bits.policy_rules(quant))
  layer_macs = sum(map(cost.macs, layers))
  variables, *inputs = layer_bits.example_arguments(model)
  # Products of two activations, in attention: of no layer, never quantized.
  products = (
    cost.count_macs(model.ldm.unet.apply, variables, *inputs) - layer_macs
  )
  rows = [_describe(layer, table) for layer in layers]
  result: dict[str, Any] = {
    'model': setup.plain(model.config.model),
    'quant': setup.plain(quant),
    'network': {
      'quantized_layers': sum(bits is not None for bits in table.values()),
      'float_layers': sum(bits is None for bits in table.values()),
      'parameters': cost.array_bytes(model.params['unet']) // 4,
      'layer_macs': layer_macs,
      'attention_macs': products,
    },
    'settings': {},
    'layers': rows,
  }
  for name, (w, a) in settings.items():
    bits = _with_bits(quant, layers, w, a)
    costs = [
      cost.layer_cost(layer, bits[layer.path], quant.per_channel)
      for layer in layers
    ]
    for row, each in zip(rows, costs, strict=True):
      width = bits[row['path']]
      row['settings'][name] = {
        'w': width and width.w,
        'a': width and width.a,
        'bytes': each.bytes,
        'bops': each.bops,
      }
    unet = cost.network_bytes(
      model.params['unet'],
      layers,
      bits,
      quant.per_channel,
      generation.float_type(quant.float_dtype).itemsize,
    )
    rest = cost.array_bytes(model.params) - cost.array_bytes(
      model.params['unet']
    )
    layer_bops = sum(each.bops for each in costs)
    result['settings'][name] = {
      'unet_bytes': unet,
      'model_bytes': unet + rest,
      'quantized_bops': sum(
        each.bops
        for row, each in zip(rows, costs, strict=True)
        if row['quantized']
      ),
      'layer_bops': layer_bops,
      'network_bops': layer_bops + cost.bops(products, None, None),
      'released_bytes': cost.released_bytes(model.params, w),
      'released_bops': cost.released_bops(layers, table, w, a),
    }
  return result


def _with_bits(
  quant: ml_collections.ConfigDict,
  layers: Sequence[transform.Layer],
  w: int | None,
  a: int | None,
) -> policy.Policy:
  """The config's policy at other bits; (None, None) is full precision."""
  if w is None and a is None:
    return {layer.path: None for layer in layers}
  other = quant.copy_and_resolve_references()
  other.update(weight_bits=w, act_bits=a)
  return policy.build_policy(layers, layer_bits.policy_rules(other))


def _describe(layer: transform.Layer, table: policy.Policy) -> dict[str, Any]:
  return {
    'path': layer.path,
    'kind': layer.kind,
    'kernel_shape': layer.kernel_shape,
    'input_shape': layer.input_shape,
    'output_shape': layer.output_shape,
    'quantized': table[layer.path] is not None,
    'macs': cost.macs(layer),
    'released_macs': cost.released_macs(layer),
    'settings': {},
  }


def totals_table(result: Mapping[str, Any]) -> str:
  """A line per setting; in brackets, how many times less than FP32."""
  rows = [('setting', *_COLUMNS.values())]
  full = result['settings']['FP32']
  for name, values in result['settings'].items():
    cells = [name]
    for key in _COLUMNS:
      unit = 2**20 if key.endswith('bytes') else 1e12
      digits = 2 if full[key] >= unit else 4
      cell = f'{values[key] / unit:.{digits}f}'
      if values is not full:
        cell += f' ({full[key] / values[key]:.2f}x)'
      cells.append(cell)
    rows.append(tuple(cells))
  network = result['network']
  return (
    f'{policy.format_table(rows)}\n'
    f'{network["quantized_layers"]} layers quantized, '
    f'{network["float_layers"]} in floating point; '
    f'{network["parameters"] / 1e6:.2f} M parameters, '
    f'{network["layer_macs"] / 1e9:.4g} GMACs in layers, '
    f'{network["attention_macs"] / 1e9:.4g} in attention; '
    'one forward of one image.'
  )


def layer_table(result: Mapping[str, Any]) -> str:
  """A line per layer: multiplications, and bits, KiB and GBOPs by setting."""
  names = list(result['settings'])
  rows = [
    (
      *('layer', 'kind', 'kernel', 'output', 'MMACs', 'released: MMACs'),
      *(f'{n} {what}' for n in names for what in ('bits', 'KiB', 'GBOPs')),
    )
  ]
  for layer in result['layers']:
    cells = [
      layer['path'],
      layer['kind'],
      'x'.join(map(str, layer['kernel_shape'])),
      'x'.join(map(str, layer['output_shape'])),
      f'{layer["macs"] / 1e6:.3f}',
      f'{layer["released_macs"] / 1e6:.3f}',
    ]
    for name in names:
      each = layer['settings'][name]
      cells += [
        f'{each["w"] or "float"}/{each["a"] or "float"}',
        f'{each["bytes"] / 1024:.1f}',
        f'{each["bops"] / 1e9:.3f}',
      ]
    rows.append(tuple(cells))
  return policy.format_table(rows)
