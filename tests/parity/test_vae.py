"""The VAE beside diffusers' AutoencoderKLWan, made in memory with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason.convert import engine
from jax_videoreason.convert import vae as vae_table
from jax_videoreason.models import wan22_vae
from jax_videoreason.models.wan21_vae import MEAN, STD, WanVAE, WanVAEConfig

pytestmark = pytest.mark.torch

# Ours, and the settings of theirs: 2.1, and 2.2 with its wider decoder, folded pixels, shortcuts.
PLAIN = (WanVAEConfig(base_width=8, blocks=1), dict(base_dim=8, z_dim=16, num_res_blocks=1))
RESIDUAL = (
  WanVAEConfig(
    base_width=8, decoder_width=16, z_channels=6, blocks=1, fold=2, residual=True,
    mean=MEAN[:6], std=STD[:6],
  ),
  dict(
    base_dim=8, decoder_base_dim=16, z_dim=6, num_res_blocks=1, patch_size=2, is_residual=True,
    in_channels=12, out_channels=12, scale_factor_spatial=16,
    latents_mean=list(MEAN[:6]), latents_std=list(STD[:6]),
  ),
)  # fmt: skip
# Float32 against float32 over some forty layers; the tolerance on pixels in [-1, 1] is the
# project's for a VAE, the differences seen are below 1e-5.
TOLERANCE = 1e-4


def shapes_of(config: WanVAEConfig):
  step, high, wide = config.stride
  video = jax.ShapeDtypeStruct((1, 1 + step, high, wide, 3), jnp.float32)
  return dict(jax.eval_shape(WanVAE(config).init, jax.random.key(0), video)["params"])


@pytest.fixture(
  scope="module",
  params=[PLAIN, RESIDUAL],
  ids=["wan21", "wan22"],
)
def pair(request):
  """(diffusers' VAE, our config, our parameters with the same weights)."""
  torch = pytest.importorskip("torch")
  from diffusers import AutoencoderKLWan

  config, theirs = request.param
  torch.manual_seed(0)
  theirs = AutoencoderKLWan(**theirs).eval()
  with torch.no_grad():
    for name, value in theirs.named_parameters():
      if name.endswith("gamma"):
        value.uniform_(0.5, 1.5)
  state = {key: value.numpy() for key, value in theirs.state_dict().items()}
  ours = engine.fill(state, vae_table.table(config, "diffusers"), shapes_of(config))
  return theirs, config, ours


def to_torch(x):
  import torch

  return torch.from_numpy(np.array(jnp.transpose(x, (0, 4, 1, 2, 3))))


def from_torch(x) -> np.ndarray:
  return np.transpose(x.numpy(), (0, 2, 3, 4, 1))


SLOW = pytest.mark.slow  # compilations


@pytest.mark.parametrize(
  ("frames", "chunk"),
  [
    (5, None),
    pytest.param(17, 1, marks=SLOW),
    pytest.param(1, None, marks=SLOW),
    pytest.param(17, None, marks=SLOW),
    pytest.param(1, 1, marks=SLOW),
    pytest.param(5, 1, marks=SLOW),
  ],
)
def test_encode_and_decode(pair, frames, chunk):
  import torch

  theirs, config, ours = pair
  rng = np.random.default_rng(frames)
  video = jnp.asarray(rng.uniform(-1, 1, (1, frames, 32, 48, 3)), jnp.float32)
  with torch.no_grad():
    moments = theirs.encode(to_torch(video)).latent_dist
    mean, logvar = from_torch(moments.mode()), from_torch(moments.logvar)
    wanted = from_torch(theirs.decode(moments.mode()).sample)

  def run(method, x):
    call = functools.partial(WanVAE(config).apply, method=method)
    return jax.jit(call, static_argnums=2)({"params": ours}, x, chunk)

  got_mean, got_logvar = run("encode_moments", video)
  np.testing.assert_allclose(got_mean, mean, atol=TOLERANCE)
  np.testing.assert_allclose(got_logvar, logvar, atol=TOLERANCE)

  latents = run("encode", video)
  np.testing.assert_allclose(
    latents, (mean - np.array(config.mean)) / np.array(config.std), atol=TOLERANCE
  )
  got = run("decode", latents)
  assert wanted.std() > 0.05  # a decoder stuck at one colour would agree with anything
  np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


PUBLISHED = {
  "wan21": (WanVAEConfig(), {}),
  "wan22": (
    wan22_vae.CONFIG,
    dict(
      base_dim=160, decoder_base_dim=256, z_dim=48, patch_size=2, is_residual=True,
      in_channels=12, out_channels=12, scale_factor_spatial=16,
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_size_has_the_tensors_of_diffusers(name):
  import torch
  from diffusers import AutoencoderKLWan

  config, theirs = PUBLISHED[name]
  with torch.device("meta"):
    state = AutoencoderKLWan(**theirs).state_dict()
  moves = engine.moves(state, vae_table.table(config, "diffusers"), shapes_of(config))
  assert len(moves) == len(state)


def test_the_normalisation_is_that_of_diffusers():
  import torch
  from diffusers import AutoencoderKLWan

  with torch.device("meta"):
    theirs = AutoencoderKLWan()
  assert tuple(theirs.config.latents_mean) == MEAN
  assert tuple(theirs.config.latents_std) == STD
