"""Answers at every step: commitment, flips, first hit, early readout, soft reading."""

import itertools

import numpy as np
import pytest

from jax_videoreason import answers, baselines, records, store, tasks


def column(text):
  """One run: a letter is an answer, "." unreadable; S 1."""
  return np.array([[None if letter == "." else letter] for letter in text], object)


@pytest.mark.parametrize(
  ("text", "first"),
  [("aaaa", 0), ("baaa", 1), ("abab", 3), ("aba.", -1), ("a.aa", 2), ("....", -1), ("a", 0)],
)
def test_commitment_is_the_first_step_from_which_the_final_answer_stays(text, first):
  assert answers.commit(column(text)).tolist() == [first]


@pytest.mark.parametrize(
  ("text", "counts"),
  [
    ("bbrr", (1, 1, 0)),
    ("rbrb", (3, 1, 2)),
    ("b.b.", (0, 0, 0)),
    ("b.r.", (1, 1, 0)),
    ("bcbc", (3, 0, 0)),
    ("....", (0, 0, 0)),
  ],
)
def test_flips_are_counted_between_rows_that_can_be_read(text, counts):
  """ "r" is right, everything else wrong."""
  answer = column(text)
  assert tuple(answers.changes(answer, answer == "r")[:, 0]) == counts


def test_soft_reading():
  visible, entropy, mass = answers.weigh({"a": 0.5, "b": 0.5, "c": 0.0}, ["a"])
  assert (visible, entropy, mass) == (2, 1.0, 0.5)
  assert answers.weigh({"a": 1.0, "b": 0.0}, ["a"])[:3] == (1, 0.0, 1.0)
  visible, entropy, mass = answers.weigh({"a": 0.05, "b": 0.0}, ["a"])
  assert visible == 0 and np.isnan(entropy) and np.isnan(mass)


@pytest.mark.parametrize(
  ("blend", "visible"),
  [
    ((0.5, 0.5), 2),
    ((0.6, 0.4), 2),
    ((0.75, 0.25), 2),
    ((0.9, 0.1), 1),
    ((1 / 3, 1 / 3, 1 / 3), 3),
    ((0.15,) * 6, 0),
    ((0.0,) * 40, 0),
  ],
)
def test_a_candidate_is_visible_from_a_fifth_of_a_blend(blend, visible):
  shares = np.array([*blend, 0.0])
  occupancy = dict(enumerate(np.exp(-4.5 * (1 - shares) ** 2)))
  seen, entropy, mass = answers.weigh(occupancy, [0])
  assert seen == visible
  assert answers.second(occupancy) == pytest.approx(blend[1])
  if not visible:
    assert np.isnan(entropy) and np.isnan(mass)
    return
  drawn = shares[shares > 0]
  assert entropy == pytest.approx(-(drawn * np.log2(drawn)).sum())
  assert mass == pytest.approx(blend[0])


def test_where_one_answer_is_possible_none_is_second():
  assert answers.second({"a": 1.0}) == 0


@pytest.fixture(scope="module")
def maze():
  """The first plain case that is no single corridor: one that can be answered wrongly."""
  task = tasks.load("maze", size=32, frames=17)
  plain = (task.generate("id", index) for index in itertools.count(0, 2))
  return task, next(case for case in plain if task.wrong_answers(case.metadata))


@pytest.fixture(scope="module")
def read(maze):
  """Run 0: noise, wrong, truth, truth. Run 1: truth, wrong, wrong, wrong. Run 2: no task."""
  task, case = maze
  wrong = task.render(case.metadata, task.wrong_answers(case.metadata)[0])
  noise = np.random.default_rng(0).integers(0, 256, case.frames.shape, np.uint8)
  runs = [
    (noise, wrong, case.frames, case.frames),
    (case.frames, wrong, wrong, wrong),
    (noise,) * 4,
  ]
  frames = np.stack([np.stack(step) for step in zip(*runs, strict=True)])
  sigma = np.array([1.0, 0.8, 0.5, 0.2])
  return answers.read_steps(
    [task, task, None], [case.metadata, case.metadata, None], frames, sigma, steps=[0, 3, 6, 9]
  )


def test_read_steps(maze, read):
  task, case = maze
  right, wrong = case.metadata["answer"], task.wrong_answers(case.metadata)[0]
  assert read.answer[:, 0].tolist() == [None, wrong, right, right]
  assert read.answer[:, 1].tolist() == [right, wrong, wrong, wrong]
  assert read.commitment.tolist() == [2, 1, -1]
  np.testing.assert_array_equal(read.commitment_sigma, [0.5, 0.8, np.nan])
  assert read.first_hit.tolist() == [2, 0, -1]
  assert read.flips.tolist() == [1, 1, 0]
  assert read.to_right.tolist() == [1, 0, 0]
  assert read.to_wrong.tolist() == [0, 1, 0]
  assert read.score[2, 0] == 1.0 and read.score[3, 1] < 0.7
  assert read.mass[2, 0] > 0.9 and read.mass[3, 1] < 0.2
  assert read.task == ("maze", "maze", None)


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_a_clip_is_read_as_an_evaluation_marks_it(name):
  task = tasks.load(name, size=32)
  case = task.generate("heldout" if task.held_out else "id", 0)
  wrong = [task.render(case.metadata, a) for a in task.wrong_answers(case.metadata)[:1]]
  clips = [case.frames, baselines.still(case.first_frame, task.frames), *wrong]
  read = answers.read_steps(task, [case.metadata], np.stack(clips)[:, None], np.ones(len(clips)))
  for row, frames in enumerate(clips):
    mark = baselines.mark(task, frames, case.metadata)
    found = read.score[row, 0], read.strict[row, 0], read.right[row, 0], read.answer[row, 0]
    assert found == (mark.score, mark.strict, mark.right, mark.answer)
    assert read.answer[row, 0] == task.parse(frames, case.metadata)
    assert read.score[row, 0] == task.score(frames, case.metadata).value
  assert read.strict[:2, 0].tolist() == [1.0, 0.0]


def test_early_readout_leaves_out_runs_without_a_task(read):
  np.testing.assert_array_equal(read.early, [0.5, 0.0, 0.5, 0.5])


def test_any_right_answer_of_an_ambiguous_case_is_right():
  task = tasks.load("maze", size=32, frames=17)
  case = task.generate("id", 1)
  assert case.metadata["k"] >= 2
  frames = np.stack([task.render(case.metadata, a) for a in case.metadata["answers"][:2]])[:, None]
  got = answers.read_steps(task, [case.metadata], frames, np.array([1.0, 0.5]))
  assert got.right.all()
  assert got.flips.tolist() == [1] and got.to_wrong.tolist() == [0]
  assert got.commitment.tolist() == [1]


def test_answers_survive_the_disk(read, tmp_path):
  store.write_answers(tmp_path, read)
  back = store.read_answers(tmp_path / "answers.json")
  assert back.task == read.task
  floats = ("score", "strict", "commitment_sigma", "mass", "second")
  for name in ("answer", "right", "commitment", "steps", *floats):
    np.testing.assert_array_equal(getattr(back, name), getattr(read, name))
  assert back.right.dtype == bool
  record = records.read_json(tmp_path / "answers.json")
  del record["second"], record["strict"]
  records.write_json(tmp_path / "answers.json", record)
  back = store.read_answers(tmp_path / "answers.json")
  assert np.isnan(back.second).all() and np.isnan(back.strict).all()


def test_counts_that_do_not_match_are_refused(maze):
  task, case = maze
  with pytest.raises(ValueError, match="metadata has 2 entries, wanted 1"):
    answers.read_steps(task, [case.metadata] * 2, case.frames[None, None], np.ones(1))
