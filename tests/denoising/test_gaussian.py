"""The error model against NumPy, on disk, and refusing what does not fit."""

import dataclasses
import json
import os
import pathlib
import pickle
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from d2dpm_jax.denoising import gaussian

_SETTINGS = {'w_bits': 4, 'eta': 0.0, 'steps': 20, 'shape': (4, 5, 3)}


def _data(seed=0, images=40, offset=0.0):
  """eps_q and eps, float32[N, 4, 5, 3], with outliers of d far out."""
  rng = np.random.default_rng(seed)
  shape = (images, 4, 5, 3)
  eps = rng.normal(size=shape) * [0.8, 1.0, 1.3] + offset
  d = 0.1 * eps + rng.normal(size=shape) * [0.02, 0.2, 0.1] + [0.0, 0.1, -0.2]
  d[rng.uniform(size=shape) < 0.01] += 3.0
  return (eps + d).astype(np.float32), eps.astype(np.float32)


def _chunks(eps_q, eps, size=7):
  return lambda: (
    (eps_q[i : i + size], eps[i : i + size]) for i in range(0, len(eps), size)
  )


def _reference(eps_q, eps, channel_wise, outlier_std):
  """Whole arrays at once, as one would in a notebook."""
  q, e = np.float64(eps_q), np.float64(eps)
  d = q - e
  groups = [slice(None), *range(3)]
  rows = []
  for group in groups[1:] if channel_wise else groups[:1]:
    qs, es, ds = (x[..., group].ravel() for x in (q, e, d))
    keep = np.abs(ds - np.mean(ds)) <= outlier_std * np.std(ds)
    qs, es, ds = qs[keep], es[keep], ds[keep]
    all_three = np.cov(np.stack([qs, ds, es]))
    rows.append(
      dict(
        mean_q=qs.mean(),
        mean_d=ds.mean(),
        var_q=all_three[0, 0],
        var_d=all_three[1, 1],
        cov=all_three[0, 1],
        var_eps=all_three[2, 2],
        cov_eps=all_three[1, 2],
        count=keep.sum(),
        outlier_share=1 - keep.mean(),
      )
    )
  out = {k: np.array([row[k] for row in rows]) for k in rows[0]}
  return out if channel_wise else {k: v[0] for k, v in out.items()}


def _model(channel_wise=False, settings=_SETTINGS, timesteps=(951, 1, 501)):
  data = {t: _data(t) for t in timesteps}
  return gaussian.fit(
    timesteps,
    lambda t: _chunks(*data[t])(),
    channel_wise,
    settings=settings,
  )


class FitTest(parameterized.TestCase):
  @parameterized.product(
    channel_wise=(False, True),
    outlier_std=(4.0, 2.5, float('inf')),
    offset=(0.0, 300.0),
  )
  def test_equals_numpy(self, channel_wise, outlier_std, offset):
    eps_q, eps = _data(offset=offset)
    got = gaussian.fit_timestep(_chunks(eps_q, eps), channel_wise, outlier_std)
    want = _reference(eps_q, eps, channel_wise, outlier_std)
    for name in ('mean_q', 'mean_d', 'var_q', 'var_d', 'cov', 'outlier_share'):
      np.testing.assert_allclose(
        getattr(got, name), want[name], rtol=1e-9, atol=1e-12, err_msg=name
      )
    np.testing.assert_array_equal(got.count, want['count'])
    if np.isfinite(outlier_std):
      self.assertGreater(np.max(got.outlier_share), 0.005)
    else:
      self.assertEqual(np.max(got.outlier_share), 0)
    model = gaussian.stack([1], [got])
    for name in ('var_eps', 'cov_eps'):
      np.testing.assert_allclose(
        getattr(model, name)[0], want[name], rtol=1e-6, err_msg=name
      )
    np.testing.assert_allclose(
      model.rho[0], want['cov'] / np.sqrt(want['var_q'] * want['var_d'])
    )

  def test_means_per_channel_are_there_either_way(self):
    eps_q, eps = _data()
    tensor = gaussian.fit_timestep(_chunks(eps_q, eps), False, np.inf)
    channel = gaussian.fit_timestep(_chunks(eps_q, eps), True, np.inf)
    for name, x in (('q', eps_q), ('d', np.float64(eps_q) - eps)):
      want = np.mean(np.float64(x), (0, 1, 2))
      for fit in (tensor, channel):
        got = getattr(fit, f'channel_mean_{name}')
        np.testing.assert_allclose(got, want, rtol=1e-12)

  @parameterized.parameters(False, True)
  def test_does_not_depend_on_chunks(self, channel_wise):
    eps_q, eps = _data()
    one = gaussian.fit_timestep(_chunks(eps_q, eps, 40), channel_wise)
    many = gaussian.fit_timestep(_chunks(eps_q, eps, 1), channel_wise)
    for a, b in zip(one, many, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-11)

  def test_constant_error_has_no_outliers(self):
    eps_q, _ = _data()
    got = gaussian.fit_timestep(_chunks(eps_q, eps_q))
    self.assertEqual(got.outlier_share, 0)
    self.assertEqual((got.mean_d, got.var_d, got.cov), (0, 0, 0))

  def test_merge_equals_whole(self):
    rng = np.random.default_rng(0)
    q, d = rng.normal(size=(2, 90, 3))
    ones = np.ones(d.shape, bool)
    whole = gaussian._moments(q, d, ones)
    parts = [
      gaussian._moments(q[s], d[s], ones[s])
      for s in (slice(0, 1), slice(1, 50), slice(50, 50), slice(50, 90))
    ]
    left = parts[0]
    for part in parts[1:]:
      left = gaussian.merge(left, part)
    right = gaussian.merge(parts[3], gaussian.merge(parts[1], parts[0]))
    for a, b, c in zip(whole, left, right, strict=True):
      np.testing.assert_allclose(b, a, rtol=1e-11)
      np.testing.assert_allclose(c, a, rtol=1e-11)

  def test_refuses(self):
    eps_q, eps = _data()
    bad = np.where(eps > 2, np.nan, eps)
    for message, pairs, std in (
      ('No pairs', lambda: (), 4.0),
      ('expected one shape', lambda: [(eps_q, eps[:1])], 4.0),
      ('expected one shape', lambda: [(eps_q[0], eps[0])], 4.0),
      ('not finite', lambda: [(eps_q, bad)], 4.0),
      ('channels', lambda: [(eps_q, eps), (eps[..., :1], eps[..., :1])], 4.0),
      ('outlier_std is 0', lambda: [(eps_q, eps)], 0),
      ('at least 2', lambda: [(eps_q, eps)], 1e-9),
    ):
      with self.assertRaisesRegex(ValueError, message):
        gaussian.fit_timestep(pairs, outlier_std=std)

  def test_refuses_passes_that_differ(self):
    eps_q, eps = _data()
    sizes = iter([40, 20])

    def pairs():
      size = next(sizes)
      return [(eps_q[:size], eps[:size])]

    with self.assertRaisesRegex(ValueError, 'had 2400 elements, then 1200'):
      gaussian.fit_timestep(pairs)

  def test_names_the_timestep(self):
    eps_q, eps = _data()
    with self.assertRaisesRegex(ValueError, 'Timestep 51: No pairs'):
      gaussian.fit([1, 51], lambda t: [(eps_q, eps)] if t == 1 else [])


class ModelTest(parameterized.TestCase):
  def test_conditional(self):
    model = _model()
    gain, bias, variance = model.conditional()
    # The regression of d over eps_q.
    np.testing.assert_allclose(gain, model.cov / model.var_q, rtol=1e-12)
    np.testing.assert_allclose(gain * model.mean_q + bias, model.mean_d)
    want = model.var_d - model.cov**2 / model.var_q
    np.testing.assert_allclose(variance, want, rtol=1e-9)

  def test_conditional_of_clamped_and_constant(self):
    model = _model()
    model = dataclasses.replace(
      model,
      var_q=[4.0, 4.0, 0.0],
      var_d=[1.0, 1.0, 1.0],
      cov=[2.0, -2.0, 0.0],
    )
    gain, bias, variance = model.conditional()
    np.testing.assert_allclose(gain, [0.49995, -0.49995, 0.0])
    np.testing.assert_allclose(variance, [*[1 - 0.9999**2] * 2, 1.0])
    self.assertEqual(bias[2], model.mean_d[2])

  @parameterized.parameters(False, True)
  def test_rows_of(self, channel_wise):
    model = _model(channel_wise)
    self.assertEqual(model.channel_wise, channel_wise)
    np.testing.assert_array_equal(model.rows_of([1, 951]), [1, 0])
    with self.assertRaisesRegex(ValueError, r'timesteps \[51, 52\]; it has'):
      model.rows_of(np.array([52, 1, 51], np.int32))

  def test_refuses_what_is_no_model(self):
    model = _model()
    for message, change in (
      ('repeat', {'timesteps': [1, 1, 2]}),
      ('shape', {'timesteps': 1}),
      ('not finite', {'mean_q': [0, np.nan, 0]}),
      ('var_d is negative', {'var_d': [1, -1, 1]}),
      (r'exceeds .* \[1\]', {'cov': [0, 99, 0]}),
      ('cov has shape', {'cov': [0, 0]}),
      ('mean_q', {'mean_q': [0, 0]}),
      ('channel_mean_q', {'channel_mean_q': [0, 0, 0]}),
      ('channel_mean_d has', {'channel_mean_d': np.zeros((3, 2))}),
    ):
      with self.assertRaisesRegex(ValueError, message):
        dataclasses.replace(model, **change)
    with self.assertRaises(ValueError):
      model.mean_q[0] = 1  # Frozen to the bottom.

  def test_stack_refuses(self):
    tensor = gaussian.fit_timestep(_chunks(*_data()))
    channel = gaussian.fit_timestep(_chunks(*_data()), True)
    for message, args in (
      ('2 timesteps, but 1 fits', ([1, 2], [tensor])),
      ('different shapes', ([1, 2], [tensor, channel])),
      ('No timesteps', ([], [])),
    ):
      with self.assertRaisesRegex(ValueError, message):
        gaussian.stack(*args)

  def test_join_is_the_model_of_all_timesteps(self):
    whole = _model(True)
    parts = [_model(True, timesteps=(t,)) for t in whole.timesteps.tolist()]
    joined = gaussian.ErrorModel.join(parts)
    for name in whole.names():
      np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    self.assertEqual(joined.settings, whole.settings)
    with self.assertRaisesRegex(ValueError, 'repeat'):
      gaussian.ErrorModel.join([whole, parts[0]])


class FileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = (
      pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
      / 'a/error_model.npz'
    )

  @parameterized.parameters(False, True)
  def test_round_trip(self, channel_wise):
    model = _model(channel_wise)
    model.save(self.path)
    self.assertEqual(os.listdir(self.path.parent), [self.path.name])
    again = gaussian.ErrorModel.load(self.path, _SETTINGS)
    self.assertEqual(again.settings, model.settings)
    for name in model.names():
      a, b = getattr(model, name), getattr(again, name)
      self.assertEqual(a.dtype, b.dtype)
      np.testing.assert_array_equal(a, b)

  def test_refuses_other_settings_naming_both_values(self):
    _model().save(self.path)
    gaussian.ErrorModel.load(self.path, {'w_bits': 4})
    with self.assertRaisesRegex(
      ValueError, r'model\.npz: .* guidance: nothing, not 3.0; w_bits: 4, not 8'
    ):
      gaussian.ErrorModel.load(
        self.path, {'w_bits': 8, 'eta': 0, 'guidance': 3.0}
      )

  def test_failed_write_leaves_the_old_file(self):
    _model().save(self.path)
    before = self.path.read_bytes()
    with mock.patch.object(np, 'savez', side_effect=OSError('disk full')):
      with self.assertRaisesRegex(OSError, 'disk full'):
        _model(True).save(self.path)
    self.assertEqual(self.path.read_bytes(), before)
    self.assertEqual(os.listdir(self.path.parent), [self.path.name])

  def test_missing_file(self):
    with self.assertRaises(FileNotFoundError):
      gaussian.ErrorModel.load(self.path)

  def test_damaged_files(self):
    _model().save(self.path)
    whole = self.path.read_bytes()
    flipped = bytearray(whole)
    # Within the last array's numbers, just before the zip's directory.
    at = whole.rindex(b'PK\x01\x02', 0, whole.index(b'PK\x01\x02') + 4) - 8
    flipped[at] ^= 0xFF
    for content in (
      b'',
      b'not a zip',
      whole[: len(whole) // 2],
      bytes(flipped),
      pickle.dumps({'mean_q': 1}),
    ):
      self.path.write_bytes(content)
      with self.assertRaisesRegex(ValueError, 'not a readable error model'):
        gaussian.ErrorModel.load(self.path)
    np.save(self.path.with_suffix('.npy'), np.zeros(3))
    with self.assertRaisesRegex(ValueError, 'not a readable error model'):
      gaussian.ErrorModel.load(self.path.with_suffix('.npy'))

  def rewrite(self, fields, **arrays):
    """Saves a model with some of its content replaced."""
    _model().save(self.path)
    content = dict(np.load(self.path))
    old = json.loads(str(content['header']))
    content['header'] = np.array(json.dumps({**old, **fields}))
    content.update(arrays)
    content = {k: v for k, v in content.items() if v is not None}
    np.savez(self.path, **content)

  def test_other_content(self):
    pickled = np.array([{'t': 1}], dtype=object)
    for message, header, arrays in (
      ('version 2: expected .* version 1', {'version': 2}, {}),
      ("'other' version", {'format': 'other'}, {}),
      ('do not match their hash', {'settings': {'w_bits': 8}}, {}),
      ('do not match their hash', {'settings': 3}, {}),
      ('no header', {}, {'header': None}),
      ('no header', {}, {'header': np.array('{')}),
      ('no header', {}, {'header': np.array('[]')}),
      ('holds', {}, {'cov': None}),
      ('holds', {}, {'more': np.zeros(1)}),
      ('var_q is negative', {}, {'var_q': -np.ones(3)}),
      ('not a readable error model', {}, {'cov': pickled}),
    ):
      self.rewrite(header, **arrays)
      with self.assertRaisesRegex(ValueError, message):
        gaussian.ErrorModel.load(self.path)


if __name__ == '__main__':
  absltest.main()
