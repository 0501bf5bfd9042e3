"""The model that ships: a small member of the Wan family, 32 x 32 pixels, 17 frames, one expert.

  videoreason sample --config mini --image FRAME.png --prompt TEXT --out runs/mini
  videoreason sample --config mini:seeds=8,steps=50 ...

It needs nothing but the package and a CPU. Expect a minute on 2 cores, most of it compilation.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common


def get_config(argument: str | None = None) -> ConfigDict:
  config = common.sample()
  config.checkpoint = "mini"
  config.frames, config.height, config.width = 17, 32, 32
  config.steps = 20
  config.guidance = (2.0,)
  config.seeds = 3
  config.piece = 4
  return common.parse(config.lock(), argument)
