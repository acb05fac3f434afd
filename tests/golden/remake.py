"""Re-makes every golden array and compares it with the stored one.

  python remake.py SOURCES

SOURCES is a folder with the five checkouts that README.md beside this file
names. The scripts run in a temporary copy of this folder; nothing stored here
changes. Needs PyTorch, not JAX.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np

_HERE = pathlib.Path(__file__).parent
# Script and arguments; {} is the folder of the checkouts.
_RUNS = (
  (
    'make_ldm.py',
    '--source={}/latent-diffusion',
    '--source={}/taming-transformers',
  ),
  (
    'make_checkpoint.py',
    '--source={}/latent-diffusion',
    '--source={}/taming-transformers',
  ),
  ('make_ddim.py', '--ldm={}/latent-diffusion'),
  ('make_correction.py', '--d2dpm={}/D2-DPM', '--ptqd={}/PTQD'),
  ('make_inception.py', '--source={}/torch-fidelity'),
  ('make_quant.py',),
  ('make_torch_files.py',),
)
# Of the largest stored number. PyTorch's float32 sums depend on the processor;
# losses after learning depend on the path that thousands of steps took.
_TOLERANCE = 1e-5
_LEARNED_TOLERANCE = 0.05


def _error(name: str, stored: np.ndarray, made: np.ndarray) -> float:
  """Largest difference, 1 being what is allowed."""
  if stored.shape != made.shape or stored.dtype != made.dtype:
    return np.inf
  if stored.dtype.kind != 'f':
    return 0.0 if np.array_equal(stored, made) else np.inf
  allowed = _LEARNED_TOLERANCE if '_loss_' in name else _TOLERANCE
  largest = max(1e-9, np.abs(stored).max(initial=0))
  return float(np.abs(stored - made).max(initial=0) / largest / allowed)


def _differences(folder: pathlib.Path) -> list[str]:
  """Arrays that differ between this folder and a new one."""
  lines = []
  for path in sorted(_HERE.glob('*.npz')):
    if not (folder / path.name).exists():
      lines.append(f'{path.name} is not made by any script')
      continue
    with np.load(path) as stored, np.load(folder / path.name) as made:
      names = (set(stored.files) | set(made.files)) - {'meta'}
      for name in sorted(names):
        if name not in stored or name not in made:
          lines.append(f'{path.name}: {name} is only on one side')
        elif (error := _error(name, stored[name], made[name])) > 1:
          lines.append(f'{path.name}: {name} is off {error:.2g} times too far')
    print(f'{path.name}: {len(names)} arrays compared')
  return lines


def main(sources: str) -> None:
  """Runs all scripts; exits with an error where something differs."""
  where = pathlib.Path(sources).resolve()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for path in _HERE.glob('*.py'):
      shutil.copy(path, folder)
    for script, *arguments in _RUNS:
      filled = [argument.format(where) for argument in arguments]
      done = subprocess.run(
        [sys.executable, folder / script, *filled],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      if done.returncode:
        sys.exit(f'{done.stdout}\n{script} failed.')
      print(f'{script}: made')
    lines = _differences(folder)
  # Files of torch.save hold addresses; their own script reads and compares.
  subprocess.run(
    [sys.executable, _HERE / 'make_torch_files.py', '--check'], check=True
  )
  if lines:
    sys.exit('\n'.join(lines))
  print('All golden arrays are the same.')


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  main(sys.argv[1])
