"""The benchmark's folder layout: five files a case, TASK/NUMBER/{first_frame.png, ...}."""

import json
from collections.abc import Sequence
from pathlib import Path

from jax_videoreason import media
from jax_videoreason.tasks.base import Case

FPS = 16  # of VBVR-Bench
FILES = ("first_frame.png", "final_frame.png", "ground_truth.mp4", "prompt.txt", "metadata.json")


def write_cases(root: Path, cases: Sequence[Case]) -> list[Path]:
  """Writes each case as root/<task>/<index as 00000>/ with `FILES`; returns the folders.

  metadata.json holds the right answers in symbols, so no score depends on the pixels of the video.
  """
  return [write_case(root / case.task / f"{case.index:05d}", case) for case in cases]


def write_case(folder: Path, case: Case) -> Path:
  """Writes the five files of a case into a new folder."""
  folder.mkdir(parents=True)
  media.write_png(folder / "first_frame.png", case.first_frame)
  media.write_png(folder / "final_frame.png", case.frames[-1])
  media.write_mp4(folder / "ground_truth.mp4", case.frames, fps=FPS)
  (folder / "prompt.txt").write_text(case.prompt + "\n", encoding="utf-8")
  (folder / "metadata.json").write_text(
    json.dumps(case.metadata, indent=1) + "\n", encoding="utf-8"
  )
  return folder
