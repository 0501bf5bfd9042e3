"""The published models have the published number of parameters."""

import jax
import pytest

from jax_videoreason import bundles
from jax_videoreason.models import FAMILIES

FAMILY = FAMILIES["wan21"]
# Of one transformer; two experts have it each.
DIT = {
  "wan21_t2v_1_3b": 1_418_996_800,
  "wan21_t2v_14b": 14_288_491_584,
  "wan21_i2v_14b": 16_394_878_784,
  "wan22_t2v_a14b": 14_288_491_584,
  "wan22_i2v_a14b": 14_288_901_184,
  "wan22_ti2v_5b": 4_999_787_712,
  "vbvr_wan21": 16_394_878_784,
  "vbvr_wan22": 14_288_901_184,
}
TEXT, VAE21, VAE22 = 5_680_910_336, 126_892_531, 704_688_668
# The published tower has 630,766,080; Wan reads neither its last layer nor the norm after it.
CLIP = 630_766_080 - (4 * 1280 * (1280 + 1) + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280) - 2 * 1280


def count(part, config):
  return sum(leaf.size for leaf in jax.tree.leaves(FAMILY.parts[part].abstract(config)))


def test_all_published_models_are_here():
  assert set(FAMILY.variants) == set(DIT)


@pytest.mark.parametrize("name", DIT)
def test_transformers(name):
  assert count("dit", FAMILY.variants[name].dit) == DIT[name]


@pytest.mark.parametrize("name", DIT)
def test_other_parts(name):
  variant = FAMILY.variants[name]
  wanted = {"text": TEXT, "vae": VAE22 if name == "wan22_ti2v_5b" else VAE21}
  if name in ("wan21_i2v_14b", "vbvr_wan21"):
    wanted["clip"] = CLIP
  configs = variant.configs
  assert {part: count(part, configs[part]) for part in configs if part != "dit"} == wanted


@pytest.mark.parametrize("name", DIT)
def test_a_bundle_of_a_published_model_has_its_frame_rate(name):
  latents = FAMILY.latents(FAMILY.build(FAMILY.variants[name].configs))
  assert FAMILY.fps(latents) == (24 if name == "wan22_ti2v_5b" else 16)


@pytest.mark.parametrize("name", ["mini", "mini_experts"])
def test_a_model_like_no_published_one_has_a_rate_of_its_own(name):
  assert FAMILY.fps(bundles.describe(name).card.latents) == 8


@pytest.mark.parametrize("name", DIT)
def test_the_parts_fit_together(name):
  """Latents, text and image tokens have the widths that the transformer reads."""
  variant = FAMILY.variants[name]
  spec = FAMILY.latents(FAMILY.build(variant.configs))
  assert spec.channels == variant.dit.out_channels
  assert spec.stride == ((4, 16, 16) if name == "wan22_ti2v_5b" else (4, 8, 8))
  assert variant.text.width == variant.dit.text_width
  assert (variant.clip and variant.clip.width) == variant.dit.clip_width
  assert (variant.boundary is not None) == (variant.experts == 2)
