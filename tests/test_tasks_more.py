"""What single tasks promise beyond the contract of test_tasks.py."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from jax_videoreason import tasks
from jax_videoreason.tasks import (
  base,
  bounce,
  draw,
  maze,
  occlusion,
  rotate,
  select_largest,
  sort_bars,
  tictactoe,
)


def test_the_nine_tasks_and_the_two_held_out_ones():
  held_out = [name for name, task in tasks.TASKS.items() if task.held_out]
  assert list(tasks.TASKS) == [
    "maze",
    "tree_reach",
    "tictactoe",
    "occlusion",
    "sort_bars",
    "rotate",
    "select_largest",
    "bounce",
    "pick",
  ]
  assert held_out == ["tree_reach", "bounce"]
  assert sorted(task.number for task in tasks.TASKS.values()) == list(range(1, 10))
  with pytest.raises(ValueError, match="has no split 'train'; it has: heldout"):
    tasks.load("bounce").generate("train", 0)


# The fewest frames make the longest steps, the most the shortest.
CASES = {13: 30, 17: 10, 33: 10, 81: 2, 121: 1}


@pytest.mark.parametrize("frames", list(CASES))
@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_the_truth_scores_one_in_many_cases_and_lengths(name, frames):
  task = tasks.load(name, size=32, frames=frames)
  split = "heldout" if task.held_out else "train"
  for index in range(CASES[frames]):
    case = task.generate(split, index)
    assert task.score(case.frames, case.metadata).value == 1, index
    assert task.parse(case.frames, case.metadata) == case.metadata["answer"]


@pytest.mark.parametrize("frames", (17, 25, 81, 121))
def test_a_mark_grows_evenly_over_any_number_of_frames(frames):
  even = np.clip((np.arange(frames) - 3) / (frames - 5), 0, 1)
  assert base.growth(even, steps=5) == 1
  jump = (even == 1).astype(float)
  assert base.growth(jump, steps=5) == 0


# --- what must not happen ---

Edit = Callable[[base.Task, base.Case], np.ndarray]


def wrong_ring(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with 55% of a ring round a wrong disc, until it is erased for the last two frames."""
  centre = task.centre(task.wrong_answers(case.metadata)[0])
  ring = draw.ring(task.size, centre, *draw.ring_radii(task.slot))
  ring &= draw.clockwise(task.size, centre) < 0.55 * 2 * np.pi
  return over(case, slice(1, -2), ring, draw.WHITE)


def wrong_cell(task: base.Task, case: base.Case) -> np.ndarray:
  """The same of a wrong cell: 55% of it filled."""
  y0, x0, y1, x1 = tictactoe.layout(task.size)[0][task.wrong_answers(case.metadata)[0]]
  part = draw.rectangle(task.size, (y1 - int(0.55 * (y1 - y0)), x0, y1, x1))
  return over(case, slice(1, -2), part, draw.colour(case.metadata["problem"]["mover"]))


def one_wrong_member(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with a whole ring round one of two wrong shapes, from the right rings' first frame
  to the last but two."""
  problem = case.metadata["problem"]
  other = task.members(problem)[1 - task.options(problem).index(case.metadata["answer"])]
  ring = draw.ring(task.size, other[0], *draw.ring_radii(task.slot))
  return over(case, slice(draw.RING_START, -2), ring, draw.WHITE)


def second_ball(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with a ball of another colour that crosses the box, its way mirrored."""
  problem, out = case.metadata["problem"], case.frames.copy()
  colour = another_colour([problem["colour"]])
  radius = bounce.RADIUS * task.size
  for canvas, middle in zip(out[1:], task.path(problem, problem["degrees"])[1:], strict=True):
    ball = draw.disc(task.size, middle, radius)
    canvas[draw.disc(task.size, task.size - middle, radius) & ~ball] = draw.RGB[colour]
  return out


def extra_bar(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with the shortest of bars, of a colour that no bar has, in the upper row."""
  problem = case.metadata["problem"]
  short = problem | {"bars": [bar | {"height": sort_bars.LEAST} for bar in problem["bars"]]}
  box = task.box(short, 0, 1, task.pixels(sort_bars.UPPER))
  colour = another_colour(sort_bars.colours_of(problem))
  return over(case, slice(3, None), draw.rectangle(task.size, box), colour)


def square_above(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with a square across two eighths of the strip where the curtain hung."""
  y0, x0, y1, x1 = task.square(0)
  box = (0, task.size // 16, y1 - y0, task.size // 16 + x1 - x0)
  return over(case, slice(1, None), draw.rectangle(task.size, box), draw.RED)


def marks_grey(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with the mover's two marks of the line grey until the end of the flash."""
  answer = case.metadata["answer"]
  line = tictactoe.lines_through(case.metadata["problem"]["board"], answer)[0]
  tiles = tictactoe.layout(task.size)[0][[cell for cell in line if cell != answer]]
  mask = np.any([draw.rectangle(task.size, tile) for tile in tiles], axis=0)
  return over(case, slice(1, -2), mask, draw.GREY)


def smaller_disc(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with its largest disc redrawn smaller than any that is not the largest."""
  disc = max(case.metadata["problem"]["discs"], key=lambda d: d["radius"])
  centre, radius = task.centre(disc["slot"]), disc["radius"] * task.slot
  less = radius - 2 * select_largest.GAP * task.slot
  return over(case, slice(1, None), draw.ring(task.size, centre, less, radius), draw.BLACK)


def extra_disc(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with a disc of middle size in an empty slot."""
  centre = task.centre(empty_slots(task, case)[0])
  return over(case, slice(1, None), draw.disc(task.size, centre, 0.2 * task.slot), draw.RED)


def empty_slots(task: base.Task, case: base.Case) -> list[int]:
  return sorted(set(range(task.side**2)) - {d["slot"] for d in case.metadata["problem"]["discs"]})


def bar_gone(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with a bar that can't be seen on five frames."""
  name = case.metadata["problem"]["bars"][0]["colour"]
  out = case.frames.copy()
  part = out[6:11]
  part[(part == draw.RGB[draw.colour(name)]).all(axis=-1)] = draw.RGB[draw.BLACK]
  return out


def other_leaf(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with another leaf yellow on five frames."""
  problem = case.metadata["problem"]
  wrong = task.path(problem, task.wrong_answers(case.metadata)[0])[-1]
  leaf = draw.rectangle(task.size, task.boxes(problem)[wrong])
  return over(case, slice(5, 10), leaf, draw.YELLOW)


def edge_erased(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with the last edge of the tree gone."""
  edge = task.edges(case.metadata["problem"])[-1]
  return over(case, slice(1, None), edge, draw.BLACK)


def gaps_painted(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with the tiles joined: the ground between them has the colour of the mover."""
  tiles = tictactoe.layout(task.size)[0]
  free = ~np.any([draw.rectangle(task.size, tile) for tile in tiles], axis=0)
  return over(case, slice(1, None), free, draw.colour(case.metadata["problem"]["mover"]))


def piece_shrinks(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with a piece of half its width and height on five frames of its turn."""
  out, half = case.frames.copy(), task.size // 2
  for canvas in out[6:11]:
    panel = canvas[half:, half:]
    rim = (half - half // 2) // 2
    small = panel[::2, ::2].copy()
    panel[:] = draw.RGB[draw.WHITE]
    panel[rim : rim + len(small), rim : rim + len(small)] = small
  return out


def tail_lost(task: base.Task, case: base.Case) -> np.ndarray:
  """The truth with the first cell of the trail white again from the middle to the end."""
  rows = case.metadata["problem"]["rows"]
  box = maze.layout(task.size, len(rows))[0][second_cell(case)]
  return over(case, slice(8, None), draw.rectangle(task.size, box), draw.WHITE)


def tail_blinks(task: base.Task, case: base.Case) -> np.ndarray:
  """The same, but the cell is red again on the last two frames."""
  out = tail_lost(task, case)
  out[-2:] = case.frames[-2:]
  return out


def second_cell(case: base.Case) -> tuple[int, int]:
  return maze.walk(tuple(case.metadata["problem"]["start"]), case.metadata["answer"])[1]


def another_colour(taken: list[str]) -> int:
  return draw.colour(next(name for name in ("red", "green", "blue", "cyan") if name not in taken))


def over(case: base.Case, when: slice, mask: np.ndarray, colour: int) -> np.ndarray:
  """The truth with the pixels of a mask in a colour on some frames."""
  out = case.frames.copy()
  out[when, mask] = draw.RGB[colour]
  return out


def two_wrong(task: base.Task, case: base.Case) -> bool:
  problem = case.metadata["problem"]
  others = task.members(problem)[1 - task.options(problem).index(case.metadata["answer"])]
  return len(others) == 2


WRONG: list[tuple[str, Edit]] = [
  ("select_largest", wrong_ring),
  ("tictactoe", wrong_cell),
  ("pick", one_wrong_member),
  ("bounce", second_ball),
  ("sort_bars", extra_bar),
  ("occlusion", square_above),
  ("tictactoe", marks_grey),
  ("tictactoe", gaps_painted),
  ("select_largest", smaller_disc),
  ("select_largest", extra_disc),
  ("sort_bars", bar_gone),
  ("tree_reach", other_leaf),
  ("tree_reach", edge_erased),
  ("rotate", piece_shrinks),
  ("maze", tail_lost),
  ("maze", tail_blinks),
]


def cases_for(task: base.Task, edit: Edit, count: int = 3) -> list[base.Case]:
  """The first plain cases that an edit can be made in."""
  split = "heldout" if task.held_out else "train"
  plain = (task.generate(split, index) for index in range(0, 200, 2))
  fits = FITS.get(edit, lambda _task, _case: True)
  return list(itertools.islice((case for case in plain if fits(task, case)), count))


FITS = {one_wrong_member: two_wrong, extra_disc: lambda task, case: bool(empty_slots(task, case))}


@pytest.mark.parametrize("size", (32, 64))
@pytest.mark.parametrize(("name", "edit"), WRONG, ids=[edit.__name__ for _, edit in WRONG])
def test_what_must_not_happen_is_no_strict_success(name, edit, size):
  task = tasks.load(name, size=size)
  for case in cases_for(task, edit):
    frames = edit(task, case)
    assert (frames[0] == case.first_frame).all()
    score = task.score(frames, case.metadata)
    assert not score.strict, (case.index, score)
    assert score.value < 0.95, (case.index, score)


# --- occlusion ---


@pytest.mark.parametrize("size", (32, 64))
def test_occlusion_covers_every_square_on_three_frames_at_least(size):
  task = tasks.load("occlusion", size=size)
  for index in range(12):
    case = task.generate("train", index)
    for square in case.metadata["problem"]["squares"]:
      colour = draw.RGB[draw.colour(square["colour"])]
      unseen = ~(case.frames == colour).all(axis=-1).any(axis=(1, 2))
      assert unseen.sum() >= 3


# --- sort_bars ---


@pytest.mark.parametrize("size", (32, 64, 128))
def test_sort_bars_answers_are_in_order_of_heights_at_least_two_pixels_apart(size):
  task = tasks.load("sort_bars", size=size)
  for index in range(24):
    problem = (meta := task.generate("train", index).metadata)["problem"]
    height = {b["colour"]: b["height"] * size / 32 for b in problem["bars"]}
    ordered = sorted(height.values())
    assert min(b - a for a, b in itertools.pairwise(ordered)) >= 2
    ways = {"rising": [1], "falling": [-1], "either": [1, -1]}[problem["order"]]
    rows = [[height[name] for name in answer.split()] for answer in meta["answers"]]
    assert rows == [ordered[::way] for way in ways]


def test_sort_bars_two_bars_in_each_others_places_leave_the_other_two_right():
  task = tasks.load("sort_bars", size=32)
  case = task.generate("train", 0)
  a, b, c, d = case.metadata["answer"].split()
  score = task.score(task.render(case.metadata, f"{b} {a} {c} {d}"), case.metadata)
  assert score.final == 0.5
  assert score.process == 0.5


def test_sort_bars_wants_heights_kept_and_no_leaps():
  task = tasks.load("sort_bars", size=32)
  case = task.generate("train", 0)
  tallest = max(case.metadata["problem"]["bars"], key=lambda b: b["height"])
  mask = (case.frames == draw.RGB[draw.colour(tallest["colour"])]).all(axis=-1)
  lower = case.frames.copy()
  for t in (-2, -1):
    top = np.flatnonzero(mask[t].any(axis=1))[0]
    lower[t, top : top + 4][mask[t, top : top + 4]] = draw.RGB[draw.BLACK]
  assert task.score(lower, case.metadata).final == 0.75
  leaps = case.frames[[0] * 6 + [5] * 6 + [15] * 5]
  score = task.score(leaps, case.metadata)
  assert score.final == 1
  assert score.process < 0.3


@pytest.mark.parametrize(("frames", "most"), ((13, 3), (17, 4), (33, 8)))
def test_sort_bars_one_that_is_hidden_for_long_is_gone(frames, most):
  """Once edges blur, other bars hide one for `most` frames at 13; more rarely in longer clips."""
  task = tasks.load("sort_bars", size=64, frames=frames)
  area = np.ones((frames, 4))
  area[4 : 4 + most, 1] = 0
  assert task.whole(area).all()
  area[4 + most, 1] = 0
  assert task.whole(area).sum() == frames - most - 1


# --- rotate ---


def orientations(shape: tuple[str, ...]) -> list[np.ndarray]:
  return [rotate.cells_of(shape, quarters) for quarters in range(4)]


def test_rotate_shapes_win_by_the_lead_over_their_best_wrong_orientation():
  everything = {"F": rotate.EXAMPLE} | rotate.SHAPES | rotate.OOD_SHAPES
  for shape in everything.values():
    right, *wrong = orientations(shape)
    assert 1 - max((right & w).sum() / (right | w).sum() for w in wrong) >= rotate.LEAD
  pictures = {o.tobytes() for shape in everything.values() for o in orientations(shape)}
  assert len(pictures) == 4 * len(everything)


def test_rotate_turns_the_piece_as_the_example_has_turned():
  task = tasks.load("rotate", size=64)
  for index in range(12):
    case = task.generate("train", index)
    panels = [case.frames[-1][:32, :32], case.frames[-1][32:, :32]]
    panels += [case.frames[0][:32, 32:], case.frames[-1][32:, 32:]]
    own = draw.RGB[draw.colour(case.metadata["problem"]["colour"])]
    shown = [(p == own).all(axis=-1) for p in panels[2:]]
    example = [(p != draw.RGB[draw.BLACK]).any(axis=-1) for p in panels[:2]]
    quarters = case.metadata["answer"] // 90
    assert (np.rot90(example[0], -quarters) == example[1]).all()
    assert (np.rot90(shown[0], -quarters) == shown[1]).all()


def test_rotate_half_a_cell_pattern_between_two_orientations_is_no_answer():
  task = tasks.load("rotate", size=32)
  case = task.generate("train", 0)
  right, wrong = (task.render(case.metadata, a) for a in (case.metadata["answer"], 0))
  both = right.copy()
  own = draw.RGB[draw.colour(case.metadata["problem"]["colour"])]
  piece = (wrong[-1] == own).all(axis=-1)
  both[-2:, piece] = own
  score = task.score(both, case.metadata)
  assert score.final < 1
  assert not score.strict


def test_rotate_reads_which_way_a_half_turn_goes():
  task = tasks.load("rotate", size=32)
  for index in range(1, 12, 2):
    case = task.generate("train", index)
    assert case.metadata["answers"] == [180, -180]
    one, other = (task.render(case.metadata, a) for a in (180, -180))
    assert (one[-1] == other[-1]).all()
    assert task.parse(one, case.metadata) == 180
    assert task.parse(other, case.metadata) == -180
    jump = np.concatenate([one[:4], one[-1:].repeat(13, axis=0)])
    assert task.parse(jump, case.metadata) is None


# --- tree_reach ---


def test_tree_reach_wants_the_nodes_in_order_from_the_root():
  task = tasks.load("tree_reach", size=64)
  case = task.generate("heldout", 0)
  boxes = task.boxes(case.metadata["problem"])
  root = boxes[0]
  late = case.frames.copy()  # the root fills last
  late[:-2, root[0] : root[2], root[1] : root[3]] = draw.RGB[draw.GREY]
  score = task.score(late, case.metadata)
  assert score.final == 1
  assert score.process <= 0.1


def test_tree_reach_a_second_leaf_is_too_much():
  task = tasks.load("tree_reach", size=64)
  case = task.generate("heldout", 1)
  one, two = case.metadata["answers"][:2]
  both, other = (task.render(case.metadata, a) for a in (one, two))
  yellow = (other == draw.RGB[draw.YELLOW]).all(axis=-1)
  both[yellow] = draw.RGB[draw.YELLOW]
  assert task.parse(both, case.metadata) is None
  assert task.score(both, case.metadata).final == 0


# --- bounce ---


def bounce_case(index: int, frames: int = 17) -> tuple[base.Task, base.Case, np.ndarray]:
  """With the ball's middle on each frame, measured, in pixels."""
  task = tasks.load("bounce", size=128, frames=frames)
  case = task.generate("heldout", index)
  ball = (case.frames == draw.RGB[draw.colour(case.metadata["problem"]["colour"])]).all(axis=-1)
  rows, columns = (ball.any(axis=axis) for axis in (2, 1))
  places = [
    [np.flatnonzero(r).mean(), np.flatnonzero(c).mean()]
    for r, c in zip(rows, columns, strict=False)
  ]
  return task, case, np.array(places) + 0.5


@pytest.mark.parametrize("index", range(6))
def test_bounce_moves_straight_and_reflects_at_constant_speed(index):
  _, _case, places = bounce_case(index, frames=33)
  steps = np.diff(places[:-1], axis=0)
  turns = np.diff(np.sign(steps.round()), axis=0) != 0
  free = ~np.pad(turns.any(axis=1), 1, mode="edge")
  free = free[:-1] & free[1:]
  speed = np.linalg.norm(steps[free], axis=-1)
  assert free.sum() >= 12
  assert np.ptp(speed) <= 2  # places are to half a pixel
  assert 0.97 < speed.mean() / np.median(speed) < 1.03
  # between walls the parts of the velocity keep their sizes, whatever their signs
  assert np.ptp(abs(steps[free]), axis=0).max() <= 1.5


@pytest.mark.parametrize("index", range(6))
def test_bounce_starts_along_the_arrow_and_meets_two_to_four_walls(index):
  __, case, places = bounce_case(index)
  white = (case.frames[0] == draw.RGB[draw.WHITE]).all(axis=-1)
  arrow = np.argwhere(white).mean(axis=0) + 0.5 - places[0]
  step = places[1] - places[0]
  if np.abs(places[1] - 64).max() < 35:  # no wall yet
    assert arrow @ step / np.linalg.norm(arrow) / np.linalg.norm(step) > 0.97
  problem = case.metadata["problem"]
  angle = np.deg2rad(problem["degrees"])
  end = np.array(problem["start"]) + 2.7 * np.array([-np.cos(angle), np.sin(angle)])
  assert 2 <= abs(np.floor(end)).sum() <= 4
  assert not (case.frames[1:] == draw.RGB[draw.WHITE]).all(axis=-1).any()


def test_bounce_an_error_of_a_cell_costs_and_uneven_speed_costs_more():
  task, case, _places = bounce_case(0)
  _y, x = (task.path(case.metadata["problem"], case.metadata["answer"])[-1]).round().astype(int)
  shift = -16 if x > 64 else 16
  moved = case.frames.copy()
  inside = moved[-2:, 8:-8, 8:-8]
  inside[:] = np.roll(inside, shift, axis=2)
  assert 0.4 < task.score(moved, case.metadata).final < 0.8
  uneven = case.frames[[0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 15, 16]]
  score = task.score(uneven, case.metadata)
  assert score.final == 1
  assert score.process < 0.4


def test_occlusion_says_what_is_hidden_when():
  task = occlusion.Occlusion(size=32, frames=17)
  case = task.generate("id", 3)
  things = task.hidden(case.metadata["problem"])
  assert [name for name, _, _ in things] == [
    s["colour"] for s in case.metadata["problem"]["squares"]
  ]
  for _, (y0, x0, y1, x1), frames in things:
    assert 3 <= frames.sum() <= 4
    seen = case.frames[:, y0:y1, x0:x1]
    covered = (seen == seen[frames][0, 0, 0]).all(axis=(1, 2, 3))  # one colour, the curtain's
    np.testing.assert_array_equal(covered, frames)
