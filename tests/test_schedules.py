"""The grids against published numbers, pieces and holds, and what a schedule refuses."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason import schedules
from jax_videoreason.schedules import GRIDS, HOLD, build, sinusoid
from jax_videoreason.solvers import SOLVERS

pair = pytest.mark.parametrize(
  ("grid", "solver"), [(grid, solver) for grid in GRIDS for solver in SOLVERS]
)


def test_sigmas_of_the_paper():
  sigma = np.asarray(build(steps=50, shift=5.0).sigma)
  published = {0: 1.0, 1: 0.9959, 5: 0.9783, 10: 0.9524, 15: 0.9211, 20: 0.8824, 21: 0.8735}
  published |= {25: 0.8333, 30: 0.7692, 35: 0.6818, 40: 0.5556, 45: 0.3571, 49: 0.0926, 50: 0.0}
  for step, value in published.items():
    assert sigma[step] == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize(
  ("grid", "timesteps", "last"),
  [
    ("official", [999, 978, 952, 920], 0.356888),
    ("diffusers", [999, 978, 952, 921], 0.359433),
    ("diffsynth", [1000, 980, 952, 920, 884, 832, 768, 680, 556, 358], 0.357143),
  ],
)
def test_timesteps_of_each_stack(grid, timesteps, last):
  schedule = build(steps=10, shift=5.0, grid=grid, numerics=grid)
  assert schedule.timestep[: len(timesteps)].tolist() == timesteps
  assert schedule.sigma[-2] == pytest.approx(last, abs=1e-6)


@pair
def test_a_schedule_falls_from_noise_to_data(grid, solver):
  schedule = build(steps=7, grid=grid, solver=solver, numerics=grid)
  assert len(schedule) == schedule.total == 7
  assert np.all(np.diff(schedule.sigma) < 0)
  assert schedule.sigma[-1] == 0
  assert schedule.which is None
  assert schedule.index.tolist() == list(range(7))
  for leaf in jax.tree.leaves(schedule):
    assert leaf.dtype in (np.float32, np.int32)
    assert np.all(np.isfinite(leaf))
    assert leaf.shape[0] == (8 if leaf is schedule.sigma else 7)


def test_shift_1_is_the_plain_grid():
  np.testing.assert_allclose(build(steps=4, shift=1.0).sigma, [1, 0.75, 0.5, 0.25, 0])


def test_experts_change_at_the_boundary():
  which = build(steps=50, boundary=0.875).which
  assert which.tolist() == [0] * 21 + [1] * 29
  assert build(steps=50, boundary=0.0).which.tolist() == [0] * 50
  assert build(steps=50, boundary=1.0).which.tolist() == [0] + [1] * 49
  # The rounded timestep of the last step above the boundary lies below it, and must not decide.
  exact = build(steps=10, boundary=0.9782, numerics="official")
  assert exact.timestep[1] == 978
  assert exact.which.tolist() == [0, 0] + [1] * 8


def test_a_step_on_the_boundary_is_where_float32_puts_it():
  """The 6th of 12 steps of shift 5 and the 4th of 10 of shift 3 would both lie on .875.

  In DiffSynth's float32 the one does, and is the first expert's; the other is at 874.99994.
  """
  assert build(steps=12, boundary=0.875).which.tolist() == [0] * 6 + [1] * 6
  assert build(steps=10, shift=3.0, boundary=0.875).which.tolist() == [0] * 3 + [1] * 7
  assert build(steps=50, shift=3.0, boundary=0.875).which.tolist() == [0] * 15 + [1] * 35


def test_a_boundary_is_compared_in_float64():
  """100 is less than 1000 * .1000000001, though not in float32."""
  assert build(steps=10, shift=1.0, boundary=0.1000000001).which.tolist() == [0] * 9 + [1]


def test_bfloat16_rounds_the_float32_timestep():
  """749.99994, the 13th of 15 steps of shift 12, rounds to 748; 750 would round to 752."""
  assert build(steps=15, shift=12.0, numerics="diffsynth").timestep[12] == 748


@pytest.mark.parametrize("shift", [0.1, 0.2, 1.32, 2.14])
def test_a_first_sigma_that_rounds_above_1_has_coefficients(shift):
  schedule = build(steps=5, shift=shift, solver="unipc")
  for name, values in schedule.coef.items():
    assert np.all(np.isfinite(values)), name


def test_guidance_is_a_scale_a_pair_or_a_plan():
  assert build(steps=3, guidance=4.5).guidance.tolist() == [4.5] * 3
  experts = build(steps=4, shift=1.0, boundary=0.6, guidance=(3.5, 2.0))
  assert experts.guidance.tolist() == [3.5, 3.5, 2.0, 2.0]
  assert build(steps=3, guidance=[1.0, 2.0, 3.0]).guidance.tolist() == [1.0, 2.0, 3.0]
  assert build(steps=2, guidance=(1.0, 2.0)).guidance.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("numerics", ["official", "diffsynth"])
def test_sinusoid_is_float64_rounded_once(numerics):
  schedule = build(steps=20, grid=numerics, numerics=numerics)
  frequency = [math.pow(10000.0, -k / 128) for k in range(128)]
  for step in range(20):
    t = float(schedule.timestep[step])
    wanted = [math.cos(t * f) for f in frequency] + [math.sin(t * f) for f in frequency]
    wanted = np.asarray(wanted).astype(np.float32)
    np.testing.assert_array_max_ulp(np.asarray(schedule.time[step, 0]), wanted, maxulp=1)
    assert schedule.time[step, 1].tolist() == [1.0] * 128 + [0.0] * 128


def test_diffusers_rounds_the_phase_to_float32():
  exact, rounded = sinusoid(987.0), sinusoid(987.0, numerics="diffusers")
  assert 1e-6 < np.max(np.abs(exact - rounded)) < 1e-4
  np.testing.assert_array_equal(sinusoid(0.0), sinusoid(0.0, numerics="diffusers"))


def test_a_piece_keeps_its_place():
  whole = build(steps=9, boundary=0.9, solver="unipc", guidance=range(9))
  piece = whole[3:7]
  assert len(piece) == 4
  assert piece.total == 9
  assert piece.index.tolist() == [3, 4, 5, 6]
  assert piece.sigma.tolist() == whole.sigma[3:8].tolist()
  chex.assert_trees_all_equal(piece.coef, {k: v[3:7] for k, v in whole.coef.items()})
  chex.assert_trees_all_equal(piece.which, whole.which[3:7])
  assert piece.time.shape == (4, 2, 256)
  chex.assert_trees_all_equal(whole[2:][1:5], piece)
  chex.assert_trees_all_equal(whole[:], whole)


def test_a_schedule_is_cut_where_the_expert_changes():
  two = build(steps=5, shift=1.0, boundary=0.5)
  assert two.by_expert() == [(0, slice(0, 3)), (1, slice(3, 5))]
  assert two[3:].by_expert() == [(1, slice(0, 2))]
  assert two.only(1, 4).by_expert() == [(0, slice(0, 3)), (1, slice(3, 5))]
  assert two.only(4, 5).by_expert() == [(1, slice(0, 5))]
  assert two.only(0, 0).by_expert() == [(0, slice(0, 5))]
  back = dataclasses.replace(two, which=np.array([0, 1, HOLD, 0, HOLD]))
  assert back.by_expert() == [(0, slice(0, 1)), (1, slice(1, 3)), (0, slice(3, 5))]
  assert build(steps=5).by_expert() == [(0, slice(0, 5))]


def test_only_holds_the_other_steps():
  one = build(steps=5)
  assert one.only(1, 3).which.tolist() == [HOLD, 0, 0, HOLD, HOLD]
  assert one.only(0, 5).which.tolist() == [0] * 5
  two = build(steps=5, shift=1.0, boundary=0.5)
  assert two.which.tolist() == [0, 0, 0, 1, 1]
  assert two.only(2, 4).which.tolist() == [HOLD, HOLD, 0, 1, HOLD]
  chex.assert_trees_all_equal(two.only(2, 4).sigma, two.sigma)
  assert two.only(1, 5).only(0, 4).which.tolist() == [HOLD, 0, 0, 1, HOLD]


def test_only_is_one_compilation_over_its_start():
  schedule = build(steps=5)
  held = jax.jit(chex.assert_max_traces(lambda i: schedule.only(i, 5).which, n=1))
  for start in range(5):
    assert held(jnp.int32(start)).tolist() == [HOLD] * start + [0] * (5 - start)


def test_all_numbers_are_data():
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def total(schedule):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(schedule))

  for shift, guidance, boundary, grid in [
    (5.0, 5.0, 0.875, "diffsynth"),
    (3.0, (4.0, 3.0), 0.9, "official"),
    (1.0, [1.0] * 6, 0.1, "diffusers"),
  ]:
    total(
      build(steps=6, shift=shift, guidance=guidance, boundary=boundary, grid=grid)
    ).block_until_ready()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"steps": 0}, r"steps=0, wanted a whole number of at least 1"),
    ({"steps": 2.5}, r"steps=2.5, wanted a whole number"),
    ({"shift": 0.0}, r"shift=0.0, wanted a number above 0"),
    ({"shift": math.nan}, r"shift=nan, wanted"),
    ({"shift": 1e18}, r"shift=1e\+18 with steps=5 puts several steps at one sigma"),
    ({"shift": 1e39}, r"shift=1e\+39 with steps=5"),
    ({"shift": 1e-9}, r"shift=1e-09 with steps=5"),
    ({"boundary": 875}, r"boundary=875, wanted a sigma in 0..1 \(0.875"),
    ({"solver": "heun"}, r"no solver 'heun'; there are: euler, unipc"),
    ({"grid": "karras"}, r"no grid 'karras'; there are: official, diffusers, diffsynth"),
    ({"numerics": "fp8"}, r"no numerics 'fp8'; there are: official, diffusers, diffsynth"),
    ({"guidance": (1.0, 2.0, 3.0)}, r"guidance has 3 values, wanted one, 5 for steps=5"),
    ({"guidance": (4.0, 3.0)}, r"2 values.*a pair needs a boundary"),
    ({"guidance": math.inf}, r"guidance=inf, wanted one finite scale"),
    ({"freq_dim": 7}, r"freq_dim=7, wanted an even number"),
  ],
)
def test_refuses(settings, message):
  with pytest.raises(ValueError, match=message):
    build(**({"steps": 5} | settings))


@pytest.mark.parametrize("rows", [slice(3, 3), slice(4, 2), slice(0, 5, 2), slice(5, 9), 2])
def test_a_piece_is_a_run_of_steps(rows):
  with pytest.raises(ValueError, match=r"schedule\[.*wanted"):
    _ = build(steps=5)[rows]


@pytest.mark.parametrize("kind", [int, np.int64, np.array, jnp.int32])
def test_only_stays_inside(kind):
  schedule = build(steps=5)
  for start, stop in [(2, 9), (9, 99), (-1, 3), (3, 2)]:
    with pytest.raises(ValueError, match=rf"only\({start}, {stop}\) of 5 steps: wanted 0 <="):
      schedule.only(kind(start), kind(stop))
    with pytest.raises(ValueError, match=rf"only\({start}, {stop}\) of 5 steps"):
      schedule.only(kind(start), stop)
  assert schedule.only(kind(1), kind(3)).which.tolist() == [HOLD, 0, 0, HOLD, HOLD]


def test_only_checks_what_is_known_beside_a_traced_bound():
  schedule = build(steps=5)
  with pytest.raises(ValueError, match=r"only\(\?, 9\) of 5 steps"):
    jax.eval_shape(lambda start: schedule.only(start, 9), jnp.int32(0))


@pytest.mark.parametrize("start", [1.5, np.float32(1), np.array([1]), "1", None])
def test_only_wants_whole_numbers(start):
  with pytest.raises(ValueError, match=r"only\(.* of 5 steps: wanted whole numbers"):
    build(steps=5).only(start, 3)


@pytest.mark.parametrize("field", ["shift", "guidance", "boundary"])
def test_a_traced_number_is_told_which_leaves_may_be_traced(field):
  said = r"schedules\.build works on the host .*replace\(schedule, guidance=guidance\)"
  with pytest.raises(ValueError, match=said):
    jax.jit(lambda value: build(**{"steps": 4, field: value}))(1.0)
  assert jax.jit(lambda: build(steps=4).sigma)().shape == (5,)


def test_every_stack_has_a_grid_and_a_rounding():
  assert set(schedules.GRIDS) == set(schedules.ROUNDING) == set(schedules.SLACK)
