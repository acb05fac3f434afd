"""Making the next items while earlier ones are in use."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

_T = TypeVar('_T')


def prefetch(items: Iterable[_T], ahead: int = 2) -> Generator[_T, None, None]:
  """The same items in the same order, made by a thread.

  The thread starts with the first item asked for and ends with the iterator,
  also if that is closed before its end.

  Args:
    items: what is worth making early, such as batches read from a disk.
    ahead: how many wait at most, beside the one in the making.

  Raises:
    Exception: what making an item raised, in its place.
  """
  waiting: queue.Queue[tuple[bool, _T | BaseException | None]] = queue.Queue(
    ahead
  )
  closed = threading.Event()

  def put(going: bool, item: _T | BaseException | None) -> None:
    while not closed.is_set():
      try:
        return waiting.put((going, item), timeout=0.1)
      except queue.Full:
        pass

  def make() -> None:
    try:
      for item in items:
        put(True, item)
        if closed.is_set():
          return
    except BaseException as error:  # Of the one who asks, not of this thread.
      put(False, error)
    else:
      put(False, None)

  thread = threading.Thread(target=make, daemon=True)
  thread.start()
  try:
    while True:
      going, item = waiting.get()
      if going:
        yield item  # type: ignore[misc]
      elif isinstance(item, BaseException):
        raise item
      else:
        return
  finally:
    closed.set()
    thread.join()
