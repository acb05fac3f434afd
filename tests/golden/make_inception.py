r"""Makes inception_*.npz: outputs of torch-fidelity's InceptionV3 and resize.

Only this script needs PyTorch; the tests read the arrays. Neither stores
weights or images: script and tests draw them from names (`weight`, `images`).

The original, at the commit that the arrays were made with:
  git clone https://github.com/toshas/torch-fidelity
  git -C torch-fidelity checkout 5e211a950a7b45206bd4976813ffd6aed6cf4ccc
  pip install torch==2.13.0

  python make_inception.py --source torch-fidelity
inception_resize.npz is made by a loop over pixels in NumPy, TensorFlow 1's
formula, and held against torch-fidelity's before it is written.
inception_names.npz has the names that torch-fidelity's converter gives the
constants of classify_image_graph_def.pb; none of its code is run for it.
"""

import argparse
import ast
import importlib
import json
import pathlib
import sys
import tempfile
import types
import zlib

import numpy as np

_HERE = pathlib.Path(__file__).parent
_SOURCES = {'toshas/torch-fidelity': '5e211a950a7b45206bd4976813ffd6aed6cf4ccc'}

# Images of the network: what a test compiles for, so one shape, not square.
IMAGE_SHAPE = (2, 40, 56, 3)
# Height and width before and after; every how many pixels are stored.
RESIZES = (
  (5, 7, 11, 16, 1),
  (32, 32, 299, 299, 13),
  (299, 299, 299, 299, 13),
  (256, 256, 299, 299, 13),
  (513, 400, 299, 299, 13),
)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A float32 tensor that depends on its PyTorch name and shape alone.

  Signals keep their size through the network. Variances are so small that an
  epsilon of 1e-3 counts. RandomState's stream is frozen by NEP 19.
  """
  rng = np.random.RandomState(zlib.crc32(name.encode()))
  x = rng.standard_normal(shape).astype(np.float32)
  leaf = name.rpartition('.')[2]
  if leaf == 'running_var':
    return 0.02 * np.exp(0.3 * x)
  if leaf == 'running_mean':
    return 0.05 * x
  if leaf == 'num_batches_tracked':
    return np.int64(0)
  if len(shape) == 1:  # Biases, and scales of norms.
    return 0.1 * x if leaf == 'bias' else 1 + 0.1 * x
  gain = 1.0 if name.startswith('fc.') else 0.2  # 0.2² is 2 * 0.02.
  return x * np.float32(gain / np.prod(shape[1:]) ** 0.5)


def images(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """uint8 noise over coarse colours; depends on its name and shape alone."""
  rng = np.random.RandomState(zlib.crc32(name.encode()))
  batch, height, width, channels = shape
  coarse = rng.uniform(0, 255, (batch, 4, 4, channels))
  rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
  noise = rng.uniform(-60, 60, shape)
  return np.clip(coarse[:, rows][:, :, columns] + noise, 0, 255).astype(
    np.uint8
  )


def resize_loop(x: np.ndarray, height: int, width: int) -> np.ndarray:
  """TensorFlow 1's bilinear resize of float32[H,W,C], pixel by pixel."""
  one = np.float32(1)
  out = np.empty((height, width, x.shape[-1]), np.float32)
  scale_y = np.float32(x.shape[0]) / np.float32(height)
  scale_x = np.float32(x.shape[1]) / np.float32(width)
  for i in range(height):
    y = np.float32(i) * scale_y
    top = int(y)
    bottom = min(top + 1, x.shape[0] - 1)
    v = y - np.float32(top)
    for j in range(width):
      z = np.float32(j) * scale_x
      left = int(z)
      right = min(left + 1, x.shape[1] - 1)
      u = z - np.float32(left)
      above = x[top, left] * (one - u) + x[top, right] * u
      below = x[bottom, left] * (one - u) + x[bottom, right] * u
      out[i, j] = above * (one - v) + below * v
  return out


def _nchw(x: np.ndarray):
  import torch

  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def _nhwc(x) -> np.ndarray:
  return np.ascontiguousarray(np.moveaxis(x.detach().numpy(), 1, -1))


def _import_fidelity(source: pathlib.Path) -> None:
  """Makes its modules importable without what its package needs beside."""
  package = types.ModuleType('torch_fidelity')
  package.__path__ = [str(source / 'torch_fidelity')]
  sys.modules['torch_fidelity'] = package


def _network():
  """The original with our weights, and [name, shape] of all its tensors."""
  import torch

  module = importlib.import_module(
    'torch_fidelity.feature_extractor_inceptionv3'
  )
  cls = module.FeatureExtractorInceptionV3

  # It loads a file while it is built: an empty one, which fits anything then.
  def ignore(self, state, *args, **kwargs):
    del self, state, args, kwargs

  load, cls.load_state_dict = cls.load_state_dict, ignore
  with tempfile.NamedTemporaryFile(suffix='.pth') as file:
    torch.save({}, file.name)
    model = cls('inception', ['2048', 'logits_unbiased'], file.name)
  cls.load_state_dict = load
  tensors = [[k, list(v.shape)] for k, v in model.state_dict().items()]
  state = {k: torch.as_tensor(weight(k, tuple(shape))) for k, shape in tensors}
  model.load_state_dict(state)
  return model, tensors


def _run_network() -> dict[str, np.ndarray]:
  import torch

  model, tensors = _network()
  spatial = []
  model.Mixed_6d.branch1x1.register_forward_hook(
    lambda module, args, out: spatial.append(out)
  )
  with torch.no_grad():
    features, logits = model(_nchw(images('inception', IMAGE_SHAPE)))
  return dict(
    tensors=json.dumps(tensors),
    features=features.numpy(),
    spatial=_nhwc(spatial[0][:, :7]),
    logits=logits.numpy(),
  )


def _run_resize() -> dict[str, np.ndarray]:
  module = importlib.import_module(
    'torch_fidelity.interpolate_compat_tensorflow'
  )
  out = {}
  for old_h, old_w, h, w, step in RESIZES:
    x = images('resize', (1, old_h, old_w, 3)).astype(np.float32)
    want = resize_loop(x[0], h, w)
    other = _nhwc(
      module.interpolate_bilinear_2d_like_tensorflow1x(
        _nchw(x), size=(h, w), align_corners=False
      )
    )[0]
    error = np.abs(other - want).max() / 255
    print(f'resize {old_h} x {old_w}: {error:.1e} between the two references')
    if error > 1e-6:
      sys.exit('The two references do not agree.')
    out[f'{old_h}_{old_w}'] = want[::step, ::step]
  return out


def _read_names(source: pathlib.Path) -> dict[str, str]:
  """The literal table of names in torch-fidelity's converter."""
  path = source / 'utils' / 'util_convert_inception_weights.py'
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      if getattr(node.targets[0], 'id', '') == 'map_tf_to_pt':
        return ast.literal_eval(node.value)
  sys.exit(f'{path} has no table of names.')


def main():
  """Parses flags; see the docstring of the file."""
  import torch

  parser = argparse.ArgumentParser(description='Golden arrays of InceptionV3.')
  parser.add_argument('--source', type=pathlib.Path, required=True)
  source = parser.parse_args().source
  _import_fidelity(source)
  meta = json.dumps(_SOURCES | {'torch': torch.__version__})
  for name, arrays in {
    'inception_features': _run_network(),
    'inception_resize': _run_resize(),
    'inception_names': dict(names=json.dumps(_read_names(source))),
  }.items():
    np.savez_compressed(_HERE / f'{name}.npz', meta=meta, **arrays)


if __name__ == '__main__':
  main()
