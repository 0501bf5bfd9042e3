"""The studies that ship, by name, and what a new one needs."""

import importlib
from pathlib import Path

from jax_videoreason.experiments import results
from jax_videoreason.experiments.base import Study, experiment, perform, verdicts
from jax_videoreason.experiments.behaviours import behaviours
from jax_videoreason.experiments.chain_of_steps import chain_of_steps
from jax_videoreason.experiments.context import Chunks, Context, Setting
from jax_videoreason.experiments.controls import controls
from jax_videoreason.experiments.early import early
from jax_videoreason.experiments.ensemble import ensemble
from jax_videoreason.experiments.frames import frames
from jax_videoreason.experiments.layer_maps import layer_maps
from jax_videoreason.experiments.layer_swap import layer_swap
from jax_videoreason.experiments.noise import noise
from jax_videoreason.experiments.probes import probes
from jax_videoreason.experiments.results import Claim, Finding, Result
from jax_videoreason.folders import checksum, read_json, write_json
from jax_videoreason.settings import nearest

EXPERIMENTS: dict[str, Study] = {
  study.name: study
  for study in (
    chain_of_steps,
    noise,
    layer_maps,
    layer_swap,
    ensemble,
    frames,
    probes,
    early,
    behaviours,
    controls,
  )
}


def find(name: str) -> Study:
  """A study that ships, or `module:function` of one elsewhere."""
  if name in EXPERIMENTS:
    return EXPERIMENTS[name]
  module, colon, function = name.partition(":")
  if not colon:
    raise ValueError(f"no experiment {name!r}; {nearest(name, EXPERIMENTS)}")
  try:
    study = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"{name}: {error}; wanted module:function of an @experiment.") from error
  if not isinstance(study, Study):
    raise ValueError(f"{name} is {type(study).__name__}, wanted a function under @experiment.")
  return study


def judge_again(folder: str | Path) -> None:
  """Takes the verdicts of a stored result anew, from its arrays and the claims as declared now.

  Nothing is computed by a model. A study that does not ship keeps what it has.
  """
  folder = Path(folder)
  result, record = results.load(folder)
  study = EXPERIMENTS.get(record["experiment"])
  if study is None:
    return
  claims = [results.describe(f) for f in verdicts(study, result, record["control"])]
  if claims != record["claims"]:
    write_json(folder / "result.json", {**record, "claims": claims})
    manifest = read_json(folder / "manifest.json")
    manifest["files"]["result.json"] = checksum(folder / "result.json")
    write_json(folder / "manifest.json", manifest)


__all__ = [
  "EXPERIMENTS",
  "Chunks",
  "Claim",
  "Context",
  "Finding",
  "Result",
  "Setting",
  "Study",
  "experiment",
  "find",
  "judge_again",
  "perform",
]
