"""The report against what lies in the work directory."""

import base64
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
import report_workdir
from PIL import Image

from d2dpm_jax.command import main
from d2dpm_jax.denoising import gaussian
from d2dpm_jax.pipelines import cost, report
from d2dpm_jax.reporting import page, tables
from d2dpm_jax.runtime import files


class _Page(html.parser.HTMLParser):
  """Texts by section, and what is loaded from where."""

  def __init__(self, text):
    super().__init__()
    self.texts, self.sources, self.links = {}, [], []
    self._section = ''
    self._skip = False
    self.feed(text)
    self.texts = {k: ' | '.join(v) for k, v in self.texts.items()}

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self._skip = tag in ('style', 'script')
    if tag == 'section':
      self._section = attrs['id']
    if attrs.get('src'):
      self.sources.append((attrs.get('alt', ''), attrs['src']))
    if attrs.get('href'):
      self.links.append(attrs['href'])

  def handle_endtag(self, tag):
    self._skip = False

  def handle_data(self, data):
    if data.strip() and not self._skip:
      text = ' '.join(data.split())
      self.texts.setdefault(self._section, []).append(text)


@pytest.fixture(scope='module')
def workdir(few, tmp_path_factory):
  target = tmp_path_factory.mktemp('report') / 'work'
  report_workdir.write(few, target)
  report.run(None, str(target))
  return target


@pytest.fixture(scope='module')
def shown(workdir):
  return _Page((workdir / 'report.html').read_text())


def _pixels(url):
  _, data = url.split(',', 1)
  with Image.open(io.BytesIO(base64.b64decode(data))) as image:
    return np.asarray(image)


def test_one_file_that_loads_nothing(workdir, shown):
  text = (workdir / 'report.html').read_text()
  assert all(url.startswith('data:image/') for _, url in shown.sources)
  assert all(link.startswith(('#', 'data:')) for link in shown.links)
  assert not re.search(r'https?://|@import|url\(', text)
  assert len(text) < 1_000_000


def test_every_image_is_there_as_it_was_sampled(shown):
  pictures = report_workdir.comparison()
  labels = (3, 0, 1)
  urls = dict(shown.sources)
  for name, row in zip(report_workdir.NAMES, pictures, strict=True):
    for k, image in enumerate(row):
      url = urls[f'{name}, image {k}, class {labels[k]}']
      np.testing.assert_array_equal(_pixels(url), image[..., 0])


def test_distances_to_full_precision(shown):
  # All pixels are off by 2 in the first row below, by 8 in the last one.
  for off in (2, 4, 6, 8):
    psnr = 10 * np.log10(255**2 / off**2)
    assert f'{psnr:.2f} dB PSNR' in shown.texts['images']
  facts = shown.texts['']
  assert 'PSNR, W4A8 | 42.11 dB | to full precision, N = 3' in facts
  assert 'PSNR, W4A8, auto | 30.07 dB' in facts


def test_metrics_with_their_number_and_interval(shown):
  text = shown.texts['metrics']
  for part in (
    'N | 123 (papers use 50000)',
    'FID | 7.250 (95 %: 6.500 to 8.125)',
    'label agreement | 98.76%',
    'recall | -',
    'samples | 123 of out/<b>x</b>/samples',  # Escaped, so it is text.
  ):
    assert part in text
  assert 'FID | 7.25 | N = 123, digits, 95 %: 6.50 to 8.12' in shown.texts['']


def test_statistics_of_every_timestep(workdir, shown):
  paths = files.Workdir.at(workdir)
  model = gaussian.ErrorModel.load(paths.error_model('tensor'))
  text = shown.texts['errors']
  for i, t in enumerate(model.timesteps):
    row = f'{t} | {model.mean_d[i]:.5f} | {model.var_d[i] ** 0.5:.5f}'
    assert row in text
  figures = [alt for alt, _ in shown.sources if 'class' not in alt]
  assert len(figures) == 4  # Three of errors, one of units.


def test_every_unit_and_layer(workdir, shown):
  lines = (workdir / 'calibration' / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  for row in rows:
    name = row['unit'].partition('/')[2]
    before = row['loss_before'] / row['signal']
    assert re.search(rf'{name} \|.*{before:.2e}', shown.texts['units'])
  config = files.read_json(workdir / 'config.json')
  from tiny_config import get_config

  found = cost.measure(get_config('few'))
  for layer in found['layers']:
    here = layer['settings']['W4A8']
    bits = f'{here["w"] or "float"} / {here["a"] or "float"}'
    assert re.search(
      rf'{layer["path"]} \| {layer["kind"]} \| \w+ \| {bits} '
      rf'\| [\d.]+ \| {here["bytes"] / 1024:.1f} ',
      shown.texts['layers'],
    )
  assert config['quant']['weight_bits'] == 4
  full, own = found['settings']['FP32'], found['settings']['W4A8']
  ratio = full['unet_bytes'] / own['unet_bytes']
  assert f'{ratio:.2f} times less than FP32' in shown.texts['']


def test_times_commands_and_environment(workdir, shown):
  run = files.read_json(workdir / 'runs.json')[0]
  assert (
    f'calibrate | {run["ended"]} | {run["seconds"]:.1f}'
    in (shown.texts['speed'])
  )
  for part in (
    'device | 1 x some device', 'none | 1.25 | 0', 'd-d2 | 1.5 | 20',
    'run | seconds, median | 1 | w4a8 | 0.25', 'quant.weight_bits | 4',
  ):  # fmt: skip
    assert part in shown.texts['speed']
  command = shown.texts['again'].replace(' | ', ' ')
  assert run['command'] in command
  assert f'jax {run["environment"]["packages"]["jax"]}' in command
  assert 'checkpoint.path' in shown.texts['settings']
  assert 'quant (' in shown.texts['settings']


def test_next_commands_are_those_of_what_is_missing(shown):
  text = shown.texts['next'].replace(' | ', ' ')
  assert '--mode=experiment' in text and '--mode=sample' in text
  for there in ('calibrate', 'evaluate', 'compare', 'corrections'):
    assert there not in text
  # They can be parsed as they are.
  command = next(x for x in text.split('python main.py ') if 'experim' in x)
  options = main.parse(['main.py', *command.split()])
  assert options.mode == 'experiment' and options.config.checkpoint.path


def test_what_is_not_there_is_left_out(few, tmp_path):
  shutil.copytree(few, tmp_path / 'work')
  for name in ('calibration', 'held_out.npz', 'runs.json'):
    path = tmp_path / 'work' / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert main.main(
    ['main.py', '--mode=report', f'--workdir={tmp_path / "work"}']
  ) == 0  # fmt: skip
  found = _Page((tmp_path / 'work' / 'report.html').read_text())
  assert set(found.texts) == {'', 'errors', 'layers', 'settings'}
  assert not found.sources


def _cell(correction, seed, fid):
  quantizer = 'brecq' if correction else ''
  return {
    'sampler': 's3_eta0_20', 'quantizer': quantizer, 'bits': 'W4A8',
    'correction': correction, 'statistics': '', 'seed': seed,
    'num_images': 50, 'num_reference': 99, 'reference': 'some',
    'network': 'digits', 'device': 'one', 'values': {'fid': fid},
  }  # fmt: skip


def test_an_experiment_alone(tmp_path):
  cells = [
    _cell(kind, seed, fid + seed)
    for kind, fid in (('', 1.0), ('none', 9.0), ('d-d2', 3.0))
    for seed in (0, 1)
  ]
  files.write_json(
    tmp_path / 'experiment' / 'results.json', tables.aggregate(cells)
  )
  report.run(None, str(tmp_path))
  text = (tmp_path / 'report.html').read_text()
  found = _Page(text)
  assert set(found.texts) == {'', 'experiment'}
  assert 'none | 9.500 ± 0.707' in found.texts['experiment']
  assert 'd-d2 | -6.000 ± 0.000' in found.texts['experiment']
  assert '<b>3.500 ± 0.707</b>' in text  # Not escaped: it stands out.


def test_large_images_are_small_files():
  rng = np.random.default_rng(0)
  ramp = np.linspace(0, 255, 256).astype(np.uint8)
  image = np.stack([np.tile(ramp, (256, 1))] * 3, -1)
  image[100:120] = rng.integers(0, 255, (20, 256, 3))
  url = page.image_url(image)
  assert url.startswith('data:image/webp') and len(url) < 30_000
  error = _pixels(url).astype(float) - image
  assert np.abs(error[:90]).mean() < 2


def test_nothing_to_report(tmp_path):
  with pytest.raises(ValueError, match='no such directory'):
    report.run(None, str(tmp_path / 'none'))
  with pytest.raises(ValueError, match='holds nothing to report'):
    report.run(None, str(tmp_path))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'name', ['metrics.json', 'samples/compare/images.npz', 'runs.json',
           'calibration/errors.png'],
)  # fmt: skip
def test_a_damaged_file_is_named(workdir, tmp_path, name, capfd):
  shutil.copytree(workdir, tmp_path / 'work')
  (tmp_path / 'work' / name).write_bytes(b'{')
  code = main.main(
    ['main.py', '--mode=report', f'--workdir={tmp_path / "work"}']
  )
  said = capfd.readouterr().err.strip().splitlines()
  assert code == 1 and len(said) == 1
  assert said[0].startswith('error: ') and name in said[0]


def test_a_run_stands_without_its_report(workdir, tmp_path, capfd):
  shutil.copytree(workdir, tmp_path / 'work')
  (tmp_path / 'work' / 'metrics.json').write_text('{')
  from tiny_config import __file__ as config

  argv = [
    'main.py', '--config', f'{config}:few', '--mode', 'benchmark',
    '--workdir', str(tmp_path / 'work'),
  ]  # fmt: skip
  assert main.main(argv) == 0
  said = capfd.readouterr().err
  assert 'report.html was not written' in said and 'metrics.json' in said
  assert (tmp_path / 'work' / 'benchmark' / 'cost.json').is_file()
