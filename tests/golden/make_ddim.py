"""Writes ddim_trajectories.npz: the original DDIM sampler in float64.

The arrays come from DDIMSampler of CompVis/latent-diffusion (commit
a506df5756472e2ebaf9078affdde2c4f1502cd4), run as it is, in double precision, on
a small closed-form network and with given noise. A second, plain NumPy loop
below has to agree with it before anything is written.

  git clone https://github.com/CompVis/latent-diffusion
  pip install numpy torch einops tqdm pillow
  python tests/golden/make_ddim.py --ldm latent-diffusion
"""

import argparse
import importlib
import os
import sys

import numpy as np

SHAPE = (4, 2, 5, 3)  # B, H, W, C: all different.
LABELS = np.array([1.0, 2.0, 3.0, 4.0])  # 0 is "no condition".
T = 1000
BETAS = (0.0015, 0.0195)
CASES = tuple(
  (steps, eta, scale)
  for steps, eta in ((20, 0.0), (20, 1.0), (250, 1.0))
  for scale in (1.0, 3.0)
)
TABLES = ((1, 1.0), (7, 0.5), (20, 0.0), (20, 1.0), (30, 1.0), (250, 1.0))


def name(steps, eta, scale):
  return f'steps{steps}_eta{eta:g}_scale{scale:g}'


def network(x, t, label):
  """Smooth, bounded gain, and every axis matters; arrays [B, H, W, C], [B]."""
  u = np.reshape(t, (-1, 1, 1, 1)) / T
  label = np.reshape(label, (-1, 1, 1, 1))
  mixed = 0.7 * x + 0.2 * np.roll(x, 1, 1) - 0.1 * np.roll(x, 1, (2, 3))
  return np.tanh(3 * u) * mixed + 0.25 * np.sin(0.5 * x + label + 2 * u)


def draw(seed, *shape):
  """Normal numbers that float16 holds, so that they can be stored small."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def alphas_cumprod():
  betas = np.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, T) ** 2
  return np.cumprod(1 - betas)


def loop(steps, eta, scale, x, noise):
  """The same in NumPy, step by step: arXiv:2010.02502, Eq. 12."""
  abar = alphas_cumprod()
  stride = T // steps
  times = [1 + stride * i for i in range(-(-T // stride))]
  xs = []
  for i, t in enumerate(reversed(times)):
    xs.append(x)
    a = abar[t]
    prev = abar[t - stride] if t > 1 else abar[0]
    sigma = eta * np.sqrt((1 - prev) / (1 - a)) * np.sqrt(1 - a / prev)
    tt = np.full(len(x), t)
    eps = network(x, tt, LABELS)
    if scale != 1:
      null = network(x, tt, 0 * LABELS)
      eps = null + scale * (eps - null)
    x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
    x = np.sqrt(prev) * x0 + np.sqrt(1 - prev - sigma**2) * eps
    x = x + sigma * noise[i]
  return x, np.stack(xs)


def original(checkout):
  """The module ldm.models.diffusion.ddim of a checkout, on the CPU."""
  for key in [k for k in sys.modules if k.split('.')[0] == 'ldm']:
    del sys.modules[key]
  sys.path.insert(0, os.path.abspath(checkout))
  module = importlib.import_module('ldm.models.diffusion.ddim')
  del sys.path[0]
  return module


def model(torch, apply=network):
  """What a DDIMSampler asks of a LatentDiffusion, around `apply`."""

  class Model:
    num_timesteps = T
    device = 'cpu'
    parameterization = 'eps'
    alphas_cumprod = torch.from_numpy(alphas_cumprod())
    alphas_cumprod_prev = torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / alphas_cumprod_prev

    def apply_model(self, x, t, label):
      x = x.permute(0, 2, 3, 1).numpy()
      eps = apply(x, t.numpy(), label.numpy())
      return torch.from_numpy(eps).permute(0, 3, 1, 2).contiguous()

  return Model()


def run_original(module, sampler, steps, eta, scale, x, noise):
  """x_0 and all x_t of an original sampler object, in NHWC."""
  import torch

  def nchw(a):
    return torch.from_numpy(np.float64(a)).permute(0, 3, 1, 2)

  noises = iter(noise)
  module.noise_like = lambda *_: nchw(next(noises))
  sampler.register_buffer = lambda key, value: setattr(sampler, key, value)
  x_0, seen = sampler.sample(
    S=steps,
    batch_size=len(x),
    shape=(x.shape[3], *x.shape[1:3]),
    conditioning=torch.from_numpy(LABELS),
    unconditional_conditioning=torch.from_numpy(0 * LABELS),
    unconditional_guidance_scale=scale,
    eta=eta,
    x_T=nchw(x),
    log_every_t=1,
    verbose=False,
  )
  xs = torch.stack(seen['x_inter'][:-1]).permute(0, 1, 3, 4, 2)
  return x_0.permute(0, 2, 3, 1).numpy(), xs.numpy()


def write(file, arrays):
  path = os.path.join(os.path.dirname(os.path.abspath(__file__)), file)
  np.savez_compressed(path, **arrays)
  print(path, os.path.getsize(path), 'bytes')


def main():
  import torch

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--ldm', required=True, help='CompVis/latent-diffusion')
  module = original(parser.parse_args().ldm)
  torch.set_default_dtype(torch.float64)

  out = dict(alphas_cumprod=alphas_cumprod())
  for steps, eta in TABLES:
    sampler = module.DDIMSampler(model(torch))
    sampler.register_buffer = lambda k, v, s=sampler: setattr(s, k, v)
    sampler.make_schedule(steps, ddim_eta=eta, verbose=False)
    key = f'table_steps{steps}_eta{eta:g}'
    out[f'{key}_t'] = np.asarray(sampler.ddim_timesteps, np.int32)
    for column in ('alphas', 'alphas_prev', 'sigmas'):
      value = np.asarray(getattr(sampler, f'ddim_{column}'), np.float64)
      out[f'{key}_{column}'] = value
  for steps in sorted({case[0] for case in CASES}):
    out[f'steps{steps}_x_T'] = draw(steps, *SHAPE)
    out[f'steps{steps}_noise'] = draw(steps + 1, steps, *SHAPE)
  for steps, eta, scale in CASES:
    given = (
      np.float64(out[f'steps{steps}_x_T']),
      np.float64(out[f'steps{steps}_noise']),
    )
    x_0, xs = run_original(
      module, module.DDIMSampler(model(torch)), steps, eta, scale, *given
    )
    again, again_xs = loop(steps, eta, scale, *given)
    np.testing.assert_allclose(again, x_0, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(again_xs, xs, rtol=1e-10, atol=1e-10)
    print(name(steps, eta, scale), 'largest |x|', np.abs(xs).max())
    out[f'{name(steps, eta, scale)}_x_0'] = x_0
    out[f'{name(steps, eta, scale)}_x'] = xs[:: steps // 5]
  write('ddim_trajectories.npz', out)


if __name__ == '__main__':
  main()
