"""Behaviours along the steps: self-correction, enhancement, memory, perception before action."""

from typing import Any

import numpy as np

from jax_videoreason.experiments.base import experiment
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.readings import per_run
from jax_videoreason.experiments.results import Claim, Result

KEPT = 0.9  # preservation from which the picture counts as perceived
GROWN = 0.02  # rise of the score that counts as growth


@experiment(
  tasks=("maze", "pick", "occlusion", "select_largest"),
  claims=(
    Claim(
      number=11,
      says="enhancement: incomplete answers grow, nothing taken back",
      of="enhanced",
      statistic="share of runs whose score rises at a step without any loss before its end",
      above=0.05,
      share=True,
      paper="occurs, no rate given",
    ),
    Claim(
      number=11,
      says="answers are corrected more often than spoiled",
      of="net_correction",
      statistic="share of runs with a flip wrong to right minus right to wrong",
      above=0.0,
      paper="occurs, no rate given",
    ),
    Claim(
      says="working memory: what a curtain hides comes back unchanged",
      of="remembered",
      statistic="share of occlusion runs whose final answer is right",
      above=0.5,
      share=True,
      paper="shown on single cases",
    ),
    Claim(
      says="perception comes before action",
      of="action_after",
      statistic="step of the first right answer minus step at which the picture stands, in shares",
      above=0.05,
      paper="shown on single cases",
    ),
  ),
)
def behaviours(ctx: Context) -> Result:
  """How often does the model correct itself, extend its answer, remember, look before it acts?

  From x0 at every step. Correction and relapse: flips wrong to right and right to wrong.
  Enhancement: the score of an answer that is not yet complete rises at some step and never falls
  by as much afterwards. Memory: in occlusion a curtain hides objects and must leave them as they
  were; also at which step that is already so. Perception: the first step at which what must not
  change is in place (preservation of .9); action: the first step with a right answer.

  Limits: behaviours are read from the decoded picture, not from hidden states (probes does that).
  Runs that are never right have no step of action.
  """
  _, trace = ctx.denoise()
  x0 = np.asarray(trace.x0)
  said = per_run(ctx.read(x0))
  score = said["score"]
  rises = np.diff(score, axis=0) > GROWN
  falls = np.diff(score, axis=0) < -GROWN
  started = (score[:-1] > GROWN) & rises
  preserved = preservation(ctx, x0)
  steps = ctx.sizes.S
  stands = preserved >= KEPT
  perceived = np.where(stands.any(0), stands.argmax(0) / steps, np.nan)
  occlusion = np.array([case.task == "occlusion" for case in ctx.cases])
  values = {
    "enhanced": (started.any(0) & ~falls.any(0)).astype(float),
    "growth_steps": started.sum(0).astype(float),
    "corrected": said["corrected"],
    "spoiled": said["spoiled"],
    "net_correction": said["corrected"] - said["spoiled"],
    "remembered": np.where(occlusion, said["right"][-1], np.nan),
    "remembered_from": np.where(occlusion, said["first_hit"], np.nan),
    "perceived": perceived,
    "acted": said["first_hit"],
    "action_after": said["first_hit"] - perceived,
    "preservation": preserved,
    "score": score,
  }
  axes = {n: ("step", "run") if v.ndim == 2 else ("run",) for n, v in values.items()}
  return Result(values=values, axes=axes, points=ctx.points, titles=TITLES)


def preservation(ctx: Context, x0: Any) -> np.ndarray:
  """S R: how much of what must not change is in place."""
  clips = ctx.setting.decode(x0)
  tasks = [ctx.task(run) for run in range(ctx.sizes.R)]
  return np.array(
    [
      [
        task.score(clip, case.metadata).preservation
        for task, clip, case in zip(tasks, row, ctx.cases, strict=True)
      ]
      for row in clips
    ]
  )


TITLES = {
  "enhanced": "Runs that grow without loss",
  "growth_steps": "Steps at which an incomplete answer grows",
  "corrected": "Runs with a flip wrong to right",
  "spoiled": "Runs with a flip right to wrong",
  "net_correction": "Corrected minus spoiled",
  "remembered": "Occlusion: right at the end",
  "remembered_from": "Occlusion: first step at which it is right, share of all",
  "perceived": "Step at which the picture stands, share of all",
  "acted": "First step with a right answer, share of all",
  "action_after": "Action minus perception, share of all steps",
  "preservation": "Preservation of what must not change",
  "score": "Score of x0",
}
