"""What is asked of a model for a benchmark: shapes, batches, what it will cost, how far it is from
the official run."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason import checkpoint, framing
from jax_videoreason.models.variants import VARIANTS
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import LatentSpec
from jax_videoreason.vbvr.samples import OWN, Data, Sample

OFFICIAL_SEED = 1
# What the official run leaves at the defaults of DiffSynth.
OFFICIAL: dict[str, Any] = {
  "steps": 50,
  "shift": 5.0,
  "guidance": (5.0,),
  "solver": "euler",
  "grid": "diffsynth",
  "tiles": "diffsynth",
}
OFFICIAL_BOUNDARY = 0.875  # of a model with two experts
BATCH_TOKENS = 32_768  # tokens that are denoised together where the settings do not say
H200 = 455e12  # operations per second that a run of the 14B model reaches: 46% of the peak
MEMBERS = 3  # runs of the ensemble
NONE, PAPER = "none", "paper"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What is asked beside the settings of the model.

  name: of the folder; None = the model's. seeds: each has a folder of its own.
  max_area: pixels of a frame at most, frames: of every video; None = as the benchmark has them.
  ensemble: NONE or PAPER. steps: denoising steps whose guess of the video is kept as step_000.mp4.
  part: (i, n), every n-th unit from the i-th on, counted from 0, for n machines at once.
  """

  name: str | None = None
  seeds: tuple[int, ...] = (OFFICIAL_SEED,)
  max_area: int | None = None
  frames: int | None = None
  ensemble: str = NONE
  steps: tuple[int, ...] = ()
  part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Shape:
  """Of a video while it is made: 1 + 4k pixel frames, whole patches."""

  frames: int
  height: int
  width: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
  """Samples of one shape that are denoised together, with one seed."""

  seed: int
  shape: Shape
  samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """videos, operations (multiplications and additions counted apart), and the same in hours."""

  videos: int
  operations: float

  @property
  def hours(self) -> float:
    """Of one H200, for a model in bfloat16; text encoder and VAE come on top."""
    return self.operations / H200 / 3600


def shape_of(sample: Sample, latents: LatentSpec, job: Job) -> Shape:
  """The shape a sample's video is made in: that of the ground truth, filled up to what is allowed.

  Raises ValueError for an area or a frame count that the model cannot make.
  """
  step, *cell = latents.stride
  units = [c * p for c, p in zip(cell, latents.patch[1:], strict=True)]
  height, width = (
    -(-side // unit) * unit for side, unit in zip((sample.height, sample.width), units, strict=True)
  )
  if job.max_area is not None and height * width > job.max_area:
    height, width = framing.area_size(
      sample.height, sample.width, area=job.max_area, stride=cell[0], patch=latents.patch[1]
    )
  wanted = sample.frames if job.frames is None else job.frames
  frames = 1 + -(-(wanted - 1) // step) * step if job.frames is None else wanted
  latents.grid(frames, height, width)
  return Shape(frames=frames, height=height, width=width)


def units(data: Data, latents: LatentSpec, job: Job, batch: int | None) -> list[Unit]:
  """All units in a fixed order; batch: samples of each, None = `BATCH_TOKENS` tokens."""
  shaped = sorted(
    ((shape_of(sample, latents, job), sample) for sample in data.samples),
    key=lambda pair: (pair[0], pair[1].key),
  )
  found = []
  for seed in job.seeds:
    for shape, group in itertools.groupby(shaped, key=lambda pair: pair[0]):
      samples = [sample for _, sample in group]
      size = batch or max(1, BATCH_TOKENS // tokens(latents, shape))
      for low in range(0, len(samples), size):
        some = tuple(samples[low : low + size])
        found.append(Unit(seed=seed, shape=shape, samples=some))
  return found


def tokens(latents: LatentSpec, shape: Shape) -> int:
  """T of a shape."""
  grid = latents.grid(shape.frames, shape.height, shape.width)
  return int(np.prod(latents.tokens(grid)))


def operations(config: Any, text_length: int, count: int) -> float:
  """Of one evaluation of a WanDiT for one run and branch; count: T. Counted are the matmuls."""
  width, keys = config.width, text_length
  per_token = 12 * width**2 + 4 * width * config.ffn_width + 4 * (count + keys) * width
  return float(config.layers) * (count * per_token + 4 * keys * width**2)


def cost(chosen: SampleSettings, data: Data, job: Job) -> Cost:
  """What the whole run will take; the model need not be there if it is a published one.

  Raises ValueError where the model is neither there nor known by the name of its folder.
  """
  config, latents, text_length = described(chosen)
  total = 0.0
  for sample in data.samples:
    count = tokens(latents, shape_of(sample, latents, job))
    total += operations(config, text_length, count)
  evaluations = chosen.steps + (MEMBERS - 1 if job.ensemble == PAPER else 0)
  branches = 2 if chosen.guided else 1
  videos_made = len(data.samples) * len(job.seeds)
  return Cost(videos=videos_made, operations=total * evaluations * branches * len(job.seeds))


def described(chosen: SampleSettings) -> tuple[Any, LatentSpec, int]:
  """(config of the transformer, what a latent is, text tokens) of the bundle or published model."""
  variant = VARIANTS.get(Path(chosen.checkpoint).name)
  if variant is not None and not Path(chosen.checkpoint).is_dir():
    stride = (4, 16, 16) if variant.dit.out_channels == 48 else (4, 8, 8)
    latents = LatentSpec(channels=variant.dit.out_channels, stride=stride)
    return variant.dit, latents, 512
  found = checkpoint.describe(chosen.checkpoint)
  return found.modules.dit.config, found.card.latents, found.card.text_length


def deviations(chosen: SampleSettings, data: Data, job: Job, seed: int, experts: int) -> list[str]:
  """How the settings differ from those of the official run, a few words each; none for own tasks
  but for a smaller size or another frame count."""
  said = []
  if job.max_area is not None:
    said.append(f"frames of at most {job.max_area} pixels, official those of the first frame")
  if job.frames is not None:
    said.append(f"{job.frames} frames, official those of the ground truth")
  if data.name == OWN:
    return said
  wanted = dict(OFFICIAL)
  if experts == 2:
    wanted["boundary"] = OFFICIAL_BOUNDARY
  for key, value in wanted.items():
    own = getattr(chosen, key)
    own = own[:1] if key == "guidance" and len(set(own)) == 1 else own
    if own != value:
      said.append(f"{key} {_bare(own)}, official {_bare(value)}")
  if not chosen.negative_prompt:
    said.append("no negative prompt, official that of Wan")
  if seed != OFFICIAL_SEED:
    said.append(f"seed {seed}, official {OFFICIAL_SEED}")
  if job.ensemble != NONE:
    said.append(f"ensemble {job.ensemble}, official none")
  return said


def _bare(value: Any) -> str:
  return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def folder_of(out: Path, name: str, seed: int) -> Path:
  """The folder of a model; of another seed than the official one, with the seed in its name."""
  return out / (name if seed == OFFICIAL_SEED else f"{name}-seed{seed}")
