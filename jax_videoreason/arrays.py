"""Arrays with named axes on disk: zarr v3 by TensorStore, written and read slice by slice.

zarr has no bfloat16, so bfloat16 is widened to float32, which is exact; the attribute
`written_from` says so. Every chunk carries a checksum, and so does what describes an array (its
attribute `sum`): a damaged one is never read as numbers.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jax_videoreason.folders import disk
from jax_videoreason.records import damaged, digest, read_json

DESCRIPTION = "zarr.json"
SUM = "sum"  # the attribute; arrays of earlier versions have none


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """An array on disk: `stored[step]`, or any numpy index, reads just that."""

  path: Path
  stored: Any
  axes: tuple[str, ...]
  attributes: Mapping[str, Any]

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.stored.shape)

  @property
  def steps(self) -> list[int]:
    """The denoising step of each row."""
    return list(self.attributes.get("steps", range(self.shape[0])))

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, where: Any) -> np.ndarray:
    try:
      shape = np.broadcast_to(np.uint8(0), self.shape)[where].shape
    except IndexError as error:
      raise IndexError(f"{self.path.name} is {self.shape}: {error}.") from error
    if 0 in shape:
      return np.empty(shape, self.stored.dtype.numpy_dtype)
    needed, within = _needed(where, self.shape)
    try:
      return np.asarray(self.stored.oindex[needed].read().result())[within]
    except ValueError as error:
      raise ValueError(
        f"{self.path} can't be read at {where!r}, a chunk is missing or damaged: run it "
        "again, or copy the folder again."
      ) from error


def _needed(where: Any, shape: Sequence[int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """The places of each axis that a numpy index asks for, in order and each once, and the index
  into an array of these alone. The index is in range and asks for something."""
  items: list[Any] = []
  for item in where if isinstance(where, tuple) else (where,):
    if item is None or item is Ellipsis or isinstance(item, slice):
      items.append(item)
    elif (places := np.asarray(item)).dtype == bool:
      items.extend(np.nonzero(places) if places.ndim else [True])  # True takes no axis
    else:
      items.append(places.astype(np.intp))
  rest = len(shape) - sum(isinstance(item, slice | np.ndarray) for item in items)
  at = next((i for i, item in enumerate(items, 1) if item is Ellipsis), len(items))
  items[at:at] = [slice(None)] * rest  # an Ellipsis stays: it parts indices even of no axes
  alone = sum(item is True or isinstance(item, np.ndarray) for item in items) == 1
  needed, within, sizes = [], [], iter(shape)
  for item in items:
    if isinstance(item, slice):
      size = next(sizes)
      places = range(*item.indices(size))
      step = min(abs(places.step), size)
      needed.append(slice(min(places), max(places) + 1, step))
      within.append(slice(None, None, 1 if places.step > 0 else -1))
    elif isinstance(item, np.ndarray):
      places, inside = np.unique(item % next(sizes), return_inverse=True)
      inside = inside.reshape(item.shape)
      as_read = alone and np.array_equal(inside, np.arange(item.size))
      needed.append(places)
      within.append(slice(None) if as_read else inside[()])
    else:
      within.append(item)
  return tuple(needed), tuple(within)


def put(
  root: Path,
  name: str,
  axes: Sequence[str],
  value: Any,
  *,
  shape: Sequence[int] | None = None,
  where: tuple[slice, ...] = (),
  chunk: Sequence[int] | None = None,
  **attributes: Any,
) -> None:
  """Writes `value` into the array `name` of the group `root`, which is made where it is lacking.

  name: may lie in groups, as taps/attn_out/norm. axes: a name for each. shape: of the whole array,
  None = that of `value`. where: the part that `value` is, () = all. chunk: None = one chunk.
  attributes: kept beside the array, as JSON.

  OSError: the disk refuses. ValueError: another array has the name.
  """
  value = np.asarray(value)
  if value.dtype.name == "bfloat16":
    value, attributes = value.astype(np.float32), {**attributes, "written_from": "bfloat16"}
  size = value.shape if shape is None else tuple(shape)
  endian = {} if value.dtype.itemsize == 1 else {"configuration": {"endian": "little"}}
  meta = {
    "shape": list(size),
    "data_type": value.dtype.name,
    "dimension_names": list(axes),
    "attributes": attributes,
    "fill_value": {"f": "NaN", "b": False}.get(value.dtype.kind, 0),
    "chunk_grid": {
      "name": "regular",
      "configuration": {"chunk_shape": [max(n, 1) for n in chunk or size]},
    },
    "codecs": [
      {"name": "bytes", **endian},
      {"name": "zstd", "configuration": {"level": 3}},
      {"name": "crc32c"},
    ],
  }
  if not _is_older(root / name):
    meta["attributes"] = {**attributes, SUM: _sum(meta)}
  spec = {
    **_spec(root / name),
    "open": True,
    "create": True,
    "store_data_equal_to_fill_value": True,
    "metadata": meta,
  }
  with disk(root / name):
    for part in reversed(list(Path(name).parents)):
      group(root / part)
    ts.open(spec).result()[where].write(value).result()


def group(path: Path) -> None:
  """Makes a group, if it is not there."""
  path.mkdir(exist_ok=True)
  mark = path / DESCRIPTION
  if not mark.exists():
    mark.write_text(json.dumps({"zarr_format": 3, "node_type": "group"}), encoding="utf-8")


def open_group(root: Path) -> dict[str, StoredArray]:
  """Every array of a group by its name, as taps/attn_out/norm; ValueError for a damaged one."""
  found = {}
  for path in sorted(root.rglob(DESCRIPTION)):
    meta = read_json(path)
    kind = meta.get("node_type") if isinstance(meta, dict) else None
    if kind not in ("array", "group"):
      raise damaged(path)
    if kind == "array":
      found[path.parent.relative_to(root).as_posix()] = _open(path.parent, meta)
  return found


def _sum(meta: Mapping[str, Any]) -> str:
  """The checksum of all that says which numbers the chunks hold, and of the attributes."""
  attributes = {key: value for key, value in meta.get("attributes", {}).items() if key != SUM}
  grid, codecs = meta["chunk_grid"]["configuration"]["chunk_shape"], meta["codecs"]
  order = [codec.get("configuration", {}).get("endian") for codec in codecs]
  names = meta.get("dimension_names", [])  # a number has none
  return digest([meta["shape"], meta["data_type"], names, grid, order, attributes])


def _is_older(path: Path) -> bool:
  """Whether an earlier version began the array, so that its description has no checksum."""
  meta = read_json(path / DESCRIPTION) if (path / DESCRIPTION).exists() else None
  return isinstance(meta, dict) and SUM not in meta.get("attributes", {})


def _open(path: Path, meta: Mapping[str, Any]) -> StoredArray:
  try:
    stored = ts.open({**_spec(path), "fill_missing_data_reads": False}, read=True).result()
    axes = tuple(meta["dimension_names"]) if meta["shape"] else ()  # a number has none
    attributes = dict(meta.get("attributes", {}))
    whole = attributes.pop(SUM, None) in (None, _sum(meta))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise damaged(path / DESCRIPTION) from error
  if not whole:
    raise damaged(path / DESCRIPTION)
  return StoredArray(path.resolve(), stored, axes, attributes)


def _spec(path: Path) -> dict[str, Any]:
  return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path.resolve()}/"}}
