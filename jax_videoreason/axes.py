"""The letters of the axes, used in docstrings, einops patterns and sharding rules."""

from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
Params = Mapping[str, Any]

LETTERS: dict[str, str] = {
  "R": "run (one case, seed and edit)",
  "S": "denoising step",
  "L": "layer",
  "G": "guidance branch: 0 with the prompt, 1 with the negative prompt",
  "F": "latent frame",
  "H": "latent height",
  "W": "latent width",
  "C": "latent channel",
  "T": "token = (f h w) after the patch embedding",
  "D": "model width",
  "N": "attention head",
  "K": "head width",
  "X": "text (or CLIP) token",
  "P": "probe, direction, region, target, point of a sweep",
}
