"""Wan2.2 TI2V 5B: text, with or without a first frame, to video: 1280 x 704 pixels, 121 frames.

  videoreason convert Wan2.2-TI2V-5B --dtype bf16 --out ckpt/wan22_ti2v_5b
  videoreason sample --config wan22_ti2v_5b --prompt TEXT --out runs/mine
  videoreason sample --config wan22_ti2v_5b --image FRAME.png --prompt TEXT --out runs/mine

The one for small cards: 10 GB in bfloat16, and latents of a stride of 16 pixels.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common


def get_config(argument: str | None = None) -> ConfigDict:
  config = common.published("wan22_ti2v_5b")
  config.frames, config.height, config.width = 121, 704, 1280
  return common.parse(config.lock(), argument)
