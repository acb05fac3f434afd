"""Trajectories on every device: what calibration and sampling both run."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2dpm_jax.denoising import correction as corrections
from d2dpm_jax.diffusion import ddim, noise, sampler, schedule
from d2dpm_jax.models import folding
from d2dpm_jax.models.latent_diffusion import LatentDiffusion
from d2dpm_jax.quantization import integer, integer_model, transform
from d2dpm_jax.runtime import images
from d2dpm_jax.runtime.microbatches import Program

Array = jax.Array

EXECUTIONS = ('simulated', 'integer')  # Of quantized layers.
FLOAT_DTYPES = ('float32', 'bfloat16')  # Of what is not quantized.


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
  """Which trajectory: DDIM steps, eta, classifier-free guidance scale."""

  steps: int = 20
  eta: float = 0.0
  guidance_scale: float = 3.0

  @property
  def scale(self) -> np.float32 | None:
    """Of guidance, as programs take it; None is none."""
    guided = self.guidance_scale != 1
    return np.float32(self.guidance_scale) if guided else None


class Inputs(NamedTuple):
  """Arguments of a program that are the same for every image."""

  params: Any  # Of the LatentDiffusion.
  qstate: Any  # Of `executable`, or {} for the full-precision network.
  correction_rows: Any  # Of denoising.correction, or None.
  key: Array  # Root of all noise.
  guidance_scale: Any  # `SamplerSettings.scale`.


class StepInputs(NamedTuple):
  """Arguments of a program for one step, the same for every image."""

  inputs: Inputs  # `correction_rows` is one row, like `row`.
  row: ddim.Rows  # Scalars.


def step_inputs(
  inputs: Inputs, rows: ddim.Rows, step: int, correct: Any = None
) -> StepInputs:
  """Arguments for step number `step`, `correct` being its correction's row."""
  row = jax.tree.map(lambda column: column[step], rows)
  return StepInputs(inputs._replace(correction_rows=correct), row)


def check_execution(execution: str) -> None:
  """Raises ValueError for an unknown `quant.execution`."""
  if execution not in EXECUTIONS:
    raise ValueError(
      f'quant.execution {execution!r}: expected one of {list(EXECUTIONS)}.'
    )


def executable(
  qstate: transform.QuantState,
  execution: str,
  in_bfloat16: Collection[str] = (),
  unpack_first: bool | None = None,
  fused: bool = False,
) -> integer.IntegerState:
  """Quantizers as programs take them.

  Args:
    qstate: quantizers.
    execution: 'simulated' or 'integer', see `config.quant.execution`.
    in_bfloat16: see `integer.prepare`.
    unpack_first: likewise; None does so on CPUs.
    fused: likewise.

  Raises:
    ValueError: an unknown `execution`.
  """
  check_execution(execution)
  if execution == 'simulated':
    return integer.simulate(qstate)
  if unpack_first is None:
    unpack_first = jax.default_backend() == 'cpu'
  return integer.prepare(qstate, in_bfloat16, unpack_first, fused)


def float_type(name: str) -> np.dtype:
  """Type of the numbers that stay float in a quantized network.

  Raises:
    ValueError: an unknown `quant.float_dtype`.
  """
  if name not in FLOAT_DTYPES:
    raise ValueError(
      f'quant.float_dtype {name!r}: expected one of {list(FLOAT_DTYPES)}.'
    )
  return jnp.dtype(name)


def network_params(
  params: Any, qstate: integer.IntegerState, float_dtype: str
) -> Any:
  """Parameters for the quantized network.

  Args:
    params: of the LatentDiffusion.
    qstate: of `executable`; {} is the full-precision network.
    float_dtype: `config.quant.float_dtype`.

  Returns:
    `params` without the U-Net's kernels that `qstate` holds as codes; what is
    left of the U-Net is rounded to `float_dtype`.
  """
  if not qstate:
    return params
  variables = integer_model.without_kernels({'params': params['unet']}, qstate)
  dtype = float_type(float_dtype)
  unet = jax.tree.map(
    # Empty ones stand for dequantized kernels, which are float32.
    lambda x: x.astype(dtype) if x.size else x,
    variables['params'],
  )
  return {**params, 'unet': unet}


def rows_of(ldm: LatentDiffusion, settings: SamplerSettings) -> ddim.Rows:
  alphas_cumprod = schedule.linear_schedule(
    ldm.num_timesteps, ldm.beta_start, ldm.beta_end
  )
  return ddim.ddim_rows(alphas_cumprod, settings.steps, settings.eta)


def balanced_labels(seed: int, index: np.ndarray, classes: int) -> np.ndarray:
  """Label of image k, a function of (seed, k): every run of `classes` images
  that begins at a multiple of `classes` holds each class once, shuffled.

  Args:
    seed: of the run.
    index: int[B], image numbers.
    classes: number of real classes, without the null class.

  Returns:
    int32[B].
  """
  labels = np.empty(len(index), np.int32)
  blocks, places = np.divmod(np.asarray(index), classes)
  for block in np.unique(blocks):
    order = np.random.default_rng([seed, block]).permutation(classes)
    labels[blocks == block] = order[places[blocks == block]]
  return labels


def _eps_fn(
  ldm: LatentDiffusion,
  inputs: Inputs,
  labels: Array,
  timesteps: Any,
) -> tuple[sampler.EpsFn, Any]:
  """The guided network of one microbatch, quantized if there is a qstate.

  Args:
    ldm: the architecture.
    inputs: parameters, quantizers and the guidance scale.
    labels: int32[B].
    timesteps: int[S], all that it will be called with.

  Returns:
    The `eps_fn` of `sampler.sample`, and the tables [S, ..] whose rows it gets.
  """
  variables = {'params': inputs.params['unet']}
  simulated: transform.QuantState = {
    path: layer
    for path, layer in inputs.qstate.items()
    if not isinstance(layer, integer.IntegerLayer)
  }
  layers = integer_model.ready(inputs.qstate)
  if simulated:
    # Weights are dequantized here, once, and not in every sampling step.
    variables = transform.dequantize_variables(variables, simulated)
    layers |= {
      path: transform.LayerState(weight=None, act=layer['act'])
      for path, layer in simulated.items()
    }
  given = None
  if ldm.cond_stage is not None:
    null = jnp.full([1], ldm.null_label, jnp.int32)
    given = ldm.context(inputs.params, jnp.append(labels, null))
  if not layers and ldm.unet.dtype != jnp.float32:
    x, t = jnp.zeros([1, *ldm.latent_shape]), jnp.zeros([1])
    context = None if given is None else given[:1]
    variables = folding.round_parameters(
      ldm.unet.apply, variables, x, t, context
    )
  apply = functools.partial(
    integer_model.apply(ldm.unet.apply), variables, layers
  )
  # Most of what is traced for constants is dead code, but fused kernels would
  # not be recognized as that.
  constants = folding.compute(
    functools.partial(
      integer_model.apply(ldm.unet.apply),
      variables,
      integer_model.plain(layers),
    ),
    ldm.latent_shape,
    jnp.asarray(timesteps),
    given,
  )

  def network(x, t, by_image, by_step):
    # What attends to it is folded, but the network wants to see a context.
    context = None if given is None else jnp.zeros((len(x), *given.shape[1:]))
    row = folding.Constants(by_step, by_image)
    return folding.apply(apply, row, x, t, context)

  if given is None:
    return (
      ddim.classifier_free(
        lambda x, t, _, row: network(x, t, {}, row), inputs.guidance_scale
      ),
      constants.by_step,
    )
  eps_fn = ddim.classifier_free(
    network,
    inputs.guidance_scale,
    jax.tree.map(lambda a: a[:-1], constants.by_image),
    jax.tree.map(lambda a: a[-1:], constants.by_image),
  )
  return eps_fn, constants.by_step


def _remembered(build: Callable[..., Program]) -> Callable[..., Program]:
  """One program for all that asks for the same one.

  Guidance is no part of the question: its scale is one of the inputs.
  """
  programs = functools.lru_cache(maxsize=64)(build)  # An experiment has many.

  @functools.wraps(build)
  def remembered(
    ldm: LatentDiffusion, settings: SamplerSettings, *rest: Any
  ) -> Program:
    return programs(
      ldm, dataclasses.replace(settings, guidance_scale=1.0), *rest
    )

  return remembered


@_remembered
def sample_program(
  ldm: LatentDiffusion,
  settings: SamplerSettings,
  correction: str,
  microbatch: int,
) -> Program:
  """Compiles noise -> images.

  Returns:
    (Inputs, index int32[B], labels int32[B]) -> {'images': uint8[B,H,W,C],
    'latents': float32[B,h,w,c]} for any B.
  """
  rows = rows_of(ldm, settings)
  correct = corrections.CORRECTIONS[correction]

  def microbatch_fn(inputs: Inputs, index: Array, labels: Array):
    stream = functools.partial(
      noise.noise_stream, inputs.key, index, ldm.latent_shape
    )
    draws = correction in corrections.DRAWS_NOISE
    eps_fn, tables = _eps_fn(ldm, inputs, labels, rows.t)
    latents = sampler.sample(
      eps_fn,
      rows,
      noise.initial_noise(inputs.key, index, ldm.latent_shape),
      noise_fn=stream() if settings.eta else None,
      correct=correct,
      correction_rows=inputs.correction_rows,
      error_noise_fn=stream(noise.Stream.ERROR) if draws else None,
      tables=tables,
    )
    decoded = ldm.decode(inputs.params, latents)
    return {'images': images.to_uint8(decoded), 'latents': latents}

  return Program(microbatch, microbatch_fn)


@functools.lru_cache(maxsize=8)
def decode_program(ldm: LatentDiffusion, microbatch: int) -> Program:
  """Compiles latents -> images, the end of `sample_program`.

  Returns:
    (Inputs, latents float32[B,h,w,c]) -> uint8[B,H,W,C].
  """
  return Program(
    microbatch, lambda inputs, z: images.to_uint8(ldm.decode(inputs.params, z))
  )


@_remembered
def trajectory_program(
  ldm: LatentDiffusion, settings: SamplerSettings, microbatch: int
) -> Program:
  """Compiles noise -> every x_t and guided eps of the network on the way.

  Returns:
    (Inputs, index int32[B], labels int32[B]) -> {'x', 'eps'}, each
    float32[B,S,h,w,c] in sampling order.
  """
  rows = rows_of(ldm, settings)

  def microbatch_fn(inputs: Inputs, index: Array, labels: Array):
    shape = ldm.latent_shape
    stream = noise.noise_stream(inputs.key, index, shape)
    eps_fn, tables = _eps_fn(ldm, inputs, labels, rows.t)
    _, seen = sampler.sample(
      eps_fn,
      rows,
      noise.initial_noise(inputs.key, index, shape),
      noise_fn=stream if settings.eta else None,
      tables=tables,
      collect=lambda step: {'x': step.x, 'eps': step.eps},
    )
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), seen)

  return Program(microbatch, microbatch_fn)


@_remembered
def eps_program(
  ldm: LatentDiffusion, settings: SamplerSettings, microbatch: int
) -> Program:
  """Compiles given trajectories -> guided eps at each of their points.

  Returns:
    (Inputs, x float32[B,S,h,w,c], labels int32[B]) -> float32[B,S,h,w,c].
  """
  rows = rows_of(ldm, settings)

  def microbatch_fn(inputs: Inputs, x: Array, labels: Array):
    eps_fn, tables = _eps_fn(ldm, inputs, labels, rows.t)

    def step(_, scanned):
      x_t, t, table = scanned
      return None, eps_fn(x_t, jnp.full(x_t.shape[:1], t, jnp.int32), table)

    _, eps = jax.lax.scan(step, None, (jnp.moveaxis(x, 1, 0), rows.t, tables))
    return jnp.moveaxis(eps, 0, 1)

  return Program(microbatch, microbatch_fn)


@_remembered
def pair_program(
  ldm: LatentDiffusion, settings: SamplerSettings, microbatch: int
) -> Program:
  """Compiles x_t -> guided eps of both networks at it, for any timestep.

  Returns:
    (StepInputs, x float32[B,h,w,c], labels int32[B]) -> {'eps', 'eps_q'}, each
    float32[B,h,w,c]. The parameters have one entry more, 'full': those of the
    U-Net in full precision.
  """

  def microbatch_fn(step: StepInputs, x: Array, labels: Array):
    params = step.inputs.params
    full = {**params, 'unet': params['full']}
    networks = {
      'eps': step.inputs._replace(params=full, qstate={}),
      'eps_q': step.inputs,
    }
    t = jnp.full(x.shape[:1], step.row.t, jnp.int32)
    out = {}
    for name, inputs in networks.items():
      eps_fn, tables = _eps_fn(ldm, inputs, labels, t[:1])
      out[name] = eps_fn(x, t, jax.tree.map(lambda row: row[0], tables))
    return out

  return Program(microbatch, microbatch_fn)


@_remembered
def advance_program(
  ldm: LatentDiffusion,
  settings: SamplerSettings,
  correction: str,
  microbatch: int,
) -> Program:
  """Compiles one step of the sampler from an eps_q that is there already.

  Returns:
    (StepInputs, index int32[B], x, eps_q float32[B,h,w,c]) -> x of the next
    step, float32[B,h,w,c].
  """

  def microbatch_fn(step: StepInputs, index: Array, x: Array, eps_q: Array):
    stream = functools.partial(
      noise.noise_stream, step.inputs.key, index, ldm.latent_shape
    )
    draws = correction in corrections.DRAWS_NOISE
    row, correction_row = jax.tree.map(
      lambda leaf: leaf[None], (step.row, step.inputs.correction_rows)
    )
    return sampler.sample(
      lambda *_: eps_q,
      row,
      x,
      noise_fn=stream() if settings.eta else None,
      correct=corrections.CORRECTIONS[correction],
      correction_rows=correction_row,
      error_noise_fn=stream(noise.Stream.ERROR) if draws else None,
    )

  return Program(microbatch, microbatch_fn)
