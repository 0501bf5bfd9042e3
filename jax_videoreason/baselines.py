"""Clips that no model made: what a score is worth beside a video that stands still, a cut to some
answer, the nearest training clip and the truth itself."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from einops import repeat

from jax_videoreason import tasks
from jax_videoreason.tasks import Answer, Case, Metadata, Task
from jax_videoreason.tasks.base import SHORTEST

STATIC, CUT, NEAREST, TRUTH = "static", "cut", "nearest", "truth"
NAMES = {
  STATIC: "the first frame, standing still",
  CUT: "a cut to a random answer, the mean over all answers",
  NEAREST: "the training clip with the nearest first frame",
  TRUTH: "the video that solves the case",
}
BANK = 1000  # training clips among which the nearest is looked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
  """What a clip earns on a case; strict and right are 0 or 1, or shares where clips are averaged.

  right: the answer read is a right one. answer: None = unreadable, or an average.
  """

  score: float
  preservation: float
  final: float
  process: float
  strict: float
  right: float
  answer: Answer | None


def mark(task: Task, frames: np.ndarray, metadata: Metadata) -> Mark:
  """Scores and reads a clip, uint8 (frames height width 3)."""
  score, answer = task.judge(frames, metadata)
  return Mark(
    score=score.value,
    preservation=score.preservation,
    final=score.final,
    process=score.process,
    strict=float(score.strict),
    right=float(answer in metadata["answers"]),
    answer=answer,
  )


def still(first_frame: np.ndarray, frames: int) -> np.ndarray:
  """The first frame as a clip."""
  return repeat(first_frame, "h w c -> t h w c", t=frames)


def cut(task: Task, metadata: Metadata, answer: Answer) -> np.ndarray:
  """The problem for half of the clip, then the last frame of the clip that gives `answer`."""
  clip = task.render(metadata, answer)
  half = len(clip) // 2
  return np.concatenate([still(clip[0], half), still(clip[-1], len(clip) - half)])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bank:
  """Training clips without their videos: 81 frames of 480 pixels are 56 MB.

  clips: N tasks and indices, by which each is drawn again. hashes: of their problems. first_frames:
  uint8 (N height width 3).
  """

  clips: Sequence[tuple[Task, int]]
  hashes: Sequence[str]
  first_frames: np.ndarray

  def nearest(self, first_frame: np.ndarray) -> Case:
    """The case whose first frame differs least, by mean squared pixel difference."""
    given = first_frame.astype(np.float32)
    away = [np.mean((own - given) ** 2) for own in self.first_frames]
    task, index = self.clips[int(np.argmin(away))]
    return task.generate("train", index)


def bank(task: Task, count: int = BANK) -> Bank:
  """The first training cases of the task; of a task that is never trained, of all others."""
  if not task.held_out:
    sources = [task]
  else:
    names = [name for name, kind in tasks.TASKS.items() if not kind.held_out]
    sources = [tasks.load(name, size=task.size, frames=task.frames) for name in names]
  each = -(-count // len(sources))
  clips = [(source, index) for source in sources for index in range(each)]
  hashes, first_frames = [], np.empty((len(clips), task.size, task.size, 3), np.uint8)
  for row, (source, index) in enumerate(clips):
    # a first frame is the same in a clip of any length
    case = dataclasses.replace(source, frames=SHORTEST).generate("train", index)
    hashes.append(case.metadata["hash"])
    first_frames[row] = case.first_frame
  return Bank(clips=clips, hashes=hashes, first_frames=first_frames)


def marks(task: Task, case: Case, clips: Bank) -> dict[str, Mark]:
  """What every clip of `NAMES` earns on a case."""
  metadata = case.metadata
  options = task.options(metadata["problem"])
  return {
    STATIC: mark(task, still(case.first_frame, task.frames), metadata),
    CUT: mean([mark(task, cut(task, metadata, option), metadata) for option in options]),
    NEAREST: mark(task, clips.nearest(case.first_frame).frames, metadata),
    TRUTH: mark(task, case.frames, metadata),
  }


def mean(some: Sequence[Mark]) -> Mark:
  """The mean of marks, without an answer."""
  values: Mapping[str, float] = {
    field.name: float(np.mean([getattr(one, field.name) for one in some]))
    for field in dataclasses.fields(Mark)
    if field.name != "answer"
  }
  return Mark(**values, answer=None)
