"""Maze: a red dot leaves a trail along the shortest way from the green square to the blue one.

The lattice alternates rooms (even row, even column) and passages. An answer is the route in moves
of one cell, e.g. "RRDDLL"; a clip that ends in a dead end gives that route, which is wrong.

Some plain mazes are one corridor from end to end: they have one option, no wrong answer, and a cut
to a random answer is always right. In a few ambiguous ones all options are right. They stay, since
the weights and sets that ship were made with them.
"""

import functools
from typing import Any

import numpy as np

from jax_videoreason.tasks import base, draw

MOVES = {"U": (-1, 0), "R": (0, 1), "D": (1, 0), "L": (0, -1)}
WALL, FLOOR = draw.BLACK, draw.WHITE
TEMPLATES = (
  "The red dot travels from the green square to the blue square by the shortest way and leaves "
  "a red trail. It never crosses a black wall.",
  "Solve the maze: a red trail grows from the green start to the blue goal along a shortest "
  "white path.",
  "Draw the shortest route through the maze in red, from green to blue, without touching walls.",
  "Move the red dot through the white corridors to the blue square. Take a shortest path and "
  "mark it in red.",
)
MOST_OPTIONS = 64

Cell = tuple[int, int]


@functools.lru_cache(maxsize=16)
def layout(size: int, side: int) -> tuple[np.ndarray, draw.Regions]:
  boxes = draw.lattice(size, side, side)
  return boxes, draw.cells(size, boxes)


def walk(start: Cell, moves: str) -> list[Cell]:
  """Cells of a route, the start included."""
  cells = [start]
  for move in moves:
    dy, dx = MOVES[move]
    cells.append((cells[-1][0] + dy, cells[-1][1] + dx))
  return cells


def carve(rng: np.random.Generator, rooms: int) -> set[Cell]:
  """Open cells of a perfect maze by depth-first search over rooms x rooms."""
  first = (2 * int(rng.integers(rooms)), 2 * int(rng.integers(rooms)))
  opened, stack = {first}, [first]
  while stack:
    y, x = stack[-1]
    ways = [
      (dy, dx)
      for dy, dx in MOVES.values()
      if 0 <= y + 2 * dy < 2 * rooms - 1
      and 0 <= x + 2 * dx < 2 * rooms - 1
      and (y + 2 * dy, x + 2 * dx) not in opened
    ]
    if not ways:
      stack.pop()
      continue
    dy, dx = ways[int(rng.integers(len(ways)))]
    opened |= {(y + dy, x + dx), (y + 2 * dy, x + 2 * dx)}
    stack.append((y + 2 * dy, x + 2 * dx))
  return opened


def several_ways(rng: np.random.Generator, opened: set[Cell], start: Cell, goal: Cell) -> set[Cell]:
  """Opens walls until there are 2 to 4 shortest ways, and closes again what those do not need."""
  side = max(max(cell) for cell in opened) + 1
  closed = [(y, x) for y in range(side) for x in range(side) if (y + x) % 2]
  closed = [cell for cell in closed if cell not in opened]
  more: list[Cell] = []
  for i in rng.permutation(len(closed)):
    more.append(closed[i])
    count = len(shortest(opened | {*more}, start, goal))
    if count > base.MOST_ANSWERS:
      more.pop()
    elif count > 1:
      break
  ways = shortest(opened | {*more}, start, goal)
  for cell in list(more):
    fewer = [c for c in more if c != cell]
    if shortest(opened | {*fewer}, start, goal) == ways:
      more = fewer
  return opened | {*more}


class Maze(base.Task):
  name = "maze"
  number = 1

  def side(self, split: str) -> int:
    """Cells per side of the lattice; `ood` mazes have one more room per side."""
    return (5 if self.size < 64 else 7) + (2 if split == "ood" else 0)

  def draw_problem(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> base.Problem | None:
    side = self.side(split)
    rooms = (side + 1) // 2
    opened = carve(rng, rooms)
    ends = rng.choice(rooms * rooms, 2, replace=False)
    start, goal = ((2 * int(e // rooms), 2 * int(e % rooms)) for e in ends)
    if ambiguous:
      opened = several_ways(rng, opened, start, goal)
    rows = ["".join(".#"[(y, x) not in opened] for x in range(side)) for y in range(side)]
    problem = {"rows": rows, "start": list(start), "goal": list(goal)}
    return problem if len(shortest(opened, start, goal)[0]) >= 4 else None

  def right_answers(self, problem: base.Problem) -> list[base.Answer]:
    return list(shortest(free(problem), *ends_of(problem)))

  def options(self, problem: base.Problem) -> list[base.Answer]:
    """Every way to the goal or into a dead end; the shortest first when there are many."""
    return list(routes(tuple(problem["rows"]), *ends_of(problem)))

  def templates(self, problem: base.Problem) -> tuple[str, ...]:
    return TEMPLATES

  def draw_answer(self, problem: base.Problem, answer: base.Answer) -> np.ndarray:
    side = len(problem["rows"])
    boxes, _ = layout(self.size, side)
    start, goal = ends_of(problem)
    ground = draw.canvas(self.size, WALL)
    for y, x in free(problem):
      fill(ground, boxes[y, x], FLOOR)
    fill(ground, boxes[start], draw.GREEN)
    fill(ground, boxes[goal], draw.BLUE)
    cells = walk(start, str(answer))
    fill(ground, draw.shrink(boxes[start], 0.5), draw.RED)
    steps = len(cells) - 1
    maps = np.repeat(ground[None], self.frames, axis=0)
    for i, cell in enumerate(cells[1:], start=1):
      # frame on which the dot enters cell i: evenly spread, the last on frame T - 2
      first = -(-i * (self.frames - 2) // steps)
      for t in range(first, self.frames):
        fill(maps[t], boxes[cell], draw.RED)
    return maps

  def kept(self, problem: base.Problem) -> list[base.Kept]:
    side = len(problem["rows"])
    boxes, _ = layout(self.size, side)
    start, goal = ends_of(problem)
    opened = sorted(free(problem))
    walls = [(y, x) for y in range(side) for x in range(side) if (y, x) not in set(opened)]
    corridors = [cell for cell in opened if cell not in (start, goal)]

    def group(cells: list[Cell], allowed: list[list[int]]) -> base.Kept:
      return base.kept(draw.cells(self.size, np.stack([boxes[c] for c in cells])), allowed)

    # Red and green blur to something like grey where cells are small.
    begin = [draw.RED, draw.GREEN, draw.GREY, draw.UNDECIDED]
    return [
      group(walls, [[WALL]] * len(walls)),
      group(corridors, [[FLOOR, draw.RED, draw.UNDECIDED]] * len(corridors)),
      group([start, goal], [begin, [draw.BLUE, draw.RED, draw.UNDECIDED]]),
    ]

  def trails(self, labels: np.ndarray, problem: base.Problem) -> tuple[np.ndarray, np.ndarray]:
    """Per frame and cell: is it red, is it a blend (neither red nor as in the problem).

    The start counts as red: the dot on it is too small to be read at 4 pixels a cell.
    """
    side = len(problem["rows"])
    seen = draw.majority(labels, layout(self.size, side)[1])
    start, goal = ends_of(problem)
    own = np.array([FLOOR if c == "." else WALL for row in problem["rows"] for c in row])
    own[goal[0] * side + goal[1]] = draw.BLUE
    seen[:, start[0] * side + start[1]] = draw.RED
    red = seen == draw.RED
    return red, ~red & (seen != own)

  def ending(self, labels: np.ndarray, problem: base.Problem) -> tuple[set[Cell], bool]:
    """Red cells of the last frame, and whether they can be read: no blend, wall or flicker."""
    side = len(problem["rows"])
    red, blend = self.trails(labels[-2:], problem)
    cells = {(int(i) // side, int(i) % side) for i in np.flatnonzero(red[-1])}
    opened = free(problem)
    clean = not any(blend[-1][y * side + x] for y, x in opened) and cells <= opened
    return cells, clean and bool((red[0] == red[1]).all())

  def read(self, labels: np.ndarray, problem: base.Problem) -> base.Answer | None:
    cells, clean = self.ending(labels, problem)
    if not clean:
      return None
    start, _ = ends_of(problem)
    for answer in self.options(problem):
      if set(walk(start, str(answer))) == cells:
        return answer
    return None

  def final(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """Overlap (IoU) of trail and path; 0 for a wrong route, a blend or a painted wall."""
    problem = metadata["problem"]
    answer = self.read(labels, problem)
    if answer is not None:
      return float(answer in metadata["answers"])
    cells, clean = self.ending(labels, problem)
    if not clean:
      return 0.0
    start, _ = ends_of(problem)
    cells.discard(start)
    paths = [set(walk(start, a)) - {start} for a in metadata["answers"]]
    return max(len(cells & path) / len(cells | path) for path in paths)

  def parts(self, labels: np.ndarray, problem: base.Problem) -> frozenset[Cell] | None:
    """The cells of the trail after the start."""
    cells, clean = self.ending(labels, problem)
    return frozenset(cells - {ends_of(problem)[0]}) if clean else None

  def process(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """Share of frames on which the trail only grows, at its head and on free cells, times the
    share of a right path it covers."""
    problem = metadata["problem"]
    side = len(problem["rows"])
    start, _ = ends_of(problem)
    opened = free(problem)
    paths = [walk(start, a) for a in metadata["answers"]]
    stride = 1 + -(-(len(paths[0]) - 1) // (self.frames - 2))
    red, _ = self.trails(labels, problem)
    tinged = draw.shares(labels, layout(self.size, side)[1])[..., draw.RED] > base.ABSENT
    trail, legal = [start], 0
    for row, faint in zip(red, tinged, strict=True):
      cells, begun = (
        {(int(i) // side, int(i) % side) for i in np.flatnonzero(r)} for r in (row, row | faint)
      )
      grown = extend(trail, cells - set(trail)) if begun <= opened else None
      if grown is None or len(grown) - len(trail) > stride or not set(trail) <= cells:
        continue
      ahead = extend(grown, begun - cells)
      if ahead is None or len(ahead) - len(grown) > stride:
        continue
      trail, legal = grown, legal + 1
    share = max(sum(1 for _ in common(trail, path)) / (len(path) - 1) for path in paths)
    return legal / len(red) * share

  def soft(self, frames: np.ndarray, problem: base.Problem) -> dict[base.Answer, float]:
    """A route is as present as the least visible of its cells."""
    side = len(problem["rows"])
    start, goal = ends_of(problem)
    ground = np.full(side * side, FLOOR)
    ground[goal[0] * side + goal[1]] = draw.BLUE
    where = layout(self.size, side)[1]
    seen = draw.occupancy(frames[-2:], where, draw.RED, ground).mean(0)
    return {
      a: float(min(seen[y * side + x] for y, x in walk(start, str(a))[1:]))
      for a in self.options(problem)
    }

  def canonical(self, problem: base.Problem) -> Any:
    return [problem["rows"], problem["start"], problem["goal"]]


def fill(maps: np.ndarray, box: Any, value: int) -> None:
  maps[int(box[0]) : int(box[2]), int(box[1]) : int(box[3])] = value


def ends_of(problem: base.Problem) -> tuple[Cell, Cell]:
  (a, b), (c, d) = problem["start"], problem["goal"]
  return (a, b), (c, d)


def free(problem: base.Problem) -> set[Cell]:
  return {(y, x) for y, row in enumerate(problem["rows"]) for x, c in enumerate(row) if c == "."}


def shortest(opened: set[Cell], start: Cell, goal: Cell) -> tuple[str, ...]:
  """All shortest routes in alphabetical order; start and goal must be connected."""
  reached: dict[Cell, tuple[str, ...]] = {start: ("",)}
  front = reached
  while goal not in front:
    ahead: dict[Cell, tuple[str, ...]] = {}
    for (y, x), ways in front.items():
      for move, (dy, dx) in MOVES.items():
        cell = (y + dy, x + dx)
        if cell in opened and cell not in reached:
          ahead[cell] = ahead.get(cell, ()) + tuple(w + move for w in ways)
    reached = reached | ahead
    front = ahead
  return tuple(sorted(front[goal]))


@functools.lru_cache(maxsize=4096)
def routes(rows: tuple[str, ...], start: Cell, goal: Cell) -> tuple[str, ...]:
  """Simple routes from start that end at the goal or cannot go on; the shortest MOST_OPTIONS.

  Routes with the same set of cells would look alike in the last frame: the first one stands.
  """
  opened = free({"rows": rows})
  found: list[str] = []
  stack: list[tuple[str, tuple[Cell, ...]]] = [("", (start,))]
  while stack:
    moves, cells = stack.pop()
    y, x = cells[-1]
    if cells[-1] == goal:
      found.append(moves)
      continue
    ahead = [
      (moves + m, (*cells, (y + dy, x + dx)))
      for m, (dy, dx) in MOVES.items()
      if (y + dy, x + dx) in opened and (y + dy, x + dx) not in cells
    ]
    stack += ahead
    if not ahead and moves:
      found.append(moves)
  seen: set[frozenset[Cell]] = set()
  unique = []
  for moves in sorted(found, key=lambda m: (walk(start, m)[-1] != goal, len(m), m)):
    cells = frozenset(walk(start, moves))
    if cells not in seen:
      seen.add(cells)
      unique.append(moves)
  return tuple(unique[:MOST_OPTIONS])


def extend(trail: list[Cell], new: set[Cell]) -> list[Cell] | None:
  """The trail with the new cells appended, each beside the one before; None = no such order."""
  grown, left = list(trail), set(new)
  while left:
    y, x = grown[-1]
    ahead = [c for c in ((y + dy, x + dx) for dy, dx in MOVES.values()) if c in left]
    if len(ahead) != 1:
      return None
    grown.append(ahead[0])
    left.remove(ahead[0])
  return grown


def common(trail: list[Cell], path: list[Cell]):
  """The cells after the start that trail and path share before they part."""
  for a, b in zip(trail[1:], path[1:], strict=False):
    if a != b:
      return
    yield a
