"""A stored trajectory taken up at a step: what it was asked, its state there, the new edit."""

import ast
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_videoreason import bundles, factors, plan, sampler, settings, store, tasks
from jax_videoreason.arrays import StoredArray
from jax_videoreason.axes import Array
from jax_videoreason.interventions import Intervention
from jax_videoreason.schedules import Schedule
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import State, Trace
from jax_videoreason.taps import TapSpec

TRACE = "trace.zarr"
SIGMA_ATOL = 1e-4  # grids of earlier versions were rounded otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
  """Where a stored run is left: before `step`.

  said: the edit in words, as a sweep reads it. edit: the same of all runs; None = "none".
  """

  run: store.Run
  chosen: SampleSettings
  step: int
  said: Mapping[str, Any]
  edit: Intervention | None

  def state(self, schedule: Schedule) -> State:
    """What the sampler held before the step: exact for Euler, restarted for another solver."""
    return sampler.state_at(self.prefix(TapSpec(), self.step + 1), schedule, self.step)

  def prefix(self, taps: TapSpec, steps: int) -> Trace:
    """The first rows of the stored trace, with the taps that `taps` keeps of them."""
    run = self.run
    assert run.latents is not None and run.x0 is not None
    kept = range(self.chosen.steps) if taps.steps is None else taps.steps
    count = sum(step < steps for step in kept)
    stored = run.taps if taps.sites else {}
    return Trace(
      sigma=jnp.asarray(run.sigma[:steps]),
      finite=jnp.asarray(run.finite[:steps]),
      latents=jnp.asarray(run.latents[:steps]),
      x0=jnp.asarray(run.x0[:steps]),
      taps={name: _as_tapped(value, count) for name, value in stored.items()},
    )

  def told(self) -> dict[str, Any]:
    """What the manifest of the branch says of it."""
    return {
      "from": str(self.run.path),
      "step": self.step,
      "intervene": dict(self.said),
      "of": self.run.manifest.get("branch"),  # how that run was itself a branch
    }

  def case(self, number: int) -> tasks.Case | None:
    """The case of a run; None where it was asked freely."""
    entry = self.run.runs[number]
    if "metadata" not in entry:
      return None
    task = tasks.load(entry["task"], size=self.chosen.height, frames=self.chosen.frames)
    return task.case(entry["metadata"])


def _as_tapped(stored: StoredArray, count: int) -> Array:
  """The first rows of a stored tap, in the type that the model gave it."""
  value = jnp.asarray(stored[:count])
  return value.astype(stored.attributes.get("written_from", value.dtype))


def take_up(
  place: str | Path, step: int, words: str | None, *, weights: str | None = None
) -> Branch:
  """The run folder `place` (or its trace.zarr), left before `step`.

  words: such as "noise_at:mode=add_sigma,gain=0.5"; it acts at `step` alone where it names no
  steps. None = no edit. weights: name or folder of a bundle, instead of the one that made the run.

  Raises:
    ValueError: no run, a step outside, a trace without latents, a run that was edited there or
      later, damaged files, other weights than made it and none named, an edit that is unknown or
      has no place in the model.
  """
  folder = Path(place)
  run = store.open_run(folder.parent if folder.name == TRACE else folder)
  steps = len(run.sigma)
  if not 0 <= step < steps:
    raise ValueError(f"--step={step} is not in {folder}; it has the steps 0..{steps - 1}.")
  if run.latents is None or run.x0 is None:
    raise ValueError(f"{folder} holds no latents, from which a branch starts: sample it again.")
  config = dict(run.manifest["config"])
  if weights is not None:
    config["checkpoint"] = weights
  chosen = settings.from_config(config)
  check_weights(run, chosen.checkpoint, named=weights is not None)
  check_edits(folder, run.manifest.get("branch"), step)
  said = parse(words, step)
  problem = plan.Problem(model=plan.model(chosen.checkpoint), chosen=chosen, runs=len(run.runs))
  schedule = problem.schedule()
  check_schedule(run, schedule)
  try:
    edit = factors.edit_for(said, problem.sizes, schedule, len(chosen.seeds))
  except ValueError as error:
    raise ValueError(f"--intervene={words}: {error}") from error
  run.verify()
  return Branch(run=run, chosen=chosen, step=step, said=said, edit=edit)


def check_schedule(run: store.Run, schedule: Schedule) -> None:
  """ValueError: the settings in the manifest are not those by which the stored steps were made."""
  stored, asked = run.sigma, np.asarray(schedule.sigma)[:-1]
  if len(stored) != len(asked) or not np.allclose(stored, asked, atol=SIGMA_ATOL):
    raise ValueError(
      f"{run.path / 'manifest.json'} is damaged: it asks for the sigmas {_ends(asked)}, the stored "
      f"steps have {_ends(stored)}: sample it again, or copy the folder again."
    )


def _ends(sigma: np.ndarray) -> str:
  return f"{sigma[0]:.4g}..{sigma[-1]:.4g} ({len(sigma)} steps)"


def check_edits(folder: Path, told: Mapping[str, Any] | None, step: int) -> None:
  """ValueError: an edit of the branch `folder`, or of one that it came from, would be left out."""
  while told is not None:
    first, stop = told["intervene"].get("steps") or (0, 0)
    if step < stop:
      raise ValueError(
        f"{folder} was edited at the steps {first}..{stop - 1}, which a branch at --step={step} "
        f"would leave out: give a --step after them, or --from {told['from']}."
      )
    told = told["of"]


def check_weights(run: store.Run, name: str, *, named: bool) -> None:
  """ValueError: the bundle is not the one that made the run, and it was not named on purpose."""
  made = run.manifest.get("weights")
  if made is None:
    raise ValueError(
      f"{run.path} was written by a version that did not keep all that a branch needs: sample it "
      "again."
    )
  if bundles.fingerprint(name) != made and not named:
    raise ValueError(
      f"{name} holds other weights than those that made {run.path}: put those back, or give "
      f"--checkpoint={name} to go on with these."
    )


def parse(words: str | None, step: int) -> dict[str, Any]:
  """The edit that "name:key=value,key=value" says; places are "from:to" or one index."""
  if words is None:
    return {"edit": "none"}
  name, _, rest = words.partition(":")
  known = factors.EDITS
  if name not in known:
    raise ValueError(f"--intervene={words}: no edit {name!r}; {settings.nearest(name, known)}")
  said: dict[str, Any] = {"edit": name}
  for word in filter(None, rest.split(",")):
    key, equals, text = word.partition("=")
    if not equals:
      raise ValueError(
        f"--intervene={words}: {word!r} is no key=value; several sites are joined by +, as "
        "sites=attn_out+mlp_out."
      )
    if key not in known[name]:
      wanted = settings.nearest(key, known[name])
      raise ValueError(f"--intervene={words}: {name} takes no {key!r}; {wanted}")
    if key in said:
      raise ValueError(f"--intervene={words}: {key} is given twice, wanted once.")
    said[key] = span(words, key, text) if key in factors.PLACES else value_of(key, text)
  faults = factors.faults_of(said)
  if faults:
    raise ValueError(f"--intervene={words}: {' '.join(faults)}")
  if "steps" in known[name]:
    said.setdefault("steps", (step, step + 1))
    if said["steps"][0] < step:
      raise ValueError(
        f"--intervene={words}: steps begin at {said['steps'][0]}, before --step={step}."
      )
  return said


def span(words: str, key: str, text: str) -> tuple[int, int]:
  """(from, to) of "3:7", or of "3"."""
  low, colon, high = text.partition(":")
  try:
    first, last = int(low), int(high) if colon else int(low) + 1
  except ValueError as error:
    raise ValueError(f"--intervene={words}: {key}={text}, wanted an index or from:to.") from error
  if not 0 <= first < last:
    raise ValueError(f"--intervene={words}: {key}={text}, wanted an index or from:to.")
  return first, last


def value_of(key: str, text: str) -> Any:
  """A number where the text is one; sites are several words joined by +."""
  if key == "sites":
    return tuple(text.split("+"))
  try:
    return ast.literal_eval(text)
  except (ValueError, TypeError, SyntaxError):
    return text
