"""Which config file a name means, and what its comments say of the fields."""

import ast
import dataclasses
import difflib
import importlib.util
import io
import pathlib
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_CONFIG = 'config'  # As every `get_config` calls what it returns.
_WIDTH, _COLUMN = 80, 40  # Of the listing; comments begin at the column.


def shipped() -> pathlib.Path:
  """The folder of the experiments that come with the program.

  Raises:
    FileNotFoundError: they are not installed.
  """
  found = importlib.util.find_spec('d2dpm_jax.configs')
  if found is None or not found.submodule_search_locations:
    raise FileNotFoundError('The package d2dpm_jax.configs is not installed.')
  return pathlib.Path(next(iter(found.submodule_search_locations)))


def names() -> list[str]:
  """Of the experiments that come with the program."""
  return sorted(
    path.stem
    for path in shipped().glob('*.py')
    if path.stem not in ('__init__', 'common')
  )


def find(name: str) -> pathlib.Path:
  """The file that `--config` names.

  Args:
    name: a path; or the name of an experiment that comes with the program,
      'mnist', or as it is in the repository, 'configs/mnist.py'.

  Raises:
    ValueError: there is no such file.
  """
  path = pathlib.Path(name)
  if path.is_file():
    return path
  stem = path.stem if path.suffix == '.py' else path.name
  if path in (pathlib.Path(stem), pathlib.Path('configs') / f'{stem}.py'):
    if stem in names():
      return shipped() / f'{stem}.py'
    close = difflib.get_close_matches(stem, names(), 1)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(
      f'--config {name}: there is no such file, and the experiments that come '
      f'with the program are {", ".join(names())}.{hint}'
    )
  raise ValueError(f'--config {name}: there is no such file.')


# ---- Comments.


@dataclasses.dataclass(frozen=True)
class _Source:
  """A config file: its functions, and its comments by line.

  Attributes:
    functions: by name.
    above: line -> comment, of lines that hold nothing else.
    beside: line -> comment behind something.
  """

  functions: Mapping[str, ast.FunctionDef]
  above: Mapping[int, str]
  beside: Mapping[int, str]

  @classmethod
  def read(cls, path: pathlib.Path) -> '_Source':
    text = path.read_text()
    lines = text.splitlines()
    above: dict[int, str] = {}
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
      if token.type == tokenize.COMMENT:
        row, column = token.start
        alone = not lines[row - 1][:column].strip()
        (above if alone else beside)[row] = token.string.lstrip('# ')
    functions = {
      node.name: node
      for node in ast.parse(text).body
      if isinstance(node, ast.FunctionDef)
    }
    return cls(functions, above, beside)

  def comment(self, first: int, last: int) -> str:
    """That of what stands in these lines: above it, or behind it."""
    block: list[str] = []
    while first - len(block) - 1 in self.above:
      block.insert(0, self.above[first - len(block) - 1])
    behind = self.beside.get(last) or self.beside.get(first)
    return ' '.join([*block, *filter(None, [behind])])


def comments(path: pathlib.Path) -> dict[str, str]:
  """Field or section by dotted name -> what the source says of it.

  Nothing is run: fields are assignments to parts of a config, and arguments of
  `dict(...)`, in the functions that make one. What a file says itself comes
  first, then configs/common.py and configs/mnist.py, which has every field of
  a model.

  Args:
    path: of the config file.

  Returns:
    Comments in the order of common.py; '' where there is none.
  """
  order = ('common.py', 'mnist.py')
  sources = [*(shipped() / name for name in order), path]
  found: dict[str, str] = {}
  for place in dict.fromkeys(sources):
    source = _Source.read(place)
    for name in ('get_config', 'base_config'):
      if name in source.functions:
        for field, text in _fields(source, source.functions[name], ''):
          found[field] = text or found.get(field, '')
  return found


def _fields(
  source: _Source, function: ast.FunctionDef, prefix: str
) -> Iterator[tuple[str, str]]:
  """(field, comment) of what a function puts into the config it returns."""
  returned = {
    node.value.id
    for node in ast.walk(function)
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Name)
  } | {_CONFIG}
  for node in function.body:
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
      yield from _entries(source, node.value, prefix)
    elif isinstance(node, ast.Assign):
      root, *path = ast.unparse(node.targets[0]).split('.')
      if root in returned and path:
        name = '.'.join([*filter(None, [prefix]), *path])
        last = node.end_lineno or node.lineno
        yield name, source.comment(node.lineno, last)
        yield from _entries(source, node.value, name)


def _entries(
  source: _Source, value: ast.expr, prefix: str
) -> Iterator[tuple[str, str]]:
  """Of a value: `ConfigDict(dict(...))`, or a call of the file's function."""
  if not isinstance(value, ast.Call):
    return
  called = ast.unparse(value.func)
  if called in source.functions:
    function = source.functions[called]
    yield prefix, (ast.get_docstring(function) or '').split('\n')[0]
    yield from _fields(source, function, prefix)
  elif called == 'dict':
    for keyword in value.keywords:
      if keyword.arg is not None:
        name = '.'.join(filter(None, [prefix, keyword.arg]))
        inner = keyword.value
        # `key=dict(  # comment` has it behind the first line.
        last = inner.end_lineno or inner.lineno
        yield name, source.comment(keyword.lineno, last)
        yield from _entries(source, inner, name)
  else:
    for argument in value.args:
      yield from _entries(source, argument, prefix)


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """Nested settings -> {'sampler.steps': 20}; an empty section is one field."""
  found: dict[str, Any] = {}
  for name, value in config.items():
    if hasattr(value, 'items') and len(value):
      found.update(flatten(value, f'{prefix}{name}.'))
    else:
      found[f'{prefix}{name}'] = value
  return found


def listing(config: Any, path: pathlib.Path, words: Sequence[str] = ()) -> str:
  """All fields of a config with their values and comments.

  Args:
    config: of that file.
    path: of the file.
    words: only fields that have one of these in their name.

  Raises:
    ValueError: there is no such field.
  """
  said = comments(path)
  order = list(said)
  sections: dict[str, dict[str, Any]] = {}
  for name, value in flatten(config).items():
    if not words or any(word in name for word in words):
      sections.setdefault(name.rpartition('.')[0], {})[name] = value
  if not sections:
    raise ValueError(
      f'--help_config: no field of {path.name} has {" or ".join(words)} in its '
      'name.'
    )

  def place(name: str) -> int:
    if not name:
      return -1  # What is in no section.
    return order.index(name) if name in order else len(order)

  lines: list[str] = []
  for section in sorted(sections, key=place):
    if section:
      lines += ['', f'{section}: {said.get(section, "")}'.rstrip(': ')]
    for name in sorted(sections[section], key=place):
      value = sections[section][name]
      lines += _described(f'  {name}={value!r}', said.get(name, ''))
  return '\n'.join(lines).strip('\n')


def _described(shown: str, text: str) -> list[str]:
  """A field, and its comment in a column of its own."""
  wrapped = textwrap.wrap(text, _WIDTH - _COLUMN)
  if wrapped and len(shown) < _COLUMN - 1:
    shown = f'{shown:{_COLUMN}}{wrapped.pop(0)}'
  return [shown, *(' ' * _COLUMN + line for line in wrapped)]
