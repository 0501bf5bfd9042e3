"""Moves published tensors into our parameter tree by a table; knows no model.

A table is rows of (regex of the source key, target path, einops pattern). A group named `L` in the
regex is the layer: the tensor fills that slice of a leaf stacked over layers. Other named
groups may be used in the target path as `\\g<name>`.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from einops import EinopsError, rearrange

from jax_videoreason.pytrees import leaves, nest

Row = tuple[str, str, str]
LAYER = r"(?P<L>\d+)"
BLOCK_BYTES = 2**24  # compared at a time
TILE = (1024, 64)  # turned over tile by tile, a matrix is four times as fast: tiles fit the cache


def regex(name: str) -> str:
  """The regex of the keys of a name in which {L} stands for the layer."""
  return LAYER.join(re.escape(part) for part in name.split("{L}"))


class Shaped(Protocol):
  """Anything with a shape and a dtype: an array, a ShapeDtypeStruct, the header of a file."""

  @property
  def shape(self) -> tuple[int, ...]: ...
  @property
  def dtype(self) -> Any: ...


class Faults(ValueError):
  """Everything that is wrong, in one message; `faults` has a sentence each."""

  def __init__(self, faults: Iterable[str]):
    self.faults = tuple(faults)
    count = len(self.faults)
    super().__init__(f"convert: {count} fault{'s' * (count > 1)}. {' '.join(self.faults)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
  """One source tensor and where it goes; layer None = the whole leaf."""

  source: str
  target: str
  layer: int | None
  pattern: str

  def __call__(self, tensor: np.ndarray) -> np.ndarray:
    """The tensor in the layout of the target."""
    return rearrange(tensor, self.pattern)

  def back(self, value: np.ndarray, **sizes: int) -> np.ndarray:
    """A slice of the target in the layout of the source; sizes: of axes the pattern joins."""
    left, _, right = self.pattern.partition("->")
    needed = {name: size for name, size in sizes.items() if name in left.split()}
    return rearrange(value, f"{right} -> {left}", **needed)


def moves(
  sources: Mapping[str, Shaped], table: Iterable[Row], target: Any, ignore: Iterable[str] = ()
) -> list[Move]:
  """One Move per source key, in the order of the target leaves and their layers.

  target: the tree wanted, of anything with a shape (`jax.eval_shape` of init).
  ignore: regexes of source keys that have no place in the target.
  Faults, all at once: a key that no row or several rows match, a target that does
  not exist, a shape that differs, a leaf or layer filled twice or never.
  """
  wanted = leaves(target)
  rows = [(re.compile(key), path, pattern) for key, path, pattern in table]
  skipped = [re.compile(key) for key in ignore]
  faults: list[str] = []
  filled: dict[str, dict[int | None, Move]] = defaultdict(dict)
  for key, tensor in sources.items():
    if any(regex.fullmatch(key) for regex in skipped):
      continue
    found = [(match, path, pattern) for regex, path, pattern in rows
                 if (match := regex.fullmatch(key))]  # fmt: skip
    if len(found) != 1:
      faults.append(f"{key}: {len(found) or 'no'} row{'s match' if found else ' matches'}.")
      continue
    match, path, pattern = found[0]
    layer = int(match["L"]) if "L" in match.re.groupindex else None
    move = Move(source=key, target=match.expand(path), layer=layer, pattern=pattern)
    fault = _misfit(move, tuple(tensor.shape), wanted)
    if fault is None and layer in filled[move.target]:
      other = filled[move.target][layer].source
      fault = f"{move.target}{_at(layer)}: filled twice, by {other} and {key}."
    if fault is None:
      filled[move.target][layer] = move
    else:
      faults.append(fault)
      filled[move.target].setdefault(layer, move)
  for path, leaf in wanted.items():
    given = filled.get(path, {})
    if not given:
      faults.append(f"{path}: never filled.")
    elif None not in given and (gaps := sorted(set(range(leaf.shape[0])) - set(given))):
      faults.append(f"{path}: layers {', '.join(map(str, gaps))} never filled.")
  if faults:
    raise Faults(faults)
  return [filled[path][layer] for path in wanted for layer in sorted(filled[path], key=_order)]


def moves_back(table: Iterable[Row], target: Any) -> list[Move]:
  """The Moves that would fill every leaf of a tree, from the keys a table would read.

  Faults: a leaf that no row fills. The rows may have no group but L.
  """
  rows = {path: (key, pattern) for key, path, pattern in table}
  made: list[Move] = []
  faults: list[str] = []
  for path, leaf in leaves(target).items():
    if path not in rows:
      faults.append(f"{path}: no row fills it.")
      continue
    key, pattern = rows[path]
    stacked = LAYER in key
    for layer in range(leaf.shape[0]) if stacked else (None,):
      name = re.sub(r"\\(.)", r"\1", key.replace(LAYER, str(layer)))
      made.append(Move(source=name, target=path, layer=layer, pattern=pattern))
  if faults:
    raise Faults(faults)
  return made


def compact(value: np.ndarray, dtype: Any) -> np.ndarray:
  """The values in a dtype and in C order; a large matrix that lies the other way is quick too."""
  if value.ndim != 2 or value.flags.c_contiguous:
    return value.astype(dtype, order="C", copy=False)
  made = np.empty(value.shape, dtype)
  high, wide = TILE
  for i in range(0, value.shape[0], high):
    for j in range(0, value.shape[1], wide):
      made[i : i + high, j : j + wide] = value[i : i + high, j : j + wide]
  return made


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
  """Whether two arrays are equal to the last bit, not-a-numbers too; no copy is made."""
  if one.shape != other.shape or one.dtype != other.dtype:
    return False
  a, b = (rearrange(np.ascontiguousarray(x).view(np.uint8), "... -> (...)") for x in (one, other))
  blocks = (slice(start, start + BLOCK_BYTES) for start in range(0, a.size, BLOCK_BYTES))
  return all(np.array_equal(a[block], b[block]) for block in blocks)


def fill(
  sources: Mapping[str, np.ndarray],
  table: Iterable[Row],
  target: Any,
  ignore: Iterable[str] = (),
) -> dict[str, Any]:
  """The target tree in memory, in its own dtypes, filled from `sources`; refuses as `moves`."""
  made = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves(target).items()}
  for move in moves(sources, table, target, ignore):
    slot = ... if move.layer is None else move.layer
    made[move.target][slot] = move(sources[move.source])
  return nest(made)


def _misfit(move: Move, shape: tuple[int, ...], wanted: Mapping[str, Shaped]) -> str | None:
  """What is wrong with a move into the tree wanted, if anything."""
  if move.target not in wanted:
    return f"{move.source}: the target {move.target} does not exist."
  leaf = tuple(wanted[move.target].shape)
  if move.layer is not None and move.layer >= leaf[0]:
    return f"{move.source}: layer {move.layer}, {move.target} has {leaf[0]}."
  try:
    given = move(np.broadcast_to(np.zeros((), np.int8), shape)).shape
  except EinopsError:
    return f"{move.source}: {shape} given, a tensor '{move.pattern}' wanted."
  slot = leaf if move.layer is None else leaf[1:]
  if given != slot:
    return f"{move.target}{_at(move.layer)}: {given} given, {slot} wanted."
  return None


def _at(layer: int | None) -> str:
  return "" if layer is None else f"[{layer}]"


def _order(layer: int | None) -> int:
  return -1 if layer is None else layer
