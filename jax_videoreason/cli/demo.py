"""Unseen cases of three tasks through the model that ships, with several seeds, and a report.

  videoreason demo
  videoreason demo --tasks maze,pick --cases 4 --config.seeds=5 --out runs/more

Needs a CPU and about two minutes. The score of a case is 1 for the truth and at most 0.10 for a
video that stands still; the report shows what the model answers at every denoising step.
"""

import numpy as np
from absl.flags import DEFINE_integer, DEFINE_string, FlagValues

from jax_videoreason import cli, console, evaluate, settings, store, tasks
from jax_videoreason.cli.decoding import decode_run
from jax_videoreason.cli.sample import Question, finish, record
from jax_videoreason.structs import AnswerTrace

TASKS = "maze,tictactoe,select_largest"


def define(flags: FlagValues) -> None:
  cli.define_config(flags, "mini")
  cli.define_out(flags, "runs/demo")
  DEFINE_string("tasks", TASKS, "names of tasks, module:Class for your own", flag_values=flags)
  DEFINE_integer("cases", 2, "cases of each task", lower_bound=1, flag_values=flags)


def main(flags: FlagValues, words: list[str]) -> None:
  chosen = settings.from_config(cli.resolved(flags))
  evaluate.check_size(chosen)
  questions = []
  for name in tasks.names_of(flags.tasks):
    task = evaluate.load_task(name, chosen)
    split = "heldout" if task.held_out else "id"
    for index in range(flags.cases):
      case = task.generate(split, index)
      questions.append(Question(first_frame=case.first_frame, prompt=case.prompt, case=case))
  with store.run_folder(flags.out, redo=flags.redo) as folder:
    bundle = record(folder, chosen, questions)
  said = decode_run(flags.out, bundle)
  if said is not None:
    show_answers(questions, len(chosen.seeds), said)
  finish(flags.out)


def show_answers(questions: list[Question], seeds: int, said: AnswerTrace) -> None:
  """A row per case: how many seeds end right, their score, when they commit."""
  rows = []
  for number, question in enumerate(questions):
    if question.case is None:
      continue
    own = slice(number * seeds, (number + 1) * seeds)
    commits = said.commitment_sigma[own]
    known = commits[np.isfinite(commits)]
    rows.append(
      (
        f"{question.case.task} {question.case.index}",
        f"{int(said.right[-1, own].sum())} of {seeds}",
        float(said.score[-1, own].mean()),
        f"{known.mean():.2f}" if known.size else "-",
        f"{said.flips[own].mean():.1f}",
      )
    )
  console.table("answers", ("case", "right", "score", "commits at sigma", "changes of mind"), rows)
