"""`evaluate.selfcheck`: does this installation measure correctly?"""

import itertools

import jax

from d2dpm_jax.evaluation import references, selfcheck
from d2dpm_jax.pipelines import judges


def check() -> None:
  """Prints known answers beside what comes out here.

  Raises:
    ValueError: one of them is wrong; names all of these.
  """
  device = jax.devices()[0]
  print(f'{len(jax.devices())} x {device.device_kind} ({device.platform})')
  net = judges.digit_net()
  reference = references.load(judges.embedded('mnist_reference.npz'), net)
  wrong, count = [], 0
  for check in itertools.chain(
    selfcheck.checks(), selfcheck.digit_checks(net, reference)
  ):
    print(check.line())
    count += 1
    if not check.ok:
      wrong.append(check.name)
  if wrong:
    raise ValueError(
      f'{len(wrong)} of {count} checks went wrong ({"; ".join(wrong)}): '
      'metrics from this installation are not to be trusted.'
    )
  print(f'All {count} checks are right.')
