"""Corrections inside the sampler, against NumPy and against themselves."""

import dataclasses
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from d2dpm_jax.denoising import correction, gaussian, selection
from d2dpm_jax.diffusion import ddim, sampler

# Last bits of 13 steps count, at which x reaches 20.
pytestmark = pytest.mark.usefixtures('full_compile')

_GOLDEN = pathlib.Path(__file__).parents[1] / (
  'golden/correction_trajectories.npz'
)
_DDIM = pathlib.Path(__file__).parents[1] / 'golden/ddim_trajectories.npz'
_LATENT = (2, 5, 3)
_LABELS = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
_STATISTICS = (
  'mean_q',
  'mean_d',
  'var_q',
  'var_d',
  'cov',
  'channel_mean_q',
  'channel_mean_d',
)


# 'auto' takes another table than all the others, see AutoTest.
_OF_GAUSSIANS = [kind for kind in correction.CORRECTIONS if kind != 'auto']
_EQUAL_WITHOUT_NOISE = (
  {'s_d2', 's_d2_absorb'},
  {'d_d2', 'mean_only'},
)


def _quantized(x, t, label, table=None):
  """`quantized` of tests/golden/make_correction.py."""
  del table
  u = t.astype(jnp.float32)[:, None, None, None] / 1000
  label = label[:, None, None, None]
  mixed = 0.7 * x + 0.2 * jnp.roll(x, 1, 1) - 0.1 * jnp.roll(x, 1, (2, 3))
  eps = jnp.tanh(3 * u) * mixed + 0.25 * jnp.sin(0.5 * x + label + 2 * u)
  return 1.04 * eps + 0.03 * jnp.sin(3 * x + label) + 0.02


def _rows(eta):
  return ddim.ddim_rows(np.load(_DDIM)['alphas_cumprod'], 20, eta)


def _model(grouping, **changes):
  golden = np.load(_GOLDEN)
  statistics = {k: golden[f'{grouping}_{k}'] for k in _STATISTICS}
  statistics.update(changes)
  shape = np.shape(statistics['mean_q'])
  return gaussian.ErrorModel(
    timesteps=_rows(0.0).t,
    count=np.full(shape, 100),
    outlier_share=np.zeros(shape),
    **statistics,
  )


def _held_out(*winners):
  """Statistics of `_model`, for which these candidates do best, in a cycle."""
  tensor, channel = _model('tensor'), _model('channel')
  steps, kinds = len(tensor.timesteps), len(selection.CANDIDATES)
  weights, bias = (np.zeros((steps, kinds, n, 3)) for n in (6, 1))
  for k, name in enumerate(selection.CANDIDATES[1:5], 1):
    model = tensor if name.startswith('tensor') else channel
    given = model.conditional()
    gains = given.gain if name.endswith('gain+bias') else 0 * given.gain
    shift = given.bias if name.endswith('gain+bias') else model.mean_d
    for c in range(3):
      pick = (slice(None), c) if model is channel else slice(None)
      weights[:, k, c, c], bias[:, k, 0, c] = gains[pick], shift[pick]
  rng = np.random.default_rng(5)
  weights[:, 5:] = rng.normal(size=(steps, 2, 6, 3)) * 0.1
  bias[:, 5:] = rng.normal(size=(steps, 2, 1, 3)) * 0.1
  r2 = np.full((steps, kinds), -0.1)
  r2[:, 0] = 0
  for step in range(steps):
    winner = winners[step % len(winners)]
    r2[step, selection.CANDIDATES.index(winner)] = 0.5 * (winner != 'none')
  variance = channel.conditional().variance[:, None]
  return selection.HeldOut(
    timesteps=tensor.timesteps,
    weights=weights,
    bias=bias[:, :, 0],
    place=rng.normal(size=(steps, *_LATENT)) * 0.1,
    left_variance=np.repeat(variance, kinds, 1),
    r2=r2,
    standard_error=np.full((steps, kinds), 0.1),
    allowed=np.ones((steps, kinds), int),
  )


def _sample(kind, rows, table, x_T, z, n):
  """x_0 and every x_t; tables are arguments, so programs are shared."""
  return sampler.sample(
    ddim.classifier_free(_quantized, 3.0, jnp.asarray(_LABELS), jnp.zeros(1)),
    rows,
    x_T,
    lambda i: z[i],
    correction.CORRECTIONS[kind],
    table,
    (lambda i: n[i]) if kind in correction.DRAWS_NOISE else None,
    collect=lambda step: step.x,
  )


_jitted = jax.jit(_sample, static_argnames='kind')


def _run(kind, model, eta, absorb=False, sample=_jitted):
  golden = np.load(_GOLDEN)
  rows = _rows(eta)
  table = correction.correction_rows(model, kind, rows.t, absorb)
  names = ('x_T', 'noise', 'error_noise')
  return sample(
    kind, rows, table, *(jnp.asarray(golden[k], jnp.float32) for k in names)
  )


class TrajectoryTest(parameterized.TestCase):
  @parameterized.product(
    kind=(*_OF_GAUSSIANS, 's-d2_absorb'),
    grouping=('tensor', 'channel'),
    eta=(0.0, 1.0),
  )
  def test_equals_golden(self, kind, grouping, eta):
    absorb = kind.endswith('_absorb')
    name = kind.removesuffix('_absorb')
    x_0, xs = _run(name, _model(grouping), eta, absorb)
    golden = np.load(_GOLDEN)
    key = f'{grouping}_{kind}_eta{eta:g}'.replace('-', '_')
    # float32 against float64; x reaches 20 on the way.
    np.testing.assert_allclose(
      xs[np.array([5, 10, 13])], golden[f'{key}_x'], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(x_0, golden[f'{key}_x_0'], rtol=1e-5, atol=1e-5)

  def test_cases_differ_where_they_should(self):
    golden = np.load(_GOLDEN)
    for eta in (0, 1):
      ends = {
        key: golden[key]
        for key in golden.files
        if key.endswith(f'_eta{eta}_x_0')
        and key != f'channel_none_eta{eta}_x_0'
      }
      self.assertLen(ends, 13)
      keys = list(ends)
      for i, a in enumerate(keys):
        for b in keys[:i]:
          kinds = {k.split('_', 1)[1].rsplit('_', 3)[0] for k in (a, b)}
          same_grouping = a.split('_')[0] == b.split('_')[0]
          # Without noise of the sampler, absorption has nothing to take.
          equal = not eta and (
            (kinds in _EQUAL_WITHOUT_NOISE and same_grouping)
            or kinds <= {'none', 'variance_only'}
          )
          difference = np.abs(ends[a] - ends[b]).max()
          if equal:
            self.assertEqual(difference, 0, (a, b))
          else:
            self.assertGreater(difference, 1e-3, (a, b))

  @parameterized.parameters('s-d2', 'd-d2')
  def test_scan_equals_python_loop(self, kind):
    model, rows, golden = _model('channel'), _rows(1.0), np.load(_GOLDEN)
    table = correction.correction_rows(model, kind, rows.t)
    eps_fn = ddim.classifier_free(
      _quantized, 3.0, jnp.asarray(_LABELS), jnp.zeros(1)
    )

    @jax.jit
    def step(x, row, correction_row, z, n):
      eps_q = eps_fn(x, jnp.full((4,), row.t), None)
      correct = correction.CORRECTIONS[kind]
      eps, residual_variance = correct(eps_q, x, correction_row, n)
      return ddim.ddim_step(x, eps, row, z, residual_variance)

    x = golden['x_T'].astype(np.float32)
    for i in range(20):
      row, correction_row = jax.tree.map(lambda c, i=i: c[i], (rows, table))
      noises = (
        golden[k][i].astype(np.float32) for k in ('noise', 'error_noise')
      )
      x = step(x, row, correction_row, *noises)
    got, _ = _run(kind, model, 1.0)
    np.testing.assert_allclose(got, x, rtol=5e-6, atol=5e-6)

  @parameterized.product(kind=_OF_GAUSSIANS, grouping=('tensor', 'channel'))
  def test_zero_statistics_are_plain_ddim(self, kind, grouping):
    given = vars(_model(grouping))
    model = _model(grouping, **{k: 0 * given[k] for k in _STATISTICS})
    (got, _), (want, _) = _run(kind, model, 1.0), _run('none', None, 1.0)
    # Adding zeros may be fused otherwise than leaving them out.
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)

  def test_none_adds_no_operations(self):
    rows = _rows(1.0)
    fn = ddim.classifier_free(_quantized, 1.0, jnp.asarray(_LABELS))
    x = jnp.zeros((4, 2, 5, 3))
    with_none, without = (
      str(
        jax.make_jaxpr(
          lambda x, c=c: sampler.sample(fn, rows, x, lambda i: x * 0, c)
        )(x)
      )
      for c in (correction.CORRECTIONS['none'], None)
    )
    self.assertEqual(with_none, without)
    self.assertIsNone(correction.correction_rows(None, 'none', rows.t))

  @parameterized.parameters(*correction.CORRECTIONS)
  def test_is_one_program_without_the_host(self, kind):
    model = _held_out('none') if kind == 'auto' else _model('channel')
    text = str(jax.make_jaxpr(lambda: _run(kind, model, 1.0, sample=_sample))())
    self.assertEqual(text.count(' scan['), 1)
    self.assertNotIn('callback', text)


class TruthTest(parameterized.TestCase):
  """On data that are Gaussian the promised residual is what is left."""

  @parameterized.product(
    kind=('d-d2', 's-d2', 'ptqd', 'variance-only'),
    channel_wise=(False, True),
  )
  def test_residual_variance(self, kind, channel_wise):
    rng = np.random.default_rng(0)
    shape = (400, 8, 8, 3)
    spread = np.array([0.7, 1.0, 1.3]) if channel_wise else 1.0
    eps = rng.normal(size=shape) * spread
    d = 0.15 * eps + rng.normal(size=shape) * 0.2 * spread
    d += np.array([0.0, 0.3, -0.4]) if kind == 'ptqd' or channel_wise else 0.1
    eps_q = (eps + d).astype(np.float32)
    eps = eps.astype(np.float32)
    model = gaussian.fit([1], lambda t: [(eps_q, eps)], channel_wise, np.inf)
    table = correction.correction_rows(model, kind, [1], kind == 's-d2')
    row = jax.tree.map(lambda leaf: leaf[0], table)
    noise = rng.normal(size=shape).astype(np.float32)
    got, residual = correction.CORRECTIONS[kind](eps_q, None, row, noise)
    axes = (0, 1, 2) if channel_wise else None
    left = np.asarray(got, np.float64) - eps
    before = np.mean(np.square(np.float64(eps_q) - eps), axes)
    after = np.mean(np.square(left), axes)
    if kind == 'variance-only':  # Takes d_d2's residual, corrects nothing.
      d_d2 = correction.correction_rows(model, 'd-d2', [1])
      np.testing.assert_array_equal(residual, d_d2.residual_variance[0])
      np.testing.assert_array_equal(got, eps_q)
      return
    # 2 % is more than five standard errors of a variance of 25 600 numbers.
    np.testing.assert_allclose(np.squeeze(residual), after, rtol=0.02)
    if kind != 's-d2':
      self.assertLess(np.max(after / before), 0.9)


class AutoTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 1.0)
  def test_is_d_d2_where_that_is_chosen(self, eta):
    """Same residual variances, so the same trajectory; eta 1 uses them."""
    auto, _ = _run('auto', _held_out('channel gain+bias'), eta)
    d_d2, _ = _run('d-d2', _model('channel'), eta)
    # One sum of products for another, over twenty steps.
    np.testing.assert_allclose(auto, d_d2, rtol=1e-5, atol=1e-5)

  def test_no_choice_is_plain_ddim_at_eta_0(self):
    (got, _), (want, _) = (
      _run('auto', _held_out('none'), 0.0),
      _run('none', None, 0.0),
    )
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)

  def test_each_step_has_its_own(self):
    names = selection.CANDIDATES
    model = _held_out(*names)
    table = correction.correction_rows(model, 'auto', model.timesteps)
    rng = np.random.default_rng(0)
    eps_q, x = rng.normal(size=(2, 4, *_LATENT)).astype(np.float32)
    channel, tensor = _model('channel'), _model('tensor')
    for step in range(len(model.timesteps)):
      name = names[step % len(names)]
      row = jax.tree.map(lambda leaf, i=step: leaf[i], table)
      got, residual = correction.auto(eps_q, x, row, None)
      of = tensor if name.startswith('tensor') else channel
      given = of.conditional()
      if name == 'none':
        want = np.zeros(3)
      elif name.startswith('linear'):
        k = names.index(name)
        a, b = np.split(model.weights[step, k], 2)
        want = eps_q @ a + x @ b + model.bias[step, k]
        want = want + model.place[step] * (name == 'linear+place')
      elif name.endswith('gain+bias'):
        want = given.gain[step] * eps_q + given.bias[step]
      else:
        want = of.mean_d[step]
      np.testing.assert_allclose(got, eps_q - want, rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(
        residual[0, 0], channel.conditional().variance[step], rtol=1e-6
      )


class RowsTest(parameterized.TestCase):
  @parameterized.product(
    kind=[k for k in _OF_GAUSSIANS if k != 'none'],
    grouping=('tensor', 'channel'),
  )
  def test_shapes(self, kind, grouping):
    model = _model(grouping)
    table = correction.correction_rows(model, kind, _rows(0.0).t)
    leaves = jax.tree.leaves(table)
    self.assertNotEmpty(leaves)
    for leaf in leaves:
      self.assertEqual(leaf.dtype, np.float32)
      self.assertEqual(leaf.shape[:3], (20, 1, 1))
    last = {leaf.shape[3] for leaf in leaves}
    if kind == 'ptqd' and grouping == 'tensor':
      self.assertEqual(last, {1, 3})  # One k, but a bias per channel.
    else:
      self.assertEqual(last, {3 if grouping == 'channel' else 1})

  def test_follow_the_timesteps_asked_for(self):
    model = _model('channel')
    want = correction.correction_rows(model, 'd-d2', model.timesteps)
    order = np.random.default_rng(0).permutation(20)[:7]
    got = correction.correction_rows(model, 'd-d2', model.timesteps[order])
    jax.tree.map(
      lambda g, w: np.testing.assert_array_equal(g, w[order]), got, want
    )

  def test_one_signature(self):
    names = {
      tuple(inspect.signature(f).parameters)
      for f in correction.CORRECTIONS.values()
    }
    self.assertEqual(names, {('eps_q', 'x', 'row', 'noise')})

  @parameterized.parameters(*correction.CORRECTIONS)
  def test_draws_noise_names_those_that_use_it(self, kind):
    model = _held_out('tensor bias') if kind == 'auto' else _model('tensor')
    table = correction.correction_rows(model, kind, [951])
    row = jax.tree.map(lambda leaf: leaf[0], table)
    x = jnp.ones((1, *_LATENT))
    fn = correction.CORRECTIONS[kind]
    if kind in correction.DRAWS_NOISE:
      with self.assertRaisesRegex(ValueError, 'noise is missing'):
        fn(x, x, row, None)
      self.assertGreater(
        np.abs(fn(x, x, row, x)[0] - fn(x, x, row, -x)[0]).max(), 0
      )
    else:
      np.testing.assert_array_equal(fn(x, x, row, None)[0], fn(x, x, row, x)[0])

  def test_refuses(self):
    model = _model('tensor')
    for message, args in (
      (r'timesteps \[52\]', (model, 'd-d2', [951, 52])),
      ("'d_d2': expected one of", (model, 'd_d2', [951])),
      ('needs an error model', (None, 'ptqd', [951])),
      ('option of s-d2, not of d-d2', (model, 'd-d2', [951], True)),
      ('option of s-d2, not of none', (None, 'none', [951], True)),
      ('option of s-d2, not of auto', (None, 'auto', [951], True)),
      ("'auto' cannot use the error model", (model, 'auto', [951])),
      (
        "'d-d2' cannot use the table of held-out",
        (_held_out('none'), 'd-d2', [951]),
      ),
      (r'timesteps \[52\]', (_held_out('none'), 'auto', [951, 52])),
    ):
      with self.assertRaisesRegex(ValueError, message):
        correction.correction_rows(*args)

  def test_negative_k_is_zero(self):
    model = _model('tensor')
    model = dataclasses.replace(model, cov=-np.abs(model.cov))
    table = correction.correction_rows(model, 'ptqd', model.timesteps)
    np.testing.assert_array_equal(table.scale, np.ones((20, 1, 1, 1)))
    np.testing.assert_allclose(
      table.shift[:, 0, 0], model.channel_mean_d, rtol=1e-6
    )


if __name__ == '__main__':
  absltest.main()
