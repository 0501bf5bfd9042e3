"""Every solver: exact where it must be, of the order it claims, and with a past it can forget."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason.schedules import GRIDS, build
from jax_videoreason.solvers import SOLVERS

SHAPE = (3, 2, 2, 3, 4)  # R F H W C
each_solver = pytest.mark.parametrize("solver", list(SOLVERS))


def normal(seed, shape=SHAPE):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def row_of(schedule, step):
  row = {name: values[step] for name, values in schedule.coef.items()}
  return row | {"sigma": schedule.sigma[step], "sigma_next": schedule.sigma[step + 1]}


def solve(schedule, velocity, latents, edits=None, memory=None):
  """Latents and memory after all steps; edits: step -> (edited R bool, latents -> latents)."""
  solver = SOLVERS[schedule.solver]
  memory = solver.init(latents) if memory is None else memory
  step = jax.jit(solver.step)
  for i in range(len(schedule)):
    edited = np.zeros(latents.shape[0], bool)
    if edits and i in edits:
      edited, change = edits[i]
      latents = change(latents)
    v = velocity(latents, int(schedule.index[i]), schedule.sigma[i])
    x0 = latents - v * schedule.sigma[i]
    latents, memory = step(memory, latents, v, x0, row_of(schedule, i), edited)
  return latents, memory


def wandering(latents, index, sigma):
  """A velocity that changes its mind at every step."""
  return normal(100 + index) + 0.3 * jnp.tanh(latents)


@each_solver
@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_a_straight_path_is_followed_exactly(solver, grid, steps):
  noise, data = normal(1), normal(2)
  schedule = build(steps=steps, solver=solver, grid=grid)
  start = schedule.sigma[0]
  latents = (1 - start) * data + start * noise
  after, _ = (
    solve(schedule[: steps - 1], lambda *_: noise - data, latents) if steps > 1 else (latents, None)
  )
  sigma = schedule.sigma[steps - 1]
  np.testing.assert_allclose(after, (1 - sigma) * data + sigma * noise, atol=3e-6)
  after, _ = solve(schedule, lambda *_: noise - data, latents)
  np.testing.assert_allclose(after, data, atol=3e-6)


def test_euler_in_closed_form():
  schedule = build(steps=6, shift=3.0)
  u = 1 - np.arange(7) / 6
  sigma = 3 * u / (1 + 2 * u)
  wanted = np.asarray(normal(0), np.float64)
  for i in range(6):
    wanted = wanted + (sigma[i + 1] - sigma[i]) * np.asarray(normal(100 + i), np.float64)
  after, _ = solve(schedule, lambda x, i, s: normal(100 + i), normal(0))
  np.testing.assert_allclose(after, wanted, atol=1e-6)


@pytest.mark.parametrize(("solver", "low", "high"), [("euler", 1.8, 2.2), ("unipc", 3.5, 12.0)])
def test_halving_the_steps_shows_the_order(solver, low, high):
  """Data from N(0, c^2) has its velocity in closed form, and latents / deviation is constant."""
  c = 0.5

  def velocity(latents, index, sigma):
    return latents * (sigma - (1 - sigma) * c**2) / deviation(sigma) ** 2

  def deviation(sigma):
    return np.sqrt((1 - sigma) ** 2 * c**2 + sigma**2)

  def error(steps):
    schedule = build(steps=steps, shift=1.0, solver=solver)[steps // 10 : 7 * steps // 10]
    after, _ = solve(schedule, velocity, deviation(0.9) * normal(3))
    return float(jnp.linalg.norm(after - deviation(0.3) * normal(3)))

  assert low < error(40) / error(80) < high


@each_solver
def test_the_last_guess_is_the_final_latent(solver):
  schedule = build(steps=5, solver=solver)
  before, memory = solve(schedule[:4], wandering, normal(0))
  v = wandering(before, 4, None)
  x0 = before - v * schedule.sigma[4]
  after, _ = SOLVERS[solver].step(memory, before, v, x0, row_of(schedule, 4), np.zeros(3, bool))
  if solver == "unipc":
    np.testing.assert_array_equal(after, x0)
  np.testing.assert_allclose(after, x0, atol=1e-6)


@each_solver
def test_pieces_equal_the_whole(solver):
  schedule = build(steps=7, solver=solver, grid="official")
  whole, _ = solve(schedule, wandering, normal(0))
  latents, memory = normal(0), None
  for i, j in [(0, 2), (2, 3), (3, 7)]:
    latents, memory = solve(schedule[i:j], wandering, latents, memory=memory)
  np.testing.assert_array_equal(latents, whole)


@each_solver
def test_an_edited_run_starts_anew_and_the_others_do_not_notice(solver):
  schedule = build(steps=8, solver=solver)
  edited = np.array([False, True, False])
  target = normal(9)

  def replace(latents):
    return jnp.where(edited[:, None, None, None, None], target, latents)

  plain, _ = solve(schedule, wandering, normal(0))
  after, memory = solve(schedule, wandering, normal(0), edits={4: (edited, replace)})
  fresh, _ = solve(schedule[4:], wandering, target)
  np.testing.assert_array_equal(after[1], fresh[1])
  np.testing.assert_array_equal(after[::2], plain[::2])
  if memory:
    assert memory["age"].tolist() == [8, 4, 8]


def test_unipc_remembers_what_an_unannounced_change_would_lose():
  """Without the restart the corrector rebuilds the latents from memory and swallows the change."""
  schedule = build(steps=8, solver="unipc")

  def push(latents):
    return latents + 1.0

  told, _ = solve(schedule[:4], wandering, normal(0), edits={3: (np.ones(3, bool), push)})
  silent, _ = solve(schedule[:4], wandering, normal(0), edits={3: (np.zeros(3, bool), push)})
  plain, _ = solve(schedule[:4], wandering, normal(0))
  assert jnp.linalg.norm(silent - plain) < 0.8 * jnp.linalg.norm(told - plain)


@each_solver
def test_a_nan_run_stays_alone_and_an_edit_heals_it(solver):
  schedule = build(steps=6, solver=solver)
  sick = normal(0).at[2].set(jnp.nan)
  edited = np.array([False, False, True])

  def heal(latents):
    return latents.at[2].set(normal(5)[2])

  after, _ = solve(schedule, wandering, sick)
  assert jnp.all(jnp.isfinite(after[:2]))
  assert not jnp.any(jnp.isfinite(after[2]))
  healed, _ = solve(schedule, wandering, sick, edits={3: (edited, heal)})
  assert jnp.all(jnp.isfinite(healed))
  np.testing.assert_array_equal(healed[:2], after[:2])


@each_solver
def test_permuting_runs_permutes_the_result(solver):
  schedule = build(steps=5, solver=solver)
  order = np.array([2, 0, 1])

  def shuffled(latents, index, sigma):
    return normal(100 + index)[order] + 0.3 * jnp.tanh(latents)

  plain, _ = solve(schedule, wandering, normal(0))
  moved, _ = solve(schedule, shuffled, normal(0)[order])
  np.testing.assert_array_equal(moved, plain[order])


@each_solver
def test_a_step_keeps_dtype_and_structure(solver):
  """So that a scan can carry it, in float32 and in bfloat16, and reverse mode stays finite."""
  schedule = build(steps=3, solver=solver)
  for dtype in (jnp.float32, jnp.bfloat16):
    latents = normal(0).astype(dtype)
    memory = SOLVERS[solver].init(latents)
    after, remembered = SOLVERS[solver].step(
      memory, latents, latents, latents, row_of(schedule, 0), np.zeros(3, bool)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes((after, remembered), (latents, memory))

  slope = jax.grad(lambda x: jnp.sum(solve(schedule, wandering, x)[0]))(normal(0))
  assert jnp.all(jnp.isfinite(slope))


@each_solver
@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_tables_are_finite_float64(solver, grid, steps):
  sigma = np.append(GRIDS[grid](steps, 5.0), 0.0)
  for values in SOLVERS[solver].coefficients(sigma).values():
    assert values.dtype == np.float64
    assert values.shape == (steps,)
    assert np.all(np.isfinite(values))
