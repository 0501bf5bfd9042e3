"""Which layer carries the answer: one layer at a time takes what another input has there."""

from typing import Any

import numpy as np
from einops import rearrange, reduce

from jax_videoreason import answers, metrics
from jax_videoreason.edits import BLOCK_UPDATE
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.results import Claim, Result
from jax_videoreason.experiments.study import experiment
from jax_videoreason.interventions import Intervention, identity, patch_runs, where
from jax_videoreason.structs import Sizes

VARIANTS: dict[str, tuple[str, ...]] = {
  "stream": ("resid_post",),
  "update": BLOCK_UPDATE,
  "objects": ("resid_post",),
  "attention": ("attn_out",),
  "mlp": ("mlp_out",),
}


def best_layer(rows: np.ndarray) -> np.ndarray:
  """The largest mean over layers."""
  return rows.mean(-2).max(-1)


def cost(sizes: Sizes, *, variants: Any, edited: Any, stride: int, branches: str) -> float:
  programs = {(VARIANTS.get(v), v == "objects") for v in variants}
  points = len(range(0, sizes.L, stride)) * len(kept_steps(sizes, edited))
  return len(programs) + len(variants) * points


def kept_steps(sizes: Sizes, edited: Any) -> list[int]:
  """The counts of edited steps that the schedule has."""
  return sorted({min(count, sizes.S) for count in edited})


@experiment(
  tasks="pick",
  runs=("counterpart", "case"),
  claims=(
    Claim(
      number=9,
      says="swapping one middle layer at the first step turns the answer round",
      of="reversal[variant=update,edited=1]",
      by=best_layer,
      statistic="share with the counterpart's answer, at the layer where it is largest, of the "
      "runs that the whole stream turns round",
      above=0.5,
      share=True,
      paper="complete reversal at layer 20 (or 21) of 40",
    ),
    Claim(
      says="the guess of the first step follows a swapped layer",
      of="pull_first[variant=update,edited=1]",
      by=best_layer,
      statistic="pull of x0 at step 0 to the counterpart, at the layer where it is largest",
      above=0.5,
      paper="the reversal is shown in x0",
    ),
    Claim(
      says="a whole stream swap can't single out a layer: it is the same at every layer",
      of="spread_of_stream",
      statistic="largest minus smallest pull of x0 at step 0 over layers, whole residual stream",
      below=0.01,
      exact=True,
      paper="not considered",
    ),
  ),
  zero=("pull", "flip", "pull_first"),
  cost=cost,
  least={"edited": 1, "stride": 1},
)
def layer_swap(
  ctx: Context,
  *,
  variants: tuple[str, ...] = ("stream", "update", "objects", "attention"),
  edited: tuple[int, ...] = (1, 2, 5, 10),
  stride: int = 1,
  branches: str = "both",
) -> Result:
  """Which layer carries the answer, when one layer takes what another input has there?

  Each case rides beside its counterpart: the same picture, prompt and noise, the two groups of
  objects exchanged. During the first steps one layer of the case takes from the counterpart:
  stream, the whole residual stream after it; update, what the layer adds; objects, the stream on
  the tokens of the objects alone; attention or mlp, that term alone. Pull: the way that x0 has gone
  from its own clean value to that of the counterpart (0 to 1). Flip: the final answer is the
  counterpart's; asked only where both clean answers can be read and differ, and an edited answer
  that can't be read is no flip. Reversal: the same, of the runs that `stream` turns round in as
  many edited steps. The published description fits each variant; all are shown.

  Limits: the largest over layers is biased upward; the maps show every layer with one error rate.
  Each variant is a program of its own. `stream` is the positive control and sets the ceiling: after
  it everything is the counterpart's, whatever the layer, so no layer can do more in so many steps.
  Where it turns no run round, as one early step of many hardly moves the video, the claim about one
  layer can't be told.
  """
  sizes = ctx.sizes
  if unknown := [v for v in variants if v not in VARIANTS]:
    raise ValueError(f"no variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}.")
  if branches not in ("both", "positive"):
    raise ValueError(f"branches={branches!r}, wanted 'both' or 'positive' (with the prompt).")
  other, own = ctx.runs("counterpart"), ctx.runs("case")
  counts, layers = kept_steps(sizes, edited), list(range(0, sizes.L, stride))
  region = objects(ctx)
  clean: dict[Any, Any] = {}

  def measure(latents: np.ndarray, trace: Any) -> dict[str, np.ndarray]:
    x0, of = np.asarray(trace.x0), clean["x0"]
    pull = np.asarray(metrics.pull(x0[:, own], own=of[:, own], other=of[:, other]))
    flip = flipped(ctx.read(latents[own], own).answer[-1], clean["own"], clean["other"])
    return {"pull": pull[-1], "pull_first": pull[0], "flip": flip}

  def at(variant: str, base: Intervention, point: tuple[int, int]) -> dict[str, np.ndarray]:
    count, layer = point
    place = where(
      sizes,
      steps=slice(0, count),
      layers=layer,
      region=region if variant == "objects" else None,
      branches=None if branches == "both" else 0,
    )
    return measure(*ctx.denoise(patch_runs(base, place, source=other, target=own)))

  rows = []
  for variant in variants:
    room = ("mix", "tokens") if variant == "objects" else ("mix",)
    base = identity(sizes, edits=room, sites=VARIANTS[variant])
    key = (VARIANTS[variant], variant == "objects")
    if clean.get("key") != key:
      latents, trace = ctx.denoise(base)
      said = ctx.read(latents).answer[-1]
      clean = {"key": key, "x0": np.asarray(trace.x0), "own": said[own], "other": said[other]}
    points = [(count, layer) for count in counts for layer in layers]
    rows.append(ctx.map(lambda point, v=variant, b=base: at(v, b, point), points))
  values = {
    name: rearrange(np.stack([row[name] for row in rows]), "v (e l) r -> v e l r", e=len(counts))
    for name in rows[0]
  }
  axes: dict[str, tuple[str, ...]] = dict.fromkeys(values, ("variant", "edited", "layer", "run"))
  if "stream" in variants:
    # of the guess itself: after one step of many the final video hardly moves, whatever was swapped
    stream = values["pull_first"][variants.index("stream"), 0]
    values["spread_of_stream"], axes["spread_of_stream"] = np.ptp(stream, axis=0), ("run",)
    turned = values["flip"][variants.index("stream")].max(1, keepdims=True) == 1  # edited 1 run
    values["reversal"] = np.where(turned, values["flip"], np.nan)
    axes["reversal"] = axes["flip"]
  points = ctx.points | {
    "variant": list(variants),
    "edited": counts,
    "layer": layers,
  }
  signed = ("pull", "pull_first")
  return Result(values=values, axes=axes, points=points, titles=TITLES, signed=signed)


def flipped(answer: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
  """1 where an edited answer is the counterpart's, else 0; NaN where the clean answers `own` and
  `other` are equal or one of them can't be read."""
  asked = answers.readable(own) & answers.readable(other) & (own != other)
  return np.where(asked, (answer == other).astype(float), np.nan)


def objects(ctx: Context) -> np.ndarray:
  """R T bool: tokens where a case and its counterpart show different pixels."""
  f, h, w = ctx.tokens
  frames = np.stack([case.first_frame for case in ctx.cases])
  apart = (frames[ctx.runs("case")] != frames[ctx.runs("counterpart")]).any(-1)
  tokens = reduce(apart.astype(float), "r (h a) (w b) -> r h w", "max", h=h, w=w) > 0
  return np.concatenate([np.repeat(rearrange(tokens, "r h w -> r 1 (h w)"), f, 1)] * 2).reshape(
    ctx.sizes.R, -1
  )


TITLES = {
  "pull": "Pull of the final video to the counterpart, by number of edited steps",
  "pull_first": "Pull of x0 at step 0 to the counterpart",
  "flip": "Runs whose final answer is the counterpart's, where both clean ones are read and differ",
  "reversal": "Runs whose final answer is the counterpart's, of those that the stream turns round",
  "spread_of_stream": "Whole stream: largest minus smallest pull of x0 at step 0 over layers",
}
