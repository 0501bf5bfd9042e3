"""Fewer frames: does the answer need the time axis of the video?"""

import numpy as np

from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.results import Claim, Result
from jax_videoreason.experiments.study import experiment
from jax_videoreason.structs import Sizes


def cost(sizes: Sizes, *, fewer: tuple[int, ...]) -> float:
  return 1 + len(fewer)


@experiment(
  tasks=("maze", "pick", "select_largest"),
  claims=(
    Claim(
      number=6,
      says="fewer frames change little",
      of="worst_drop",
      statistic="drop of the score with the fewest frames",
      below=0.1,
      paper="minor effect, no number",
    ),
  ),
  zero=("drop",),
  cost=cost,
  least={"fewer": 1},
)
def frames(ctx: Context, *, fewer: tuple[int, ...] = (13,)) -> Result:
  """How much does the answer suffer when the video has fewer frames?

  The same cases with fewer pixel frames, from the first frames of the same noise, so runs are
  paired. Each count of frames is a program of its own.

  Limits: the truth of a shorter video is faster; a model trained on one length alone is asked for
  something new, which the paper's model was not.
  """
  clean, _ = ctx.denoise()
  score = ctx.read(clean).score[-1]

  def with_frames(count: int) -> np.ndarray:
    short = ctx.vary(frames=count)
    return score - short.read(short.denoise()[0]).score[-1]

  drop = ctx.map(with_frames, list(fewer))
  return Result(
    values={"clean": score, "drop": drop, "worst_drop": drop[int(np.argmin(fewer))]},
    axes={"clean": ("run",), "drop": ("frames", "run"), "worst_drop": ("run",)},
    points=ctx.points | {"frames": [f"{count} frames" for count in fewer]},
    titles={
      "clean": "Score with all frames",
      "drop": "Drop of the score",
      "worst_drop": "Drop with the fewest frames",
    },
  )
