"""Flow-matching schedules: sigmas of three grids, timesteps and their sinusoids, expert per step.

Everything is computed on the host, in float64 but for DiffSynth's grid, which is float32.
The leaves are numpy arrays that jit takes as data.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jax_videoreason.axes import Array
from jax_videoreason.pytrees import is_known, pytree, refuse_traced, static
from jax_videoreason.solvers import SOLVERS

HOLD = 2
TRAIN_STEPS = 1000


@pytree
class Schedule:
  """What every denoising step needs to know; each leaf is data, so none of it recompiles.

  sigma: S+1, ending at 0 in a whole schedule. timestep: S, rounded as `numerics` says.
  time: S 2 freq_dim, cosines first; row 0 is the timestep, row 1 is t = 0 (for given tokens).
  guidance: S, or S R, a scale for each run. coef: the table of the solver, S each.
  index: S int32, place in the whole schedule.
  which: S int32, 0 and 1 = expert, 2 = hold; None = one expert, no step held.
  total: steps of the whole schedule, which a piece still knows.
  """

  sigma: Array
  timestep: Array
  time: Array
  guidance: Array
  coef: dict[str, Array]
  index: Array
  which: Array | None = None
  solver: str = static()
  total: int = static()

  def __len__(self) -> int:
    return self.sigma.shape[0] - 1

  def __getitem__(self, rows: slice) -> "Schedule":
    """The piece of the steps i <= s < j; `sigma` keeps one more row. Only slices of step 1."""
    if not isinstance(rows, slice):
      raise ValueError(f"schedule[{rows!r}]: wanted a slice, schedule[i:j].")
    start, stop, stride = rows.indices(len(self))
    if stride != 1 or stop <= start:
      raise ValueError(
        f"schedule[{rows.start}:{rows.stop}:{rows.step}] of {len(self)} steps: wanted "
        "consecutive steps, at least one: schedule[i:j] with i < j."
      )
    piece = jax.tree.map(lambda leaf: leaf[start:stop], self)
    return dataclasses.replace(piece, sigma=self.sigma[start : stop + 1])

  def by_expert(self) -> list[tuple[int, slice]]:
    """(expert, its steps i:j) of each stretch that one expert makes, together the whole.

    A held step needs no expert and stays with the one before it. `which` may not be traced.
    """
    which = np.zeros(len(self), int) if self.which is None else np.asarray(self.which)
    called = [(int(e), step) for step, e in enumerate(which) if e != HOLD] or [(0, 0)]
    changes = [new for old, new in itertools.pairwise(called) if old[0] != new[0]]
    begins = [0, *(step for _, step in changes)]
    experts = [called[0][0], *(expert for expert, _ in changes)]
    return [
      (expert, slice(begin, end))
      for expert, begin, end in zip(experts, begins, [*begins[1:], len(self)], strict=True)
    ]

  def only(self, start: int | Array, stop: int | Array) -> "Schedule":
    """The same schedule with every step outside start <= s < stop held.

    Shapes stay, so a sweep over `start` is one compilation; both may be traced, and then are not
    checked.
    """
    start, stop = self._bounds(start, stop)
    rows = jnp.arange(len(self), dtype=jnp.int32)
    inside = (rows >= start) & (rows < stop)
    which = jnp.zeros_like(rows) if self.which is None else self.which
    return dataclasses.replace(self, which=jnp.where(inside, which, jnp.int32(HOLD)))

  def _bounds(self, *bounds: int | Array) -> list[int | Array]:
    """`start` and `stop` of `only`: an int where it is known, and then one that is possible."""
    try:
      wanted = [operator.index(b) if is_known(b) else b for b in bounds]
    except TypeError:
      self._refuse(bounds, "whole numbers")
    known = [0, *(b for b in wanted if is_known(b)), len(self)]
    if known != sorted(known):
      self._refuse(wanted, f"0 <= start <= stop <= {len(self)}")
    return wanted

  def _refuse(self, bounds: Sequence[Any], wanted: str) -> NoReturn:
    said = ", ".join(str(b) if is_known(b) else "?" for b in bounds)
    raise ValueError(f"only({said}) of {len(self)} steps: wanted {wanted}.") from None


def check(schedule: Schedule, runs: int) -> None:
  """ValueError with the leaves of a schedule that are no arrays of their shape; runs: R."""
  steps, width = np.size(schedule.index), (0, *np.shape(schedule.time))[-1]
  faults = []

  def wanted(name: str, leaf: Any, letters: str, *shapes: tuple[int, ...]) -> None:
    shape = getattr(leaf, "shape", f"a {type(leaf).__name__}")
    if leaf is not None and shape not in shapes:
      several = " or ".join(str(shape) for shape in shapes)
      faults.append(f"{name} is {shape}, wanted {letters} = {several}")

  wanted("sigma", schedule.sigma, "S+1", (steps + 1,))
  for name in ("timestep", "index", "which"):
    wanted(name, getattr(schedule, name), "S", (steps,))
  wanted("time", schedule.time, "S 2 freq_dim", (steps, 2, width))
  wanted("guidance", schedule.guidance, "S or S R", (steps,), (steps, runs))
  for name, leaf in schedule.coef.items():
    wanted(f"coef[{name!r}]", leaf, "S", (steps,))
  if faults:
    raise ValueError(
      f"schedule: {'; '.join(faults)}: replace leaves by arrays of these shapes, or build it anew."
    )


def _official(steps: int, shift: float) -> np.ndarray:
  # The reference keeps sigma_max as a float32 and counts down from there in float64.
  return _shifted(np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1], shift)


def _diffsynth(steps: int, shift: float) -> np.ndarray:
  """float32, to the bit what DiffSynth's PyTorch makes of it on a CPU."""
  # torch.linspace counts from either end to the middle and rounds each value once.
  step = np.float64(np.float32(-1.0 / steps))
  place = np.arange(steps)
  u = np.where(place < (steps + 1) // 2, 1.0 + step * place, -step * (steps - place))
  u = u.astype(np.float32)
  with np.errstate(all="ignore"):  # a shift that float32 can't hold is refused by `build`
    return np.float32(shift) * u / (np.float32(1.0) + np.float32(shift - 1.0) * u)


def _diffusers(steps: int, shift: float) -> np.ndarray:
  sigma = _shifted(np.linspace(1.0, 1.0 / TRAIN_STEPS, steps + 1)[:-1], shift)
  if abs(sigma[0] - 1.0) < 1e-6:
    sigma[0] -= 1e-6
  return sigma


def _shifted(u: np.ndarray, shift: float) -> np.ndarray:
  return shift * u / (1.0 + (shift - 1.0) * u)


GRIDS: dict[str, Callable[[int, float], np.ndarray]] = {
  "official": _official,
  "diffusers": _diffusers,
  "diffsynth": _diffsynth,
}

# How far below the boundary a timestep is still the first expert's: float64 that should lie on it
# may miss it by a rounding. DiffSynth compares its float32 as they are.
SLACK: dict[str, float] = {"official": 1e-6, "diffusers": 1e-6, "diffsynth": 0.0}


def _bfloat16(timestep: np.ndarray) -> np.ndarray:
  # float32 comes first, as in the reference.
  return timestep.astype(np.float32).astype(jnp.dtype("bfloat16")).astype(np.float64)


ROUNDING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  "official": np.trunc,
  "diffusers": np.trunc,
  "diffsynth": _bfloat16,
}


def sinusoid(timestep: Any, freq_dim: int = 256, numerics: str = "official") -> np.ndarray:
  """(..., freq_dim) float32 of timesteps (...), the cosines first, base 10000.

  Computed in float64 and rounded once, except for numerics "diffusers", where frequencies and
  phases are float32 (which moves them by up to 5e-5 near t = 1000). There too each frequency is
  the float32 nearest to the exponential; PyTorch's own depend on its library and device, and are
  not always the nearest.
  """
  if freq_dim < 2 or freq_dim % 2:
    raise ValueError(f"freq_dim={freq_dim}, wanted an even number of at least 2.")
  half = freq_dim // 2
  if numerics == "diffusers":
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
    exponent = exponent / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = np.asarray(timestep, np.float32)[..., None] * frequency
    phase = phase.astype(np.float64)
  else:
    frequency = np.power(10000.0, -np.arange(half, dtype=np.float64) / half)
    phase = np.asarray(timestep, np.float64)[..., None] * frequency
  return np.concatenate([np.cos(phase), np.sin(phase)], axis=-1).astype(np.float32)


def build(
  *,
  steps: int,
  shift: float = 5.0,
  guidance: float | Sequence[float] = 5.0,
  boundary: float | None = None,
  solver: str = "euler",
  grid: str = "diffsynth",
  numerics: str = "official",
  freq_dim: int = 256,
) -> Schedule:
  """The schedule of `steps` denoising steps.

  guidance: one scale; (high, low), a pair, where a boundary is given; or one scale per step. One
    per step and run is put in by dataclasses.replace(schedule, guidance=guidance), S R.
  boundary: sigma in 0..1; the first expert makes the steps whose timestep before rounding is at
    least 1000 * boundary. None = one expert.
  grid: where the sigmas lie, "official", "diffusers" (0.37 and later) or "diffsynth", whose
    sigmas and timesteps are float32: one that should lie on the boundary may fall short of it.
  numerics: how the timestep is rounded and embedded; "official" and "diffusers" truncate it to
    an integer, "diffsynth" rounds it to bfloat16.
  ValueError names the argument. None may be traced; the leaves of the schedule may.
  """
  refuse_traced(
    "schedules.build",
    "build the schedule before, from numbers; its leaves may be traced, as by "
    "dataclasses.replace(schedule, guidance=guidance)",
    (steps, shift, guidance, boundary),
  )
  _check_name("solver", solver, SOLVERS)
  _check_name("grid", grid, GRIDS)
  _check_name("numerics", numerics, ROUNDING)
  steps = _check_steps(steps)
  if not (math.isfinite(shift) and shift > 0):
    raise ValueError(f"shift={shift}, wanted a number above 0: Wan uses 3.0 at 480p, 5.0 above.")
  if boundary is not None and not 0 <= boundary <= 1:
    raise ValueError(
      f"boundary={boundary}, wanted a sigma in 0..1 (0.875 for timestep 875), or None for a "
      "model with one expert."
    )
  sigma = GRIDS[grid](steps, float(shift))
  timestep = (TRAIN_STEPS * sigma).astype(np.float64)  # multiplied in the grid's own precision
  sigma = np.append(sigma.astype(np.float64), 0.0)
  if not (np.all(np.isfinite(sigma)) and np.all(np.diff(sigma) < 0)):
    raise ValueError(
      f"shift={shift} with steps={steps} puts several steps at one sigma: use fewer steps or "
      "a shift nearer to 1."
    )
  which: Any = None
  if boundary is not None:
    which = (timestep < TRAIN_STEPS * boundary - SLACK[grid]).astype(np.int32)
  rounded = ROUNDING[numerics](timestep)
  time = np.stack([rounded, np.zeros_like(rounded)], axis=1)
  tables = {
    "sigma": sigma,
    "timestep": rounded,
    "guidance": _guidance(guidance, steps, which),
    "coef": SOLVERS[solver].coefficients(sigma),
    "time": sinusoid(time, freq_dim, numerics),
  }
  leaves: dict[str, Any] = jax.tree.map(np.float32, tables)
  leaves["index"] = np.arange(steps, dtype=np.int32)
  return Schedule(**leaves, which=which, solver=solver, total=steps)


def _guidance(guidance: Any, steps: int, which: np.ndarray | None) -> np.ndarray:
  scale = np.asarray(guidance, np.float64)
  if scale.ndim > 1 or not np.all(np.isfinite(scale)):
    raise ValueError(
      f"guidance={guidance}, wanted one finite scale, (high, low), or {steps} scales."
    )
  if scale.ndim == 0:
    return np.full(steps, scale)
  if which is not None and len(scale) == 2:
    return scale[which]
  if len(scale) != steps:
    pair = "or a pair (high, low)" if which is not None else "(a pair needs a boundary)"
    raise ValueError(
      f"guidance has {len(scale)} values, wanted one, {steps} for steps={steps}, {pair}."
    )
  return scale


def _check_name(argument: str, name: str, known: dict[str, Any]) -> None:
  if name not in known:
    raise ValueError(f"no {argument} {name!r}; there are: {', '.join(known)}.")


def _check_steps(steps: Any) -> int:
  try:
    count = operator.index(steps)
  except TypeError:
    count = 0
  if count < 1:
    raise ValueError(f"steps={steps!r}, wanted a whole number of at least 1.")
  return count
