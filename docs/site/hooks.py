"""What MkDocs is told of the rest of the repository.

README.md is the first page. There is a page for each public module, made of
its docstrings, and one for each other text file that a page links to. Links in
Markdown are those of the repository, so that they work there, too; here they
are turned to these pages. Modules that are named in the text, as in
`quantization/affine.py: fake_quant`, become links as well.
"""

import ast
import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_ROOT = pathlib.Path(__file__).parents[2]
# Of the code, in the order of the pages.
_ROOMS = (
  'models',
  'diffusion',
  'denoising',
  'quantization',
  'evaluation',
  'reporting',
  'training',
  'pipelines',
  'command',
  'runtime',
)
_FOLDERS = (*(f'd2dpm_jax/{room}' for room in _ROOMS), 'convert')
# Shown as they are: path in the repository -> path of the page.
_TEXTS = {
  'README.md': 'index.md',
  'CHANGELOG.md': 'CHANGELOG.md',
  'd2dpm_jax/pretrained/README.md': 'pretrained.md',
}
_LISTED = ('configs', 'examples')  # Shown as source code.
_LINK = re.compile(r'(?<=\]\()([^)#\s]+)')
_FENCE = re.compile(r'(^```.*?^```$)', re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r'(?<!\[)`((?:\w+/)+\w+\.py)(?:: (\w+))?`(?!\])')


def _modules(folder: str) -> list[pathlib.Path]:
  """Public modules right in a folder of the repository."""
  paths = sorted((_ROOT / folder).glob('*.py'))
  return [path for path in paths if not path.name.startswith('_')]


def _source_of(path: str) -> str | None:
  """Page of a module, by its path in the repository."""
  if path == 'd2dpm_jax/api.py':
    return 'api/index.md'
  folder, _, name = path.rpartition('/')
  if folder in _FOLDERS and name.endswith('.py') and name[0] != '_':
    return f'api/{posixpath.basename(folder)}/{name[:-3]}.md'
  return None


def _page_of(path: str) -> str | None:
  """Page of a file, by its path in the repository."""
  if path.startswith('docs/'):
    return path.removeprefix('docs/')
  if path.split('/')[0] in _LISTED and path.endswith('.py'):
    return f'source/{path[:-3]}.md'
  if path.endswith('.ipynb'):
    return path
  return _TEXTS.get(path) or _source_of(path)


def _path_of(page: str) -> str:
  """Inverse of `_page_of` for pages that are Markdown in the repository."""
  texts = {to: path for path, to in _TEXTS.items()}
  return texts.get(page, f'docs/{page}')


# ---- Pages of the code


def _summary(path: pathlib.Path) -> str:
  """First paragraph of a module's docstring, in one line."""
  text = ast.get_docstring(ast.parse(path.read_text())) or ''
  return ' '.join(text.split('\n\n')[0].split())


def _module_page(path: pathlib.Path) -> str:
  name = '.'.join(path.relative_to(_ROOT).with_suffix('').parts)
  # `convert` lies beside the package, and is imported as a part of it.
  imported = name if name.startswith('d2dpm_jax.') else f'd2dpm_jax.{name}'
  return f'# {path.stem}\n\n`{imported}`\n\n::: {name}\n'


def _cell(text: str) -> str:
  """Plain text as Markdown; what is between backticks is left alone."""
  parts = re.split(r'(`[^`]+`)', text)
  parts[::2] = [re.sub(r'([*_\[\]<>|])', r'\\\1', x) for x in parts[::2]]
  return ''.join(parts)


def _table(what: str, rows: list[tuple[str, str, str]]) -> str:
  """Of (link, name, what is in it)."""
  lines = [f'| [{n}]({link}) | {_cell(text)} |' for link, n, text in rows]
  head = [f'| {what} | what is in it |', '| --- | --- |']
  return '\n'.join([*head, *lines])


def _folder_page(folder: str) -> str:
  rows = [(f'{p.stem}.md', p.stem, _summary(p)) for p in _modules(folder)]
  text = _cell(_summary(_ROOT / folder / '__init__.py'))
  return f'# {folder}\n\n{text}\n\n{_table("module", rows)}\n'


def _first_page() -> str:
  """The functions of the package itself, and where the others are."""
  rows = []
  for folder in _FOLDERS:
    name = posixpath.basename(folder)
    text = _summary(_ROOT / folder / '__init__.py')
    rows.append((f'{name}/index.md', folder, text))
  return (
    '# The code\n\n'
    f'{_table("folder", rows)}\n\n'
    '## In a notebook\n\n'
    'These are members of `d2dpm_jax` itself.\n\n'
    '::: d2dpm_jax.api\n    options: {heading_level: 3}\n'
  )


def _listing(path: pathlib.Path) -> str:
  name = path.relative_to(_ROOT)
  return f'# {name}\n\n````python\n{path.read_text()}````\n'


def _generated() -> Iterator[tuple[str, str]]:
  """(page, its text) of all pages that are not in docs/."""
  for path, page in _TEXTS.items():
    yield page, (_ROOT / path).read_text()
  yield 'api/index.md', _first_page()
  for folder in _FOLDERS:
    yield f'api/{posixpath.basename(folder)}/index.md', _folder_page(folder)
    for path in _modules(folder):
      page = _source_of(path.relative_to(_ROOT).as_posix())
      assert page is not None
      yield page, _module_page(path)


def _deepen(markdown: str) -> str:
  """Indents by four what belongs to an item of a list.

  So Python-Markdown wants it; in the repository it stands below the text of
  the item, as two or three columns are enough for others.
  """
  width, fenced, lines = 0, False, []
  for line in markdown.splitlines():
    fenced ^= line.startswith('```')
    item = re.match(r'[-*] |\d\. ', line)
    if item and not fenced:
      width = len(item[0])
    elif line and not line.startswith(' '):
      width = 0
    elif width and line.startswith(' ' * width):
      line = ' ' * (4 - width) + line
    lines.append(line)
  return '\n'.join(lines) + '\n'


# ---- What MkDocs calls


def on_config(config: MkDocsConfig) -> None:
  """Adds the pages of the code to the navigation."""
  pages: list[Any] = ['api/index.md']
  for folder in _FOLDERS:
    name = posixpath.basename(folder)
    inside = [{p.stem: f'api/{name}/{p.stem}.md'} for p in _modules(folder)]
    pages.append({name: [f'api/{name}/index.md', *inside]})
  assert config.nav is not None
  config.nav.append({'Code': pages})


def on_files(files: Files, config: MkDocsConfig) -> None:
  """Adds the files that are not in docs/."""
  for page, text in _generated():
    files.append(File.generated(config, page, content=text))
  for folder in _LISTED:
    for path in _modules(folder):
      page = _page_of(path.relative_to(_ROOT).as_posix())
      assert page is not None
      files.append(
        File.generated(
          config,
          page,
          content=_listing(path),
          inclusion=InclusionLevel.NOT_IN_NAV,
        )
      )
  for path in sorted((_ROOT / 'notebooks').glob('*.ipynb')):
    name = path.relative_to(_ROOT).as_posix()
    files.append(File.generated(config, name, abs_src_path=str(path)))


def on_page_markdown(
  markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Turns links of the repository into links of the site."""
  del config
  here = page.file.src_uri
  if here.startswith(('api/', 'source/')):
    return markdown
  folder = posixpath.dirname(_path_of(here))

  def relative(target: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(here) or '.')

  def link(match: re.Match[str]) -> str:
    url = match[1]
    if re.match(r'\w+:', url):
      return url
    target = _page_of(posixpath.normpath(posixpath.join(folder, url)))
    return url if target is None else relative(target)

  def named(match: re.Match[str]) -> str:
    path, name = match.groups()
    for candidate in (path, f'd2dpm_jax/{path}'):
      target = _page_of(candidate)
      if target is not None and files.get_file_from_path(target) is not None:
        anchor = f'#{candidate[:-3].replace("/", ".")}.{name}' if name else ''
        listed = target.startswith('source/')
        url = relative(target) + ('' if listed else anchor)
        return f'[{match[0]}]({url})'
    return match[0]

  parts = _FENCE.split(_deepen(markdown))
  parts[::2] = [_NAMED.sub(named, _LINK.sub(link, part)) for part in parts[::2]]
  return ''.join(parts)
