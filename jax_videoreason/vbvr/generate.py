"""Videos of a model for a benchmark: same-shaped samples in batches, resumable.

A unit is a batch of samples of one shape; which samples form a unit is fixed by the data and the
settings, never by the machine. Text encoder and transformer are never resident together: units are
encoded in rounds that fit into host memory, and then denoised.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_videoreason import (
  answers,
  bundles,
  checkpoint,
  conditioning,
  framing,
  interventions,
  media,
  prepare,
  runs,
  sampler,
  settings,
  store,
  sweep,
  tasks,
)
from jax_videoreason.decode import decode, decode_each
from jax_videoreason.folders import MANIFEST, disk, remove
from jax_videoreason.records import plain
from jax_videoreason.schedules import Schedule
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Conditioning, ModelBundle, Noise, Parts, Trace
from jax_videoreason.taps import TapSpec
from jax_videoreason.vbvr import baselines, layout, suite, tokens, videos
from jax_videoreason.vbvr.jobs import (
  MEMBERS,
  PAPER,
  Job,
  Unit,
  deviations,
  folder_of,
  guessed,
  units,
)
from jax_videoreason.vbvr.samples import Data, Sample
from jax_videoreason.vbvr.tokens import Tokens

ROUND_BYTES = 16 * 10**9  # conditioning that is held in host memory
NAME_BYTES = 200  # of a name, to which a seed is added; file systems take 255
TAKEN = (videos.CLIPS, videos.PROBLEMS, *baselines.CLIPS, *suite.SPLITS, *suite.OWN_SPLITS)

Advance = Callable[[int], Any]
Draw = Callable[[Path, Tokens], Any]


def generate(
  out: str | Path,
  chosen: SampleSettings,
  data: Data,
  job: Job,
  *,
  command: Sequence[str] = (),
  redo: bool = False,
  process: tuple[int, int] = (0, 1),
  meet: Callable[[str], Any] = lambda place: None,
  mesh: Mesh | None = None,
  guidance: sampler.Guidance = "parallel",
  experts: int | None = None,
  draw: Draw = lambda folder, tokens: None,
  advance: Advance = lambda count: None,
) -> list[Path]:
  """Makes the videos that are not there yet, and returns the folders of the models.

  process: (number, count) of this process; process p makes the units p, p + count, ... meet:
  returns when every process has come to that place. mesh: of the devices of this process, None =
  one device. guidance: as `runs.run` takes it. experts: of the model that may be resident at once,
  None = all; where it has more, each unit loads one after the other. draw: told of the folder and
  the tokens of each sample where `job.layers` asks for them. advance: told of network evaluations
  of one branch, `len(data.samples) * seeds * steps` in all (those of the ensemble's other members
  are not counted).

  Raises:
    ValueError: a folder holds videos of other settings or data, or another command works in it;
      settings that the model refuses; fewer `experts` than it has with several processes.
    OSError: a folder can't be written.
  """
  found = bundles.describe(chosen.checkpoint)
  seats = 1 if mesh is None else mesh.shape["seed"]
  check(chosen, job, found.modules, redo=redo, seats=seats)
  settings.boundary_of(chosen, found.card)
  if experts is not None and experts < found.experts and process[1] > 1:
    raise ValueError(
      f"--experts={experts} with {process[1]} processes, which load together and not unit by unit: "
      "leave it out, or start one process a machine and share the data out by --part."
    )
  name = job.name or found.card.name + ("-ensemble" if job.ensemble == PAPER else "")
  asked = {
    **_settings(chosen),
    "weights": bundles.fingerprint(chosen.checkpoint),
    "model": name,
    "max_area": job.max_area,
    "frames": job.frames,
    "ensemble": job.ensemble,
  }
  folders = {seed: folder_of(Path(out), name, seed) for seed in job.seeds}
  everything = units(data, found.card.latents, job, chosen.batch)
  number, count = process
  here = everything[job.part[0] :: job.part[1]]
  turns = [rounds(here[first::count], found) for first in range(count)]

  def begin() -> None:
    for seed, folder in folders.items():
      said = deviations(chosen, data, job, seed, found.card)
      videos.begin(folder, {**asked, "seed": seed, "deviations": said}, redo=redo)
    for seed in {unit.seed for unit in here if not _done(folders[unit.seed], unit, job)}:
      remove(folders[seed] / MANIFEST)  # it tells of the videos before

  def do() -> None:
    for turn in range(max(map(len, turns))):
      some = turns[number][turn] if turn < len(turns[number]) else []
      left = [unit for unit in some if not _done(folders[unit.seed], unit, job)]
      advance(sum(len(unit.samples) for unit in some if unit not in left) * chosen.steps)
      if not left and count == 1:
        continue  # several processes load together, also those that have nothing left to do
      encoded = encode(chosen, left, mesh)
      bundle = load(chosen, mesh, experts)
      for unit in left:
        cond = encoded.pop(0)
        make(folders[unit.seed], bundle, chosen, job, unit, cond, mesh, guidance, draw, advance)
      del bundle  # before the text encoder of the next turn is loaded

  def finish() -> None:
    for seed, folder in folders.items():
      if videos.made_by(folder) is not None:
        continue  # it tells how the videos were made, also where another call asks for them
      if all(_done(folder, unit, job) for unit in everything if unit.seed == seed):
        store.write_manifest(
          folder,
          config=dataclasses.asdict(chosen),
          command=command,
          device=jax.devices()[0].device_kind,
          processes=count,
          model=name,
          seed=seed,
          data=data.mark,
        )

  # Parts of several commands share a folder, so none of them holds it.
  held = list(folders.values()) if job.part == (0, 1) else []
  sweep.share(held, process, meet, begin=begin, do=do, finish=finish)
  return list(folders.values())


def check(chosen: SampleSettings, job: Job, model: Parts, *, redo: bool, seats: int) -> None:
  """ValueError: settings that contradict each other, the model or the mesh, or a name of no
  folder.

  seats: the `seed` axis of the mesh.
  """
  if job.name is not None:
    check_name(job.name)
  if chosen.taps.sites:
    raise ValueError("vbvr generate keeps no taps: use --token-layers, or `videoreason sample`.")
  if any(step >= chosen.steps for step in job.steps):
    raise ValueError(f"--keep-steps={_list(job.steps)}, wanted steps below {chosen.steps}.")
  layers = model.dit.config.layers
  if any(layer >= layers for layer in job.layers):
    raise ValueError(f"--token-layers={_list(job.layers)}, wanted layers below {layers}.")
  if job.layers and not job.steps:
    raise ValueError("--token-layers draws maps of the steps kept: give --keep-steps too.")
  if job.ensemble == PAPER and chosen.steps < 2:
    raise ValueError(f"steps={chosen.steps}, wanted 2 or more: the ensemble acts on the first one.")
  if job.ensemble == PAPER and seats > 1:
    raise ValueError(
      f"--ensemble mixes the runs of a sample on a mesh with seed={seats}: give a "
      "--mesh of fsdp and context."
    )
  if redo and job.part != (0, 1):
    raise ValueError(
      f"--redo would remove the videos of the other parts than {job.part[0] + 1}/{job.part[1]}: "
      "remove the folder first, then start the parts without --redo."
    )


def check_name(name: str) -> None:
  """ValueError: --name is no folder of its own in --out, or one that `vbvr score` has otherwise."""
  if name in ("", ".", "..") or Path(name).name != name:
    raise ValueError(f"--name={name}, wanted the name of one folder, which is made in --out.")
  if (size := len(os.fsencode(name))) > NAME_BYTES:
    raise ValueError(
      f"--name={name} is a name of {size} bytes, wanted {NAME_BYTES} at most: shorten it."
    )
  if name in TAKEN:
    raise ValueError(
      f"--name={name}, which `vbvr score` has for other folders ({', '.join(TAKEN)}): choose "
      "another one."
    )


def _list(numbers: Sequence[int]) -> str:
  return ",".join(map(str, numbers))


def _settings(chosen: SampleSettings) -> dict[str, Any]:
  """The settings that change a video."""
  settings = dataclasses.asdict(chosen)
  for key in ("batch", "piece", "taps", "checkpoint", "seeds", "frames", "height", "width"):
    settings.pop(key)
  return plain(settings)


def _done(folder: Path, unit: Unit, job: Job) -> bool:
  return all(_whole(folder, sample, job) for sample in unit.samples)


def _whole(folder: Path, sample: Sample, job: Job) -> bool:
  """Whether the video of a sample is there with everything that was to be kept of it."""
  record = videos.record_of(folder, sample)
  if record is None:
    return False
  kept = [step_file(folder, sample, step) for step in job.steps]
  if job.layers:
    kept.append(folder / videos.MAPS / sample.key / tokens.FILE)
    if record.get("maps") != maps_of(job):
      return False
  return all(path.is_file() for path in kept)


def maps_of(job: Job) -> dict[str, list[int]]:
  """Of what the tokens are kept, as the record of a video says it."""
  return {"layers": list(job.layers), "steps": list(job.steps)}


def step_file(folder: Path, sample: Sample, step: int) -> Path:
  """Where the guess of the video at a step lies, named as the official tools name it."""
  return folder / videos.STEPS / sample.key / f"step_{step:03d}.mp4"


def rounds(left: Sequence[Unit], found: bundles.Described) -> list[list[Unit]]:
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


def load(chosen: SampleSettings, mesh: Mesh | None, experts: int | None) -> ModelBundle:
  """What denoises and decodes; the transformer lies on the mesh, or is left for each unit."""
  bundle = checkpoint.load(chosen.checkpoint, parts=("vae",))
  return prepare.with_experts(chosen, bundle, mesh, experts)


def encode(chosen: SampleSettings, some: Sequence[Unit], mesh: Mesh | None) -> list[Conditioning]:
  """The conditioning of each unit, in host memory."""
  bundle = checkpoint.load(chosen.checkpoint, parts=("text", "clip", "vae"), mesh=mesh)
  encoded = []
  image_input, tower = bundle.parts.dit.config.image_input, bundle.parts.dit.config.clip_width
  stack = bundle.card.numerics
  for unit in some:
    pictures = [sample.first() for sample in unit.samples]
    first = [framing.stretched(p, unit.shape.height, unit.shape.width, stack) for p in pictures]
    shown = [framing.shown_to_clip(*pair, stack) for pair in zip(pictures, first, strict=True)]
    cond = conditioning.encode(
      bundle,
      [sample.prompt for sample in unit.samples],
      None if image_input == "none" else np.stack(first),
      frames=unit.shape.frames,
      negative_prompt=chosen.negative_prompt,
      guided=chosen.guided,
      tiles=chosen.tiles,
      clip=None if tower is None else conditioning.image_tokens(bundle, shown),
    )
    encoded.append(jax.tree.map(np.asarray, cond))
  return encoded


def make(
  folder: Path,
  bundle: ModelBundle,
  chosen: SampleSettings,
  job: Job,
  unit: Unit,
  cond: Conditioning,
  mesh: Mesh | None,
  guidance: sampler.Guidance,
  draw: Draw,
  advance: Advance,
) -> None:
  """Denoises one unit and writes its videos with their records."""
  latents, shape = bundle.card.latents, unit.shape
  grid = latents.shape(shape.frames, shape.height, shape.width)
  noise = runs.make_noise([unit.seed] * len(unit.samples), grid)
  schedule = settings.schedule(chosen, bundle.card, bundle.parts)
  kept = guessed(job, unit.samples, chosen.steps)
  x0 = np.empty((len(kept), len(unit.samples), *grid), np.float32)
  finite = np.ones(len(unit.samples), bool)
  seen: list[dict[str, np.ndarray]] = []

  def on_piece(trace: Trace, at: slice, part: slice) -> None:
    finite[part] &= np.asarray(trace.finite).all(0)
    for row, step in enumerate(kept):
      if trace.x0 is not None and at.start <= step < at.stop:
        x0[row, part] = trace.x0[step - at.start]
    if job.layers:
      seen.append(tokens.of_piece(trace.taps, at.start, job.steps))
    advance((at.stop - at.start) * (part.stop - part.start))

  taps = tokens.taps(job.layers, x0=bool(kept))
  denoise = functools.partial(ensemble, seed=unit.seed) if job.ensemble == PAPER else runs.run
  final = denoise(
    bundle,
    noise,
    cond,
    schedule,
    taps=taps,
    piece=chosen.piece,
    mesh=mesh,
    guidance=guidance,
    expert=prepare.one_expert(chosen, mesh),
    on_piece=on_piece,
  )
  sigma = np.asarray(schedule.sigma)
  made = decode(bundle, final, tiles=chosen.tiles, mesh=mesh)
  for row, (sample, frames) in enumerate(zip(unit.samples, made, strict=True)):
    if _whole(folder, sample, job):
      continue  # made in another unit, before the data or the batch were chosen otherwise
    shown = decode_each(bundle, x0[:, row], tiles=chosen.tiles, mesh=mesh) if kept else ()
    guesses = written(folder, sample, job.steps, zip(kept, shown, strict=True))
    if sample.own and finite[row]:
      said = read_answers(sample, guesses, sigma[kept])
    else:
      said = None
      for _ in guesses:
        pass
    if job.layers:
      found = tokens.of_run(
        seen,
        row,
        latents.tokens(grid[:3]),
        layers=job.layers,
        steps=job.steps,
        sigma=sigma[:-1],
      )
      draw(folder / videos.MAPS / sample.key, found)
      tokens.write(folder / videos.MAPS / sample.key / tokens.FILE, found)
    videos.put(
      folder,
      sample,
      frames,
      seed=unit.seed,
      made=dataclasses.asdict(shape),
      finite=bool(finite[row]),
      answers=said,
      maps=maps_of(job) if job.layers else None,
      **({"truth": sample.truth_mark} if sample.own else {}),  # by which its answers were judged
    )


def ensemble(
  bundle: ModelBundle,
  noise: Noise,
  cond: Conditioning,
  schedule: Schedule,
  *,
  seed: int,
  taps: TapSpec,
  piece: int,
  mesh: Mesh | None,
  guidance: sampler.Guidance,
  expert: runs.OneExpert,
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
  wide = runs.take(cond, np.tile(np.arange(count), MEMBERS))
  sizes = sampler.sizes_of(bundle, many, wide, schedule)
  members = [np.arange(count) + member * count for member in range(MEMBERS)]
  at = interventions.where(sizes, steps=0, layers=interventions.depth(sizes.L))
  edit = interventions.ensemble_runs(interventions.identity(sizes), at, members, keep="first")
  first = bundle
  if not any(params is not None for params in bundle.params):
    ((number, _),) = schedule[0:1].by_expert()
    first = dataclasses.replace(bundle, params=expert(number))
  edit = runs.place_edit(edit, mesh)
  many, wide, start = (
    runs.place(tree, mesh) for tree in (many, wide, sampler.start(many, schedule.solver))
  )
  with runs.over(mesh):
    _, trace, state = sampler.denoise(
      first, many, wide, schedule[0:1], edit, taps, start, guidance=guidance
    )
  del first  # before the next expert is loaded
  on_piece(runs.take(jax.tree.map(np.asarray, trace), slice(count)), slice(0, 1), slice(0, count))
  return runs.run(
    bundle,
    noise,
    cond,
    schedule[1:],
    taps=taps,
    piece=piece,
    mesh=mesh,
    guidance=guidance,
    expert=expert,
    on_piece=lambda trace, rows, part: on_piece(trace, slice(rows.start + 1, rows.stop + 1), part),
    state=runs.take(state, np.arange(count)),
  )


def read_answers(
  sample: Sample, guesses: Iterable[np.ndarray], sigma: np.ndarray
) -> Mapping[str, Any]:
  """What x0 answers at every step; guesses: frames height width 3 of each of S."""
  task = tasks.load(sample.task, size=sample.height, frames=sample.frames)
  clips = (videos.exported(frames, sample) for frames in guesses)
  found = answers.read_each([task], [dict(sample.metadata)], clips, sigma)
  return {
    "sigma": found.sigma,
    "answer": [None if a is None else str(a) for a in found.answer[:, 0]],
    "right": found.right[:, 0],
    "score": found.score[:, 0],
    "commitment": int(found.commitment[0]),
    "first_hit": int(found.first_hit[0]),
    "flips": int(found.flips[0]),
  }


def written(
  folder: Path, sample: Sample, steps: Sequence[int], guesses: Iterable[tuple[int, np.ndarray]]
) -> Iterator[np.ndarray]:
  """The guesses of the video, (step, frames) each, as they are taken; those at `steps` are written
  first."""
  for step, frames in guesses:
    if step in steps:
      path = step_file(folder, sample, step)
      with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
      media.write_mp4(path, frames, fps=layout.FPS)
    yield frames
