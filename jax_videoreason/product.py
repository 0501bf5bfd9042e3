"""The product of cases, seeds and edits, run through the one sampler and read into rows.

Runs are ordered edit by edit, case by case, seeds inside. A unit holds whole cases of one edit, so
all seeds of a case ride together and an ensemble finds its members.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jax_videoreason import (
  answers,
  baselines,
  checkpoint,
  evaluate,
  interventions,
  media,
  prepare,
  runs,
  sampler,
  sharding,
  sweep,
)
from jax_videoreason.decode import decode, preview
from jax_videoreason.folders import checksum, plain, read_json, write_json
from jax_videoreason.interventions import Intervention
from jax_videoreason.schedules import Schedule
from jax_videoreason.settings import SampleSettings
from jax_videoreason.store import LATENT_AXES, TAP_AXES
from jax_videoreason.structs import Conditioning, ModelBundle, Sizes, Trace
from jax_videoreason.sweep import RUN, Part, Work
from jax_videoreason.tasks import Answer, Case, Task

UNIT = 32  # runs of a unit where nothing is said
STILLS = 5  # frames of the final video that are kept to look at
STILL_PIXELS = 64  # of the shorter side of a still, at most
AGREEMENT = 0.98  # of the answers that the preview and the VAE give
LOOKED_AT = (5, 8)  # steps and runs on which they are compared
KEYS = (
  "tasks",
  "split",
  "cases",
  "ambiguous",
  "edits",
  "unit",
  "mesh",
  "reader",
)  # of a configuration
READERS = ("auto", "preview", "vae")
EDITS = {
  "none": (),
  "noise_at": ("mode", "gain", "steps", "frames"),
  "ablate": ("sites", "gate", "steps", "layers"),
  "ensemble_runs": ("what", "keep", "amount", "steps", "layers"),
}
PLACES = ("steps", "layers", "frames")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Varied:
  """What is multiplied, and how it is read.

  tasks: names. cases: of each task. kind: plain or ambiguous cases, or both in turn.
  edits: name -> {"edit": of `EDITS`, its arguments}; steps and layers are (from, to).
  unit: runs of a work unit, rounded down to whole cases. mesh: axes of the devices of a process;
  None = as many runs side by side as divide a unit. reader: what shows x0 at every step: the
  linear preview, the VAE, or the preview where it agrees with the VAE.
  """

  tasks: tuple[str, ...]
  split: str
  cases: int
  kind: str
  edits: Mapping[str, Mapping[str, Any]]
  unit: int | None
  mesh: str | None
  reader: str


def varied(given: Mapping[str, Any]) -> Varied:
  """What a plain mapping says; ValueError names every fault."""
  faults = []
  edits = {str(name): dict(edit) for name, edit in given["edits"].items()}
  if not edits:
    faults.append("edits={}, wanted at least one: edits.none.edit='none' runs without any.")
  for name, edit in edits.items():
    kind = edit.get("edit")
    if kind not in EDITS:
      faults.append(f"edits.{name}.edit={kind!r}, wanted one of {', '.join(EDITS)}.")
      continue
    wrong = sorted(edit.keys() - {"edit", *EDITS[kind]})
    if wrong:
      known = ", ".join(EDITS[kind]) or "none"
      faults.append(f"edits.{name}: {kind} takes no {wrong[0]!r}; it takes: {known}.")
    for place in PLACES:
      value = edit.get(place)
      if value is not None and (len(value) != 2 or not value[0] < value[1]):
        faults.append(f"edits.{name}.{place}={value!r}, wanted (from, to).")
  for key, known in (
    ("reader", READERS),
    ("split", evaluate.SPLITS),
    ("ambiguous", tuple(evaluate.KINDS)),
  ):
    if given[key] not in known:
      faults.append(f"{key}={given[key]!r}, wanted one of {', '.join(known)}.")
  for key in ("cases", "unit"):
    if given[key] is not None and given[key] < 1:
      faults.append(f"{key}={given[key]}, wanted at least 1.")
  if not given["tasks"]:
    faults.append("tasks=(), wanted at least one.")
  if faults:
    raise ValueError("configuration: " + " ".join(faults))
  return Varied(
    tasks=tuple(given["tasks"]),
    split=given["split"],
    cases=given["cases"],
    kind=given["ambiguous"],
    edits=edits,
    unit=given["unit"],
    mesh=given["mesh"],
    reader=given["reader"],
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
  """All cases, and how they are cut: units_of_edit units of `cases_of_unit` cases for each edit."""

  chosen: SampleSettings
  varied: Varied
  tasks: Mapping[str, Task]
  cases: Sequence[Case]
  cases_of_unit: int

  @property
  def width(self) -> int:
    return self.cases_of_unit * len(self.chosen.seeds)

  @property
  def units(self) -> int:
    return len(self.varied.edits) * len(self.cases) // self.cases_of_unit

  def edit_of(self, unit: int) -> str:
    return list(self.varied.edits)[unit * self.cases_of_unit // len(self.cases)]

  def cases_in(self, unit: int) -> np.ndarray:
    """The numbers of the cases of a unit."""
    low = unit * self.cases_of_unit % len(self.cases)
    return np.arange(low, low + self.cases_of_unit)

  def asked(self) -> dict[str, Any]:
    """What two calls must share for one to go on where the other stopped."""
    settings = dataclasses.asdict(self.chosen)
    for name in ("batch", "piece", "checkpoint"):  # they change no number
      settings.pop(name)
    settings["taps"].pop("budget_gb")
    weights = checksum(checkpoint.find(self.chosen.checkpoint) / checkpoint.DESCRIPTION)
    own = dataclasses.asdict(self.varied)
    for name in ("unit", "mesh"):  # units and width say what the first did
      own.pop(name)
    return plain({**settings, **own, "weights": weights, "units": self.units, "width": self.width})


def cut(wanted: Varied, seeds: int) -> tuple[int, int]:
  """(units, cases of a unit): all units hold equally many whole cases."""
  cases = len(wanted.tasks) * wanted.cases
  most = max(1, (wanted.unit or UNIT) // seeds)
  size = max(n for n in range(1, min(most, cases) + 1) if cases % n == 0)
  return len(wanted.edits) * cases // size, size


def multiply(chosen: SampleSettings, wanted: Varied) -> Product:
  """Draws the cases and cuts the units. ValueError: a task without the split, too few cases."""
  if chosen.height != chosen.width:
    raise ValueError(
      f"the config says {chosen.width} x {chosen.height} pixels, tasks are square: give "
      f"--config.height={chosen.width}."
    )
  loaded = {name: evaluate.load_task(name, chosen) for name in wanted.tasks}
  cases = []
  for task in loaded.values():
    split = "heldout" if task.held_out else wanted.split
    task.check_split(split, 0)
    drawn = evaluate.cases_of(task, split, wanted.cases, wanted.kind)
    # the video that solves a case is large and not looked at here
    cases += [dataclasses.replace(case, frames=case.frames[:1].copy()) for case in drawn]
  return Product(
    chosen=chosen,
    varied=wanted,
    tasks=loaded,
    cases=cases,
    cases_of_unit=cut(wanted, len(chosen.seeds))[1],
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
  """What units are computed with: cond has a row per case."""

  product: Product
  bundle: ModelBundle
  cond: Conditioning
  schedule: Schedule
  mesh: Mesh | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
  """What the sampler left of a unit: final R F H W C, finite S R, x0 S R F H W C, taps.

  again: how often runs that are not finite made it run again.
  """

  final: np.ndarray
  finite: np.ndarray
  x0: np.ndarray
  taps: Mapping[str, np.ndarray]
  again: int = 0


def ready(product: Product, mesh: Mesh | None = None) -> Bench:
  """Encodes every case, always in the same order and groups, then loads what denoises.

  A sweep that goes on encodes all cases again: a share of them would be encoded in other groups,
  and so perhaps in other bits.
  """
  prompts = [case.prompt for case in product.cases]
  firsts = np.stack([case.first_frame for case in product.cases])
  bundle, (cond,) = prepare.encode(product.chosen, [(prompts, firsts)], mesh=mesh)
  return Bench(
    product=product,
    bundle=bundle,
    cond=cond,
    schedule=prepare.schedule(product.chosen, bundle),
    mesh=mesh,
  )


def mesh_for(product: Product, devices: Sequence[Any]) -> Mesh | None:
  """The mesh of the settings, else as many devices on `seed` as divide a unit; None = one device.

  ValueError: the units do not divide by its seeds, or the devices are fewer.
  """
  if product.varied.mesh is not None:
    axes = sharding.axes_of(product.varied.mesh)
    if product.width % axes["seed"]:
      raise ValueError(
        f"mesh={product.varied.mesh} and units of {product.width} runs, wanted seeds that divide "
        "them: give another --config.unit."
      )
    some = list(devices)[: axes["seed"] * axes["fsdp"] * axes["context"]]
    return sharding.make_mesh(axes["seed"], axes["fsdp"], axes["context"], devices=some)
  seats = max(n for n in range(1, len(devices) + 1) if product.width % n == 0)
  return None if seats == 1 else sharding.make_mesh(seed=seats, devices=list(devices)[:seats])


def compute(bench: Bench, unit: int) -> Made:
  """Denoises a unit; a second time where a run is not finite, in case the machine was at fault."""
  made = _denoise(bench, unit)
  if made.finite.all():
    return made
  return dataclasses.replace(_denoise(bench, unit), again=1)


def _denoise(bench: Bench, unit: int) -> Made:
  product, chosen = bench.product, bench.product.chosen
  numbers, seeds = product.cases_in(unit), chosen.seeds
  row = np.repeat(numbers, len(seeds))
  spec = bench.bundle.card.latents
  noise = runs.make_noise(
    [product.cases[c].index * evaluate.STRIDE + seed for c in numbers for seed in seeds],
    (*spec.grid(chosen.frames, chosen.height, chosen.width), spec.channels),
  )
  cond = runs.take(bench.cond, row)
  sizes = sampler.sizes_of(bench.bundle, noise, cond, bench.schedule)
  name = product.edit_of(unit)
  kept: list[Trace] = []
  final = runs.run(
    bench.bundle,
    noise,
    cond,
    bench.schedule,
    edit_for(product.varied.edits[name], sizes, bench.schedule, len(seeds)),
    dataclasses.replace(chosen.taps.spec(), latents=False),
    piece=chosen.piece,
    mesh=bench.mesh,
    on_piece=lambda trace, steps, part: kept.append(trace),
  )

  def joined(values: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(value) for value in values])

  return Made(
    final=final,
    finite=joined([trace.finite for trace in kept]),
    x0=joined([trace.x0 for trace in kept]),
    taps={name: joined([trace.taps[name] for trace in kept]) for name in kept[0].taps},
  )


def edit_for(
  said: Mapping[str, Any], sizes: Sizes, schedule: Schedule, seeds: int
) -> Intervention | None:
  """The edit of a unit whose runs are case by case, `seeds` of each; None = without room for any.

  An ensemble is one of the seeds of each case.
  """
  options = {key: value for key, value in said.items() if key != "edit" and value is not None}
  place = {key: slice(*options.pop(key)) for key in PLACES if key in options}
  at = interventions.where(
    sizes, steps=place.get("steps"), layers=place.get("layers"), frames=place.get("frames")
  )
  sigma = np.asarray(schedule.sigma)
  if said["edit"] == "none":
    return None
  if said["edit"] == "noise_at":
    return interventions.noise_at(interventions.identity(sizes), at, sigma=sigma, **options)
  if said["edit"] == "ablate":
    return interventions.ablate(interventions.identity(sizes), at, **options)
  if seeds < 2:
    raise ValueError(f"an ensemble of {seeds} seed, wanted two or more: give --config.seeds=4.")
  members = [np.arange(seed, sizes.R, seeds) for seed in range(seeds)]
  return interventions.ensemble_runs(
    interventions.identity(sizes), at, members, sigma=sigma, **options
  )


# Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
  """What shows x0 at every step. agreement: of preview and VAE; None = not looked at."""

  by: str
  agreement: float | None = None


def choose_reader(bench: Bench, unit: int, made: Made) -> Reader:
  """The reader that the settings name; "auto" compares preview and VAE on some of this unit."""
  wanted = bench.product.varied.reader
  if wanted == "preview" and bench.bundle.preview is None:
    raise ValueError(f"{bench.bundle.card.name} has no preview: give --config.reader=vae.")
  if wanted != "auto":
    return Reader(by=wanted)
  if bench.bundle.preview is None:
    return Reader(by="vae")
  steps, width = made.finite.shape
  rows = np.unique(np.linspace(0, steps - 1, LOOKED_AT[0]).round().astype(int))
  some = np.unique(np.linspace(0, width - 1, LOOKED_AT[1]).round().astype(int))
  x0 = made.x0[np.ix_(rows, some)]
  cases = [_case_of(bench.product, unit, int(r)) for r in some]
  said = [parse(bench.product, cases, show(bench.bundle, x0)) for show in (preview, decode)]
  agreement = float((said[0] == said[1]).mean())
  return Reader(by="preview" if agreement >= AGREEMENT else "vae", agreement=agreement)


def parse(product: Product, cases: Sequence[Case], frames: np.ndarray) -> np.ndarray:
  """S R objects: the answer of each clip; frames S R frames height width 3."""
  answer = np.full(frames.shape[:2], None, object)
  for r, case in enumerate(cases):
    for s in range(len(frames)):
      answer[s, r] = product.tasks[case.task].parse(frames[s, r], case.metadata)
  return answer


def read(bench: Bench, reader: Reader, unit: int, made: Made) -> Part:
  """Rows and arrays of a unit: its final videos scored, its answers at every step."""
  product = bench.product
  cases = [_case_of(product, unit, r) for r in range(product.width)]
  show = preview if reader.by == "preview" else decode
  said = parse(product, cases, show(bench.bundle, made.x0))
  right = np.array(
    [[a in c.metadata["answers"] for a, c in zip(row, cases, strict=True)] for row in said]
  )
  videos = decode(bench.bundle, made.final)
  sigma = np.asarray(bench.schedule.sigma)[:-1]
  finite = np.asarray(made.finite.all(0))
  said[:, ~finite], right[:, ~finite] = None, False
  commitment, flips = answers.commit(said), answers.changes(said, right)
  rows = []
  for r, case in enumerate(cases):
    metadata = case.metadata
    task = product.tasks[case.task]
    mark = baselines.mark(task, videos[r], metadata) if finite[r] else evaluate.BROKEN
    rows.append(
      {
        RUN: unit * product.width + r,
        "edit": product.edit_of(unit),
        "task": case.task,
        "split": case.split,
        "index": case.index,
        "case": int(product.cases_in(unit)[r // len(product.chosen.seeds)]),
        "problem": metadata["hash"],
        "k": metadata["k"],
        "seed": product.chosen.seeds[r % len(product.chosen.seeds)],
        **dataclasses.asdict(mark),
        "answer": _text(mark.answer),
        "answers": [_text(a) for a in said[:, r]],
        "rights": right[:, r].tolist(),
        "commitment": int(commitment[r]),
        "commitment_sigma": float(sigma[commitment[r]]) if commitment[r] >= 0 else None,
        "first_hit": int(right[:, r].argmax()) if right[:, r].any() else -1,
        "flips": int(flips[0, r]),
        "to_right": int(flips[1, r]),
        "to_wrong": int(flips[2, r]),
        "broken_at": None if finite[r] else int(np.argmin(made.finite[:, r])),
      }
    )
  arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
    "final_latents": (LATENT_AXES[1:], made.final),
    "finite": ((RUN, "step"), made.finite.T),
    "stills": ((RUN, "frame", "height", "width", "rgb"), stills(videos)),
  }
  for name, value in made.taps.items():
    rest = tuple(f"value_{axis}" for axis in range(value.ndim - len(TAP_AXES)))
    arrays[f"taps/{name}"] = ((*TAP_AXES, *rest), value)
  notes = [
    f"run {row[RUN]} is not finite from step {row['broken_at']} on, also when run again"
    for row in rows
    if row["broken_at"] is not None
  ]
  if made.again and not notes:
    notes = ["a run was not finite and is when run again"]
  return Part(rows=rows, arrays=arrays, notes=tuple(notes))


def stills(videos: np.ndarray) -> np.ndarray:
  """R n height width 3: frames of R videos, from the first to the last, small."""
  shown = np.linspace(0, videos.shape[1] - 1, min(STILLS, videos.shape[1])).round().astype(int)
  some = videos[:, shown]
  height, width = some.shape[2:4]
  shrink = min(1.0, STILL_PIXELS / min(height, width))
  if shrink == 1.0:
    return some
  size = (round(height * shrink), round(width * shrink))
  return np.stack([[media.resize(frame, *size) for frame in video] for video in some])


# All units


class _Workshop:
  """The functions of a sweep's `Work`: models are loaded when the first unit is to be done."""

  def __init__(self, product: Product, mesh: Mesh | None, settled: Path, *, writes: bool):
    self.product, self.mesh, self.settled, self.writes = product, mesh, settled, writes
    self.first: dict[int, Made] = {}

  @functools.cached_property
  def bench(self) -> Bench:
    return ready(self.product, self.mesh)

  @functools.cached_property
  def reader(self) -> Reader:
    """Chosen once for the whole sweep, and remembered beside it."""
    if self.settled.exists():
      return Reader(**read_json(self.settled))
    self.first[0] = compute(self.bench, 0)
    chosen = choose_reader(self.bench, 0, self.first[0])
    if self.writes:
      write_json(self.settled, dataclasses.asdict(chosen))
    return chosen

  def compute(self, unit: int) -> tuple[Reader, Made]:
    reader = self.reader
    return reader, self.first.pop(unit) if unit in self.first else compute(self.bench, unit)

  def read(self, unit: int, made: tuple[Reader, Made]) -> Part:
    return read(self.bench, made[0], unit, made[1])


def perform(
  out: str | Path,
  product: Product,
  *,
  command: Sequence[str] = (),
  redo: bool = False,
  devices: Sequence[Any],
  process: tuple[int, int] = (0, 1),
  meet: Callable[[str], Any] = lambda place: None,
  advance: sweep.Advance = lambda runs: None,
) -> None:
  """Carries out a sweep in the folder `out`, or what is left of it.

  devices: of this process. process: (number, count); process p does the units p, p + count, ...
  and the first one holds the folder and writes table and manifest. meet: returns when every
  process has come to that place.

  Raises:
    ValueError: the folder is held by another sweep, or holds something else.
    OSError: the disk refuses; the same command goes on.
  """
  out, (number, count) = Path(out), process
  mesh = mesh_for(product, devices)
  shop = _Workshop(product, mesh, out / sweep.SETTLED, writes=number == 0)
  used = list(devices)[:1] if mesh is None else list(mesh.devices.flat)
  work = Work(
    units=product.units,
    width=product.width,
    compute=shop.compute,
    read=shop.read,
    devices={"kind": used[0].device_kind, "count": len(used)},
  )
  with sweep.held(out) if number == 0 else contextlib.nullcontext():
    if number == 0:
      sweep.begin(out, product.asked(), redo=redo)
    meet("begun")
    if count > 1 and sweep.faults(out, range(work.units), work.width):
      _ = shop.bench  # processes load together, also those that have nothing left to do
    sweep.carry_out(out, work, mine=lambda unit: unit % count == number, advance=advance)
    meet("done")
    if number == 0:
      sweep.finish(
        out,
        work,
        config=dataclasses.asdict(product.chosen),
        varied=dataclasses.asdict(product.varied),
        command=command,
        device=used[0].device_kind,
        processes=count,
        model=checkpoint.describe(product.chosen.checkpoint).card.name,
        evaluations=evaluations(product),
      )
    meet("finished")


def evaluations(product: Product) -> int:
  """Network evaluations of all runs, both guidance branches counted."""
  branches = 2 if product.chosen.guided else 1
  return product.units * product.width * product.chosen.steps * branches


def _case_of(product: Product, unit: int, row: int) -> Case:
  return product.cases[product.cases_in(unit)[row // len(product.chosen.seeds)]]


def _text(answer: Answer | None) -> str | None:
  return None if answer is None else str(answer)
