"""Many images, so that nothing which was finished is lost.

Missing images are cut into batches; a batch is on the way to the disk while the
devices compute the next one.
"""

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from d2dpm_jax.pipelines import shards
from d2dpm_jax.runtime import (
  background,
  files,
  metrics,
  microbatches,
  processes,
  progress,
)

_log = logging.getLogger(__name__)
_LISTING_S = 120.0


class Run(Protocol):
  """Begins with a batch; see `microbatches.Program.launch`."""

  def launch(
    self, index: np.ndarray, labels: np.ndarray, room: int = 0
  ) -> microbatches.Launched: ...


class _Batch(NamedTuple):
  start: int
  labels: np.ndarray
  launched: microbatches.Launched


def make(
  run: Run,
  labels_of: Callable[[np.ndarray], np.ndarray],
  wanted: int,
  batch_size: int,
  paths: files.Workdir,
) -> None:
  """Makes the images that are missing, and the file of all of them.

  See `make_missing`; the first process merges.

  Raises:
    OSError: among others, the disk is full; the message says what is kept.
  """
  directory = shards.Shards(paths.shards)
  with _full_disk_told(directory, wanted):
    make_missing(run, labels_of, wanted, batch_size, paths)
    if processes.is_first():
      directory.merge(paths.all_samples, wanted)


def make_missing(
  run: Run,
  labels_of: Callable[[np.ndarray], np.ndarray],
  wanted: int,
  batch_size: int,
  paths: files.Workdir,
) -> None:
  """Makes the first `wanted` images, but for those that are there.

  All processes of a run call this, and each makes a part.

  Args:
    run: begins with a batch.
    labels_of: index int[B] -> int32[B].
    wanted: number of images.
    batch_size: images in flight per call, over all devices of a process.
    paths: of the run.
  """
  directory = shards.Shards(paths.shards)

  def plan() -> list[shards.Range]:
    directory.remove_damaged()
    return shards.split(shards.holes(directory.ranges(), wanted), batch_size)

  # One process decides: others may not see yet what was written last, and may
  # have less memory for a batch.
  batches = processes.from_first('batches', plan)
  with _reporting(directory, wanted, bool(batches), paths) as report:

    def finish(batch: _Batch) -> None:
      images = batch.launched.fetch('images')['images']
      directory.write(batch.start, images, batch.labels)
      report()

    # While one batch is written and one waits for it, the next is computed.
    with background.Background(finish) as thread:
      for start, stop in processes.own(batches):
        processes.check()
        index = np.arange(start, stop, dtype=np.int32)
        labels = labels_of(index)
        launched = run.launch(index, labels, batch_size)
        thread.put(_Batch(start, labels, launched))
    processes.wait_for_all('sampled')
    if processes.is_first():
      _wait_until_seen(directory, wanted)
    report()


def _wait_until_seen(directory: shards.Shards, wanted: int) -> None:
  """Listings of network file systems are old for a while."""
  end = time.monotonic() + (_LISTING_S if processes.count() > 1 else 0)
  while directory.count(wanted) < wanted and time.monotonic() < end:
    time.sleep(0.5)


@contextlib.contextmanager
def _reporting(
  directory: shards.Shards, wanted: int, working: bool, paths: files.Workdir
) -> Iterator[Callable[[], None]]:
  """Yields what is called when images were written; the first process talks.

  It counts those of all processes.
  """
  if not processes.is_first():
    yield lambda: None
    return
  begun = done = directory.count(wanted)
  compiled = progress.compile_seconds()
  first = last = time.perf_counter()
  with contextlib.ExitStack() as stack:
    bar = stack.enter_context(progress.progress('sampling', wanted, 'image'))
    bar.update(done, reused=True)
    write = None
    if working:
      write = stack.enter_context(metrics.writer(paths.samples))

    def report() -> None:
      nonlocal done, last
      found, now = directory.count(wanted), time.perf_counter()
      if write is None or found == done:
        return
      bar.update(found - done)
      rate = (found - done) / (now - last)
      write(found, {'images_per_second': rate, 'seconds': now - first})
      done, last = found, now

    yield report
    if done > begun:
      gone = time.perf_counter() - first
      _log.info(
        'Made %d images in %.1f s: %.2f images/s; %.1f s of compiling',
        done - begun,
        gone,
        (done - begun) / gone,
        progress.compile_seconds() - compiled,
      )


@contextlib.contextmanager
def _full_disk_told(directory: shards.Shards, wanted: int) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise OSError(
      error.errno,
      f'The disk is full. {directory.count(wanted)} of {wanted} images are '
      f'kept in {directory.directory}; make room and run the same command '
      'again',
    ) from error
