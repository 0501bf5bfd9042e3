"""The table of scores: paired, with intervals, of the same samples and scorers, escaped, marked."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jax_videoreason import cli
from jax_videoreason.vbvr import page, published, scores, suite, table


def call(*words) -> int:
  return cli.main(["vbvr", *map(str, words)])


def test_published_rows_are_the_means_of_their_parts():
  for row in published.BENCH.values():
    if "in-domain" in row:
      assert row["overall"] == pytest.approx(
        (row["in-domain"] + row["out-of-domain"]) / 2, abs=2e-3
      )
      for split, domain in suite.SPLITS.items():
        parts = [row[f"{domain} {f}"] for s, f in suite.OFFICIAL.values() if s == split]
        assert row[domain] == pytest.approx(np.mean(parts), abs=0.03)


def system(name, values, *, baseline=None, seed=None, noise=0.0, **more) -> dict:
  """A result.json of 20 tasks of 5 samples; values: the score of every sample of a task."""
  rows = []
  names = suite.official("In-Domain_50")[:10] + suite.official("Out-of-Domain_50")[:10]
  rng = np.random.default_rng(0)
  for task, value in zip(names, values, strict=True):
    split, faculty = suite.OFFICIAL[task]
    for index in range(5):
      rows.append(
        {
          "key": f"{split}/{task}/{index:05d}", "split": split, "domain": suite.SPLITS[split],
          "task": task, "index": index, "faculty": faculty, "prompt": "p", "broken": False,
          "score": float(value + noise * rng.uniform(-1, 1)), "error": None,
        }
      )  # fmt: skip
  return {
    "format": scores.FORMAT, "name": name, "model": name.partition("-seed")[0], "seed": seed,
    "baseline": baseline, "deviations": [], "settings": {"steps": 50, "seed": seed},
    "benchmark": "VBVR-Bench", "data": "d", "tasks": 20, "whole": False, "expected": 100,
    "missing": [], "errors": [], "broken": [], "version": "0",
    "evalkit": {"entry": "run_evaluation.py", "commit": "275472f", "digest": "x", "versions": {}},
    "summary": {}, "samples": rows, **more,
  }  # fmt: skip


def written(root: Path, *results: dict) -> list[Path]:
  for result in results:
    (root / result["name"]).mkdir()
    (root / result["name"] / "result.json").write_text(json.dumps(result))
  return [root / result["name"] for result in results]


def test_differences_are_paired_and_intervals_cover_tasks_and_samples(tmp_path):
  base = np.linspace(0.1, 0.9, 20)
  gain = np.where(np.arange(20) % 2, 0.3, -0.1)  # of every second task
  places = written(
    tmp_path,
    system("plain", base),
    system("better", base + 0.05),
    system("mixed", base + gain, noise=0.01),
    system("truth", np.ones(20), baseline="truth"),
  )
  made = table.table(*table.load(places))
  of = {(d["a"], d["b"]): d["scores"]["overall"] for d in made["differences"]}
  steady = of["plain", "better"]
  assert steady["estimate"] == pytest.approx(-0.05)
  assert steady["p"] < 0.001
  mixed = of["plain", "mixed"]
  assert mixed["estimate"] == pytest.approx(-0.1, abs=0.01)
  assert mixed["low"] < mixed["over_samples"]["low"] < mixed["over_samples"]["high"] < mixed["high"]
  assert ("plain", "truth") in of and ("truth", "plain") not in of
  row = made["systems"][0]["scores"]
  assert row["overall"]["estimate"] == pytest.approx(0.5)
  assert row["overall"]["of_truth"] == pytest.approx(0.5)
  assert row["overall"]["tasks"] == 20 and row["overall"]["samples"] == 100
  assert {c for c in row} <= set(published.COLUMNS)


def test_tasks_that_are_all_alike_give_no_interval():
  rows = system("flat", np.full(20, 0.1))["samples"]
  found = table.over_tasks(rows)
  assert found["estimate"] == pytest.approx(0.1)
  assert (found["low"], found["high"]) == (None, None)
  assert found["note"] == "all 20 cases are equal: resampling shows no spread"
  assert table.over_tasks(rows[1:])["note"] == found["note"]  # also with a sample less in one


def test_seeds_of_a_model_are_averaged_sample_by_sample(tmp_path):
  places = written(
    tmp_path,
    system("wan", np.full(20, 0.2), seed=1),
    system("wan-seed2", np.full(20, 0.6), seed=2),
  )
  (row,) = table.table(*table.load([tmp_path]))["systems"]
  assert (row["name"], row["seeds"]) == ("wan", [1, 2])
  assert row["scores"]["overall"]["estimate"] == pytest.approx(0.4)
  assert row["scores"]["overall"]["samples"] == 100
  assert len(table.find(places)) == 2


def rows_of(*places: str | Path) -> dict[str, float]:
  """The overall score of every row."""
  rows = table.table(*table.load(places))["systems"]
  return {row["name"]: row["scores"]["overall"]["estimate"] for row in rows}


def in_two(root: Path, *results: dict) -> list[Path]:
  """Each result in a set of scores of its own: may, june, ..."""
  outs = [root / out for out in ("may", "june", "july")[: len(results)]]
  for out, result in zip(outs, results, strict=True):
    out.mkdir()
    written(out, result)
  return outs


def test_videos_of_unknown_settings_are_never_seeds_of_one_model(tmp_path):
  unknown = {"settings": {}, "deviations": None}
  outs = in_two(tmp_path, *(system("sora", np.full(20, value), **unknown) for value in (1.0, 0.5)))
  assert rows_of(*outs) == pytest.approx({"may/sora": 1.0, "june/sora": 0.5})
  assert rows_of(outs[0]) == pytest.approx({"sora": 1.0})


def test_one_seed_twice_is_no_mean_of_seeds(tmp_path):
  values = (0.2, 0.6, 0.7)
  outs = in_two(
    tmp_path,
    *(system("wan", np.full(20, v), seed=s) for v, s in zip(values, (1, 1, 2), strict=True)),
  )
  assert rows_of(*outs) == pytest.approx({"may/wan": 0.2, "june/wan": 0.6, "july/wan": 0.7})
  assert rows_of(*outs[1:]) == pytest.approx({"wan": 0.65})


def test_one_model_at_two_settings_is_two_rows(tmp_path):
  outs = in_two(
    tmp_path,
    *(
      system("wan", np.full(20, v), seed=1, settings={"steps": steps})
      for v, steps in ((0.2, 50), (0.6, 20))
    ),
  )
  assert rows_of(*outs) == pytest.approx({"may/wan": 0.2, "june/wan": 0.6})


def test_two_settings_at_several_seeds_are_rows_called_by_the_model(tmp_path):
  for out, steps, values in (("may", 50, (0.2, 0.4)), ("june", 20, (0.6, 0.8))):
    (tmp_path / out).mkdir()
    seeds = (
      system(f"wan-seed{s}", np.full(20, v), seed=s, model="wan", settings={"steps": steps})
      for s, v in zip((1, 2), values, strict=True)
    )
    written(tmp_path / out, *seeds)
  wanted = {"may/wan": 0.3, "june/wan": 0.7}
  assert rows_of(tmp_path / "may", tmp_path / "june") == pytest.approx(wanted)


def test_clips_that_were_scored_beside_two_models_are_one_row(tmp_path):
  clip = system("static", np.full(20, 0.3), baseline="static", settings={"baseline": "static"})
  assert rows_of(*in_two(tmp_path, clip, clip)) == pytest.approx({"static": 0.3})


def test_results_that_no_name_tells_apart_are_refused(tmp_path):
  for place in ("a", "b"):
    (tmp_path / place / "scores").mkdir(parents=True)
    written(tmp_path / place / "scores", system("sora", np.ones(20), settings={}))
  with pytest.raises(ValueError, match=r"are both called 'scores/sora': rename one of the folders"):
    table.load([tmp_path / "a/scores", tmp_path / "b/scores"])


def test_one_folder_counts_once_however_it_is_given(tmp_path, monkeypatch):
  (place,) = written(tmp_path, system("wan", np.ones(20), seed=1))
  (tmp_path / "link").symlink_to(place)
  monkeypatch.chdir(tmp_path)
  assert table.find(["wan", place, "link", "wan/result.json", tmp_path]) == [Path("wan")]


@pytest.mark.parametrize(
  ("changed", "said"),
  [
    ({"data": "other"}, "scored with other data than"),
    ({"evalkit": None}, "another EvalKit or other packages"),
    ({"format": 0}, "of another version"),
    ({"scoring": 2}, "scored with another version of the tasks' rules than"),
  ],
)
def test_scores_of_different_things_share_no_table(tmp_path, changed, said):
  written(tmp_path, system("a", np.ones(20)), system("b", np.ones(20), **changed))
  with pytest.raises(ValueError, match=said):
    table.load([tmp_path])


def test_published_rows_are_marked_everywhere(tmp_path, capsys):
  place = written(tmp_path, system("wan_2", np.linspace(0, 1, 20)))[0]
  out = tmp_path / "table"
  assert call("table", place, f"--out={out}") == 0
  assert "published, of all 500 samples; not computed here" in capsys.readouterr().out
  latex = (out / "table.tex").read_text()
  assert r"Sora 2$^\dagger$ & .546 & .569" in latex
  assert r"wan\_2 & .500" in latex and "As published" in latex
  text = (out / "report.html").read_text()
  assert text.count("published</span>") == len(published.BENCH)
  for line in re.findall(r"^.* & .*\\\\$", latex, re.MULTILINE):
    assert line.count("&") == len(published.COLUMNS)


def test_a_picture_of_several_seeds_has_the_score_of_its_own(tmp_path):
  places = written(
    tmp_path,
    system("wan-seed2", np.full(20, 0.6), seed=2),
    system("wan-seed10", np.full(20, 0.2), seed=10),
    system("sora", np.full(20, 0.7), settings={}, deviations=None),
  )
  systems, shared = table.load(places)
  key = next(iter(systems[0].rows))
  picture = places[0] / scores.PICTURES / f"{key}.png"
  picture.parent.mkdir(parents=True)
  picture.write_bytes(b"png")
  shown = page.tasks(table.table(systems, shared), systems)
  (told,) = [one["score"] for task in shown for one in task["pictures"]]
  assert told == "seed 2, score 0.60; mean of 2 seeds 0.40"
  assert page.told(systems[1], key) == "score 0.70" and page.told(systems[1], "no") == ""


def test_a_table_says_how_the_videos_were_made_and_what_tells_rows_apart(tmp_path, capsys):
  made = {
    "command": ["videoreason", "vbvr", "generate"], "written": "2026-01-02T03:04:05+00:00",
    "device": "TPU v9", "versions": {"jax_videoreason": "1.0"}, "revision": "0123456789abcdef",
  }  # fmt: skip
  outs = []
  for out, steps, values in (("may", 50, (0.2, 0.4)), ("june", 20, (0.6, 0.8))):
    (tmp_path / out).mkdir()
    settings = {"steps": steps, "shift": 5.0, "model": "wan"}
    seeds = (
      system(f"wan-seed{s}", np.full(20, v), seed=s, model="wan", settings=settings, made=made)
      for s, v in zip((1, 2), values, strict=True)
    )
    written(tmp_path / out, *seeds)
    outs.append(tmp_path / out)
  assert call("table", *outs, f"--out={tmp_path / 'table'}") == 0
  said = " ".join(capsys.readouterr().out.split())
  assert "may/wan: steps=50, mean of seeds 1 (0.200), 2 (0.400)" in said.replace(";", ",")
  text = (tmp_path / "table" / "report.html").read_text()
  assert '<td>may/wan<br><span class="small">steps=50</span></td>' in text
  for row in ("<td>shift</td><td>5.0</td>", "<td>seed 2</td><td>overall 0.800</td>"):
    assert row in text
  assert '<p class="alert"><b>may/wan</b>: mean of seeds 1 (0.200), 2 (0.400).</p>' in text
  latex = (tmp_path / "table" / "table.tex").read_text()
  assert "% may/wan: steps=50, shift=5.0, model=wan" in latex
  for word in (text, latex):
    assert word.count("videoreason vbvr generate") == 2  # of two seeds each
    assert "TPU v9, jax_videoreason 1.0, revision 0123456789ab" in word
  only = table.table(*table.load(outs[:1]))["systems"][0]
  assert only["apart"] == [] and only["of_seed"] == pytest.approx({"1": 0.2, "2": 0.4})


def test_a_row_is_told_apart_from_those_of_its_own_model_alone(tmp_path):
  results = (
    system(name, np.full(20, 0.5), seed=1, settings={"model": model, "weights": model, **more})
    for name, model, more in (
      ("a", "wan", {"steps": 20, "negative_prompt": "still"}),
      ("b", "wan", {"steps": 50, "negative_prompt": "静止"}),
      ("c", "mini", {"steps": 2, "negative_prompt": ""}),
    )
  )
  made = table.table(*table.load(written(tmp_path, *results)))
  assert {row["name"]: row["apart"] for row in made["systems"]} == {
    "a": ["steps=20", "negative_prompt=still"],
    "b": ["steps=50", "negative_prompt=静止"],
    "c": [],
  }
  latex = table.latex(made)
  assert "% b: model=wan, weights=wan, steps=50, negative_prompt=静止" in latex
  shown = [line for line in latex.splitlines() if not line.startswith("%")]
  assert all(line.isascii() for line in shown)
  assert [line for line in shown if line.startswith(r"\par")][:2] == [
    r"\par $^{1}$ steps=20, negative\_prompt=still.", r"\par $^{2}$ steps=50."
  ]  # fmt: skip


def test_a_command_of_several_lines_is_one_line_of_the_table(tmp_path):
  made = {
    "command": ["generate", "--config.negative_prompt=no cuts\nno\ttext"], "written": "2026",
    "device": "cpu", "versions": {"jax_videoreason": "1.0"}, "revision": None,
  }  # fmt: skip
  (place,) = written(tmp_path, system("wan", np.full(20, 0.5), made=made))
  latex = table.latex(table.table(*table.load([place])))
  assert "\n% wan: generate --config.negative_prompt=no cuts no text on 2026, cpu" in latex


def test_seeds_without_a_common_sample_have_no_mean_to_speak_of(tmp_path):
  first, second = (system(f"wan-seed{s}", np.full(20, 0.5), seed=s) for s in (1, 2))
  for result, half in ((first, 0), (second, 1)):
    for number, row in enumerate(result["samples"]):
      row["error"] = "gone" if number % 2 == half else None
  written(tmp_path, first, second)
  (row,) = table.table(*table.load([tmp_path]))["systems"]
  assert (row["seeds"], row["of_seed"]) == ([1, 2], {})
  assert table.remarks(row) == "PARTIAL: 100 samples without a score are left out"


def test_the_page_says_from_when_on_an_interval_over_samples_is_given(tmp_path):
  rows = system("a", np.ones(20))["samples"]
  one_each = {"samples": [row for row in rows if row["index"] == 0]}
  for place, more in (("five", {}), ("one", one_each)):
    (tmp_path / place).mkdir()
    found = written(tmp_path / place, *(
      {**system(name, np.linspace(0, 1, 20), noise=noise), **more}
      for name, noise in (("a", 0.0), ("b", 0.1))
    ))  # fmt: skip
    assert call("table", *found, f"--out={tmp_path / place / 'table'}") == 0
    (row,) = json.loads((tmp_path / place / "table" / "table.json").read_text())["differences"]
    assert (row["scores"]["overall"]["over_samples"]["low"] is None) == (place == "one")
    text = " ".join((tmp_path / place / "table" / "report.html").read_text().split())
    assert "where each has two or more, 7 more samples than tasks in all" in text


def test_redo_replaces_a_table_and_nothing_else(tmp_path, capsys):
  place = written(tmp_path, system("a", np.ones(20)))[0]
  words = ["table", place, f"--out={tmp_path / 'table'}"]
  assert [call(*words), call(*words), call(*words, "--redo")] == [0, 2, 0]
  (tmp_path / "table" / "table.json").unlink()
  capsys.readouterr()
  assert call(*words, "--redo") == 2
  assert "has report.html and no table.json, so it holds no table" in capsys.readouterr().err


def test_prompts_and_names_are_escaped(tmp_path):
  result = system("<b>bold</b>", np.ones(20))
  for row in result["samples"]:
    row["prompt"] = "<script>alert(1)</script>"
  result["name"] = "x"
  place = written(tmp_path, result)[0]
  renamed = json.loads((place / "result.json").read_text())
  renamed["name"] = "<b>bold</b>"
  (place / "result.json").write_text(json.dumps(renamed))
  assert call("table", place, f"--out={tmp_path / 'table'}") == 0
  text = (tmp_path / "table" / "report.html").read_text()
  assert "<script>" not in text and "<b>bold" not in text
  assert "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize("content", ["null", "[]", "3", f'{{"format": {scores.FORMAT}}}'])
def test_a_damaged_result_is_one_sentence(tmp_path, capsys, content):
  path = tmp_path / "result.json"
  path.write_text(content)
  assert call("table", tmp_path) == 2
  assert f"{path} is missing or damaged" in capsys.readouterr().err


def test_a_table_of_nothing_is_refused(tmp_path, capsys):
  assert call("table", tmp_path) == 2
  assert "holds no result.json" in capsys.readouterr().err
  assert call("table") == 2
