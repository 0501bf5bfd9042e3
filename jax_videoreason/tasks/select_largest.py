"""Select the largest: a white ring grows round the largest disc.

Discs stand in the slots of a square grid, 2 x 2 below 64 pixels, 3 x 3 from there. An answer is the
number of a slot in reading order.
"""

from typing import Any

import numpy as np

from jax_videoreason.tasks import base, draw

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
GROUND = draw.BLACK
GAP = 0.095  # least difference, in slots, between the largest radius and the next: 1.5 px of 16
BAND = 0.047  # width in slots of the bands that tell a radius: 0.75 px of 16
TEMPLATES = {
  False: (
    "A white ring grows around the largest disc.",
    "Find the biggest circle and draw a white ring round it.",
    "Mark the largest of the coloured discs with a white ring.",
    "Circle the largest disc in white. All discs stay where they are.",
  ),
  True: (
    "A white ring grows around one of the largest discs.",
    "Several circles are equally the biggest: draw a white ring round one of them.",
    "Mark one of the largest discs with a white ring.",
    "Circle one of the largest discs in white. All discs stay where they are.",
  ),
}


class SelectLargest(base.Task):
  name = "select_largest"
  number = 7

  @property
  def side(self) -> int:
    """Slots per side."""
    return 2 if self.size < 64 else 3

  @property
  def slot(self) -> float:
    """Pixels per slot."""
    return self.size / self.side

  def centre(self, slot: int) -> tuple[float, float]:
    """(y, x) of a slot's middle, in pixels."""
    return (slot // self.side + 0.5) * self.slot, (slot % self.side + 0.5) * self.slot

  def centres(self) -> list[tuple[float, float]]:
    return [self.centre(slot) for slot in range(self.side**2)]

  def draw_problem(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> base.Problem | None:
    """Radii are in slots. All discs of an `ood` picture have one colour, which training lacks."""
    slots = self.side**2
    count = int(rng.integers(3, 5)) if slots == 4 else int(rng.integers(4, 7))
    equal = int(rng.integers(2, 4)) if ambiguous else 1
    largest = rng.uniform(0.25, 0.285)
    radii = [largest] * equal
    radii += [rng.uniform(0.13, largest - GAP) for _ in range(count - equal)]
    places = rng.permutation(slots)[:count]
    names = [COLOURS[int(i)] for i in rng.integers(len(COLOURS), size=count)]
    if split == "ood":
      names = names[:1] * count
    elif len(set(names)) == 1:
      return None
    discs = [
      {"slot": int(p), "radius": round(float(r), 3), "colour": c}
      for p, r, c in zip(places, radii, names, strict=True)
    ]
    return {"discs": sorted(discs, key=lambda d: d["slot"])}

  def right_answers(self, problem: base.Problem) -> list[base.Answer]:
    largest = max(d["radius"] for d in problem["discs"])
    return [d["slot"] for d in problem["discs"] if d["radius"] == largest]

  def options(self, problem: base.Problem) -> list[base.Answer]:
    return [d["slot"] for d in problem["discs"]]

  def templates(self, problem: base.Problem) -> tuple[str, ...]:
    return TEMPLATES[len(self.right_answers(problem)) > 1]

  def canonical(self, problem: base.Problem) -> Any:
    """The picture: radii that fill the same pixels do not make another problem."""

    def pixels(disc: base.Problem) -> int:
      mask = draw.disc(self.size, self.centre(disc["slot"]), disc["radius"] * self.slot)
      return int(mask.sum())

    return [[disc["slot"], disc["colour"], pixels(disc)] for disc in problem["discs"]]

  def draw_answer(self, problem: base.Problem, answer: base.Answer) -> np.ndarray:
    ground = draw.canvas(self.size, GROUND)
    for d in problem["discs"]:
      mask = draw.disc(self.size, self.centre(d["slot"]), d["radius"] * self.slot)
      ground[mask] = draw.colour(d["colour"])
    maps = np.repeat(ground[None], self.frames, axis=0)
    draw.draw_rings(maps, [self.centre(int(answer))], self.slot)
    return maps

  def kept(self, problem: base.Problem) -> list[base.Kept]:
    """Each disc's inside and the ground just round it; all other ground; and for each disc, a
    group of its own, its radius."""
    masks, allowed = [], []
    for d in problem["discs"]:
      centre, radius = self.centre(d["slot"]), d["radius"] * self.slot
      masks.append(draw.disc(self.size, centre, max(1.0, 0.65 * radius)))
      allowed.append([draw.colour(d["colour"])])
      collar = draw.ring(self.size, centre, radius + 0.06 * self.slot, 0.23 * self.slot)
      if collar.any():
        masks.append(collar)
        allowed.append([GROUND])
    discs = base.kept(draw.regions(masks), allowed)
    centres = self.centres()
    rings = draw.rings(self.size, centres, self.slot)
    outside = draw.outside(self.size, centres, self.slot)
    taken = {d["slot"] for d in problem["discs"]}
    free = [self.centre(s) for s in range(len(centres)) if s not in taken]
    groups = [
      discs,
      base.kept(rings, [[GROUND, draw.WHITE]] * len(rings), other=draw.TINGED),
      base.kept(outside, [[GROUND]] * len(outside)),
      *(self.kept_radius(d) for d in problem["discs"]),
    ]
    if free:
      empty = draw.regions([draw.disc(self.size, c, 0.2 * self.slot) for c in free])
      groups.append(base.kept(empty, [[GROUND]] * len(empty)))
    return groups

  def kept_radius(self, disc: base.Problem) -> base.Kept:
    """Narrow bands within the edge of a disc and beyond it, as far as its ring."""
    centre, radius = self.centre(disc["slot"]), disc["radius"] * self.slot
    band = BAND * self.slot
    far = min(radius + 2 * band, draw.ring_radii(self.slot)[0])
    bands = [
      (draw.ring(self.size, centre, max(0, radius - 2 * band), radius - band), GROUND),
      (draw.ring(self.size, centre, radius + band, far), draw.colour(disc["colour"])),
    ]
    bands = [(mask, wrong) for mask, wrong in bands if mask.any()]
    return base.never(draw.regions([mask for mask, _ in bands]), [wrong for _, wrong in bands])

  def drawn(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the ring of each slot, empty ones too, that is white, and ground: (T, slots)."""
    seen = draw.shares(labels, draw.rings(self.size, self.centres(), self.slot))
    return seen[..., draw.WHITE], seen[..., GROUND]

  def read(self, labels: np.ndarray, problem: base.Problem) -> base.Answer | None:
    slot = base.only_mark(self.drawn(labels)[0])
    return slot if slot in self.options(problem) else None

  def process(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """One ring grows gradually, and no other is ever there."""
    white, ground = self.drawn(labels)
    return base.lone_growth(white, base.unmixed(white, ground), steps=5)

  def soft(self, frames: np.ndarray, problem: base.Problem) -> dict[base.Answer, float]:
    options = self.options(problem)
    where = draw.rings(self.size, [self.centre(int(s)) for s in options], self.slot)
    ground = np.full(len(options), GROUND)
    seen = draw.occupancy(frames[-2:], where, draw.WHITE, ground).mean(axis=0)
    return dict(zip(options, seen.tolist(), strict=True))
