"""How good a model is on unseen cases, with intervals, beside clips that no model made.

  videoreason evaluate --out runs/scores
  videoreason evaluate --tasks maze,pick --cases 16 --seeds 16 --ambiguous ambiguous --out ...
  videoreason evaluate --checkpoint DIR --split ood --mesh seed=2,fsdp=4 --out runs/ood
  videoreason evaluate --tasks mymodule:MyTask --out runs/mine

Per task: score, strict success and right answers, each with a 95% bootstrap interval over problems,
beside the prompts shuffled between cases, a video that stands still, a cut to a random answer, the
nearest training clip and the truth. Where several answers are right: whether seeds differ, and how
many candidates x0 shows along the steps. Stopped at any time, the same command goes on with the
tasks that are left. Leaves result.json, table.parquet (a row per clip), tasks/, report.html.
"""

from typing import Any

from absl.flags import DEFINE_integer, DEFINE_string, FlagValues

from jax_videoreason import (
  axes,
  baselines,
  cli,
  console,
  evaluate,
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


POINTS = 6  # steps whose candidates are shown
OWN_KEYS = ("seeds",)


def define(flags: FlagValues) -> None:
  cli.define_config(flags, "mini")
  cli.define_out(flags)
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


def main(flags: FlagValues, words: list[str]) -> None:
  cli.required(flags, "out")
  asked = evaluate.plan(flags.tasks, flags.split, flags.cases, flags.ambiguous)
  chosen = settings.from_config({**cli.resolved(flags), "seeds": flags.seeds})
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
  show(result)
  page = scorecard.render(flags.out)
  console.say(f"report: {page.resolve().as_uri()}")


def show(result: dict[str, Any]) -> None:
  """Scores with intervals, the scores of the other clips, whether seeds differ, and how many
  candidates x0 shows along the steps."""
  mean = "mean"
  blocks = (
    {**result["tasks"], mean: result["mean"]} if len(result["tasks"]) > 1 else result["tasks"]
  )
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
  for note in notes(result):
    console.say(note)


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
  without: dict[str, list[str]] = {}
  mean = {"the mean over tasks": result["mean"]} if len(result["tasks"]) > 1 else {}
  for name, block in {**result["tasks"], **mean}.items():
    for note in {found["note"] for found in block["systems"][scoring.MODEL].values()} - {None}:
      without.setdefault(note, []).append(name)
  said = [f"no interval for {', '.join(names)}: {note}." for note, names in without.items()]
  for name, block in result["tasks"].items():
    if block["problems"] < block["cases"]:
      said.append(
        f"{name}: its {block['cases']} cases are {block['problems']} different problems, over "
        "which intervals are taken."
      )
    if block["broken"]:
      said.append(f"{name}: {block['broken']} runs are not finite and count as 0.")
  return said
