"""`videoreason sweep`: cases x seeds x edits of the model that ships, read, stopped, looked at."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import helpers
from jax_videoreason import (
  bundles,
  checkpoint,
  cli,
  conditioning,
  distributed,
  factors,
  gallery,
  lanes,
  open_sweep,
  product,
  runs,
  schedules,
  scoring,
  settings,
  sweep,
  tasks,
)
from jax_videoreason.configs import common
from jax_videoreason.decode import decode
from jax_videoreason.experiments import base
from jax_videoreason.schedules import Schedule
from jax_videoreason.structs import Sizes
from jax_videoreason.tasks import ENDING

TASKS, CASES, SEEDS, STEPS = ("pick", "tree_reach"), 2, 2, 3
WORDS = (
  "--config=seeds_mini:cases=2,seeds=2,tasks=('pick','tree_reach'),unit=4",
  "--config.steps=3",
  "--config.taps.sites=('attn_out',)",
)
TOTAL = len(TASKS) * CASES * SEEDS


def call(out: Path, *words: str) -> int:
  return cli.main(["sweep", *WORDS, f"--out={out}", *words])


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
  """A finished sweep of 8 runs in 2 units."""
  out = tmp_path_factory.mktemp("sweeps") / "mini"
  assert call(out) == 0
  return out


@pytest.fixture
def copy(done, tmp_path) -> Path:
  return Path(shutil.copytree(done, tmp_path / "copy"))


def made(edits=None, **changes) -> factors.Product:
  """The product of the words above, with other keys."""
  config = cli.load_config(WORDS[0].removeprefix("--config=")).to_dict()
  config.update({"steps": STEPS, **changes})
  if edits is not None:
    config["edits"] = edits
  own = {key: config.pop(key) for key in factors.KEYS}
  return factors.multiply(settings.from_config(config), factors.varied(own))


# What it leaves


def test_a_page_with_too_many_cases_has_some_of_every_kind():
  kinds = [["a0", "a1", "a2"], ["b0"], ["c0", "c1", "c2"]]
  assert gallery.spread(kinds, 5) == ["a0", "a1", "b0", "c0", "c1"]
  assert gallery.spread(kinds, 100) == ["a0", "a1", "a2", "b0", "c0", "c1", "c2"]


def test_a_page_shows_some_seeds_of_many_and_judges_by_all(done, monkeypatch):
  found = open_sweep(done)
  rows = [dict(row, right=0, answer="a", flips=0) for row in found.rows[:2]]
  rows += [{**rows[0], "right": 1, "answer": said, "flips": 3} for said in ("b", "b", None)]
  monkeypatch.setattr(gallery, "MOST_SEEDS", 2)
  monkeypatch.setattr(gallery, "MOST_STRIPS", 4)
  shown = gallery.card(found, rows)
  assert (len(shown["rows"]), shown["more"], shown["outcome"], shown["flips"]) == (2, 3, "some", 3)
  assert gallery.numbers([rows])["agreement"] == (1 + 1) / 10  # of the pairs of five seeds
  assert len(gallery.contents(found)["cards"]) == 2


def test_means_of_a_page_say_over_how_many_runs_and_problems_they_are():
  scores = np.random.default_rng(0).random((10, 2))
  cases = [
    [
      {"problem": f"p{min(case, 7)}", "score": score, "strict": 0.0, "right": 1.0, "flips": seed,
       "answer": "a", "commitment": 3 if case < 2 else -1}
      for seed, score in enumerate(row)
    ]
    for case, row in enumerate(scores)
  ]  # fmt: skip
  found = gallery.numbers(cases)
  assert (found["runs"], found["problems"], found["settled"]) == (20, 8, 4)
  assert found["commitment"] == 3
  assert found["score"]["estimate"] == pytest.approx(scores.mean())
  of_problem = [*scores[:7].mean(1), scores[7:].mean()]
  assert min(of_problem) <= found["score"]["low"] < scores.mean() < found["score"]["high"]
  few = gallery.numbers(cases[:7])["score"]
  assert (few["low"], few["high"], few["problems"]) == (None, None, 7)
  still = gallery.numbers([[dict(run, flips=0) for run in case] for case in cases])["flips"]
  assert (still["low"], still["note"][:17]) == (None, "all 8 cases are e")


def test_shares_of_a_page_have_the_intervals_that_evaluate_gives_them(done):
  cases = [
    [
      {"system": "model", "problem": f"p{min(case, 15)}", "score": 0.5, "strict": case < 12,
       "right": seed == 0 or case < 8, "flips": 0, "answer": "a", "commitment": 0}
      for seed in range(2)
    ]
    for case in range(18)
  ]  # fmt: skip
  found = gallery.numbers(cases)
  wanted = scoring.measures([row for case in cases for row in case], "model")
  for name in ("strict", "right"):
    assert found[name] == pytest.approx(wanted[name])
  assert found["strict"]["estimate"] == 12 / 16
  page = " ".join((done / "report.html").read_text().split())
  assert "Strict and right answers: shares of problems, the runs of each averaged" in page


def test_the_page_says_what_made_the_sweep(done):
  page = (done / "report.html").read_text()
  manifest = json.loads((done / "manifest.json").read_text())
  assert f"{TOTAL} runs of mini:" in page
  for row in (
    f"<td>{manifest['device']}</td>", f"<td>{manifest['written']}</td>",
    '<code>guidance</code></th><td>', '<code>weights</code></th><td>',
    f"<code>seeds</code></th><td>{list(range(SEEDS))}</td>", "<td>4</td><td>2</td>",
  ):  # fmt: skip
    assert row in page, row


def test_a_row_per_case_seed_and_edit(done):
  found = open_sweep(done)
  assert found.finished
  assert [(r["task"], r["case"], r["seed"]) for r in found.rows] == [
    (task, CASES * t + case, seed)
    for t, task in enumerate(TASKS)
    for case in range(CASES)
    for seed in range(SEEDS)
  ]
  assert {row["split"] for row in found.rows if row["task"] == "tree_reach"} == {"heldout"}
  for row in found.rows:
    assert len(row["answers"]) == len(row["rights"]) == STEPS
    assert 0 <= row["score"] <= 1
    assert row["broken_at"] is None
  layers = checkpoint.load("mini", parts=("dit",)).parts.dit.config.layers
  assert found.of("taps/attn_out/norm").shape[:4] == (STEPS, layers, 1, TOTAL)
  assert found.of("finite").all()


def test_a_run_is_what_the_sampler_and_the_task_make_of_it_alone(done):
  found = open_sweep(done)
  row = found.rows[3]  # the second case of the first task, second seed
  of = made()
  case = of.cases[row["case"]]
  whole = checkpoint.load("mini")
  cond = conditioning.encode(
    whole, [case.prompt], case.first_frame[None], frames=17, negative_prompt=""
  )
  grid = (*whole.card.latents.grid(17, 32, 32), 16)
  noise = runs.make_noise([runs.seed_of(case.index, row["seed"])], grid)
  schedule: Schedule = settings.schedule(of.chosen, whole.card, whole.parts)
  final = runs.run(whole, noise, cond, schedule)
  # another batch size, another order of the sums
  np.testing.assert_allclose(found.of("final_latents", 3)[0], final[0], atol=2e-4)
  frames = decode(whole, final)[0]
  task = of.tasks[case.task]
  said = task.parse(frames, case.metadata)
  assert row["answer"] == (None if said is None else str(said))
  assert row["score"] == pytest.approx(task.score(frames, case.metadata).value, abs=0.02)


def test_the_conditioning_of_all_cases_lies_in_host_memory_and_costs_no_program():
  bench = product.ready(made(cases=2, steps=2, piece=1))
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(bench.cond))
  moved = dataclasses.replace(bench, cond=jax.tree.map(jax.device_put, bench.cond))
  with base._count_programs() as programs:
    here, there = (product.compute(b, unit).final for b, unit in ((bench, 0), (moved, 0)))
    product.compute(bench, 1)
  assert len(programs) == 1  # of two pieces, two units, and both places
  np.testing.assert_array_equal(here, there)


def test_the_page_has_a_card_per_case_to_filter(done):
  page = (done / "report.html").read_text()
  assert page.count('class="card"') == len(TASKS) * CASES
  for task in TASKS:
    assert page.count(f'data-task="{task}"') == CASES
    assert f"<option>{task}</option>" in page
  assert page.count('class="strip"') == TOTAL
  assert not re.search(r'(src|href)="(?!data:)', page)
  for words in gallery.OUTCOMES.values():
    assert words in page


def test_the_last_answer_is_that_of_the_final_video(done):
  for row in open_sweep(done).rows:
    assert row["answers"][-1] == row["answer"]
    assert row["rights"][-1] == bool(row["right"])


@pytest.mark.parametrize(("same", "read_at"), [(True, 1), (False, 2)])
def test_a_last_step_that_is_the_final_video_is_decoded_once(same, read_at, monkeypatch):
  of = made(cases=2)
  seen = []

  def show(bundle, latents, last=None, tiles=None, mesh=None):
    seen.append((len(latents), last))
    return np.zeros((len(latents), of.chosen.frames if last is None else last, 32, 32, 3), np.uint8)

  monkeypatch.setattr(product, "decode", show)
  nothing: Any = None
  schedule: Any = types.SimpleNamespace(sigma=np.array([1.0, 0.5, 0.0]))
  bench = product.Bench(product=of, bundle=nothing, cond=nothing, schedule=schedule, mesh=None)
  final = np.zeros((of.width, 5, 4, 4, 16), np.float32)
  x0 = np.stack([final + 1, final if same else final + 1e-6])
  finite = np.ones((2, of.width), bool)
  part = product.read(bench, 0, product.Made(final=final, finite=finite, x0=x0, taps={}))
  assert [len(row["answers"]) for row in part.rows] == [2] * of.width
  assert sum(count for count, last in seen if last is not None) == read_at * of.width
  assert seen[0] == (of.width, None)


@pytest.mark.parametrize(("by", "wanted"), [("vae", [True, True]), ("preview", [True, False])])
def test_answers_are_read_from_the_frames_of_their_reader(by, wanted, monkeypatch):
  """Two steps of two runs; the preview shows the second one a grey clip, the VAE the truth."""
  of = made(cases=2, tiles="diffusers")
  cases = of.cases[:2]
  truths = [of.tasks[c.task].generate(c.split, c.index).frames for c in cases]

  def show(bundle, x0, last, grey=False, tiles=None, mesh=None):
    assert tiles == (None if grey else "diffusers")
    runs = [round(float(x.mean())) for x in x0]
    shown = np.stack([np.full_like(truths[r], 128) if grey and r else truths[r] for r in runs])
    return shown[:, -last:]

  monkeypatch.setattr(product, "decode", show)
  monkeypatch.setattr(
    product, "preview", lambda bundle, x0, last: show(bundle, x0, last, grey=True)
  )
  nothing: Any = None
  bench = product.Bench(product=of, bundle=nothing, cond=nothing, schedule=nothing, mesh=None)
  x0 = np.broadcast_to(np.arange(2.0)[None, :, None], (2, 2, 3))
  said = product.answers_at(bench, cases, x0, by)
  for run, case in enumerate(cases):
    answer = case.metadata["answer"] if wanted[run] else None
    assert said[:, run].tolist() == [answer, answer]


def test_more_than_the_ending_is_shown_only_where_that_does_not_say_the_answer(monkeypatch):
  of = made(tasks=("rotate", "maze"), cases=4)
  cases = of.cases
  truths = [of.tasks[c.task].generate(c.split, c.index).frames for c in cases]
  seen: list[tuple[int, int | None]] = []
  sizes: dict[int | None, set[int]] = {ENDING: set(), None: set()}

  def show(bundle, x0, last, tiles, mesh):
    shown = [round(float(x.mean())) for x in x0]
    seen.extend((r, last) for r in shown)
    sizes[last].add(len(shown))
    return np.stack([truths[r][-(last or len(truths[r])) :] for r in shown])

  monkeypatch.setattr(product, "decode", show)
  monkeypatch.setattr(product, "ENDINGS", 5)
  monkeypatch.setattr(product, "CLIPS", 2)
  nothing: Any = None
  bench = product.Bench(product=of, bundle=nothing, cond=nothing, schedule=nothing, mesh=None)
  x0 = np.broadcast_to(np.arange(float(len(cases)))[None, :, None], (2, len(cases), 3))
  said = product.answers_at(bench, cases, x0, "vae")
  assert said.tolist() == [[case.metadata["answer"] for case in cases]] * 2
  half = {r for r, c in enumerate(cases) if c.metadata["answer"] in (180, -180)}
  assert 0 < len(half) < 4
  assert {r for r, last in seen if last == ENDING} == set(range(len(cases)))
  assert {r for r, last in seen if last is None} == half
  assert sizes == {ENDING: {4}, None: {2}}  # of 16: no group is filled up


def test_the_preview_of_a_model_without_one_is_refused_before_anything_is_run(tmp_path):
  bundle = checkpoint.load("mini")
  checkpoint.save(dataclasses.replace(bundle, preview=None), tmp_path / "blind")
  assert checkpoint.load(tmp_path / "blind", parts=("preview",)).preview is None
  with pytest.raises(ValueError, match=r"blind has no preview: give --config\.reader=vae"):
    made(checkpoint=str(tmp_path / "blind"), reader="preview")


# Stop and go on


def test_report_draws_the_page_again_also_of_what_is_done_so_far(done, copy, capsys):
  page = copy / "report.html"
  page.unlink()
  assert cli.main(["report", str(copy)]) == 0
  assert page.resolve().as_uri() in capsys.readouterr().out
  whole = (done / "report.html").read_text()
  assert page.read_text() == whole.replace(f"Sweep {done.name}<", f"Sweep {copy.name}<")
  for name in ("units/00001.json", "manifest.json", "table.parquet"):
    (copy / name).unlink()
  assert cli.main(["report", str(copy)]) == 0
  assert "The sweep is not finished" in page.read_text()
  assert page.read_text().count('class="card"') == TOTAL // 2 // SEEDS
  (copy / "sweep.json").write_text("{")
  assert cli.main(["report", str(copy)]) == cli.BAD_INPUT
  assert "sweep.json" in capsys.readouterr().err


def test_what_is_left_is_done_and_the_table_is_the_same_to_the_last_bit(done, copy, capsys):
  before = (done / "table.parquet").read_bytes()
  (copy / "units" / "00001.json").unlink()
  (copy / "manifest.json").unlink()
  (copy / "table.parquet").unlink()
  assert cli.main(["sweep", "--status", str(copy)]) == 0
  assert "stopped, 1 of 2 units (4 runs)" in capsys.readouterr().out
  assert not open_sweep(copy).finished
  assert call(copy) == 0
  assert (copy / "table.parquet").read_bytes() == before
  found, wanted = (open_sweep(folder).of("final_latents") for folder in (copy, done))
  np.testing.assert_array_equal(found, wanted)


def test_a_finished_sweep_with_damage_says_so_and_its_bar_counts_what_is_done_again(copy, capsys):
  (copy / "units" / "00001.json").write_text("{")
  assert cli.main(["sweep", "--status", str(copy)]) == 0
  said = capsys.readouterr().out
  assert "stopped, 1 of 2 units (4 runs)" in said
  assert "unit 1: 00001.json is damaged; the same command does it again" in said
  chunks = (copy / "results.zarr" / "finite" / "c").rglob("*")
  next(path for path in chunks if path.is_file()).unlink()
  assert call(copy) == 0
  assert f"{TOTAL}/{TOTAL}" in capsys.readouterr().err


@pytest.mark.slow
def test_on_another_number_of_devices_answers_are_the_same_and_numbers_nearly(done, tmp_path):
  assert len(jax.local_devices()) > 1
  out = tmp_path / "one"
  of = made(taps={**common.sample().taps.to_dict(), "sites": ("attn_out",)})
  product.perform(out, of, mesh=None)
  ours, wanted = open_sweep(out), open_sweep(done)
  layouts = [json.loads((f / "manifest.json").read_text())["layouts"] for f in (out, done)]
  assert layouts[0] != layouts[1]
  for ours_row, wanted_row in zip(ours.rows, wanted.rows, strict=True):
    for name, value in wanted_row.items():
      if isinstance(value, float):
        assert ours_row[name] == pytest.approx(value, abs=1e-5), name
      else:
        assert ours_row[name] == value, name
  for name in ("final_latents", "taps/attn_out/norm"):
    a, b = ours.of(name), wanted.of(name)
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), name


def test_another_config_is_refused_by_its_keys(copy, capsys):
  assert call(copy, "--config.shift=4.0", "--config.piece=2") == 2
  said = capsys.readouterr().err
  assert "shift=5.0 there and 4.0 here" in said
  assert "piece" not in said  # changes no number


def test_what_decides_which_run_is_which_is_asked(copy, capsys):
  a, b = {"edit": "none"}, {"edit": "ensemble_runs", "what": "out"}
  assert made({"a": a, "b": b}).asked() != made({"b": b, "a": a}).asked()
  asked = json.loads((copy / "sweep.json").read_text())
  for key, now in (("format", factors.FORMAT), ("scoring", tasks.SCORING)):
    (copy / "sweep.json").write_text(json.dumps({**asked, key: 0}))
    assert call(copy) == 2
    assert f"{key}=0 there and {now} here" in capsys.readouterr().err


def test_a_run_that_is_not_finite_is_run_again_and_named(tmp_path, monkeypatch, capsys):
  real, count = product._denoise, []

  def broken(bench, unit):
    found = real(bench, unit)
    if unit == 1:
      count.append(unit)
      finite, x0, final = found.finite.copy(), found.x0.copy(), found.final.copy()
      finite[1:, 2], x0[1:, 2], final[2] = False, np.nan, np.nan
      return dataclasses.replace(found, finite=finite, x0=x0, final=final)
    return found

  monkeypatch.setattr(product, "_denoise", broken)
  assert call(tmp_path / "nan") == 0
  assert count == [1, 1]
  rows = open_sweep(tmp_path / "nan").rows
  assert [row["broken_at"] for row in rows] == [None] * 6 + [1, None]
  assert rows[6]["answer"] is None
  assert rows[6]["answers"] == [None] * STEPS
  assert np.isnan(open_sweep(tmp_path / "nan").of("final_latents", 6)).all()
  assert "run 6 (tree_reach heldout" in capsys.readouterr().out
  assert "1 runs are not finite" in (tmp_path / "nan" / "report.html").read_text()


# Edits


ABLATED = {"edit": "ablate", "sites": ("attn_out",), "gate": 0.5}
ENSEMBLE = {"edit": "ensemble_runs", "what": "out", "steps": (0, 2)}


def test_the_edits_of_a_sweep_are_those_of_the_library():
  of = made({"none": {"edit": "none"}, "mean": ENSEMBLE})
  assert (of.units, of.width) == (4, 4)
  assert [of.edit_of(unit) for unit in range(4)] == ["none", "none", "mean", "mean"]
  runs = [[(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1), (3, 0), (3, 1)]]
  assert [of.runs_in(unit) for unit in range(4)] == runs * 2
  sizes = Sizes(S=3, R=4, G=2, L=8, F=5, H=8, W=8, C=16, T=80, D=128)
  mini = bundles.describe("mini")
  schedule = settings.schedule(of.chosen, mini.card, mini.modules)
  edit = factors.edit_for(ENSEMBLE, sizes, schedule, seeds=2)
  assert edit is not None
  half = np.array([[0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]])
  np.testing.assert_array_equal(np.asarray(edit.mix_out), [half, half, np.eye(4)])
  assert factors.edit_for({"edit": "none"}, sizes, schedule, seeds=2) is None


def test_the_seeds_of_a_case_are_cut_unless_an_edit_mixes_them():
  many = {"seeds": 1024, "cases": 1, "tasks": ("pick",)}
  of = made(unit=100, **many)
  assert (of.units, of.width) == (16, 64)
  assert of.runs_in(1) == [(0, seed) for seed in range(64, 128)]
  of = made({"none": {"edit": "none"}, "mean": ENSEMBLE}, unit=100, **many)
  assert (of.units, of.width) == (2, 1024)
  of = made({"none": {"edit": "none"}, "half": ABLATED}, unit=4, seeds=6, cases=2)
  assert (of.units, of.width) == (2 * 2 * 2 * 2, 3)
  assert [of.edit_of(unit) for unit in (7, 8)] == ["none", "half"]
  assert [of.runs_in(unit) for unit in (3, 11)] == [[(1, 3), (1, 4), (1, 5)]] * 2


def test_runs_are_the_same_however_the_seeds_of_a_case_are_cut(done, tmp_path):
  out = tmp_path / "cut"
  assert call(out, "--config.unit=1") == 0
  whole, cut = open_sweep(done), open_sweep(out)
  assert (len(list((out / "units").iterdir())), len(cut.rows)) == (TOTAL, TOTAL)
  assert [row["answers"] for row in cut.rows] == [row["answers"] for row in whole.rows]
  np.testing.assert_allclose(cut.of("final_latents"), whole.of("final_latents"), atol=1e-5)
  assert (out / "report.html").read_text().count("<video") == (
    (done / "report.html").read_text().count("<video")
  )


def test_what_a_sweep_would_not_heed_is_refused():
  with pytest.raises(ValueError, match=r"batch=2: .* give --config.unit=2 in its place"):
    made(batch=2)
  taps = {"sites": ("attn_out",), "reduce": ("norm",), "layers": None, "steps": None,
          "branches": (0,), "budget_gb": 1e-7}  # fmt: skip
  with pytest.raises(ValueError, match=r"taps need .*; the budget is 100 bytes"):
    made(taps=taps)


@pytest.mark.parametrize("edit", ["noise_at", {"edit": ["noise_at"]}, {"mode": "add"}])
def test_an_edit_that_is_no_mapping_with_a_name_is_refused(edit):
  with pytest.raises(ValueError, match=r"edits\.a=.*, wanted {'edit': NAME, \.\.\.}"):
    made({"a": edit})


def test_faults_of_a_sweep_are_told_at_once():
  with pytest.raises(ValueError) as refused:
    made({"a": {"edit": "mix"}, "b": {"edit": "ablate", "gain": 2}}, split="test", cases=0)
  said = str(refused.value)
  assert "edits.a.edit='mix', wanted one of none, noise_at, ablate, ensemble_runs." in said
  assert "edits.b: ablate takes no 'gain'; it takes: sites, gate, steps, layers, heads." in said
  assert "split='test', wanted one of id, ood, heldout" in said
  assert "cases=0, wanted at least 1" in said


def test_nothing_is_multiplied_twice():
  with pytest.raises(ValueError, match=r"tasks=\('pick', 'pick'\), wanted at least one, and none"):
    made(tasks=("pick", "pick"))
  with pytest.raises(ValueError, match=r"seeds=\(0, 3, 0\), wanted different numbers"):
    made(seeds=(0, 3, 0))
  assert made(seeds=(0, runs.STRIDE - 1)).width == 4
  with pytest.raises(ValueError, match=r"seed 10000, wanted one in 0\.\.9999: the noise of case i"):
    made(seeds=(0, runs.STRIDE))


BAD_EDITS = {
  "no mode": (
    {"edit": "noise_at"},
    "edits.bad: noise_at needs mode, of replace, add, add_sigma, renoise.",
  ),
  "no sites": ({"edit": "ablate"}, "edits.bad: ablate needs sites, of resid_pre, attn_out,"),
  "a gain that is not finite": (
    {"edit": "noise_at", "mode": "add", "gain": math.nan},
    "edits.bad: gain=nan, wanted a finite number.",
  ),
  "one step of a gain that is not finite": (
    {"edit": "noise_at", "mode": "add", "gain": (1.0, math.inf, 1.0)},
    "edits.bad: gain=(1.0, inf, 1.0), wanted a finite number.",
  ),
  "a gain over float32": (
    {"edit": "noise_at", "mode": "add", "gain": 1e39},
    "edits.bad: gain=1e+39, wanted a finite number.",
  ),
  "a gate that is no number": (
    {"edit": "ablate", "sites": ("attn_out",), "gate": {}},
    "edits.bad: gate={}, wanted a finite number.",
  ),
  "an amount in words": (
    {"edit": "ensemble_runs", "amount": "half"},
    "edits.bad: amount='half', wanted a finite number.",
  ),
  "a place that is one number": (
    {"edit": "noise_at", "mode": "add", "steps": 1},
    "edits.bad: steps=1, wanted (from, to).",
  ),
  "sites that are no words": (
    {"edit": "ablate", "sites": 3},
    "edits.bad: sites=3, wanted some of resid_pre, attn_out,",
  ),
}


@pytest.mark.parametrize("fault", list(BAD_EDITS))
def test_an_edit_with_bad_arguments_is_one_sentence(fault):
  said, wanted = BAD_EDITS[fault]
  with pytest.raises(ValueError) as refused:
    made({"bad": said})
  assert wanted in str(refused.value)


def test_a_gain_may_be_one_for_each_step():
  said = {"edit": "noise_at", "mode": "add", "gain": (0.5, 0.0, 2.0)}
  assert factors.faults_of(said) == []


def test_an_edit_that_the_model_has_no_place_for_is_told_before_anything_is_run():
  deep = {"edit": "ablate", "sites": ("attn_out",), "layers": (20, 30)}
  with pytest.raises(ValueError, match=r"edits\.deep: layers=20:30 leaves 0\.\.11: cut it to 12"):
    made({"none": {"edit": "none"}, "deep": deep})
  with pytest.raises(ValueError, match=r"edits\.mean: an ensemble of 1 seed"):
    made({"mean": ENSEMBLE}, seeds=1)


def test_heads_are_ablated_by_their_span_and_refused_where_there_are_none():
  sizes = Sizes(S=3, R=4, G=2, L=8, F=5, H=8, W=8, C=16, T=80, D=128, N=4)
  schedule = schedules.build(steps=3, freq_dim=16)
  said = {"edit": "ablate", "sites": ("attn_heads",), "layers": (2, 3), "heads": (1, 3)}
  edit = factors.edit_for(said, sizes, schedule, seeds=2)
  assert edit is not None and edit.heads is not None
  np.testing.assert_array_equal(edit.heads[:, 2], np.tile([False, True, True, False], (3, 4, 1)))
  with pytest.raises(ValueError, match=r"edits\.deep: heads=20:30 leaves 0\.\.3: cut it to 4"):
    made({"deep": {**said, "heads": (20, 30)}})
  with pytest.raises(
    ValueError, match=r"edits\.out: heads are named and there are none at attn_out"
  ):
    made({"out": {**said, "sites": ("attn_out",)}})


def test_units_hold_whole_cases_and_are_all_of_one_size():
  assert made(unit=5).width == 4
  assert made(cases=3, unit=8).width == 6  # 6 cases in threes
  assert made({"mean": ENSEMBLE}, unit=1).width == 2


def test_the_shipped_sweeps_are_what_they_say():
  seeds = cli.load_config("seeds_mini").to_dict()
  assert len(seeds["tasks"]) * seeds["cases"] * seeds["seeds"] == 1024
  assert seeds["steps"] == 10
  assert set(cli.load_config("vbvr_ensemble").to_dict()["edits"]) == {
    "none",
    "block_update",
    "guess",
    "latents",
  }


def test_looking_at_a_sweep_asks_for_no_device(done):
  command = [sys.executable, "-m", "jax_videoreason", "sweep", "--status", str(done)]
  there_are_none = {**os.environ, "JAX_PLATFORMS": "nosuch"}
  said = subprocess.run(command, env=there_are_none, capture_output=True, text=True, check=False)
  assert "finished, 2 of 2 units" in said.stdout, said.stderr


# Faults of the real command


def start(out: Path, cache: Path) -> subprocess.Popen:
  environment = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "",
  }
  return subprocess.Popen(
    [sys.executable, "-m", "jax_videoreason", "sweep", *WORDS, "--config.unit=2", f"--out={out}"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  )


KILLS = 20


@pytest.mark.slow
def test_killed_at_random_moments_the_command_ends_with_the_same_table(tmp_path):
  cache = tmp_path / "cache"
  began = time.monotonic()
  assert start(tmp_path / "whole", cache).wait() == 0
  began = time.monotonic()
  assert start(tmp_path / "again", cache).wait() == 0
  taken = time.monotonic() - began
  wanted = (tmp_path / "whole" / "table.parquet").read_bytes()
  assert (tmp_path / "again" / "table.parquet").read_bytes() == wanted
  drawn, kills, folder = random.Random(0), 0, 0
  while kills < KILLS:
    out = tmp_path / str(folder)
    process = start(out, cache)
    time.sleep(drawn.uniform(0.2, 0.9) * taken)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode == -signal.SIGKILL:
      kills += 1
    else:  # it was over before that moment: the rest of the kills meets a new folder
      assert process.returncode == 0
      folder += 1
    if kills == KILLS or process.returncode == 0:
      assert start(out, cache).wait() == 0
      assert (out / "table.parquet").read_bytes() == wanted
      assert sweep.status(out).events == []


def two(out: Path, number: int, port: int, *words: str, devices: int = 2) -> subprocess.Popen:
  environment = {
    **os.environ,
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(number),
  }
  return subprocess.Popen(
    [sys.executable, "-m", "jax_videoreason", "sweep", *WORDS, f"--out={out}", *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  )


@pytest.mark.slow
def test_one_model_over_two_processes_does_all_units_as_one_share(done, tmp_path):
  out, mesh = tmp_path / "over", "--config.mesh=fsdp=2,context=2"
  shutil.copytree(done, out)
  (out / "manifest.json").unlink()
  (out / "units" / "00001.json").unlink()  # both must find the same unit left
  for folder in (out, tmp_path / "new"):
    port = helpers.free_port()
    both = [two(folder, number, port, mesh) for number in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    ours, wanted = open_sweep(folder), open_sweep(done)
    for name in ("run", "answer", "answers", "flips", "commitment"):
      assert ours.column(name).tolist() == wanted.column(name).tolist()
    np.testing.assert_allclose(ours.column("score"), wanted.column("score"), atol=1e-5)
    latents, same = (found.of("final_latents") for found in (ours, wanted))
    assert np.linalg.norm(latents - same) < 1e-4 * np.linalg.norm(same)
    made = json.loads((folder / "manifest.json").read_text())
    assert made["processes"] == 2
    assert '"count": 4' in made["layouts"][made["layout_of_unit"][1]]
    assert "8/8" in said[0][1]
    assert "share" not in said[0][1]
    assert "units" not in said[1][0]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "width"), [(2, 4), (1, 1)])
def test_two_processes_share_the_units_and_answer_as_one(done, tmp_path, devices, width):
  port, words = helpers.free_port(), (f"--config.unit={width}",)
  both = [two(tmp_path / "two", n, port, *words, devices=devices) for n in range(2)]
  said = [process.communicate(timeout=300) for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  ours, wanted = open_sweep(tmp_path / "two"), open_sweep(done)
  for name in ("run", "answer", "flips", "commitment"):
    assert ours.column(name).tolist() == wanted.column(name).tolist()
  np.testing.assert_allclose(ours.column("score"), wanted.column("score"), atol=1e-5)
  units = TOTAL // width
  assert f"{units} of {units} units" in said[0][0]
  part = json.loads((tmp_path / "two" / "units" / "00000.json").read_text())
  assert part["lanes"] == (1 if devices == 2 else min(lanes.cores(), units // 2))
  assert "share 1 of 2" in said[0][1] and "4/4" in said[0][1]
  assert "units" not in said[1][0]  # only the first process speaks


@pytest.mark.slow
def test_when_a_process_dies_the_other_ends_soon_and_the_restart_goes_on(done, tmp_path):
  port, out = helpers.free_port(), tmp_path / "dies"
  first, second = (two(out, number, port, "--config.unit=2") for number in range(2))
  while not list(out.glob("units/0*.json")):
    assert first.poll() is None
    time.sleep(0.005)
  second.send_signal(signal.SIGKILL)
  second.communicate()
  began = time.monotonic()
  _, said = first.communicate(timeout=120)
  assert time.monotonic() - began < 60
  assert first.returncode != 0
  assert "another task died" in said or "If another one has ended, the output of" in said
  kept = {path: path.stat().st_mtime_ns for path in out.glob("units/0*.json")}
  assert 0 < len(kept) < 4
  assert call(out, "--config.unit=2") == 0
  assert all(path.stat().st_mtime_ns == time_ for path, time_ in kept.items())
  ours, wanted = open_sweep(out), open_sweep(done)
  assert ours.column("answer").tolist() == wanted.column("answer").tolist()


def test_units_side_by_side_on_a_cpu_leave_the_same_to_the_last_bit(tmp_path, monkeypatch):
  of = made(unit=1, cases=1, tasks=("maze", "rotate", "tree_reach"))
  compute, tables = product.compute, []
  for number in (1, 3):
    together = threading.Barrier(number, timeout=120)
    monkeypatch.setattr(lanes, "cores", lambda number=number: number)
    monkeypatch.setattr(
      product,
      "compute",
      lambda bench, unit, together=together: together.wait() >= 0 and compute(bench, unit),
    )
    product.perform(tmp_path / str(number), of, mesh=None)
    found = open_sweep(tmp_path / str(number))
    tables.append((found.rows, found.of("final_latents").tobytes()))
    unit = json.loads((tmp_path / str(number) / "units" / "00001.json").read_text())
    assert unit["lanes"] == number
  assert of.units == 6
  assert tables[0] == tables[1]


def test_units_lie_side_by_side_where_they_are_small_and_a_cpu_is_one_device(monkeypatch):
  monkeypatch.setattr(lanes, "cores", lambda: 4)
  of = made()
  assert product.lanes_for(of, None) == 4
  assert product.lanes_for(of, product.mesh_for(of, jax.devices()[:2])) == 1
  assert product.lanes_for(made(unit=1000, cases=64, seeds=16), None) == 1  # 2,048 runs
  monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="gpu")])
  assert product.lanes_for(of, None) == 1


def test_devices_are_used_as_far_as_they_divide_a_unit():
  of = made()
  assert product.mesh_for(of, jax.devices()[:1]) is None
  found = product.mesh_for(of, jax.devices()[:3])
  assert found is not None
  assert found.shape["seed"] == 2
  wide = product.mesh_for(made(mesh="seed=2,context=2"), jax.devices())
  assert wide is not None
  assert tuple(wide.shape.values()) == (2, 1, 2)
  with pytest.raises(ValueError, match="units of 4 runs on seed=3, wanted seeds that divide"):
    product.mesh_for(made(mesh="seed=3"), jax.devices())


def test_a_mesh_of_more_devices_than_a_process_has_lies_on_those_of_all(monkeypatch):
  here, everywhere = jax.devices()[:2], jax.devices()
  over = product.mesh_for(made(mesh="fsdp=2,context=2"), here, everywhere)
  assert over is not None
  assert list(over.devices.flat) == everywhere
  own = product.mesh_for(made(mesh="fsdp=2"), here, everywhere)
  assert own is not None
  assert list(own.devices.flat) == here
  for axes, said in (("fsdp=3", "takes 3 devices, .* the 2 of this process or all 4"),
                     ("fsdp=8", "takes 8 devices, .* or all 4")):  # fmt: skip
    with pytest.raises(ValueError, match=said):
      product.mesh_for(made(mesh=axes), here, everywhere)
  assert product.shares(5, (1, 2), own) == ((1, 2), range(1, 5, 2))
  monkeypatch.setattr(distributed, "spans", lambda mesh: mesh is over)
  assert product.shares(5, (1, 2), over) == ((0, 1), range(5))
