"""Decoding in tiles beside diffusers' tiled_decode, and beside DiffSynth's loop over its VAE.

Tolerance 1e-4 on pixels in -1..1, the project's for a VAE; the joining itself is exact to 1e-6.
"""

import jax
import numpy as np
import pytest
from einops import rearrange

from jax_videoreason import decode
from jax_videoreason.convert import engine
from jax_videoreason.convert import vae as table
from jax_videoreason.models import FAMILIES
from jax_videoreason.models.wan21_vae import WanVAE, WanVAEConfig
from jax_videoreason.sharding import make_mesh
from jax_videoreason.structs import Card, LatentSpec, ModelBundle, Parts
from jax_videoreason.tiling import Tiling

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

Z, STAGES = 4, dict(stages=(1, 2), temporal=(True,))
PLAIN = (
  WanVAEConfig(base_width=4, z_channels=Z, blocks=1, mean=(0.1,) * Z, std=(1.3,) * Z, **STAGES),
  dict(base_dim=4, scale_factor_spatial=2),
)
FOLDED = (
  WanVAEConfig(
    base_width=4, z_channels=Z, blocks=1, mean=(0.1,) * Z, std=(1.3,) * Z, fold=2, residual=True,
    stages=(2, 2), temporal=(True,),
  ),
  dict(
    base_dim=4, scale_factor_spatial=4, patch_size=2, is_residual=True, in_channels=12,
    out_channels=12,
  ),
)  # fmt: skip


def build(config, settings):
  """Theirs, and a bundle of ours with the same weights."""
  from diffusers import AutoencoderKLWan

  torch.manual_seed(0)
  theirs = AutoencoderKLWan(
    z_dim=Z, num_res_blocks=1, dim_mult=list(config.stages), latents_mean=[0.1] * Z,
    latents_std=[1.3] * Z, temperal_downsample=list(config.temporal), scale_factor_temporal=2,
    **settings,
  ).eval()  # fmt: skip
  shapes = FAMILIES["wan21"].parts["vae"].abstract(config)
  state = {key: value.numpy() for key, value in theirs.state_dict().items()}
  weights = engine.fill(state, table.table(config, "diffusers"), shapes)
  bundle = ModelBundle(
    params=(None,),
    vae=jax.tree.map(jax.numpy.asarray, weights),
    parts=Parts(dit=None, vae=WanVAE(config)),
    card=Card(
      name="tiny", family="wan21", latents=LatentSpec(channels=Z, stride=config.stride),
      text_length=1,
    ),
  )  # fmt: skip
  return theirs, bundle


@pytest.fixture(
  scope="module",
  params=[PLAIN, pytest.param(FOLDED, marks=pytest.mark.slow)],
  ids=["wan21", "wan22"],
)
def both(request):
  return build(*request.param)


def latents(height, width):
  return np.random.default_rng(0).normal(size=(1, 3, height, width, Z)).astype(np.float32)


def given_to_theirs(z):
  return torch.tensor(rearrange(z * np.float32(1.3) + np.float32(0.1), "r f h w c -> r c f h w"))


def as_bytes(video):
  return np.round(127.5 * (rearrange(video.clamp(-1, 1).numpy(), "r c f h w -> r f h w c") + 1))


@pytest.mark.parametrize("size", [(7, 9), pytest.param((6, 4), marks=pytest.mark.slow)])
def test_tiles_of_diffusers(both, size):
  theirs, bundle = both
  pixels = bundle.card.latents.stride[1]
  theirs.enable_tiling(*(4 * pixels,) * 2, *(3 * pixels,) * 2)
  z = latents(*size)
  with torch.no_grad():
    wanted = as_bytes(theirs.decode(given_to_theirs(z)).sample)
    theirs.disable_tiling()
    whole = as_bytes(theirs.decode(given_to_theirs(z)).sample)
  fold = bundle.parts.vae.config.fold
  tiles = Tiling(size=(4, 4), stride=(3, 3), rule="diffusers", fold=fold)
  ours = decode(bundle, z, tiles=tiles).astype(int)
  assert np.abs(ours - wanted).max() <= 1  # roundings of nearly equal numbers
  assert (ours != wanted).mean() < 1e-3
  assert np.abs(ours - whole).max() > 1  # tiles are not the whole


def ramp(length, border, first, last):
  made = torch.ones(length)
  if not first:
    made[:border] = (torch.arange(border) + 1) / border
  if not last:
    made[-border:] = torch.flip((torch.arange(border) + 1) / border, (0,))
  return made


def loop_of_diffsynth(theirs, z, size, step, pixels):
  """Every tile by itself, weighed by ramps, added up, divided, clipped."""
  height, width = z.shape[3:]
  values = weights = 0
  for top in range(0, height, step):
    for left in range(0, width, step):
      done = [s - step >= 0 and s - step + size >= n for s, n in ((top, height), (left, width))]
      if any(done):
        continue
      tile = theirs.decode(z[..., top : top + size, left : left + size]).sample
      high, wide = tile.shape[3:]
      border = (size - step) * pixels
      mask = torch.minimum(
        ramp(high, border, top == 0, top + size >= height)[:, None],
        ramp(wide, border, left == 0, left + size >= width)[None],
      )
      pad = (left * pixels, width * pixels - left * pixels - wide,
             top * pixels, height * pixels - top * pixels - high)  # fmt: skip
      values = values + torch.nn.functional.pad(tile * mask, pad)
      weights = weights + torch.nn.functional.pad(mask, pad)
  return values / weights


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, dict(seed=2, fsdp=2)], ids=["one device", "four"])
def test_tiles_of_diffsynth_on_any_mesh(mesh):
  """Small latents, so that no tile is clipped before it is weighed: theirs always clips."""
  theirs, bundle = build(*PLAIN)
  z = 0.2 * latents(7, 9)
  with torch.no_grad():
    wanted = as_bytes(loop_of_diffsynth(theirs, given_to_theirs(z), 4, 2, 2))
  tiles = Tiling(size=(4, 4), stride=(2, 2), rule="diffsynth")
  ours = decode(bundle, z, tiles=tiles, mesh=None if mesh is None else make_mesh(**mesh))
  assert 0 < wanted.min() and wanted.max() < 255
  assert np.abs(ours.astype(int) - wanted).max() <= 1
  assert (ours != wanted).mean() < 1e-3
