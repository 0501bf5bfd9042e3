"""What can be read from the hidden states: linear probes for every layer and step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jax_videoreason import probes as linear
from jax_videoreason import stats
from jax_videoreason.experiments.base import experiment
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.results import SEED, Claim, Result
from jax_videoreason.reductions import squeeze
from jax_videoreason.taps import TapSpec
from jax_videoreason.tasks import Metadata

WIDTH = 64  # columns of a region's mean after a fixed random projection
FOLDS = 4
PERCEPTION, REASONING = "perception", "reasoning"

Label = str | int | None

SEEN: Mapping[str, Mapping[str, Callable[[Metadata], Label]]] = {
  "pick": {"colour": lambda m: m["problem"]["groups"][0]["colour"]},
  "select_largest": {"colour": lambda m: m["problem"]["discs"][0]["colour"]},
  "maze": {"place of the goal": lambda m: m["problem"]["goal"][1]},
  "occlusion": {"colour": lambda m: m["problem"]["squares"][0]["colour"]},
  "sides": {"lit side": lambda m: m["problem"]["side"]},
}
THOUGHT: Mapping[str, Callable[[Label, Metadata], Label]] = {
  "pick": lambda answer, m: answer,
  "select_largest": lambda answer, m: answer,
  "maze": lambda answer, m: None if answer is None else str(answer)[:1],
  "sides": lambda answer, m: answer,
}


@experiment(
  tasks=("pick", "select_largest", "maze"),
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
      of="first_reasoning",
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
  finish=lambda result, **options: fit(result),
)
def probes(ctx: Context, *, stride: int = 1, site: str = "resid_post") -> Result:
  """What can be read linearly from the hidden states, at which layer and step?

  Region means are tapped inside the scan: the four quarters of the picture, on the first latent
  frame and on the others, each projected to 64 columns. Perception: the colour of the first group
  or disc, the column of the goal. Reasoning: the final answer of the run (its first move in maze).
  All layers and steps train at once; every case is judged by a probe that never saw it (4 folds).
  Beside it the same with shuffled labels; selectivity is the difference.

  Limits: a linear probe shows what can be read, not what is used. Few cases make weak probes: an
  empty map is no proof of absence. Tasks differ in their chance level; the shuffled map shows it.
  """
  sizes = ctx.sizes
  regions = quarters(ctx)
  steps = tuple(range(0, sizes.S, stride))
  taps = TapSpec(sites=(site,), reduce=("region_mean",), steps=steps, regions=regions)
  final, trace = ctx.denoise(taps=taps)
  means = jnp.asarray(trace.taps[f"{site}/region_mean"], jnp.float32)[:, :, 0]  # S L R P D
  features = rearrange(np.asarray(squeeze(means, WIDTH)), "s l r p k -> s l r (p k)")
  said = ctx.read(final).answer[-1]
  labels = {PERCEPTION: [], REASONING: []}
  for case, answer in zip(ctx.cases, said, strict=True):
    seen = [str(of(case.metadata)) for of in SEEN.get(case.task, {}).values()]
    think = THOUGHT.get(case.task, lambda answer, m: None)(answer, case.metadata)
    labels[PERCEPTION].append(f"{case.task} {seen[0]}" if seen else "")
    labels[REASONING].append("" if think is None else f"{case.task} {think}")
  points = ctx.points | {"kind": list(labels), "step": list(steps)}
  points["sigma"] = ctx.points["sigma"]
  return Result(
    values={
      "features": features,
      "labels": np.array(list(labels.values()), dtype="U64"),
    },
    axes={"features": ("step", "layer", "run", "feature"), "labels": ("kind", "run")},
    points=points,
    titles=TITLES,
  )


def quarters(ctx: Context) -> Any:
  """R 8 T: the four quarters of the first latent frame, and of all others."""
  f, h, w = ctx.bundle.card.latents.tokens((ctx.sizes.F, ctx.sizes.H, ctx.sizes.W))
  weights = np.zeros((8, f, h, w), np.float32)
  number = 0
  for time in (slice(0, 1), slice(1, None) if f > 1 else slice(0, 1)):
    for y in (slice(0, h // 2), slice(h // 2, None)):
      for x in (slice(0, w // 2), slice(w // 2, None)):
        weights[number, time, y, x] = 1
        number += 1
  flat = rearrange(weights, "p f h w -> 1 p (f h w)")
  return np.repeat(flat, ctx.sizes.R, axis=0)


def fit(result: Result) -> Result:
  """Trains the probes of every task and kind; NaN where a run has no label or a task too few."""
  features, labels = (np.asarray(result.values[name]) for name in ("features", "labels"))
  s, _, n, seeds, _ = np.shape(features)
  x = rearrange(features, "s l n e k -> (s l) (n e) k")
  said = rearrange(labels, "kind n e -> kind (n e)")
  case = np.repeat(np.arange(n), seeds)
  task = np.array([str(label).split()[0] for label in result.points["case"]])[case]
  right = np.full((2, len(said), *x.shape[:2]), np.nan)
  notes = list(result.notes)
  for kind, row in enumerate(said):
    for name in np.unique(task):
      mine = np.flatnonzero((task == name) & (row != ""))
      if len(np.unique(row[mine])) < 2 or len(np.unique(case[mine])) < max(FOLDS, stats.LEAST):
        notes.append(f"{name}: too few labels of {result.points['kind'][kind]} for a probe.")
        continue
      turned = row[mine][np.random.default_rng(SEED).permutation(len(mine))]
      for shuffled, label in enumerate((row[mine], turned)):
        found = linear.crossed(x[:, mine], label, case[mine], folds=FOLDS)
        right[shuffled, kind][:, mine] = found
  maps = rearrange(right, "b kind (s l) (n e) -> b kind s l n e", s=s, n=n)
  selectivity = maps[0] - maps[1]
  third = max(1, len(selectivity[0, 0]) // 3)
  early, late = (
    selectivity[:, :, part].mean((1, 2)) for part in (slice(third), slice(-third, None))
  )
  values = {
    "accuracy": maps[0],
    "shuffled": maps[1],
    "selectivity": selectivity,
    "perception_selectivity": selectivity[0].mean((0, 1)),
    "first_reasoning": selectivity[1, 0, -third:].mean(0),
    "perception_lead": (early[0] - late[0]) - (early[1] - late[1]),
  }
  axes = {n: ("kind", "step", "layer", "case", "seed") if v.ndim == 5 else ("case", "seed")
          for n, v in values.items()}  # fmt: skip
  return Result(values=values, axes=axes, points=result.points, titles=TITLES, notes=notes)


TITLES = {
  "accuracy": "Accuracy of the probe on unseen cases",
  "shuffled": "The same with shuffled labels",
  "selectivity": "Selectivity: accuracy minus shuffled",
  "perception_selectivity": "Perception: selectivity over all layers and steps",
  "first_reasoning": "Reasoning: selectivity at the first step, last third of the layers",
  "perception_lead": "Lead of perception over reasoning in early layers",
}
