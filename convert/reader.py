"""Tensors in files, one at a time: safetensors, and .pth that hold nothing but tensors.

The only importer of torch and safetensors. A file is opened anew for every tensor: both libraries
map it into memory, and what has been read would count as ours until the map is closed.
"""

import dataclasses
import json
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from .engine import Faults

SUFFIXES = (".safetensors", ".pth")
INDEX = ".safetensors.index.json"
# The names of floating dtypes in a safetensors header; weights have no other.
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
ARCHIVE = b"PK\x03\x04"  # a .pth begins so since PyTorch 1.6
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
  """A tensor that has not been read: where it lies and what it is.

  part: (i, n) = only the i-th of n equal pieces along the first axis; `shape` is the piece's.
  """

  file: Path
  key: str
  shape: tuple[int, ...]
  dtype: np.dtype
  part: tuple[int, int] = (0, 1)

  def piece(self, i: int, n: int) -> "Header":
    """The i-th of n equal pieces. Faults: the first axis does not divide."""
    if not self.shape or self.shape[0] % n:
      raise Faults([f"{self.file}: {self.key} is {self.shape}, wanted a first axis of {n} pieces."])
    return dataclasses.replace(self, shape=(self.shape[0] // n, *self.shape[1:]), part=(i, n))

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a JSON file says. Faults names the file and the key of a value that cannot be meant."""

  file: Path
  values: Mapping[str, Any]

  def whole(self, *keys: str) -> int | None:
    """Of the first key that is there, a number from 1 up; None where none is."""
    for key in keys:
      if key in self.values:
        value = self.values[key]
        if type(value) is not int or value < 1:
          raise self.fault(key, value, "a whole number from 1 up")
        return value
    return None

  def number(self, key: str, default: float | None = None) -> float:
    """Over 0; the default where the key is absent."""
    value = self.values.get(key, default)
    if not _is_number(value) or value <= 0:
      raise self.fault(key, value, "a number over 0")
    return float(value)

  def numbers(self, key: str, default: Sequence[float]) -> tuple[float, ...]:
    """A list of them; the default where the key is absent."""
    value = self.values.get(key, default)
    if not isinstance(value, list | tuple) or not all(map(_is_number, value)):
      raise self.fault(key, value, "a list of numbers")
    return tuple(value)

  def fault(self, key: str, value: Any, wanted: str) -> Faults:
    """What is said of a value."""
    return Faults([f"{self.file} says {key}={json.dumps(value)}, wanted {wanted}."])


def settings(file: Path) -> Settings:
  """Of a JSON file; they are empty where it is absent."""
  return Settings(file=file, values=read_json(file) if file.is_file() else {})


def files_in(folder: Path) -> list[Path]:
  """The safetensors files of a folder, by its index where it has one; Faults names what lacks."""
  index = sorted(folder.glob(f"*{INDEX}"))
  if len(index) > 1:
    names = ", ".join(file.name for file in index)
    raise Faults([f"{folder} has several indexes ({names}): leave the one that is meant."])
  if not index:
    found = sorted(folder.glob("*.safetensors"))
    faults = _incomplete(folder, found) or ([] if found else [f"{folder}: no .safetensors there."])
  else:
    found = sorted({folder / name for name in _weight_map(index[0]).values()})
    faults = [
      f"{file} is missing, {index[0].name} names it: download it again."
      for file in found
      if not file.is_file()
    ]
  if faults:
    raise Faults(faults)
  return found


def headers(files: Iterable[Path], skip: str | None = None) -> dict[str, Header]:
  """Key -> header of every tensor of the files; Faults names each file and key that is wrong.

  skip: a regex of keys that are as if they were not there, whatever they hold.
  """
  skipped = re.compile(skip) if skip is not None else None
  found: dict[str, Header] = {}
  faults: list[str] = []
  files = list(files)
  for file in files:
    try:
      given = (_safetensors if file.suffix == ".safetensors" else _pth)(file, skipped)
    except Faults as error:
      faults += error.faults
      continue
    for key, header in given.items():
      if key in found:
        faults.append(f"{key} lies in {found[key].file.name} and in {file.name} of {file.parent}.")
      found[key] = header
  if not faults:  # an unreadable shard has its own sentence
    faults = _not_as_indexed(files, found, skipped)
  if faults:
    raise Faults(faults)
  return found


def read(header: Header) -> np.ndarray:
  """The tensor in its own dtype. Faults names the file and key."""
  i, n = header.part
  try:
    if header.file.suffix == ".safetensors":
      with safetensors.safe_open(header.file, "numpy") as opened:
        if n == 1:
          return opened.get_tensor(header.key)
        size = header.shape[0]
        return opened.get_slice(header.key)[i * size : (i + 1) * size]
    whole = _load_pth(header.file)[header.key]
    return _as_numpy(whole if n == 1 else whole.chunk(n)[i])
  except (safetensors.SafetensorError, KeyError) as error:
    raise Faults([f"{header.file}: {header.key} cannot be read ({error})."]) from error


def metadata(file: Path) -> Mapping[str, str]:
  """The notes in the header of a safetensors file; {} in any other."""
  if file.suffix != ".safetensors":
    return {}
  with safetensors.safe_open(file, "numpy") as opened:
    return opened.metadata() or {}


def read_json(file: Path) -> dict[str, Any]:
  """The object in a JSON file; Faults says that it is damaged."""
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise Faults([f"{file} cannot be read ({error}): download it again."]) from error
  if not isinstance(value, dict):
    raise Faults([f"{file} holds no JSON object: download it again."])
  return value


def _safetensors(file: Path, skipped: re.Pattern[str] | None) -> dict[str, Header]:
  try:
    with safetensors.safe_open(file, "numpy") as opened:
      slices = {key: opened.get_slice(key) for key in opened.keys() if not _is(skipped, key)}
      given = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
  except (safetensors.SafetensorError, OSError) as error:
    raise Faults(
      [f"{file} is truncated or has a wrong header ({error}): download it again."]
    ) from error
  odd = [
    f"{file}: {key} is {dtype}, wanted one of {', '.join(DTYPES)} (quantised weights are not read)."
    for key, (_, dtype) in given.items()
    if dtype not in DTYPES
  ]
  if odd:
    raise Faults(odd)
  return {
    key: Header(file=file, key=key, shape=shape, dtype=DTYPES[dtype])
    for key, (shape, dtype) in given.items()
  }


def _pth(file: Path, skipped: re.Pattern[str] | None) -> dict[str, Header]:
  loaded = {key: value for key, value in _load_pth(file).items() if not _is(skipped, str(key))}
  import torch

  names = {getattr(torch, dtype.name): dtype for dtype in DTYPES.values()}
  odd = [
    f"{file}: {key} is {_kind_of(value)}, wanted a floating tensor."
    for key, value in loaded.items()
    if not isinstance(value, torch.Tensor)
    or value.dtype not in names
    or value.layout != torch.strided
    or value.is_meta
  ]
  odd += [f"{file}: {key!r} is no name of a tensor." for key in loaded if not isinstance(key, str)]
  if odd:
    raise Faults(odd)
  return {
    key: Header(file=file, key=key, shape=tuple(value.shape), dtype=names[value.dtype])
    for key, value in loaded.items()
  }


def _kind_of(value: Any) -> str:
  """What a value in a pickle is, in words."""
  if not hasattr(value, "layout"):
    return type(value).__name__
  return f"{value.dtype} ({str(value.layout).removeprefix('torch.')}, {value.device})"


def _load_pth(file: Path) -> dict[str, Any]:
  try:
    import torch
  except ImportError as error:
    raise Faults([f"{file} is a PyTorch file and torch is missing: pip install torch."]) from error
  with file.open("rb") as opened:
    if opened.read(len(ARCHIVE)) != ARCHIVE:
      raise Faults(
        [
          f"{file} is no PyTorch file of version 1.6 or later: download it again, or load it where "
          "it was made and save it as safetensors."
        ]
      )
  try:
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
  except pickle.UnpicklingError as error:
    raise Faults(
      [f"{file} holds more than tensors and is not opened: save it again as safetensors."]
    ) from error
  except (RuntimeError, OSError, EOFError, ValueError) as error:
    first = str(error).splitlines()[0].partition(". ")[0]
    raise Faults([f"{file} is truncated or no PyTorch file ({first}): download it again."]) from (
      error
    )
  if not isinstance(loaded, dict):
    raise Faults([f"{file} holds a {type(loaded).__name__}, wanted a dict of tensors."])
  return loaded


def _as_numpy(tensor: Any) -> np.ndarray:
  import torch

  tensor = tensor.detach().resolve_neg()
  if tensor.dtype == torch.bfloat16:
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _weight_map(index: Path) -> dict[str, str]:
  named = read_json(index).get("weight_map")
  if not isinstance(named, dict) or not named:
    raise Faults([f"{index} has no weight_map: download it again."])
  outside = sorted({name for name in named.values() if Path(str(name)).name != name})
  if outside:
    raise Faults([f"{index} names {outside[0]!r}, wanted files beside it: download it again."])
  return named


def _incomplete(folder: Path, files: Sequence[Path]) -> list[str]:
  """Shards that their neighbours' names promise and that are not there."""
  counts: dict[tuple[str, int], set[int]] = defaultdict(set)
  for file in files:
    if match := SHARD.fullmatch(file.name):
      counts[match["stem"], int(match["count"])].add(int(match["number"]))
  return [
    f"{folder / f'{stem}-{number:05d}-of-{count:05d}.safetensors'} is missing: download it again."
    for (stem, count), numbers in counts.items()
    for number in sorted(set(range(1, count + 1)) - numbers)
  ]


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


def _is(skipped: re.Pattern[str] | None, key: str) -> bool:
  return skipped is not None and skipped.fullmatch(key) is not None


def _not_as_indexed(
  files: Sequence[Path], found: Mapping[str, Header], skipped: re.Pattern[str] | None
) -> list[str]:
  """Keys that an index beside the files places in one that does not have them."""
  return [
    f"{folder / name} has no {key}, {index.name} says so: download both again."
    for folder in sorted({file.parent for file in files})
    for index in folder.glob(f"*{INDEX}")
    for key, name in _weight_map(index).items()
    if folder / name in files and (key not in found or found[key].file.name != name)
    if not _is(skipped, key)
  ]
