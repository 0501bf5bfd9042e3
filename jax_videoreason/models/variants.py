"""The published models: which modules each is made of, at full size.

A bundle brings its own sizes; these say what a published checkpoint has before it is there, for
plans and for tests. Source: the config.json of each repository and the official configurations.
"""

import dataclasses
from typing import Any

from jax_videoreason.models.clip import CLIPConfig
from jax_videoreason.models.umt5 import UMT5Config
from jax_videoreason.models.wan import WanConfig
from jax_videoreason.models.wan21_vae import WanVAEConfig
from jax_videoreason.models.wan22_vae import CONFIG as WAN22_VAE

TEXT, VAE, CLIP = UMT5Config(), WanVAEConfig(), CLIPConfig(dtype="bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """The configs of a model's parts; experts: transformers of that config; boundary as in `Card`.

  fps: frames per second of its videos, as it was trained.
  """

  dit: WanConfig
  vae: WanVAEConfig = VAE
  text: UMT5Config = TEXT
  clip: CLIPConfig | None = None
  experts: int = 1
  boundary: float | None = None
  fps: int = 16

  @property
  def configs(self) -> dict[str, Any]:
    """Part -> config, for `Family.build`."""
    parts = {"dit": self.dit, "vae": self.vae, "text": self.text, "clip": self.clip}
    return {name: config for name, config in parts.items() if config is not None}


def _dit(width: int, ffn_width: int, layers: int, **more: Any) -> WanConfig:
  """All published transformers have heads of 128 and compute in bfloat16."""
  heads = width // 128
  return WanConfig(
    width=width, ffn_width=ffn_width, heads=heads, layers=layers, dtype="bfloat16", **more
  )


_14B: dict[str, Any] = dict(width=5120, ffn_width=13824, layers=40)
_IMAGE: dict[str, Any] = dict(in_channels=36, image_input="concat")
_5B: dict[str, Any] = dict(width=3072, ffn_width=14336, layers=30, in_channels=48, out_channels=48)

VARIANTS = {
  "wan21_t2v_1_3b": Variant(dit=_dit(1536, 8960, 30)),
  "wan21_t2v_14b": Variant(dit=_dit(**_14B)),
  "wan21_i2v_14b": Variant(dit=_dit(**_14B, **_IMAGE, clip_width=CLIP.width), clip=CLIP),
  "wan22_t2v_a14b": Variant(dit=_dit(**_14B), experts=2, boundary=0.875),
  "wan22_i2v_a14b": Variant(dit=_dit(**_14B, **_IMAGE), experts=2, boundary=0.9),
  "wan22_ti2v_5b": Variant(dit=_dit(**_5B, image_input="overwrite"), vae=WAN22_VAE, fps=24),
}
# VBVR are fine-tuned weights in the same modules.
VARIANTS["vbvr_wan21"] = VARIANTS["wan21_i2v_14b"]
VARIANTS["vbvr_wan22"] = VARIANTS["wan22_i2v_a14b"]
