"""Carries out an experiment, or all of them, and leaves arrays, intervals and a page.

  videoreason run noise --config mini --out runs/noise
  videoreason run noise --preset quick --config.cases=4 --config.experiment.stride=4 --out ...
  videoreason run all --preset full --out runs/claims
  videoreason run ensemble --preset paper --config vbvr_wan22 --out runs/ensemble
  videoreason run mymodule:my_experiment --out runs/mine
  videoreason run noise --config wan22_i2v_a14b:height=480,width=480 --mesh context=4 --out ...

A preset sets cases, seeds, steps, batch and more of a study, whatever the file of the config says
of them; what is typed is kept, as --config mini:steps=3,seeds=2 or --config.steps=3.

Interrupted, the same command goes on where it stopped; finished, it says so, unless --redo. A
result that is damaged is done again.
"""

import dataclasses
import hashlib
import importlib
import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl.flags import DEFINE_string, FlagValues

from jax_videoreason import cli

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from jax_videoreason.costs import Work
  from jax_videoreason.experiments import Study

WORDS = 1
ALL = "all"
PRESETS = ("quick", "full")
SHIPPED = "mini"
CHUNKS = "chunks"
KEYS = ("split", "tasks", "cases", "decoder", "experiment", "words")  # of a study's config
OWNED = ("manifest.json", "result.json", "arrays.zarr", "figures", "report.html", CHUNKS)


def define(flags: FlagValues) -> None:
  cli.define_config(flags, "mini")
  cli.define_out(flags, goes_on=True)
  DEFINE_string(
    "preset",
    "quick",
    "size of the study, in place of what a config file says: quick, full, or paper (ensemble)",
    flag_values=flags,
  )
  cli.define_mesh(flags)


def told(words: Sequence[str]) -> str:
  """The studies with their questions; of one that is named, its question and its options."""
  from jax_videoreason.experiments import EXPERIMENTS, find

  name = _name(words)
  if name in (None, ALL):
    lines = ["The studies; videoreason run NAME --help has the options of each:"]
    for study in EXPERIMENTS.values():
      lines.append(_wrapped(f"{study.name:<16}{study.question}", 18))
    return "\n".join(lines)
  study = find(name)
  lines = [_wrapped(f"{study.name}: {study.question}", 2), ""]
  if not study.options:
    return "\n".join([*lines, "It has no options of its own."])
  lines.append("Its options, as --config.experiment.KEY=VALUE, and what they are without a preset:")
  lines += [f"  {key}={value!r}" for key, value in study.options.items()]
  return "\n".join(lines)


def _wrapped(text: str, indent: int) -> str:
  """Lines of a help text, two spaces in, those after the first so many."""
  return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent=" " * indent)


def _name(words: Sequence[str]) -> str | None:
  """The study that is named, which comes first."""
  return words[0] if words and not words[0].startswith("-") else None


def complete(config: "ConfigDict", words: Sequence[str]) -> "ConfigDict":
  """The config with the keys of a study in it.

  A value is that of the argument, else of the preset, else of the file, else of the study.
  """
  from ml_collections import ConfigDict, config_dict

  from jax_videoreason.experiments import EXPERIMENTS, find

  name = _name(words)
  if name is None:
    raise cli.UsageError(
      "no experiment named: videoreason run NAME --out DIR, or run all; NAME is one of "
      f"{', '.join(EXPERIMENTS)}, or module:function."
    )
  preset = _preset(words)
  study = None if name == ALL else find(name)
  try:
    presets = _presets().get(preset, study.name if study is not None and study.shipped else "")
  except KeyError as error:
    also = " (and paper for ensemble)" if preset == "paper" else ""
    raise cli.UsageError(f"--preset={preset}, wanted {' or '.join(PRESETS)}{also}.") from error
  typed = importlib.import_module("jax_videoreason.configs.common").named(cli.typed_argument(words))
  own = presets.pop("experiment", {})
  plain = {"split": "id", "tasks": study.tasks if study else (), "cases": 8, "decoder": "auto"}
  with config.unlocked():
    config.words = tuple(words)
    for key, value in {**plain, **presets}.items():
      if key not in config or (key in presets and key not in typed):
        config[key] = value
    if study is not None:
      of_preset = {key: value for key, value in own.items() if f"experiment.{key}" not in typed}
      # a file may serve several studies: it may have what is an option of another one
      others = {name for other in EXPERIMENTS.values() for name in other.options}
      given: Any = config.get("experiment", {})
      of_file = {k: v for k, v in given.items() if k in study.options or k not in others}
      options = {**study.options, **of_file, **of_preset}
      config.experiment = ConfigDict(
        {  # None alone has a type that no value given has
          name: config_dict.placeholder(object) if value is None else value
          for name, value in options.items()
        }
      )
  return config


def _presets() -> Any:
  return importlib.import_module("jax_videoreason.configs.presets")


def _preset(words: Sequence[str]) -> str:
  found = cli.typed_option(words, "preset")
  return PRESETS[0] if found is None else found


def main(flags: FlagValues, words: list[str]) -> None:
  cli.required(flags, "out")
  from jax_videoreason.experiments import find

  if words[0] == ALL:
    every(flags.config.words[1:], Path(flags.out))
  else:
    one(find(words[0]), cli.resolved(flags), Path(flags.out), mesh=flags.mesh, redo=flags.redo)


def every(words: Sequence[str], out: Path) -> None:
  """Carries out every study into a folder of its own, then draws the table of all claims.

  A study that fails is named, and the others go on; the table says that it is missing.
  """
  from jax_videoreason import console, folders, pages
  from jax_videoreason.experiments import claims

  folders.refuse_other(out, "set of studies")
  failed, asked = {}, []
  module = importlib.import_module(__name__)
  whole, _ = cli.parse(module, [ALL, *words])
  with folders.held(out, needed=False):
    for place, study, more in every_study(whole):
      asked.append(place)
      try:
        flags, _ = cli.parse(module, [study.name, *words, *more])
        one(study, cli.resolved(flags), out / place, mesh=flags.mesh, redo=flags.redo)
      except (ValueError, RuntimeError, OSError) as error:
        failed[place] = str(error)
        console.say(f"{place}: {error}")
    rows = claims.write(out, failed, asked)
    page = pages.render_claims(out)
  console.table(
    "claims",
    ("number", "claim", "ours", "verdict"),
    [(row["number"] or "", row["says"], pages.said(row)["ours"], row["verdict"]) for row in rows],
  )
  console.say(f"report: {page.resolve().as_uri()}")
  if failed:
    raise ValueError(f"{len(failed)} studies failed: {', '.join(failed)}; the rest is in {out}.")


def every_study(flags: FlagValues) -> list[tuple[str, "Study", list[str]]]:
  """(folder, study, more words) of all studies, and of those that run on a model beside `mini`."""
  from jax_videoreason.experiments import EXPERIMENTS

  found = [(study.name, study, []) for study in EXPERIMENTS.values()]
  if cli.resolved(flags)["checkpoint"] == SHIPPED:
    for name, more in _presets().BESIDE.items():
      config = more["config"]
      asked = [f"--config.experiment.{key}={value}" for key, value in more[flags.preset].items()]
      argument = cli.typed_argument(flags.config.words)
      words = ["--config", f"{config}:{argument}", "--checkpoint", config]
      found.append((f"{name}_{config}", EXPERIMENTS[name], [*words, *asked]))
  return found


def planned(study: "Study", config: dict[str, Any]) -> "Work":
  """A study: its batches with their taps; without the identity control."""
  from jax_videoreason import costs, evaluate, plan, settings, tasks
  from jax_videoreason.experiments import setting

  config = dict(config)
  own = {key: config.pop(key) for key in KEYS}
  chosen = settings.from_config(config)
  evaluate.check(chosen)
  study.check(own["experiment"])
  setting.check_cases(own["tasks"], own["cases"])
  for name in own["tasks"]:
    tasks.find(name)
  cases = len(own["tasks"]) * own["cases"]
  size = min(chosen.batch or cases, cases)
  together = size * len(chosen.seeds) * len(study.roles)
  problem = plan.Problem(
    model=plan.model(chosen.checkpoint), chosen=chosen, runs=together, decodes="between"
  )
  sizes, options = problem.sizes, {**study.options, **own["experiment"]}
  switch = settings.boundary_of(chosen, problem.model.card) is not None
  evaluations = study.evaluations(sizes, options, -(-cases // size), switch=switch)
  return costs.Work(
    name=study.name,
    problem=dataclasses.replace(problem, taps=study.tapped(sizes, options)),
    evaluations=evaluations,
    videos=evaluations / sizes.S / sizes.G,
  )


def one(study: "Study", config: dict[str, Any], out: Path, *, mesh: str | None, redo: bool) -> None:
  """Carries out one study and draws its page; a study that lies in `out` is left as it is."""
  import jax

  from jax_videoreason import (
    bundles,
    console,
    costs,
    evaluate,
    experiments,
    folders,
    pages,
    settings,
    sharding,
    store,
    tasks,
  )
  from jax_videoreason.experiments import base, results, setting

  fault = costs.over_budget(planned(study, config))
  if fault is not None:
    raise ValueError(fault)
  asked = dict(config)
  own = {key: asked.pop(key) for key in KEYS}
  own.pop("words")
  chosen = settings.from_config(asked)
  batch = asked.pop("batch")
  laid = sharding.mesh_here(mesh)
  layout = None if laid is None else dict(laid.shape)
  source, scoring = study.source(), tasks.scoring(own["tasks"])
  code = [scoring, results.FORMAT, *([] if source is None else [source])]
  key = _key(study.name, asked, own, bundles.fingerprint(chosen.checkpoint), *code)
  of_tasks = tasks.sources(own["tasks"])
  if not redo and is_ours(out, key):
    fault = fault_of(out, key)
    if fault is None:
      console.say(f"{study.name}: {out} has it already; --redo does it again.")
      return
    console.say(f"{study.name}: {fault} is missing or damaged; done again.")
  else:
    check_out(out, redo=redo, source=source, of_tasks=of_tasks)
  with folders.held(out, needed=False):
    if redo:
      with folders.disk(out):
        folders.remove(out / CHUNKS)
    cases = setting.pick_cases(chosen, own["tasks"], own["cases"], own["split"])
    chunks = experiments.Chunks(
      folder=out / CHUNKS, of=key if layout is None else f"{key} {layout}"
    )
    left = base.batches_left(study, chosen, evaluate.load_task, cases, batch=batch, chunks=chunks)
    previews = bundles.describe(chosen.checkpoint).modules.preview is not None
    looked_at = [setting.compared(cases)] if own["decoder"] == "auto" and previews else []
    made = setting.load(chosen, laid, itertools.chain(looked_at, left))
    made, agreement = choose_reader(made, cases, own["decoder"])
    result, record, findings = experiments.perform(
      study,
      made,
      cases,
      options=own["experiment"],
      batch=batch,
      chunks=chunks,
      say=console.say,
      progress=lambda total, title: console.progress(total, title, "evaluation"),
    )
    with folders.filled(out, owned=lambda name: name in OWNED, redo=True) as folder:
      results.save(
        folder,
        result,
        {
          **record,
          "preview_agreement": agreement,
          "key": key,
          "format": results.FORMAT,
          "source": source,
          "task_sources": of_tasks,
        },
      )
      store.write_manifest(
        folder,
        config={**asked, "batch": batch, **own},
        command=cli.typed(),
        device=jax.devices()[0].device_kind,
        mesh=layout,
        model=made.bundle.card.name,
        key=key,
        evaluations=record["evaluations"],
        seconds=record["seconds"],
      )
  page = pages.render(out)
  console.table(
    study.name,
    ("claim", "estimate", "low", "high", "verdict"),
    [(f.claim.says, f.estimate, f.low, f.high, f.verdict) for f in findings],
  )
  console.say(f"report: {page.resolve().as_uri()}")
  console.say(f"in Python: jax_videoreason.open_study({str(out.resolve())!r})")


def choose_reader(made: Any, cases: Sequence[Any], decoder: str) -> tuple[Any, float | None]:
  """The setting with its decoder, and how often the preview agreed, which is printed."""
  import functools

  from jax_videoreason import console
  from jax_videoreason.decode import preview_each
  from jax_videoreason.experiments import setting

  if decoder == "vae":
    return made, None
  if decoder == "preview":
    quick = functools.partial(preview_each, made.bundle)
    return dataclasses.replace(made, decode=quick), None
  if decoder != "auto":
    raise cli.UsageError(f"decoder={decoder!r}, wanted auto, vae or preview.")
  chosen, agreement = setting.with_reader(made, cases)
  if agreement is not None:
    used = "the VAE" if chosen is made else "the preview"
    console.say(
      f"answers: preview and VAE agree on {agreement:.1%} of what can be read; read from {used}"
    )
  return chosen, agreement


def is_ours(out: Path, key: str) -> bool:
  """Whether this very command filled `out`, by its manifest, also where it is still on its way, or,
  of older versions, by its result."""
  from jax_videoreason.folders import STAGE

  manifests = (_read(place, "manifest.json") for place in (out, out / STAGE))
  return key in (*(found.get("key") for found in manifests), _record(out).get("key"))


def fault_of(out: Path, key: str) -> Path | None:
  """The file that is not what this very command left in `out`; None = all are. Reads arrays once.

  Hidden files are of others, as .DS_Store, and no damage. A stage tells of files on their way.
  """
  from jax_videoreason.folders import STAGE
  from jax_videoreason.records import vouched

  if _record(out).get("key") != key:
    return out / "result.json"
  if (out / "manifest.json").is_file() and not _read(out, "manifest.json"):
    return out / "manifest.json"
  if (out / STAGE).exists() or not (out / "arrays.zarr").is_dir():
    return out / "arrays.zarr"
  try:
    vouched(out, "arrays.zarr", lambda name: not Path(name).name.startswith("."))
  except ValueError:
    return out / "arrays.zarr"
  return None


def check_out(
  out: Path,
  *,
  redo: bool,
  source: dict[str, str] | None = None,
  of_tasks: Mapping[str, dict[str, str]] | None = None,
) -> None:
  """ValueError where `out` holds something else than an interrupted study, or with `redo` than a
  study.

  source: of the study, if it does not ship. of_tasks: of those of its tasks that do not, by name.
  """
  from jax_videoreason.experiments.results import FORMAT
  from jax_videoreason.folders import STAGE, names_in, refuse_other, replaceable

  if not out.exists():
    return
  if not out.is_dir():
    raise ValueError(f"{out} is a file, wanted a folder: choose another --out.")
  refuse_other(out, "study")
  names = names_in(out)
  if redo:
    replaceable(names, OWNED, marks=["result.json", CHUNKS], what="study", folder=out)
    return
  there = sorted(names - {CHUNKS, STAGE})
  if there:
    record, code = _record(out), ""
    tasks_before = record.get("task_sources", {})
    pairs = [(record.get("source"), source)]
    pairs += [(tasks_before.get(name), now) for name, now in (of_tasks or {}).items()]
    for before, now in pairs:
      if now is not None and before is not None and before != now:
        code = f"; it was made by other code than {now['module']} has now"
    if not code and "axes" in record and "problem_of" not in record:
      code = "; it is a study of an older version, whose intervals are over cases"
    elif not code and "axes" in record and record.get("format") != FORMAT:
      code = "; it is a study of an older version"
    raise ValueError(
      f"{out} holds something else (it has {there[0]}{code}): choose another --out, or give --redo."
    )


def _record(out: Path) -> dict[str, Any]:
  """What result.json says; nothing where it is missing or damaged."""
  return _read(out, "result.json")


def _read(out: Path, name: str) -> dict[str, Any]:
  """What a JSON file of `out` says; nothing where it is missing or damaged."""
  from jax_videoreason.records import read_mapping, vouched

  try:
    return read_mapping(vouched(out, name))
  except ValueError:
    return {}


def _key(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
