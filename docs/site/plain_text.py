"""Docstrings as they are meant: plain text, of which MkDocs makes Markdown.

Our docstrings are written to be read in an editor: `float32[B, H, W, C]`,
`c**2 * v` and indented examples stand there as they are. Here what Markdown
would take for a sign is escaped, and what is indented becomes a code block.
"""

import re
import textwrap
from typing import Any

import griffe

_CODE_SPAN = re.compile(r'(`[^`\n]+`)')
_SIGNS = re.compile(r'([\\*_\[\]<>#|])')
_ITEM = re.compile(r'[-*] |\d+\. ')


def to_markdown(text: str) -> str:
  """Markdown that looks like the plain text of a docstring."""
  blocks = re.split(r'\n[ ]*\n', text.strip('\n'))
  return '\n\n'.join(map(_block, blocks))


def _block(block: str) -> str:
  """One of the parts between empty lines."""
  lines = block.splitlines()
  if lines[0].startswith(' ') and not _ITEM.match(lines[0].lstrip()):
    return textwrap.indent(textwrap.dedent(block), ' ' * 4)
  # A list or a drawing below a sentence, without an empty line between.
  for number, line in enumerate(lines):
    if number and line.startswith(' ') and lines[number - 1].endswith(':'):
      head, tail = '\n'.join(lines[:number]), '\n'.join(lines[number:])
      return f'{_escape(head)}\n\n{_block(tail)}'
  return _escape(textwrap.dedent(block))


def _escape(text: str) -> str:
  parts = _CODE_SPAN.split(text)
  parts[::2] = [_SIGNS.sub(r'\\\1', part) for part in parts[::2]]
  return ''.join(parts)


class PlainText(griffe.Extension):
  """Turns the docstrings of a package into Markdown, section by section."""

  def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
    del kwargs
    self._visit(pkg)

  def _visit(self, found: griffe.Object) -> None:
    if found.docstring is not None:
      for section in found.docstring.parsed:
        self._change(section)
    for member in found.members.values():
      if not member.is_alias:
        self._visit(member)

  def _change(self, section: griffe.DocstringSection) -> None:
    if isinstance(section.value, str):
      section.value = to_markdown(section.value)
    elif isinstance(section.value, list):
      for item in section.value:
        if isinstance(getattr(item, 'description', None), str):
          item.description = to_markdown(item.description)
