"""Wan2.1 T2V 1.3B: text to video, 832 x 480 pixels, 81 frames, one transformer.

  videoreason convert Wan2.1-T2V-1.3B --dtype bf16 --out ckpt/wan21_t2v_1_3b
  videoreason sample --config wan21_t2v_1_3b --prompt TEXT --out runs/mine

The smallest published model: 2.8 GB in bfloat16, and 11.4 GB for the text encoder before it.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common


def get_config(argument: str | None = None) -> ConfigDict:
  config = common.published("wan21_t2v_1_3b")
  return common.parse(config.lock(), argument)
