"""How good a model is on unseen cases, beside clips that no model made: a resumable evaluation.

`evaluation` says what its folder holds, and reads it. `comparing` adds to a finished one what
another one scores on its cases.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_videoreason import (
  answers,
  baselines,
  bundles,
  media,
  prepare,
  runs,
  scoring,
  settings,
  store,
  tasks,
)
from jax_videoreason.axes import Array, Params, spread
from jax_videoreason.baselines import Mark
from jax_videoreason.decode import decode
from jax_videoreason.evaluation import (
  ASKED,
  PARTS,
  RESULT,
  TABLE,
  TASK,
  again,
  numbers,
  read_parts,
  write_table,
  written,
)
from jax_videoreason.folders import MANIFEST, beside, disk, held, remove
from jax_videoreason.models import FAMILIES
from jax_videoreason.records import begin, checksum, mapping_of, plain, sealed, write_json
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Conditioning, ModelBundle, Trace
from jax_videoreason.taps import TapSpec
from jax_videoreason.tasks import Case, Task

SPLITS = ("id", "ood", "heldout")
KINDS = {"both": None, "plain": False, "ambiguous": True}
BATCH = 16  # runs denoised together where the settings do not say
WATCHED_SEEDS = 4  # seeds of an ambiguous case whose x0 is read at every step
WATCHED_STEPS = 25  # steps at which it is read
PIXELS = 1 << 24  # pixels of video that are decoded and held at once
TRIES = 50  # indices looked at per case wanted
OWNED = (ASKED, RESULT, TABLE, MANIFEST, PARTS, "report.html")

Advance = Callable[[int], Any]
Show = Callable[[np.ndarray], np.ndarray]  # latents R F H W C -> R frames height width 3 uint8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is asked. tasks: names. split: of SPLITS. cases: of each task. kind: of KINDS, "both" has
  plain and ambiguous cases in turn, where the task has ambiguous ones."""

  tasks: tuple[str, ...]
  split: str = "id"
  cases: int = 32
  kind: str = "both"


def plan(names: str, split: str, cases: int, kind: str) -> Plan:
  """The plan of a command line; names: "a,b" or "all", those that have the split and the kind.

  Raises:
    ValueError: an unknown split or kind, fewer than 2 cases, a task that is not there, has no name
      or lacks the split or kind.
  """
  for name, value, known in (("split", split, SPLITS), ("ambiguous", kind, tuple(KINDS))):
    if value not in known:
      raise ValueError(f"--{name}={value}, wanted one of {', '.join(known)}.")
  if cases < 2:
    raise ValueError(f"--cases={cases}, wanted 2 or more: prompts are shuffled between cases.")
  kinds = tasks.TASKS
  if names == "all":
    wanted = [
      name
      for name, task in kinds.items()
      if task.held_out == (split == "heldout") and (task.ambiguous or kind != "ambiguous")
    ]
  else:
    wanted = tasks.names_of(names)
  for name in wanted:
    task = tasks.find(name)
    task.check_split(split, 0)
    if kind == "ambiguous" and not task.ambiguous:
      raise ValueError(f"{name} has no ambiguous cases: leave it out, or give --ambiguous plain.")
  return Plan(tasks=tuple(wanted), split=split, cases=cases, kind=kind)


def work(chosen: SampleSettings, asked: Plan) -> int:
  """The network evaluations of one guidance branch that an evaluation needs, over all its tasks."""
  return len(asked.tasks) * _runs_of_task(chosen, asked) * chosen.steps


def evaluations(chosen: SampleSettings, asked: Plan, mesh: Mesh | None) -> int:
  """All that are computed: of both guidance branches, with what fills batches up."""
  seats = 1 if mesh is None else mesh.shape["seed"]
  made = runs.computed(_runs_of_task(chosen, asked), chosen.batch or BATCH, seats)
  return len(asked.tasks) * made * chosen.steps * (2 if chosen.guided else 1)


def _runs_of_task(chosen: SampleSettings, asked: Plan) -> int:
  """Every case with every seed, and with the prompt of another."""
  return asked.cases * (len(chosen.seeds) + 1)


def evaluate(
  out: str | Path,
  chosen: SampleSettings,
  asked: Plan,
  *,
  mesh: Mesh | None = None,
  command: Sequence[str] = (),
  redo: bool = False,
  advance: Advance = lambda count: None,
) -> dict[str, Any]:
  """Evaluates into the folder `out` and returns what result.json says.

  Finished tasks of an earlier call that asked the same are kept; a finished folder is only read.
  chosen: the model and its schedule; the noise of a case and a seed is `runs.seed_of`.
  mesh: on which the DiT lies, runs are made and videos are decoded; None = one device.
  advance: told of network evaluations as they are done, of one guidance branch.

  Raises:
    ValueError: `out` holds something else, or what was asked for otherwise; another command works
      in it; cases that don't exist.
    OSError: `out` can't be written.
  """
  check(chosen)
  settings.boundary_of(chosen, bundles.describe(chosen.checkpoint).card)
  loaded = {name: load_task(name, chosen) for name in asked.tasks}
  said = describe(chosen, asked)
  out = Path(out)
  with held(out, needed=False):
    begin(out, ASKED, said, owned=OWNED, what="evaluation", redo=redo)
    if (out / MANIFEST).exists():
      advance(work(chosen, asked))
      return again(out)
    cases = {n: cases_of(task, asked.split, asked.cases, asked.kind) for n, task in loaded.items()}
    left = [name for name in asked.tasks if not is_done(out / PARTS / name / TASK)]
    advance(work(chosen, dataclasses.replace(asked, tasks=tuple(set(asked.tasks) - set(left)))))
    if left:
      bundle, conds = prepare.encode(chosen, [questions(cases[name]) for name in left], mesh=mesh)
      for name in left:
        with disk(out):
          remove(out / PARTS / name)  # half of it, where files were moved one by one
        with beside(out / PARTS / name, last=TASK) as folder:
          measure(folder, bundle, chosen, loaded[name], cases[name], conds.pop(0), mesh, advance)
    return finish(out, chosen, asked, mesh, command)


def is_done(path: Path) -> bool:
  """Whether a finished task left what it says; warns of one that is damaged."""
  whole = mapping_of(path, "cases", "shuffled", "rows", "watched") is not None
  if not whole and path.exists():
    warnings.warn(f"{path} was damaged: the task is done again.", stacklevel=2)
  return whole


def check(chosen: SampleSettings) -> None:
  """ValueError where no task has the size of the settings, or seeds are those of other cases."""
  check_size(chosen)
  runs.check_seeds(chosen.seeds)


def check_size(chosen: SampleSettings) -> None:
  """ValueError where no task has the size of the settings."""
  if chosen.height != chosen.width:
    raise ValueError(
      f"the config says {chosen.width} x {chosen.height} pixels, tasks are square: give "
      f"--config.height={chosen.width}."
    )


def load_task(name: str, chosen: SampleSettings) -> Task:
  """The task at the size of the settings."""
  return tasks.load(name, size=chosen.height, frames=chosen.frames)


def describe(chosen: SampleSettings, asked: Plan) -> dict[str, Any]:
  """What two calls must share for one to go on where the other stopped."""
  settings = dataclasses.asdict(chosen)
  for name in ("batch", "piece", "taps", "checkpoint"):  # they change no number
    settings.pop(name)
  weights = bundles.fingerprint(chosen.checkpoint)
  scoring = tasks.scoring(asked.tasks)
  return plain({**dataclasses.asdict(asked), **settings, "weights": weights, "scoring": scoring})


# Cases


def cases_of(task: Task, split: str, count: int, kind: str, first: int = 0) -> list[Case]:
  """`count` cases of a split from index `first` on, none with the picture and prompt of an earlier.

  Raises ValueError when the split has not so many.
  """
  found: dict[tuple[bytes, str], Case] = {}
  for index in range(first, first + TRIES * count):
    case = task.generate(split, index, ambiguous=KINDS[kind])
    if kind == "both" and task.ambiguous and (case.metadata["k"] > 1) != (len(found) % 2 == 1):
      continue
    found.setdefault((case.first_frame.tobytes(), case.prompt), case)
    if len(found) == count:
      return list(found.values())
  raise ValueError(
    f"{task.name} has {len(found)} different cases among the first {TRIES * count} of split "
    f"{split!r}, {count} are wanted: give fewer cases."
  )


def shuffled(cases: Sequence[Case]) -> list[str]:
  """The prompts of the cases, shifted so that as many as possible get another text."""
  prompts = [case.prompt for case in cases]

  def differ(shift: int) -> int:
    return sum(a != b for a, b in zip(prompts, prompts[shift:] + prompts[:shift], strict=True))

  best = max(range(1, len(prompts)), key=differ)
  return prompts[best:] + prompts[:best]


def questions(cases: Sequence[Case]) -> prepare.Asked:
  """What is encoded for a task: N cases with their prompts, then with those of others."""
  firsts = np.stack([case.first_frame for case in cases] * 2)
  return [case.prompt for case in cases] + shuffled(cases), firsts


# One task


def measure(
  folder: Path,
  bundle: ModelBundle,
  chosen: SampleSettings,
  task: Task,
  cases: Sequence[Case],
  cond: Conditioning,
  mesh: Mesh | None,
  advance: Advance,
) -> None:
  """Runs, reads and scores one task, and writes its folder; cond: of `questions`, 2N rows."""
  with disk(folder):
    folder.mkdir(parents=True)
  show = functools.partial(decode, bundle, tiles=chosen.tiles, mesh=mesh)
  others = beside_models(bundle, task, cases, show)  # first: it may refuse the cases
  count, seeds = len(cases), len(chosen.seeds)
  row = np.concatenate([np.repeat(np.arange(count), seeds), np.arange(count, 2 * count)])
  of_run = [cases[i % count] for i in row]
  own = [s for _ in cases for s in chosen.seeds] + [chosen.seeds[0]] * count
  numbers = [runs.seed_of(case.index, s) for case, s in zip(of_run, own, strict=True)]
  systems = [scoring.MODEL] * (count * seeds) + [scoring.SHUFFLED] * count
  shape = bundle.card.latents.shape(chosen.frames, chosen.height, chosen.width)
  noise = runs.make_noise(numbers, shape)
  schedule = settings.schedule(chosen, bundle.card, bundle.parts)
  watched = [
    r for r in range(count * seeds) if of_run[r].metadata["k"] > 1 and r % seeds < WATCHED_SEEDS
  ]
  steps = spread(chosen.steps, WATCHED_STEPS)
  x0 = np.empty((len(steps), len(watched), *noise.grid), np.float32)
  finite = np.ones(len(row), bool)

  def on_piece(trace: Trace, at: slice, part: slice) -> None:
    finite[part] &= np.asarray(trace.finite).all(0)
    here = [(i, r - part.start) for i, r in enumerate(watched) if part.start <= r < part.stop]
    for i, step in enumerate(steps):
      if trace.x0 is not None and at.start <= step < at.stop and here:
        places, of_part = (list(column) for column in zip(*here, strict=True))
        x0[i, places] = trace.x0[step - at.start][of_part]
    advance((at.stop - at.start) * (part.stop - part.start))

  final = runs.run(
    bundle,
    noise,
    runs.take(cond, row),
    schedule,
    taps=TapSpec(latents=False),
    batch=chosen.batch or BATCH,
    piece=chosen.piece,
    mesh=mesh,
    on_piece=on_piece,
  )
  fps = FAMILIES[bundle.card.family].fps(bundle.card.latents)
  rows = []
  for group in groups(len(row), task, mesh):
    for r, frames in zip(group, show(final[group]), strict=True):
      found = baselines.mark(task, frames, of_run[r].metadata) if finite[r] else BROKEN
      rows.append(
        said(found, of_run[r], int(row[r]) % count, systems[r], numbers[r], not finite[r])
      )
      if systems[r] == scoring.MODEL:
        media.write_mp4(folder / f"video_{row[r]}_{numbers[r]}.mp4", frames, fps=fps)
  rows += others
  ks = [of_run[r].metadata["k"] for r in watched]
  some = [of_run[r] for r in watched]
  seen = watch(task, some, x0, show) if watched else None
  write_json(
    folder / TASK,
    sealed(
      {
        "cases": [case.metadata for case in cases],
        "shuffled": shuffled(cases),
        "rows": rows,
        "watched": seen
        and {
          **seen,
          "case": [row[r] for r in watched],
          "k": ks,
          "step": steps,
          "sigma": np.asarray(schedule.sigma)[steps],
        },
      }
    ),
  )


BROKEN = Mark(
  score=0.0, preservation=0.0, final=0.0, process=0.0, strict=0.0, right=0.0, answer=None
)


def said(
  mark: Mark, case: Case, number: int, system: str, seed: int | None = None, broken: bool = False
) -> dict[str, Any]:
  """A row of the table: one clip of one system on one case."""
  return {
    "task": case.task,
    "split": case.split,
    "index": case.index,
    "case": number,
    "problem": case.metadata["hash"],
    "k": case.metadata["k"],
    "system": system,
    "seed": seed,
    **dataclasses.asdict(mark),
    "answer": None if mark.answer is None else str(mark.answer),
    "broken": bool(broken),
  }


def groups(count: int, task: Task, mesh: Mesh | None = None) -> list[np.ndarray]:
  """Runs in groups whose videos can be held at once, and that leave no device of the mesh idle."""
  seats = 1 if mesh is None else mesh.size
  size = max(seats, PIXELS // (task.frames * task.size**2))
  return [np.arange(low, min(low + size, count)) for low in range(0, count, size)]


def beside_models(
  bundle: ModelBundle, task: Task, cases: Sequence[Case], show: Show
) -> list[dict[str, Any]]:
  """Rows of the clips that no model made, and of the truth through the model's VAE.

  Raises ValueError where a case is one of the training clips.
  """
  bank = baselines.bank(task)
  trained = set(bank.hashes)
  leaked = [case.index for case in cases if case.metadata["hash"] in trained]
  if leaked:
    raise ValueError(
      f"{task.name}: the cases {leaked} are training cases too: the splits of this task overlap, "
      "mend its `canonical`."
    )
  rows = []
  for number, case in enumerate(cases):
    for system, mark in baselines.marks(task, case, bank).items():
      rows.append(said(mark, case, number, system))
  for group in groups(len(cases), task):
    truth = np.stack([cases[i].frames for i in group])
    for i, frames in zip(group, through_vae(bundle, truth, show), strict=True):
      mark = baselines.mark(task, frames, cases[i].metadata)
      rows.append(said(mark, cases[i], int(i), scoring.VAE))
  return rows


def through_vae(bundle: ModelBundle, videos: np.ndarray, show: Show) -> np.ndarray:
  """uint8 R frames height width 3, encoded one by one and decoded."""
  encode = functools.partial(_encode, bundle.parts.vae, bundle.vae)
  latents = np.concatenate([np.asarray(encode(video[None])) for video in videos])
  return show(latents)


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: Any, params: Params, video: Array) -> Array:
  signed = video.astype(np.float32) / 127.5 - 1.0
  return vae.apply({"params": params}, signed, None, method="encode")


def watch(task: Task, cases: Sequence[Case], x0: np.ndarray, show: Show) -> dict[str, np.ndarray]:
  """The soft reading of x0 (S W F H W C) at every step, S W each: visible candidates, entropy in
  bits, share of the weight on right answers; truth: W, the entropy where the truth is read."""
  parts, truths = [], []
  for group in groups(len(cases), task):
    of_group = [cases[i].metadata for i in group]
    parts.append(answers.read_steps(task, of_group, show(x0[:, group]), np.zeros(len(x0))))
    truth = np.stack([cases[i].frames for i in group])[None]
    truths.append(answers.read_steps(task, of_group, truth, np.zeros(1)).entropy[0])
  return {
    "truth": np.concatenate(truths),
    "visible": np.concatenate([part.candidates for part in parts], axis=1),
    "entropy": np.concatenate([part.entropy for part in parts], axis=1),
    "mass": np.concatenate([part.mass for part in parts], axis=1),
  }


# All tasks


def finish(
  out: Path, chosen: SampleSettings, asked: Plan, mesh: Mesh | None, command: Sequence[str]
) -> dict[str, Any]:
  """result.json, table.parquet and, last, manifest.json, from the finished tasks."""
  parts = read_parts(out, asked.tasks)
  name = bundles.describe(chosen.checkpoint).card.name
  result = plain(
    {
      "format": 1,
      "model": name,
      "split": asked.split,
      "cases": asked.cases,
      "kind": asked.kind,
      "seeds": len(chosen.seeds),
      "steps": chosen.steps,
      "level": 0.95,
      **numbers(parts),
    }
  )
  write_json(out / RESULT, result)
  write_table(out, parts)
  store.write_manifest(
    out,
    config=dataclasses.asdict(chosen),
    command=command,
    device=jax.devices()[0].device_kind,
    checksums={PARTS: checksum(out / PARTS, written(asked.tasks))},
    mesh=None if mesh is None else dict(mesh.shape),
    model=name,
    plan=dataclasses.asdict(asked),
    evaluations=evaluations(chosen, asked, mesh),
  )
  return result
