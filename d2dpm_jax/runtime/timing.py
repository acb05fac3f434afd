"""How long programs take, and what the device could do at best."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seconds(
  run: Callable[[], Any], repeats: int, calls: int = 1, warmup: int = 1
) -> list[float]:
  """Times of a call, one per repetition.

  Args:
    run: what is timed, until its result is there.
    repeats: how many times to give.
    calls: in a row per repetition, so that a device never waits for the host.
    warmup: calls before, which do not count.
  """
  for _ in range(warmup):
    jax.block_until_ready(run())
  found = []
  for _ in range(repeats):
    start = time.perf_counter()
    out = None
    for _ in range(calls):
      out = run()
    jax.block_until_ready(out)
    found.append((time.perf_counter() - start) / calls)
  return found


def summary(times: Sequence[float]) -> dict[str, float]:
  """Median, least and most."""
  return {
    'median': statistics.median(times),
    'least': min(times),
    'most': max(times),
  }


def peaks(size: int | None = None) -> dict[str, float]:
  """What one device reaches, measured.

  Args:
    size: of the square matrices; None is 8192, on CPUs 1024.

  Returns:
    'float32', 'bfloat16' and 'int8': operations a second of a matrix product,
    as XLA runs it by default, two per multiplication; 'bytes' a second, read
    and written by an elementwise program.
  """
  if size is None:
    size = 1024 if jax.default_backend() == 'cpu' else 8192
  calls = 4 if jax.default_backend() == 'cpu' else 20
  rng = np.random.default_rng(0)
  values = rng.integers(-127, 128, [2, size, size], np.int8)
  found = {}
  for name in ('float32', 'bfloat16', 'int8'):
    result = 'int32' if name == 'int8' else name
    a, b = jnp.asarray(values, name)
    # Of rows with rows, as int8 kernels of GPUs want it.
    product = jax.jit(
      functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=result,
      )
    )
    times = seconds(functools.partial(product, a, b), 3, calls)
    found[name] = 2 * size**3 / min(times)
  x = jnp.zeros([16 * size * size], jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  found['bytes'] = 2 * x.nbytes / min(seconds(lambda: copy(x), 3, calls))
  return found
