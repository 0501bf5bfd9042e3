"""The training-free ensemble over seeds, beside what the same network evaluations buy otherwise."""

from typing import Any

import jax
import numpy as np
from einops import rearrange

from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.readings import majority
from jax_videoreason.experiments.results import Claim, Result
from jax_videoreason.experiments.study import experiment
from jax_videoreason.interventions import (
  ENSEMBLES,
  Intervention,
  closeness_weights,
  depth,
  ensemble_runs,
  identity,
  where,
)
from jax_videoreason.structs import Sizes

# Shares of the depth; the middle is layers 20 to 29 of 40.
DEPTHS = {"early": (0.0, 0.25), "middle": (0.5, 0.75), "late": (0.75, 1.0), "all": (0.0, 1.0)}
AVERAGED = (*ENSEMBLES, "out", "velocity", "latents")
CLOSE = "close"  # weights by closeness to the mean guess, in place of equal ones
KINDS = (*AVERAGED, "update close", "out close", "update early", "update late", "update all")


def cost(sizes: Sizes, *, kinds: Any, steps: Any, more_steps: int) -> float:
  return 1 + len(kinds) * len(steps) + (more_steps if more_steps > 1 else 0)


def parsed(kind: str) -> tuple[str, str, bool]:
  """(what is averaged, at which depth, by closeness) of a kind such as "update late"."""
  what, *more = kind.split()
  depths = [word for word in more if word in DEPTHS]
  unknown = [word for word in more if word not in (*DEPTHS, CLOSE)]
  if what not in AVERAGED or unknown or len(depths) > (what in ENSEMBLES):
    raise ValueError(
      f"no kind {kind!r}: wanted one of {', '.join(AVERAGED)}, then {CLOSE!r} for weights by "
      f"closeness, and for the first three also one of {', '.join(DEPTHS)}."
    )
  return what, (depths or ["middle"])[0], CLOSE in more


def room(kind: str, sizes: Sizes) -> Intervention:
  """The identity that has what a kind needs."""
  what = parsed(kind)[0]
  if what in ENSEMBLES:
    return identity(sizes, edits=("mix",), sites=ENSEMBLES[what])
  wanted = ("mix_latents", "noise") if what == "latents" else ("mix_out",)
  return identity(sizes, edits=wanted, out="velocity" if what == "velocity" else "x0")


def edit_of(
  kind: str, sizes: Sizes, by_seed: np.ndarray, count: int, sigma: np.ndarray, close: np.ndarray
) -> Intervention:
  """The first seeds take the average of all during the first `count` steps.

  close: S N n, weights by closeness.
  """
  what, part, weighed = parsed(kind)
  layers = depth(sizes.L, *DEPTHS[part]) if what in ENSEMBLES else None
  return ensemble_runs(
    room(kind, sizes),
    where(sizes, steps=slice(0, min(count, sizes.S)), layers=layers),
    list(by_seed),
    what="out" if what == "velocity" else what,
    weights=close if weighed else "mean",
    amount=0.5 if what == "resid" else 1.0,
    sigma=sigma,
  )


def closeness(x0: np.ndarray, by_seed: np.ndarray) -> np.ndarray:
  """S N n: the weight of each seed in its case, softmax of -distance of x0 to the mean.

  Equal weights where a seed is not finite: that case counts for nothing.
  """
  grouped = rearrange(x0[:, by_seed], "s n m f h w c -> s m n (f h w c)")
  weights = np.asarray(jax.vmap(jax.vmap(closeness_weights))(grouped))
  known = np.isfinite(weights).all(-1, keepdims=True)
  return np.where(known, weights, np.float32(1 / len(by_seed)))


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
  least={"steps": 1, "more_steps": 1},
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
  latents, put back on the noise level. A second word changes one thing: close, seeds weighed by
  softmax(-distance of their x0 to the mean); early, late, all, other layers. Gain: score minus that
  of the first seed alone, same noise. Beside it, at the cost of all seeds: the mean of single
  seeds, the best of all (oracle), the medoid in x0, the majority of the parsed answers; and one
  seed with as many times the steps.

  Limits: which tensor, which steps and which layers the published ensemble averages is not known,
  so the variants stand side by side and none is picked after the fact. The oracle sees the truth.
  Each site is a program of its own. Weights by closeness come from the run without an edit.
  """
  by_seed, sizes = ctx.by_seed(), ctx.sizes
  seeds = len(by_seed)
  if seeds < 2:
    raise ValueError(f"an ensemble of {seeds} seed, wanted two or more: --config.seeds=3.")
  first = by_seed[0]
  latents, trace = ctx.denoise()
  close = closeness(np.asarray(trace.x0), by_seed)
  said = ctx.read(latents)
  alone, right = said.score[-1], said.right[-1].astype(float)

  def at(point: tuple[str, int]) -> dict[str, np.ndarray]:
    kind, count = point
    edit = edit_of(kind, sizes, by_seed, count, ctx.sigma, close)
    # an open site changes how the program is fused, by 1e-5, so the control has a twin of its own
    plain, own = (latents, alone[first]) if not ctx.control else twin(kind)
    final, _ = ctx.denoise(edit)
    moved = np.abs(final[first] - plain[first]).max(axis=(1, 2, 3, 4))
    return {"gain": ctx.read(final[first], first).score[-1] - own, "moved": moved}

  def twin(kind: str) -> tuple[np.ndarray, np.ndarray]:
    plain, _ = ctx.denoise(room(kind, sizes))
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
  return Result(
    values=values,
    axes=axes,
    points=points,
    titles=TITLES,
    notes=(costs(seeds, sizes, steps),),
  )


def costs(seeds: int, sizes: Sizes, steps: tuple[int, ...]) -> str:
  """What each use of the seeds costs, in network evaluations of a single seed."""
  few = [f"{1 + (seeds - 1) * min(n, sizes.S) / sizes.S:.2f} ({n} steps)" for n in steps]
  return (
    "Cost in network evaluations, one seed = 1: the ensemble "
    f"{', '.join(few)}; mean, best, medoid and majority {seeds}."
  )


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
