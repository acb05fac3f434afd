"""The fields that every experiment has, with the defaults they share.

The argument of a config file is words with commas between, in any order:

  full, fast             the best we have; a short calibration
  paper_w4a8, paper_w8a8 as the paper's released scripts quantize
  s3_eta0_20             guidance scale 3, eta 0, 20 DDIM steps
  eta1_200               the same of an unconditional model, without guidance

so `configs/imagenet.py:paper_w4a8,s3_eta1_20`. What is not named stays as the
file has it.
"""

import re
from typing import Any

import ml_collections

# Layers of LDM's U-Net by path, as regexes that have to match all of it: those
# of `quant.edge_layers`, then `quant.float_layers`; the rest are quantized to
# `quant.weight_bits` and `quant.act_bits`.
FLOAT_LAYERS = r'(.*/)?(skip_connection|op)'
# The paper's: AttentionBlock's layers are Conv1d there, which it leaves alone.
PAPER_FLOAT_LAYERS_LSUN = r'(.*/)?(skip_connection|op|qkv|proj_out)'
EDGE_LAYERS = r'time_embed_0|input_blocks_0_0|out_2'
LATENT_LAYERS = 'input_blocks_0_0'


# The VQ first stage of LDM-4: 256x256 images, 64x64x3 latents, 8192 codes.
VQ_F4 = dict(
  kind='vq',
  resolution=256,
  in_channels=3,
  out_ch=3,
  ch=128,
  ch_mult=(1, 2, 4),
  num_res_blocks=2,
  z_channels=3,
  embed_dim=3,
  n_embed=8192,
)


# Word for how to quantize -> bits of the weights.
WEIGHT_BITS = {'full': 4, 'fast': 4, 'paper_w4a8': 4, 'paper_w8a8': 8}

_NUMBER = r'\d+(?:\.\d+)?'
_SAMPLER = re.compile(rf'(?:s({_NUMBER})_)?eta({_NUMBER})_([1-9]\d*)')


def base_config(
  arg: str = '',
  quantization: str = 'full',
  sampler: str = 's3_eta0_20',
  paper_float_layers: str = FLOAT_LAYERS,
) -> ml_collections.ConfigDict:
  """Everything but the model, which each experiment adds.

  Args:
    arg: words, see the top of this file.
    quantization: word for what is meant without one.
    sampler: likewise; whether it has a guidance scale says whether the model
      is conditional.
    paper_float_layers: `quant.float_layers` of the words paper_*.

  Raises:
    ValueError: unknown words, or several that say the same thing.
  """
  chosen, schedule = parse(arg, quantization, sampler)
  config = ml_collections.ConfigDict()
  # Seed of everything random: noise, label order, mini-batches.
  config.seed = 0
  config.checkpoint = _checkpoint()
  # Denoising schedule of sampling and calibration.
  config.sampler = ml_collections.ConfigDict(
    dict(
      steps=schedule['steps'],  # of DDIM
      eta=schedule['eta'],  # 0 draws no noise on the way, 1 as much as DDPM
      # Classifier-free guidance; 1 is none, as unconditional models have it.
      guidance_scale=schedule['guidance_scale'],
    )
  )
  config.quant = _quant(WEIGHT_BITS[chosen])
  config.calibration = _calibration()
  config.statistics = _statistics()
  config.sample = _sample()
  config.evaluate = _evaluate()
  config.benchmark = _benchmark()
  config.experiment = _experiment(conditional=sampler.startswith('s'))
  if chosen == 'fast':
    _set_fast_quantization(config)
  elif chosen.startswith('paper'):
    _set_paper_quantization(config, paper_float_layers)
  return config


def parse(
  arg: str, quantization: str, sampler: str
) -> tuple[str, dict[str, Any]]:
  """Reads the argument of a config file.

  Args:
    arg: words, see the top of this file.
    quantization: what is meant without such a word.
    sampler: likewise.

  Returns:
    A key of WEIGHT_BITS, and the fields of `config.sampler`.

  Raises:
    ValueError: unknown words, or several that say the same thing.
  """
  conditional = sampler.startswith('s')
  quantizations, samplers = [], []
  for word in arg.split(',') if arg else ():
    if word in WEIGHT_BITS:
      quantizations.append(word)
    elif is_sampler(word, conditional):
      samplers.append(word)
    else:
      raise ValueError(
        f'Config argument {arg!r}: {word!r} is unknown; '
        f'{_choices(conditional)}.'
      )
  for words in (quantizations, samplers):
    if len(words) > 1:
      raise ValueError(
        f'Config argument {arg!r}: {" and ".join(words)} contradict each '
        f'other; {_choices(conditional)}.'
      )
  return (
    quantizations[0] if quantizations else quantization,
    sampler_fields(samplers[0] if samplers else sampler),
  )


def is_sampler(word: str, conditional: bool) -> bool:
  """Whether a word names a sampler of such a model."""
  match = _SAMPLER.fullmatch(word)
  return match is not None and (match[1] is not None) == conditional


def sampler_fields(word: str) -> dict[str, Any]:
  """The fields of `config.sampler` that a word names.

  Raises:
    ValueError: it names none.
  """
  match = _SAMPLER.fullmatch(word)
  if match is None:
    raise ValueError(
      f'Sampler {word!r}: expected s<guidance scale>_eta<eta>_<steps>, or '
      'eta<eta>_<steps> without guidance.'
    )
  scale, eta, steps = match.groups()
  return dict(
    steps=int(steps),
    eta=float(eta),
    guidance_scale=1.0 if scale is None else float(scale),
  )


def _choices(conditional: bool) -> str:
  """What an argument may hold, in words."""
  form, example = (
    ('s<guidance scale>_eta<eta>_<steps>', 's3_eta0_20')
    if conditional
    else ('eta<eta>_<steps>', 'eta1_200')
  )
  return (
    f'expected at most one of {", ".join(WEIGHT_BITS)} and one sampler '
    f'{form}, such as {example}'
  )


def _checkpoint() -> ml_collections.ConfigDict:
  """Where the weights are."""
  checkpoint = ml_collections.ConfigDict()
  # 'pretrained:mnist' (embedded), a directory written by --mode train or
  # convert, '' for <workdir>/params, or 'random:<seed>' for benchmarks
  # without weights.
  checkpoint.path = ''
  # Read by --mode convert: a PyTorch checkpoint of latent diffusion (.ckpt, or
  # a .zip or folder that holds one).
  checkpoint.torch_path = ''
  checkpoint.use_ema = True  # its averaged weights, if any; False: the raw ones
  # Of a checkpoint that holds no scale_factor; None: it has to hold one.
  checkpoint.scale_factor = ml_collections.config_dict.placeholder(float)
  checkpoint.scale_factor = 1.0
  # The original YAML of the model, in place of `config.model`; in every mode.
  checkpoint.ldm_yaml = ''
  return checkpoint


def _quant(weight_bits: int) -> ml_collections.ConfigDict:
  """Which layers get how many bits, and how they get them."""
  quant = ml_collections.ConfigDict()
  quant.weight_bits = weight_bits  # 2..8
  quant.act_bits = 8  # 2..8; of the inputs of quantized layers
  quant.edge_bits = 8  # weights and inputs of `edge_layers`
  quant.edge_layers = EDGE_LAYERS  # regex: first and last layers
  quant.float_layers = FLOAT_LAYERS  # regex: left in floating point
  # What stays float in the quantized network (layers above, biases, norms) is
  # rounded to this type, and stored in it: 'bfloat16' or 'float32'.
  quant.float_dtype = 'bfloat16'
  quant.per_channel = True  # weight ranges per output channel or per tensor
  quant.weight_range = 'mse'  # 'mse' or 'max'
  quant.act_range = 'mse'  # 'mse' or 'max'
  quant.latent_layers = LATENT_LAYERS  # regex: what sees x_t
  # Their range is [-5, 5] at least, since x_t begins as N(0, 1). A pixel beyond
  # the range is invisible to the network and runs away while sampling. 0 is
  # the searched range alone.
  quant.latent_range = 5.0

  # How quantized layers compute: 'integer', int8 x int8 (docs/integer.md), or
  # 'simulated', the same whole numbers in float32.
  quant.execution = 'integer'
  # What runs integer layers: XLA's kernels for int8 ('int8'), kernels that also
  # do what lies between layers ('fused', for NVIDIA Hopper), XLA's for int8 or
  # bfloat16 as measured (a layers.json of --mode benchmark), or what is fastest
  # on such devices ('auto'). Sums of the same codes are the same.
  quant.kernels = 'auto'
  # Unpacks weights of 4 bits once per batch of images and not in every step:
  # a little faster, for twice the memory. None does so on CPUs.
  quant.unpack_first = ml_collections.config_dict.placeholder(bool)

  # Modules whose weights are reconstructed together (BRECQ's blocks); every
  # other quantized layer is reconstructed alone, with () all of them.
  quant.block_types = ('ResBlock', 'BasicTransformerBlock')
  quant.reconstruction = _reconstruction()
  return quant


def _reconstruction() -> ml_collections.ConfigDict:
  """AdaRound weights, then activation step sizes, unit by unit.

  These are the fields of d2dpm_jax.quantization.adaround.Settings, with the
  paper's values.
  """
  return ml_collections.ConfigDict(
    dict(
      iters=10_000,  # per unit; 0 is nearest rounding
      batch_size=32,  # samples per iteration
      lr=1e-3,  # Adam, of the rounding variables
      rounding_weight=0.01,  # lambda, of the rounding regularizer
      warmup=0.2,  # share of the iterations without the regularizer
      beta_start=20.0,  # its exponent after warm-up
      beta_end=2.0,  # its exponent at the end
      p=2.0,  # norm of the reconstruction loss
      asymmetric=True,  # inputs from the network quantized so far
      drop_prob=0.0,  # QDrop: share of activation elements left in float
      loss='mse',  # or 'fisher_diag': by squared gradients of the output error
      act_iters=5_000,  # per unit; 0 keeps the searched ranges
      act_batch_size=32,  # samples per iteration, of step sizes
      act_lr=4e-4,  # Adam with cosine decay, of the step sizes
      act_p=2.4,  # norm of the loss, of step sizes
      act_asymmetric=False,  # as `asymmetric`, of step sizes
      act_init_samples=32,  # for the range search
      # Where it is computed; the next three change nothing else (but last
      # bits). Devices; None: all local ones.
      devices=ml_collections.config_dict.placeholder(int),
      # Activations of the calibration set in host memory; None: if need be.
      host_streams=ml_collections.config_dict.placeholder(bool),
      chunk=128,  # samples in one forward of a unit
    )
  )


def _calibration() -> ml_collections.ConfigDict:
  """Inputs (x_t, t, c) of the full-precision sampler."""
  calibration = ml_collections.ConfigDict()
  calibration.num_samples = 1024  # inputs, one of a trajectory each
  calibration.timesteps = 'uniform'  # their spread; or 'normal' (PTQ4DM)
  calibration.balanced_labels = True  # over classes; False: at random
  # Trajectories at a time; a multiple of `sample.microbatch` times the devices
  # of a process uses all of them.
  calibration.batch_size = 64
  return calibration


def _statistics() -> ml_collections.ConfigDict:
  """Joint Gaussian of (eps_q, eps_q - eps) per step."""
  statistics = ml_collections.ConfigDict()
  # 'fp': at points of full-precision trajectories, as the paper; 'quantized':
  # of those of the quantized network with `sample.correction`.
  statistics.trajectory = 'fp'
  statistics.num_samples = 1024  # trajectories
  statistics.outlier_std = 4.0  # farther from the mean: left out
  statistics.folds = 4  # of images, to try the corrections on others
  # More trajectories, on which `auto` is tried from end to end; 0: it is not,
  # and takes what predicts the most of each step's error.
  statistics.num_trials = 64
  return statistics


def _sample() -> ml_collections.ConfigDict:
  """Of --mode sample; calibration takes `microbatch` and the correction."""
  sample = ml_collections.ConfigDict()
  sample.num_images = 64  # in all
  # Images in flight per call, over all devices of a process; 0: from their free
  # memory. Has no effect on images.
  sample.batch_size = 0
  # Images a device computes together, whatever the batch size: rounding
  # decisions in a quantized network depend on the last bit of a sum, and so
  # on the shape of the compiled program. An accelerator wants 32 or more.
  sample.microbatch = 8
  # none, s-d2, d-d2, ptqd, mean-only, variance-only; auto: what predicts the
  # error best on held-out images, step by step (docs/results.md).
  sample.correction = 'auto'
  sample.channel_wise = False  # statistics per latent channel or per tensor
  sample.absorb_variance = False  # s-d2 only; the official code leaves it off
  sample.quantized = True  # False: the full-precision network
  sample.labels = ()  # () is balanced over all classes; else cycled
  sample.compare = False  # one picture: fp, quantized, s-d2, d-d2 in rows
  return sample


def _evaluate() -> ml_collections.ConfigDict:
  """What is compared with what, and by which network."""
  return ml_collections.ConfigDict(
    dict(
      # An .npz (arr_0, arr_1), a folder of them or of pictures; '' is the run's
      # samples; 'mnist:test', 'mnist:train[:10000]': images of `train.data`;
      # 'tfds:lsun/bedroom:train[:50000]'. Several with commas between.
      samples='',
      # As `samples`, a file written with `save_statistics`, a reference batch
      # of openai/guided-diffusion, or, for the network 'digits',
      # 'pretrained:mnist' (the test set).
      reference='',
      save_statistics='',  # write those of the samples there, as a reference
      network='inception',  # what looks at images; 'digits' at those of MNIST
      # Weights of 'inception': a published file or a folder that holds one; ''
      # looks into ~/.cache/d2dpm_jax. See docs/evaluate.md.
      inception='',
      # How pictures and images of tfds become one size: 'none' (they are),
      # 'adm' (ImageNet's), 'ldm' (LSUN's).
      preprocess='none',
      image_size=0,  # that size; 0 is the model's
      # Samples of the same seed and labels, such as those of full precision:
      # how far the samples are from them, image by image.
      fidelity='',
      bootstrap=0,  # draws for an interval of FID, such as 200; 0: none
      selfcheck=False,  # only see whether known inputs give known numbers
      through_first_stage=False,  # encode and decode the samples first
      batch_size=64,  # images at a time, over all devices
      neighbours=3,  # k of precision and recall
      split_size=5000,  # of the inception score
      shuffle=True,  # before splitting for it; False: the file's order
    )
  )


def _benchmark() -> ml_collections.ConfigDict:
  """What is measured."""
  benchmark = ml_collections.ConfigDict()
  # 'cost': size in MB and bit operations, from shapes alone (docs/cost.md);
  # 'sampling': time and memory of `runs` at each of `batch_sizes`; 'layers':
  # time of every kind of layer at the first of them (docs/performance.md);
  # 'corrections': what they add to a sampling step of a calibrated network;
  # 'job': images per second of --mode sample from end to end (docs/scale.md);
  # 'evaluation': how long --mode evaluate takes (docs/evaluate.md).
  benchmark.what = 'cost'
  # 'float32', 'bfloat16'; 'w8a8' computes in bfloat16 between layers that run
  # on integers, 'w8a8-float32' in float32; 'w8a8-simulated' is what it says.
  benchmark.runs = ('float32', 'bfloat16', 'w8a8', 'w4a8')
  benchmark.batch_sizes = (16, 32, 64)  # images that a device has at once
  benchmark.repeats = 5  # of 'sampling' and 'corrections': medians are told
  benchmark.max_seconds = 480.0  # later no other run begins
  benchmark.num_images = 2_000  # that 'job' samples
  # Random images that 'evaluation' looks at, of the model's size.
  benchmark.num_samples = 50_000
  benchmark.num_reference = 10_000  # random images as its reference
  return benchmark


def _experiment(conditional: bool) -> ml_collections.ConfigDict:
  """Every combination of these is a cell of --mode experiment's tables."""
  samplers: tuple[str, ...] = ('eta0_200', 'eta1_200')
  if conditional:
    samplers = ('s3_eta0_20', 's3_eta1_20', 's1.5_eta0_250', 's1.5_eta1_250')
  return ml_collections.ConfigDict(
    dict(
      # nearest, brecq or brecq-qdrop; the rest is as in `quant`.
      quantizers=('brecq',),
      bits=('W8A8', 'W4A8'),  # of weights and of inputs of quantized layers
      # Any of `sample.correction`.
      corrections=(
        'none',
        'ptqd',
        's-d2',
        'd-d2',
        'mean-only',
        'variance-only',
        'auto',
      ),
      channel_wise=(False, True),  # statistics per tensor, per latent channel
      # Words as in the argument of a config file. Error statistics are those
      # of each one's own trajectories.
      samplers=samplers,
      learn_on='',  # quantizers learn on that sampler's; '' is the first one
      seeds=(0, 1, 2),  # of the noise; tables give mean and spread over them
      num_images=5_000,  # per seed; label every FID with it
      batch_size=500,  # images in flight per call, over all devices
    )
  )


def _set_paper_quantization(
  config: ml_collections.ConfigDict, float_layers: str
) -> None:
  """Quantizes as the paper's released scripts do; bits stay as they are."""
  config.quant.per_channel = False  # one range per weight tensor
  config.quant.latent_range = 0.0
  config.sample.correction = 'd-d2'
  config.quant.float_layers = float_layers
  config.quant.float_dtype = 'float32'
  config.quant.reconstruction.update(batch_size=8, act_batch_size=16)


def _set_fast_quantization(config: ml_collections.ConfigDict) -> None:
  """A short calibration: fewer and larger steps on fewer samples."""
  config.quant.reconstruction.update(
    iters=100, batch_size=16, lr=2e-2, act_iters=50, act_batch_size=16
  )
  config.calibration.num_samples = 128
  config.statistics.update(num_samples=128, num_trials=16)
