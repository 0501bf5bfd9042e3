"""The units of a product: run through the one sampler, read into rows, carried out as a sweep."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_videoreason import (
  answers,
  baselines,
  bundles,
  distributed,
  evaluate,
  factors,
  lanes,
  media,
  plan,
  prepare,
  runs,
  sampler,
  settings,
  sharding,
  sweep,
)
from jax_videoreason.axes import spread
from jax_videoreason.decode import decode, preview, rows_at_once
from jax_videoreason.factors import Product
from jax_videoreason.schedules import Schedule
from jax_videoreason.store import LATENT_AXES, TAP_AXES
from jax_videoreason.structs import Conditioning, ModelBundle, Trace
from jax_videoreason.sweep import RUN, Part, Work
from jax_videoreason.tasks import ENDING, Answer, Case, Unseen

STILLS = 5  # frames of the final video that are kept to look at
STILL_PIXELS = 64  # of the shorter side of a still, at most
HELD = 2**24  # pixels of video that are held at once to be read
CLIPS, ENDINGS = 8, 64  # that are read together at most
SMALL = 2**28  # bytes of all units that are computed side by side on a CPU, at most


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
    schedule=settings.schedule(product.chosen, bundle.card, bundle.parts),
    mesh=mesh,
  )


def mesh_for(
  product: Product, here: Sequence[Any], everywhere: Sequence[Any] | None = None
) -> Mesh | None:
  """The mesh of the settings, else as many devices on `seed` as divide a unit; None = one device.

  here: the devices of this process. everywhere: those of all processes, None = the same; a mesh of
  more devices than are here lies on all of them.
  ValueError: the units do not divide by its seeds, or it takes another number of devices.
  """
  if product.varied.mesh is None:
    seats = max(n for n in range(1, len(here) + 1) if product.width % n == 0)
    return None if seats == 1 else sharding.make_mesh(seed=seats, devices=list(here)[:seats])
  said, everywhere = product.varied.mesh, here if everywhere is None else everywhere
  axes = sharding.axes_of(said)
  factors.check_seats(product.varied, len(product.chosen.seeds), axes["seed"])
  wanted = math.prod(axes.values())
  if wanted > len(here) and wanted != len(everywhere):
    raise ValueError(
      f"mesh={said} takes {wanted} devices, wanted at most the {len(here)} of this process"
      + (f" or all {len(everywhere)}" if len(everywhere) > len(here) else "")
      + ": give another --config.mesh."
    )
  some = list(here)[:wanted] if wanted <= len(here) else list(everywhere)
  return sharding.make_mesh(**axes, devices=some)


def shares(
  units: int, process: tuple[int, int], mesh: Mesh | None
) -> tuple[tuple[int, int], range]:
  """((number, count) of the share of a process, its units): share p has p, p + count, ...

  Processes over which a mesh lies do all units together, as one share.
  """
  share = (0, 1) if distributed.spans(mesh) else process
  return share, range(share[0], units, share[1])


def lanes_for(product: Product, mesh: Mesh | None) -> int:
  """Units that are computed side by side: on a CPU, without a mesh, as many as it has cores and as
  take `SMALL` bytes together by arithmetic, beside the weights; else one.

  Cores that share a small program wait for each other at every operation, and units do not.
  """
  if mesh is not None or jax.local_devices()[0].platform != "cpu":
    return 1
  here, alone = plan.target("cpu"), {"seed": 1, "fsdp": 1, "context": 1}
  told = [
    plan.arithmetic(problem, here, alone)
    for problem in factors.problems(product.chosen, product.varied).values()
  ]
  each = max(t.total - t.parameters - t.vae + t.decode for t in told)
  return max(1, min(lanes.cores(), int(SMALL / each)))


def compute(bench: Bench, unit: int) -> Made:
  """Denoises a unit; a second time where a run is not finite, in case the machine was at fault."""
  made = _denoise(bench, unit)
  if made.finite.all():
    return made
  return dataclasses.replace(_denoise(bench, unit), again=1)


def _denoise(bench: Bench, unit: int) -> Made:
  product = bench.product
  return sample(bench, product.runs_in(unit), product.varied.edits[product.edit_of(unit)])


def sample(bench: Bench, asked: Sequence[tuple[int, int]], said: Mapping[str, Any]) -> Made:
  """Denoises runs (number of the case, seed) with an edit."""
  product, chosen = bench.product, bench.product.chosen
  spec = bench.bundle.card.latents
  noise = runs.make_noise(
    [runs.seed_of(product.cases[case].index, seed) for case, seed in asked],
    spec.shape(chosen.frames, chosen.height, chosen.width),
  )
  cond = runs.take(bench.cond, np.array([case for case, _ in asked]))
  sizes = sampler.sizes_of(bench.bundle, noise, cond, bench.schedule)
  kept: list[Trace] = []
  final = runs.run(
    bench.bundle,
    noise,
    cond,
    bench.schedule,
    factors.edit_for(said, sizes, bench.schedule, len(chosen.seeds)),
    dataclasses.replace(chosen.taps.spec(), **dict.fromkeys(factors.DROPS, False)),
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


# Reading


def answers_at(bench: Bench, cases: Sequence[Case], x0: np.ndarray, by: str) -> np.ndarray:
  """S R objects: the answer at every step, None = unreadable; x0 S R F H W C, a case for each R.

  by: of `factors.READERS`. Of each clip only its ending is shown, and all of it where that does not
  say the answer; in groups of one size, the last one filled up.
  """
  said = np.full(x0.shape[:2], None, object)
  own, chosen = [bench.product.tasks[case.task] for case in cases], bench.product.chosen
  whole = functools.partial(decode, tiles=chosen.tiles, mesh=bench.mesh)
  show: Callable[..., np.ndarray] = preview if by == "preview" else whole

  def say(at: Sequence[tuple[int, int]], last: int | None, size: int) -> list[tuple[int, int]]:
    """Reads those (step, run) from so many frames; returns those whose answer is not on them."""
    unseen = []
    for low in range(0, len(at), size):
      group = at[low : low + size]
      clips = show(bench.bundle, x0[tuple(np.resize(group, (size, 2)).T)], last=last)
      for (s, r), frames in zip(group, clips, strict=False):
        try:
          said[s, r] = own[r].parse(frames, cases[r].metadata)
        except Unseen:
          unseen.append((s, r))
    return unseen

  everything, held = list(np.ndindex(said.shape)), HELD // (chosen.height * chosen.width)
  size = rows_at_once(max(1, len(everything)), max(1, min(ENDINGS, held // ENDING)))
  unseen = say(everything, ENDING, size)
  # How many these are differs from unit to unit: one size for all, or each would be compiled.
  say(unseen, None, max(1, min(len(cases), CLIPS, held // chosen.frames)))
  return said


def read(bench: Bench, unit: int, made: Made) -> Part:
  """Rows and arrays of a unit: its final videos scored, its answers at every step."""
  product, by = bench.product, bench.product.varied.reader
  asked = product.runs_in(unit)
  cases = [product.cases[case] for case, _ in asked]
  videos = decode(bench.bundle, made.final, tiles=product.chosen.tiles, mesh=bench.mesh)
  found = [
    baselines.mark(product.tasks[case.task], video, case.metadata)
    for case, video in zip(cases, videos, strict=True)
  ]
  if by == "vae" and np.array_equal(made.x0[-1], made.final, equal_nan=True):  # decoded just now
    last = np.array([mark.answer for mark in found], object)
    said = np.concatenate([answers_at(bench, cases, made.x0[:-1], by), last[None]])
  else:
    said = answers_at(bench, cases, made.x0, by)
  right = np.array(
    [[a in c.metadata["answers"] for a, c in zip(row, cases, strict=True)] for row in said]
  )
  sigma = np.asarray(bench.schedule.sigma)[:-1]
  finite = np.asarray(made.finite.all(0))
  said[:, ~finite], right[:, ~finite] = None, False
  commitment, flips = answers.commit(said), answers.changes(said, right)
  rows = []
  for r, (number, seed) in enumerate(asked):
    case = cases[r]
    metadata = case.metadata
    mark = found[r] if finite[r] else evaluate.BROKEN
    rows.append(
      {
        RUN: unit * product.width + r,
        "edit": product.edit_of(unit),
        "task": case.task,
        "split": case.split,
        "index": case.index,
        "case": number,
        "problem": metadata["hash"],
        "k": metadata["k"],
        "wanted": [_text(answer) for answer in metadata["answers"]],
        "seed": seed,
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
  some = videos[:, spread(videos.shape[1], STILLS)]
  height, width = some.shape[2:4]
  shrink = min(1.0, STILL_PIXELS / min(height, width))
  if shrink == 1.0:
    return some
  size = (round(height * shrink), round(width * shrink))
  return np.stack([[media.resize(frame, *size) for frame in video] for video in some])


# All units


@contextlib.contextmanager
def silently(done: int) -> Iterator[sweep.Advance]:
  """Progress that nobody sees."""
  yield lambda runs: None


def perform(
  out: str | Path,
  product: Product,
  *,
  mesh: Mesh | None,
  command: Sequence[str] = (),
  redo: bool = False,
  process: tuple[int, int] = (0, 1),
  meet: Callable[[str], Any] = lambda place: None,
  progress: Callable[[int], AbstractContextManager[sweep.Advance]] = silently,
) -> None:
  """Carries out a sweep in the folder `out`, or what is left of it.

  mesh: as `mesh_for` makes it. process: (number, count); `shares` says which units it does. The
  first one holds the folder and writes table and manifest, and where the mesh lies on several
  processes, the units too. meet: returns when every process has come to that place. progress:
  entered with the number of this process' runs that are there already; gives what is told of more.

  Raises:
    ValueError: the folder is held by another sweep, or holds something else; units are lacking when
      all processes are done.
    OSError: the disk refuses; the same command goes on.
  """
  out, (number, count) = Path(out), process
  used = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
  _, own = shares(product.units, process, mesh)

  def do() -> None:
    everything = range(product.units)
    found = sweep.faults(out) if number == 0 else {}
    marks = distributed.told(*(unit in found for unit in everything))
    left = [unit for unit in everything if marks[unit]]
    mine = [unit for unit in left if unit in own]
    if number > 0:
      found = sweep.faults(out, mine)
    meet("looked")  # before the first one writes
    if not left:
      return
    with progress(product.width * (len(own) - len(mine))) as advance:
      bench = ready(product, mesh)  # processes load together, also those with nothing left to do
      if number > 0 and distributed.spans(mesh):
        for unit in left:  # no device of the mesh may be missing where the first one computes
          compute(bench, unit)
        return
      work = Work(
        units=product.units,
        width=product.width,
        compute=functools.partial(compute, bench),
        read=functools.partial(read, bench),
        lanes=lanes_for(product, mesh),
        devices={"kind": used[0].device_kind, "count": len(used)},
      )
      sweep.carry_out(out, work, {unit: found.get(unit, "") for unit in mine}, advance=advance)

  def finish() -> None:
    sweep.finish(
      out,
      config=dataclasses.asdict(product.chosen),
      varied=dataclasses.asdict(product.varied),
      command=command,
      device=used[0].device_kind,
      processes=count,
      model=bundles.describe(product.chosen.checkpoint).card.name,
      evaluations=factors.evaluations(product),
    )

  sweep.share(
    [out],
    process,
    meet,
    begin=lambda: sweep.begin(out, product.asked(), redo=redo),
    do=do,
    finish=finish,
  )


def _text(answer: Answer | None) -> str | None:
  return None if answer is None else str(answer)
