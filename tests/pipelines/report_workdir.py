"""A work directory with something for every section of the report."""

import json
import pathlib
import shutil

import numpy as np

NAMES = ('full precision', 'W4A8', 'W4A8, S-D2', 'W4A8, D-D2', 'W4A8, auto')
METRICS = {
  'samples': 'out/<b>x</b>/samples',
  'num_samples': 123,
  'reference': 'pretrained:mnist',
  'num_reference': 10_000,
  'num_reference_statistics': 10_000,
  'network': 'digits',
  'label_agreement': 0.9876,
  'fid': 7.25,
  'sfid': 8.5,
  'inception_score': 9.125,
  'precision': 0.75,
  'recall': None,
  'fid_bootstrap': {'low': 6.5, 'high': 8.125, 'mean': 7.5, 'std': 0.4},
  'fidelity': None,
}
CORRECTIONS = {
  'device': '1 x some device',
  'repeats': 5,
  'corrections': {
    'none': {'ms_per_step': 1.25, 'added_percent': 0.0},
    'd-d2': {'ms_per_step': 1.5, 'added_percent': 20.0},
  },
  'runs': [{'run': 'w4a8', 'seconds': {'median': 0.25, 'least': 0.125}}],
  'config': {'quant': {'weight_bits': 4}},
}


def comparison(size: int = 8, channels: int = 1) -> np.ndarray:
  """uint8[5, 3, size, size, channels]; rows are further and further off."""
  rng = np.random.default_rng(0)
  first = rng.integers(40, 200, (3, size, size, channels))
  return np.stack([first + 2 * row for row in range(5)]).astype(np.uint8)


def write(few: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  """Copies a calibration and adds images, metrics and a benchmark."""
  shutil.copytree(few, target)
  (target / 'samples' / 'compare').mkdir(parents=True)
  np.savez(
    target / 'samples' / 'compare' / 'images.npz',
    images=comparison(),
    names=np.array(NAMES),
    labels=np.array([3, 0, 1], np.int32),
  )
  (target / 'metrics.json').write_text(json.dumps(METRICS))
  (target / 'benchmark').mkdir()
  text = json.dumps(CORRECTIONS)
  (target / 'benchmark' / 'corrections.json').write_text(text)
  return target
