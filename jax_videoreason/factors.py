"""What a sweep multiplies: cases, seeds and edits; their product, cut into units of equal size.

Runs are ordered edit by edit, case by case, seeds inside. A unit holds whole cases of one edit, or
equal shares of the seeds of a case that has many; where an edit mixes seeds always whole cases, so
that an ensemble finds its members.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_videoreason import bundles, evaluate, interventions, plan, tasks
from jax_videoreason.interventions import NOISE_MODES, Intervention
from jax_videoreason.records import plain
from jax_videoreason.schedules import Schedule
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import SITES
from jax_videoreason.tasks import Case, Task

FORMAT = 1  # raised where the same question gets other bits or another layout than before
UNIT = 32  # runs of a unit where nothing is said
# of a configuration
KEYS = ("tasks", "split", "cases", "ambiguous", "edits", "unit", "mesh", "reader")
READERS = ("vae", "preview")
DROPS = ("latents",)  # of a trace: what a unit does not keep
MIXING = "ensemble_runs"
EDITS = {
  "none": (),
  "noise_at": ("mode", "gain", "steps", "frames"),
  "ablate": ("sites", "gate", "steps", "layers", "heads"),
  MIXING: ("what", "keep", "amount", "steps", "layers"),
}
CHOICES = {
  "mode": NOISE_MODES,
  "sites": SITES,
  "what": (*interventions.ENSEMBLES, "out", "latents"),
  "keep": ("first", "all"),
}
NEEDED = {"noise_at": {"mode": NOISE_MODES}, "ablate": {"sites": SITES}}
PLACES = ("steps", "layers", "frames", "heads")
NUMBERS = ("gain", "gate", "amount")  # gain alone may be one for each step
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Varied:
  """What is multiplied, and how it is read.

  tasks: names. cases: of each task. kind: plain or ambiguous cases, or both in turn.
  edits: name -> {"edit": of `EDITS`, its arguments}; `PLACES` are (from, to).
  unit: runs of a work unit at most, rounded down to whole cases or to an equal share of the seeds
  of one; a case whose seeds an edit mixes is never cut. mesh: axes of the devices of a process, or
  of all; None = as many runs side by side as divide a unit. reader: what shows x0 at every step,
  the VAE or the preview of the bundle, a small and quick decoder taught by it.
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
  edits = {}
  for name, edit in given["edits"].items():
    if isinstance(edit, Mapping) and isinstance(edit.get("edit"), str):
      edits[str(name)] = dict(edit)
    else:
      faults.append(f"edits.{name}={edit!r}, wanted {{'edit': NAME, ...}}.")
  if not given["edits"]:
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
    faults += [f"edits.{name}: {fault}" for fault in faults_of(edit)]
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
  if not given["tasks"] or len(set(given["tasks"])) < len(given["tasks"]):
    faults.append(f"tasks={given['tasks']!r}, wanted at least one, and none twice.")
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


def edits_told() -> str:
  """The edits with what each may take, a line for each, as `--help` shows them."""
  lines = []
  for name, keys in EDITS.items():
    told = [f"{key} ({', '.join(CHOICES[key])})" if key in CHOICES else key for key in keys]
    lines.append(f"  {name:<15}{', '.join(told) or 'takes nothing'}")
  return "\n".join(lines)


def faults_of(said: Mapping[str, Any]) -> list[str]:
  """What is wrong with the arguments of an edit, whatever the model."""
  kind = said["edit"]
  faults = [
    f"{kind} needs {key}, of {', '.join(known)}."
    for key, known in NEEDED.get(kind, {}).items()
    if said.get(key) is None
  ]
  for key, value in said.items():
    several = value if isinstance(value, tuple | list) else (value,)
    if value is None:
      continue
    if key in PLACES and not _is_span(value):
      faults.append(f"{key}={value!r}, wanted (from, to).")
    if key in NUMBERS and not all(map(_is_number, several if key == "gain" else (value,))):
      faults.append(f"{key}={value!r}, wanted a finite number.")
    if key == "sites" and not all(isinstance(site, str) for site in several):
      faults.append(f"sites={value!r}, wanted some of {', '.join(SITES)}.")
  return faults


def _is_span(value: Any) -> bool:
  return (
    isinstance(value, tuple | list)
    and len(value) == 2
    and all(isinstance(index, int) for index in value)
    and value[0] < value[1]
  )


def _is_number(value: Any) -> bool:
  """Whether it is one that float32 holds, so not nan."""
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
  """All cases, and how they are cut: units of `width` runs."""

  chosen: SampleSettings
  varied: Varied
  tasks: Mapping[str, Task]
  cases: Sequence[Case]
  width: int

  @property
  def units(self) -> int:
    return len(self.varied.edits) * self._runs_of_edit // self.width

  @property
  def _runs_of_edit(self) -> int:
    return len(self.cases) * len(self.chosen.seeds)

  def edit_of(self, unit: int) -> str:
    return list(self.varied.edits)[unit * self.width // self._runs_of_edit]

  def runs_in(self, unit: int) -> list[tuple[int, int]]:
    """(number of the case, seed) of the runs of a unit."""
    seeds, low = self.chosen.seeds, unit * self.width % self._runs_of_edit
    places = (divmod(run, len(seeds)) for run in range(low, low + self.width))
    return [(case, seeds[seed]) for case, seed in places]

  def asked(self) -> dict[str, Any]:
    """What two calls must share for one to go on where the other stopped."""
    settings = dataclasses.asdict(self.chosen)
    for name in ("batch", "piece", "checkpoint"):  # they change no number
      settings.pop(name)
    settings["taps"].pop("budget_gb")
    weights = bundles.fingerprint(self.chosen.checkpoint)
    own = {**dataclasses.asdict(self.varied), "order": list(self.varied.edits), "format": FORMAT}
    own["scoring"] = tasks.scoring(self.varied.tasks)
    for name in ("unit", "mesh"):  # units and width say what the first did
      own.pop(name)
    return plain({**settings, **own, "weights": weights, "units": self.units, "width": self.width})


def cut(wanted: Varied, seeds: int) -> tuple[int, int]:
  """(units, runs of each): whole cases, or an equal share of the seeds of one."""
  known, most = widths(wanted, seeds), wanted.unit or UNIT
  width = max((runs for runs in known if runs <= most), default=known[0])
  return len(wanted.edits) * len(wanted.tasks) * wanted.cases * seeds // width, width


def widths(wanted: Varied, seeds: int) -> list[int]:
  """The numbers of runs that a unit may have, the least first."""
  mixed = any(said["edit"] == MIXING for said in wanted.edits.values())
  whole = {seeds * n for n in _divisors(len(wanted.tasks) * wanted.cases)}
  return sorted(whole if mixed else whole | _divisors(seeds))


def _divisors(of: int) -> set[int]:
  return {n for n in range(1, of + 1) if of % n == 0}


def check_seats(wanted: Varied, seeds: int, seats: int) -> None:
  """ValueError where units do not lie evenly on so many devices of `seed`; names what would."""
  width = cut(wanted, seeds)[1]
  if width % seats == 0:
    return
  fitting = [unit for unit in widths(wanted, seeds) if unit % seats == 0]
  nearest = min(fitting, key=lambda unit: abs(unit - width), default=None)
  units = "" if nearest is None else f"--config.unit={nearest} or "
  fewer = max(n for n in range(1, seats) if width % n == 0)
  raise ValueError(
    f"units of {width} runs on seed={seats}, wanted seeds that divide them: give {units}"
    f"a mesh with seed={fewer}."
  )


def check(chosen: SampleSettings, wanted: Varied) -> dict[str, Task]:
  """The tasks of a sweep; draws no case.

  ValueError: a batch, pictures that are not square, seeds of other cases, a task without the split.
  """
  if chosen.batch is not None:
    raise ValueError(
      f"batch={chosen.batch}: the runs of a unit are denoised together, so give "
      f"--config.unit={chosen.batch} in its place."
    )
  evaluate.check(chosen)
  loaded = {name: evaluate.load_task(name, chosen) for name in wanted.tasks}
  for task in loaded.values():
    task.check_split(split_of(task, wanted), 0)
  return loaded


def split_of(task: Task, wanted: Varied) -> str:
  return "heldout" if task.held_out else wanted.split


def problems(chosen: SampleSettings, wanted: Varied) -> dict[str, plan.Problem]:
  """What a unit of each edit is, by the name of the edit.

  ValueError: an edit that the model has no place for, a reader that it does not have.
  """
  bare = plan.Problem(
    model=plan.model(chosen.checkpoint),
    chosen=chosen,
    runs=cut(wanted, len(chosen.seeds))[1],
    decodes="beside",
    ending=tasks.ENDING if wanted.reader == "vae" else None,
    drops=DROPS,
  )
  if wanted.reader == "preview" and bare.model.parts.preview is None:
    raise ValueError(f"{chosen.checkpoint} has no preview: give --config.reader=vae.")
  schedule, found = bare.schedule(), {}
  for name, said in wanted.edits.items():
    try:
      edit = edit_for(said, bare.sizes, schedule, len(chosen.seeds))
    except ValueError as error:
      raise ValueError(f"configuration: edits.{name}: {error}") from error
    found[name] = dataclasses.replace(bare, edit=edit)
  return found


def multiply(chosen: SampleSettings, wanted: Varied) -> Product:
  """Draws the cases and cuts the units.

  ValueError: as `check` and `problems`, or taps of a unit that are over their budget.
  """
  loaded, cases = check(chosen, wanted), []
  bundles.describe(chosen.checkpoint)  # a plan needs no bundle, a sweep does
  for task in loaded.values():
    drawn = evaluate.cases_of(task, split_of(task, wanted), wanted.cases, wanted.kind)
    # the video that solves a case is large and not looked at here
    cases += [dataclasses.replace(case, frames=case.frames[:1].copy()) for case in drawn]
  made = Product(
    chosen=chosen,
    varied=wanted,
    tasks=loaded,
    cases=cases,
    width=cut(wanted, len(chosen.seeds))[1],
  )
  for problem in problems(chosen, wanted).values():
    problem.check_taps()
  return made


def edit_for(
  said: Mapping[str, Any], sizes: Sizes, schedule: Schedule, seeds: int
) -> Intervention | None:
  """The edit of a unit whose runs are case by case, `seeds` of each; None = without room for any.

  An ensemble is one of the seeds of each case.
  """
  options = {key: value for key, value in said.items() if key != "edit" and value is not None}
  place: dict[str, Any] = {key: slice(*options.pop(key)) for key in PLACES if key in options}
  at = interventions.where(sizes, **place)
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


def evaluations(product: Product) -> int:
  """Network evaluations of all runs, both guidance branches counted."""
  branches = 2 if product.chosen.guided else 1
  return product.units * product.width * product.chosen.steps * branches
