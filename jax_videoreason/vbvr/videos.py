"""The folder of a model: a video per sample, a record beside each, and the settings all share.

generation.json            what was asked; a call that asks otherwise is refused
SPLIT/TASK/00000.mp4       where the EvalKit looks: 16 fps, H.264, yuv420p, of the size and the
                           frame count of the ground truth
records/SPLIT/TASK/00000.json   written last: the sample's mark, sha256 of the video, and more
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import reduce

from jax_videoreason import media, records
from jax_videoreason.folders import MANIFEST, disk
from jax_videoreason.records import checksum, mapping_of, plain, write_json
from jax_videoreason.vbvr import layout, suite
from jax_videoreason.vbvr.samples import Sample

ASKED = "generation.json"
RECORDS, STEPS, MAPS = "records", "steps", "feature_maps"
MADE_BY = ("command", "written", "device", "versions", "revision")  # keys of a manifest
CLIPS, PROBLEMS = "clips", "problems"  # what lies beside the scores of systems


def begin(folder: Path, asked: Mapping[str, Any], *, redo: bool) -> None:
  """Makes the folder of a model ready, as `records.begin` does."""
  owned = (ASKED, RECORDS, STEPS, MAPS, MANIFEST, *suite.SPLITS, *suite.OWN_SPLITS)
  records.begin(folder, ASKED, asked, owned=owned, what="set of videos", redo=redo)


def made_by(folder: Path) -> dict[str, Any] | None:
  """Command, date, device, versions and revision of the call that last made a video of a folder.

  None where nobody knows: it is not finished, not by `vbvr generate`, or its manifest is damaged.
  """
  found = mapping_of(folder / MANIFEST, *MADE_BY) if (folder / ASKED).is_file() else None
  return None if found is None else {key: found[key] for key in MADE_BY}


def place(folder: Path, sample: Sample) -> Path:
  """Where the video of a sample lies."""
  return folder / f"{sample.key}.mp4"


def record_place(folder: Path, sample: Sample) -> Path:
  """Where the record of a video lies."""
  return folder / RECORDS / f"{sample.key}.json"


def written(folder: Path, sample: Sample) -> dict[str, Any] | None:
  """The record of a finished video, perhaps of another version of the sample; None where there is
  none, it can't be read, or the video is gone."""
  if not place(folder, sample).is_file():
    return None
  return mapping_of(record_place(folder, sample), "mark", "sha256")


def record_of(folder: Path, sample: Sample) -> dict[str, Any] | None:
  """`written`; raises ValueError for a video of another version of the sample (`fits`)."""
  record = written(folder, sample)
  if record is not None and not fits(record, sample):
    raise ValueError(
      f"{place(folder, sample)} was made for another {sample.key} than the one in "
      f"{sample.folder}: give the --data it was made from, or give --redo to the command that made "
      "it."
    )
  return record


def fits(record: Mapping[str, Any], sample: Sample) -> bool:
  """Whether a video was made for what the sample asks and, if of its ground truth, of this one."""
  truth = record.get("truth", sample.truth_mark)
  return record.get("mark") == sample.mark and truth == sample.truth_mark


def put(folder: Path, sample: Sample, frames: np.ndarray, **record: Any) -> None:
  """Writes the video of a sample, frames uint8 (F height width 3), and then its record."""
  path, record_path = place(folder, sample), record_place(folder, sample)
  with disk(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    record_path.parent.mkdir(parents=True, exist_ok=True)
  media.write_mp4(path, exported(frames, sample), fps=layout.FPS)
  said = {"mark": sample.mark, "sha256": checksum(path), **record}
  write_json(record_path, plain(said))


def exported(frames: np.ndarray, sample: Sample) -> np.ndarray:
  """A clip, uint8 (frames height width 3), at the size and frame count of the ground truth."""
  return fitted(frames, sample.frames, sample.height, sample.width)


def fitted(frames: np.ndarray, count: int, height: int, width: int) -> np.ndarray:
  """A clip at another frame count and size: evenly in time, first and last frame stay; nearest."""
  chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
  if chosen.shape[1:3] == (height, width):
    return chosen
  return np.stack([media.resize(frame, height, width, "nearest") for frame in chosen])


def read(folder: Path, sample: Sample) -> np.ndarray:
  """The video of a sample, uint8 (F height width 3), at the size of the ground truth.

  `media.write_mp4` enlarges small and odd sizes by a whole factor, which is taken back.
  Raises ValueError for a video of another size or frame count, or one that does not decode.
  """
  path = place(folder, sample)
  frames = media.read_mp4(path)[0]
  factor = media.mp4_scale(sample.height, sample.width)
  sizes = {(sample.height, sample.width), (factor * sample.height, factor * sample.width)}
  if frames.shape[1:3] not in sizes or len(frames) != sample.frames:
    raise ValueError(
      f"{path} has {len(frames)} frames of {frames.shape[2]} x {frames.shape[1]} pixels, wanted "
      f"{sample.frames} of {sample.width} x {sample.height}: make it again."
    )
  k = frames.shape[1] // sample.height
  if k == 1:
    return frames
  mean = reduce(frames.astype(np.float32), "t (h y) (w x) c -> t h w c", "mean", y=k, x=k)
  return mean.round().astype(np.uint8)
