"""What an experiment is given: a batch of runs that ride together, the one sampler, and a reader.

Runs are laid out role by role; within a role they go case by case, seeds inside. An experiment asks
for `ctx.runs("case")`, an index array into R, and gets results whose axis "run" has that order.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_videoreason import answers, interventions, runs, sampler, settings
from jax_videoreason.composing import room_of
from jax_videoreason.folders import atomic
from jax_videoreason.interventions import Intervention
from jax_videoreason.schedules import Schedule
from jax_videoreason.settings import SampleSettings, from_config
from jax_videoreason.structs import AnswerTrace, Conditioning, ModelBundle, Noise, Sizes, Trace
from jax_videoreason.taps import TapSpec, check_batch
from jax_videoreason.tasks import Case, Task

Point = Any
Rows = Any

ENCODED = ("frames", "negative_prompt")  # settings that the encoders are told
VARIED = ("steps", "shift", "guidance", "boundary", "solver", "grid", *ENCODED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What all batches of an experiment share.

  encode: (settings, cases) -> the conditioning of one run per case. decode: latents ... F H W C ->
  the uint8 frames of one video after the other, as `decode_each` gives them. load_task:
  (name, settings) -> Task. mesh: on which the DiT lies and runs are made, of devices of this
  process; None = one device.
  """

  bundle: ModelBundle
  chosen: SampleSettings
  encode: Callable[[SampleSettings, Sequence[Case]], Conditioning]
  decode: Callable[[Any], Iterable[np.ndarray]]
  load_task: Callable[[str, SampleSettings], Task]
  mesh: Mesh | None = None


@dataclasses.dataclass
class Tally:
  """What has been spent. evaluations: calls of the network for one run and one guidance branch.

  saved: those that shared prefixes made needless. reused: those that an earlier, interrupted call
  had left. broken: the runs that were not finite, in words.
  """

  advance: Callable[[int], Any] = lambda count: None
  evaluations: int = 0
  saved: int = 0
  reused: int = 0
  broken: list[str] = dataclasses.field(default_factory=list)

  def name_broken(self, texts: Iterable[str]) -> list[str]:
    """Those of the texts that are new."""
    new = [text for text in texts if text not in self.broken]
    self.broken += new
    return new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
  """Finished pieces of work on disk, found again by everything they depend on.

  folder: None = nothing is kept. of: what all chunks here depend on.
  """

  folder: Path | None = None
  of: str = ""

  def path(self, key: str) -> Path | None:
    if self.folder is None:
      return None
    name = hashlib.sha256(f"{self.of}\n{key}".encode()).hexdigest()[:24]
    return self.folder / f"{name}.npz"

  def get(self, key: str) -> dict[str, np.ndarray] | None:
    path = self.path(key)
    if path is None or not path.exists():
      return None
    with np.load(path, allow_pickle=False) as stored:
      return dict(stored)

  def put(self, key: str, value: Mapping[str, np.ndarray]) -> None:
    path = self.path(key)
    if path is not None:
      path.parent.mkdir(parents=True, exist_ok=True)
      with atomic(path) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(value))


@dataclasses.dataclass
class Calls:
  """Numbers the calls of a batch, so that one finds what the same call has left, and no other.

  within: the key of the piece of work that is being done, with a line end; empty = none. counts: of
  the calls under one key and one place. Work within a piece is numbered by itself: a piece that is
  found on disk does none.
  """

  within: str = ""
  counts: dict[str, Iterator[int]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(itertools.count)
  )


def storable(value: Any) -> np.ndarray:
  """An array as a chunk can hold it: bfloat16, which a chunk would lose, as float32."""
  made = np.asarray(value)
  return made.astype(np.float32) if made.dtype.name == "bfloat16" else made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """A batch of R runs and what can be done with it.

  cases: of the R runs. roles: role -> its runs. control: every edit is replaced by the identity
  with the same room, and `map` looks at its first and its middle point alone; the result must show
  no effect.
  """

  setting: Setting
  cases: tuple[Case, ...]
  roles: Mapping[str, np.ndarray]
  noise: Noise
  cond: Conditioning
  schedule: Schedule
  sizes: Sizes
  tally: Tally
  chunks: Chunks
  control: bool = False
  place: str = ""
  calls: Calls = dataclasses.field(default_factory=Calls)
  lost: set[int] = dataclasses.field(default_factory=set)

  @property
  def bundle(self) -> ModelBundle:
    return self.setting.bundle

  @property
  def tokens(self) -> tuple[int, int, int]:
    """(f, h, w): the grid of the tokens of a run; a hidden state has T = f * h * w of them."""
    return self.bundle.card.latents.tokens((self.sizes.F, self.sizes.H, self.sizes.W))

  @property
  def sigma(self) -> np.ndarray:
    """S+1."""
    return np.asarray(self.schedule.sigma)

  @property
  def points(self) -> dict[str, list[Any]]:
    """Labels of the axes that most results have."""
    return {
      "step": list(range(self.sizes.S)),
      "sigma": [round(float(s), 4) for s in self.sigma[:-1]],
      "layer": list(range(self.sizes.L)),
      "latent_frame": list(range(self.sizes.F)),
    }

  def runs(self, role: str = "case") -> np.ndarray:
    """Which of the R runs have this role; the same place in two roles is the same case and seed."""
    if role not in self.roles:
      raise ValueError(f"no run here is {role!r}; there are: {', '.join(self.roles)}.")
    return self.roles[role]

  def by_seed(self, role: str = "case") -> np.ndarray:
    """The runs of a role as seed case: row j holds seed j of every case."""
    return self.runs(role).reshape(-1, len(self.setting.chosen.seeds)).T

  def task(self, run: int) -> Task:
    return self.setting.load_task(self.cases[run].task, self.setting.chosen)

  def denoise(
    self, edit: Intervention | None = None, taps: TapSpec | None = None
  ) -> tuple[np.ndarray, Trace]:
    """(final latents R F H W C, trace) of a whole trajectory, on the host."""
    return self._denoise(self.schedule, edit, taps, None, 0, self.sizes.S)

  def resume(
    self,
    before: Trace | None,
    step: int,
    edit: Intervention | None,
    taps: TapSpec | None = None,
    *,
    stop: int | None = None,
  ) -> tuple[np.ndarray, Trace]:
    """As `denoise`, from what `before` held at `step`: the prefix is shared, not computed again.

    before: a trace that `resume` returned (None and step 0 for the first one): held steps are part
    of the program, so only runs of one program are equal to the last bit. stop: the step before
    which it ends, with the latents it has then; None = at the end. Rows of the new trace before
    `step` and from `stop` on repeat the state, so it goes on by `resume(trace, stop, edit)`; all
    pieces are one program. Such a trace has the solver's memory; from another one, as of `denoise`,
    a multistep solver restarts.

    ValueError: no 0 <= step <= stop <= S.
    """
    stop = self.sizes.S if stop is None else stop
    schedule = self.schedule.only(step, stop)
    taps = dataclasses.replace(TapSpec() if taps is None else taps, solver=True)
    if before is None:
      state = sampler.start(self.noise, self.schedule.solver)
    else:
      state = sampler.state_at(before, self.schedule, step)
    return self._denoise(schedule, edit, taps, state, step, stop)

  def _denoise(
    self,
    schedule: Schedule,
    edit: Intervention | None,
    taps: Any,
    state: Any,
    first: int,
    stop: int,
  ) -> tuple[np.ndarray, Trace]:
    if taps is not None:
      dtype = self.bundle.parts.dit.config.dtype
      check_batch(taps, self.sizes, self.setting.chosen.taps.budget_gb, dtype=dtype)
    if self.control and edit is not None:
      edit = neutral(edit, self.sizes)
    mesh = self.setting.mesh
    edit = runs.place_edit(edit, mesh)
    state = None if state is None else runs.place(state, mesh)
    with runs.over(mesh):
      latents, trace, _ = sampler.denoise(
        self.bundle, self.noise, self.cond, schedule, edit, taps, state
      )
    trace = jax.tree.map(np.asarray, trace)
    one = self.sizes.R * self.sizes.G
    self.tally.evaluations += one * (stop - first)
    self.tally.saved += one * first
    self.tally.advance(one * (stop - first))
    self._note_broken(trace.finite)
    return np.asarray(latents), trace

  def _note_broken(self, finite: np.ndarray) -> None:
    pairs = len(next(iter(self.roles.values())))
    seeds = self.setting.chosen.seeds
    for run in np.flatnonzero(~finite.all(0)):
      case, step = self.cases[run], int(np.argmin(finite[:, run]))
      seed = seeds[int(run) % len(seeds)]
      text = f"{title(case)}, seed {seed} is not finite from step {step} on"
      self.lost.add(int(run) % pairs)
      if self.tally.name_broken([text]):
        warnings.warn(f"{text}: it is left out of every number.", stacklevel=4)

  def map(self, fn: Callable[[Point], Rows], points: Sequence[Point]) -> Any:
    """fn at every point, stacked; each finished point is kept on disk and not done again.

    fn: point -> an array, or a dict of arrays. Every value of an edit is data, so all points are
    one compilation if they start from one identity. What fn itself keeps by `map` or `once` is kept
    as a part of its point.
    """
    number = self._number()
    middle = len(points) // 2  # work that is resumed from a later step may err there alone
    rows: list[dict[str, np.ndarray]] = []
    for place, point in enumerate(points):
      if self.control and place not in (0, middle):
        rows.append(rows[0])
      else:
        rows.append(self._once(f"map {number} point {place}", functools.partial(fn, point)))
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return stacked[""] if list(stacked) == [""] else stacked

  def once(self, fn: Callable[[], Rows]) -> Any:
    """fn(), kept on disk; arrays or a dict of them."""
    row = self._once(f"once {self._number()}", fn)
    return row[""] if list(row) == [""] else row

  @property
  def _here(self) -> str:
    """What tells the calls on this context from others, but for their number."""
    return f"{self.calls.within}{self.place}"

  def _number(self) -> int:
    return next(self.calls.counts[self._here])

  def _once(self, key: str, fn: Callable[[], Rows]) -> dict[str, np.ndarray]:
    key = f"{self._here}\n{key}\ncontrol={self.control}"
    found = self.chunks.get(key)
    if found is not None:
      spent = int(found.pop(".evaluations"))
      self.lost.update(int(pair) for pair in found.pop(".lost"))
      self.tally.name_broken(str(text) for text in found.pop(".broken"))
      self.tally.reused += spent
      self.tally.advance(spent)
      return found
    before, named = self.tally.evaluations + self.tally.reused, len(self.tally.broken)
    outside, self.calls.within = self.calls.within, f"{key}\n"
    try:
      made = fn()
    finally:
      self.calls.within = outside
    row = {k: storable(v) for k, v in (made if isinstance(made, dict) else {"": made}).items()}
    spent = {
      ".evaluations": np.asarray(self.tally.evaluations + self.tally.reused - before),
      ".lost": np.array(sorted(self.lost), int),
      ".broken": np.array(self.tally.broken[named:], str),
    }
    self.chunks.put(key, {**row, **spent})
    return row

  def read(
    self,
    latents: Any,
    of: np.ndarray | None = None,
    look: Callable[[int, int, np.ndarray], Any] = lambda row, run, frames: None,
  ) -> AnswerTrace:
    """The answers that latents give: S R' F H W C, or R' F H W C as one row.

    of: which of the R runs they are, None = all. Rows that are not the S steps have no sigma. look:
    shown every video with its row and its place in R'; none is held when it has been read.
    """
    x = np.asarray(latents)
    x = x[None] if x.ndim == 5 else x
    of = np.arange(self.sizes.R) if of is None else of
    cases = [self.cases[run] for run in of]
    tasks = [self.setting.load_task(case.task, self.setting.chosen) for case in cases]
    sigma = self.sigma[:-1] if len(x) == self.sizes.S else np.full(len(x), np.nan)

    def videos() -> Iterator[np.ndarray]:
      for (row, run), frames in zip(np.ndindex(x.shape[:2]), self.setting.decode(x), strict=True):
        look(row, run, frames)
        yield frames

    return answers.read_each(tasks, [case.metadata for case in cases], videos(), sigma)

  def vary(self, **changes: Any) -> "Context":
    """The same cases and seeds under other settings, of `VARIED`, as a configuration has them.

    Another negative prompt, or guidance where no run had any, is encoded anew; the encoders are
    loaded for it beside the DiT. The control leaves everything as it is.

    ValueError: a setting that is none of `VARIED`, or can't have this value.
    """
    other = [name for name in changes if name not in VARIED]
    if other:
      raise ValueError(
        f"ctx.vary got {other[0]!r}, wanted some of {', '.join(VARIED)}: any other setting is that "
        "of a whole study, --config.KEY=VALUE."
      )
    given = {name: np.asarray(value).tolist() for name, value in changes.items()}
    chosen = from_config(dataclasses.asdict(self.setting.chosen) | given)
    if self.control or not changes:
      return self
    setting = dataclasses.replace(self.setting, chosen=chosen)
    anew = not changes.keys().isdisjoint(ENCODED) or (chosen.guided and self.sizes.G == 1)
    named = {name: getattr(chosen, name) for name in changes}
    cases = self.cases
    if "frames" in changes:
      cases = tuple(
        setting.load_task(case.task, chosen).case(case.metadata | {"frames": chosen.frames})
        for case in cases
      )
    return assemble(
      setting,
      cases,
      self.roles,
      tally=self.tally,
      chunks=self.chunks,
      place=f"{self.place} {json.dumps(named, sort_keys=True)}",
      calls=self.calls,
      lost=self.lost,
      cond=None if anew else self.cond,
    )


def assemble(
  setting: Setting,
  cases: Sequence[Case],
  roles: Mapping[str, np.ndarray],
  *,
  tally: Tally,
  chunks: Chunks,
  cond: Conditioning | None = None,
  **more: Any,
) -> Context:
  """The Context of R = len(cases) runs; cond: None = encoded here.

  ValueError: R does not divide by the seeds of the mesh.
  """
  chosen, card = setting.chosen, setting.bundle.card
  seeds = chosen.seeds
  shape = card.latents.shape(chosen.frames, chosen.height, chosen.width)
  seats = 1 if setting.mesh is None else setting.mesh.shape["seed"]
  if len(cases) % seats:
    raise ValueError(
      f"{len(cases)} runs on a mesh with seed={seats}, wanted a multiple of it: give other "
      "--config.batch or --config.seeds, or another --mesh."
    )
  drawn = [runs.seed_of(case.index, seeds[i % len(seeds)]) for i, case in enumerate(cases)]
  noise = runs.place(runs.make_noise(drawn, shape), setting.mesh)
  made = setting.encode(chosen, cases) if cond is None else cond
  placed: Conditioning = (
    jax.device_put(made) if setting.mesh is None else runs.place(made, setting.mesh)
  )
  schedule = settings.schedule(chosen, setting.bundle.card, setting.bundle.parts)
  return Context(
    setting=setting,
    cases=tuple(cases),
    roles=roles,
    noise=noise,
    cond=placed,
    schedule=schedule,
    sizes=sampler.sizes_of(setting.bundle, noise, placed, schedule),
    tally=tally,
    chunks=chunks,
    **more,
  )


def neutral(edit: Intervention, sizes: Sizes) -> Intervention:
  """`edit` with the same room and no effect."""
  still = {k: v for name in interventions.ROOM for k, v in room_of(name, sizes).items()}
  if edit.added_at is not None:
    still["added_at"] = np.full_like(edit.added_at, -1)
  kept = {name: value for name, value in still.items() if getattr(edit, name) is not None}
  return dataclasses.replace(edit, **kept)


def title(case: Case) -> str:
  """Such as "maze id 3"."""
  return f"{case.task} {case.split} {case.index}"
