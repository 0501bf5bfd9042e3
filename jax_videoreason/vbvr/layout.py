"""The benchmark's folder layout: five files a case, TASK/NUMBER/{first_frame.png, ...}."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_videoreason import media, tasks
from jax_videoreason.folders import disk
from jax_videoreason.records import sealed, unsealed, write_json
from jax_videoreason.tasks import Case, Metadata, Task

FPS = 16  # of VBVR-Bench
FILES = ("first_frame.png", "final_frame.png", "ground_truth.mp4", "prompt.txt", "metadata.json")


def write_cases(root: Path, cases: Sequence[Case]) -> list[Path]:
  """Writes each case as root/<task>/<index as 00000>/ with `FILES`; returns the folders.

  metadata.json holds the right answers in symbols, so no score depends on the pixels of the video,
  and a checksum of all that it says.
  """
  return [write_case(root / case.task / f"{case.index:05d}", case) for case in cases]


def write_case(folder: Path, case: Case) -> Path:
  """Writes the five files of a case into a new folder."""
  with disk(folder):
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text(case.prompt + "\n", encoding="utf-8")
  media.write_png(folder / "first_frame.png", case.first_frame)
  media.write_png(folder / "final_frame.png", case.frames[-1])
  media.write_mp4(folder / "ground_truth.mp4", case.frames, fps=FPS)
  write_json(folder / "metadata.json", sealed(case.metadata))
  return folder


def check_replaceable(folder: Path) -> None:
  """ValueError where a folder of a task's cases holds anything that `write_cases` never writes."""
  items = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
  for item in items:
    whole = item.is_dir() and re.fullmatch(r"\d{5,}", item.name)
    strange = [inner for inner in item.iterdir() if inner.name not in FILES] if whole else [item]
    if strange:
      raise ValueError(
        f"{strange[0]} is no part of a case, and --redo replaces cases alone: choose another --out."
      )


def is_case(metadata: Mapping[str, Any]) -> bool:
  """Whether metadata.json describes a case of a task of ours, or of one of a user's own."""
  return tasks.is_name(metadata.get("task")) and "problem" in metadata


def read(root: str | Path) -> Iterator[Case]:
  """The cases below a folder in the order of their paths, one at a time: the videos are large.

  Cases of the project's own tasks are drawn again from the symbols in their metadata.json, exactly
  as they were. Those of the benchmark come from the files: `task` is the folder above the case,
  `split` the one above that, `metadata` the contents of metadata.json, or empty without one.

  Raises:
    ValueError: no case below the folder, a file is missing or damaged, or first frame, prompt and
      answers are not those of the problem in symbols.
  """
  folders = sorted(path.parent for path in Path(root).rglob("prompt.txt"))
  if not folders:
    raise ValueError(
      f"{root} holds no case: wanted folders TASK/NUMBER with prompt.txt and first_frame.png."
    )
  for folder in folders:
    yield read_case(folder)


def read_case(folder: str | Path) -> Case:
  """One case; see `read`."""
  folder = Path(folder).resolve()
  needed = [name for name in FILES if name not in ("final_frame.png", "metadata.json")]
  missing = [name for name in needed if not (folder / name).is_file()]
  if missing:
    raise ValueError(f"{folder} lacks {', '.join(missing)}: copy or export the case again.")
  metadata = read_metadata(folder / "metadata.json")
  first_frame = media.read_image(folder / "first_frame.png")
  if is_case(metadata):
    prompt = read_prompt(folder)
    try:
      task = tasks.load(metadata["task"], size=metadata["size"], frames=metadata["frames"])
      fault = _fault(task, metadata, prompt)
      case = None if fault else task.case(metadata)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
      fault, case = f"{type(error).__name__}: {error}", None
    if case is None:
      raise ValueError(f"metadata.json in {folder} is damaged ({fault}): export the case again.")
    if first_frame.shape != case.first_frame.shape or (first_frame != case.first_frame).any():
      raise ValueError(
        f"first_frame.png in {folder} is not the one that its metadata.json describes: export the "
        "case again."
      )
    return case
  number = re.search(r"(\d+)$", folder.name)
  if number is None:
    raise ValueError(
      f"{folder} is named {folder.name!r}, wanted a number such as 00000 at its end."
    )
  return Case(
    task=folder.parent.name,
    split=folder.parent.parent.name,
    index=int(number[1]),
    first_frame=first_frame,
    prompt=read_prompt(folder),
    frames=media.read_mp4(folder / "ground_truth.mp4")[0],
    metadata=metadata,
  )


def _fault(task: Task, metadata: Metadata, prompt: str) -> str | None:
  """What in the metadata of a case contradicts its problem, or its prompt the file; None = nothing.

  A case of an earlier version has no checksum.
  """
  problem, answers = metadata["problem"], metadata["answers"]
  if not isinstance(problem, dict):
    return "its problem is no mapping"
  if metadata["hash"] != task.problem_hash(problem):
    return "its hash is not that of its problem"
  if metadata["answer"] not in answers or not set(answers) <= set(task.options(problem)):
    return "its answers are no answers to its problem"
  if metadata["k"] != len(answers):
    return f"its k is {metadata['k']}, wanted {len(answers)}, the number of its answers"
  if metadata["prompt"].strip() != prompt:
    return "its prompt is not that of prompt.txt"
  return None


def read_prompt(folder: Path) -> str:
  """The words of prompt.txt; ValueError: it is not UTF-8."""
  try:
    return (folder / "prompt.txt").read_text(encoding="utf-8-sig").strip()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{folder / 'prompt.txt'} is not UTF-8 (byte {error.start}): save it as UTF-8."
    ) from error


def read_metadata(path: Path) -> dict[str, Any]:
  """What metadata.json holds; empty without the file, which the benchmark does not have.

  Of a case of a task of ours without its checksum, with which it is compared where it is there.
  """
  if not path.is_file():
    return {}
  try:
    metadata = dict(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path} is no JSON object: copy or export the case again.") from error
  found = unsealed(metadata) if is_case(metadata) else metadata
  if found is None:
    raise ValueError(f"{path} differs from its checksum: copy or export the case again.")
  return found
