"""The trees of a bundle leaf by leaf, slice by slice: so is one written that no memory holds.

The trees are plain zarr3 arrays, one chunk or more per layer, in the layout of Orbax, which
restores them.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any, TextIO

import jax
import numpy as np
import tensorstore as ts

from jax_videoreason import bundles, checkpoint
from jax_videoreason.folders import NoLocksError, disk, local, remove
from jax_videoreason.pytrees import nest
from jax_videoreason.structs import ModelBundle

CHUNK_BYTES = 2**28  # a chunk of a leaf is one layer, and at most so much
PENDING_BYTES = 2**28  # so much may be under way to the disk while the next slice is made
JOURNAL = "journal.jsonl"
RESUME = "make room and start again, it goes on from there"


def refuse_existing(path: Path, *, redo: bool) -> None:
  """ValueError where a bundle can't be written: something is there and not `redo`, or no bundle."""
  if path.exists() and not redo:
    raise ValueError(f"{path} exists already: remove it, or give --redo to replace it.")
  if path.exists() and not (path / bundles.DESCRIPTION).is_file():
    raise ValueError(
      f"{path} has no {bundles.DESCRIPTION}, and --redo replaces bundles alone: remove it, or "
      "choose another --out."
    )


class LeafWriter:
  """Writes a bundle leaf by leaf, slice by slice, holding one slice at a time.

  The bundle grows in a hidden folder beside its destination, with a journal of what is done, and
  `commit` moves it there whole. After an interruption a writer of the same plan goes on where the
  journal ends. A lock on the journal keeps every other process away.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    leaves: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
    *,
    plan: str,
    redo: bool = False,
  ):
    """leaves: part -> path -> shape and dtype; a leaf under "blocks" is stacked over layers.

    plan: what tells this conversion from another. redo: replace a bundle that is there, and drop
    another plan that was begun there.
    ValueError: the destination exists, another plan was begun there, or the disk is too small.
    """
    self.path = Path(os.path.abspath(local(path)))
    self.folder = self.path.parent / f".{self.path.name}.part"
    self.leaves = leaves
    self.redo = redo
    self._count: dict[tuple[str, str], int] = {}
    self._digest: dict[tuple[str, str], Any] = {}
    self._sha: dict[tuple[str, str], str] = {}
    self._pending: collections.deque[tuple[Any, np.ndarray, dict[str, Any]]] = collections.deque()
    self.notes: dict[str, str] = {}
    refuse_existing(self.path, redo=self.redo)
    self._journal = self._locked()
    try:
      refuse_existing(
        self.path, redo=self.redo
      )  # another process may have ended just before the lock
      self._resume(plan)
    except BaseException:
      if not (self.folder / JOURNAL).stat().st_size:
        shutil.rmtree(self.folder)
      self._journal.close()
      raise

  def __enter__(self) -> "LeafWriter":
    return self

  def __exit__(self, *_: Any) -> None:
    for pending in self._pending:  # after a failure: nothing may be written behind our back
      pending[0].exception()
    self._journal.close()

  def has(self, part: str, path: str, layer: int | None) -> bool:
    """Whether the slice is written already."""
    return self._count.get((part, path), 0) > (layer or 0)

  def write(self, part: str, path: str, layer: int | None, value: np.ndarray) -> None:
    """One layer of a stacked leaf, or with None a whole leaf; the layers of a leaf in order."""
    leaf, at = self.leaves[part][path], (part, path)
    stacked = "blocks" in path.split("/")
    given = (leaf.shape[0], *value.shape) if stacked else value.shape
    done = self._count.get(at, 0)
    if given != leaf.shape or value.dtype != leaf.dtype or done != (layer or 0):
      raise ValueError(
        f"{part}/{path}: slice {layer} of {value.shape} {value.dtype} given, slice {done} of a "
        f"leaf {leaf.shape} {leaf.dtype} wanted."
      )
    if at not in self._digest:
      self._digest[at] = self._digest_so_far(part, path, done)
    with disk(self.folder, full=RESUME):
      stored = self._create(part, path) if done == 0 else _open(self.folder / part, path, True)
      slot = stored[layer] if stacked else stored
      writing = slot.write(value, can_reference_source_data_indefinitely=True).commit
      writing.force()
      self._digest[at].update(np.ascontiguousarray(value).view(np.uint8).data)
    self._count[at] = done + 1
    if self._count[at] == (leaf.shape[0] if stacked else 1):
      self._sha[at] = self._digest.pop(at).hexdigest()
    entry = {"slice": [part, path], "sha256": self._sha.get(at)}
    self._pending.append((writing, value, entry))
    self._settle(PENDING_BYTES)

  def settle(self) -> None:
    """Returns when everything is on disk and in the journal."""
    self._settle(-1)

  def sha256(self, part: str, path: str) -> str:
    """The checksum of a leaf that is whole."""
    return self._sha[part, path]

  def note(self, key: str, value: str) -> None:
    """Remembers something over an interruption, in `notes`."""
    self.notes[key] = value
    self._note({"note": key, "value": value})

  def commit(self, bundle: ModelBundle) -> Path:
    """Describes the bundle (its card and modules; weights are not looked at) and moves it in place.

    ValueError: a leaf is not whole, or the leaves contradict the config of their module.
    """
    self.settle()
    lacking = [f"{p}/{n}" for p in self.leaves for n in self.leaves[p] if (p, n) not in self._sha]
    if lacking:
      raise ValueError(f"{len(lacking)} leaves are not written, first {lacking[0]}.")
    records = {
      part: {
        path: bundles.Record(shape=leaf.shape, dtype=leaf.dtype, sha256=self._sha[part, path])
        for path, leaf in leaves.items()
      }
      for part, leaves in self.leaves.items()
    }
    with disk(self.folder, full=RESUME):
      bundles.complete(self.folder, bundle, records)
      old = self.path.parent / f".{self.path.name}.old"
      remove(old)
      if self.redo and self.path.exists():
        os.rename(self.path, old)
      os.rename(self.folder, self.path)
      (self.path / JOURNAL).unlink()  # not before: without it all would be written again
      remove(old)
    return self.path

  def _locked(self) -> TextIO:
    """The journal, which no other process has open; ValueError where one does."""
    file = self.folder / JOURNAL
    while True:
      with disk(self.folder, full=RESUME):
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = file.open("a+", encoding="utf-8")
      try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        journal.close()
        raise ValueError(
          f"{self.path} is being written by another process: wait for it."
        ) from error
      except OSError as error:
        journal.close()
        raise NoLocksError(
          f"{self.path.parent} has no locks ({error.strerror}): choose an --out on a file system "
          "that has them."
        ) from error
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(journal.fileno()), file.stat()):
          return journal
      journal.close()  # another process has just moved it away, with its bundle

  def _settle(self, left: int) -> None:
    """Waits for the oldest slices while more bytes than these are under way."""
    while self._pending and sum(value.nbytes for _, value, _ in self._pending) > left:
      writing, _, entry = self._pending.popleft()
      with disk(self.folder, full=RESUME):
        writing.result()
      self._note(entry)

  def _resume(self, plan: str) -> None:
    """Goes on where the journal ends, or begins it."""
    self._journal.seek(0)
    lines = self._journal.read().splitlines(True)
    lines = [line for line in lines if line.endswith("\n")]  # the last may have been cut short
    begun = bool(lines) and self._recall(lines, plan)
    total = sum(_bytes(leaf) for part in self.leaves.values() for leaf in part.values())
    there = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
    bundles.check_space(self.path, total - there)
    with disk(self.folder, full=RESUME):
      self._journal.truncate(sum(len(line.encode()) for line in lines) if begun else 0)
      for item in [] if begun else list(self.folder.iterdir()):
        if item.name != JOURNAL:
          remove(item)
      if not begun:
        self._note({"plan": plan})
      for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished)
      for part, leaves in self.leaves.items():
        if not (self.folder / part).is_dir():
          tree = nest({path: np.zeros(1) for path in leaves})
          checkpoint.write_tree(self.folder / part, tree, False)

  def _recall(self, lines: Sequence[str], plan: str) -> bool:
    """Takes in a journal of this plan; False where it is of another, which `redo` drops."""
    try:
      first, *entries = map(json.loads, lines)
    except ValueError:  # the machine went down, say
      first, entries = {}, []
    if first.get("plan") != plan:
      if self.redo:
        return False
      raise ValueError(
        f"{self.folder} holds the beginning of another conversion: give --redo to start over, or "
        "another destination."
      )
    for entry in entries:
      if "slice" in entry:
        part, path = entry["slice"]
        self._count[part, path] = self._count.get((part, path), 0) + 1
        if entry["sha256"]:
          self._sha[part, path] = entry["sha256"]
      else:
        self.notes[entry["note"]] = entry["value"]
    return True

  def _note(self, entry: Mapping[str, Any]) -> None:
    with disk(self.folder, full=RESUME):
      self._journal.write(json.dumps(entry) + "\n")
      self._journal.flush()

  def _digest_so_far(self, part: str, path: str, done: int) -> Any:
    digest = hashlib.sha256()
    for layer in range(done):
      value = read_slice(self.folder / part, path, layer)
      digest.update(np.ascontiguousarray(value).view(np.uint8).data)
    return digest

  def _create(self, part: str, path: str) -> Any:
    leaf = self.leaves[part][path]
    shutil.rmtree(self.folder / part / path.replace("/", "."), ignore_errors=True)
    metadata = {
      "shape": list(leaf.shape),
      "data_type": np.dtype(leaf.dtype).name,
      "chunk_grid": {
        "name": "regular",
        "configuration": {"chunk_shape": _chunk_shape(path, leaf)},
      },
      "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    spec = _spec(self.folder / part, path)
    return ts.open({**spec, "metadata": metadata}, create=True).result()


def read_slice(folder: Path, path: str, layer: int | None) -> np.ndarray:
  """One layer of a leaf, or with None the whole leaf, of a tree on disk; nothing else is read."""
  return _read(_slice(folder, path, layer), folder, path)


def read_blocks(
  folder: Path, path: str, layer: int | None
) -> Iterator[tuple[slice | EllipsisType, np.ndarray]]:
  """The same in blocks of rows, of about CHUNK_BYTES at most; each with its place."""
  stored = _slice(folder, path, layer)
  rows = stored.shape[0] if stored.shape else 0
  size = int(np.prod(stored.shape, dtype=np.int64)) * stored.dtype.numpy_dtype.itemsize
  step = max(1, -(-rows // max(1, -(-size // CHUNK_BYTES))))
  places = [slice(start, min(start + step, rows)) for start in range(0, rows, step)] or [...]
  for place in places:
    yield place, _read(stored[place], folder, path)


def _slice(folder: Path, path: str, layer: int | None) -> Any:
  stored = _open(folder, path, False)
  return stored if layer is None else stored[layer]


def _read(stored: Any, folder: Path, path: str) -> np.ndarray:
  try:
    return stored.read().result()
  except ValueError as error:  # TensorStore's word for a chunk that is missing or damaged
    raise ValueError(
      f"leaf {path} cannot be read from {folder} ({type(error).__name__}): copy the bundle again."
    ) from error


def _open(folder: Path, path: str, write: bool) -> Any:
  try:
    return ts.open(_spec(folder, path), open=True, read=True, write=write).result()
  except ValueError as error:
    raise ValueError(
      f"leaf {path} cannot be opened in {folder} ({type(error).__name__}): copy the bundle again."
    ) from error


def _spec(folder: Path, path: str) -> dict[str, Any]:
  """Where a leaf lies, in the one database of a saved tree or as a folder of its own."""
  name = path.replace("/", ".") + "/"
  store: dict[str, Any] = {"driver": "file", "path": f"{folder.resolve()}/"}
  if (folder / "manifest.ocdbt").is_file():
    store = {"driver": "ocdbt", "base": store, "path": name}
  else:
    store["path"] += name
  return {
    "driver": "zarr3",
    "kvstore": store,
    "fill_missing_data_reads": False,
    "store_data_equal_to_fill_value": True,
  }


def _chunk_shape(path: str, leaf: jax.ShapeDtypeStruct) -> list[int]:
  """One layer; a layer over CHUNK_BYTES is cut into equal pieces along its first axis."""
  stacked = "blocks" in path.split("/")
  shape = [max(n, 1) for n in leaf.shape]
  if stacked:
    shape[0] = 1
  first = int(stacked)
  size = int(np.prod(shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
  if first < len(shape):
    shape[first] = -(-shape[first] // -(-size // CHUNK_BYTES))
  return shape


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
  return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
