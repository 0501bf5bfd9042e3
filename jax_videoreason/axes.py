"""The letters of the axes, used in docstrings, einops patterns and sharding rules, and places on
an axis."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

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


def spread(count: int, most: int) -> list[int]:
  """At most `most` of 0..count-1, evenly spread, the first and the last among them."""
  return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})
