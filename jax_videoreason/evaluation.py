"""A finished evaluation on disk: opened, and its numbers taken anew.

The folder:

    evaluation.json    what was asked, written first: a call that asks the same goes on here
    tasks/TASK/        a finished task: task.json (cases, a row per clip, what x0 showed),
                       video_<case>_<seed>.mp4
    result.json        the numbers with intervals (`scoring`)    table.parquet   a row per clip
    manifest.json      written last
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jax_videoreason import scoring, tables
from jax_videoreason.folders import MANIFEST, expect
from jax_videoreason.records import plain, read_json, rewriting, sums, vouched, write_json

ASKED, RESULT, TABLE, PARTS = "evaluation.json", "result.json", "table.parquet", "tasks"
TASK = "task.json"  # of the folder of a task, which is whole with it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """A finished evaluation on disk; made by `open_evaluation`.

  asked: the cases, the settings and the rules of scoring, as evaluation.json has them. result: the
  numbers with intervals, of every task (`result["tasks"]`) and of their mean. rows: one per clip,
  with task, split, index, seed, system ("model" or a clip beside), score, strict, right, answer.
  """

  path: Path
  asked: dict[str, Any]
  result: dict[str, Any]
  rows: list[dict[str, Any]]

  def to_pandas(self) -> Any:
    """The rows as a pandas DataFrame."""
    return tables.frame(self.rows, otherwise=".rows")


def open_evaluation(folder: str | Path) -> Evaluation:
  """Opens the --out of `videoreason evaluate`.

  ValueError: the folder is no evaluation, is not finished, or a file of it is missing or damaged.
  """
  folder = Path(folder)
  expect(folder, "evaluation")
  if not folder.is_dir():
    is_file = f"{folder} is a file, wanted a folder"
    said = is_file if folder.exists() else f"there is no folder {folder}"
    raise ValueError(f"{said}: give the --out of `videoreason evaluate`.")
  if not (folder / ASKED).is_file():
    raise ValueError(
      f"{folder} has no {ASKED}, so it is no evaluation: give the --out of `videoreason evaluate`."
    )
  check_finished(folder)
  return Evaluation(
    path=folder.resolve(),
    asked=read_json(vouched(folder, ASKED)),
    result=read_json(vouched(folder, RESULT)),
    rows=read_table(folder),
  )


def check_finished(folder: Path) -> None:
  """ValueError where the evaluation has no manifest, which is written last."""
  if not (folder / MANIFEST).is_file():
    raise ValueError(
      f"{folder} has no {MANIFEST}, so it is not finished: the command that began it goes on there."
    )


def read_table(folder: Path) -> list[dict[str, Any]]:
  """The rows of a finished evaluation; ValueError where they are not what its manifest says."""
  try:
    return tables.read(vouched(folder, TABLE))
  except ValueError as error:
    raise ValueError(
      f"{folder / TABLE} is missing or damaged: `videoreason report {folder}` writes it again, or "
      "copy the folder again."
    ) from error


# What the finished tasks left


def written(names: Iterable[str]) -> Callable[[str], Any]:
  """Whether a path below tasks/ is of a file that an evaluation of these tasks writes there."""
  of_tasks = "|".join(map(re.escape, names))
  return re.compile(rf"({of_tasks})/(task\.json|video_\d+_\d+\.mp4)").fullmatch


def read_parts(out: Path, names: Iterable[str]) -> dict[str, Any]:
  """What the finished tasks left, by name."""
  return {name: read_json(out / PARTS / name / TASK) for name in names}


def numbers(parts: Mapping[str, Any]) -> dict[str, Any]:
  """What result.json says of every task and of their mean, from the rows that were kept."""
  return {
    "tasks": {
      name: {
        **scoring.summary(part["rows"], part["watched"]),
        "shuffled": sum(
          case["prompt"] != other
          for case, other in zip(part["cases"], part["shuffled"], strict=True)
        ),
      }
      for name, part in parts.items()
    },
    "mean": scoring.over_tasks({name: part["rows"] for name, part in parts.items()}),
  }


def write_table(out: Path, parts: Mapping[str, Any]) -> None:
  """table.parquet, from what the finished tasks left."""
  tables.write(out / TABLE, [row for part in parts.values() for row in part["rows"]])


# The numbers anew


def again(out: str | Path) -> dict[str, Any]:
  """Takes the numbers of a finished evaluation anew from its rows, as they are reckoned now.

  Nothing is computed by a model; result.json is written where they differ. Returns what it says.
  A table that is damaged, or was being written when a command was stopped, is written from tasks/,
  with a warning; a comparison with an earlier evaluation, which lies in both, is then left out.

  ValueError: a file of it is damaged, or an earlier version wrote it, without something that is
    now looked at.
  """
  out = Path(out)
  check_finished(out)
  before = read_json(vouched(out, RESULT))
  vouched(out, PARTS, written(before["tasks"]))
  parts = read_parts(out, before["tasks"])
  try:
    result = plain({**before, **numbers(parts)})
  except KeyError as error:
    raise ValueError(
      f"{out} was written by an earlier version and lacks {error}: `videoreason evaluate --redo` "
      "does it again."
    ) from error
  stale = set() if _has_table(out) else {TABLE}
  if stale:
    found = result.pop("against", None)
    lost = f"; --against {found['folder']} compares again" if found else ""
    warnings.warn(
      f"{out / TABLE} was missing, damaged or not whole: it is written again from {PARTS}/{lost}.",
      stacklevel=2,
    )
  if result != before or RESULT not in sums(out):
    stale.add(RESULT)
  if stale:
    with rewriting(out, *stale):
      write_json(out / RESULT, result)
      if TABLE in stale:
        write_table(out, parts)
  return result


def _has_table(out: Path) -> bool:
  """Whether the table is what the manifest says; one that it does not know was being written."""
  try:
    tables.read(vouched(out, TABLE))
  except ValueError:
    return False
  return TABLE in sums(out)
