"""The top of the report: a title, a sentence, single numbers."""

from collections.abc import Iterator

from d2dpm_jax.reporting.contents import Contents
from d2dpm_jax.runtime import files


def title(work: Contents) -> str:
  """The config of the last run, and the name of the work directory."""
  names = [run.get('config') for run in work.history if run.get('config')]
  folder = work.paths.root.name
  return f'{names[-1]} in {folder}' if names else folder


def sentence(work: Contents) -> str:
  """The settings that matter most, in a sentence."""
  config, quant = work.config, work.quant
  if not config:
    return ''
  steps = config['sampler']
  text = (
    f'{config["model"]["image_size"]} x {config["model"]["image_size"]} '
    f'images by {steps["steps"]} DDIM steps, eta {steps["eta"]:g}, guidance '
    f'{steps["guidance_scale"]:g}; seed {config["seed"]}.'
  )
  if quant is not None:
    text += (
      f' Weights of {quant["weight_bits"]} bits, layer inputs of '
      f'{quant["act_bits"]}, first and last layers of {quant["edge_bits"]}; '
      f'weight ranges per {"channel" if quant["per_channel"] else "tensor"}.'
    )
  return text


def facts(work: Contents) -> list[dict[str, str]]:
  """Single numbers, each with what it is of."""
  return [*_size(work), *_noise(work), *_distances(work), *_fid(work)]


def _fact(name: str, value: str, note: str) -> dict[str, str]:
  return {'name': name, 'value': value, 'note': note}


def _size(work: Contents) -> Iterator[dict[str, str]]:
  """Of the U-Net."""
  if work.costs is None or not (name := work.bits):
    return
  full, own = (
    work.costs['settings'][key]['unet_bytes'] for key in ('FP32', name)
  )
  yield _fact(
    f'U-Net, {name}',
    f'{own / 2**20:.2f} MiB',
    f'{full / own:.2f} times less than FP32',
  )


def _noise(work: Contents) -> Iterator[dict[str, str]]:
  """Of the network's output."""
  if not work.paths.unit_summary.is_file():
    return
  snr = files.read_json(work.paths.unit_summary).get('snr_db', {}).get('act')
  if snr is not None:
    yield _fact(
      'Signal to quantization noise',
      f'{snr:.1f} dB',
      'of the network, on the calibration set',
    )


def _distances(work: Contents) -> Iterator[dict[str, str]]:
  """Of the first quantized sampler, and of `auto`."""
  if work.comparison is None:
    return
  rows = work.comparison.rows
  for row in rows[1:]:
    if 'auto' in row.name or row is rows[1]:
      yield _fact(
        f'PSNR, {row.name}',
        row.note.removesuffix(' PSNR'),
        f'to full precision, N\u00a0=\u00a0{len(row.urls)}',
      )


def _fid(work: Contents) -> Iterator[dict[str, str]]:
  """With its number of images."""
  if not work.paths.metrics.is_file():
    return
  result = files.read_json(work.paths.metrics)
  if result.get('fid') is None:
    return
  note = f'N = {result["num_samples"]}, {result["network"]}'
  if interval := result.get('fid_bootstrap'):
    note += f', 95 %: {interval["low"]:.2f} to {interval["high"]:.2f}'
  yield _fact('FID', f'{result["fid"]:.2f}', note)
