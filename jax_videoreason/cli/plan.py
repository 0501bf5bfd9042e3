"""What a command will need on a device kind, before it is paid for: memory, network evaluations,
hours; whether it fits; which mesh.

  videoreason plan --config wan22_i2v_a14b:480p --on v5p:2x2x4 --mesh fsdp=4,context=4
  videoreason plan --config wan22_ti2v_5b --on gpu:80GB
  videoreason plan sweep --config vbvr_ensemble --on v5e:4x8
  videoreason plan run noise --config vbvr_wan22:height=480,width=480 --on gpu:141GB
  videoreason plan run all --config mini --preset full --on cpu
  videoreason plan vbvr generate --data VBVR-Bench --config vbvr_wan22 --on gpu:141GB

The command that is planned stands first, with its options; alone, plan means `sample`. For a TPU
slice the sampler is compiled ahead of time, without a TPU and without weights: it needs libtpu (pip
install "jax-videoreason[pods]"). Without --mesh one is proposed. Where a command has batches of
several kinds, a table shows all by arithmetic, and the largest is laid out: of a sweep that of the
edit which needs the most memory, by name. A study makes its edits while it runs: they are not part
of its plan, its taps are.
"""

import dataclasses
import importlib
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl.flags import DEFINE_integer, DEFINE_string, FlagValues

from jax_videoreason import cli
from jax_videoreason.cli import run, sweep

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from jax_videoreason.costs import Work

WORDS = 2
# a slice is described by libtpu, which must not look for a TPU of this machine, nor guard one
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
RUN, SWEEP, GENERATE = "run", "sweep", ["vbvr", "generate"]


def define(flags: FlagValues) -> None:
  # jax is imported with the flags of the planned command
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  cli.define_config(flags, "mini")
  DEFINE_string(
    "on", "cpu", "cpu, gpu:80GB, gpu:a100-80GBx8, or a slice: v5p:2x2x4", flag_values=flags
  )
  DEFINE_string("mesh", None, "as seed=2,fsdp=4,context=2; None = proposed", flag_values=flags)
  DEFINE_integer(
    "runs",
    None,
    "runs together, of at least so many; None = as the command has them",
    lower_bound=1,
    flag_values=flags,
  )
  cli.define_room(flags)
  cli.define_route(flags)
  DEFINE_string("preset", "quick", "run: size of a study, quick or full", flag_values=flags)
  importlib.import_module("jax_videoreason.cli.vbvr").define_generate(flags)


def complete(config: "ConfigDict", words: Sequence[str]) -> "ConfigDict":
  """The config with the keys that the planned command adds."""
  if words and words[0] == RUN:
    return run.complete(config, words[1:])
  if list(words[:2]) == GENERATE:
    cli.refuse_typed(importlib.import_module("jax_videoreason.cli.vbvr").OWN_KEYS, words)
  return sweep.complete(config, words[1:]) if words and words[0] == SWEEP else config


def main(flags: FlagValues, words: list[str]) -> None:
  from jax_videoreason import console, costs, plan, sharding

  check(flags, words)
  where, mesh = plan.target(flags.on), flags.mesh
  if mesh is None and words in ([], [SWEEP]):
    mesh = flags.config.get("mesh")  # of a sweep
  axes = None if mesh is None else sharding.axes_of(mesh)
  seats = 1 if axes is None else axes["seed"]
  works = [with_options(flags, work, seats) for work in planned(flags, words, seats)]
  if words in ([], [SWEEP]):
    made = costs.heaviest(works, where, axes)
    axes = made.axes  # of all edits
  else:
    made = plan.make(costs.largest(works, where), where, axes)
  if len(works) > 1:
    title = "by arithmetic, an estimate; memory on each device"
    console.table(title, costs.TABLE, [costs.row(work, where, axes) for work in works])
  for line in costs.lines(made, works):
    console.say(line)
  if words == [SWEEP] and mesh is None and math.prod(made.axes.values()) > 1:
    mesh = plan.spelled(made.axes)
    console.say(f"the sweep lies so with --config.mesh={mesh}")


def with_options(flags: FlagValues, work: "Work", seats: int) -> "Work":
  """The work with the options of plan; more runs together than it makes videos count as so many.

  Runs that are asked for are filled up to `seats`, the `seed` axis of the mesh.
  """
  cli.check_experts(flags, len(work.problem.model.experts))
  runs = -(-flags.runs // seats) * seats if flags.runs else work.problem.runs
  more = max(1.0, (flags.runs or 0) / work.videos)
  problem = dataclasses.replace(
    work.problem,
    runs=runs,
    guidance="sequential" if flags.sequential else "parallel",
    resident=flags.experts,
    route=flags.route,
  )
  return dataclasses.replace(
    work, problem=problem, evaluations=more * work.evaluations, videos=more * work.videos
  )


def check(flags: FlagValues, words: list[str]) -> None:
  """Refuses commands that can't be planned, and options of another than the one that is."""
  if words not in ([], [SWEEP], GENERATE) and (words[0] != RUN or len(words) != 2):
    raise cli.UsageError(
      f"plan {' '.join(words)}: say plan (for a sample), plan sweep, plan run NAME, plan run all "
      "or plan vbvr generate, and the options after it."
    )
  of_generate = cli.new_flags()
  importlib.import_module("jax_videoreason.cli.vbvr").define_generate(of_generate)
  of_command = {
    "preset": words[:1] == [RUN],
    **dict.fromkeys(("sequential", "experts"), words in ([], GENERATE)),
    "route": not words,
    "runs": words != [SWEEP] and "unit" not in flags.config,
    **dict.fromkeys(of_generate, words == GENERATE),
  }
  given = [name for name, known in of_command.items() if flags[name].present and not known]
  if given:
    said = " ".join(["plan", *words])
    raise cli.UsageError(f"{said} takes no --{given[0]}; --help says more.")


def planned(flags: FlagValues, words: list[str], seats: int) -> "list[Work]":
  """What the command of `words` takes. seats: of a mesh that is asked for, its `seed`."""
  if words == GENERATE:
    from jax_videoreason import plan

    vbvr = importlib.import_module("jax_videoreason.cli.vbvr")
    cli.required(flags, "data")
    data, chosen, job = vbvr.asked(flags)
    model = plan.model(chosen.checkpoint).parts
    vbvr.generate.check(chosen, job, model, redo=False, seats=seats)
    return vbvr.jobs.work(chosen, data, job, seats)
  if words == [RUN, run.ALL]:
    return studies(flags)
  if words[:1] == [RUN]:
    from jax_videoreason.experiments import find

    return [run.planned(find(words[1]), cli.resolved(flags))]
  return whole(cli.resolved(flags), flags.runs, seats)


def whole(config: dict[str, Any], asked: int | None, seats: int) -> "list[Work]":
  """A sample, or a sweep, edit by edit, where the config has cases.

  asked: runs together, None = of the config. seats: for which a sample's batches are filled up.
  """
  from jax_videoreason import costs, factors, plan, runs, settings

  own = {key: config.pop(key) for key in factors.KEYS if key in config}
  chosen = settings.from_config(config)
  if own:
    if lacking := [key for key in factors.KEYS if key not in own]:
      raise cli.UsageError(
        f"the config has {', '.join(own)} and no {', '.join(lacking)}: say `plan sweep`, which "
        "completes it, or leave the former out to plan a sample."
      )
    wanted = factors.varied(own)
    factors.check(chosen, wanted)
    factors.check_seats(wanted, len(chosen.seeds), seats)
    units, together = factors.cut(wanted, len(chosen.seeds))
    problems = factors.problems(chosen, wanted)
    made = videos = units // len(wanted.edits) * together
  else:
    videos = max(len(chosen.seeds), asked or 0)
    batch = asked or chosen.batch
    problem = plan.Problem(
      model=plan.model(chosen.checkpoint),
      chosen=chosen,
      runs=runs.computed(min(batch or videos, videos), None, seats),
    )
    problems, made = {"all": problem}, runs.computed(videos, batch, seats)
  return [
    costs.Work(
      name=name,
      problem=problem,
      videos=videos,
      evaluations=problem.sizes.S * problem.sizes.G * made,
    )
    for name, problem in problems.items()
  ]


def studies(flags: FlagValues) -> "list[Work]":
  """Every study, as `run all` with these options carries it out."""
  module = importlib.import_module(__name__)
  found = []
  for place, asked, more in run.every_study(flags):
    own, _ = cli.parse(module, [RUN, asked.name, *flags.config.words[1:], *more])
    work = run.planned(asked, cli.resolved(own))
    found.append(dataclasses.replace(work, name=place))
  return found
