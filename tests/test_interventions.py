"""Interventions: what they leave alone to the bit, what they change, and what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_videoreason.edits import (
  BLOCK_UPDATE,
  check_edit,
  edit_latents,
  edit_output,
  edit_site,
  layer_edits,
  step_edits,
  wants_noise,
)
from jax_videoreason.experiments.context import neutral
from jax_videoreason.interventions import (
  NOISE_MODES,
  ROOM,
  Intervention,
  ablate,
  add,
  closeness_weights,
  depth,
  ensemble_runs,
  identity,
  noise_at,
  patch_runs,
  steer,
  swap_runs,
  where,
)
from jax_videoreason.sharding import make_mesh
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import HEAD_SITES, SITES

SIZES = Sizes(S=5, R=4, G=2, L=6, F=3, H=4, W=4, C=2, T=12, D=8, N=4, sites=SITES)
SIGMA = np.array([1.0, 0.95, 0.8, 0.6, 0.3, 0.0], np.float32)
BLOCK_ROOM = ("mix", "gate", "steer", "tokens")
MIDDLE = 1 / 3


@pytest.fixture(scope="module")
def value():
  return np.asarray(jax.random.normal(jax.random.key(0), (2, 4, 12, 8)))


@pytest.fixture(scope="module")
def latents():
  x, x0, noise = jax.random.normal(jax.random.key(1), (3, 4, 3, 4, 4, 2))
  return np.asarray(x), np.asarray(x0), np.asarray(noise)


@pytest.fixture(scope="module")
def at_site():
  """edit_site with everything in the room, compiled once: (value, edit, step, layer) -> value."""

  @jax.jit
  def call(value, edit, step, layer):
    edits = step_edits(edit, step)
    return value if edits is None else edit_site(value, layer_edits(edits, layer), edits.sites[0])

  return lambda value, edit, step=0, layer=0: np.asarray(call(value, edit, step, layer))


@pytest.fixture(scope="module")
def on_latents():
  call = jax.jit(edit_latents)

  def run(edit, step, x, x0, noise):
    return [np.asarray(out) for out in call(edit, step, x, x0, noise)]

  return run


@pytest.fixture(scope="module")
def on_output():
  call = jax.jit(edit_output)

  def run(edit, step, x0, velocity, x, sigma):
    return [np.asarray(out) for out in call(edit, step, x0, velocity, x, sigma)]

  return run


def room(*edits, sites=("attn_out",), sizes=SIZES):
  return identity(sizes, edits=edits or BLOCK_ROOM, sites=sites)


# Identity


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_identity_keeps_every_bit(dtype, at_site, value):
  x = value.astype(dtype)
  x[0, 1, 2, 3], x[1, 0, 0, 0] = np.nan, -0.0
  for step, layer in ((0, 0), (4, 5)):
    after = at_site(x, room(), step, layer)
    assert after.dtype == dtype
    assert after.tobytes() == x.tobytes()


def test_identity_keeps_every_bit_of_latents_and_output(on_latents, on_output, latents):
  x, x0, noise = latents
  edit = identity(SIZES, edits=("mix_latents", "noise", "mix_out"))
  after, touched = on_latents(edit, 2, x, x0, noise)
  assert after.tobytes() == x.tobytes()
  assert not touched.any()
  same = on_output(edit, 2, x0, noise, x, 0.8)
  assert same[0].tobytes() == x0.tobytes() and same[1].tobytes() == noise.tobytes()


def test_identity_without_room_is_not_in_the_program(value, latents):
  edit = identity(SIZES)
  assert jax.tree.leaves(edit) == []
  assert step_edits(edit, 0) is None
  x, x0, _ = latents
  kept = jnp.asarray(x)
  assert edit_latents(edit, 0, kept, x0)[0] is kept
  program = jax.make_jaxpr(lambda x: edit_latents(edit, 0, x, x)[0])(x)
  assert [e.primitive.name for e in program.eqns if e.primitive.name in ("cond", "select_n")] == []
  for edits, site in ((None, "attn_out"), (step_edits(room(), 0), "mlp_out")):
    assert edit_site(value, edits, site) is value


def test_one_cond_per_site(value):
  edits = layer_edits(step_edits(room(), 0), 0)
  (edited,) = jax.make_jaxpr(lambda x: edit_site(x, edits, "attn_out"))(value).eqns
  program = edited.params["call_jaxpr"]
  assert [e.primitive.name for e in program.eqns].count("cond") == 1
  touching = [
    e.primitive.name
    for e in program.eqns
    if any(getattr(v, "aval", None) is not None and v.aval.shape == value.shape for v in e.outvars)
  ]
  assert touching == ["cond"]


# Derivatives


def slopes(f, at, along):
  """What jax says of the derivative, and the central difference."""
  _, exact = jax.jvp(f, (at,), (along,))
  step = 1e-2
  return exact, (f(at + step * along) - f(at - step * along)) / (2 * step)


def swapped(edit):
  return swap_runs(edit, where(SIZES), 0, 3)


NEUTRAL = [
  ("mix", lambda edit: edit),
  ("mix", swapped),
  ("gate", lambda edit: edit),
  ("gate", lambda edit: ablate(edit, where(SIZES))),
  ("steer", lambda edit: edit),
  ("direction", lambda edit: dataclasses.replace(edit, steer=edit.steer + 0.5)),
  ("added", lambda edit: add(edit, where(SIZES, steps=(1, 2), layers=(0, 3)), 0.0)),
]


@pytest.mark.parametrize(("field", "change"), NEUTRAL)
@pytest.mark.parametrize(
  "dense", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "vmap"]
)
def test_the_derivative_by_a_number_that_changes_nothing_is_that_of_the_formula(
  field, change, dense, value
):
  """As attribution patching takes it: mix, gate and steer of a site, some tokens of one branch."""
  draw = np.random.default_rng(0).standard_normal
  edit = change(steer(room(), where(SIZES), direction=draw((6, 8)).astype(np.float32), gain=0.0))
  edit = dataclasses.replace(
    edit,
    tokens=np.broadcast_to(np.arange(12) % 3 > 0, (5, 4, 12)),
    branches=np.array([True, False]),
  )
  readout = draw(value.shape).astype(np.float32)

  def read(number):
    changed = dataclasses.replace(edit, **{field: number})
    return jnp.sum(readout * edit_site(value, layer_edits(step_edits(changed, 2), 3), "attn_out"))

  at = jnp.asarray(getattr(edit, field), jnp.float32)
  along = draw(at.shape).astype(np.float32)
  exact, wanted = slopes(read, at, along)
  assert abs(wanted) > 1
  np.testing.assert_allclose(exact, wanted, rtol=1e-2)
  by_all = jax.vmap(jax.grad(read))(at[None])[0] if dense else jax.grad(read)(at)
  np.testing.assert_allclose(jnp.sum(by_all * along), wanted, rtol=1e-2)


@pytest.mark.parametrize("out", ["x0", "velocity"])
def test_the_derivative_by_a_number_at_the_latents_is_that_of_the_formula(out, latents):
  x, x0, noise = latents
  edit = dataclasses.replace(identity(SIZES, edits=("mix_latents", "noise", "mix_out")), out=out)
  draw = np.random.default_rng(0).standard_normal
  readout = [draw(x.shape).astype(np.float32) for _ in range(3)]

  def read(field, number):
    changed = dataclasses.replace(edit, **{field: number})
    after, _ = edit_latents(changed, 2, x, x0, noise)
    guess, velocity = edit_output(changed, 2, x0, noise, x, 0.8)
    return sum(jnp.sum(r * v) for r, v in zip(readout, (after, guess, velocity), strict=True))

  if out == "velocity":  # x0 is what the velocity says of x: in the trajectory they always agree
    x0 = x - 0.8 * noise
  else:
    noise = (x - x0) / np.float32(0.8)
  for field in ("mix_latents", "keep", "to_x0", "noise_gain", "mix_out"):
    at = jnp.asarray(getattr(edit, field), jnp.float32)
    exact, wanted = slopes(functools.partial(read, field), at, draw(at.shape).astype(np.float32))
    assert abs(wanted) > 1, field
    np.testing.assert_allclose(exact, wanted, rtol=1e-2, err_msg=field)


def test_second_derivatives_at_a_gate_that_changes_nothing_are_those_of_the_formula(value):
  """Two gates with a sine between them."""
  edits = layer_edits(step_edits(identity(SIZES, edits=("gate",), sites=("attn_out",)), 0), 0)
  readout = np.random.default_rng(0).standard_normal(value.shape).astype(np.float32)

  def by_edits(gates, x):
    for gate in gates:
      own = dataclasses.replace(edits, gate=jnp.broadcast_to(gate, edits.gate.shape))
      x = edit_site(jnp.sin(x), own, "attn_out")
    return jnp.sum(readout * x)

  def by_hand(gates, x):
    return jnp.sum(readout * gates[1] * jnp.sin(gates[0] * jnp.sin(x)))

  gates = jnp.ones(2)
  exact, wanted = (jax.hessian(f)(gates, value) for f in (by_edits, by_hand))
  assert jnp.abs(wanted).max() > 1
  np.testing.assert_allclose(exact, wanted, rtol=1e-4, atol=1e-4)

  def steepness(f):
    return lambda gates: jnp.sum(jax.grad(f, argnums=1)(gates, value) ** 2)

  exact, wanted = (jax.grad(steepness(f))(gates) for f in (by_edits, by_hand))
  np.testing.assert_allclose(exact, wanted, rtol=1e-4)


def test_a_program_without_derivatives_does_not_hold_the_formula(value):
  """One product for true averages, behind the cond; none more for the slopes."""
  edits = layer_edits(step_edits(room(), 0), 0)
  held = jax.jit(lambda x, edits: edit_site(x, edits, "attn_out")).lower(value, edits).as_text()
  assert held.count("dot_general") == 1


# Added values


def test_values_are_added_where_they_are_asked_for(at_site, value):
  draw = np.random.default_rng(0).standard_normal
  at = where(SIZES, steps=(1, 3), layers=(2, 5))
  values = draw((2, 2, 2, 4, 12, 8)).astype(np.float32)
  edit = add(room(), at, values, runs=(0, 2))
  check_edit(edit, SIZES)
  for i, step in enumerate((1, 3)):
    for j, layer in enumerate((2, 5)):
      wanted = value + values[i, j] * np.array([1, 0, 1, 0], np.float32)[:, None, None]
      np.testing.assert_array_equal(at_site(value, edit, step, layer), wanted)
  for step, layer in ((0, 2), (1, 3), (4, 5)):
    assert at_site(value, edit, step, layer).tobytes() == value.tobytes()


def test_added_to_what_is_ablated_stands_alone(at_site, value):
  """A patch from elsewhere; tokens of a region alone, the others keep their bits."""
  at = where(SIZES, steps=2, layers=4, region=np.arange(12) < 5)
  stored = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
  edit = add(ablate(room(), at, runs=1), at, stored, runs=1)
  wanted = value.copy()
  wanted[:, 1, :5] = stored[:5]
  np.testing.assert_array_equal(at_site(value, edit, 2, 4), wanted)


def test_values_that_are_added_twice_add_up(at_site, value):
  """At places that they share and beside them; also under a trace."""
  first, second = where(SIZES, steps=1, layers=(1, 2)), where(SIZES, steps=1, layers=(2, 3))
  edit = add(add(room(), first, 1.0), second, 2.0)
  assert edit.added.shape == (3, 2, 4, 12, 8)
  traced = jax.jit(lambda v: add(add(room(), first, v), second, 2 * v).added)(1.0)
  np.testing.assert_array_equal(traced, edit.added)
  for layer, more in ((1, 1), (2, 3), (3, 2), (4, 0)):
    after = at_site(value, edit, 1, layer)
    np.testing.assert_allclose(after, value + np.float32(more), rtol=1e-6)


def test_runs_that_nothing_is_added_to_keep_their_bits_and_their_masks(at_site, value):
  x = value.copy()
  x[0, 1, :2, 0] = -0.0, 1e-40
  first = where(SIZES, steps=1, layers=2, region=np.arange(12) < 5)
  edit = add(room(), first, 1.0, runs=0)
  other = where(SIZES, steps=1, layers=2, region=np.arange(12) > 8)
  edit = ablate(add(edit, other, 2.0, runs=1), other, runs=2)
  wanted = x.copy()
  wanted[:, 0, :5] += 1
  wanted[:, 1, 9:] += 2
  wanted[:, 2, 9:] = 0
  assert at_site(x, edit, 1, 2).tobytes() == wanted.tobytes()
  with pytest.raises(ValueError, match="already edited under another token mask"):
    add(edit, other, 1.0, runs=0)


def test_an_edit_that_lies_on_a_device_is_checked_inside_jit(value):
  edit = jax.tree.map(jnp.asarray, add(room(), where(SIZES), 1.0))

  @jax.jit
  def call(x):
    check_edit(ablate(edit, where(SIZES), gate=1.0), SIZES)
    return edit_site(x, layer_edits(step_edits(edit, 0), 0), "attn_out")

  np.testing.assert_allclose(call(value), value + 1, rtol=1e-6)


def test_every_edit_of_a_study_has_a_control_without_effect(at_site, on_latents, value, latents):
  full = {f.name for f in dataclasses.fields(Intervention)} - {"sites", "out"}
  edit = identity(SIZES, edits=[name for name in ROOM if name != "heads"], sites=("attn_out",))
  at = where(SIZES, branches=0)
  edit = add(steer(edit, at, np.ones(8), gain=2.0), at, 1.0, runs=0)
  edit = ablate(swap_runs(edit, at, 0, 1), at, gate=0.5)
  edit = noise_at(edit, where(SIZES), mode="add", gain=0.5)
  assert {name for name in full if getattr(edit, name) is None} == {"heads"}
  control = neutral(edit, SIZES)
  assert at_site(value, control, 1, 2).tobytes() == value.tobytes()
  assert at_site(value, edit, 1, 2).tobytes() != value.tobytes()
  x, x0, noise = latents
  assert on_latents(control, 2, x, x0, noise)[0].tobytes() == x.tobytes()
  assert jax.tree.structure(control) == jax.tree.structure(edit)


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (
      lambda: add(room(), where(SIZES), np.ones((3, 8))),
      r"values are \(3, 8\), wanted S' L' G",
    ),
    (lambda: add(identity(SIZES), where(SIZES), 1.0), "sites"),
    (lambda: jax.jit(lambda i: add(room(), where(SIZES, steps=i), 1.0).added)(1), "traced steps"),
    (
      lambda: check_edit(dataclasses.replace(room(), added=np.ones((2, 2, 4, 12, 8))), SIZES),
      "added and added_at come together",
    ),
    (
      lambda: check_edit(
        dataclasses.replace(add(room(), where(SIZES), 1.0), added=np.ones((2, 2, 4, 12, 8))), SIZES
      ),
      "added_at names 29, wanted -1 or one of the 2 of added",
    ),
    (
      lambda: check_edit(
        dataclasses.replace(add(room(), where(SIZES), 1.0), added=np.ones((30, 4, 8))), SIZES
      ),
      r"added K G R T D is \(30, 4, 8\), wanted K and \(2, 4, 12, 8\)",
    ),
    (
      lambda: check_edit(
        dataclasses.replace(add(room(), where(SIZES), 1.0), added_at=np.zeros((5, 6))), SIZES
      ),
      "added_at is float64, wanted int32",
    ),
    (
      lambda: add(room(), where(SIZES, layers=(5, 1)), np.ones((2, 1, 1, 12, 8))),
      "names out of order: name each once",
    ),
    (
      lambda: add(room(), where(SIZES), np.ones((1, 1, 1, 4, 12, 8))),
      r"of one branch for all 2: name its own by where\(branches=0\)",
    ),
    (
      lambda: jax.jit(lambda e: add(e, where(SIZES), 1.0).added)(add(room(), where(SIZES), 1.0)),
      "an edit that is traced and holds values",
    ),
  ],
)
def test_added_values_are_checked(make, said):
  with pytest.raises(ValueError, match=said):
    make()


# Mixing between runs


def test_swap_exchanges_bits_and_twice_is_none(at_site, value):
  at = where(SIZES, steps=1, layers=2)
  once = swap_runs(room(), at, 0, 3)
  after = at_site(value, once, 1, 2)
  np.testing.assert_array_equal(after, value[:, [3, 1, 2, 0]])
  for step, layer in ((0, 2), (1, 3)):
    np.testing.assert_array_equal(at_site(value, once, step, layer), value)
  twice = swap_runs(once, at, 0, 3)
  np.testing.assert_array_equal(twice.mix, room().mix)


def test_patch_copies_bits_pair_by_pair(at_site, value):
  edit = patch_runs(room(), where(SIZES), source=(0, 1), target=(2, 3))
  np.testing.assert_array_equal(at_site(value, edit), value[:, [0, 1, 0, 1]])
  from_one = patch_runs(room(), where(SIZES), source=1, target=np.array([0, 2, 3]))
  np.testing.assert_array_equal(at_site(value, from_one), value[:, [1, 1, 1, 1]])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4))
def test_a_second_edit_acts_on_the_result_of_the_first(at_site, value, patches):
  edit, runs = room(), np.arange(4)
  for source, target in patches:
    edit = patch_runs(edit, where(SIZES, layers=1), source=source, target=target)
    runs[target] = runs[source]
  check_edit(edit, SIZES)
  np.testing.assert_array_equal(at_site(value, edit, 3, 1), value[:, runs])


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 3), st.integers(0, 3))
def test_the_order_of_runs_does_not_matter(at_site, value, order, source, target):
  """Edit, then permute = permute, then the same edit of the permuted runs."""
  place = np.argsort(order)
  at = where(SIZES)
  edit = patch_runs(room(), at, source=source, target=target)
  moved = patch_runs(room(), at, source=int(place[source]), target=int(place[target]))
  np.testing.assert_array_equal(at_site(value, edit)[:, order], at_site(value[:, order], moved))


@settings(max_examples=25, deadline=None)
@given(
  st.sets(st.integers(0, 4), min_size=1),
  st.sets(st.integers(0, 5), min_size=1),
  st.lists(st.booleans(), min_size=12, max_size=12).filter(any),
  st.sampled_from([(0,), (1,), (0, 1)]),
  st.integers(0, 4),
  st.integers(0, 5),
)
def test_only_the_cells_asked_for_change(at_site, value, steps, layers, region, branches, s, l):  # noqa: E741
  at = where(
    SIZES, steps=sorted(steps), layers=sorted(layers), region=np.array(region), branches=branches
  )
  edit = swap_runs(room(), at, 1, 2)
  hit = np.zeros((2, 4, 12), bool)
  if s in steps and l in layers:
    hit[np.ix_(branches, [1, 2], np.flatnonzero(region))] = True
  swapped = value[:, [0, 2, 1, 3]]
  np.testing.assert_array_equal(
    at_site(value, edit, s, l), np.where(hit[..., None], swapped, value)
  )


def test_frames_and_regions_choose_tokens(at_site, value):
  """Tokens are (f h w): latent frame 1 of 3 is tokens 4..7; a region cuts it; runs may differ."""
  own = np.zeros((4, 3, 2, 2), bool)
  own[0, :, 0], own[1, :, :, 1] = True, True
  for at, hits in (
    (where(SIZES, frames=1), {0: [4, 5, 6, 7], 1: [4, 5, 6, 7]}),
    (where(SIZES, frames=slice(1, 3), region=own[0]), {0: [4, 5, 8, 9], 1: [4, 5, 8, 9]}),
    (where(SIZES, frames=0, region=own), {0: [0, 1], 1: [1, 3]}),
  ):
    after = at_site(value, swap_runs(room(), at, 0, 1))
    changed = (after != value).any(axis=(0, 3))
    assert {run: np.flatnonzero(changed[run]).tolist() for run in (0, 1)} == hits
    assert not changed[2:].any()


def test_an_average_is_the_mean_and_equals_stay(at_site, value):
  at = where(SIZES)
  edit = ensemble_runs(room(), at, (0, 2, 3), what="attn")
  mean = value[:, [0, 2, 3]].mean(1)
  after = at_site(value, edit)
  np.testing.assert_allclose(after[:, 0], mean, atol=1e-6)
  np.testing.assert_array_equal(after[:, 1:], value[:, 1:])
  every = ensemble_runs(room(), at, (0, 2, 3), what="attn", keep="all")
  np.testing.assert_allclose(
    at_site(value, every)[:, [0, 2, 3]], np.stack([mean] * 3, 1), atol=1e-6
  )
  alike = np.repeat(value[:, :1], 4, axis=1)
  np.testing.assert_allclose(at_site(alike, every), alike, atol=1e-6)


def test_an_average_of_patched_runs_reads_what_was_patched(at_site, value):
  at = where(SIZES)
  edit = ensemble_runs(patch_runs(room(), at, source=3, target=0), at, (0, 1), what="attn")
  np.testing.assert_allclose(at_site(value, edit)[:, 0], value[:, [3, 1]].mean(1), atol=1e-6)


def test_an_ensemble_of_groups_weights_and_amount(at_site, value):
  first, second = np.array([0, 1]), np.array([2, 3])
  edit = ensemble_runs(
    room(), where(SIZES), (first, second), what="attn", weights=(0.75, 0.25), amount=0.5
  )
  after = at_site(value, edit)
  np.testing.assert_allclose(
    after[:, :2], 0.5 * value[:, :2] + 0.375 * value[:, :2] + 0.125 * value[:, 2:], atol=1e-6
  )
  np.testing.assert_array_equal(after[:, 2:], value[:, 2:])


def test_averages_of_bf16_are_taken_in_float32(at_site):
  x = np.full((2, 4, 12, 8), 256, jnp.bfloat16)
  x[:, 1], x[:, 2] = 257.6, 250
  edit = ensemble_runs(room(), where(SIZES), (0, 1, 2), what="attn")
  exact = x[:, :3].astype(np.float32).mean(1).astype(jnp.bfloat16)
  np.testing.assert_array_equal(at_site(x, edit)[:, 0], exact)


def test_nan_travels_only_through_averages(at_site, value):
  x = value.copy()
  x[:, 3] = np.nan
  edit = ensemble_runs(room(), where(SIZES), (0, 1), what="attn")
  edit = patch_runs(edit, where(SIZES), source=1, target=2)
  clean = np.isfinite(at_site(x, edit)).all(axis=(0, 2, 3))
  # run 0 averages only 0 and 1, but 0 * NaN is NaN; 1 is left alone, 2 is gathered
  assert clean.tolist() == [False, True, True, False]


def test_closeness_weights_sum_to_one_and_like_the_middle():
  x = np.array([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0]], np.float32)
  weights = np.asarray(closeness_weights(x))
  assert weights.sum() == pytest.approx(1, abs=1e-6)
  assert weights[2] == weights.min()
  np.testing.assert_allclose(closeness_weights(np.ones((3, 4))), MIDDLE, atol=1e-6)


# A small residual network, to see what an edit does downstream


@pytest.fixture(scope="module")
def network():
  """Layers scanned with all five sites: (x R T D, edit, text R) -> x of every layer, L+1 R T D."""
  weights = jax.random.normal(jax.random.key(2), (SIZES.L, 3, 8, 8)) * 0.3

  @jax.jit
  def call(x, edit, text):
    edits = step_edits(edit, 0)

    def layer(x, row):
      weight, number = row
      own = None if edits is None else layer_edits(edits, number)
      x = edit_site(x, own, "resid_pre")
      for which, site in enumerate(BLOCK_UPDATE):
        seen = jnp.tanh(x @ weight[which]) + x.mean(axis=2, keepdims=True)
        if site == "cross_out":
          seen = seen + text[None, :, None, None]
        x = x + edit_site(jnp.tanh(seen), own, site)
      x = edit_site(x, own, "resid_post")
      return x, x

    rows = (weights, jnp.arange(SIZES.L))
    return jax.lax.scan(layer, x[None], rows)[1]

  return lambda x, edit, text=(0.0, 0.0, 0.0, 0.0): np.asarray(
    call(x, edit, np.asarray(text, np.float32))
  )


def test_swapping_the_whole_stream_is_flat_over_layers(network, value):
  """Runs that share their text are exchanged from the layer on: the same bits at every layer."""
  base = identity(SIZES, edits=BLOCK_ROOM, sites=("resid_post",))
  clean = network(value[0], base)[-1]
  for layer in range(SIZES.L):
    after = network(value[0], swap_runs(base, where(SIZES, layers=layer), 0, 1))[-1]
    assert after[:, [1, 0]].tobytes() == clean[:, :2].tobytes()
  ends = [
    network(value[0], swap_runs(base, where(SIZES, layers=layer, frames=0), 0, 1))[-1]
    for layer in (0, 3)
  ]
  assert np.abs(ends[0] - ends[1]).max() > 1e-3, "with a token mask the layers differ"
  texts = [
    network(value[0], swap_runs(base, where(SIZES, layers=layer), 0, 1), (0, 1, 0, 0))[-1]
    for layer in (0, 3)
  ]
  assert np.abs(texts[0] - texts[1]).max() > 1e-3, "with different texts the layers differ"


def test_the_three_terms_patched_together_are_the_block_update(network, value):
  base = identity(SIZES, edits=BLOCK_ROOM, sites=BLOCK_UPDATE)
  clean = network(value[0], base)
  layer = 3
  at = where(SIZES, layers=layer)
  after = network(value[0], patch_runs(base, at, source=0, target=2))
  update = clean[layer, :, 0] - clean[layer - 1, :, 0]
  np.testing.assert_allclose(after[layer, :, 2], clean[layer - 1, :, 2] + update, atol=1e-6)
  np.testing.assert_array_equal(after[:, :, :2], clean[:, :, :2])


def test_averaging_whole_streams_over_layers_is_averaging_at_the_first(network, value):
  base = identity(SIZES, edits=BLOCK_ROOM, sites=("resid_post",))
  ends = [
    network(
      value[0], ensemble_runs(base, where(SIZES, layers=at), (0, 1), what="resid", keep="all")
    )[-1]
    for at in (2, slice(2, 6))
  ]
  np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)


def test_one_compilation_for_all_values(value):
  base = room()
  traces = []

  @jax.jit
  def call(edit, layer):
    traces.append(0)
    return edit_site(value, layer_edits(step_edits(edit, 1), layer), "attn_out")

  at = where(SIZES, steps=1, layers=2, frames=1)
  for edit in (
    base,
    swap_runs(base, at, 0, 1),
    ensemble_runs(base, at, (0, 1, 2), what="attn"),
    ablate(base, at),
    steer(base, at, np.ones(8)),
  ):
    call(edit, 2)
  assert len(traces) == 1


# Gate and steer


def test_a_gate_scales_and_zero_is_zero(at_site, value):
  x = value.copy()
  x[:, 1] = np.inf
  edit = ablate(room(), where(SIZES, layers=0), runs=(1, 2))
  after = at_site(x, edit)
  assert (after[:, 1:3] == 0).all()
  np.testing.assert_array_equal(after[:, [0, 3]], x[:, [0, 3]])
  half = ablate(ablate(room(), where(SIZES), gate=0.5), where(SIZES), gate=0.5)
  np.testing.assert_array_equal(at_site(value, half), value / 4)


def test_steering_adds_along_its_direction(at_site, value):
  directions = np.arange(48, dtype=np.float32).reshape(6, 8)
  at = where(SIZES, layers=slice(1, 3))
  edit = steer(steer(room(), at, directions, gain=2), at, directions, gain=-0.5, runs=3)
  after = at_site(value, edit, 0, 2)
  np.testing.assert_allclose(after[:, :3], value[:, :3] + 2 * directions[2], rtol=1e-6)
  np.testing.assert_allclose(after[:, 3], value[:, 3] + 1.5 * directions[2], rtol=1e-6)
  np.testing.assert_array_equal(at_site(value, edit, 0, 3), value)


def test_runs_without_a_gain_keep_their_bits(at_site, value):
  x = value.copy()
  x[:, 2, :, 0] = -0.0
  edit = steer(room(), where(SIZES), np.ones(8), runs=0)
  assert at_site(x, edit)[:, 1:].tobytes() == x[:, 1:].tobytes()


def test_mix_then_gate_then_steer(at_site, value):
  at, direction = where(SIZES), np.ones(8, np.float32)
  calls = [
    lambda e: steer(e, at, direction, runs=0),
    lambda e: ablate(e, at, gate=3.0, runs=0),
    lambda e: patch_runs(e, at, source=1, target=0),
  ]
  for order in (calls, calls[::-1]):
    edit = room()
    for call in order:
      edit = call(edit)
    np.testing.assert_allclose(at_site(value, edit)[:, 0], value[:, 1] * 3 + 1, atol=1e-5)


# Latents


def expected_noise(mode, step, x, x0, noise):
  sigma = SIGMA[step]
  return {
    "replace": noise,
    "add": x + 0.5 * noise,
    "add_sigma": x + 0.5 * sigma * noise,
    "renoise": (1 - sigma) * x0 + sigma * noise,
  }[mode]


@pytest.mark.parametrize("mode", NOISE_MODES)
def test_noise_modes(mode, on_latents, latents):
  x, x0, noise = latents
  gain = {"gain": 0.5} if mode.startswith("add") else {}
  at = where(SIZES, steps=(1, 3), frames=2)
  edit = noise_at(identity(SIZES), at, mode=mode, sigma=SIGMA, runs=(0, 2), **gain)
  check_edit(edit, SIZES)
  for step in range(SIZES.S):
    after, touched = on_latents(edit, step, x, x0, noise)
    hit = np.zeros((4, 3), bool)
    if step in (1, 3):
      hit[[0, 2], 2] = True
    wanted = np.where(hit[:, :, None, None, None], expected_noise(mode, step, x, x0, noise), x)
    np.testing.assert_allclose(after, wanted, atol=1e-6)
    np.testing.assert_array_equal(after[~hit], x[~hit])
    assert touched.tolist() == hit.any(1).tolist()
    assert bool(wants_noise(edit, step)) == (step in (1, 3))


def test_replace_forgets_even_nan(on_latents, latents):
  x, x0, noise = latents
  edit = noise_at(identity(SIZES), where(SIZES, steps=2), mode="replace")
  after, _ = on_latents(edit, 2, x * np.nan, x0 * np.nan, noise)
  np.testing.assert_array_equal(after, noise)


def test_noise_composes_with_one_draw(on_latents, latents):
  x, x0, noise = latents
  at = where(SIZES, steps=2)
  twice = noise_at(noise_at(identity(SIZES), at, mode="add"), at, mode="add", gain=2.0)
  np.testing.assert_allclose(on_latents(twice, 2, x, x0, noise)[0], x + 3 * noise, rtol=1e-5)
  last = noise_at(twice, at, mode="renoise", sigma=SIGMA)
  np.testing.assert_allclose(
    on_latents(last, 2, x, x0, noise)[0],
    (1 - SIGMA[2]) * x0 + SIGMA[2] * noise,
    atol=1e-6,
  )


def test_averaged_latents_stay_on_the_noise_level(on_latents, latents):
  """x = (1-sigma) x0 + sigma eps, averaged: (1-sigma) mean x0 + sigma sqrt(n) mean eps."""
  _, x0, noise = latents
  step = 2
  x = (1 - SIGMA[step]) * x0 + SIGMA[step] * noise
  edit = ensemble_runs(
    identity(SIZES), where(SIZES, steps=step), (1, 2, 3), what="latents", sigma=SIGMA
  )
  after, touched = on_latents(edit, step, x, x0, noise)
  level = (1 - SIGMA[step]) * x0[1:].mean(0) + SIGMA[step] * np.sqrt(3) * noise[1:].mean(0)
  np.testing.assert_allclose(after[1], level, atol=1e-5)
  np.testing.assert_array_equal(after[[0, 2, 3]], x[[0, 2, 3]])
  assert touched.tolist() == [False, True, False, False]
  assert not bool(wants_noise(edit, step))
  noised = noise_at(edit, where(SIZES, steps=step), mode="add", gain=0.1)
  np.testing.assert_allclose(
    on_latents(noised, step, x, x0, noise)[0][1], level + 0.1 * noise[1], atol=1e-5
  )


def test_mixed_latents_are_gathered_and_touched(on_latents, latents):
  x, x0, noise = latents
  swap = np.eye(4, dtype=np.float32)[[1, 0, 2, 3]]
  base = identity(SIZES, edits=("mix_latents",))
  edit = dataclasses.replace(base, mix_latents=np.stack([swap, *base.mix_latents[1:]]))
  check_edit(edit, SIZES)
  after, touched = on_latents(edit, 0, x, x0, noise)
  np.testing.assert_array_equal(after, x[[1, 0, 2, 3]])
  assert touched.tolist() == [True, True, False, False]
  assert not on_latents(edit, 1, x, x0, noise)[1].any()


def test_weights_set_the_noise_level_too(on_latents, latents):
  x, x0, noise = latents
  edit = ensemble_runs(
    identity(SIZES), where(SIZES, steps=0), (0, 1), what="latents", weights=(0.8, 0.2), sigma=SIGMA
  )
  after, _ = on_latents(edit, 0, x, x0, noise)
  # at sigma 1 the latents are noise; 0.8^2 + 0.2^2 of the variance is left, and is put back
  np.testing.assert_allclose(after[0], (0.8 * x[0] + 0.2 * x[1]) / np.sqrt(0.68), atol=1e-5)


# The model's guess


@pytest.mark.parametrize("out", ["x0", "velocity"])
def test_an_averaged_guess_keeps_each_run_consistent(out, on_output, latents):
  x, x0, _ = latents
  sigma = 0.8
  velocity = (x - x0) / np.float32(sigma)
  edit = ensemble_runs(
    identity(SIZES), where(SIZES, steps=1), (0, 1, 2), what="out", keep="all", out=out
  )
  assert edit.out == out
  new_x0, new_velocity = on_output(edit, 1, x0, velocity, x, sigma)
  np.testing.assert_allclose(x - sigma * new_velocity, new_x0, atol=1e-5)
  mixed, whole = (new_x0, x0) if out == "x0" else (new_velocity, velocity)
  for run in range(3):
    np.testing.assert_allclose(mixed[run], whole[:3].mean(0), atol=1e-5)
  assert new_x0[3].tobytes() == x0[3].tobytes()
  assert new_velocity[3].tobytes() == velocity[3].tobytes()
  same = on_output(edit, 2, x0, velocity, x, sigma)
  assert same[0].tobytes() == x0.tobytes() and same[1].tobytes() == velocity.tobytes()


# Constructors


def constructors(step, layer, number):
  """Every constructor at a step and layer with a number; inside the blocks, then on latents."""
  block = where(SIZES, steps=step, layers=layer, frames=1, branches=0)
  latent = where(SIZES, steps=step, frames=2)
  runs = where(SIZES, steps=step)
  full = identity(SIZES, edits=(*BLOCK_ROOM, "noise", "mix_latents", "mix_out"), sites=BLOCK_UPDATE)
  return {
    "swap": swap_runs(full, block, 0, 1),
    "patch": patch_runs(full, block, source=0, target=(2, 3)),
    "ensemble": ensemble_runs(full, block, (0, 1), amount=number),
    "ablate": ablate(full, block, gate=number, runs=1),
    "steer": steer(full, block, np.ones(8), gain=number),
    "add": noise_at(full, latent, mode="add_sigma", gain=number, sigma=SIGMA),
    "renoise": noise_at(full, latent, mode="renoise", sigma=SIGMA * number),
    "latents": ensemble_runs(full, runs, (0, 1), what="latents", sigma=SIGMA, amount=number),
    "out": ensemble_runs(full, runs, (0, 1), what="out", amount=number),
  }


def test_traced_places_and_numbers_give_the_same_edit():
  traced = jax.jit(constructors)(3, 2, 0.25)
  concrete = constructors(3, 2, 0.25)
  for name, edit in concrete.items():
    check_edit(edit, SIZES)
    for field in dataclasses.fields(Intervention):
      one, two = getattr(edit, field.name), getattr(traced[name], field.name)
      if isinstance(one, np.ndarray):
        assert two.dtype == one.dtype, (name, field.name)
        np.testing.assert_allclose(two, one, atol=1e-6, err_msg=f"{name} {field.name}")
      else:
        assert one == two, (name, field.name)


def test_traced_runs_give_the_same_edit():
  call = jax.jit(lambda a, b: (patch_runs(room(), where(SIZES), source=a, target=b)).mix)
  np.testing.assert_array_equal(
    call(1, 2), patch_runs(room(), where(SIZES), source=1, target=2).mix
  )


def test_constructors_make_room_and_leave_their_argument_alone():
  base = identity(SIZES)
  edit = patch_runs(base, where(SIZES, frames=0), source=0, target=1, sites=("attn_out",))
  assert (edit.sites, edit.mix.shape, edit.tokens.shape) == (
    ("attn_out",), (5, 6, 4, 4), (5, 4, 12)
  )  # fmt: skip
  assert edit.gate is None and base.mix is None
  full = room()
  before = [leaf.tobytes() for leaf in jax.tree.leaves(full)]
  swap_runs(full, where(SIZES, frames=0), 0, 1)
  ablate(full, where(SIZES))
  assert [leaf.tobytes() for leaf in jax.tree.leaves(full)] == before


def test_room_has_no_effect_and_the_right_shapes():
  edit = identity(SIZES, edits=ROOM, sites=HEAD_SITES)
  check_edit(edit, SIZES)
  assert edit.branches is None
  assert all(
    getattr(edit, field.name) is not None
    for field in dataclasses.fields(Intervention)
    if field.name not in ("branches", "added", "added_at")
  )


def test_what_an_ensemble_of_each_kind_mixes():
  at = where(SIZES, steps=0)
  for what, sites in (
    ("resid", ("resid_post",)),
    ("update", BLOCK_UPDATE),
    ("attn", ("attn_out",)),
    ("out", ()),
    ("latents", ()),
  ):
    edit = ensemble_runs(identity(SIZES), at, (0, 1, 2), what=what, sigma=SIGMA)
    assert edit.sites == sites
    mix = {"out": edit.mix_out, "latents": edit.mix_latents}.get(what, edit.mix)
    rows = mix[0] if what in ("out", "latents") else mix[0, 0]
    np.testing.assert_allclose(rows[0], [MIDDLE, MIDDLE, MIDDLE, 0])
    np.testing.assert_array_equal(rows[1:], np.eye(4)[1:])


# Heads, side by side in D


def of_heads(sites=HEAD_SITES):
  return room(*BLOCK_ROOM, "heads", sites=sites)


def head(value, *numbers):
  """The channels of some heads."""
  return rearrange(value, "... (n k) -> ... n k", n=SIZES.N)[..., numbers, :]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_room_for_heads_keeps_every_bit(dtype, at_site, value):
  x = value.astype(dtype)
  x[0, 1, 2, 3], x[1, 0, 0, 0] = np.nan, -0.0
  assert at_site(x, of_heads()).tobytes() == x.tobytes()


def test_an_edit_of_some_heads_leaves_the_bits_of_the_others(at_site, value):
  some = where(SIZES, layers=2, heads=(0, 3))
  direction = np.arange(8, dtype=np.float32)
  for change, wanted in (
    (lambda edit: ablate(edit, some, runs=1), np.zeros_like(value[:, 1])),
    (lambda edit: patch_runs(edit, some, source=3, target=1), value[:, 3]),
    (lambda edit: steer(edit, some, direction, gain=2, runs=1), value[:, 1] + 2 * direction),
  ):
    for edit in (change(of_heads()), change(identity(SIZES, sites=("attn_heads",)))):
      after = at_site(value, edit, layer=2)
      np.testing.assert_array_equal(head(after[:, 1], 0, 3), head(wanted, 0, 3))
      np.testing.assert_array_equal(head(after[:, 1], 1, 2), head(value[:, 1], 1, 2))
      np.testing.assert_array_equal(after[:, [0, 2, 3]], value[:, [0, 2, 3]])
      np.testing.assert_array_equal(at_site(value, edit, layer=3), value)


def test_layers_and_runs_have_heads_of_their_own_cut_with_tokens_and_branches(at_site, value):
  edit = of_heads()
  for layer, run, number in ((1, 0, 2), (1, 1, 0), (4, 0, 1)):
    at = where(SIZES, layers=layer, heads=number, frames=0, branches=1)
    edit = ablate(edit, at, runs=run)
  check_edit(edit, SIZES)
  for layer, own in ((1, {0: 2, 1: 0}), (4, {0: 1}), (5, {})):
    wanted = value.copy()
    for run, number in own.items():
      wanted[1, run, :4, 2 * number : 2 * number + 2] = 0
    np.testing.assert_array_equal(at_site(value, edit, layer=layer), wanted)


def test_all_heads_one_by_one_are_one_compilation(value):
  base, traces = of_heads(), []

  @jax.jit
  @jax.vmap
  def without(number):
    traces.append(0)
    edit = ablate(base, where(SIZES, heads=number))
    return edit_site(value, layer_edits(step_edits(edit, 1), 2), "attn_heads")

  numbers = np.arange(SIZES.N)
  each = [without(numbers), without(numbers[::-1])]
  assert len(traces) == 1
  np.testing.assert_array_equal(each[0], each[1][::-1])
  for number in numbers:
    wanted = value.copy()
    wanted[..., 2 * number : 2 * number + 2] = 0
    np.testing.assert_array_equal(each[0][number], wanted)


def test_the_slope_of_a_neutral_gate_is_that_of_its_heads_alone(value):
  readout = np.random.default_rng(0).standard_normal(value.shape).astype(np.float32)

  def slope(number):
    edit = ablate(of_heads(), where(SIZES, heads=number), gate=1.0)

    def read(gate):
      edits = step_edits(dataclasses.replace(edit, gate=gate), 1)
      return jnp.sum(readout * edit_site(value, layer_edits(edits, 2), "attn_heads"))

    return jax.grad(read)(jnp.asarray(edit.gate))

  found = jax.vmap(slope)(np.arange(SIZES.N))  # N S L R
  wanted = rearrange(readout * value, "g r t (n k) -> n r (g t k)", n=SIZES.N).sum(axis=2)
  np.testing.assert_allclose(found[:, 1, 2], wanted, rtol=1e-4, atol=1e-4)
  assert not np.asarray(found[:, 1, 3]).any()


# Refusals


@pytest.mark.parametrize(
  ("place", "said"),
  [
    ({"layers": 6}, r"layers=6 does not exist: there are 6, 0\.\.5"),
    ({"layers": -1}, r"layers=-1 does not exist"),
    ({"steps": (0, 5)}, r"steps=5 does not exist: there are 5, 0\.\.4"),
    ({"steps": slice(0, 10)}, r"steps=0:10 leaves 0\.\.4"),
    ({"steps": slice(0, 0)}, "selects nothing: for no edit use identity"),
    ({"frames": 3}, "frames=3 does not exist"),
    ({"heads": 4}, r"heads=4 does not exist: there are 4, 0\.\.3"),
    ({"branches": 2}, "branches=2 does not exist"),
    ({"frames": 1.5}, r"frames=1.5, wanted indices 0\.\.2"),
    ({"steps": np.ones(4, bool)}, r"the mask steps is \(4,\), wanted \(5,\)"),
    ({"region": np.ones(11, bool)}, r"region is \(11,\), wanted T = \(12,\)"),
    ({"region": np.ones(12)}, "region is float64, wanted bool"),
    ({"layers": np.zeros(6, bool)}, "the mask layers selects nothing: for no edit use identity"),
    ({"region": np.zeros(12, bool)}, "region selects nothing: for no edit use identity"),
    ({"region": np.zeros((4, 12), bool)}, "region selects nothing"),
  ],
)
def test_places_that_do_not_exist(place, said):
  with pytest.raises(ValueError, match=said):
    where(SIZES, **place)


def test_a_region_may_be_empty_for_some_of_the_runs():
  region = np.zeros((SIZES.R, SIZES.T), bool)
  region[1, 3] = True
  np.testing.assert_array_equal(where(SIZES, region=region).region, region)


EVERYWHERE = where(SIZES)
FRAME = where(SIZES, frames=0)
HEAD = where(SIZES, heads=0)
SAID = [
  (lambda: identity(SIZES, edits=("swap",)), "no edit 'swap' to make room for; there are: mix_lat"),
  (lambda: identity(SIZES, edits=("mix",)), r"room for 'mix' needs a site: sites=\('attn_out',\)"),
  (lambda: room(sites=("resid_mid",)), "no site 'resid_mid' to edit; there are: resid_pre, "),
  (lambda: room(sites=("update",)), "'update' is for taps alone"),
  (lambda: room(sites="attn_out"), r"wanted a tuple: sites=\('attn_out',\)"),
  (lambda: identity(SIZES, out="noise"), "out='noise', wanted 'x0' or 'velocity'"),
  (lambda: swap_runs(identity(SIZES), EVERYWHERE, 0, 1), r"the edit has no site: pass sites="),
  (lambda: swap_runs(room(), EVERYWHERE, 0, 1, sites=("mlp_out",)), "one set of sites"),
  (lambda: swap_runs(room(), EVERYWHERE, 0, 0), "name a run twice"),
  (lambda: swap_runs(room(), EVERYWHERE, 0, 4), r"b=4: the batch has the runs 0\.\.3"),
  (lambda: patch_runs(room(), EVERYWHERE, source=(0, 1), target=(2, 3, 1)), "pair by pair"),
  (lambda: patch_runs(room(), EVERYWHERE, source=0, target=(1, 1)), "one source"),
  (lambda: patch_runs(room(), EVERYWHERE, source=None, target=1), "source=None, wanted a run"),
  (lambda: ablate(room(), EVERYWHERE, runs=9), "runs=9 does not exist"),
  (lambda: ablate(room(), EVERYWHERE, gate=np.ones(4)), r"gate is \(4,\), wanted one number"),
  (lambda: steer(room(), EVERYWHERE, np.ones(7)), r"direction is \(7,\), wanted D = \(8,\)"),
  (
    lambda: steer(steer(room(), EVERYWHERE, np.ones(8)), EVERYWHERE, np.arange(8)),
    "layer 0 already steers along another direction",
  ),
  (
    lambda: ablate(swap_runs(room(), FRAME, 0, 1), where(SIZES, frames=1)),
    "run 0 at step 0 is already edited under another token mask",
  ),
  (lambda: ablate(swap_runs(room(), FRAME, 0, 1), EVERYWHERE), "another token mask"),
  (
    lambda: ablate(swap_runs(room(), where(SIZES, branches=0), 0, 1), EVERYWHERE),
    r"acts on branches \[0\], this one on \[0, 1\]",
  ),
  (
    lambda: identity(SIZES, edits=("heads",)),
    r"room for 'heads' needs a site: sites=\('attn_heads',\)",
  ),
  (
    lambda: room("heads"),
    "heads are named and there are none at attn_out: edit at attn_heads, cro",
  ),
  (lambda: ablate(room(), HEAD), "heads are named and there are none at attn_out: edit at attn_h"),
  (
    lambda: ablate(identity(SIZES), HEAD, sites=("attn_heads", "resid_post", "mlp_out")),
    "there are none at resid_post, mlp_out: edit at attn_heads, .* alone, or leave heads",
  ),
  (
    lambda: ensemble_runs(identity(SIZES), HEAD, (0, 1), what="attn"),
    "heads are named and there are none at attn_out",
  ),
  (
    lambda: ensemble_runs(identity(SIZES), HEAD, (0, 1), what="out"),
    "an ensemble of out has no heads",
  ),
  (lambda: noise_at(room(), HEAD, mode="add"), "noise_at has no heads"),
  (
    lambda: ablate(ablate(of_heads(), HEAD, runs=2), where(SIZES, layers=3, heads=1)),
    "run 2 at step 0, layer 3 is already edited under another head mask; there is one per step, "
    "layer and run: use the same heads, or another run",
  ),
  (lambda: ablate(ablate(of_heads(), HEAD), EVERYWHERE), "under another head mask"),
  (lambda: ablate(ablate(of_heads(), EVERYWHERE), HEAD), "under another head mask"),
  (lambda: noise_at(room(), EVERYWHERE, mode="swap"), "no noise mode 'swap'; there are: replace, "),
  (lambda: noise_at(room(), EVERYWHERE, mode="renoise"), "needs sigma"),
  (lambda: noise_at(room(), EVERYWHERE, mode="replace", gain=0.5), "gain has no meaning"),
  (
    lambda: noise_at(room(), EVERYWHERE, mode="renoise", sigma=SIGMA[:3]),
    r"sigma is \(3,\), wanted \(5,\) or \(6,\)",
  ),
  (lambda: noise_at(room(), where(SIZES, layers=1), mode="add"), "noise_at has no layers"),
  (lambda: ensemble_runs(room(), EVERYWHERE, (0, 1), what="mlp"), "no ensemble of 'mlp'"),
  (lambda: ensemble_runs(room(), EVERYWHERE, (0,)), "an ensemble of 1 runs"),
  (lambda: ensemble_runs(room(), EVERYWHERE, (0, 0), what="attn"), "name a run twice"),
  (lambda: ensemble_runs(room(), EVERYWHERE, (0, 7), what="attn"), r"the batch has the runs 0\.\."),
  (
    lambda: ensemble_runs(room(), EVERYWHERE, (0, 1), what="attn", weights=(0.5, 0.6)),
    "weights sum to .*, wanted 1",
  ),
  (lambda: ensemble_runs(room(), EVERYWHERE, (0, 1), what="attn", weights="max"), "weights='max'"),
  (lambda: ensemble_runs(room(), EVERYWHERE, (0, 1), what="attn", keep="last"), "keep='last'"),
  (lambda: ensemble_runs(room(), EVERYWHERE, (0, 1), what="update"), "one set of sites"),
  (lambda: ensemble_runs(room(), FRAME, (0, 1), what="out"), "an ensemble of out has no frames"),
  (lambda: ensemble_runs(room(), EVERYWHERE, (0, 1), what="latents"), "needs sigma"),
  (
    lambda: ensemble_runs(
      identity(SIZES, edits=("mix_out",)), EVERYWHERE, (0, 1), what="out", out="velocity"
    ),
    "the edit mixes x0, this one velocity",
  ),
  (
    lambda: ensemble_runs(
      noise_at(identity(SIZES), where(SIZES, steps=2), mode="add"),
      EVERYWHERE,
      (0, 1),
      what="latents",
      sigma=SIGMA,
    ),
    "run 0 at step 2 already have a noise edit",
  ),
  (
    lambda: swap_runs(room(), where(dataclasses.replace(SIZES, S=7)), 0, 1),
    r"mix S L R R is \(5, 6, 4, 4\), wanted \(7, 6, 4, 4\)",
  ),
]


@pytest.mark.parametrize(("call", "said"), SAID, ids=range(len(SAID)))
def test_edits_that_cannot_be(call, said):
  with pytest.raises(ValueError, match=said):
    call()


def test_the_same_mask_may_be_edited_twice(at_site, value):
  edit = ablate(swap_runs(room(), FRAME, 0, 1), FRAME, gate=2.0)
  after = at_site(value, edit)
  np.testing.assert_allclose(after[:, 0, :4], 2 * value[:, 1, :4], rtol=1e-6)
  np.testing.assert_array_equal(after[:, :, 4:], value[:, :, 4:])


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"mix": room().mix * 0.5}, "mix at step 0, layer 0: row 0 sums to 0.5, wanted 1"),
    ({"mix": np.eye(4)[None, None]}, r"mix S L R R is \(1, 1, 4, 4\), wanted \(5, 6, 4, 4\)"),
    ({"mix": room().mix * np.nan}, "sums to nan"),
    ({"sites": ()}, "mix has no site to act at"),
    ({"sites": ("resid_mid",)}, "no site 'resid_mid'"),
    ({"direction": None}, "steer and direction come together"),
    ({"tokens": np.ones((4, 12), bool)}, r"tokens S R T is \(4, 12\), wanted \(5, 4, 12\)"),
    ({"heads": np.ones((5, 4, 4), bool)}, r"heads S L R N is \(5, 4, 4\), wanted \(5, 6, 4, 4\)"),
    ({"heads": np.ones((5, 6, 4, 4), bool)}, "heads are named and there are none at attn_out"),
    ({"out": "noise"}, "out='noise'"),
  ],
)
def test_an_edit_made_by_hand_is_checked(change, said):
  check_edit(room(), SIZES)
  with pytest.raises(ValueError, match=said):
    check_edit(dataclasses.replace(room(), **change), SIZES)


def test_noise_is_demanded_where_it_is_injected(latents):
  x, x0, _ = latents
  with pytest.raises(ValueError, match="noise=None"):
    edit_latents(identity(SIZES, edits=("noise",)), 0, x, x0)


def test_runs_on_four_devices_are_mixed_as_on_one(at_site, value):
  """The run axis sharded over the mesh: gathers stay exact, averages agree."""
  mesh = make_mesh(seed=4)
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "seed"))
  sharded = jax.device_put(value, place)
  edit = swap_runs(room(), where(SIZES), 0, 3)
  np.testing.assert_array_equal(at_site(sharded, edit), at_site(value, edit))
  edit = ensemble_runs(room(), where(SIZES), (0, 1, 2), what="attn", keep="all")
  np.testing.assert_allclose(at_site(sharded, edit), at_site(value, edit), atol=1e-6)


def test_each_group_of_an_ensemble_may_have_its_own_weights():
  sizes = Sizes(S=2, R=4, G=1, L=2, F=2, H=2, W=2, C=2, T=8, D=4)
  weights = np.array([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.7, 0.3]]])
  groups = ([0, 2], [1, 3])  # (0, 1) and (2, 3)
  edit = ensemble_runs(identity(sizes), where(sizes), groups, what="out", weights=weights)
  mix = np.asarray(edit.mix_out)
  np.testing.assert_allclose(mix[:, 0, :2], weights[:, 0])
  np.testing.assert_allclose(mix[:, 2, 2:], weights[:, 1])
  np.testing.assert_array_equal(mix[:, [1, 3]], np.broadcast_to(np.eye(4)[[1, 3]], (2, 2, 4)))
  with pytest.raises(ValueError, match=r"weights are \(2, 3, 2\), wanted n = \(2,\), \(2, 2\) or"):
    ensemble_runs(
      identity(sizes), where(sizes), groups, what="out", weights=np.full((2, 3, 2), 0.5)
    )


@pytest.mark.parametrize(
  ("layers", "wanted"), [(40, (20, 30)), (30, (15, 22)), (12, (6, 9)), (2, (1, 2)), (1, (0, 1))]
)
def test_a_part_of_the_depth_is_never_empty(layers, wanted):
  part = depth(layers)
  assert (part.start, part.stop) == wanted
  assert depth(40, 0.75, 1.0) == slice(30, 40)
