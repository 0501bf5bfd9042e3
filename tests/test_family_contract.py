"""What every model family promises to sampler, interventions and taps."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from helpers import relative, tiny_config
from jax_videoreason.attention import weights
from jax_videoreason.convert import engine, wan
from jax_videoreason.edits import BlockEdits
from jax_videoreason.models import FAMILIES
from jax_videoreason.models.umt5 import UMT5Config
from jax_videoreason.models.wan import WanConfig
from jax_videoreason.models.wan21_vae import WanVAEConfig
from jax_videoreason.sharding import make_mesh
from jax_videoreason.structs import Conditioning
from jax_videoreason.taps import HEAD_SITES, TAP_SITES, TapSpec

G, R, GRID = 2, 4, (2, 4, 8)  # T = 16
WAN_14B = WanConfig(
  width=5120, ffn_width=13824, heads=40, layers=40, in_channels=36, image_input="concat",
  dtype="bfloat16",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """A small and a full-size member of a family, and the tables of its transformer."""

  small: dict
  full: dict
  tables: tuple


SAMPLES = {
  "wan21": Sample(
    small={
      "dit": tiny_config(clip_width=6),
      "vae": WanVAEConfig(base_width=4, z_channels=4, stages=(1, 2), temporal=(True,),
                          mean=(0.0,) * 4, std=(1.0,) * 4),
      "text": UMT5Config(vocab=16, width=12, head_width=4, heads=2, ffn_width=16, layers=1),
    },
    full={"dit": WAN_14B, "vae": WanVAEConfig(), "text": UMT5Config()},
    tables=(wan.table("original"), wan.table("diffusers")),
  )
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A small transformer with random weights and its inputs; `run` is jitted, `apply` is not."""

  dit: object
  params: dict
  latents: jax.Array
  time: jax.Array
  cond: Conditioning
  run: object

  def apply(self, **more):
    return self.dit.apply({"params": self.params}, self.latents, self.time, self.cond, **more)


def inputs(config, grid, runs, branches):
  draw = np.random.default_rng(1).standard_normal
  latents, known = (jnp.asarray(draw((runs, *grid, config.out_channels)), "f4") for _ in range(2))
  clip = (
    None if config.clip_width is None else jnp.asarray(draw((runs, 3, config.clip_width)), "f4")
  )
  cond = Conditioning(
    text=jnp.asarray(draw((branches, runs, 5, config.text_width)), "f4"),
    known=known,
    known_mask=jnp.zeros((runs, *grid, 4)).at[:, 0].set(1.0),
    clip=clip,
  )
  return latents, jnp.asarray(draw((2, config.freq_dim)), "f4"), cond


@pytest.fixture(scope="session", params=FAMILIES)
def model(request):
  family, sample = FAMILIES[request.param], SAMPLES[request.param]
  parts = family.build({"dit": sample.small["dit"]})
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), jnp.float32), family.abstract(parts)["dit"]
  )
  latents, time, cond = inputs(parts.dit.config, GRID, R, G)

  @jax.jit
  def run(params, latents, time, cond, edits=None, taps=None):
    return parts.dit.apply({"params": params}, latents, time, cond, edits, taps)

  return Model(dit=parts.dit, params=params, latents=latents, time=time, cond=cond, run=run)


@pytest.fixture(scope="session")
def everything(model):
  """Velocity and full states of all sites; layers 1 and 2, both branches."""
  lens = tuple(f"{site}/lens" for site in TAP_SITES if site not in HEAD_SITES)
  heads = tuple(f"{site}/head_norm" for site in HEAD_SITES)
  spec = TapSpec(sites=TAP_SITES, reduce=("full", *lens, *heads), layers=(1, 2), branches=(0, 1))
  return model.run(model.params, model.latents, model.time, model.cond, None, spec)


@pytest.fixture(scope="session")
def plain(model):
  return model.run(model.params, model.latents, model.time, model.cond)[0]


def identity(model, sites):
  layers = model.dit.config.layers
  return BlockEdits(
    mix=jnp.broadcast_to(jnp.eye(R)[None], (layers, R, R)),
    gate=jnp.ones((layers, R)),
    steer=jnp.zeros((layers, R)),
    direction=jnp.ones((layers, model.dit.config.width)),
    tokens=jnp.ones((R, 16), bool),
    branches=jnp.ones(G, bool),
    sites=sites,
  )


def test_every_family_is_sampled_here():
  assert set(SAMPLES) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_built_from_settings_and_hash(name):
  family, small = FAMILIES[name], SAMPLES[name].small
  parts = family.build(small)
  assert parts == family.build({part: dataclasses.asdict(c) for part, c in small.items()})
  assert hash(parts) == hash(family.build(small))
  assert set(family.abstract(parts)) == set(small)
  spec = family.latents(parts)
  assert spec.channels == parts.dit.config.out_channels
  assert (spec.stride, spec.patch) == (parts.vae.config.stride, parts.dit.config.patch)


@pytest.mark.parametrize("name", FAMILIES)
def test_unknown_parts_and_settings_are_refused(name):
  with pytest.raises(ValueError, match=f"family {name} has no part audio; it has: dit"):
    FAMILIES[name].build({"audio": {}})
  with pytest.raises(TypeError, match="depth"):
    FAMILIES[name].build({"dit": {"depth": 3}})


@pytest.mark.parametrize("name", FAMILIES)
def test_full_size_by_shape(name):
  """81 frames at 480p: the velocity has the shape of the latents, a norm per token and layer."""
  family, sample = FAMILIES[name], SAMPLES[name]
  parts = family.build(sample.full)
  grid = family.latents(parts).grid(81, 480, 832)
  config = parts.dit.config
  latents, time, cond = jax.eval_shape(lambda: inputs_of_shape(config, grid))
  edits = BlockEdits(
    gate=jax.ShapeDtypeStruct((config.layers, 1), jnp.float32), sites=("attn_out",)
  )
  taps = TapSpec(sites=("resid_post",))
  velocity, kept = jax.eval_shape(
    lambda p, *a: parts.dit.apply({"params": p}, *a),
    family.abstract(parts)["dit"], latents, time, cond, edits, taps,
  )  # fmt: skip
  assert velocity.shape == (2, 1, *grid, config.out_channels)
  assert family.latents(parts).shape(81, 480, 832) == (*grid, config.out_channels)
  assert kept["resid_post/norm"].shape == (config.layers, 1, 1, 32760)


def inputs_of_shape(config, grid):
  cond = Conditioning(
    text=jnp.zeros((2, 1, 512, config.text_width)),
    known=jnp.zeros((1, *grid, config.out_channels)),
    known_mask=jnp.zeros((1, *grid, 4)),
  )
  return jnp.zeros((1, *grid, config.out_channels)), jnp.zeros((2, config.freq_dim)), cond


def test_nothing_asked_for_is_not_in_the_program(model):
  def program(**more):
    return str(jax.make_jaxpr(lambda: model.apply(**more))())

  untouched = program()
  assert "cond[" not in untouched
  assert program(taps=TapSpec()) == untouched
  assert program(edits=BlockEdits()) == untouched


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_identity_edits_change_no_bit_at_any_site(model, dtype):
  """Against the same program whose conds are all passed by, so that only the edits can differ."""
  dit = type(model.dit)(dataclasses.replace(model.dit.config, dtype=dtype))
  sites = tuple(site for site in TAP_SITES if site != "update")
  edits = identity(model, sites)
  # an edit that is active (its mix is no identity) but writes every run from an equal one
  twins = dataclasses.replace(edits, mix=edits.mix[:, jnp.asarray([1, 0, 2, 3])])
  pair = jnp.asarray([0, 0, 2, 3])
  latents = model.latents[pair]
  cond = jax.tree.map(lambda a: a, model.cond)
  cond = dataclasses.replace(
    cond, text=cond.text[:, pair], known=cond.known[pair], known_mask=cond.known_mask[pair],
    clip=cond.clip[pair],
  )  # fmt: skip

  @jax.jit
  def run(edits):
    return dit.apply({"params": model.params}, latents, model.time, cond, edits)[0]

  np.testing.assert_array_equal(run(edits), run(twins))
  free = jax.jit(lambda: dit.apply({"params": model.params}, latents, model.time, cond)[0])()
  # the compiler fuses differently around the conds
  assert relative(run(edits), free) < (1e-5 if dtype == "float32" else 2e-2)


def test_every_site_gives_the_shape_it_declares(model, everything):
  _, taps = everything
  width, head = model.dit.config.width, 4 * model.dit.config.out_channels
  assert {key: value.shape for key, value in taps.items()} == {
    f"{site}/{name}": (2, G, R, 16, size)
    for site in TAP_SITES
    for name, size in (("full", width), ("lens", head))
    if site not in HEAD_SITES or name == "full"
  } | {
    f"{site}/head_norm": (2, G, R, GRID[0], model.dit.config.heads) for site in HEAD_SITES
  }  # fmt: skip
  assert all(bool(jnp.isfinite(value).all()) and value.any() for value in taps.values())


def test_taps_do_not_move_the_velocity(plain, everything):
  assert relative(everything[0], plain) < 1e-5


def test_the_sites_add_up(everything):
  """resid_post is resid_pre plus the three terms, and the next layer starts from it."""
  tap = {site: everything[1][f"{site}/full"] for site in TAP_SITES}
  terms = tap["attn_out"] + tap["cross_out"] + tap["mlp_out"]
  np.testing.assert_allclose(tap["resid_pre"] + terms, tap["resid_post"], rtol=0, atol=2e-5)
  np.testing.assert_allclose(tap["update"], terms, rtol=0, atol=2e-5)
  np.testing.assert_array_equal(tap["resid_post"][0], tap["resid_pre"][1])


def test_the_lens_at_the_end_is_the_velocity(everything):
  velocity, taps = everything
  f, h, w = GRID[0], GRID[1] // 2, GRID[2] // 2
  lens = rearrange(
    taps["resid_post/lens"][-1],
    "g r (f h w) (p q c) -> g r f (h p) (w q) c",
    f=f,
    h=h,
    w=w,
    p=2,
    q=2,
  )
  np.testing.assert_allclose(lens, velocity, rtol=0, atol=1e-5 * float(jnp.abs(velocity).max()))


def test_an_edit_acts_at_its_site_and_layer(model):
  """A gate of zero on a term is the same as a model whose layer puts nothing out there."""
  layer, last = 1, {"attn_out": ("self_attn", "o"), "mlp_out": ("mlp", "down"),
                    "cross_out": ("cross_attn", "o")}  # fmt: skip
  gate = jnp.ones((model.dit.config.layers, R)).at[layer, 2].set(0.0)
  for site, (part, name) in last.items():
    edits = BlockEdits(gate=gate, sites=(site,))
    edited = model.run(model.params, model.latents, model.time, model.cond, edits)[0]
    muted = jax.tree_util.tree_map_with_path(
      lambda path, leaf, ends=("blocks", part, name): (
        leaf.at[layer].set(0.0) if tuple(p.key for p in path[:3]) == ends else leaf
      ),
      model.params,
    )
    wanted = model.run(muted, model.latents, model.time, model.cond)[0]
    plain = model.run(model.params, model.latents, model.time, model.cond)[0]
    assert relative(edited[:, 2], wanted[:, 2]) < 1e-5
    assert relative(edited[:, 2], plain[:, 2]) > 1e-3
    assert relative(edited[:, :2], plain[:, :2]) < 1e-5


JOINED = {"attn_heads": "self_attn", "cross_heads": "cross_attn"}


def test_the_heads_are_what_the_output_projection_joins(model, everything):
  for site, part in JOINED.items():
    joins = model.params["blocks"][part]["o"]
    kernel, bias = (np.asarray(joins[name][1:], np.float64) for name in ("kernel", "bias"))
    found = np.asarray(everything[1][f"{site}/full"])
    joined = np.einsum("lgrtd,lde->lgrte", found, kernel) + bias[:, None, None, None]
    out = everything[1][site.replace("heads", "out") + "/full"]
    if site == "attn_heads":  # the gate of the modulation is one number for each channel and token
      alone = model.run(
        model.params, model.latents, model.time, model.cond,
        BlockEdits(gate=jnp.zeros((model.dit.config.layers, R)), sites=(site,)),
        TapSpec(sites=("attn_out",), reduce=("full",), layers=(1, 2), branches=(0, 1)),
      )[1]["attn_out/full"]  # fmt: skip
      joined = joined * np.asarray(alone) / bias[:, None, None, None]
    assert relative(out, joined) < 1e-4


def test_the_norms_of_heads_are_those_of_their_columns(model, everything):
  for site in HEAD_SITES:
    by_head = rearrange(everything[1][f"{site}/full"], "l g r (f t) (n k) -> l g r f n (t k)",
                        f=GRID[0], n=model.dit.config.heads)  # fmt: skip
    kept = everything[1][f"{site}/head_norm"]
    np.testing.assert_allclose(kept, np.linalg.norm(by_head, axis=-1), rtol=1e-5)


def attention(model, tap):
  """L' G R N T X of what is kept at attn_q and attn_k."""
  return weights(tap["attn_q/full"], tap["attn_k/full"], model.dit.config.heads)


def test_weights_times_values_are_what_the_heads_find(model, everything):
  tap, heads = everything[1], model.dit.config.heads
  maps = np.asarray(attention(model, tap), np.float64)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
  values = rearrange(tap["attn_v/full"], "l g r x (n k) -> l g r n x k", n=heads)
  found = rearrange(maps @ np.asarray(values, np.float64), "l g r n t k -> l g r t (n k)")
  assert relative(tap["attn_heads/full"], found) < 1e-5
  assert relative(np.ones_like(maps) / maps.shape[-1], maps) > 1e-2  # it attends to something


def test_maps_of_some_queries_and_one_layer_are_those_rows(model, everything):
  tap = everything[1]
  some = weights(tap["attn_q/full"][1, :, :, 3:5], tap["attn_k/full"][1], model.dit.config.heads)
  np.testing.assert_allclose(some, attention(model, tap)[1, ..., 3:5, :], rtol=1e-5)


@pytest.mark.parametrize(
  ("q", "k", "heads"), [((4, 6), (5, 8), 2), ((4, 6), (4, 6), 4)], ids=["widths", "heads"]
)
def test_weights_say_what_does_not_fit(q, k, heads):
  with pytest.raises(ValueError, match=rf"q is .* and k .*, wanted .* multiple of heads={heads}"):
    weights(np.zeros(q), np.zeros(k), heads)


@pytest.mark.parametrize(
  ("q", "k"), [((5, 1, 4, 6), (3, 2, 6)), ((2, 3, 4, 6), (2, 1, 2, 6))], ids=["layers", "runs"]
)
def test_weights_stretch_no_axis(q, k):
  """The queries of one layer with the keys of all would be maps that no layer has."""
  with pytest.raises(ValueError, match=r"q is .* and k .*: take both of the same layers, branches"):
    weights(np.zeros(q), np.zeros(k), 2)


def test_muted_queries_attend_to_all_tokens_alike_and_muted_values_bring_nothing(model):
  c, layer = model.dit.config, 1
  spec = TapSpec(sites=("attn_heads", "attn_v"), reduce=("full",), layers=(layer,))

  def muted(site, tokens):
    edits = BlockEdits(
      gate=jnp.ones((c.layers, R)).at[layer, 2].set(0.0), tokens=jnp.asarray(tokens), sites=(site,)
    )
    tap = model.run(model.params, model.latents, model.time, model.cond, edits, spec)[1]
    return (np.asarray(tap[f"{name}/full"][0, 0], np.float64) for name in ("attn_heads", "attn_v"))

  first = np.broadcast_to(np.arange(16) < 8, (R, 16))
  found, values = muted("attn_q", first)
  alike = np.broadcast_to(values[2].mean(0), (8, c.width))
  assert relative(found[2, :8], alike) < 1e-5
  # the rest attends as before, and so do the other runs
  assert relative(found[2, 8:], alike) > 1e-3 and relative(found[1, :8], values[1].mean(0)) > 1e-3
  found, values = muted("attn_v", first)
  assert not values[2, :8].any() and values[2, 8:].all()
  found, _ = muted("attn_v", np.ones((R, 16), bool))
  assert not found[2].any() and found[1].all()


def test_muted_queries_of_the_prompt_find_the_same_for_every_token(model, everything):
  c, layer = model.dit.config, 1
  edits = BlockEdits(
    gate=jnp.ones((c.layers, R)).at[layer, 2].set(0.0),
    tokens=jnp.broadcast_to(jnp.arange(16) < 8, (R, 16)),
    sites=("cross_q",),
  )
  spec = TapSpec(sites=("cross_heads",), reduce=("full",), layers=(layer,), branches=(0, 1))
  tap = model.run(model.params, model.latents, model.time, model.cond, edits, spec)[1]
  found, plain = tap["cross_heads/full"][0], everything[1]["cross_heads/full"][0]
  alike = np.broadcast_to(found[:, 2, :1], found[:, 2, :8].shape)
  assert relative(found[:, 2, :8], alike) < 1e-6 and relative(plain[:, 2, :8], alike) > 1e-2
  assert relative(found[:, 2, 8:], plain[:, 2, 8:]) < 1e-6
  assert relative(found[:, :2], plain[:, :2]) < 1e-6


def dense(params, x, layer=slice(None)):
  kernel, bias = (np.asarray(params[name], np.float64)[layer] for name in ("kernel", "bias"))
  return x @ kernel + bias


def embedded_text(model):
  """G R X D float64, by hand."""
  parts = model.params["text_embed"]
  h = dense(parts["up"], np.asarray(model.cond.text, np.float64))
  h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  return dense(parts["down"], h)


def test_the_keys_of_the_text_are_its_projections_after_their_norm(model):
  text, parts = embedded_text(model), model.params["blocks"]["cross_attn"]
  found = model.dit.cross_keys(model.params, model.cond.text, (0, 2))
  assert found.shape == (2, G, R, 5, model.dit.config.width)
  for row, layer in enumerate((0, 2)):
    k = dense(parts["k"], text, layer)
    k *= 1 / np.sqrt((k**2).mean(-1, keepdims=True) + model.dit.config.epsilon)
    assert relative(found[row], k * np.asarray(parts["norm_k"]["scale"][layer])) < 1e-5


def test_weights_of_the_text_times_values_are_what_the_heads_find(model):
  """Image tokens, whose attention is another, bring nothing here."""
  c, layers, steps = model.dit.config, (1, 2), 2
  cross = model.params["blocks"]["cross_attn"]
  mute = {"v_clip": jax.tree.map(jnp.zeros_like, cross["v_clip"])}
  blocks = {**model.params["blocks"], "cross_attn": {**cross, **mute}}
  params = {**model.params, "blocks": blocks}
  spec = TapSpec(sites=("cross_q", "cross_heads"), reduce=("full",), layers=layers, branches=(0, 1))
  tap = model.run(params, model.latents, model.time, model.cond, None, spec)[1]
  keys = model.dit.cross_keys(params, model.cond.text, layers)
  queries = np.stack([tap["cross_q/full"]] * steps)  # those of steps have an axis more
  maps = np.asarray(weights(queries, keys, c.heads), np.float64)
  assert maps.shape == (steps, len(layers), G, R, c.heads, 16, 5)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
  q, k = (
    rearrange(np.asarray(a, np.float64), "l g r x (n k) -> l g r n x k", n=c.heads)
    for a in (tap["cross_q/full"], keys)
  )
  scores = np.exp(np.einsum("lgrntk,lgrnxk->lgrntx", q, k) / np.sqrt(c.width / c.heads))
  np.testing.assert_allclose(maps[1], scores / scores.sum(-1, keepdims=True), rtol=1e-4)
  values = np.stack([dense(cross["v"], embedded_text(model), layer) for layer in layers])
  values = rearrange(values, "l g r x (n k) -> l g r n x k", n=c.heads)
  found = rearrange(maps[1] @ values, "l g r n t k -> l g r t (n k)")
  assert relative(tap["cross_heads/full"], found) < 1e-5
  assert relative(np.ones_like(maps) / 5, maps) > 1e-2  # it attends to something


@pytest.mark.parametrize("number", [None, 1], ids=["all heads", "one head"])
@pytest.mark.parametrize("site", JOINED)
def test_ablated_heads_are_a_projection_without_their_rows(model, plain, site, number):
  """Of all heads the bias of the output projection is left."""
  c, layer, run = model.dit.config, 1, 2
  chosen = slice(None) if number is None else number
  own = np.arange(c.width).reshape(c.heads, -1)[chosen].ravel()
  heads = np.zeros((c.layers, R, c.heads), bool)
  heads[layer, run, chosen] = True
  gate = jnp.ones((c.layers, R)).at[layer, run].set(0.0)
  edits = BlockEdits(gate=gate, heads=jnp.asarray(heads), sites=(site,))
  edited = model.run(model.params, model.latents, model.time, model.cond, edits)[0]
  muted = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf.at[layer, own].set(0.0)
      if tuple(p.key for p in path) == ("blocks", JOINED[site], "o", "kernel")
      else leaf
    ),
    model.params,
  )
  wanted = model.run(muted, model.latents, model.time, model.cond)[0]
  assert relative(edited[:, run], wanted[:, run]) < 1e-5
  assert relative(edited[:, run], plain[:, run]) > 1e-3
  assert relative(edited[:, :run], plain[:, :run]) < 1e-5


@pytest.mark.parametrize("site", HEAD_SITES)
def test_one_head_is_patched_from_another_run(model, everything, plain, site):
  c, layer = model.dit.config, 1
  heads = np.zeros((c.layers, R, c.heads), bool)
  heads[layer, 3, 0] = True
  edits = BlockEdits(
    mix=jnp.broadcast_to(jnp.eye(R)[None], (c.layers, R, R)).at[layer, 3].set(jnp.eye(R)[0]),
    heads=jnp.asarray(heads),
    sites=(site,),
  )
  spec = TapSpec(sites=(site,), reduce=("full",), layers=(layer,), branches=(0, 1))
  velocity, kept = model.run(model.params, model.latents, model.time, model.cond, edits, spec)
  wanted = np.array(everything[1][f"{site}/full"][0])
  wanted[:, 3, :, : c.width // c.heads] = wanted[:, 0, :, : c.width // c.heads]
  assert relative(kept[f"{site}/full"][0], wanted) < 1e-5
  assert relative(velocity[:, 3], plain[:, 3]) > 1e-4
  assert relative(velocity[:, :3], plain[:, :3]) < 1e-5


def test_edits_on_the_stream_reach_the_layers_after_them(model, everything):
  """Steering resid_post of a layer is steering resid_pre of the next."""
  layers, width = model.dit.config.layers, model.dit.config.width
  push = jax.random.normal(jax.random.key(3), (width,))

  def steered(site, layer):
    edits = BlockEdits(
      steer=jnp.zeros((layers, R)).at[layer].set(2.0),
      direction=jnp.broadcast_to(push[None], (layers, width)),
      sites=(site,),
    )
    return model.run(model.params, model.latents, model.time, model.cond, edits)[0]

  assert relative(steered("resid_post", 0), steered("resid_pre", 1)) < 1e-5
  assert relative(steered("resid_post", 0), everything[0]) > 1e-2


def test_slots_choose_the_rows(model, everything):
  spec = TapSpec(sites=("mlp_out",), reduce=("full",), layers=(1, 2), branches=(0, 1))
  slots = jnp.asarray([2, 1, 0])
  turned = jax.jit(lambda: model.apply(taps=spec, slots=slots))()[1]["mlp_out/full"]
  np.testing.assert_allclose(
    turned[::-1], everything[1]["mlp_out/full"], rtol=0, atol=1e-5 * float(jnp.abs(turned).max())
  )


def test_the_scan_is_a_loop_over_layers(model):
  """The blocks called one after the other, each with its slice of the parameters."""
  seen = {}

  def note(call, args, kwargs, context):
    if context.module.name == "blocks" and context.method_name == "__call__":
      seen["block"], seen["at"], seen["inner"] = context.module.clone(parent=None), args[2], kwargs
    return call(*args, **kwargs)

  @jax.jit
  def streams(params):
    spec = TapSpec(sites=("resid_pre", "resid_post"), reduce=("full",), branches=(0, 1))
    with nn.intercept_methods(note):
      _, scanned = model.dit.apply(
        {"params": params}, model.latents, model.time, model.cond, taps=spec
      )
    untapped = functools.partial(seen["at"], taps=None)
    x, looped = scanned["resid_pre/full"][0], []
    for layer in range(model.dit.config.layers):
      own = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
      x, _ = seen["block"].apply({"params": own}, x, {}, untapped, **seen["inner"])
      looped.append(x)
    return scanned["resid_post/full"], looped

  scanned, looped = streams(model.params)
  for layer, x in enumerate(looped):
    assert relative(x, scanned[layer]) < 1e-5


def test_permuting_runs_permutes_outputs(model, plain):
  order = jnp.asarray([2, 0, 3, 1])
  cond = dataclasses.replace(
    model.cond, text=model.cond.text[:, order], known=model.cond.known[order],
    known_mask=model.cond.known_mask[order], clip=model.cond.clip[order],
  )  # fmt: skip
  turned = model.run(model.params, model.latents[order], model.time, cond)[0]
  assert relative(turned, plain[:, order]) < 1e-5


def test_branches_do_not_see_each_other(model, plain):
  for branch in range(G):
    cond = dataclasses.replace(model.cond, text=model.cond.text[branch : branch + 1])
    alone = model.run(model.params, model.latents, model.time, cond)[0]
    assert relative(alone[0], plain[branch]) < 1e-5


@pytest.mark.parametrize(
  "shape",
  [
    pytest.param(dict(seed=4), marks=pytest.mark.slow),
    dict(fsdp=2, context=2),
    pytest.param(dict(seed=2, fsdp=2), marks=pytest.mark.slow),
  ],
)
def test_four_devices_equal_one(model, plain, shape):
  with jax.set_mesh(make_mesh(**shape)):
    sharded = model.run(model.params, model.latents, model.time, model.cond)[0]
  assert relative(sharded, plain) < 1e-5


def test_unknown_sites_are_named(model):
  with pytest.raises(
    ValueError, match="no site 'resid_mid' in WanDiT; it has: resid_pre, attn_out"
  ):
    model.apply(edits=BlockEdits(gate=jnp.ones((3, R)), sites=("resid_mid",)))


@pytest.mark.parametrize("name", FAMILIES)
def test_conversion_is_a_bijection(name):
  """Every leaf of the model with all its branches is the target of exactly one row."""
  family, sample = FAMILIES[name], SAMPLES[name]
  leaves = engine.leaves(family.abstract(family.build(sample.small))["dit"])
  for table in sample.tables:
    targets = [target for _, target, _ in table]
    assert sorted(targets) == sorted(leaves)
