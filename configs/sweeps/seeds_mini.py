"""1,024 runs of the model that ships: 8 tasks, 16 cases of each, 8 seeds, 10 steps.

  videoreason sweep --config seeds_mini --out runs/seeds
  videoreason sweep --config seeds_mini:cases=2,seeds=4 --out runs/small       64 runs

Do seeds of one case give one answer, and when does each commit? A few minutes on 2 CPU cores.
"""

from ml_collections import ConfigDict

from jax_videoreason.configs import common, mini


def get_config(argument: str | None = None) -> ConfigDict:
  config = mini.get_config()
  with config.unlocked():
    config.update(common.sweep())
  config.steps, config.seeds = 10, 8
  config.tasks = (
    "maze",
    "tictactoe",
    "occlusion",
    "sort_bars",
    "rotate",
    "select_largest",
    "pick",
    "tree_reach",
  )
  config.cases = 16
  config.unit = 8  # the seeds of a case
  return common.parse(config.lock(), argument)
