"""Pick: white rings grow round the group of shapes that the prompt names.

Two groups, one shape against two, each in its half of the picture. An answer is the half whose
group is marked: "left" or "right", "top" or "bottom". `counterpart` exchanges the groups.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jax_videoreason.tasks import base, draw

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
GROUND = draw.BLACK
LEAST = 0.0115  # square slots by which one kind of shape must differ from another: 3 px of 16 x 16
HALVES = {"across": ("left", "right"), "down": ("top", "bottom")}
TEMPLATES = {
  False: (
    "Draw a white ring around every {kind}.",
    "A white ring grows round each {kind}, and round nothing else.",
    "Mark the group of {colour} shapes that are {shape}s with white rings.",
    "Pick each {kind} and circle it in white.",
  ),
  True: (
    "There are two groups of {kind}s. Mark one group with white rings.",
    "White rings grow round one of the two groups of {kind}s, and round nothing else.",
    "Choose the {kind}s in one half of the picture and circle them in white.",
    "Pick one group of {kind}s and draw a white ring around each of its members.",
  ),
}


class Pick(base.Task):
  name = "pick"
  number = 9

  @property
  def slot(self) -> float:
    """Pixels per slot: the picture is 2 x 2 slots."""
    return self.size / 2

  def draw_problem(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> base.Problem | None:
    """In `ood` the named shapes have a colour that their shape never has in training."""
    shapes = rng.permutation(len(SHAPES))[:2]
    colours = rng.integers(len(COLOURS), size=2)
    if ambiguous:
      shapes, colours = shapes[[0, 0]], colours[[0, 0]]
    kinds = [(int(c), int(s)) for c, s in zip(colours, shapes, strict=True)]
    unseen = [c == s for c, s in kinds]
    if split != "ood" and any(unseen):
      return None
    target = int(rng.integers(2))
    if split == "ood" and not unseen[target]:
      return None
    counts = [1, 2] if rng.integers(2) else [2, 1]
    groups = [
      {
        "colour": COLOURS[c],
        "shape": SHAPES[s],
        # places along the half, in slots
        "along": [0.5, 1.5] if n == 2 else [(0.5, 1.0, 1.5)[int(rng.integers(3))]],
      }
      for (c, s), n in zip(kinds, counts, strict=True)
    ]
    axis = "across" if rng.integers(2) else "down"
    if ambiguous and any(g["along"] in ([0.5], [1.5]) for g in groups):
      return None  # all shapes alike, one in a corner: the picture would not say which two belong
    named = {key: groups[target][key] for key in ("colour", "shape")}
    return {"axis": axis, "groups": groups, "named": named}

  def right_answers(self, problem: base.Problem) -> list[base.Answer]:
    return [
      half
      for half, group in zip(self.options(problem), problem["groups"], strict=True)
      if all(group[key] == value for key, value in problem["named"].items())
    ]

  def options(self, problem: base.Problem) -> list[base.Answer]:
    return list(HALVES[problem["axis"]])

  def templates(self, problem: base.Problem) -> list[str]:
    colour, shape = problem["named"]["colour"], problem["named"]["shape"]
    several = len(self.right_answers(problem)) > 1
    return [
      t.format(kind=f"{colour} {shape}", colour=colour, shape=shape) for t in TEMPLATES[several]
    ]

  def members(self, problem: base.Problem) -> list[list[tuple[float, float]]]:
    """Centres (y, x) in pixels of both groups' members."""
    found = []
    for half, group in enumerate(problem["groups"]):
      across = (half + 0.5) * self.slot
      places = [(a * self.slot, across) for a in group["along"]]
      found.append(places if problem["axis"] == "across" else [(x, y) for y, x in places])
    return found

  def draw_answer(self, problem: base.Problem, answer: base.Answer) -> np.ndarray:
    ground = draw.canvas(self.size, GROUND)
    members = self.members(problem)
    for group, centres in zip(problem["groups"], members, strict=True):
      for centre in centres:
        mask = draw.shape(self.size, group["shape"], centre, 0.28 * self.slot)
        ground[mask] = draw.colour(group["colour"])
    maps = np.repeat(ground[None], self.frames, axis=0)
    draw.draw_rings(maps, members[self.options(problem).index(answer)], self.slot)
    return maps

  def kept(self, problem: base.Problem) -> list[base.Kept]:
    """Every shape's inside and the ground within its ring; the rings; the ground beyond; and for
    each shape, a group of its own, that it is no other kind."""
    members = self.members(problem)
    masks, allowed, kinds = [], [], []
    for group, centres in zip(problem["groups"], members, strict=True):
      for centre in centres:
        kinds.append(self.kept_kind(group, centre))
        inside, notches = self.shape_regions(group["shape"], centre)
        masks.append(inside)
        allowed.append([draw.colour(group["colour"])])
        if notches.any():
          masks.append(notches)
          allowed.append([GROUND])
    centres = [c for group in members for c in group]
    rings = draw.rings(self.size, centres, self.slot)
    outside = draw.outside(self.size, centres, self.slot)
    return [
      base.kept(draw.regions(masks), allowed),
      base.kept(rings, [[GROUND, draw.WHITE]] * len(rings), other=draw.TINGED),
      base.kept(outside, [[GROUND]] * len(outside)),
      *kinds,
    ]

  def kept_kind(self, group: base.Problem, centre: tuple[float, float]) -> base.Kept:
    """Where another kind of shape would show the ground instead of this one, or the reverse.

    At 32 pixels these are edges, so only pixels that a blur leaves alone are looked at.
    """
    full = {kind: draw.shape(self.size, kind, centre, 0.28 * self.slot) for kind in SHAPES}
    own, colour = full.pop(group["shape"]), draw.colour(group["colour"])
    masks, wrong = [draw.firm(own)], [GROUND]
    for other in full.values():
      for mask, never in ((draw.firm(own) & ~other, GROUND), (other & draw.firm(~own), colour)):
        if mask.sum() >= LEAST * self.slot**2:
          masks.append(mask)
          wrong.append(never)
    return base.never(draw.regions(masks), wrong)

  def shape_regions(self, kind: str, centre: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels well inside a shape, and pixels of the circle round it well outside the shape."""
    radius = 0.28 * self.slot
    full = draw.shape(self.size, kind, centre, radius)
    near = draw.disc(self.size, centre, 0.25 * self.slot)
    inside, notches = full & near, near & ~full
    for _ in range(max(1, round(0.05 * self.slot))):
      inside, notches = erode(inside), erode(notches)
    return (inside if inside.any() else full & near), notches

  def drawn(
    self, labels: np.ndarray, problem: base.Problem
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of each member's ring that is white, and ground (T, members), and its half."""
    members = self.members(problem)
    where = draw.rings(self.size, [c for group in members for c in group], self.slot)
    half = np.repeat([0, 1], [len(group) for group in members])
    seen = draw.shares(labels, where)
    return seen[..., draw.WHITE], seen[..., GROUND], half

  def read(self, labels: np.ndarray, problem: base.Problem) -> base.Answer | None:
    """The half all of whose members have a ring while no member of the other has one."""
    amounts, _, half = self.drawn(labels, problem)
    whole, absent = base.at_the_end(amounts)
    for i, option in enumerate(self.options(problem)):
      if whole[half == i].all() and absent[half != i].all():
        return option
    return None

  def process(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """The rings of one group grow gradually and together; no member of the other ever has one."""
    amounts, left, half = self.drawn(labels, metadata["problem"])

    def of_groups(f: Callable[..., np.ndarray], values: np.ndarray) -> np.ndarray:
      return np.stack([f(values[:, half == i], axis=1) for i in (0, 1)], axis=1)

    mean = of_groups(np.mean, amounts)
    clear = base.unmixed(mean, of_groups(np.mean, left))
    return base.lone_growth(mean, clear, steps=5, most=of_groups(np.max, amounts))

  def soft(self, frames: np.ndarray, problem: base.Problem) -> dict[base.Answer, float]:
    """A group is as marked as the least marked of its members."""
    found = {}
    for option, centres in zip(self.options(problem), self.members(problem), strict=True):
      where = draw.rings(self.size, centres, self.slot)
      ground = np.full(len(centres), GROUND)
      seen = draw.occupancy(frames[-2:], where, draw.WHITE, ground).mean(axis=0)
      found[option] = float(seen.min())
    return found

  def canonical(self, problem: base.Problem) -> Any:
    """Without places and halves, so that a case and its counterpart share a split."""
    groups = [[g["colour"], g["shape"], len(g["along"])] for g in problem["groups"]]
    return [sorted(groups), problem["named"], problem["axis"]]

  def counterpart(self, case: base.Case) -> base.Case:
    """The same picture and prompt with the two groups exchanged; the same group is marked."""
    self.check_metadata(case.metadata)
    problem = case.metadata["problem"]
    options = self.options(problem)
    swapped = problem | {"groups": problem["groups"][::-1]}
    metadata = case.metadata | {
      "problem": swapped,
      "answers": self.right_answers(swapped),
      "answer": options[1 - options.index(case.metadata["answer"])],
    }
    return self.case(metadata)


def erode(mask: np.ndarray) -> np.ndarray:
  """Pixels whose four neighbours are in the mask too."""
  padded = np.pad(mask, 1)
  return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
