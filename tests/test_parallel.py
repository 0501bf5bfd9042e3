"""Devices change where numbers are computed, not what they are: four forced CPU devices."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import relative, tiny_bundle, tiny_schedule
from jax_videoreason import attention, checkpoint, runs, sampler, sharding
from jax_videoreason.interventions import (
  ablate,
  add,
  ensemble_runs,
  identity,
  patch_runs,
  swap_runs,
  where,
)
from jax_videoreason.pytrees import leaves, nest
from jax_videoreason.structs import Conditioning
from jax_videoreason.taps import HEAD_SITES, TapSpec

ODD = (3, 4, 6, 4)  # F H W C: 18 tokens, which 4 devices cannot share evenly
STEPS = 3
TAPS = TapSpec(sites=("attn_out", "resid_post"), reduce=("norm", "full"), branches=(0, 1))
TOLERANCE = 1e-5  # float32 sums in another order


def inputs(count: int, grid: tuple[int, int, int, int] = ODD):
  """Noise and conditioning of `count` runs."""
  rng = np.random.default_rng(0)
  known = jnp.asarray(rng.normal(size=(count, *grid)), jnp.float32)
  cond = Conditioning(
    text=jnp.asarray(rng.normal(size=(2, count, 5, 12)), jnp.float32),
    known=known,
    known_mask=jnp.zeros((*known.shape[:-1], 4)).at[:, 0].set(1.0),
  )
  return runs.make_noise(range(count), grid), cond


def traced(bundle, noise, cond, edit=None, mesh=None, taps=TAPS, **options):
  """Final latents and the whole trace of one batch."""
  kept = []
  final = runs.run(
    bundle,
    noise,
    cond,
    tiny_schedule(STEPS),
    edit,
    taps,
    mesh=mesh,
    on_piece=lambda trace, steps, part: kept.append(trace),
    **options,
  )
  (trace,) = kept
  return final, trace


def agree(ours, wanted) -> None:
  (final, trace), (final_wanted, trace_wanted) = ours, wanted
  assert relative(final, final_wanted) < TOLERANCE
  assert relative(trace.x0, trace_wanted.x0) < TOLERANCE
  np.testing.assert_array_equal(trace.finite, trace_wanted.finite)
  assert trace.taps.keys() == trace_wanted.taps.keys()
  for name, value in trace.taps.items():
    assert value.shape == trace_wanted.taps[name].shape
    assert relative(value, trace_wanted.taps[name]) < TOLERANCE


def block_edit(sizes):
  """One run patched from another at some tokens, a site ablated: what happens inside the blocks."""
  edit = identity(sizes, edits=("mix", "gate", "tokens"), sites=("attn_out",))
  region = np.arange(sizes.T) % 3 == 0
  edit = patch_runs(edit, where(sizes, layers=1, region=region), source=0, target=1)
  return ablate(edit, where(sizes, layers=2, region=region), runs=1, gate=0.5)


@functools.cache
def bundle_of(image_input: str):
  return tiny_bundle(image_input)


@pytest.fixture(
  scope="module", params=["concat", pytest.param("overwrite", marks=pytest.mark.slow)]
)
def edited(request):
  """(bundle, noise, cond, edit) and what one device makes of them."""
  bundle = bundle_of(request.param)
  noise, cond = inputs(2)
  edit = block_edit(sampler.sizes_of(bundle, noise, cond, tiny_schedule(STEPS)))
  return (bundle, noise, cond, edit), traced(bundle, noise, cond, edit)


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
def test_sharded_tokens_and_runs_equal_one_device_with_edits_and_taps(edited, shape):
  problem, wanted = edited
  agree(traced(*problem, mesh=sharding.make_mesh(*shape)), wanted)


def test_a_mesh_whose_axes_are_not_auto_is_refused():
  mesh, (noise, cond) = jax.make_mesh((2, 1, 1), sharding.MESH_AXES), inputs(2)
  problem = (bundle_of("concat"), noise, cond, tiny_schedule(STEPS))

  def over():
    with runs.over(mesh):
      sampler.denoise(*problem)

  def ambient():
    with jax.set_mesh(mesh):
      sampler.denoise(*problem)

  said = (
    "the axes of the mesh are seed=Explicit, fsdp=Explicit, context=Explicit, wanted Auto ones of "
    "seed, fsdp, context: make it by sharding.make_mesh(seed=2, fsdp=1, context=1)."
  )
  for use in (
    over,
    ambient,
    lambda: runs.run(*problem, mesh=mesh),
    lambda: runs.place(cond, mesh),
    lambda: checkpoint.load("mini", parts=("dit",), mesh=mesh),
  ):
    with pytest.raises(ValueError, match=re.escape(said)):
      use()
  with pytest.raises(ValueError, match=r"are data=Explicit, .* sharding.make_mesh\(seed=4\)\."):
    runs.run(*problem, mesh=jax.make_mesh((4,), ("data",)))


@pytest.mark.parametrize("shape", [(1, 2, 2), pytest.param((2, 2, 1), marks=pytest.mark.slow)])
def test_heads_edited_and_tapped_on_a_mesh_equal_one_device(shape):
  noise, cond = inputs(2)
  bundle = bundle_of("concat")
  sizes = sampler.sizes_of(bundle, noise, cond, tiny_schedule(STEPS))
  edit = identity(sizes, edits=("mix", "gate", "heads"), sites=HEAD_SITES)
  edit = patch_runs(edit, where(sizes, layers=1, heads=1), source=0, target=1)
  edit = ablate(edit, where(sizes, layers=2, heads=0), runs=1, gate=0.5)
  values = np.random.default_rng(0).standard_normal((2, sizes.T, sizes.D))
  edit = add(edit, where(sizes, steps=1, layers=0), values)
  taps = TapSpec(sites=HEAD_SITES, reduce=("head_norm", "full"), branches=(0, 1))
  wanted = traced(bundle, noise, cond, edit, taps=taps)
  agree(traced(bundle, noise, cond, edit, mesh=sharding.make_mesh(*shape), taps=taps), wanted)


def test_the_odd_grid_does_not_divide():
  with jax.set_mesh(sharding.make_mesh(1, 2, 2)):
    assert sharding.token_shards() == 4
  assert sharding.token_shards() == 1
  assert 3 * 2 * 3 % 4 != 0


def test_pmap_equals_the_mesh_also_where_runs_do_not_divide():
  bundle = bundle_of("concat")
  noise, cond = inputs(6)
  wanted = traced(bundle, noise, cond)
  agree(runs.pmap_runs(bundle, noise, cond, tiny_schedule(STEPS), taps=TAPS), wanted)
  agree(traced(bundle, noise, cond, mesh=sharding.make_mesh(seed=4)), wanted)


def test_pmap_compiles_once_for_all_calls_of_one_shape(caplog):
  noise, cond = inputs(6)
  runs.pmap_runs(bundle_of("concat"), noise, cond, tiny_schedule(STEPS), taps=TAPS)
  with jax.log_compiles():
    runs.pmap_runs(bundle_of("concat"), noise, cond, tiny_schedule(STEPS, shift=3.0), taps=TAPS)
  assert not [r for r in caplog.records if r.getMessage().startswith("Compiling")]


def test_pmap_refuses_taps_of_single_runs_and_taps_without_their_name():
  noise, cond = inputs(2)
  taps = TapSpec(sites=("attn_out",), reduce=("region_mean",), regions=np.ones((2, 1, 18)))
  with pytest.raises(ValueError, match="taps with an R axis are not dealt out by pmap_runs"):
    runs.pmap_runs(bundle_of("concat"), noise, cond, tiny_schedule(STEPS), taps=taps)
  with pytest.raises(TypeError, match="positional"):  # where `run` and `denoise` have an edit
    runs.pmap_runs(*(bundle_of("concat"), noise, cond, tiny_schedule(STEPS), taps))


# Collectives


def collectives(bundle, count: int, mesh, edit=None, grid=ODD) -> list[str]:
  """The lines of the compiled program that talk to another device."""
  noise, cond = inputs(count, grid)
  noise, cond = runs.place(noise, mesh), runs.place(cond, mesh)
  edit = jax.device_put(edit, jax.NamedSharding(mesh, jax.P()))
  schedule = tiny_schedule(STEPS)

  def denoise(bundle, noise, cond, edit):
    return sampler.denoise(bundle, noise, cond, schedule, edit, TapSpec())

  with jax.set_mesh(mesh):
    text = jax.jit(denoise).lower(bundle, noise, cond, edit).compile().as_text()
  kinds = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\("
  return [line for line in text.splitlines() if re.search(kinds, line)]


def ordered(dims: str, transposed: str | None) -> np.ndarray:
  """The devices in order, as an array of "2,2", its axes then permuted as "1,0" says."""
  sizes, axes = ([int(n) for n in said.split(",")] if said else None for said in (dims, transposed))
  devices = np.arange(np.prod(sizes)).reshape(sizes)
  return devices if axes is None else devices.transpose(axes)


def groups(line: str) -> set[frozenset[int]]:
  """The groups of devices that a collective joins."""
  found = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line)
  if found:
    return {frozenset(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", found[1])}
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
  if iota:
    shape = [int(n) for n in iota[1].split(",")]
    return {frozenset(row.tolist()) for row in ordered(iota[2], iota[3]).reshape(shape)}
  order = r", device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)"
  named = re.search(rf"replica_groups=mesh\[(.*?)\](?:{order})? \{{(.*?)\}}", line)
  if named:
    axes = {n: int(size) for n, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    joined = re.findall(r"'(\w+)'", named[4])
    sizes = list(axes.values())
    grid = ordered(named[2] or f"{np.prod(sizes)}", named[3]).reshape(sizes)
    grid = np.moveaxis(grid, [list(axes).index(n) for n in joined], range(-len(joined), 0))
    size = int(np.prod([axes[n] for n in joined]))
    return {frozenset(row.tolist()) for row in grid.reshape(-1, size)}
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
  assert pairs, line
  return {frozenset(map(int, p.split(","))) for p in re.findall(r"\{(\d+,\d+)", pairs[1] + "}")}


def sizes_for(count: int, grid=ODD):
  noise, cond = inputs(count, grid)
  return sampler.sizes_of(bundle_of("concat"), noise, cond, tiny_schedule(STEPS))


def test_without_a_mix_field_no_device_talks_to_another():
  mesh = sharding.make_mesh(seed=4)
  assert collectives(bundle_of("concat"), 4, mesh) == []
  sizes = sizes_for(4)
  gate = identity(sizes, edits=("gate", "noise"), sites=("attn_out",))
  assert collectives(bundle_of("concat"), 4, mesh, gate) == []
  heads = ablate(identity(sizes), where(sizes, heads=0), sites=HEAD_SITES)
  assert collectives(bundle_of("concat"), 4, mesh, heads) == []


def test_a_kernel_for_whole_runs_makes_no_device_talk_to_another(monkeypatch):
  """cuDNN takes guidance branches and runs as one axis, which no sharding of runs can say."""

  plain = jax.nn.dot_product_attention

  def kernel(q, k, v, *, implementation, **more):
    assert implementation == "cudnn"
    return plain(q, k, v, implementation="xla", **more)

  monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
  mesh = sharding.make_mesh(seed=2)
  by_run = jax.NamedSharding(mesh, jax.P(None, "seed"))
  a = jax.ShapeDtypeStruct((2, 4, 8, 2, 16), jnp.bfloat16, sharding=by_run)
  call = functools.partial(attention.attend, spread="qkv")
  with jax.set_mesh(mesh), attention.compiling_for("gpu"):
    text = jax.jit(call, out_shardings=by_run).lower(a, a, a).compile().as_text()
  assert "all-gather" not in text


def mixes(sizes) -> dict:
  """Every kind of mix: of latents, inside the blocks, of the guess, of the velocity."""
  sigma = np.asarray(tiny_schedule(STEPS).sigma)
  early, late = where(sizes, steps=slice(0, 1)), where(sizes, steps=slice(1, 3))
  region = where(sizes, layers=1, region=np.arange(sizes.T) % 3 == 0)
  velocity = identity(sizes, out="velocity")
  return {
    "latents": ensemble_runs(identity(sizes), early, (0, 1), what="latents", sigma=sigma),
    "averaged updates": ensemble_runs(identity(sizes), where(sizes), (0, 1), what="update"),
    "swapped tokens": swap_runs(identity(sizes), region, 0, 1, sites=("attn_out",)),
    "x0": ensemble_runs(identity(sizes), late, (0, 1), what="out", keep="all"),
    "velocity": ensemble_runs(velocity, late, (0, 1), what="out"),
  }


QUICK = (("latents", 2), ("velocity", 2), ("swapped tokens", 2), ("swapped tokens", 1))
KINDS = ("latents", "averaged updates", "swapped tokens", "x0", "velocity")
NINE = (3, 2, 6, 4)  # F H W C: 9 tokens, which two devices cannot share evenly


def lying_on(mesh, bundle):
  """The bundle with its weights over `fsdp`, as they are restored; also small leaves."""

  def stored(path, leaf):
    return jax.device_put(leaf, jax.NamedSharding(mesh, sharding.partition(path, leaf.shape, mesh)))

  def placed(tree):
    return nest({path: stored(path, leaf) for path, leaf in leaves(tree).items()})

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "SMALL", 100)
    return dataclasses.replace(bundle, params=tuple(map(placed, bundle.params)))


@functools.cache
def spoken(kind: str | None, shape: tuple[int, int, int]) -> Counter:
  """How often which devices talk in the program with a kind of mix: group -> count."""
  edit = None if kind is None else mixes(sizes_for(2, NINE))[kind]
  mesh = sharding.make_mesh(*shape)
  lines = collectives(lying_on(mesh, bundle_of("concat")), 2, mesh, edit, NINE)
  return Counter(group for line in lines for group in groups(line))


@pytest.mark.parametrize(
  ("kind", "shape"),
  [
    pytest.param(k, shape, marks=[] if (k, shape[2]) in QUICK else pytest.mark.slow)
    for shape in ((2, 1, 2), (2, 2, 1))
    for k in KINDS
  ],
)
def test_a_mix_adds_collectives_over_the_seed_axis_alone(kind, shape):
  over_seed = {frozenset({0, 2}), frozenset({1, 3})}  # of a mesh of 2 x 2, seed first
  plain, mixed = spoken(None, shape), spoken(kind, shape)
  assert plain.keys() == {frozenset({0, 1}), frozenset({2, 3})}  # tokens, and weights on fsdp
  assert (mixed - plain).keys() == over_seed
  assert not plain - mixed


def test_mixes_of_runs_on_several_devices_equal_one_device():
  noise, cond = inputs(2, NINE)
  sizes = sizes_for(2, NINE)
  region = where(sizes, layers=1, region=np.arange(sizes.T) % 3 == 0)
  edit = swap_runs(mixes(sizes)["latents"], region, 0, 1, sites=("attn_out",))
  edit = ensemble_runs(edit, where(sizes, steps=slice(1, 3)), (0, 1), what="out", keep="all")
  problem = (bundle_of("concat"), noise, cond, edit)
  agree(traced(*problem, mesh=sharding.make_mesh(2, 1, 2)), traced(*problem))


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_all_pieces_on_a_mesh_are_one_program(solver, caplog):
  mesh, grid = sharding.make_mesh(seed=2, fsdp=2), (2, 2, 6, 4)  # of no other test
  with jax.log_compiles():
    schedule = tiny_schedule(10, solver=solver)
    runs.run(tiny_bundle("concat"), *inputs(2, grid), schedule, piece=5, mesh=mesh)
  compiled = [r for r in caplog.records if re.match(r"Compiling .*_trajectory", r.getMessage())]
  assert len(compiled) == 1


@pytest.mark.parametrize("seats", [1, 2])
def test_runs_go_on_from_the_states_that_were_handed_out(seats):
  noise, cond = inputs(3, NINE)
  mesh, schedule = sharding.make_mesh(seed=seats), tiny_schedule(4, solver="unipc")
  call = functools.partial(runs.run, bundle_of("concat"), noise, cond, batch=2, mesh=mesh)
  kept = []
  half = call(schedule[:2], piece=1, on_state=lambda state, part: kept.append((state, part)))
  assert [part for _, part in kept] == [slice(0, 2), slice(2, 3)]
  state = jax.tree.map(lambda *parts: np.concatenate(parts), *(state for state, _ in kept))
  np.testing.assert_array_equal(state.latents, half)
  assert state.solver["age"].tolist() == state.step.tolist() == [2] * 3
  assert relative(call(schedule[2:], state=state), call(schedule)) < TOLERANCE


def test_a_mix_of_runs_that_do_not_divide_is_refused():
  noise, cond = inputs(3)
  edit = mixes(sizes_for(3))["x0"]
  with (
    jax.set_mesh(sharding.make_mesh(seed=2)),
    pytest.raises(ValueError, match="a mix of 3 runs on a mesh with seed=2: give a multiple"),
  ):
    jax.eval_shape(
      lambda noise, cond: sampler.denoise(
        bundle_of("concat"), noise, cond, tiny_schedule(STEPS), edit
      ),
      noise,
      cond,
    )


# One guidance branch after the other


def test_sequential_guidance_equals_parallel_guidance():
  bundle = bundle_of("concat")
  noise, cond = inputs(2)
  sizes = sampler.sizes_of(bundle, noise, cond, tiny_schedule(STEPS))
  edit = ablate(
    identity(sizes), where(sizes, layers=1, branches=0), runs=1, gate=0.5, sites=("mlp_out",)
  )
  wanted = traced(bundle, noise, cond, edit)
  agree(traced(bundle, noise, cond, edit, guidance="sequential"), wanted)


@pytest.mark.parametrize("guidance", ["parallel", "sequential"])
def test_taps_of_a_branch_that_is_not_there_are_refused(guidance):
  noise, cond = inputs(1)
  taps = TapSpec(sites=("attn_out",), reduce=("norm",), branches=(0, 1))
  alone = dataclasses.replace(cond, text=cond.text[:1])
  schedule = tiny_schedule(STEPS, guidance=1.0)
  with pytest.raises(ValueError, match=r"branches=\(0, 1\): there is no 1, only 0..0"):
    sampler.denoise(bundle_of("concat"), noise, alone, schedule, taps=taps, guidance=guidance)


@pytest.mark.slow
def test_sequential_guidance_needs_less_memory():
  bundle, (noise, cond) = bundle_of("concat"), inputs(4)
  schedule = tiny_schedule(STEPS)

  def temporary(guidance):
    def denoise(bundle, noise, cond):
      return sampler.denoise(bundle, noise, cond, schedule, guidance=guidance)

    compiled = jax.jit(denoise).lower(bundle, noise, cond).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary("sequential") < 0.75 * temporary("parallel")


def test_an_unknown_guidance_is_refused():
  bundle, (noise, cond) = bundle_of("concat"), inputs(1)
  with pytest.raises(ValueError, match="guidance='half', wanted 'parallel' or 'sequential'"):
    sampler.denoise(bundle, noise, cond, tiny_schedule(STEPS), guidance="half")  # type: ignore


# Attention


def draw(t, x, width=128, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((1, 2, t, 2, width), (1, 2, x, 2, width), (1, 2, x, 2, width))
  return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
  ("t", "x", "keys"),
  [
    pytest.param(100, 70, None, marks=pytest.mark.slow),
    (130, 257, 200),
    pytest.param(128, 128, None, marks=pytest.mark.slow),
  ],
)
def test_splash_equals_plain_attention_whatever_the_counts(t, x, keys):
  q, k, v = draw(t, x)
  ours = attention.attend(q, k, v, implementation="splash", keys=keys)
  wanted = attention.attend(q, k[:, :, :keys], v[:, :, :keys], implementation="xla")
  np.testing.assert_allclose(ours, wanted, atol=2e-5)  # other tiles, other sums


@pytest.mark.parametrize(
  "limit", [pytest.param(attention.BLOCK_BYTES, marks=pytest.mark.slow), 10_000]
)
def test_keys_that_do_not_count_change_nothing(limit, monkeypatch):
  monkeypatch.setattr(attention, "BLOCK_BYTES", limit)
  q, k, v = draw(37, 23, width=8)
  wanted = attention.attend(q, k[:, :, :19], v[:, :, :19])
  np.testing.assert_allclose(attention.attend(q, k, v, keys=19), wanted, atol=2e-6)


# Keys and values that go round a ring


def sharded(route, keys, implementation=None, shape=(1, 2, 2)):
  """attend over tokens on a mesh; a function of q, k, v on it, and the mesh."""
  mesh = sharding.make_mesh(*shape)

  def attended(q, k, v):
    with attention.by_route(route):
      return attention.attend(q, k, v, keys=keys, spread="qkv", implementation=implementation)

  return attended, mesh


def on_mesh(attended, mesh, *arrays):
  with jax.set_mesh(mesh):
    return jax.jit(attended)(*arrays)


# 20 tokens on 4 devices, of which the last holds some, or no key that counts
@pytest.mark.parametrize(
  ("keys", "limit"),
  [
    pytest.param(None, attention.BLOCK_BYTES, marks=pytest.mark.slow),
    pytest.param(18, 400, marks=pytest.mark.slow),
    (13, 400),
  ],
)
def test_a_ring_equals_one_device(keys, limit, monkeypatch):
  monkeypatch.setattr(attention, "BLOCK_BYTES", limit)
  q, k, v = draw(20, 20, width=8)
  wanted = attention.attend(q, k[:, :, :keys], v[:, :, :keys])
  ours = on_mesh(*sharded("ring", keys), q, k, v)
  np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_a_ring_of_runs_and_tokens_equals_one_device_with_large_scores():
  q, k, v = draw(20, 20, width=8)
  wanted = attention.attend(q * 30, k[:, :, :15], v[:, :, :15])
  ours = on_mesh(*sharded("ring", 15, shape=(2, 1, 2)), q * 30, k, v)
  np.testing.assert_allclose(ours, wanted, atol=3e-5)  # scores near 100 are known to 1e-5


@pytest.mark.slow
def test_gradients_go_round_the_ring():
  q, k, v = draw(20, 20, width=8)

  def gradient(attended):
    return jax.grad(lambda *qkv: jnp.sum(jnp.sin(attended(*qkv))), argnums=(0, 1, 2))

  plain = gradient(functools.partial(attention.attend, keys=18))(q, k, v)
  attended, mesh = sharded("ring", 18)
  for ours, wanted in zip(on_mesh(gradient(attended), mesh, q, k, v), plain, strict=True):
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_a_ring_of_splash_equals_one_device():
  q, k, v = draw(260, 260)
  wanted = attention.attend(q, k[:, :, :190], v[:, :, :190])  # the third device: some; last: none
  ours = on_mesh(*sharded("ring", 190, "splash"), q, k, v)
  np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_a_ring_never_holds_all_keys():
  shape = jax.ShapeDtypeStruct((2, 1, 8192, 2, 8), jnp.float32)

  def compiled(route):
    attended, mesh = sharded(route, 8190)
    place = jax.NamedSharding(mesh, jax.P(None, "seed", ("fsdp", "context")))
    own = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
    with jax.set_mesh(mesh):
      return jax.jit(attended).lower(own, own, own).compile()

  ring, gather = compiled("ring"), compiled("gather")
  assert "collective-permute" in ring.as_text()
  assert "all-gather" not in ring.as_text()
  assert "all-gather" in gather.as_text()
  assert "collective-permute" not in gather.as_text()


def test_the_route_is_chosen_by_the_bytes_on_a_device():
  wan = (2, 1, 32760, 40, 128)  # of the 14B model at 480p, both branches
  long = (2, 1, 75600 * 2, 40, 128)
  for platform in ("cpu", "tpu"):
    assert attention.choose_route(platform, wan, 2) == "gather"
    assert attention.choose_route(platform, long, 2) == "ring"
  assert attention.choose_route("gpu", long, 2) == "gather"


def test_a_route_that_can_not_be_is_refused():
  with pytest.raises(ValueError, match="route='tree', wanted 'gather' or 'ring'"):
    attention.by_route("tree")
  attended, mesh = sharded("ring", None, "cudnn")
  with pytest.raises(ValueError, match="route='ring' with cuDNN"):
    on_mesh(attended, mesh, *draw(20, 20, width=8))


def test_a_ring_equals_one_device_with_edits_and_taps(edited):
  problem, wanted = edited
  agree(traced(*problem, mesh=sharding.make_mesh(1, 2, 2), route="ring"), wanted)


def test_attention_is_chosen_by_device():
  half, full = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
  large, small = (2, 1, 32760, 40, 128), (2, 1, 80, 4, 128)
  assert attention.choose("cpu", half, large, 32760) == "xla"
  assert attention.choose("gpu", half, large, 32760) == "cudnn"
  assert attention.choose("tpu", half, large, 32760) == "splash"
  for platform in ("gpu", "tpu"):
    assert attention.choose(platform, full, small, 80) == "xla"
    with pytest.raises(ValueError, match=f"the limit on {platform} is 8.6 GB"):
      attention.choose(platform, full, large, 32760)
  with pytest.raises(ValueError, match=r"a multiple of 128 \(here of 96\)"):
    attention.choose("tpu", half, (*large[:-1], 96), 32760)
  for width, chosen in ((24, "cudnn"), (96, "cudnn"), (20, "xla"), (160, "xla")):
    assert attention.choose("gpu", half, (*small[:-1], width), 80) == chosen
  with pytest.raises(ValueError, match=r"a multiple of 8, up to 128 \(here of 160\)"):
    attention.choose("gpu", half, (*large[:-1], 160), 32760)
  with pytest.raises(ValueError, match="wanted one of 'xla', 'cudnn', 'splash'"):
    attention.attend(*draw(4, 4), implementation="flash")  # type: ignore
