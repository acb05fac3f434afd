"""Makes quant_reference.npz: quantization as PyTorch does it.

An implementation of its own, written from the papers with PyTorch's autograd
and optimizer; it shares nothing with d2dpm_jax.

  range_*    80-candidate L_2.4 search, per tensor and per output channel.
  grad_*     gradients of fake quantization (straight-through rounding).
  conv_*,    AdaRound (arXiv:2004.10568) of one convolution and one linear
  dense_*      layer: inputs, weights, reconstruction loss of nearest rounding
               and after learned rounding, over all samples.

Run with PyTorch (made with 2.13.0, CPU):
  python tests/golden/make_quant.py
"""

import pathlib

import numpy as np
import torch
import torch.nn.functional as F

ITERS = 1500
BATCH_SIZE = 32


def search(x, bits):
  """(scale, zero point) of the best of 80 ranges of one tensor."""
  best = None
  for i in range(80):
    low, high = x.min() * (1 - 0.01 * i), x.max() * (1 - 0.01 * i)
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale)
    y = (
      torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1) - zero
    ) * scale
    score = float((y - x).abs().pow(2.4).mean())
    if best is None or score < best[0]:
      best = (score, scale, zero)
  return best[1], best[2]


def search_channels(weight, bits):
  """The same for each output channel (axis 0 in PyTorch)."""
  found = [search(row, bits) for row in weight]
  shape = (-1,) + (1,) * (weight.ndim - 1)
  return (
    torch.stack([f[0] for f in found]).view(shape),
    torch.stack([f[1] for f in found]).view(shape),
  )


def h(alpha):
  return torch.clamp(torch.sigmoid(alpha) * 1.2 - 0.1, 0, 1)


def adaround(forward, x, weight, bits, channels):
  """Returns losses of nearest and of learned rounding over all of `x`."""
  scale, zero = (search_channels if channels else search)(weight, bits)
  top = 2**bits - 1
  floor = torch.floor(weight / scale)

  def kernel(codes):
    return (torch.clamp(codes + zero, 0, top) - zero) * scale

  def loss_of(out, want):
    return (out - want).abs().pow(2).sum(1).mean()

  target = forward(x, weight)
  nearest = kernel(torch.round(weight / scale))
  before = float(loss_of(forward(x, nearest), target))
  rest = weight / scale - floor
  alpha = (-torch.log(1.2 / (rest + 0.1) - 1)).requires_grad_()
  optimizer = torch.optim.Adam([alpha], lr=1e-3)
  for count in range(1, ITERS + 1):
    rows = torch.randperm(len(x))[:BATCH_SIZE]
    out = forward(x[rows], kernel(floor + h(alpha)))
    loss = loss_of(out, target[rows])
    if count >= 0.2 * ITERS:
      share = (count - 0.2 * ITERS) / (ITERS - 0.2 * ITERS)
      beta = 2 + 18 * (1 - share)
      loss = loss + 0.01 * (1 - (2 * h(alpha) - 1).abs().pow(beta)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
  hard = kernel(floor + (alpha.detach() >= 0))
  after = float(loss_of(forward(x, hard), target))
  return before, after


def main():
  torch.manual_seed(0)
  arrays = {'iters': ITERS, 'batch_size': BATCH_SIZE}

  x = torch.randn(500) * 2 + 1
  arrays['range_x'] = x.numpy()
  for bits in (2, 4, 8):
    scale, zero = search(x, bits)
    arrays[f'range_{bits}'] = np.array([scale, zero])
  weight = torch.randn(6, 5, 3, 3) * torch.rand(6, 1, 1, 1)
  scale, zero = search_channels(weight, 4)
  arrays['range_kernel'] = weight.permute(2, 3, 1, 0).numpy()  # HWIO
  arrays['range_kernel_4'] = np.stack([scale.flatten(), zero.flatten()])

  x = torch.linspace(-3, 4, 57).requires_grad_()
  scale = torch.tensor(0.25, requires_grad=True)
  r = x / scale
  r = r + (torch.round(r) - r).detach()
  y = (torch.clamp(r + 6, 0, 15) - 6) * scale
  weights = torch.sin(torch.arange(57.0))
  (y * weights).sum().backward()
  arrays['grad_x'] = x.detach().numpy()
  arrays['grad_y'] = y.detach().numpy()
  arrays['grad_dx'] = x.grad.numpy()
  arrays['grad_dscale'] = scale.grad.numpy()

  # Inputs with correlated channels, as real activations have: rounding errors
  # then compensate each other, which is what AdaRound is about.
  mix = torch.randn(8, 8) * 0.5 + 0.5
  x = F.relu(torch.einsum('bchw,cd->bdhw', torch.randn(128, 8, 6, 6), mix))
  weight = torch.randn(12, 8, 3, 3) * 0.1
  arrays['conv_x'] = x.permute(0, 2, 3, 1).numpy()
  arrays['conv_kernel'] = weight.permute(2, 3, 1, 0).numpy()
  for name, channels in (('tensor', False), ('channel', True)):
    losses = adaround(
      lambda x, w: F.conv2d(x, w, padding=1), x, weight, 3, channels
    )
    arrays[f'conv_loss_{name}'] = np.array(losses)

  x = torch.randn(256, 4) @ torch.randn(4, 24) + 0.3 * torch.randn(256, 24)
  weight = torch.randn(16, 24) * 0.2
  arrays['dense_x'] = x.numpy()
  arrays['dense_kernel'] = weight.T.numpy()
  for name, channels in (('tensor', False), ('channel', True)):
    losses = adaround(F.linear, x, weight, 3, channels)
    arrays[f'dense_loss_{name}'] = np.array(losses)

  path = pathlib.Path(__file__).with_name('quant_reference.npz')
  np.savez_compressed(path, **arrays)
  for key in arrays:
    if 'loss' in key:
      print(key, arrays[key])


if __name__ == '__main__':
  main()
