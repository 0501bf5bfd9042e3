"""Videos that no model made, as folders like a model's: what a score is worth beside them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange, repeat

from jax_videoreason.folders import held
from jax_videoreason.records import read_json
from jax_videoreason.vbvr import videos
from jax_videoreason.vbvr.samples import Data, Sample

STATIC, CUT, FADE, TRUTH, NOISE = "static", "cut", "cross-fade", "truth", "noise"


def static(sample: Sample) -> np.ndarray:
  return repeat(sample.first(), "h w c -> t h w c", t=sample.frames)


def cut(sample: Sample) -> np.ndarray:
  """The first frame for half of the clip, then the last frame of the ground truth."""
  half = sample.frames // 2
  return np.concatenate(
    [
      repeat(sample.first(), "h w c -> t h w c", t=half),
      repeat(sample.truth()[-1], "h w c -> t h w c", t=sample.frames - half),
    ]
  )


def cross_fade(sample: Sample) -> np.ndarray:
  share = rearrange(np.linspace(0, 1, sample.frames, dtype=np.float32), "t -> t 1 1 1")
  first, last = sample.first()[None].astype(np.float32), sample.truth()[-1:].astype(np.float32)
  return np.round((1 - share) * first + share * last).astype(np.uint8)


def truth(sample: Sample) -> np.ndarray:
  """The ground truth, through the exporter that every video of ours goes through."""
  return sample.truth()


def noise(sample: Sample) -> np.ndarray:
  """Even random bytes, the same for a sample on every machine."""
  seed = int(hashlib.sha256(sample.key.encode()).hexdigest()[:8], 16)
  shape = (sample.frames, sample.height, sample.width, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


CLIPS: dict[str, tuple[Callable[[Sample], np.ndarray], str]] = {
  STATIC: (static, "the first frame, standing still"),
  CUT: (cut, "a cut from the first frame to the last frame of the ground truth"),
  FADE: (cross_fade, "a cross-fade from the first frame to the last frame of the ground truth"),
  TRUTH: (truth, "the ground truth, through our exporter"),
  NOISE: (noise, "random pixels"),
}
OF_TRUTH = (CUT, FADE, TRUTH)  # their records say of which


def check(names: Sequence[str]) -> None:
  """ValueError: an unknown name."""
  unknown = [name for name in names if name not in CLIPS]
  if unknown:
    raise ValueError(f"no clips {unknown[0]!r}; there are: {', '.join(CLIPS)}.")


def check_beside(systems: Mapping[str, Path], names: Sequence[str]) -> None:
  """ValueError: videos of somebody else have the name of clips that are scored beside them."""
  for name in names:
    if name in systems and not _is_made(systems[name], name):
      raise ValueError(
        f"a system can't be called {name!r} beside the clip of that name: rename "
        f"{systems[name]}, or leave {name} out of --beside."
      )


def _is_made(folder: Path, name: str) -> bool:
  """Whether a folder holds the clips `name` as `write` makes them."""
  asked = folder / videos.ASKED
  return asked.is_file() and read_json(asked) == {"baseline": name}


def write(
  out: Path,
  data: Data,
  names: Sequence[str],
  *,
  redo: bool = False,
  advance: Callable[[int], Any] = lambda count: None,
) -> list[Path]:
  """Writes out/NAME/SPLIT/TASK/00000.mp4 for each of `names`; videos that are there stay.

  Those of another version of their sample are made again; commands that write the same clips take
  turns.
  advance: told of every video. Raises ValueError for an unknown name, or a folder that holds
  something else.
  """
  check(names)
  folders = []
  for name in names:
    folder = out / name
    with held(folder, needed=False, wait=True):
      videos.begin(folder, {"baseline": name}, redo=redo)
      for sample in data.samples:
        record = videos.written(folder, sample)
        made_of = {"truth": sample.truth_mark} if name in OF_TRUTH else {}
        if record is None or record != {**record, "mark": sample.mark, **made_of}:
          videos.put(folder, sample, CLIPS[name][0](sample), **made_of)
        advance(1)
    folders.append(folder)
  return folders
