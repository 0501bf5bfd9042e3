"""From videos to scores: every sample by its scorer, resumable, nothing missing, no error hidden.

    OUT/SYSTEM/result.json            all samples with their scores, and how they came about
    OUT/SYSTEM/samples/SPLIT/TASK/00000.json   a finished sample: a second call keeps it
    OUT/SYSTEM/pictures/SPLIT/TASK/00000.png   some frames of its video, small
    OUT/SYSTEM/manifest.json          written last, with checksums
    OUT/problems/SPLIT/TASK/00000.png          the same of the ground truth; .json: of which

Samples of VBVR-Bench are scored by the official EvalKit, cases of our own tasks by their task.
"""

import concurrent.futures
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from jax_videoreason import media, store, tasks
from jax_videoreason.folders import MANIFEST, disk, held, refuse_other, remove
from jax_videoreason.records import (
  checksum,
  mapping_of,
  plain,
  read_mapping,
  sealed,
  vouched,
  write_json,
)
from jax_videoreason.vbvr import evalkit, suite, videos
from jax_videoreason.vbvr.evalkit import EvalKit
from jax_videoreason.vbvr.published import COLUMNS
from jax_videoreason.vbvr.samples import NUMBER, Data, Sample, listing, refuse
from jax_videoreason.vbvr.videos import CLIPS, PROBLEMS
from jax_videoreason.version import __version__

RESULT, SAMPLES, PICTURES = "result.json", "samples", "pictures"
FORMAT = 2  # of a result: raised where one of before must not stand beside one of now
SHOWN = 5  # frames of a picture
CELL = 72  # pixels of the shorter side of each
GAP = 3  # pixels between them

Advance = Callable[[int], Any]


def systems_of(folder: str | Path) -> dict[str, Path]:
  """name -> folder of videos: the folder itself, or each of those inside it.

  Raises ValueError where there are none.
  """
  folder = Path(folder)
  if not folder.is_dir():
    raise ValueError(f"there is no folder {folder}: give the --out of `vbvr generate`.")
  splits = {*suite.SPLITS, *suite.OWN_SPLITS}
  if any((folder / split).is_dir() for split in splits):
    return {folder.resolve().name: folder}
  found = {
    inner.name: inner
    for inner in sorted(folder.iterdir())
    if inner.is_dir() and any((inner / split).is_dir() for split in splits)
  }
  if not found:
    raise ValueError(
      f"{folder} holds no videos: wanted SPLIT/TASK/00000.mp4, with SPLIT one of "
      f"{', '.join((*suite.SPLITS, *suite.OWN_SPLITS))}, or folders of models with that inside."
    )
  return found


def score(
  out: str | Path,
  data: Data,
  systems: Mapping[str, Path],
  kit: EvalKit | None,
  *,
  limit: float = evalkit.LIMIT,
  workers: int = 1,
  allow_partial: bool = False,
  command: Sequence[str] = (),
  advance: Advance = lambda count: None,
) -> dict[str, dict[str, Any]]:
  """Scores the videos of each system and returns what its result.json says.

  Commands that score into one `out` take turns where they write the same.

  systems: name -> folder of videos. kit: None where there are only tasks of our own. limit: seconds
  that a sample may take. allow_partial: report what there is, with what is missing or failed.
  advance: told of every sample.

  Raises:
    ValueError: samples that the EvalKit can't score (`scorable`); videos that are missing, that the
      data does not ask for, that were made for other data or changed since; samples whose evaluator
      raised or hung; a ground truth that does not decode. OSError: `out` can't be written.
  """
  out = Path(out)
  refuse_other(out, "set of scores")
  if scorable(data) and kit is None:
    raise ValueError(
      f"{data.root} holds samples of {data.name}, which the official EvalKit scores: give its "
      "folder as --evalkit."
    )
  for name in (PROBLEMS, CLIPS):
    if name in systems:
      raise ValueError(f"a system can't be called {name!r}: rename its folder.")
  absent = {name: missing(folder, data) for name, folder in systems.items()}
  for name, folder in systems.items():
    clip = folder.parent == out / CLIPS
    check(folder, data, absent[name], allow_partial=allow_partial, allow_more=clip)
  draw_problems(out, data)
  results = {}
  for name, folder in systems.items():
    place = out / name
    with held(place, needed=False, wait=True):
      rows = _rows(place, folder, data, set(absent[name]), kit, limit, workers, advance)
      results[name] = result = summarised(name, folder, data, rows, absent[name], kit)
      failed = [row for row in rows if row["error"] is not None]
      if failed and not allow_partial:
        said = " ".join(f"{row['key']}: {row['error']}." for row in failed[:3])
        more = f" And {len(failed) - 3} more." if len(failed) > 3 else ""
        raise ValueError(
          f"{len(failed)} of {len(rows)} samples of {name} have no score. {said}{more} The others "
          "are kept: mend it and give the same command, or report the rest by --allow-partial."
        )
      with disk(place):
        remove(place / MANIFEST)  # it tells of the result before
      write_json(place / RESULT, plain(result))
      asked = {"data": data.root, "videos": folder, "limit": limit, "allow_partial": allow_partial}
      store.write_manifest(
        place, config=asked, command=command, device="cpu", model=result["model"]
      )
  return results


def read_result(folder: Path, *keys: str) -> dict[str, Any]:
  """What result.json of a system says, with some keys at least; ValueError where it is not what its
  manifest says."""
  try:
    return read_mapping(vouched(folder, RESULT), *keys)
  except ValueError as error:
    raise ValueError(
      f"{folder / RESULT} is missing or damaged: the same `videoreason vbvr score` writes it "
      "again, or copy the folder again."
    ) from error


def scorable(data: Data) -> bool:
  """Whether the data needs the EvalKit; our own scorers read cases of our own tasks.

  Raises ValueError for samples that the EvalKit can't score, or scores with 0 without a word.
  """
  official = [sample for sample in data.samples if not sample.own]
  pro = [sample.key for sample in official if sample.pro]
  if pro:
    raise ValueError(
      f"{listing(pro)}: metadata.json is there, so these samples are of VBVR-Pro-Bench, which the "
      "EvalKit would score by the rules of VBVR-Bench: give the videos to run_evaluation_video.py "
      "of Video-Reason/VBVR-Pro-Bench, or remove metadata.json if they are of VBVR-Bench."
    )
  unlisted = [sample.key for sample in official if sample.picture is not None]
  if unlisted:
    raise ValueError(
      f"{listing(unlisted)}: the EvalKit reads first_frame.png and final_frame.png from their "
      "folders, VBVR-Bench.json is not enough: download the folders too."
    )
  faults = []
  for sample in official:
    try:
      sample.final()
    except ValueError as error:
      faults.append(str(error))
  refuse(faults)
  return bool(official)


def missing(folder: Path, data: Data) -> list[str]:
  """Keys of the samples without a video."""
  return [s.key for s in data.samples if not videos.place(folder, s).is_file()]


def check(
  folder: Path,
  data: Data,
  absent: Sequence[str],
  *,
  allow_partial: bool,
  allow_more: bool = False,
) -> None:
  """Refuses a folder of videos that does not fit the data.

  allow_more: it may hold videos of other data too.
  """
  if absent and not allow_partial:
    raise ValueError(
      f"{folder} lacks {len(absent)} of {len(data.samples)} videos ({listing(absent)}): make them, "
      "or report the rest by --allow-partial."
    )
  if len(absent) == len(data.samples):
    raise ValueError(f"{folder} has none of the {len(absent)} videos that {data.root} asks for.")
  gone = set(absent)
  wanted = {f"{sample.key}.mp4" for sample in data.samples}
  extra = sorted(set(_there(folder)) - wanted)
  if extra and not (data.part or allow_partial or allow_more):
    raise ValueError(
      f"{folder} has {len(extra)} videos that {data.root} does not ask for ({listing(extra)}): "
      "give the --data they were made from, or leave them out by --allow-partial."
    )
  for sample in data.samples:
    record, path = videos.record_of(folder, sample), videos.record_place(folder, sample)
    if record is None and path.is_file() and sample.key not in gone:
      raise ValueError(f"{path} is damaged: the command that made the videos makes it again.")
    if record is not None and checksum(videos.place(folder, sample)) != record["sha256"]:
      raise ValueError(
        f"{videos.place(folder, sample)} was changed since it was made: make it again (remove it "
        "first)."
      )


def _there(folder: Path) -> Iterator[str]:
  """The videos that the EvalKit would find, as SPLIT/TASK/00000.mp4."""
  for split in (*suite.SPLITS, *suite.OWN_SPLITS):
    for path in (folder / split).glob("*/*.mp4"):
      if NUMBER.fullmatch(path.stem):
        yield path.relative_to(folder).as_posix()


def _rows(
  out: Path,
  folder: Path,
  data: Data,
  absent: set[str],
  kit: EvalKit | None,
  limit: float,
  workers: int,
  advance: Advance,
) -> list[dict[str, Any]]:
  """A row per sample that has a video; those scored before come from their files."""
  code = tasks.sources(names_of(data))

  def one(sample: Sample) -> dict[str, Any]:
    video = videos.place(folder, sample)
    scorer = f"jax_videoreason {__version__}, scoring {tasks.SCORING}"
    if sample.task in code:
      scorer += f", {code[sample.task]['module']} {code[sample.task]['sha256']}"
    elif kit is not None and not sample.own:
      scorer = kit.digest
    key = {"sha256": checksum(video), **_marks(sample), "scorer": scorer}
    path = out / SAMPLES / f"{sample.key}.json"
    before = mapping_of(path, "of", "row")
    row = None if before is None or before["of"] != key else before["row"]
    if isinstance(row, dict) and row.get("error", ...) is None:
      return row
    record = videos.record_of(folder, sample)
    try:
      _write_picture(out / PICTURES / f"{sample.key}.png", media.read_mp4(video)[0])
      if kit is not None and not sample.own and record is None:  # ours are H.264 with a checksum
        evalkit.check_frames(kit, video, limit)
    except ValueError as error:
      found = _failed(error)
    else:
      found = _score(sample, folder, data, kit, limit)
    row = {**_of_sample(sample), **found}
    row["broken"] = record is not None and record.get("finite") is False
    with disk(path):
      path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, sealed({"of": key, "row": row}))
    return row

  chosen = [sample for sample in data.samples if sample.key not in absent]
  rows = []
  with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
    futures = [pool.submit(one, sample) for sample in chosen]
    try:
      for future in futures:
        rows.append(future.result())
        advance(1)
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  advance(len(absent))
  return rows


def names_of(data: Data) -> list[str]:
  """The tasks that our own scorers read, each once."""
  return sorted({sample.task for sample in data.samples if sample.own})


def _of_sample(sample: Sample) -> dict[str, Any]:
  return {
    "key": sample.key,
    "split": sample.split,
    "domain": suite.domain(sample.split),
    "task": sample.task,
    "index": sample.index,
    "faculty": suite.faculty(sample.task),
    "prompt": sample.prompt,
  }


def _score(
  sample: Sample, folder: Path, data: Data, kit: EvalKit | None, limit: float
) -> dict[str, Any]:
  if sample.own or kit is None:
    return own_score(sample, folder)
  found = evalkit.score(kit, data.root, sample, videos.place(folder, sample), limit)
  faculty = found.pop("faculty")
  return {**found, "faculty": faculty} if faculty in suite.FACULTIES else found


def own_score(sample: Sample, folder: Path) -> dict[str, Any]:
  """Score, strict success and answer of a case of ours, by its task."""
  task = tasks.load(sample.task, size=sample.height, frames=sample.frames)
  metadata = dict(sample.metadata)
  try:
    frames = videos.read(folder, sample)
  except ValueError as error:
    return _failed(error)
  found, answer = task.judge(frames, metadata)
  return {
    "score": found.value,
    "error": None,
    "seconds": 0.0,
    "strict": found.strict,
    "answer": None if answer is None else str(answer),
    "right": answer in metadata["answers"],
  }


def _marks(sample: Sample) -> dict[str, str]:
  return {"mark": sample.mark, "truth": sample.truth_mark}


def _failed(error: ValueError) -> dict[str, Any]:
  return {"score": None, "error": str(error).rstrip("."), "seconds": 0.0}


def draw_problems(out: Path, data: Data) -> None:
  """Small pictures of every ground truth, which is decoded for it: a damaged one is found here.

  A picture of another version of its sample is drawn again; its marks lie beside it.
  """
  with held(out / PROBLEMS, needed=False, wait=True):
    for sample in data.samples:
      path = out / PROBLEMS / f"{sample.key}.png"
      marks = path.with_suffix(".json")
      if not (path.is_file() and mapping_of(marks) == _marks(sample)):
        _write_picture(path, sample.truth())
        write_json(marks, _marks(sample))


def _write_picture(path: Path, frames: np.ndarray) -> None:
  with disk(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  media.write_png(path, strip(frames))


def strip(frames: np.ndarray) -> np.ndarray:
  """Some frames of a clip side by side, small: height width 3."""
  chosen = frames[np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)]
  height, width = frames.shape[1:3]
  scale = CELL / min(height, width)
  size = (round(height * scale), round(width * scale))
  method = "nearest" if scale >= 1 else "lanczos"
  small = np.stack([media.resize(frame, *size, method) for frame in chosen])
  spaced = np.pad(small, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255)
  return rearrange(spaced, "t h w c -> h (t w) c")[:, :-GAP]


def summarised(
  name: str,
  folder: Path,
  data: Data,
  rows: Sequence[Mapping[str, Any]],
  absent: Sequence[str],
  kit: EvalKit | None,
) -> dict[str, Any]:
  """result.json: the numbers, and all that is needed to judge them."""
  asked = read_mapping(folder / videos.ASKED) if (folder / videos.ASKED).is_file() else {}
  good = [row for row in rows if row["error"] is None]
  return {
    "format": FORMAT,
    "name": name,
    "model": asked.get("model", name),
    "seed": asked.get("seed"),
    "baseline": asked.get("baseline"),
    "deviations": asked.get("deviations"),
    "settings": asked,
    "made": videos.made_by(folder),
    "benchmark": data.name,
    "data": data.truth_mark,
    "tasks": len({sample.task for sample in data.samples}),
    "whole": data.whole and len(good) == len(data.samples),
    "expected": len(data.samples),
    "missing": list(absent),
    "errors": [{"key": row["key"], "error": row["error"]} for row in rows if row["error"]],
    "broken": [row["key"] for row in good if row["broken"]],
    "evalkit": None if kit is None or all(s.own for s in data.samples) else kit.said,
    "version": __version__,
    "scoring": tasks.SCORING if names_of(data) else None,
    "task_sources": tasks.sources(names_of(data)) or None,
    "summary": summary(good),
    "samples": list(rows),
  }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """Column -> mean over samples (as the EvalKit has it, not over tasks) and how many; empty ones
  are left out."""
  found = {}
  for column in COLUMNS:
    scores = [row["score"] for row in rows if in_column(row, column)]
    if scores:
      found[column] = {"score": float(np.mean(scores)), "samples": len(scores)}
  return found


def in_column(row: Mapping[str, Any], column: str) -> bool:
  """Whether a sample counts in a column of `published.COLUMNS`."""
  domain, _, faculty = column.partition(" ")
  return column == "overall" or (row["domain"] == domain and faculty in ("", row["faculty"]))
