r"""Quantizes and corrects a network that is not of this package.

A small diffusion transformer (arXiv:2212.09748) in plain Flax Linen learns to
draw white shapes; it is quantized from outside, its errors are fitted, and
the sampler takes them off. docs/extend.md goes through it step by step.

  PYTHONPATH=. python examples/own_model.py    # One or two minutes.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2dpm_jax.denoising import correction, selection, statistics
from d2dpm_jax.diffusion import ddim, noise, sampler, schedule
from d2dpm_jax.quantization import (
  integer,
  integer_model,
  policy,
  reconstruction,
  transform,
)

Array = jax.Array
SIZE, CHANNELS, CLASSES = 12, 1, 4


@dataclasses.dataclass(frozen=True)
class Settings:
  """How long and how precisely; the defaults make docs/extend.md."""

  train_steps: int = 1500
  depth: int = 3
  weight_bits: int = 4
  act_bits: int = 8
  iters: int = 200  # Of AdaRound, per block.
  calibration_images: int = 128
  trial_images: int = 32  # On which `auto` is tried before it is used.
  images: int = 128  # Those that PSNR is of.
  sampling_steps: int = 20
  eta: float = 0.0
  seed: int = 0


# ---- Any network: nothing here is of d2dpm_jax


class Block(nn.Module):
  """Attention and MLP of tokens, modulated by a condition (adaLN-Zero)."""

  heads: int = 4

  @nn.compact
  def __call__(self, x: Array, condition: Array) -> Array:
    width = x.shape[-1]
    zeros = nn.initializers.zeros
    mods = nn.Dense(6 * width, kernel_init=zeros, name='modulation')(
      nn.silu(condition)
    )
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
      mods[:, None], 6, axis=-1
    )
    norm = functools.partial(nn.LayerNorm, use_bias=False, use_scale=False)
    h = norm()(x) * (1 + scale1) + shift1
    h = nn.Dense(3 * width, name='qkv')(h)
    h = h.reshape(*x.shape[:2], 3, self.heads, -1)
    h = nn.dot_product_attention(h[:, :, 0], h[:, :, 1], h[:, :, 2])
    x = x + gate1 * nn.Dense(width, name='proj')(h.reshape(x.shape))
    h = norm()(x) * (1 + scale2) + shift2
    h = nn.gelu(nn.Dense(4 * width, name='mlp_in')(h))
    return x + gate2 * nn.Dense(width, name='mlp_out')(h)


class Dit(nn.Module):
  """eps(x float32[B, H, W, C], t int32[B], label int32[B]) -> like x."""

  width: int = 64
  depth: int = 3
  patch: int = 2

  @nn.compact
  def __call__(self, x: Array, t: Array, label: Array) -> Array:
    p = self.patch
    h = nn.Conv(self.width, (p, p), (p, p), 'VALID', name='patches')(x)
    batch, rows, columns, _ = h.shape
    h = h.reshape(batch, rows * columns, self.width)
    h += self.param('place', nn.initializers.normal(0.1), h.shape[1:])
    waves = jnp.exp(-np.log(1e4) * jnp.arange(32) / 32)
    angles = t[:, None].astype(jnp.float32) * waves
    c = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    c = nn.silu(nn.Dense(self.width, name='time_0')(c))
    c = nn.Dense(self.width, name='time_1')(c)
    c += nn.Embed(CLASSES, self.width, name='label')(label)
    for i in range(self.depth):
      h = Block(name=f'block_{i}')(h, c)
    h = nn.LayerNorm()(h)
    h = nn.Dense(p * p * x.shape[-1], name='out')(h)
    h = h.reshape(batch, rows, columns, p, p, -1)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def draw(key: Array, count: int) -> tuple[Array, Array]:
  """White discs, squares, crosses and stripes on black.

  Returns:
    (float32[N, 12, 12, 1] in [-1, 1], labels int32[N]).
  """
  keys = jax.random.split(key, 3)
  label = jax.random.randint(keys[0], (count,), 0, CLASSES)
  middle = jax.random.uniform(keys[1], (2, count, 1, 1), minval=4, maxval=7)
  radius = jax.random.uniform(keys[2], (count, 1, 1), minval=2, maxval=4)
  place = jnp.arange(SIZE, dtype=jnp.float32)
  dy = jnp.abs(place[:, None] - middle[0])
  dx = jnp.abs(place - middle[1])
  square = radius - jnp.maximum(dy, dx)
  kinds = jnp.stack(  # Above 0 inside of the shape.
    [
      radius - jnp.hypot(dy, dx),
      square,
      jnp.minimum(square, 1 - jnp.minimum(dy, dx)),
      jnp.minimum(square, jnp.cos(dx * np.pi / 2)),
    ]
  )
  return jnp.tanh(2 * kinds[label, jnp.arange(count)])[..., None], label


def train(model: Dit, alphas_cumprod: np.ndarray, s: Settings) -> Any:
  """`{'params': ...}` that minimise E|eps - eps_theta(x_t, t, label)|^2."""
  alphas = jnp.asarray(alphas_cumprod, jnp.float32)
  shape = (1, SIZE, SIZE, CHANNELS)
  one = jnp.zeros(1, jnp.int32)
  variables = model.init(jax.random.key(s.seed), jnp.zeros(shape), one, one)
  decay = optax.cosine_decay_schedule(2e-3, s.train_steps)
  optimizer = optax.adam(decay)

  def loss(variables, key):
    keys = jax.random.split(key, 3)
    x0, label = draw(keys[0], 32)
    t = jax.random.randint(keys[1], (32,), 0, len(alphas))
    a = alphas[t][:, None, None, None]
    eps = jax.random.normal(keys[2], x0.shape)
    x = jnp.sqrt(a) * x0 + jnp.sqrt(1 - a) * eps
    return jnp.mean(jnp.square(model.apply(variables, x, t, label) - eps))

  @jax.jit
  def step(variables, state, key):
    value, slope = jax.value_and_grad(loss)(variables, key)
    change, state = optimizer.update(slope, state)
    return optax.apply_updates(variables, change), state, value

  state, values = optimizer.init(variables), []
  for number in range(s.train_steps):
    key = jax.random.fold_in(jax.random.key(s.seed + 1), number)
    variables, state, value = step(variables, state, key)
    values.append(value)
  print(f'Trained: loss {np.mean(values[-50:]):.4f}')
  return variables


# ---- The method, on any `model.apply(variables, x, t, condition)`


@dataclasses.dataclass(frozen=True)
class Problem:
  """A network, its sampler, and images to come.

  Attributes:
    model: eps(x, t, label).
    variables: `{'params': ...}`.
    rows: of `ddim.ddim_rows`.
    seed: of all noise.
  """

  model: nn.Module
  variables: Any
  rows: ddim.Rows
  seed: int

  def sampler(
    self,
    eps: Callable[..., Array],
    first: int,
    count: int,
    **options: Any,
  ) -> Callable[..., Any]:
    """Makes images first .. first + count - 1; `eps` is of (x, t, label).

    Returns:
      A jitted function of a table of corrections, or of nothing.
    """
    key, index = noise.seed_key(self.seed), first + jnp.arange(count)
    label, shape = index % CLASSES, (SIZE, SIZE, CHANNELS)

    @jax.jit
    def run(correction_rows=None):
      return sampler.sample(
        lambda x, t, table: eps(x, t, label),
        self.rows,
        noise.initial_noise(key, index, shape),
        noise.noise_stream(key, index, shape),
        correction_rows=correction_rows,
        **options,
      )

    return run

  def sample(self, eps: Callable[..., Array], *images: int, **options: Any):
    """What `sampler` makes, not corrected."""
    return self.sampler(eps, *images, **options)()

  def full_precision(self, x: Array, t: Array, label: Array) -> Array:
    return self.model.apply(self.variables, x, t, label)

  def quantized(self, state: transform.QuantState) -> Callable[..., Array]:
    """The network with these quantizers, simulated in floating point."""
    apply = transform.quantize(self.model.apply)
    return functools.partial(apply, self.variables, state)

  def on_integers(self, state: transform.QuantState) -> Callable[..., Array]:
    """The same network on int8."""
    layers = integer.prepare(state)
    variables = integer_model.without_kernels(self.variables, layers)
    return functools.partial(
      integer_model.apply(self.model.apply), variables, layers
    )

  def calibration_set(self, count: int) -> tuple[Array, Array, Array]:
    """x, t, label: a random point of each of `count` trajectories."""
    _, x = self.sample(
      self.full_precision, 0, count, collect=lambda step: step.x
    )
    keys = jax.random.split(jax.random.key(self.seed))
    step = jax.random.randint(keys[0], (count,), 0, len(self.rows.t))
    index = jax.random.permutation(keys[1], count)
    t = jnp.asarray(self.rows.t)[step]
    return x[step, index], t, index % CLASSES

  def quantize(
    self, s: Settings, iters: int
  ) -> tuple[policy.Policy, transform.QuantState]:
    """Bits of all layers, and quantizers: BRECQ, or nearest if iters = 0."""
    inputs = self.calibration_set(s.calibration_images)
    layers = transform.list_layers(self.model.apply, self.variables, *inputs)
    edge = dict(w=8, a=8, reconstruct=False)
    inner = dict(w=s.weight_bits, a=s.act_bits)
    rules = [(r'patches|time_0|out', edge), (r'.*', inner)]
    table = policy.build_policy(layers, rules)
    found = reconstruction.reconstruct(
      self.model.apply,
      self.variables,
      table,
      inputs,
      key=jax.random.key(self.seed),
      settings=reconstruction.Settings(
        iters=iters,
        lr=1e-2,  # For hundreds of iterations; 1e-3 is for thousands.
        batch_size=16,
        act_iters=iters // 2,
        act_init_samples=s.calibration_images,
      ),
      block_types=('Block',),
    )
    return table, found.state

  def fit_errors(
    self, state: transform.QuantState, count: int
  ) -> statistics.Statistics:
    """Asks both networks at the points of full-precision trajectories."""
    quantized, index = self.quantized(state), jnp.arange(count)

    def collect(step: sampler.Step):
      eps_q = quantized(step.x, step.t, index % CLASSES)
      return step.x, step.eps, eps_q

    _, arrays = self.sample(self.full_precision, 0, count, collect=collect)
    return statistics.fit_arrays(self.rows.t, *arrays)

  def corrected(
    self, state: transform.QuantState, kind: str, *images: int
  ) -> Callable[[statistics.Statistics], Array]:
    """Images of the quantized network, corrected with what is known."""
    run = self.sampler(
      self.quantized(state), *images, correct=correction.CORRECTIONS[kind]
    )
    return lambda errors: run(errors.rows(kind, self.rows.t))

  def settled(
    self,
    state: transform.QuantState,
    errors: statistics.Statistics,
    *images: int,
  ) -> statistics.Statistics:
    """Keeps of `auto` what helps over whole trajectories of new images."""
    wanted = self.sample(self.full_precision, *images)
    corrected = self.corrected(state, 'auto', *images)

    def distance(held_out: selection.HeldOut) -> float:
      got = corrected(errors._replace(held_out=held_out))
      by_image = jnp.mean(jnp.square(got - wanted), axis=(1, 2, 3))
      return float(jnp.mean(jnp.log(by_image)))

    held_out, _ = selection.settle(errors.held_out, distance)
    return errors._replace(held_out=held_out)


def psnr(images: Any, wanted: Any) -> float:
  """dB, of images in [-1, 1]."""
  error = np.asarray(images, np.float64) - np.asarray(wanted, np.float64)
  return float(10 * np.log10(4 / np.mean(np.square(error))))


def compare(
  problem: Problem, state: transform.QuantState, s: Settings
) -> dict[str, float]:
  """PSNR to full precision, of images that nothing was fitted to.

  Returns:
    correction -> dB; 'integers' is the network on int8, not corrected.
  """
  errors = problem.fit_errors(state, s.calibration_images)
  if s.trial_images:
    tried_on = s.calibration_images, s.trial_images
    errors = problem.settled(state, errors, *tried_on)
  images = s.calibration_images + s.trial_images, s.images
  wanted = problem.sample(problem.full_precision, *images)
  got = {'none': problem.sample(problem.quantized(state), *images)}
  for kind in ('d-d2', 'auto'):
    got[kind] = problem.corrected(state, kind, *images)(errors)
  got['integers'] = problem.sample(problem.on_integers(state), *images)
  return {kind: psnr(value, wanted) for kind, value in got.items()}


def trained(s: Settings) -> Problem:
  """A network that can draw, and its sampler."""
  alphas_cumprod = schedule.linear_schedule(1000, 0.0015, 0.0195)
  model = Dit(depth=s.depth)
  variables = train(model, alphas_cumprod, s)
  rows = ddim.ddim_rows(alphas_cumprod, s.sampling_steps, s.eta)
  return Problem(model, variables, rows, s.seed)


def run(s: Settings) -> None:
  """Trains, quantizes to nearest and by BRECQ, corrects, prints."""
  problem = trained(s)
  for name, iters in (('nearest', 0), ('BRECQ', s.iters)):
    table, state = problem.quantize(s, iters)
    layers = integer.prepare(state).values()
    count = sum(isinstance(x, integer.IntegerLayer) for x in layers)
    print(f'{name}: {count} of {len(table)} layers run on integers')
    for kind, value in compare(problem, state, s).items():
      print(f'  {kind:9} {value:6.2f} dB')


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  for field in dataclasses.fields(Settings):
    kind = type(field.default)
    parser.add_argument(f'--{field.name}', type=kind, default=field.default)
  run(Settings(**vars(parser.parse_args())))


if __name__ == '__main__':
  main()
