r"""Do averaged seeds answer better? VBVR on Wan2.2 I2V A14B beside three averages of four seeds.

  videoreason plan --config vbvr_ensemble --on v5p:2x2x4
  videoreason sweep --config vbvr_ensemble --out runs/vbvr_ensemble
  videoreason sweep --config "vbvr_ensemble:checkpoint=mini_experts,height=32,width=32,frames=17,\
steps=12,negative_prompt='',edits.block_update.layers=(6,9)" --out runs/small     on a small model

The first seed of each case carries the average, the others ride beside it. `none` is the same
without; `block_update` averages what layers 20 to 29 add during the first 10 steps, `guess` the
predicted x0, `latents` what the model sees. The paper's ensemble, as far as it is known, is of the
first step alone and of three seeds: `videoreason run ensemble --preset paper`. Puzzles of 480 x 480
pixels; it needs the bundle ckpt/vbvr_wan22 and what `plan` says.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common, vbvr_wan22


def get_config(argument: str | None = None) -> ConfigDict:
  config = vbvr_wan22.get_config()
  with config.unlocked():
    config.update(common.sweep())
    early = {"edit": "ensemble_runs", "steps": (0, 10)}
    config.edits = {
      "none": {"edit": "none"},
      "block_update": {**early, "what": "update", "layers": (20, 30)},
      "guess": {**early, "what": "out"},
      "latents": {**early, "what": "latents"},
    }
  config.height, config.width = 480, 480
  config.seeds = 4
  config.tasks = ("maze", "pick", "tictactoe", "sort_bars")
  config.cases = 8
  config.unit = 4
  return common.parse(config.lock(), argument)
