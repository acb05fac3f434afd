"""The notebook runs from top to bottom, and is kept as it should be read."""

import pathlib
import re

import nbclient
import nbformat
import pytest

_PATH = pathlib.Path(__file__).parents[1] / 'notebooks/quickstart.ipynb'
_FEW = 'NUM_CALIBRATION = 8\nNUM_IMAGES = 10'


def _code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def _said(notebook):
  return ''.join(
    output.text
    for cell in _code(notebook)
    for output in cell.outputs
    if output.output_type == 'stream' and output.name == 'stdout'
  )


def _pictures(notebook):
  return sum(
    'image/png' in output.get('data', {})
    for cell in _code(notebook)
    for output in cell.outputs
  )


def _distances(text):
  """Row -> PSNR in dB."""
  return {k: float(v) for k, v in re.findall(r'(\S.*?) +(\d+\.\d+) dB', text)}


@pytest.mark.slow
def test_it_runs(monkeypatch):
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  monkeypatch.setenv('XLA_FLAGS', '')  # One device, as on a laptop.
  monkeypatch.setenv('PYTHONPATH', str(_PATH.parents[1]))
  notebook = nbformat.read(_PATH, 4)
  (parameters,) = (
    cell
    for cell in notebook.cells
    if 'parameters' in cell.metadata.get('tags', ())
  )
  names = re.findall(r'^(\w+) = ', parameters.source, re.MULTILINE)
  assert names == re.findall(r'^(\w+) = ', _FEW, re.MULTILINE)
  parameters.source = _FEW
  folder = {'metadata': {'path': str(_PATH.parent)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
  found = _distances(_said(notebook))
  assert list(found) == list(_distances(_said(nbformat.read(_PATH, 4))))
  # All are digits that resemble those of full precision.
  assert min(found.values()) > 15
  assert _pictures(notebook) == 4


def test_it_is_kept_with_what_it_shows():
  notebook = nbformat.read(_PATH, 4)
  nbformat.validate(notebook)
  counts = [cell.execution_count for cell in _code(notebook)]
  assert counts == [*range(1, len(counts) + 1)]
  kinds = {
    (output.output_type, output.get('name'))
    for cell in _code(notebook)
    for output in cell.outputs
  }
  assert ('error', None) not in kinds and ('stream', 'stderr') not in kinds
  assert _pictures(notebook) == 4
  found = _distances(_said(notebook))
  assert found['auto'] > found['none']
  assert _PATH.stat().st_size < 1e6


@pytest.mark.parametrize('path', ['docs/results.md', 'docs/method.md'])
def test_links_lead_somewhere(path):
  text = _PATH.read_text()
  assert f'](../{path})' in text and (_PATH.parents[1] / path).is_file()
