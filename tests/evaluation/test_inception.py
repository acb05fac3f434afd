"""FID's InceptionV3 and its resize against torch-fidelity's and plain loops.

The arrays were made by tests/golden/make_inception.py; weights and images are
drawn anew from their names.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from d2dpm_jax.convert import inception as conversion
from d2dpm_jax.convert import names
from d2dpm_jax.convert.torch_reader import TensorRef
from jax.extend import core as jax_core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from d2dpm_jax.evaluation import inception, resize

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
_spec = importlib.util.spec_from_file_location(
  'make_inception', _GOLDEN / 'make_inception.py'
)
make_inception = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_inception)

# Float32 sums in another order, 50 layers deep: up to 2e-6. Pooling 7c by
# averages (2e-1), averages over padding (5e-2), modern resizing (7e-3) and
# 127.5 for 128 (2e-3) are far from that.
_TOLERANCE = 2e-5


def _golden_params(data):
  tensors = {
    name: make_inception.weight(name, tuple(shape))
    for name, shape in json.loads(str(data['tensors']))
  }
  refs = {
    name: TensorRef(np.shape(x), np.asarray(x).dtype, lambda x=x: np.asarray(x))
    for name, x in tensors.items()
  }
  plan = conversion._plan_state_dict(refs)
  return conversion._assemble(
    pathlib.Path('golden'), plan, refs, inception.parameter_shapes()
  )[0]


def test_equals_torch_fidelity_split_over_devices_and_compiled_once():
  data = np.load(_GOLDEN / 'inception_features.npz')
  params = _golden_params(data)
  images = make_inception.images('inception', make_inception.IMAGE_SHAPE)
  traces = []

  def apply(params, images):
    traces.append(images.shape)
    return inception.InceptionV3().apply({'params': params}, images)

  mesh = Mesh(np.asarray(jax.devices()[:2]), ('data',))
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec('data'))
  run = jax.jit(apply, in_shardings=(whole, split), out_shardings=split)
  out = run(params, images)
  swapped = run(params, images[::-1].copy())
  assert len(traces) == 1
  shapes = {'features': (2048,), 'spatial': (17, 17, 7), 'logits': (1008,)}
  assert out.keys() == shapes.keys()
  for name, shape in shapes.items():
    got, want = np.asarray(out[name]), data[name]
    assert got.dtype == np.float32 and got.shape == (2, *shape)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= _TOLERANCE, f'{name}: {error:.1e}'
    # What the images differ in is smaller than what they share.
    difference = want[0] - want[1]
    error = np.abs(got[0] - got[1] - difference).max()
    assert error <= 1e-3 * np.abs(difference).max(), name
    # An image's numbers do not depend on its place or its neighbours.
    np.testing.assert_array_equal(got[::-1], swapped[name])
  # The evaluator's order of the 2023 numbers: rows, columns, channels.
  flat = np.asarray(out['spatial']).reshape(2, -1)
  assert flat.shape == (2, 2023)
  assert flat[1, (3 * 17 + 5) * 7 + 2] == out['spatial'][1, 3, 5, 2]


@pytest.mark.parametrize(
  'height,width,new_height,new_width,step', make_inception.RESIZES
)
def test_resize_equals_a_loop_over_pixels(
  height, width, new_height, new_width, step
):
  want = np.load(_GOLDEN / 'inception_resize.npz')[f'{height}_{width}']
  images = make_inception.images('resize', (1, height, width, 3))
  got = jax.jit(resize.resize_bilinear_tf1, static_argnums=(1, 2))(
    images, new_height, new_width
  )
  assert got.dtype == jnp.float32 and got.shape == (1, new_height, new_width, 3)
  # Of 255: rounding of float32.
  error = np.abs(np.asarray(got)[0, ::step, ::step] - want).max() / 255
  assert error <= 1e-6


def test_resize_has_no_half_pixel_centres():
  ramp = np.arange(4, dtype=np.float32)[None, None, :, None]
  got = resize.resize_bilinear_tf1(ramp, 1, 8)[0, 0, :, 0]
  np.testing.assert_array_equal(got, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
  modern = jax.image.resize(ramp, (1, 1, 8, 1), 'bilinear')[0, 0, :, 0]
  np.testing.assert_allclose(modern, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_average_pool_leaves_padding_out():
  x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
  want = np.empty_like(x)
  for i in range(5):
    for j in range(4):
      window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
      want[:, i, j] = window.mean(axis=(1, 2))
  np.testing.assert_allclose(
    inception._average_pool(x), want, rtol=1e-5, atol=1e-6
  )


def test_parameters_are_those_of_the_state_dict():
  data = np.load(_GOLDEN / 'inception_features.npz')
  shapes = dict(json.loads(str(data['tensors'])))
  ours = inception.parameter_shapes()
  convolutions = [name for name in shapes if name.endswith('.conv.weight')]
  assert len(convolutions) == 94
  assert len(ours) == 94 * 5 + 1
  for name in convolutions:
    out, inside, height, width = shapes[name]
    path = names.module_path(name.removesuffix('.weight'))
    assert ours[f'{path}/kernel'] == (height, width, inside, out)
  total = sum(int(np.prod(shape)) for shape in ours.values())
  unused = sum(
    int(np.prod(shape))
    for name, shape in shapes.items()
    if name.endswith('num_batches_tracked') or name == 'fc.bias'
  )
  assert total == sum(int(np.prod(s)) for s in shapes.values()) - unused


def test_every_product_is_of_float32():
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
  network = inception.InceptionV3()
  variables = jax.eval_shape(network.init, jax.random.key(0), images)
  jaxpr = jax.make_jaxpr(network.apply)(variables, images)
  found = [
    equation.params['precision']
    for equation in _equations(jaxpr.jaxpr)
    if equation.primitive.name in ('conv_general_dilated', 'dot_general')
  ]
  assert len(found) == 95
  assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


def _equations(jaxpr):
  """All equations, those of inner functions included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax_core.jaxprs_in_params(equation.params):
      yield from _equations(inner)


@pytest.mark.parametrize(
  'images',
  [
    np.zeros((1, 8, 8, 3), np.float32),
    np.zeros((1, 8, 8, 1), np.uint8),
    np.zeros((8, 8, 3), np.uint8),
  ],
)
def test_other_images_are_refused(images):
  with pytest.raises(ValueError, match=r'takes uint8\[B, H, W, 3\]'):
    jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), images)
