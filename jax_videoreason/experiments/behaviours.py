"""Behaviours along the steps: self-correction, enhancement, memory, perception before action."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from jax_videoreason import probes as linear
from jax_videoreason.axes import Array
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.readings import grown, per_run
from jax_videoreason.experiments.results import Claim, Result, known_mean
from jax_videoreason.experiments.study import experiment
from jax_videoreason.reductions import squeeze
from jax_videoreason.stats import SEED
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import TapSpec
from jax_videoreason.tasks import ENDING, Metadata, Task, draw

KEPT = 0.9  # preservation from which the picture counts as perceived
HIDES = 0.9  # process of an occlusion above which its curtain hides what it should
PARTS = ("preservation", "process")  # of a score
MOST_HIDDEN = 4  # objects of a case that are probed while they are hidden
WIDTH = 64  # columns of an object's mean after a fixed random projection


def tapped(sizes: Sizes, *, stride: int, regions: Any = None) -> TapSpec:
  """Means of regions R P T; None = empty ones."""
  regions = jnp.zeros((sizes.R, MOST_HIDDEN, sizes.T)) if regions is None else regions
  steps = tuple(range(0, sizes.S, stride))
  return TapSpec(sites=("resid_post",), reduce=("region_mean",), steps=steps, regions=regions)


@experiment(
  tasks=("maze", "pick", "occlusion", "select_largest"),
  claims=(
    Claim(
      number=11,
      says="enhancement: incomplete answers grow, nothing taken back",
      of="enhanced",
      statistic="share whose begun answer gains parts at a step and loses none at any, of runs "
      "whose answer has parts and is read at two steps",
      above=0.05,
      share=True,
      paper="occurs, no rate given",
    ),
    Claim(
      number=11,
      says="answers are corrected more often than spoiled",
      of="net_correction",
      statistic="share with a flip wrong to right minus right to wrong, of runs read at two steps "
      "before the last",
      above=0.0,
      paper="occurs, no rate given",
    ),
    Claim(
      says="working memory: what a curtain hides comes back unchanged",
      of="remembered",
      statistic="share with a right final answer, of occlusion runs that do hide the objects",
      above=0.5,
      share=True,
      paper="shown on single cases",
    ),
    Claim(
      says="working memory: a hidden object can be read from the hidden states while it is hidden",
      of="memory",
      statistic="accuracy of the colour minus shuffled labels, mean over layers and steps",
      above=0.1,
      paper="early steps already hold the hidden object, shown on single cases",
    ),
    Claim(
      says="perception comes before action",
      of="action_after",
      statistic="step of the first right answer minus step at which the picture stands, in shares",
      above=0.05,
      paper="shown on single cases",
    ),
  ),
  taps=tapped,
  finish=lambda result, **options: with_memory(result),
  least={"stride": 1},
)
def behaviours(ctx: Context, *, stride: int = 2) -> Result:
  """How often does the model correct itself, extend its answer, remember, look before it acts?

  From x0 at every step. Correction and relapse: flips wrong to right and right to wrong.
  Enhancement: an answer that is begun gains parts at some step and loses none at any: the cells of
  a trail in maze, the bars that stand in sort_bars. Only steps are compared at which each part is
  wholly there or not at all, so that a picture which becomes legible does not grow; the answers of
  other tasks have no parts and are not asked. Memory: in occlusion a curtain hides objects (where
  the process of the final video scores .9) and must leave them as they were; also at which step
  that is already so, and whether the colour of a square can be read linearly from the tokens at its
  place on the latent frames that show nothing but the curtain there (probes as in `probes`, unseen
  cases, beside shuffled labels; every `stride`-th step). Perception: the first step at which what
  must not change is in place (preservation of .9); action: the first step with a right answer.

  Limits: all but the probe of memory is read from the decoded picture. A token is larger than a
  square, so its neighbours may show beside it. What a video VAE of the past frames keeps in its
  latents counts as memory too. Runs that are never right have no step of action.
  """
  steps = tuple(range(0, ctx.sizes.S, stride))
  regions, colours = hidden(ctx)
  taps = tapped(ctx.sizes, stride=stride, regions=regions)
  _, trace = ctx.denoise(taps=taps)
  means = jnp.asarray(trace.taps["resid_post/region_mean"], jnp.float32)[:, :, 0]  # S' L R P D
  x0 = np.asarray(trace.x0)
  tasks = [ctx.task(run) for run in range(ctx.sizes.R)]
  marks = {part: np.empty(x0.shape[:2]) for part in PARTS}
  parts = np.full(x0.shape[:2], None, object)

  def look(step: int, run: int, frames: np.ndarray) -> None:
    case = ctx.cases[run].metadata
    score = tasks[run].score(frames, case)
    for part, found in marks.items():
      found[step, run] = getattr(score, part)
    parts[step, run] = parts_shown(tasks[run], frames, case)

  said = per_run(ctx.read(x0, look=look))
  preserved, process = marks.values()
  hides = process[-1] > HIDES
  stands = preserved >= KEPT
  perceived = np.where(stands.any(0), stands.argmax(0) / ctx.sizes.S, np.nan)
  occlusion = np.array([case.task == "occlusion" for case in ctx.cases])
  values = {
    **grown(parts),
    "corrected": said["corrected"],
    "spoiled": said["spoiled"],
    "net_correction": said["corrected"] - said["spoiled"],
    "remembered": np.where(occlusion & hides, said["right"][-1], np.nan),
    "remembered_from": np.where(occlusion & hides, said["first_hit"], np.nan),
    "perceived": perceived,
    "acted": said["first_hit"],
    "action_after": said["first_hit"] - perceived,
    "preservation": preserved,
    "score": said["score"],
  }
  axes = {n: ("step", "run") if v.ndim == 2 else ("run",) for n, v in values.items()}
  values |= {
    "features": rearrange(np.asarray(squeeze(means, WIDTH)), "s l r p k -> r p s l k"),
    "colours": colours,
  }
  axes |= {"features": ("run", "object", "probed", "layer", "column"), "colours": ("run", "object")}
  points = ctx.points | {"probed": list(steps)}
  return Result(values=values, axes=axes, points=points, titles=TITLES)


def hidden(ctx: Context) -> tuple[Array, np.ndarray]:
  """R P T, where each hidden object is while all of it is hidden; R P, its colour ("" = none)."""
  f, h, w = ctx.tokens
  regions = np.zeros((ctx.sizes.R, MOST_HIDDEN, f, h, w), np.float32)
  colours = np.full((ctx.sizes.R, MOST_HIDDEN), "", dtype="U64")
  for run, case in enumerate(ctx.cases):
    of: Any = getattr(ctx.task(run), "hidden", None)
    things = [] if of is None else of(case.metadata["problem"])
    for number, (colour, box, frames) in enumerate(things):
      # the first latent frame is the first pixel frame, each other one is the next few
      later = rearrange(frames[1:], "(f n) -> f n", f=f - 1).all(1)
      if number < MOST_HIDDEN and later.any():
        picture = np.zeros(case.first_frame.shape[:2], np.float32)
        picture[box[0] : box[2], box[1] : box[3]] = 1
        tokens = reduce(picture, "(h a) (w b) -> h w", "mean", h=h, w=w)
        regions[run, number, 1:] = rearrange(later, "f -> f 1 1") * tokens
        colours[run, number] = colour
  return jnp.asarray(rearrange(regions, "r p f h w -> r p (f h w)")), colours


def with_memory(result: Result) -> Result:
  """The probes of hidden objects in place of their features."""
  kept = {n: v for n, v in result.values.items() if n not in ("features", "colours")}
  axes = {name: result.axes[name] for name in kept}
  features, colours = (np.asarray(result.values[name]) for name in ("features", "colours"))
  cases, seeds, count, steps = features.shape[:4]
  found = linear.beside_shuffled(
    rearrange(features, "n e p s l k -> (s l) (n e p) k"),
    rearrange(colours, "n e p -> (n e p)"),
    np.repeat(np.arange(cases), seeds * count),
    seed=SEED,
  )
  notes = list(result.notes)
  if found is None:
    notes.append("Too few hidden objects for a probe of memory.")
  else:
    maps = rearrange(found, "b (s l) (n e p) -> b s l n e p", s=steps, n=cases, e=seeds)
    right, shuffled = (known_mean(part, -1) for part in maps)
    kept |= {
      "memory_accuracy": right,
      "memory_shuffled": shuffled,
      "memory_selectivity": right - shuffled,
      "memory": (right - shuffled).mean((0, 1)),
    }
    axes |= dict.fromkeys(kept.keys() - axes.keys(), ("probed", "layer", "case", "seed"))
    axes["memory"] = ("case", "seed")
  signed = () if found is None else ("memory_selectivity",)
  return dataclasses.replace(result, values=kept, axes=axes, notes=notes, signed=signed)


def parts_shown(task: Task, frames: np.ndarray, metadata: Metadata) -> frozenset[Any] | None:
  """The parts of an answer that a clip ends with, as `Task.parts` has them."""
  return task.parts(draw.label(frames[-ENDING:]), metadata["problem"])


TITLES = {
  "enhanced": "Runs whose answer gains parts and loses none, of those whose answer has parts",
  "growth_steps": "Steps at which a begun answer gains parts",
  "corrected": "Runs with a flip wrong to right, of those read at two steps before the last",
  "spoiled": "Runs with a flip right to wrong, of those read at two steps before the last",
  "net_correction": "Corrected minus spoiled",
  "remembered": "Occlusion: right at the end, of runs that hide the objects",
  "remembered_from": "Occlusion: first step at which it is right, share of all",
  "memory_accuracy": "Memory: accuracy of a hidden square's colour, by step and layer",
  "memory_shuffled": "The same with shuffled labels",
  "memory_selectivity": "Memory: accuracy minus shuffled",
  "memory": "Memory: accuracy minus shuffled, mean over layers and steps",
  "perceived": "Step at which the picture stands, share of all",
  "acted": "First step with a right answer, share of all",
  "action_after": "Action minus perception, share of all steps",
  "preservation": "Preservation of what must not change",
  "score": "Score of x0",
}
