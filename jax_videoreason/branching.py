"""A stored trajectory taken up at a step: what it was asked, its state there, the new edit."""

import ast
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_videoreason import factors, media, sampler, settings, store, tasks
from jax_videoreason.interventions import Intervention
from jax_videoreason.schedules import Schedule
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Sizes, State, Trace
from jax_videoreason.taps import TapSpec

TRACE = "trace.zarr"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
  """Where a stored run is left: before `step`. said: the edit in words, as a sweep reads it."""

  run: store.Run
  chosen: SampleSettings
  step: int
  said: Mapping[str, Any]

  def state(self, schedule: Schedule) -> State:
    """What the sampler held before the step: exact for Euler, restarted for another solver."""
    return sampler.state_at(self.prefix(TapSpec(), self.step + 1), schedule, self.step)

  def edit(self, sizes: Sizes, schedule: Schedule) -> Intervention | None:
    return factors.edit_for(self.said, sizes, schedule, len(self.chosen.seeds))

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
      taps={name: jnp.asarray(value[:count]) for name, value in stored.items()},
    )

  def x0(self, step: int) -> np.ndarray:
    """R F H W C."""
    assert self.run.x0 is not None
    return np.asarray(self.run.x0[step])

  def told(self) -> dict[str, Any]:
    """What the manifest of the branch says of it."""
    return {"from": str(self.run.path), "step": self.step, "intervene": dict(self.said)}

  def case(self, number: int) -> tasks.Case | None:
    """The case of a run; None where it was asked freely."""
    entry = self.run.runs[number]
    if "metadata" not in entry:
      return None
    task = tasks.load(entry["task"], size=self.chosen.height, frames=self.chosen.frames)
    return task.case(entry["metadata"])

  def first_frame(self, number: int) -> np.ndarray | None:
    path = self.run.first(number)
    return None if path is None else media.read_image(path)


def take_up(
  place: str | Path, step: int, words: str | None, *, checkpoint: str | None = None
) -> Branch:
  """The run folder `place` (or its trace.zarr), left before `step`.

  words: such as "noise_at:mode=add_sigma,gain=0.5"; it acts at `step` alone where it names no
  steps. None = no edit. checkpoint: instead of the one that the run was made by.

  Raises:
    ValueError: no run, a step outside, a trace without latents, an unknown edit or key of it.
  """
  folder = Path(place)
  run = store.open_run(folder.parent if folder.name == TRACE else folder)
  steps = len(run.sigma)
  if not 0 <= step < steps:
    raise ValueError(f"--step={step} is not in {folder}; it has the steps 0..{steps - 1}.")
  if run.latents is None or run.x0 is None:
    raise ValueError(f"{folder} holds no latents, from which a branch starts: sample it again.")
  config = dict(run.manifest["config"])
  if checkpoint is not None:
    config["checkpoint"] = checkpoint
  chosen = settings.from_config(config)
  return Branch(run=run, chosen=chosen, step=step, said=parse(words, step))


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
    key, _, text = word.partition("=")
    if key not in known[name]:
      wanted = settings.nearest(key, known[name])
      raise ValueError(f"--intervene={words}: {name} takes no {key!r}; {wanted}")
    said[key] = span(words, key, text) if key in factors.PLACES else value_of(key, text)
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
  except (ValueError, SyntaxError):
    return text
