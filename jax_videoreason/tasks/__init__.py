"""The tasks that ship, by name, and what one of a user's own needs."""

from collections.abc import Iterable
from typing import Any

from jax_videoreason import own
from jax_videoreason.tasks.base import (
  ENDING,
  NEEDED,
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
from jax_videoreason.tasks.contract import check
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

NUMBERS = 100  # the numbers of own tasks are as large or larger


def names_of(text: str) -> list[str]:
  """The names of "maze, pick", each once; ValueError where one is empty."""
  names = [name.strip() for name in text.split(",")]
  if not all(names):
    raise ValueError(f"--tasks={text} has an empty name, wanted names as maze,pick.")
  return list(dict.fromkeys(names))


def load(name: str, size: int = 64, frames: int = 17) -> Task:
  """The task `name` at `size` x `size` pixels and `frames` pixel frames."""
  return find(name)(size=size, frames=frames)


def find(name: str) -> type[Task]:
  """A task that ships, or `module:Class` of one elsewhere.

  ValueError names every rule that it breaks.
  """
  if name in TASKS:
    return TASKS[name]
  if ":" not in name:
    raise ValueError(
      f"no task {name!r}; there are: {', '.join(TASKS)}; one of your own is module:Class."
    )
  task = own.load(
    name, what="task", form="module:Class", of="a tasks.Task", example="odd_one:OddOne"
  )
  if not (isinstance(task, type) and issubclass(task, Task)):
    said = task.__name__ if isinstance(task, type) else type(task).__name__
    raise ValueError(f"{name} is {said}, wanted a class below jax_videoreason.tasks.Task.")
  faults = []
  if task.name != name:
    faults.append(
      f"{name} has name = {task.name!r}, wanted what it is loaded by, as stored cases keep the "
      f"name: write name = {name!r} in the class."
    )
  if not isinstance(task.number, int) or task.number < NUMBERS:
    faults.append(
      f"{name} has number = {task.number!r}, wanted a whole number from {NUMBERS} on, as lower "
      f"ones seed the draws of tasks that ship: write number = {NUMBERS} in the class."
    )
  lacking = [method for method in NEEDED if getattr(task, method) is getattr(Task, method)]
  if lacking:
    faults.append(f"{name} lacks {', '.join(lacking)}: write them in the class, as Task says.")
  if faults:
    count = f"{len(faults)} faults. " if len(faults) > 1 else ""
    raise ValueError(f"{count}{' '.join(faults)}")
  return task


def is_name(name: Any) -> bool:
  """Whether a task that ships has this name, or one elsewhere could; imports nothing."""
  return isinstance(name, str) and (name in TASKS or own.is_name(name))


def sources(names: Iterable[str]) -> dict[str, dict[str, str]]:
  """`own.source` of those tasks that do not ship, by name."""
  return {name: own.source(find(name)) for name in names if name not in TASKS}


def scoring(names: Iterable[str]) -> int | dict[str, Any]:
  """What scores must share to be put together: SCORING, and the files of own tasks."""
  found = sources(names)
  return {"rules": SCORING, **found} if found else SCORING


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
  "check",
  "find",
  "is_name",
  "load",
  "names_of",
  "scoring",
  "sources",
]
