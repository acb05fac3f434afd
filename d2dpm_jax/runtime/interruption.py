"""SIGTERM and SIGINT: the program stops where it can go on later."""

import signal
from types import FrameType

# EX_TEMPFAIL of sysexits.h: the same command, later, goes on.
EXIT_CODE = 75


class Interrupted(BaseException):
  """Raised in the main thread; not an error that anybody handles by chance."""


def install() -> None:
  """Turns the first signal into `Interrupted`; the second one kills."""
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _raise)


def _raise(number: int, _: FrameType | None) -> None:
  for known in (signal.SIGTERM, signal.SIGINT):
    signal.signal(known, signal.SIG_DFL)
  raise Interrupted(f'Stopped by {signal.Signals(number).name}')
