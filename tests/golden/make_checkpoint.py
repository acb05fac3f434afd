r"""Makes ldm_state_dicts.npz, and whole checkpoints, by the original classes.

The .npz holds no weights: names and shapes of every tensor in the three
published checkpoints, and the noise schedules, as the original
`LatentDiffusion` makes them from its YAML. The tests convert these.

Sources and packages: see make_ldm.py.

  python make_checkpoint.py --source latent-diffusion \
      --source taming-transformers
With --check the stored arrays are compared instead of written. With
--checkpoint model.ckpt --yaml .../configs/latent-diffusion/cin256-v2.yaml
one checkpoint in full size is written as Lightning does, with weights that
`make_ldm.weight` draws from the names (cin256-v2: 1.8 GB on disk, 4 GB of
memory, a minute); see docs/convert.md. Of a U-Net with moving averages these
have the drawn weights, and the raw ones are others.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import types

import make_ldm
import make_torch_files
import numpy as np
import torch

_HERE = pathlib.Path(__file__).parent
_YAML = {
  'imagenet': 'configs/latent-diffusion/cin256-v2.yaml',
  'lsun_bedrooms': 'models/ldm/lsun_beds256/config.yaml',
  'lsun_churches': 'models/ldm/lsun_churches256/config.yaml',
}
_EMA = 'model_ema.diffusion_model'


def _stub_imports():
  """Stands in for what LDM imports but a model without data never uses."""
  make_ldm._stub_imports()
  for name, members in (
    ('pytorch_lightning.utilities', {}),
    (
      'pytorch_lightning.utilities.distributed',
      {'rank_zero_only': lambda function: function},
    ),
    ('torchvision', {}),
    ('torchvision.utils', {'make_grid': None}),
    ('tqdm', {'tqdm': None}),
  ):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules.setdefault(name, module)


@contextlib.contextmanager
def _no_initialization():
  """Leaves parameters as allocated: memory that nobody touched costs none."""
  names = [n for n in vars(torch.nn.init) if n.endswith('_') and n[0] != '_']
  kept = {name: getattr(torch.nn.init, name) for name in names}
  try:
    for name in names:
      setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    yield
  finally:
    for name, function in kept.items():
      setattr(torch.nn.init, name, function)


def build(path: str):
  """The original model of a YAML, weights undefined, schedule as trained."""
  from ldm.util import instantiate_from_config
  from omegaconf import OmegaConf

  config = OmegaConf.load(path).model
  for part in ('first_stage_config', 'unet_config'):
    config.params[part].params.pop('ckpt_path', None)
  with _no_initialization(), contextlib.redirect_stdout(sys.stderr):
    return instantiate_from_config(config)


def describe(path: str) -> dict[str, np.ndarray]:
  """Names and shapes of the state dict, and its schedule."""
  state = build(path).state_dict()
  shapes = [[name, list(tensor.shape)] for name, tensor in state.items()]
  return dict(
    tensors=np.asarray(json.dumps(shapes)),
    alphas_cumprod=state['alphas_cumprod'].numpy(),
  )


def fill(model) -> None:
  """Draws every weight from its name; see the top of the file."""
  state = model.state_dict()
  averaged = any(name.startswith(_EMA) for name in state)
  with torch.no_grad():
    for name, tensor in state.items():
      part, _, rest = name.partition('.')
      rest = rest.removeprefix('diffusion_model.')
      if part not in ('model', 'first_stage_model', 'cond_stage_model'):
        continue  # The schedule, and the averages: they come with the raw ones.
      value = torch.from_numpy(make_ldm.weight(rest, tuple(tensor.shape)))
      if averaged and part == 'model':
        state[_EMA + rest.replace('.', '')].copy_(value)
        value = 2 * value + 1
      tensor.copy_(value)
    if 'scale_factor' in state:
      state['scale_factor'].fill_(0.25)


def save(model, path: str) -> None:
  """Writes what Lightning 1.4 does, with a class of its own in it."""
  callback = make_torch_files._fake_class(
    'pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint'
  )
  torch.save(
    {
      'epoch': 134,
      'global_step': 178000,
      'pytorch-lightning_version': '1.4.2',
      'state_dict': model.state_dict(),
      'callbacks': {callback: {'monitor': 'val/loss'}},
      'optimizer_states': [],
      'lr_schedulers': [],
    },
    path,
  )


def main():
  """Parses flags; see the docstring of the file."""
  parser = argparse.ArgumentParser(description='State dicts of LDM.')
  parser.add_argument('--source', action='append', default=[])
  parser.add_argument('--check', action='store_true')
  parser.add_argument('--checkpoint')
  parser.add_argument('--yaml')
  args = parser.parse_args()
  sys.path[:0] = args.source
  _stub_imports()
  if args.checkpoint:
    model = build(args.yaml)
    fill(model)
    save(model, args.checkpoint)
    return
  made = {
    f'{name}/{key}': array
    for name, file in _YAML.items()
    for key, array in describe(f'{args.source[0]}/{file}').items()
  }
  if not args.check:
    np.savez_compressed(_HERE / 'ldm_state_dicts.npz', **made)
    return
  with np.load(_HERE / 'ldm_state_dicts.npz') as stored:
    different = [
      name
      for name in sorted(made.keys() | set(stored.files))
      if name not in made or not np.array_equal(made[name], stored.get(name))
    ]
  print('ldm_state_dicts.npz:', ', '.join(different) or 'the same')
  sys.exit(bool(different))


if __name__ == '__main__':
  main()
