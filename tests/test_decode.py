"""Decoding by the VAE and by the linear preview: batches, rounding, fit, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason import decode as public_decode
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig
from jax_videoreason.sharding import make_mesh
from jax_videoreason.structs import Card, LatentSpec, ModelBundle, Parts
from jax_videoreason.tiling import Tiling

CONFIG = WanVAEConfig(base_width=4, stages=(1, 2), temporal=(True,), blocks=1)  # stride 2 2 2
CHANNELS = CONFIG.z_channels


@pytest.fixture(scope="session")
def bundle():
  """A VAE with random weights and a preview with a random map of small gain."""
  vae = WanVAE(CONFIG)
  shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 3, 4, 4, 3)))["params"]
  rng = np.random.default_rng(0)

  def weights(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    gain = max(1, np.prod(shape.shape[:-1])) ** -0.5
    return np.asarray(rng.normal(0, gain, shape.shape), np.float32)

  params = jax.tree.map(weights, shapes)

  def linear(pixels: int):
    return {
      "kernel": rng.normal(0, 0.01, (27 * CHANNELS, pixels)).astype(np.float32),
      "bias": rng.normal(0, 0.1, pixels).astype(np.float32),
    }

  spec = LatentSpec(channels=CHANNELS, stride=CONFIG.stride)
  return ModelBundle(
    params=(None,),
    vae=params,
    preview={"first": linear(2 * 2 * 3), "rest": linear(2 * 2 * 2 * 3)},
    parts=Parts(dit=None, vae=vae),
    card=Card(name="tiny", family="wan21", latents=spec, text_length=5),
  )


def replace(bundle, **changes):
  fields = {k: getattr(bundle, k) for k in ("params", "vae", "preview", "parts", "card")}
  return ModelBundle(**{**fields, **changes})


def latents(*lead: int, frames: int = 3) -> np.ndarray:
  rng = np.random.default_rng(1)
  return rng.normal(size=(*lead, frames, 2, 3, CHANNELS)).astype(np.float32)


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

  assert decoding._in_batches(seen, x, most, of=of).tolist() == x.tolist()
  assert sizes == wanted


def test_batches_over_a_mesh_are_those_of_one_device(bundle, decoding, monkeypatch):
  z = latents(12)
  whole = decoding.decode(bundle, z)
  monkeypatch.setattr(decoding, "PIXELS", 2 * 5 * 4 * 6)  # two runs of each of 4 devices at once
  spread = decoding.decode(bundle, z, mesh=make_mesh(seed=4))
  assert int(np.abs(spread.astype(int) - whole).max()) <= 1


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
  "last", [2, *(pytest.param(last, marks=pytest.mark.slow) for last in (1, 3, 5, 7))]
)
def test_the_last_frames_alone_are_those_of_the_whole(bundle, decoding, last):
  z = latents(2, 2, frames=4)
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


def test_fit_preview_finds_the_map_that_made_the_frames(bundle, decoding, monkeypatch):
  z = latents(300)
  frames = decoding.preview(bundle, z)
  assert frames.min() > 0 and frames.max() < 255  # nothing clipped, so the map is linear
  found = decoding.fit_preview(z, frames, ridge=1e-8)
  again = decoding.preview(replace(bundle, preview=found), latents(301)[300:])
  true = decoding.preview(bundle, latents(301)[300:])
  assert int(np.abs(again.astype(int) - true).max()) <= 1
  monkeypatch.setattr(decoding, "ROWS", 100 * 3 * 2 * 3)  # batches of 100 clips
  batched = decoding.fit_preview(z, frames, ridge=1e-8)
  for name in ("first", "rest"):
    np.testing.assert_allclose(batched[name]["kernel"], found[name]["kernel"], atol=1e-6)


def test_ridge_shrinks_the_kernel_to_the_mean_colour(bundle, decoding):
  z = latents(20)
  frames = decoding.preview(bundle, z)
  found = decoding.fit_preview(z, frames, ridge=1e8)
  assert float(np.abs(found["rest"]["kernel"]).max()) < 1e-6
  flat = decoding.preview(replace(bundle, preview=found), z[:1])[0]
  wanted = frames[:, 1::2, ::2, ::2].reshape(-1, 3).astype(float).mean(0)
  np.testing.assert_allclose(flat[1, 0, 0], wanted, atol=0.51)


def test_the_preview_looks_one_cell_around(bundle, decoding):
  z = latents(1, frames=4)
  moved = z.copy()
  moved[:, 0, 0, 0] += 5.0
  changed = (decoding.preview(bundle, z) != decoding.preview(bundle, moved))[0].any(-1)
  assert changed[0].any() and changed[1:3].any()
  assert not changed[3:].any()  # latent frames 2 and 3
  assert not changed[:, :, 4:].any()  # latent column 2


def test_one_latent_frame_is_one_pixel_frame(bundle, decoding):
  assert decoding.preview(bundle, latents(2, frames=1)).shape == (2, 1, 4, 6, 3)
  assert decoding.decode(bundle, latents(2, frames=1)).shape == (2, 1, 4, 6, 3)


def test_agreement_counts_equal_answers_and_explained_compares_pixels(bundle, decoding):
  z = latents(60)
  fitted = replace(bundle, preview=decoding.fit_preview(z, decoding.decode(bundle, z)))
  assert decoding.preview_agreement(fitted, z, lambda frames, run: run) == 1.0
  shares = decoding.preview_agreement(fitted, z, lambda frames, run: bytes(frames))
  assert shares == 0.0
  assert decoding.preview_explained(bundle, z) < decoding.preview_explained(fitted, z) < 1.0


def test_what_is_not_loaded_or_does_not_fit_is_refused(bundle, decoding):
  with pytest.raises(ValueError, match=r"latents are \(3, 2, 3\), wanted ... F H W C with C = 16"):
    decoding.decode(bundle, np.zeros((3, 2, 3)))
  with pytest.raises(ValueError, match=r"latents are \(3, 2, 3, 4\), wanted"):
    decoding.preview(bundle, np.zeros((3, 2, 3, 4)))
  with pytest.raises(ValueError, match="latents hold no run"):
    decoding.decode(bundle, latents(0))
  with pytest.raises(ValueError, match="the VAE of tiny is not loaded"):
    decoding.decode(replace(bundle, vae=None), latents(1))
  with pytest.raises(ValueError, match="tiny has no preview: fit one"):
    decoding.preview(replace(bundle, preview=None), latents(1))
  z = latents(2)
  for show in (decoding.decode, decoding.preview):
    with pytest.raises(ValueError, match="last=6 of 5 frames, wanted 1 to 5"):
      show(bundle, z, last=6)
  with pytest.raises(ValueError, match="wanted as many clips as latents"):
    decoding.fit_preview(z, np.zeros((3, 5, 4, 6, 3), np.uint8))
  with pytest.raises(ValueError, match="uint8 N frames height width 3"):
    decoding.fit_preview(z, np.zeros((2, 5, 4, 6, 3)))
  with pytest.raises(ValueError, match=r"ridge=0\.0, wanted more than 0"):
    decoding.fit_preview(z, np.zeros((2, 5, 4, 6, 3), np.uint8), ridge=0.0)


@pytest.fixture(scope="session")
def decoding():
  """The module; the package's own name `decode` is the function."""
  import importlib

  assert callable(public_decode)
  return importlib.import_module("jax_videoreason.decode")
