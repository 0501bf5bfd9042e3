"""What can be read from the hidden states: linear probes for every layer and step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jax_videoreason import probes as linear
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.results import Claim, Result, known_mean
from jax_videoreason.experiments.study import experiment
from jax_videoreason.reductions import squeeze
from jax_videoreason.stats import SEED
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import TapSpec
from jax_videoreason.tasks import Metadata

WIDTH = 64  # columns of a region's mean after a fixed random projection
PERCEPTION, RELATION, ANSWER = "perception", "relation", "answer"
REASONING = (RELATION, ANSWER)
NO_LABEL = ""

Label = str | int | None


def first_disc(m: Metadata) -> Mapping[str, Any]:
  """The first disc in reading order."""
  return m["problem"]["discs"][0]


def rank_of(values: list[float]) -> int:
  """How many of the values are larger than the first."""
  return sum(value > values[0] for value in values)


# task -> target -> (kind, (metadata, the final answer of the run) -> label, None = it has none)
TARGETS: Mapping[str, Mapping[str, tuple[str, Callable[[Metadata, Any], Label]]]] = {
  "pick": {
    "colour": (PERCEPTION, lambda m, a: m["problem"]["groups"][0]["colour"]),
    "count": (PERCEPTION, lambda m, a: len(m["problem"]["groups"][0]["along"])),
    "answer": (ANSWER, lambda m, a: a),
  },
  "select_largest": {
    "colour": (PERCEPTION, lambda m, a: first_disc(m)["colour"]),
    "size": (PERCEPTION, lambda m, a: "large" if first_disc(m)["radius"] > 0.2 else "small"),
    "rank": (RELATION, lambda m, a: rank_of([d["radius"] for d in m["problem"]["discs"]])),
    "answer": (ANSWER, lambda m, a: a),
  },
  "maze": {
    "position": (PERCEPTION, lambda m, a: m["problem"]["goal"][1]),
    "next cell": (ANSWER, lambda m, a: None if a is None else str(a)[:1]),
  },
  "sort_bars": {
    "colour": (PERCEPTION, lambda m, a: m["problem"]["bars"][0]["colour"]),
    "rank": (RELATION, lambda m, a: rank_of([b["height"] for b in m["problem"]["bars"]])),
  },
  "sides": {
    "side": (PERCEPTION, lambda m, a: m["problem"]["side"]),
    "answer": (ANSWER, lambda m, a: a),
  },
}


def tapped(sizes: Sizes, *, stride: int, site: str, regions: Any = None) -> TapSpec:
  """Means of regions R 8 T; None = empty ones."""
  regions = jnp.zeros((sizes.R, 8, sizes.T)) if regions is None else regions
  steps = tuple(range(0, sizes.S, stride))
  return TapSpec(sites=(site,), reduce=("region_mean",), steps=steps, regions=regions)


@experiment(
  tasks=("pick", "select_largest", "maze", "sort_bars"),
  claims=(
    Claim(
      says="what is seen can be read from the hidden states",
      of="perception_selectivity",
      statistic="accuracy minus shuffled labels, mean over layers and steps",
      above=0.1,
      paper="early layers perceive",
    ),
    Claim(
      says="the final answer can be read from the hidden states of the first step",
      of="first_answer",
      statistic="accuracy minus shuffled labels at the first step, last third of the layers",
      above=0.1,
      paper="decided early, by the follow-up",
    ),
    Claim(
      says="perception comes before reasoning: it is read at earlier layers",
      of="perception_lead",
      statistic="selectivity, perception minus reasoning, first third of layers less last third",
      above=0.05,
      paper="early layers perceive, middle layers reason",
    ),
  ),
  taps=tapped,
  finish=lambda result, **options: fit(result),
  least={"stride": 1},
)
def probes(ctx: Context, *, stride: int = 1, site: str = "resid_post") -> Result:
  """What can be read linearly from the hidden states, at which layer and step?

  Region means are tapped inside the scan: the four quarters of the picture, on the first latent
  frame and on the others, each projected to 64 columns. Perception: colour, number, size or place
  of the first object. Reasoning: the rank of the first object among all, the final answer of the
  run, its next cell (maze); the claim about the answer counts the last two alone. All layers and
  steps train at once, target by target; every case is judged by a probe that never saw its problem
  (4 folds). Beside it the same with shuffled labels; selectivity is the difference.

  Limits: a linear probe shows what can be read, not what is used. Few cases make weak probes: an
  empty map is no proof of absence. Targets differ in their chance level; the shuffled map shows it.
  """
  sizes = ctx.sizes
  steps = tuple(range(0, sizes.S, stride))
  taps = tapped(sizes, stride=stride, site=site, regions=quarters(ctx))
  final, trace = ctx.denoise(taps=taps)
  means = jnp.asarray(trace.taps[f"{site}/region_mean"], jnp.float32)[:, :, 0]  # S L R P D
  features = rearrange(np.asarray(squeeze(means, WIDTH)), "s l r p k -> s l r (p k)")
  said = ctx.read(final).answer[-1]
  names = targets_of(task for task in TARGETS)
  labels = np.full((len(names), ctx.sizes.R), NO_LABEL, dtype="U64")
  for run, (case, answer) in enumerate(zip(ctx.cases, said, strict=True)):
    for target, (_, of) in TARGETS.get(case.task, {}).items():
      label = of(case.metadata, answer)
      labels[names.index(f"{case.task}: {target}"), run] = NO_LABEL if label is None else str(label)
  problems = np.array([case.metadata["hash"] for case in ctx.cases])
  points = ctx.points | {"target": names, "step": list(steps)}
  return Result(
    values={"features": features, "labels": labels, "problem": problems},
    axes={
      "features": ("step", "layer", "run", "feature"),
      "labels": ("target", "run"),
      "problem": ("run",),
    },
    points=points,
    titles=TITLES,
  )


def quarters(ctx: Context) -> Any:
  """R 8 T: the four quarters of the first latent frame, and of all others."""
  f, h, w = ctx.tokens
  weights = np.zeros((8, f, h, w), np.float32)
  number = 0
  for time in (slice(0, 1), slice(1, None) if f > 1 else slice(0, 1)):
    for y in (slice(0, h // 2), slice(h // 2, None)):
      for x in (slice(0, w // 2), slice(w // 2, None)):
        weights[number, time, y, x] = 1
        number += 1
  flat = rearrange(weights, "p f h w -> 1 p (f h w)")
  return np.repeat(flat, ctx.sizes.R, axis=0)


def targets_of(names: Iterable[str]) -> list[str]:
  """Such as "pick: colour", of the tasks named."""
  return [f"{task}: {target}" for task in names for target in TARGETS.get(task, {})]


def fit(result: Result) -> Result:
  """Trains the probes of every target; NaN for the cases of other tasks."""
  features, labels, problem = (
    np.asarray(result.values[name]) for name in ("features", "labels", "problem")
  )
  s, _, n, _, _ = np.shape(features)
  x = rearrange(features, "s l n e k -> (s l) (n e) k")
  # another picture of a problem can give it away
  hashes = rearrange(problem, "n e -> (n e)").tolist()
  number = {key: place for place, key in enumerate(dict.fromkeys(hashes))}
  same = np.array([number[key] for key in hashes])
  here = dict.fromkeys(str(label).split()[0] for label in result.points["case"])
  notes, names, found = list(result.notes), [], []
  if not targets_of(here):
    known = ", ".join(probes.tasks)
    raise ValueError(
      f"nothing is known to be probed in cases of {', '.join(here)}, wanted some of {known} too: "
      "give --config.tasks=pick."
    )
  for target in targets_of(here):
    row = rearrange(labels[list(result.points["target"]).index(target)], "n e -> (n e)")
    right = linear.beside_shuffled(x, row, same, seed=SEED)
    if right is None:
      notes.append(f"{target}: too few labels for a probe.")
      continue
    names.append(target)
    found.append(rearrange(right, "b (s l) (n e) -> b s l n e", s=s, n=n))
  if not found:
    raise ValueError(
      f"{n} cases of {', '.join(here)} are too few for any probe: give --config.cases=16 or more."
    )
  maps = np.stack(found, axis=1)  # b target s l n e
  selectivity = maps[0] - maps[1]
  kinds = np.array([kind_of(target) for target in names])
  seen, thought, answered = (
    known_mean(selectivity[np.isin(kinds, some)], 0) for some in (PERCEPTION, REASONING, ANSWER)
  )
  third = max(1, maps.shape[3] // 3)
  lead = seen - thought
  values = {
    "accuracy": maps[0],
    "shuffled": maps[1],
    "selectivity": selectivity,
    "perception": seen.mean(0),
    "reasoning": thought.mean(0),
    "perception_selectivity": seen.mean((0, 1)),
    "first_answer": answered[0, -third:].mean(0),
    "perception_lead": lead[:, :third].mean((0, 1)) - lead[:, -third:].mean((0, 1)),
  }
  axes = {name: AXES[value.ndim] for name, value in values.items()}
  points = {**result.points, "target": names}
  return Result(
    values=values, axes=axes, points=points, titles=TITLES, notes=notes, signed=("selectivity",)
  )


def kind_of(target: str) -> str:
  task, _, name = target.partition(": ")
  return TARGETS[task][name][0]


AXES = {
  5: ("target", "step", "layer", "case", "seed"),
  3: ("layer", "case", "seed"),
  2: ("case", "seed"),
}
TITLES = {
  "accuracy": "Accuracy of the probe on unseen cases",
  "shuffled": "The same with shuffled labels",
  "selectivity": "Selectivity: accuracy minus shuffled",
  "perception": "Selectivity of perception by layer, mean over steps",
  "reasoning": "Selectivity of reasoning by layer, mean over steps",
  "perception_selectivity": "Perception: selectivity over all layers and steps",
  "first_answer": "The answer: selectivity at the first step, last third of the layers",
  "perception_lead": "Lead of perception over reasoning in early layers",
}
