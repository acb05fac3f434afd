"""Work that is finished in a thread, beside the thread that begins it."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

_T = TypeVar('_T')
_GRACE_S = 10.0


class Background(Generic[_T]):
  """Calls `finish` with one item after the other, in a thread.

  As a context: leaves when all is finished. When its body raises, what is in
  hand has ten seconds, and what waits is dropped.
  """

  def __init__(self, finish: Callable[[_T], None], waiting: int = 1):
    """Starts the thread.

    Args:
      finish: takes an item; what it raises, `put` raises.
      waiting: items that wait, at most, while another is finished.
    """
    self._finish = finish
    self._queue: queue.Queue[_T | None] = queue.Queue(waiting)
    self._error: BaseException | None = None
    self._dropped = False
    # A daemon: it may wait for a device that takes long.
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def put(self, item: _T) -> None:
    """Hands over an item; waits while there are too many."""
    self._check()
    self._queue.put(item)
    self._check()

  def __enter__(self) -> 'Background[_T]':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if kind is not None:
      self._drop()
      return
    try:
      self._queue.put(None)
      while self._thread.is_alive():
        self._thread.join(0.5)  # Signals are noticed in between.
    except BaseException:
      self._drop()
      raise
    self._check()

  def _drop(self) -> None:
    self._dropped = True
    try:
      self._queue.put(None, timeout=_GRACE_S)
    except queue.Full:
      return
    self._thread.join(_GRACE_S)

  def _check(self) -> None:
    if self._error is not None:
      raise self._error

  def _run(self) -> None:
    while (item := self._queue.get()) is not None:
      # After an error items are still taken: nobody waits to put something.
      if not self._dropped and self._error is None:
        try:
          self._finish(item)
        except BaseException as error:
          self._error = error
      del item  # Memory of devices, while this waits for the next one.
