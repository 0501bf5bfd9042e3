"""Sort the bars: one bar after another slides from the upper row to its rank in the lower one.

An answer is the order in which the bars stand in the lower row, their colours from left to right,
e.g. "green red yellow blue".
"""

import itertools

import numpy as np

from jax_videoreason.tasks import base, draw

COLOURS = ("red", "green", "yellow", "purple", "blue")
OOD_COLOUR = "cyan"  # never beside blue: the two are too close to be told apart in a blend
GROUND, FLOOR = draw.BLACK, draw.GREY
UNITS = 32  # heights are in 32nds of the picture
LEAST, MOST = 4, 15
UPPER, LOWER = 15, 30  # where the bars of either row stand
AREA = (0.3, 1.4)  # least and most of its area that a bar may show: edges blur away at 32 pixels
HIDDEN = 2  # bars that those on their way may hide on one frame
HIDING = 0.8  # share of the frames of one bar's way for which it may be hidden, in all
SEEN = 0.15  # share of a bar that must be visible to say where it is
STEP = 1.4  # furthest way in one frame, in slots: more is a leap
TEMPLATES = {
  "rising": (
    "The bars slide down one after another and stand in order of height, the shortest on the left "
    "and the tallest on the right.",
    "Sort the bars from short to tall, left to right, in the lower row.",
    "Move each bar down to its rank: heights rise from left to right.",
    "Put the bars in rising order on the grey floor. Colours and heights stay as they are.",
  ),
  "falling": (
    "The bars slide down one after another and stand in order of height, the tallest on the left "
    "and the shortest on the right.",
    "Sort the bars from tall to short, left to right, in the lower row.",
    "Move each bar down to its rank: heights fall from left to right.",
    "Put the bars in falling order on the grey floor. Colours and heights stay as they are.",
  ),
  "either": (
    "The bars slide down one after another and stand in order of height.",
    "Sort the bars in order in the lower row, whichever way round.",
    "Move each bar down to its rank: heights rise or fall from left to right.",
    "Put the bars in order of height on the grey floor. Colours and heights stay as they are.",
  ),
}


class SortBars(base.Task):
  name = "sort_bars"
  number = 5

  def draw_problem(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> base.Problem | None:
    """Heights differ by 3 pixels of 32 among four bars, by 4 of 64 among five; `ood` has cyan."""
    count = 4 if self.size < 64 else int(rng.integers(4, 6))
    gap = 3 if count == 4 else 2
    spare = MOST - LEAST + 1 - (gap - 1) * (count - 1)
    heights = LEAST + np.sort(rng.permutation(spare)[:count]) + (gap - 1) * np.arange(count)
    heights = rng.permutation(heights)
    palette = (*COLOURS[:-1], OOD_COLOUR) if split == "ood" else COLOURS
    names = [palette[int(i)] for i in rng.permutation(len(palette))[:count]]
    if split == "ood" and OOD_COLOUR not in names:
      return None
    order = "either" if ambiguous else ("rising", "falling")[int(rng.integers(2))]
    bars = [{"colour": n, "height": int(h)} for n, h in zip(names, heights, strict=True)]
    problem = {"bars": bars, "order": order}
    shuffled = " ".join(names) not in self.right_answers(problem | {"order": "either"})
    return problem if shuffled else None

  def right_answers(self, problem: base.Problem) -> list[base.Answer]:
    rising = [b["colour"] for b in sorted(problem["bars"], key=lambda b: b["height"])]
    ways = {"rising": [rising], "falling": [rising[::-1]], "either": [rising, rising[::-1]]}
    return [" ".join(names) for names in ways[problem["order"]]]

  def options(self, problem: base.Problem) -> list[base.Answer]:
    return [" ".join(names) for names in itertools.permutations(colours_of(problem))]

  def templates(self, problem: base.Problem) -> tuple[str, ...]:
    return TEMPLATES[problem["order"]]

  # --- where things are, in pixels ---

  def pixels(self, units: float) -> int:
    return round(units * self.size / UNITS)

  def slot(self, problem: base.Problem) -> int:
    """Width of a slot."""
    return self.size // len(problem["bars"])

  def left(self, problem: base.Problem) -> int:
    """Where the first slot begins."""
    return (self.size - self.slot(problem) * len(problem["bars"])) // 2

  def box(self, problem: base.Problem, bar: int, slot: float, foot: float) -> tuple[int, ...]:
    """y0 x0 y1 x1 of a bar that stands in a slot, its foot at a height of the picture."""
    width = self.slot(problem)
    rim = max(1, width // 8)
    x0 = round(self.left(problem) + slot * width) + rim
    y1 = round(foot)
    return y1 - self.pixels(problem["bars"][bar]["height"]), x0, y1, x0 + width - 2 * rim

  def standing(self, problem: base.Problem, bar: int, slot: int) -> tuple[int, ...]:
    """The box of a bar in the lower row."""
    return self.box(problem, bar, slot, self.pixels(LOWER))

  def middles(self, problem: base.Problem, slots: list[int], foot: int) -> np.ndarray:
    """(bars, 2): (y, x) of each bar's middle, were it in its one of the slots of a row."""
    boxes = [self.box(problem, bar, s, self.pixels(foot)) for bar, s in enumerate(slots)]
    return np.array([((y0 + y1) / 2, (x0 + x1) / 2) for y0, x0, y1, x1 in boxes])

  @property
  def travel(self) -> int:
    """Frames that a bar is on its way."""
    return -(-(self.frames - 2) // 3)

  def draw_answer(self, problem: base.Problem, answer: base.Answer) -> np.ndarray:
    """The bars start in the order of their goals; a bar on its way is in front."""
    names, goals = colours_of(problem), slots_of(problem, answer)
    last, travel = self.frames - 2, self.travel
    starts = [round(i * (last - travel) / (len(goals) - 1)) for i in range(len(goals))]
    ground = draw.canvas(self.size, GROUND)
    ground[self.pixels(LOWER) :] = FLOOR
    maps = np.repeat(ground[None], self.frames, axis=0)
    upper, lower = self.pixels(UPPER), self.pixels(LOWER)
    for t, canvas in enumerate(maps):
      done = [min(1.0, max(0.0, (t - starts[g]) / travel)) for g in goals]
      for bar in sorted(range(len(names)), key=lambda i: (0 < done[i] < 1, goals[i])):
        slot = bar + done[bar] * (goals[bar] - bar)
        foot = upper + done[bar] * (lower - upper)
        y0, x0, y1, x1 = self.box(problem, bar, slot, foot)
        canvas[y0:y1, x0:x1] = draw.colour(names[bar])
    return maps

  # --- reading ---

  def kept(self, problem: base.Problem) -> list[base.Kept | base.NoObject]:
    """The floor; and nowhere a colour that no bar has: by blocks, and over the area of the shortest
    bar there could be. The latter may be grey, as where two bars blend."""
    floor = self.pixels(LOWER)
    blocks = draw.blocks(floor, self.size)
    floors = [(floor, x0, self.size, x1) for _, x0, _, x1 in blocks[:4]]
    bars = [GROUND, draw.UNDECIDED, *(draw.colour(n) for n in colours_of(problem))]
    return [
      base.kept(draw.regions([draw.rectangle(self.size, b) for b in floors]), [[FLOOR]] * 4),
      base.kept(draw.regions([draw.rectangle(self.size, b) for b in blocks]), [bars] * 16),
      base.no_object(
        draw.rectangle(self.size, (0, 0, floor, self.size)),
        dict.fromkeys([*bars, draw.GREY], True),
        self.least(problem),
      ),
    ]

  def least(self, problem: base.Problem) -> int:
    """Pixels of the shortest bar there could be."""
    _, x0, _, x1 = self.standing(problem, 0, 0)
    return self.pixels(LEAST) * (x1 - x0)

  def tracks(self, labels: np.ndarray, problem: base.Problem) -> tuple[np.ndarray, np.ndarray]:
    """Area of each bar's colour over the bar's own (T, bars), and its middle (T, bars, 2)."""
    sky = labels[:, : self.pixels(LOWER)]
    hits = np.stack([sky == draw.colour(n) for n in colours_of(problem)], axis=1)
    count = hits.sum(axis=(2, 3))
    y, x = (np.arange(n) + 0.5 for n in sky.shape[1:])
    most = np.maximum(count, 1)
    middle = np.stack(
      [(hits.sum(axis=3) * y).sum(-1) / most, (hits.sum(axis=2) * x).sum(-1) / most], axis=-1
    )
    boxes = [self.standing(problem, bar, 0) for bar in range(len(problem["bars"]))]
    own = np.array([(y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in boxes])
    return count / own, middle

  def begins(self, labels: np.ndarray, problem: base.Problem) -> bool:
    """Whether the clip starts from these bars: to sort others is no answer."""
    area, middle = self.tracks(labels[:1], problem)
    source = self.middles(problem, list(range(len(problem["bars"]))), UPPER)
    near = np.abs(middle[0] - source).max(axis=-1) <= 0.3 * self.slot(problem)
    return bool((near & (area[0] >= AREA[0]) & (area[0] <= AREA[1])).all())

  def row(self, labels: np.ndarray, problem: base.Problem) -> list[int] | None:
    """Per slot of the lower row at the end, the bar there, -1 = none, or one of the wrong height or
    that is seen in the upper row as well.

    None when a slot is a blend, shows no bar's colour, or changes on the last two frames.
    """
    count = len(problem["bars"])
    feet = [self.standing(problem, 0, s) for s in range(count)]
    foot = self.pixels(LOWER)
    low = [(foot - self.pixels(LEAST), x0, foot, x1) for _, x0, _, x1 in feet]
    seen = draw.majority(labels[-2:], draw.cells(self.size, np.array(low)))
    names = [draw.colour(n) for n in colours_of(problem)]
    if (seen[0] != seen[1]).any() or not set(seen[1].tolist()) <= {GROUND, *names}:
      return None
    found = []
    for s, colour in enumerate(seen[1].tolist()):
      bar = names.index(colour) if colour in names else -1
      if bar >= 0:
        y0, x0, y1, x1 = self.standing(problem, bar, s)
        inner = labels[-1, :foot, x0 + (x1 - x0) // 4 : x1 - (x1 - x0) // 4] == colour
        tall = inner[self.pixels(LOWER - MOST - 1) :].mean(axis=1) >= 0.5
        above = labels[-2:, : self.pixels(UPPER)]
        again = any(draw.has_object(a == colour, self.least(problem)) for a in above)
        if again or abs(int(tall.sum()) - (y1 - y0)) > self.pixels(1):
          bar = -1
      found.append(bar)
    return found

  def read(self, labels: np.ndarray, problem: base.Problem) -> base.Answer | None:
    row = self.row(labels, problem)
    if row is None or sorted(row) != list(range(len(row))):
      return None
    return " ".join(colours_of(problem)[bar] for bar in row)

  def final(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """Share of bars that stand at their rank with their colour and height, in the best answer."""
    problem = metadata["problem"]
    row = self.row(labels, problem)
    if row is None or not self.begins(labels, problem):
      return 0.0
    right = [slots_of(problem, answer) for answer in metadata["answers"]]
    hits = [sum(row[goal] == bar for bar, goal in enumerate(goals)) for goals in right]
    return max(hits) / len(row)

  def parts(self, labels: np.ndarray, problem: base.Problem) -> frozenset[tuple[int, int]] | None:
    """The (slot, bar) of every bar that stands in the lower row."""
    row = self.row(labels, problem)
    return None if row is None else frozenset((s, b) for s, b in enumerate(row) if b >= 0)

  def process(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """Share of bars' ways to their ranks that were travelled without a leap, times the share of
    frames on which the bars have their areas. The way of a bar that does not arrive is worth 0."""
    problem = metadata["problem"]
    if not self.begins(labels, problem):
      return 0.0
    area, middle = self.tracks(labels, problem)
    whole = self.whole(area)
    source = self.middles(problem, list(range(area.shape[1])), UPPER)
    best = 0.0
    for answer in metadata["answers"]:
      target = self.middles(problem, slots_of(problem, answer), LOWER)
      ways = [
        self.way(middle[area[:, bar] >= SEEN, bar], source[bar], target[bar], self.slot(problem))
        for bar in range(len(source))
      ]
      best = max(best, sum(ways) / len(ways))
    return best * float(whole.mean())

  def whole(self, area: np.ndarray) -> np.ndarray:
    """Frames on which the bars have their areas (T, bars) but for what others may hide: few at a
    time, and none for long, or it is gone."""
    hidden = area < AREA[0]
    gone = hidden & (hidden.sum(axis=0) > HIDING * self.travel)
    return (area <= AREA[1]).all(axis=1) & (hidden.sum(axis=1) <= HIDDEN) & ~gone.any(axis=1)

  def way(self, middle: np.ndarray, source: np.ndarray, target: np.ndarray, slot: int) -> float:
    """Share of the line from source to target that the middles (T, 2) cover in small steps."""
    if np.abs(middle[-1] - target).max() > 0.4 * slot:
      return 0.0
    steps = np.diff(middle, axis=0)
    line = target - source
    small = np.linalg.norm(steps, axis=-1) <= STEP * slot
    covered = float((steps @ line)[small].sum() / (line @ line))
    return min(1.0, max(0.0, covered / 0.9))

  def soft(self, frames: np.ndarray, problem: base.Problem) -> dict[base.Answer, float]:
    """An order is as present as the least visible of its bars.

    A slot that shows one bar shows no other, however alike their colours are.
    """
    names = [draw.colour(n) for n in colours_of(problem)]
    count = len(names)
    seen = np.zeros((count, count))
    for bar, name in enumerate(names):
      boxes = np.array([self.standing(problem, bar, s) for s in range(count)])
      where = draw.cells(self.size, boxes)
      seen[bar] = draw.among(frames[-2:], where, name, [GROUND, *names]).mean(axis=0)
    return {
      answer: float(min(seen[bar, s] for bar, s in enumerate(slots_of(problem, answer))))
      for answer in self.options(problem)
    }


def colours_of(problem: base.Problem) -> list[str]:
  return [bar["colour"] for bar in problem["bars"]]


def slots_of(problem: base.Problem, answer: base.Answer) -> list[int]:
  """The slot that each bar has in the lower row."""
  order = str(answer).split()
  return [order.index(name) for name in colours_of(problem)]
