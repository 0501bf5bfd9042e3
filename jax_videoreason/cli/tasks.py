"""Writes cases of the tasks in the benchmark's folder layout: a first frame, a prompt, the truth.

  videoreason tasks export --tasks maze,pick --split id --cases 5 --out cases
  videoreason tasks list

A case is the folder OUT/<task>/<00000>/ with first_frame.png, final_frame.png, ground_truth.mp4,
prompt.txt and metadata.json (all right answers, in symbols). Cases are the same on every machine.
"""

from pathlib import Path

from absl.flags import DEFINE_integer, DEFINE_string, FlagValues

from jax_videoreason import cli, console, folders, tasks
from jax_videoreason.vbvr import layout

WORDS = 1


def define(flags: FlagValues) -> None:
  cli.define_out(flags)
  DEFINE_string(
    "tasks", "all", "names of tasks, module:Class for one of your own, or all", flag_values=flags
  )
  DEFINE_string("split", "id", "train, id, ood or heldout", flag_values=flags)
  DEFINE_integer("cases", 5, "cases of each task, from index 0", lower_bound=1, flag_values=flags)
  DEFINE_integer("size", 64, "height and width in pixels", flag_values=flags)
  DEFINE_integer("frames", 17, "frames of the video, 1 + 4k", flag_values=flags)


def main(flags: FlagValues, words: list[str]) -> None:
  word = words[0] if words else ""
  if word == "list":
    listing()
  elif word == "export":
    cli.required(flags, "out")
    export(flags)
  else:
    raise cli.UsageError(f"tasks {word or '?'}: say videoreason tasks export, or tasks list.")


def listing() -> None:
  """A row per task."""
  rows = [
    (name, "heldout" if task.held_out else "train, id, ood", "yes" if task.ambiguous else "no")
    for name, task in tasks.TASKS.items()
  ]
  console.table("tasks", ("task", "splits", "ambiguous cases"), rows)


def export(flags: FlagValues) -> None:
  """Writes the cases that the flags name."""
  names = asked(flags.tasks, flags.split)
  for name in names:  # before a bar begins
    tasks.load(name, size=flags.size, frames=flags.frames).check_split(flags.split, 0)
  out = Path(flags.out)
  if flags.redo:
    for item in sorted(out.iterdir()) if out.is_dir() else ():
      if tasks.is_name(item.name):
        layout.check_replaceable(item)
  with folders.whole(out, what="set of cases", owned=tasks.is_name, redo=flags.redo) as folder:
    with console.progress(len(names) * flags.cases, "write", "case") as advance:
      for name in names:
        task = tasks.load(name, size=flags.size, frames=flags.frames)
        for index in range(flags.cases):
          layout.write_cases(folder, [task.generate(flags.split, index)])
          advance(1)
  console.say(f"{len(names) * flags.cases} cases: {out.resolve()}")


def asked(given: str, split: str) -> list[str]:
  """The names that --tasks says, each once; all = those that have the split."""
  if given == "all":
    return [n for n, task in tasks.TASKS.items() if task.held_out == (split == "heldout")]
  return tasks.names_of(given)
