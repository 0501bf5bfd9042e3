"""Wan2.2 I2V A14B: a first frame and text to video, two experts of 28.6 GB each.

  videoreason convert Wan2.2-I2V-A14B --dtype bf16 --out ckpt/wan22_i2v_a14b
  videoreason sample --config wan22_i2v_a14b --image FRAME.png --prompt TEXT --out runs/mine
  videoreason sample --config wan22_i2v_a14b:480p,boundary=0.875 --image FRAME.png ...

The experts change at the bundle's own boundary, sigma .9.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common


def get_config(argument: str | None = None) -> ConfigDict:
  size, rest = common.choose(argument, "720p", "480p")
  config = common.published("wan22_i2v_a14b")
  config.steps, config.guidance = 40, (3.5, 3.5)
  if size == "720p":
    config.height, config.width = 720, 1280
  return common.parse(config.lock(), rest)
