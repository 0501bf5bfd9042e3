"""The training-free ensemble over seeds, beside what the same network evaluations buy otherwise."""

from typing import Any

import numpy as np

from jax_videoreason.experiments.base import experiment
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.readings import majority
from jax_videoreason.experiments.results import Claim, Result
from jax_videoreason.interventions import Intervention, ensemble_runs, identity, where
from jax_videoreason.structs import Sizes

MIDDLE = (0.5, 0.75)  # of the depth: layers 20 to 29 of 40
SITED = {"update": "mix", "attn": "mix", "resid": "mix"}
KINDS = ("update", "attn", "resid", "out", "velocity", "latents")


def cost(sizes: Sizes, *, kinds: Any, steps: Any, more_steps: int) -> float:
  return 1 + len(kinds) * len(steps) + (more_steps if more_steps > 1 else 0)


@experiment(
  tasks=("maze", "pick", "select_largest", "tictactoe"),
  claims=(
    Claim(
      says="the ensemble of block updates at the first step raises the score",
      of="gain[kind=update,steps=1]",
      statistic="score of the ensemble minus score of its own seed alone",
      above=0.02,
      paper="a gain, on VBVR-Bench",
    ),
    Claim(
      says="the ensemble beats a vote among the same seeds",
      of=("gain[kind=update,steps=1]", "vote_gain"),
      by=lambda rows: (rows[..., 0] - rows[..., 1]).mean(-1),
      statistic="gain of the ensemble minus gain of the majority answer of all seeds",
      above=0.02,
      paper="not compared",
    ),
  ),
  zero=("gain", "moved"),
  cost=cost,
)
def ensemble(
  ctx: Context,
  *,
  kinds: tuple[str, ...] = KINDS,
  steps: tuple[int, ...] = (1, 3),
  more_steps: int = 3,
) -> Result:
  """Does averaging several seeds inside the model give better answers than other uses of the cost?

  The seeds of a case ride together; the first one takes the average of all at the first steps and
  goes on alone. Averaged: update, what the layers from half to three quarters of the depth add;
  attn, their attention term; resid, half of their whole stream; out, the guess x0; velocity;
  latents, put back on the noise level. Gain: score minus that of the first seed alone, same noise.
  Beside it, at the cost of all seeds: the mean of single seeds, the best of all (oracle), the
  medoid in x0, the majority of the parsed answers; and one seed with as many times the steps.

  Limits: which tensor, which steps and which layers the published ensemble averages is not known,
  so the variants stand side by side and none is picked after the fact. The oracle sees the truth.
  Each site is a program of its own.
  """
  by_seed, sizes = ctx.by_seed(), ctx.sizes
  if len(by_seed) < 2:
    raise ValueError(f"an ensemble of {len(by_seed)} seed, wanted two or more: --config.seeds=3.")
  first = by_seed[0]
  low, high = (round(part * sizes.L) for part in MIDDLE)
  layers = slice(low, max(high, low + 1))

  def room(kind: str) -> Intervention:
    sites = {"update": ("attn_out", "cross_out", "mlp_out"), "attn": ("attn_out",)}
    if kind in SITED:
      return identity(sizes, edits=("mix",), sites=sites.get(kind, ("resid_post",)))
    wanted = ("mix_latents", "noise") if kind == "latents" else ("mix_out",)
    return identity(sizes, edits=wanted, out="velocity" if kind == "velocity" else "x0")

  latents, _ = ctx.denoise()
  said = ctx.read(latents)
  alone, right = said.score[-1], said.right[-1].astype(float)

  def at(point: tuple[str, int]) -> dict[str, np.ndarray]:
    kind, count = point
    place = where(
      sizes, steps=slice(0, min(count, sizes.S)), layers=layers if kind in SITED else None
    )
    what = "out" if kind == "velocity" else kind
    amount = 0.5 if kind == "resid" else 1.0
    edit = ensemble_runs(
      room(kind), place, list(by_seed), what=what, amount=amount, sigma=ctx.sigma
    )
    # an open site changes how the program is fused, by 1e-5, so the control has a twin of its own
    plain, own = (latents, alone[first]) if not ctx.control else twin(kind)
    final, _ = ctx.denoise(edit)
    moved = np.abs(final[first] - plain[first]).max(axis=(1, 2, 3, 4))
    return {"gain": ctx.read(final[first], first).score[-1] - own, "moved": moved}

  def twin(kind: str) -> tuple[np.ndarray, np.ndarray]:
    plain, _ = ctx.denoise(room(kind))
    return plain, ctx.read(plain[first], first).score[-1]

  rows = ctx.map(at, [(kind, count) for kind in kinds for count in steps])
  values = {n: v.reshape(len(kinds), len(steps), -1) for n, v in rows.items()}
  scores = alone[by_seed]
  base = scores[0]
  values |= {
    "alone": base,
    "mean_gain": scores.mean(0) - base,
    "oracle_gain": scores.max(0) - base,
    "medoid_gain": np.take_along_axis(scores, medoid(latents, by_seed)[None], 0)[0] - base,
    "vote_gain": np.take_along_axis(scores, majority(said.answer[-1][by_seed])[None], 0)[0] - base,
    "right": right[first],
  }
  if more_steps > 1:
    longer = ctx.vary(steps=more_steps * sizes.S)
    values["steps_gain"] = longer.read(longer.denoise()[0][first], first).score[-1] - base
  axes = {n: ("kind", "steps", "case") if v.ndim == 3 else ("case",) for n, v in values.items()}
  points = ctx.points | {"kind": list(kinds), "steps": [str(count) for count in steps]}
  return Result(values=values, axes=axes, points=points, titles=TITLES)


def medoid(latents: np.ndarray, by_seed: np.ndarray) -> np.ndarray:
  """N: the seed whose final latents are nearest to the mean of all seeds of the case."""
  x = latents[by_seed]
  return ((x - x.mean(0, keepdims=True)) ** 2).sum((2, 3, 4, 5)).argmin(0)


TITLES = {
  "gain": "Gain of the ensemble over its own seed",
  "moved": "Largest change of the final latents by the ensemble",
  "alone": "Score of the first seed alone",
  "right": "Right answers of the first seed alone",
  "mean_gain": "Mean of single seeds minus the first",
  "oracle_gain": "Best of all seeds (oracle) minus the first",
  "medoid_gain": "Medoid of all seeds minus the first",
  "vote_gain": "Majority answer of all seeds minus the first",
  "steps_gain": "One seed with as many times the steps, minus the first",
}
