"""Carrying a study out: its control first, then batch by batch, and the verdicts on its claims."""

import contextlib
import dataclasses
import inspect
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_videoreason.experiments import results
from jax_videoreason.experiments.context import (
  Chunks,
  Context,
  Setting,
  Tally,
  assemble,
  storable,
  title,
)
from jax_videoreason.experiments.results import Finding, Result
from jax_videoreason.experiments.study import ROLES, Study
from jax_videoreason.records import plain
from jax_videoreason.settings import SampleSettings
from jax_videoreason.tasks import Case, Task

EVENT = "backend_compile_duration"
PROGRAM = "_trajectory"


def perform(
  study: Study,
  setting: Setting,
  cases: Sequence[Case],
  *,
  options: Mapping[str, Any] | None = None,
  batch: int | None = None,
  chunks: Chunks | None = None,
  say: Callable[[str], Any] = lambda text: None,
  progress: Callable[[int, str], Any] | None = None,
) -> tuple[Result, dict[str, Any], list[Finding]]:
  """Carries a study out: control first, then batch by batch; (arrays, record, findings).

  cases: all of them. batch: cases that ride together, None = all. chunks: where finished work is
  kept. progress: (network evaluations, title) -> a context manager that yields `advance(n)`.

  Raises ValueError for unknown options or no cases.
  """
  given = dict(options or {})
  study.check(given)
  given = {**study.options, **given}
  if not cases:
    raise ValueError(f"{study.name} got no cases: give at least one.")
  began = time.monotonic()
  chosen, load_task = setting.chosen, setting.load_task
  groups, counts = _groups(cases, batch)
  chunks = chunks or Chunks()
  tally = Tally()

  def context(riding: Sequence[Case], place: str, *, control: bool) -> Context:
    roles = np.arange(len(riding)).reshape(len(study.roles), -1)
    return assemble(
      setting,
      riding,
      dict(zip(study.roles, roles, strict=True)),
      tally=tally,
      chunks=chunks,
      control=control,
      place=place,
    )

  with _count_programs() as programs, _keeping(study, chunks, say):
    first = context(*_riding(study, chosen, load_task, groups, 0), control=bool(study.zero))
    switch = setting.bundle.card.boundary is not None
    total = study.evaluations(first.sizes, given, len(groups), switch=switch)
    say(
      f"{study.name}: {len(cases)} cases x {len(setting.chosen.seeds)} seeds in {len(groups)} "
      f"batches of {first.sizes.R} runs, {first.sizes.S} steps: {total:,} network evaluations"
    )
    bar = contextlib.nullcontext(tally.advance) if progress is None else progress(total, study.name)
    control = None
    if study.zero:
      found = _batch(study, first, given)
      control = {name: _largest(found, name) for name in study.zero}
      _warn_of_claims(study, found, counts, len(setting.chosen.seeds))
      tally = dataclasses.replace(tally, evaluations=0, saved=0, reused=0)
    with bar as advance:
      tally.advance = advance
      parts = []
      for number in range(len(groups)):
        riding, place = _riding(study, chosen, load_task, groups, number)
        part = _finished(place, chunks, tally)
        if part is None:
          part = _batch(study, context(riding, place, control=False), given)
        parts.append(part)
        if number == 0 and not study.zero:
          _warn_of_claims(study, parts[0], counts, len(setting.chosen.seeds))
    result = results.join(parts, len(setting.chosen.seeds), counts)
    points = {**result.points, "case": [title(case) for case in cases]}
    points = {**points, "seed": list(setting.chosen.seeds)}
    problems = [case.metadata["hash"] for case in cases]
    result = dataclasses.replace(result, points=points, problem_of=problems)
    if study.finish is not None:
      with _placed(study):
        result = study.finish(result, **given)
      _check_parts(study, result, whole=True)
      _name_missing(study, result)
      if "case" not in result.points and _places(result, "case") == {len(cases)}:  # made anew
        result = dataclasses.replace(result, points={**result.points, "case": points["case"]})
      if list(result.points.get("case", ())) == points["case"]:
        result = dataclasses.replace(result, problem_of=problems)
    findings = verdicts(study, result, control)
  say(
    f"{study.name}: {tally.evaluations:,} evaluations, {tally.saved:,} saved by shared prefixes, "
    f"{tally.reused:,} reused, {len(programs)} programs compiled"
  )
  record = {
    "experiment": study.name,
    "module": study.module,
    "question": study.question,
    "method": study.method,
    "limits": study.limits,
    "options": given,
    "cases": len(cases),
    "problems": len(set(problems)),
    "seeds": len(setting.chosen.seeds),
    "steps": first.sizes.S,
    "runs": first.sizes.R,
    "model": setting.bundle.card.name,
    "planned": total,
    "evaluations": tally.evaluations,
    "saved": tally.saved,
    "reused": tally.reused,
    "programs": len(programs),
    "seconds": round(time.monotonic() - began, 1),
    "control": control,
    "broken": tally.broken,
    "claims": [results.describe(finding) for finding in findings],
  }
  return result, record, findings


def verdicts(study: Study, result: Result, control: Mapping[str, float] | None) -> list[Finding]:
  """Every claim of a study held against its result; all in doubt where the control is not 0."""
  findings = [results.judge(claim, result) for claim in study.claims]
  broken = {name: value for name, value in (control or {}).items() if value != 0}
  return [_doubt(finding, broken) for finding in findings] if broken else findings


def batches_left(
  study: Study,
  chosen: SampleSettings,
  load_task: Callable[[str, SampleSettings], Task],
  cases: Sequence[Case],
  *,
  batch: int | None,
  chunks: Chunks,
) -> Iterator[list[Case]]:
  """The case of every run of each batch that `perform`, called so, will make.

  Those are the first one, also where it is finished, and all that no earlier call has finished.
  """
  groups, _ = _groups(cases, batch)
  for number in range(len(groups)):
    riding, place = _riding(study, chosen, load_task, groups, number)
    kept = chunks.path(_key(place))
    if number == 0 or kept is None or not kept.exists():
      yield riding


def _groups(cases: Sequence[Case], batch: int | None) -> tuple[list[list[Case]], list[int]]:
  """Cases in batches of one size, the last filled up with its last case; how many each began as."""
  size = min(batch or len(cases), len(cases))
  groups = [list(cases[low : low + size]) for low in range(0, len(cases), size)]
  return [g + [g[-1]] * (size - len(g)) for g in groups], [len(g) for g in groups]


def _riding(
  study: Study,
  chosen: SampleSettings,
  load_task: Callable[[str, SampleSettings], Task],
  groups: Sequence[Sequence[Case]],
  number: int,
) -> tuple[list[Case], str]:
  """(the case of every run of a batch: role by role, case by case, seed by seed; its place)."""
  riding = [
    ROLES[role](load_task(case.task, chosen), case)
    for role in study.roles
    for case in groups[number]
    for _ in chosen.seeds
  ]
  names = json.dumps([case.metadata["hash"] for case in riding])
  return riding, f"{study.name} batch {number} {names}"


def _key(place: str) -> str:
  """Of the chunk of a finished batch."""
  return f"{place}\nbatch"


def _finished(place: str, chunks: Chunks, tally: Tally) -> Result | None:
  """A batch that an earlier call has finished."""
  kept = chunks.get(_key(place))
  if kept is None:
    return None
  told = json.loads(str(kept.pop(".told")))
  tally.reused += told["evaluations"]
  tally.advance(told["evaluations"])
  tally.name_broken(told["broken"])
  axes = {name: tuple(names) for name, names in told["axes"].items()}
  return Result(
    values=kept,
    axes=axes,
    points=told["points"],
    titles=told["titles"],
    notes=told["notes"],
    signed=told["signed"],
  )


def _batch(study: Study, ctx: Context, options: Mapping[str, Any]) -> Result:
  """One batch, kept on disk when it is finished; runs that were not finite become NaN."""
  tally = ctx.tally
  spent, broken = tally.evaluations + tally.reused, len(tally.broken)
  with _placed(study):
    found = study.run(ctx, **options)
  _check_result(study, found, ctx)
  found = dataclasses.replace(found, values=_without_lost(found, ctx))
  if not ctx.control:
    told = {
      "evaluations": tally.evaluations + tally.reused - spent,
      "broken": tally.broken[broken:],
      **{f: getattr(found, f) for f in ("axes", "points", "titles", "notes", "signed")},
    }
    ctx.chunks.put(_key(ctx.place), {**found.values, ".told": np.asarray(json.dumps(plain(told)))})
  return found


@contextlib.contextmanager
def _keeping(study: Study, chunks: Chunks, say: Callable[[str], Any]) -> Iterator[None]:
  """Where an own study fails, says that the work it has finished stays."""
  try:
    yield
  except Exception:
    folder = chunks.folder
    if not study.shipped and folder is not None and any(folder.glob("*.npz")):
      say(
        f"{study.name}: what is finished stays in {folder}; the same command goes on behind it, "
        "unless the file of the study changes."
      )
    raise


@contextlib.contextmanager
def _placed(study: Study) -> Iterator[None]:
  """Puts the line of an own study before what a ValueError says, which is shown without its
  traceback."""
  try:
    yield
  except ValueError as error:
    code = getattr(inspect.unwrap(study.run), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if code and frame.filename == code.co_filename]
    if study.shipped or not lines:
      raise
    said = str(error) or type(error).__name__
    raise ValueError(f"{Path(lines[-1].filename).name}, line {lines[-1].lineno}: {said}") from error


def _check_parts(study: Study, found: Any, *, whole: bool) -> None:
  """ValueError for what is no Result, or can't be kept.

  whole: whether nothing is made of it any more, as where the study has no `finish`.
  """
  if not isinstance(found, Result):
    raise ValueError(
      f"{study.name} returned {type(found).__name__}, wanted Result(values={{name: array}}, "
      "axes={name: its axes})."
    )
  _check_named(study, found, "axes=", found.axes)
  _check_named(study, found, "signed=", found.signed if whole else ())
  results.check_values(study.name, found, texts=not whole)


def _check_named(study: Study, found: Result, what: str, names: Iterable[str]) -> None:
  """ValueError where one of the names is no value."""
  there = ", ".join(map(str, found.values)) or "none"
  unknown = [name for name in names if name not in found.values]
  if unknown:
    raise ValueError(
      f"{study.name}: {what} names {unknown[0]!r}, wanted a value that it returns: {there}."
    )


def _check_result(study: Study, found: Any, ctx: Context) -> None:
  """ValueError for what a study may not return: its rows would be taken for those of other runs."""
  _check_parts(study, found, whole=study.finish is None)
  _check_named(study, found, "zero=", study.zero if ctx.control else ())
  seeds = len(ctx.setting.chosen.seeds)
  role = "case" if "case" in study.roles else study.roles[0]
  pairs = len(ctx.runs(role))
  wanted = {"run": (pairs, "case and seed"), "case": (pairs // seeds, "case")}
  for name, value in found.values.items():
    for axis, size in zip(found.axes[name], np.shape(value), strict=True):
      count, each = wanted.get(axis, (size, ""))
      if size != count:
        whole = axis == "run" and size == ctx.sizes.R
        remedy = f"take value[ctx.runs({role!r})]" if whole else f"give those of {role!r} alone"
        raise ValueError(
          f"{study.name}: axis {axis} of {name!r} has {size} places, wanted {count}, one per "
          f"{each}: {remedy}."
        )


def _warn_of_claims(study: Study, part: Result, counts: Sequence[int], seeds: int) -> None:
  """`_name_missing` as soon as a batch is there, unless `finish` makes more values of all."""
  if study.finish is None:
    _name_missing(study, results.join([part], seeds, counts[:1]))


def _places(result: Result, axis: str) -> set[int]:
  """The lengths that an axis has in the values of a result."""
  return {
    np.shape(value)[result.axes[name].index(axis)]
    for name, value in result.values.items()
    if axis in result.axes[name]
  }


def _name_missing(study: Study, result: Result) -> None:
  """Warns of claims about a value that is none of those returned; studies that ship may leave out
  some, and any may leave out places of an axis, by its options. ValueError: one without cases."""
  for claim in () if study.shipped else study.claims:
    for of in (claim.of,) if isinstance(claim.of, str) else claim.of:
      if of.partition("[")[0] not in result.values:
        there = ", ".join(result.values)
        said = f"claim {claim.says!r} can't be judged: no value {of!r}; there are: {there}."
        warnings.warn(said, stacklevel=3)
      elif result.has(of):
        result.per_case(of)


def _without_lost(found: Result, ctx: Context) -> dict[str, np.ndarray]:
  """The values, NaN (no text) where a run was not finite."""
  seeds = len(ctx.setting.chosen.seeds)
  values = {}
  for name, value in found.values.items():
    value = storable(value)
    for axis, lost in (("run", ctx.lost), ("case", {pair // seeds for pair in ctx.lost})):
      if lost and axis in found.axes[name]:
        text = value.dtype.kind == "U"
        value = np.array(value, None if text else float)
        rows = np.moveaxis(value, found.axes[name].index(axis), 0)
        rows[sorted(lost)] = "" if text else np.nan
    values[name] = value
  return values


def _largest(result: Result, name: str) -> float:
  """0 where there is no number, as of answers that can't be read."""
  return float(np.nanmax(np.abs(np.asarray(result.values[name], float)), initial=0.0))


def _doubt(finding: Finding, broken: Mapping[str, float]) -> Finding:
  said = ", ".join(f"{name} = {value:.2g}" for name, value in broken.items())
  note = f"the identity control shows an effect ({said}), wanted 0"
  return dataclasses.replace(finding, verdict="can't tell", needed=None, note=note)


@contextlib.contextmanager
def _count_programs() -> Iterator[list[float]]:
  """Yields the list of seconds that every program of the sampler took to compile."""
  seen: list[float] = []

  def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event.endswith(EVENT) and PROGRAM in str(kwargs.get("fun_name", "")):
      seen.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seen
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
