"""Wan2.2 T2V A14B: text to video, 1280 x 720 pixels, 81 frames, two experts of 28.6 GB each.

  videoreason convert Wan2.2-T2V-A14B --dtype bf16 --out ckpt/wan22_t2v_a14b
  videoreason sample --config wan22_t2v_a14b --prompt TEXT --out runs/mine
  videoreason sample --config wan22_t2v_a14b:480p,boundary=0.9 --prompt TEXT --out runs/mine

Guidance is (high noise, low noise); the experts change at the bundle's own boundary, sigma .875.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common


def get_config(argument: str | None = None) -> ConfigDict:
  size, rest = common.choose(argument, "720p", "480p")
  config = common.published("wan22_t2v_a14b")
  config.steps, config.shift, config.guidance = 40, 12.0, (4.0, 3.0)
  if size == "720p":
    config.height, config.width = 720, 1280
  return common.parse(config.lock(), rest)
