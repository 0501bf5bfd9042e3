"""The headline measures under other samplers: shift, steps, guidance, expert switch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_videoreason import metrics
from jax_videoreason.experiments.base import experiment
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.readings import per_run
from jax_videoreason.experiments.results import Claim, Result
from jax_videoreason.interventions import identity, noise_at, where
from jax_videoreason.structs import Sizes


def settings_of(ctx: Context, names: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
  """The chosen settings; those of the expert switch only where the bundle has one."""
  chosen, boundary = ctx.setting.chosen, ctx.bundle.card.boundary
  known: dict[str, Mapping[str, Any]] = {
    "as is": {},
    "shift 1": {"shift": 1.0},
    "shift 3": {"shift": 3.0},
    "shift 8": {"shift": 8.0},
    "half the steps": {"steps": max(2, chosen.steps // 2)},
    "twice the steps": {"steps": 2 * chosen.steps},
    "no guidance": {"guidance": (1.0,)},
  }
  if boundary is not None:
    known |= {
      "switch earlier": {"boundary": min(1.0, boundary + 0.06)},
      "switch later": {"boundary": max(0.0, boundary - 0.2)},
      "high noise expert only": {"boundary": 0.0},
      "low noise expert only": {"boundary": 1.0},
    }
  if unknown := [n for n in names if n not in known]:
    raise ValueError(f"no setting {unknown[0]!r} for this model; there are: {', '.join(known)}.")
  return {name: known[name] for name in names or known}


def cost(sizes: Sizes, *, settings: tuple[str, ...], places: int) -> float:
  counts = {"half the steps": max(2, sizes.S // 2), "twice the steps": 2 * sizes.S}
  names = settings or ("", *("",) * 4, *counts)

  def of(steps: int) -> int:
    return steps + sum(steps - at for at in places_of(steps, places))

  return sum(of(counts.get(name, sizes.S)) for name in names) / sizes.S


def places_of(steps: int, places: int) -> list[int]:
  """Steps spread over the trajectory; not the first, at which renoise is another seed."""
  return np.linspace(0, steps - 1, places + 1).round().astype(int)[1:].tolist()


def highest(rows: np.ndarray) -> np.ndarray:
  """Where the mean curve is highest, 0 = first place, 1 = last; NaN for fewer than five places."""
  if rows.shape[-1] < 5:
    return np.full(rows.shape[:-2], np.nan)
  return rows.mean(-2).argmax(-1) / max(1, rows.shape[-1] - 1)


def moved(rows: np.ndarray) -> np.ndarray:
  """Distance between the highest places of two curves, the last axis."""
  return np.abs(highest(rows[..., 0]) - highest(rows[..., 1]))


@experiment(
  tasks=("maze", "pick", "select_largest"),
  claims=(
    Claim(
      number=14,
      says="the peak of sensitivity is there without an expert switch",
      of="one_network",
      by=highest,
      statistic="place of the largest 1 - CKA of the final video under renoise, share of the steps",
      above=0.35,
      below=0.65,
      paper="steps 20 to 30; its model switches experts at step 21",
    ),
    Claim(
      number=14,
      says="the peak of sensitivity does not move with the expert switch",
      of=("sensitivity[setting=switch earlier]", "sensitivity[setting=switch later]"),
      by=moved,
      statistic="distance between the peaks with the switch moved up and down, share of the steps",
      below=0.2,
      paper="not controlled for",
    ),
  ),
  zero=("sensitivity",),
  cost=cost,
)
def controls(ctx: Context, *, settings: tuple[str, ...] = (), places: int = 7) -> Result:
  """Do the measures survive another shift, step count, guidance or expert switch?

  Under every setting: score, right answers, commitment in sigma, several candidates, correction,
  and how far the final video moves (1 - CKA) when its noise is drawn anew at places spread over the
  steps. Settings: shift 1, 3, 8; half and twice the steps; guidance off; where the model has two
  experts also the switch moved and each expert alone. Under `twice the steps` and shift the same
  place is another sigma: the table gives commitment in sigma.

  Limits: places are coarse. The claim without a switch can only be asked of a model without one,
  and that of a switch that is moved only of a model with two experts. `low noise expert only`
  leaves the very first step, at sigma 1, to the other one.
  """
  chosen = settings_of(ctx, settings)
  rows = []
  for changes in chosen.values():
    here = ctx.vary(**changes)
    sizes = here.sizes
    base = identity(sizes, edits=("noise",))
    final, clean = here.resume(None, 0, base)
    said = per_run(here.read(clean.x0))

    def at(step: int, here=here, base=base, clean=clean, final=final) -> np.ndarray:
      edit = noise_at(base, where(here.sizes, steps=step), mode="renoise", sigma=here.sigma)
      latents, _ = here.resume(clean, step, edit)
      same = (latents == final).all(axis=(1, 2, 3, 4))
      return np.where(same, 0.0, 1 - np.asarray(metrics.cka(latents, final)))

    rows.append(
      {
        "score": said["score"][-1],
        "right": said["right"][-1],
        "commitment": said["commitment"],
        "commitment_sigma": said["commitment_sigma"],
        "flips": said["flips"],
        "several": said["several"],
        "corrected": said["corrected"],
        "sensitivity": here.map(at, places_of(sizes.S, places)),
      }
    )
  values = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  axes = {
    n: ("setting", "place", "run") if v.ndim == 3 else ("setting", "run") for n, v in values.items()
  }
  if ctx.bundle.card.boundary is None and "as is" in chosen:
    values["one_network"] = values["sensitivity"][list(chosen).index("as is")]
    axes["one_network"] = ("place", "run")
  shares = np.linspace(0, 1, places + 1)[1:].round(3).tolist()
  points = ctx.points | {"setting": list(chosen), "place": shares}
  return Result(values=values, axes=axes, points=points, titles=TITLES)


TITLES = {
  "score": "Score",
  "right": "Right answers",
  "commitment": "Commitment, share of the steps",
  "commitment_sigma": "Sigma at commitment",
  "flips": "Changes of the answer",
  "several": "Runs with two or more candidates at some step",
  "corrected": "Runs with a flip wrong to right",
  "one_network": "1 - CKA of the final video after renoise, a model without an expert switch",
  "sensitivity": "1 - CKA of the final video after renoise, by place (share of the steps)",
}
