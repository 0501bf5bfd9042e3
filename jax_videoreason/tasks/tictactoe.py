"""Tic-tac-toe: the side to move fills the cell that wins.

Squares of two colours stand for X and O. A board is nine letters in reading order, "m" of the side
to move, "o" of the other, "." empty. An answer is the number of a cell, 0..8. Chance is one in the
number of empty cells.
"""

import functools
import itertools
from typing import Any

import numpy as np

from jax_videoreason.tasks import base, draw

LINES = (
  *((3 * i, 3 * i + 1, 3 * i + 2) for i in range(3)),
  *((i, i + 3, i + 6) for i in range(3)),
  (0, 4, 8),
  (2, 4, 6),
)
SIDES = ("red", "green", "blue", "yellow", "purple", "cyan")
GROUND, EMPTY, FLASH = draw.BLACK, draw.WHITE, draw.GREY
GROWING = 6  # frames in which the cell fills
CALM = -5  # until here nothing flashes: the flash is on frames T - 4 and T - 3, or one early
TEMPLATES = (
  "Tic-tac-toe: {mover} plays against {other}. {Mover} fills the cell that completes three in a "
  "line.",
  "It is {mover}'s turn. Colour the winning cell {mover}.",
  "{Mover} to move and win: one empty square turns {mover} and makes a line of three.",
  "Find the winning move for {mover} and fill that square; {other} must not move.",
)


def empty(board: str) -> list[int]:
  """Numbers of the empty cells."""
  return [i for i, mark in enumerate(board) if mark == "."]


def wins(board: str, side: str) -> list[int]:
  """Empty cells that complete a line for `side`, in order."""
  found = set()
  for line in LINES:
    marks = [board[i] for i in line]
    if marks.count(side) == 2 and marks.count(".") == 1:
      found.add(line[marks.index(".")])
  return sorted(found)


@functools.lru_cache(maxsize=2)
def boards(ambiguous: bool) -> tuple[str, ...]:
  """All boards with one winning move (2 or 3 if ambiguous), nobody having won, in fixed order.

  A plain board also has a decoy: a cell where the other side would win, or a line of two of the
  mover that is blocked. At least three cells are empty, and one of them is a wrong move.
  """
  found = []
  for cells in itertools.product(".mo", repeat=9):
    mine, theirs = cells.count("m"), cells.count("o")
    if theirs - mine not in (0, 1) or mine < 2:
      continue
    lines = [[cells[i] for i in line] for line in LINES]
    if any(line.count("m") == 3 or line.count("o") == 3 for line in lines):
      continue
    board = "".join(cells)
    ways = len(wins(board, "m"))
    if cells.count(".") < max(3, ways + 1):
      continue
    decoy = wins(board, "o") or any(x.count("m") == 2 and x.count("o") == 1 for x in lines)
    if (2 <= ways <= 3) if ambiguous else (ways == 1 and decoy):
      found.append(board)
  return tuple(found)


@functools.lru_cache(maxsize=8)
def layout(size: int) -> tuple[np.ndarray, draw.Regions, draw.Regions]:
  """Tiles (9, 4), their inner halves, and the gaps between neighbouring tiles."""
  boxes = draw.lattice(size, 3, 3)
  inset = round(0.15 * (boxes[0, 0, 2] - boxes[0, 0, 0]) + 0.49)
  tiles = boxes + np.array([inset, inset, -inset, -inset])
  across = [(t[0], t[3], t[2], u[1]) for t, u in zip(tiles[:, 0], tiles[:, 1], strict=True)]
  across += [(t[0], t[3], t[2], u[1]) for t, u in zip(tiles[:, 1], tiles[:, 2], strict=True)]
  down = [(t[2], t[1], u[0], t[3]) for t, u in zip(tiles[0], tiles[1], strict=True)]
  down += [(t[2], t[1], u[0], t[3]) for t, u in zip(tiles[1], tiles[2], strict=True)]
  flat = np.concatenate([tiles[0], tiles[1], tiles[2]])
  return flat, draw.cells(size, flat), draw.cells(size, np.array(across + down))


class TicTacToe(base.Task):
  name = "tictactoe"
  number = 3

  def draw_problem(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> base.Problem | None:
    """`ood` boards have pairs of colours that never meet in training."""
    choice = boards(ambiguous)
    board = choice[int(rng.integers(len(choice)))]
    a, b = (int(i) for i in rng.choice(len(SIDES), 2, replace=False))
    if (abs(a - b) == 3) != (split == "ood"):
      return None
    return {"board": board, "mover": SIDES[a], "other": SIDES[b]}

  def right_answers(self, problem: base.Problem) -> list[base.Answer]:
    return list(wins(problem["board"], "m"))

  def options(self, problem: base.Problem) -> list[base.Answer]:
    return list(empty(problem["board"]))

  def templates(self, problem: base.Problem) -> list[str]:
    mover, other = problem["mover"], problem["other"]
    return [t.format(mover=mover, other=other, Mover=mover.capitalize()) for t in TEMPLATES]

  def draw_answer(self, problem: base.Problem, answer: base.Answer) -> np.ndarray:
    tiles = layout(self.size)[0]
    board, mover = problem["board"], draw.colour(problem["mover"])
    own = self.tile_colours(problem)
    ground = draw.canvas(self.size, GROUND)
    for (y0, x0, y1, x1), value in zip(tiles, own, strict=True):
      ground[y0:y1, x0:x1] = value
    maps = np.repeat(ground[None], self.frames, axis=0)
    y0, x0, y1, x1 = tiles[int(answer)]
    for t in range(base.FIRST_MARK, self.frames):
      done = min(1.0, (t - base.FIRST_MARK + 1) / GROWING)
      maps[t, y1 - max(1, round(done * (y1 - y0))) : y1, x0:x1] = mover
    for line in lines_through(board, int(answer)):
      for y0, x0, y1, x1 in tiles[list(line)]:
        maps[-4:-2, y0:y1, x0:x1] = FLASH
    return maps

  def tile_colours(self, problem: base.Problem) -> list[int]:
    names = {
      ".": EMPTY,
      "m": draw.colour(problem["mover"]),
      "o": draw.colour(problem["other"]),
    }
    return [names[mark] for mark in problem["board"]]

  def kept(self, problem: base.Problem) -> list[base.Kept]:
    tiles, _, gaps = layout(self.size)
    board, own = problem["board"], self.tile_colours(problem)
    lines = [line for a in wins(board, "m") for line in lines_through(board, a)]
    flashing = {i for line in lines for i in line}
    allowed = [[colour] for colour in own]
    for i, colours in enumerate(allowed):
      if board[i] == ".":
        colours += [draw.colour(problem["mover"]), draw.UNDECIDED]
      if i in flashing:
        colours += [FLASH, draw.UNDECIDED]
    groups = [base.kept(gaps, [[GROUND]] * len(gaps))]
    taken = [i for i in range(9) if board[i] != "."]
    for which in (empty(board), taken):
      groups.append(base.kept(draw.cells(self.size, tiles[which]), [allowed[i] for i in which]))
    return groups

  def filled(self, labels: np.ndarray, problem: base.Problem) -> np.ndarray:
    """Share of each option's tile that has the mover's colour: (T, options)."""
    tiles = layout(self.size)[0][empty(problem["board"])]
    where = draw.regions([draw.rectangle(self.size, tile) for tile in tiles])
    return draw.shares(labels, where)[..., draw.colour(problem["mover"])]

  def read(self, labels: np.ndarray, problem: base.Problem) -> base.Answer | None:
    """The one empty cell that has turned the mover's colour, the other eight being unchanged."""
    own = np.array(self.tile_colours(problem))
    seen = draw.majority(labels[-2:], layout(self.size)[1])
    changed = np.flatnonzero((seen != own).any(axis=0))
    if len(changed) != 1:
      return None
    cell = int(changed[0])
    legal = problem["board"][cell] == "."
    return cell if legal and (seen[:, cell] == draw.colour(problem["mover"])).all() else None

  def process(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """One cell fills gradually, and no other empty cell is ever filled; times the share of frames
    before the flash on which all other tiles are as they were and this one shows little else."""
    problem = metadata["problem"]
    mover, options = draw.colour(problem["mover"]), empty(problem["board"])
    filled = self.filled(labels, problem)
    target = options[int(filled[-1].argmax())]
    seen = draw.shares(labels, layout(self.size)[1])
    same = seen[:, np.arange(9), self.tile_colours(problem)]
    blend = 1 - seen[:, target].sum(axis=-1)
    least = np.full(9, 1 - base.ABSENT)
    least[target] = base.CLEAR
    clear = base.unmixed(seen[:, options, mover], same[:, options])
    same[:, target] += seen[:, target, mover] + blend
    calm = (same[:CALM] >= least).all(axis=1).mean()
    return base.lone_growth(filled, clear, steps=2) * float(calm)

  def soft(self, frames: np.ndarray, problem: base.Problem) -> dict[base.Answer, float]:
    options = empty(problem["board"])
    where = draw.cells(self.size, layout(self.size)[0][options])
    mark, ground = draw.colour(problem["mover"]), np.full(len(options), EMPTY)
    seen = draw.occupancy(frames[-2:], where, mark, ground).mean(axis=0)
    return {cell: float(v) for cell, v in zip(options, seen, strict=True)}

  def canonical(self, problem: base.Problem) -> Any:
    """The board alone: other colours do not make another problem."""
    return problem["board"]


def lines_through(board: str, cell: int) -> list[tuple[int, ...]]:
  """The lines that the mover completes by taking `cell`."""
  after = board[:cell] + "m" + board[cell + 1 :]
  return [line for line in LINES if cell in line and all(after[i] == "m" for i in line)]
