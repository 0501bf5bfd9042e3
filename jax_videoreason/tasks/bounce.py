"""Bounce: a ball leaves as its white arrow points and is reflected by the walls at constant speed.

The middle of the ball moves in a square playing field whose side is the unit of length. An answer
is the direction, in degrees clockwise from the top, whose path ends where the ball ends; the right
one is the arrow's. Held out: there is no training split.
"""

import numpy as np

from jax_videoreason.tasks import base, draw

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
GROUND, WALL, ARROW = draw.BLACK, draw.GREY, draw.WHITE
DIRECTIONS = tuple(range(15, 360, 30))  # never along a wall
WAY = 2.7  # length of the path
BOUNCES = (2, 4)
RIM, RADIUS, TIP = 2 / 32, 3.3 / 32, 9.5 / 32  # wall, ball, arrow's end: shares of the picture
SMALL = 0.5  # share of the ball's area from which another object is one
CELL = 1 / 8  # of the picture
EXACT = 0.25  # error in cells that a ball of a few pixels cannot do without
FAR = 2 + EXACT  # error in cells from which on nothing is earned
TEMPLATES = (
  "The {colour} ball starts in the direction of the white arrow and bounces off the grey walls at "
  "constant speed.",
  "A {colour} ball rolls the way its white arrow points. Every wall reflects it; it never slows "
  "down.",
  "Let the {colour} ball go: it flies straight along the arrow and is reflected by the walls of "
  "the box without losing speed.",
  "The white arrow shows where the {colour} ball moves first. Follow it as it bounces round the "
  "box.",
)


def velocity(degrees: float) -> np.ndarray:
  """(dy, dx) of length 1."""
  angle = np.deg2rad(degrees)
  return np.array([-np.cos(angle), np.sin(angle)])


def fold(places: np.ndarray) -> np.ndarray:
  """Places on a straight line reflected into 0..1."""
  return 1 - abs(places % 2 - 1)


class Bounce(base.Task):
  name = "bounce"
  number = 8
  held_out = True
  ambiguous = False

  # --- from the playing field to pixels ---

  @property
  def near(self) -> float:
    """Least coordinate of the ball's middle, in pixels."""
    return (RIM + RADIUS) * self.size

  @property
  def side(self) -> float:
    """Side of the playing field in pixels."""
    return self.size - 2 * self.near

  @property
  def cell(self) -> float:
    """Pixels per cell, the unit of errors."""
    return CELL * self.size

  def path(self, problem: base.Problem, degrees: base.Answer) -> np.ndarray:
    """(T, 2): the ball's middle (y, x) on each frame, to half a pixel; at rest on the last two."""
    share = np.minimum(np.arange(self.frames) / (self.frames - 2), 1.0)
    line = np.array(problem["start"]) + WAY * share[:, None] * velocity(float(degrees))[None]
    return np.round(2 * (self.near + self.side * fold(line))) / 2

  def draw_problem(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> base.Problem | None:
    start = [round(float(v), 3) for v in rng.uniform(0.3, 0.7, size=2)]
    degrees = DIRECTIONS[int(rng.integers(len(DIRECTIONS)))]
    colour = COLOURS[int(rng.integers(len(COLOURS)))]
    problem = {"start": start, "degrees": degrees, "colour": colour}
    end = np.array(start) + WAY * velocity(degrees)
    bounces = int(abs(np.floor(end)).sum())
    if not BOUNCES[0] <= bounces <= BOUNCES[1]:
      return None
    path = self.path(problem, degrees)
    if np.linalg.norm(path[-1] - path[0]) < (FAR + 0.25) * self.cell:
      return None
    return problem if len(self.options(problem)) >= 4 else None

  def right_answers(self, problem: base.Problem) -> list[base.Answer]:
    return [problem["degrees"]]

  def options(self, problem: base.Problem) -> list[base.Answer]:
    """Directions whose paths end far from the start, the right end and one another."""
    right = problem["degrees"]
    paths = {d: self.path(problem, d) for d in DIRECTIONS}
    taken = [right]
    for d in DIRECTIONS:
      ends = np.array([paths[right][0], *(paths[t][-1] for t in taken)])
      apart = np.linalg.norm(ends - paths[d][-1], axis=-1) / self.cell
      if d != right and apart.min() >= 1.75 and apart[1] >= FAR + 0.25:
        taken.append(d)
    return sorted(taken)

  def templates(self, problem: base.Problem) -> list[str]:
    return [t.format(colour=problem["colour"]) for t in TEMPLATES]

  # --- drawing ---

  def arrow(self, problem: base.Problem, wider: float = 0) -> np.ndarray:
    """Mask of the bar from the ball's edge in its direction, 3.5 pixels of 32 wide; `wider`: by as
    many pixels of 32 on all sides."""
    dy, dx = draw.offsets(self.size, self.path(problem, problem["degrees"])[0])
    y, x = velocity(problem["degrees"])
    ahead, aside = (dy * y + dx * x) / self.size, (dx * y - dy * x) / self.size
    ball = dy**2 + dx**2 <= (RADIUS * self.size) ** 2
    long = (ahead > -wider / 32) & (ahead <= TIP + wider / 32)
    return long & (abs(aside) <= (1.75 + wider) / 32) & (~ball | (wider > 0))

  def draw_answer(self, problem: base.Problem, answer: base.Answer) -> np.ndarray:
    """The arrow is seen on the first frame alone. A clip in which it lasts loses nothing: what the
    ball does not cover of it is scored as ground."""
    rim = round(RIM * self.size)
    ground = draw.canvas(self.size, WALL)
    ground[rim:-rim, rim:-rim] = GROUND
    maps = np.repeat(ground[None], self.frames, axis=0)
    maps[0][self.arrow(problem)] = ARROW
    for canvas, middle in zip(maps, self.path(problem, answer), strict=True):
      canvas[draw.disc(self.size, middle, RADIUS * self.size)] = draw.colour(problem["colour"])
    return maps

  # --- reading ---

  def kept(self, problem: base.Problem) -> list[base.Kept | base.NoObject]:
    """The walls; and in the box nothing of SMALL of the ball's area but the ball, and the arrow in
    its place, white or, where it blurs, grey."""
    rim = round(RIM * self.size)
    inside = draw.rectangle(self.size, (rim, rim, self.size - rim, self.size - rim))
    blocks = [draw.rectangle(self.size, box) for box in draw.blocks(self.size, self.size)]
    walls = [block & ~inside for block in blocks if (block & ~inside).any()]
    arrow = self.arrow(problem, wider=1)
    belong = {GROUND: True, draw.colour(problem["colour"]): True, ARROW: arrow, draw.GREY: arrow}
    return [
      base.kept(draw.regions(walls), [[WALL]] * len(walls)),
      base.no_object(inside, belong, SMALL * np.pi * (RADIUS * self.size) ** 2),
    ]

  def places(self, labels: np.ndarray, problem: base.Problem) -> np.ndarray:
    """(T, 2): the ball's middle on each frame; nan where there is no ball or more than one."""
    hits = labels == draw.colour(problem["colour"])
    count = hits.sum(axis=(1, 2))
    at = np.arange(self.size) + 0.5
    rows, columns = hits.sum(axis=2), hits.sum(axis=1)
    middle = np.stack([(rows * at).sum(-1), (columns * at).sum(-1)], axis=-1)
    middle = middle / np.maximum(count, 1)[:, None]
    square = np.stack([(rows * at**2).sum(-1), (columns * at**2).sum(-1)], axis=-1)
    spread = (square / np.maximum(count, 1)[:, None] - middle**2).sum(axis=-1)
    radius = RADIUS * self.size
    area = count / (np.pi * radius**2)
    one = (area >= 0.3) & (area <= 1.6) & (spread <= 0.8 * radius**2)  # a disc has half of it
    return np.where(one[:, None], middle, np.nan)

  def begins(self, labels: np.ndarray, problem: base.Problem) -> bool:
    """Whether the clip starts from this ball and arrow: the path of another is no answer."""
    start = self.path(problem, problem["degrees"])[0]
    apart = float(np.linalg.norm(self.places(labels[:1], problem)[0] - start))
    # A thin white arrow blurs to grey; what it must not be is ground.
    missing = draw.shares(labels[:1], draw.regions([self.arrow(problem)]))[0, 0, GROUND]
    return apart <= 0.5 * self.cell and bool(missing <= 0.4)

  def closeness(self, places: np.ndarray, path: np.ndarray) -> np.ndarray:
    """1 - error / 2 cells on each frame, 0..1; 0 where there is no ball."""
    error = np.linalg.norm(places - path, axis=-1) / self.cell
    return np.nan_to_num(np.clip(1 - (error - EXACT) / 2, 0, 1), nan=0.0)

  def read(self, labels: np.ndarray, problem: base.Problem) -> base.Answer | None:
    """The direction whose end is where the ball rests on the last two frames."""
    places = self.places(labels[-2:], problem)
    options = self.options(problem)
    ends = np.array([self.path(problem, d)[-1] for d in options])
    apart = np.linalg.norm(places[:, None] - ends[None], axis=-1).max(axis=0) / self.cell
    if np.isnan(apart).any() or apart.min() > 0.85:
      return None
    return options[int(apart.argmin())]

  def final(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """1 - d / 2 cells, d the error of the ball's place at the end."""
    problem = metadata["problem"]
    if not self.begins(labels, problem):
      return 0.0
    path = self.path(problem, problem["degrees"])
    return float(self.closeness(self.places(labels, problem), path)[-2:].min())

  def process(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """Mean over frames of 1 - error / 2 cells, times the share of steps at the constant speed."""
    problem = metadata["problem"]
    if not self.begins(labels, problem):
      return 0.0
    places = self.places(labels, problem)
    path = self.path(problem, problem["degrees"])
    close = self.closeness(places, path)[1:]
    return float(close.mean() * self.steady(places[:-1], path[:-1]).mean())

  def steady(self, places: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Which steps between places (T, 2) are as long as the speed says, to a fifth and half a pixel
    of 32: straight, or by way of one wall or two, which mirror the place that is reached.

    path: the right places; a wall may send the ball back to where it was.
    """
    speed = WAY * self.side / (self.frames - 2)
    low, high = self.near, self.near + self.side
    images = np.stack([places, 2 * low - places, 2 * high - places])  # 3 T 2
    away = (images[:, 1:] - places[None, :-1]) ** 2
    lengths = np.sqrt(away[:, None, :, 0] + away[None, :, :, 1])  # 3 3 T-1
    good = abs(lengths - speed) <= 0.2 * speed + self.size / 64
    # A ball at rest beside a wall mirrors itself.
    least = np.minimum(0.1 * speed, 0.5 * np.linalg.norm(np.diff(path, axis=0), axis=-1))
    moved = lengths[0, 0] >= least
    return good.any(axis=(0, 1)) & moved

  def soft(self, frames: np.ndarray, problem: base.Problem) -> dict[base.Answer, float]:
    options = self.options(problem)
    ends = [self.path(problem, d)[-1] for d in options]
    where = draw.regions([draw.disc(self.size, end, 0.7 * RADIUS * self.size) for end in ends])
    ground = np.full(len(options), GROUND)
    before = draw.mean_colour(frames[:1], where)[0]  # the arrow may lie there
    seen = draw.occupancy(frames[-2:], where, draw.colour(problem["colour"]), ground, [before])
    return dict(zip(options, seen.mean(axis=0).tolist(), strict=True))
