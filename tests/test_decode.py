"""Decoding by the VAE and by the preview: batches, rounding, what is looked back on, errors."""

import functools
import re
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jax_videoreason import decode as public_decode
from jax_videoreason import tiling
from jax_videoreason.models import FAMILIES
from jax_videoreason.models.preview import PreviewConfig, PreviewDecoder, of_ending
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig
from jax_videoreason.models.wan22_vae import CONFIG as WAN22
from jax_videoreason.plan import KINDS
from jax_videoreason.sharding import make_mesh
from jax_videoreason.structs import Card, LatentSpec, ModelBundle, Parts
from jax_videoreason.tiling import Tiling
from jax_videoreason.training import TrainSettings, begin, make_step, preview_loss

CONFIG = WanVAEConfig(base_width=4, stages=(1, 2), temporal=(True,), blocks=1)  # stride 2 2 2
CHANNELS = CONFIG.z_channels
ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MINI = WanVAEConfig(base_width=8, stages=(1, 2, 4), temporal=(True, True), blocks=1)


@pytest.fixture(scope="session")
def bundle():
  """A VAE and a preview with random weights."""
  vae = WanVAE(CONFIG)
  shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 3, 4, 4, 3)))["params"]
  rng = np.random.default_rng(0)

  def weights(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    gain = max(1, np.prod(shape.shape[:-1])) ** -0.5
    return np.asarray(rng.normal(0, gain, shape.shape), np.float32)

  params = jax.tree.map(weights, shapes)

  small = PreviewDecoder(
    PreviewConfig(stride=CONFIG.stride, z_channels=CHANNELS, width=8, blocks=1)
  )
  grid = jnp.zeros((1, 2, 1, 1, CHANNELS))
  fresh = jax.tree.map(weights, jax.eval_shape(small.init, jax.random.key(1), grid)["params"])
  spec = LatentSpec(channels=CHANNELS, stride=CONFIG.stride)
  return ModelBundle(
    params=(None,),
    vae=params,
    preview=fresh,
    parts=Parts(dit=None, vae=vae, preview=small),
    card=Card(name="tiny", family="wan21", latents=spec, text_length=5),
  )


def replace(bundle, **changes):
  fields = {k: getattr(bundle, k) for k in ("params", "vae", "preview", "parts", "card")}
  return ModelBundle(**{**fields, **changes})


def latents(*lead: int, frames: int = 3) -> np.ndarray:
  rng = np.random.default_rng(1)
  return rng.normal(size=(*lead, frames, 2, 3, CHANNELS)).astype(np.float32)


@pytest.mark.parametrize(
  ("config", "sizes", "chunk", "last"),
  [
    (MINI, (16, 5, 8, 8), None, None),
    (MINI, (2, 9, 16, 16), 2, None),
    (WanVAEConfig(), (1, 5, 30, 40), 1, None),
    pytest.param(WanVAEConfig(), (1, 21, 30, 40), None, 2, marks=pytest.mark.slow),
    pytest.param(WAN22, (1, 5, 30, 30), 1, None, marks=pytest.mark.slow),
  ],
)
def test_what_decoding_takes_is_what_the_compiler_says_to_within_a_fifth(
  decoding, config, sizes, chunk, last
):
  vae, params = WanVAE(config), FAMILIES["wan21"].parts["vae"].abstract(config)
  z = jax.ShapeDtypeStruct((*sizes, config.z_channels), "float32")
  compiled = decoding._decode.lower(vae, chunk, last, True, params, z).compile()
  found = compiled.memory_analysis().temp_size_in_bytes
  assert vae.decoding_bytes(sizes, chunk, last) == pytest.approx(found, rel=0.2)


def test_tiles_and_chunks_are_counted_as_they_are_decoded(decoding, bundle, monkeypatch):
  parts, spec = bundle.parts, bundle.card.latents
  large = (3, 9, 64, 64)
  chunk, runs = decoding.at_once(spec, large[1:])
  asked = decoding.decoding_bytes(parts, spec, large)
  pixels = 3 * spec.frames(9) * 128 * 128  # as they come out, one byte a colour
  assert (chunk, runs) == (8, 1)
  assert asked == parts.vae.decoding_bytes((1, *large[1:]), 8) + pixels
  tiling = Tiling(size=(32, 32), stride=(16, 16), rule="diffsynth")
  chunk, runs = decoding.at_once(spec, (9, 32, 32))
  assert chunk is None
  tiled = decoding.decoding_bytes(parts, spec, large, tiling)
  assert tiled > parts.vae.decoding_bytes((runs, 9, 32, 32))
  assert tiled < asked


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_a_preview_of_endings_makes_the_last_frames_of_each_latent_frame(frames):
  config = PreviewConfig(stride=(4, 2, 2), z_channels=CHANNELS, width=5, blocks=1)
  rng, whole, z = np.random.default_rng(3), PreviewDecoder(config), latents(2, frames=4)
  shapes = jax.eval_shape(whole.init, jax.random.key(0), z)["params"]
  params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
  ending, narrowed = of_ending(whole, params, frames)
  shown, wanted = (
    rearrange(d.apply({"params": p}, z, None), "r (f t) h w c -> r f t h w c", f=2)
    for d, p in ((ending, narrowed), (whole, params))
  )
  np.testing.assert_allclose(shown, wanted[:, :, -frames:], rtol=1e-4, atol=1e-3)


def test_leading_axes_are_free_and_batches_change_nothing(bundle, decoding, monkeypatch):
  z = latents(2, 3)
  whole = decoding.decode(bundle, z)
  assert whole.dtype == np.uint8
  assert whole.shape == (2, 3, 5, 4, 6, 3)
  monkeypatch.setattr(decoding, "PIXELS", 4 * 5 * 4 * 6)  # at most 4: batches of 3 for 6 runs
  batched = decoding.decode(bundle, z)
  # The convolution of another batch size may round a value on the edge to the other side.
  assert int(np.abs(batched.astype(int) - whole).max()) <= 1
  alone = decoding.decode(bundle, z[1, 2])
  assert alone.shape == (5, 4, 6, 3)
  assert int(np.abs(alone.astype(int) - whole[1, 2]).max()) <= 1


@pytest.mark.parametrize(
  ("rows", "most", "of", "wanted"),
  [
    (32, 7, 1, [4] * 8),  # none is filled up
    (6, 4, 1, [3] * 2),
    (11, 4, 1, [4] * 3),
    (3, 8, 1, [3]),
    (1, 1, 1, [1]),
    (12, 8, 4, [4] * 3),  # over 4 devices
    (8, 8, 4, [8]),
  ],
)
def test_batches_are_equal_and_as_full_as_can_be(decoding, rows, most, of, wanted):
  sizes = []
  x = np.arange(rows)[:, None, None, None, None]

  def seen(part):
    sizes.append(len(part))
    return part

  assert np.stack([*decoding._in_batches(seen, x, most, of=of)]).tolist() == x.tolist()
  assert sizes == wanted


def test_batches_over_a_mesh_are_those_of_one_device(bundle, decoding, monkeypatch):
  z = latents(12)
  whole = decoding.decode(bundle, z)
  monkeypatch.setattr(decoding, "PIXELS", 2 * 5 * 4 * 6)  # two runs of each of 4 devices at once
  spread = decoding.decode(bundle, z, mesh=make_mesh(seed=4))
  assert int(np.abs(spread.astype(int) - whole).max()) <= 1


@pytest.mark.parametrize(("runs", "devices"), [(1, 1), (3, 3), (6, 4)])
def test_no_device_decodes_what_another_one_does(bundle, decoding, monkeypatch, runs, devices):
  used, inner = [], decoding._decode
  monkeypatch.setattr(
    decoding, "_decode", lambda *a: used.append(len(a[-1].sharding.device_set)) or inner(*a)
  )
  z = latents(runs)
  spread = decoding.decode(bundle, z, mesh=make_mesh(seed=2, fsdp=2))
  assert set(used) == {devices}
  assert int(np.abs(spread.astype(int) - decoding.decode(bundle, z)).max()) <= 1


@pytest.mark.parametrize("last", [None, 2])
def test_devices_that_decode_do_not_wait_for_one_another(bundle, decoding, monkeypatch, last):
  """So a sweep may decode on the devices that denoise its next unit."""
  programs, inner = [], decoding._decode

  def compiled(*args):
    programs.append(inner.lower(*args).compile().as_text())
    return inner(*args)

  monkeypatch.setattr(decoding, "_decode", compiled)
  decoding.decode(bundle, latents(4), last=last, mesh=make_mesh(seed=4))
  assert programs
  for text in programs:
    assert "num_partitions=4" in text
    assert not re.findall(rf" ({KINDS})(-start)?\(", text)


def test_frames_are_the_video_to_the_nearest_level(bundle, decoding):
  z = latents(2)
  video = jax.jit(lambda b, z: b.parts.vae.apply({"params": b.vae}, z, method="decode"))(bundle, z)
  exact = 127.5 * (np.asarray(video, np.float64) + 1)
  assert float(np.abs(decoding.decode(bundle, z) - exact).max()) <= 0.5 + 1e-3
  assert exact.std() > 5  # not one colour


@pytest.mark.parametrize("chunk", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_chunks_give_the_same_frames(bundle, decoding, chunk):
  z = latents(2, frames=4)
  whole = decoding.decode(bundle, z).astype(int)
  assert int(np.abs(decoding.decode(bundle, z, chunk=chunk) - whole).max()) <= 1


def test_a_long_video_is_cut_into_chunks_by_itself(bundle, decoding, monkeypatch):
  z = latents(2, frames=4)
  whole = decoding.decode(bundle, z).astype(int)
  calls = []
  original = decoding._decode
  monkeypatch.setattr(decoding, "PIXELS", 2 * 2 * 4 * 6)  # two latent frames of one run
  monkeypatch.setattr(
    decoding,
    "_decode",
    lambda vae, chunk, *rest: calls.append(chunk) or original(vae, chunk, *rest),
  )
  assert int(np.abs(decoding.decode(bundle, z) - whole).max()) <= 1
  assert calls == [2, 2]  # one run at a time, two latent frames at a time


@pytest.mark.parametrize(
  "last", [1, 2, *(pytest.param(last, marks=pytest.mark.slow) for last in (3, 5, 8, 11))]
)
@pytest.mark.parametrize("frames", [3, 6])
def test_the_last_frames_alone_are_those_of_the_whole(bundle, decoding, frames, last):
  z = latents(2, 2, frames=frames)
  last = min(last, bundle.card.latents.frames(frames))
  for show in (decoding.decode, decoding.preview):
    whole = show(bundle, z).astype(int)
    end = show(bundle, z, last=last)
    assert end.shape == (2, 2, last, 4, 6, 3)
    assert int(np.abs(end - whole[:, :, -last:]).max()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_the_last_frames_come_in_tiles_and_over_a_mesh_too(bundle, decoding, spread):
  rng = np.random.default_rng(2)
  z = rng.normal(size=(3, 4, 6, 5, CHANNELS)).astype(np.float32)
  more = {
    "tiles": Tiling(size=(4, 3), stride=(3, 2), rule="diffusers"),
    "mesh": make_mesh(seed=4) if spread else None,
  }
  whole = decoding.decode(bundle, z, **more).astype(int)
  assert int(np.abs(decoding.decode(bundle, z, last=2, **more) - whole[:, -2:]).max()) <= 1


def peak_of(call) -> int:
  tracemalloc.start()
  try:
    call()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("rule", tiling.NAMES)
def test_clips_in_tiles_take_the_memory_of_one_beside_their_frames(
  bundle, decoding, monkeypatch, rule
):
  def enlarged(vae, chunk, last, whole, params, z):
    """In the place of the VAE, whose memory is not the host's."""
    made = np.asarray(z)[..., :3]
    for axis, times in enumerate(CONFIG.stride, 1):
      made = np.repeat(made, times, axis)
    return made[:, 1:]

  monkeypatch.setattr(decoding, "_decode", enlarged)
  monkeypatch.setattr(decoding, "PIXELS", 4 * 9 * 16 * 16)  # four tiles at once
  z = np.random.default_rng(0).normal(size=(24, 5, 22, 20, CHANNELS)).astype(np.float32)
  tiles = Tiling(size=(8, 8), stride=(6, 6), rule=rule)
  show = functools.partial(decoding.decode, bundle, tiles=tiles)
  each = functools.partial(decoding.decode_each, bundle, tiles=tiles)
  together = show(z)
  np.testing.assert_array_equal(together, np.concatenate([show(one[None]) for one in z]))
  np.testing.assert_array_equal(together, list(each(z)))
  frames = together[0].nbytes
  few, many, passed = (
    peak_of(call)
    for call in (lambda: show(z[:12]), lambda: show(z), lambda: [None for _ in each(z)])
  )
  assert many < few + 16 * frames  # those of twelve more, and where their tiles lie
  assert passed < many - 23 * frames
  assert passed < 40 * frames  # batches of tiles, and a clip that is joined


def test_each_video_comes_as_it_does_with_the_others(bundle, decoding, monkeypatch):
  monkeypatch.setattr(decoding, "PIXELS", 4 * 5 * 4 * 6)
  z = latents(2, 3)
  for show, each in (
    (decoding.decode, decoding.decode_each),
    (decoding.preview, decoding.preview_each),
  ):
    np.testing.assert_array_equal(
      show(bundle, z, last=2), np.reshape(list(each(bundle, z, last=2)), (2, 3, 2, 4, 6, 3))
    )


def test_a_preview_of_a_frame_looks_back_on_two_latent_frames_and_on_none_ahead(bundle, decoding):
  z = latents(1, frames=6)  # latent frame n > 0 stands for frames 2 n - 1 and 2 n
  moved = z.copy()
  moved[:, 1] += 5.0
  changed = (decoding.preview(bundle, z) != decoding.preview(bundle, moved))[0].any((1, 2, 3))
  assert changed.tolist() == [False] + [True] * 6 + [False] * 4


def test_half_precision_latents_are_shown_as_float32_ones_are(bundle, decoding):
  z = jnp.asarray(latents(2), jnp.bfloat16)
  wanted = decoding.preview(bundle, z.astype(jnp.float32))
  np.testing.assert_array_equal(decoding.preview(bundle, z), wanted)


def test_one_latent_frame_is_one_pixel_frame(bundle, decoding):
  assert decoding.preview(bundle, latents(2, frames=1)).shape == (2, 1, 4, 6, 3)
  assert decoding.decode(bundle, latents(2, frames=1)).shape == (2, 1, 4, 6, 3)


@pytest.mark.slow
def test_a_preview_that_learnt_from_the_vae_shows_what_it_shows(bundle, decoding):
  z = latents(48)
  video = decoding.decode(bundle, z).astype(np.float32) / 127.5 - 1.0
  settings = TrainSettings(steps=120, batch=48, learning_rate=1e-2, warmup=5, weight_decay=0.0)
  step = make_step(preview_loss(bundle.parts.preview, end=1, weight=2.0), settings, seed=0)
  state = begin(bundle.preview, settings)
  for _ in range(settings.steps):
    state, _ = step(state, {"latents": z, "video": video})
  learnt = replace(bundle, preview=state.params)
  before, after = (decoding.preview_explained(b, z) for b in (bundle, learnt))
  assert before < 0.1 and 0.5 < after < 1.0


def test_what_is_not_loaded_or_does_not_fit_is_refused(bundle, decoding):
  with pytest.raises(ValueError, match=r"latents are \(3, 2, 3\), wanted ... F H W C with C = 16"):
    decoding.decode(bundle, np.zeros((3, 2, 3)))
  with pytest.raises(ValueError, match=r"latents are \(3, 2, 3, 4\), wanted"):
    decoding.preview(bundle, np.zeros((3, 2, 3, 4)))
  with pytest.raises(ValueError, match="latents hold no run"):
    decoding.decode(bundle, latents(0))
  with pytest.raises(ValueError, match="latents hold no run"):
    decoding.decode(bundle, latents(2, 0), tiles="diffusers")
  with pytest.raises(ValueError, match="the VAE of tiny is not loaded") as refused:
    decoding.decode(replace(bundle, vae=None), latents(1))
  assert "(from jax_videoreason.decode import preview)" in str(refused.value)
  with pytest.raises(ValueError, match=r"the preview of tiny is not loaded: load it, parts="):
    decoding.preview(replace(bundle, preview=None), latents(1))
  with pytest.raises(ValueError, match=r"tiny has no preview: use jax_videoreason\.decode\."):
    decoding.preview(replace(bundle, parts=Parts(dit=None, vae=bundle.parts.vae)), latents(1))
  z = latents(2)
  for show in (decoding.decode, decoding.preview):
    with pytest.raises(ValueError, match="last=6 of 5 frames, wanted 1 to 5"):
      show(bundle, z, last=6)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_takes_the_public_function_for_its_module(page):
  assert re.findall(r"\bdecode\.\w+", page.read_text()) == []


@pytest.mark.slow
def test_a_traced_call_is_told_what_has_a_gradient(bundle, decoding):
  z = jnp.asarray(latents(1, frames=2))
  said = (
    r'use (bundle\.parts\.vae\.apply\(.*, method="decode"\)), or (bundle\..*\)), of R F H W C\.'
  )
  for show in (decoding.decode, decoding.preview, decoding.decode_each, decoding.preview_each):
    for traced in (
      lambda z, show=show: jax.grad(lambda z: show(bundle, z).sum())(z),
      lambda z, show=show: jax.jit(lambda z: show(bundle, z))(z),
      lambda z, show=show: jax.jit(lambda b: show(b, z))(bundle),
      lambda z, show=show: jax.jit(lambda: show(bundle, np.asarray(z)))(),
      lambda z, show=show: jax.vmap(lambda z: show(bundle, z))(z),
    ):
      with pytest.raises(ValueError, match=said) as refused:
        traced(z)
  for way, shown in zip(
    re.search(said, str(refused.value)).groups(), (decoding.decode, decoding.preview), strict=True
  ):

    def video(z, way=way):
      return eval(way, {"bundle": bundle, "latents": z})

    exact = 127.5 * (np.clip(video(z), -1, 1) + 1)
    assert float(np.abs(shown(bundle, z) - exact).max()) <= 0.5 + 1e-3
    slope = jax.grad(lambda z, video=video: video(z).sum())(z)
    assert np.isfinite(slope).all() and float(jnp.abs(slope).max()) > 0


@pytest.fixture(scope="session")
def decoding():
  """The module; the package's own name `decode` is the function."""
  import importlib

  assert callable(public_decode)
  return importlib.import_module("jax_videoreason.decode")
