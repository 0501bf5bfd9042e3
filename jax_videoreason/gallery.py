"""A sweep as one page, report.html: numbers by task and edit, a card for every case with all its
seeds, to filter by task, success and flips. Opens offline."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from einops import rearrange

from jax_videoreason import media, scoring, stats
from jax_videoreason.folders import MANIFEST
from jax_videoreason.records import read_mapping
from jax_videoreason.report import flat, inline, write_page
from jax_videoreason.sweep import PAGE, Row, Sweep, open_sweep

T = TypeVar("T")

MOST_STRIPS = 3200  # of a page, a strip per seed of a case; the table on disk has all
MOST_SEEDS = 16  # of a case
MEANS = ("score", "flips")  # over runs, with an interval over problems
SHARES = ("strict", "right")  # of problems, whose runs are averaged
OUTCOMES = {"all": "every seed right", "some": "some seeds right", "none": "no seed right"}


def render(folder: str | Path) -> Path:
  """Draws the page of a sweep, finished or not, from what is on disk; returns its path.

  ValueError: the folder is no sweep, or is damaged. OSError: it can't be written.
  """
  folder = Path(folder)
  return write_page(folder / PAGE, "gallery.html.j2", **contents(open_sweep(folder)))


def contents(sweep: Sweep) -> dict[str, Any]:
  """Everything the template shows, as plain values."""
  groups: dict[tuple[str, int], list[Row]] = {}
  for row in sweep.rows:
    groups.setdefault((row["edit"], row["case"]), []).append(row)
  kinds: dict[tuple[str, str], list[list[Row]]] = {}
  for rows in groups.values():
    kinds.setdefault((rows[0]["task"], rows[0]["edit"]), []).append(rows)
  strips = min(MOST_SEEDS, max(map(len, groups.values()), default=1))
  shown = spread(list(kinds.values()), MOST_STRIPS // strips)
  return {
    "name": sweep.path.resolve().name,
    "asked": sweep.asked,
    "finished": sweep.finished,
    "runs": len(sweep.rows),
    "wanted": sweep.asked["units"] * sweep.asked["width"],
    "cases": len({row["case"] for row in sweep.rows}),
    "summary": [{"task": task, "edit": edit, **numbers(kinds[task, edit])} for task, edit in kinds],
    "tasks": sorted({row["task"] for row in sweep.rows}),
    "edits": list(sweep.asked["edits"]),
    "cards": [card(sweep, rows) for rows in shown],
    "hidden": len(groups) - len(shown),
    "outcomes": OUTCOMES,
    "broken": [row for row in sweep.rows if row["broken_at"] is not None],
    "events": sweep.events,
    "manifest": read_mapping(sweep.path / MANIFEST) if sweep.finished else None,
    "settings": flat(sweep.asked),
    "words": stats.spell,
    "least": stats.LEAST,
  }


def spread(kinds: Sequence[Sequence[T]], most: int) -> list[T]:
  """At most `most` members, as many of each kind as there is room for; kind by kind, in order."""
  places = sorted(
    (place, kind) for kind, members in enumerate(kinds) for place in range(len(members))
  )
  chosen = sorted((kind, place) for place, kind in places[:most])
  return [kinds[kind][place] for kind, place in chosen]


def numbers(cases: Sequence[Sequence[Row]]) -> dict[str, Any]:
  """Means over the runs of some cases and shares of their problems, with intervals over problems.

  agreement: of pairs of seeds that give one answer. commitment: of the runs that settle, `settled`
  in number.
  """
  rows = [row for case in cases for row in case]
  of_problem: dict[str, list[Row]] = {}
  for row in rows:
    of_problem.setdefault(row["problem"], []).append(row)
  own = list(of_problem.values())
  committed = [row["commitment"] for row in rows if row["commitment"] >= 0]
  said = [Counter(row["answer"] for row in case) for case in cases]
  pairs = sum(math.comb(len(case), 2) for case in cases)
  alike = sum(math.comb(n, 2) for one in said for answer, n in one.items() if answer is not None)
  return {
    "runs": len(rows),
    "problems": len(own),
    **{key: scoring.said(mean(own, key)) for key in MEANS},
    **{key: scoring.said(share(own, key)) for key in SHARES},
    "settled": len(committed),
    "commitment": float(np.mean(committed)) if committed else None,
    "agreement": alike / pairs if pairs else None,
  }


def mean(problems: Sequence[Sequence[Row]], key: str) -> stats.Interval:
  """The mean over the runs of all problems."""
  values = [[row[key] for row in rows] for rows in problems]
  return stats.bootstrap_groups(values, seed=stats.SEED, draws=2000)


def share(problems: Sequence[Sequence[Row]], key: str) -> stats.Interval:
  """The share of problems that succeed, as `evaluate` has it: each the mean of its runs."""
  shares = [float(np.mean([row[key] for row in rows])) for rows in problems]
  return stats.share(shares, seed=stats.SEED)


def card(sweep: Sweep, rows: Sequence[Row]) -> dict[str, Any]:
  """A case with one edit: a strip of stills for each of its first seeds, its answer, its answers
  along the steps; `more` are the seeds that are not shown. Success and flips are of all."""
  right = [row["right"] == 1 for row in rows]
  shown = rows[:MOST_SEEDS]
  strips = sweep.of("stills", [row["run"] for row in shown])
  return {
    "rows": [
      {**row, "kind": kind(row), "marks": marks(row), "said": row["answer"] or "unreadable"}
      for row in shown
    ],
    "more": len(rows) - len(shown),
    "first": rows[0],
    "outcome": "all" if all(right) else "some" if any(right) else "none",
    "flips": max(row["flips"] for row in rows),
    "picture": sheet(strips),
    "columns": strips.shape[1],
    "shape": f"{strips.shape[1] * strips.shape[3]} / {strips.shape[2]}",
  }


def kind(row: Row) -> str:
  """The class of the badge of a final answer."""
  return "none" if row["answer"] is None else "right" if row["right"] == 1 else "wrong"


def marks(row: Row) -> list[dict[str, str]]:
  """A mark per step: right, wrong or unreadable, with what was said."""
  return [
    {
      "kind": "none" if said is None else "right" if is_right else "wrong",
      "title": f"step {step}: {'unreadable' if said is None else said}",
    }
    for step, (said, is_right) in enumerate(zip(row["answers"], row["rights"], strict=True))
  ]


def sheet(strips: np.ndarray) -> str:
  """R n height width 3: a row per seed, as data URI."""
  return inline(media.png(rearrange(strips, "r n h w c -> (r h) (n w) c")))
