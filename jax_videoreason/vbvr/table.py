"""Scores side by side: systems, published rows, and differences with intervals.

All systems of a table answered the same questions by the same scorers. Results of one model with
several seeds become one row: seeds of a sample are averaged first. Results whose settings nobody
knows stay apart, whatever they are called. Two intervals stand beside a
difference: tasks drawn anew (what other tasks of this kind might say), and samples drawn anew (what
other samples of these tasks might say).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason import stats
from jax_videoreason.stats import SEED
from jax_videoreason.vbvr import baselines, published, samples, scores
from jax_videoreason.vbvr.published import COLUMNS

BRIEF = 24  # letters of a setting where rows are told apart
MAIN = ("overall", "in-domain", "out-of-domain")
FACULTY_COLUMNS = tuple(column for column in COLUMNS if column not in MAIN)

READ = (  # what is read of a result
  *("name", "model", "seed", "baseline", "deviations", "settings", "benchmark", "data", "tasks"),
  *("whole", "expected", "broken", "evalkit", "version", "samples"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class System:
  """What one row of the table is made of.

  rows: key -> the sample's row, its score averaged over `seeds`, in `each` that of every folder;
  samples without a score are left out. baseline: its name, None = a model. lacking: how many
  samples have no score. deviations: from the official run; None = nobody knows. settings: of the
  videos, empty where nobody knows. made: how these came about (`videos.made_by`), each way once.
  folders: of the results. seeds: in their order.
  """

  name: str
  baseline: str | None
  seeds: tuple[int, ...]
  rows: Mapping[str, Mapping[str, Any]]
  lacking: int
  broken: int
  deviations: tuple[str, ...] | None
  settings: Mapping[str, Any]
  made: tuple[Mapping[str, Any], ...]
  folders: tuple[Path, ...]


def find(places: Sequence[str | Path]) -> list[Path]:
  """The folders of results: those given, or all inside a folder given; each once.

  Raises ValueError where there are none.
  """
  found: dict[Path, Path] = {}
  for place in map(Path, places):
    folder = place.parent if place.name == scores.RESULT else place
    inner = [folder] if (folder / scores.RESULT).is_file() else []
    if not inner and folder.is_dir():
      inner = sorted(path.parent for path in folder.glob(f"*/{scores.RESULT}"))
    if not inner:
      raise ValueError(f"{place} holds no {scores.RESULT}: give the --out of `vbvr score`.")
    for path in inner:
      found.setdefault(path.resolve(), path)
  return list(found.values())


def load(places: Sequence[str | Path]) -> tuple[list[System], dict[str, Any]]:
  """The systems of a table, models first, and what they share: benchmark, data, scorers.

  Raises:
    ValueError: no results, results of different data, scorers or formats, or two of one name that
      lie in folders of one name.
  """
  folders = find(places)
  results = [_read(folder) for folder in folders]
  for folder, result in zip(folders, results, strict=True):
    for key, words in (
      ("data", "other data"),
      ("evalkit", "another EvalKit or other packages"),
      ("version", "another version of jax_videoreason"),
      ("scoring", "another version of the tasks' rules"),
      ("task_sources", "other code of its own tasks"),
    ):
      if result.get(key) != results[0].get(key):
        raise ValueError(
          f"{folder} was scored with {words} than {folders[0]}: scores stand in one table only if "
          "they are of the same samples and scorers."
        )
  systems = _told_apart(
    [
      _joined([results[i] for i in group], [folders[i] for i in group])
      for group in _grouped(results)
    ]
  )
  order = list(baselines.CLIPS)
  systems.sort(key=lambda s: -1 if s.baseline is None else order.index(s.baseline))
  shared = {key: results[0][key] for key in ("benchmark", "data", "evalkit", "version", "tasks")}
  whole = all(result["whole"] for result in results)
  return systems, {**shared, "samples": results[0]["expected"], "whole": whole}


def _read(folder: Path) -> dict[str, Any]:
  """A result; ValueError: it is of another format, or damaged."""
  if scores.read_result(folder).get("format") != scores.FORMAT:
    raise ValueError(f"{folder / scores.RESULT} is of another version: score it again.")
  return scores.read_result(folder, *READ)


def _grouped(results: Sequence[Mapping[str, Any]]) -> list[list[int]]:
  """Which results make a row: several seeds of one model at the same settings, or the same clips
  that no model made; all others stand alone."""
  groups: dict[tuple[str, str], list[int]] = {}
  for number, result in enumerate(results):
    settings = _shared(result["settings"])
    groups.setdefault((result["model"], repr(settings)), []).append(number)
  rows = []
  for group in groups.values():
    seeds = {results[i]["seed"] for i in group} - {None}
    joined = results[group[0]]["baseline"] is not None or len(seeds) == len(group)
    rows += [group] if joined else [[i] for i in group]
  return rows


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that the seeds of a model share."""
  return {key: value for key, value in settings.items() if key not in ("seed", "deviations")}


def _told_apart(systems: Sequence[System]) -> list[System]:
  """Where several have one name, each has that of the folder it lies in before its own: that of its
  folder, or of the model where it is several seeds."""
  names = [system.name for system in systems]

  def placed(system: System) -> str:
    folder = system.folders[0].resolve()
    own = folder.name if len(system.folders) == 1 else system.name
    return f"{folder.parent.name}/{own}"

  made = [
    dataclasses.replace(system, name=placed(system)) if names.count(system.name) > 1 else system
    for system in systems
  ]
  first: dict[str, System] = {}
  for system in made:
    other = first.setdefault(system.name, system)
    if other is not system:
      raise ValueError(
        f"{other.folders[0]} and {system.folders[0]} are both called {system.name!r}: rename one "
        "of the folders that they lie in."
      )
  return made


def _joined(results: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> System:
  """One system of the results of a model with several seeds; a sample needs a score of each."""
  of_key: dict[str, list[Mapping[str, Any]]] = {}
  for result in results:
    for row in result["samples"]:
      if row["error"] is None:
        of_key.setdefault(row["key"], []).append(row)
  rows = {}
  for key, group in of_key.items():
    if len(group) == len(results):
      means = {
        n: float(np.mean([r[n] for r in group])) for n in ("score", "strict") if n in group[0]
      }
      rows[key] = {**group[0], **means, "each": [row["score"] for row in group]}
  first = results[0]
  said = [result["deviations"] for result in results]
  made = [result.get("made") for result in results]  # older results have none
  seeds = [result["seed"] for result in results if result["seed"] is not None]
  return System(
    name=first["model"] if len(results) > 1 else first["name"],
    baseline=first["baseline"],
    seeds=tuple(seeds),
    rows=rows,
    lacking=first["expected"] - len(rows),
    broken=sum(len(result["broken"]) for result in results),
    deviations=None if None in said else tuple(sorted({w for words in said for w in words})),
    settings=_shared(first["settings"]),
    made=tuple(how for i, how in enumerate(made) if how and how not in made[:i]),
    folders=tuple(folders),
  )


# Numbers


def table(systems: Sequence[System], shared: Mapping[str, Any]) -> dict[str, Any]:
  """All numbers of the table, as JSON can say them."""
  truth = next((s for s in systems if s.baseline == baselines.TRUTH), None)
  rows = published.BENCH if shared["benchmark"] == samples.BENCH else {}
  return {
    **shared,
    "systems": [{**said(system, truth), "apart": apart(system, systems)} for system in systems],
    "published": [{"name": name, "scores": found} for name, found in rows.items()],
    "differences": [difference(a, b) for a, b in compared(systems)],
    "by_task": by_task(systems),
  }


def said(system: System, truth: System | None) -> dict[str, Any]:
  """A row of the table; of_truth: its score divided by that of the ground truth, same samples."""
  columns = {}
  for column in COLUMNS:
    own = [row for row in system.rows.values() if scores.in_column(row, column)]
    if own:
      columns[column] = {**over_tasks(own), "of_truth": None}
      if truth is not None:
        ceiling = [truth.rows[row["key"]]["score"] for row in own if row["key"] in truth.rows]
        if len(ceiling) == len(own) and sum(ceiling) > 0:
          columns[column]["of_truth"] = sum(row["score"] for row in own) / sum(ceiling)
  strict = [row["strict"] for row in system.rows.values() if "strict" in row]
  return {
    "name": system.name,
    "baseline": system.baseline,
    "words": baselines.CLIPS[system.baseline][1] if system.baseline else None,
    "seeds": sorted(system.seeds),
    "of_seed": of_seed(system),
    "settings": dict(system.settings),
    "made": list(system.made),
    "lacking": system.lacking,
    "broken": system.broken,
    "deviations": None if system.deviations is None else list(system.deviations),
    "strict": float(np.mean(strict)) if len(strict) == len(system.rows) > 0 else None,
    "scores": columns,
  }


def of_seed(system: System) -> dict[str, float]:
  """The mean over samples of each seed, in the order of the seeds."""
  scores = np.array([row["each"] for row in system.rows.values()])
  if not len(scores) or len(system.seeds) != scores.shape[1]:
    return {}
  means = dict(zip(system.seeds, scores.mean(0), strict=True))
  return {str(seed): float(means[seed]) for seed in sorted(means)}


def apart(system: System, systems: Sequence[System]) -> list[str]:
  """Such as "steps=20": settings of a row that are not those of every other row of its model."""
  if system.baseline is not None:
    return []
  model = system.settings.get("model")
  models = [s.settings for s in systems if s.baseline is None and s.settings]
  others = [settings for settings in models if settings.get("model") == model]
  return [
    f"{key}={brief(value)}"
    for key, value in system.settings.items()
    if key != "model" and any(other.get(key) != value for other in others)
  ]


def brief(value: Any) -> str:
  """A setting in one line: a long one, such as a checksum, is cut."""
  text = " ".join(str(value).split())
  return text if len(text) <= BRIEF else f"{text[:BRIEF]}..."


def over_tasks(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The mean over samples, with its interval over tasks: whole tasks are drawn anew."""
  found = stats.bootstrap_groups(_by_task(rows), seed=SEED)
  return {**_ends(found), "samples": len(rows), "tasks": found.cases}


def _by_task(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
  """The scores of each task."""
  of_task: dict[str, list[float]] = {}
  for row in rows:
    of_task.setdefault(f"{row['split']}/{row['task']}", []).append(row["score"])
  return [values for _, values in sorted(of_task.items())]


def _ends(found: stats.Interval) -> dict[str, Any]:
  low, high = (float(x) if np.isfinite(x) else None for x in (found.low, found.high))
  return {"estimate": float(found.estimate), "low": low, "high": high, "note": found.note}


def compared(systems: Sequence[System]) -> list[tuple[System, System]]:
  """Which pairs: every two models, and every model with every baseline."""
  models = [s for s in systems if s.baseline is None]
  pairs = list(itertools.combinations(models, 2))
  return pairs + [(m, s) for m in models for s in systems if s.baseline is not None]


def difference(a: System, b: System) -> dict[str, Any]:
  """a - b on the samples that both have, per column.

  p: two-sided, sign flips of whole tasks.
  """
  both = sorted(a.rows.keys() & b.rows.keys())
  columns = {}
  for column in COLUMNS:
    rows = [
      {**a.rows[key], "score": a.rows[key]["score"] - b.rows[key]["score"]}
      for key in both
      if scores.in_column(a.rows[key], column)
    ]
    if not rows:
      continue
    means = [sum(values) / len(values) for values in _by_task(rows)]
    p = stats.sign_flip(means, seed=SEED).p
    columns[column] = {
      **over_tasks(rows),
      "over_samples": _ends(stats.bootstrap_within(_by_task(rows), seed=SEED)),
      "p": float(p) if np.isfinite(p) else None,
    }
  return {"a": a.name, "b": b.name, "samples": len(both), "scores": columns}


def by_task(systems: Sequence[System]) -> list[dict[str, Any]]:
  """Mean scores of every system per task, in the order of domain and name; None = no score."""
  tasks: dict[tuple[str, str, str], dict[str, list[float]]] = {}
  for system in systems:
    for row in system.rows.values():
      place = (row["domain"], row["task"], row["faculty"])
      tasks.setdefault(place, {}).setdefault(system.name, []).append(row["score"])
  return [
    {
      "domain": domain,
      "task": task,
      "faculty": faculty,
      "scores": {s.name: float(np.mean(of[s.name])) if s.name in of else None for s in systems},
    }
    for (domain, task, faculty), of in sorted(tasks.items())
  ]


# Words


def number(found: Mapping[str, Any] | None) -> str:
  """Such as "0.610 [0.500, 0.720]"."""
  return stats.spell(found, digits=3)


def remarks(row: Mapping[str, Any]) -> str:
  """What has to be known beside a system's numbers."""
  said = []
  if row["baseline"] is not None:
    said.append(row["words"])
  elif row["deviations"] is None:
    said.append("settings unknown")
  elif row["deviations"]:
    said.append(f"not the official setting: {'; '.join(row['deviations'])}")
  if len(row["of_seed"]) > 1:
    each = (f"{seed} ({score:.3f})" for seed, score in row["of_seed"].items())
    said.append(f"mean of seeds {', '.join(each)}")
  if row["lacking"]:
    said.append(f"PARTIAL: {row['lacking']} samples without a score are left out")
  if row["broken"]:
    said.append(f"{row['broken']} videos are not finite")
  return "; ".join(said)


def noted(row: Mapping[str, Any]) -> str:
  """What tells a system from others of its name, and what has to be known beside its numbers."""
  return "; ".join(filter(None, (", ".join(row["apart"]), remarks(row))))


def scope(made: Mapping[str, Any]) -> str:
  """What was scored, by what: the line above every table."""
  kit = made["evalkit"]
  by = []
  if kit is not None:
    commit = f"commit {kit['commit']}" if kit["commit"] else f"other files {kit['digest'][:12]}"
    opencv = kit["versions"].get("opencv-python-headless", "unknown")
    by.append(f"EvalKit {kit['entry']}, {commit}, OpenCV {opencv}")
  if made["benchmark"] in (samples.OWN, samples.MIXED):
    by.append(f"scorers of jax_videoreason {made['version']}")
  part = "" if made["whole"] or made["benchmark"] == samples.OWN else " (not the whole benchmark)"
  count = f"{made['samples']} samples of {made['tasks']} tasks{part}"
  return f"{made['benchmark']}, {count}; {'; '.join(by)}"


def how_made(row: Mapping[str, Any]) -> list[str]:
  """Settings, seeds, commands, dates and devices of a model, a line each; nothing of a baseline."""
  if row["baseline"] is not None:
    return []
  settings = (f"{k}={' '.join(str(v).split())}" for k, v in row["settings"].items())
  said = [f"{row['name']}: {', '.join(settings) or 'settings unknown'}"]
  if row["of_seed"]:
    each = (f"{seed}: {score:.3f}" for seed, score in row["of_seed"].items())
    said.append(f"{row['name']}: overall of each seed: {', '.join(each)}")
  for made in row["made"]:
    command = " ".join(" ".join(made["command"]).split())
    words = f"{command} on {made['written']}, {made['device']}"
    version = f"jax_videoreason {made['versions']['jax_videoreason']}"
    revision = f", revision {made['revision'][:12]}" if made["revision"] else ""
    said.append(f"{row['name']}: {words}, {version}{revision}")
  return said


_LATEX = {
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  **{c: f"\\{c}" for c in "&%$#_{}"},
}


def escaped(text: str) -> str:
  """Text as LaTeX takes it."""
  return "".join(_LATEX.get(character, character) for character in text)


def latex(made: Mapping[str, Any]) -> str:
  """The table as LaTeX that needs no package; published rows carry a dagger."""
  short = {"overall": "All", "in-domain": "ID", "out-of-domain": "OOD"}
  heads = [short.get(column) or column.rpartition(" ")[2][:5] + "." for column in COLUMNS]
  lines = [
    f"% {escaped(scope(made))}",
    *(f"% {line}" for row in made["systems"] for line in how_made(row)),
    rf"\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}",
    r"\hline",
    " & ".join(["System", *heads]) + r" \\",
    r"\hline",
  ]
  notes = []
  for row in made["systems"]:
    # pdflatex ends at many other letters, as of a negative prompt; the comments above have them all
    plain = [setting for setting in row["apart"] if setting.isascii()]
    words = noted({**row, "apart": plain})
    mark = ""
    if words and row["baseline"] is None:
      notes.append(words)
      mark = rf"$^{{{len(notes)}}}$"
    cells = [_cell(row["scores"].get(column)) for column in COLUMNS]
    lines.append(" & ".join([escaped(row["name"]) + mark, *cells]) + r" \\")
  if made["published"]:
    lines.append(r"\hline")
  for row in made["published"]:
    values = [row["scores"].get(column) for column in COLUMNS]
    cells = ["--" if value is None else f"{value:.3f}".lstrip("0") for value in values]
    lines.append(" & ".join([escaped(row["name"]) + r"$^\dagger$", *cells]) + r" \\")
  lines += [r"\hline", r"\end{tabular}"]
  lines += [rf"\par $^{{{i}}}$ {escaped(words)}." for i, words in enumerate(notes, 1)]
  if made["published"]:
    lines.append(r"\par $^\dagger$ As published; not computed here, perhaps by other scorers.")
  return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any] | None) -> str:
  return "--" if found is None else f"{found['estimate']:.3f}".lstrip("0") or "0"
