r"""Cases x seeds x edits through one sampler: killed at any time, the same command goes on.

  videoreason sweep --config seeds_mini --out runs/seeds
  videoreason sweep --config seeds_mini:cases=2,seeds=2 --out runs/small
  videoreason sweep --config mini --config.tasks maze,pick --config.cases=8 --out ...
  videoreason sweep --config "mini:edits={'none':{'edit':'none'},'mine':{'edit':'noise_at',\
'mode':'add','steps':(2,4)}}" --out runs/edited
  videoreason sweep --status runs/seeds        (from another terminal)
  videoreason report runs/seeds                the page of what is done so far (likewise)

Leaves table.parquet (a row per run: scores, answers at every step, flips), results.zarr (final
latents, stills, taps), manifest.json and report.html, a page that filters cases by task, success
and flips. jax_videoreason.open_sweep(DIR) reads it, also while it is not finished.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl.flags import DEFINE_string, FlagValues

from jax_videoreason import cli

if TYPE_CHECKING:
  from ml_collections import ConfigDict


def define(flags: FlagValues) -> None:
  cli.define_config(flags, "seeds_mini")
  cli.define_out(flags, goes_on=True)
  DEFINE_string("status", None, "only say how far the sweep in this folder is", flag_values=flags)


def told(_: Sequence[str]) -> str:
  from jax_videoreason import factors

  return (
    "Edits, by names of your own, each with what it may take; steps, layers, frames and heads are\n"
    f"(from, to):\n{factors.edits_told()}"
  )


def complete(config: "ConfigDict", words: Sequence[str]) -> "ConfigDict":
  """The config with the keys of a sweep in it, where it has none."""
  common = importlib.import_module("jax_videoreason.configs.common")
  with config.unlocked():
    for key, value in common.sweep().items(preserve_field_references=True):
      if key not in config:
        config[key] = value
  return config


def main(flags: FlagValues, words: list[str]) -> None:
  if flags.status is not None:
    show(Path(flags.status))
    return
  cli.required(flags, "out")
  from jax_videoreason import distributed

  process = distributed.initialize()
  import jax

  from jax_videoreason import console, factors, gallery, product, settings

  config = cli.resolved(flags)
  own = {key: config.pop(key) for key in factors.KEYS}
  made = factors.multiply(settings.from_config(config), factors.varied(own))
  mesh = product.mesh_for(made, jax.local_devices(), jax.devices())
  if mesh is not None:
    distributed.introduce(mesh)
  share, units = product.shares(made.units, process, mesh)
  used = 1 if mesh is None else mesh.size
  there = f"{jax.device_count()} devices"
  if share[1] > 1:
    there = f"the {jax.local_device_count()} devices of each process"
  console.say(
    f"{made.units * made.width} runs in {made.units} units of {made.width}, "
    f"{factors.evaluations(made)} network evaluations, on {used} of {there}"
  )
  title = "sweep" if share[1] == 1 else f"sweep, share 1 of {share[1]}"
  product.perform(
    flags.out,
    made,
    mesh=mesh,
    command=cli.typed(),
    redo=flags.redo,
    process=process,
    meet=distributed.meet,
    progress=lambda done: console.progress(made.width * len(units), title, "run", done=done),
  )
  if console.speaks():
    page = gallery.render(flags.out)
    show(Path(flags.out))
    console.say(f"report: {page.resolve().as_uri()}")
    console.say(f"in Python: jax_videoreason.open_sweep({str(Path(flags.out).resolve())!r})")


def show(folder: Path) -> None:
  """How far a sweep is, and what went wrong."""
  from jax_videoreason import console, sweep

  found = sweep.status(folder)
  state = "finished" if found.finished else "working" if found.working else "stopped"
  said = f"{folder}: {state}, {found.done} of {found.units} units ({found.done * found.width} runs)"
  if found.seconds and found.done < found.units:
    said += f", about {duration(found.seconds)} of work left"
  console.say(said)
  for unit, damage in found.damaged.items():
    console.say(f"unit {unit}: {damage}; the same command does it again")
  if found.table:
    console.say(f"{found.table}; the same command writes it again")
  for row in found.broken:
    console.say(
      f"run {row['run']} ({row['task']} {row['split']} {row['index']}, seed {row['seed']}, edit "
      f"{row['edit']}) is not finite from step {row['broken_at']} on"
    )
  for event in found.events:
    where = "" if event["unit"] is None else f"unit {event['unit']}: "
    console.say(f"{where}{event['event']}")


def duration(seconds: float) -> str:
  """Such as "1 h 12 min"."""
  minutes = round(seconds / 60)
  if minutes < 2:
    return f"{seconds:.0f} s"
  return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
