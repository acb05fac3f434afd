"""Reads a pickle without running it.

A pickle is a program: Python's own unpickler imports and calls whatever it
names, and grows its memo to any index that it mentions. Here `pickletools`
splits the file into opcodes and a stack machine of our own builds plain
containers from them. It imports nothing, sets no attribute and calls no
function but those in the tables of `pickle_names` and of the caller.
"""

import pickletools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .pickle_names import (
  PLAIN,
  CheckpointError,
  Known,
  Opaque,
  as_key,
  resolve,
)

# A known function copies its arguments; a few bytes can call it again and again
# on the same long list. Honest files stay far below this number of items.
_MAX_COPIED = 2**24


def load(
  stream: Any,
  known: Mapping[str, Any],
  persistent: Callable[[Any], Any] | None = None,
) -> Any:
  """Builds what one pickle describes; leaves `stream` right behind it.

  Args:
    stream: has `read`, `readline` and `tell`, and returns no more than there
      is, whatever length is asked for.
    known: 'module.name' -> `Known`, or a value that is used as it is.
    persistent: maps a persistent id to a value; None refuses such ids.

  Raises:
    CheckpointError: the pickle is damaged, dangerous or beyond this reader.
  """
  machine = _Machine(known, persistent)
  try:
    return machine.run(stream)
  except CheckpointError:
    raise
  # What a damaged pickle can run into: a stack too short, a wrong operand, text
  # that is no number, an allocation that fails.
  except (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
  ) as error:
    raise CheckpointError(
      f'its pickle is damaged near byte {machine.position} '
      f'({str(error)[:200]}); get the file again'
    ) from error


class _Machine:
  """The stack, the marks and the memo of one pickle.

  Values that belong together stand above a mark: MARK puts the stack aside and
  starts an empty one, which the opcode that uses the mark takes as a whole.
  """

  def __init__(self, known: Mapping[str, Any], persistent):
    self.known = {**PLAIN, **known}
    self.persistent = persistent
    self.stack: list = []
    self.marked: list[list] = []
    self.memo: dict[int, Any] = {}
    self.globals: dict[tuple[str, str], Any] = {}
    self.position = 0
    self.copied = 0

  def run(self, stream: Any) -> Any:
    for opcode, arg, position in pickletools.genops(stream):
      self.position = position or 0
      if opcode.name == 'STOP':
        return self.stack.pop()
      handler = _HANDLERS.get(opcode.name)
      if handler is None:  # Extension registry, out-of-band buffers.
        raise CheckpointError(f'its pickle uses {opcode.name}, refused here')
      handler(self, arg)
    raise ValueError('no STOP')

  def push(self, value: Any) -> None:
    self.stack.append(value)

  def mark(self) -> None:
    self.marked.append(self.stack)
    self.stack = []

  def pop_mark(self) -> list:
    items, self.stack = self.stack, self.marked.pop()
    return items

  def pop(self) -> None:
    if self.stack:
      self.stack.pop()
    else:
      self.pop_mark()

  def put(self, index: int | None) -> None:
    self.memo[len(self.memo) if index is None else index] = self.stack[-1]

  def short_tuple(self, size: int) -> None:
    items = tuple(self.stack[-size:])
    if len(items) != size:
      raise IndexError('too few values for a tuple')
    self.stack[-size:] = [items]

  def extend(self, items: list) -> None:
    target = self.stack[-1]
    if isinstance(target, set):
      target.update(map(as_key, items))
    elif isinstance(target, list):
      target.extend(items)
    elif not isinstance(target, Opaque):
      raise TypeError(f'items for a {type(target).__name__}')

  def set_items(self, items: list) -> None:
    target = self.stack[-1]
    if isinstance(target, dict):
      for key, value in zip(items[::2], items[1::2], strict=True):
        target[as_key(key)] = value
    elif not isinstance(target, Opaque):
      raise TypeError(f'keys for a {type(target).__name__}')

  def make_dict(self) -> None:
    items = self.pop_mark()
    self.push({})
    self.set_items(items)

  def find(self, module: Any, name: Any) -> None:
    """Pushes a global; the same name is the same object every time."""
    if not isinstance(module, str) or not isinstance(name, str):
      raise TypeError('a global without a name')
    if (module, name) not in self.globals:
      self.globals[module, name] = resolve(module, name, self.known)
    self.push(self.globals[module, name])

  def find_on_stack(self) -> None:
    name = self.stack.pop()
    self.find(self.stack.pop(), name)

  def call(self, target: Any, args: Any) -> None:
    if not isinstance(args, tuple):
      raise TypeError('arguments that are no tuple')
    if isinstance(target, Known):
      self.copied += sum(len(a) for a in args if isinstance(a, Collection))
      if self.copied > _MAX_COPIED:
        raise ValueError('it copies its contents over and over')
      self.push(target.function(*args))
    elif isinstance(target, Opaque):
      self.push(Opaque(target.name))
    else:
      raise TypeError(f'calls a {type(target).__name__}')

  def reduce(self) -> None:
    args = self.stack.pop()
    self.call(self.stack.pop(), args)

  def new_with_keywords(self) -> None:
    self.stack.pop()  # Placeholders take none, known functions need none.
    self.reduce()

  def call_marked(self) -> None:
    target, *args = self.pop_mark()
    self.call(target, tuple(args))

  def inst(self, path: str) -> None:
    args = tuple(self.pop_mark())
    self.find(*path.split(' '))
    self.call(self.stack.pop(), args)

  def build(self) -> None:
    """Drops the state: containers need none, placeholders take none."""
    self.stack.pop()
    if isinstance(self.stack[-1], Known):
      raise TypeError('state for a function')

  def persistent_id(self, pid: Any) -> None:
    if self.persistent is None:
      raise CheckpointError('its pickle refers to data outside of itself')
    self.push(self.persistent(pid))


_Handler = Callable[[_Machine, Any], Any]


def _handlers(names: str, handler: _Handler) -> dict[str, _Handler]:
  return dict.fromkeys(names.split(), handler)


_HANDLERS: dict[str, _Handler] = {
  **_handlers('PROTO FRAME', lambda m, arg: None),
  **_handlers(
    'INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING '
    'BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE '
    'BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8',
    _Machine.push,
  ),
  'NONE': lambda m, arg: m.push(None),
  'NEWTRUE': lambda m, arg: m.push(True),
  'NEWFALSE': lambda m, arg: m.push(False),
  'EMPTY_LIST': lambda m, arg: m.push([]),
  'EMPTY_TUPLE': lambda m, arg: m.push(()),
  'EMPTY_DICT': lambda m, arg: m.push({}),
  'EMPTY_SET': lambda m, arg: m.push(set()),
  'MARK': lambda m, arg: m.mark(),
  'POP': lambda m, arg: m.pop(),
  'POP_MARK': lambda m, arg: m.pop_mark(),
  'DUP': lambda m, arg: m.push(m.stack[-1]),
  **_handlers(
    'GET BINGET LONG_BINGET', lambda m, arg: m.push(m.memo[int(arg)])
  ),
  **_handlers('PUT BINPUT LONG_BINPUT MEMOIZE', _Machine.put),
  'LIST': lambda m, arg: m.push(m.pop_mark()),
  'TUPLE': lambda m, arg: m.push(tuple(m.pop_mark())),
  'TUPLE1': lambda m, arg: m.short_tuple(1),
  'TUPLE2': lambda m, arg: m.short_tuple(2),
  'TUPLE3': lambda m, arg: m.short_tuple(3),
  'DICT': lambda m, arg: m.make_dict(),
  'FROZENSET': lambda m, arg: m.push(frozenset(map(as_key, m.pop_mark()))),
  'APPEND': lambda m, arg: m.extend([m.stack.pop()]),
  'APPENDS': lambda m, arg: m.extend(m.pop_mark()),
  'ADDITEMS': lambda m, arg: m.extend(m.pop_mark()),
  'SETITEM': lambda m, arg: m.set_items([m.stack.pop(-2), m.stack.pop()]),
  'SETITEMS': lambda m, arg: m.set_items(m.pop_mark()),
  'GLOBAL': lambda m, arg: m.find(*arg.split(' ')),
  'STACK_GLOBAL': lambda m, arg: m.find_on_stack(),
  'REDUCE': lambda m, arg: m.reduce(),
  'NEWOBJ': lambda m, arg: m.reduce(),
  'NEWOBJ_EX': lambda m, arg: m.new_with_keywords(),
  'OBJ': lambda m, arg: m.call_marked(),
  'INST': _Machine.inst,
  'BUILD': lambda m, arg: m.build(),
  'PERSID': _Machine.persistent_id,
  'BINPERSID': lambda m, arg: m.persistent_id(m.stack.pop()),
}
