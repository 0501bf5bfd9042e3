"""Every task against one contract: what each kind of clip may score, and what a case promises."""

import functools
import io
import itertools
import time

import av
import numpy as np
import pytest

from jax_videoreason import tasks
from jax_videoreason.tasks import ENDING, Unseen, base, draw, pick

SIZES = (32, 64, 128)
SLOW = pytest.mark.slow
EVERY = [
  pytest.param(name, size, marks=[] if size == 32 else SLOW)
  for name in tasks.TASKS
  for size in SIZES
]
every_task = pytest.mark.parametrize(("name", "size"), EVERY)
each_task = pytest.mark.parametrize("name", list(tasks.TASKS))

# clip -> (least, most) score allowed
CONTRACT = {
  "truth": (1.0, 1.0),
  "truth, compressed": (0.95, 1.0),
  "static": (0.0, 0.10),
  "cut": (0.0, 0.55),
  "cross-fade": (0.0, 0.55),
  "cross-fade, noisy": (0.0, 0.70),
  "cross-fade, blurred": (0.0, 0.70),
  "wrong answer": (0.0, 0.60),
  "noise": (0.0, 0.05),
  "reversed": (0.0, 0.30),
  "redrawn puzzle": (0.0, 0.10),
}


def blurred(frames: np.ndarray) -> np.ndarray:
  """The binomial 1 2 1 blur along height and width."""
  out = frames.astype(np.float32)
  for axis in (1, 2):
    padded = np.pad(out, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode="edge")
    size = out.shape[axis]
    parts = [np.take(padded, np.arange(size) + i, axis=axis) for i in range(3)]
    out = (parts[0] + 2 * parts[1] + parts[2]) / 4
  return out.round().astype(np.uint8)


def reencoded(frames: np.ndarray) -> np.ndarray:
  """Through H.264 in yuv420p, at the quality of the videos we write, and back."""
  file = io.BytesIO()
  with av.open(file, "w", format="mp4") as out:
    stream = out.add_stream("libx264", rate=16, options={"crf": "10"})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1  # several choose differently when the machine is busy
    for frame in frames:
      out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    out.mux(stream.encode())
  file.seek(0)
  with av.open(file) as source:
    return np.stack([f.to_ndarray(format="rgb24") for f in source.decode(video=0)])


def grainy(frames: np.ndarray, level: float, seed: int) -> np.ndarray:
  """With normal noise of a standard deviation."""
  noise = np.random.default_rng(seed).normal(0, level, frames.shape)
  return np.clip(frames + noise, 0, 255).round().astype(np.uint8)


def mixed(a: np.ndarray, b: np.ndarray, share: float | np.ndarray = 0.5) -> np.ndarray:
  return ((1 - share) * a.astype(np.float64) + share * b).round().astype(np.uint8)


def static(frames: np.ndarray) -> np.ndarray:
  return np.repeat(frames[:1], len(frames), axis=0)


def cut(frames: np.ndarray) -> np.ndarray:
  half = len(frames) // 2
  return np.concatenate([static(frames)[:half], static(frames[::-1])[half:]])


REDRAWN = 0.107  # a puzzle is another one when more of its first frame's pixels are others


def changed(case: base.Case, other: base.Case) -> float:
  """Share of the first frame's pixels that are others."""
  return float((other.first_frame != case.first_frame).any(axis=-1).mean())


def another(task: base.Task, case: base.Case) -> base.Case:
  """Of ten other problems of the same split and kind, the one whose first frame differs most."""
  others = [task.generate(case.split, index) for index in range(case.index + 2, case.index + 22, 2)]
  return max(others, key=lambda other: changed(case, other))


def clip(task: base.Task, case: base.Case, kind: str) -> list[np.ndarray]:
  truth = case.frames
  if kind == "truth":
    return [task.render(case.metadata, a) for a in case.metadata["answers"]]
  if kind == "static":
    return [static(truth)]
  if kind == "cut":
    return [cut(truth)]
  if kind.startswith("cross-fade"):
    share = np.linspace(0, 1, len(truth))[:, None, None, None]
    fade = mixed(static(truth), static(truth[::-1]), share)
    if kind == "cross-fade, noisy":
      return [grainy(fade, level, case.index) for level in (3, 5, 8)]
    return [blurred(fade) if kind == "cross-fade, blurred" else fade]
  if kind == "wrong answer":
    wrong = task.wrong_answers(case.metadata)
    take = np.random.default_rng(case.index).permutation(len(wrong))[:4]
    return [task.render(case.metadata, wrong[int(i)]) for i in take]
  if kind == "noise":
    return [np.random.default_rng(case.index).integers(0, 256, truth.shape, dtype=np.uint8)]
  if kind == "reversed":
    return [truth[::-1]]
  return [another(task, case).frames]


@functools.cache
def cases(name: str, size: int) -> list[base.Case]:
  """Plain and ambiguous cases of every split, more of them where they are small."""
  task = tasks.load(name, size=size)
  few = range(4) if size == 32 else range(2)
  return [task.generate(split, index) for split in task.splits() for index in few]


@functools.cache
def compressed_truths(name: str, size: int) -> list[np.ndarray]:
  return [reencoded(blurred(case.frames)) for case in cases(name, size)]


@pytest.mark.parametrize("kind", list(CONTRACT))
@every_task
def test_each_kind_of_clip_scores_as_the_contract_says(name, size, kind):
  task = tasks.load(name, size=size)
  least, most = CONTRACT[kind]
  seen = 0
  for i, case in enumerate(cases(name, size)):
    lossy = kind == "truth, compressed"
    for frames in [compressed_truths(name, size)[i]] if lossy else clip(task, case, kind):
      score = task.score(frames, case.metadata)
      assert least <= score.value <= most, (case.split, case.index, score)
      assert score.strict == (kind in ("truth", "truth, compressed")), (case.index, score)
      seen += 1
  assert seen >= len(cases(name, size)) / 2  # a maze of one corridor has no wrong answer


@each_task
def test_the_ending_says_the_answer_or_that_the_rest_must_be_seen(name):
  task = tasks.load(name, size=32)
  read, unseen = set(), set()
  for case in cases(name, 32):
    for kind in ("truth", "wrong answer", "cut", "cross-fade", "noise", "static"):
      for frames in clip(task, case, kind):
        answer = task.parse(frames, case.metadata)
        try:
          assert task.parse(frames[-ENDING:], case.metadata) == answer
          read.add(answer)
        except Unseen:
          unseen.add(answer)
  assert None in read and len(read) > 2
  if name == "rotate":  # of a half turn the ending shows no direction
    assert {180, -180} <= unseen <= {180, -180, None}
    assert not {180, -180} & read
  else:
    assert not unseen
  with pytest.raises(ValueError, match="frames are uint8"):
    task.parse(cases(name, 32)[0].frames[-3:], cases(name, 32)[0].metadata)


@pytest.mark.parametrize("size", (32, pytest.param(64, marks=SLOW)))
@each_task
def test_no_clip_earns_anything_on_another_problem(name, size):
  task = tasks.load(name, size=size)
  for split in task.splits():
    several = [task.generate(split, index) for index in range(12)]
    pairs = [p for p in itertools.permutations(several, 2) if changed(*p) > REDRAWN]
    assert pairs, f"no two problems of {split} differ enough"
    for case, other in pairs:
      score = task.score(other.frames, case.metadata)
      assert score.value <= CONTRACT["redrawn puzzle"][1], (split, case.index, other.index)


@pytest.mark.parametrize(("shown", "wanted"), list(itertools.permutations(pick.SHAPES, 2)))
def test_pick_tells_the_kinds_of_shape_apart_at_32_pixels(shown, wanted):
  task = tasks.load("pick", size=32)
  case = task.generate("train", 0)
  groups = [
    {"colour": "purple", "shape": wanted, "along": [1.0]},
    case.metadata["problem"]["groups"][1],
  ]
  problem = case.metadata["problem"] | {"groups": groups}
  redrawn = problem | {"groups": [groups[0] | {"shape": shown}, groups[1]]}
  answer = case.metadata["answer"]
  labels = task.draw_answer(redrawn, answer)
  assert base.preservation(task.draw_answer(problem, answer), task.kept(problem)) == 1
  assert base.preservation(labels, task.kept(problem)) == 0


@each_task
def test_judge_says_what_score_and_parse_say(name):
  task = tasks.load(name, size=32)
  for case in cases(name, 32):
    for kind in ("truth", "wrong answer", "cut", "noise"):
      for frames in clip(task, case, kind):
        apart = task.score(frames, case.metadata), task.parse(frames, case.metadata)
        assert task.judge(frames, case.metadata) == apart
  with pytest.raises(ValueError, match="frames are uint8"):
    task.judge(cases(name, 32)[0].frames[-ENDING:], cases(name, 32)[0].metadata)


@every_task
def test_parse_reads_the_answer_that_a_clip_shows(name, size):
  task = tasks.load(name, size=size)
  for case, lossy in zip(cases(name, size), compressed_truths(name, size), strict=True):
    meta = case.metadata
    assert task.parse(case.frames, meta) == meta["answer"]
    assert task.parse(lossy, meta) == meta["answer"]


def visible(occupancy: float) -> bool:
  return bool(draw.blended(np.array(occupancy)) >= draw.VISIBLE)


@every_task
def test_candidates_put_the_mass_on_the_answer_shown(name, size):
  task = tasks.load(name, size=size)
  for case in cases(name, size):
    seen = task.candidates(case.frames, case.metadata)
    assert seen[case.metadata["answer"]] > 0.9
    others = [v for a, v in seen.items() if a != case.metadata["answer"]]
    assert not visible(max(others))


@pytest.mark.parametrize("name", [n for n, task in tasks.TASKS.items() if task.ambiguous])
def test_a_blend_of_two_right_answers_shows_both_and_earns_nothing(name):
  task = tasks.load(name, size=32)
  for index in (1, 3, 5):
    case = task.generate(task.splits()[0], index)
    first, second = (task.render(case.metadata, a) for a in case.metadata["answers"][:2])
    blend = mixed(first, second)
    assert task.score(blend, case.metadata).final == 0
    assert task.parse(blend, case.metadata) not in case.metadata["answers"]
    if (first[-1] != second[-1]).any():  # otherwise the answer is in the way, not in the end
      seen = task.candidates(blend, case.metadata)
      assert all(visible(seen[a]) for a in case.metadata["answers"][:2])


def shown(task: base.Task, case: base.Case, blend: dict[base.Answer, float]) -> int:
  """Candidates that a blend of clips shows; what is left of it is the clip that stands still."""
  still = (1 - sum(blend.values())) * static(case.frames).astype(float)
  clips = still + sum(share * task.render(case.metadata, a) for a, share in blend.items())
  seen = task.candidates(clips.round().astype(np.uint8), case.metadata)
  return sum(visible(value) for value in seen.values())


@every_task
def test_one_answer_is_one_candidate_from_its_first_shade_on(name, size):
  task = tasks.load(name, size=size)
  for index in range(12):
    case = task.generate(task.splits()[-1], index)
    for answer in task.options(case.metadata["problem"])[:4]:
      assert shown(task, case, {answer: 1.0}) == 1
    if name != "bounce":  # whose arrow fades where another end may lie
      right = case.metadata["answer"]
      assert all(shown(task, case, {right: share}) <= 1 for share in (0.1, 0.3, 0.5, 0.7, 0.9))


@pytest.mark.parametrize("name", [n for n, task in tasks.TASKS.items() if task.ambiguous])
def test_candidates_are_seen_by_their_share_of_a_blend(name):
  task, found = tasks.load(name, size=32), []
  for index in range(1, 16, 2):
    case = task.generate(task.splits()[0], index)
    first, second, *third = case.metadata["answers"]
    assert shown(task, case, {first: 0.9, second: 0.1}) == 1
    for share in (0.5, 0.6):
      found.append(shown(task, case, {first: share, second: 1 - share}))
    if third:
      found.append(shown(task, case, dict.fromkeys([first, second, third[0]], 1 / 3)) - 1)
  assert min(found) >= 2
  # Ways through a maze cross and orders of bars mix, so that a blend holds others too.
  assert max(found) == 2 or name in ("maze", "sort_bars")


@each_task
def test_of_a_right_and_a_wrong_answer_both_are_seen_where_they_are_blended(name):
  task, found = tasks.load(name, size=32), []
  for index in range(12):
    case = task.generate(task.splits()[0], index)
    answer, meta = case.metadata["answer"], case.metadata
    wrong = [a for a in task.wrong_answers(meta) if (task.render(meta, a) != case.frames)[-1].any()]
    for other in wrong[:4]:
      clips = 0.6 * case.frames.astype(float) + 0.4 * task.render(meta, other)
      seen = task.candidates(clips.round().astype(np.uint8), meta)
      found.append(visible(seen[answer]) and visible(seen[other]))
  assert np.mean(found) >= 0.85  # a mixture of two colours may be near a third


@every_task
def test_frames_are_flat_begin_with_the_problem_and_end_with_the_answer(name, size):
  task = tasks.load(name, size=size)
  for case in cases(name, size):
    assert case.frames.shape == (17, size, size, 3)
    assert case.frames.dtype == np.uint8
    assert (case.frames[0] == case.first_frame).all()
    assert (case.frames[-1] == case.frames[-2]).all()
    assert (draw.paint(draw.label(case.frames)) == case.frames).all()
    for answer in task.options(case.metadata["problem"])[:6]:
      assert (task.render(case.metadata, answer)[0] == case.first_frame).all()


@pytest.mark.parametrize("split", ("train", "id", "ood"))
def test_some_mazes_are_one_corridor_and_most_can_be_answered_wrongly(split):
  task = tasks.load("maze", size=32)
  metas = [task.generate(split, index).metadata for index in range(0, 80, 2)]
  alone = [m for m in metas if not task.wrong_answers(m)]
  assert 0 < len(alone) < len(metas) / 4
  assert all(task.options(m["problem"]) == m["answers"] for m in alone)


@pytest.mark.parametrize("name", ("tictactoe", "select_largest", "pick"))
def test_a_flawless_wrong_mark_earns_half(name):
  task = tasks.load(name, size=32)
  case = task.generate("train", 0)
  wrong = task.render(case.metadata, task.wrong_answers(case.metadata)[0])
  assert task.score(wrong, case.metadata).value == 0.5


@each_task
def test_a_case_depends_on_task_split_and_index_alone(name):
  one, two = tasks.load(name, size=32), tasks.load(name, size=32)
  split = one.splits()[0]
  kept = one.generate(split, 7)
  two.generate(split, 3)
  again = two.generate(split, 7)
  assert again.metadata == kept.metadata
  assert (again.frames == kept.frames).all()
  assert one.generate(split, 8).metadata["problem"] != kept.metadata["problem"]


@pytest.mark.parametrize("size", (32, pytest.param(64, marks=SLOW)))
@each_task
def test_no_problem_is_in_two_splits(name, size):
  task = tasks.load(name, size=size)
  found = [{task.generate(s, i).metadata["hash"] for i in range(150)} for s in task.splits()]
  for one, two in itertools.combinations(found, 2):
    assert not one & two


@each_task
def test_even_cases_have_one_right_answer_and_odd_ones_several(name):
  task = tasks.load(name, size=32)
  split = task.splits()[0]
  for index in range(20):
    meta = task.generate(split, index).metadata
    several = task.ambiguous and index % 2 == 1
    assert 2 <= meta["k"] <= 4 if several else meta["k"] == 1
    assert meta["k"] == len(meta["answers"]) == len(set(meta["answers"]))
    assert meta["answer"] in meta["answers"]
    assert task.generate(split, index, ambiguous=False).metadata["k"] == 1
    if task.ambiguous:
      assert task.generate(split, index, ambiguous=True).metadata["k"] > 1
  if not task.ambiguous:
    with pytest.raises(ValueError, match="no ambiguous variant"):
      task.generate(split, 0, ambiguous=True)


@pytest.mark.parametrize("name", [n for n, task in tasks.TASKS.items() if task.ambiguous])
def test_the_answer_shown_is_drawn_evenly(name):
  task = tasks.load(name, size=32)
  metas = [task.generate(task.splits()[0], i, ambiguous=True).metadata for i in range(120)]
  hits = sum(m["answer"] == m["answers"][0] for m in metas)
  expected = sum(1 / m["k"] for m in metas)
  assert abs(hits - expected) < 4 * (expected * 0.6) ** 0.5


@each_task
def test_prompts_come_in_several_wordings(name):
  task = tasks.load(name, size=32)
  case = task.generate(task.splits()[0], 0)
  texts = task.templates(case.metadata["problem"])
  assert len(set(texts)) >= 4
  assert case.prompt in texts
  assert case.metadata["prompt"] == case.prompt
  assert not any("{" in text for text in texts)


@every_task
def test_every_task_keeps_what_authors_promise(name, size):
  tasks.check(tasks.load(name, size=size), cases=4 if size == 32 else 2)


@each_task
def test_garbage_is_read_without_raising(name):
  task = tasks.load(name, size=32)
  case = task.generate(task.splits()[0], 1)
  rng = np.random.default_rng(0)
  shape = case.frames.shape
  garbage = [
    rng.integers(0, 256, shape, dtype=np.uint8),
    draw.paint(rng.integers(0, 9, shape[:3])),
    np.roll(case.frames, 5, axis=1),
    case.frames[:, ::-1],
    *(np.broadcast_to(c, shape).astype(np.uint8) for c in draw.RGB),
  ]
  for frames in garbage:
    answer = task.parse(frames, case.metadata)
    assert answer is None or answer in task.options(case.metadata["problem"])
    score = task.score(frames, case.metadata)
    assert 0 <= score.value <= 0.6
    assert not score.strict
    assert all(np.isfinite(v) for v in task.candidates(frames, case.metadata).values())


@each_task
def test_generation_is_fast_enough_for_training(name):
  task = tasks.load(name, size=32)
  task.generate(task.splits()[0], 0)
  began = time.process_time()
  for index in range(40):
    task.generate(task.splits()[0], index)
  assert time.process_time() - began < 40 * 0.03  # 2000 cases a minute; usual is 20 times that


@each_task
def test_what_does_not_fit_is_refused_in_a_sentence(name):
  task = tasks.load(name, size=32)
  split = task.splits()[0]
  case = task.generate(split, 0)
  for read in (task.parse, task.candidates, task.score):
    with pytest.raises(ValueError, match=r"frames are uint8 \(9, 32, 32, 3\), wanted uint8"):
      read(case.frames[:9], case.metadata)
    with pytest.raises(ValueError, match="frames are float64"):
      read(case.frames / 255, case.metadata)
  with pytest.raises(ValueError, match="load the task as the case was made"):
    tasks.load(name, size=64).score(case.frames, case.metadata)
  with pytest.raises(ValueError, match="has no split 'test'; it has: "):
    task.generate("test", 0)
  with pytest.raises(ValueError, match=r"index=-1, wanted 0 or more"):
    task.generate(split, -1)
  with pytest.raises(ValueError, match="is no answer to this"):
    task.render(case.metadata, "nonsense")
  with pytest.raises(ValueError, match="frames=16, wanted 1 \\+ 4k"):
    tasks.load(name, size=32, frames=16)
  with pytest.raises(ValueError, match="size=8 pixels"):
    tasks.load(name, size=8)


@each_task
def test_longer_clips_keep_the_contract(name):
  task = tasks.load(name, size=32, frames=33)
  for index in (0, 1):
    case = task.generate(task.splits()[0], index)
    assert case.frames.shape[0] == 33
    assert task.score(case.frames, case.metadata).value == 1
    assert task.score(cut(case.frames), case.metadata).value <= 0.55


def test_an_unknown_task_is_refused_with_the_list():
  with pytest.raises(ValueError, match="no task 'chess'; there are: maze"):
    tasks.load("chess")


# --- drawing and reading ---


def test_the_nine_colours_lie_at_least_100_apart():
  assert len(draw.RGB) == 9
  for one, two in itertools.combinations(draw.RGB.astype(float), 2):
    assert np.linalg.norm(one - two) >= 100


def test_labels_undo_painting_and_leave_blends_undecided():
  maps = np.random.default_rng(0).integers(0, 9, (2, 8, 8)).astype(np.int8)
  assert (draw.label(draw.paint(maps)) == maps).all()
  blend = mixed(draw.RGB[draw.RED][None], draw.RGB[draw.WHITE][None])
  assert draw.label(np.broadcast_to(blend, (1, 2, 2, 3))).tolist() == [[[-1, -1], [-1, -1]]]


def test_a_pixel_is_labelled_by_its_nearest_colour_within_reach():
  frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
  squares = ((frames[..., None, :].astype(int) - draw.RGB.astype(int)) ** 2).sum(-1)
  wanted = np.where(squares.min(-1) <= draw.REACH**2, squares.argmin(-1), draw.UNDECIDED)
  assert (wanted == draw.UNDECIDED).any() and len(np.unique(wanted)) == 10
  np.testing.assert_array_equal(draw.label(frames), wanted)


def test_a_cell_is_decided_by_six_tenths_of_its_inner_half():
  box = np.array([0, 0, 10, 10])
  y0, x0, y1, x1 = draw.shrink(box, 0.5)
  assert (y1 - y0) * (x1 - x0) == pytest.approx(50, abs=15)
  cell = draw.cells(10, box[None])
  maps = np.full((1, 10, 10), draw.RED, np.int8)
  maps[:, y0 : y0 + 2] = draw.BLUE  # a third of the inner rows
  assert draw.majority(maps, cell).item() == draw.RED
  maps[:, y0 : y0 + (y1 - y0) // 2] = draw.BLUE
  assert draw.majority(maps, cell).item() == draw.UNDECIDED


@pytest.mark.parametrize("mark", (draw.RED, draw.CYAN, draw.GREY))
def test_soft_occupancy_of_an_even_blend_is_just_above_the_threshold(mark):
  where = draw.cells(8, np.array([[0, 0, 8, 8]]))
  ground = np.array([draw.BLACK])

  def seen(rgb):
    return draw.occupancy(np.broadcast_to(rgb, (1, 8, 8, 3)), where, mark, ground).item()

  assert seen(draw.RGB[mark]) == 1
  assert seen(draw.RGB[draw.BLACK]) == pytest.approx(np.exp(-4.5))
  assert seen(mixed(draw.RGB[mark], draw.RGB[draw.BLACK])) == pytest.approx(0.325, abs=0.02)


def test_cells_too_small_to_read_are_refused():
  with pytest.raises(ValueError, match="9 x 9 cells in 32 pixels are 3 pixels each"):
    draw.lattice(32, 9, 9)
  with pytest.raises(ValueError, match="no colour 'teal'"):
    draw.colour("teal")


def test_a_ring_is_swept_clockwise_from_the_top():
  centre = (8.0, 8.0)
  whole = draw.ring(16, centre, 4, 7)
  quarter = whole & (draw.clockwise(16, centre) < np.pi / 2)
  assert quarter.sum() * 4 == whole.sum()
  assert not quarter[8:].any()
  assert not quarter[:, :8].any()


# --- the single tasks ---


def painted(case: base.Case, frames: slice, box: np.ndarray, colour: int) -> np.ndarray:
  out = case.frames.copy()
  out[frames, box[0] : box[2], box[1] : box[3]] = draw.RGB[colour]
  return out


def maze_case(index: int = 0, size: int = 64) -> tuple[base.Task, base.Case, np.ndarray]:
  task = tasks.load("maze", size=size)
  case = task.generate("train", index)
  side = len(case.metadata["problem"]["rows"])
  return task, case, draw.lattice(size, side, side)


def test_maze_answers_are_all_the_shortest_ways():
  for index in range(12):
    _, case, _ = maze_case(index)
    problem = case.metadata["problem"]
    rows, goal = problem["rows"], tuple(problem["goal"])
    front, ways = {"": tuple(problem["start"])}, []
    while not ways:  # every walk of n moves, n growing
      front = {
        moves + m: (y + dy, x + dx)
        for moves, (y, x) in front.items()
        for m, (dy, dx) in (("U", (-1, 0)), ("R", (0, 1)), ("D", (1, 0)), ("L", (0, -1)))
        if 0 <= y + dy < len(rows) and 0 <= x + dx < len(rows) and rows[y + dy][x + dx] == "."
        if not moves or (moves[-1] + m) not in ("UD", "DU", "LR", "RL")
      }
      ways = [moves for moves, cell in front.items() if cell == goal]
    assert sorted(ways) == case.metadata["answers"]


def test_maze_half_a_trail_earns_half_and_a_painted_wall_nothing():
  task, case, boxes = maze_case()
  part = case.frames.copy()
  part[9:] = part[8]
  score = task.score(part, case.metadata)
  assert 0.3 < score.final < 0.7
  assert 0.3 < score.process < 0.7
  rows = case.metadata["problem"]["rows"]
  wall = next((y, x) for y, x in np.ndindex(len(rows), len(rows)) if rows[y][x] == "#")
  through = painted(case, slice(8, None), boxes[wall], draw.RED)
  assert task.score(through, case.metadata).final == 0


def test_maze_a_leaping_head_is_no_legal_process():
  task, case, _ = maze_case()
  leap = case.frames.copy()
  leap[4:13] = leap[3]
  score = task.score(leap, case.metadata)
  assert score.final == 1
  assert score.process < 0.3


def test_tictactoe_positions_are_legal_and_the_answers_win():
  task = tasks.load("tictactoe", size=32)
  for index in range(30):
    meta = task.generate("train", index).metadata
    grid = np.array(list(meta["problem"]["board"]))
    assert (grid == "o").sum() - (grid == "m").sum() in (0, 1)
    for cell in np.flatnonzero(grid == "."):
      after = grid.copy()
      after[cell] = "m"
      square = (after == "m").reshape(3, 3)
      lines = [*square, *square.T, square.diagonal(), square[::-1].diagonal()]
      assert any(line.all() for line in lines) == (int(cell) in meta["answers"])


def test_tictactoe_wants_the_other_eight_squares_unchanged():
  task = tasks.load("tictactoe", size=64)
  case = task.generate("train", 0)
  boxes = draw.lattice(64, 3, 3)
  board = case.metadata["problem"]["board"]
  other = next(i for i in range(9) if i not in case.metadata["answers"])
  colour = draw.colour(case.metadata["problem"]["mover"])
  colour = draw.GREY if board[other] == "m" else colour
  changed = painted(case, slice(12, None), boxes[other // 3, other % 3], colour)
  assert task.score(changed, case.metadata).final == 0


@pytest.mark.parametrize("size", SIZES)
def test_select_largest_leads_by_a_pixel_and_a_half(size):
  task = tasks.load("select_largest", size=size)
  for index in range(30):
    meta = task.generate("train", index).metadata
    radii = {d["slot"]: d["radius"] * task.slot for d in meta["problem"]["discs"]}
    best = max(radii.values())
    assert sorted(s for s, r in radii.items() if r == best) == meta["answers"]
    assert all(r <= best - 1.49 for s, r in radii.items() if s not in meta["answers"])


@pytest.mark.parametrize("name", ("select_largest", "pick"))
def test_two_rings_are_no_answer(name):
  task = tasks.load(name, size=32)
  case = task.generate("train", 1)
  one, two = task.options(case.metadata["problem"])[:2]
  white = (task.render(case.metadata, one) == draw.RGB[draw.WHITE]).all(axis=-1)
  both = task.render(case.metadata, two)
  both[white] = draw.RGB[draw.WHITE]
  assert task.score(both, case.metadata).final == 0
  assert task.parse(both, case.metadata) is None


@pytest.mark.parametrize("name", ("tictactoe", "select_largest", "pick"))
def test_a_mark_before_the_fourth_frame_is_no_legal_process(name):
  task = tasks.load(name, size=32)
  case = task.generate("train", 0)
  early = np.concatenate([case.frames[:1], case.frames[5:], case.frames[-4:]])
  score = task.score(early, case.metadata)
  assert score.final == 1
  assert score.process == 0


def test_pick_counterpart_exchanges_the_groups_and_nothing_else():
  task = tasks.load("pick", size=32)
  for index in range(8):
    case = task.generate("train", index)
    other = task.counterpart(case)
    assert other.prompt == case.prompt
    assert (other.first_frame != case.first_frame).any()
    colours = [np.sort(draw.label(c.first_frame[None]), axis=None) for c in (case, other)]
    assert (colours[0] == colours[1]).all()
    assert other.metadata["answer"] != case.metadata["answer"]
    assert other.metadata["hash"] == task.problem_hash(other.metadata["problem"])
    assert task.score(other.frames, other.metadata).value == 1
    if other.metadata["k"] == 1:
      assert task.score(other.frames, case.metadata).value <= 0.1
    assert (task.counterpart(other).frames == case.frames).all()
