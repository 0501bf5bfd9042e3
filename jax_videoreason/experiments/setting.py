"""From settings to what experiments share: bundle, encoder, reader, cases."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from jax_videoreason import checkpoint, conditioning, prepare, runs, tasks
from jax_videoreason.decode import decode, preview
from jax_videoreason.experiments.context import Chunks, Setting, Tally, assemble
from jax_videoreason.folders import checksum
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Conditioning
from jax_videoreason.tasks import Case, Task

AGREEMENT = 0.98  # of the answers that the preview and the VAE give
LOOKED_AT = 5  # steps on which they are compared


def load(chosen: SampleSettings, mesh: Mesh | None = None) -> Setting:
  """The setting of these settings; the DiT lies on the mesh, None = on one device."""
  check(chosen)
  bundle = checkpoint.load(chosen.checkpoint, parts=("vae", "preview"))
  bundle = prepare.with_experts(chosen, bundle, mesh)
  return Setting(
    bundle=bundle,
    chosen=chosen,
    encode=functools.partial(encode, mesh=mesh),
    decode=functools.partial(decode, bundle, tiles=chosen.tiles),
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

  Odd indices are ambiguous cases, where the task has them.
  """
  found = []
  for name in names:
    task = load_task(name, chosen)
    own = "heldout" if task.held_out else split
    found += [task.generate(own, index) for index in range(count)]
  return found


def with_reader(setting: Setting, cases: Sequence[Case]) -> tuple[Setting, float | None]:
  """The setting with the quickest honest decoder, and how often the preview agrees with the VAE.

  Answers are read from the preview where it agrees with the VAE in at least `AGREEMENT` of
  the steps looked at, else from the VAE. None = the model has no preview.
  """
  if setting.bundle.parts.preview is None:
    return setting, None
  asked = list(cases) * len(setting.chosen.seeds)
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
  agreement = float((said[0] == said[1]).mean())
  return (quick if agreement >= AGREEMENT else setting), agreement


def fingerprint(chosen: SampleSettings) -> str:
  """Tells the weights of one bundle from those of another: all leaves of all parts count."""
  return checksum(checkpoint.find(chosen.checkpoint) / checkpoint.DESCRIPTION)
