"""VBVR-Bench: videos of a model, official scores, and what they are worth. docs/vbvr.md says more.

  videoreason vbvr generate --data VBVR-Bench --config vbvr_wan22 --out videos
  videoreason vbvr score --setup
  videoreason vbvr score --evalkit VBVR-EvalKit --data VBVR-Bench --videos videos --out scores
  videoreason vbvr table scores --out table
  videoreason vbvr baselines --data VBVR-Bench --out clips
  videoreason vbvr audit --evalkit VBVR-EvalKit --data VBVR-Bench --out audit

--data is the folder of VBVR-Bench or VBVR-Pro-Bench, or of `videoreason tasks export`, whose cases
our own scorers read, without the EvalKit. generate --dry-run says what it will cost. generate and
score go on where they stopped when the same command is given again.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl.flags import (
  DEFINE_bool,
  DEFINE_enum,
  DEFINE_float,
  DEFINE_integer,
  DEFINE_list,
  DEFINE_string,
  FlagValues,
)

from jax_videoreason import (
  bundles,
  cli,
  console,
  costs,
  distributed,
  folders,
  plan,
  records,
  settings,
  sharding,
  stats,
)
from jax_videoreason.vbvr import (
  audit,
  baselines,
  evalkit,
  generate,
  jobs,
  maps,
  page,
  samples,
  scores,
  suite,
  table,
  videos,
)

WORDS = 100
CARD = "gpu:141GB"  # for which `generate` says its cost; `plan vbvr generate` takes others
DATA = ("data", "out", "split", "tasks", "cases")
KIT = ("evalkit", "environment", "setup", "other-evalkit", "limit", "workers", "allow-partial")
KIT_OF = "score, audit:"  # the words that take these
OWN_KEYS = ("seeds",)
LISTS = ("split", "tasks", "seeds", "clips")  # none of which stands for none
MADE = ("table.json", "table.tex", "report.html")


def define(flags: FlagValues) -> None:
  cli.define_config(flags, "mini")
  define_generate(flags)
  DEFINE_string("out", None, "folder to write", flag_values=flags)
  DEFINE_bool("redo", False, "do it again and replace what is in --out", flag_values=flags)
  DEFINE_bool("dry-run", False, "generate: say what it will cost, and stop", flag_values=flags)
  DEFINE_string(
    "mesh",
    None,
    "generate: of the devices of each process, as fsdp=2,context=2; without it one device",
    flag_values=flags,
  )
  cli.define_room(flags)
  DEFINE_string("videos", None, "score: --out of generate, or a model's in it", flag_values=flags)
  DEFINE_string(
    "evalkit", None, f"{KIT_OF} the folder of the official VBVR-EvalKit", flag_values=flags
  )
  DEFINE_string(
    "environment", None, f"{KIT_OF} virtual environment of the EvalKit", flag_values=flags
  )
  DEFINE_bool("setup", False, f"{KIT_OF} make that environment first", flag_values=flags)
  DEFINE_bool(
    "other-evalkit", False, f"{KIT_OF} take another version, and say so", flag_values=flags
  )
  DEFINE_float(
    "limit", evalkit.LIMIT, f"{KIT_OF} seconds a sample may take", 0.01, flag_values=flags
  )
  DEFINE_integer("workers", os.cpu_count() or 1, f"{KIT_OF} samples at once", 1, flag_values=flags)
  DEFINE_bool(
    "allow-partial", False, f"{KIT_OF} report what there is, and what lacks", flag_values=flags
  )
  DEFINE_list("beside", [baselines.STATIC], "score: clips scored too", flag_values=flags)
  DEFINE_list("clips", list(baselines.CLIPS), "baselines: which", flag_values=flags)


def define_generate(flags: FlagValues) -> None:
  """What `vbvr generate` is asked, and `plan vbvr generate`."""
  DEFINE_string("data", None, "the benchmark's folder", flag_values=flags)
  DEFINE_list("split", [], "of in-domain,out-of-domain; without it all", flag_values=flags)
  DEFINE_list("tasks", [], "as O-39,G-3 or whole names; without it all", flag_values=flags)
  DEFINE_integer("cases", None, "samples of each task at most", lower_bound=1, flag_values=flags)
  DEFINE_list("seeds", ["1"], "generate: a folder of videos for each", flag_values=flags)
  DEFINE_string("name", None, "generate: of the folder; without it the model's", flag_values=flags)
  DEFINE_integer(
    "max-area",
    None,
    "generate: pixels of a frame at most (not the official setting)",
    lower_bound=1,
    flag_values=flags,
  )
  DEFINE_integer(
    "frames",
    None,
    "generate: of every video, 1 + 4k (not the official setting)",
    lower_bound=5,
    flag_values=flags,
  )
  DEFINE_enum(
    "ensemble",
    jobs.NONE,
    [jobs.NONE, jobs.PAPER],
    "generate: paper averages three seeds in the middle layers of the first step",
    flag_values=flags,
  )
  DEFINE_list("keep-steps", [], "generate: steps kept as step_000.mp4", flag_values=flags)
  DEFINE_list(
    "token-layers",
    [],
    "generate: as 0,10,20,30,39, maps of the tokens after these layers at the steps kept",
    flag_values=flags,
  )
  DEFINE_string("part", "1/1", "generate: 2/4 makes the second of four parts", flag_values=flags)


def takes(words: Sequence[str]) -> Sequence[str]:
  """The options of the word that is named, else of all."""
  named = [word for word in words[:1] if word in COMMANDS]
  return [name for word in named or COMMANDS for name in COMMANDS[word][1]]


def main(flags: FlagValues, words: list[str]) -> None:
  word, *rest = words or ["?"]
  if word not in COMMANDS:
    raise cli.UsageError(f"vbvr {word}: say videoreason vbvr {', '.join(COMMANDS)}.")
  run, known = COMMANDS[word]
  given = [n for n in flags if flags[n].present and n.partition(".")[0] not in known]
  if given:
    raise cli.UsageError(f"vbvr {word} takes no --{given[0]}; --help says more.")
  if rest and word != "table":
    raise cli.UsageError(f"unexpected word {rest[0]!r}: options begin with --.")
  run(flags, [cli.typed_path(word, "RESULT") for word in rest])


# The commands


def run_generate(flags: FlagValues, _: Sequence[str]) -> None:
  dry = bool(flags["dry-run"].value)
  cli.required(flags, "data", *([] if dry else ["out"]))
  process = (0, 1) if dry else distributed.initialize()
  data, chosen, job = asked(flags)
  cli.check_experts(flags, len(plan.model(chosen.checkpoint).experts))
  mesh = None if dry else sharding.mesh_here(flags.mesh)
  name = chosen.checkpoint  # only a dry run takes one that is not here yet
  model = plan.model(name).parts if dry else bundles.describe(name).modules
  seats = 1 if flags.mesh is None else sharding.axes_of(flags.mesh)["seed"]
  generate.check(chosen, job, model, redo=flags.redo, seats=seats)  # before a bar begins
  cost = costs.totals(jobs.work(chosen, data, job, seats), plan.target(CARD))
  console.say(f"{data.name}, {len(data.samples)} samples: {cost}")
  if dry:
    return
  total = len(data.samples) * len(job.seeds) * chosen.steps // (job.part[1] * process[1])
  with console.progress(total, "denoise", "step") as advance:
    made = generate.generate(
      flags.out,
      chosen,
      data,
      job,
      command=cli.typed(),
      redo=flags.redo,
      process=process,
      meet=distributed.meet,
      mesh=mesh,
      guidance="sequential" if flags.sequential else "parallel",
      experts=flags.experts,
      draw=maps.draw,
      advance=advance,
    )
  for folder in made:
    console.say(f"videos: {folder.resolve()}")
    said = records.read_json(folder / "generation.json")["deviations"]
    if said:
      console.say(f"  not the official setting: {'; '.join(said)}.")


def run_score(flags: FlagValues, _: Sequence[str]) -> None:
  if flags.setup:
    evalkit.setup(environment(flags))
    console.say(f"environment of the EvalKit: {environment(flags).resolve()}")
    if flags.data is None:
      return
  cli.required(flags, "data", "videos", "out")
  data, systems = load(flags), scores.systems_of(flags.videos)
  kit = toolkit(flags, data)
  clips = [name for name in flags.beside if name]
  baselines.check_beside(systems, clips)
  made = write_clips(Path(flags.out) / videos.CLIPS, data, clips)
  systems |= {folder.name: folder for folder in made}
  scored(flags, data, systems, kit)
  for name, result in table_of(flags.out, systems)[0].items():
    for key in result["missing"]:
      console.say(f"{name}: {key} has no video.")
    for error in result["errors"]:
      console.say(f"{name}: {error['key']}: {error['error']}.")


def run_table(flags: FlagValues, words: Sequence[str]) -> None:
  if not words:
    raise cli.UsageError("no results given: videoreason vbvr table RESULT... --out DIR.")
  systems, shared = table.load(words)
  made = table.table(systems, shared)
  show(made)
  if flags.out is None:
    return
  out = Path(flags.out)
  if flags.redo and out.is_dir():
    names = [path.name for path in out.iterdir()]
    folders.replaceable(names, MADE, marks=["table.json"], what="table", folder=out)
  with folders.whole(out, what="table", owned=MADE.__contains__, redo=flags.redo) as folder:
    records.write_json(folder / "table.json", records.plain(made))
    with folders.atomic(folder / "table.tex") as file:
      file.write_text(table.latex(made), encoding="utf-8")
    page.render(folder, made, systems)
  console.say(f"report: {(out / 'report.html').resolve().as_uri()}")


def run_baselines(flags: FlagValues, _: Sequence[str]) -> None:
  cli.required(flags, "data", "out")
  for folder in write_clips(Path(flags.out), load(flags), flags.clips, redo=flags.redo):
    console.say(f"videos: {folder.resolve()}")


def run_audit(flags: FlagValues, _: Sequence[str]) -> None:
  cli.required(flags, "data", "out")
  out, data = Path(flags.out), load(flags)
  kit = toolkit(flags, data)
  made = write_clips(out / videos.CLIPS, data, audit.CLIPS)
  systems = {folder.name: folder for folder in made}
  scored(flags, data, systems, kit)
  found = audit.audit(table_of(out, systems)[1]["by_task"])
  records.write_json(out / "audit.json", records.plain(found))
  console.table(
    "mean score of clips that no model made",
    ("task", *audit.CLIPS, "can't tell, or gives away"),
    [
      (short(row["task"]), *(cell(row["scores"].get(c)) for c in audit.CLIPS), said(row["faults"]))
      for row in found["tasks"]
    ],
  )
  for kind, count in found["counts"].items():
    console.say(f"{count} of {len(found['tasks'])} tasks: {audit.WORDS[kind]}.")


COMMANDS: dict[str, tuple[Callable[[FlagValues, Sequence[str]], None], tuple[str, ...]]] = {
  "generate": (
    run_generate,
    (
      *DATA,
      *("config", "checkpoint", "redo", "seeds", "name", "max-area", "frames", "ensemble"),
      *("keep-steps", "token-layers", "mesh", "sequential", "experts", "part", "dry-run"),
    ),
  ),
  "score": (run_score, (*DATA, *KIT, "videos", "beside")),
  "table": (run_table, ("out", "redo")),
  "baselines": (run_baselines, (*DATA, "redo", "clips")),
  "audit": (run_audit, (*DATA, *KIT)),
}


# What they share


def load(flags: FlagValues) -> samples.Data:
  """The data of the flags; says which tasks of the benchmark are not there.

  UsageError: one of `LISTS` has an empty place.
  """
  for name in LISTS:
    given = flags[name].value if name in flags and flags[name].present else None
    if given is not None and not all(given or [""]):
      raise cli.UsageError(
        f"--{name}={','.join(given)} has an empty place, wanted values as one,two: "
        f"fill it, or leave --{name} out."
      )
  data = samples.load(flags.data, splits=flags.split, names=flags.tasks, cases=flags.cases)
  if data.absent and not flags.tasks:
    missed = samples.listing(data.absent)
    console.say(f"{len(data.absent)} tasks of the benchmark are not there: {missed}.")
  return data


def asked(flags: FlagValues) -> tuple[samples.Data, settings.SampleSettings, jobs.Job]:
  """What `generate` is to make."""
  data = load(flags)
  chosen = settings.from_config({**cli.resolved(flags), "seeds": [0]})
  job = jobs.Job(
    name=flags.name,
    seeds=tuple(cli.numbers("seeds", flags.seeds)),
    max_area=flags["max-area"].value,
    frames=flags.frames,
    ensemble=flags.ensemble,
    steps=tuple(sorted(cli.numbers("keep-steps", flags["keep-steps"].value or []))),
    layers=tuple(sorted(cli.numbers("token-layers", flags["token-layers"].value or []))),
    part=part(flags.part),
  )
  return data, chosen, job


def part(text: str) -> tuple[int, int]:
  """(i, n) of "i/n", i counted from 1 in the text and from 0 in what is returned."""
  first, _, count = text.partition("/")
  if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
    raise cli.UsageError(f"--part={text}, wanted one of several, as 2/4.")
  return int(first) - 1, int(count)


def environment(flags: FlagValues) -> Path:
  return Path(flags.environment) if flags.environment else evalkit.default_environment()


def write_clips(
  out: Path, data: samples.Data, names: Sequence[str], *, redo: bool = False
) -> list[Path]:
  baselines.check(names)
  with console.progress(len(data.samples) * len(names), "write", "clip") as advance:
    return baselines.write(out, data, names, redo=redo, advance=advance)


def toolkit(flags: FlagValues, data: samples.Data) -> evalkit.EvalKit | None:
  """The EvalKit, if the data needs it; whatever is wrong with either is said before any work."""
  if not scores.scorable(data):
    return None
  cli.required(flags, "evalkit")
  return evalkit.open_evalkit(
    flags.evalkit, environment(flags), other=bool(flags["other-evalkit"].value)
  )


def scored(
  flags: FlagValues,
  data: samples.Data,
  systems: Mapping[str, Path],
  kit: evalkit.EvalKit | None,
) -> None:
  """Scores into --out."""
  with console.progress(len(systems) * len(data.samples), "score", "sample") as advance:
    scores.score(
      flags.out,
      data,
      systems,
      kit,
      limit=flags.limit,
      workers=flags.workers,
      allow_partial=bool(flags["allow-partial"].value),
      command=cli.typed(),
      advance=advance,
    )


def table_of(
  out: str | Path, systems: Mapping[str, Path]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
  """What was just scored: result.json of each, and their table, which is shown."""
  places = [Path(out) / name for name in systems]
  made = table.table(*table.load(places))
  show(made)
  return {place.name: records.read_json(place / scores.RESULT) for place in places}, made


# What they show


def show(made: Mapping[str, Any]) -> None:
  """The table in the terminal."""
  console.say(table.scope(made))
  strict = any(row["strict"] is not None for row in made["systems"])
  rows = []
  for row in made["systems"]:
    of_truth = row["scores"].get("overall", {}).get("of_truth")
    main = [table.number(row["scores"].get(column)) for column in table.MAIN]
    rows.append((row["name"], *main, cell(of_truth), *([cell(row["strict"])] if strict else [])))
  heads = ("system", *table.MAIN, "of truth", *(["strict"] if strict else []))
  console.table("mean score, 95% interval over tasks", heads, rows)
  if made["published"]:
    rows = [
      (row["name"], *(cell(row["scores"].get(column)) for column in table.MAIN))
      for row in made["published"]
    ]
    title = "published, of all 500 samples; not computed here"
    console.table(title, ("system", *table.MAIN), rows)
  for domain in table.MAIN[1:]:
    columns = [
      c
      for c in table.FACULTY_COLUMNS
      if c.startswith(f"{domain} ") and any(c in row["scores"] for row in made["systems"])
    ]
    if not columns:
      continue
    rows = [
      (row["name"], *(cell(row["scores"].get(c, {}).get("estimate")) for c in columns))
      for row in made["systems"]
    ]
    heads = ("system", *(c.rpartition(" ")[2] for c in columns))
    console.table(domain, heads, rows)
  if made["differences"]:
    console.table(
      "overall differences, sample by sample",
      ("difference", "estimate", "95% over tasks", "95% over samples", "p"),
      [
        (f"{row['a']} - {row['b']}", *differs(row["scores"]["overall"]))
        for row in made["differences"]
        if "overall" in row["scores"]
      ],
    )
  for row in made["systems"]:
    if table.noted(row) and (row["baseline"] is None or row["lacking"] or row["broken"]):
      console.say(f"{row['name']}: {table.noted(row)}.")


def short(task: str) -> str:
  """G-18, of an official task; our own keep their names."""
  return task.partition("_")[0] if task in suite.OFFICIAL else task


def said(words: Sequence[str]) -> str:
  return ", ".join(words) or "-"


def cell(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"


def differs(found: Mapping[str, Any]) -> tuple[str, str, str, str]:
  """Estimate, both intervals and p of a difference."""

  def ends(of: Mapping[str, Any]) -> str:
    return "-" if of["low"] is None else f"{of['low']:+.3f} to {of['high']:+.3f}"

  intervals = ends(found), ends(found["over_samples"])
  return f"{found['estimate']:+.3f}", *intervals, stats.chance(found["p"])
