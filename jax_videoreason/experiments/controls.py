"""The headline measures under other samplers: shift, steps, guidance, expert switch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_videoreason import metrics
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.noise import inner_peak
from jax_videoreason.experiments.readings import per_run
from jax_videoreason.experiments.results import Claim, Result
from jax_videoreason.experiments.study import experiment
from jax_videoreason.interventions import identity, noise_at, where
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import TapSpec

COMMON = 7  # settings that every model has
OF_SWITCH = 4  # and those of a model with an expert switch
LEAST_PLACES = 5  # for a peak
FINE_PLACES = 9  # for a peak that moves: two places are then a fifth of the steps


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


def cost(sizes: Sizes, *, settings: tuple[str, ...], places: int, switch: bool) -> float:
  counts = {"half the steps": max(2, sizes.S // 2), "twice the steps": 2 * sizes.S}
  plain = COMMON - len(counts) + (OF_SWITCH if switch else 0)
  names = settings or ("",) * plain + tuple(counts)

  def of(steps: int) -> int:
    return steps + sum(steps - at for at in places_of(steps, places))

  return sum(of(counts.get(name, sizes.S)) for name in names) / sizes.S


def places_of(steps: int, places: int) -> list[int]:
  """Steps spread over the trajectory, each once, so of few steps fewer than `places`.

  Not the first, at which renoise is another seed.
  """
  return sorted({max(1, place * steps // (places + 1)) for place in range(1, places + 1)})


def filled(rows: np.ndarray, places: int) -> np.ndarray:
  """P ... of fewer places or as many, the last one repeated."""
  return rows[np.minimum(np.arange(places), len(rows) - 1)]


def distinct(rows: np.ndarray) -> np.ndarray:
  """... N places K, the last of K being the place: of equal places the first alone."""
  place = rows[..., -1].reshape(-1, rows.shape[-2])[0]
  return rows[..., np.unique(place, return_index=True)[1], :]


def highest(rows: np.ndarray) -> np.ndarray:
  """Where the mean curve of ... N places 2 (curve, share of the steps) is highest.

  NaN at an edge of the grid and for fewer than `LEAST_PLACES`; a repeated place counts once.
  """
  rows = distinct(rows)
  if rows.shape[-2] < LEAST_PLACES:
    return np.full(rows.shape[:-3], np.nan)
  return inner_peak(rows)


def moved(rows: np.ndarray) -> np.ndarray:
  """Distance between the peaks of two curves, ... N places 3 (two curves, share of the steps).

  NaN for fewer than `FINE_PLACES`; a repeated place counts once.
  """
  rows = distinct(rows)
  if rows.shape[-2] < FINE_PLACES:
    return np.full(rows.shape[:-3], np.nan)
  return np.abs(highest(rows[..., [0, 2]]) - highest(rows[..., [1, 2]]))


@experiment(
  tasks=("maze", "pick", "select_largest"),
  claims=(
    Claim(
      number=14,
      says="the peak of sensitivity is there without an expert switch",
      of=("one_network", "place_at[setting=as is]"),
      by=highest,
      statistic="step of the largest 1 - CKA of the final video under renoise, share of all steps; "
      "a largest value at an edge of the grid is no peak",
      above=0.35,
      below=0.65,
      paper="steps 20 to 30; its model switches experts at step 21",
    ),
    Claim(
      number=14,
      says="the peak of sensitivity does not move with the expert switch",
      of=(
        "sensitivity[setting=switch earlier]",
        "sensitivity[setting=switch later]",
        "place_at[setting=switch earlier]",
      ),
      by=moved,
      statistic="distance between the peaks with the switch moved up and down, share of the steps",
      below=0.21,  # more than two places of the coarsest grid that is asked (FINE_PLACES)
      paper="not controlled for",
    ),
  ),
  zero=("sensitivity",),
  cost=cost,
  taps=lambda sizes: TapSpec(solver=True),
  least={"places": 1},
)
def controls(ctx: Context, *, settings: tuple[str, ...] = (), places: int = 11) -> Result:
  """Do the measures survive another shift, step count, guidance or expert switch?

  Under every setting: score, right answers, commitment in sigma, several candidates, correction,
  and how far the final video moves (1 - CKA) when its noise is drawn anew at places spread over the
  steps. Settings: shift 1, 3, 8; half and twice the steps; guidance off; where the model has two
  experts also the switch moved and each expert alone. Under `twice the steps` and shift the same
  place is another sigma: the table gives commitment in sigma.

  Limits: places are coarse: a curve that is highest at the first or last of them has no peak here,
  a peak is asked of five places or more alone, and whether it moves of nine. A setting with fewer
  steps than places has its last one repeated, which counts once. The claim without a switch can
  only be asked of a model without one, and that of a switch that is moved only of a model with two
  experts. `low noise expert only` leaves the very first step, at sigma 1, to the other one.
  """
  chosen = settings_of(ctx, settings)
  rows = []
  for changes in chosen.values():
    here = ctx.vary(**changes)
    sizes = here.sizes
    steps = places_of(sizes.S, places)
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
        "sensitivity": here.map(at, steps),
        "place_at": np.repeat(np.array(steps)[:, None] / sizes.S, sizes.R, axis=1),
      }
    )
  most = max(len(row["place_at"]) for row in rows)
  for row in rows:
    row |= {name: filled(row[name], most) for name in ("sensitivity", "place_at")}
  values = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  axes = {
    n: ("setting", "place", "run") if v.ndim == 3 else ("setting", "run") for n, v in values.items()
  }
  first = list(chosen).index("as is") if "as is" in chosen else 0
  if ctx.bundle.card.boundary is None and "as is" in chosen:
    values["one_network"] = values["sensitivity"][first]
    axes["one_network"] = ("place", "run")
  shares = values["place_at"][first, :, 0].round(3).tolist()
  points = ctx.points | {"setting": list(chosen), "place": shares}
  return Result(values=values, axes=axes, points=points, titles=TITLES)


TITLES = {
  "score": "Score",
  "right": "Right answers",
  "commitment": "Commitment, share of the steps",
  "commitment_sigma": "Sigma at commitment",
  "flips": "Changes of the answer",
  "several": "Runs with two or more candidates at some step, of those that show any",
  "corrected": "Runs with a flip wrong to right, of those read at two steps before the last",
  "place_at": "Step at which the noise is drawn anew, share of all steps",
  "one_network": "1 - CKA of the final video after renoise, a model without an expert switch",
  "sensitivity": "1 - CKA of the final video after renoise, by place (share of the steps)",
}
