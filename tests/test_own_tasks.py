"""Tasks that users write: found by `module:Class` by every command, and refused in a sentence."""

import importlib
import json
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import helpers
import run_folder
from jax_videoreason import (
  baselines,
  cli,
  console,
  evaluate,
  factors,
  report,
  settings,
  store,
  tables,
  tasks,
)
from jax_videoreason.branching import Branch
from jax_videoreason.cli import run, sweep
from jax_videoreason.records import read_json, write_json
from jax_videoreason.tasks import base, draw
from jax_videoreason.vbvr import baselines as clips
from jax_videoreason.vbvr import layout, samples, scores, suite, table

NAME = "odd_one:OddOne"
TEXT = (Path(__file__).parent.parent / "docs" / "new_task.md").read_text()
EXAMPLE = helpers.documented("new_task.md")


@pytest.fixture
def odd_one(write_module) -> Path:
  """The file of the documented task."""
  return write_module("odd_one", EXAMPLE)


@pytest.fixture
def change(odd_one, write_module):
  """Changes the file of the task, but nothing that it does."""
  return lambda: write_module("odd_one", f"{EXAMPLE}\n# another word\n")


# docs/new_task.md


@pytest.mark.parametrize(("size", "frames"), [(32, 13), (32, 33), (64, 17)])
def test_the_documented_task_keeps_what_authors_promise(odd_one, size, frames):
  assert 60 <= len(EXAMPLE.splitlines()) <= 90
  tasks.check(tasks.load(NAME, size=size, frames=frames))


def test_the_documented_task_is_generated_scored_and_read(odd_one):
  task = tasks.load(NAME, size=32)
  plain, several = (task.generate("id", index).metadata for index in (0, 1))
  assert (plain["task"], plain["k"], several["k"]) == (NAME, 1, 2)
  colours = plain["problem"]["colours"]
  assert colours.count(colours[plain["answer"]]) == 1
  wrong = task.render(plain, task.wrong_answers(plain)[0])
  assert task.score(wrong, plain).value == 0.5
  assert task.parse(wrong, plain) not in plain["answers"]
  grounds = {s: task.generate(s, 0).metadata["problem"]["ground"] for s in task.splits()}
  assert grounds == {"train": "black", "id": "black", "ood": "grey"}
  assert task.score(task.generate("ood", 2).frames, plain).value <= 0.1


def test_the_documented_prompts_have_words_that_mini_knows(odd_one):
  task = tasks.load(NAME)
  known = (Path(evaluate.__file__).parent / "assets" / "mini" / "tokenizer.json").read_text()
  words = json.loads(known)["model"]["vocab"]
  for index in (0, 1):
    for text in task.templates(task.generate("id", index).metadata["problem"]):
      assert set(text.lower().replace(".", " ").split()) <= set(words)


def test_the_documented_lines_of_python_say_that_it_is_right(odd_one, capsys):
  (lines,) = re.findall(r"^    from jax_videoreason.*\n(?:    .*\n)*", TEXT, re.MULTILINE)
  exec(textwrap.dedent(lines), {})
  assert "Score(value=1.0, " in capsys.readouterr().out


def commands() -> list[list[str]]:
  return [shlex.split(line) for line in re.findall(r"PYTHONPATH=\. videoreason (.*)", TEXT)]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_documented_command_line_is_understood(words):
  cli.parse(importlib.import_module(f"jax_videoreason.cli.{words[0]}"), words[1:])


# What is refused

BROKEN = {
  "": "module 'own_task' has no attribute 'Own'; wanted module:Class of a tasks.Task",
  "def Own(): pass": "own_task:Own is function, wanted a class below jax_videoreason.tasks.Task",
  "class Own: pass": "own_task:Own is Own, wanted a class below",
  "import nowhere": r"No module named 'nowhere'; wanted .* on PYTHONPATH the folder of each module",
  "1 / 0": "own_task: ZeroDivisionError: division by zero; mend it there",
}
TASK = "from jax_videoreason import tasks\nclass Own(tasks.Task):\n"
WHOLE = "  " + " = ".join(base.NEEDED) + " = lambda self, *given: None\n"


@pytest.mark.parametrize(("text", "said"), BROKEN.items())
def test_a_name_that_leads_to_no_task_is_told_in_a_sentence(write_module, text, said):
  write_module("own_task", text)
  with pytest.raises(ValueError, match=said):
    tasks.load("own_task:Own")


@pytest.mark.parametrize(
  ("body", "said"),
  [
    (
      "  name, number = 'own', 100\n" + WHOLE,
      "has name = 'own', .* write name = 'own_task:Own'",
    ),
    (
      "  name, number = 'own_task:Own', 9\n" + WHOLE,
      "has number = 9, .* write number = 100 in",
    ),
    ("  name, number = 'own_task:Own', '100'\n" + WHOLE, "has number = '100', wanted a whole"),
    (
      "  name, number = 'own_task:Own', 100\n" + WHOLE.replace("read = process", "final"),
      "^own_task:Own lacks read, process: write them in the class",
    ),
    ("  pass\n", r"^3 faults\. own_task:Own has name = ''.* number = 0.* lacks draw_problem, "),
  ],
)
def test_a_class_that_breaks_a_rule_is_refused_when_it_is_loaded(write_module, body, said):
  write_module("own_task", TASK + body)
  with pytest.raises(ValueError, match=said):
    tasks.load("own_task:Own")


def test_a_class_that_keeps_the_rules_is_loaded(write_module):
  write_module("own_task", TASK + "  name, number, smallest = 'own_task:Own', 100, 128\n" + WHOLE)
  assert tasks.load("own_task:Own", size=128).name == "own_task:Own"
  assert evaluate.plan("own_task:Own", "ood", 2, "both").tasks == ("own_task:Own",)
  with pytest.raises(ValueError, match="own_task:Own has no split 'heldout'; it has: train, id"):
    evaluate.plan("own_task:Own", "heldout", 2, "both")


@pytest.mark.parametrize("name", [":Own", "own_task:", "own/task:Own", "own_task:Own:Own"])
def test_a_name_of_another_form_is_refused(name):
  with pytest.raises(ValueError, match="names no task, wanted module:Class, as in odd_one:OddOne"):
    tasks.load(name)


def test_all_means_the_tasks_that_ship(odd_one):
  tasks.load(NAME)
  assert NAME not in evaluate.plan("all", "id", 8, "both").tasks
  assert tasks.names_of(f"{NAME}, maze") == [NAME, "maze"]


def test_a_study_of_no_such_task_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr("jax_videoreason.checkpoint.load", None)
  words = ["run", "noise", f"--config.tasks={NAME}", f"--out={tmp_path}"]
  assert cli.main(words) == cli.BAD_INPUT
  assert "No module named 'odd_one'; wanted module:Class" in capsys.readouterr().err


# What an author can check


def odd_one_with(**changes) -> tasks.Task:
  """The documented task with other methods."""
  space = {"__name__": "odd_one"}
  exec(compile(EXAMPLE, "new_task.md", "exec"), space)
  return type("Changed", (space["OddOne"],), changes)(size=32)


def usual(method: str):
  """A method of the documented task as it is."""
  return lambda self, *given: getattr(super(type(self), self), method)(*given)


def drawn_at_once(self, problem, answer):
  maps = usual("draw_answer")(self, problem, answer)
  maps[0] = maps[-1]
  return maps


def with_salt(self, rng, split, ambiguous):
  """A problem with something that no picture shows."""
  salt = int(rng.integers(10**6))
  return {**usual("draw_problem")(self, rng, split, ambiguous), "salt": salt}


def with_length(self, *given):
  """A problem that is another one in longer clips."""
  problem = usual("draw_problem")(self, *given)
  return {**problem, "ground": "black" if self.frames == 17 else "grey"}


def with_tuple(self, *given):
  problem = usual("draw_problem")(self, *given)
  return {**problem, "colours": tuple(problem["colours"])}


def nothing_kept(self, problem):
  return [base.kept(draw.cells(self.size, draw.lattice(self.size, 1, 1)), [[draw.RED]])]


def with_clips_alone(self, labels, problem):
  return usual("read")(self, labels, problem) if len(labels) > tasks.ENDING else None


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"read": lambda self, *_: 0}, "is read as 0, wanted [123]: mend read"),
    ({"read": with_clips_alone}, "the last 2 frames of .* alone are read as None, wanted"),
    (
      {"process": lambda self, *_: 0.5},
      r"right answer \d scores 0.75 \(preservation 1.00, final 1.00, process 0.50\), wanted 1: "
      "mend process, or draw_answer",
    ),
    ({"final": lambda self, *_: 1.0}, r"wrong answer \d scores 1.00 .*: mend final or process"),
    (
      {"final": lambda self, *_: 1.0, "options": usual("right_answers")},
      "standing still scores 0.50 .*, wanted at most 0.1: mend final or process",
    ),
    ({"kept": nothing_kept}, r"scores 0.00 \(preservation 0.00, .*: mend kept, or draw_answer"),
    ({"soft": lambda self, *_: dict.fromkeys(range(4), 0.0)}, r"shows the candidates \[\], wanted"),
    ({"soft": lambda self, *_: {0: 0.0}}, r"candidates are \[0\], wanted the options \[0, 1, 2, 3"),
    ({"soft": lambda self, *_: dict.fromkeys(range(4), 1.0)}, "still shows the candidate 0"),
    (
      {"soft": lambda *args: {a: draw.blended(seen) for a, seen in usual("soft")(*args).items()}},
      "a blend of 0.1 of the answer with the first frame shows it, wanted none on the scale of",
    ),
    ({"options": lambda self, _: list(np.arange(4))}, "option np.int64.* is a int64, wanted str"),
    ({"options": lambda self, _: [0, 1, 2, 3, 3]}, "the option 3 is there twice"),
    ({"right_answers": lambda self, _: [4]}, "^4 is no answer to this odd_one:OddOne case"),
    (
      {"draw_problem": with_tuple},
      r"its problem .* when read from JSON.*: mend draw_problem: lists",
    ),
    ({"draw_problem": with_salt}, "has its picture and prompt too, wanted .*: mend canonical"),
    (
      {"templates": lambda self, _: [str(np.random.default_rng().random())]},
      "drawn again it is another one, wanted all chance from the rng",
    ),
    ({"draw_problem": with_length}, "another first frame in a clip of 13 frames, .*: mend draw_p"),
    ({"draw_answer": drawn_at_once}, "begins with another picture than that of"),
  ],
)
def test_a_promise_that_is_broken_is_named_with_the_method_to_mend(changes, said):
  with pytest.raises(ValueError, match=said):
    tasks.check(odd_one_with(**changes), cases=40 if changes.get("draw_problem") else 2)


def test_a_problem_that_is_no_json_is_refused_when_it_is_drawn():
  task = odd_one_with(
    draw_problem=lambda self, rng, *_: {"n": rng.integers(9)}, right_answers=lambda self, _: [0]
  )
  with pytest.raises(ValueError, match=r"of odd_one:OddOne can't be kept as JSON .* as int\(x\)"):
    task.generate("id", 0)


def test_who_forgets_that_nothing_is_ambiguous_is_reminded(monkeypatch):
  monkeypatch.setattr(base, "TRIES", 100)
  task = odd_one_with(right_answers=lambda self, problem: [0])
  with pytest.raises(ValueError, match=r"too strict, or the class lacks ambiguous = False\.$"):
    task.generate("id", 1)


# What scores must share


def test_scores_of_own_tasks_share_the_file_of_the_class_and_others_the_rules_alone(change):
  assert tasks.scoring(["maze", "pick"]) == tasks.SCORING
  before = tasks.scoring(["maze", NAME])
  assert before["rules"] == tasks.SCORING
  assert before.keys() == {"rules", NAME}
  assert before[NAME]["module"] == "odd_one"
  change()
  assert tasks.scoring(["maze", NAME])[NAME]["sha256"] != before[NAME]["sha256"]


def product_of(*words) -> factors.Product:
  config = cli.resolved(cli.parse(sweep, [*words, "--config.steps=1", "--config.seeds=1"])[0])
  own = {key: config.pop(key) for key in factors.KEYS}
  return factors.multiply(settings.from_config(config), factors.varied(own))


def test_a_sweep_takes_the_name_inside_the_text_of_its_config(change):
  made = product_of("--config", f"seeds_mini:tasks=({NAME}),cases=2")
  assert [(case.task, case.split) for case in made.cases] == [(NAME, "id")] * 2
  before = made.asked()["scoring"]
  change()
  after = product_of("--config=mini", f"--config.tasks={NAME}", "--config.cases=2").asked()
  assert after["scoring"].keys() == before.keys()
  assert after["scoring"] != before
  shipped = product_of("--config", "seeds_mini:tasks=(maze),cases=2")
  assert shipped.asked()["scoring"] == tasks.SCORING


def test_a_study_of_a_task_that_changed_is_another_one(change, tmp_path, monkeypatch):
  chunks = []

  def stop(study, *_, **more):
    chunks.append(more["chunks"].of)
    raise ValueError("it got as far as that")

  monkeypatch.setattr("jax_videoreason.experiments.perform", stop)
  words = ["run", "noise", f"--config.tasks=maze,{NAME}", "--config.cases=1"]
  sources = []
  for _ in range(2):
    assert cli.main([*words, f"--out={tmp_path / 'out'}"]) == cli.BAD_INPUT
    sources.append(tasks.sources([NAME]))
    change()
  assert len(set(chunks)) == 2
  (tmp_path / "done").mkdir()
  write_json(tmp_path / "done" / "result.json", {"key": "k", "task_sources": sources[0]})
  with pytest.raises(ValueError, match="it was made by other code than odd_one has now"):
    run.check_out(tmp_path / "done", redo=False, of_tasks=sources[1])
  with pytest.raises(ValueError, match=r"\(it has result.json\)"):
    run.check_out(tmp_path / "done", redo=False, of_tasks=sources[0])


# The commands


@pytest.fixture
def evaluated(odd_one, tmp_path, monkeypatch):
  """Calls `evaluate` of the task into one folder; the nearest clip is looked for among few."""
  usual = baselines.bank
  monkeypatch.setattr(baselines, "bank", lambda task: usual(task, 20))
  out = tmp_path / "scores"
  words = ["evaluate", f"--tasks={NAME}", "--cases=2", "--config.steps=1", f"--out={out}"]
  return lambda *more: (cli.main([*words, *more]), out)


def test_an_evaluation_keeps_the_name_and_is_refused_where_the_code_changed(
  evaluated, change, capsys
):
  status, out = evaluated()
  assert status == 0
  block = read_json(out / "result.json")["tasks"][NAME]
  for system, score in (("truth", 1), ("static", 0), ("cut", 0.1875)):
    assert block["systems"][system]["score"]["estimate"] == score, system
  assert {row["task"] for row in tables.read(out / "table.parquet")} == {NAME}
  assert len(list((out / "tasks" / NAME).glob("*.mp4"))) == 2
  assert f">{NAME}</h2>" in (out / "report.html").read_text()
  change()
  capsys.readouterr()
  assert evaluated()[0] == cli.BAD_INPUT
  assert f"scoring.{NAME}.sha256=" in capsys.readouterr().err
  assert cli.main(["report", str(out)]) == 0
  assert f"odd_one has changed since {out} was scored" in capsys.readouterr().err


def test_a_stored_run_finds_its_task_where_it_is_on_the_path(odd_one, tmp_path):
  folder = run_folder.make(tmp_path / "run", cases=((NAME, 1),), seeds=1, steps=3)
  stored = store.open_run(folder)
  chosen = settings.from_config({"checkpoint": "mini", "frames": 17, "height": 32, "width": 32})
  branch = Branch(run=stored, chosen=chosen, step=0, said={}, edit=None)
  case = branch.case(0)
  assert case is not None
  assert (case.task, case.frames[-1].tolist()) == (NAME, case_of(1).frames[-1].tolist())
  page = report.render(folder).read_text()
  assert f"{NAME}, unseen case 1" in page
  odd_one.unlink()
  sys.modules.pop("odd_one")
  importlib.invalidate_caches()
  with pytest.raises(ValueError, match=f"^{NAME}: No module named 'odd_one'; .* on PYTHONPATH the"):
    branch.case(0)


def case_of(index: int) -> tasks.Case:
  return tasks.load(NAME, size=32).generate("id", index)


@pytest.fixture
def exported(odd_one, tmp_path) -> Path:
  """Cases of the task and of one that ships, as `tasks export` writes them."""
  words = ["tasks", "export", f"--tasks={NAME},maze", "--size=32", "--cases=2"]
  assert cli.main([*words, f"--out={tmp_path / 'cases'}"]) == 0
  return tmp_path / "cases"


def test_an_export_is_read_back_and_replaced_as_a_whole(exported, capsys):
  assert [case.task for case in layout.read(exported)] == ["maze", "maze", NAME, NAME]
  (exported / "notes:2024").mkdir()
  words = ["tasks", "export", "--tasks=pick", "--size=32", f"--out={exported}", "--redo"]
  assert cli.main(words) == 0
  assert sorted(path.name for path in exported.iterdir()) == ["notes:2024", "pick"]
  (exported / NAME).mkdir()
  (exported / NAME / "todo.md").write_text("mine")
  assert cli.main(words) == cli.BAD_INPUT
  assert "todo.md is no part of a case" in capsys.readouterr().err


def test_exported_cases_are_scored_by_the_task_and_anew_where_it_changed(
  exported, change, tmp_path, monkeypatch
):
  data = samples.load(exported)
  assert (data.name, len(data.samples)) == (samples.OWN, 4)
  assert len(samples.load(exported, names=[NAME]).samples) == 2
  systems = {path.name: path for path in clips.write(tmp_path, data, [clips.TRUTH, clips.STATIC])}
  counted, real = [], scores.own_score
  monkeypatch.setattr(scores, "own_score", lambda s, f: (counted.append(s.task), real(s, f))[1])
  for _ in range(2):  # the second call finds all that the first has scored
    found = scores.score(tmp_path / "scores", data, systems, None)
  assert [row["score"] for row in found["truth"]["samples"]] == [1, 1, 1, 1]
  assert [row["score"] for row in found["static"]["samples"]] == [0, 0, 0, 0]
  assert {row["faculty"] for row in found["truth"]["samples"]} == {suite.NO_FACULTY, "Spatiality"}
  assert len(counted) == 8
  shutil.copytree(tmp_path / "scores", tmp_path / "before")
  change()
  scores.score(tmp_path / "scores", data, systems, None)
  assert counted[8:] == [NAME] * 4
  made = table.table(*table.load([tmp_path / "scores"]))
  assert [row["task"] for row in made["by_task"]] == ["maze", NAME]
  columns = made["systems"][0]["scores"]
  assert (columns["in-domain"]["samples"], columns["in-domain Spatiality"]["samples"]) == (4, 2)
  with pytest.raises(ValueError, match="was scored with other code of its own tasks than"):
    table.load([tmp_path / "before" / "truth", tmp_path / "scores" / "static"])


def test_a_task_that_is_not_on_the_path_is_named_once_for_all_its_cases(exported, odd_one):
  odd_one.unlink()
  sys.modules.pop("odd_one")
  importlib.invalidate_caches()
  with pytest.raises(ValueError, match="No module named 'odd_one'") as caught:
    samples.load(exported)
  assert str(caught.value).count("No module named") == 1


def test_scores_of_tasks_that_ship_say_nothing_of_files(tmp_path):
  for index in range(2):
    layout.write_cases(tmp_path / "cases", [tasks.load("maze", size=32).generate("id", index)])
  data = samples.load(tmp_path / "cases")
  systems = {path.name: path for path in clips.write(tmp_path, data, [clips.STATIC])}
  found = scores.score(tmp_path / "scores", data, systems, None)["static"]
  assert found["task_sources"] is None


@pytest.mark.parametrize("held_out", [False, True])
def test_the_nearest_clip_is_of_the_task_or_of_those_that_ship_where_it_is_held_out(held_out):
  task = odd_one_with(held_out=held_out)
  names = {source.name for source, _ in baselines.bank(task, 14).clips}
  shipped = {name for name, kind in tasks.TASKS.items() if not kind.held_out}
  assert names == (shipped if held_out else {NAME})


def test_a_name_is_printed_as_it_is(capsys):
  console.say("nature:Fire: a line")
  console.table("nature:Fire: a title", ("task",), [("a:fire:b",)])
  said = capsys.readouterr().out
  assert "nature:Fire: a line" in said and "a:fire:b" in said
