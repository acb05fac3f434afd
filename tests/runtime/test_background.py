"""A thread that finishes what another begins: in order, and not in silence."""

import threading
import time

import pytest

from d2dpm_jax.runtime import background


def test_all_is_finished_in_order():
  done = []
  with background.Background(done.append) as thread:
    for item in range(20):
      thread.put(item)
  assert done == list(range(20))


def test_the_next_item_is_begun_while_one_is_finished():
  """And not more than one waits."""
  release, begun, done = threading.Event(), [], []

  def finish(item):
    assert release.wait(10)
    done.append(item)

  def produce(thread):
    for item in range(6):
      begun.append(item)
      thread.put(item)

  with background.Background(finish) as thread:
    producer = threading.Thread(target=produce, args=(thread,))
    producer.start()
    deadline = time.monotonic() + 10
    while len(begun) < 3 and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.1)
    # One in hand, one waits, one is begun; nothing is finished yet.
    assert begun == [0, 1, 2] and not done
    release.set()
    producer.join()
  assert done == list(range(6))


def test_an_error_is_raised_where_work_is_begun():
  def finish(item):
    raise OSError(f'no {item}')

  begun = 0
  with pytest.raises(OSError, match='no 0'):
    with background.Background(finish) as thread:
      for item in range(1000):
        thread.put(item)
        begun += 1
        time.sleep(0.01)
  assert begun < 100
  with pytest.raises(OSError, match='no 7'):
    with background.Background(finish) as thread:
      thread.put(7)  # The last one: raised on leaving.


def test_when_the_body_fails_only_what_is_in_hand_is_finished():
  in_hand, done = threading.Event(), []

  def finish(item):
    in_hand.set()
    time.sleep(0.2)
    done.append(item)

  with pytest.raises(KeyboardInterrupt):
    with background.Background(finish) as thread:
      thread.put('first')
      thread.put('second')
      assert in_hand.wait(10)
      raise KeyboardInterrupt
  assert done == ['first']
