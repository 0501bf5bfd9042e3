"""Prompts and first frames reach the model as Wan wants them."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import replace, tiny_bundle, tiny_inputs
from jax_videoreason import conditioning, framing
from jax_videoreason.models.clip import CLIPConfig, CLIPTower
from jax_videoreason.models.umt5 import UMT5Config, UMT5Encoder
from jax_videoreason.models.wan import WanConfig, WanDiT
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig
from jax_videoreason.structs import Card, LatentSpec, ModelBundle, Parts
from jax_videoreason.tiling import Tiling
from jax_videoreason.tokenizer import Tokenizer, train_word_tokenizer

PROMPTS = ["move the red ball to the exit", "sort the bars", "sort the bars"]
LENGTH = 9


def dit(image_input: str, clip_width: int | None = None) -> WanDiT:
  channels = 12 if image_input == "concat" else 4
  return WanDiT(
    WanConfig(
      width=24,
      ffn_width=32,
      heads=2,
      layers=1,
      in_channels=channels,
      out_channels=4,
      image_input=image_input,
      clip_width=clip_width,
    )
  )


def random_params(module, *inputs):
  """Weights in every leaf without compiling init."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), jnp.float32), shapes)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> ModelBundle:
  """concat; 2 x 2 x 2 stride, 4 channels; text 9 x 16."""
  file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  file.write_text(train_word_tokenizer(PROMPTS), encoding="utf-8")
  text = UMT5Encoder(
    UMT5Config(vocab=32, width=16, head_width=8, heads=2, ffn_width=32, layers=1, dtype="float32")
  )
  vae = WanVAE(
    WanVAEConfig(
      base_width=4,
      z_channels=4,
      stages=(1, 1),
      blocks=1,
      temporal=(True,),
      mean=(0.1, -0.2, 0.3, 0.0),
      std=(1.0, 2.0, 0.5, 1.5),
    )
  )
  ids = jnp.zeros((1, LENGTH), jnp.int32)
  return ModelBundle(
    params=(None,),
    text=random_params(text, ids, ids == 0),
    vae=random_params(vae, jnp.zeros((1, 1, 4, 4, 3))),
    parts=Parts(dit=dit("concat"), vae=vae, text=text),
    card=Card(
      name="tiny",
      family="wan21",
      latents=LatentSpec(channels=4, stride=vae.config.stride),
      text_length=LENGTH,
      tokenizer=str(file),
    ),
  )


def vae_encode(bundle: ModelBundle, video: np.ndarray) -> jax.Array:
  vae = bundle.parts.vae
  return jax.jit(lambda x: vae.apply({"params": bundle.vae}, x, method="encode"))(video)


def with_dit(bundle: ModelBundle, image_input: str, clip_width: int | None = None) -> ModelBundle:
  parts = dataclasses.replace(bundle.parts, dit=dit(image_input, clip_width))
  return dataclasses.replace(bundle, parts=parts)


@pytest.fixture(scope="session")
def first_frames() -> np.ndarray:
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
  return images[[0, 1, 0]]


@pytest.fixture(scope="session")
def encoded(bundle, first_frames):
  return conditioning.encode(bundle, PROMPTS, first_frames, frames=5)


def test_shapes_and_branches(encoded):
  assert encoded.text.shape == (2, 3, LENGTH, 16)
  assert encoded.known.shape == (3, 3, 4, 6, 4)
  assert encoded.known_mask.shape == (3, 3, 4, 6, 4)
  assert encoded.clip is None


def test_text_is_that_of_the_encoder_and_zero_after_the_last_token(bundle, encoded):
  ids, mask = Tokenizer(bundle.card.tokenizer).encode(PROMPTS, LENGTH)
  states = bundle.parts.text.apply({"params": bundle.text}, ids, mask)
  wanted = np.where(mask[..., None], states, 0.0)
  np.testing.assert_allclose(encoded.text[0], wanted, atol=1e-5)
  assert mask.sum(1).tolist() == [8, 4, 4]
  assert not np.any(encoded.text[0, 1, 4:])


def test_the_negative_prompt_is_one_for_all_runs(bundle, encoded, first_frames):
  negative = np.asarray(encoded.text[1])
  np.testing.assert_array_equal(negative, negative[[0, 0, 0]])
  assert np.any(negative[0, 0]) and not np.any(negative[0, 1:])  # '' is its </s> alone
  other = conditioning.encode(
    bundle, PROMPTS, first_frames, frames=5, negative_prompt="sort the bars"
  )
  np.testing.assert_allclose(other.text[1, 0], other.text[0, 1], atol=1e-6)


def test_unguided_has_one_branch(bundle, encoded, first_frames):
  unguided = conditioning.encode(bundle, PROMPTS, first_frames, frames=5, guided=False)
  assert unguided.text.shape == (1, 3, LENGTH, 16)
  np.testing.assert_allclose(unguided.text[0], encoded.text[0], atol=1e-6)


def test_known_is_the_image_followed_by_mid_grey(bundle, encoded, first_frames):
  video = np.zeros((3, 5, 8, 12, 3), np.float32)
  video[:, 0] = first_frames / 127.5 - 1.0
  wanted = vae_encode(bundle, video)
  np.testing.assert_allclose(encoded.known, wanted, atol=1e-5)
  assert np.abs(encoded.known[0] - encoded.known[1]).max() > 1e-3
  np.testing.assert_array_equal(encoded.known[0], encoded.known[2])


def test_the_mask_gives_all_four_channels_of_latent_frame_zero(encoded):
  mask = np.asarray(encoded.known_mask)
  assert np.all(mask[:, 0] == 1) and not np.any(mask[:, 1:])


def test_overwrite_encodes_the_image_alone_and_pads(bundle, first_frames):
  made = conditioning.encode(with_dit(bundle, "overwrite"), PROMPTS, first_frames, frames=5)
  image = first_frames[:, None] / np.float32(127.5) - 1
  wanted = vae_encode(bundle, image)
  assert made.known.shape == (3, 3, 4, 6, 4)
  np.testing.assert_allclose(made.known[:, :1], wanted, atol=1e-5)
  assert not np.any(made.known[:, 1:])
  np.testing.assert_array_equal(made.known_mask[:, :, 0, 0, 0], [[1, 0, 0]] * 3)


@pytest.mark.parametrize("image_input", ["none", "overwrite"])
def test_text_alone_gives_no_known(bundle, image_input):
  made = conditioning.encode(with_dit(bundle, image_input), PROMPTS, None, frames=5)
  assert made.known is None and made.known_mask is None


@pytest.mark.parametrize("image_input", ["concat", "overwrite"])
def test_a_video_of_another_length_needs_the_vae_alone(bundle, first_frames, image_input):
  made = with_dit(bundle, image_input)
  long, short = (
    conditioning.encode(made, PROMPTS, first_frames, frames=frames) for frames in (9, 5)
  )
  alone = dataclasses.replace(made, text=None)
  found = conditioning.reframed(alone, long, first_frames, frames=5)
  jax.tree.map(np.testing.assert_array_equal, found, short)


def test_batches_do_not_show(bundle, encoded, first_frames, monkeypatch):
  monkeypatch.setattr(conditioning, "PROMPTS", 2)
  monkeypatch.setattr(conditioning, "PIXELS", 5 * 8 * 12 - 1)  # one video at a time, in chunks
  small = conditioning.encode(bundle, PROMPTS, first_frames, frames=5)
  np.testing.assert_allclose(small.text, encoded.text, atol=1e-5)
  np.testing.assert_allclose(small.known, encoded.known, atol=1e-5)


def test_the_model_takes_what_was_made(bundle, encoded):
  made = jax.eval_shape(
    lambda: WanDiT(dataclasses.replace(bundle.parts.dit.config, text_width=16)).init_with_output(
      jax.random.key(0), jnp.zeros((3, 3, 4, 6, 4)), jnp.zeros((2, 256)), encoded
    )[0][0]
  )
  assert made.shape == (2, 3, 3, 4, 6, 4)


def test_last_frames_end_the_video(bundle, first_frames):
  """Mid-grey lies between; of the last latent frame only the last pixel frame is given."""
  last = first_frames[::-1].copy()
  made = conditioning.encode(bundle, PROMPTS, first_frames, frames=5, last_frames=last)
  video = np.zeros((3, 5, 8, 12, 3), np.float32)
  video[:, 0], video[:, -1] = first_frames / 127.5 - 1.0, last / 127.5 - 1.0
  np.testing.assert_allclose(made.known, vae_encode(bundle, video), atol=1e-5)
  assert np.asarray(made.known_mask[0, :, 0, 0]).tolist() == [[1] * 4, [0] * 4, [0, 0, 0, 1]]
  with pytest.raises(ValueError, match="tiny is given its first frame alone"):
    conditioning.encode(
      with_dit(bundle, "overwrite"), PROMPTS, first_frames, frames=5, last_frames=last
    )
  with pytest.raises(ValueError, match="wanted first frames of the same shape"):
    conditioning.encode(bundle, PROMPTS, first_frames, frames=5, last_frames=last[:, :4])


@pytest.mark.slow
def test_given_frames_in_tiles(bundle, first_frames):
  """Each tile is a video of its own; weighed together where they overlap."""
  tiles = Tiling(size=(4, 4), stride=(4, 2), rule="diffsynth")
  made = conditioning.encode(bundle, PROMPTS, first_frames, frames=5, tiles=tiles)
  video = np.zeros((3, 5, 8, 12, 3), np.float32)
  video[:, 0] = first_frames / 127.5 - 1.0
  left, right = (np.asarray(vae_encode(bundle, video[:, :, :, cut]))
                 for cut in (slice(0, 8), slice(4, 12)))  # fmt: skip
  weights = np.array([1, 0.5])[:, None]  # of the two cells that both cover, times their ramps
  middle = (left[..., 2:, :] * weights + right[..., :2, :] * weights[::-1]) / 1.5
  wanted = np.concatenate([left[..., :2, :], middle, right[..., 2:, :]], axis=3)
  np.testing.assert_allclose(made.known, wanted, atol=1e-5)
  whole = conditioning.encode(bundle, PROMPTS, first_frames, frames=5, tiles="diffsynth")
  np.testing.assert_allclose(whole.known, vae_encode(bundle, video), atol=1e-5)


def test_float_frames_are_taken_as_they_are(bundle, encoded, first_frames):
  """The official stack resizes in floats, which may leave -1..1."""
  floats = first_frames.astype(np.float32) / np.float32(127.5) - 1
  made = conditioning.encode(bundle, PROMPTS, floats, frames=5)
  np.testing.assert_allclose(made.known, encoded.known, atol=1e-5)
  beyond = conditioning.encode(bundle, PROMPTS, 1.2 * floats, frames=5)
  assert np.abs(beyond.known - encoded.known).max() > 1e-3


@pytest.fixture(scope="session")
def with_tower(bundle):
  """The same with a DiT that reads image tokens and a tower that makes them, 10 wide."""
  tower = CLIPTower(CLIPConfig(width=10, ffn_width=12, heads=2, layers=1, image=8, patch=4))
  parts = dataclasses.replace(bundle.parts, dit=dit("concat", 10), clip=tower)
  weights = random_params(tower, jnp.zeros((1, 8, 8, 3)))
  return dataclasses.replace(bundle, parts=parts, clip=weights)


@pytest.mark.parametrize("stack", framing.STACKS)
def test_image_tokens_are_those_of_the_first_frames(with_tower, first_frames, stack):
  card = dataclasses.replace(with_tower.card, numerics=stack)
  made = conditioning.encode(
    dataclasses.replace(with_tower, card=card), PROMPTS, first_frames, frames=5
  )
  squares = framing.square(first_frames, 8, stack)
  wanted = with_tower.parts.clip.apply({"params": with_tower.clip}, squares)
  assert made.clip.shape == (3, 5, 10)
  np.testing.assert_allclose(made.clip, wanted, atol=1e-5)
  assert np.abs(made.clip[0] - made.clip[1]).max() > 1e-3


def test_image_tokens_may_come_from_pictures_of_any_size(with_tower, first_frames):
  rng = np.random.default_rng(0)
  large, small = (rng.integers(0, 256, size, np.uint8) for size in ((20, 9, 3), (8, 8, 3)))
  tokens = conditioning.image_tokens(with_tower, [large, small, large])
  np.testing.assert_array_equal(tokens[0], tokens[2])
  np.testing.assert_allclose(
    tokens[1], conditioning.image_tokens(with_tower, [small])[0], atol=1e-5
  )
  made = conditioning.encode(with_tower, PROMPTS, first_frames, frames=5, clip=tokens)
  np.testing.assert_array_equal(made.clip, tokens)


def test_image_tokens_need_a_tower_and_a_model_that_reads_them(with_tower, bundle, first_frames):
  without = dataclasses.replace(with_tower, clip=None)
  with pytest.raises(ValueError, match="the image tower of tiny is not loaded"):
    conditioning.encode(without, PROMPTS, first_frames, frames=5)
  with pytest.raises(ValueError, match=r"clip is \(3, 7, 10\) and tiny reads no image tokens"):
    conditioning.encode(bundle, PROMPTS, first_frames, frames=5, clip=jnp.ones((3, 7, 10)))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"frames": 6}, r"frames=6, wanted 1 \+ 2k: use 5 or 7"),
    ({"prompts": "one"}, "wanted a list with one prompt per run"),
    ({"prompts": []}, "wanted a list with one prompt per run"),
    ({"prompts": ["a"]}, "3 first_frames for 1 prompts"),
    ({"first_frames": np.zeros((3, 8, 10, 3), np.uint8)}, "width=10 pixels, wanted a multiple"),
    ({"first_frames": np.zeros((3, 8, 12, 3))}, r"float64 \(3, 8, 12, 3\), wanted uint8 RGB"),
    ({"first_frames": np.zeros((3, 8, 12, 4), np.uint8)}, r"uint8 \(3, 8, 12, 4\), wanted uint8"),
    ({"first_frames": np.zeros((8, 12, 3), np.uint8)}, r"uint8 \(8, 12, 3\), wanted uint8 RGB"),
    ({"first_frames": None}, "tiny continues a first frame and first_frames is None"),
  ],
)
def test_bad_input_is_refused(bundle, first_frames, change, message):
  call = {"prompts": PROMPTS, "first_frames": first_frames, "frames": 5} | change
  with pytest.raises(ValueError, match=message):
    conditioning.encode(bundle, **call)


def test_a_frame_for_a_model_without_image_input_is_refused(bundle, first_frames):
  with pytest.raises(ValueError, match="tiny takes text alone"):
    conditioning.encode(with_dit(bundle, "none"), PROMPTS, first_frames, frames=5)


@pytest.mark.parametrize(
  ("part", "message"), [("text", "text encoder of tiny is not loaded"), ("vae", "VAE of tiny")]
)
def test_a_part_that_is_not_loaded_is_named(bundle, first_frames, part, message):
  with pytest.raises(ValueError, match=message):
    conditioning.encode(
      dataclasses.replace(bundle, **{part: None}), PROMPTS, first_frames, frames=5
    )


def test_a_foreign_tokenizer_is_refused(bundle, first_frames, tmp_path):
  file = tmp_path / "tokenizer.json"
  file.write_text(train_word_tokenizer([" ".join(f"word{i}" for i in range(40))]))
  card = dataclasses.replace(bundle.card, tokenizer=str(file))
  with pytest.raises(ValueError, match="has 43 ids, the text encoder 32"):
    conditioning.encode(dataclasses.replace(bundle, card=card), PROMPTS, first_frames, frames=5)


def test_pictures_that_are_asked_for_twice_are_found_at_once():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 256, (2, 1, 720, 1280, 3), dtype=np.uint8)
  began = time.monotonic()
  first, place = conditioning._distinct(np.stack([b, a, b, b]))
  assert (first.tolist(), place.tolist()) == ([0, 1], [0, 1, 0, 0])
  assert time.monotonic() - began < 5  # np.unique takes a minute


def test_keys_of_the_prompt_by_layer_branch_and_expert():
  bundle, (_, cond) = tiny_bundle(experts=2), tiny_inputs(3)
  high, low = (
    conditioning.cross_keys(bundle, cond, expert=expert, branches=(0, 1)) for expert in (0, 1)
  )
  assert high.shape == low.shape == (3, 2, 3, 5, 24)  # layer branch run X D
  assert not np.any(np.all(high == low, axis=-1))
  one = replace(bundle, params=bundle.params[1:])
  np.testing.assert_allclose(conditioning.cross_keys(one, cond), low[:, :1], rtol=1e-5, atol=1e-6)
  some = conditioning.cross_keys(bundle, cond, expert=0, layers=slice(1, 3), branches=1)
  np.testing.assert_allclose(some, high[1:, 1:], rtol=1e-5, atol=1e-6)


def test_the_keys_of_an_expert_need_no_other():
  bundle, (_, cond) = tiny_bundle(experts=2), tiny_inputs(1)
  low = replace(bundle, params=(None, bundle.params[1]))
  np.testing.assert_array_equal(
    conditioning.cross_keys(low, cond, expert=1), conditioning.cross_keys(bundle, cond, expert=1)
  )


@pytest.mark.parametrize(
  ("experts", "given", "message"),
  [
    (2, {}, r"tiny has 2 experts, each with keys of its own, and expert=None: give 0 or 1"),
    (2, {"expert": 2}, "expert=2: tiny has 2, counted from 0: give one of them"),
    (2, {"expert": 1.0}, "expert=1.0: tiny has 2, counted from 0: give one of them"),
    (1, {"expert": -1}, "expert=-1: tiny has 1, counted from 0"),
    (1, {"layers": 3}, r"layers=\(3,\): there is no 3, only 0\.\.2"),
    (1, {"branches": 2}, r"branches=\(2,\): there is no 2, only 0\.\.1"),
  ],
)
def test_keys_that_there_are_not(experts, given, message):
  _, cond = tiny_inputs(1)
  with pytest.raises(ValueError, match=message):
    conditioning.cross_keys(tiny_bundle(experts=experts), cond, **given)


@pytest.mark.parametrize(("experts", "part"), [(1, "dit"), (2, "dit_1")])
def test_keys_of_what_is_not_loaded_name_the_part(experts, part):
  bundle, (_, cond) = tiny_bundle(experts=experts), tiny_inputs(1)
  bare = replace(bundle, params=(*bundle.params[:-1], None))
  with pytest.raises(ValueError, match=rf"not loaded: load it, parts=\('{part}',\)"):
    conditioning.cross_keys(bare, cond, expert=experts - 1)


def test_keys_of_text_of_another_model_are_refused(encoded):
  with pytest.raises(ValueError, match=r"cond.text is \(2, 3, 9, 16\), wanted G R X D with D=12"):
    conditioning.cross_keys(tiny_bundle(), encoded)
