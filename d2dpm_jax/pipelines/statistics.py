"""Error statistics: what the quantized network does on trajectories."""

from collections.abc import Iterator

import numpy as np

from d2dpm_jax.denoising import gaussian
from d2dpm_jax.diffusion import noise
from d2dpm_jax.pipelines import artifacts, generation, setup, trajectories
from d2dpm_jax.quantization import transform
from d2dpm_jax.runtime import files, progress


def fit_errors(
  model: setup.Model,
  qstate: transform.QuantState,
  spool: trajectories.Trajectories,
  paths: files.Workdir,
) -> dict[str, gaussian.ErrorModel]:
  """Runs the quantized network on the trajectories, fits (eps_q, error).

  Returns:
    'tensor' and 'channel' -> error model of all sampling steps.
  """
  config = model.config
  directory = paths.calibration / 'eps_q'
  count = config.statistics.num_samples
  program = generation.eps_program(
    model.ldm, model.sampler, config.sample.microbatch
  )
  inputs = generation.Inputs(
    model.params, qstate, None, noise.seed_key(config.seed)
  )
  with progress.progress('statistics', count, 'image') as bar:
    for start in spool.starts:
      batch = spool.batch(start)
      rows = min(len(batch.x), count - start)
      if rows <= 0:
        break
      reused = (directory / f'{start:06d}.npy').is_file()
      if not reused:
        eps_q = program(inputs, batch.x[:rows], batch.labels[:rows])
        trajectories.write_array(directory, f'{start:06d}', eps_q)
      bar.update(rows, reused=reused)
  timesteps = generation.rows_of(model.ldm, model.sampler).t

  def pairs(t: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    step = int(np.flatnonzero(timesteps == t)[0])
    for start in spool.starts:
      if start < count:
        eps_q = trajectories.read_array(directory, f'{start:06d}')
        eps = spool.batch(start).eps[: len(eps_q)]
        yield eps_q[:, step], eps[:, step]

  settings = {
    **artifacts.structure(model),
    'sampler': artifacts.sampler_settings(model),
  }
  return {
    kind: gaussian.fit(
      timesteps.tolist(),
      pairs,
      channel_wise=kind == 'channel',
      outlier_std=config.statistics.outlier_std,
      settings=settings,
    )
    for kind in ('tensor', 'channel')
  }
