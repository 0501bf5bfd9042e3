"""What is written in a folder: JSON, the checksums that vouch for files, and what was asked."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason.folders import (
  MANIFEST,
  atomic,
  disk,
  names_in,
  refuse_other,
  remove,
  replaceable,
)

SUM = "sum"  # of a JSON file: the checksum of all else in it


def canonical_json(value: Any) -> str:
  """`value` as JSON that is the same text for equal values."""
  return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(value: Any) -> str:
  """sha256 of the canonical JSON of `value`, in hex."""
  return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_json(path: str | Path, value: Any) -> None:
  """Writes `value` as JSON; not-a-number is not JSON, so it must be None already (`plain`)."""
  with atomic(path) as part:
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
  """What a JSON file holds; ValueError when it is missing or damaged."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ValueError(f"{path} is missing: run it again, or copy the folder again.") from error
  except (OSError, ValueError) as error:
    raise damaged(path) from error


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
  """`plain(value)` with a checksum of all that it says."""
  value = plain(value)
  return {**value, SUM: digest(value)}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any] | None:
  """What `sealed` made it of; None where it is not that any more. Without a checksum, as it is."""
  rest = {key: inner for key, inner in value.items() if key != SUM}
  return rest if value.get(SUM, digest(rest)) == digest(rest) else None


def read_mapping(path: Path, *keys: str) -> dict[str, Any]:
  """What a JSON file holds, without its checksum.

  ValueError: it is missing, damaged or no mapping with the keys.
  """
  found = read_json(path)
  value = unsealed(found) if isinstance(found, dict) else None
  if value is None or not value.keys() >= set(keys):
    raise damaged(path)
  return value


def mapping_of(path: Path, *keys: str) -> dict[str, Any] | None:
  """`read_mapping` of what is made again where it can't be read: None in the place of an error."""
  try:
    return read_mapping(path, *keys)
  except ValueError:
    return None


def damaged(path: Path) -> ValueError:
  """What is said of a file that can't be read."""
  return ValueError(
    f"{path} is missing or damaged: run it again with --redo, or copy the folder again."
  )


def plain(value: Any) -> Any:
  """`value` as JSON can say it: arrays and tuples as lists, numbers that are not finite as None."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, np.ndarray):
    return plain(value.tolist())
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, set | frozenset):
    return sorted((plain(v) for v in value), key=repr)
  if isinstance(value, np.generic):
    return plain(value.item())
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, str | int | bool):
    return value
  if isinstance(value, Path):
    return str(value)
  raise ValueError(f"{value!r} can't be written as JSON: give numbers, strings, lists and dicts.")


# Checksums


def every(name: str) -> bool:
  """Whether a file counts for the checksum of its folder: all do."""
  return True


def checksum(path: Path, counts: Callable[[str], Any] = every) -> str:
  """sha256 of a file; of a folder, over the names and checksums of its files in order.

  counts: whether a file of the folder does, by its path below it.
  """
  if not path.is_dir():
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  digest = hashlib.sha256()
  for item in sorted(p for p in path.rglob("*") if p.is_file()):
    name = item.relative_to(path).as_posix()
    if counts(name):
      digest.update(f"{name} {checksum(item)}\n".encode())
  return digest.hexdigest()


def vouched(folder: Path, name: str, counts: Callable[[str], Any] = every) -> Path:
  """The path of a file or folder in `folder`, compared with the checksum in the manifest beside it.

  A folder without a manifest, or one whose manifest does not know the name, vouches for nothing.
  counts: as `checksum` takes it.

  ValueError: it is missing, or not what was written.
  """
  path = folder / name
  wanted = sums(folder).get(name)
  try:
    differs = wanted is not None and checksum(path, counts) != wanted
  except OSError as error:
    raise damaged(path) from error
  if differs:
    raise damaged(path)
  return path


def sums(folder: Path) -> dict[str, str]:
  """Name -> checksum, as the manifest of a folder has them; nothing where there is none."""
  if not (folder / MANIFEST).is_file():
    return {}
  manifest = read_json(folder / MANIFEST)
  files = manifest.get("files", {}) if isinstance(manifest, dict) else None
  if not isinstance(files, dict):
    raise damaged(folder / MANIFEST)
  return files


@contextlib.contextmanager
def rewriting(folder: Path, *names: str) -> Iterator[None]:
  """Files of a folder are written anew inside; meanwhile its manifest has no checksum of them."""
  manifest = read_mapping(folder / MANIFEST, "files")
  others = {file: found for file, found in manifest["files"].items() if file not in names}
  write_json(folder / MANIFEST, sealed({**manifest, "files": others}))
  yield
  files = others | {name: checksum(folder / name) for name in names}
  write_json(folder / MANIFEST, sealed({**manifest, "files": dict(sorted(files.items()))}))


# What was asked


def begin(
  folder: Path,
  file: str,
  asked: Mapping[str, Any],
  *,
  owned: Iterable[str],
  what: str,
  redo: bool,
) -> None:
  """Makes `folder` ready to be filled piece by piece: new, or begun by a call that asked the same.

  file: the name under which `asked` is kept there. owned: the names that `redo` removes where
  `file` is there too; all others are left alone. what: of which kind the content is, such as
  "evaluation".

  Raises:
    ValueError: `folder` is a file, holds something else, or what was asked otherwise.
    OSError: it can't be written.
  """
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder} is a file, wanted a folder: choose another --out.")
  refuse_other(folder, what)
  asked = plain(asked)
  with disk(folder):
    there = sorted(names_in(folder))
    ours = set(there) & set(owned)
    for name in replaceable(there, owned, marks=[file], what=what, folder=folder) if redo else ():
      remove(folder / name)
  if file in there and not redo:
    differ = list(differences(read_mapping(folder / file), asked))
    if differ:
      raise ValueError(
        f"{folder} holds another {what} ({'; '.join(differ)}): choose another --out, or give "
        "--redo to replace it."
      )
    return
  if there and not redo:
    more = f" and {len(there) - 1} more" if len(there) > 1 else ""
    remedy = "" if ours else ", or give --redo to write beside it"
    raise ValueError(
      f"{folder} is not empty (it has {there[0]}{more}) and has no {file}, so nobody knows how "
      f"what is there was made: choose another --out{remedy}."
    )
  with disk(folder):
    folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / file, asked)


def differences(before: Mapping[str, Any], asked: Mapping[str, Any], at: str = "") -> Iterator[str]:
  """'steps=10 there and 20 here' for every key, dotted, that differs."""
  for key in sorted(before.keys() | asked.keys()):
    old, new = before.get(key), asked.get(key)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      yield from differences(old, new, f"{at}{key}.")
    elif old != new:
      yield f"{at}{key}={old!r} there and {new!r} here"
