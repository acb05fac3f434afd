"""What calibration leaves behind: quantizers and error models, on disk."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from d2dpm_jax.denoising import gaussian, selection
from d2dpm_jax.pipelines import setup
from d2dpm_jax.quantization import transform
from d2dpm_jax.runtime import files, weights

FORMAT = 1
# Fields of config.quant that decide what the quantized network is; the others
# only say how it was found.
_STRUCTURE = (
  'weight_bits',
  'act_bits',
  'edge_bits',
  'edge_layers',
  'float_layers',
  'per_channel',
)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
  """A model with quantizers and error models; what sampling takes.

  Attributes:
    model: the full-precision model that the quantizers belong to.
    qstate: path -> quantizers of `quantization.transform`; empty for the
      full-precision network itself.
    error_models: 'tensor' and 'channel' -> joint Gaussians of all steps.
    held_out: how corrections did on images that they were not fitted on, for
      the correction 'auto'.
  """

  model: setup.Model
  qstate: transform.QuantState
  error_models: Mapping[str, gaussian.ErrorModel]
  held_out: selection.HeldOut | None = None

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
  """Writes quantizers (Orbax) and error models (.npz)."""
  for kind, error_model in quantized.error_models.items():
    error_model.save(paths.error_model(kind))
  if quantized.held_out is not None:
    quantized.held_out.save(paths.held_out)
  # Last: a directory with quantizers is a finished calibration.
  tree = {
    # Orbax takes '/' in a name for a folder.
    path.replace('/', '.'): sides
    for path, sides in transform.state_to_arrays(quantized.qstate).items()
  }
  weights.save_tree(
    paths.quantized, jax.device_get(tree), structure(quantized.model)
  )


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
  """Reads what `save` wrote.

  Raises:
    FileNotFoundError: this work directory has no finished calibration.
    ValueError: it was made for another model, other bits or another format;
      the message names both values.
  """
  try:
    tree, saved = weights.load_tree(paths.quantized)
  except FileNotFoundError as error:
    raise _not_finished(paths) from error
  different = files.differences(saved, structure(model))
  if different:
    raise ValueError(
      f'The calibration in {paths.root} was made with other settings: '
      f'{"; ".join(different)}. Use these, or calibrate in another --workdir.'
    )
  qstate = transform.state_from_arrays(
    {path.replace('.', '/'): sides for path, sides in tree.items()}
  )
  error_models = {
    kind: gaussian.ErrorModel.load(paths.error_model(kind), structure(model))
    for kind in ('tensor', 'channel')
  }
  held = None  # Calibrations from before there was any have none.
  if paths.held_out.is_file():
    held = selection.HeldOut.load(paths.held_out, structure(model))
  return Quantized(model, jax.tree.map(np.asarray, qstate), error_models, held)
