"""The contract of `denoise`."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import (
  GRID,
  SITES,
  SOLVERS,
  relative,
  replace,
  tiny_bundle,
  tiny_inputs,
  tiny_schedule,
)
from jax_videoreason import interventions, runs, sampler, schedules, sharding
from jax_videoreason.interventions import Intervention, identity
from jax_videoreason.sampler import denoise
from jax_videoreason.taps import TapSpec

# Two programs of the same mathematics differ by float32 rounding, which the steps carry on.
SAME = 1e-5


@pytest.fixture(scope="module")
def bundle():
  return tiny_bundle()


@pytest.fixture(scope="module")
def pair():
  return tiny_bundle(experts=2)


@pytest.fixture(scope="module")
def inputs():
  return tiny_inputs(4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_guess_is_the_final_latent(bundle, inputs, solver):
  latents, trace, _ = denoise(bundle, *inputs, tiny_schedule(solver=solver))
  assert relative(trace.x0[-1], latents) < 1e-6
  assert trace.finite.all() and trace.latents.shape == (4, 4, *GRID)


def test_euler_steps_from_its_own_guess(bundle, inputs):
  schedule = tiny_schedule()
  latents, trace, _ = denoise(bundle, *inputs, schedule)
  sigma = schedule.sigma[:, None, None, None, None, None]
  velocity = (trace.latents - trace.x0) / sigma[:-1]
  after = jnp.concatenate([trace.latents[1:], latents[None]])
  assert relative(trace.x0 + sigma[1:] * velocity, after) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_pieces_handed_on_by_state_equal_the_whole(bundle, inputs, solver):
  schedule = tiny_schedule(solver=solver)
  whole, trace, _ = denoise(bundle, *inputs, schedule)
  state = sampler.start(inputs[0], solver)
  seen = []
  for piece in (schedule[:2], schedule[2:]):
    latents, part, state = denoise(bundle, *inputs, piece, state=state)
    seen.append(part.x0)
  assert relative(latents, whole) < SAME
  assert relative(jnp.concatenate(seen), trace.x0) < SAME


def test_a_state_goes_on_with_the_step_before_which_it_stands(bundle, inputs):
  schedule = tiny_schedule()
  _, trace, state = denoise(bundle, *inputs, schedule[:2])
  assert state.step.tolist() == [2] * 4
  check = functools.partial(sampler.check, bundle, *inputs)
  for piece, wanted in ((schedule[3:], 3), (schedule[1:], 1), (schedule.only(1, 4), 1)):
    said = rf"stands before step 2, wanted before step {wanted},.*: continue with schedule\[2:\]"
    with pytest.raises(ValueError, match=said):
      denoise(bundle, *inputs, piece, state=state)
    check(piece, state=replace(state, step=None))
    check(piece, state=sampler.start(inputs[0], "euler"))
    jax.eval_shape(lambda s, piece=piece: denoise(bundle, *inputs, piece, state=s), state)
  check(schedule[2:], state=runs.take(state, [3, 2, 1, 0]))
  check(schedule.only(2, 4), state=state)
  check(schedule.only(3, 4), state=state)  # a step is held on purpose
  for row in range(2):
    assert sampler.state_at(trace, schedule, row).step.tolist() == [row] * 4
  _, part, last = denoise(bundle, *inputs, schedule[2:], state=state)
  assert last.step.tolist() == [4] * 4
  with pytest.raises(ValueError, match=r"after the last step, wanted before step 2,.*: say"):
    check(schedule[2:], state=last)
  assert sampler.state_at(part, schedule[2:], 1).step.tolist() == [3] * 4
  assert sampler.state_at(part, schedule, 1).step.tolist() == [-1] * 4  # not its schedule
  _, _, early = denoise(bundle, *inputs, schedule.only(0, 2))
  check(schedule.only(2, 4), state=early)
  check(schedule[2:], state=early)


@pytest.mark.parametrize("solver", SOLVERS)
def test_held_steps_equal_a_cut_schedule(bundle, inputs, solver):
  schedule = tiny_schedule(solver=solver)
  _, _, middle = denoise(bundle, *inputs, schedule[:2])
  cut, _, _ = denoise(bundle, *inputs, schedule[2:], state=middle)
  held, trace, _ = denoise(bundle, *inputs, schedule.only(2, 4), state=middle)
  assert relative(held, cut) < SAME
  np.testing.assert_array_equal(trace.latents[0], middle.latents)
  np.testing.assert_array_equal(trace.x0[1], middle.x0)


def test_a_held_step_is_not_edited(bundle, inputs):
  schedule = tiny_schedule()
  sizes = sampler.sizes_of(bundle, *inputs, schedule)
  noisy = interventions.noise_at(
    identity(sizes), interventions.where(sizes, steps=0), mode="replace"
  )
  room = identity(sizes, edits=("noise",))
  plain, seen, _ = denoise(bundle, *inputs, schedule.only(1, 4), room)
  edited, shown, _ = denoise(bundle, *inputs, schedule.only(1, 4), noisy)
  np.testing.assert_array_equal(plain, edited)
  np.testing.assert_array_equal(seen.latents, shown.latents)


def test_a_stored_trajectory_branches_exactly(bundle, inputs):
  schedule = tiny_schedule()
  whole, trace, _ = denoise(bundle, *inputs, schedule)
  state = sampler.state_at(trace, schedule, 2)
  _, _, handed_on = denoise(bundle, *inputs, schedule[:2])
  assert jax.tree.structure(state) == jax.tree.structure(handed_on)
  assert relative(state.latents, handed_on.latents) < SAME
  assert relative(state.x0, handed_on.x0) < SAME
  branched, _, _ = denoise(bundle, *inputs, schedule[2:], state=state)
  assert relative(branched, whole) < SAME
  with pytest.raises(ValueError, match=r"step 4 is not in the trace"):
    sampler.state_at(trace, schedule, 4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_whose_trace_has_the_memory_goes_on_to_the_last_bit(bundle, inputs, solver):
  schedule = tiny_schedule(6, solver=solver)
  taps = TapSpec(solver=True)
  state = sampler.start(inputs[0], solver)
  whole, trace, _ = denoise(bundle, *inputs, schedule.only(0, 6), None, taps, state)
  for step in (0, 1, 3, 5):
    state = sampler.state_at(trace, schedule, step)
    rest, again, _ = denoise(bundle, *inputs, schedule.only(step, 6), None, taps, state)
    np.testing.assert_array_equal(rest, whole)
    np.testing.assert_array_equal(again.x0[step:], trace.x0[step:])
    for name, rows in again.solver.items():
      np.testing.assert_array_equal(rows[step:], trace.solver[name][step:])
  seen = []
  runs.run(bundle, *inputs, schedule, None, taps, on_piece=lambda piece, *_: seen.append(piece))
  assert {n: v.shape for n, v in seen[0].solver.items()} == {
    n: v.shape for n, v in trace.solver.items()
  }


@pytest.mark.parametrize("branches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_order_and_batch_of_runs_do_not_matter(bundle, branches):
  noise, cond = tiny_inputs(4, branches=branches)
  schedule = tiny_schedule()
  latents, _, _ = denoise(bundle, noise, cond, schedule)
  order = np.array([2, 0, 3, 1])
  turned, _, _ = denoise(bundle, runs.take(noise, order), runs.take(cond, order), schedule)
  assert relative(turned, latents[order]) < SAME
  assert relative(runs.run(bundle, noise, cond, schedule, batch=3, piece=2), latents) < SAME


def test_a_scale_of_guidance_for_each_run_is_that_of_the_run_alone(bundle, inputs):
  noise, cond = inputs
  scales = np.random.default_rng(0).uniform(1, 6, (4, 4)).astype(np.float32)  # S R
  schedule = replace(tiny_schedule(), guidance=scales)
  latents, trace, _ = denoise(bundle, noise, cond, schedule)
  for run in (0, 3):
    same = replace(schedule, guidance=scales[:, run])
    assert relative(latents[run], denoise(bundle, noise, cond, same)[0][run]) < SAME
  turned = runs.take(schedule, [3, 2, 1, 0])
  np.testing.assert_array_equal(turned.guidance, scales[:, ::-1])
  assert runs.take(same, [3, 2, 1, 0]) is same
  problem = (bundle, noise, cond, schedule)
  assert relative(runs.run(*problem, batch=3, piece=2), latents) < SAME
  assert relative(runs.run(*problem, mesh=sharding.make_mesh(seed=2)), latents) < SAME
  three = (runs.take(tree, slice(3)) for tree in problem[1:])
  final, dealt = runs.pmap_runs(bundle, *three, devices=jax.devices()[:2])
  assert relative(final, latents[:3]) < SAME and relative(dealt.x0, trace.x0[:, :3]) < SAME


@pytest.mark.parametrize(
  ("leaf", "shape", "wanted"),
  [
    ("sigma", (4,), r"wanted S\+1 = \(5,\)"),
    ("timestep", (), r"wanted S = \(4,\)"),
    ("time", (4, 16), r"wanted S 2 freq_dim = \(4, 2, 16\)"),
    ("guidance", (), r"wanted S or S R = \(4,\) or \(4, 3\)"),
    ("guidance", (3, 4), r"wanted S or S R = \(4,\) or \(4, 3\)"),
    ("guidance", (4, 4), r"wanted S or S R = \(4,\) or \(4, 3\)"),
    ("which", (3,), r"wanted S = \(4,\)"),
    ("coef", (4, 3), r"wanted S = \(4,\)"),
  ],
)
def test_a_leaf_of_the_schedule_in_another_shape_is_refused(bundle, leaf, shape, wanted):
  value = np.zeros(shape, np.float32)
  schedule = replace(tiny_schedule(), **{leaf: {"delta": value} if leaf == "coef" else value})
  for call in (denoise, runs.run, runs.pmap_runs):
    with pytest.raises(ValueError, match=rf"{leaf}.* is {re.escape(str(shape))}, {wanted}"):
      call(bundle, *tiny_inputs(3), schedule)


def test_a_leaf_of_the_schedule_that_is_no_array_is_refused(bundle):
  schedule = replace(tiny_schedule(), guidance=[1.0] * 4)
  said = r"guidance is a list, wanted S or S R = \(4,\) or \(4, 3\): replace leaves by arrays"
  for call in (denoise, runs.run, runs.pmap_runs):
    with pytest.raises(ValueError, match=said):
      call(bundle, *tiny_inputs(3), schedule)


def test_runs_are_taken_of_whatever_has_them(bundle, inputs):
  noise, cond = inputs
  taps = TapSpec(sites=("attn_out",), steps=(0,), solver=True)
  _, trace, state = denoise(bundle, noise, cond, tiny_schedule(2, solver="unipc"), taps=taps)
  own = replace(noise, injected=jnp.arange(8.0).reshape(2, 4))
  order = [2, 0, 2]
  np.testing.assert_array_equal(runs.take(own, order).injected, own.injected[:, order])
  np.testing.assert_array_equal(runs.take(cond, order).text, cond.text[:, order])
  np.testing.assert_array_equal(runs.take(state, order).solver["age"], [2, 2, 2])
  some = runs.take(trace, order)
  np.testing.assert_array_equal(some.sigma, trace.sigma)
  np.testing.assert_array_equal(some.x0, trace.x0[:, order])
  np.testing.assert_array_equal(some.solver["x0_1"], trace.solver["x0_1"][:, order])
  name = "attn_out/norm"
  np.testing.assert_array_equal(some.taps[name], trace.taps[name][:, :, :, order])
  host = jax.tree.map(np.asarray, state)
  for which, count in ((3, 1), (slice(1, 3), 2), (np.array([True, False, True, True]), 3)):
    assert runs.take(host, which).latents.shape == (count, *GRID)
  traced = jax.jit(lambda index: runs.take(host, index).latents)(np.array(order))
  np.testing.assert_array_equal(traced, host.latents[order])


@pytest.mark.parametrize("which", [[0, 99], -1, [], 0.5, [True, False]])
def test_runs_that_are_not_there_are_not_taken(inputs, which):
  with pytest.raises(ValueError, match=r"runs|\(2,\), wanted \(4,\)"):
    runs.take(inputs[1], which)


def test_a_mask_that_takes_no_run_or_is_traced_is_refused(inputs):
  with pytest.raises(ValueError, match=r"the mask runs=\[False, .* takes no run, wanted one"):
    runs.take(inputs[1], np.zeros(4, bool))
  with pytest.raises(ValueError, match=r"take by a mask works on the host .*: give the indices"):
    jax.jit(lambda mask: runs.take(inputs[1], mask))(np.ones(4, bool))


@pytest.mark.parametrize("other", [Intervention(), {"text": np.zeros(3)}, np.zeros(3)])
def test_runs_of_other_kinds_are_not_taken(other):
  with pytest.raises(ValueError, match="wanted one of Noise, Conditioning, State"):
    runs.take(other, [0])


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "devices"), [("euler", 1)])
def test_one_expert_at_a_time_equals_both(pair, solver, devices):
  noise, cond = tiny_inputs(4)
  schedule = tiny_schedule(5, boundary=0.9, solver=solver)
  assert [e for e, _ in schedule.by_expert()] == [0, 1]
  taps = TapSpec(sites=("attn_out",), steps=(0, 3))
  sizes = sampler.sizes_of(pair, noise, cond, schedule)
  where = interventions.where(sizes, steps=slice(1, 5))
  edit = interventions.noise_at(identity(sizes), where, mode="replace")

  def traced(bundle, **more):
    kept = {}
    final = runs.run(
      bundle,
      *(noise, cond, schedule, edit, taps),
      piece=1,
      on_piece=lambda trace, steps, part: kept.update({(steps.start, part.start): trace}),
      **more,
    )
    return final, kept

  asked = []

  def expert(number):
    asked.append(number)
    return tuple(params if e == number else None for e, params in enumerate(pair.params))

  wanted, by_both = traced(pair)
  bare = replace(pair, params=(None, None))
  mesh = None if devices == 1 else sharding.make_mesh(seed=devices)
  final, by_one = traced(bare, expert=expert, mesh=mesh)
  assert asked == [0, 1]
  assert relative(final, wanted) < SAME
  assert by_one.keys() == by_both.keys()
  for at, trace in by_one.items():
    assert trace.finite.all()
    assert trace.taps.keys() == by_both[at].taps.keys()
    assert relative(trace.x0, by_both[at].x0) < SAME
    for name, value in trace.taps.items():
      assert value.shape == by_both[at].taps[name].shape
      assert not value.size or relative(value, by_both[at].taps[name]) < SAME


@pytest.mark.slow
def test_each_expert_is_asked_once_for_all_batches(pair):
  noise, cond = tiny_inputs(3)
  schedule, asked = tiny_schedule(5, boundary=0.9), []

  def expert(number):
    asked.append(number)
    return tuple(params if e == number else None for e, params in enumerate(pair.params))

  final = runs.run(
    replace(pair, params=(None, None)), noise, cond, schedule, batch=2, expert=expert
  )
  assert asked == [0, 1]
  assert relative(final, runs.run(pair, noise, cond, schedule)) < SAME


def test_four_devices_equal_one(bundle, inputs):
  schedule = tiny_schedule()
  latents, _, _ = denoise(bundle, *inputs, schedule)
  mesh = sharding.make_mesh(seed=4)
  assert relative(runs.run(bundle, *inputs, schedule, mesh=mesh), latents) < SAME
  placed = sampler.start(runs.place(inputs[0], mesh), "euler").latents
  assert len(placed.sharding.device_set) == 4
  np.testing.assert_array_equal(placed, sampler.start(inputs[0], "euler").latents)


def test_noise_of_a_run_is_its_own():
  whole = sampler.start(runs.make_noise([3, 5, 8], GRID), "euler").latents
  alone = sampler.start(runs.make_noise([5], GRID), "euler").latents
  np.testing.assert_array_equal(whole[1], alone[0])
  fewer = sampler.start(runs.make_noise([5], (2, *GRID[1:])), "euler").latents
  np.testing.assert_array_equal(fewer[0], alone[0, :2])
  assert abs(float(whole.mean())) < 0.2 and abs(float(whole.std()) - 1) < 0.2
  # what seed 3 means, in every release
  np.testing.assert_allclose(
    whole[0, 0, 0, 0], [1.6818217, 0.66590047, -0.20399334, 0.84289193], rtol=1e-5
  )


def test_noise_of_a_seed_is_the_same_under_any_default_generator():
  whole = sampler.start(runs.make_noise([3, 5], GRID), "euler").latents
  with jax.default_prng_impl("rbg"):
    alone = sampler.start(runs.make_noise([5], GRID), "euler").latents
  np.testing.assert_array_equal(alone[0], whole[1])


def test_noise_that_a_setting_changes_is_refused():
  with (
    jax.threefry_partitionable(False),
    pytest.raises(ValueError, match="jax_threefry_partitionable is off, by which a seed is other"),
  ):
    runs.make_noise([3], GRID)


def test_giving_the_noise_equals_drawing_it(bundle, inputs):
  noise, cond = inputs
  schedule = tiny_schedule()
  drawn, _, _ = denoise(bundle, noise, cond, schedule)
  start = np.asarray(sampler.start(noise, "euler").latents)
  given, _, _ = denoise(bundle, runs.make_noise(range(4), GRID, start), cond, schedule)
  assert relative(given, drawn) < SAME


def test_a_bundle_of_another_name_and_with_other_parts_is_no_other_program(bundle, caplog):
  card = replace(bundle.card, name="merged", tokenizer="tokenizer.json", sources=(("a", "b"),))
  elsewhere = jax.device_put({"kernel": jnp.ones(2)}, jax.devices()[1])
  other = replace(bundle, card=card, parts=replace(bundle.parts, vae="a VAE"), vae=elsewhere)
  with jax.log_compiles():
    for each in (bundle, other):
      denoise(each, *tiny_inputs(1), tiny_schedule(7))  # steps of no other test
  compiled = [r for r in caplog.records if re.match(r"Compiling .*_trajectory", r.getMessage())]
  assert len(compiled) == 1


def test_one_compilation_for_all_that_is_data(pair, inputs):
  noise, cond = inputs
  run = jax.jit(chex.assert_max_traces(lambda *a: denoise(*a)[0], n=1))
  results = []
  for seed, shift, guidance, boundary, gain in (
    (0, 5.0, 5.0, 0.9, 0.0),
    (1, 5.0, 5.0, 0.9, 0.0),
    (0, 3.0, 5.0, 0.9, 0.0),
    (0, 5.0, (4.0, 3.0), 0.9, 0.0),
    (0, 5.0, 5.0, 0.5, 0.0),
    (0, 5.0, 5.0, 0.9, 1.0),
  ):
    schedule = tiny_schedule(shift=shift, guidance=guidance, boundary=boundary)
    sizes = sampler.sizes_of(pair, noise, cond, schedule)
    room = identity(sizes, edits=("noise", "gate"), sites=("mlp_out",))
    edit = interventions.noise_at(room, interventions.where(sizes, steps=2), mode="add", gain=gain)
    some = runs.make_noise([seed + r for r in range(4)], GRID)
    results.append(np.asarray(run(pair, some, cond, schedule, edit)))
  for other in results[1:]:
    assert relative(other, results[0]) > 1e-3


def test_the_boundary_hands_over_to_the_second_expert(pair, inputs):
  low_only = replace(pair, params=(None, pair.params[1]))
  always_low = tiny_schedule(boundary=1.0)
  always_low = replace(always_low, which=np.ones(4, np.int32))
  both, _, _ = denoise(pair, *inputs, always_low)
  single = tiny_bundle()
  single = replace(single, params=(pair.params[1],))
  alone, _, _ = denoise(single, *inputs, tiny_schedule())
  assert relative(both, alone) < SAME
  assert relative(denoise(low_only, *inputs, always_low)[0], alone) < SAME
  mixed, trace, _ = denoise(pair, *inputs, tiny_schedule(boundary=0.9))
  high, high_trace, _ = denoise(replace(single, params=(pair.params[0],)), *inputs, tiny_schedule())
  which = tiny_schedule(boundary=0.9).which
  first_low = int(np.argmax(which))
  assert 0 < first_low < 4
  assert relative(trace.x0[:first_low], high_trace.x0[:first_low]) < SAME
  assert relative(mixed, high) > 1e-3


@pytest.mark.parametrize(
  "image_input",
  ["concat", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "overwrite"))],
)
def test_an_identity_changes_nothing(image_input):
  bundle, inputs = tiny_bundle(image_input), tiny_inputs(3, image_input)
  schedule = tiny_schedule()
  sizes = sampler.sizes_of(bundle, *inputs, schedule)
  plain, _, _ = denoise(bundle, *inputs, schedule)
  np.testing.assert_array_equal(denoise(bundle, *inputs, schedule, identity(sizes))[0], plain)
  everything = ("mix_latents", "noise", "mix_out", "mix", "gate", "steer", "tokens")
  open_sites = identity(sizes, edits=everything, sites=SITES)
  assert relative(denoise(bundle, *inputs, schedule, open_sites)[0], plain) < SAME


def test_runs_an_edit_does_not_name_stay_bit_equal(bundle, inputs):
  schedule = tiny_schedule()
  sizes = sampler.sizes_of(bundle, *inputs, schedule)
  room = identity(sizes, edits=("gate",), sites=("attn_out",))
  clean, _, _ = denoise(bundle, *inputs, schedule, room)
  edit = replace(room, gate=jnp.asarray(room.gate).at[:, 1, 2].set(0.0))
  edited, _, _ = denoise(bundle, *inputs, schedule, edit)
  np.testing.assert_array_equal(edited[jnp.array([0, 1, 3])], clean[jnp.array([0, 1, 3])])
  assert relative(edited[2], clean[2]) > 1e-4


@pytest.mark.parametrize("layer", [0, 2])
def test_a_whole_residual_swap_becomes_the_other_run(bundle, layer):
  """Two runs with one text differ by their stream alone, so after the swap they are each other."""
  noise, cond = tiny_inputs(2)
  text = jnp.broadcast_to(cond.text[:, :1], cond.text.shape)
  cond = replace(cond, text=text)
  schedule = tiny_schedule()
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  at = interventions.where(sizes, steps=0, layers=layer)
  room = identity(sizes, edits=("mix",), sites=("resid_post",))
  _, clean, _ = denoise(bundle, noise, cond, schedule[:1], room)
  swapped = interventions.swap_runs(room, at, 0, 1)
  _, trace, _ = denoise(bundle, noise, cond, schedule[:1], swapped)
  velocity = (clean.latents[0] - clean.x0[0]) / schedule.sigma[0]
  other = (trace.latents[0] - trace.x0[0]) / schedule.sigma[0]
  assert relative(other, velocity[::-1]) < 1e-6


def test_replaced_noise_at_the_first_step_is_another_seed(bundle, inputs):
  noise, cond = inputs
  schedule = tiny_schedule()
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  edit = interventions.noise_at(
    identity(sizes), interventions.where(sizes, steps=0), mode="replace"
  )
  rng = np.random.default_rng(5)
  injected = jnp.asarray(rng.normal(size=(4, 4, *GRID)), jnp.float32)
  edited, trace, _ = denoise(bundle, replace(noise, injected=injected), cond, schedule, edit)
  np.testing.assert_array_equal(trace.latents[0], injected[0])
  again, _, _ = denoise(bundle, replace(noise, start=injected[0]), cond, schedule)
  assert relative(edited, again) < SAME


@pytest.mark.slow
def test_injected_noise_is_drawn_from_the_key_of_the_run(bundle, inputs):
  noise, cond = inputs
  schedule = tiny_schedule()
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  at = interventions.where(sizes, steps=1)
  edit = interventions.noise_at(identity(sizes), at, mode="replace")
  _, trace, _ = denoise(bundle, noise, cond, schedule, edit)
  wanted = jax.random.normal(jax.random.fold_in(noise.keys[2], 2), GRID, jnp.float32)
  np.testing.assert_array_equal(trace.latents[1, 2], wanted)
  _, piece, _ = denoise(
    bundle, noise, cond, schedule[1:], edit, state=sampler.start(noise, "euler")
  )
  np.testing.assert_array_equal(piece.latents[0, 2], wanted)


def test_copies_of_a_run_branch_by_noise_of_other_seeds(bundle, inputs):
  noise, cond = inputs
  schedule = tiny_schedule()
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  copies, second = [0, 0, 2, 2], [1, 3]
  _, _, state = denoise(bundle, noise, cond, schedule[:2])
  state, cond = (runs.take(tree, copies) for tree in (state, cond))
  at = interventions.where(sizes, steps=2)
  edit = interventions.noise_at(
    identity(sizes), at, mode="renoise", sigma=schedule.sigma, runs=second
  )

  def branched(noise, edit):
    _, trace, _ = denoise(bundle, noise, cond, schedule[2:], edit, state=state)
    return np.asarray(trace.latents[0])

  others = runs.make_noise([runs.seed_of(case, 7 + n) for n, case in enumerate(copies)], GRID)
  made = branched(others, edit)
  np.testing.assert_array_equal(made[::2], state.latents[::2])
  sigma = schedule.sigma[2]
  for run in second:
    drawn = jax.random.normal(jax.random.fold_in(others.keys[run], 3), GRID)
    assert relative(made[run], (1 - sigma) * state.x0[run] + sigma * drawn) < SAME
  both = interventions.noise_at(identity(sizes), at, mode="renoise", sigma=schedule.sigma)
  same, differing = (branched(own, both) for own in (runs.take(noise, copies), others))
  np.testing.assert_array_equal(same[::2], same[1::2])
  assert relative(differing[::2], differing[1::2]) > 0.1


def test_unipc_forgets_a_run_whose_latents_were_edited(bundle, inputs):
  noise, cond = inputs
  schedule = tiny_schedule(solver="unipc")
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  rng = np.random.default_rng(1)
  injected = jnp.asarray(rng.normal(size=(4, 4, *GRID)), jnp.float32)
  at = interventions.where(sizes, steps=2)
  edit = interventions.noise_at(identity(sizes), at, mode="replace")
  edited, _, _ = denoise(bundle, replace(noise, injected=injected), cond, schedule, edit)
  fresh = replace(sampler.start(noise, "unipc"), latents=injected[2])
  restarted, _, _ = denoise(bundle, noise, cond, schedule[2:], state=fresh)
  assert relative(edited, restarted) < SAME


@pytest.mark.parametrize("solver", SOLVERS)
def test_latents_moved_between_pieces_are_those_of_an_edit(bundle, inputs, solver):
  noise, cond = inputs
  schedule = tiny_schedule(solver=solver)
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  change = jax.random.normal(jax.random.key(1), (4, *GRID))
  injected = jnp.zeros((4, 4, *GRID)).at[2].set(change)
  at = interventions.where(sizes, steps=2)
  edit = interventions.noise_at(identity(sizes), at, mode="add")
  edited, _, _ = denoise(bundle, replace(noise, injected=injected), cond, schedule, edit)
  _, _, handed_on = denoise(bundle, noise, cond, schedule[:2])
  _, trace, _ = denoise(bundle, noise, cond, schedule, taps=TapSpec(solver=True))
  for state in (handed_on, sampler.state_at(trace, schedule, 2)):
    other = sampler.moved(state, state.latents + change, schedule)
    assert jax.tree.structure(other) == jax.tree.structure(state)
    assert relative(denoise(bundle, noise, cond, schedule[2:], state=other)[0], edited) < SAME
  with pytest.raises(ValueError, match=r"are \(2, 3, 4, 4, 4\), wanted \(4, 3, 4, 4, 4\): give"):
    sampler.moved(handed_on, change[:2], schedule)


def test_averaged_guesses_make_the_runs_one_at_the_end(bundle, inputs):
  schedule = tiny_schedule()
  sizes = sampler.sizes_of(bundle, *inputs, schedule)
  mean = jnp.full((4, 4, 4), 0.25)
  edit = replace(identity(sizes, edits=("mix_out",)), mix_out=mean)
  latents, trace, _ = denoise(bundle, *inputs, schedule, edit)
  assert relative(latents[1], latents[0]) < SAME
  velocity = (trace.latents[0] - trace.x0[0]) / schedule.sigma[0]
  assert relative(trace.x0[0] + schedule.sigma[1] * velocity, trace.latents[1]) < SAME


def test_given_cells_of_ti2v_never_move():
  bundle, (noise, cond) = tiny_bundle("overwrite"), tiny_inputs(3, "overwrite")
  latents, trace, _ = denoise(bundle, noise, cond, tiny_schedule())
  np.testing.assert_array_equal(latents[:, 0], cond.known[:, 0])
  np.testing.assert_array_equal(trace.latents[:, :, 0], np.stack([cond.known[:, 0]] * 4))
  np.testing.assert_array_equal(trace.x0[:, :, 0], np.stack([cond.known[:, 0]] * 4))
  assert relative(latents[:, 1:], cond.known[:, 1:]) > 0.1


def test_a_nan_stays_in_its_run(bundle, inputs):
  noise, cond = inputs
  start = np.asarray(sampler.start(noise, "euler").latents).copy()
  start[1, 0, 0, 0, 0] = np.nan
  bad, trace, _ = denoise(bundle, replace(noise, start=jnp.asarray(start)), cond, tiny_schedule())
  assert trace.finite.all(axis=0).tolist() == [True, False, True, True]
  assert np.isfinite(np.asarray(bad)[[0, 2, 3]]).all()


def test_taps_keep_the_steps_layers_and_branches_asked_for(bundle, inputs):
  schedule = tiny_schedule()
  every = TapSpec(sites=("resid_post", "update"), reduce=("norm",), branches=(0, 1))
  plain, _, _ = denoise(bundle, *inputs, schedule)
  latents, trace, _ = denoise(bundle, *inputs, schedule, taps=every)
  assert relative(latents, plain) < SAME
  norms = trace.taps["resid_post/norm"]
  assert norms.shape == (4, 3, 2, 4, 3 * 2 * 2)
  some = replace(every, layers=(0, 2), steps=(1, 3), branches=(1,), latents=False, x0=False)
  _, part, _ = denoise(bundle, *inputs, schedule, taps=some)
  assert part.latents is None and part.x0 is None
  wanted = norms[jnp.array([1, 3])][:, jnp.array([0, 2])][:, :, 1:]
  assert relative(part.taps["resid_post/norm"], wanted) < SAME
  with pytest.raises(ValueError, match=r"steps=\(4,\): there is no 4, only 0\.\.3"):
    denoise(bundle, *inputs, schedule, taps=replace(every, steps=(4,)))
  with pytest.raises(ValueError, match=r"steps=\(3, 1\), wanted increasing"):
    denoise(bundle, *inputs, schedule, taps=replace(every, steps=(3, 1)))


@pytest.mark.slow
def test_tapped_steps_are_found_in_their_pieces(bundle, inputs):
  schedule = tiny_schedule(6)
  taps = TapSpec(sites=("resid_post",), steps=(1, 5), latents=False, x0=False)
  whole, parts = [], []
  keep = {6: whole, 2: parts}
  for piece, kept in keep.items():
    runs.run(
      bundle, *inputs, schedule, taps=taps, piece=piece,
      on_piece=lambda trace, *_, kept=kept: kept.extend(trace.taps.get("resid_post/norm", ())),
    )  # fmt: skip
  assert len(whole) == 2 and relative(np.stack(parts), np.stack(whole)) < SAME
  for steps, said in (((6,), r"there is no 6"), ((-1, 1), r"there is no -1")):
    with pytest.raises(ValueError, match=said):
      runs.run(bundle, *inputs, schedule, taps=replace(taps, steps=steps), piece=2)


def test_a_lens_of_the_last_layer_is_the_velocity(bundle, inputs):
  schedule = tiny_schedule(guidance=1.0)
  taps = TapSpec(sites=("resid_post",), reduce=("lens",), layers=(2,))
  _, trace, _ = denoise(bundle, *inputs, schedule, taps=taps)
  from jax_videoreason.models.common import unpatchify

  lens = trace.taps["resid_post/lens"][:, 0, 0]
  velocity = jnp.stack([unpatchify(x[None], (3, 2, 2), (1, 2, 2))[0] for x in lens])
  sigma = schedule.sigma[:-1][:, None, None, None, None, None]
  assert relative(velocity, (trace.latents - trace.x0) / sigma) < 1e-4


@pytest.mark.slow
def test_the_trajectory_is_differentiable(bundle):
  noise, cond = tiny_inputs(1, branches=1)
  start = sampler.start(noise, "euler").latents

  def last(x):
    return denoise(bundle, replace(noise, start=x), cond, tiny_schedule(2))[0].sum()

  slope = jax.grad(last)(start)
  assert np.isfinite(np.asarray(slope)).all() and float(jnp.abs(slope).max()) > 0


@pytest.mark.slow
def test_steps_computed_again_give_the_same(bundle, inputs):
  noise, cond = inputs
  schedule = tiny_schedule(2)
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  room = identity(sizes, edits=("gate",), sites=("mlp_out",))
  at = sampler.start(noise, "euler").latents, jnp.asarray(room.gate, jnp.float32)

  def made(start, gate, remat):
    own, edit = replace(noise, start=start), replace(room, gate=gate)
    return denoise(bundle, own, cond, schedule, edit, TapSpec(sites=("mlp_out",)), remat=remat)

  def score(start, gate, remat):
    latents, trace, _ = made(start, gate, remat)
    return jnp.square(latents).sum() + trace.taps["mlp_out/norm"].sum()

  chex.assert_trees_all_equal(made(*at, True), made(*at, False))
  again, kept = (jax.grad(score, argnums=(0, 1))(*at, remat) for remat in (True, False))
  assert all(relative(a, b) < SAME for a, b in zip(again, kept, strict=True))


def test_steps_computed_again_bound_what_a_gradient_holds(bundle, inputs):
  noise, cond = inputs
  start = sampler.start(noise, "euler").latents

  def growth(remat):
    """Bytes that a gradient holds for one more step."""

    def last(start, schedule):
      return denoise(bundle, replace(noise, start=start), cond, schedule, remat=remat)[0].sum()

    few, many = (
      jax.jit(jax.grad(last)).lower(start, tiny_schedule(steps)).compile().memory_analysis()
      for steps in (4, 12)
    )
    return (many.temp_size_in_bytes - few.temp_size_in_bytes) / 8

  assert growth(remat=True) <= 1.1 * start.nbytes
  assert growth(remat=False) > 5 * start.nbytes


@pytest.mark.parametrize("guidance", ["parallel", "sequential"])
def test_a_stored_value_put_in_is_a_patch_from_the_run_it_was_stored_of(bundle, inputs, guidance):
  """To the bit; a region of both branches, at one step and layer."""
  noise, cond = inputs
  schedule = tiny_schedule(3)
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  taps = TapSpec(sites=("resid_post",), reduce=("full",), layers=1, steps=1, branches=(0, 1))
  call = functools.partial(denoise, bundle, noise, cond, schedule, guidance=guidance)
  _, trace, _ = call(taps=taps)
  stored = trace.taps["resid_post/full"]  # S' L' G R T D
  at = interventions.where(sizes, steps=1, layers=1, region=np.arange(sizes.T) > 2)
  room = identity(sizes, edits=("mix", "gate"), sites=("resid_post",))
  patched = interventions.patch_runs(room, at, source=2, target=0)
  away = interventions.ablate(room, at, runs=0)
  put = interventions.add(away, at, stored[:, :, :, 2:3], runs=0)
  latents, _, _ = call(patched)
  np.testing.assert_array_equal(call(put)[0], latents)
  assert relative(latents[0], call()[0][0]) > 1e-4


@pytest.mark.slow
def test_layers_are_attributed_at_the_gate_that_changes_nothing(bundle, inputs):
  """The derivative by every gate at 1, through steps and layers, beside a step to both sides."""
  noise, cond = inputs
  schedule = tiny_schedule(2)
  sizes = sampler.sizes_of(bundle, noise, cond, schedule)
  edit = identity(sizes, edits=("gate",), sites=("mlp_out",))
  readout = jax.random.normal(jax.random.key(3), (sizes.R, *noise.grid))

  @jax.jit
  def read(gate):
    latents, _, _ = denoise(bundle, noise, cond, schedule, replace(edit, gate=gate))
    return jnp.sum(readout * latents)

  gate = jnp.asarray(edit.gate, jnp.float32)
  slope = jax.jit(jax.grad(read))(gate)
  along = jax.random.normal(jax.random.key(4), gate.shape)
  wanted = (read(gate + 1e-2 * along) - read(gate - 1e-2 * along)) / 2e-2
  assert abs(float(jnp.sum(slope * along)) - wanted) < 0.02 * jnp.linalg.norm(slope)
  assert (jnp.abs(slope) > 0).all()


def test_contradictions_are_named_before_anything_runs(pair, bundle, inputs):
  noise, cond = inputs
  schedule = tiny_schedule(boundary=0.9)
  high_only = replace(pair, params=(pair.params[0], None))
  with pytest.raises(ValueError, match=r"calls expert 1, which is not loaded"):
    denoise(high_only, noise, cond, schedule)
  _, seen, _ = jax.jit(lambda s: denoise(high_only, noise, cond, s))(schedule)
  assert seen.finite.all(axis=1).tolist() == (schedule.which == 0).tolist()
  denoise(high_only, noise, cond, schedule.only(0, 1))
  with pytest.raises(ValueError, match=r"names no expert and the model has 2"):
    denoise(pair, noise, cond, tiny_schedule())
  short = replace(cond, known=cond.known[:, :1])
  with pytest.raises(ValueError, match=r"known R F H W C is \(4, 1, 4, 4, 4\), wanted \(4, 3, 4"):
    denoise(bundle, noise, short, tiny_schedule())
  with pytest.raises(ValueError, match=r"takes a first frame and cond.known is None"):
    denoise(bundle, noise, replace(cond, known=None, known_mask=None), tiny_schedule())
  plain = tiny_bundle("none")
  with pytest.raises(ValueError, match=r"takes no first frame and cond.known is given"):
    denoise(plain, noise, cond, tiny_schedule())
  with pytest.raises(ValueError, match=r"cond.text is 11 wide, the model reads 12"):
    denoise(bundle, noise, replace(cond, text=cond.text[..., :11]), tiny_schedule())
  with pytest.raises(ValueError, match=r"schedule.time is 256 wide.*freq_dim=16"):
    denoise(bundle, noise, cond, schedules.build(steps=4))
  state = sampler.start(noise, "euler")
  with pytest.raises(ValueError, match=r"state remembers \[\], solver 'unipc' wants \['age'"):
    denoise(bundle, noise, cond, tiny_schedule(solver="unipc"), state=state)
  with pytest.raises(ValueError, match=r"gate S L R is \(4, 3, 4\), wanted \(5, 3, 4\)"):
    denoise(bundle, noise, cond, tiny_schedule(5), Intervention(gate=jnp.ones((4, 3, 4))))
  with pytest.raises(ValueError, match=r"typed keys"):
    denoise(bundle, replace(noise, keys=jnp.zeros((4,), jnp.uint32)), cond, tiny_schedule())


def test_an_edit_and_taps_of_another_kind_are_refused(bundle, inputs):
  schedule = tiny_schedule()
  for call in (denoise, runs.run):
    for edit, kind in ((TapSpec(), "TapSpec"), ([Intervention()], "list")):
      with pytest.raises(ValueError, match=f"edit is of the kind {kind}, wanted one Intervention"):
        call(bundle, *inputs, schedule, edit)
    with pytest.raises(ValueError, match="taps is of the kind Intervention, wanted one TapSpec"):
      call(bundle, *inputs, schedule, taps=Intervention())


def test_what_works_on_the_host_is_refused_where_it_is_traced(bundle, inputs):
  noise, cond = inputs
  schedule = tiny_schedule()
  for call in (
    lambda: jax.jit(lambda s: runs.run(bundle, noise, cond, s))(schedule),
    lambda: jax.jit(lambda: runs.run(bundle, noise, cond, schedule))(),
    lambda: jax.grad(lambda g: runs.run(bundle, noise, cond, replace(schedule, guidance=g)).sum())(
      schedule.guidance
    ),
  ):
    with pytest.raises(ValueError, match=r"run works on the host .*: call sampler\.denoise"):
      call()
  for call in (
    lambda: jax.jit(lambda seed: runs.make_noise([seed], GRID))(0),
    lambda: jax.jit(lambda seeds: runs.make_noise(seeds, GRID))(np.arange(2)),
    lambda: jax.jit(lambda start: runs.make_noise([0], GRID, start))(np.zeros((1, *GRID))),
  ):
    with pytest.raises(ValueError, match=r"make_noise works on the host .*replace\(noise, start="):
      call()
  keys = jax.jit(lambda: jax.random.key_data(runs.make_noise([0, 1], GRID).keys))()
  np.testing.assert_array_equal(keys, jax.random.key_data(runs.make_noise([0, 1], GRID).keys))


def test_bad_noise_is_refused():
  good = np.zeros((2, *GRID), np.float32)
  with pytest.raises(ValueError, match=r"noise R F H W C is float32 \(2, 3, 4, 4, 4\), wanted"):
    runs.make_noise([0], GRID, good)
  good[1, 2, 3, 0, 1] = np.nan
  with pytest.raises(ValueError, match=r"1 values that are not finite, the first at \(1, 2, 3, 0"):
    runs.make_noise([0, 1], GRID, good)
  with pytest.raises(ValueError, match=r"at least one whole number"):
    runs.make_noise([], GRID)


def test_edited_runs_are_never_split_over_batches(bundle, inputs):
  schedule = tiny_schedule()
  edit = identity(sampler.sizes_of(bundle, *inputs, schedule))
  with pytest.raises(ValueError, match=r"need their 4 runs in one batch, batch=2"):
    runs.run(bundle, *inputs, schedule, edit, batch=2)
  targets = TapSpec(sites=("resid_post",), reduce=("gram",), targets=jnp.ones((4, 12, 1)))
  with pytest.raises(ValueError, match=r"need their 4 runs in one batch, batch=2"):
    runs.run(bundle, *inputs, schedule, taps=targets, batch=2)
  with pytest.raises(ValueError, match=r"no room to fill 4 runs up on a mesh with seed=3"):
    runs.run(bundle, *inputs, schedule, taps=targets, mesh=sharding.make_mesh(seed=3))


@pytest.mark.parametrize(("batch", "seats", "wanted"), [(None, 1, 4), (3, 1, 6), (3, 2, 8)])
def test_runs_that_fill_batches_up_are_counted(bundle, inputs, monkeypatch, batch, seats, wanted):
  seen, real = [], sampler.denoise

  def denoise(bundle, noise, *rest, **more):
    seen.append(len(noise.keys))
    return real(bundle, noise, *rest, **more)

  monkeypatch.setattr(sampler, "denoise", denoise)
  mesh = None if seats == 1 else sharding.make_mesh(seed=seats)
  runs.run(bundle, *inputs, tiny_schedule(), batch=batch, mesh=mesh)
  assert runs.computed(4, batch, seats) == sum(seen) == wanted


def test_pieces_have_one_length():
  assert [p.stop - p.start for p in runs.pieces(50, 12)] == [10] * 5
  assert runs.pieces(7, 3) == [slice(i, i + 1) for i in range(7)]
  assert [list(b) for b in runs.batches(5, 2)] == [[0, 1], [2, 3], [4, 4]]


def test_steps_beyond_the_schedule_are_refused():
  with pytest.raises(ValueError):
    schedules.build(steps=0)
