"""Chain of steps: how the answer forms along the denoising steps."""

import numpy as np
from einops import rearrange

from jax_videoreason import media
from jax_videoreason.experiments.context import Context, title
from jax_videoreason.experiments.readings import per_run
from jax_videoreason.experiments.results import CELL, Claim, Result
from jax_videoreason.experiments.study import experiment
from jax_videoreason.tasks.draw import VISIBLE

SHARES = (0.1, VISIBLE, 0.3)  # from which a candidate may count as visible
OVERLAID = ("rotate", "sort_bars", "occlusion")  # the answers exclude each other at one place


@experiment(
  tasks=("maze", "pick", "select_largest", "occlusion", "tictactoe", "sort_bars", "rotate"),
  claims=(
    Claim(
      number=7,
      says="most cases show several candidate answers at once on the way",
      of="several",
      statistic="share with two or more visible candidates at some step, of runs that show any",
      above=0.5,
      share=True,
      paper="about 72% of 200 cases",
    ),
    Claim(
      number=11,
      says="self-correction: answers flip from wrong to right",
      of="corrected",
      statistic="share with a flip wrong to right, of runs read at two steps before the last",
      above=0.05,
      share=True,
      paper="occurs, no rate given",
    ),
    Claim(
      says="the decision falls in the middle of the trajectory",
      of="decided",
      statistic="step of the last change of the answer, share of all steps, of runs that change it "
      "or show it from step 0 on",
      above=0.4,
      below=0.6,
      paper="steps 20 to 30 of 50",
    ),
    Claim(
      says="disputed: the plan is fixed in the first steps (2603.30043)",
      of="decided",
      statistic="step of the last change of the answer, share of all steps, of runs that change it "
      "or show it from step 0 on",
      below=0.15,
      paper="first 10 to 15% of the steps, by its follow-up",
    ),
  ),
  least={"strips": 0},
)
def chain_of_steps(ctx: Context, *, strips: int = 2) -> Result:
  """How does the answer form along the denoising steps, and when is it settled?

  x0 is decoded at every step and its answer parsed; the soft parser counts the candidates that are
  visible, each from a fifth of the blend that its place shows, and the share of their weight on
  right answers. Commitment is the first step from which the answer equals the final one and stays;
  beside it stands the first step at which any answer can be read, and the step of the last change
  from one answer to another, on which the claims about the decision rest (0 where the answer is
  there from step 0 on and no other is read). Multi-path: candidates at different places;
  superposed: candidates that exclude each other at one place (rotate, sort_bars, occlusion). Cases
  with an odd number are ambiguous (k right answers).

  Limits: the share from which a candidate is visible is a choice; `several_from` says what others
  would give. Where several orders of bars or squares make one blend (sort_bars, occlusion), all
  of them count. Nothing is edited here, so there is no identity control. Runs whose final answer
  can't be read have no commitment. Runs that can first be read after step 0 and never say another
  answer count for no claim: this tells when the picture became legible and not when the answer
  was made. As those can only have decided later than at step 0, what is left leans to 0. Runs
  that never show a candidate are not counted as "not several", and runs read at fewer than two
  steps before the last not as "not corrected".
  """
  _, trace = ctx.denoise()
  x0 = np.asarray(trace.x0)
  said = ctx.read(x0)
  found = per_run(said)
  overlaid = np.array([case.task in OVERLAID for case in ctx.cases])
  several = found["several"]
  k = np.array([float(case.metadata["k"]) for case in ctx.cases])
  shown = ctx.by_seed()[0][:strips]
  values = {
    **found,
    "multi_path": np.where(overlaid, np.nan, several),
    "superposed": np.where(overlaid, several, np.nan),
    "several_from": np.where(
      np.isnan(several), np.nan, found["second"] >= np.array(SHARES)[:, None]
    ),
    "several_plain": np.where(k == 1, several, np.nan),
    "several_ambiguous": np.where(k > 1, several, np.nan),
    "right_answers": k,
  }
  axes: dict[str, tuple[str, ...]]
  axes = {name: ("step", "run") if np.ndim(v) == 2 else ("run",) for name, v in values.items()}
  axes["several_from"] = ("share", "run")
  points = ctx.points | {
    "strip": [f"{title(ctx.cases[run])}, seed {ctx.setting.chosen.seeds[0]}" for run in shown],
    "share": [f"{share:.0%} of a blend" for share in SHARES],
  }
  if len(shown):
    drawn = [media.shrink(frames, CELL) for frames in ctx.setting.decode(x0[:, shown])]
    values["strip"] = rearrange(np.stack(drawn), "(s n) f h w c -> n s f h w c", n=len(shown))
    axes["strip"] = ("strip", "step", "pixel_frame", "height", "width", "rgb")
  return Result(values=values, axes=axes, points=points, titles=TITLES)


TITLES = {
  "right": "Share of runs whose x0 shows a right answer",
  "readable": "Share of runs whose x0 shows a readable answer",
  "candidates": "Visible candidate answers",
  "entropy": "Entropy of the candidates (bits)",
  "mass": "Share of the candidates' weight on right answers",
  "score": "Score of x0",
  "several": "Runs with two or more candidates at some step, of those that show any",
  "several_from": "Runs with two or more candidates, each visible from so much",
  "second": "Largest share of a blend that a second candidate has at a step",
  "multi_path": "Runs with several candidates at different places",
  "superposed": "Runs with several candidates at one place",
  "several_plain": "Several candidates, cases with one right answer",
  "several_ambiguous": "Several candidates, cases with k right answers",
  "most_candidates": "Most candidates at once",
  "right_answers": "Right answers k",
  "corrected": "Runs with a flip wrong to right, of those read at two steps before the last",
  "spoiled": "Runs with a flip right to wrong, of those read at two steps before the last",
  "flips": "Changes of the answer per run",
  "first_readable": "First step whose answer can be read, share of all steps",
  "decided": "Step of the last change of the answer (0 = there from step 0 on), share of all steps",
  "commitment": "Step of commitment, share of all steps",
  "commitment_sigma": "Sigma at commitment",
  "first_hit": "First step with a right answer, share of all steps",
  "strip": "The video that x0 shows along the steps",
}
