"""Rotate: a piece moves into the white box and turns as the example on the left has turned.

On the left an F and below it the same F turned; on the right a piece and below it an empty box. An
answer is the turn in degrees, clockwise positive: 0, 90, 180, -90 or -180.
"""

import functools
from typing import Any

import numpy as np
from einops import rearrange

from jax_videoreason.tasks import base, draw

EXAMPLE = (".##", "##.", ".#.")
SHAPES = {  # all differ in their four orientations
  "L": ("#..", "#..", "##."),
  "J": (".#.", ".#.", "##."),
  "T": ("...", "###", ".#."),
  "P": (".##", ".##", ".#."),
  "Q": ("##.", "##.", ".#."),
  "V": ("#..", "#..", "###"),
  "K": ("##.", ".##", ".#."),
}
OOD_SHAPES = {
  "U": ("#.#", "###", "..."),
  "W": ("#..", "##.", ".##"),
  "Y": ("###", ".#.", ".#."),
}
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
GROUND, BOX = draw.BLACK, draw.WHITE
TURNS = (0, 90, 180, -90, -180)
STEP = 15  # degrees
LEAP = 50  # degrees between two frames from which on a turn is a leap
MATCH = 0.5  # least overlap (IoU) of piece and raster for an angle to be read
LEAD = 0.15
WORDS = {
  90: "the short way",
  -90: "the short way",
  180: "clockwise",
  -180: "counterclockwise",
  None: "in either direction",
}
TEMPLATES = (
  "The piece moves into the white box and turns {way} until it is turned as the F on the left is.",
  "Move the {colour} piece into the box, then rotate it {way} by the angle between the upper and "
  "the lower F.",
  "The two F shapes show a rotation. The {colour} piece slides into the white box and does the "
  "same rotation {way}.",
  "Slide the piece down into the box and turn it {way}, as the upper F was turned into the lower.",
)


def cells_of(shape: tuple[str, ...], quarters: int) -> np.ndarray:
  """bool (3 3): the shape after that many clockwise quarter turns."""
  return np.rot90(np.array([[c == "#" for c in row] for row in shape]), -quarters)


@functools.lru_cache(maxsize=4096)
def raster(
  size: int, rows: tuple[tuple[bool, ...], ...], panel: tuple[int, int], degrees: int
) -> np.ndarray:
  """Mask of a 3 x 3 piece turned about the middle of a panel, by nearest pixels.

  rows: the piece before the turn. panel: (y, x) of the panel, 0 or 1 each. The mask is shared: do
  not write into it.
  """
  cell = size // 8
  middle = [round((p + 0.5) * size / 2 - 1.5 * cell) + 1.5 * cell for p in panel]
  dy, dx = draw.offsets(size, middle)
  angle = np.deg2rad(degrees)
  y = (np.cos(angle) * dy - np.sin(angle) * dx).round(6)
  x = (np.sin(angle) * dy + np.cos(angle) * dx).round(6)
  row, column = (np.floor(v / cell + 1.5).astype(int) for v in (y, x))
  inside = (row >= 0) & (row < 3) & (column >= 0) & (column < 3)
  return inside & np.array(rows)[row.clip(0, 2), column.clip(0, 2)]


def hashable(cells: np.ndarray) -> tuple[tuple[bool, ...], ...]:
  return tuple(tuple(bool(v) for v in row) for row in cells)


def iou(seen: np.ndarray, masks: np.ndarray) -> np.ndarray:
  """Overlaps (T, N) of bool masks (T height width) and (N height width)."""
  seen, masks = (rearrange(x, "t h w -> t (h w)").astype(np.float32) for x in (seen, masks))
  both = np.einsum("tp,np->tn", seen, masks)  # no threads: on a busy machine they wait for long
  return both / (seen.sum(axis=1)[:, None] + masks.sum(axis=1)[None] - both)


class Rotate(base.Task):
  name = "rotate"
  number = 6

  def draw_problem(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> base.Problem | None:
    """`ood` pieces have shapes that training lacks; half turns in either direction if ambiguous."""
    shapes = OOD_SHAPES if split == "ood" else SHAPES
    turn = int(rng.choice([90, -90, 180, -180]))
    if ambiguous:
      turn = 180
    piece, example = (COLOURS[int(i)] for i in rng.permutation(len(COLOURS))[:2])
    return {
      "shape": list(shapes)[int(rng.integers(len(shapes)))],
      "colour": piece,
      "quarters": int(rng.integers(4)),
      "example": {"colour": example, "quarters": int(rng.integers(4))},
      "turn": None if ambiguous else turn,
    }

  def right_answers(self, problem: base.Problem) -> list[base.Answer]:
    return [180, -180] if problem["turn"] is None else [problem["turn"]]

  def options(self, problem: base.Problem) -> list[base.Answer]:
    return list(TURNS)

  def templates(self, problem: base.Problem) -> list[str]:
    way = WORDS[problem["turn"]]
    return [t.format(way=way, colour=problem["colour"]) for t in TEMPLATES]

  # --- drawing ---

  def cells(self, problem: base.Problem) -> np.ndarray:
    """bool (3 3): the piece as the first frame shows it."""
    return cells_of((SHAPES | OOD_SHAPES)[problem["shape"]], problem["quarters"])

  def examples(self, problem: base.Problem) -> list[np.ndarray]:
    """The F and the turned F, bool (3 3)."""
    before = problem["example"]["quarters"]
    turn = 180 if problem["turn"] is None else problem["turn"]
    return [cells_of(EXAMPLE, before), cells_of(EXAMPLE, before + turn // 90)]

  def boxes(self, panel: tuple[int, int]) -> np.ndarray:
    """(9, 4): the cells of a panel."""
    cell = self.size // 8
    y, x = (round((p + 0.5) * self.size / 2 - 1.5 * cell) for p in panel)
    return np.array(
      [
        (y + i * cell, x + j * cell, y + (i + 1) * cell, x + (j + 1) * cell)
        for i in range(3)
        for j in range(3)
      ]
    )

  def target(self) -> tuple[int, int, int, int]:
    """The white box: the lower right panel but for a rim."""
    half, rim = self.size // 2, max(1, self.size // 32)
    return half + rim, half + rim, 2 * half - rim, 2 * half - rim

  def schedule(self, turn: int) -> list[tuple[float, int]]:
    """Per frame, share of the way into the box and degrees turned."""
    last = self.frames - 2
    moving = last // 5
    shares = [min(1.0, t / moving) for t in range(self.frames)]
    turned = [min(1.0, max(0.0, (t - moving) / (last - moving))) for t in range(self.frames)]
    steps = abs(turn) // STEP
    sign = 1 if turn > 0 else -1
    return [(s, sign * STEP * round(v * steps)) for s, v in zip(shares, turned, strict=True)]

  def draw_answer(self, problem: base.Problem, answer: base.Answer) -> np.ndarray:
    ground = draw.canvas(self.size, GROUND)
    ground[draw.rectangle(self.size, self.target())] = BOX
    for y, cells in enumerate(self.examples(problem)):
      mask = raster(self.size, hashable(cells), (y, 0), 0)
      ground[mask] = draw.colour(problem["example"]["colour"])
    rows, colour = hashable(self.cells(problem)), draw.colour(problem["colour"])
    start = raster(self.size, rows, (0, 1), 0)
    down = int(self.boxes((1, 1))[0, 0] - self.boxes((0, 1))[0, 0])
    maps = np.repeat(ground[None], self.frames, axis=0)
    for canvas, (share, degrees) in zip(maps, self.schedule(int(answer)), strict=True):
      if share < 1:
        canvas[np.roll(start, round(share * down), axis=0)] = colour
      else:
        canvas[raster(self.size, rows, (1, 1), degrees)] = colour
    return maps

  # --- reading ---

  def kept(self, problem: base.Problem) -> list[base.Kept]:
    """Both F panels, exactly; the piece's panel and the box may show the piece or be empty."""
    example, piece = draw.colour(problem["example"]["colour"]), draw.colour(problem["colour"])
    cells = np.concatenate([self.boxes((0, 0)), self.boxes((1, 0))])
    shown = np.concatenate([c.ravel() for c in self.examples(problem)])
    panels = np.concatenate([self.boxes((0, 1)), self.boxes((1, 1))])
    # Piece, ground and box blur to something like grey where cells are small.
    free = [[GROUND, BOX, piece, draw.GREY, draw.UNDECIDED]] * 18
    return [
      base.kept(draw.cells(self.size, cells), [[example if s else GROUND] for s in shown]),
      base.kept(draw.cells(self.size, panels), free),
    ]

  def piece(self, labels: np.ndarray, problem: base.Problem) -> np.ndarray:
    """Pixels of the piece: bool (T height width), nothing in the left half."""
    mask = labels == draw.colour(problem["colour"])
    mask[..., : self.size // 2] = False
    return mask

  def begins(self, labels: np.ndarray, problem: base.Problem) -> bool:
    """Whether the clip starts from this piece: to turn another is no answer.

    One cell may be unreadable: a lone one at 32 pixels can blur away.
    """
    where = draw.cells(self.size, self.boxes((0, 1)))
    wanted = np.where(self.cells(problem).ravel(), draw.colour(problem["colour"]), GROUND)
    seen = draw.majority(labels[:1], where)[0]
    other = np.isin(seen, [GROUND, draw.colour(problem["colour"])]) & (seen != wanted)
    return not other.any() and int((seen == wanted).sum()) >= 8

  def angles(self, labels: np.ndarray, problem: base.Problem) -> np.ndarray:
    """Degrees turned as each frame shows it, -180 < angle <= 180.

    nan = the piece is not in the box, or would fit as well turned the other way round.
    """
    rows = hashable(self.cells(problem))
    degrees = np.arange(-180 + STEP, 181, STEP)
    turned = [raster(self.size, rows, (1, 1), int(d)) for d in degrees]
    upright = raster(self.size, rows, (1, 1), 0)
    coming = [np.roll(upright, -up, axis=0) for up in range(1, self.size // 4)]
    overlap = iou(self.piece(labels, problem), np.stack(turned))
    most, best = overlap.max(axis=1), overlap.argmax(axis=1)
    mirror = np.append(np.arange(len(degrees) - 1)[::-1], len(degrees) - 1)[best]
    lead = most - np.take_along_axis(overlap, mirror[:, None], axis=1)[:, 0]
    clear = (lead >= 0.1) | (mirror == best)
    arrived = most >= iou(self.piece(labels, problem), np.stack(coming)).max(axis=1)
    return np.where((most >= MATCH) & clear & arrived, degrees[best], np.nan)

  def turned(self, labels: np.ndarray, problem: base.Problem) -> float:
    """Degrees turned in all, without leaps."""
    seen = self.angles(labels, problem)
    steps = np.diff(np.append(0.0, seen[~np.isnan(seen)]))
    steps = (steps + 180) % 360 - 180
    return float(steps[abs(steps) <= LEAP].sum())

  def overlaps(self, labels: np.ndarray, problem: base.Problem) -> dict[int, float] | None:
    """IoU of the cells in the box on the last frame with each orientation.

    None when a cell is neither the piece nor empty, or changes on the last two frames.
    """
    colour = draw.colour(problem["colour"])
    seen = draw.majority(labels[-2:], draw.cells(self.size, self.boxes((1, 1))))
    if (seen[0] != seen[1]).any() or not set(seen[1].tolist()) <= {BOX, colour}:
      return None
    shown, cells = (seen[1] == colour).reshape(3, 3), self.cells(problem)
    found = {}
    for turn in (0, 90, 180, 270):
      wanted = np.rot90(cells, -turn // 90)
      found[turn] = float((shown & wanted).sum() / (shown | wanted).sum())
    return found

  def orientation(self, labels: np.ndarray, problem: base.Problem) -> tuple[int, float] | None:
    """(degrees 0..270, IoU) of the orientation that leads the others by LEAD."""
    found = self.overlaps(labels, problem)
    if found is None:
      return None
    second, best = sorted(found, key=lambda turn: found[turn])[-2:]
    return (best, found[best]) if found[best] >= found[second] + LEAD else None

  def read(self, labels: np.ndarray, problem: base.Problem) -> base.Answer | None:
    """The orientation says the turn, but for half turns, whose direction the way there says."""
    shown = self.orientation(labels, problem)
    if shown is None:
      return None
    if shown[0] != 180:
      return {0: 0, 90: 90, 270: -90}[shown[0]]
    if len(labels) < self.frames:
      raise base.Unseen(
        f"the piece ends half turned and only the last {len(labels)} of {self.frames} frames are "
        "given: give all, which show the direction."
      )
    turned = self.turned(labels, problem)
    return None if abs(turned) < 90 else (180 if turned > 0 else -180)

  def final(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """Overlap with the right orientation, if the answer is right."""
    problem = metadata["problem"]
    right = self.begins(labels, problem) and self.read(labels, problem) in metadata["answers"]
    shown = self.orientation(labels, problem) if right else None
    return shown[1] if shown else 0.0

  def process(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """Share of the way into the box and of the turn made in small steps, times the share of frames
    on which the piece keeps its area and does not go back up."""
    problem = metadata["problem"]
    if not self.begins(labels, problem):
      return 0.0
    mask = self.piece(labels, problem)
    cell = self.size // 8
    count = mask.sum(axis=(1, 2))
    area = count / (self.cells(problem).sum() * cell**2)
    middle = (mask.sum(axis=2) * (np.arange(self.size) + 0.5)).sum(axis=1) / np.maximum(count, 1)
    height = middle * 2 / self.size  # in panels
    steps = np.diff(height)
    moved = np.where(abs(steps) <= 0.6, steps, 0).cumsum().max() / 0.75  # the turn lifts it
    turn = max(self.turned(labels, problem) / (0.9 * int(a)) for a in metadata["answers"])
    same = abs(area[1:] - 1) <= 0.15 + 1.4 / cell  # a fraction of a pixel all round may blur away
    legal = same & ((steps >= -0.1) | (height[1:] >= 1.2))
    return float(np.clip([moved, turn], 0, 1).prod() * legal.mean())

  def soft(self, frames: np.ndarray, problem: base.Problem) -> dict[base.Answer, float]:
    """An orientation is as present as the least right of its cells; a half turn also as its
    direction is on the frames on which the truth stands near a quarter."""
    colour, cells = draw.colour(problem["colour"]), self.cells(problem)
    where = draw.cells(self.size, self.boxes((1, 1)))
    nine = (np.full(9, BOX), np.full(9, colour))
    filled = draw.occupancy(frames[-2:], where, colour, nine[0]).mean(axis=0)
    blank = draw.occupancy(frames[-2:], where, BOX, nine[1]).mean(axis=0)
    found: dict[base.Answer, float] = {}
    for turn in TURNS:
      wanted = np.rot90(cells, -turn // 90).ravel()
      found[turn] = float(np.where(wanted, filled, blank).min())
    for turn in (180, -180):
      found[turn] *= self.direction(frames, problem, turn)
    return found

  def direction(self, frames: np.ndarray, problem: base.Problem, turn: int) -> float:
    """Occupancy of the pixels that a half turn fills and one the other way round does not."""
    rows, colour = hashable(self.cells(problem)), draw.colour(problem["colour"])
    seen = []
    for frame, (share, degrees) in zip(frames, self.schedule(turn), strict=True):
      if share == 1 and 45 <= abs(degrees) <= 135:
        own, other = (raster(self.size, rows, (1, 1), d) for d in (degrees, -degrees))
        where = draw.regions([own & ~other])
        seen.append(draw.occupancy(frame[None], where, colour, np.array([BOX])).item())
    return float(np.mean(seen))

  def canonical(self, problem: base.Problem) -> Any:
    """The first frame and the turn; not the colour of the example."""
    return problem | {"example": problem["example"]["quarters"]}
