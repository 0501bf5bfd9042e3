"""The VAE beside diffusers' AutoencoderKLWan, made in memory with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason.convert import engine
from jax_videoreason.convert import vae as vae_table
from jax_videoreason.models.wan21_vae import MEAN, STD, WanVAE, WanVAEConfig

pytestmark = pytest.mark.torch

CONFIG = WanVAEConfig(base_width=8, blocks=1)
# Float32 against float32 over some forty layers; the tolerance on pixels in [-1, 1] is the
# project's for a VAE, the differences seen are below 1e-5.
TOLERANCE = 1e-4


def shapes_of(config: WanVAEConfig):
  video = jax.ShapeDtypeStruct((1, 5, 16, 16, 3), jnp.float32)
  return dict(jax.eval_shape(WanVAE(config).init, jax.random.key(0), video)["params"])


@pytest.fixture(scope="module")
def pair():
  """(diffusers' VAE, our parameters with the same weights)."""
  torch = pytest.importorskip("torch")
  from diffusers import AutoencoderKLWan

  torch.manual_seed(0)
  theirs = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).eval()
  with torch.no_grad():
    for name, value in theirs.named_parameters():
      if name.endswith("gamma"):
        value.uniform_(0.5, 1.5)
  state = {key: value.numpy() for key, value in theirs.state_dict().items()}
  ours = engine.fill(state, vae_table.table(CONFIG, "diffusers"), shapes_of(CONFIG))
  return theirs, ours


def to_torch(x):
  import torch

  return torch.from_numpy(np.array(jnp.transpose(x, (0, 4, 1, 2, 3))))


def from_torch(x) -> np.ndarray:
  return np.transpose(x.numpy(), (0, 2, 3, 4, 1))


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encode_and_decode(pair, frames, chunk):
  import torch

  theirs, ours = pair
  rng = np.random.default_rng(frames)
  video = jnp.asarray(rng.uniform(-1, 1, (1, frames, 32, 32, 3)), jnp.float32)
  with torch.no_grad():
    moments = theirs.encode(to_torch(video)).latent_dist
    mean, logvar = from_torch(moments.mode()), from_torch(moments.logvar)
    wanted = from_torch(theirs.decode(moments.mode()).sample)

  vae = WanVAE(CONFIG)
  got_mean, got_logvar = vae.apply({"params": ours}, video, chunk, method="encode_moments")
  np.testing.assert_allclose(got_mean, mean, atol=TOLERANCE)
  np.testing.assert_allclose(got_logvar, logvar, atol=TOLERANCE)

  latents = vae.apply({"params": ours}, video, chunk, method="encode")
  np.testing.assert_allclose(latents, (mean - np.array(MEAN)) / np.array(STD), atol=TOLERANCE)
  got = vae.apply({"params": ours}, latents, chunk, method="decode")
  assert wanted.std() > 0.05  # a decoder stuck at one colour would agree with anything
  np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


def test_the_published_size_has_the_tensors_of_diffusers():
  import torch
  from diffusers import AutoencoderKLWan

  with torch.device("meta"):
    state = AutoencoderKLWan().state_dict()
  config = WanVAEConfig()
  moves = engine.moves(state, vae_table.table(config, "diffusers"), shapes_of(config))
  assert len(moves) == len(state)


def test_the_normalisation_is_that_of_diffusers(pair):
  theirs, _ = pair
  assert tuple(theirs.config.latents_mean) == MEAN
  assert tuple(theirs.config.latents_std) == STD
