"""A made-up benchmark folder in the official layout, and a stand-in for the official EvalKit."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from jax_videoreason import media
from jax_videoreason.vbvr import suite
from jax_videoreason.vbvr.samples import Sample

WHITE, BLACK, GREEN, RED, ORANGE, PINK, GREY, BLUE = np.asarray(
  [
    [255, 255, 255], [0, 0, 0], [0, 170, 60], [220, 20, 20], [255, 140, 0], [230, 60, 150],
    [170, 170, 170], [40, 80, 200],
  ],
  np.uint8,
)  # fmt: skip
GRID, COUNT, MAZE, SHELF = (
  f"{name}{suite.SUFFIX}"
  for name in ("G-18_grid_shortest_path", "O-33_counting_object", "O-39_maze", "O-30_bookshelf")
)
NAMES = ("ground_truth.mp4", "first_frame.png", "final_frame.png", "prompt.txt")


def disc(picture, x, y, radius, colour):
  """A filled disc; x, y and radius are shares of the side."""
  side = len(picture)
  rows, columns = np.mgrid[:side, :side]
  inside = (rows - y * side) ** 2 + (columns - x * side) ** 2 <= (radius * side) ** 2
  picture[inside] = colour


def box(picture, left, top, right, bottom, colour):
  side = len(picture)
  rows = slice(round(top * side), round(bottom * side))
  picture[rows, round(left * side) : round(right * side)] = colour


def along(points, share):
  """The place at a share of a way along `points`."""
  points = np.asarray(points, float)
  lengths = np.abs(np.diff(points, axis=0)).sum(1)
  way = np.concatenate([[0], lengths.cumsum()]) / lengths.sum()
  return np.interp(share, way, points[:, 0]), np.interp(share, way, points[:, 1])


def grid_path(size, index, share):
  """G-18: a pink disc goes along a grid to a red square."""
  picture = np.full((size, size, 3), 255, np.uint8)
  for line in np.linspace(0.1, 0.9, 6):
    box(picture, line - 0.004, 0.1, line + 0.004, 0.9, GREY)
    box(picture, 0.1, line - 0.004, 0.9, line + 0.004, GREY)
  goal = 0.5 + 0.16 * (index % 3)
  box(picture, goal - 0.05, goal - 0.05, goal + 0.05, goal + 0.05, RED)
  disc(picture, *along([(0.18, 0.18), (goal, 0.18), (goal, goal)], share), 0.035, PINK)
  return picture


def counting(size, index, share):
  """O-33: blue discs, each of which gets a small orange mark when it is counted."""
  picture = np.full((size, size, 3), 255, np.uint8)
  count = 3 + index % 4
  for number in range(count):
    x, y = 0.15 + 0.7 * number / count, 0.3 + 0.3 * (number % 2)
    disc(picture, x, y, 0.06, BLUE)
    if share * count >= number + 0.5:
      disc(picture, x, y, 0.02, ORANGE)
  return picture


def maze(size, index, share):
  """O-39: an orange way round two walls from green to red."""
  picture = np.full((size, size, 3), 255, np.uint8)
  for edge in ((0, 0, 1, 0.05), (0, 0.95, 1, 1), (0, 0, 0.05, 1), (0.95, 0, 1, 1)):
    box(picture, *edge, BLACK)
  low, high = (0.28, 0.72) if index % 2 else (0.34, 0.66)
  box(picture, 0.32, 0.05, 0.37, high, BLACK)
  box(picture, 0.63, low, 0.68, 0.95, BLACK)
  way = [(0.18, 0.15), (0.18, 0.83), (0.5, 0.83), (0.5, 0.15), (0.82, 0.15), (0.82, 0.83)]
  for part in np.linspace(0, share, round(400 * share) + 1) if share else ():
    x, y = along(way, part)
    box(picture, x - 0.015, y - 0.015, x + 0.015, y + 0.015, ORANGE)
  disc(picture, *way[0], 0.045, GREEN)
  disc(picture, *way[-1], 0.045, RED)
  return picture


def shelf(size, index, share):
  """O-30: a red book moves into the gap of a shelf."""
  picture = np.full((size, size, 3), 255, np.uint8)
  box(picture, 0.05, 0.9, 0.95, 0.93, BLACK)
  gap = 1 + index % 4
  for place in range(7):
    colour = (BLUE, GREEN, GREY)[place % 3]
    if place != gap:
      box(picture, 0.1 + 0.1 * place, 0.5, 0.18 + 0.1 * place, 0.9, colour)
  x, y = along([(0.82, 0.1), (0.1 + 0.1 * gap, 0.1), (0.1 + 0.1 * gap, 0.5)], share)
  box(picture, x, y, x + 0.08, y + 0.4, RED)
  return picture


TASKS = {
  GRID: (grid_path, "Move the pink disc along the grid to the red square by the shortest path."),
  COUNT: (counting, "Count the blue discs: mark each one."),
  MAZE: (maze, "Draw the way from the green start to the red goal."),
  SHELF: (shelf, "Put the red book into the gap of the shelf."),
}


def make(root: Path, *, size=64, frames=5, tasks=(GRID, MAZE), count=2, prompt=None) -> Path:
  """Writes the folders of `count` samples of each task; they end in two still frames."""
  for task in tasks:
    draw, words = TASKS[task]
    for index in range(count):
      clip = np.stack(
        [draw(size, index, min(1.0, t / (frames - 2))) for t in range(frames + index)]
      )
      folder = root / suite.OFFICIAL[task][0] / task / f"{index:05d}"
      folder.mkdir(parents=True)
      media.write_png(folder / "first_frame.png", clip[0])
      media.write_png(folder / "final_frame.png", clip[-1])
      media.write_mp4(folder / "ground_truth.mp4", clip, fps=16)
      (folder / "prompt.txt").write_text(prompt or words, encoding="utf-8")
  return root


EVALKIT = '''
"""A stand-in with the command line and the result of the official run_evaluation.py."""
import argparse, json, os, pathlib, time
import av, numpy as np
from PIL import Image

parser = argparse.ArgumentParser()
for name in ("model_path", "gt_base", "output_dir", "device"):
  parser.add_argument(f"--{name}")
asked = parser.parse_args()
samples = []
for video in sorted(pathlib.Path(asked.model_path).glob("*/*/*.mp4")):
  split, task = video.parts[-3:-1]
  truth = pathlib.Path(asked.gt_base) / split / task / video.stem
  words, error, score = (truth / "prompt.txt").read_text(), None, 0.0
  if "HANG" in words:
    time.sleep(60)
  if task.startswith("O-30"):
    continue  # no evaluator
  with av.open(str(video)) as container:
    last = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][-1]
  final = np.asarray(Image.open(truth / "final_frame.png").convert("RGB"))
  score = max(0.0, 1 - np.abs(last.astype(float) - final).mean() / 20)
  if "RAISE" in words:
    score, error = 0.0, "index 4 is out of bounds"
  samples.append({"video_path": str(video), "task_name": task, "score": score, "error": error,
                  "category": "Spatiality", "dimensions": {}})
if samples:
  os.makedirs(asked.output_dir)
  path = os.path.join(asked.output_dir, os.path.basename(asked.model_path) + "_vbvr_results.json")
  json.dump({"samples": samples, "summary": {}}, open(path, "w"))
'''


UTILS = '''
"""What a stand-in reads of a video: as OpenCV's wheels, it has no decoder for AV1."""
import av

def get_frame_count(path):
  with av.open(path) as container:
    return container.streams.video[0].frames

def get_video_frames(path, max_frames=None):
  frames = []
  with av.open(path) as container:
    try:
      if "av1" not in container.streams.video[0].codec_context.name:
        for frame in container.decode(video=0):
          frames.append(frame.to_ndarray(format="bgr24"))
    except av.FFmpegError:
      pass
  return frames[:max_frames]
'''


def make_evalkit(root: Path) -> tuple[Path, Path]:
  """(toolkit, environment): both look like the official ones from outside."""
  kit, environment = root / "EvalKit", root / "environment"
  (kit / "vbvr_bench" / "evaluators").mkdir(parents=True)
  (kit / "run_evaluation.py").write_text(EVALKIT)
  (kit / "vbvr_bench" / "__init__.py").write_text("")
  (kit / "vbvr_bench" / "utils.py").write_text(UTILS)
  (environment / "bin").mkdir(parents=True)
  python = environment / "bin" / "python"
  python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  python.chmod(0o755)
  return kit, environment


def write_index(root: Path, entries: list[dict]) -> None:
  """VBVR-Bench.json."""
  (root / "VBVR-Bench.json").write_text(json.dumps(entries), encoding="utf-8")


def replaced(sample: Sample, height: int, width: int, frames: int) -> Sample:
  """A sample that says it has another shape."""
  return dataclasses.replace(sample, height=height, width=width, frames=frames)
