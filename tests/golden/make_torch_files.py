r"""Makes torch_*.pt, torch_*.ckpt and torch_expected.npz by PyTorch itself.

Only this script needs PyTorch; the tests read the files with our reader and
compare with the arrays, which `Tensor.numpy` gave. Every file exists in the zip
format and, as torch_*_legacy.*, in the one before PyTorch 1.6.

  pip install torch==2.13.0 numpy
  python make_torch_files.py          # writes
  python make_torch_files.py --check  # compares with what is stored
"""

import argparse
import collections
import datetime
import pathlib
import sys
import tempfile
import types

import numpy as np
import torch

_HERE = pathlib.Path(__file__).parent
_DTYPES = {
  'float16': torch.float16,
  'float32': torch.float32,
  'float64': torch.float64,
  'bfloat16': torch.bfloat16,
  'int8': torch.int8,
  'int16': torch.int16,
  'int32': torch.int32,
  'int64': torch.int64,
  'uint8': torch.uint8,
  'bool': torch.bool,
}


def _dtypes():
  """A tensor of each dtype; values that the dtype holds exactly."""
  values = torch.tensor([[0.0, 1.0, 2.0], [5.0, 64.0, 100.0]])
  return {name: (values * 1).to(dtype) for name, dtype in _DTYPES.items()}


def _views():
  """Tensors that share storages, start within them, or step through them."""
  base = torch.arange(24, dtype=torch.float32)
  image = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32)
  image = image.reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
  module = torch.nn.Linear(3, 2)
  with torch.no_grad():
    module.weight.copy_(torch.arange(6.0).reshape(2, 3))
    module.bias.fill_(0.5)
  tied = torch.arange(4, dtype=torch.int64)
  return {
    'base': base,
    'matrix': base.view(4, 6),
    'transposed': base.view(4, 6).t(),
    'sliced': base.view(4, 6)[1:, ::2],
    'offset': base[7:19],
    'scalar': base[5],
    'empty': base[3:3],
    'empty_matrix': torch.zeros(0, 5),
    'overlapping': base.as_strided((3, 4), (2, 1), 1),
    'expanded': base[2].expand(3, 2),
    'odd_stride': base.as_strided((1, 3, 1), (99, 1, 7), 4),
    'channels_last': image,
    'parameter': module.weight,
    'bias': module.bias,
    'tied': tied,
    'tied_again': tied,
    'step': torch.tensor(7),
  }


def _fake_class(path, bases=(object,)):
  """A class that pickle finds under `path`, of a library that is not here."""
  module, name = path.rsplit('.', 1)
  parts = module.split('.')
  for end in range(1, len(parts) + 1):
    parent = '.'.join(parts[:end])
    sys.modules.setdefault(parent, types.ModuleType(parent))
  body = {'__module__': module, '__init__': lambda self, *args, **kwargs: None}
  made = type(name, bases, body)
  setattr(sys.modules[module], name, made)
  return made


class _Reduced:
  """Pickled as a call of `function`, as Lightning and OmegaConf objects are."""

  def __init__(self, function, *args):
    self.call = (function, args)

  def __reduce__(self):
    return self.call


def _lightning():
  """What a Lightning checkpoint of an LDM holds, with classes of libraries."""
  callback = _fake_class(
    'pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint'
  )
  attributes = _fake_class(
    'pytorch_lightning.utilities.parsing.AttributeDict', (dict,)
  )
  config = _fake_class('omegaconf.listconfig.ListConfig')
  node = config()
  node.__dict__.update(_content=[1, 2], _metadata={'object_type': list})
  hyper = attributes()
  hyper.update(base_learning_rate=1e-6, channels=node)
  module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
  with torch.no_grad():
    for index, value in enumerate(module.state_dict().values()):
      value.copy_(torch.arange(value.numel()).reshape(value.shape) + index)
  optimizer = {'state': {0: {'step': 3, 'exp_avg': torch.zeros(3, 2)}}}
  return {
    'epoch': 134,
    'global_step': 178000,
    'pytorch-lightning_version': '1.4.2',
    'state_dict': module.state_dict(),
    'callbacks': {
      callback: {
        'monitor': 'val/loss',
        'best_model_score': torch.tensor(0.25),
        'best_model_path': pathlib.PurePosixPath('logs/epoch=000134.ckpt'),
      },
      'counts': collections.defaultdict(int, a=1),
    },
    'optimizer_states': [optimizer],
    'lr_schedulers': [],
    'hparams_name': 'kwargs',
    'hyper_parameters': hyper,
    'extra': {
      'set': {1, 2},
      'tuple': (1, 2.5, None, True, -(2**40), 2**70),
      'bytes': b'\x00\xff',
      'time': datetime.datetime(2022, 3, 1),
      'size': torch.Size([2, 3]),
      'numpy': np.float64(0.5),
      'dtype': torch.float16,
      'made': _Reduced(config, 1, 'a'),
      'text': 'Grüße',
    },
  }


def _array(tensor):
  """NumPy has no bfloat16; float32 holds its values exactly."""
  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    tensor = tensor.float()
  return tensor.contiguous().numpy().copy()


def _write(folder):
  objects = {
    'torch_dtypes.pt': _dtypes(),
    'torch_views.pt': _views(),
    'torch_lightning.ckpt': _lightning(),
  }
  expected = {}
  for file, value in objects.items():
    stem, suffix = file.split('.')
    torch.save(value, folder / file)
    torch.save(
      value,
      folder / f'{stem}_legacy.{suffix}',
      _use_new_zipfile_serialization=False,
    )
    for name, tensor in value.get('state_dict', value).items():
      expected[f'{stem}/{name}'] = _array(tensor)
  np.savez_compressed(folder / 'torch_expected.npz', **expected)


def _check(folder):
  """Compares arrays, exactly; legacy files hold addresses that differ."""
  ours = np.load(_HERE / 'torch_expected.npz')
  made = np.load(folder / 'torch_expected.npz')
  assert sorted(ours) == sorted(made), 'other names'
  for name in ours:
    np.testing.assert_array_equal(ours[name], made[name], err_msg=name)
  for path in sorted(folder.glob('torch_*.*t')):
    stored = torch.load(_HERE / path.name, weights_only=False)
    for name, tensor in stored.get('state_dict', stored).items():
      key = f'{path.stem.removesuffix("_legacy")}/{name}'
      np.testing.assert_array_equal(_array(tensor), made[key], err_msg=key)
    print(f'{path.name}: the same')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--check', action='store_true')
  if not parser.parse_args().check:
    _write(_HERE)
    return
  with tempfile.TemporaryDirectory() as folder:
    _write(pathlib.Path(folder))
    _check(pathlib.Path(folder))


if __name__ == '__main__':
  main()
