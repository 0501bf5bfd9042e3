"""The conversion engine on a toy table, and the tables of the Wan transformer by their names."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jax_videoreason.convert import engine, wan
from jax_videoreason.models.wan import WanConfig, abstract_params

TABLE = (
  (r"first\.weight", "embed/kernel", "o i -> i o"),
  (r"blocks\.(?P<L>\d+)\.(?P<part>[qk])\.weight", r"blocks/\g<part>/kernel", "o i -> i o"),
  (r"patch", "patch/kernel", "o c a b -> (c a b) o"),
)
TARGET = {
  "embed": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)},
  "blocks": {
    "q": {"kernel": jax.ShapeDtypeStruct((3, 4, 5), np.float32)},
    "k": {"kernel": jax.ShapeDtypeStruct((3, 4, 5), ml_dtypes.bfloat16)},
  },
  "patch": {"kernel": jax.ShapeDtypeStruct((8, 3), np.float32)},
}


def sources():
  draw = np.random.default_rng(0).standard_normal
  layers = {f"blocks.{i}.{p}.weight": draw((5, 4)) for i in range(3) for p in "qk"}
  return {"first.weight": draw((3, 2)), **layers, "patch": draw((3, 2, 2, 2))}


def refused(given, **more):
  with pytest.raises(ValueError) as caught:
    engine.fill(given, TABLE, TARGET, **more)
  return str(caught.value)


def test_every_tensor_lands_in_its_place_and_dtype():
  given = sources()
  made = engine.fill(given, TABLE, TARGET)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
    lambda a: (a.shape, np.dtype(a.dtype)), TARGET
  )
  np.testing.assert_array_equal(made["embed"]["kernel"], given["first.weight"].T.astype("f4"))
  for layer in range(3):
    wanted = given[f"blocks.{layer}.k.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(made["blocks"]["k"]["kernel"][layer], wanted)
  np.testing.assert_array_equal(
    made["patch"]["kernel"], given["patch"].reshape(3, 8).T.astype("f4")
  )


def test_the_order_of_the_keys_does_not_matter():
  given = sources()
  turned = dict(reversed(given.items()))
  jax.tree.map(
    np.testing.assert_array_equal,
    engine.fill(given, TABLE, TARGET),
    engine.fill(turned, TABLE, TARGET),
  )


def test_moves_go_leaf_by_leaf_and_layer_by_layer():
  """A writer that streams fills one leaf after the other."""
  found = [(m.target, m.layer) for m in engine.moves(sources(), TABLE, TARGET)]
  assert [target for target, _ in found] == sorted(target for target, _ in found)
  assert [layer for target, layer in found if target == "blocks/q/kernel"] == [0, 1, 2]


def test_every_fault_is_in_one_message():
  given = sources()
  del given["blocks.1.q.weight"], given["first.weight"]
  given["head.bias"] = np.zeros(3)
  given["patch"] = np.zeros((3, 9, 2, 2))
  given["blocks.3.k.weight"] = np.zeros((5, 4))
  said = refused(given)
  assert said.startswith("convert: 5 faults. ")
  assert "head.bias: no row matches." in said
  assert "patch/kernel: (36, 3) given, (8, 3) wanted." in said
  assert "blocks.3.k.weight: layer 3, blocks/k/kernel has 3." in said
  assert "blocks/q/kernel: layers 1 never filled." in said
  assert "embed/kernel: never filled." in said


def test_a_tensor_of_another_rank_is_a_fault():
  assert "first.weight: (6,) given, a tensor 'o i -> i o' wanted." in refused(
    {**sources(), "first.weight": np.zeros(6)}
  )


def test_nothing_is_filled_twice():
  given = {**sources(), "blocks.01.q.weight": np.zeros((5, 4))}
  assert (
    "blocks/q/kernel[1]: filled twice, by blocks.1.q.weight and blocks.01.q.weight."
    in refused(given)
  )


def test_a_key_that_two_rows_match_is_a_fault():
  with pytest.raises(ValueError, match=r"1 fault\. patch: 2 rows match"):
    engine.moves(
      {"patch": np.zeros((3, 2, 2, 2))},
      (TABLE[2], (r"p.*", "patch/kernel", "o c a b -> (c a b) o")),
      {},
    )


def test_a_target_that_does_not_exist_is_a_fault():
  table = (*TABLE, (r"extra", "extra/bias", "o -> o"))
  with pytest.raises(ValueError, match=r"1 fault\. extra: the target extra/bias does not exist"):
    engine.fill({**sources(), "extra": np.zeros(3)}, table, TARGET)


def test_only_keys_on_the_ignore_list_are_left_out():
  given = {**sources(), "rope.freqs": np.zeros(3)}
  assert "rope.freqs: no row matches." in refused(given)
  engine.fill(given, TABLE, TARGET, ignore=(r"rope\..*",))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(2100, 130), (1024, 64), (3, 5)])
def test_a_matrix_that_is_turned_keeps_every_number(shape, dtype):
  """Also where no tile is whole."""
  value = np.random.default_rng(0).standard_normal(shape[::-1], np.float32).T
  made = engine.compact(value, dtype)
  assert made.flags.c_contiguous and made.dtype == dtype
  np.testing.assert_array_equal(made, value.astype(dtype))


def test_leaves_and_nest_are_inverse():
  assert engine.nest(engine.leaves(TARGET)) == TARGET


# The published names of a one-layer image-to-video model with CLIP tokens; D = 48, ffn 64, text 20.
D, FFN, TEXT, CLIP, FREQ = 48, 64, 20, 24, 32
ORIGINAL = {
  "patch_embedding": (D, 36, 1, 2, 2), "text_embedding.0": (D, TEXT), "text_embedding.2": (D, D),
  "time_embedding.0": (D, FREQ), "time_embedding.2": (D, D), "time_projection.1": (6 * D, D),
  "img_emb.proj.0": (CLIP,), "img_emb.proj.1": (CLIP, CLIP), "img_emb.proj.3": (D, CLIP),
  "img_emb.proj.4": (D,), "head.head": (64, D), "blocks.0.norm3": (D,),
  "blocks.0.ffn.0": (FFN, D), "blocks.0.ffn.2": (D, FFN),
  **{f"blocks.0.self_attn.{p}": (D, D) for p in "qkvo"},
  **{f"blocks.0.cross_attn.{p}": (D, D) for p in ("q", "k", "v", "o", "k_img", "v_img")},
}  # fmt: skip
WEIGHT_ONLY = {
  "blocks.0.self_attn.norm_q": (D,), "blocks.0.self_attn.norm_k": (D,),
  "blocks.0.cross_attn.norm_q": (D,), "blocks.0.cross_attn.norm_k": (D,),
  "blocks.0.cross_attn.norm_k_img": (D,),
}  # fmt: skip
CONFIG = WanConfig(
  width=D, ffn_width=FFN, heads=2, layers=1, in_channels=36, text_width=TEXT, freq_dim=FREQ,
  image_input="concat", clip_width=CLIP,
)  # fmt: skip


def published():
  keys = {f"{name}.weight": shape for name, shape in (ORIGINAL | WEIGHT_ONLY).items()}
  keys |= {f"{name}.bias": shape[:1] for name, shape in ORIGINAL.items()}
  keys |= {"head.modulation": (1, 2, D), "blocks.0.modulation": (1, 6, D)}
  return {key: np.full(shape, i, np.float32) for i, (key, shape) in enumerate(keys.items())}


def test_the_published_names_fill_the_transformer():
  given = published()
  found = engine.moves(given, wan.table("original"), abstract_params(CONFIG))
  assert {move.source for move in found} == set(given)
  assert len(wan.table("original")) == len(given)


def test_text_to_video_has_no_place_for_clip_tensors():
  plain = WanConfig(width=D, ffn_width=FFN, heads=2, layers=1, in_channels=36, text_width=TEXT,
                    freq_dim=FREQ, image_input="concat")  # fmt: skip
  with pytest.raises(ValueError, match=r"13 faults.*clip_norm/scale does not exist"):
    engine.moves(published(), wan.table("original"), abstract_params(plain))


def test_another_variant_is_told_by_its_shapes():
  given = published() | {"patch_embedding.weight": np.zeros((D, 16, 1, 2, 2), np.float32)}
  with pytest.raises(ValueError, match=r"patch_embed/kernel: \(64, 48\) given, \(144, 48\) wanted"):
    engine.moves(given, wan.table("original"), abstract_params(CONFIG))


def test_the_patch_kernel_takes_channels_slowest():
  given = published()
  kernel = np.arange(D * 36 * 4, dtype=np.float32).reshape(D, 36, 1, 2, 2)
  given["patch_embedding.weight"] = kernel
  made = engine.fill(given, wan.table("original"), abstract_params(CONFIG))
  assert made["patch_embed"]["kernel"][3 * 4 + 1 * 2 + 0, 7] == kernel[7, 3, 0, 1, 0]


def test_the_two_namings_differ_in_names_alone():
  one, two = wan.table("original"), wan.table("diffusers")
  assert [row[1:] for row in one] == [row[1:] for row in two]
  assert len({row[0] for row in two}) == len(two)


def test_an_unknown_naming_is_refused():
  with pytest.raises(ValueError, match="naming 'hub', wanted 'original' or 'diffusers'"):
    wan.table("hub")
