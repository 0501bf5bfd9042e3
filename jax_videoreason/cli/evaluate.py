"""How good a model is on unseen cases, with intervals, beside clips that no model made.

  videoreason evaluate --out runs/scores
  videoreason evaluate --tasks maze,pick --cases 16 --seeds 16 --ambiguous ambiguous --out ...
  videoreason evaluate --checkpoint DIR --split ood --mesh seed=2,fsdp=4 --out runs/ood
  videoreason evaluate --tasks mymodule:MyTask --out runs/mine
  videoreason evaluate --config.guidance=3 --against runs/scores --out runs/guided

Per task: score, strict success and right answers, each with a 95% interval over problems, beside
the prompts shuffled between cases, a video that stands still, a cut to a random answer, the nearest
training clip and the truth. Intervals of shares of a task are exact (Clopper and Pearson), or the
bootstrap's where it is wider; those of scores, of means over tasks and of differences a bootstrap.
Where several answers are right: whether seeds differ, and how many candidates x0 shows along the
steps.
Stopped at any time, the same command goes on with the tasks that are left. Leaves result.json,
table.parquet (a row per clip), tasks/, report.html.

With --against every clip is paired with that of an earlier evaluation, of the same case and seed:
score and strict success here less there, with the interval over problems and the p-value of a
sign-flip test, as it is and by Holm's correction over the tasks. Models, settings, seeds and the
number of cases may differ; the kind of cases, their size and the rules of scoring may not.
A finished evaluation is only compared.
"""

from pathlib import Path
from typing import Any

from absl.flags import DEFINE_integer, DEFINE_string, FlagValues

from jax_videoreason import (
  axes,
  baselines,
  cli,
  comparing,
  console,
  evaluate,
  evaluation,
  folders,
  scorecard,
  scoring,
  settings,
  sharding,
  stats,
)

SHORT = {
  scoring.MODEL: "model",
  scoring.SHUFFLED: "prompts shuffled",
  baselines.STATIC: "static",
  baselines.CUT: "cut",
  baselines.NEAREST: "nearest clip",
  scoring.VAE: "truth by VAE",
  baselines.TRUTH: "truth",
}


GAINED = ("", " there, here", " p, Holm")
POINTS = 6  # steps whose candidates are shown
OWN_KEYS = ("seeds",)


def define(flags: FlagValues) -> None:
  cli.define_config(flags, "mini")
  cli.define_out(flags, goes_on=True)
  cli.define_mesh(flags)
  said = "names of tasks, module:Class for one of your own, or all that have the split"
  DEFINE_string("tasks", "all", said, flag_values=flags)
  DEFINE_string("split", "id", "id, ood (beyond the training range) or heldout", flag_values=flags)
  DEFINE_integer("cases", 32, "cases of each task", flag_values=flags)
  DEFINE_integer("seeds", 1, "seeds of each case", lower_bound=1, flag_values=flags)
  DEFINE_string(
    "ambiguous",
    "both",
    "plain (one right answer), ambiguous (several) or both, in turn",
    flag_values=flags,
  )
  said = "folder of an earlier evaluation, with whose clips of the same cases and seeds to compare"
  DEFINE_string("against", None, said, flag_values=flags)


def main(flags: FlagValues, words: list[str]) -> None:
  cli.required(flags, "out")
  asked = evaluate.plan(flags.tasks, flags.split, flags.cases, flags.ambiguous)
  chosen = settings.from_config({**cli.resolved(flags), "seeds": flags.seeds})
  if flags.against is not None:
    folders.spare(Path(flags.out), [Path(flags.against)])
    comparing.check(evaluate.describe(chosen, asked), evaluation.open_evaluation(flags.against))
  with console.progress(evaluate.work(chosen, asked), "denoise", "step") as advance:
    result = evaluate.evaluate(
      flags.out,
      chosen,
      asked,
      mesh=sharding.mesh_here(flags.mesh),
      command=cli.typed(),
      redo=flags.redo,
      advance=advance,
    )
  if flags.against is not None:
    result = comparing.compare(flags.out, flags.against)
  show(result)
  page = scorecard.render(flags.out)
  console.say(f"report: {page.resolve().as_uri()}")


def show(result: dict[str, Any]) -> None:
  """Scores with intervals, the scores of the other clips, whether seeds differ, and how many
  candidates x0 shows along the steps."""
  blocks = with_mean(result, "mean")
  console.table(
    f"{result['model']}, {result['cases']} cases of each task, split {result['split']}",
    ("task", "score", "strict", "right answers"),
    [
      (name, *(stats.spell(block["systems"][scoring.MODEL][m]) for m in scoring.MEASURES))
      for name, block in blocks.items()
    ],
  )
  console.table(
    "mean score",
    ("task", *SHORT.values()),
    [
      (name, *(block["systems"][system]["score"]["estimate"] for system in SHORT))
      for name, block in blocks.items()
    ],
  )
  rows = [
    (
      name,
      f"{found['k']:.1f}",
      *spread(found),
      *(stats.spell(found[w]) for w in ("right", "wrong", "unreadable")),
    )
    for name, block in result["tasks"].items()
    if (found := block["ambiguity"]) is not None
  ]
  if rows:
    console.table(
      "cases with k right answers: entropy in bits of those that seeds give, and how seeds end",
      ("task", "k", "compared", "entropy", "if even", "log2 k", "right", "wrong", "unreadable"),
      rows,
    )
  watched = {
    name: found
    for name, block in result["tasks"].items()
    if (found := block["ambiguity"]) is not None and "steps" in found
  }
  if watched:
    sigma = next(iter(watched.values()))["steps"]["sigma"]
    at = axes.spread(len(sigma), POINTS)
    console.table(
      "the same cases: candidates that x0 shows at sigma (2^entropy where any is drawn), and truth",
      ("task", "k", *(f"{sigma[i]:.2f}" for i in at), "truth", f"draw at {sigma[0]:.2f}"),
      [
        (
          name,
          f"{found['k']:.1f}",
          *(number(found["steps"]["candidates"][i]) for i in at),
          number(found["steps"]["truth"]),
          f"{found['steps']['drawn'][0]:.0%}",
        )
        for name, found in watched.items()
      ],
    )
  if "against" in result:
    show_against(result["against"])
  for note in notes(result):
    console.say(note)


def with_mean(result: dict[str, Any], name: str) -> dict[str, Any]:
  """What is said of every task and, where there are several, of their mean under this name."""
  mean = {name: result["mean"]} if len(result["tasks"]) > 1 else {}
  return {**result["tasks"], **mean}


def show_against(found: dict[str, Any]) -> None:
  """What is here above an earlier evaluation, per task and for their mean."""
  console.table(
    f"here less {found['folder']}, on the same cases and seeds; p by itself, Holm's over tasks",
    ("task", "pairs", "problems", *(f"{m}{said}" for m in scoring.COMPARED for said in GAINED)),
    [
      (
        name,
        block.get("pairs", found["pairs"]),
        block["score"]["problems"],
        *(text for m in scoring.COMPARED for text in gained(block[m])),
      )
      for name, block in with_mean(found, "mean").items()
    ],
  )
  for note in comparing.notes(found):
    console.say(note)


def gained(lead: dict[str, Any]) -> tuple[str, str, str]:
  """A difference with its interval, the two means, the p-value and that of Holm's correction."""
  means = f"{lead['there']:.2f}, {lead['here']:.2f}"
  p = ", ".join(stats.chance(lead[name]) for name in ("p", "holm") if name in lead)
  return stats.spell(lead), means, p


def number(found: dict[str, Any] | None) -> str:
  """An estimate alone; a dash where there was nothing to see."""
  return "-" if found is None else f"{found['estimate']:.2f}"


def spread(found: dict[str, Any]) -> tuple[str, str, str, str]:
  """Cases compared, entropy, that of even draws, log2 k; dashes where no case can be compared."""
  if "entropy" not in found:
    return "-", "-", "-", "-"
  numbers = stats.spell(found["entropy"]), f"{found['even']:.2f}", f"{found['log_k']:.2f}"
  return f"{found['compared']} of {found['cases']}", *numbers


def notes(result: dict[str, Any]) -> list[str]:
  """Why some numbers have no interval, over what intervals are taken, and what was not finite."""
  systems = {
    n: block["systems"][scoring.MODEL] for n, block in with_mean(result, scoring.MEAN).items()
  }
  said = [f"no interval{text}." for text in scoring.without(systems)]
  for name, block in result["tasks"].items():
    if block["problems"] < block["cases"]:
      said.append(
        f"{name}: its {block['cases']} cases are {block['problems']} different problems, over "
        "which intervals are taken."
      )
    if block["broken"]:
      said.append(f"{name}: {block['broken']} runs are not finite and count as 0.")
  return said
