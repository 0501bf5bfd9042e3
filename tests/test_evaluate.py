"""`videoreason evaluate`: what it measures, what it leaves, how it goes on after a stop."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jax_videoreason import (
  baselines,
  cli,
  comparing,
  evaluate,
  evaluation,
  folders,
  records,
  scorecard,
  scoring,
  settings,
  sharding,
  stats,
  tables,
  tasks,
)
from jax_videoreason.cli.evaluate import notes
from jax_videoreason.experiments import Result, experiment, perform, setting

TASKS = ("pick", "occlusion")
WORDS = ("--tasks=pick,occlusion", "--cases=2", "--seeds=2", "--config.steps=2")


def call(out, *words) -> int:
  return cli.main(["evaluate", *WORDS, f"--out={out}", *words])


def result_of(folder: Path) -> dict:
  return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def few_training_clips():
  """The nearest is looked for among 50, as drawing the usual number takes long."""
  usual = baselines.bank
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(baselines, "bank", lambda task, count=50: usual(task, count))
    yield


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
  """A finished evaluation of the model that ships, 2 tasks, 2 cases, 2 seeds, 2 steps."""
  out = tmp_path_factory.mktemp("scores") / "mini"
  assert call(out) == 0
  return out


@pytest.fixture
def copy(done, tmp_path) -> Path:
  return Path(shutil.copytree(done, tmp_path / "copy"))


@pytest.fixture
def measured(monkeypatch) -> list[str]:
  """The names of the tasks that are really run."""
  names, real = [], evaluate.measure

  def measure(folder, bundle, chosen, task, *rest):
    names.append(task.name)
    real(folder, bundle, chosen, task, *rest)

  monkeypatch.setattr(evaluate, "measure", measure)
  return names


# What it leaves


def test_a_second_evaluation_in_a_folder_is_refused_meanwhile(tmp_path, measured, capsys):
  with folders.held(tmp_path / "scores"):
    assert call(tmp_path / "scores") == cli.BAD_INPUT
  assert "another command works in" in capsys.readouterr().err
  assert not measured and not list((tmp_path / "scores").iterdir())


def test_every_task_stands_beside_the_clips_that_no_model_made(done):
  result = result_of(done)
  assert list(result["tasks"]) == list(TASKS)
  for block in [*result["tasks"].values(), result["mean"]]:
    scores = {name: found["score"]["estimate"] for name, found in block["systems"].items()}
    assert set(scores) == set(scoring.SYSTEMS)
    assert scores["truth"] == 1
    assert scores["truth through the VAE"] > 0.9
    assert scores["static"] <= 0.1
    assert scores["cut"] <= 0.55
    assert scores["nearest"] <= 0.55
    assert 0 <= scores["model"] <= 1
  mean = np.mean([b["systems"]["model"]["score"]["estimate"] for b in result["tasks"].values()])
  assert result["mean"]["systems"]["model"]["score"]["estimate"] == pytest.approx(mean)


def test_two_cases_get_a_statement_instead_of_an_interval(done):
  found = result_of(done)["tasks"]["pick"]["systems"]["model"]["score"]
  assert (found["low"], found["high"]) == (None, None)
  assert found["note"] == "2 cases: an interval needs at least 8"


def test_the_table_has_a_row_per_clip(done):
  rows = tables.read(done / "table.parquet")
  clips = {"model": 2 * 2} | {name: 2 for name in scoring.SYSTEMS if name != "model"}
  for task in TASKS:
    for system, count in clips.items():
      own = [row for row in rows if (row["task"], row["system"]) == (task, system)]
      assert len(own) == count
      assert all(0 <= row["score"] <= 1 for row in own)
  assert len(rows) == len(TASKS) * sum(clips.values())


def test_every_video_of_the_model_is_kept(done):
  rows = [r for r in tables.read(done / "table.parquet") if r["system"] == "model"]
  for row in rows:
    assert (done / "tasks" / row["task"] / f"video_{row['case']}_{row['seed']}.mp4").is_file()
  assert len({row["seed"] for row in rows if row["task"] == "pick"}) == 4  # no noise twice


def test_entropy_is_set_beside_even_draws_of_as_many_right_answers():
  answers = {0: "aabb", 1: ["a", "b", None, "z"], 2: ["a", "y", "z", None]}
  rows = [
    {"case": case, "problem": f"p{case}", "answer": answer, "right": answer in ("a", "b"), "k": 2}
    for case, said in answers.items()
    for answer in said
  ]
  found = scoring.ambiguity(rows, None)
  assert (found["cases"], found["compared"], found["seeds"], found["log_k"]) == (3, 2, 4, 1.0)
  assert found["entropy"]["estimate"] == 1.0
  even = [scoring.even_entropy(2, 4), 0.5]  # two even draws of two agree half of the time
  assert found["even"] == pytest.approx(np.mean(even))
  assert "entropy" not in scoring.ambiguity(rows[8:], None)


def test_ambiguous_cases_say_whether_seeds_differ_and_how_candidates_fall(done):
  blocks = result_of(done)["tasks"]
  assert blocks["occlusion"]["ambiguity"] is None
  found = blocks["pick"]["ambiguity"]
  assert (found["cases"], found["seeds"], found["k"]) == (1, 2, 2.0)
  assert found["steps"]["step"] == [0, 1]
  assert len(found["steps"]["candidates"]) == 2
  for candidates in found["steps"]["candidates"]:
    assert candidates is None or 1 <= candidates["estimate"] <= 2
  assert found["steps"]["truth"]["estimate"] == pytest.approx(1.06, abs=0.1)


def test_the_terminal_shows_the_tables(done, capsys):
  assert call(done) == 0  # finished: it is only read
  said = capsys.readouterr().out
  for word in (
    "strict",
    "right answers",
    "static",
    "cut",
    "truth",
    "pick",
    "mean",
    "candidates that x0 shows at sigma",
    "draw at 1.00",
    "report: file:",
  ):
    assert word in said
  assert "2 cases: an interval needs at least 8" in " ".join(said.split())


# Stop and go on


def test_a_finished_evaluation_is_only_read(copy, measured):
  before = (copy / "result.json").stat().st_mtime_ns
  assert call(copy) == 0
  assert measured == []
  assert (copy / "result.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_finished_tasks_are_not_done_again_and_the_numbers_are_the_same(done, copy, measured):
  for name in ("manifest.json", "result.json", "table.parquet", "report.html"):
    (copy / name).unlink()
  shutil.rmtree(copy / "tasks" / "pick")
  (copy / "tasks" / ".part-pick").mkdir()  # what a kill leaves of a task
  (copy / "tasks" / ".part-pick" / "video_0_0.mp4").touch()
  assert call(copy) == 0
  assert measured == ["pick"]
  assert result_of(copy) == result_of(done)
  assert sorted(p.name for p in (copy / "tasks").iterdir()) == sorted(TASKS)


def test_a_damaged_task_of_an_unfinished_evaluation_is_done_again(done, copy, measured, capsys):
  for name in ("manifest.json", "result.json", "table.parquet"):
    (copy / name).unlink()
  path = copy / "tasks" / "pick" / "task.json"
  text = path.read_text()
  assert evaluate.is_done(path)
  for content in (text[:99], "", "null", "{}", "[]", text.replace('"score": ', '"score": 1', 1)):
    path.write_text(content)
    with pytest.warns(UserWarning, match="task.json was damaged: the task is done again"):
      assert not evaluate.is_done(path)
  assert call(copy) == 0
  assert measured == ["pick"]
  assert f"{path} was damaged" in capsys.readouterr().err
  assert result_of(copy) == result_of(done)
  without = {key: value for key, value in json.loads(text).items() if key != records.SUM}
  path.write_text(json.dumps(without))  # as an earlier version wrote it
  assert evaluate.is_done(path)


def test_an_interrupted_task_leaves_nothing_and_what_was_finished_stays(copy, monkeypatch):
  for name in ("manifest.json", "result.json", "table.parquet"):
    (copy / name).unlink()
  shutil.rmtree(copy / "tasks" / "pick")

  def stop(folder, *_):
    folder.mkdir(parents=True)
    (folder / "task.json").touch()
    raise KeyboardInterrupt

  monkeypatch.setattr(evaluate, "measure", stop)
  assert call(copy) == cli.INTERRUPTED
  assert [p.name for p in (copy / "tasks").iterdir()] == ["occlusion"]
  assert not (copy / "result.json").exists()


@pytest.mark.slow
def test_redo_does_everything_again_and_leaves_other_files_alone(copy, measured):
  (copy / "mine.txt").write_text("keep")
  assert call(copy, "--redo", "--tasks=occlusion") == 0
  assert measured == ["occlusion"]
  assert list(result_of(copy)["tasks"]) == ["occlusion"]
  assert (copy / "mine.txt").read_text() == "keep"


# Bad input


@pytest.mark.parametrize(
  ("words", "told"),
  [
    (["--cases=4", "--config.steps=3"], r"cases=2 there and 4 here; steps=2 there and 3 here"),
    (["--tasks=chess"], "no task 'chess'"),
    (["--tasks=maze", "--split=heldout"], "maze has no split 'heldout'"),
    (["--tasks=bounce", "--split=id"], "bounce has no split 'id'"),
    (["--split=train"], "--split=train, wanted one of id, ood, heldout"),
    (["--ambiguous=maybe"], "--ambiguous=maybe, wanted one of both, plain, ambiguous"),
    (["--ambiguous=ambiguous"], "occlusion has no ambiguous cases"),
    (["--cases=1"], "--cases=1, wanted 2 or more"),
    (["--seeds=0"], "seeds"),
    (["--checkpoint=nowhere"], "no bundle 'nowhere'"),
    (["--config.height=64"], "tasks are square"),
    (["extra"], "unexpected word 'extra'"),
  ],
)
def test_bad_input_is_refused_in_one_sentence(done, capsys, words, told):
  assert call(done, *words) == 2
  err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("videoreason: ")]
  assert len(err) == 1
  assert re.search(told, err[0])


def test_a_folder_of_something_else_is_not_touched(tmp_path, capsys):
  (tmp_path / "mine.txt").write_text("keep")
  assert call(tmp_path) == 2
  assert "is not empty (it has mine.txt)" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
  assert call(tmp_path / "mine.txt") == 2
  assert "is a file, wanted a folder" in capsys.readouterr().err
  assert cli.main(["evaluate"]) == 2
  assert "--out must be given" in capsys.readouterr().err


def test_scores_of_two_ways_of_scoring_are_not_put_together(done, tmp_path, capsys):
  copy = Path(shutil.copytree(done, tmp_path / "copy"))
  asked = json.loads((copy / "evaluation.json").read_text())
  (copy / "evaluation.json").write_text(json.dumps({**asked, "scoring": 0}))
  assert call(copy) == 2
  assert f"scoring=0 there and {tasks.SCORING} here" in capsys.readouterr().err


def test_more_cases_than_a_split_has_are_refused(monkeypatch):
  monkeypatch.setattr(evaluate, "TRIES", 1)
  with pytest.raises(ValueError, match=r"tictactoe has \d+ different cases among the first 100"):
    evaluate.cases_of(tasks.load("tictactoe", size=32), "id", 100, "ambiguous")


# Cases


def test_all_means_every_task_with_the_split_and_the_kind():
  assert evaluate.plan("all", "heldout", 8, "both").tasks == ("tree_reach", "bounce")
  assert "occlusion" not in evaluate.plan("all", "id", 8, "ambiguous").tasks
  assert len(evaluate.plan("all", "ood", 8, "plain").tasks) == 7


@pytest.mark.parametrize("name", ["pick", "rotate", "occlusion"])
@pytest.mark.parametrize("split", ["id", "ood"])
def test_no_case_is_asked_twice_and_none_was_trained_on(name, split):
  task = tasks.load(name, size=32)
  cases = evaluate.cases_of(task, split, 24, "both")
  assert len({(case.first_frame.tobytes(), case.prompt) for case in cases}) == 24
  trained = {task.generate("train", i).metadata["hash"] for i in range(400)}
  assert not trained & {case.metadata["hash"] for case in cases}
  several = [case.metadata["k"] > 1 for case in cases]
  assert several == ([False, True] * 12 if task.ambiguous else [False] * 24)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=[] if n == "pick" else pytest.mark.slow)
    for n, task in tasks.TASKS.items()
    if not task.held_out
  ],
)
def test_no_picture_comes_with_the_same_prompt_in_training_and_in_a_test(name):
  task = tasks.load(name, size=32)
  asked = [
    {(c.first_frame.tobytes(), c.prompt) for c in (task.generate(split, i) for i in range(count))}
    for split, count in (("train", 900), ("id", 90))
  ]
  assert not asked[0] & asked[1]


@pytest.mark.parametrize("name", [n for n, task in tasks.TASKS.items() if not task.held_out])
def test_the_hash_alone_decides_between_training_and_tests(name):
  task = tasks.load(name, size=32)
  for split, wanted in (("train", {2, 3, 4, 5, 6, 7}), ("id", {0}), ("ood", {1})):
    hashes = [task.generate(split, i).metadata["hash"] for i in range(40)]
    assert {int(one, 16) % 8 for one in hashes} <= wanted


def test_a_case_that_was_trained_on_stops_the_evaluation(monkeypatch):
  task = tasks.load("pick", size=32)
  case = task.generate("id", 3)
  bank = baselines.Bank(
    clips=[(task, 3)], hashes=[case.metadata["hash"]], first_frames=case.first_frame[None]
  )
  monkeypatch.setattr(baselines, "bank", lambda task: bank)
  with pytest.raises(ValueError, match=r"pick: the cases \[3\] are training cases too"):
    evaluate.beside_models(None, task, [case], lambda latents: latents)  # type: ignore[arg-type]


def test_a_case_that_was_trained_on_is_refused_before_anything_is_denoised(
  tmp_path, monkeypatch, capsys
):
  task = tasks.load("pick", size=32)
  hashes = [case.metadata["hash"] for case in evaluate.cases_of(task, "id", 2, "both")]
  bank = baselines.Bank(clips=[], hashes=hashes, first_frames=np.empty((0, 32, 32, 3), np.uint8))
  monkeypatch.setattr(baselines, "bank", lambda task: bank)
  monkeypatch.setattr(evaluate.runs, "run", None)
  assert call(tmp_path / "scores", "--tasks=pick") == cli.BAD_INPUT
  assert "are training cases too" in capsys.readouterr().err


def test_shuffled_prompts_are_the_same_prompts_and_differ_where_they_can():
  cases = evaluate.cases_of(tasks.load("pick", size=32), "id", 9, "both")
  own, other = [case.prompt for case in cases], evaluate.shuffled(cases)
  assert sorted(own) == sorted(other)
  assert sum(a != b for a, b in zip(own, other, strict=True)) >= 7


# Clips that no model made


def test_a_cut_is_worth_the_mean_over_all_answers():
  task = tasks.load("maze", size=32)
  case = task.generate("id", 0)
  options = task.options(case.metadata["problem"])
  found = baselines.marks(task, case, baselines.bank(task, 20))
  assert found["cut"].right == pytest.approx(1 / len(options))
  assert found["truth"].score == found["truth"].strict == 1
  assert found["static"].score <= 0.1


def test_the_nearest_training_clip_is_the_one_of_the_same_picture():
  task = tasks.load("pick", size=32)
  bank = baselines.bank(task, 30)
  again = task.generate("train", 17)
  assert bank.nearest(again.first_frame).frames.tobytes() == again.frames.tobytes()


@pytest.mark.parametrize("name", [n for n, task in tasks.TASKS.items() if not task.held_out])
def test_a_bank_has_the_first_frames_of_clips_of_any_length(name):
  task = tasks.load(name, size=32, frames=81)
  bank = baselines.bank(task, 4)
  for row in range(4):
    case = task.generate("train", row)
    np.testing.assert_array_equal(bank.first_frames[row], case.first_frame)
    assert bank.hashes[row] == case.metadata["hash"]
    found = bank.nearest(case.first_frame)
    np.testing.assert_array_equal(found.frames[0], case.first_frame)
    assert len(found.frames) == 81


def test_a_bank_holds_no_videos():
  task = tasks.load("pick", size=64, frames=81)
  case = task.generate("train", 0)  # and what a task remembers
  tracemalloc.start()
  try:
    bank = baselines.bank(task, 20)
    held, most = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert bank.first_frames.nbytes < held < 2 * case.frames.nbytes
  assert most < 6 * case.frames.nbytes


def test_the_bank_of_a_held_out_task_is_that_of_all_others():
  found = baselines.bank(tasks.load("bounce", size=32), 14)
  assert {task.name for task, _ in found.clips} == {
    name for name, task in tasks.TASKS.items() if not task.held_out
  }


# Numbers


def rows_of(scores, system="model", k=1, answers=None, right=None) -> list[dict]:
  """Rows of one system, scores N K."""
  return [
    {
      "system": system,
      "case": case,
      "seed": seed,
      "problem": f"p{case}",
      "k": k,
      "score": float(score),
      "strict": float(score == 1),
      "right": float(score > 0.5) if right is None else right[case][seed],
      "answer": "a" if answers is None else answers[case][seed],
      "broken": False,
    }
    for case, of_case in enumerate(scores)
    for seed, score in enumerate(of_case)
  ]


def test_seeds_of_a_case_are_averaged_before_cases_are_resampled():
  rng = np.random.default_rng(0)
  cases = rng.random((12, 1))
  once = scoring.measures(rows_of(cases), "model")["score"]
  often = scoring.measures(rows_of(np.repeat(cases, 50, axis=1)), "model")["score"]
  assert often == pytest.approx(once)
  assert often["problems"] == 12


def test_cases_of_one_problem_are_no_independent_cases():
  rng = np.random.default_rng(0)
  scores, truth = rng.random((12, 1)), np.ones((12, 1))
  once = [*rows_of(scores), *rows_of(truth, "static")]
  twins = [{**row, "case": row["case"] + 12} for row in once]
  alone, twice = (scoring.summary(rows, None) for rows in (once, once + twins))
  assert (twice["cases"], twice["problems"]) == (24, 12)
  for part in ("systems", "differences"):
    assert twice[part] == alone[part]
  assert scoring.over_tasks({"a": once, "b": once}) == scoring.over_tasks(
    {"a": once, "b": once + twins}
  )


def test_cases_of_one_problem_count_once_where_several_answers_are_right():
  answers = {0: "aabb", 1: ["a", "a", None, "z"], 2: ["a", "y", "b", "b"]}
  rows = [
    {"case": case, "problem": f"p{case}", "answer": answer, "right": answer in ("a", "b"),
     "k": 2 + case}
    for case, said in answers.items()
    for answer in said
  ]  # fmt: skip
  twins = [{**row, "case": row["case"] + 3} for row in rows if row["case"] == 1]
  once, twice = (scoring.ambiguity(given, None) for given in (rows, rows + twins))
  assert (once.pop("cases"), twice.pop("cases")) == (3, 4)
  assert (once.pop("compared"), twice.pop("compared")) == (3, 4)
  assert once == twice

  def along(*cases):
    bits = {0: [1.0, None], 1: [0.0, 1.0], 2: [1.0, 1.0]}
    watched = {
      "case": [case for case in cases for _ in range(2)],
      "k": [2] * 2 * len(cases),
      "step": [0],
      "sigma": [1.0],
      "entropy": [[bit for case in cases for bit in bits[case % 3]]],
      "visible": [[case % 3 for case in cases for _ in range(2)]],
      "mass": [[0.5 * (case % 3) for case in cases for _ in range(2)]],
      "truth": [float(case % 3) for case in cases for _ in range(2)],
    }
    return scoring.along_steps(watched, {case: f"p{case % 3}" for case in cases})

  alone, again = along(0, 1, 2), along(0, 1, 2, 4)
  assert (alone["by_k"]["2"].pop("cases"), again["by_k"]["2"].pop("cases")) == (3, 4)
  assert alone == again


def test_the_lead_over_a_system_is_judged_by_the_leads():
  rng = np.random.default_rng(0)
  good, bad = 0.5 + 0.1 * rng.random((12, 1)), 0.1 * rng.random((12, 1))

  def lead(model, other):
    rows = [*rows_of(model), *rows_of(other, "static")]
    return scoring.over_tasks({"a": rows, "b": rows})["differences"]["static"]

  assert lead(good, bad)["p"] < 0.001
  assert lead(good, bad)["estimate"] == pytest.approx((good - bad).mean())
  assert lead(good, good[::-1])["p"] > 0.5


def test_what_has_no_interval_is_said_once_with_the_tasks_it_is_about():
  rows = [*rows_of(np.linspace(0, 1, 6)[:, None]), *rows_of(np.ones((6, 1)), "static")]
  twins = [{**row, "case": row["case"] + 6} for row in rows]
  tables = {"maze": rows, "pick": rows + twins}
  blocks = {name: scoring.summary(given, None) for name, given in tables.items()}
  result = {"tasks": blocks, "mean": scoring.over_tasks(tables)}
  assert notes(result) == [
    "no interval for maze, pick: 6 cases: an interval needs at least 8.",
    "pick: its 12 cases are 6 different problems, over which intervals are taken.",
  ]
  result["tasks"] = {"maze": blocks["maze"]}
  assert notes(result) == ["no interval for maze: 6 cases: an interval needs at least 8."]


def test_a_measure_that_alone_has_no_interval_is_named():
  rng = np.random.default_rng(0)
  there = rows_of(rng.random((8, 1)) / 2)
  here = rows_of(rng.random((8, 1)) / 2)
  block = scoring.summary(here, None)["systems"]["model"]
  assert scoring.without({"rotate": {m: block[m] for m in scoring.COMPARED}}) == []  # exact shares
  found = {
    **dict.fromkeys(("pairs", "clips", "clips_there"), 8),
    **{"folder": "a", "changed": [], "unpaired": []},
    **scoring.against({"rotate": list(zip(here, there, strict=True))}),
  }
  assert comparing.notes(found)[1:] == [
    "no interval of the difference of strict success for rotate: all 8 cases are equal: resampling "
    "shows no spread."
  ]


def test_every_task_weighs_as_much_in_the_mean_however_many_problems_it_has():
  rng = np.random.default_rng(0)
  many, few = rng.random((32, 1)), rng.random((16, 1)) / 2
  rows = {"a": rows_of(many), "b": rows_of(few)}
  found = scoring.over_tasks(rows)["systems"]["model"]["score"]
  assert found["estimate"] == pytest.approx((many.mean() + few.mean()) / 2)
  spread = np.sqrt(many.var(ddof=1) / 32 + few.var(ddof=1) / 16) / 2
  assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_the_lead_over_a_clip_is_paired_by_case():
  rng = np.random.default_rng(0)
  hard = rng.random((16, 1)) / 2
  rows = rows_of(hard + 0.3) + rows_of(hard, "static")
  lead = scoring.summary(rows, None)["differences"]["static"]
  assert lead["estimate"] == pytest.approx(0.3)
  assert lead["p"] < 1e-3


def test_the_entropy_of_answers_is_in_bits():
  assert scoring.entropy(["a", "b", "a", "b"]) == 1
  assert scoring.entropy(["a", "a"]) == 0


@pytest.mark.parametrize(("k", "seeds"), [(2, 2), (3, 4), (4, 3)])
def test_the_entropy_of_even_draws_is_that_of_all_draws(k, seeds):
  every = [scoring.entropy(draw) for draw in itertools.product(range(k), repeat=seeds)]
  assert scoring.even_entropy(k, seeds) == pytest.approx(np.mean(every))


def test_blends_and_wrong_answers_are_told_apart_and_neither_is_diversity():
  answers = [["a", "a", None, "x", "y"]] * 8
  right = [[1.0, 1.0, 0.0, 0.0, 0.0]] * 8
  found = scoring.summary(rows_of(np.ones((8, 5)), k=2, answers=answers, right=right), None)
  several = found["ambiguity"]
  shares = {name: several[name]["estimate"] for name in ("right", "wrong", "unreadable")}
  assert shares == pytest.approx({"right": 0.4, "wrong": 0.4, "unreadable": 0.2})
  assert several["entropy"]["estimate"] == 0.0
  assert several["even"] == scoring.even_entropy(2, 2) == 0.5


def test_a_report_takes_the_numbers_of_an_evaluation_again_from_its_rows(copy):
  result, manifest = (json.loads((copy / n).read_text()) for n in ("result.json", "manifest.json"))
  del result["tasks"]["pick"]["ambiguity"]["right"]  # as an earlier version left it
  with records.rewriting(copy, "result.json"):
    records.write_json(copy / "result.json", result)
  assert cli.main(["report", str(copy)]) == 0
  found = result_of(copy)["tasks"]["pick"]["ambiguity"]
  assert sum(found[name]["estimate"] for name in ("right", "wrong", "unreadable")) == 1
  again = json.loads((copy / "manifest.json").read_text())
  assert again == manifest


def test_over_a_mesh_every_video_is_decoded_in_the_settings_tiles_and_scored_the_same(
  done, tmp_path, monkeypatch
):
  asked, real = [], evaluate.decode

  def show(bundle, latents, *, tiles, mesh):
    asked.append((tiles, dict(mesh.shape)))
    return real(bundle, latents, mesh=mesh)  # whole, as those of `done`

  monkeypatch.setattr(evaluate, "decode", show)
  out = tmp_path / "mesh"
  assert call(out, "--mesh", "seed=2,context=2", "--config.tiles=diffsynth") == 0
  layout = {"seed": 2, "fsdp": 1, "context": 2}
  assert asked and all(one == ("diffsynth", layout) for one in asked)
  assert json.loads((out / "manifest.json").read_text())["mesh"] == layout
  ours, wanted = (evaluation.read_parts(folder, TASKS) for folder in (out, done))
  for name in TASKS:
    assert ours[name]["rows"] == wanted[name]["rows"]
  entropies = (np.asarray(part["pick"]["watched"]["entropy"]) for part in (ours, wanted))
  np.testing.assert_allclose(*entropies, atol=1e-3)


def test_runs_that_fill_batches_up_are_counted(done):
  chosen = settings.from_config(cli.load_config("mini:steps=5,seeds=2").to_dict())
  asked = evaluate.Plan(tasks=("maze", "pick"), cases=3)  # 9 runs of each
  for batch, mesh, made in ((None, None, 9), (4, None, 12), (4, sharding.make_mesh(seed=3), 18)):
    some = dataclasses.replace(chosen, batch=batch)
    assert evaluate.evaluations(some, asked, mesh) == 2 * made * 5 * 2
  assert json.loads((done / "manifest.json").read_text())["evaluations"] == 2 * 6 * 2 * 2


def test_groups_are_held_at_once_and_leave_no_device_idle():
  task = tasks.load("pick", size=512, frames=61)
  assert [len(group) for group in evaluate.groups(9, task)] == [1] * 9
  wide = sharding.make_mesh(seed=2, context=2)
  assert [len(group) for group in evaluate.groups(9, task, wide)] == [4, 4, 1]


def test_rows_of_an_earlier_version_are_told_from_ours(copy, capsys):
  path = copy / "tasks" / "pick" / "task.json"
  part = json.loads(path.read_text())
  del part["watched"]["truth"]
  path.write_text(json.dumps(part))
  manifest = json.loads((copy / "manifest.json").read_text())
  manifest["files"]["tasks"] = records.checksum(copy / "tasks")
  (copy / "manifest.json").write_text(json.dumps(manifest))
  assert cli.main(["report", str(copy)]) == 2
  said = capsys.readouterr().err
  assert (
    "was written by an earlier version and lacks 'truth': `videoreason evaluate --redo`" in said
  )


def test_candidates_fall_from_k_to_one():
  watched = {
    "case": [0, 0, 1, 1],
    "k": [2, 2, 2, 2],
    "step": [0, 1],
    "sigma": [1.0, 0.5],
    "entropy": [[1.0, None, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]],
    "visible": [[2, 0, 2, 2], [1, 1, 1, 1]],
    "mass": [[1.0, None, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]],
    "truth": [0.0, 0.0, 1.0, 1.0],
  }
  found = scoring.along_steps(watched, {0: "p0", 1: "p1"})
  assert [one["estimate"] for one in found["candidates"]] == [2.0, 1.0]
  assert found["drawn"] == [0.75, 1.0]
  assert found["truth"]["estimate"] == 1.5
  assert found["by_k"]["2"]["cases"] == 2


def test_the_best_and_worst_are_of_different_cases():
  rows = rows_of(np.array([[0.5], [0.1], [0.9], [0.9], [0.2], [0.3]]))
  summary = scoring.summary(rows, None)
  assert [one["case"] for one in summary["worst"]] == [1, 4, 5]
  assert [one["case"] for one in summary["best"]] == [3, 2, 0]


# The page


def test_the_page_stands_alone_and_shows_the_best_and_the_worst(done):
  text = (done / "report.html").read_text()
  assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
  assert not re.findall(r"url\((?!data:)", text)
  assert text.count('class="clip"') == len(TASKS) * 2
  seeds = re.findall(r"<dt>case</dt><dd>id \d+, seed (\d+), kept", text)
  assert set(map(int, seeds)) <= {row["seed"] for row in tables.read(done / "table.parquet")}
  assert len(seeds) == len(TASKS) * 2
  assert "Where several answers are right" in text
  assert "of shares of a task exact (Clopper and Pearson), or the bootstrap's where it is" in text
  assert "of scores, of means over tasks and of differences a bootstrap" in text


def test_the_films_of_the_page_jump_from_frame_to_frame_and_stop_at_the_last(done):
  text = (done / "report.html").read_text()
  keyframes = re.search(r"@keyframes film \{(.*?)\n\}", text, re.DOTALL)
  assert keyframes and "var(" not in keyframes[1]  # there Chromium takes steps(var()) for `ease`
  assert re.search(r"\n\.film \{[^}]*timing-function: steps\(var\(--columns\), jump-none\)", text)
  films = re.findall(r'class="tile film [^"]*" style="([^"]*)"', text)
  assert len(films) == len(TASKS) * 2 * 2
  assert not [style for style in films if "--column:" in style]  # it would beat that of .still


def test_the_candidates_are_drawn_where_a_run_shows_any():
  def some(estimate):
    return {"estimate": estimate, "low": estimate - 0.5, "high": estimate + 0.5}

  steps = {
    "step": [0, 2, 4, 6, 8],
    "sigma": [1.0, 0.9, 0.7, 0.4, 0.1],
    "candidates": [None, some(1.5), some(1.4), None, some(1.0)],
    "truth": some(1.0),
    "drawn": [0.0],
  }
  found = scorecard.curve({"k": 2.0, "steps": steps})
  assert found is not None
  assert [len(line.split()) for line in found["lines"]] == [2, 1]  # nothing over the gap
  assert [len(band.split()) for band in found["bands"]] == [4, 2]
  assert found["dots"].count("M") == 3
  assert found["ends"] == [
    {"candidates": 1.5, "step": 2, "sigma": 0.9},
    {"candidates": 1.0, "step": 8, "sigma": 0.1},
  ]


def test_prompts_are_escaped(copy):
  path = copy / "tasks" / "pick" / "task.json"
  part = json.loads(path.read_text())
  for case in part["cases"]:
    case["prompt"] = "<script>alert(1)</script>"
  path.write_text(json.dumps(part))
  text = scorecard.render(copy).read_text()
  assert "<script>alert" not in text
  assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_report_draws_the_page_again(copy):
  (copy / "report.html").unlink()
  assert cli.main(["report", str(copy)]) == 0
  assert (copy / "report.html").is_file()


@pytest.mark.parametrize("name", ["result.json", "tasks/pick/task.json"])
def test_a_number_that_is_not_what_was_written_is_told(copy, capsys, name):
  path = copy / name
  text = path.read_text()
  path.write_text(text.replace('"score": ', '"score": 1', 1))
  assert path.read_text() != text
  assert cli.main(["report", str(copy)]) == 2
  said = f"{name.split('/')[0]} is missing or damaged: run it again with --redo"
  assert said in capsys.readouterr().err


def test_files_of_others_among_the_tasks_are_no_damage(copy):
  for place in (".DS_Store", "pick/.nfs0001", "pick/notes.txt", "pick copy/task.json"):
    path = copy / "tasks" / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("not ours")
  assert call(copy) == 0
  assert cli.main(["report", str(copy)]) == 0
  chosen = settings.from_config(json.loads((copy / "manifest.json").read_text())["config"])
  asked = evaluate.plan("pick,occlusion", "id", 2, "both")
  evaluate.finish(copy, chosen, asked, None, ["videoreason"])
  (copy / "tasks" / ".DS_Store").unlink()
  evaluation.again(copy)


@pytest.mark.parametrize("name", ["task.json", "video_*.mp4"])
def test_a_file_of_a_task_that_is_missing_is_damage(copy, capsys, name):
  next((copy / "tasks" / "pick").glob(name)).unlink()
  assert call(copy) == cli.BAD_INPUT
  assert "tasks is missing or damaged" in capsys.readouterr().err


def no_table(folder: Path) -> None:
  (folder / "table.parquet").write_bytes(b"no table")


def other_number(folder: Path) -> None:
  rows = tables.read(folder / "table.parquet")
  tables.write(folder / "table.parquet", [{**rows[0], "score": 0.123}, *rows[1:]])


def cut_short(folder: Path) -> None:
  """A comparison that was stopped between the result and the table."""
  result = result_of(folder)
  result["against"]["folder"] = "another"
  rewritten = records.rewriting(folder, "result.json", "table.parquet")
  with contextlib.suppress(KeyboardInterrupt), rewritten:
    records.write_json(folder / "result.json", result)
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", [no_table, other_number, cut_short])
@pytest.mark.parametrize("command", ["report", "evaluate"])
def test_a_table_that_is_not_what_was_written_is_written_again(
  copy, done, capsys, measured, damage, command
):
  comparing.compare(copy, done)
  damage(copy)
  assert (cli.main(["report", str(copy)]) if command == "report" else call(copy)) == 0
  said = " ".join(capsys.readouterr().err.split())
  assert "table.parquet was missing, damaged or not whole: it is written again from tasks/" in said
  assert f"--against {'another' if damage is cut_short else done} compares again" in said
  assert tables.read(copy / "table.parquet") == tables.read(done / "table.parquet")
  assert result_of(copy) == result_of(done)
  ours, wanted = (json.loads((f / "manifest.json").read_text())["files"] for f in (copy, done))
  assert ours == wanted and not measured
  assert call(copy, f"--against={done}") == 0
  assert "warning" not in capsys.readouterr().err


def test_a_table_that_is_damaged_is_not_opened(copy):
  other_number(copy)
  with pytest.raises(ValueError, match=r"parquet is missing or damaged: `videoreason report .* wr"):
    evaluation.open_evaluation(copy)


def test_the_report_of_an_unfinished_evaluation_says_that_it_is_not_finished(copy, capsys):
  (copy / "manifest.json").unlink()
  assert cli.main(["report", str(copy)]) == cli.BAD_INPUT
  assert "so it is not finished: the command that began it goes on" in capsys.readouterr().err


# Beside an earlier evaluation


def edit_table(folder: Path, change) -> None:
  """Puts change(row) in the place of every row of the table; None = the row is left out."""
  rows = [change(dict(row)) for row in tables.read(folder / "table.parquet")]
  with records.rewriting(folder, "table.parquet"):
    tables.write(folder / "table.parquet", [row for row in rows if row is not None])


def edit_json(path: Path, **changes) -> None:
  with records.rewriting(path.parent, path.name):
    records.write_json(path, {**records.read_json(path), **changes})


@pytest.fixture
def before(done, tmp_path) -> Path:
  """An earlier evaluation of one seed and other steps, whose model scored .25 on everything."""
  folder = Path(shutil.copytree(done, tmp_path / "before"))
  first = {
    (row["task"], row["index"]): row["seed"]
    for row in reversed(tables.read(folder / "table.parquet"))
    if row["system"] == "model"
  }

  def change(row):
    if row["system"] != "model":
      return row
    mine = row["seed"] == first[row["task"], row["index"]]
    return {**row, "score": 0.25, "strict": 0.0} if mine else None

  edit_table(folder, change)
  edit_json(folder / "evaluation.json", steps=4, seeds=[0])
  return folder


def test_an_evaluation_is_paired_with_an_earlier_one_clip_by_clip(copy, before, measured, capsys):
  assert call(copy, f"--against={before}") == 0
  assert measured == []
  found = result_of(copy)["against"]
  rows = tables.read(copy / "table.parquet")
  pairs = [row for row in rows if row["against_score"] is not None]
  assert (found["pairs"], found["clips"], found["clips_there"]) == (4, 8, 4) and len(pairs) == 4
  for name in TASKS:
    own = [row for row in pairs if row["task"] == name]
    here, there = (np.mean([row[key] for row in own]) for key in ("score", "against_score"))
    block = found["tasks"][name]
    assert block["pairs"] == 2 and there == 0.25
    assert (block["score"]["here"], block["score"]["there"]) == (pytest.approx(here), 0.25)
    assert block["score"]["estimate"] == pytest.approx(here - there)
    assert block["strict"]["there"] == 0.0
  leads = [block["score"]["estimate"] for block in found["tasks"].values()]
  assert found["mean"]["score"]["estimate"] == pytest.approx(np.mean(leads))
  assert found["changed"] == ["steps=4 there and 2 here"]
  said = " ".join(capsys.readouterr().out.split())
  page = (copy / "report.html").read_text()
  for text in (
    "steps=4 there and 2 here",
    "4 of 8 clips here have the same case and seed there (4 clips): 4 here and 0 there are left",
  ):
    assert text in said and text in page
  for text in (said, page):
    assert "o interval of the difference for pick, occlusion: 2 cases" in text
  assert page.count("<th>problems</th>") == 1
  assert "<td>Pick</td><td>2</td><td>2</td>" in page and "<td>Mean</td><td>4</td><td>4</td>" in page
  assert "Holm" in said and "p, Holm" in page
  assert "Beside an earlier evaluation" in page
  files = json.loads((copy / "manifest.json").read_text())["files"]
  for name in ("result.json", "table.parquet"):
    assert files[name] == records.checksum(copy / name)


def test_a_comparison_stays_in_the_report_until_another_takes_its_place(copy, done, before):
  assert call(copy, f"--against={before}") == 0
  wanted = result_of(copy)
  shutil.rmtree(before)
  assert cli.main(["report", str(copy)]) == 0
  assert result_of(copy) == wanted
  assert "Beside an earlier evaluation" in (copy / "report.html").read_text()
  found = comparing.compare(copy, done)["against"]
  assert found == result_of(copy)["against"]
  assert (found["pairs"], found["clips"], found["clips_there"]) == (8, 8, 8)
  assert {found["mean"][m]["estimate"] for m in scoring.COMPARED} == {0.0}
  assert comparing.notes(found) == [
    f"other than {done}: nothing, it has the same settings.",
    "no interval of the difference for pick, occlusion: 2 cases: an interval needs at least 8.",
    "no interval of the difference for the mean over tasks: no group has two values that differ: "
    "resampling shows no spread.",
  ]


@pytest.mark.slow
def test_a_new_evaluation_is_compared_when_it_is_done(done, tmp_path, capsys):
  words = "--tasks=occlusion", "--config.guidance=1", "--seeds=1"
  assert call(tmp_path / "new", *words, f"--against={done}") == 0
  found = result_of(tmp_path / "new")["against"]
  assert list(found["tasks"]) == ["occlusion"]
  assert found["changed"] == ["guidance=[2.0] there and [1.0] here"]
  assert (found["pairs"], found["clips"], found["clips_there"]) == (2, 2, 8)


@pytest.mark.parametrize(
  ("change", "words", "told"),
  [
    (lambda f: shutil.rmtree(f), (), "there is no folder"),
    (lambda f: (shutil.rmtree(f), f.touch()), (), "is a file, wanted a folder: give the --out of"),
    (lambda f: (shutil.rmtree(f), f.mkdir()), (), "has no evaluation.json, so it is no evaluation"),
    (lambda f: (f / "evaluation.json").write_text("{}"), (), "evaluation.json is missing or dam"),
    (lambda f: (f / "evaluation.json").rename(f / "runs.json"), (), "is a run, no evaluation"),
    (lambda f: (f / "manifest.json").unlink(), (), "has no manifest.json, so it is not finished"),
    (lambda f: (f / "table.parquet").unlink(), (), "table.parquet is missing or damaged"),
    (lambda f: edit_json(f / "evaluation.json", scoring=1), (), "scoring.rules=1 there and"),
    (lambda f: None, ("--config.frames=21",), "frames=17 there and 21 here"),
    (lambda f: None, ("--config.height=48", "--config.width=48"), "height=32 there and 48 here"),
    (lambda f: None, ("--split=ood",), "split='id' there and 'ood' here"),
    (lambda f: None, ("--ambiguous=plain",), "kind='both' there and 'plain' here"),
    (lambda f: None, ("--tasks=maze",), "has the tasks pick, occlusion and none of those asked"),
    (lambda f: edit_json(f / "evaluation.json", seeds=[7]), (), "has the seeds 7 and none of"),
  ],
)
def test_what_makes_no_pairs_is_refused_before_anything_is_computed(
  before, tmp_path, measured, capsys, change, words, told
):
  change(before)
  assert call(tmp_path / "new", *words, f"--against={before}") == cli.BAD_INPUT
  err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("videoreason: ")]
  assert len(err) == 1 and told in err[0]
  assert not measured and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", evaluate.KINDS)
def test_fewer_cases_are_the_first_of_more(kind):
  task = tasks.load("pick", size=32)
  few, many = ([c.metadata for c in evaluate.cases_of(task, "id", n, kind)] for n in (3, 7))
  assert few == many[:3]


def test_two_numbers_of_cases_are_compared_on_those_of_both(copy, done, before, capsys, measured):
  edit_table(before, lambda row: row if row["case"] == 0 else None)
  edit_json(before / "evaluation.json", cases=1)
  assert call(copy, f"--against={before}") == 0
  found = result_of(copy)["against"]
  assert (found["pairs"], found["clips"], found["clips_there"]) == (2, 8, 2)
  assert found["changed"] == ["steps=4 there and 2 here"] and not measured
  said = " ".join(capsys.readouterr().out.split())
  assert "2 of 8 clips here have the same case and seed there (2 clips): 6 here and 0 there" in said
  found = comparing.compare(before, done)["against"]
  assert (found["pairs"], found["clips"], found["clips_there"]) == (2, 2, 8)


def test_an_evaluation_is_not_compared_with_itself(copy, capsys):
  before = (copy / "result.json").read_bytes()
  assert call(copy, f"--against={copy}", "--redo") == cli.BAD_INPUT
  assert "which is read: choose another --out" in capsys.readouterr().err
  assert (copy / "result.json").read_bytes() == before


def test_clips_of_cases_that_were_drawn_otherwise_make_no_pairs(copy, before):
  edit_table(before, lambda row: {**row, "problem": "another"})
  with pytest.raises(ValueError, match="its cases were drawn by another version"):
    comparing.compare(copy, before)
  assert "against" not in result_of(copy)


def test_own_tasks_are_compared_where_their_files_are_the_same():
  own = {"rules": 3, "odd:Odd": {"module": "odd", "sha256": "a"}}
  asked = {**dict.fromkeys(comparing.SAME, 1), "seeds": [0], "scoring": 3, "tasks": ["pick"]}

  def earlier(scoring):
    there = {**asked, "tasks": ["pick", "odd:Odd"], "scoring": scoring}
    return evaluation.Evaluation(path=Path("before"), asked=there, result={}, rows=[])

  comparing.check(asked, earlier(own))  # the other task is not asked for
  both = {**asked, "tasks": ["pick", "odd:Odd"], "scoring": own}
  comparing.check(both, earlier(own))
  other = {**own, "odd:Odd": {"module": "odd", "sha256": "b"}}
  with pytest.raises(ValueError, match=r"scoring.odd:Odd.sha256='b' there and 'a' here"):
    comparing.check(both, earlier(other))


def test_what_is_hard_for_both_cancels():
  rng = np.random.default_rng(0)
  hard = rng.random((16, 1)) / 2
  ours, others = rows_of(hard + 0.3 + 0.01 * rng.random((16, 1))), rows_of(hard)
  found = scoring.against({"a": list(zip(ours, others, strict=True))})
  lead = found["tasks"]["a"]["score"]
  assert lead["estimate"] == pytest.approx(lead["here"] - lead["there"])
  assert 0.3 < lead["low"] < lead["estimate"] < lead["high"] < 0.31
  assert lead["p"] < 1e-3
  assert found["tasks"]["a"]["strict"]["p"] == 1
  assert lead["holm"] == lead["p"]  # of one task
  assert found["mean"]["score"]["estimate"] == pytest.approx(lead["estimate"])


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_difference_of_one_problem_alone_has_no_interval(moved):
  pairs = {}
  for name in ("a", "b"):
    there = np.full((16, 1), 0.5)
    here = there.copy()
    if name == "a":
      here[:moved, 0] = (0.9, 0.8)[:moved]
    pairs[name] = list(zip(rows_of(here), rows_of(there), strict=True))
  found = scoring.against(pairs)
  leads = found["tasks"]["a"]["score"], found["mean"]["score"]
  for lead, count in zip(leads, (16, 32), strict=True):
    assert (lead["low"] is None) == (lead["high"] is None) == (moved < 2)
    if moved == 1:
      assert lead["note"] == f"one problem of {count} alone moved, which shows no spread"
      assert lead["p"] == 1 and lead["estimate"] == pytest.approx(0.4 / count)


def test_p_values_are_corrected_for_the_number_of_tasks():
  rng = np.random.default_rng(0)
  pairs = {}
  for name, gain, count in (("a", 0.1, 16), ("b", 0.02, 16), ("c", 0.0, 16), ("d", 0.1, 3)):
    hard = rng.random((count, 1)) / 2
    ours = rows_of(hard + gain + 0.1 * rng.random((count, 1)) - 0.05)
    pairs[name] = list(zip(ours, rows_of(hard), strict=True))
  found = scoring.against(pairs)
  leads = [found["tasks"][name]["score"] for name in pairs]
  raw = [lead["p"] for lead in leads]
  assert raw[3] is None and leads[3]["holm"] is None  # 3 cases can't reject: no test of three
  assert [lead["holm"] for lead in leads[:3]] == stats.holm(raw[:3]).tolist()
  assert leads[0]["holm"] == 3 * raw[0] and "holm" not in found["mean"]["score"]


def test_an_evaluation_is_opened_in_python(done):
  import jax_videoreason

  found = jax_videoreason.open_evaluation(done)
  assert found.result == result_of(done)
  assert found.rows == tables.read(done / "table.parquet")
  assert (found.asked["steps"], found.asked["tasks"]) == (2, list(TASKS))


def test_the_baseline_of_a_study_is_what_an_evaluation_gives_to_its_cases_and_seeds(done):
  @experiment(tasks=TASKS)
  def plain(ctx):
    """What does a run without a change score?"""
    said = ctx.read(ctx.denoise()[0])
    values = {"score": said.score[-1], "strict": said.strict[-1], "right": said.right[-1]}
    return Result(values=values, axes=dict.fromkeys(values, ("run",)))

  config = json.loads((done / "manifest.json").read_text())["config"]
  chosen = settings.from_config(config)
  cases = setting.pick_cases(chosen, TASKS, 2)
  found, _, _ = perform(plain, setting.load(chosen, groups=[cases]), cases)
  rows = [row for row in tables.read(done / "table.parquet") if row["system"] == "model"]
  for name, value in found.values.items():
    np.testing.assert_allclose(value.ravel(), [row[name] for row in rows], atol=1e-6)
