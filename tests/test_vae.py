"""The Wan2.1 VAE: shapes, causality, chunks, normalisation, errors, names of the tensors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat

from jax_videoreason.convert import vae as vae_table
from jax_videoreason.convert.engine import leaves
from jax_videoreason.models import wan22_vae
from jax_videoreason.models.vae_blocks import (
  CausalConv,
  DoubledConv,
  average_down,
  fold,
  repeat_up,
  unfold,
)
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig

TINY = WanVAEConfig(base_width=4, stages=(1, 2, 4), temporal=(True, True), blocks=1)
RESIDUAL = WanVAEConfig(
  base_width=4, decoder_width=8, stages=(1, 2, 2), temporal=(True, False), blocks=1, fold=2,
  residual=True,
)  # fmt: skip


def random_params(config: WanVAEConfig):
  """Weights in every leaf, so that biases and scales count."""
  frames = 1 + config.stride[0]
  video = jax.ShapeDtypeStruct((1, frames, *config.stride[1:], 3), jnp.float32)
  shapes = jax.eval_shape(WanVAE(config).init, jax.random.key(0), video)["params"]
  rng = np.random.default_rng(0)

  def leaf(path, shape):
    if path[-1].key == "scale":
      value = rng.uniform(0.5, 1.5, shape.shape)
    else:
      value = rng.normal(0, 1.0, shape.shape) / max(1, np.prod(shape.shape[:-1])) ** 0.5
    return jnp.asarray(value, jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def test_a_convolution_of_doubled_pixels_is_that_of_each_pixel_repeated():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 3, 4, 5, 6)), jnp.float32)
  doubled, plain = DoubledConv(7), CausalConv(7, (1, 3, 3))
  shapes = jax.eval_shape(doubled.init, jax.random.key(0), x)
  params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
  wanted = plain.apply(params, repeat(x, "r f h w c -> r f (h a) (w b) c", a=2, b=2))
  assert wanted.shape == (2, 3, 8, 10, 7)
  np.testing.assert_allclose(doubled.apply(params, x), wanted, atol=1e-4)
  half = doubled.apply(params, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  assert float(jnp.linalg.norm(half.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)) < 1e-2


@pytest.fixture(scope="session")
def params():
  return random_params(TINY)


@functools.cache
def run(method: str, chunk: int | None = None):
  vae = WanVAE(TINY)
  return jax.jit(lambda p, x: vae.apply({"params": p}, x, chunk, method=method))


def video(frames: int, runs: int = 2, size: int = 8):
  rng = np.random.default_rng(frames)
  return jnp.asarray(rng.uniform(-1, 1, (runs, frames, size, size, 3)), jnp.float32)


@pytest.mark.parametrize("temporal", [(True, True), (False, True), (False, False)])
def test_the_stride_follows_the_stages_and_the_temporal_flags(temporal):
  config = WanVAEConfig(base_width=4, stages=(1, 2, 4), temporal=temporal, blocks=1)
  step = 2 ** sum(temporal)
  assert config.stride == (step, 4, 4)
  x = jax.ShapeDtypeStruct((2, 1 + 2 * step, 8, 12, 3), jnp.float32)
  _, variables = jax.eval_shape(lambda x: WanVAE(config).init_with_output(jax.random.key(0), x), x)
  z = jax.eval_shape(lambda v, x: WanVAE(config).apply(v, x, method="encode"), variables, x)
  y = jax.eval_shape(lambda v, z: WanVAE(config).apply(v, z, method="decode"), variables, z)
  assert set(variables) == {"params"}
  assert z.shape == (2, 3, 2, 3, 16)
  assert y.shape == x.shape


@pytest.mark.parametrize("widths", [(3, 5), (5, 3)])
def test_a_causal_convolution_is_the_3d_convolution_of_frames_padded_in_front(widths):
  inside, outside = widths
  conv = CausalConv(outside)
  x = jax.random.normal(jax.random.key(0), (2, 4, 5, 6, inside))
  variables = conv.init(jax.random.key(1), x)
  wanted = jax.lax.conv_general_dilated(
    x,
    variables["params"]["kernel"],
    (1, 1, 1),
    ((2, 0), (1, 1), (1, 1)),
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
  )
  np.testing.assert_allclose(conv.apply(variables, x), wanted, atol=1e-5)


SLOW = pytest.mark.slow  # compilations: the pairs left out say little that the others do not


@pytest.mark.parametrize(
  ("frames", "chunk"),
  [
    (1, 1),
    (5, 2),
    pytest.param(17, 1, marks=SLOW),
    pytest.param(17, 2, marks=SLOW),
    pytest.param(1, 2, marks=SLOW),
    pytest.param(1, 4, marks=SLOW),
    pytest.param(5, 1, marks=SLOW),
    pytest.param(5, 4, marks=SLOW),
    pytest.param(17, 4, marks=SLOW),
  ],
)
def test_chunks_equal_the_whole(params, frames, chunk):
  x = video(frames)
  mean, logvar = run("encode_moments")(params, x)
  chunked_mean, chunked_logvar = run("encode_moments", chunk)(params, x)
  np.testing.assert_allclose(chunked_mean, mean, atol=1e-5)
  np.testing.assert_allclose(chunked_logvar, logvar, atol=1e-5)
  whole = run("decode_values")(params, mean)
  assert whole.shape == x.shape
  np.testing.assert_allclose(run("decode_values", chunk)(params, mean), whole, atol=1e-5)


@pytest.mark.slow
def test_chunks_equal_the_whole_with_shortcuts():
  """2.2: the stages' shortcuts, averaged down and repeated up, pass chunks too."""
  vae, weights = WanVAE(RESIDUAL), random_params(RESIDUAL)
  x = video(7)

  @functools.partial(jax.jit, static_argnums=2)
  def both(p, x, chunk):
    z, _ = vae.apply({"params": p}, x, chunk, method="encode_moments")
    return z, vae.apply({"params": p}, z, chunk, method="decode_values")

  (z, y), (z_pieces, y_pieces) = both(weights, x, None), both(weights, x, 1)
  assert RESIDUAL.stride == (2, 8, 8)
  assert (z.shape, y.shape) == ((2, 4, 1, 1, 16), x.shape)
  np.testing.assert_allclose(z_pieces, z, atol=1e-5)
  np.testing.assert_allclose(y_pieces, y, atol=1e-5)


@functools.partial(jax.jit, static_argnums=(0, 1))
def end_of(config: WanVAEConfig, last: int | None, params, values):
  return WanVAE(config).apply({"params": params}, values, None, last, method="decode_values")


@pytest.mark.parametrize(
  ("config", "frames", "last"),
  [
    (TINY, 9, 2),
    pytest.param(TINY, 2, 3, marks=SLOW),  # fewer than the blocks look back
    pytest.param(TINY, 9, 1, marks=SLOW),
    pytest.param(TINY, 9, 7, marks=SLOW),
    pytest.param(TINY, 9, 33, marks=SLOW),
    pytest.param(RESIDUAL, 12, 2, marks=SLOW),
    pytest.param(RESIDUAL, 12, 3, marks=SLOW),
  ],
  ids=lambda value: (
    ("residual" if value.residual else "tiny") if isinstance(value, WanVAEConfig) else str(value)
  ),
)
def test_the_last_frames_alone_are_those_of_the_whole(config, frames, last):
  weights = random_params(config)
  rng = np.random.default_rng(5)
  values = jnp.asarray(rng.normal(size=(2, frames, 2, 2, config.z_channels)), jnp.float32)
  whole = end_of(config, None, weights, values)
  assert float(jnp.std(whole[:, -1])) > 0.1
  found = end_of(config, last, weights, values)
  assert found.shape == (2, last, *whole.shape[2:])
  np.testing.assert_allclose(found, whole[:, -last:], atol=1e-5)


@pytest.mark.slow
def test_the_last_two_frames_of_81_cost_a_fraction_of_all():
  """At the published depth."""
  config = WanVAEConfig(base_width=4)
  frames = jax.ShapeDtypeStruct((1, 5, 8, 8, 3), jnp.float32)
  weights = jax.eval_shape(WanVAE(config).init, jax.random.key(0), frames)["params"]
  values = jax.ShapeDtypeStruct((1, 21, 4, 4, config.z_channels), jnp.float32)
  whole, end = (
    end_of.lower(config, last, weights, values).cost_analysis()["flops"] for last in (None, 2)
  )
  assert end < whole / 3


def test_the_last_frames_are_not_made_in_pieces(params):
  values = jnp.zeros((1, 3, 2, 2, 16))
  for chunk, last in ((1, 2), (None, 0)):
    with pytest.raises(ValueError, match="wanted 1 or more frames at the end"):
      WanVAE(TINY).apply({"params": params}, values, chunk, last, method="decode")


@pytest.mark.slow
def test_nothing_sees_a_later_frame(params):
  x = video(9)
  z = run("encode")(params, x)
  cut = run("encode")(params, x[:, :5])
  np.testing.assert_allclose(cut, z[:, :2], atol=1e-5)
  y, y_cut = run("decode")(params, z), run("decode")(params, z[:, :2])
  np.testing.assert_allclose(y_cut, y[:, :5], atol=1e-5)
  later = run("encode")(params, x.at[:, 5:].set(0.0))
  assert float(jnp.abs(later[:, 2] - z[:, 2]).max()) > 1e-2


def test_latents_are_normalised_per_channel_and_the_video_is_clipped(params):
  x = video(5)
  mean, _ = run("encode_moments")(params, x)
  z = run("encode")(params, x)
  wanted = (np.asarray(mean, np.float64) - np.array(TINY.mean)) / np.array(TINY.std)
  np.testing.assert_allclose(z, wanted, atol=1e-5)
  raw = run("decode_values")(params, mean)
  np.testing.assert_allclose(run("decode")(params, z), np.clip(raw, -1, 1), atol=1e-4)


@pytest.mark.slow
def test_gradients_are_finite_for_a_constant_video():
  vae = WanVAE(WanVAEConfig(base_width=4, stages=(1, 2), temporal=(True,), blocks=1))

  @jax.jit
  @jax.grad
  def slope(p, x):
    mean, logvar = vae.apply({"params": p}, x, method="encode_moments")
    y = vae.apply({"params": p}, mean, method="decode_values")
    return jnp.mean((y - x) ** 2) + jnp.mean(jnp.exp(logvar))

  weights = random_params(vae.config)
  blank = jax.tree.map(jnp.zeros_like, weights)  # every norm divides by the norm of zeros
  for given in (weights, blank):
    grads = slope(given, jnp.zeros((1, 3, 4, 4, 3)))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_memory_of_chunks_does_not_grow_with_the_frames(params):
  def working(frames: int, chunk: int | None) -> int:
    z = jax.ShapeDtypeStruct((1, frames, 8, 8, 16), jnp.float32)
    compiled = run("decode_values", chunk).lower(params, z).compile()
    analysis = compiled.memory_analysis()
    pixels = 4 * 3 * 32 * 32 * (1 + 4 * (frames - 1))
    return analysis.temp_size_in_bytes - 2 * pixels  # the scan's rows, then the joined video

  assert working(33, 1) < 1.2 * working(9, 1)
  assert working(33, None) > 2 * working(9, None)
  assert working(33, 1) < 0.2 * working(33, None)


@pytest.mark.slow
def test_bfloat16_blocks_give_float32_near_the_float32_result(params):
  half = WanVAE(WanVAEConfig(**{**vars(TINY), "dtype": "bfloat16"}))
  x = video(5)
  z = run("encode")(params, x)
  z_half = jax.jit(lambda p, x: half.apply({"params": p}, x, method="encode"))(params, x)
  assert z_half.dtype == jnp.float32
  # bfloat16 keeps 8 bits: 0.4% a rounding, some ten of them in a row.
  assert float(jnp.linalg.norm(z_half - z) / jnp.linalg.norm(z)) < 5e-2
  x = run("decode_values")(params, z)
  x_half = jax.jit(lambda p, z: half.apply({"params": p}, z, method="decode_values"))(params, z)
  assert x_half.dtype == jnp.float32
  assert float(jnp.linalg.norm(x_half - x) / jnp.linalg.norm(x)) < 5e-2


@pytest.mark.parametrize("shape", [(5, 8, 8, 16), (1, 5, 8, 8, 4)])
def test_latents_of_another_rank_or_width_are_refused(params, shape):
  with pytest.raises(ValueError, match=r"latents are \(.*wanted R F H W C with C = 16"):
    WanVAE(TINY).apply({"params": params}, jnp.zeros(shape), method="decode")


@pytest.mark.parametrize(
  ("shape", "text"),
  [
    ((1, 4, 8, 8, 3), r"1 \+ 4k frames"),
    ((1, 5, 10, 8, 3), "multiples of 4 and 4 pixels"),
    ((5, 8, 8, 3), "wanted R frames height width 3"),
  ],
)
def test_videos_that_do_not_fit_are_refused(params, shape, text):
  with pytest.raises(ValueError, match=text):
    WanVAE(TINY).apply({"params": params}, jnp.zeros(shape), method="encode")


def test_bad_chunks_and_configs_are_refused(params):
  with pytest.raises(ValueError, match="chunk=0 latent frames, wanted 1 or more"):
    WanVAE(TINY).apply({"params": params}, video(5), 0, method="encode")
  with pytest.raises(ValueError, match="has 3 flags, wanted 2"):
    WanVAEConfig(stages=(1, 2, 4))
  with pytest.raises(ValueError, match="mean has 16 numbers, wanted z_channels=4"):
    WanVAEConfig(z_channels=4)


def test_resampling_without_parameters():
  """Two frames, 2 x 2 cells and 3 channels become 4 features; and back, each in its place."""
  x = jnp.arange(2 * 2 * 2 * 3, dtype=jnp.float32).reshape(1, 2, 2, 2, 3)
  down = average_down(x, 4, (2, 2), first=False)
  groups = np.transpose(np.asarray(x[0]), (3, 0, 1, 2)).reshape(4, 6)  # channel, time, row, column
  np.testing.assert_allclose(down[0, 0, 0, 0], groups.mean(1), rtol=1e-6)
  alone = average_down(x[:, :1], 4, (2, 2))
  groups = groups.reshape(3, 2, 4)[:, 0]  # frame 0 with an empty frame before it
  wanted = np.concatenate([np.zeros((3, 4)), groups], axis=1).reshape(4, 6).mean(1)
  np.testing.assert_allclose(alone[0, 0, 0, 0], wanted, rtol=1e-6)
  cell = jnp.arange(8, dtype=jnp.float32).reshape(1, 1, 1, 1, 8)
  up = repeat_up(cell, 2, (2, 2), first=False)
  np.testing.assert_array_equal(up[..., 0].ravel(), np.repeat(np.arange(4), 2))
  np.testing.assert_array_equal(repeat_up(cell, 2, (2, 2))[0, 0], up[0, 1])


def test_folding_puts_columns_before_rows():
  x = jnp.arange(4.0).reshape(1, 1, 2, 2, 1)
  np.testing.assert_array_equal(fold(x, 2)[0, 0, 0, 0], [0, 2, 1, 3])
  np.testing.assert_array_equal(unfold(fold(x, 2), 2), x)


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("config", [TINY, WanVAEConfig(base_width=4), RESIDUAL])
def test_both_namings_fill_every_leaf_once(config, naming):
  rows = vae_table.table(config, naming)
  targets = [target for _, target, _ in rows]
  assert sorted(targets) == sorted(leaves(random_params(config)))
  assert len({key for key, _, _ in rows}) == len(rows)


def test_the_original_names_of_the_published_size():
  keys = {key: target for key, target, _ in vae_table.table(WanVAEConfig(), "original")}
  assert keys[r"encoder\.downsamples\.5\.time_conv\.weight"] == (
    "encoder/stage_1_down/time_conv/kernel"
  )
  assert keys[r"decoder\.upsamples\.4\.shortcut\.weight"] == (
    "decoder/stage_1_block_0/shortcut/kernel"
  )
  assert keys[r"decoder\.upsamples\.11\.resample\.1\.weight"] == "decoder/stage_2_up/space/kernel"


def test_the_original_names_of_the_published_2_2():
  keys = {key: target for key, target, _ in vae_table.table(wan22_vae.CONFIG, "original")}
  assert keys[r"encoder\.downsamples\.2\.downsamples\.2\.time_conv\.weight"] == (
    "encoder/stage_2_down/time_conv/kernel"
  )
  assert keys[r"decoder\.upsamples\.2\.upsamples\.0\.shortcut\.weight"] == (
    "decoder/stage_2_block_0/shortcut/kernel"
  )
  assert keys[r"decoder\.upsamples\.0\.upsamples\.3\.resample\.1\.bias"] == (
    "decoder/stage_0_up/space/bias"
  )
