"""Where the overlapping tiles of a large video lie, and how each reference stack joins them.

diffusers lays tiles from the top left, the last ones smaller, and mixes the edge of each with the
one above and then with the one to its left. DiffSynth lets the last tile overhang and weighs
all that cover a pixel. The official code decodes whole frames.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jax_videoreason.structs import LatentSpec

Place = tuple[slice, slice]  # rows and columns of latent cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """Tiles of `size` latent cells (height, width), one every `stride`; rule: whose joining.

  fold: pixels a side that share one weight where diffusers mixes (2 for the Wan2.2 VAE).
  """

  size: tuple[int, int]
  stride: tuple[int, int]
  rule: Literal["diffusers", "diffsynth"]
  fold: int = 1

  def __post_init__(self):
    if self.rule not in NAMES:
      raise ValueError(f"tiling rule {self.rule!r}, wanted one of {', '.join(NAMES)}.")
    if not all(0 < step <= size for size, step in zip(self.size, self.stride, strict=True)):
      raise ValueError(
        f"tiles of {self.size} latent cells every {self.stride}: wanted strides of at least 1 and "
        "at most the size."
      )


NAMES = ("diffusers", "diffsynth")


def named(name: str, spec: LatentSpec, fold: int = 1) -> Tiling:
  """The tiling that a stack has by default; ValueError lists them."""
  if name == "diffusers":  # 256 pixels every 192
    high, wide = spec.stride[1:]
    size, stride = (256 // high, 256 // wide), (192 // high, 192 // wide)
    return Tiling(size=size, stride=stride, rule="diffusers", fold=fold)
  if name == "diffsynth":
    return Tiling(size=(30, 52), stride=(15, 26), rule="diffsynth")
  raise ValueError(f"no tiling {name!r}; there are: {', '.join(NAMES)}.")


def places(tiling: Tiling, height: int, width: int) -> list[list[Place]]:
  """Rows of tiles that cover height x width latent cells; one tile where the rule makes one."""
  if height <= tiling.size[0] and width <= tiling.size[1]:
    return [[(slice(0, height), slice(0, width))]]
  rows, columns = (
    [slice(start, min(start + size, length)) for start in _starts(tiling.rule, length, size, step)]
    for length, size, step in zip((height, width), tiling.size, tiling.stride, strict=True)
  )
  return [[(row, column) for column in columns] for row in rows]


def join(
  tiling: Tiling,
  where: Sequence[Sequence[Place]],
  tiles: Iterable[Iterable[np.ndarray]],
  stride: tuple[int, int],
) -> np.ndarray:
  """Decoded tiles, R frames height width C each, as one video; stride: pixels per latent cell.

  The tiles are taken one by one, row by row: at most two rows of them are held.
  """
  if len(where) == 1 and len(where[0]) == 1:
    ((tile,),) = tiles
    return tile
  joined = _mixed if tiling.rule == "diffusers" else _weighed
  return joined(tiling, where, tiles, stride)


def _starts(rule: str, length: int, size: int, step: int) -> Iterator[int]:
  for start in range(0, length, step):
    # DiffSynth leaves out a tile when the one before reached the end already.
    if rule == "diffsynth" and start > 0 and start - step + size >= length:
      continue
    yield start


def _mixed(
  tiling: Tiling,
  where: Sequence[Sequence[Place]],
  tiles: Iterable[Iterable[np.ndarray]],
  stride: tuple[int, int],
) -> np.ndarray:
  overlap = [
    (size - step) * pixels
    for size, step, pixels in zip(tiling.size, tiling.stride, stride, strict=True)
  ]
  kept = [step * pixels for step, pixels in zip(tiling.stride, stride, strict=True)]
  ends = _ends(where, stride)
  whole: Any = None
  above: list[np.ndarray] = []
  for row, cells in zip(tiles, where, strict=True):
    mixed: list[np.ndarray] = []
    for j, (given, place) in enumerate(zip(row, cells, strict=True)):
      tile = np.array(given)
      if above:
        _mix(above[j], tile, overlap[0], 2, tiling.fold)
      if mixed:
        _mix(mixed[-1], tile, overlap[1], 3, tiling.fold)
      if whole is None:
        whole = np.zeros((*tile.shape[:2], *ends, tile.shape[-1]), np.float32)
      top, left = (cut.start * pixels for cut, pixels in zip(place, stride, strict=True))
      own = whole[:, :, top : top + kept[0], left : left + kept[1]]
      own[...] = tile[:, :, : own.shape[2], : own.shape[3]]
      mixed.append(tile)  # all of it: the next ones mix with what is not its own
    above = mixed
  return whole


def _mix(before: np.ndarray, tile: np.ndarray, extent: int, axis: int, fold: int) -> None:
  """Writes the first pixels of `tile` along an axis as a ramp from the last ones of `before`."""
  extent = min(extent, before.shape[axis], tile.shape[axis])
  if not extent:
    return
  shape = [1] * tile.ndim
  shape[axis] = extent
  ramp = (np.arange(extent) // fold * fold / extent).astype(np.float32).reshape(shape)
  end = np.take(before, range(before.shape[axis] - extent, before.shape[axis]), axis=axis)
  begin = tile[(slice(None),) * axis + (slice(0, extent),)]
  begin[...] = end * (1 - ramp) + begin * ramp


def _weighed(
  tiling: Tiling,
  where: Sequence[Sequence[Place]],
  tiles: Iterable[Iterable[np.ndarray]],
  stride: tuple[int, int],
) -> np.ndarray:
  ends = _ends(where, stride)
  values: Any = None
  weights = np.zeros((1, 1, *ends, 1), np.float32)
  for row, cells in zip(tiles, where, strict=True):
    for tile, place in zip(row, cells, strict=True):
      ramps = []
      for axis, cut in enumerate(place):
        border = (tiling.size[axis] - tiling.stride[axis]) * stride[axis]
        open_start, open_end = cut.start > 0, cut.stop * stride[axis] < ends[axis]
        ramps.append(_ramp(tile.shape[2 + axis], border, open_start, open_end))
      mask = np.minimum(ramps[0][:, np.newaxis], ramps[1][np.newaxis])[..., np.newaxis]
      at = tuple(
        slice(cut.start * pixels, cut.stop * pixels)
        for cut, pixels in zip(place, stride, strict=True)
      )
      if values is None:
        values = np.zeros((*tile.shape[:2], *ends, tile.shape[-1]), np.float32)
      values[:, :, *at] += tile * mask
      weights[:, :, *at] += mask
  values /= weights
  return values


def _ends(where: Sequence[Sequence[Place]], stride: tuple[int, int]) -> list[int]:
  """Height and width in pixels of the video that the tiles cover."""
  return [cut.stop * pixels for cut, pixels in zip(where[-1][-1], stride, strict=True)]


def _ramp(length: int, border: int, open_start: bool, open_end: bool) -> np.ndarray:
  """Ones that rise from 1/border at an end that has a neighbour."""
  made = np.ones(length, np.float32)
  rise = (np.arange(border, dtype=np.float32) + 1) / max(border, 1)
  if border and open_start:
    made[:border] = rise[:length]
  if border and open_end:
    made[-border:] = rise[::-1][-length:]
  return made
