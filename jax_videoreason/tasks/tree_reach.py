"""Reach through a tree: yellow flows from the root, node by node, down to the red leaf.

Three levels: the root at the top, its two or three children, and their leaves in slots along the
bottom. An answer is the slot of the leaf that is reached. Held out: there is no training split.
"""

import itertools

import numpy as np

from jax_videoreason.tasks import base, draw

GROUND, EDGE, NODE, GOAL, MARK = draw.BLACK, draw.WHITE, draw.GREY, draw.RED, draw.YELLOW
ROWS = (1 / 8, 1 / 2, 7 / 8)  # heights of the three levels, in shares of the picture
TEMPLATES = {
  False: (
    "Yellow spreads from the root at the top of the tree, one node after another, down to the red "
    "leaf.",
    "Colour the path from the top node to the red leaf yellow, node by node. No other node "
    "changes.",
    "Find the way down the tree to the red leaf and fill its nodes with yellow, beginning at the "
    "root.",
    "Reach the red leaf: first the root turns yellow, then the node below it, then the leaf.",
  ),
  True: (
    "Yellow spreads from the root at the top of the tree, one node after another, down to one of "
    "the red leaves.",
    "Colour the path from the top node to any one red leaf yellow, node by node. No other node "
    "changes.",
    "Find a way down the tree to one of the red leaves and fill its nodes with yellow, beginning "
    "at the root.",
    "Reach one red leaf: first the root turns yellow, then the node below it, then the leaf.",
  ),
}


class TreeReach(base.Task):
  name = "tree_reach"
  number = 2
  held_out = True

  @property
  def slots(self) -> int:
    """Places for leaves."""
    return 4 if self.size < 64 else 8

  def draw_problem(
    self, rng: np.random.Generator, split: str, ambiguous: bool
  ) -> base.Problem | None:
    """Inner nodes have two or three children; below 64 pixels those under the root 1 to 3."""
    least = 1 if self.size < 64 else 2
    counts = [int(n) for n in rng.integers(least, 4, size=int(rng.integers(2, 4)))]
    if not 3 <= sum(counts) <= self.slots:
      return None
    leaves = sorted(int(s) for s in rng.permutation(self.slots)[: sum(counts)])
    ends = np.cumsum(counts)
    goals = int(rng.integers(2, min(4, len(leaves)))) if ambiguous else 1
    red = sorted(int(s) for s in rng.choice(leaves, goals, replace=False))
    children = [leaves[end - n : end] for n, end in zip(counts, ends.tolist(), strict=True)]
    return {"children": children, "red": red}

  def right_answers(self, problem: base.Problem) -> list[base.Answer]:
    return list(problem["red"])

  def options(self, problem: base.Problem) -> list[base.Answer]:
    return [slot for family in problem["children"] for slot in family]

  def templates(self, problem: base.Problem) -> tuple[str, ...]:
    return TEMPLATES[len(problem["red"]) > 1]

  # --- nodes: the root, its children, the leaves, in this order ---

  def centres(self, problem: base.Problem) -> np.ndarray:
    """(nodes, 2): (y, x) of each node's middle in pixels; a parent stands above its children."""
    slot = self.size / self.slots
    leaves = [(int(s) + 0.5) * slot for s in self.options(problem)]
    middles = [float(np.mean([(s + 0.5) * slot for s in f])) for f in problem["children"]]
    x = [float(np.mean(middles)), *middles, *leaves]
    levels = [0] + [1] * len(middles) + [2] * len(leaves)
    return np.array([(ROWS[v] * self.size, at) for v, at in zip(levels, x, strict=True)])

  def boxes(self, problem: base.Problem) -> np.ndarray:
    """(nodes, 4): a node takes three quarters of a slot."""
    side = round(0.75 * self.size / self.slots)
    corner = (self.centres(problem) - side / 2).round().astype(int)
    return np.concatenate([corner, corner + side], axis=1)

  def path(self, problem: base.Problem, leaf: base.Answer) -> list[int]:
    """Numbers of the nodes on the way from the root to a leaf."""
    family = next(i for i, f in enumerate(problem["children"]) if leaf in f)
    first = 1 + len(problem["children"])
    return [0, 1 + family, first + self.options(problem).index(leaf)]

  def colours(self, problem: base.Problem) -> np.ndarray:
    """(nodes,) as the first frame shows them."""
    inner = [NODE] * (1 + len(problem["children"]))
    return np.array(inner + [GOAL if s in problem["red"] else NODE for s in self.options(problem)])

  def edges(self, problem: base.Problem, wider: float = 0.0) -> list[np.ndarray]:
    """One mask per edge: a line two fifths of a node wide, outside all nodes."""
    centres = self.centres(problem)
    free = np.ones((self.size, self.size), bool)
    for box in self.boxes(problem):
      free &= ~draw.rectangle(self.size, box)
    pairs = {(a, b) for leaf in self.options(problem) for a, b in steps(self.path(problem, leaf))}
    width = 0.3 * self.size / self.slots + wider
    return [free & line(self.size, centres[a], centres[b], width) for a, b in sorted(pairs)]

  def draw_answer(self, problem: base.Problem, answer: base.Answer) -> np.ndarray:
    """The nodes fill from the top, one after the other, evenly over frames FIRST_MARK to T - 2."""
    ground, boxes = draw.canvas(self.size, GROUND), self.boxes(problem)
    for mask in self.edges(problem):
      ground[mask] = EDGE
    for (y0, x0, y1, x1), colour in zip(boxes, self.colours(problem), strict=True):
      ground[y0:y1, x0:x1] = colour
    maps = np.repeat(ground[None], self.frames, axis=0)
    way = self.path(problem, answer)
    for t in range(base.FIRST_MARK, self.frames):
      done = len(way) * (t - base.FIRST_MARK + 1) / (self.frames - 1 - base.FIRST_MARK)
      for i, node in enumerate(way):
        y0, x0, y1, x1 = boxes[node]
        filled = round(min(1.0, max(0.0, done - i)) * (y1 - y0))
        maps[t, y0 : y0 + filled, x0:x1] = MARK
    return maps

  # --- reading ---

  def kept(self, problem: base.Problem) -> list[base.Kept]:
    """Red leaves, grey leaves and inner nodes, which may turn yellow; edges; the ground."""
    boxes, own = self.boxes(problem), self.colours(problem)
    inner = np.arange(len(own)) <= len(problem["children"])
    groups = []
    for which in (own == GOAL, ~inner & (own != GOAL), inner):
      if which.any():
        allowed = [[int(c), MARK, draw.UNDECIDED] for c in own[which]]
        groups.append(base.kept(draw.cells(self.size, boxes[which]), allowed))
    edges = self.edges(problem)
    free = self.free(problem)
    drawn = [c for c in range(len(draw.NAMES)) if c != GROUND]  # thin lines blur to many colours
    return [
      *groups,
      base.kept(draw.regions(edges), [[*drawn, draw.UNDECIDED]] * len(edges)),
      base.kept(draw.regions(free), [[GROUND]] * len(free)),
    ]

  def free(self, problem: base.Problem) -> list[np.ndarray]:
    """Masks of the ground a pixel of 32 away from the tree, in blocks of a quarter of the side."""
    rim = self.size / 32
    apart = ~np.any(self.edges(problem, 2 * rim), axis=0)
    for box in self.boxes(problem) + np.round([-rim, -rim, rim, rim]).astype(int):
      apart &= ~draw.rectangle(self.size, np.maximum(box, 0))
    blocks = [apart & draw.rectangle(self.size, b) for b in draw.blocks(self.size, self.size)]
    return [block for block in blocks if block.sum() >= 0.05 * (self.size / 4) ** 2]

  def read(self, labels: np.ndarray, problem: base.Problem) -> base.Answer | None:
    """The leaf whose path is yellow while every other node is as it was, on both last frames."""
    seen = draw.majority(labels[-2:], draw.cells(self.size, self.boxes(problem)))
    own = self.colours(problem)
    for leaf in self.options(problem):
      wanted = own.copy()
      wanted[self.path(problem, leaf)] = MARK
      if (seen == wanted).all():
        return leaf
    return None

  def process(self, labels: np.ndarray, metadata: base.Metadata) -> float:
    """Share of the path that fills gradually and each node after the one above, times the share of
    frames on which no other node is yellow; the best right answer counts."""
    problem = metadata["problem"]
    where = draw.regions([draw.rectangle(self.size, box) for box in self.boxes(problem)])
    amounts = draw.shares(labels, where)[..., MARK]
    yellow = draw.majority(labels, draw.cells(self.size, self.boxes(problem))) == MARK
    begun = amounts > base.ABSENT
    best = 0.0
    for leaf in metadata["answers"]:
      way = self.path(problem, leaf)
      alone = ~np.delete(begun, way, axis=1).any(axis=1)
      # A node counts from the frame on which all nodes above it are yellow until one below begins:
      # in a cross-fade all turn yellow together.
      above = np.logical_and.accumulate(yellow[:, way[:-1]], axis=1)
      ready = np.concatenate([np.ones_like(above[:, :1]), above], axis=1)
      grown = [
        base.growth(amounts[:, node] * ready[:, i], 2, begun[:, way[i + 1 :]].sum(axis=1) == 0)
        for i, node in enumerate(way)
      ]
      best = max(best, float(np.mean(grown) * alone.mean()))
    return best

  def soft(self, frames: np.ndarray, problem: base.Problem) -> dict[base.Answer, float]:
    """A leaf is as reached as the least yellow node of its path."""
    where = draw.cells(self.size, self.boxes(problem))
    seen = draw.occupancy(frames[-2:], where, MARK, self.colours(problem)).mean(axis=0)
    return {leaf: float(seen[self.path(problem, leaf)].min()) for leaf in self.options(problem)}


def steps(path: list[int]) -> list[tuple[int, int]]:
  return list(itertools.pairwise(path))


def line(size: int, start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
  """Mask of a straight line between two points (y, x)."""
  dy, dx = draw.offsets(size, start.tolist())
  along = end - start
  length = float(np.linalg.norm(along))
  ahead = (dy * along[0] + dx * along[1]) / length
  aside = (dy * along[1] - dx * along[0]) / length
  return (ahead >= 0) & (ahead <= length) & (abs(aside) <= width / 2)
