"""`mini` continued as two experts, as Wan2.2 A14B is built: the first one above sigma 0.9.

  videoreason sample --config mini_experts --image FRAME.png --prompt TEXT --out runs/experts
  videoreason sample --config mini_experts:boundary=0.8 ...   the switch at another place

Beside `mini`, which has one network for all steps, it tells what the switch does to a run.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common, mini


def get_config(argument: str | None = None) -> ConfigDict:
  config = mini.get_config().unlock()
  config.checkpoint = "mini_experts"
  return common.parse(config.lock(), argument)
