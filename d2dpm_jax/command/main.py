"""The command line: flags in, one call of a pipeline out."""

import contextlib
import dataclasses
import difflib
import importlib
import logging
import os
import pathlib
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from d2dpm_jax.command import config_files, errors

MODES = {
  'calibrate': 'quantizes the network and fits its error model',
  'sample': 'generates images with the quantized, corrected network',
  'evaluate': 'judges images: FID, sFID, IS, precision, recall, labels',
  'experiment': 'all corrections, bits and samplers of config.experiment',
  'benchmark': 'measures what --config.benchmark.what names',
  'report': 'shows what is in --workdir on one page, report.html',
  'convert': 'reads a PyTorch checkpoint of latent diffusion',
  'train': 'trains the embedded MNIST models (config mnist)',
}

# Modes that several processes can share.
SHARED_MODES = ('calibrate', 'sample')
# Modes whose results are in the report.
_REPORTED = ('calibrate', 'sample', 'evaluate', 'experiment', 'benchmark')

_HELP = """\
Quantized latent diffusion with dual denoising (D2-DPM) in JAX/Flax.

  {program} --config mnist --mode calibrate
  {program} --config mnist --mode sample --config.sample.num_images=100

--mode, one of
{modes}

--config      an experiment, or a file of your own; there are
              {names};
              words behind a colon choose settings, as in mnist:full
--config.X=Y  sets a field of it, as in --config.quant.weight_bits=8
--workdir     all output goes below it; out/<config name> if not given
--dry_run     says what the mode would do, need and write, and stops
--debug       shows the traceback of an error, not only one line
--help_config lists the fields of --config, what they mean and their values;
              words behind it choose, as in --help_config sampler
Several processes make one run with --coordinator_address, --num_processes and
--process_id (docs/scale.md). A run that ends with exit code 75 was stopped by a
signal: the same command goes on.
"""


@dataclasses.dataclass(frozen=True)
class Options:
  """What a command line says.

  Attributes:
    argv: all of it, as it was typed.
    config: the experiment with its overrides; None without --config.
    source: what --config names, 'configs/mnist.py:full'.
    path: of its file.
    overrides: fields that were set, by dotted name.
    mode: a key of `MODES`, or not.
    workdir: where output goes, if it was said.
    words: arguments that are no flags.
    cluster: address of the first of several processes, their number, and the
      number of this one.
  """

  argv: tuple[str, ...]
  config: Any
  source: str
  path: pathlib.Path | None
  overrides: dict[str, Any]
  mode: str | None
  workdir: str | None
  words: tuple[str, ...]
  cluster: tuple[str | None, int | None, int | None]
  debug: bool
  dry_run: bool
  help: bool
  help_config: bool


def run() -> None:
  """The program; ends the process, be others in the midst of work."""
  code = main(sys.argv)
  processes = sys.modules.get('d2dpm_jax.runtime.processes')
  if code and processes is not None:
    processes.leave(code)
  if code > 1:
    sys.stdout.flush()
    os._exit(code)  # Threads still compile or compute what nobody will have.
  sys.exit(code)


def main(argv: Sequence[str]) -> int:
  """Runs a command line, program name first; returns the exit code.

  Of an error, one line is written to stderr; with --debug it is raised.
  """
  mode = None
  try:
    with _logging(), _signals():
      options = parse(argv)
      mode = options.mode
      _dispatch(options)
  except BrokenPipeError:  # As of `| head`: who reads has read enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0
  except Exception as error:
    if '--debug' in argv:
      raise
    print(f'error: {errors.explain(error, mode)}', file=sys.stderr, flush=True)
    return 1
  except BaseException as error:
    interruption = sys.modules.get('d2dpm_jax.runtime.interruption')
    if not (interruption and isinstance(error, interruption.Interrupted)):
      raise
    print(
      f'{error}. What is finished is kept, and the same command goes on there.',
      file=sys.stderr,
      flush=True,
    )
    return interruption.EXIT_CODE
  return 0


def _dispatch(options: Options) -> None:
  """Help, a plan, or the work."""
  # First of all: who waits for other processes can be stopped, too.
  importlib.import_module('d2dpm_jax.runtime.interruption').install()
  if options.help:
    print(help_text(options.argv[0]))
    return
  if options.mode == 'report' and options.workdir and not options.config:
    _pipeline('report').run(None, options.workdir)
    return
  if options.config is None or options.path is None:
    raise ValueError(
      '--config is missing; try --config mnist, or --help for all flags.'
    )
  if options.help_config:
    print(config_files.listing(options.config, options.path, options.words))
    return
  if options.words:
    raise ValueError(f'Unexpected arguments: {" ".join(options.words)}')
  # A plan needs no other processes.
  pipeline = _pipeline(options.mode, options.cluster, not options.dry_run)
  workdir = options.workdir or f'out/{options.path.stem}'
  if options.dry_run:
    print(_plan(options, workdir))
    return
  _check_writable(workdir)
  start = time.perf_counter()
  pipeline.run(options.config, workdir)
  progress = importlib.import_module('d2dpm_jax.runtime.progress')
  peak = progress.peak_memory()
  if peak:
    logging.getLogger('d2dpm_jax').info('Peak memory: %.2f GB', peak / 1e9)
  processes = importlib.import_module('d2dpm_jax.runtime.processes')
  written = options.mode in _REPORTED and pathlib.Path(workdir).is_dir()
  if written and processes.is_first():
    _record(options, workdir, time.perf_counter() - start, peak)
    _report(workdir)
  # Those who leave early would wait for the others for minutes only.
  processes.wait_for_all('end')


def _report(workdir: str) -> None:
  """Writes report.html; what was made stands without it."""
  report = importlib.import_module('d2dpm_jax.pipelines.report')
  try:
    report.run(None, workdir)
  except Exception as error:
    logging.getLogger('d2dpm_jax').warning(
      'report.html was not written: %s', errors.explain(error, 'report')
    )


def _check_writable(workdir: str) -> None:
  """Raises ValueError before the work, and not when its results are there."""
  files = importlib.import_module('d2dpm_jax.runtime.files')
  if not files.is_writable(files.Workdir.at(workdir).root):
    raise ValueError(
      f'--workdir {workdir} cannot be written to: change its permissions, or '
      'choose another --workdir.'
    )


def _record(options: Options, workdir: str, seconds: float, peak: int) -> None:
  """Notes a run in its work directory."""
  paths = importlib.import_module('d2dpm_jax.runtime.files').Workdir.at(workdir)
  runs = importlib.import_module('d2dpm_jax.runtime.runs')
  runs.add(
    paths,
    {
      'command': f'{_program(options.argv[0])} {shlex.join(options.argv[1:])}',
      'mode': options.mode,
      'config': options.source,
      'overrides': {k: str(v) for k, v in options.overrides.items()},
      'ended': time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime()),
      'seconds': round(seconds, 1),
      'peak_memory_bytes': peak,
      'environment': runs.environment(),
    },
  )


def _pipeline(
  mode: str | None,
  cluster: Sequence[Any] = (None, None, None),
  joins: bool = True,
) -> Any:
  """Imports late: --help and flag errors need no JAX."""
  if mode is None:
    raise ValueError(f'--mode is missing; it is one of {", ".join(MODES)}.')
  if mode not in MODES:
    close = difflib.get_close_matches(mode, MODES, 1)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(f'--mode {mode!r}: expected {", ".join(MODES)}.{hint}')
  runtime = 'd2dpm_jax.runtime'
  importlib.import_module(f'{runtime}.devices').configure()
  processes = importlib.import_module(f'{runtime}.processes')
  found = processes.cluster(*cluster, os.environ)
  if found is not None:  # Before anybody waits for the others.
    _check_shared(mode, found.num_processes)
  if joins:
    processes.initialize(*cluster)
    # A TPU pod says it when all are there.
    _check_shared(mode, processes.count())
  if not processes.is_first():
    logging.getLogger('d2dpm_jax').setLevel(logging.WARNING)
  return importlib.import_module(f'd2dpm_jax.pipelines.{mode}')


def _check_shared(mode: str, count: int) -> None:
  """Raises ValueError if several processes are to run a mode of one."""
  if count > 1 and mode not in SHARED_MODES:
    raise ValueError(
      f'--mode {mode} is run by one process, and here are {count}; several '
      f'take {" or ".join(SHARED_MODES)}.'
    )


def _plan(options: Options, workdir: str) -> str:
  """What --dry_run prints."""
  default = parse([options.argv[0], f'--config={options.path}']).config
  plan = importlib.import_module('d2dpm_jax.pipelines.plan')
  return plan.describe(options.mode, options.config, default, workdir)


def help_text(program: str) -> str:
  """What --help prints."""
  return _HELP.format(
    program=_program(program),
    modes='\n'.join(f'  {mode:11} {text}' for mode, text in MODES.items()),
    names=', '.join(config_files.names()),
  ).rstrip()


def _program(path: str) -> str:
  """How this program was called."""
  name = pathlib.Path(path).name
  return f'python {name}' if name.endswith('.py') else name


def parse(argv: Sequence[str]) -> Options:
  """Reads a command line.

  Raises:
    ValueError: a flag is wrong; one line says which, without usage.
  """
  typed = tuple(argv)
  sys.modules.pop('config_config', None)  # Of an earlier call.
  argv, source = _with_config_file(argv)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config', None, flag_values=values, lock_config=True, sys_argv=argv
  )
  for name in ('mode', 'workdir', 'coordinator_address'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  for name in ('num_processes', 'process_id'):
    flags.DEFINE_integer(name, None, '', flag_values=values)
  for name in ('debug', 'dry_run', 'help_config'):
    flags.DEFINE_bool(name, False, '', flag_values=values)
  flags.DEFINE_bool('help', False, '', flag_values=values, short_name='h')
  try:
    words = values(argv)[1:]
  except flags.UnrecognizedFlagError as error:
    raise ValueError(_unknown_flag(error.flagname, values, source)) from error
  except flags.Error as error:
    # Of a config file that fails, the last line of the traceback says why.
    text = str(error).strip().splitlines()[-1]
    raise ValueError(text.removeprefix('ValueError: ')) from error
  except SyntaxError as error:
    raise ValueError(
      f'--config {error.filename}, line {error.lineno}: {error.msg}.'
    ) from error
  except (AttributeError, KeyError) as error:
    # An unknown field is named by a repr within a repr: 'name'\\n...
    text = str(error).replace('\\n', '. ')
    for sign in '\'"\\':
      text = text.replace(sign, '')
    if 'get_config' in text or 'NoneType' in text:
      raise ValueError(
        f'--config {source}: expected a file with a function get_config(arg) '
        'that returns a ConfigDict, as in configs/mnist.py.'
      ) from error
    kind = 'unknown field ' if text.split('.')[0].isidentifier() else ''
    raise ValueError(f'--config: {kind}{text}') from error
  flag: Any = values['config']
  given = bool(flag.present)
  return Options(
    argv=typed,
    config=values.config if given else None,
    source=source,
    path=pathlib.Path(flag.config_filename.split(':')[0]) if given else None,
    overrides=dict(flag.override_values) if given else {},
    mode=values.mode,
    workdir=values.workdir,
    words=tuple(words),
    cluster=(
      values.coordinator_address,
      values.num_processes,
      values.process_id,
    ),
    debug=values.debug,
    dry_run=values.dry_run,
    help=values.help,
    help_config=values.help_config,
  )


def _with_config_file(argv: Sequence[str]) -> tuple[list[str], str]:
  """The same with the path of the config file; and what was named."""
  argv = list(argv)
  for i, arg in enumerate(argv):
    match = re.fullmatch(r'(--?config)(?:=(.*))?', arg)
    if match is None or (match[2] is None and i + 1 == len(argv)):
      continue
    source = argv[i + 1] if match[2] is None else match[2]
    name, colon, words = source.partition(':')
    found = f'{match[1]}={config_files.find(name)}{colon}{words}'
    argv[i : i + 1 + (match[2] is None)] = [found]
    return argv, source
  return argv, ''


def _unknown_flag(name: str, values: flags.FlagValues, source: str) -> str:
  """What to say of a flag that is none."""
  if name.startswith('config.') and not source:
    return f'--{name} is a field of --config, which is missing.'
  close = difflib.get_close_matches(name.split('.')[0], list(values), 1)
  rest = f'.{name.split(".", 1)[1]}' if '.' in name else ''
  hint = f' Did you mean --{close[0]}{rest}?' if close else ''
  return f'Unknown flag --{name}.{hint} --help lists all flags.'


@contextlib.contextmanager
def _signals() -> Iterator[None]:
  """Puts back what was done at signals before."""
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  finally:
    for number, handler in before.items():
      if signal.getsignal(number) is not handler:
        signal.signal(number, handler)


@contextlib.contextmanager
def _logging() -> Iterator[None]:
  """Shows ours: libraries report every file that they write at INFO level."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter('%(message)s'))
  root = logging.getLogger()
  root.addHandler(handler)
  ours = logging.getLogger('d2dpm_jax')
  level = ours.level
  ours.setLevel(logging.INFO)
  try:
    yield
  finally:
    root.removeHandler(handler)
    ours.setLevel(level)
