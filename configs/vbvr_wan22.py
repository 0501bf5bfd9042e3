"""VBVR on Wan2.2 I2V A14B, as the paper runs it: 50 Euler steps, shift 5, guidance 5, two experts.

  videoreason convert VBVR-Wan2.2 --numerics diffsynth --dtype bf16 --out ckpt/vbvr_wan22
  videoreason sample --config vbvr_wan22 --image FRAME.png --prompt TEXT --out runs/mine
  videoreason sample --config vbvr_wan22:boundary=0.9 --image FRAME.png --prompt TEXT ...

The paper's tools change experts at sigma .875, step 21 of 50; the experts were trained for .9, step
18, which is also the boundary of the base model.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common


def get_config(argument: str | None = None) -> ConfigDict:
  config = common.vbvr("vbvr_wan22")
  config.boundary = 0.875
  return common.parse(config.lock(), argument)
