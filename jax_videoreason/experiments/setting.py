"""From settings to what experiments share: bundle, encoder, reader, cases."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from jax_videoreason import answers, checkpoint, conditioning, evaluate, prepare, runs
from jax_videoreason.axes import spread
from jax_videoreason.decode import decode_each, preview_each
from jax_videoreason.experiments.context import Chunks, Setting, Tally, assemble
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import Conditioning, ModelBundle
from jax_videoreason.tasks import Case

AGREEMENT = 0.98  # of the answers that the preview and the VAE give
CASES, LOOKED_AT = 8, 5  # cases and steps on which they are compared


def load(
  chosen: SampleSettings, mesh: Mesh | None = None, groups: Iterable[Sequence[Case]] = ()
) -> Setting:
  """The setting of these settings; the DiT lies on the mesh, None = on one device.

  groups: the cases of runs that will ride together. Each group is encoded on its own, so that its
  bits depend on no other, and kept in host memory: the text encoder, which is let go before the DiT
  is loaded, is then needed no more.
  """
  evaluate.check(chosen)
  asked = {}
  for group in groups:
    distinct = {name_of(case): case for case in group}
    asked[tuple(distinct)] = questions([*distinct.values()])
  bundle, encoded = prepare.encode(chosen, [*asked.values()], mesh=mesh)
  return Setting(
    bundle=bundle,
    chosen=chosen,
    encode=functools.partial(
      encoded_before, bundle, chosen, dict(zip(asked, encoded, strict=True)), mesh
    ),
    decode=functools.partial(decode_each, bundle, tiles=chosen.tiles, mesh=mesh),
    load_task=evaluate.load_task,
    mesh=mesh,
  )


def check_cases(names: Sequence[str], count: int) -> None:
  """ValueError where no task is asked, or one twice, or less than one case of each."""
  if not names or len(set(names)) < len(names):
    raise ValueError(f"tasks={tuple(names)!r}, wanted at least one, and none twice.")
  if count < 1:
    raise ValueError(f"cases={count}, wanted at least 1.")


def name_of(case: Case) -> str:
  """Equal for cases that are encoded alike: those of one prompt and one picture."""
  picture = hashlib.sha256(np.ascontiguousarray(case.first_frame).tobytes())
  return f"{picture.hexdigest()} {case.first_frame.shape} {case.prompt}"


def questions(cases: Sequence[Case]) -> tuple[list[str], np.ndarray]:
  """What is encoded: prompts and first frames."""
  return [case.prompt for case in cases], np.stack([case.first_frame for case in cases])


def encoded_before(
  bundle: ModelBundle,
  before: SampleSettings,
  encoded: Mapping[tuple[str, ...], Conditioning],
  mesh: Mesh | None,
  chosen: SampleSettings,
  cases: Sequence[Case],
) -> Conditioning:
  """The conditioning of one run per case, from what `load` encoded under the settings `before`.

  encoded: by the names of a group. Where the video has another length, the VAE, which stays
  loaded, encodes the first frames anew. For other cases, or another negative prompt, all encoders
  are loaded again, beside the DiT.
  """
  distinct = {name_of(case): case for case in cases}
  cond = encoded.get(tuple(distinct))
  if cond is None or said_of(chosen) != said_of(before):
    return encode(chosen, cases, mesh)
  if (chosen.frames, chosen.tiles) != (before.frames, before.tiles):
    _, first_frames = questions([*distinct.values()])
    cond = conditioning.reframed(
      bundle, cond, first_frames, frames=chosen.frames, tiles=chosen.tiles
    )
  row = {name: number for number, name in enumerate(distinct)}
  return runs.take(cond, np.array([row[name_of(case)] for case in cases]))


def said_of(chosen: SampleSettings) -> tuple[str, bool]:
  """What settings say of the text beside the prompts."""
  return chosen.negative_prompt, chosen.guided


def encode(chosen: SampleSettings, cases: Sequence[Case], mesh: Mesh | None = None) -> Conditioning:
  """The conditioning of one run per case; the encoders are loaded for it and let go."""
  return conditioning.encode(
    checkpoint.load(chosen.checkpoint, parts=("text", "clip", "vae"), mesh=mesh),
    *questions(cases),
    frames=chosen.frames,
    negative_prompt=chosen.negative_prompt,
    guided=chosen.guided,
    tiles=chosen.tiles,
  )


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
    task = evaluate.load_task(name, chosen)
    found += evaluate.cases_of(task, "heldout" if task.held_out else split, count, "both")
  return found


def compared(cases: Sequence[Case]) -> list[Case]:
  """The cases on which `with_reader` compares the preview with the VAE."""
  return [cases[number] for number in spread(len(cases), CASES)]


def with_reader(setting: Setting, cases: Sequence[Case]) -> tuple[Setting, float | None]:
  """The setting with the quickest honest decoder, and how often the preview agrees with the VAE.

  Answers are read from the preview where it agrees with the VAE in at least `AGREEMENT` of what one
  of them can read, over `CASES` of the cases, else from the VAE. None = the model has no preview,
  or nothing can be read.
  """
  if setting.bundle.parts.preview is None:
    return setting, None
  asked = [case for case in compared(cases) for _ in setting.chosen.seeds]
  seats = 1 if setting.mesh is None else setting.mesh.shape["seed"]
  filled = asked + [asked[-1]] * (-len(asked) % seats)
  ctx = assemble(setting, filled, {"case": np.arange(len(filled))}, tally=Tally(), chunks=Chunks())
  _, trace = ctx.denoise()
  assert trace.x0 is not None
  rows = spread(ctx.sizes.S, LOOKED_AT)
  quick = dataclasses.replace(setting, decode=functools.partial(preview_each, setting.bundle))
  said = [
    dataclasses.replace(ctx, setting=s).read(np.asarray(trace.x0)[rows]).answer[:, : len(asked)]
    for s in (setting, quick)
  ]
  seen = answers.readable(said[0]) | answers.readable(said[1])
  if not seen.any():
    return setting, None
  agreement = float((said[0] == said[1])[seen].mean())
  return (quick if agreement >= AGREEMENT else setting), agreement
