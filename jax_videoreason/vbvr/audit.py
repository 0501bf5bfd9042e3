"""Which tasks can't tell a clip that solves nothing from a solution, on the data at hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_videoreason.vbvr import baselines

CLIPS = (baselines.STATIC, baselines.CUT, baselines.FADE, baselines.NOISE, baselines.TRUTH)
MARGIN = 0.05  # a clip this near to the ground truth, or above it, can't be told from it
FLOOR = 0.1  # more than that for random pixels is a gift
STANDING, JUMPING, LOW, GIFT = "standing still", "a cut", "low truth", "random pixels"
WORDS = {
  STANDING: "standing still can't be told from solving",
  JUMPING: "a cut to the end can't be told from solving",
  LOW: "the ground truth itself is below 1",
  GIFT: "random pixels are worth something",
}


def audit(by_task: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What each task's scores of the clips in `CLIPS` mean, and how many tasks share each fault.

  by_task: of `table.by_task`; the names of the systems are those of the clips.
  """
  rows = [{**row, "faults": faults(row["scores"])} for row in by_task]
  return {
    "margin": MARGIN,
    "floor": FLOOR,
    "tasks": rows,
    "counts": {kind: sum(kind in row["faults"] for row in rows) for kind in WORDS},
  }


def faults(of: Mapping[str, float | None]) -> list[str]:
  """The faults of one task; a clip without a score shows none."""
  truth = of.get(baselines.TRUTH)
  if truth is None:
    return []
  said = []
  for clip, kind in ((baselines.STATIC, STANDING), (baselines.CUT, JUMPING)):
    value = of.get(clip)
    if value is not None and value >= truth - MARGIN:
      said.append(kind)
  if truth < 1 - MARGIN:
    said.append(LOW)
  noise = of.get(baselines.NOISE)
  if noise is not None and noise > FLOOR:
    said.append(GIFT)
  return said
