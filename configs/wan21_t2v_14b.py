"""Wan2.1 T2V 14B: text to video, 1280 x 720 pixels, 81 frames, one transformer (28.6 GB, bfloat16).

videoreason convert Wan2.1-T2V-14B --dtype bf16 --out ckpt/wan21_t2v_14b
videoreason sample --config wan21_t2v_14b --prompt TEXT --out runs/mine
videoreason sample --config wan21_t2v_14b:480p --prompt TEXT --out runs/mine
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common


def get_config(argument: str | None = None) -> ConfigDict:
  size, rest = common.choose(argument, "720p", "480p")
  config = common.published("wan21_t2v_14b")
  if size == "720p":
    config.height, config.width = 720, 1280
  return common.parse(config.lock(), rest)
