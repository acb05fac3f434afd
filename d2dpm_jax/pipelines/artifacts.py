"""What calibration leaves behind: a quantized model and its error models.

`quantized/` holds all that sampling needs: packed weights and grids of the
quantized layers, and every other parameter in floating point, those of the
first stage and of the condition too.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from d2dpm_jax.denoising import gaussian, selection
from d2dpm_jax.pipelines import generation, kernel_choice, setup
from d2dpm_jax.quantization import cost, integer, packing, transform
from d2dpm_jax.runtime import files, weights

_log = logging.getLogger(__name__)

# 1: a byte per code, and no other parameters. 2: all of these in float32.
FORMAT = 3
# Fields of config.quant that decide what the quantized network is; the others
# only say how it was found.
_STRUCTURE = (
  'weight_bits',
  'act_bits',
  'edge_bits',
  'edge_layers',
  'float_layers',
  'float_dtype',
  'per_channel',
)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
  """A model with quantizers and error models; what sampling takes.

  Attributes:
    model: the full-precision model that the quantizers belong to. Of
      `load_alone` it has float32[0] for kernels that are quantized.
    qstate: path -> quantizers of `quantization.transform`; empty for the
      full-precision network itself.
    error_models: 'tensor' and 'channel' -> joint Gaussians of all steps.
    held_out: how corrections did on images that they were not fitted on, for
      the correction 'auto'.
    prepared: what `executable` returns, if that is made already; then the
      parameters of `model` are what `network_params` returns.
  """

  model: setup.Model
  qstate: transform.QuantState
  error_models: Mapping[str, gaussian.ErrorModel]
  held_out: selection.HeldOut | None = None
  prepared: integer.IntegerState | None = None

  def executable(self) -> integer.IntegerState:
    """Quantized layers as programs take them, see `generation.executable`."""
    if self.prepared is not None:
      return self.prepared
    quant = self.model.config.quant
    kernels = kernel_choice.choose(self.model)
    return generation.executable(
      self.qstate,
      quant.execution,
      kernels.in_bfloat16,
      quant.unpack_first,
      kernels.fused,
    )

  def network_params(self) -> Any:
    """Parameters for that, see `generation.network_params`."""
    if self.prepared is not None:
      return self.model.params
    return generation.network_params(
      self.model.params, {**self.qstate}, self.model.config.quant.float_dtype
    )

  def statistics(
    self, correction: str, channel_wise: bool
  ) -> gaussian.ErrorModel | selection.HeldOut | None:
    """Those that a correction uses; None for 'none'.

    Raises:
      ValueError: there are none, or they were made for another sampler.
    """
    if correction == 'none':
      return None
    kind = 'channel' if channel_wise else 'tensor'
    found: gaussian.ErrorModel | selection.HeldOut | None = (
      self.held_out if correction == 'auto' else self.error_models.get(kind)
    )
    if found is None:
      raise ValueError(
        f'There are no error statistics for the correction {correction!r}: run '
        "--mode calibrate, or set --config.sample.correction='none'."
      )
    different = files.differences(
      {'sampler': found.settings.get('sampler', {})},
      {'sampler': sampler_settings(self.model)},
    )
    if different:
      raise ValueError(
        f'The error statistics were made with {"; ".join(different)}. Use '
        'these settings, or calibrate in another --workdir.'
      )
    return found


def full_precision(model: setup.Model) -> Quantized:
  """The model itself, for `sample`.

  Raises:
    ValueError: it comes from a calibration alone and has no such weights.
  """
  if not all(np.size(x) for x in jax.tree.leaves(model.params['unet'])):
    raise ValueError(
      'A model that was read from a calibration alone has no full-precision '
      'weights: name them with --config.checkpoint.path.'
    )
  return Quantized(model, {}, {})


def structure(model: setup.Model) -> dict[str, Any]:
  """Settings that the quantized network depends on."""
  quant = setup.plain(model.config.quant)
  return {
    'format': FORMAT,
    **model.identity(),
    'quant': {name: quant[name] for name in _STRUCTURE},
  }


def sampler_settings(model: setup.Model) -> dict[str, Any]:
  """Settings that error statistics depend on."""
  return setup.plain(model.config.sampler)


def save(quantized: Quantized, paths: files.Workdir) -> None:
  """Writes the quantized model (Orbax) and error models (.npz)."""
  for kind, error_model in quantized.error_models.items():
    error_model.save(paths.error_model(kind))
  if quantized.held_out is not None:
    quantized.held_out.save(paths.held_out)
  # Last: a directory with quantizers is a finished calibration.
  weights.save_tree(
    paths.quantized,
    jax.device_get(_stored(quantized)),
    structure(quantized.model),
  )


def _stored(quantized: Quantized) -> dict[str, Any]:
  """The tree in `quantized/`."""
  qstate = transform.pack_state(quantized.qstate)
  params = traverse_util.flatten_dict(
    generation.network_params(
      quantized.model.params,
      {**qstate},
      quantized.model.config.quant.float_dtype,
    )
  )
  return {
    'layers': {
      # Orbax takes '/' in a name for a folder.
      path.replace('/', '.'): sides
      for path, sides in transform.state_to_arrays(qstate).items()
    },
    'params': traverse_util.unflatten_dict(
      {name: x for name, x in params.items() if np.size(x)}
    ),
  }


def log_sizes(quantized: Quantized) -> None:
  """Says what the U-Net takes as it is stored, and while it runs."""
  sizes, parts = unet_bytes(quantized), stored_parts(quantized)
  execution = quantized.model.config.quant.execution
  _log.info(
    'U-Net: %.1f MB in float32; %.1f MB stored (%.4fx: %s), %.1f MB on each '
    'device (%.4fx, %s execution)',
    sizes['float32'] / 1e6,
    sizes['stored'] / 1e6,
    sizes['stored'] / sizes['float32'],
    ', '.join(f'{k} {v / sizes["float32"]:.4f}' for k, v in parts.items()),
    sizes['device'] / 1e6,
    sizes['device'] / sizes['float32'],
    execution,
  )


def unet_bytes(quantized: Quantized) -> dict[str, int]:
  """Bytes of the parameters of the U-Net, without activations.

  Returns:
    'float32'; 'stored', in `quantized/` before compression; 'device', while it
    runs: simulated execution has kernels in float32 there.
  """
  stored = _stored(quantized)
  kernels = sum(
    4 * int(np.prod(packing.pack(layer['weight']).shape))
    for layer in quantized.qstate.values()
    if layer['weight'] is not None
  )
  floats = stored['params']['unet']
  return {
    'float32': kernels + sum(4 * x.size for x in jax.tree.leaves(floats)),
    'stored': sum(stored_parts(quantized).values()),
    'device': cost.array_bytes((floats, quantized.executable())),
  }


def stored_parts(quantized: Quantized) -> dict[str, int]:
  """Bytes of the U-Net in `quantized/`, by what they are.

  Returns:
    'codes', 'grids', 'kernels' (of layers in floating point), 'biases' and
    'norms'.
  """
  stored = _stored(quantized)
  parts = dict.fromkeys(('codes', 'grids', 'kernels', 'biases', 'norms'), 0)
  for sides in stored['layers'].values():
    parts['grids'] += cost.array_bytes(sides)
    if 'weight' in sides:
      codes = cost.array_bytes(sides['weight']['data'])
      parts['codes'] += codes
      parts['grids'] -= codes
  params = traverse_util.flatten_dict(stored['params']['unet'])
  for (*path, name), x in params.items():
    kind = 'kernels'
    if name != 'kernel':
      kind = 'norms' if (*path, 'scale') in params else 'biases'
    parts[kind] += x.nbytes
  return parts


def is_finished(paths: files.Workdir) -> bool:
  """Whether a work directory holds a finished calibration."""
  return weights.is_complete(paths.quantized)


def _not_finished(paths: files.Workdir) -> FileNotFoundError:
  return FileNotFoundError(
    f'{paths.root} holds no finished calibration. Run the same command with '
    '--mode calibrate first, or name its directory with --workdir.'
  )


def saved_settings(paths: files.Workdir) -> dict[str, Any]:
  """`structure` and 'sampler' of a calibration on disk.

  config.json does not tell: it is that of the latest run of any mode.

  Raises:
    FileNotFoundError: this work directory has no finished calibration.
  """
  try:
    found = gaussian.ErrorModel.load(paths.error_model('tensor'))
  except FileNotFoundError as error:
    raise _not_finished(paths) from error
  return dict(found.settings)


def load(model: setup.Model, paths: files.Workdir) -> Quantized:
  """Reads what `save` wrote, for a full-precision model that is there.

  Raises:
    FileNotFoundError: this work directory has no finished calibration.
    ValueError: it was made for another model, other bits or another format;
      the message names both values.
  """
  tree, saved = _read(paths)
  return _assemble(model, tree, saved, paths)


def load_alone(
  config: ml_collections.ConfigDict, paths: files.Workdir
) -> Quantized:
  """Reads what `save` wrote; no checkpoint is needed.

  Raises:
    FileNotFoundError: this work directory has no finished calibration.
    ValueError: as `load`; and as `setup.load` for a bad config.
  """
  config, ldm = setup.checked(config)
  tree, saved = _read(paths)
  model = setup.Model(config, ldm, None, saved['weights'])
  quantized = _assemble(model, tree, saved, paths)
  absent = [
    f'unet/{path}/kernel'
    for path, layer in quantized.qstate.items()
    if layer['weight'] is not None
  ]
  flat = traverse_util.flatten_dict(tree['params'], sep='/')
  setup.check_shapes(tree['params'], ldm, paths.quantized, absent)
  flat |= {name: np.zeros([0], np.float32) for name in absent}
  params = traverse_util.unflatten_dict(flat, sep='/')
  params.setdefault('cond_stage', {})  # Of an unconditional model.
  return dataclasses.replace(
    quantized, model=dataclasses.replace(model, params=params)
  )


def _read(paths: files.Workdir) -> tuple[Any, dict[str, Any]]:
  """The tree in `quantized/`, and `structure` of its model.

  Raises:
    FileNotFoundError: this work directory has no finished calibration.
    ValueError: it has another format, or is damaged.
  """
  try:
    saved = weights.load_meta(paths.quantized)
    if saved.get('format') != FORMAT:
      raise ValueError(
        f'{paths.quantized} has format {saved.get("format")}, but this version '
        f'reads format {FORMAT}: run --mode calibrate again, in another '
        '--workdir.'
      )
    return weights.load_tree(paths.quantized)
  except FileNotFoundError as error:
    raise _not_finished(paths) from error


def _assemble(
  model: setup.Model, tree: Any, saved: Mapping[str, Any], paths: files.Workdir
) -> Quantized:
  different = files.differences(saved, structure(model))
  if different:
    raise ValueError(
      f'The calibration in {paths.root} was made with other settings: '
      f'{"; ".join(different)}. Use these, or calibrate in another --workdir.'
    )
  qstate = transform.state_from_arrays(
    {path.replace('.', '/'): sides for path, sides in tree['layers'].items()}
  )
  error_models = {
    kind: gaussian.ErrorModel.load(paths.error_model(kind), structure(model))
    for kind in ('tensor', 'channel')
  }
  held = None  # Calibrations from before there was any have none.
  if paths.held_out.is_file():
    held = selection.HeldOut.load(paths.held_out, structure(model))
  return Quantized(model, qstate, error_models, held)
