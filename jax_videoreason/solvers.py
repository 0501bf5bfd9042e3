"""Solvers of the flow-matching ODE: pure steps, each with a float64 host table of its coefficients.

x_sigma = (1 - sigma) * x0 + sigma * noise and velocity = noise - x0, so x0 = x - sigma * velocity.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jax_videoreason.axes import Array

Memory = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
  """One way to go from sigma to sigma_next.

  coefficients(sigma S+1, float64) -> float64 tables of S rows each.
  init(latents R F H W C) -> the memory before the first step.
  step(memory, latents, velocity, x0, row, edited) -> (latents at sigma_next, memory): latents,
    velocity and x0 are R F H W C; row holds this step's coefficients with `sigma` and
    `sigma_next`, all scalars; edited (R bool) says whose latents were changed from outside, and
    a solver with a past forgets it for those runs.
  """

  coefficients: Callable[[np.ndarray], dict[str, np.ndarray]]
  init: Callable[[Array], Memory]
  step: Callable[[Memory, Array, Array, Array, Mapping[str, Array], Array], tuple[Array, Memory]]


def _euler_coefficients(sigma: np.ndarray) -> dict[str, np.ndarray]:
  return {"delta": np.diff(np.asarray(sigma, np.float64))}


def _euler_init(latents: Array) -> Memory:
  return {}


def _euler_step(
  memory: Memory,
  latents: Array,
  velocity: Array,
  x0: Array,
  row: Mapping[str, Array],
  edited: Array,
) -> tuple[Array, Memory]:
  return (latents + velocity * row["delta"]).astype(latents.dtype), memory


def _unipc_coefficients(sigma: np.ndarray) -> dict[str, np.ndarray]:
  """UniPC of order 2 (bh2, x0 prediction), last step of order 1; see `_unipc_step`.

  sigma = 1 has log-SNR -inf and sigma = 0 has +inf; every coefficient has its finite limit there.
  """
  sigma = np.asarray(sigma, np.float64)
  steps = len(sigma) - 1
  alpha = np.maximum(1.0 - sigma, 0.0)  # the first sigma may have been rounded to above 1
  with np.errstate(divide="ignore"):
    lam = np.log(alpha) - np.log(sigma)
  names = ("pred_x", "pred_x0", "pred_diff", "corr_x", "corr_x0", "corr_1", "corr_2", "corr_past")
  table = {name: np.zeros(steps) for name in names}
  for i in range(steps):
    h = lam[i + 1] - lam[i]
    gain = -alpha[i + 1] * np.expm1(-h)
    table["pred_x"][i] = sigma[i + 1] / sigma[i]
    table["pred_x0"][i] = gain
    if 0 < i < steps - 1:
      table["pred_diff"][i] = gain * 0.5 * h / (lam[i - 1] - lam[i])
    if i == 0:
      continue
    h = lam[i] - lam[i - 1]
    e = np.expm1(-h)
    gain = -alpha[i] * e
    table["corr_x"][i] = sigma[i] / sigma[i - 1]
    table["corr_x0"][i] = gain
    table["corr_1"][i] = gain * 0.5
    if i == 1:
      continue
    q1 = -e / h - 1.0
    q2 = -q1 / h - 0.5
    b1, b2 = q1 / e, 2.0 * q2 / e
    r = (lam[i - 2] - lam[i - 1]) / h
    rho = (b1 - b2) / (1.0 - r)
    table["corr_2"][i] = gain * (b1 - rho)
    table["corr_past"][i] = gain * rho / r
  return table


def _unipc_init(latents: Array) -> Memory:
  return {
    "x0_1": jnp.zeros_like(latents),
    "x0_2": jnp.zeros_like(latents),
    "latents": jnp.zeros_like(latents),
    "age": jnp.zeros(latents.shape[0], jnp.int32),
  }


def _unipc_step(
  memory: Memory,
  latents: Array,
  velocity: Array,
  x0: Array,
  row: Mapping[str, Array],
  edited: Array,
) -> tuple[Array, Memory]:
  """Corrects the sample with the guess just made at it, then predicts the next one.

  The memory holds the two guesses before (`x0_1`, `x0_2`), the corrected sample of the step
  before (`latents`) and per run the steps since its start (`age`): at age 0 nothing is corrected
  and the prediction has order 1; at age 1 the corrector has order 1.
  """
  age = jnp.where(edited, 0, memory["age"])
  age_cells = rearrange(age, "r -> r 1 1 1 1")
  x0_1, x0_2 = memory["x0_1"], memory["x0_2"]
  base = row["corr_x"] * memory["latents"] + row["corr_x0"] * x0_1
  first = base + row["corr_1"] * (x0 - x0_1)
  second = base + row["corr_2"] * (x0 - x0_1) + row["corr_past"] * (x0_2 - x0_1)
  sample = jnp.where(age_cells == 0, latents, jnp.where(age_cells == 1, first, second)).astype(
    latents.dtype
  )
  line = row["pred_x"] * sample + row["pred_x0"] * x0
  bend = line + row["pred_diff"] * (x0_1 - x0)
  following = jnp.where(age_cells == 0, line, bend).astype(latents.dtype)
  return following, {"x0_1": x0, "x0_2": x0_1, "latents": sample, "age": age + 1}


SOLVERS: dict[str, Solver] = {
  "euler": Solver(coefficients=_euler_coefficients, init=_euler_init, step=_euler_step),
  "unipc": Solver(coefficients=_unipc_coefficients, init=_unipc_init, step=_unipc_step),
}
