"""Wan2.1 I2V 14B: a first frame and text to video, one transformer that also reads CLIP tokens.

  videoreason convert Wan2.1-I2V-14B-480P --dtype bf16 --out ckpt/wan21_i2v_14b_480p
  videoreason sample --config wan21_i2v_14b:480p --image FRAME.png --prompt TEXT --out runs/mine

Two sets of weights: `:480p` (832 x 480, shift 3) and `:720p` (1280 x 720, shift 5). 32.8 GB.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common


def get_config(argument: str | None = None) -> ConfigDict:
  size, rest = common.choose(argument, "480p", "720p")
  config = common.published(f"wan21_i2v_14b_{size}")
  config.negative_prompt = common.STEADY + common.NEGATIVE_PROMPT
  config.steps = 40
  if size == "480p":
    config.shift = 3.0
  else:
    config.height, config.width = 720, 1280
  return common.parse(config.lock(), rest)
