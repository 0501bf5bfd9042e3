"""What is asked of a model for a benchmark: shapes, batches, what it will cost, how far it is from
the official run."""

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason import costs, framing, plan, runs, settings
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Card, LatentSpec
from jax_videoreason.vbvr import suite
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
# sha256 of Wan's stock negative prompt (`configs.common.NEGATIVE_PROMPT`)
OFFICIAL_NEGATIVE = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
STACKS = {"official": "Wan's own code", "diffusers": "diffusers"}  # other numerics
BATCH_TOKENS = 32_768  # tokens that are denoised together where the settings do not say
MEMBERS = 3  # runs of the ensemble
NONE, PAPER = "none", "paper"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What is asked beside the settings of the model.

  name: of the folder; None = the model's. seeds: each has a folder of its own.
  max_area: pixels of a frame at most, frames: of every video; None = as the benchmark has them.
  ensemble: NONE or PAPER. steps: denoising steps whose guess of the video is kept as step_000.mp4.
  layers: after which the tokens are looked at, with maps of these steps.
  part: (i, n), every n-th unit from the i-th on, counted from 0, for n commands at once.
  """

  name: str | None = None
  seeds: tuple[int, ...] = (OFFICIAL_SEED,)
  max_area: int | None = None
  frames: int | None = None
  ensemble: str = NONE
  steps: tuple[int, ...] = ()
  layers: tuple[int, ...] = ()
  part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Shape:
  """Of a video while it is made: 1 + 4k pixel frames, whole patches."""

  frames: int
  height: int
  width: int


LONGEST = Shape(frames=85, height=1024, width=1024)  # of the benchmark's videos that were seen


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
  """Samples of one shape that are denoised together, with one seed."""

  seed: int
  shape: Shape
  samples: tuple[Sample, ...]


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


def guessed(job: Job, samples: Iterable[Sample], steps: int) -> list[int]:
  """The steps of so many whose guess of the video is looked at: of our own tasks every one."""
  return sorted({*job.steps, *(range(steps) if any(s.own for s in samples) else ())})


def work(chosen: SampleSettings, data: Data, job: Job, seats: int = 1) -> list[costs.Work]:
  """What the units of this part of a job take; a published model need not be there.

  seats: the `seed` axis of the mesh, for which each unit is filled up.
  Raises ValueError where the model is neither there nor known by the name of its folder, and as
  `settings.boundary_of` says.
  """
  model = plan.model(chosen.checkpoint)
  settings.boundary_of(chosen, model.card)
  mine = units(data, model.card.latents, job, chosen.batch)[job.part[0] :: job.part[1]]
  batches = [(unit.shape, len(unit.samples)) for unit in mine]
  looked = {unit.shape for unit in mine if guessed(job, unit.samples, chosen.steps)}
  return by_shape(model, chosen, batches, job, seats, looked)


def by_shape(
  model: plan.Model,
  chosen: SampleSettings,
  batches: Sequence[tuple[Shape, int]],
  job: Job,
  seats: int = 1,
  looked: Collection[Shape] = (),
) -> list[costs.Work]:
  """What batches (shape, videos) take, shape by shape; looked: shapes of which x0 is kept."""
  members = MEMBERS if job.ensemble == PAPER else 1  # in the first step
  found = []
  for shape in sorted({shape for shape, _ in batches}):
    counts = [count for own, count in batches if own == shape]
    sized = dataclasses.replace(chosen, **dataclasses.asdict(shape))
    filled = [runs.computed(count, None, seats) for count in counts]
    problem = plan.Problem(
      model=model,
      chosen=sized,
      runs=members * max(filled),
      decodes="between",
      drops=("latents",) if shape in looked else ("latents", "x0"),
      spreads=job.ensemble != PAPER,
    )
    sizes = problem.sizes
    found.append(
      costs.Work(
        name=f"{shape.frames} x {shape.height} x {shape.width}",
        problem=problem,
        videos=sum(counts),
        evaluations=sum(filled) * sizes.G * (sizes.S + members - 1),
      )
    )
  return found


def official(ensemble: str = NONE) -> list[costs.Work]:
  """What the official run takes at most: as if all videos were as long as the longest."""
  chosen = SampleSettings(
    checkpoint="ckpt/vbvr_wan22",
    **dataclasses.asdict(LONGEST),
    **OFFICIAL,
    boundary=OFFICIAL_BOUNDARY,
  )
  videos = len(suite.OFFICIAL) * suite.SAMPLES
  model, job = plan.model(chosen.checkpoint), Job(ensemble=ensemble)
  return by_shape(model, chosen, [(LONGEST, 1)] * videos, job)


def deviations(chosen: SampleSettings, data: Data, job: Job, seed: int, card: Card) -> list[str]:
  """How the settings differ from those of the official run, a few words each; none for own tasks
  but for a smaller size or another frame count. card: of the model."""
  said = []
  if job.max_area is not None:
    said.append(f"frames of at most {job.max_area} pixels, official those of the first frame")
  if job.frames is not None:
    said.append(f"{job.frames} frames, official those of the ground truth")
  if data.name == OWN:
    return said
  wanted = dict(OFFICIAL)
  if card.boundary is not None:
    wanted["boundary"] = OFFICIAL_BOUNDARY
    if chosen.boundary is None:
      chosen = dataclasses.replace(chosen, boundary=card.boundary)
  for key, value in wanted.items():
    own = getattr(chosen, key)
    own = own[:1] if key == "guidance" and len(set(own)) == 1 else own
    if own != value:
      said.append(f"{key} {_bare(own)}, official {_bare(value)}")
  if hashlib.sha256(chosen.negative_prompt.encode()).hexdigest() != OFFICIAL_NEGATIVE:
    own = "another" if chosen.negative_prompt else "no"
    said.append(f"{own} negative prompt, official that of Wan")
  if card.numerics in STACKS:
    said.append(f"arithmetic of {STACKS[card.numerics]}, official that of DiffSynth")
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
