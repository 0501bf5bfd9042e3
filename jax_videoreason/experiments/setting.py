"""From settings to what experiments share: bundle, encoder, reader, cases."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from jax_videoreason import answers, checkpoint, conditioning, evaluate, prepare, runs, tasks
from jax_videoreason.decode import decode, preview
from jax_videoreason.experiments.context import Chunks, Setting, Tally, assemble
from jax_videoreason.folders import checksum
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Conditioning
from jax_videoreason.tasks import Case, Task

AGREEMENT = 0.98  # of the answers that the preview and the VAE give
CASES, LOOKED_AT = 8, 5  # cases and steps on which they are compared


def load(chosen: SampleSettings, mesh: Mesh | None = None) -> Setting:
  """The setting of these settings; the DiT lies on the mesh, None = on one device."""
  check(chosen)
  bundle = checkpoint.load(chosen.checkpoint, parts=("vae", "preview"))
  bundle = prepare.with_experts(chosen, bundle, mesh)
  return Setting(
    bundle=bundle,
    chosen=chosen,
    encode=functools.partial(encode, mesh=mesh),
    decode=functools.partial(decode, bundle, tiles=chosen.tiles, mesh=mesh),
    load_task=load_task,
    mesh=mesh,
  )


def check(chosen: SampleSettings) -> None:
  """ValueError where no case has the size of the settings, or seeds are those of other cases."""
  runs.check_seeds(chosen.seeds)
  if chosen.height != chosen.width:
    raise ValueError(
      f"cases are square and the config says {chosen.width} x {chosen.height}: give "
      "--config.height and --config.width the same number."
    )


def check_cases(names: Sequence[str], count: int) -> None:
  """ValueError where no task is asked, or one twice, or less than one case of each."""
  if not names or len(set(names)) < len(names):
    raise ValueError(f"tasks={tuple(names)!r}, wanted at least one, and none twice.")
  if count < 1:
    raise ValueError(f"cases={count}, wanted at least 1.")


def encode(chosen: SampleSettings, cases: Sequence[Case], mesh: Mesh | None = None) -> Conditioning:
  """The conditioning of one run per case; the encoders are loaded for it and let go."""
  return conditioning.encode(
    checkpoint.load(chosen.checkpoint, parts=("text", "clip", "vae"), mesh=mesh),
    [case.prompt for case in cases],
    np.stack([case.first_frame for case in cases]),
    frames=chosen.frames,
    negative_prompt=chosen.negative_prompt,
    guided=chosen.guided,
    tiles=chosen.tiles,
  )


def load_task(name: str, chosen: SampleSettings) -> Task:
  """The task at the size of the settings."""
  return tasks.load(name, size=chosen.height, frames=chosen.frames)


def pick_cases(
  chosen: SampleSettings, names: Sequence[str], count: int, split: str = "id"
) -> list[Case]:
  """`count` cases of every task, task by task; a task that is held out has its own split.

  Every other one is ambiguous, where the task has such; none has picture and prompt of another.
  ValueError: as `check_cases` says; a split has not so many cases.
  """
  check_cases(names, count)
  found = []
  for name in names:
    task = load_task(name, chosen)
    found += evaluate.cases_of(task, "heldout" if task.held_out else split, count, "both")
  return found


def with_reader(setting: Setting, cases: Sequence[Case]) -> tuple[Setting, float | None]:
  """The setting with the quickest honest decoder, and how often the preview agrees with the VAE.

  Answers are read from the preview where it agrees with the VAE in at least `AGREEMENT` of what one
  of them can read, over `CASES` of the cases, else from the VAE. None = the model has no preview,
  or nothing can be read.
  """
  if setting.bundle.parts.preview is None:
    return setting, None
  some = np.linspace(0, len(cases) - 1, min(CASES, len(cases))).round().astype(int)
  asked = [cases[number] for number in some for _ in setting.chosen.seeds]
  seats = 1 if setting.mesh is None else setting.mesh.shape["seed"]
  filled = asked + [asked[-1]] * (-len(asked) % seats)
  ctx = assemble(setting, filled, {"case": np.arange(len(filled))}, tally=Tally(), chunks=Chunks())
  _, trace = ctx.denoise()
  assert trace.x0 is not None
  rows = np.unique(np.linspace(0, ctx.sizes.S - 1, LOOKED_AT).round().astype(int))
  quick = dataclasses.replace(setting, decode=functools.partial(preview, setting.bundle))
  said = [
    dataclasses.replace(ctx, setting=s).read(np.asarray(trace.x0)[rows]).answer[:, : len(asked)]
    for s in (setting, quick)
  ]
  seen = answers.readable(said[0]) | answers.readable(said[1])
  if not seen.any():
    return setting, None
  agreement = float((said[0] == said[1])[seen].mean())
  return (quick if agreement >= AGREEMENT else setting), agreement


def fingerprint(chosen: SampleSettings) -> str:
  """Tells the weights of one bundle from those of another: all leaves of all parts count."""
  return checksum(checkpoint.find(chosen.checkpoint) / checkpoint.DESCRIPTION)
