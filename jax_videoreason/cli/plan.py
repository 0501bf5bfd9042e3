"""What a command will need on a device kind, before it is paid for: memory, network evaluations,
seconds; whether it fits; which mesh.

  videoreason plan --config wan22_i2v_a14b:480p --on v5p:2x2x4 --mesh fsdp=4,context=4
  videoreason plan --config wan22_ti2v_5b --on gpu:80GB
  videoreason plan --config vbvr_ensemble --on v5e:4x8       (a sweep: a unit, and the whole)
  videoreason plan run noise --config vbvr_wan22 --on gpu:80GBx8
  videoreason plan --config mini --on cpu

For a TPU slice the sampler is compiled ahead of time, without a TPU and without weights: it needs
libtpu (pip install "jax-videoreason[pods]"). Without --mesh one is proposed.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl.flags import DEFINE_integer, DEFINE_string, FlagValues

from jax_videoreason import cli
from jax_videoreason.cli import run

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from jax_videoreason.settings import SampleSettings

WORDS = 2
RUN = "run"
STUDY_KEYS = ("split", "tasks", "cases", "decoder", "experiment", "words", "batch")


def define(flags: FlagValues) -> None:
  cli.define_config(flags, "mini")
  DEFINE_string("on", "cpu", "cpu, gpu:80GB, gpu:80GBx8, or a slice: v5p:2x2x4", flag_values=flags)
  DEFINE_string("mesh", None, "as seed=2,fsdp=4,context=2; None = proposed", flag_values=flags)
  DEFINE_integer(
    "runs", None, "runs together; None = as the command has them", lower_bound=1, flag_values=flags
  )
  DEFINE_string("preset", "quick", "size of a study: quick or full", flag_values=flags)


def complete(config: "ConfigDict", words: Sequence[str]) -> "ConfigDict":
  """The config with the keys of a study, where one is planned."""
  return run.complete(config, words[1:]) if words and words[0] == RUN else config


def main(flags: FlagValues, words: list[str]) -> None:
  if words and (words[0] != RUN or len(words) < 2):
    raise cli.UsageError(f"plan {' '.join(words)}: say plan run NAME, or plan alone.")
  # a slice is described by libtpu, which must not look for a TPU of this machine
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  from jax_videoreason import console, plan, settings, sharding

  config = cli.resolved(flags)
  if words:
    own = {key: config.pop(key) for key in STUDY_KEYS}
    chosen = settings.from_config(config)
    problem, total = study(words[1], chosen, own, flags.runs)
  else:
    chosen, together, videos = whole(config)
    problem = plan.Problem(
      model=plan.model(chosen.checkpoint), chosen=chosen, runs=flags.runs or together
    )
    total = videos * chosen.steps * problem.sizes.G
  axes = None if flags.mesh is None else sharding.axes_of(flags.mesh)
  for line in plan.lines(plan.make(problem, plan.target(flags.on), axes), total):
    console.say(line)


def whole(config: dict[str, Any]) -> tuple["SampleSettings", int, int]:
  """The settings of a sample or a sweep, how many runs go together, and how many there are."""
  from jax_videoreason import product, settings

  own = {key: config.pop(key) for key in product.KEYS if key in config}
  chosen = settings.from_config(config)
  seeds = len(chosen.seeds)
  if not own:
    return chosen, min(chosen.batch or seeds, seeds), seeds
  units, cases = product.cut(product.varied(own), seeds)
  return chosen, cases * seeds, units * cases * seeds


def study(
  name: str, chosen: "SampleSettings", own: dict[str, Any], runs: int | None
) -> tuple[Any, float]:
  """A batch of a study as a problem, and the network evaluations of all of them."""
  from jax_videoreason import plan
  from jax_videoreason.experiments import find

  asked = find(name)
  cases = len(own["tasks"]) * own["cases"]
  size = min(own["batch"] or cases, cases)
  together = size * len(chosen.seeds) * len(asked.roles)
  model = plan.model(chosen.checkpoint)
  problem = plan.Problem(model=model, chosen=chosen, runs=together)
  options = {**asked.options, **own["experiment"]}
  each = problem.sizes.S * together * problem.sizes.G
  total = each * -(-cases // size) * asked.trajectories(problem.sizes, options)
  return plan.Problem(model=model, chosen=chosen, runs=runs or together), total
