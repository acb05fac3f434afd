"""A PyTorch checkpoint of latent diffusion as parameters of our model.

Every tensor of the file is used exactly once or named in the report with the
reason why it is not needed. Whatever does not fit is collected, and one error
names all of it.

Source of the names: CompVis/latent-diffusion, ldm/models/diffusion/ddpm.py
(`DDPM`, `LatentDiffusion`) and ldm/modules/ema.py (`LitEma`).
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.diffusion import schedule
from d2dpm_jax.models.latent_diffusion import LatentDiffusion

from . import names
from .torch_reader import TensorRef

# Part of the model -> prefix of its tensors.
_PREFIXES = {
  'unet': 'model.diffusion_model.',
  'first_stage': 'first_stage_model.',
  'cond_stage': 'cond_stage_model.',
}
_EMA = 'model_ema.'
_SCALE = 'scale_factor'
_ALPHAS = 'alphas_cumprod'
# float32 of the same float64 numbers; another schedule is off by 1e-2.
_ALPHAS_TOLERANCE = 1e-6

# What no image depends on: regex of the whole name -> why. The first counts.
_NOT_NEEDED = (
  (
    r'(alphas_cumprod|betas|alphas_cumprod_prev|sqrt_\w+|log_one_minus_\w+'
    r'|posterior_\w+|lvlb_weights)',
    'noise schedule: follows from config.model.schedule',
  ),
  (r'model_ema\.(decay|num_updates)', 'counter of the moving average'),
  (r'logvar', 'weight of the training loss'),
  (r'first_stage_model\.loss\..*', 'discriminator and perceptual loss'),
  (r'first_stage_model\.model_ema\..*', 'moving average LDM does not use'),
  (r'first_stage_model\.colorize', 'colours of segmentation maps'),
)


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of a checkpoint.

  Attributes:
    weights: 'ema' or 'raw', of the U-Net.
    mapped: parameter path -> name of its tensor.
    parameters: part of the model -> number of its parameters.
    ignored: name of a tensor -> why it is not needed.
    scale_factor: value and where it is from.
    schedule: what the schedule in the checkpoint says of the config's.
    training: counters of the training run, where the file has them.
  """

  weights: str
  mapped: dict[str, str]
  parameters: dict[str, int]
  ignored: dict[str, str]
  scale_factor: tuple[float, str]
  schedule: str
  training: dict[str, int]

  def summary(self) -> str:
    """A few lines for people."""
    counts = ', '.join(f'{k} {v:,}' for k, v in self.parameters.items())
    lines = [
      f'{len(self.mapped)} tensors mapped; parameters: {counts}',
      f'U-Net weights: {self.weights}',
      f'scale_factor: {self.scale_factor[0]:.8g} ({self.scale_factor[1]})',
      f'Noise schedule: {self.schedule}',
    ]
    lines += [
      f'{count} tensors not needed: {reason}'
      for reason, count in Counter(self.ignored.values()).items()
    ]
    return '\n'.join(lines)


def convert(
  tensors: Mapping[str, TensorRef],
  ldm: LatentDiffusion,
  *,
  use_ema: bool = True,
  scale_factor: float | None = 1.0,
  contents: Mapping[str, Any] | None = None,
  store: Callable[[np.ndarray], Any] = np.asarray,
  on_tensor: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Any], Report]:
  """Builds the parameters of `ldm` from the tensors of a checkpoint.

  Memory: the parameters in float32 and one tensor; tensors are read one by one.

  Args:
    tensors: of a `LatentDiffusion` state dict, unread.
    ldm: the architecture.
    use_ema: take the U-Net's moving average where there is one.
    scale_factor: for a checkpoint that holds none; None if it has to.
    contents: what else the file holds, for the report.
    store: keeps one parameter, float32 in our layout; returns a leaf.
    on_tensor: is called after each tensor, to show progress.

  Returns:
    `params` of `LatentDiffusion` and the report.

  Raises:
    ValueError: tensors are missing, unexpected, misshapen or not finite, or the
      noise schedule is another one; names all of them.
  """
  plan = _sort(tensors, use_ema)
  problems = plan.problems
  for _ in plan.ignored:
    on_tensor()
  mapped: dict[str, str] = {}
  params: dict[str, Any] = {}
  sizes = {}
  for part, target in _targets(ldm).items():
    sources = plan.parts[part]
    shapes = {name: tensors[source].shape for name, source in sources.items()}
    paths, found = names.assign(shapes, target, _PREFIXES[part])
    average = ', moving average' if plan.ema and part == 'unet' else ''
    problems += [f'{line} [{part}{average}]' for line in found]
    flat = {}
    for name, path in paths.items():
      source = sources[name]
      array = tensors[source].read()
      problem = _check_numbers(source, array)
      if problem:
        problems.append(problem)
      else:
        flat[path] = store(names.to_parameter(array, path, target))
      mapped[f'{part}/{path}'] = source
      on_tensor()
    params[part] = names.unflatten(flat)
    sizes[part] = sum(math.prod(shape) for shape in target.shapes.values())
  scale, origin = _scale_factor(tensors, scale_factor, problems)
  params[_SCALE] = store(np.asarray(scale, np.float32))
  if _SCALE in tensors:
    mapped[_SCALE] = _SCALE
    on_tensor()
  schedule_text = _check_schedule(tensors, ldm, problems)
  if problems:
    raise ValueError(_complaint(problems))
  return params, Report(
    weights='ema' if plan.ema else 'raw',
    mapped=mapped,
    parameters=sizes,
    ignored=plan.ignored,
    scale_factor=(scale, origin),
    schedule=schedule_text,
    training={
      key: value
      for key in ('epoch', 'global_step')
      if isinstance(value := (contents or {}).get(key), int)
    },
  )


def _targets(ldm: LatentDiffusion) -> dict[str, names.Target]:
  """What each part of the model needs; costs no memory."""

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  label = array(1, dtype=jnp.int32)
  size, channels = ldm.image_size, ldm.first_stage.in_channels
  context = ldm.cond_stage and array(1, 1, ldm.cond_stage.embed_dim)
  return {
    'unet': names.target_of(
      ldm.unet, array(1, *ldm.latent_shape), label, context
    ),
    'first_stage': names.target_of(
      ldm.first_stage, array(1, size, size, channels)
    ),
    'cond_stage': names.target_of(ldm.cond_stage, label)
    if ldm.cond_stage
    else names.Target({}, {}),
  }


@dataclasses.dataclass
class _Sorted:
  """Where the tensors of a checkpoint belong.

  Attributes:
    parts: part -> {name as in PyTorch's module: name in the file}; the two
      differ for the moving average.
    ignored: see `Report`.
    problems: tensors that belong nowhere or that are missing.
    ema: whether the U-Net is its moving average.
  """

  parts: dict[str, dict[str, str]]
  ignored: dict[str, str]
  problems: list[str]
  ema: bool


def _sort(tensors: Iterable[str], use_ema: bool) -> _Sorted:
  """Gives every tensor to a part, to the ignored, or to the problems."""
  parts: dict[str, dict[str, str]] = {part: {} for part in _PREFIXES}
  ignored, problems, averages = {}, [], []
  for name in tensors:
    reason = _reason_to_ignore(name)
    part = next((p for p, s in _PREFIXES.items() if name.startswith(s)), None)
    if reason:
      ignored[name] = reason
    elif part:
      parts[part][name] = name
    elif name.startswith(_EMA):
      averages.append(name)
    elif name != _SCALE:
      problems.append(f'unexpected: {name}')
  if not averages:
    return _Sorted(parts, ignored, problems, False)
  if not use_ema:
    reason = 'moving average: config.checkpoint.use_ema is False'
    ignored |= dict.fromkeys(averages, reason)
    return _Sorted(parts, ignored, problems, False)
  raw = parts['unet']
  averaged = {name: _average_of(name) for name in raw}
  missing = set(averaged.values()) - set(averages)
  problems += [f'missing: {name}' for name in missing]
  unknown = set(averages) - set(averaged.values())
  problems += [f'unexpected: {name}' for name in unknown]
  twice = [k for k, n in Counter(averaged.values()).items() if n > 1]
  problems += [f'repeated: {name} stands for several tensors' for name in twice]
  reason = 'raw weights: their moving average is used'
  ignored |= dict.fromkeys(raw, reason)
  parts['unet'] = {
    name: average for name, average in averaged.items() if average in averages
  }
  return _Sorted(parts, ignored, problems, True)


def _reason_to_ignore(name: str) -> str | None:
  for pattern, reason in _NOT_NEEDED:
    if re.fullmatch(pattern, name):
      return reason
  return None


def _average_of(name: str) -> str:
  """LitEma's name for the average of a parameter below 'model.'."""
  return _EMA + name.removeprefix('model.').replace('.', '')


def _check_numbers(name: str, array: np.ndarray) -> str | None:
  # NumPy does not count bfloat16 among its floating-point types.
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return f'not floating-point: {name} {array.dtype}'
  bad = array.size - np.count_nonzero(np.isfinite(array))
  return f'not finite: {name}, {bad} of {array.size} numbers' if bad else None


def _scale_factor(
  tensors: Mapping[str, TensorRef],
  default: float | None,
  problems: list[str],
) -> tuple[float, str]:
  """The factor that latents are multiplied with, and where it is from."""
  if _SCALE not in tensors:
    if default is None:
      problems.append(f'missing: {_SCALE}, which this model was trained with')
    return default or 1.0, 'not in the checkpoint: the default'
  if tensors[_SCALE].shape not in ((), (1,)):
    problems.append(f'misshapen: {_SCALE} {tensors[_SCALE].shape} for ()')
    return 1.0, ''
  value = tensors[_SCALE].read()
  problem = _check_numbers(_SCALE, value)
  if problem is None and not float(value.item()) > 0:
    problem = f'not positive: {_SCALE} {value.item()}'
  if problem is not None:
    problems.append(problem)
  return float(value.item()), 'of the checkpoint'


def _check_schedule(
  tensors: Mapping[str, TensorRef],
  ldm: LatentDiffusion,
  problems: list[str],
) -> str:
  """Compares the checkpoint's noise schedule with the model's, if it has one.

  Nothing else would show a wrong schedule: all shapes fit, and images are bad.
  """
  if _ALPHAS not in tensors:
    return 'not in the checkpoint, so not checked'
  want = schedule.linear_schedule(
    ldm.num_timesteps, ldm.beta_start, ldm.beta_end
  )
  found = tensors[_ALPHAS].read().astype(np.float64)
  if found.shape != want.shape:
    problems.append(f'misshapen: {_ALPHAS} {found.shape} for {want.shape}')
    return ''
  error = float(np.abs(found - want).max())
  if not error <= _ALPHAS_TOLERANCE:
    betas = 1 - found / np.append(1.0, found[:-1])
    problems.append(
      f'another noise schedule: {_ALPHAS} differs by {error:.2g}; betas in the '
      f'checkpoint run from {betas[0]:.4g} to {betas[-1]:.4g}, in the config '
      f'from {ldm.beta_start:.4g} to {ldm.beta_end:.4g}'
    )
  return f"the config's, to {error:.1g}"


def _complaint(problems: Iterable[str]) -> str:
  """All problems in one message, by kind."""
  kinds: dict[str, list[str]] = {}
  for line in problems:
    kind, _, what = line.partition(': ')
    kinds.setdefault(kind, []).append(what)
  parts = [
    f'{kind} ({len(lines)}): {", ".join(sorted(lines))}'
    for kind, lines in sorted(kinds.items())
  ]
  hint = ''
  if kinds.keys() & {'missing', 'unexpected', 'misshapen'}:
    hint = (
      '\nFor a model of another size give its YAML: '
      '--config.checkpoint.ldm_yaml'
    )
  return (
    'the checkpoint does not fit the model of this config, so nothing was '
    'written.\n' + ';\n'.join(parts) + '.' + hint
  )
