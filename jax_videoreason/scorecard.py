"""An evaluation as one page, report.html: scores beside the clips that no model made, whether seeds
differ, the best and worst videos. Opens offline."""

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from einops import rearrange

from jax_videoreason import baselines, comparing, media, scoring, stats, tasks
from jax_videoreason.axes import spread
from jax_videoreason.evaluation import ASKED, PARTS, RESULT, TASK, read_table
from jax_videoreason.records import read_json, read_mapping
from jax_videoreason.report import SPLITS, inline, title_of_task, write_page

T = TypeVar("T")

CELL = 64  # pixels of the shorter side of a frame on the page, at most about twice that
FRAMES = 17  # frames of a clip that are shown at most
STILLS = 5  # of them side by side
BESIDE = (
  baselines.STATIC,
  baselines.NEAREST,
  baselines.CUT,
  scoring.SHUFFLED,
  scoring.VAE,
)
WORDS = {
  baselines.STATIC: "stands still",
  baselines.NEAREST: "nearest training clip",
  baselines.CUT: "cut to a random answer",
  scoring.SHUFFLED: "model, prompts shuffled",
  scoring.VAE: "truth through the VAE",
}


def render(folder: str | Path) -> Path:
  """Draws the page of an evaluation again from what is on disk; returns its path.

  Raises:
    ValueError: the folder is no whole evaluation, or is damaged. OSError: it can't be written.
  """
  folder = Path(folder)
  return write_page(folder / "report.html", "evaluation.html.j2", **contents(folder))


def contents(folder: Path) -> dict[str, Any]:
  """Everything the template shows, as plain values."""
  result = read_json(folder / RESULT)
  manifest = read_mapping(folder / "manifest.json")
  rows = read_table(folder)
  warn_of_code(folder, result["tasks"])
  sheets: list[str] = []
  blocks = {name: block(folder, name, result, rows, sheets) for name in result["tasks"]}
  return {
    "result": result,
    "manifest": manifest,
    "split": SPLITS[result["split"]],
    "mean": scores(result["mean"]) if len(blocks) > 1 else None,
    "blocks": blocks,
    "against": result.get("against"),
    "remarks": comparing.notes(result["against"]) if "against" in result else [],
    "ambiguous": [n for n, b in blocks.items() if b["ambiguity"] is not None],
    "beside": WORDS,
    "sheets": sheets,
    "stills": STILLS,
    "words": stats.spell,
    "chance": stats.chance,
    "title": title_of_task,
  }


def warn_of_code(folder: Path, names: Iterable[str]) -> None:
  """Warns of own tasks that were scored by other code than they have now."""
  scoring = read_json(folder / ASKED).get("scoring")
  for name, now in tasks.sources(names).items():
    if isinstance(scoring, Mapping) and scoring.get(name) != now:
      warnings.warn(
        f"{now['module']} has changed since {folder} was scored: its page draws the cases of "
        f"{name} as they are now.",
        stacklevel=2,
      )


def scores(found: Mapping[str, Any]) -> dict[str, Any]:
  """The numbers of a row of the overview."""
  return {
    "measures": found["systems"][scoring.MODEL],
    "beside": {name: found["systems"][name]["score"]["estimate"] for name in BESIDE},
    "lead": found["differences"],
  }


def block(
  folder: Path,
  name: str,
  result: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  sheets: list[str],
) -> dict[str, Any]:
  """What the page says of one task; its sprite sheets are added to `sheets`."""
  found = result["tasks"][name]
  part = read_json(folder / PARTS / name / TASK)
  size, frames = (part["cases"][0][key] for key in ("size", "frames"))
  task = tasks.load(name, size=size, frames=frames)
  of_run = {
    (row["case"], row["seed"]): row
    for row in rows
    if row["task"] == name and row["system"] == scoring.MODEL
  }
  return {
    **scores(found),
    "found": found,
    "ambiguity": found["ambiguity"],
    "curve": curve(found["ambiguity"]),
    **{
      kind: [
        clip(folder, task, part["cases"][one["case"]], of_run[one["case"], one["seed"]], sheets)
        for one in found[kind]
      ]
      for kind in ("worst", "best")
    },
  }


def clip(
  folder: Path,
  task: tasks.Task,
  metadata: Mapping[str, Any],
  row: Mapping[str, Any],
  sheets: list[str],
) -> dict[str, Any]:
  """A video of the model beside the truth."""
  path = folder / PARTS / task.name / f"video_{row['case']}_{row['seed']}.mp4"
  made = media.read_mp4(path)[0]
  truth = task.case(dict(metadata)).frames
  numbers = []
  for frames in (made, truth):
    numbers.append(len(sheets))
    sheets.append(sheet(frames))
  columns = len(spread(len(made), FRAMES))
  return {
    "sheets": numbers,
    "columns": columns,
    "stills": spread(columns, STILLS),
    "row": row,
    "prompt": metadata["prompt"],
    "answers": [str(answer) for answer in metadata["answers"]],
    "kind": scoring.kind(row),
  }


def sheet(frames: np.ndarray) -> str:
  """The frames of a clip side by side, as data URI."""
  tiles = media.shrink(frames[spread(len(frames), FRAMES)], CELL)
  return inline(media.png(rearrange(tiles, "t h w c -> h (t w) c")))


def curve(ambiguity: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """The effective number of candidates along the steps, in a box of 100 x 100, with gaps where no
  run shows any."""
  if ambiguity is None or "steps" not in ambiguity:
    return None
  steps = ambiguity["steps"]
  points = [(i, c) for i, c in enumerate(steps["candidates"]) if c is not None]
  if not points:
    return None
  total = len(steps["candidates"])
  highs = [c["high"] if c["high"] is not None else c["estimate"] for _, c in points]
  truth = steps["truth"]["estimate"]
  top = max(1.2 * ambiguity["k"], truth, *highs)

  def at(i: int, value: float) -> str:
    return f"{(i + 0.5) / total * 100:.2f},{98 - 96 * value / top:.2f}"

  banded = together([(i, c) for i, c in points if c["low"] is not None])
  ends = [
    {"candidates": c["estimate"], "step": steps["step"][i], "sigma": steps["sigma"][i]}
    for i, c in points[:1] + points[1:][-1:]
  ]
  return {
    "lines": [" ".join(at(i, c["estimate"]) for i, c in part) for part in together(points)],
    "dots": "".join(f"M{at(i, c['estimate'])}h0" for i, c in points),
    "bands": [
      " ".join([at(i, c["high"]) for i, c in part] + [at(i, c["low"]) for i, c in part[::-1]])
      for part in banded
    ],
    "k": 98 - 96 * ambiguity["k"] / top,
    "truth": 98 - 96 * truth / top,
    "read": truth,
    "ends": ends,
    "drawn": steps["drawn"][0],
  }


def together(points: Sequence[tuple[int, T]]) -> list[list[tuple[int, T]]]:
  """Points (place, value) cut where a place is missing."""
  groups = itertools.groupby(enumerate(points), key=lambda one: one[1][0] - one[0])
  return [[point for _, point in group] for _, group in groups]
