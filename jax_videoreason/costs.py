"""What a whole command costs, as numbers and in words.

A command is `Work`: batches of a `plan.Problem`, one kind of batch for each study or shape of
video.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jax_videoreason import tiling
from jax_videoreason.plan import (
  FITS,
  GIB,
  SHARE,
  Plan,
  Problem,
  Target,
  arithmetic,
  counted,
  make,
  most_runs,
  propose,
  seconds_of,
  spelled,
)
from jax_videoreason.taps import check_batch, check_budget

FEW = 4  # structures of edits that are compiled at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """Batches of one kind: the problem of the largest, and the network evaluations of all.

  evaluations: calls of the network for one run and one guidance branch. videos: what they make.
  """

  name: str
  problem: Problem
  evaluations: float
  videos: float

  @property
  def flops(self) -> float:
    return self.evaluations * self.problem.flops()


def largest(works: Sequence[Work], where: Target) -> Problem:
  """The batch that needs the most memory, by arithmetic on all devices."""
  alone = {"seed": 1, "fsdp": where.count, "context": 1}
  return max((work.problem for work in works), key=lambda p: arithmetic(p, where, alone).most)


def heaviest(works: Sequence[Work], where: Target, axes: Mapping[str, int] | None) -> Plan:
  """The plan of the batch that needs the most memory, of batches that differ in their edits alone.

  Mixes inside the blocks need the most, then what opens most sites, then the largest arrays. Of
  edits that differ in the last alone a compiler tells, for up to `FEW` structures.
  """

  def weight(problem: Problem) -> tuple[float, int, float]:
    sites = 0 if problem.edit is None else len(problem.edit.sites)
    return problem.exchanged(), sites, problem.edit_arrays()

  ordered = sorted((work.problem for work in works), key=weight, reverse=True)
  first = ordered[0]
  axes = propose(first, where) if axes is None else axes
  if where.device.platform == "gpu":
    return make(first, where, axes)
  kinds: dict[Any, Problem] = {}
  for problem in ordered:
    if weight(problem)[:2] == weight(first)[:2]:
      kinds.setdefault(jax.tree.structure(problem.edited), problem)
  plans = [make(problem, where, axes) for problem in [*kinds.values()][:FEW]]
  return max(plans, key=lambda plan: (plan.refused is not None, plan.most))


def pace(where: Target) -> str:
  """Of which peak the seconds are."""
  device = where.device
  each = " a device" if where.count > 1 else ""
  like = f", {device.like}" if device.like else ""
  return f"{SHARE:.0%} of {device.peak / 1e12:,.3g} TFLOP/s{each}{like}"


def totals(works: Sequence[Work], where: Target) -> str:
  """Evaluations, videos, FLOPs and hours of a command; text encoder and VAE come on top."""
  evaluations, videos, flops = (
    sum(getattr(work, name) for work in works) for name in ("evaluations", "videos", "flops")
  )
  return (
    f"{evaluations:,.0f} network evaluations ({counted(videos, 'video')}), "
    f"{_peta(flops)}, {_time(seconds_of(flops, where))} on {where.name} "
    f"at {pace(where)} (an estimate, of the network alone)"
  )


DECODING = {
  "after": "decoding, the DiT let go",
  "between": "decoding, the DiT kept",
  "beside": "decoding, beside a batch",
}
TABLE = ("part", "runs", "taps", "memory", "fits", "evaluations", "time")


def row(work: Work, where: Target, axes: Mapping[str, int] | None) -> tuple[str, ...]:
  """The cells of `TABLE`, all by arithmetic, memory per device."""
  problem = work.problem
  told = arithmetic(problem, where, propose(problem, where) if axes is None else axes)
  return (
    work.name,
    f"{problem.runs}",
    _size(told.taps) if told.taps else "-",
    _size(told.most),
    "yes" if told.fits and over_budget(work) is None else "no",
    f"{work.evaluations:,.0f}",
    _time(seconds_of(work.flops, where)),
  )


def lines(plan: Plan, works: Sequence[Work]) -> list[str]:
  """What is printed of the largest batch of a command, and of all."""
  device, s = plan.target.device, plan.problem.sizes
  source = "compiled ahead of time" if plan.compiled else "by arithmetic, an estimate"
  rows = {
    "parameters": plan.parameters,
    "latents and their trace": plan.latents,
    "taps": plan.taps,
    "temporaries": plan.temporaries,
    "arguments": plan.arguments,
    "outputs": plan.outputs,
    "program": plan.code,
    "VAE": plan.vae,
    "together": plan.total,
    "text encoder, let go before": plan.text,
    DECODING[plan.problem.decodes]: plan.decoding,
  }
  talk = ", ".join(f"{count} {kind}" for kind, count in sorted(plan.collectives.items())) or "none"
  batch = plan.seconds_per_step * s.S
  names = [work.name for work in works if work.problem is plan.problem]
  edited = "" if plan.problem.edit is None else f", edit {names[0]}"
  said = [
    f"{plan.target.name}: {counted(plan.target.count, 'device')} as {spelled(plan.axes)}, "
    f"{source}; R={s.R} G={s.G} T={s.T:,}{edited}, on each device",
  ]
  said += [f"  {name:<28} {_size(size):>12}" for name, size in rows.items() if size]
  said += [
    f"  {'of':<28} {_size(device.memory):>12}, of which {FITS:.0%} may be used: "
    + ("it fits" if plan.fits else "it does not fit"),
  ]
  if plan.decoding > plan.room and plan.decode:
    said.append(smaller_decode(plan))
  if plan.refused is not None:
    said.append(f"the compiler refused it: {plan.refused}")
  if plan.compiled:
    said.append(f"collectives in the program: {talk}; compiled in {plan.compile_seconds:.0f} s")
  faults: dict[str, list[str]] = {}
  for work in works:
    if fault := over_budget(work):
      faults.setdefault(fault, []).append(work.name)
  said += [
    f"{', '.join(names)}: {fault}" if len(works) > 1 else fault for fault, names in faults.items()
  ]
  if device.platform == "gpu":
    most = most_runs(plan.problem, plan.target, plan.axes)
    bare = "" if plan.problem.taps is None else ", without the taps of the study"
    said.append(f"at most {counted(most, 'run')} together would fit{bare}")
  return [
    *said,
    f"{counted(s.R, 'run')} together: {plan.evaluations:,} network evaluations of "
    f"{plan.problem.flops():.3g} FLOPs; {_time(plan.seconds_per_step)} a step, "
    f"{_time(batch / s.R)} a video",
    f"the whole command: {totals(works, plan.target)}",
  ]


def over_budget(work: Work) -> str | None:
  """What is refused of the taps that a config or a study asks for."""
  problem, chosen = work.problem, work.problem.chosen
  runs = round(work.videos) if problem.decodes == "after" else problem.runs
  sizes = dataclasses.replace(problem.sizes, R=runs)
  dtype, budget = problem.model.parts.dit.config.dtype, chosen.taps.budget_gb
  try:
    if problem.taps is not None:
      check_batch(problem.taps, problem.sizes, budget, dtype=dtype)
    else:
      check_budget(chosen.taps.spec(), sizes, budget * 1e9, dtype=dtype)
  except ValueError as error:
    said = f" (--config.taps.budget_gb={budget:g})" if problem.taps is None else ""
    return f"{error}{said}"
  return None


def smaller_decode(plan: Plan) -> str:
  """What to do where decoding does not fit."""
  chosen, whole = plan.problem.chosen, plan.decode
  tiled = {name: plan.problem.decoding(name) for name in tiling.NAMES}
  best = min(tiled, key=lambda name: tiled[name])
  if plan.decoding - whole + tiled[best] <= plan.room and chosen.tiles != best:
    return (
      f"decoding alone takes {_size(whole)}, in tiles {_size(tiled[best])}: give "
      f"--config.tiles={best}."
    )
  return (
    f"decoding does not fit, in tiles neither ({_size(tiled[best])} beside "
    f"{_size(plan.decoding - whole)}): give a smaller video, or more fsdp."
  )


def _size(size: float) -> str:
  unit, scale = ("GiB", GIB) if size >= GIB / 10 else ("MiB", 2**20)
  number = size / scale
  return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}"


def _peta(flops: float) -> str:
  number = flops / 1e15
  return f"{number:,.0f} PFLOP" if number >= 100 else f"{number:.3g} PFLOP"


def _time(seconds: float) -> str:
  for unit, length in (("h", 3600), ("min", 60)):
    if seconds >= 2 * length:
      return f"{seconds / length:.1f} {unit}"
  return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
