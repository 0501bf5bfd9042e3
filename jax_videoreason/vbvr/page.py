"""A table of scores as one page, report.html, with pictures of a sample of every task; offline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_videoreason import stats
from jax_videoreason.report import inline, write_page
from jax_videoreason.vbvr import baselines, scores, table
from jax_videoreason.vbvr.table import System

PICTURE_BYTES = 12 << 20  # all pictures of a page


def render(out: Path, made: Mapping[str, Any], systems: Sequence[System]) -> Path:
  """Writes report.html of what `table.table` says of the systems; returns its path."""
  return write_page(out / "report.html", "vbvr.html.j2", **contents(made, systems))


def contents(made: Mapping[str, Any], systems: Sequence[System]) -> dict[str, Any]:
  """Everything the template shows, as plain values."""
  return {
    "made": made,
    "scope": table.scope(made),
    "systems": [{**row, "remarks": table.remarks(row)} for row in made["systems"]],
    "main": [c for c in table.MAIN if any(c in row["scores"] for row in made["systems"])],
    "faculties": [
      c for c in table.FACULTY_COLUMNS if any(c in row["scores"] for row in made["systems"])
    ],
    "columns": table.COLUMNS,
    "title": ", ".join(
      [s.name for s in systems if s.baseline is None] or [s.name for s in systems]
    ),
    "tasks": tasks(made, systems),
    "number": table.number,
    "chance": stats.chance,
    "least": stats.LEAST - 1,
  }


def tasks(made: Mapping[str, Any], systems: Sequence[System]) -> list[dict[str, Any]]:
  """The scores of every task, with the pictures of its first sample while there is room."""
  room = PICTURE_BYTES
  found = []
  for row in made["by_task"]:
    shown = sorted(
      key
      for key, sample in systems[0].rows.items()
      if (sample["task"], sample["domain"]) == (row["task"], row["domain"])
    )
    pictures: list[dict[str, Any]] = []
    prompt = ""
    if shown and room > 0:
      key = shown[0]
      prompt = systems[0].rows[key]["prompt"]
      first = systems[0].folders[0].parent / scores.PROBLEMS / f"{key}.png"
      places = [("ground truth", "", first)]
      for system in systems:
        score = told(system, key)
        if system.baseline not in (baselines.NOISE, baselines.TRUTH):
          path = system.folders[0] / scores.PICTURES / f"{key}.png"
          places.append((system.name, score, path))
      for name, score, path in places:
        if path.is_file():
          room -= path.stat().st_size
          pictures.append({"name": name, "score": score, "src": inline(path.read_bytes())})
    found.append({**row, "pictures": pictures, "prompt": prompt, "sample": shown[:1]})
  return found


def told(system: System, key: str) -> str:
  """The score under a picture of a sample, which is of the first folder: with several seeds that of
  its seed, and the mean; nothing where there is no score."""
  row = system.rows.get(key)
  if row is None:
    return ""
  if len(system.seeds) < 2:
    return f"score {row['score']:.2f}"
  own = f"seed {system.seeds[0]}, score {row['each'][0]:.2f}"
  return f"{own}; mean of {len(system.seeds)} seeds {row['score']:.2f}"
