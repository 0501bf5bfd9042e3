"""Occlusion: a grey curtain slides down over coloured squares and leaves them as they were.

An answer says which colour stands in which cell once the curtain is gone, cells in reading order,
e.g. "3:red 9:blue". There is one right answer; the wrong ones exchange colours.
"""

import itertools

import numpy as np

from jax_videoreason.tasks import base, draw

SIDE = 4
COLOURS = ("red", "green", "blue", "yellow", "purple")
OOD_COLOUR = "cyan"
GROUND, CURTAIN = draw.BLACK, draw.GREY
TALL = 2.5  # height of the curtain, in cells: three frames and more of full cover
TEMPLATES = (
  "The grey curtain slides down over the squares and leaves the picture at the bottom. The "
  "squares stay where they are.",
  "A grey curtain moves down, hides the coloured squares for a while and disappears below. Nothing "
  "else changes.",
  "Lower the grey curtain until it has passed all squares and is gone. They keep place and colour.",
  "The curtain falls past every square and out of the picture; behind it all is as before.",
)


class Occlusion(base.Task):
  name = "occlusion"
  number = 4
  ambiguous = False

  def boxes(self) -> np.ndarray:
    """(4 4 box): the cells of the squares; the curtain hangs above them."""
    return draw.lattice(self.size, SIDE + 1, SIDE)[1:]

  def edges(self) -> np.ndarray:
    """(T, 2): top and bottom of the curtain on each frame, in pixels; gone on the last two."""
    cell = self.size // (SIDE + 1)
    low = int(self.boxes()[0, 0, 0])
    way = np.minimum(np.arange(self.frames) / (self.frames - 2), 1.0)
    bottom = low + way * (self.size - low + TALL * cell)
    return np.stack([bottom - TALL * cell, bottom], axis=1).round().astype(int)

  def draw_problem(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> base.Problem | None:
    """2 to 4 squares of different colours; in `ood` one of them is cyan."""
    count = int(rng.integers(2, 5))
    names = [COLOURS[int(i)] for i in rng.permutation(len(COLOURS))[:count]]
    if split == "ood":
      names[0] = OOD_COLOUR
    cells = rng.permutation(SIDE * SIDE)[:count]
    squares = [{"cell": int(c), "colour": n} for c, n in zip(cells, names, strict=True)]
    return {"squares": sorted(squares, key=lambda s: s["cell"])}

  def right_answers(self, problem: base.Problem) -> list[base.Answer]:
    return [spell(cells_of(problem), colours_of(problem))]

  def options(self, problem: base.Problem) -> list[base.Answer]:
    orders = itertools.permutations(colours_of(problem))
    return [spell(cells_of(problem), order) for order in orders]

  def templates(self, problem: base.Problem) -> tuple[str, ...]:
    return TEMPLATES

  def draw_answer(self, problem: base.Problem, answer: base.Answer) -> np.ndarray:
    """The colours change, if they do, while their square is covered."""
    edges = self.edges()
    maps = np.full((self.frames, self.size, self.size), GROUND, np.int8)
    after = [word.split(":")[1] for word in str(answer).split()]
    for square, colour in zip(problem["squares"], after, strict=True):
      y0, x0, y1, x1 = self.square(square["cell"])
      for t, (top, _) in enumerate(edges):
        seen = colour if top >= y0 else square["colour"]
        maps[t, y0:y1, x0:x1] = draw.colour(seen)
    for t, (top, bottom) in enumerate(edges):
      maps[t, max(top, 0) : max(bottom, 0)] = CURTAIN
    return maps

  def square(self, cell: int) -> tuple[int, int, int, int]:
    """The box that is filled: its cell, without a rim from 8 pixels on."""
    y0, x0, y1, x1 = (int(v) for v in self.boxes()[cell // SIDE, cell % SIDE])
    rim = (y1 - y0) // 8
    return y0 + rim, x0 + rim, y1 - rim, x1 - rim

  @property
  def area(self) -> int:
    """Pixels of a square."""
    y0, x0, y1, x1 = self.square(0)
    return (y1 - y0) * (x1 - x0)

  def kept(self, problem: base.Problem) -> list[base.Kept | base.NoObject]:
    """The squares' cells, the empty ones, and anywhere no square that does not belong there."""
    own = {s["cell"]: draw.colour(s["colour"]) for s in problem["squares"]}
    empty = [c for c in range(SIDE * SIDE) if c not in own]
    everywhere = np.ones((self.size, self.size), bool)
    at_home = {
      own[c]: draw.rectangle(self.size, self.boxes()[c // SIDE, c % SIDE].tolist()) for c in own
    }
    belong = {GROUND: True, CURTAIN: True, **at_home}
    foreign = base.no_object(everywhere, belong, self.area)
    cells = [
      base.kept(
        self.regions(list(cells)), [[own.get(c, GROUND), CURTAIN, draw.UNDECIDED] for c in cells]
      )
      for cells in (own, empty)
    ]
    return [*cells, foreign]

  def regions(self, cells: list[int]) -> draw.Regions:
    return draw.cells(self.size, np.array([self.square(c) for c in cells]))

  def read(self, labels: np.ndarray, problem: base.Problem) -> base.Answer | None:
    seen = draw.majority(labels[-2:], self.regions(list(range(SIDE * SIDE))))
    hanging = (labels[-2:, : int(self.boxes()[0, 0, 0])] == CURTAIN).mean()
    cells = cells_of(problem)
    rest = np.delete(seen, cells, axis=1)
    if (seen[0] != seen[1]).any() or (rest != GROUND).any() or hanging > 0.2:
      return None
    grey = draw.has_object(labels[-1] == CURTAIN, self.area)
    if (seen[1][cells] == draw.UNDECIDED).any() or grey:
      return None
    answer = spell(cells, [draw.NAMES[i] for i in seen[1][cells]])
    return answer if answer in self.options(problem) else None

  def process(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """Share of (square, frame) rightly hidden times share rightly seen; edges do not count."""
    problem = metadata["problem"]
    cells = cells_of(problem)
    boxes = np.array([self.square(c) for c in cells])
    own = np.array([draw.colour(c) for c in colours_of(problem)])
    seen = draw.majority(labels, self.regions(cells))
    hidden = np.stack([frames for _, _, frames in self.hidden(problem)], axis=1)
    top, bottom = (self.edges()[:, i, None] for i in range(2))
    clear = (bottom <= boxes[None, :, 0]) | (top >= boxes[None, :, 2])
    return float((seen == CURTAIN)[hidden].mean() * (seen == own[None])[clear].mean())

  def hidden(
    self, problem: base.Problem
  ) -> list[tuple[str, tuple[int, int, int, int], np.ndarray]]:
    """Of each square: its colour, its box, and on which frames (T bool) all of it is covered."""
    top, bottom = self.edges().T
    boxes = [self.square(cell) for cell in cells_of(problem)]
    return [
      (colour, box, (top <= box[0]) & (bottom >= box[2]))
      for colour, box in zip(colours_of(problem), boxes, strict=True)
    ]

  def soft(self, frames: np.ndarray, problem: base.Problem) -> dict[base.Answer, float]:
    """An arrangement is as present as the least visible of its squares, once no curtain hangs."""
    cells = cells_of(problem)
    where = self.regions(cells)
    marks = [draw.colour(name) for name in colours_of(problem)]
    seen = {
      draw.NAMES[mark]: draw.among(frames[-2:], where, mark, [GROUND, *marks]).mean(axis=0)
      for mark in marks
    }
    strip = draw.regions([draw.rectangle(self.size, (0, 0, self.boxes()[0, 0, 0], self.size))])
    gone = draw.occupancy(frames[-2:], strip, GROUND, np.array([CURTAIN])).mean()
    return {
      spell(cells, order): float(gone * min(seen[name][i] for i, name in enumerate(order)))
      for order in itertools.permutations(colours_of(problem))
    }


def cells_of(problem: base.Problem) -> list[int]:
  return [s["cell"] for s in problem["squares"]]


def colours_of(problem: base.Problem) -> list[str]:
  return [s["colour"] for s in problem["squares"]]


def spell(cells: list[int], colours) -> str:
  """The answer in words."""
  return " ".join(f"{c}:{name}" for c, name in zip(cells, colours, strict=True))
