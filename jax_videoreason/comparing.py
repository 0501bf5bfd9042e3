"""An evaluation beside an earlier one: what another checkpoint, guidance, schedule or solver gains.

Clips of the model are paired by task, split, index, problem and seed, so that what is hard for both
cancels. A clip without a partner is left out, and counted: of two numbers of cases, the fewer are
among the more.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax_videoreason import scoring, tables
from jax_videoreason.evaluation import RESULT, TABLE, Evaluation, open_evaluation
from jax_videoreason.folders import held
from jax_videoreason.records import differences, plain, rewriting, write_json

PAIRED = ("task", "split", "index", "problem", "seed")
SAME = ("split", "kind", "height", "width", "frames")  # and how their tasks are scored
APART = ("tasks", "cases", "seeds", "scoring", "weights")  # keys that are no settings of the model
DIGITS = 8  # of the checksum of weights


def compare(folder: str | Path, against: str | Path) -> dict[str, Any]:
  """Sets a finished evaluation beside another finished one; returns what its result.json says.

  result.json gets `against` (`scoring.against`, what differs, how many clips have a pair), and
  every row of the model in table.parquet the score and strict success of its pair, None where
  there is none. An earlier comparison in the folder is replaced.

  Raises:
    ValueError: one is no finished evaluation, no clip of them makes a pair (`check`), or another
      command works in the folder.
    OSError: it can't be written.
  """
  before = open_evaluation(against)
  with held(folder, needed=False):
    now = open_evaluation(folder)
    check(now.asked, before)
    result, rows = paired(now, before)
    with rewriting(now.path, RESULT, TABLE):
      write_json(now.path / RESULT, result)
      tables.write(now.path / TABLE, rows)
  return result


def check(asked: Mapping[str, Any], before: Evaluation) -> None:
  """ValueError where an evaluation that asks so has no clip that makes a pair with one of before.

  asked: as `evaluate.describe` says it.
  """
  tasks = [name for name in asked["tasks"] if name in before.asked["tasks"]]
  here, there = ({**_same(one), "scoring": _rules(one, tasks)} for one in (asked, before.asked))
  differ = list(differences(there, here))
  if differ:
    raise ValueError(
      f"{before.path} can't be compared with ({'; '.join(differ)}): pairs are of the same kind of "
      "cases at the same size, scored by the same rules; ask for the same, or evaluate that one "
      "anew."
    )
  for name, common in (
    ("tasks", tasks),
    ("seeds", set(asked["seeds"]) & set(before.asked["seeds"])),
  ):
    if not common:
      own, others = (", ".join(map(str, one[name])) for one in (asked, before.asked))
      raise ValueError(
        f"{before.path} can't be compared with: it has the {name} {others} and none of those asked "
        f"for ({own}): give one of them at least."
      )


def _same(asked: Mapping[str, Any]) -> dict[str, Any]:
  return {name: asked.get(name) for name in SAME}


def _rules(asked: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
  """How the tasks were scored: the number of the rules, and the files of own tasks."""
  said = asked.get("scoring")
  found = said if isinstance(said, Mapping) else {"rules": said}
  return {name: found.get(name) for name in ("rules", *names)}


def paired(now: Evaluation, before: Evaluation) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """(what result.json of `now` says with `against`, its rows with those of their pairs)."""
  others = {_key(row): row for row in before.rows if row["system"] == scoring.MODEL}
  pairs: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
  rows, clips = [], 0
  for row in now.rows:
    is_model = row["system"] == scoring.MODEL
    other = others.get(_key(row)) if is_model else None
    clips += is_model
    if other is not None:
      pairs.setdefault(row["task"], []).append((row, other))
    beside = {f"against_{m}": None if other is None else other[m] for m in scoring.COMPARED}
    rows.append({**row, **beside})
  if not pairs:
    raise ValueError(
      f"{before.path} has no clip of a case and seed of {now.path}: its cases were drawn by "
      "another version; evaluate that one anew."
    )
  found = {
    "folder": str(before.path),
    "model": before.result["model"],
    "changed": changed(now, before),
    "pairs": sum(map(len, pairs.values())),
    "clips": clips,
    "clips_there": len(others),
    "unpaired": [name for name in now.asked["tasks"] if name not in pairs],
    **scoring.against(pairs),
  }
  return plain({**now.result, "against": found}), rows


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
  return tuple(row[name] for name in PAIRED)


def changed(now: Evaluation, before: Evaluation) -> list[str]:
  """'steps=10 there and 20 here' for the model, its weights and every setting that differs."""
  here, there = (
    {
      "model": one.result["model"],
      **{name: value for name, value in one.asked.items() if name not in (*SAME, *APART)},
      "weights": str(one.asked.get("weights"))[:DIGITS],
    }
    for one in (now, before)
  )
  return list(differences(there, here))


def notes(found: Mapping[str, Any]) -> list[str]:
  """What differs between the two, which clips are left out of the comparison, and which differences
  have no interval; found: the `against` of a result."""
  changed = "; ".join(found["changed"])
  said = [f"other than {found['folder']}: {changed or 'nothing, it has the same settings'}."]
  left = [found[name] - found["pairs"] for name in ("clips", "clips_there")]
  if any(left):
    said.append(
      f"{found['pairs']} of {found['clips']} clips here have the same case and seed there "
      f"({found['clips_there']} clips): {left[0]} here and {left[1]} there are left out of the "
      "differences."
    )
  if found["unpaired"]:
    said.append(f"no clip there is of {', '.join(found['unpaired'])}.")
  mean = {scoring.MEAN: found["mean"]} if len(found["tasks"]) > 1 else {}
  leads = {
    name: {measure: block[measure] for measure in scoring.COMPARED}
    for name, block in {**found["tasks"], **mean}.items()
  }
  return said + [f"no interval of the difference{text}." for text in scoring.without(leads)]
