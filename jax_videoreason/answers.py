"""The answer that x0 gives at every step: when a run commits, how often it changes its mind."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jax_videoreason.arrays import StoredArray
from jax_videoreason.structs import AnswerTrace
from jax_videoreason.tasks.base import Answer, Metadata, Task
from jax_videoreason.tasks.draw import VISIBLE, blended


def read_steps(
  tasks: Task | Sequence[Task | None],
  metadata: Sequence[Metadata | None],
  frames: np.ndarray | StoredArray,
  sigma: np.ndarray,
  steps: Sequence[int] | None = None,
) -> AnswerTrace:
  """Reads every run at every step.

  tasks: one for all runs or one per run; None = the run belongs to no task and stays empty.
  metadata: the R cases' metadata. frames: x0 as pixels, S R frames height width 3 uint8, of which
  one row at a time is read. sigma: S, before each step. steps: the denoising step of each row,
  None = 0..S-1.

  Raises:
    ValueError: as many metadata or tasks as runs are wanted, and frames of the task's size.
  """
  rows, runs = frames.shape[:2]
  each = [tasks] * runs if isinstance(tasks, Task) else list(tasks)
  for name, given, wanted in (
    ("tasks", each, runs),
    ("metadata", metadata, runs),
    ("sigma", sigma, rows),
  ):
    if len(given) != wanted:
      raise ValueError(
        f"{name} has {len(given)} entries, wanted {wanted}: one for each row of frames."
      )
  return read_each(each, metadata, (video for row in frames for video in row), sigma, steps)


def read_each(
  tasks: Sequence[Task | None],
  metadata: Sequence[Metadata | None],
  videos: Iterable[np.ndarray],
  sigma: np.ndarray,
  steps: Sequence[int] | None = None,
) -> AnswerTrace:
  """As `read_steps`, of S R videos that are not held together: they are taken one after the other,
  row by row, frames height width 3 uint8 each."""
  rows, runs = len(sigma), len(tasks)
  answer = np.full((rows, runs), None, object)
  right = np.zeros((rows, runs), bool)
  score, strict = np.zeros((2, rows, runs))
  soft = np.full((4, rows, runs), np.nan)
  for (s, r), frames in zip(np.ndindex(rows, runs), videos, strict=True):
    task, case = tasks[r], metadata[r]
    if task is None or case is None:
      continue
    earned, answer[s, r] = task.judge(frames, case)
    right[s, r] = answer[s, r] in case["answers"]
    score[s, r], strict[s, r] = earned.value, earned.strict
    seen = task.candidates(frames, case)
    soft[:, s, r] = *weigh(seen, case["answers"]), second(seen)
  commitment = commit(answer)
  flips = changes(answer, right)
  return AnswerTrace(
    sigma=np.asarray(sigma, float),
    steps=np.arange(rows) if steps is None else np.asarray(steps, int),
    answer=answer,
    right=right,
    score=score,
    strict=strict,
    commitment=commitment,
    commitment_sigma=np.where(commitment < 0, np.nan, np.asarray(sigma, float)[commitment]),
    first_hit=np.where(right.any(0), right.argmax(0), -1),
    flips=flips[0],
    to_right=flips[1],
    to_wrong=flips[2],
    candidates=soft[0],
    entropy=soft[1],
    mass=soft[2],
    second=soft[3],
    task=tuple(
      None if t is None or m is None else t.name for t, m in zip(tasks, metadata, strict=True)
    ),
  )


def commit(answer: np.ndarray) -> np.ndarray:
  """R: the first row of `answer` (S R) from which it equals the last; -1 where that is None."""
  rows, runs = answer.shape
  first = np.full(runs, -1)
  for r in range(runs):
    if answer[-1, r] is not None:
      differs = [s for s in range(rows) if answer[s, r] != answer[-1, r]]
      first[r] = differs[-1] + 1 if differs else 0
  return first


def readable(answer: np.ndarray) -> np.ndarray:
  """Which answers could be read, bool of the same shape."""
  return np.vectorize(lambda said: said is not None, otypes=[bool])(answer)


def changes(answer: np.ndarray, right: np.ndarray) -> np.ndarray:
  """3 R: all changes, those wrong -> right, those right -> wrong; rows of None are skipped."""
  count = np.zeros((3, answer.shape[1]), int)
  for r in range(answer.shape[1]):
    said = [(answer[s, r], right[s, r]) for s in range(len(answer)) if answer[s, r] is not None]
    for (old, was), (new, now) in itertools.pairwise(said):
      count[:, r] += (old != new, not was and now, was and not now)
  return count


def weigh(occupancy: Mapping[Answer, float], right: Sequence[Answer]) -> tuple[float, float, float]:
  """(candidates visible, entropy in bits, share of the weight on right answers) of a soft reading.

  A candidate weighs as much as its share of a blend of candidates, which an occupancy tells
  (`draw.blended`), and is visible from a share of `VISIBLE`. Entropy and share are NaN where none
  is: nothing is drawn that could be an answer.
  """
  weights = blended(np.array(list(occupancy.values()), float))
  visible = float((weights >= VISIBLE).sum())
  if not visible:
    return visible, np.nan, np.nan
  share = weights / weights.sum()
  entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
  on_right = sum(v for v, a in zip(share, occupancy, strict=True) if a in right)
  return visible, float(entropy + 0.0), float(on_right)


def second(occupancy: Mapping[Answer, float]) -> float:
  """The blend share of the second most drawn candidate of a soft reading; 0 where there is one."""
  weights = np.sort(blended(np.array([0.0, *occupancy.values()])))
  return float(weights[-2])
