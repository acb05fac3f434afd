"""Several processes of one run: who they are, and what they agree on.

Images do not depend on each other, so every process computes with its own
devices alone and no program runs over several processes: none waits for a
slower one within a batch, and what they compile is what one process compiles.
They meet where one of them needs what the others wrote, through the
coordination service of jax.distributed and not through the devices, whose
collectives give up on processes that come minutes later.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax._src import distributed  # What Orbax uses; JAX exports no barrier.

from d2dpm_jax.runtime import files, interruption

_log = logging.getLogger(__name__)
_T = TypeVar('_T')
# How long a process waits for the others to be started. Nodes of a cluster boot
# and load their programs from one file system, so this is not seconds.
JOIN_S = 600.0
# JAX waits longer: when its own time is over it aborts the process.
_LONGER_S = 60.0
_FOREVER_MS = 30 * 24 * 3600 * 1000  # A process that dies ends the others.
_LEAVE_S = 20.0  # Time for the others to end, too.
_ENDED = 'd2dpm_jax/ended'
_meetings: dict[str, int] = {}
_joined = threading.Event()


class Cluster(NamedTuple):
  """Arguments of `jax.distributed.initialize`."""

  coordinator_address: str  # host:port of process 0
  num_processes: int
  process_id: int
  local_device_ids: tuple[int, ...] | None = None  # None: all.


def index() -> int:
  """Number of this process."""
  return distributed.global_state.process_id or 0


def count() -> int:
  """How many processes there are."""
  return distributed.global_state.num_processes or 1


def is_first() -> bool:
  """Whether this process writes what is written once, and talks."""
  return index() == 0


def own(work: Sequence[_T]) -> Sequence[_T]:
  """The part of a list of work that is of this process."""
  return work[index() :: count()]


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the other processes of a run, if there are others.

  Must come before the first computation. Signals are noticed while it waits.

  Args:
    coordinator_address: host:port of process 0; None, like the others: as
      SLURM, Open MPI or a TPU pod say, and one process where none of them does.
    num_processes: how many there are.
    process_id: which one this is.

  Raises:
    ValueError: some are given and some are not, they contradict each other, or
      process 0 cannot listen there.
    TimeoutError: the others did not come within `JOIN_S`. The process has to
      `leave` then, since JAX still waits for them in a thread.
  """
  given = (coordinator_address, num_processes, process_id)
  found = cluster(*given, os.environ)
  # SIGTERM is `interruption`'s.
  jax.config.update('jax_enable_preemption_service', False)
  if found is not None and found.num_processes > 1:
    ids = found.local_device_ids
    _join(
      f'{found.num_processes} processes at {found.coordinator_address}',
      coordinator_address=found.coordinator_address,
      num_processes=found.num_processes,
      process_id=found.process_id,
      local_device_ids=None if ids is None else list(ids),
      cluster_detection_method='deactivate',
    )
  elif found is None and on_tpu_pod(os.environ):
    _join('all hosts of the TPU')


def _join(whom: str, **arguments: Any) -> None:
  """`jax.distributed.initialize`, and a time limit that Python notices."""
  _log.info('Waiting for %s.', whom)
  timeout = int(JOIN_S + _LONGER_S)
  try:
    _interruptible(
      lambda: jax.distributed.initialize(
        **arguments, initialization_timeout=timeout
      ),
      watch=False,
      limit_s=JOIN_S,
    )
  except TimeoutError as error:
    raise TimeoutError(
      f'Waited {JOIN_S:.0f} s for {whom}, and not all have come: start the '
      'same command for each --process_id, with an address of process 0 that '
      'all others reach.'
    ) from error
  except RuntimeError as error:
    reason = ' '.join(str(error).split())
    raise ValueError(f'No meeting of {whom}: {reason[:200]}') from error
  _joined.set()


def cluster(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  environment: Mapping[str, str],
) -> Cluster | None:
  """Which processes there are; None if nothing says that there are several.

  Raises:
    ValueError: some of the arguments are given and some are not, or they
      contradict each other.
  """
  flags = {
    '--coordinator_address': coordinator_address,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in flags.items() if value is None]
  if len(missing) == len(flags):
    return _slurm(environment) or _open_mpi(environment)
  if coordinator_address is None or num_processes is None or process_id is None:
    raise ValueError(f'{" and ".join(missing)}: not given; it takes all of '
                     f'{", ".join(flags)}.')  # fmt: skip
  if not re.fullmatch(r'.+:\d+', coordinator_address):
    raise ValueError(
      f'--coordinator_address {coordinator_address!r}: expected host:port.'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id is {process_id}; expected 0..{num_processes - 1}, as '
      f'--num_processes is {num_processes}.'
    )
  return Cluster(coordinator_address, num_processes, process_id)


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
  """Tasks of `srun`; a batch script outside of it is one process.

  JAX's own detection gives a task the one device of its number, and so all but
  one of the GPUs to nobody where a host has one task, or where SLURM has
  numbered the GPUs of each task from 0.
  """
  try:
    tasks = int(environment['SLURM_STEP_NUM_TASKS'])
    task = int(environment['SLURM_PROCID'])
    nodes = environment['SLURM_STEP_NODELIST']
    port = 61440 + int(environment['SLURM_JOB_ID']) % 4096
  except KeyError:
    return None
  if tasks == 1:
    return None
  first = re.match(r'[^,\[]+(\[\d+)?', nodes)
  host = first[0].replace('[', '') if first else nodes
  visible = environment.get('CUDA_VISIBLE_DEVICES', '').split(',')
  alone = environment.get('SLURM_STEP_TASKS_PER_NODE', '').split('(')[0] == '1'
  ids = None
  if len(visible) > 1 and not alone:
    ids = (int(environment['SLURM_LOCALID']),)
  return Cluster(f'{host}:{port}', tasks, task, ids)


def _open_mpi(environment: Mapping[str, str]) -> Cluster | None:
  """Processes of `mpirun`, whose address JAX knows how to find."""
  if int(environment.get('OMPI_COMM_WORLD_SIZE', '1')) == 1:
    return None
  raise ValueError(
    'Several processes of mpirun: give --coordinator_address=<host>:<port> '
    '--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK.'
  )


def on_tpu_pod(environment: Mapping[str, str]) -> bool:
  """Whether this is a host of Cloud TPUs, which JAX knows everything about."""
  platforms = environment.get('JAX_PLATFORMS') or 'tpu'
  if 'tpu' not in platforms.split(','):
    return False
  if ',' in environment.get('TPU_WORKER_HOSTNAMES', ''):
    return True
  # Of GPUs that are handed to virtual machines there is a /dev/vfio, too.
  return importlib.util.find_spec('libtpu') is not None and any(
    pathlib.Path(device).exists() for device in ('/dev/accel0', '/dev/vfio/0')
  )


def _client() -> Any:
  """Of the coordination service."""
  return distributed.global_state.client


def check() -> None:
  """Does nothing while all processes are at work.

  Raises:
    Interrupted: another one was stopped by a signal.
    RuntimeError: another one met an error.
  """
  if count() == 1:
    return
  for key, code in _client().key_value_dir_get(_ENDED):
    who = f'Process {key.rpartition("/")[2]} of this run'
    if int(code) == interruption.EXIT_CODE:
      raise interruption.Interrupted(f'{who} was stopped')
    raise RuntimeError(f'{who} met an error and says which')


def _interruptible(
  call: Callable[[], _T], watch: bool = True, limit_s: float = math.inf
) -> _T:
  """What a call in C++ returns.

  Signals, and with `watch` the end of other processes, are noticed while it
  waits.

  Raises:
    TimeoutError: it has not returned after `limit_s`, and goes on in a thread.
  """
  outcome: list[Any] = []

  def run() -> None:
    try:
      outcome.append((call(), None))
    except Exception as error:
      outcome.append((None, error))

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  end = time.monotonic() + limit_s
  thread.join(min(0.5, limit_s))
  while thread.is_alive():
    if time.monotonic() >= end:
      raise TimeoutError(f'no answer within {limit_s:.0f} s')
    if watch:
      check()
    thread.join(0.5)
  value, error = outcome[0]
  if error is not None:
    raise error
  return value


def _meeting(name: str) -> str:
  """A name of its own for every time that all processes come there."""
  _meetings[name] = _meetings.get(name, 0) + 1
  return f'd2dpm_jax/{name}/{_meetings[name]}'


def wait_for_all(name: str) -> None:
  """Returns when all processes have come here."""
  if count() > 1:
    key = _meeting(name)
    _interruptible(lambda: _client().wait_at_barrier(key, _FOREVER_MS))


def from_first(name: str, make: Callable[[], Any]) -> Any:
  """What the first process makes, told to all of them.

  Args:
    name: of the meeting.
    make: returns what JSON can hold; its ValueError is raised in all.
  """
  if count() == 1:
    return make()
  key, client = _meeting(name), _client()
  if is_first():
    try:
      made = {'value': make()}
    except ValueError as error:
      client.key_value_set(key, json.dumps({'error': str(error)}))
      raise
    client.key_value_set(key, json.dumps(made))
    return made['value']
  told = json.loads(
    _interruptible(lambda: client.blocking_key_value_get(key, _FOREVER_MS))
  )
  if 'error' in told:
    raise ValueError(told['error'])
  return told['value']


@contextlib.contextmanager
def claimed(directory: pathlib.Path) -> Iterator[None]:
  """`files.claimed` for all processes of a run; the first one holds it.

  Raises:
    ValueError: see there; in all of them.
  """
  with contextlib.ExitStack() as stack:
    from_first('claimed', lambda: stack.enter_context(files.claimed(directory)))
    yield
    wait_for_all('released')


def leave(code: int) -> None:
  """Ends this process soon, if it is one of several, and tells the others.

  An orderly end would wait for them, which may be in the midst of work; `check`
  tells them to end as well.
  """
  if count() == 1:
    return
  if not _joined.is_set():  # Nobody to tell, and a thread that still waits.
    os._exit(code)
  with contextlib.suppress(Exception):
    _client().key_value_set(f'{_ENDED}/{index()}', str(code))
    _interruptible(
      lambda: _client().wait_at_barrier(
        'd2dpm_jax/leave', int(1000 * _LEAVE_S)
      ),
      watch=False,
    )
  if is_first():
    # The others go first: they are shot when the coordination service ends.
    with contextlib.suppress(Exception):
      threading.Event().wait(0.5)
  os._exit(code)
