r"""Makes ldm_*.npz: outputs of the original PyTorch LDM on small models.

Only this script needs PyTorch; the tests read the arrays. Neither stores
weights: script and tests draw them from the name of the parameter (`weight`).

The originals, at the commits that the arrays were made with:
  git clone https://github.com/CompVis/latent-diffusion
  git -C latent-diffusion checkout a506df5756472e2ebaf9078affdde2c4f1502cd4
  git clone https://github.com/CompVis/taming-transformers
  git -C taming-transformers checkout 3ba01b241669f5ade541ce990f7650a3b8f65318
  pip install torch==2.13.0 einops omegaconf pillow

  python make_ldm.py --source latent-diffusion --source taming-transformers
With --check the stored arrays are compared instead of written. With
--full cin256.npz the full-size U-Net of cin256-v2 runs once (5 GB of memory,
a minute) and its input and output go to that file; then, where JAX is,
  python make_ldm.py --compare cin256.npz
runs ours on the same input with the same weights and prints the error.
"""

import argparse
import json
import pathlib
import sys
import types
import zlib

import numpy as np

_HERE = pathlib.Path(__file__).parent
_SOURCES = {
  'CompVis/latent-diffusion': 'a506df5756472e2ebaf9078affdde2c4f1502cd4',
  'CompVis/taming-transformers': '3ba01b241669f5ade541ce990f7650a3b8f65318',
}

# Fields of `UNetModel`: small forms of the three checkpoints, then settings
# that the LDM family has and these three lack.
_UNETS = {
  'imagenet': dict(
    in_channels=3, out_channels=3, model_channels=32, num_res_blocks=2,
    channel_mult=[1, 2, 3], attention_resolutions=[4, 2], num_heads=1,
    use_spatial_transformer=True, context_dim=24),
  'lsun_bedrooms': dict(
    in_channels=3, out_channels=3, model_channels=32, num_res_blocks=2,
    channel_mult=[1, 2, 3], attention_resolutions=[4, 2],
    num_head_channels=32),
  'lsun_churches': dict(
    in_channels=4, out_channels=4, model_channels=64, num_res_blocks=1,
    channel_mult=[1, 2, 2], attention_resolutions=[1, 2, 4], num_heads=8,
    use_scale_shift_norm=True, resblock_updown=True),
  'transformer': dict(
    in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1,
    channel_mult=[1, 2], attention_resolutions=[1], num_head_channels=16,
    use_spatial_transformer=True, transformer_depth=2, context_dim=24,
    use_scale_shift_norm=True),
}  # fmt: skip

# Fields of the first stages; `embed_dim` and `n_embed` beside `ddconfig`.
_FIRST_STAGES = {
  'vq': dict(
    embed_dim=3, n_embed=64,
    ddconfig=dict(
      double_z=False, z_channels=3, resolution=32, in_channels=3, out_ch=3,
      ch=32, ch_mult=[1, 2, 4], num_res_blocks=2, attn_resolutions=[])),
  'vq_attention': dict(
    embed_dim=3, n_embed=64,
    ddconfig=dict(
      double_z=False, z_channels=4, resolution=32, in_channels=1, out_ch=1,
      ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[16])),
  'kl': dict(
    embed_dim=4,
    ddconfig=dict(
      double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3,
      ch=32, ch_mult=[1, 2, 2, 4], num_res_blocks=1, attn_resolutions=[8])),
}  # fmt: skip

_CLASS_EMBEDDER = dict(n_classes=11, embed_dim=24)

_CIN256 = dict(
  in_channels=3, out_channels=3, model_channels=192, num_res_blocks=2,
  channel_mult=[1, 2, 3, 5], attention_resolutions=[8, 4, 2], num_heads=1,
  use_spatial_transformer=True, context_dim=512)  # fmt: skip


# Layers that do not write to the residual stream; the others have weights a
# tenth as large, so that the variances that norms divide by are near 0.01 and
# an epsilon of 1e-5 instead of 1e-6 shows in the output.
_FULL_GAIN = {
  'q', 'k', 'v', 'qkv', 'to_q', 'to_k', 'to_v', 'proj', 'quant_conv',
  'post_quant_conv', 'time_embed', 'emb_layers',
}  # fmt: skip


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A float32 parameter that depends on its PyTorch name and shape alone.

  None is zero, not even where LDM initializes with zeros. RandomState's stream
  is frozen by NEP 19.
  """
  rng = np.random.RandomState(zlib.crc32(name.encode()))
  x = rng.standard_normal(shape).astype(np.float32)
  gain = 1.0 if _FULL_GAIN.intersection(name.split('.')) else 0.2
  if len(shape) == 1:  # Biases, and scales of norms.
    return 0.05 * x if name.endswith('bias') else 1 + 0.1 * x
  if 'embedding' in name:
    return 0.2 * x
  return x * np.float32(gain / np.prod(shape[1:]) ** 0.5)


def signal(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A float32 standard normal input that depends on its name and shape."""
  rng = np.random.RandomState(zlib.crc32(name.encode()))
  return rng.standard_normal(shape).astype(np.float32)


def unet_inputs(name: str, config: dict, batch: int = 2, size: int = 16):
  """x in NHWC, t and context (None for an unconditional U-Net)."""
  x = signal(f'{name} x', (batch, size, size, config['in_channels']))
  t = np.array([3, 951] if batch == 2 else [501], np.int32)
  context = None
  if 'context_dim' in config:
    context = signal(f'{name} context', (batch, 2, config['context_dim']))
  return x, t, context


def images(name: str, config: dict) -> np.ndarray:
  """Two smooth-less images in NHWC, roughly in [-1, 1]."""
  size, channels = config['resolution'], config['in_channels']
  return np.tanh(signal(f'{name} images', (2, size, size, channels)))


def _stub_imports():
  """Stands in for what LDM imports but these modules never use."""
  import torch

  lightning = types.ModuleType('pytorch_lightning')
  lightning.LightningModule = torch.nn.Module
  sys.modules.setdefault('pytorch_lightning', lightning)
  for name in ('clip', 'kornia'):
    sys.modules.setdefault(name, types.ModuleType(name))


def _load_weights(module) -> list:
  """Fills a torch module; returns [name, shape] of all its tensors."""
  import torch

  with torch.no_grad():
    for name, p in module.state_dict().items():
      p.copy_(torch.from_numpy(weight(name, tuple(p.shape))))
  module.eval()
  return [[k, list(p.shape)] for k, p in module.state_dict().items()]


def _nchw(x):
  import torch

  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def _nhwc(x) -> np.ndarray:
  return np.ascontiguousarray(np.moveaxis(x.detach().numpy(), 1, -1))


def _run_unet(name: str, config: dict, **kwargs) -> dict[str, np.ndarray]:
  import torch
  from ldm.modules.diffusionmodules.openaimodel import UNetModel

  x, t, context = unet_inputs(name, config, **kwargs)
  model = UNetModel(image_size=x.shape[1], **config)
  tensors = _load_weights(model)
  with torch.no_grad():
    eps = model(
      _nchw(x),
      torch.from_numpy(t).long(),
      None if context is None else torch.from_numpy(context),
    )
  return dict(tensors=json.dumps(tensors), x=x, t=t, eps=_nhwc(eps)) | (
    {} if context is None else dict(context=context)
  )


def _run_first_stage(name: str, config: dict) -> dict[str, np.ndarray]:
  import torch
  from ldm.models.autoencoder import AutoencoderKL, VQModelInterface

  cls = VQModelInterface if 'n_embed' in config else AutoencoderKL
  model = cls(lossconfig=dict(target='torch.nn.Identity'), **config)
  tensors = _load_weights(model)
  x = images(name, config['ddconfig'])
  out = dict(tensors=json.dumps(tensors), images=x)
  with torch.no_grad():
    if 'n_embed' in config:
      z = model.encode(_nchw(x))
      z_q, loss, (_, _, indices) = model.quantize(z)
      out |= dict(
        z_q=_nhwc(z_q),
        loss=loss.numpy(),
        indices=indices.numpy().reshape(z.shape[0], *z.shape[2:]),
      )
    else:
      posterior = model.encode(_nchw(x))
      z = posterior.mode()
      out |= dict(mean=_nhwc(posterior.mean), logvar=_nhwc(posterior.logvar))
    return out | dict(latents=_nhwc(z), decoded=_nhwc(model.decode(z)))


def _run_class_embedder() -> dict[str, np.ndarray]:
  import torch
  from ldm.modules.encoders.modules import ClassEmbedder

  model = ClassEmbedder(key='label', **_CLASS_EMBEDDER)
  tensors = _load_weights(model)
  labels = np.array([0, 7, 10], np.int32)
  with torch.no_grad():
    context = model(dict(label=torch.from_numpy(labels).long()))
  return dict(
    tensors=json.dumps(tensors), labels=labels, context=context.numpy()
  )


def make() -> dict[str, dict[str, np.ndarray]]:
  """File name -> arrays."""
  import torch

  meta = json.dumps(_SOURCES | {'torch': torch.__version__})
  files = {}
  for name, config in _UNETS.items():
    files[f'ldm_unet_{name}'] = _run_unet(name, config) | dict(
      config=json.dumps(config)
    )
  for name, config in _FIRST_STAGES.items():
    files[f'ldm_first_stage_{name}'] = _run_first_stage(name, config) | dict(
      config=json.dumps(config)
    )
  files['ldm_class_embedder'] = _run_class_embedder() | dict(
    config=json.dumps(_CLASS_EMBEDDER)
  )
  return {
    k: {n: np.asarray(a) for n, a in v.items()} | dict(meta=np.asarray(meta))
    for k, v in files.items()
  }


def check(files: dict[str, dict[str, np.ndarray]]) -> bool:
  """True if the stored arrays equal new ones to float32 rounding."""
  good = True
  for file, arrays in files.items():
    stored = np.load(_HERE / f'{file}.npz')
    for name in sorted(arrays.keys() | set(stored.files)):
      if name == 'meta':
        continue
      got, want = arrays.get(name), stored.get(name)
      if got is None or want is None:
        error = np.inf
      elif got.dtype.kind == 'f':
        error = np.abs(got - want).max() / max(1e-9, np.abs(want).max())
      else:
        error = 0.0 if np.array_equal(got, want) else np.inf
      good &= bool(error < 1e-5)
      print(f'{file} {name}: {error:.1e}')
  return good


def compare(path: str) -> float:
  """Runs our cin256-v2 U-Net on a file of --full; returns the error."""
  import jax

  sys.path.insert(0, str(_HERE.parent.parent))
  from d2dpm_jax.convert import names

  from d2dpm_jax.models import unet

  data = np.load(path)
  model = unet.UNet(
    out_channels=3,
    model_channels=192,
    channel_mult=(1, 2, 3, 5),
    num_res_blocks=2,
    attention_resolutions=(8, 4, 2),
    num_heads=1,
    use_spatial_transformer=True,
    context_dim=512,
  )
  inputs = data['x'], data['t'], data['context']
  target = names.target_of(model, *inputs)
  tensors = json.loads(str(data['tensors']))
  params, problems = names.match(
    {name: weight(name, tuple(shape)) for name, shape in tensors}, target
  )
  if problems:
    raise SystemExit('\n'.join(problems))
  eps = np.asarray(jax.jit(model.apply)({'params': params}, *inputs))
  want = data['eps']
  count = sum(p.size for p in jax.tree.leaves(params))
  print(f'{count} parameters, output up to {np.abs(want).max():.3f}')
  return float(np.abs(eps - want).max() / np.abs(want).max())


def main():
  """Parses flags; see the docstring of the file."""
  parser = argparse.ArgumentParser(description='Golden arrays of LDM.')
  parser.add_argument('--source', action='append', default=[])
  parser.add_argument('--check', action='store_true')
  parser.add_argument('--full')
  parser.add_argument('--compare')
  args = parser.parse_args()
  if args.compare:
    print(f'max error / max output: {compare(args.compare):.1e}')
    return
  sys.path[:0] = args.source
  _stub_imports()
  if args.full:
    np.savez(args.full, **_run_unet('cin256', _CIN256, batch=1, size=64))
    return
  files = make()
  if args.check:
    sys.exit(0 if check(files) else 'The stored arrays are different ones.')
  for file, arrays in files.items():
    np.savez_compressed(_HERE / f'{file}.npz', **arrays)


if __name__ == '__main__':
  main()
