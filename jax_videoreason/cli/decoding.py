"""Decoding the run in a folder: its frames, its videos and what x0 answers at every step shown.

What `sample`, `demo` and `report` share: a run that was denoised is made whole here, at once or
later.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jax_videoreason import (
  answers,
  arrays,
  branching,
  bundles,
  checkpoint,
  cli,
  console,
  settings,
  store,
  tasks,
)
from jax_videoreason.decode import decode
from jax_videoreason.models import FAMILIES
from jax_videoreason.structs import AnswerTrace, Card, ModelBundle


def decode_run(
  out: str | Path,
  bundle: ModelBundle | None = None,
  *,
  weights: str | None = None,
  tiles: str | None = None,
  mesh: Mesh | None = None,
) -> AnswerTrace | None:
  """Decodes what is outstanding of the run in `out`; returns its answers. One process does.

  bundle: what made the run, with its VAE; None = it is loaded. weights: name or folder of a bundle,
  instead of the one that the run names. tiles, mesh: as `decode` takes them, tiles=None = those of
  the config.
  Returns None where no run is a case of a task, and on all processes but the first.

  Raises:
    ValueError: other weights than made the run and none named, a task that is not found, or it
      could not be decoded; what was denoised stays.
  """
  if not console.speaks():
    return None
  run = store.open_run(out)
  shown = run.undecoded
  if shown is None:
    return run.answers
  config = run.manifest["config"] | ({} if weights is None else {"checkpoint": weights})
  chosen = settings.from_config(config)
  used = chosen.tiles if tiles is None else tiles
  for name in {entry["task"] for entry in run.runs if entry.get("task")}:
    tasks.find(name)  # now, and not when all is decoded
  again_later = bundle is None
  if bundle is None:
    branching.check_weights(run, chosen.checkpoint, named=weights is not None)
    bundle = checkpoint.load(chosen.checkpoint, parts=("vae",))
  show = functools.partial(decode, bundle, tiles=used, mesh=mesh)
  more = {} if tiles is None else {"decoded_in": tiles}
  if weights is not None:
    made_by = bundles.fingerprint(chosen.checkpoint)
    more |= {"decoded_by": bundle.card.name, "decoded_by_weights": made_by}
  try:
    with store.decoding(run, check=again_later, **more) as folder:
      return write_decoded(folder, run, shown, show, bundle.card)
  except (ValueError, OSError, MemoryError, RuntimeError) as error:
    again = f"videoreason report {out}"
    if cli.out_of_memory(error):
      raise ValueError(
        f"out of memory while decoding, what was denoised stays in {out}: `{again}` goes on where "
        "there is more."
        if used
        else f"out of memory while decoding, what was denoised stays in {out}: `{again} "
        "--tiles=diffusers` goes on in tiles, as a new run does with --config.tiles=diffusers."
      ) from error
    if isinstance(error, RuntimeError):
      raise
    raise ValueError(
      f"the run could not be decoded ({error}), what was denoised stays in {out}: when that is "
      f"mended, `{again}` goes on."
    ) from error


def write_decoded(
  folder: Path,
  run: store.Run,
  shown: Sequence[int],
  show: Callable[[np.ndarray], np.ndarray],
  card: Card,
) -> AnswerTrace | None:
  """Writes frames, videos and answers of a run, one step in memory; returns the answers.

  show: latents R F H W C -> R frames height width 3 uint8.
  """
  assert run.x0 is not None
  with console.progress(len(shown) + 1, "decode", "step") as advance:
    with store.create_trace(folder, steps=len(run.sigma), runs=len(run.runs)) as writer:
      for row, step in enumerate(shown):
        writer.write_frames(show(run.x0[step]), at_row=row, steps=shown)
        advance(1)
    videos = show(run.final_latents)
    store.write_videos(folder, videos, fps=FAMILIES[card.family].fps(card.latents))
    advance(1)
  frames = arrays.open_group(folder / "trace.zarr")["frames"]
  said = read_answers(run.runs, frames, run.sigma[shown], shown)
  if said is not None:
    store.write_answers(folder, said)
  return said


def read_answers(
  of_run: Sequence[Mapping[str, Any]],
  frames: arrays.StoredArray,
  sigma: np.ndarray,
  steps: Sequence[int],
) -> AnswerTrace | None:
  """What x0 answers at the steps shown, for the runs that are cases of a task.

  of_run: their entries in runs.json (`sample.describe`).
  """
  names = [run.get("task") for run in of_run]
  if not any(names):
    return None
  size, count = frames.shape[-2], frames.shape[2]
  return answers.read_steps(
    [None if name is None else tasks.load(name, size=size, frames=count) for name in names],
    [run.get("metadata") for run in of_run],
    frames,
    sigma,
    steps,
  )
