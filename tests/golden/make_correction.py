"""Writes correction_trajectories.npz: corrected DDIM runs in float64.

The arrays come from the NumPy loop below, written number by number from the
formulas of arXiv:2501.08180 and arXiv:2305.10657. Before anything is written,
all that the released samplers do as intended has to agree with it: those of
TaylorJocelyn/D2-DPM (commit dafed700e16488dfee0895583f7f4113bd13d1cd; S-D2 with
either statistics, with absorption, D-D2 tensor-wise, and channel-wise at
eta = 0, where its slip about sigma cannot show) and of ziplab/PTQD (commit
6b190f94b459ca869bf165509454c8676c3a62be).

  git clone https://github.com/TaylorJocelyn/D2-DPM
  git clone https://github.com/ziplab/PTQD
  pip install numpy torch einops tqdm pillow
  python tests/golden/make_correction.py --d2dpm D2-DPM --ptqd PTQD
"""

import argparse

import make_ddim
import numpy as np

STEPS = 20
SCALE = 3.0
CHANNELS = 3
# Steps, in sampling order, whose statistics are made special.
CLAMPED_UP, CLAMPED_DOWN, NEGATIVE_K, LARGE = 4, 9, 12, 19
KINDS = (
  'none',
  's_d2',
  's_d2_absorb',
  'd_d2',
  'ptqd',
  'mean_only',
  'variance_only',
)
GROUPINGS = ('tensor', 'channel')
ETAS = (0.0, 1.0)


def quantized(x, t, label):
  """The network of make_ddim with an error that depends on its output."""
  eps = make_ddim.network(x, t, label)
  label = np.reshape(label, (-1, 1, 1, 1))
  return 1.04 * eps + 0.03 * np.sin(3 * x + label) + 0.02


def statistics(grouping):
  """Made up, one row per step: [20] or [20, C]; means per channel [20, C]."""
  shape = (STEPS, CHANNELS) if grouping == 'channel' else (STEPS,)
  rng = np.random.default_rng(7)
  std_q = rng.uniform(0.7, 1.2, shape)
  std_d = rng.uniform(0.05, 0.3, shape)
  rho = rng.uniform(0.3, 0.8, shape)
  std_q[LARGE], std_d[LARGE] = 3.0, 2.0  # More than the step's own noise.
  rho[CLAMPED_UP], rho[CLAMPED_DOWN], rho[NEGATIVE_K] = 1, -1, -0.5
  if grouping == 'channel':
    rho[NEGATIVE_K, 1] = 0.7  # Not in every channel.
  out = dict(
    mean_q=rng.normal(0, 0.05, shape),
    mean_d=rng.normal(0, 0.02, shape),
    var_q=std_q**2,
    var_d=std_d**2,
    cov=rho * std_q * std_d,
  )
  if grouping == 'channel':
    out['channel_mean_q'] = out['mean_q']
    out['channel_mean_d'] = out['mean_d']
  else:
    per = (STEPS, CHANNELS)
    out['channel_mean_q'] = out['mean_q'][:, None] + rng.normal(0, 0.03, per)
    out['channel_mean_d'] = out['mean_d'][:, None] + rng.normal(0, 0.01, per)
  return out


def conditional(mean_q, mean_d, var_q, var_d, cov):
  """Slope of d over eps_q, mean of d at eps_q = mean_q, left-over variance."""
  rho = cov / (var_q * var_d) ** 0.5
  rho = min(max(rho, -0.9999), 0.9999)
  return rho * (var_d / var_q) ** 0.5, mean_d, var_d * (1 - rho * rho)


def ptqd(stats, i, c, grouping):
  """k, bias and standard deviation of the residual, for step i, channel c."""

  def k_of(j):
    at = (i, j) if grouping == 'channel' else i
    var_q, var_d, cov = (stats[n][at] for n in ('var_q', 'var_d', 'cov'))
    var_eps = var_q + var_d - 2 * cov
    cov_eps = cov - var_d
    k = max(0.0, cov_eps / var_eps)
    return k, var_d - 2 * k * cov_eps + k * k * var_eps

  def bias_of(j):
    mean_d = stats['channel_mean_d'][i, j]
    return mean_d - k_of(j)[0] * (stats['channel_mean_q'][i, j] - mean_d)

  k, variance = k_of(c)
  if grouping == 'tensor':
    biases = [bias_of(j) for j in range(CHANNELS)]
    middle = sum(biases) / CHANNELS
    variance -= sum((b - middle) ** 2 for b in biases) / CHANNELS
  return k, bias_of(c), max(variance, 0.0) ** 0.5


def correct(kind, eps_q, n, stats, i, c, grouping):
  """One channel of one step: eps, and how much variance to absorb."""
  if kind == 'none':
    return eps_q, 0.0
  if kind == 'ptqd':
    k, bias, std = ptqd(stats, i, c, grouping)
    return (eps_q - bias) / (1 + k), (std / (1 + k)) ** 2
  at = (i, c) if grouping == 'channel' else i
  names = ('mean_q', 'mean_d', 'var_q', 'var_d', 'cov')
  slope, middle, variance = conditional(*(stats[name][at] for name in names))
  mu = middle + slope * (eps_q - stats['mean_q'][at])
  if kind == 's_d2':
    return eps_q - (mu + variance**0.5 * n), 0.0
  if kind == 's_d2_absorb':
    return eps_q - (mu + variance**0.5 * n), 2 * variance
  if kind == 'd_d2':
    return eps_q - mu, variance
  if kind == 'mean_only':
    return eps_q - mu, 0.0
  return eps_q, variance  # variance_only


def loop(kind, grouping, eta, stats, x, z, n):
  """A whole trajectory; returns x_0, all x_t, and which steps used up sigma."""
  abar = make_ddim.alphas_cumprod()
  stride = make_ddim.T // STEPS
  labels = make_ddim.LABELS
  xs, used_up = [], []
  for i in range(STEPS):
    xs.append(x)
    t = 1 + stride * (STEPS - 1 - i)
    a, prev = abar[t], abar[max(t - stride, 0)]
    sigma = eta * ((1 - prev) / (1 - a) * (1 - a / prev)) ** 0.5
    times = np.full(len(x), t)
    eps_u, eps_c = quantized(x, times, 0 * labels), quantized(x, times, labels)
    eps_q = eps_u + SCALE * (eps_c - eps_u)
    after = np.empty_like(x)
    for c in range(CHANNELS):
      eps, variance = correct(
        kind, eps_q[..., c], n[i, ..., c], stats, i, c, grouping
      )
      reach = (1 - prev - sigma**2) ** 0.5 - (prev * (1 - a) / a) ** 0.5
      less = max(sigma**2 - reach**2 * variance, 0.0)
      if c == 0:
        used_up.append(sigma > 0 and less == 0)
      x0 = (x[..., c] - (1 - a) ** 0.5 * eps) / a**0.5
      after[..., c] = prev**0.5 * x0 + (1 - prev - less) ** 0.5 * eps
      after[..., c] += less**0.5 * z[i, ..., c]
    x = after
  return x, np.stack(xs), used_up


def released(module, kind, grouping, eta, stats):
  """The released sampler for this case, or None; given our statistics."""
  import torch

  plain = {
    ('s_d2', 'tensor'): 'gaussian',
    ('d_d2', 'tensor'): 'implicit_gaussian',
    ('s_d2', 'channel'): 'channel_wise_explicit_gaussian',
    ('d_d2', 'channel'): 'channel_wise_implicit_gaussian',
    ('s_d2_absorb', 'tensor'): 'variance_shrinkage_gaussian',
    ('ptqd', 'tensor'): '',
  }.get((kind, grouping))
  if plain is None or (kind == 'd_d2' and grouping == 'channel' and eta > 0):
    return None
  prefix = f'{plain}_' if plain else ''
  cls = getattr(module, f'DDIMSampler_{prefix}quantCorrection_imagenet')
  sampler = object.__new__(cls)  # Its __init__ reads fixed paths.
  sampler.model = make_ddim.model(torch, quantized)
  sampler.ddpm_num_timesteps, sampler.schedule = make_ddim.T, 'linear'
  sampler.correct = True
  stride = make_ddim.T // STEPS
  times = [1 + stride * (STEPS - 1 - i) for i in range(STEPS)]

  def by_time(values):
    return dict(zip(times, values, strict=True))

  if kind == 'ptqd':
    rows = [
      [ptqd(stats, i, c, grouping) for c in range(CHANNELS)]
      for i in range(STEPS)
    ]
    sampler.kt_dict = by_time([row[0][0] for row in rows])
    # Exactly 0 would end in torch.pow(0, 2), an error.
    sampler.sigmaq_dict = by_time(
      [torch.tensor(max(row[0][2], 1e-12)) for row in rows]
    )
    sampler.index_bias = np.array([[b for _, b, _ in row] for row in rows])
    sampler.index_bias = sampler.index_bias[::-1].copy()
    return sampler
  mean = np.stack([stats['mean_q'], stats['mean_d']], 1)
  var = np.stack(
    [stats['var_q'], stats['cov'], stats['cov'], stats['var_d']], 1
  )
  sampler.mu_dict = by_time(mean)
  sampler.cov_dict = by_time(var.reshape(STEPS, 2, 2, *var.shape[2:]))
  if kind == 's_d2_absorb':
    rho = stats['cov'] / np.sqrt(stats['var_q'] * stats['var_d'])
    sampler.scheme = 'all given'
    sampler.sigmax_dict = by_time(np.sqrt(stats['var_q']))
    sampler.sigmay_dict = by_time(np.sqrt(stats['var_d']))
    sampler.rho_dict = by_time(np.clip(rho, -0.9999, 0.9999))
  return sampler


def main():
  import torch

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--d2dpm', required=True, help='TaylorJocelyn/D2-DPM')
  parser.add_argument('--ptqd', required=True, help='ziplab/PTQD')
  args = parser.parse_args()
  torch.set_default_dtype(torch.float64)
  torch.Tensor.cuda = lambda self: self
  torch.Tensor.float = torch.Tensor.double
  d2dpm, ptqd_module = map(make_ddim.original, (args.d2dpm, args.ptqd))

  out = dict(
    x_T=make_ddim.draw(1, *make_ddim.SHAPE),
    noise=make_ddim.draw(2, STEPS, *make_ddim.SHAPE),
    error_noise=make_ddim.draw(3, STEPS, *make_ddim.SHAPE),
  )
  x, z, n = (np.float64(out[k]) for k in ('x_T', 'noise', 'error_noise'))
  checked = []
  for grouping in GROUPINGS:
    stats = statistics(grouping)
    out.update({f'{grouping}_{k}': v for k, v in stats.items()})
    for kind in KINDS:
      for eta in ETAS:
        x_0, xs, used_up = loop(kind, grouping, eta, stats, x, z, n)
        key = f'{grouping}_{kind}_eta{eta:g}'
        out[f'{key}_x_0'] = x_0
        out[f'{key}_x'] = xs[[5, 10, 13]]
        absorbs = kind in ('s_d2_absorb', 'd_d2', 'ptqd', 'variance_only')
        assert used_up[LARGE] == (eta > 0 and absorbs), (key, used_up)
        assert not any(used_up[:15]), (key, used_up)
        module = ptqd_module if kind == 'ptqd' else d2dpm
        sampler = released(module, kind, grouping, eta, stats)
        if sampler is not None:
          errors = iter(n)
          torch.randn = lambda *_, errors=errors: torch.from_numpy(
            next(errors).transpose(0, 3, 1, 2).copy()
          )
          got, got_xs = make_ddim.run_original(
            module, sampler, STEPS, eta, SCALE, x, z
          )
          np.testing.assert_allclose(x_0, got, rtol=1e-9, atol=1e-9)
          np.testing.assert_allclose(xs, got_xs, rtol=1e-9, atol=1e-9)
          checked.append(key)
        print(key, 'largest |x|', np.abs(xs).max())
  print('Agree with the released samplers:', *checked)
  make_ddim.write('correction_trajectories.npz', out)


if __name__ == '__main__':
  main()
