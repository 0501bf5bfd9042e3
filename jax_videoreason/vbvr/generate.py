"""Videos of a model for a benchmark: same-shaped samples in batches, resumable.

A unit is a batch of samples of one shape; which samples form a unit is fixed by the data and the
settings, never by the machine. Text encoder and transformer are never resident together: units are
encoded in rounds that fit into host memory, and then denoised.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_videoreason import (
  answers,
  checkpoint,
  conditioning,
  framing,
  interventions,
  media,
  prepare,
  runs,
  sampler,
  store,
  tasks,
)
from jax_videoreason.decode import decode
from jax_videoreason.folders import checksum, disk, plain, remove
from jax_videoreason.schedules import Schedule
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Conditioning, ModelBundle, Noise, Trace
from jax_videoreason.taps import TapSpec
from jax_videoreason.vbvr import layout, videos
from jax_videoreason.vbvr.jobs import MEMBERS, PAPER, Job, Shape, Unit, deviations, folder_of, units
from jax_videoreason.vbvr.samples import Data, Sample

ROUND_BYTES = 16 * 10**9  # conditioning that is held in host memory

Advance = Callable[[int], Any]


def generate(
  out: str | Path,
  chosen: SampleSettings,
  data: Data,
  job: Job,
  *,
  command: Sequence[str] = (),
  redo: bool = False,
  advance: Advance = lambda count: None,
) -> list[Path]:
  """Makes the videos that are not there yet, and returns the folders of the models.

  advance: told of network evaluations of one branch, `len(data.samples) * seeds * steps` in all
  (those of the ensemble's other members are not counted).

  Raises:
    ValueError: a folder holds videos of other settings or data; settings that the model refuses.
    OSError: a folder can't be written.
  """
  if chosen.taps.sites:
    raise ValueError("vbvr generate keeps no taps: use `videoreason sample`, or leave taps empty.")
  if any(step >= chosen.steps for step in job.steps):
    raise ValueError(f"--keep-steps={job.steps}, wanted steps below {chosen.steps}.")
  if job.ensemble == PAPER and chosen.steps < 2:
    raise ValueError(f"steps={chosen.steps}, wanted 2 or more: the ensemble acts on the first one.")
  found = checkpoint.describe(chosen.checkpoint)
  name = job.name or found.card.name
  asked = {
    **_settings(chosen),
    "weights": checksum(found.folder / "bundle.json"),
    "model": name,
    "max_area": job.max_area,
    "frames": job.frames,
    "ensemble": job.ensemble,
  }
  experts = 1 if found.card.boundary is None else 2
  folders = {seed: folder_of(Path(out), name, seed) for seed in job.seeds}
  for seed, folder in folders.items():
    said = deviations(chosen, data, job, seed, experts)
    videos.begin(folder, {**asked, "seed": seed, "deviations": said}, redo=redo)
  everything = units(data, found.card.latents, job, chosen.batch)
  mine = everything[job.part[0] :: job.part[1]]
  left = [unit for unit in mine if not _done(folders[unit.seed], unit)]
  advance(sum(len(u.samples) for u in mine if _done(folders[u.seed], u)) * chosen.steps)
  for some in rounds(left, found):
    encoded = encode(chosen, some)
    bundle = checkpoint.load(chosen.checkpoint, parts=("dit", "vae"))
    for unit in some:
      make(folders[unit.seed], bundle, chosen, job, unit, encoded.pop(0), advance)
    del bundle
  for seed, folder in folders.items():
    if all(_done(folder, unit) for unit in everything if unit.seed == seed):
      store.write_manifest(
        folder,
        config=dataclasses.asdict(chosen),
        command=command,
        device=jax.devices()[0].device_kind,
        model=name,
        seed=seed,
        data=data.mark,
      )
  return list(folders.values())


def _settings(chosen: SampleSettings) -> dict[str, Any]:
  """The settings that change a video."""
  settings = dataclasses.asdict(chosen)
  for key in ("batch", "piece", "taps", "checkpoint", "seeds", "frames", "height", "width"):
    settings.pop(key)
  return plain(settings)


def _done(folder: Path, unit: Unit) -> bool:
  return all(videos.record_of(folder, sample) is not None for sample in unit.samples)


def rounds(left: Sequence[Unit], found: checkpoint.Described) -> list[list[Unit]]:
  """Units whose conditioning fits into host memory together."""
  config, latents = found.modules.dit.config, found.card.latents
  groups: list[list[Unit]] = []
  room = 0
  for unit in left:
    grid = latents.grid(unit.shape.frames, unit.shape.height, unit.shape.width)
    one = int(np.prod(grid)) * (latents.channels + 4) + 2 * found.card.text_length * (
      config.text_width
    )
    size = 4 * one * len(unit.samples)
    if not groups or room < size:
      groups.append([])
      room = ROUND_BYTES
    groups[-1].append(unit)
    room -= size
  return groups


def encode(chosen: SampleSettings, some: Sequence[Unit]) -> list[Conditioning]:
  """The conditioning of each unit, in host memory."""
  bundle = checkpoint.load(chosen.checkpoint, parts=("text", "clip", "vae"))
  encoded = []
  for unit in some:
    first = np.stack([first_frame(s, unit.shape, bundle.card.numerics) for s in unit.samples])
    cond = conditioning.encode(
      bundle,
      [sample.prompt for sample in unit.samples],
      None if bundle.parts.dit.config.image_input == "none" else first,
      frames=unit.shape.frames,
      negative_prompt=chosen.negative_prompt,
      guided=chosen.guided,
      tiles=chosen.tiles,
    )
    encoded.append(jax.tree.map(np.asarray, cond))
  return encoded


def first_frame(sample: Sample, shape: Shape, stack: str) -> np.ndarray:
  """first_frame at the size of the model; as it is where that is its own size."""
  image = sample.first()
  if image.shape[:2] == (shape.height, shape.width):
    return image
  made = framing.stretched(image, shape.height, shape.width, stack)
  if made.dtype == np.uint8:
    return made
  return np.round(127.5 * (np.clip(made, -1, 1) + 1)).astype(np.uint8)


def make(
  folder: Path,
  bundle: ModelBundle,
  chosen: SampleSettings,
  job: Job,
  unit: Unit,
  cond: Conditioning,
  advance: Advance,
) -> None:
  """Denoises one unit and writes its videos with their records."""
  latents, shape = bundle.card.latents, unit.shape
  grid = (*latents.grid(shape.frames, shape.height, shape.width), latents.channels)
  noise = runs.make_noise([unit.seed] * len(unit.samples), grid)
  schedule = prepare.schedule(chosen, bundle)
  read = range(chosen.steps) if any(s.own for s in unit.samples) else ()
  kept = sorted({*job.steps, *read})
  x0 = np.empty((len(kept), len(unit.samples), *grid), np.float32)
  finite = np.ones(len(unit.samples), bool)

  def on_piece(trace: Trace, at: slice, part: slice) -> None:
    finite[part] &= np.asarray(trace.finite).all(0)
    for row, step in enumerate(kept):
      if trace.x0 is not None and at.start <= step < at.stop:
        x0[row, part] = trace.x0[step - at.start]
    advance((at.stop - at.start) * (part.stop - part.start))

  taps = TapSpec(latents=False, x0=bool(kept))
  if job.ensemble == PAPER:
    final = ensemble(bundle, noise, cond, schedule, taps, chosen.piece, unit.seed, on_piece)
  else:
    final = runs.run(
      bundle, noise, cond, schedule, taps=taps, piece=chosen.piece, on_piece=on_piece
    )
  sigma = np.asarray(schedule.sigma)
  made = decode(bundle, final, tiles=chosen.tiles)
  for row, (sample, frames) in enumerate(zip(unit.samples, made, strict=True)):
    if videos.record_of(folder, sample) is not None:
      continue  # made in another unit, before the data or the batch were chosen otherwise
    guesses = decode(bundle, x0[:, row], tiles=chosen.tiles) if kept else np.empty(0)
    if job.steps:
      write_steps(folder, sample, {s: guesses[kept.index(s)] for s in job.steps})
    said = read_answers(sample, guesses, sigma[kept]) if sample.own and finite[row] else None
    videos.put(
      folder,
      sample,
      frames,
      seed=unit.seed,
      made=dataclasses.asdict(shape),
      finite=bool(finite[row]),
      answers=said,
    )


def ensemble(
  bundle: ModelBundle,
  noise: Noise,
  cond: Conditioning,
  schedule: Schedule,
  taps: TapSpec,
  piece: int,
  seed: int,
  on_piece: runs.OnPiece,
) -> np.ndarray:
  """R F H W C: the training-free ensemble, as far as it is known.

  At the first step three runs of a sample, of the seeds s, s + 1 and s + 2, average what the middle
  layers (the third quarter, 20 to 29 of 40) write; the first run goes on alone.
  """
  count = len(noise.keys)
  many = runs.make_noise(
    [seed + member for member in range(MEMBERS) for _ in range(count)], noise.grid
  )
  rows = np.tile(np.arange(count), MEMBERS)
  wide = runs.take(cond, rows)
  sizes = sampler.sizes_of(bundle, many, wide, schedule)
  members = [np.arange(count) + member * count for member in range(MEMBERS)]
  at = interventions.where(sizes, steps=0, layers=slice(sizes.L // 2, sizes.L * 3 // 4))
  edit = interventions.ensemble_runs(interventions.identity(sizes), at, members, keep="first")
  start = sampler.start(many, schedule.solver)
  _, trace, state = sampler.denoise(bundle, many, wide, schedule[0:1], edit, taps, start)
  host = jax.tree.map(np.asarray, trace)
  first = dataclasses.replace(
    host,
    finite=host.finite[:, :count],
    x0=None if host.x0 is None else host.x0[:, :count],
  )
  on_piece(first, slice(0, 1), slice(0, count))
  state = runs.take(state, np.arange(count))
  for at_steps in runs.pieces(len(schedule) - 1, piece):
    place = slice(at_steps.start + 1, at_steps.stop + 1)
    _, trace, state = sampler.denoise(bundle, noise, cond, schedule[place], None, taps, state)
    on_piece(jax.tree.map(np.asarray, trace), place, slice(0, count))
  return np.asarray(state.latents)


def read_answers(sample: Sample, guesses: np.ndarray, sigma: np.ndarray) -> Mapping[str, Any]:
  """What x0 answers at every step; guesses: S frames height width 3."""
  task = tasks.load(sample.task, size=sample.height, frames=sample.frames)
  clips = np.stack([videos.exported(frames, sample) for frames in guesses])
  found = answers.read_steps(task, [dict(sample.metadata)], clips[:, None], sigma)
  return {
    "sigma": found.sigma,
    "answer": [None if a is None else str(a) for a in found.answer[:, 0]],
    "right": found.right[:, 0],
    "score": found.score[:, 0],
    "commitment": int(found.commitment[0]),
    "first_hit": int(found.first_hit[0]),
    "flips": int(found.flips[0]),
  }


def write_steps(folder: Path, sample: Sample, guesses: Mapping[int, np.ndarray]) -> None:
  """Writes steps/SPLIT/TASK/00000/step_000.mp4, as the official tools name them."""
  place = folder / videos.STEPS / sample.key
  with disk(place):
    remove(place)
    place.mkdir(parents=True)
  for step, frames in guesses.items():
    media.write_mp4(place / f"step_{step:03d}.mp4", frames, fps=layout.FPS)
