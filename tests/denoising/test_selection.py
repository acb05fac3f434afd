"""What corrections do on held-out images: against NumPy and known answers."""

import dataclasses
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from d2dpm_jax.denoising import gaussian, selection

_NAMES = selection.CANDIDATES


def _evaluate(
  eps_q, eps, folds=4, outlier_std=np.inf, size=7, settings=None, x=None
):
  """Of one timestep; images come in chunks of `size`."""
  if x is None:  # It tells nothing.
    x = np.random.default_rng(9).normal(size=eps.shape)

  def points(t):
    assert t == 1
    for i in range(0, len(eps), size):
      yield tuple(a[i : i + size] for a in (eps_q, eps, x))

  tensor, channel = (
    gaussian.fit([1], points, channel_wise, outlier_std, settings)
    for channel_wise in (False, True)
  )
  return selection.evaluate(tensor, channel, points, folds, outlier_std)


def _pairs(draw, images=400, seed=0):
  """eps_q ~ N(0.5, 1) and eps = eps_q - draw(rng, eps_q), float64."""
  rng = np.random.default_rng(seed)
  eps_q = rng.normal(size=(images, 4, 4, 3)) + 0.5
  return eps_q, eps_q - draw(rng, eps_q)


def _design(q, x, by_place):
  """Rows (eps_q, x_t, what has an offset of its own), float64[N * H * W, _]."""
  shape = q.shape[1:3]
  places = np.eye(shape[0] * shape[1]).reshape(*shape, -1)
  if not by_place:
    places = np.ones((*shape, 1))
  places = np.broadcast_to(places, (len(q), *places.shape))
  return np.concatenate([q, x, places], -1)


def _fit_by_hand(q, x, d, name, outlier_std):
  """The prediction of a candidate, from whole arrays [N, H, W, 3]."""
  if name.startswith('linear'):
    by_place = name == 'linear+place'
    known = _design(q, x, by_place)
    flat = known.reshape(-1, known.shape[-1])
    weights, *_ = np.linalg.lstsq(flat, d.reshape(-1, 3), rcond=None)
    return lambda q, x: _design(q, x, by_place) @ weights
  gain, bias = np.zeros(3), np.zeros(3)
  groups = [slice(None)] if name.startswith('tensor') else [0, 1, 2]
  for group in groups if name != 'none' else []:
    a, b = q[..., group].ravel(), d[..., group].ravel()
    keep = np.abs(b - b.mean()) <= outlier_std * b.std()
    a, b = a[keep], b[keep]
    slope, offset = 0.0, b.mean()
    if name.endswith('gain+bias'):
      slope, offset = np.polyfit(a, b, 1)
    gain[group], bias[group] = slope, offset
  return lambda q, x: gain * q + bias


class HeldOutTest(parameterized.TestCase):
  @parameterized.product(outlier_std=(np.inf, 2.5), folds=(2, 3))
  def test_equals_numpy(self, outlier_std, folds):
    eps_q, eps = _pairs(
      lambda rng, q: (
        0.2 * q + [0.1, 0.0, -0.3] + rng.normal(size=q.shape) * [0.1, 0.2, 0.3]
      ),
      images=20,
    )
    x = 0.9 * eps_q + np.random.default_rng(3).normal(size=eps_q.shape)
    found = _evaluate(eps_q, eps, folds, outlier_std, x=x)
    d = eps_q - eps
    image = np.arange(20)
    for k, name in enumerate(_NAMES):
      left = np.empty_like(d)
      for fold in range(folds):
        out = image % folds == fold
        predict = _fit_by_hand(eps_q[~out], x[~out], d[~out], name, outlier_std)
        left[out] = d[out] - predict(eps_q[out], x[out])
      of_image = np.sum(left**2, (1, 2, 3)), np.sum(d**2, (1, 2, 3))
      ratio = of_image[0].sum() / of_image[1].sum()
      spread = np.std(of_image[0] - ratio * of_image[1], ddof=1)
      want = dict(
        left_variance=np.var(left, (0, 1, 2)),
        r2=1 - ratio,
        standard_error=spread * 20**0.5 / of_image[1].sum(),
      )
      for key, value in want.items():
        np.testing.assert_allclose(
          getattr(found, key)[0, k], value, rtol=1e-8, atol=1e-12, err_msg=name
        )
      predict = _fit_by_hand(eps_q, x, d, name, outlier_std)
      known = np.concatenate([eps_q, x], -1)
      got = known @ found.weights[0, k] + found.bias[0, k]
      if name == 'linear+place':
        got = got + found.place[0]
      want = np.broadcast_to(predict(eps_q, x), got.shape)
      np.testing.assert_allclose(got, want, atol=1e-10, err_msg=name)

  def test_known_shares(self):
    """d = m_c + g q + noise: every share follows from the moments."""
    bias, gain, noise = np.array([0.3, 0.0, -0.3]), 0.2, 0.4
    eps_q, eps = _pairs(
      lambda rng, q: bias + gain * q + noise * rng.normal(size=q.shape),
      images=1000,
    )
    found = _evaluate(eps_q, eps)
    mean = bias + gain * 0.5  # Of d, per channel; eps_q has mean 0.5.
    whole = np.mean(mean**2) + gain**2 + noise**2
    left = {
      'none': whole,
      'tensor bias': whole - mean.mean() ** 2,
      'tensor gain+bias': np.var(mean) + noise**2,
      'channel bias': gain**2 + noise**2,
      'channel gain+bias': noise**2,
      'linear': noise**2,
      'linear+place': noise**2,
    }
    # Four standard errors are 0.02 at most with 48 000 numbers.
    for k, name in enumerate(_NAMES):
      np.testing.assert_allclose(
        found.r2[0, k], 1 - left[name] / whole, atol=0.02, err_msg=name
      )
    # The last ones may win by chance; there is nothing for them to find.
    self.assertGreaterEqual(found.choice()[0], 4)
    last = _NAMES.index('channel gain+bias')
    np.testing.assert_allclose(
      found.left_variance[0, last], noise**2, rtol=0.05
    )

  def test_standard_error_is_the_spread_over_data_sets(self):
    """Errors of an image are alike, so elements would give far too little."""

    def draw(rng, q):
      loud = rng.gamma(1.0, size=(len(q), 1, 1, 1))
      return 0.1 * q + 0.1 + loud * rng.normal(size=q.shape) * 0.5

    sets = [_evaluate(*_pairs(draw, 100, seed)) for seed in range(40)]
    r2 = np.stack([s.r2[0] for s in sets])
    error = np.stack([s.standard_error[0] for s in sets])
    # A standard deviation of 40 numbers is good to 11 %, twice that allowed.
    spread, error = r2.std(0, ddof=1), error.mean(0)
    np.testing.assert_allclose(spread[1:6], error[1:6], rtol=0.35)
    # An offset for each place of 100 images: fits differ, too.
    self.assertBetween(spread[6] / error[6], 1.0, 2.0)
    self.assertEqual(error[0], 0)

  def test_x_tells_what_eps_q_does_not(self):
    """d is a mix of x_t's channels and a pattern in space, seen through noise.

    Of eps_q = eps + d alone next to nothing can be told: d is a tenth of it.
    """
    rng = np.random.default_rng(2)
    x, eps = rng.normal(size=(2, 300, 4, 4, 3))
    mix = 0.1 * rng.normal(size=(3, 3))
    pattern = 0.1 * rng.normal(size=(4, 4, 3))
    pattern -= pattern.mean((0, 1))
    noise = 0.05
    d = x @ mix + pattern + noise * rng.normal(size=x.shape)
    found = _evaluate(eps + d, eps, x=x)
    whole = np.square(d).mean()
    self.assertLess(found.r2[0, :5].max(), 0.2)
    of_pattern = np.square(pattern).mean()
    for name, left in (
      ('linear', of_pattern + noise**2),
      ('linear+place', noise**2),
    ):
      k = _NAMES.index(name)
      # eps_q holds d, too: that tells a little more.
      self.assertBetween(
        found.r2[0, k], 1 - left / whole - 0.01, 1 - 0.9 * left / whole
      )
    self.assertEqual(_NAMES[found.choice()[0]], 'linear+place')
    np.testing.assert_allclose(found.weights[0, -1, 3:], mix, atol=0.01)
    np.testing.assert_allclose(found.place[0], pattern, atol=0.02)

  def test_x_that_is_eps_q_is_no_trouble(self):
    eps_q, eps = _pairs(lambda rng, q: 0.3 * q + rng.normal(size=q.shape), 50)
    same = _evaluate(eps_q, eps, x=eps_q)
    zero = _evaluate(eps_q, eps, x=0 * eps_q)
    np.testing.assert_allclose(same.r2, zero.r2, rtol=1e-6, atol=1e-9)
    self.assertLess(np.abs(same.weights).max(), 0.5)

  def test_few_images_overfit_and_that_is_seen(self):
    """In sample a bias looks good; other images do not share it."""
    eps_q, eps = _pairs(lambda rng, q: rng.normal(size=(len(q), 1, 1, 3)), 4)
    found = _evaluate(eps_q, eps, folds=2)
    self.assertLess(found.r2[0, 3], 0)
    self.assertEqual(found.choice()[0], 0)

  def test_chunks_do_not_matter(self):
    eps_q, eps = _pairs(lambda rng, q: 0.1 * q + rng.normal(size=q.shape), 20)
    one, other = (_evaluate(eps_q, eps, size=size) for size in (20, 3))
    for name in one.names():
      np.testing.assert_allclose(
        getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12
      )

  def test_no_error_at_all(self):
    eps_q, _ = _pairs(lambda rng, q: q, 8)
    found = _evaluate(eps_q, eps_q)
    np.testing.assert_array_equal(found.r2, 0)
    self.assertEqual(found.choice()[0], 0)

  def test_refuses(self):
    eps_q, eps = _pairs(lambda rng, q: rng.normal(size=q.shape), 8)
    with self.assertRaisesRegex(ValueError, 'Timestep 1: 1 images'):
      _evaluate(eps_q[:1], eps[:1])
    with self.assertRaisesRegex(ValueError, 'folds is 1'):
      _evaluate(eps_q, eps, folds=1)
    with self.assertRaisesRegex(ValueError, 'x_t .* and eps_q .* differ'):
      _evaluate(eps_q, eps, x=eps_q[..., :1])
    with self.assertRaisesRegex(ValueError, 'x_t holds values'):
      _evaluate(eps_q, eps, x=eps_q * np.inf)


class ChoiceTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('noise', 'none', lambda rng, q: 0),
    ('bias', 'tensor bias', lambda rng, q: 0.5),
    ('channels', 'channel bias', lambda rng, q: np.array([0.5, 0.0, -0.5])),
    ('gain', 'tensor gain+bias', lambda rng, q: 0.5 * q),
    (
      'gains',
      'channel gain+bias',
      lambda rng, q: np.array([0.5, 0.0, -0.5]) * q,
    ),
  )
  def test_picks_what_the_error_is_made_of(self, name, predictable):
    eps_q, eps = _pairs(
      lambda rng, q: predictable(rng, q) + rng.normal(size=q.shape)
    )
    found = _evaluate(eps_q, eps)
    if name == 'none':
      self.assertEqual(found.choice()[0], 0)
      return
    # Where it holds, a candidate with more freedom may do as well by chance;
    # it is fitted to the same numbers then.
    best = found.choice()[0]
    k = _NAMES.index(name)
    self.assertGreater(found.r2[0, k], 10 * found.standard_error[0, k])
    self.assertLess(found.r2[0, best] - found.r2[0, k], 1e-4)
    poorer = [j for j in range(k) if not (name.startswith('tensor') and j > 2)]
    self.assertLess(found.r2[0, poorer].max(), found.r2[0, k] - 0.01)

  def test_needs_two_standard_errors(self):
    eps_q, eps = _pairs(lambda rng, q: 0.5 + rng.normal(size=q.shape), 40)
    found = _evaluate(eps_q, eps)
    choices = [
      dataclasses.replace(
        found, standard_error=np.full((1, 7), found.r2.max() / few)
      ).choice()[0]
      for few in (1.9, 2.1)
    ]
    self.assertEqual(choices, [0, np.argmax(found.r2[0])])


class SettleTest(parameterized.TestCase):
  def _found(self):
    """Of eight steps, in which the richest candidate always predicts most."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4, 4, 3))
    eps_q, eps = _pairs(lambda rng, q: 0.3 * q + 0.5 * x + 1, 40)
    one = _evaluate(eps_q, eps, x=x)
    timesteps = [951, 801, 651, 501, 401, 301, 201, 1]
    found = selection.HeldOut.join(
      [dataclasses.replace(one, timesteps=[t]) for t in timesteps]
    )
    self.assertTrue((found.choice() >= _NAMES.index('linear')).all())
    return found

  def test_order_of_timesteps_does_not_matter(self):
    found = self._found()
    ascending = selection.HeldOut.join(
      [
        dataclasses.replace(
          found,
          **{name: getattr(found, name)[[i]] for name in found.names()},
        )
        for i in reversed(range(8))
      ]
    )
    for name, menu in selection.restricted(found).items():
      other = selection.restricted(ascending)[name]
      np.testing.assert_array_equal(menu.allowed, other.allowed[::-1])

  @parameterized.parameters(
    ('x_t in 4/4', 8), ('x_t in 3/4', 6), ('x_t in 1/4', 2), ('Gaussians', 0)
  )
  def test_maps_that_see_x_are_kept_to_the_last_steps(self, wanted, steps):
    found = self._found()
    linear = _NAMES.index('linear')

    def distance(menu):
      sees = menu.choice() >= linear
      self.assertTrue((menu.choice() > 0).all() or not menu.choice().any())
      return abs(int(sees.sum()) - steps) + (not menu.choice().any())

    best, tried = selection.settle(found, distance)
    self.assertEqual(min(tried, key=tried.get), wanted)
    sees = best.choice() >= linear
    np.testing.assert_array_equal(sees, [False] * (8 - steps) + [True] * steps)
    np.testing.assert_array_equal(best.weights, found.weights)

  def test_nothing_at_all_if_all_do_harm(self):
    found = self._found()
    best, tried = selection.settle(found, lambda menu: menu.choice().any())
    self.assertEqual(tried['none'], 0)
    np.testing.assert_array_equal(best.choice(), np.zeros(8))

  def test_equal_choices_are_tried_once(self):
    eps_q, eps = _pairs(lambda rng, q: rng.normal(size=q.shape))  # Noise alone.
    found = _evaluate(eps_q, eps)
    self.assertEqual(found.choice().tolist(), [0])
    calls = []
    best, tried = selection.settle(found, lambda menu: calls.append(0) or 1.0)
    self.assertLen(calls, 1)
    self.assertLen(tried, 6)
    np.testing.assert_array_equal(best.allowed, found.allowed)


class FileTest(parameterized.TestCase):
  def test_round_trip_and_refusals(self):
    eps_q, eps = _pairs(lambda rng, q: rng.normal(size=q.shape), 8)
    found = _evaluate(eps_q, eps, settings={'bits': 4})
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'held_out.npz'
    found.save(path)
    again = selection.HeldOut.load(path, {'bits': 4})
    self.assertEqual(again.settings, {'bits': 4})
    for name in found.names():
      np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    with self.assertRaisesRegex(ValueError, 'bits: 4, not 8'):
      selection.HeldOut.load(path, {'bits': 8})
    with self.assertRaisesRegex(ValueError, "'d2dpm_jax.held_out' version 4"):
      gaussian.ErrorModel.load(path)
    for message, change in (
      ('bias has shape', {'bias': np.zeros((1, 4, 3))}),
      ('weights has shape', {'weights': np.zeros((1, 7, 3, 3))}),
      ('place has shape', {'place': np.zeros((1, 4, 3))}),
      ('r2 has shape', {'r2': np.zeros((1, 4))}),
      ('allowed has shape', {'allowed': np.ones((1, 6), int)}),
      ('standard_error is negative', {'standard_error': -np.ones((1, 7))}),
      ('not finite', {'r2': np.full((1, 7), np.nan)}),
    ):
      with self.assertRaisesRegex(ValueError, message):
        dataclasses.replace(found, **change)

  def test_any_damaged_byte_is_an_error_that_names_the_file(self):
    """Or is in a part of the archive that nothing reads."""
    rng = np.random.default_rng(0)
    eps_q, eps = _pairs(lambda rng, q: rng.normal(size=q.shape), 8)
    found = _evaluate(eps_q, eps)
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / 'held_out.npz'
    found.save(path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
      damaged = bytearray(whole)
      damaged[place] ^= 1 << int(rng.integers(8))
      path.write_bytes(damaged)
      try:
        again = selection.HeldOut.load(path)
      except ValueError as error:
        self.assertIn('held_out', str(error))
        refused += 1
      else:
        for name in found.names():
          np.testing.assert_array_equal(
            getattr(again, name), getattr(found, name)
          )
    self.assertGreater(refused, len(whole) // 9)

  def test_table_for_people(self):
    eps_q, eps = _pairs(
      lambda rng, q: [0.5, 0.0, -0.5] + rng.normal(size=q.shape)
    )
    found = _evaluate(eps_q, eps)
    later = dataclasses.replace(found, timesteps=[951])
    table = selection.format_table(selection.HeldOut.join([later, found]))
    header, first, second = table.splitlines()
    for name in _NAMES[1:]:
      self.assertIn(name, header)
    self.assertRegex(first, r'^  951 .* 1[345]\.\d \+- 0\.\d .* channel ')
    self.assertRegex(second, r'^    1 ')
    self.assertEqual({len(header.split('  best')[0])}, {first.index('  chan')})


if __name__ == '__main__':
  absltest.main()
