"""The Wan transformer: published sizes, inputs, time, precision, errors."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import FREQ, GRID, relative, tiny_bundle, tiny_config, tiny_inputs
from jax_videoreason.models import wan
from jax_videoreason.models.common import NUMERICS, patchify, unpatchify
from jax_videoreason.models.wan import WanConfig, WanDiT, abstract_params
from jax_videoreason.structs import Conditioning
from jax_videoreason.taps import TapSpec

LATENTS = jax.random.normal(jax.random.key(1), (2, *GRID))


def sinusoid(*timesteps):
  angles = np.asarray(timesteps)[:, None] * 1e4 ** (-np.arange(FREQ // 2) / (FREQ // 2))
  return jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], 1), jnp.float32)


TIME = sinusoid(800.0, 0.0)


@pytest.fixture(scope="module")
def run():
  """Velocity of the tiny model: run(latents, time, cond, image_input, **changes of the config)."""
  compiled = {}

  def call(latents, time, cond, image_input="concat", **changes):
    key = (image_input, *sorted(changes.items()))
    if key not in compiled:
      bundle = tiny_bundle(image_input, **changes)
      compiled[key] = jax.jit(bundle.parts.dit.apply), bundle.params[0]
    apply, params = compiled[key]
    return apply({"params": params}, latents, time, cond)[0]

  return call


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("official", 4),  # two of the time embedding, its projection, the head
    ("diffusers", 2),  # those of the time embedding
    ("diffsynth", 0),
  ],
)
def test_what_stays_float32_in_a_bfloat16_model_is_multiplied_in_float32(name, count):
  """By default a GPU rounds such factors to TF32 and a TPU to bfloat16."""
  bundle = tiny_bundle("concat", numerics=name, dtype="bfloat16")
  cond = tiny_inputs(len(LATENTS))[1]
  with jax.default_matmul_precision("default"):
    lowered = jax.jit(bundle.parts.dit.apply).lower(
      {"params": bundle.params[0]}, LATENTS, TIME, cond
    )
  products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
  wide = [line for line in products if re.search(r"\(tensor<[^>]*f32>, tensor<[^>]*f32>\)", line)]
  assert len(wide) == count
  assert all("precision = [HIGHEST, HIGHEST]" in line for line in wide)


# the published checkpoints: their settings and how many parameters they hold
SIZES = {
  "2.1 t2v 1.3B": (dict(width=1536, ffn_width=8960, heads=12, layers=30), 1_418_996_800),
  "t2v 14B": (dict(width=5120, ffn_width=13824, heads=40, layers=40), 14_288_491_584),
  "2.1 i2v 14B": (
    dict(width=5120, ffn_width=13824, heads=40, layers=40, in_channels=36, image_input="concat",
         clip_width=1280), 16_394_878_784),
  "2.2 i2v A14B": (
    dict(width=5120, ffn_width=13824, heads=40, layers=40, in_channels=36, image_input="concat"),
    14_288_901_184),
  "2.2 ti2v 5B": (
    dict(width=3072, ffn_width=14336, heads=24, layers=30, in_channels=48, out_channels=48,
         image_input="overwrite"), 4_999_787_712),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_published_parameter_counts(name):
  config, count = SIZES[name]
  tree = abstract_params(WanConfig(**config))
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


@pytest.mark.slow
def test_a_fresh_model_says_nothing_and_learns():
  """The head starts at zero: no velocity, but a gradient on the head."""
  dit = WanDiT(tiny_config())
  _, cond = tiny_inputs(2)
  params = jax.jit(dit.init)(jax.random.key(0), LATENTS, TIME, cond)["params"]

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def total(head):
    velocity, _ = dit.apply({"params": {**params, "head": head}}, LATENTS, TIME, cond)
    return velocity.sum(), velocity

  grads, velocity = total(params["head"])
  assert not velocity.any()
  assert jnp.abs(grads["kernel"]).max() > 0


@pytest.mark.slow
def test_remat_computes_the_same():
  bundle, (_, cond) = tiny_bundle(), tiny_inputs(2)

  def gradient(remat):
    dit = WanDiT(dataclasses.replace(bundle.parts.dit.config, remat=remat))

    def loss(params):
      spec = TapSpec(sites=("mlp_out",))
      velocity, taps = dit.apply({"params": params}, LATENTS, TIME, cond, taps=spec)
      return jnp.mean(velocity**2) + jnp.mean(taps["mlp_out/norm"])

    return jax.jit(jax.grad(loss))(bundle.params[0])

  for a, b in zip(jax.tree.leaves(gradient(True)), jax.tree.leaves(gradient(False)), strict=True):
    assert relative(a, b) < 1e-5


def test_patches_take_channels_slowest_and_give_them_fastest():
  x = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(1, 2, 4, 4, 3)
  tokens = patchify(x, (1, 2, 2))
  np.testing.assert_array_equal(tokens[0, 1].reshape(3, 2, 2), x[0, 0, :2, 2:].transpose(2, 0, 1))
  back = unpatchify(x.reshape(1, 1, 8, 12), (2, 2, 2), (1, 2, 2))
  np.testing.assert_array_equal(back[0, 0, 0, :2, 2:], x.reshape(8, 12)[1].reshape(2, 2, 3))


def test_every_run_may_have_its_own_time(run):
  _, cond = tiny_inputs(2)
  early, late = sinusoid(900.0, 0.0), sinusoid(100.0, 0.0)
  both = run(LATENTS, jnp.stack([early, late]), cond)
  np.testing.assert_allclose(both[:, 0], run(LATENTS, early, cond)[:, 0], atol=1e-5)
  np.testing.assert_allclose(both[:, 1], run(LATENTS, late, cond)[:, 1], atol=1e-5)
  assert relative(both[:, 1], run(LATENTS, early, cond)[:, 1]) > 1e-2


def test_given_frames_and_mask_reach_the_concatenating_model(run):
  _, cond = tiny_inputs(2)
  plain = run(LATENTS, TIME, cond)
  for change in ({"known": cond.known + 1}, {"known_mask": 1 - cond.known_mask}):
    assert relative(run(LATENTS, TIME, dataclasses.replace(cond, **change)), plain) > 1e-3


def test_the_second_row_of_time_is_for_given_tokens_alone(run):
  _, cond = tiny_inputs(2, "overwrite")
  other = TIME.at[1].set(sinusoid(500.0)[0])
  concat = tiny_inputs(2)[1]
  np.testing.assert_array_equal(run(LATENTS, TIME, concat), run(LATENTS, other, concat))
  plain = run(LATENTS, TIME, cond, "overwrite")
  assert relative(run(LATENTS, other, cond, "overwrite"), plain) > 1e-3
  everywhere = dataclasses.replace(cond, known_mask=jnp.ones_like(cond.known_mask))
  swapped = run(cond.known, TIME[::-1], dataclasses.replace(cond, known=None, known_mask=None),
                "overwrite")  # fmt: skip
  assert relative(run(LATENTS, TIME, everywhere, "overwrite"), swapped) < 1e-5


def test_latents_under_given_frames_do_not_matter(run):
  _, cond = tiny_inputs(2, "overwrite")
  noisier = LATENTS.at[:, 0].add(7.0)
  np.testing.assert_array_equal(
    run(noisier, TIME, cond, "overwrite"), run(LATENTS, TIME, cond, "overwrite")
  )


def test_a_token_is_given_when_all_its_cells_are(run):
  _, cond = tiny_inputs(2, "overwrite")
  dit = WanDiT(tiny_config("overwrite"))
  mask = cond.known_mask.at[0, 0, 0, 0].set(0.0).at[1, 1, 2:, 2:, :3].set(1.0)
  _, given = dit.inputs(LATENTS, dataclasses.replace(cond, known_mask=mask))
  np.testing.assert_array_equal(given[0], [False] + [True] * 3 + [False] * 8)
  np.testing.assert_array_equal(given[1], [True] * 4 + [False] * 8)


def test_padded_text_is_attended_to(run):
  """Zero rows pass through two biased layers and count, as in the published models."""
  _, cond = tiny_inputs(2)
  longer = jnp.pad(cond.text, ((0, 0), (0, 0), (0, 3), (0, 0)))
  assert relative(run(LATENTS, TIME, dataclasses.replace(cond, text=longer)),
                  run(LATENTS, TIME, cond)) > 1e-3  # fmt: skip


def test_in_float32_the_stacks_are_one_function(run):
  _, cond = tiny_inputs(2)
  one, *others = (run(LATENTS, TIME, cond, numerics=name) for name in NUMERICS)
  for other in others:
    assert relative(other, one) < 1e-5


@pytest.mark.slow
def test_in_bfloat16_the_stacks_round_differently(run):
  _, cond = tiny_inputs(2)
  exact = run(LATENTS, TIME, cond)
  errors = {}
  for name in NUMERICS:
    velocity = run(LATENTS, TIME, cond, numerics=name, dtype="bfloat16")
    assert velocity.dtype == jnp.float32
    errors[name] = relative(velocity, exact)
  # 3 layers of bfloat16, whose unit is 4e-3; each rounding less is a smaller error
  assert 1e-4 < errors["official"] < errors["diffsynth"] < 0.1
  assert len(set(errors.values())) == len(errors)


@pytest.mark.parametrize(
  ("name", "kept"),
  [("official", jnp.float32), ("diffusers", jnp.bfloat16), ("diffsynth", jnp.bfloat16)],
)
def test_the_residual_stream_has_the_dtype_of_the_stack(name, kept):
  dit = WanDiT(tiny_config(numerics=name, dtype="bfloat16"))
  _, cond = tiny_inputs(2)
  spec = TapSpec(sites=("resid_post",), reduce=("full",))
  params = abstract_params(dit.config)
  _, taps = jax.eval_shape(
    lambda p, x: dit.apply({"params": p}, x, TIME, cond, taps=spec), params, LATENTS
  )
  assert taps["resid_post/full"].dtype == kept


@pytest.mark.parametrize(
  ("name", "kept"),
  [("official", jnp.float32), ("diffusers", jnp.bfloat16), ("diffsynth", jnp.bfloat16)],
)
def test_queries_and_keys_are_rounded_before_attention_or_from_the_norm_on(name, kept, monkeypatch):
  turned, attended = [], []
  rotate, attend = wan.rope.rotate, wan.attend

  def turn(x, cos, sin):
    turned.append(x.dtype)
    return rotate(x, cos, sin)

  def attending(q, k, v, **more):
    attended.extend(x.dtype for x in (q, k, v))
    return attend(q, k, v, **more)

  monkeypatch.setattr(wan.rope, "rotate", turn)
  monkeypatch.setattr(wan, "attend", attending)
  dit = WanDiT(tiny_config(numerics=name, dtype="bfloat16"))
  _, cond = tiny_inputs(2)
  params = abstract_params(dit.config)
  jax.eval_shape(lambda p, x: dit.apply({"params": p}, x, TIME, cond)[0], params, LATENTS)
  assert len(turned) >= 2 and set(turned) == {jnp.dtype(kept)}
  assert len(attended) >= 6 and set(attended) == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (dict(heads=5), "width=24 does not divide by heads=5"),
    (dict(numerics="torch"), "numerics 'torch', wanted one of official, diffusers, diffsynth"),
    (dict(dtype="float16"), "dtype='float16', wanted 'float32' or 'bfloat16'"),
    (dict(image_input="paste"), "image_input='paste', wanted 'none', 'concat' or 'overwrite'"),
    (dict(in_channels=4), r"image_input='concat', wanted in_channels=12"),
  ],
)
def test_configs_that_cannot_be(change, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(tiny_config(), **change)


@pytest.mark.parametrize(
  ("latents", "change", "said"),
  [
    ((2, 3, 4, 4, 5), {}, r"latents are \(2, 3, 4, 4, 5\), wanted R F H W C with C=4"),
    ((2, 3, 5, 4, 4), {}, r"F H W = \(3, 5, 4\) do not divide into patches of \(1, 2, 2\)"),
    ((3, *GRID), {}, "text has R=2 runs, the latents have 3"),
    ((2, *GRID), {"known": None}, "image_input='concat' needs known and known_mask"),
    (
      (2, *GRID),
      {"known": jnp.zeros((2, 1, 4, 4, 4))},
      r"known is R F H W C = \(2, 1, 4, 4, 4\), wanted \(2, 3, 4, 4, 4\): pad the given",
    ),
  ],
)
def test_inputs_that_do_not_fit(latents, change, said):
  _, cond = tiny_inputs(2)
  dit = WanDiT(tiny_config())
  with pytest.raises(ValueError, match=said):
    jax.eval_shape(
      lambda p, x: dit.apply({"params": p}, x, TIME, dataclasses.replace(cond, **change)),
      abstract_params(dit.config),
      jax.ShapeDtypeStruct(latents, jnp.float32),
    )


def test_a_model_with_an_image_branch_asks_for_clip_tokens():
  dit = WanDiT(tiny_config(clip_width=6))
  _, cond = tiny_inputs(2)
  params = abstract_params(dit.config)
  with pytest.raises(ValueError, match="clip_width=6 needs clip in the conditioning"):
    jax.eval_shape(lambda p: dit.apply({"params": p}, LATENTS, TIME, cond), params)


def test_conditioning_without_an_image_suits_ti2v_but_not_by_halves():
  dit = WanDiT(tiny_config("overwrite"))
  text = tiny_inputs(2)[1].text
  half = Conditioning(text=text, known=jnp.zeros_like(LATENTS))
  assert dit.inputs(LATENTS, Conditioning(text=text))[1] is None
  with pytest.raises(ValueError, match="image_input='overwrite' needs known and known_mask"):
    dit.inputs(LATENTS, half)
