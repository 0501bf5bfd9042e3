"""VBVR on Wan2.1 I2V 14B 720P: 50 Euler steps, shift 5, guidance 5, one transformer.

  videoreason convert Wan2.1-I2V-14B-720P --lora VBVR-Wan2.1/lora.safetensors
    --numerics diffsynth --dtype bf16 --out ckpt/vbvr_wan21
  videoreason sample --config vbvr_wan21 --image FRAME.png --prompt TEXT --out runs/mine

What vbvr_wan22 shows and this one does not may come from the change of experts.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common


def get_config(argument: str | None = None) -> ConfigDict:
  config = common.vbvr("vbvr_wan21")
  return common.parse(config.lock(), argument)
