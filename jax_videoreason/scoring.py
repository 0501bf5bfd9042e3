"""From the marks of single clips to numbers per task, with intervals over problems.

A row is one clip: {task, system, case (number within the evaluation), problem, k, seed, score,
...}. Seeds of a case and cases of a problem (another picture or wording of it) are averaged first:
they are not independent. Problems are resampled.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jax_videoreason import baselines, stats
from jax_videoreason.stats import SEED

MODEL, SHUFFLED, VAE = "model", "prompts shuffled", "truth through the VAE"
SYSTEMS = {
  MODEL: "the model",
  SHUFFLED: "the model, each case with the prompt of another",
  **baselines.NAMES,
  VAE: "the truth, encoded and decoded by the model's VAE",
}
MEAN = "the mean over tasks"
COMPARED = ("score", "strict")  # of two evaluations
MEASURES = {"score": stats.bootstrap, "strict": stats.share, "right": stats.share}
IN_WORDS = {"score": "the score", "strict": "strict success", "right": "right answers"}
SHOWN = 3  # best and worst videos

Row = Mapping[str, Any]


def said(found: stats.Interval) -> dict[str, Any]:
  """An interval over problems as JSON can say it; None = no interval, `note` says why."""
  ends = [float(x) if np.isfinite(x) else None for x in (found.low, found.high)]
  return {
    "estimate": float(found.estimate),
    "low": ends[0],
    "high": ends[1],
    "problems": found.cases,
    "note": found.note,
  }


def without(blocks: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Which measures of some blocks have no interval, and why: " for maze, pick: 6 cases: ..." where
  it is all of them, else " of strict success for rotate: all 8 cases are equal: ..."."""
  names: dict[tuple[str, str], list[str]] = {}
  for name, block in blocks.items():
    for note in dict.fromkeys(found["note"] for found in block.values() if found["note"]):
      lacking = [IN_WORDS[measure] for measure, found in block.items() if found["note"] == note]
      of = "" if len(lacking) == len(block) else f" of {' and '.join(lacking)}"
      names.setdefault((of, note), []).append(name)
  return [f"{of} for {', '.join(some)}: {note}" for (of, note), some in names.items()]


def per_problem(rows: Sequence[Row], system: str, measure: str) -> np.ndarray:
  """N: the mean over the cases and seeds of each problem, in the order of the problems' names."""
  own = [row for row in rows if row["system"] == system]
  return _by_problem([row[measure] for row in own], [row["problem"] for row in own])


def _by_problem(values: ArrayLike, problems: ArrayLike) -> np.ndarray:
  """The mean of the values of each problem, in the order of their names."""
  _, of = np.unique(problems, return_inverse=True)
  return np.bincount(of, weights=np.asarray(values, float)) / np.bincount(of)


def measures(rows: Sequence[Row], system: str) -> dict[str, Any]:
  """Score, strict success and right answers of one system."""
  return {
    name: said(interval(per_problem(rows, system, name), seed=SEED))
    for name, interval in MEASURES.items()
  }


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
  """a - b, problem by problem: its interval, and the p-value of a sign-flip test."""
  return _lead(stats.paired(a, b, seed=SEED), a - b)


def _lead(found: stats.Interval, differences: np.ndarray) -> dict[str, Any]:
  """An interval of differences with the p-value of their sign-flip test."""
  p = stats.sign_flip(differences, seed=SEED).p
  return {**said(found), "p": float(p) if np.isfinite(p) else None}


def summary(rows: Sequence[Row], watched: Mapping[str, Any] | None) -> dict[str, Any]:
  """All numbers of one task; watched: `evaluate.watch` of its ambiguous cases."""
  systems = [name for name in SYSTEMS if any(row["system"] == name for row in rows)]
  own = [row for row in rows if row["system"] == MODEL]
  halves = {
    "plain": [row for row in own if row["k"] == 1],
    "ambiguous": [row for row in own if row["k"] > 1],
  }
  score = per_problem(rows, MODEL, "score")
  cases = len({row["case"] for row in own})
  return {
    "cases": cases,
    "problems": len({row["problem"] for row in own}),
    "seeds": len({(row["case"], row["seed"]) for row in own}) // cases,
    "broken": sum(row["broken"] for row in own),
    "systems": {name: measures(rows, name) for name in systems},
    "differences": {
      name: difference(score, per_problem(rows, name, "score"))
      for name in systems
      if name not in (MODEL, VAE, baselines.TRUTH)
    },
    "halves": {name: measures(half, MODEL) for name, half in halves.items() if half},
    "ambiguity": ambiguity(halves["ambiguous"], watched) if halves["ambiguous"] else None,
    "worst": shown(own, best=False),
    "best": shown(own, best=True),
  }


def ambiguity(rows: Sequence[Row], watched: Mapping[str, Any] | None) -> dict[str, Any]:
  """Whether seeds differ where several answers are right, and how candidates fall along the steps.

  right, wrong, unreadable: shares of the draws, which sum to 1. Entropies are in bits, over the
  right answers of a case's seeds, of the cases with two of them or more (`compared`): wrong answers
  differ without end and are no diversity. `even` is what as many draws would show on average if
  each were drawn from the k right answers evenly (few show less than log2 k).
  """
  cases: dict[int, list[Row]] = {}
  for row in rows:
    cases.setdefault(row["case"], []).append(row)
  seeds = len(next(iter(cases.values())))
  found: dict[str, Any] = {"cases": len(cases), "seeds": seeds}
  ks = [own[0]["k"] for own in cases.values()]
  problems = [own[0]["problem"] for own in cases.values()]
  found["k"] = float(_by_problem(ks, problems).mean())
  for name in ("right", "wrong", "unreadable"):
    shares = [float(np.mean([kind(row) == name for row in own])) for own in cases.values()]
    found[name] = said(stats.share(_by_problem(shares, problems), seed=SEED))
  if seeds > 1:
    good = [[row["answer"] for row in own if kind(row) == "right"] for own in cases.values()]
    several = [one for one in zip(good, ks, problems, strict=True) if len(one[0]) > 1]
    found["compared"] = len(several)
    if several:
      of = [problem for _, _, problem in several]
      spread = [entropy(answers) for answers, _, _ in several]
      even = [even_entropy(k, len(answers)) for answers, k, _ in several]
      found["entropy"] = said(stats.bootstrap(_by_problem(spread, of), seed=SEED))
      found["log_k"] = float(_by_problem([math.log2(k) for _, k, _ in several], of).mean())
      found["even"] = float(_by_problem(even, of).mean())
  if watched is not None:
    found["steps"] = along_steps(watched, {row["case"]: row["problem"] for row in rows})
  return found


def kind(row: Row) -> str:
  """What the end of a clip is: right, wrong or unreadable."""
  if row["answer"] is None:
    return "unreadable"
  return "right" if row["right"] else "wrong"


def entropy(answers: Sequence[Any]) -> float:
  """Bits of the distribution of one answer or more."""
  _, counts = np.unique([str(answer) for answer in answers], return_counts=True)
  share = counts / counts.sum()
  return float(-(share * np.log2(share)).sum() + 0.0)


def even_entropy(k: int, seeds: int) -> float:
  """The mean of `entropy` over `seeds` even draws from k answers, summed over the binomial."""
  total = 0.0
  for count in range(1, seeds + 1):
    chance = math.comb(seeds, count) * (1 / k) ** count * (1 - 1 / k) ** (seeds - count)
    total -= chance * count / seeds * math.log2(count / seeds)
  return k * total


def along_steps(watched: Mapping[str, Any], problem_of: Mapping[int, str]) -> dict[str, Any]:
  """Mean over problems of what x0 shows at each step, with intervals.

  problem_of: the problem of each case. candidates: the effective number, 2^entropy of the soft
  reading over the answers, over the runs in which anything is drawn (`drawn`, a share). by_k: the
  same for the cases with k right answers. truth: what the same reading makes of the videos that
  solve the cases: where a run can end.
  """
  case, k = np.asarray(watched["case"]), np.asarray(watched["k"])
  problem = np.array([problem_of[number] for number in watched["case"]])
  bits = np.array(watched["entropy"], float)  # S W, NaN where nothing is drawn
  several = 2.0**bits
  which = np.unique(problem)
  k_of = np.array([k[problem == one][0] for one in which])
  return {
    "step": watched["step"],
    "sigma": watched["sigma"],
    "candidates": _means(several, problem, which),
    "visible": _means(np.array(watched["visible"], float), problem, which),
    "right": _means(np.array(watched["mass"], float), problem, which),
    "drawn": [float(_by_problem(row, problem).mean()) for row in np.isfinite(bits)],
    "truth": _means(2.0 ** np.array([watched["truth"]], float), problem, which)[0],
    "by_k": {
      str(n): {
        "cases": len(np.unique(case[k == n])),
        "candidates": _means(several, problem, which[k_of == n]),
      }
      for n in np.unique(k_of)
    },
  }


def _means(
  values: np.ndarray, problem: np.ndarray, which: np.ndarray
) -> list[dict[str, Any] | None]:
  """For each row of values (S W): the mean over problems, of the runs that have a number."""
  rows = []
  for row in values:
    good = np.isfinite(row) & np.isin(problem, which)
    means = _by_problem(row[good], problem[good]) if good.any() else None
    rows.append(None if means is None else said(stats.bootstrap(means, seed=SEED, draws=2000)))
  return rows


def shown(rows: Sequence[Row], *, best: bool) -> list[dict[str, Any]]:
  """The case and seed of the best or worst videos, each of another case."""
  count = min(SHOWN, len({row["case"] for row in rows}) // 2)
  sign = -1 if best else 1
  order = sorted(rows, key=lambda row: (sign * row["score"], sign * row["case"]))
  first: dict[int, Row] = {}
  for row in order:
    first.setdefault(row["case"], row)
  return [{"case": row["case"], "seed": row["seed"]} for row in list(first.values())[:count]]


def over_tasks(of_task: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
  """The mean over tasks of every system, and the model's lead.

  Problems are drawn anew within each task; a task counts as much as another, however many of its
  cases are of one problem.
  """
  systems = [
    name
    for name in SYSTEMS
    if all(any(row["system"] == name for row in rows) for rows in of_task.values())
  ]

  def each(system: str, measure: str) -> list[np.ndarray]:
    return [per_problem(rows, system, measure) for rows in of_task.values()]

  # A mean over tasks is no share of problems, so its interval is that of a mean, also where the
  # measure is a share.
  leads = {
    system: [a - b for a, b in zip(each(MODEL, "score"), each(system, "score"), strict=True)]
    for system in systems
    if system not in (MODEL, VAE, baselines.TRUTH)
  }
  return {
    "systems": {
      system: {
        name: said(stats.bootstrap_within(_of_equal_weight(each(system, name)), seed=SEED))
        for name in MEASURES
      }
      for system in systems
    },
    "differences": {system: _mean_lead(lead) for system, lead in leads.items()},
  }


def _mean_lead(of_task: Sequence[np.ndarray]) -> dict[str, Any]:
  """The mean over tasks of the differences of their problems, as `difference` says one."""
  lead = _of_equal_weight(of_task)
  return _lead(stats.bootstrap_within(lead, seed=SEED), np.concatenate(lead))


def _unless_lone(lead: Mapping[str, Any], of_task: Sequence[np.ndarray]) -> dict[str, Any]:
  """A lead without its interval where one problem alone moved; of_task: differences of each task.

  A problem moved whose difference is not the commonest of its task. Where there is but one, draws
  of the problems differ by how often they have it alone: an interval of multiples of its
  difference says nothing of how far such problems spread.
  """
  if sum(stats.moving(group)[0] for group in of_task) != 1 or lead["low"] is None:
    return dict(lead)
  note = f"one problem of {lead['problems']} alone moved, which shows no spread"
  return {**lead, "low": None, "high": None, "note": note}


def _of_equal_weight(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Groups whose mean over all values is the mean of the means of the groups."""
  total = sum(len(group) for group in groups)
  return [group * total / (len(groups) * len(group)) for group in groups]


def against(pairs: Mapping[str, Sequence[tuple[Row, Row]]]) -> dict[str, Any]:
  """What one evaluation has above another, per task and for the mean over tasks.

  pairs: of each task, the rows of the model in both, of the same case and seed. here, there: the
  means over problems of the two; estimate: here less there, problem by problem. p: of the row by
  itself; holm: corrected for the number of tasks (`stats.holm`), of each measure by itself. There
  is no interval where one problem alone moved (`_unless_lone`).
  """
  of_task: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
  for name, both in pairs.items():
    ours, others = zip(*both, strict=True)
    of_task[name] = {
      measure: (per_problem(ours, MODEL, measure), per_problem(others, MODEL, measure))
      for measure in COMPARED
    }

  def mean(measure: str) -> dict[str, Any]:
    two = [found[measure] for found in of_task.values()]
    here, there = (float(np.mean([part.mean() for part in own])) for own in zip(*two, strict=True))
    leads = [a - b for a, b in two]
    return {"here": here, "there": there, **_unless_lone(_mean_lead(leads), leads)}

  found = {
    name: {
      "pairs": len(pairs[name]),
      **{
        measure: {
          "here": float(a.mean()),
          "there": float(b.mean()),
          **_unless_lone(difference(a, b), [a - b]),
        }
        for measure, (a, b) in two.items()
      },
    }
    for name, two in of_task.items()
  }
  for measure in COMPARED:
    leads = [block[measure] for block in found.values()]
    corrected = stats.holm([np.nan if lead["p"] is None else lead["p"] for lead in leads])
    for lead, p in zip(leads, corrected, strict=True):
      lead["holm"] = float(p) if np.isfinite(p) else None
  return {"tasks": found, "mean": {measure: mean(measure) for measure in COMPARED}}
