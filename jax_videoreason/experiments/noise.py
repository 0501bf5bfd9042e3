"""Noise at a step against noise at a frame: where along the trajectory the answer can be broken."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jax_videoreason import metrics, stats
from jax_videoreason.experiments.context import Context
from jax_videoreason.experiments.results import Claim, Result, mean_by
from jax_videoreason.experiments.study import experiment
from jax_videoreason.interventions import NOISE_MODES, identity, noise_at, where
from jax_videoreason.reductions import signs
from jax_videoreason.stats import SEED
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import TapSpec

COLUMNS = 32  # of the projection by which hidden states are compared
LEAST_PLACES = 6
ARMS = ("step_arm", "frame_arm_matched")


def ratio(rows: np.ndarray) -> np.ndarray:
  """Mean of the first column over that of the second."""
  mean = rows.mean(-2)
  return mean[..., 0] / np.maximum(mean[..., 1], 1e-6)


def cos_index(rows: np.ndarray) -> np.ndarray:
  """step / (step + frame) of mean drops; a drop below 0 is none, and NaN where neither drops."""
  step, frame = np.moveaxis(np.maximum(rows.mean(-2), 0), -1, 0)
  return np.where(step + frame > 1e-6, step / np.maximum(step + frame, 1e-6), np.nan)


def peak(rows: np.ndarray) -> np.ndarray:
  """Where the mean curve is highest after its first place, at which noise is another seed.

  rows: ... N places 2, the curve and the share of the steps of each place. NaN where the highest
  place is an edge of the grid, so that the peak may lie beyond it, and for a curve of fewer than
  `LEAST_PLACES`: on a coarse grid its edge looks like its middle.
  """
  if rows.shape[-2] < LEAST_PLACES:
    return np.full(rows.shape[:-3], np.nan)
  return inner_peak(rows[..., 1:, :])


def inner_peak(rows: np.ndarray) -> np.ndarray:
  """The place of the largest mean of ... N places 2 (curve, place); NaN at the first and last."""
  curve, place = np.moveaxis(rows.mean(-3), -1, 0)
  best = curve.argmax(-1)
  found = np.take_along_axis(place, best[..., None], -1)[..., 0]
  return np.where((best == 0) | (best == curve.shape[-1] - 1), np.nan, found)


def matched_steps(steps: Sequence[int], frames: int, cells: int) -> list[list[int]]:
  """For each of `frames` noised frames, `cells` of the steps, spread over all of them.

  Over all frames every step comes up equally often, or once more where that does not come out even.
  """
  cells = min(cells, len(steps))
  return [
    [steps[(frame + frames * k) * len(steps) // (frames * cells)] for k in range(cells)]
    for frame in range(frames)
  ]


def chosen_steps(sizes: Sizes, stride: int) -> list[int]:
  return list(range(0, sizes.S, stride))


def cost(sizes: Sizes, *, modes: Sequence[str], stride: int, **_: Any) -> float:
  steps = chosen_steps(sizes, stride)
  shared = sum(sizes.S - s for s in steps) / sizes.S
  return 1 + len(modes) * (shared + 2 * max(1, sizes.F - 1))


def tapped(sizes: Sizes) -> TapSpec:
  """A projection of the middle layer."""
  directions = jnp.asarray(signs(COLUMNS, sizes.D), jnp.float32)
  return TapSpec(
    sites=("resid_post",),
    reduce=("project",),
    layers=(sizes.L // 2,),
    directions=directions,
    solver=True,
  )


def with_index(result: Result) -> Result:
  """The CoS index of every mode, of all cases and of each task, as notes."""
  task = np.array([str(case).split()[0] for case in result.points["case"]])
  problems = result.problems(len(task))
  notes = list(result.notes)
  for mode in result.points["mode"]:
    arms = [result.per_case(f"{arm}[mode={mode}]")[0] for arm in ARMS]
    both = np.stack(arms, axis=-1)
    good = np.isfinite(both).all(1)
    of = {"all": good, **{name: good & (task == name) for name in dict.fromkeys(task)}}
    said = [
      f"{name} {index_of(mean_by(both[some], problems[some]))}"
      for name, some in of.items()
      if some.any()
    ]
    notes.append(f"CoS index under {mode}: {'; '.join(said)}.")
  return dataclasses.replace(result, notes=notes)


def index_of(both: np.ndarray) -> str:
  """The CoS index of drops N 2 in words."""
  if not np.isfinite(cos_index(both)):
    return "has none: neither arm drops"
  return str(stats.bootstrap(both, seed=SEED, statistic=cos_index))


@experiment(
  tasks=("maze", "pick", "select_largest"),
  claims=(
    Claim(
      number=2,
      says="noise at one step destroys the answer",
      of=("step_arm[mode=replace]", "clean"),
      by=ratio,
      statistic="mean drop of the score over steps, as a share of the clean score",
      above=0.5,
      paper="the score is more than halved",
    ),
    Claim(
      number=3,
      says="noise at one frame in all steps hurts clearly less than noise at one step",
      of="apart[mode=replace]",
      statistic="drop at a step minus drop at a frame",
      above=0.1,
      paper="clearly less, no number",
    ),
    Claim(
      number=4,
      says="sensitivity to noise peaks in the middle of the trajectory",
      of=("sensitivity[mode=renoise]", "injected_at"),
      by=peak,
      statistic="step of the largest mean 1 - CKA of x0 (the first left out), share of all steps; "
      "a largest value at an edge of the grid is no peak",
      above=0.4,
      below=0.6,
      paper="steps 20 to 30, likely of 50",
    ),
    Claim(
      number=5,
      says="noise injected early is never recovered from",
      of="unrecovered[mode=replace]",
      statistic="final over largest 1 - CKA of x0, injected in the first fifth of the steps",
      above=0.5,
      paper="1 - CKA stays high, no number",
    ),
    Claim(
      number=13,
      says="the reasoning runs along steps, not frames",
      of=tuple(f"{arm}[mode=renoise]" for arm in ARMS),
      by=cos_index,
      statistic="CoS index: step drop / (step drop + frame drop), equal cells and energy",
      above=0.5,
      paper="the paper's thesis, no number",
    ),
  ),
  zero=("step_drop", "frame_drop", "matched_drop", "cka_x0", "cka_latents", "cka_hidden"),
  cost=cost,
  taps=tapped,
  finish=lambda result, **options: with_index(result),
  least={"stride": 1},
)
def noise(
  ctx: Context, *, modes: tuple[str, ...] = NOISE_MODES, gain: float = 1.0, stride: int = 1
) -> Result:
  """Is the answer broken by noise at one step, or by noise at one frame?

  Noise at Step: all latent frames at one step. Noise at Frame: one latent frame at every step.
  Matched: one latent frame at F of these steps, spread so that over all frames each comes up as
  often, so that both arms noise F cells (step, frame) with the same mean energy; a note gives the
  mean sigma^2 of both. Modes: replace x by noise; add noise; add noise times sigma; renoise,
  which keeps the guess x0 and draws its noise anew, so that x stays on the noise level. Divergence
  is 1 - linear CKA between the noised run and its clean twin (same seed), over latent positions, of
  x, x0 and the residual stream in the middle layer. The prefix before the noise is shared.

  Limits: frame 0 is given to the model and left out of the frame arms. With fewer noised steps than
  latent frames the matched arm has fewer cells. The CoS index has no number where neither arm
  drops, and a sensitivity that is largest at an edge of the grid has no peak. `replace` at step 0
  is another seed; at late steps it destroys the picture whatever it shows. x0 is the guess of the
  step before, so `renoise` at step 0 is `replace`. Under a multistep solver a noised run starts
  again without the guesses before the noise, which is part of what the noise does.
  """
  sizes, sigma = ctx.sizes, ctx.sigma
  steps = chosen_steps(sizes, stride)
  frames = list(range(1, sizes.F)) if sizes.F > 1 else [0]
  matched = dict(zip(frames, matched_steps(steps, len(frames), sizes.F), strict=True))
  taps = tapped(sizes)
  base = identity(sizes, edits=("noise",))
  final, clean = ctx.resume(None, 0, base, taps)
  score = ctx.read(final).score[-1]

  def noised(at: Any, mode: str, first: int) -> tuple[np.ndarray, Any]:
    level = gain if mode.startswith("add") else 1.0
    edit = noise_at(base, at, mode=mode, gain=level, sigma=sigma)
    latents, trace = ctx.resume(clean, first, edit, taps)
    return score - ctx.read(latents).score[-1], trace

  def at_step(point: tuple[str, int]) -> dict[str, np.ndarray]:
    mode, step = point
    drop, trace = noised(where(sizes, steps=step), mode, step)
    held = np.arange(sizes.S)[:, None] < step
    apart = {name: np.where(held, 0, 1 - cka) for name, cka in alike(trace, clean).items()}
    return {"step_drop": drop, **apart}

  def at_frame(point: tuple[str, int]) -> dict[str, np.ndarray]:
    mode, frame = point
    return {
      "frame_drop": noised(where(sizes, frames=frame), mode, 0)[0],
      "matched_drop": noised(where(sizes, frames=frame, steps=matched[frame]), mode, 0)[0],
    }

  def grid(fn: Any, places: list[int]) -> dict[str, np.ndarray]:
    # place by place, so that the middle point, which the control looks at, is of the middle place
    rows = ctx.map(fn, [(mode, place) for place in places for mode in modes])
    return {n: rearrange(v, "(p m) ... -> m p ...", m=len(modes)) for n, v in rows.items()}

  found = {**grid(at_step, steps), **grid(at_frame, frames)}
  divergence = found["cka_x0"]  # mode step observed run
  after = np.arange(sizes.S)[None, :] >= np.array(steps)[:, None]
  count = after.sum(1)[None, :, None]
  early = max(1, len(steps) // 5)
  largest = np.maximum(divergence[:, :early].max(2), 1e-6)
  found |= {
    "clean": score,
    "injected_at": np.repeat(np.array(steps)[:, None] / sizes.S, sizes.R, 1),
    "step_arm": found["step_drop"].mean(1),
    "frame_arm": found["frame_drop"].mean(1),
    "frame_arm_matched": found["matched_drop"].mean(1),
    "sensitivity": divergence.sum(2) / count,
    "sensitivity_end": divergence[:, :, -1],
    "unrecovered": (divergence[:, :early, -1] / largest).mean(1),
  }
  found["apart"] = found["step_arm"] - found["frame_arm"]
  if not ctx.control:
    found |= {
      n: np.where(after[None, ..., None], found[n], np.nan) for n in found if n[:4] == "cka_"
    }
  axes = {name: AXES.get(name, ("mode", "run")) for name in found}
  points = ctx.points | {
    "mode": list(modes),
    "injected": steps,
    "observed": list(range(sizes.S)),
    "latent_frame": frames,
  }
  energy = [(sigma[at] ** 2).mean() for at in (steps, np.concatenate(list(matched.values())))]
  note = "Mean sigma^2 of the noised cells: {:.3f} at a step, {:.3f} at a frame (matched)."
  return Result(values=found, axes=axes, points=points, titles=TITLES, notes=[note.format(*energy)])


def alike(trace: Any, clean: Any) -> dict[str, np.ndarray]:
  """CKA S R of x, x0 and the middle layer with the clean run."""
  hidden, own = (t.taps["resid_post/project"][:, 0, 0] for t in (trace, clean))  # S R T P
  pairs = {
    "cka_x0": (trace.x0, clean.x0),
    "cka_latents": (trace.latents, clean.latents),
    "cka_hidden": tuple(x[:, :, :, None, None] for x in (hidden, own)),
  }
  return {
    name: np.where(same(a, b), 1.0, np.asarray(metrics.cka(a, b))) for name, (a, b) in pairs.items()
  }


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """S R: states equal to the last bit, whose CKA is 1 by definition, not by rounding."""
  return (a == b).all(axis=(2, 3, 4, 5))


GRID = ("mode", "injected", "observed", "run")
AXES = {
  "clean": ("run",),
  "injected_at": ("injected", "run"),
  "step_drop": ("mode", "injected", "run"),
  "frame_drop": ("mode", "latent_frame", "run"),
  "matched_drop": ("mode", "latent_frame", "run"),
  "sensitivity": ("mode", "injected", "run"),
  "sensitivity_end": ("mode", "injected", "run"),
  **dict.fromkeys(("cka_x0", "cka_latents", "cka_hidden"), GRID),
}
TITLES = {
  "clean": "Score of the clean run",
  "injected_at": "Step of the noise, share of all steps",
  "step_drop": "Drop of the score, noise at one step",
  "frame_drop": "Drop of the score, noise at one frame in all steps",
  "matched_drop": "Drop of the score, noise at one frame in F steps",
  "step_arm": "Drop, noise at a step (mean over steps)",
  "frame_arm": "Drop, noise at a frame (mean over frames)",
  "frame_arm_matched": "Drop, noise at a frame, as many cells as at a step",
  "apart": "Drop at a step minus drop at a frame",
  "sensitivity": "Mean 1 - CKA of x0 from the injection on",
  "sensitivity_end": "1 - CKA of the final video",
  "unrecovered": "Final over largest 1 - CKA, early injections",
  "cka_x0": "1 - CKA of x0 with the clean run",
  "cka_latents": "1 - CKA of x with the clean run",
  "cka_hidden": "1 - CKA of the middle layer with the clean run",
}
