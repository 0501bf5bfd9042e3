"""The project's own tasks, by name."""

from jax_videoreason.tasks.base import (
  ENDING,
  SCORING,
  SPLITS,
  Answer,
  Case,
  Metadata,
  Score,
  Task,
  Unseen,
)
from jax_videoreason.tasks.bounce import Bounce
from jax_videoreason.tasks.maze import Maze
from jax_videoreason.tasks.occlusion import Occlusion
from jax_videoreason.tasks.pick import Pick
from jax_videoreason.tasks.rotate import Rotate
from jax_videoreason.tasks.select_largest import SelectLargest
from jax_videoreason.tasks.sort_bars import SortBars
from jax_videoreason.tasks.tictactoe import TicTacToe
from jax_videoreason.tasks.tree_reach import TreeReach

TASKS: dict[str, type[Task]] = {
  task.name: task
  for task in (
    Maze,
    TreeReach,
    TicTacToe,
    Occlusion,
    SortBars,
    Rotate,
    SelectLargest,
    Bounce,
    Pick,
  )
}


def names_of(text: str) -> list[str]:
  """The names of "maze, pick", each once; ValueError where one is empty."""
  names = [name.strip() for name in text.split(",")]
  if not all(names):
    raise ValueError(f"--tasks={text} has an empty name, wanted names as maze,pick.")
  return list(dict.fromkeys(names))


def load(name: str, size: int = 64, frames: int = 17) -> Task:
  """The task `name` at `size` x `size` pixels and `frames` pixel frames."""
  if name not in TASKS:
    raise ValueError(f"no task {name!r}; there are: {', '.join(TASKS)}.")
  return TASKS[name](size=size, frames=frames)


__all__ = [
  "ENDING",
  "SCORING",
  "SPLITS",
  "TASKS",
  "Answer",
  "Case",
  "Metadata",
  "Score",
  "Task",
  "Unseen",
  "load",
  "names_of",
]
