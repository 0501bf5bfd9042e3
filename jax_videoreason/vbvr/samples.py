"""What a benchmark folder asks: its samples, checked before anything is paid for.

Read are the folders SPLIT/TASK/00000/ of VBVR-Bench and VBVR-Pro-Bench (which adds metadata.json),
the file VBVR-Bench.json with prompts and first frames inside, and TASK/00000/ of `tasks export`.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jax_videoreason import media, tasks
from jax_videoreason.records import checksum, digest
from jax_videoreason.settings import nearest
from jax_videoreason.vbvr import layout, suite

INDEX = "VBVR-Bench.json"
NUMBER = re.compile(r"\d{5}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
BENCH, PRO, OWN, MIXED = "VBVR-Bench", "VBVR-Pro-Bench", "own tasks", "several benchmarks"
NAMED = 6  # names that one sentence lists


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
  """One question of a benchmark; its pictures are read when asked for.

  split: its folder, or the split of an own task. height, width: of first_frame. frames: of the
  ground truth, F pixel frames. folder: where its files lie. picture: first_frame of the JSON form,
  None = a file of `folder`. mark: sha256 of what is asked. truth_mark: of what answers are compared
  with: ground_truth.mp4 and final_frame.png, for an own task its symbols.
  """

  split: str
  task: str
  index: int
  prompt: str
  height: int
  width: int
  frames: int
  folder: Path
  metadata: Mapping[str, Any]
  picture: bytes | None
  mark: str
  truth_mark: str

  @property
  def key(self) -> str:
    """SPLIT/TASK/00000: the place of its video below the folder of a model, without .mp4."""
    return f"{self.split}/{self.task}/{self.index:05d}"

  @property
  def own(self) -> bool:
    """Whether it is a case of a task of ours, which our scorers read."""
    return layout.is_case(self.metadata)

  @property
  def pro(self) -> bool:
    """Whether it is of VBVR-Pro-Bench, whose scorer needs metadata.json."""
    return bool(self.metadata) and not self.own

  def first(self) -> np.ndarray:
    """first_frame, uint8 height width 3."""
    path = self.folder / "first_frame.png"
    return media.read_image(path) if self.picture is None else media.image_of(self.picture, path)

  def final(self) -> np.ndarray:
    """final_frame, uint8 height width 3, with which the EvalKit compares.

    Raises ValueError where it is missing, does not decode, or has another size than first_frame.
    """
    path = self.folder / "final_frame.png"
    if not path.is_file():
      raise ValueError(f"{self.folder} lacks final_frame.png: download it again.")
    image = media.read_image(path)
    if image.shape[:2] != (self.height, self.width):
      raise ValueError(
        f"{path} is {image.shape[1]} x {image.shape[0]} pixels and first_frame.png {self.width} x "
        f"{self.height}, wanted one size: download it again."
      )
    return image

  def truth(self) -> np.ndarray:
    """The ground truth, uint8 F height width 3; exact for an own task.

    Raises ValueError where it does not decode, or has another size than first_frame.
    """
    if self.own:
      return layout.read_case(self.folder).frames
    path = self.folder / "ground_truth.mp4"
    frames = media.read_mp4(path)[0]
    wanted = (self.frames, self.height, self.width)
    if frames.shape[:3] != wanted:
      raise ValueError(
        f"{path} decodes to frames height width {frames.shape[:3]}, wanted {wanted} as its header "
        "and first_frame.png say: download the sample again."
      )
    return frames


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data:
  """A benchmark folder, or the part of it that was chosen.

  name: BENCH, PRO, OWN or MIXED. absent: official task folders of the chosen splits that are not
  there. whole: all samples of all 100 tasks. part: only some were asked for. samples: in the order
  of their keys.
  """

  root: Path
  name: str
  samples: tuple[Sample, ...]
  absent: tuple[str, ...]
  whole: bool
  part: bool

  @property
  def mark(self) -> str:
    """sha256 over what all samples ask."""
    text = "\n".join(f"{sample.key} {sample.mark}" for sample in self.samples)
    return hashlib.sha256(text.encode()).hexdigest()

  @property
  def truth_mark(self) -> str:
    """sha256 over what all samples ask and what answers are compared with."""
    return digest([[sample.key, sample.mark, sample.truth_mark] for sample in self.samples])


def load(
  root: str | Path,
  *,
  splits: Sequence[str] = (),
  names: Sequence[str] = (),
  cases: int | None = None,
) -> Data:
  """The samples of a benchmark folder.

  splits, names: those asked for, none = all; a split may be said as in-domain or out-of-domain, a
  task by its number (O-39) or without `_data-generator`. cases: samples of each task at most.

  Raises:
    ValueError: all faults of all chosen samples in one sentence each: files that are missing or
      damaged, prompts that are empty or not UTF-8, names or links that lead out of the folder, task
      folders that the benchmark does not have, splits and tasks that are not there.
  """
  root = Path(root)
  if not root.is_dir():
    raise ValueError(f"there is no folder {root}: give the folder of the benchmark as --data.")
  places = {**_folders(root), **_listed(root)}
  if not places:
    raise ValueError(
      f"{root} holds no sample: wanted SPLIT/TASK/00000/ or TASK/00000/ with prompt.txt and "
      f"first_frame.png, or {INDEX}."
    )
  chosen = _choose(places, splits, names)
  samples, faults = [], []
  counts: dict[tuple[str, str], int] = {}
  for place in sorted(chosen):
    task = place[:2]
    counts[task] = counts.get(task, 0) + 1
    if cases is not None and counts[task] > cases:
      continue
    try:
      samples.append(_sample(root, place, chosen[place]))
    except ValueError as error:
      faults.append(str(error))
  faults = list(dict.fromkeys(faults)) + _strangers(samples)  # a task that is not found, once
  refuse(faults)
  samples.sort(key=lambda sample: sample.key)
  keys = [sample.key for sample in samples]
  if len(set(keys)) < len(keys):
    twice = sorted({key for key in keys if keys.count(key) > 1})
    raise ValueError(f"{root} has {listing(twice)} twice: export each split into its own folder.")
  return _data(root, samples, bool(splits or names or cases is not None))


def refuse(faults: Sequence[str]) -> None:
  """ValueError of the first NAMED of the sentences, where there are any."""
  if faults:
    more = f" And {len(faults) - NAMED} more." if len(faults) > NAMED else ""
    count = f"{len(faults)} faults. " if len(faults) > 1 else ""
    raise ValueError(f"{count}{' '.join(faults[:NAMED])}{more}")


def listing(names: Sequence[str]) -> str:
  """At most NAMED names, and how many more there are."""
  more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
  return f"{', '.join(names[:NAMED])}{more}"


Place = tuple[str, str, str]  # split ("" where there is no such folder), task, number
Entry = Mapping[str, Any] | None


def _folders(root: Path) -> dict[Place, Entry]:
  """The sample folders, SPLIT/TASK/00000 or TASK/00000."""
  found: dict[Place, Entry] = {}
  for top in _inner(root):
    if any(NUMBER.fullmatch(path.name) for path in _inner(top)):
      found.update(dict.fromkeys(_numbers("", top)))
      continue
    for task in _inner(top):
      found.update(dict.fromkeys(_numbers(top.name, task)))
  return found


def _inner(folder: Path) -> list[Path]:
  try:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
  except OSError as error:
    raise ValueError(f"{folder} cannot be read ({error.strerror}): check its rights.") from error


def _numbers(split: str, task: Path) -> Iterator[Place]:
  for folder in _inner(task):
    if NUMBER.fullmatch(folder.name):
      yield split, task.name, folder.name


def _listed(root: Path) -> dict[Place, Entry]:
  """What VBVR-Bench.json lists; nothing without it."""
  path = root / INDEX
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}): copy the benchmark again.") from error
  if isinstance(content, dict):
    lists = [value for value in content.values() if isinstance(value, list)]
    content = lists[0] if len(lists) == 1 else list(content.values())
  if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
    raise ValueError(f"{path} is no list of samples: download it again.")
  found: dict[Place, Entry] = {}
  for number, entry in enumerate(content):
    said = entry.get("ground_truth_video_path") or entry.get("first_frame_path")
    parts = PurePosixPath(said).parts if isinstance(said, str) else ()
    if len(parts) < 4 or ".." in parts or parts[0] == "/" or not NUMBER.fullmatch(parts[-2]):
      raise ValueError(
        f"entry {number} of {path} lies at {said!r}, wanted SPLIT/TASK/00000/ground_truth.mp4 "
        "inside the folder: download the file again."
      )
    place = parts[-4], parts[-3], parts[-2]
    if place in found:
      raise ValueError(
        f"{path} lists {'/'.join(place)} twice, wanted each sample once: download it again."
      )
    found[place] = entry
  return found


def _choose(
  places: Mapping[Place, Entry], splits: Sequence[str], names: Sequence[str]
) -> dict[Place, Entry]:
  """The places of the splits and tasks asked for."""
  kept = dict(places)
  there = sorted({split for split, _, _ in kept if split})
  for word in splits:
    if not there:
      raise ValueError(
        f"the data has no splits, so there is none to choose ({word!r}): leave it out."
      )
    if not any(_is_split(word, split) for split in there):
      raise ValueError(f"no split {word!r} in the data; {nearest(word, there)}")
  if splits:
    kept = {p: e for p, e in kept.items() if any(_is_split(word, p[0]) for word in splits)}
  known = sorted({task for _, task, _ in kept})
  for word in names:
    if not any(_is_task(word, task) for task in known):
      raise ValueError(f"no task {word!r} in the data; {nearest(word, known)}")
  if names:
    kept = {p: e for p, e in kept.items() if any(_is_task(word, p[1]) for word in names)}
  return kept


def _is_split(word: str, split: str) -> bool:
  return word == split or word.lower().replace("_", "-") == suite.SPLITS.get(split)


def _is_task(word: str, task: str) -> bool:
  return task in (word, word + suite.SUFFIX) or (
    task in suite.OFFICIAL and task.startswith(f"{word}_")
  )


def _sample(root: Path, place: Place, entry: Entry) -> Sample:
  split, task, number = place
  folder = root.joinpath(*filter(None, place))
  for name in filter(None, place):
    if not (NAME.fullmatch(name) or (name == task and tasks.is_name(name))):
      raise ValueError(
        f"{folder} has the name {name!r}, wanted letters, digits, '.', '_' and '-': rename it."
      )
  in_folder = entry is None or (folder / "prompt.txt").is_file()
  needed = ["ground_truth.mp4", *(["prompt.txt", "first_frame.png"] if in_folder else [])]
  _confine(root, folder, [*needed, "metadata.json", "final_frame.png"])
  missing = [name for name in needed if not (folder / name).is_file()]
  if missing:
    raise ValueError(f"{folder} lacks {', '.join(missing)}: download or export it again.")
  if in_folder:
    prompt, picture = layout.read_prompt(folder), None
  else:
    prompt, picture = _of_entry(folder, entry or {})
  if not prompt:
    raise ValueError(f"the prompt of {folder} is empty, wanted words: download or export it again.")
  if entry is not None and in_folder and str(entry.get("prompt", "")).strip() != prompt:
    raise ValueError(
      f"the prompt of {folder} is not the one in {INDEX}: keep one of the two, they are of "
      "different versions of the benchmark."
    )
  metadata = layout.read_metadata(folder / "metadata.json")
  path = folder / "first_frame.png"
  first = media.read_image(path) if picture is None else media.image_of(picture, path)
  height, width = first.shape[:2]
  if layout.is_case(metadata):
    case = layout.read_case(folder)  # refuses what the symbols do not give
    if metadata["task"] != task or (split and split != metadata["split"]):
      raise ValueError(
        f"{folder} is a case of {metadata['task']}, split {metadata['split']}: export it again."
      )
    split, frames = metadata["split"], len(case.frames)
  else:
    frames, *shape = media.measure_mp4(folder / "ground_truth.mp4")
    if tuple(shape) != (height, width):
      raise ValueError(
        f"ground_truth.mp4 in {folder} is {shape[1]} x {shape[0]} pixels and first_frame.png "
        f"{width} x {height}, wanted one size: download it again."
      )
  if frames < 2:
    raise ValueError(f"ground_truth.mp4 in {folder} has {frames} frame, wanted 2 or more.")
  asked = f"{prompt}\n{frames} {first.shape}\n".encode() + first.tobytes()
  return Sample(
    split=split,
    task=task,
    index=int(number),
    prompt=prompt,
    height=height,
    width=width,
    frames=frames,
    folder=folder,
    metadata=metadata,
    picture=picture,
    mark=hashlib.sha256(asked).hexdigest(),
    truth_mark=digest(metadata if layout.is_case(metadata) else _checksums(folder)),
  )


def _checksums(folder: Path) -> dict[str, str]:
  """Of what the EvalKit compares with; final_frame.png need not be there to make videos."""
  paths = [folder / name for name in ("ground_truth.mp4", "final_frame.png")]
  return {path.name: checksum(path) for path in paths if path.is_file()}


def _confine(root: Path, folder: Path, names: Sequence[str]) -> None:
  """Refuses links that lead out of the data folder."""
  inside = root.resolve()
  for path in (folder, *(folder / name for name in names)):
    if not path.resolve().is_relative_to(inside):
      raise ValueError(
        f"{path} leads out of {root} to {path.resolve()}: samples lie inside the data folder "
        "(`hf download --local-dir` writes files, no links)."
      )


def _of_entry(folder: Path, entry: Mapping[str, Any]) -> tuple[str, bytes]:
  prompt, text = entry.get("prompt"), entry.get("first_image")
  if not isinstance(prompt, str) or not isinstance(text, str):
    raise ValueError(
      f"the entry of {folder} in {INDEX} lacks prompt or first_image: download the file again."
    )
  try:
    return prompt.strip(), base64.b64decode(text.rpartition(",")[2], validate=True)
  except (binascii.Error, ValueError) as error:
    raise ValueError(
      f"first_image of {folder} in {INDEX} is no base64: download the file again."
    ) from error


def _strangers(samples: Sequence[Sample]) -> list[str]:
  """A sentence on the tasks that neither the benchmark nor this package has."""
  said = []
  strange = [s for s in samples if not s.own and s.split != suite.OFFICIAL.get(s.task, ("",))[0]]
  for split, task in sorted({(s.split, s.task) for s in strange}):
    hint = nearest(task, suite.official(split)) if split in suite.SPLITS else ""
    near = f" ({hint})" if hint.startswith("did you mean") else ""
    said.append(
      f"{split}/{task} is no task of VBVR-Bench{near}: rename or remove the folder, or choose "
      "others by --tasks."
    )
  return said


def _data(root: Path, samples: Sequence[Sample], part: bool) -> Data:
  official = [s for s in samples if not s.own]
  if not official:
    name = OWN
  elif len(official) < len(samples):
    name = MIXED
  else:
    name = PRO if all(s.pro for s in official) else BENCH
  there = {s.task for s in samples}
  splits = {s.split for s in official}
  absent = [t for t, (split, _) in suite.OFFICIAL.items() if split in splits and t not in there]
  whole = len({s.key for s in official}) == len(suite.OFFICIAL) * suite.SAMPLES == len(samples)
  return Data(
    root=root,
    name=name,
    samples=tuple(samples),
    absent=tuple(sorted(absent)),
    whole=whole,
    part=part,
  )
