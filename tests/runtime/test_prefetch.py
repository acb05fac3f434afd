import threading
import time

import pytest

from d2dpm_jax.runtime.prefetch import prefetch


@pytest.mark.parametrize('count', [0, 1, 50])
def test_same_items_in_the_same_order(count):
  assert list(prefetch(iter(range(count)))) == list(range(count))


def test_items_are_made_ahead_and_not_farther():
  made = []

  def items():
    for k in range(10):
      made.append(k)
      yield k

  found = prefetch(items(), ahead=2)
  assert next(found) == 0
  deadline = time.monotonic() + 5
  while len(made) < 4 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.2)
  # One was taken, two wait, one is in the making.
  assert made == [0, 1, 2, 3]
  found.close()


def test_an_error_comes_in_its_place():
  def items():
    yield 1
    raise ValueError('the second one is damaged')

  found = prefetch(items())
  assert next(found) == 1
  with pytest.raises(ValueError, match='the second one is damaged'):
    next(found)


def test_the_thread_ends_with_who_asks():
  before = threading.active_count()
  found = prefetch(iter(range(1000)))
  next(found)
  assert threading.active_count() == before + 1
  found.close()
  assert threading.active_count() == before
