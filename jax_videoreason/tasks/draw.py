"""Flat colours, grids and shapes, and the decoder that reads them back.

A picture is drawn as an int8 map of palette indices (height width), so every truth frame is flat
and exact; `paint` turns maps into uint8 RGB. Reading goes the other way: `label` gives each pixel
its nearest palette colour, `majority` each region (a cell, an object) the colour most of it has.
All lengths are pixels of the picture being drawn; tasks state theirs in cells or shares of `size`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from einops import rearrange

PALETTE: dict[str, tuple[int, int, int]] = {
  "black": (20, 20, 20),
  "white": (240, 240, 240),
  "grey": (130, 130, 130),
  "red": (220, 40, 40),
  "green": (40, 180, 60),
  "blue": (40, 70, 220),
  "yellow": (240, 220, 40),
  "purple": (180, 50, 200),
  "cyan": (40, 200, 220),
}
NAMES = tuple(PALETTE)
BLACK, WHITE, GREY, RED, GREEN, BLUE, YELLOW, PURPLE, CYAN = range(len(NAMES))
HUES = (RED, GREEN, BLUE, YELLOW, PURPLE, CYAN)  # of objects; grounds and walls have none
UNDECIDED = -1
RGB = np.array(list(PALETTE.values()), np.uint8)
# Squared distance of a pixel (r g b 1) from each colour, less |pixel|^2, times 16 plus the index of
# the colour, so that one minimum finds both; whole numbers below 2^24, which float32 holds exactly.
CODED = np.array(
  [
    [-32 * r, -32 * g, -32 * b, 16 * (r * r + g * g + b * b) + i]
    for i, (r, g, b) in enumerate(RGB.tolist())
  ],
  np.float32,
)
PIECE = 2**12  # pixels at once: so few that the product of numpy takes no threads
REACH = 90.0  # a pixel further than this from all nine colours has none: a blend stays a blend
SHARE = 0.6  # a region whose leading colour covers less is undecided
TINGED = 0.3  # most of a ring that may be neither ground nor white, as blurred edges are
RING_START = 4  # first frame with a piece of a ring
ASKED = 64  # sets of regions that are kept, of each kind
STEEP = 4.5  # of occupancy: half the square of 3, as its scale is a third of the way to the mark
VISIBLE = 0.2  # share of a mark in a blend from which a candidate counts as present

Rows = tuple[tuple[float, ...], ...]


def colour(name: str) -> int:
  """Palette index of a colour name."""
  if name not in PALETTE:
    raise ValueError(f"no colour {name!r} in the palette; it has: {', '.join(NAMES)}.")
  return NAMES.index(name)


def canvas(size: int, ground: int) -> np.ndarray:
  """An int8 map (size, size) of one colour."""
  return np.full((size, size), ground, np.int8)


def paint(maps: np.ndarray) -> np.ndarray:
  """Palette indices (... height width) -> uint8 RGB (... height width 3)."""
  return RGB[maps]


# --- shapes: boolean masks (size, size) ---


@functools.cache
def lattice(size: int, rows: int, columns: int) -> np.ndarray:
  """Boxes (rows, columns, 4) = y0 x0 y1 x1 of equal square cells, centred in the picture; one array
  for all who ask, which can't be written to."""
  cell = size // max(rows, columns)
  if cell < 4:
    raise ValueError(
      f"{rows} x {columns} cells in {size} pixels are {cell} pixels each, wanted at least 4: "
      f"use size={4 * max(rows, columns)} or more."
    )
  y = (size - cell * rows) // 2 + cell * np.arange(rows)
  x = (size - cell * columns) // 2 + cell * np.arange(columns)
  y, x = np.meshgrid(y, x, indexing="ij")
  boxes = np.stack([y, x, y + cell, x + cell], axis=-1)
  boxes.flags.writeable = False
  return boxes


def shrink(box: Sequence[float], share: float) -> tuple[int, int, int, int]:
  """The centred box with about `share` of the area of `box`, never empty."""
  y0, x0, y1, x1 = (int(v) for v in box)
  by = min(round((y1 - y0) * (1 - share**0.5) / 2), (y1 - y0 - 1) // 2)
  bx = min(round((x1 - x0) * (1 - share**0.5) / 2), (x1 - x0 - 1) // 2)
  return y0 + by, x0 + bx, y1 - by, x1 - bx


def rectangle(size: int, box: Sequence[int]) -> np.ndarray:
  """Mask of a box y0 x0 y1 x1."""
  mask = np.zeros((size, size), bool)
  mask[int(box[0]) : int(box[2]), int(box[1]) : int(box[3])] = True
  return mask


def blocks(height: int, width: int) -> list[tuple[int, int, int, int]]:
  """The boxes y0 x0 y1 x1 of 4 x 4 equal parts, row by row."""
  ys, xs = ([round(i * length / 4) for i in range(5)] for length in (height, width))
  return [
    (y0, x0, y1, x1) for y0, y1 in itertools.pairwise(ys) for x0, x1 in itertools.pairwise(xs)
  ]


def offsets(size: int, centre: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
  """(dy, dx) of every pixel's middle from `centre` = (y, x); the picture spans 0..size."""
  middle = np.arange(size) + 0.5
  return np.meshgrid(middle - centre[0], middle - centre[1], indexing="ij")


def disc(size: int, centre: Sequence[float], radius: float) -> np.ndarray:
  """Mask of a disc."""
  dy, dx = offsets(size, centre)
  return dy**2 + dx**2 <= radius**2


def ring(size: int, centre: Sequence[float], inside: float, outside: float) -> np.ndarray:
  """Mask of a ring between two radii."""
  dy, dx = offsets(size, centre)
  squared = dy**2 + dx**2
  return (squared > inside**2) & (squared <= outside**2)


def clockwise(size: int, centre: Sequence[float]) -> np.ndarray:
  """The angle of every pixel's middle round `centre`, clockwise from the top, 0..2 pi."""
  dy, dx = offsets(size, centre)
  return np.arctan2(dx, -dy) % (2 * np.pi)


def shape(size: int, kind: str, centre: Sequence[float], radius: float) -> np.ndarray:
  """Mask of a "circle", "square", "triangle" or "cross" of half width `radius`."""
  dy, dx = offsets(size, centre)
  if kind == "circle":
    return dy**2 + dx**2 <= radius**2
  if kind == "square":
    return np.maximum(abs(dy), abs(dx)) <= 0.75 * radius
  if kind == "triangle":
    return (dy >= -radius) & (dy <= 0.6 * radius) & (abs(dx) <= (dy + radius) / 2 + 0.1 * radius)
  if kind == "cross":
    return (np.minimum(abs(dy), abs(dx)) <= radius / 3) & (np.maximum(abs(dy), abs(dx)) <= radius)
  raise ValueError(f"no shape {kind!r}; there are: circle, square, triangle, cross.")


def ring_radii(slot: float) -> tuple[float, float]:
  """Inner and outer radius of the ring round an object in a square slot of `slot` pixels."""
  return 0.29 * slot, 0.48 * slot


def draw_rings(maps: np.ndarray, centres: Sequence[Sequence[float]], slot: float) -> None:
  """White rings that grow clockwise, whole two frames before the end: maps (T size size)."""
  growing = len(maps) - 2 - RING_START + 1
  for centre in centres:
    whole = ring(maps.shape[-1], centre, *ring_radii(slot))
    angle = clockwise(maps.shape[-1], centre)
    for t in range(RING_START, len(maps)):
      turn = (t - RING_START + 1) / growing
      maps[t][whole & (angle < turn * 2 * np.pi) if turn < 1 else whole] = WHITE


# --- reading ---


def firm(mask: np.ndarray) -> np.ndarray:
  """The pixels of a mask that keep most of themselves under a 1 2 1 blur along both axes."""
  soft = np.pad(mask.astype(np.float32), 1, mode="edge")
  soft = (soft[:-2] + 2 * soft[1:-1] + soft[2:]) / 4
  soft = (soft[:, :-2] + 2 * soft[:, 1:-1] + soft[:, 2:]) / 4
  return mask & (soft >= 0.7)


@dataclasses.dataclass(frozen=True, eq=False)
class Regions:
  """N sets of pixels to be read together: cells, objects, arcs. Built by `regions`.

  They can't be written to: those of `cells`, `rings` and `outside` are shared, as every step and
  seed of a case asks for the same ones.
  """

  index: np.ndarray  # flat pixel numbers, one region after another
  start: np.ndarray  # (N,) where each region begins in `index`
  count: np.ndarray  # (N,) its pixels

  def __len__(self) -> int:
    return len(self.start)


def regions(masks: Sequence[np.ndarray]) -> Regions:
  """Regions of boolean masks (size, size); none may be empty."""
  index = [np.flatnonzero(mask) for mask in masks]
  count = np.array([len(i) for i in index], int)
  if not len(count) or not count.all():
    raise ValueError(f"regions have {count.tolist()} pixels, wanted at least 1 in each.")
  made = Regions(np.concatenate(index), np.cumsum(count) - count, count)
  for part in (made.index, made.start, made.count):
    part.flags.writeable = False
  return made


def cells(size: int, boxes: np.ndarray) -> Regions:
  """The inner half (by area) of each box: boxes (... 4) in row order."""
  flat = rearrange(boxes[None], "one ... box -> (one ...) box")
  return _cells(size, _rows(flat))


@functools.lru_cache(ASKED)
def _cells(size: int, boxes: Rows) -> Regions:
  return regions([rectangle(size, shrink(box, 0.5)) for box in boxes])


def rings(size: int, centres: Sequence[Sequence[float]], slot: float) -> Regions:
  """The middle half (by width) of the ring round each centre."""
  return _rings(size, _rows(centres), slot)


@functools.lru_cache(ASKED)
def _rings(size: int, centres: Rows, slot: float) -> Regions:
  inside, outside = ring_radii(slot)
  edge = (outside - inside) / 4
  return regions([ring(size, c, inside + edge, outside - edge) for c in centres])


def outside(size: int, centres: Sequence[Sequence[float]], slot: float) -> Regions:
  """The ground beyond all rings, by blocks of a quarter of the picture."""
  return _outside(size, _rows(centres), slot)


@functools.lru_cache(ASKED)
def _outside(size: int, centres: Rows, slot: float) -> Regions:
  apart = np.ones((size, size), bool)
  for centre in centres:
    apart &= ~disc(size, centre, ring_radii(slot)[1] + 1)
  parts = [apart & rectangle(size, box) for box in blocks(size, size)]
  least = 0.05 * (size / 4) ** 2
  return regions([part for part in parts if part.sum() >= least])


def _rows(values: Iterable[Sequence[float]]) -> Rows:
  """Boxes or centres as a cache takes them."""
  return tuple(tuple(float(v) for v in row) for row in values)


def label(frames: np.ndarray) -> np.ndarray:
  """Nearest palette colour of each pixel: uint8 (T height width 3) -> int8 (T height width).

  UNDECIDED where no colour is within REACH.
  """
  pixels = rearrange(frames, "t h w c -> (t h w) c")
  found = np.empty(len(pixels), np.int8)
  for low in range(0, len(pixels), PIECE):
    part = pixels[low : low + PIECE]
    rows = np.ones((4, len(part)), np.float32)
    rows[:3] = part.T
    nearest = (CODED @ rows).min(axis=0).astype(np.int32)
    nearest += 16 * np.einsum("cp,cp->p", rows[:3], rows[:3]).astype(np.int32)
    found[low : low + PIECE] = np.where(nearest >> 4 <= int(REACH**2), nearest & 15, UNDECIDED)
  return rearrange(found, "(t h w) -> t h w", t=len(frames), h=frames.shape[1])


def has_object(hits: np.ndarray, pixels: float) -> bool:
  """Whether a mask (height width) fills a square of the area `pixels` somewhere, SHARE of it."""
  side, least = min(math.ceil(pixels**0.5), *hits.shape), SHARE * pixels
  if hits.sum() < least:
    return False
  sums = np.pad(hits.astype(np.int32), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
  rows = sums[side:] - sums[:-side]
  return bool((rows[:, side:] - rows[:, :-side]).max() >= least)


def shares(labels: np.ndarray, where: Regions, of: np.ndarray | None = None) -> np.ndarray:
  """Share of each colour in each region: labels (T height width) -> (T, N, 9).

  of: bool (N, 10), colours to be taken together, "undecided" the last -> (T, N).
  """
  picked = rearrange(labels, "t h w -> t (h w)")[:, where.index]
  if of is not None:
    taken = np.repeat(of, where.count, axis=0)[np.arange(len(where.index)), picked]
    return np.add.reduceat(taken.astype(np.float32), where.start, axis=1) / where.count
  hits = (picked[..., None] == np.arange(len(NAMES))).astype(np.float32)
  return np.add.reduceat(hits, where.start, axis=1) / where.count[:, None]


def majority(labels: np.ndarray, where: Regions) -> np.ndarray:
  """Colour of each region, UNDECIDED below SHARE: labels (T height width) -> (T, N)."""
  table = shares(labels, where)
  return np.where(table.max(-1) >= SHARE, table.argmax(-1), UNDECIDED)


def mean_colour(frames: np.ndarray, where: Regions) -> np.ndarray:
  """Of each region, RGB in 0..255: frames uint8 (T height width 3) -> float (T, N, 3)."""
  pixels = rearrange(frames, "t h w c -> t (h w) c")[:, where.index].astype(np.float64)
  return np.add.reduceat(pixels, where.start, axis=1) / where.count[:, None]


def occupancy(
  frames: np.ndarray,
  where: Regions,
  mark: int,
  ground: np.ndarray,
  others: Iterable[np.ndarray] = (),
) -> np.ndarray:
  """Soft reading, exp(-|rgb - mark|^2 / 2 s^2) of each region's mean colour: (T, N) in 0..1.

  ground: (N,) the colour index each region has when it is not marked. s is a third of the
  distance from ground to mark, so a blend with a share b of the mark reads exp(-4.5 (1 - b)^2),
  which `blended` takes back: an even one .32, one of VISIBLE .06 and an unmarked region .01,
  whatever the two colours are. others: RGB (3,) or (N, 3) of what else a region may show unmarked,
  which is read as the ground is, however near the mark its colour lies.
  """
  mean = mean_colour(frames, where)
  target = RGB[mark].astype(np.float64)
  scale = ((RGB[ground] - target) ** 2).sum(-1) / 9
  away = ((mean - target) ** 2).sum(-1) / (2 * scale)
  for other in others:
    line = target - other
    along = ((target - mean) * line).sum(-1) / np.maximum((line**2).sum(-1), 1)
    away = np.maximum(away, STEEP * np.maximum(along, 0) ** 2)
  return np.exp(-away)


def among(frames: np.ndarray, where: Regions, mark: int, shown: Sequence[int]) -> np.ndarray:
  """`occupancy` (T, N) of a mark where a region shows one of several colours, `shown`, or a blend.

  It is measured against the one that is furthest from it: a blend with a nearer one, of which no
  more than that one's distance is seen, would have the mark read for less than its share.
  """
  rest = [colour for colour in shown if colour != mark]
  away = [np.linalg.norm(RGB[colour].astype(float) - RGB[mark]) for colour in rest]
  furthest = rest[int(np.argmax(away))]
  others = [RGB[colour] for colour in rest if colour != furthest]
  return occupancy(frames, where, mark, np.full(len(where), furthest), others)


def blended(occupancy: np.ndarray) -> np.ndarray:
  """The share of a mark in a blend that has this occupancy, 0..1."""
  away = -np.log(np.maximum(occupancy, math.exp(-STEEP))) / STEEP
  return 1 - np.sqrt(np.maximum(away, 0))
