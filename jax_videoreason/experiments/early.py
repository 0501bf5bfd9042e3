"""Early pruning: seeds are judged by the answer read from x0 at an early step."""

import numpy as np

from jax_videoreason.edits import BLOCK_UPDATE
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.readings import majority
from jax_videoreason.experiments.results import Claim, Result
from jax_videoreason.experiments.study import experiment
from jax_videoreason.interventions import depth, ensemble_runs, identity, where

EARLY = 0.15  # of the steps, where the follow-up reads the plan


@experiment(
  tasks=("maze", "pick", "select_largest", "tictactoe"),
  claims=(
    Claim(
      says="seeds pruned early by their agreement beat one seed (2603.30043)",
      of="early_gain",
      statistic="success of the kept seed minus one seed, read at 15% of the steps",
      above=0.05,
      paper="long mazes 7% to 67% with a verifier, by the follow-up",
    ),
    Claim(
      says="an early vote is as good as a late one",
      of="late_minus_early",
      statistic="success of the final vote minus the vote at 15% of the steps",
      below=0.05,
      paper="plan fixed in the first steps, by the follow-up",
    ),
  ),
  zero=("ensemble_gain",),
  cost=lambda sizes: 2,
)
def early(ctx: Context) -> Result:
  """Can seeds be judged by the answer that x0 gives at an early step, and the rest be saved?

  All seeds of a case run to step i; the first one with the commonest answer goes on alone (no
  oracle). Success of its final answer against the network evaluations that this costs, as a
  multiple of one seed, for every i; beside it one seed, the mean of all, the vote at the end, the
  best of all with an oracle at the cost of all, and the training-free ensemble (block updates of
  the layers from half to three quarters of the depth, averaged at the first step).

  Limits: nothing is rerun: every seed was run to its end once and the cost is counted, which is
  exact because seeds do not touch each other. No verifier is used.
  """
  by_seed = ctx.by_seed()
  if len(by_seed) < 2:
    raise ValueError(f"pruning {len(by_seed)} seed, wanted two or more: --config.seeds=4.")
  sizes = ctx.sizes
  base = identity(sizes, edits=("mix",), sites=BLOCK_UPDATE)
  middle = where(sizes, steps=0, layers=depth(sizes.L))
  _, trace = ctx.denoise(base)
  final, _ = ctx.denoise(ensemble_runs(base, middle, list(by_seed)))
  together = ctx.read(final[by_seed[0]], by_seed[0]).right[-1].astype(float)
  said = ctx.read(trace.x0)
  right = said.right[-1][by_seed].astype(float)  # seed case
  steps = ctx.sizes.S
  kept = np.stack([majority(said.answer[s][by_seed]) for s in range(steps)])
  success = np.stack([np.take_along_axis(right, k[None], 0)[0] for k in kept])
  read_at = max(0, round(EARLY * steps) - 1)
  spent = np.arange(1, steps + 1)
  values = {
    "success": success,
    "one_seed": right[0],
    "mean_of_seeds": right.mean(0),
    "oracle": right.max(0),
    "final_vote": success[-1],
    "ensemble": together,
    "ensemble_gain": together - right[0],
    "early_gain": success[read_at] - right[0],
    "late_minus_early": success[-1] - success[read_at],
    "early_readout": said.right[:, by_seed].mean(1).astype(float),
    "cost": (len(by_seed) * spent + steps - spent) / steps,
  }
  axes = {name: ("case",) for name in values}
  axes |= {"success": ("step", "case"), "early_readout": ("step", "case"), "cost": ("step",)}
  return Result(values=values, axes=axes, points=ctx.points, titles=TITLES)


TITLES = {
  "success": "Success when all seeds but one are dropped at this step",
  "one_seed": "Success of one seed",
  "mean_of_seeds": "Mean success of all seeds",
  "oracle": "Success of the best seed (oracle)",
  "final_vote": "Success of the vote at the end",
  "ensemble": "Success of the ensemble at the first step",
  "ensemble_gain": "Gain of the ensemble over one seed",
  "early_gain": "Gain of pruning at 15% of the steps",
  "late_minus_early": "Final vote minus vote at 15% of the steps",
  "early_readout": "Share of seeds whose x0 shows a right answer",
  "cost": "Network evaluations when pruned at this step (one seed = 1)",
}
