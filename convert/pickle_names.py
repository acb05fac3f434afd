"""What becomes of the names that a pickle refers to.

A pickle names functions and classes (GLOBAL, STACK_GLOBAL, INST) in order to
call them. None of them is imported here. Be a name called later or not, the
first rule that fits decides:

  1. Known names (`PLAIN` below and the table of the caller): our own function
     takes the place of the original.
  2. Harmless classes of the standard library (`_INERT`) become `Opaque`.
  3. Anything else of the standard library, of packages whose trade is running
     code (`_CODE_RUNNERS`), with a name that runs code wherever it is found
     (`_DANGEROUS`), or that reaches through other objects (`a.os.system`,
     dunder names) is refused, and the file with it: weights need none of it.
  4. What is left is a class of some library, such as Lightning's
     ModelCheckpoint in `callbacks`. It becomes `Opaque`: a placeholder that
     has a name and nothing else. Calling it, filling it or setting its state
     does nothing. `torch_reader` refuses placeholders among the weights.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any


class CheckpointError(ValueError):
  """A file of weights that cannot or must not be read; says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
  """Stands for a class, or an object of a class, that was not loaded."""

  name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
  """A name that is understood; `function` builds what calling it would."""

  function: Callable[..., Any]


def _names(**modules: str) -> frozenset[str]:
  """'module.name' for every name of every module."""
  return frozenset(
    f'{module}.{name}' for module in modules for name in modules[module].split()
  )


_BUILTINS = ('builtins', '__builtin__')  # Python 3 and Python 2.
# Names of Python 2's standard library that Python 3 has moved.
_PYTHON2_MODULES = frozenset(
  '__builtin__ commands copy_reg cPickle cStringIO dl exceptions imp new nt '
  'popen2 posixfile StringIO thread urllib2 UserDict UserList'.split()
)
_STDLIB = sys.stdlib_module_names | _PYTHON2_MODULES
_TYPES = (  # In protocol 2, Python 3 writes int as long and str as unicode.
  'bool bytes complex dict float int list long object range slice str tuple '
  'unicode xrange'
)
_INERT = _names(
  **dict.fromkeys(_BUILTINS, _TYPES),
  argparse='Namespace',
  collections='deque',
  copy_reg='_reconstructor',
  copyreg='_reconstructor',
  datetime='date datetime time timedelta timezone',
  decimal='Decimal',
  pathlib='Path PosixPath PurePosixPath PureWindowsPath WindowsPath',
  types='SimpleNamespace',
  typing='Any Dict List Optional Tuple Union',
  uuid='UUID',
)
_CODE_RUNNERS = tuple(
  'IPython cloudpickle dill joblib numpy.distutils numpy.f2py numpy.load '
  'numpy.testing pip pkg_resources setuptools torch._dynamo torch._inductor '
  'torch.classes torch.fx torch.hub torch.jit torch.load torch.ops '
  'torch.package torch.serialization.load torch.utils.cpp_extension'.split()
)
_DANGEROUS = frozenset(
  'apply compile delattr eval exec execfile execv execve fork getattr globals '
  'import_module input loads open popen run_module run_path runstring setattr '
  'spawn system unlink vars'.split()
)
_KEYS = (str, bytes, int, float, bool, type(None), Opaque)


def resolve(module: str, name: str, known: Mapping[str, Any]) -> Any:
  """Applies the rules above to one name.

  Args:
    module: as the pickle has it, for example 'torch._utils'.
    name: within the module; may have dots.
    known: 'module.name' -> what to use instead.

  Returns:
    A value of `known`, or an `Opaque`.

  Raises:
    CheckpointError: the name is one that rule 3 refuses.
  """
  path = f'{module}.{name}'
  if path in known:
    return known[path]
  reason = None if path in _INERT else _danger(path, module, name)
  if reason is None:
    return Opaque(path)
  raise CheckpointError(
    f'refused, because it refers to {path[:200]!r}, {reason}. Weights need '
    'no such thing: in other programs this file could run code. Nothing of '
    'it was run here; get the weights from a source that you trust'
  )


def _danger(path: str, module: str, name: str) -> str | None:
  """Says why a name must not be in a file of weights, or None."""
  parts = name.split('.')
  if module.split('.')[0] in _STDLIB:
    return "a part of Python's standard library"
  if any(f'{path}.'.startswith(f'{prefix}.') for prefix in _CODE_RUNNERS):
    return 'a part of a package that loads or runs code'
  if any(part.startswith('__') for part in [*module.split('.')[1:], *parts]):
    return 'an internal of Python objects'
  if parts[-1] in _DANGEROUS:
    return 'a function that can run code'
  if len(parts) > 1 and _STDLIB.intersection(parts):
    return "a way to Python's standard library"
  return None


def as_key(key: Any) -> Any:
  """Passes what may be a key of a dict or an element of a set.

  Hashing must be cheap: nested tuples that share their parts take exponential
  time, and large integers can be chosen to collide.

  Raises:
    TypeError: the key is not a scalar, a placeholder, or a tuple of such.
    ValueError: it is too large an integer.
  """
  for part in key if isinstance(key, tuple) else (key,):
    if not isinstance(part, _KEYS):
      raise TypeError(f'{type(part).__name__} as a key')
    if isinstance(part, int) and abs(part) >= sys.hash_info.modulus:
      raise ValueError('too large an integer as a key')
  return key


def _mapping(source: Any = ()) -> dict:
  """OrderedDict(), OrderedDict(pairs) and Counter(dict), as a plain dict."""
  pairs = source.items() if isinstance(source, dict) else source
  return {as_key(key): value for key, value in pairs}


def _encode(text: str, encoding: str = 'latin1') -> bytes:
  """How protocol 2 writes bytes: as latin-1 text to be encoded again."""
  if encoding not in ('latin1', 'latin-1'):
    raise ValueError(f'encoding {encoding!r}')
  return text.encode('latin1')


PLAIN: Mapping[str, Known] = {
  'collections.OrderedDict': Known(_mapping),
  'collections.Counter': Known(_mapping),
  'collections.defaultdict': Known(lambda *args: {}),
  '_codecs.encode': Known(_encode),
  **{
    f'{module}.{kind.__name__}': Known(
      lambda items=(), kind=kind: kind(map(as_key, items))
    )
    for module in _BUILTINS
    for kind in (set, frozenset)
  },
}
