"""VBVR-Bench: what is asked, what it costs, who scores it, and what must never be reported."""

import base64
import concurrent.futures
import dataclasses
import json
import re
import shutil
import time
from pathlib import Path

import av
import numpy as np
import pytest

import helpers
import vbvr_folder
from jax_videoreason import cli, costs, folders, media, plan, records, settings, tasks
from jax_videoreason.configs import common
from jax_videoreason.structs import Card, LatentSpec
from jax_videoreason.vbvr import (
  audit,
  baselines,
  evalkit,
  generate,
  jobs,
  layout,
  samples,
  scores,
  suite,
  videos,
)
from vbvr_folder import COUNT, GRID, MAZE, SHELF

WAN = LatentSpec(channels=16, stride=(4, 8, 8))
OFFICIAL_RUN = settings.from_config(
  {
    "checkpoint": "ckpt/vbvr_wan22",
    "frames": 81,
    "height": 480,
    "width": 832,
    "boundary": 0.875,
    "negative_prompt": "still",
    "tiles": "diffsynth",
  }
)


def call(*words) -> int:
  return cli.main(["vbvr", *map(str, words)])


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Path:
  """Two samples each of an in-domain and an out-of-domain task, 64 pixels, 5 and 6 frames."""
  return vbvr_folder.make(tmp_path_factory.mktemp("data") / "VBVR-Bench")


@pytest.fixture
def copy(bench, tmp_path) -> Path:
  return Path(shutil.copytree(bench, tmp_path / "VBVR-Bench"))


@pytest.fixture(scope="session")
def own_cases(tmp_path_factory) -> Path:
  """Cases of two tasks of ours, as `tasks export` writes them."""
  return helpers.export_cases(tmp_path_factory.mktemp("data") / "cases", "pick,maze", 2)


@pytest.fixture(scope="session")
def own_videos(own_cases, tmp_path_factory) -> Path:
  """Videos of the model that ships for these cases, after 2 steps."""
  out = tmp_path_factory.mktemp("videos")
  assert call("generate", f"--data={own_cases}", "--config.steps=2", f"--out={out}") == 0
  return out


@pytest.fixture
def kit(tmp_path, monkeypatch) -> list[str]:
  """The flags for a stand-in of the EvalKit."""
  path, environment = vbvr_folder.make_evalkit(tmp_path)
  monkeypatch.setattr(evalkit, "PINS", {"numpy": np.__version__})
  monkeypatch.setattr(evalkit, "DIGEST", evalkit.digest_of(path))
  return [f"--evalkit={path}", f"--environment={environment}", "--workers=2"]


@pytest.fixture
def clips(bench, tmp_path) -> Path:
  """Folders of videos: the ground truth and a clip that stands still."""
  baselines.write(tmp_path / "clips", samples.load(bench), ["truth", "static"])
  return tmp_path / "clips"


def kit_of(path: Path) -> evalkit.EvalKit:
  return evalkit.EvalKit(path=path, python=path, digest="", known=True, versions={})


def result_of(folder: Path) -> dict:
  return json.loads((folder / "result.json").read_text())


# The map of the benchmark


def test_the_benchmark_has_a_hundred_tasks_in_five_faculties():
  counts = {
    split: [
      sum(f == faculty for s, f in suite.OFFICIAL.values() if s == split)
      for faculty in suite.FACULTIES
    ]
    for split in suite.SPLITS
  }
  assert counts == {
    "In-Domain_50": [15, 9, 11, 8, 7],
    "Out-of-Domain_50": [8, 5, 19, 5, 13],
  }
  assert set(suite.OWN_FACULTIES) == set(tasks.TASKS)
  assert set(suite.OWN_FACULTIES.values()) == set(suite.FACULTIES)


# Reading what is asked


def test_the_official_folders_are_read(bench):
  data = samples.load(bench)
  assert [s.key for s in data.samples] == [
    f"{split}/{task}/{index:05d}"
    for split, task in (("In-Domain_50", GRID), ("Out-of-Domain_50", MAZE))
    for index in (0, 1)
  ]
  first, second = data.samples[:2]
  assert (first.height, first.width, first.frames, second.frames) == (64, 64, 5, 6)
  assert first.prompt.startswith("Move the pink disc")
  np.testing.assert_array_equal(first.first(), media.read_image(first.folder / "first_frame.png"))
  assert first.truth().shape == (5, 64, 64, 3)
  assert (data.name, data.whole, len(data.absent)) == ("VBVR-Bench", False, 98)


def test_the_file_with_everything_inside_asks_the_same(copy):
  folders = samples.load(copy)
  entries = []
  for sample in folders.samples:
    picture = (sample.folder / "first_frame.png").read_bytes()
    entries.append(
      {
        "prompt": sample.prompt,
        "first_image": base64.b64encode(picture).decode(),
        "first_frame_path": f"{sample.key}/first_frame.png",
        "ground_truth_video_path": f"VBVR-Bench/{sample.key}/ground_truth.mp4",
      }
    )
    for name in ("prompt.txt", "first_frame.png", "final_frame.png"):
      (sample.folder / name).unlink()
  vbvr_folder.write_index(copy, entries)
  listed = samples.load(copy)
  assert listed.mark == folders.mark
  assert listed.samples[0].first().shape == (64, 64, 3)
  with pytest.raises(ValueError, match="download the folders too"):
    scores.score(copy / "out", listed, {"a": copy}, kit_of(copy))


def test_scores_are_put_into_no_folder_of_another_kind(copy, tmp_path):
  out = tmp_path / "sweep"
  out.mkdir()
  (out / "sweep.json").touch()
  with pytest.raises(ValueError, match="holds a sweep, which no set of scores replaces"):
    scores.score(out, samples.load(copy), {}, kit_of(copy))
  assert [path.name for path in out.iterdir()] == ["sweep.json"]


def test_the_pro_benchmark_brings_metadata(copy):
  for sample in samples.load(copy).samples:
    (sample.folder / "metadata.json").write_text('{"parameters": {"cells": 5}}')
  data = samples.load(copy)
  assert data.name == "VBVR-Pro-Bench"
  assert data.samples[0].metadata == {"parameters": {"cells": 5}}


@pytest.mark.parametrize("word", ["score", "audit"])
def test_the_pro_benchmark_is_refused_before_any_clip_is_written(copy, clips, kit, tmp_path, word):
  sample = samples.load(copy).samples[0]
  (sample.folder / "metadata.json").write_text('{"parameters": {"cells": 5}}')
  out = tmp_path / "out"
  more = [f"--videos={clips / 'truth'}"] if word == "score" else []
  words = [f"--data={copy}", f"--out={out}", "--other-evalkit", "--allow-partial"]
  assert call(word, *words, *more, *kit) == 2
  assert not out.exists()
  with pytest.raises(ValueError, match=f"{sample.key}: .*are of VBVR-Pro-Bench, .*_video.py"):
    scores.scorable(samples.load(copy))


def test_own_cases_are_read_from_the_same_layout(own_cases):
  data = samples.load(own_cases)
  assert data.name == "own tasks"
  assert [s.key for s in data.samples] == [
    f"id/{t}/{i:05d}" for t in ("maze", "pick") for i in (0, 1)
  ]
  case = tasks.load("maze", size=32).generate("id", 0)
  np.testing.assert_array_equal(data.samples[0].truth(), case.frames)


@pytest.mark.parametrize(
  ("chosen", "count"),
  [
    ({"splits": ["out-of-domain"]}, 2),
    ({"splits": ["In-Domain_50"]}, 2),
    ({"names": ["O-39"]}, 2),
    ({"names": ["O-39_maze", GRID]}, 4),
    ({"cases": 1}, 2),
  ],
)
def test_a_part_can_be_chosen(bench, chosen, count):
  data = samples.load(bench, **chosen)
  assert len(data.samples) == count and data.part and not data.whole


def spoil(folder: Path, name: str, content: bytes | None) -> None:
  (folder / name).unlink()
  if content is not None:
    (folder / name).write_bytes(content)


def to_link(folder: Path) -> None:
  outside = folder.parents[3] / "outside"
  shutil.move(folder, outside)
  folder.symlink_to(outside)


def other_size(folder: Path) -> None:
  media.write_png(folder / "first_frame.png", np.zeros((32, 64, 3), np.uint8))


FAULTS = {
  "prompt that is not UTF-8": (
    lambda f: spoil(f, "prompt.txt", b"draw \xff"), r"prompt\.txt is not UTF-8 \(byte 5\)"),
  "empty prompt": (lambda f: spoil(f, "prompt.txt", b"\n"), "the prompt of .*00001 is empty"),
  "no prompt": (lambda f: spoil(f, "prompt.txt", None), r"00001 lacks prompt\.txt"),
  "no first frame": (lambda f: spoil(f, "first_frame.png", None), r"lacks first_frame\.png"),
  "truth that is no video": (
    lambda f: spoil(f, "ground_truth.mp4", b"hello"), r"truth\.mp4 is (missing or )?damaged"),
  "no truth": (lambda f: spoil(f, "ground_truth.mp4", None), r"lacks ground_truth\.mp4"),
  "picture that is no picture": (
    lambda f: spoil(f, "first_frame.png", b"hello"), r"first_frame\.png is damaged"),
  "sizes that differ": (other_size, "is 64 x 64 pixels and first_frame.png 64 x 32, wanted one"),
  "folder that is a link": (to_link, "leads out of .* --local-dir"),
  "file that is a link": (
    lambda f: (spoil(f, "prompt.txt", None), (f / "prompt.txt").symlink_to("/etc/hostname")),
    "leads out of .*"),
  "strange task": (
    lambda f: f.parent.rename(f.parent.with_name("G-18_grid_path_data-generator")),
    f"is no task of VBVR-Bench .did you mean '{GRID}'"),
  "task of the other split": (
    lambda f: f.parent.rename(f.parents[2] / "Out-of-Domain_50" / f.parent.name),
    f"Out-of-Domain_50/{GRID} is no task of VBVR-Bench"),
  "strange split": (
    lambda f: f.parents[1].rename(f.parents[2] / "Test"), "Test/G-18.* is no task"),
  "name with a space": (
    lambda f: f.parent.rename(f.parent.with_name("G 18")), "wanted letters, digits"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_bad_data_is_named_before_anything_runs(copy, capsys, kind):
  make, said = FAULTS[kind]
  make(copy / "In-Domain_50" / GRID / "00001")
  out = copy.parent / "out"
  assert call("generate", f"--data={copy}", f"--out={out}") == 2
  assert re.search(said, capsys.readouterr().err)
  assert not out.exists()


@pytest.mark.parametrize(
  ("path", "said"),
  [
    ("../../In-Domain_50/G-1/00000/ground_truth.mp4", "inside the folder"),
    ("/etc/In-Domain_50/G-1/00000/ground_truth.mp4", "inside the folder"),
    ("In-Domain_50/G-1/zero/ground_truth.mp4", "wanted SPLIT/TASK/00000"),
    (f"In-Domain_50/{GRID}/00007/ground_truth.mp4", "00007 lacks ground_truth"),
  ],
)
def test_entries_that_lead_elsewhere_are_refused(copy, path, said):
  vbvr_folder.write_index(copy, [{"prompt": "x", "ground_truth_video_path": path}])
  with pytest.raises(ValueError, match=said):
    samples.load(copy)


def test_a_damaged_list_of_the_benchmark_is_to_be_copied_again(tmp_path):
  (tmp_path / "VBVR-Bench.json").write_text("{")
  with pytest.raises(ValueError, match=r"VBVR-Bench\.json is damaged .*: copy the benchmark again"):
    samples.load(tmp_path)


def test_a_sample_that_is_listed_twice_is_refused(copy):
  path = f"In-Domain_50/{GRID}/00000/ground_truth.mp4"
  entries = [{"prompt": word, "ground_truth_video_path": path} for word in ("one", "two")]
  vbvr_folder.write_index(copy, entries)
  with pytest.raises(ValueError, match=f"lists In-Domain_50/{GRID}/00000 twice"):
    samples.load(copy)


def test_a_byte_order_mark_is_no_part_of_a_prompt(copy):
  asked = samples.load(copy)
  for sample in asked.samples:
    (sample.folder / "prompt.txt").write_text(sample.prompt, encoding="utf-8-sig")
  assert samples.load(copy).mark == asked.mark
  assert next(iter(layout.read(copy))).prompt == asked.samples[0].prompt


def test_two_versions_of_a_prompt_are_refused(copy):
  path = f"In-Domain_50/{GRID}/00000/ground_truth.mp4"
  vbvr_folder.write_index(copy, [{"prompt": "another", "ground_truth_video_path": path}])
  with pytest.raises(ValueError, match="different versions of the benchmark"):
    samples.load(copy)


@pytest.mark.parametrize(
  ("chosen", "said"),
  [
    ({"names": ["O-93"]}, "no task 'O-93' in the data"),
    ({"splits": ["in"]}, "no split 'in' in the data"),
  ],
)
def test_a_wrong_choice_is_answered_with_the_right_ones(bench, chosen, said):
  with pytest.raises(ValueError, match=said):
    samples.load(bench, **chosen)


def test_an_empty_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match="holds no sample"):
    samples.load(tmp_path)


# Shapes, price, how official


def asked_of(bench: Path, height=1024, width=1024, frames=85) -> samples.Data:
  """Samples of another size, without their files."""
  data = samples.load(bench)
  changed = [vbvr_folder.replaced(s, height, width, frames) for s in data.samples]
  return samples.Data(
    root=data.root, name=data.name, samples=tuple(changed), absent=(), whole=False, part=False
  )


@pytest.mark.parametrize(
  ("height", "width", "frames", "job", "shape"),
  [
    (1024, 1024, 85, {}, (85, 1024, 1024)),
    (1024, 1024, 22, {}, (25, 1024, 1024)),
    (1000, 1024, 81, {}, (81, 1008, 1024)),
    (1024, 1024, 85, {"max_area": 256 * 256}, (85, 256, 256)),
    (256, 256, 85, {"max_area": 1024 * 1024}, (85, 256, 256)),
    (1024, 1024, 85, {"frames": 33}, (33, 1024, 1024)),
  ],
)
def test_a_video_is_made_in_the_shape_of_its_truth(bench, height, width, frames, job, shape):
  sample = asked_of(bench, height, width, frames).samples[0]
  made = jobs.shape_of(sample, WAN, jobs.Job(**job))
  assert (made.frames, made.height, made.width) == shape


def test_the_official_setting_costs_what_it_costs(bench):
  """1024 x 1024 at 85 frames is T = 90,112 tokens: 885 PFLOP a video, 270 hours for 500."""
  data = asked_of(bench)
  assert jobs.tokens(WAN, jobs.Shape(frames=85, height=1024, width=1024)) == 90_112
  (price,) = jobs.work(OFFICIAL_RUN, data, jobs.Job())
  assert (price.videos, price.evaluations) == (4, 4 * 50 * 2)
  (filled,) = jobs.work(OFFICIAL_RUN, data, jobs.Job(), seats=3)  # each alone in its unit
  assert (filled.videos, filled.evaluations) == (4, 3 * price.evaluations)
  assert not price.problem.spec.latents  # of every step: `generate` does not keep them
  assert not price.problem.spec.x0
  (shown,) = jobs.work(OFFICIAL_RUN, data, jobs.Job(steps=(3,)))
  assert shown.problem.spec.x0
  assert price.flops / 4 == pytest.approx(885e15, rel=2e-3)
  (three,) = jobs.work(OFFICIAL_RUN, data, jobs.Job(ensemble="paper"))
  assert three.flops / price.flops == pytest.approx(52 / 50)
  assert three.problem.runs == 3 * price.problem.runs  # the members ride together
  (half,) = jobs.work(OFFICIAL_RUN, data, jobs.Job(part=(1, 2)))
  assert half.videos == 2
  (all_of_it,) = jobs.official()
  assert all_of_it.videos == 500
  assert " 270.1 h on gpu:141GB at 46% " in costs.totals([all_of_it], plan.target("gpu:141GB"))


def test_a_plan_counts_the_guesses_that_answers_are_read_from(own_cases):
  chosen = dataclasses.replace(OFFICIAL_RUN, checkpoint="mini", solver="euler", boundary=None)
  (price,) = jobs.work(chosen, samples.load(own_cases), jobs.Job())
  assert price.problem.spec.x0


def test_only_the_official_setting_is_called_so(bench):
  data = samples.load(bench)
  card = Card(
    name="x", family="wan21", latents=WAN, text_length=512, boundary=0.875, numerics="diffsynth"
  )
  run = dataclasses.replace(OFFICIAL_RUN, negative_prompt=common.NEGATIVE_PROMPT)
  assert jobs.deviations(run, data, jobs.Job(), 1, card) == []
  bare = dataclasses.replace(run, boundary=None)  # the bundle's own
  assert jobs.deviations(bare, data, jobs.Job(), 1, card) == []
  few = settings.from_config({"checkpoint": "x", "frames": 5, "height": 8, "width": 8, "steps": 4})
  other = dataclasses.replace(card, boundary=0.9, numerics="official")
  said = "; ".join(jobs.deviations(few, data, jobs.Job(max_area=64, frames=5), 2, other))
  for words in (
    "at most 64 pixels",
    "5 frames, official",
    "steps 4, official 50",
    "seed 2",
    "boundary 0.9, official 0.875",
    "no negative prompt",
    "of Wan's own code",
  ):
    assert words in said
  another = jobs.deviations(OFFICIAL_RUN, data, jobs.Job(), 1, card)
  assert another == ["another negative prompt, official that of Wan"]


def test_samples_of_one_shape_share_a_batch(bench):
  made = jobs.units(samples.load(bench), WAN, jobs.Job(seeds=(1, 2)), None)
  shapes = [(u.seed, u.shape.frames, [s.key[-5:] for s in u.samples]) for u in made]
  assert shapes == [
    (seed, frames, [index] * 2) for seed in (1, 2) for frames, index in ((5, "00000"), (9, "00001"))
  ]
  assert all(len(u.samples) == 1 for u in jobs.units(asked_of(bench), WAN, jobs.Job(), None))


# What is written


def clip_of(size: int, frames: int = 30) -> np.ndarray:
  """The synthetic maze, over which a disc moves: static regions, flat colours, thin lines."""
  return np.stack([vbvr_folder.maze(size, 0, t / (frames - 1)) for t in range(frames)])


@pytest.mark.parametrize("size", [64, 128, 256])
def test_an_exported_video_read_back_is_the_one_given(bench, tmp_path, size):
  frames = clip_of(size)
  sample = vbvr_folder.replaced(samples.load(bench).samples[0], size, size, len(frames))
  videos.put(tmp_path, sample, frames)
  back, rate = media.read_mp4(videos.place(tmp_path, sample))
  assert back.shape == frames.shape and rate == 16
  error = np.abs(back.astype(int) - frames)
  assert error.mean() <= 6
  still = (frames == frames[:1]).all((0, 3))
  for axis in (0, 1):  # 2x2 pixels share their colour: a region that nothing touches
    still = np.all([np.roll(still, move, axis) for move in range(-2, 3)], axis=0)
  drift = np.abs(back[:, still].astype(int) - back[:1, still].astype(int))
  assert still.mean() > 0.5 and drift.mean((1, 2)).max() <= 2
  flat = still  # what has its own colour for 4 pixels around, all the time
  for axis in (0, 1):
    equal = [(np.roll(frames, move, axis + 1) == frames).all((0, 3)) for move in range(-4, 5)]
    flat = np.all([e & np.roll(flat, m, axis) for m, e in zip(range(-4, 5), equal, strict=True)], 0)
  assert len(np.unique(frames[0, flat], axis=0)) >= (2 if size > 64 else 1)
  assert error[:, flat].max() <= 12


def test_a_clip_of_another_shape_is_brought_to_that_of_the_truth(bench, tmp_path):
  sample = vbvr_folder.replaced(samples.load(bench).samples[0], 64, 64, 10)
  small = clip_of(32, 13)
  videos.put(tmp_path, sample, small, seed=1)
  back = videos.read(tmp_path, sample)
  assert back.shape == (10, 64, 64, 3)
  for row, source in ((0, 0), (-1, -1)):
    large = small[source].repeat(2, 0).repeat(2, 1)
    assert np.abs(back[row].astype(int) - large).mean() <= 6
  record = videos.record_of(tmp_path, sample)
  assert record is not None and record["seed"] == 1


def test_small_videos_are_read_back_at_their_own_size(own_cases, tmp_path):
  sample = samples.load(own_cases).samples[0]
  videos.put(tmp_path, sample, sample.truth())
  assert media.read_mp4(videos.place(tmp_path, sample))[0].shape == (17, 64, 64, 3)
  assert scores.own_score(sample, tmp_path)["score"] >= 0.95


def test_baselines_are_what_they_say(bench):
  sample = samples.load(bench).samples[1]
  truth = sample.truth().astype(int)
  made = {name: clip(sample).astype(int) for name, (clip, _) in baselines.CLIPS.items()}
  assert {clip.shape for clip in made.values()} == {(6, 64, 64, 3)}
  assert (made["static"] == sample.first()).all()
  assert (made["cut"][:3] == sample.first()).all() and (made["cut"][3:] == truth[-1]).all()
  assert (made["cross-fade"][0] == sample.first()).all()
  assert (made["cross-fade"][-1] == truth[-1]).all()
  assert (made["truth"] == truth).all()
  assert made["noise"].std() > 60 and (made["noise"] == baselines.noise(sample)).all()


# The whole way, on our own tasks, with the model that ships


@pytest.mark.slow
def test_own_tasks_go_the_whole_way_with_the_model_that_ships(
  own_cases, own_videos, tmp_path, capsys
):
  out, made = tmp_path / "scores", tmp_path / "table"
  words = [f"--data={own_cases}", f"--videos={own_videos}", f"--out={out}"]
  assert call("score", *words, "--beside=static,cut,truth") == 0
  assert call("table", out, f"--out={made}") == 0
  found = json.loads((made / "table.json").read_text())
  rows = {row["name"]: row["scores"]["overall"]["estimate"] for row in found["systems"]}
  assert list(rows) == ["mini", "static", "cut", "truth"]
  assert rows["truth"] >= 0.95 and rows["static"] <= 0.1 and rows["cut"] <= 0.55
  assert {row["faculty"] for row in found["by_task"]} == {"Perception", "Spatiality"}
  assert [f"{d['a']} - {d['b']}" for d in found["differences"]] == [
    "mini - static", "mini - cut", "mini - truth"
  ]  # fmt: skip
  assert found["published"] == []
  page = (made / "report.html").read_text()
  assert page.count("data:image/png;base64,") == 2 * 4  # truth, mini, static, cut of two tasks
  assert "http" not in re.sub(r"data:[^\"]*", "", page)
  assert r"\begin{tabular}" in (made / "table.tex").read_text()
  said = capsys.readouterr().out
  assert "own tasks, 4 samples of 2 tasks; scorers of jax_videoreason" in said


@pytest.mark.slow
def test_answers_at_every_step_are_kept_for_own_tasks(own_cases, own_videos):
  for sample in samples.load(own_cases).samples:
    record = videos.record_of(own_videos / "mini", sample)
    assert record is not None and record["finite"] and record["truth"] == sample.truth_mark
    said = record["answers"]
    assert len(said["answer"]) == len(said["sigma"]) == len(said["right"]) == 2
    assert said["sigma"][0] == 1


@pytest.mark.slow
def test_a_second_call_only_makes_what_lacks(own_cases, own_videos, tmp_path, monkeypatch):
  out = tmp_path / "videos"
  shutil.copytree(own_videos, out)
  gone = out / "mini" / "id" / "maze" / "00001.mp4"
  gone.unlink()
  made = []
  monkeypatch.setattr(generate, "make", lambda folder, bundle, chosen, job, unit, *_: made.append(
    [s.key for s in unit.samples]))  # fmt: skip
  monkeypatch.setattr(generate, "encode", lambda chosen, some, mesh: [None] * len(some))
  monkeypatch.setattr(generate, "load", lambda chosen, mesh, experts: None)
  words = [f"--data={own_cases}", "--config.steps=2", f"--out={out}"]
  assert call("generate", *words, "--config.batch=1") == 0
  assert made == [["id/maze/00001"]]


@pytest.mark.slow
def test_videos_of_other_settings_are_refused(own_cases, own_videos, capsys):
  words = [f"--data={own_cases}", f"--out={own_videos}"]
  assert call("generate", *words, "--config.steps=3") == 2
  assert "another set of videos (steps=2 there and 3 here)" in capsys.readouterr().err


def test_videos_of_unknown_settings_are_refused(own_cases, tmp_path, capsys):
  (tmp_path / "mini" / "id").mkdir(parents=True)
  assert call("generate", f"--data={own_cases}", "--config.steps=2", f"--out={tmp_path}") == 2
  assert "nobody knows how what is there was made" in capsys.readouterr().err


@pytest.mark.slow
def test_videos_of_other_data_are_refused(own_cases, own_videos, tmp_path, capsys):
  other = tmp_path / "cases"
  words = ["tasks", "export", "--tasks=pick,maze", "--split=ood", "--size=32", "--cases=2"]
  assert cli.main([*words, f"--out={other}"]) == 0
  shutil.copytree(own_videos / "mini", tmp_path / "mini")
  (tmp_path / "mini" / "id").rename(tmp_path / "mini" / "ood")
  (tmp_path / "mini" / "records" / "id").rename(tmp_path / "mini" / "records" / "ood")
  out = tmp_path / "scores"
  assert call("score", f"--data={other}", f"--videos={tmp_path / 'mini'}", f"--out={out}") == 2
  assert "was made for another ood/maze/00000" in capsys.readouterr().err


def test_the_price_is_said_before_it_is_paid(bench, capsys):
  assert call("generate", f"--data={bench}", "--config=vbvr_wan22", "--dry-run") == 0
  said = capsys.readouterr().out
  assert "98 tasks of the benchmark are not there" in said
  cost = said.partition("VBVR-Bench, 4 samples: ")[2]
  assert cost.startswith("400 network evaluations (4 videos)")
  planned = ["plan", "vbvr", "generate", f"--data={bench}", "--config=vbvr_wan22"]
  assert cli.main([*planned, "--on=gpu:141GB"]) == 0
  said = capsys.readouterr().out
  assert f"the whole command: {cost}" in said
  assert "5 x 64 x 64" in said and "9 x 64 x 64" in said  # a row for each shape
  assert cli.main([*planned, "--on=gpu:141GB", "--frames=81"]) == 0
  assert "81 frames" not in capsys.readouterr().out
  assert cli.main(["plan", "vbvr", "generate", "--on=cpu"]) == 2
  assert "--data must be given" in capsys.readouterr().err


def test_a_plan_fills_batches_up_as_generate_does(bench, capsys):
  words = ["plan", "vbvr", "generate", f"--data={bench}", "--config=mini:steps=3,batch=1"]
  assert cli.main([*words, "--on=gpu:80GBx2", "--mesh=seed=2"]) == 0
  said = capsys.readouterr().out
  assert "2 runs together" in said
  assert f"{4 * 2 * 3 * 2} network evaluations (4 videos)" in said  # units, seats, steps, branches


@pytest.mark.parametrize("word", ["plan", "generate"])
def test_an_ensemble_on_a_mesh_of_seeds_is_refused_by_its_plan_too(bench, word, capsys):
  words = [f"--data={bench}", "--config=mini:steps=3", "--ensemble=paper", "--mesh=seed=2"]
  of_word = ["plan", "vbvr", "generate", "--on=gpu:80GBx2"]
  if word == "generate":
    of_word = ["vbvr", "generate", "--dry-run"]
  assert cli.main([*of_word, *words]) == 2
  assert capsys.readouterr().err == (
    "videoreason: --ensemble mixes the runs of a sample on a mesh with seed=2: give a --mesh of "
    "fsdp and context.\n"
  )


def test_the_mesh_proposed_for_an_ensemble_is_one_that_generate_takes(bench, capsys):
  words = ["plan", "vbvr", "generate", f"--data={bench}", "--config=mini:steps=3"]
  said = []
  for more in ([], ["--ensemble=paper"]):
    assert cli.main([*words, "--on=gpu:80GBx2", *more]) == 0
    said.append(capsys.readouterr().out)
  assert "2 devices as seed=2," in said[0]
  assert "2 devices as seed=1," in said[1]


# The whole way, in the official layout, with a stand-in for the EvalKit


@pytest.mark.slow
def test_the_official_layout_goes_the_whole_way(bench, kit, tmp_path, capsys):
  """generate with settings that are marked, score by the toolkit, table beside published rows."""
  data = f"--data={bench}"
  words = ["--config.steps=2", "--frames=5", "--cases=1", "--ensemble=paper", "--keep-steps=1"]
  assert call("generate", data, *words, f"--out={tmp_path / 'videos'}") == 0
  assert "not the official setting: 5 frames, official those of the ground truth" in (
    capsys.readouterr().out
  )
  folder = tmp_path / "videos" / "mini-ensemble"
  assert (folder / "steps" / "Out-of-Domain_50" / MAZE / "00000" / "step_001.mp4").is_file()
  videos_of = f"--videos={tmp_path / 'videos'}"
  out = tmp_path / "scores"
  assert call("score", data, videos_of, f"--out={out}", "--cases=1", *kit) == 0
  said = capsys.readouterr().out
  assert "EvalKit run_evaluation.py, commit 275472f" in said
  assert "mini-ensemble: not the official setting" in said
  assert "published, of all 500 samples; not computed here" in said
  result = result_of(out / "mini-ensemble")
  assert [row["key"][-5:] for row in result["samples"]] == ["00000", "00000"]
  assert result["summary"]["overall"]["samples"] == 2
  assert result["evalkit"]["entry"] == "run_evaluation.py" and not result["whole"]


def test_the_truth_gets_its_score_and_the_static_clip_its_own(bench, clips, kit, tmp_path):
  out = tmp_path / "scores"
  assert (
    call("score", f"--data={bench}", f"--videos={clips}", f"--out={out}", "--beside=", *kit) == 0
  )
  of = {name: result_of(out / name)["summary"]["overall"]["score"] for name in ("truth", "static")}
  assert 1 > of["truth"] > of["static"] > 0


def scored(bench, clips, kit, out, *words) -> int:
  videos_of = f"--videos={clips / 'truth'}"
  return call("score", f"--data={bench}", videos_of, f"--out={out}", "--beside=", *kit, *words)


def test_nothing_is_reported_unless_every_video_is_there(bench, clips, kit, tmp_path, capsys):
  (clips / "truth" / "In-Domain_50" / GRID / "00001.mp4").unlink()
  out = tmp_path / "scores"
  assert scored(bench, clips, kit, out) == 2
  assert f"lacks 1 of 4 videos (In-Domain_50/{GRID}/00001)" in capsys.readouterr().err
  assert not (out / "truth" / "result.json").exists()
  assert scored(bench, clips, kit, out, "--allow-partial") == 0
  said = capsys.readouterr().out
  assert f"truth: In-Domain_50/{GRID}/00001 has no video." in said
  assert result_of(out / "truth")["summary"]["overall"]["samples"] == 3


def troubled(tmp_path: Path, word: str, count: int = 2) -> tuple[Path, Path]:
  """(data, clips) of some samples; the word makes the evaluator of the last one misbehave."""
  data = vbvr_folder.make(tmp_path / "data", tasks=(GRID,), count=count)
  (data / "In-Domain_50" / GRID / f"{count - 1:05d}" / "prompt.txt").write_text(f"please {word}")
  baselines.write(tmp_path / "clips", samples.load(data), ["truth"])
  return data, tmp_path / "clips"


@pytest.mark.parametrize(
  ("word", "count", "limit", "said"),
  [
    ("RAISE", 2, 300, "the evaluator raised: index 4"),
    ("HANG", 1, 2, "no answer within 2 seconds"),  # alone: on a busy machine all take long
  ],
)
def test_an_evaluator_that_raises_or_hangs_is_named(
  kit, tmp_path, capsys, word, count, limit, said
):
  places = troubled(tmp_path, word, count)
  assert scored(*places, kit, tmp_path / "scores", f"--limit={limit}") == 2
  error = capsys.readouterr().err
  assert f"1 of {count} samples of truth have no score" in error and said in error
  assert f"In-Domain_50/{GRID}/{count - 1:05d}" in error
  assert not (tmp_path / "scores" / "truth" / "result.json").exists()


def test_a_partial_report_says_what_it_lacks(kit, tmp_path, capsys):
  words = (*troubled(tmp_path, "RAISE"), kit, tmp_path / "scores")
  assert scored(*words, "--allow-partial") == 0
  result = result_of(tmp_path / "scores" / "truth")
  assert [e["key"][-5:] for e in result["errors"]] == ["00001"]
  assert result["summary"]["overall"]["samples"] == 1
  assert "PARTIAL: 1 samples without a score are left out" in capsys.readouterr().out


def test_a_task_without_an_evaluator_is_named(kit, tmp_path, capsys):
  data = vbvr_folder.make(tmp_path / "data", tasks=(SHELF,), count=1)
  baselines.write(tmp_path / "clips", samples.load(data), ["truth"])
  assert scored(data, tmp_path / "clips", kit, tmp_path / "scores") == 2
  assert "the EvalKit has no evaluator for this task" in capsys.readouterr().err


def test_scored_samples_are_kept_and_changed_videos_refused(
  bench, clips, kit, tmp_path, capsys, monkeypatch
):
  out = tmp_path / "scores"
  assert scored(bench, clips, kit, out) == 0
  calls = []
  real = evalkit.score
  monkeypatch.setattr(evalkit, "score", lambda *a: calls.append(a[2].key) or real(*a))
  assert scored(bench, clips, kit, out) == 0 and calls == []
  key = f"In-Domain_50/{GRID}/00000"
  shutil.copy(clips / "static" / f"{key}.mp4", clips / "truth" / f"{key}.mp4")
  capsys.readouterr()
  assert scored(bench, clips, kit, out) == 2
  assert "was changed since it was made" in capsys.readouterr().err


def solve_otherwise(data: samples.Data) -> None:
  """Other ends of the ground truths; what is asked stays."""
  for sample in data.samples:
    frames = sample.truth().copy()
    frames[-2:] = 255 - frames[-2:]
    media.write_mp4(sample.folder / "ground_truth.mp4", frames)
    media.write_png(sample.folder / "final_frame.png", frames[-1])


def test_scores_of_two_ground_truths_are_never_put_together(copy, kit, tmp_path, capsys):
  asked = samples.load(copy)
  baselines.write(tmp_path / "clips", asked, list(baselines.CLIPS))

  def means(out, name="static"):
    words = [f"--data={copy}", f"--videos={tmp_path / 'clips' / name}", f"--out={tmp_path / out}"]
    done = call("score", *words, "--beside=", *kit)
    return result_of(tmp_path / out / name)["summary"] if done == 0 else None

  before = means("one")
  shutil.copytree(tmp_path / "one", tmp_path / "kept")
  solve_otherwise(asked)
  assert samples.load(copy).mark == asked.mark  # a model was asked the same
  after = means("one")
  assert before and after and before["overall"]["score"] > after["overall"]["score"] + 0.3
  assert means("two") == after
  capsys.readouterr()
  assert call("table", tmp_path / "kept", tmp_path / "two") == 2
  assert "was scored with other data" in capsys.readouterr().err
  for name in ("truth", "cut", "cross-fade"):
    assert means("one", name) is None
    assert "was made for another In-Domain_50" in capsys.readouterr().err
  assert means("one", "noise")
  baselines.write(tmp_path / "clips", samples.load(copy), ["truth"])  # makes them again
  assert means("one", "truth")


def test_cases_of_our_own_are_told_apart_by_their_symbols(own_cases, tmp_path):
  root = Path(shutil.copytree(own_cases, tmp_path / "cases"))
  asked = samples.load(root)
  solve_otherwise(asked)  # pictures that nothing is compared with
  assert samples.load(root).truth_mark == asked.truth_mark
  path = asked.samples[1].folder / "metadata.json"
  metadata = layout.read_metadata(path)
  assert metadata["k"] > 1
  path.write_text(json.dumps({**metadata, "answers": [metadata["answer"]], "k": 1}))
  changed = samples.load(root)
  assert changed.mark == asked.mark and changed.truth_mark != asked.truth_mark


def test_problems_are_drawn_anew_where_the_ground_truth_is_another(copy, tmp_path, monkeypatch):
  data = samples.load(copy)
  scores.draw_problems(tmp_path, data)
  paths = [tmp_path / "problems" / f"{sample.key}.png" for sample in data.samples]
  drawn = [path.read_bytes() for path in paths]
  solve_otherwise(data)
  changed = samples.load(copy)
  scores.draw_problems(tmp_path, changed)
  assert not set(drawn) & {path.read_bytes() for path in paths}
  monkeypatch.setattr(scores, "strip", None)
  scores.draw_problems(tmp_path, changed)  # nothing is left to draw


def test_videos_that_nobody_asked_for_are_refused(bench, clips, kit, tmp_path, capsys):
  extra = clips / "truth" / "In-Domain_50" / COUNT
  shutil.copytree(clips / "truth" / "In-Domain_50" / GRID, extra)
  assert scored(bench, clips, kit, tmp_path / "scores") == 2
  assert "has 2 videos that" in capsys.readouterr().err


def test_videos_of_other_people_are_scored_with_settings_unknown(
  bench, clips, kit, tmp_path, capsys
):
  for name in ("generation.json", "records"):
    path = clips / "truth" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  (clips / "truth").rename(clips / "theirs")
  words = [f"--data={bench}", f"--videos={clips / 'theirs'}", f"--out={tmp_path / 'scores'}"]
  assert call("score", *words, "--beside=", *kit) == 0
  assert "theirs: settings unknown." in capsys.readouterr().out


def test_scores_by_two_versions_of_the_rules_share_no_table(
  own_cases, tmp_path, monkeypatch, capsys
):
  data, outs = samples.load(own_cases), [tmp_path / "older", tmp_path / "newer"]
  (folder,) = baselines.write(tmp_path / "clips", data, ["cut"])
  for out, rules in zip(outs, (2, 3), strict=True):
    monkeypatch.setattr(tasks, "SCORING", rules)
    result = scores.score(out, data, {out.name: folder}, None)[out.name]
    assert result["scoring"] == rules
  assert call("table", *outs) == 2
  assert "scored with another version of the tasks' rules than" in capsys.readouterr().err


def test_scores_that_are_not_what_was_written_stand_in_no_table(own_cases, tmp_path, capsys):
  data, out = samples.load(own_cases), tmp_path / "scores"
  (folder,) = baselines.write(tmp_path / "clips", data, ["cut"])
  found = scores.score(out, data, {"cut": folder}, None)
  place, manifest = out / "cut", records.read_json(out / "cut" / "manifest.json")
  assert set(manifest["files"]) == {"result.json", "samples", "pictures"}
  assert all(records.checksum(place / name) == s for name, s in manifest["files"].items())
  path = place / "result.json"
  path.write_text(path.read_text().replace('"score": 0', '"score": 1', 1))
  assert call("table", place) == cli.BAD_INPUT
  said = "result.json is missing or damaged: the same `videoreason vbvr score` writes it again"
  assert said in capsys.readouterr().err
  assert scores.score(out, data, {"cut": folder}, None) == found
  assert call("table", place) == 0
  (place / "manifest.json").unlink()  # scores of earlier versions have none
  assert call("table", place) == 0


def test_a_damaged_sample_is_scored_again(own_cases, tmp_path, monkeypatch):
  data, out = samples.load(own_cases), tmp_path / "scores"
  (folder,) = baselines.write(tmp_path / "clips", data, ["cut"])
  found = scores.score(out, data, {"cut": folder}, None)
  calls, real = [], scores.own_score
  monkeypatch.setattr(scores, "own_score", lambda s, f: calls.append(s.key) or real(s, f))
  key = data.samples[0].key
  path = out / "cut" / "samples" / f"{key}.json"
  text = path.read_text()
  other = json.loads(text)
  other["row"]["score"] = 0.123
  for damaged in ("{", "[]", json.dumps(other)):
    path.write_text(damaged)
    assert scores.score(out, data, {"cut": folder}, None) == found
    assert calls == [key]
    calls.clear()
  assert path.read_text() == text
  records.write_json(path, {k: v for k, v in json.loads(text).items() if k != "sum"})
  assert scores.score(out, data, {"cut": folder}, None) == found
  assert not calls  # of an earlier version


@pytest.mark.parametrize("place", ["clips/static", "problems", "static"])
def test_commands_with_one_out_take_turns(own_cases, tmp_path, monkeypatch, place):
  monkeypatch.setattr(folders, "PATIENCE", 0.1)
  data = samples.load(own_cases)

  def work() -> float:
    (folder,) = baselines.write(tmp_path / "clips", data, ["static"])
    return scores.score(tmp_path, data, {"static": folder}, None)["static"]["expected"]

  with (
    concurrent.futures.ThreadPoolExecutor(1) as pool,
    pytest.warns(UserWarning, match=f"works in .*/{place}: this one waits for it") as said,
  ):
    with folders.held(tmp_path / place):
      second = pool.submit(work)
      while not said and not second.done():
        time.sleep(0.01)
      assert [path.name for path in (tmp_path / place).iterdir()] == [folders.LOCK]
    assert second.result() == len(data.samples)


def test_other_data_may_be_scored_into_the_same_folder(own_cases, tmp_path):
  """As after another export: the clips beside and the pictures of the problems follow the data."""
  other, out = tmp_path / "cases", tmp_path / "scores"
  words = ["tasks", "export", "--tasks=pick,maze", "--size=48", "--cases=1", f"--out={other}"]
  assert cli.main(words) == 0
  for number, root in enumerate((own_cases, other, own_cases)):
    data, folder = samples.load(root), tmp_path / f"mine{number}"
    baselines.write(folder, data, ["truth"])
    words = [f"--data={root}", f"--videos={folder}", f"--out={out}", "--beside=static,cut"]
    assert call("score", *words) == 0
    found = {name: result_of(out / name) for name in ("static", "cut")}
    assert {result["data"] for result in found.values()} == {data.truth_mark}
    assert [len(result["samples"]) for result in found.values()] == [len(data.samples)] * 2
    first = data.samples[0]
    picture = media.read_image(out / videos.PROBLEMS / f"{first.key}.png")
    np.testing.assert_array_equal(picture, scores.strip(first.truth()))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '"x"', "3"])
def test_a_damaged_file_of_one_sample_is_made_again(own_cases, tmp_path, content):
  out, data = tmp_path / "scores", samples.load(own_cases, names=["pick"], cases=1)
  baselines.write(tmp_path / "mine", data, ["truth"])
  words = [f"--data={own_cases}", "--tasks=pick", "--cases=1", f"--videos={tmp_path / 'mine'}"]
  assert call("score", *words, f"--out={out}") == 0
  (sample,) = data.samples
  paths = [
    out / place / f"{sample.key}.json"
    for place in ("truth/samples", "problems", "clips/static/records")
  ]
  before = [path.read_text() for path in paths]
  for path in paths:
    path.write_text(content)
  paths[0].write_text(content and before[0].replace('"score": ', '"score": 0.', 1))
  assert call("score", *words, f"--out={out}") == 0
  assert [path.read_text() for path in paths] == before


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_video_whose_record_is_damaged_is_made_again_and_has_no_score(
  own_cases, tmp_path, capsys, content
):
  data = samples.load(own_cases, names=["pick"], cases=1)
  (sample,) = data.samples
  videos.put(tmp_path / "mine", sample, sample.truth())
  assert generate._whole(tmp_path / "mine", sample, jobs.Job())
  path = videos.record_place(tmp_path / "mine", sample)
  path.write_text(content)
  assert not generate._whole(tmp_path / "mine", sample, jobs.Job())
  words = [f"--data={own_cases}", "--tasks=pick", "--cases=1", f"--videos={tmp_path / 'mine'}"]
  assert call("score", *words, f"--out={tmp_path / 'scores'}") == 2
  assert f"{path} is damaged: the command that made the videos makes it" in capsys.readouterr().err


def test_settings_of_videos_that_are_no_mapping_are_one_sentence(own_cases, tmp_path, capsys):
  data = samples.load(own_cases, names=["pick"], cases=1)
  (folder,) = baselines.write(tmp_path / "mine", data, ["truth"])
  path = folder / videos.ASKED
  path.write_text("null")
  words = [f"--data={own_cases}", "--tasks=pick", "--cases=1", f"--videos={tmp_path / 'mine'}"]
  assert call("score", *words, f"--out={tmp_path / 'scores'}") == 2
  assert f"{path} is missing or damaged" in capsys.readouterr().err


def test_scores_of_videos_whose_manifest_is_damaged_do_not_say_how_they_were_made(
  own_cases, tmp_path
):
  data = samples.load(own_cases, names=["pick"], cases=1)
  (folder,) = baselines.write(tmp_path / "mine", data, ["truth"])
  (folder / folders.MANIFEST).write_text("{")
  words = [f"--data={own_cases}", "--tasks=pick", "--cases=1", f"--videos={tmp_path / 'mine'}"]
  assert call("score", *words, f"--out={tmp_path / 'scores'}") == 0
  assert result_of(tmp_path / "scores" / "truth")["made"] is None


def test_videos_called_like_a_clip_beside_are_not_passed_over(own_cases, tmp_path, capsys):
  out = tmp_path / "scores"
  (made,) = baselines.write(tmp_path, samples.load(own_cases), ["truth"])
  folder = made.rename(tmp_path / "static")
  words = [f"--data={own_cases}", f"--videos={folder}", f"--out={out}"]
  assert call("score", *words) == 2
  said = f"a system can't be called 'static' beside the clip of that name: rename {folder}, or"
  assert said in capsys.readouterr().err
  assert not out.exists()
  assert call("score", *words, "--beside=") == 0
  assert result_of(out / "static")["summary"]["overall"]["score"] > 0.9


def encode(path: Path, codec: str, **options: str) -> None:
  """Writes a video anew."""
  frames = media.read_mp4(path)[0]
  with av.open(str(path), "w", format="mp4", options=options) as container:
    stream = container.add_stream(codec, rate=16)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode(None))


def to_av1(path: Path) -> None:
  encode(path, "libsvtav1")


def cut_off(path: Path) -> None:
  """What an interrupted download leaves of a video whose header comes first."""
  encode(path, "libx264", movflags="faststart")
  data = path.read_bytes()
  path.write_bytes(data[: (data.index(b"mdat") + len(data)) // 2])


def to_zeros(path: Path) -> None:
  """The header of a video stays, its pictures are zeros."""
  data = bytearray(path.read_bytes())
  start = data.index(b"mdat")
  size = int.from_bytes(data[start - 4 : start], "big")
  data[start + 4 : start - 4 + size] = bytes(size - 8)
  path.write_bytes(data)


@pytest.mark.parametrize(
  ("spoiled", "said"),
  [
    (cut_off, "00000.mp4 is damaged or not a video"),
    (to_zeros, "00000.mp4 is damaged or not a video"),
    (to_av1, "0 of 5 frames decode in the EvalKit, wanted all: encode the video anew"),
  ],
)
def test_a_video_that_the_evalkit_cannot_decode_gets_no_score(
  bench, clips, kit, tmp_path, capsys, spoiled, said
):
  shutil.rmtree(clips / "truth" / "records")  # as videos of other people
  key = f"In-Domain_50/{GRID}/00000"
  spoiled(clips / "truth" / f"{key}.mp4")
  assert scored(bench, clips, kit, tmp_path / "scores") == 2
  error = capsys.readouterr().err
  assert "1 of 4 samples of truth have no score" in error and said in error
  assert not (tmp_path / "scores" / "truth" / "result.json").exists()
  assert scored(bench, clips, kit, tmp_path / "scores", "--allow-partial") == 0
  result = result_of(tmp_path / "scores" / "truth")
  assert [e["key"] for e in result["errors"]] == [key]
  assert result["summary"]["overall"]["samples"] == 3


@pytest.mark.parametrize(
  ("spoiled", "said"),
  [
    (lambda path: path.unlink(), r"00000 lacks final_frame\.png: download"),
    (lambda path: path.write_bytes(path.read_bytes()[:99]), r"final_frame\.png is damaged"),
    (
      lambda path: media.write_png(path, np.zeros((32, 64, 3), np.uint8)),
      r"final_frame\.png is 64 x 32 pixels and first_frame\.png 64 x 64, wanted one size",
    ),
  ],
)
def test_a_final_frame_that_the_evalkit_would_miss_is_named(
  copy, clips, kit, tmp_path, capsys, spoiled, said
):
  spoiled(copy / "In-Domain_50" / GRID / "00000" / "final_frame.png")
  samples.load(copy)  # enough to make videos
  assert scored(copy, clips, kit, tmp_path / "scores") == 2
  assert re.search(said, capsys.readouterr().err)
  assert not (tmp_path / "scores").exists()


def test_a_truth_that_does_not_decode_is_named(copy, kit, tmp_path, capsys):
  baselines.write(tmp_path / "clips", samples.load(copy), ["static"])
  to_zeros(copy / "In-Domain_50" / GRID / "00000" / "ground_truth.mp4")
  words = [f"--data={copy}", f"--videos={tmp_path / 'clips'}", f"--out={tmp_path / 'scores'}"]
  assert call("score", *words, "--beside=", *kit) == 2
  assert re.search(r"truth\.mp4 (is damaged|decodes to|holds no)", capsys.readouterr().err)


def test_another_evalkit_is_refused_unless_it_is_wanted(bench, clips, kit, tmp_path, capsys):
  path = Path(kit[0].partition("=")[2])
  (path / "vbvr_bench" / "new.py").write_text("threshold = 3\n")
  assert scored(bench, clips, kit, tmp_path / "scores") == 2
  assert "another version of the EvalKit than commit 275472f" in capsys.readouterr().err
  assert scored(bench, clips, kit, tmp_path / "scores", "--other-evalkit") == 0
  assert "other files" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda kit, m: [f"--evalkit={Path(kit[0][10:]).parent}", *kit[1:]], "is no VBVR-EvalKit"),
    (
      lambda kit, m: [kit[0], "--environment=/nowhere", kit[2]],
      "there is no environment .*--setup",
    ),
    (lambda kit, m: m.setattr(evalkit, "PINS", {"numpy": "1.0"}) or kit, "numpy .*, wanted 1.0"),
    (lambda kit, m: [], "--evalkit must be given"),
  ],
)
def test_an_evalkit_that_cannot_work_is_named(
  bench, clips, kit, tmp_path, capsys, monkeypatch, change, said
):
  assert scored(bench, clips, change(kit, monkeypatch), tmp_path / "scores") == 2
  assert re.search(said, capsys.readouterr().err)


def test_relative_paths_work(bench, clips, kit, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  words = ["--evalkit=EvalKit", "--environment=environment", "--videos=clips", "--out=scores"]
  assert call("score", f"--data={bench}", "--cases=1", "--beside=", *words) == 0


def test_the_toolkit_sees_nothing_of_ours(monkeypatch):
  monkeypatch.setenv("PYTHONPATH", "/ours")
  clean = evalkit.clean_environment()
  assert "PYTHONPATH" not in clean and clean["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.slow
def test_the_audit_says_which_tasks_are_blind(bench, kit, tmp_path, capsys):
  assert call("audit", f"--data={bench}", f"--out={tmp_path / 'audit'}", *kit) == 0
  found = json.loads((tmp_path / "audit" / "audit.json").read_text())
  assert [row["task"] for row in found["tasks"]] == [GRID, MAZE]
  # the stand-in looks at the last frame alone, so a cut to it is as good as the truth
  assert all(audit.JUMPING in row["faults"] for row in found["tasks"])
  assert "2 of 2 tasks: a cut to the end can't be told from solving." in capsys.readouterr().out


@pytest.mark.parametrize(
  ("scores_of", "wanted"),
  [
    ({"truth": 1.0, "static": 0.2, "cut": 0.5, "noise": 0.1}, []),
    ({"truth": 1.0, "static": 0.96, "cut": 0.5, "noise": 0.1}, [audit.STANDING]),
    ({"truth": 0.7, "static": 0.2, "cut": 0.7, "noise": 0.5},
     [audit.JUMPING, audit.LOW, audit.GIFT]),
    ({"truth": None, "static": 0.2}, []),
  ],
)  # fmt: skip
def test_a_fault_is_what_it_is_called(scores_of, wanted):
  assert audit.faults(scores_of) == wanted


# The command line


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["make"], "vbvr make: say videoreason vbvr generate"),
    (["generate"], "--data and --out must be given"),
    (["table", "x", "--limit=3"], "vbvr table takes no --limit"),
    (["generate", "--data=x", "--out=y", "--part=3/2"], "there is no folder x"),
    (["score", "here"], "unexpected word 'here'"),
  ],
)
def test_a_command_line_that_makes_no_sense_is_one_sentence(words, said, capsys):
  assert call(*words) == 2
  assert said in capsys.readouterr().err


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--seeds=1,1"], "each once"),
    (["--seeds=a"], "wanted numbers"),
    (["--seeds="], "--seeds= has an empty place"),
    (["--tasks="], "--tasks= has an empty place"),
    (["--tasks=O-39,,G-3"], "--tasks=O-39,,G-3 has an empty place"),
    (["--split="], "--split= has an empty place"),
    (["--part=3/2"], "--part=3/2, wanted one of several"),
    (["--config.taps.sites=('attn_out',)"], "keeps no taps"),
    (["--keep-steps=20"], "wanted steps below"),
    (["--frames=6"], "frames=6, wanted 1 + 4k"),
    (["--max-area=10"], "allow a larger area"),
  ],
)
def test_settings_that_make_no_sense_are_one_sentence(bench, tmp_path, capsys, words, said):
  out = tmp_path / "videos"
  for more in ([], ["--dry-run"]):
    assert call("generate", f"--data={bench}", f"--out={out}", *words, *more) == 2
    heard = capsys.readouterr()
    assert said in heard.err and "denoise:" not in heard.err  # before a bar begins
    assert "network evaluations" not in heard.out
  assert not out.exists()


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("../x", "wanted the name of one folder"),
    ("/x", "wanted the name of one folder"),
    ("a/b", "wanted the name of one folder"),
    ("..", "wanted the name of one folder"),
    ("", "wanted the name of one folder"),
    ("x" * 300, "is a name of 300 bytes, wanted 200 at most"),
    ("clips", "which `vbvr score` has for other folders (clips, problems, static, cut,"),
    ("problems", "which `vbvr score` has for other folders"),
    ("static", "which `vbvr score` has for other folders"),
    ("id", "which `vbvr score` has for other folders"),
  ],
)
def test_a_name_that_score_could_not_use_is_refused_before_any_work(
  bench, tmp_path, capsys, name, said
):
  words = [f"--data={bench}", f"--out={tmp_path / 'videos'}", f"--name={name}"]
  for more in ([], ["--dry-run"]):
    assert call("generate", *words, *more) == 2
    heard = capsys.readouterr()
    assert f"--name={name}" in heard.err and said in heard.err
    assert "network evaluations" not in heard.out
  assert [path.name for path in tmp_path.iterdir()] == []


def test_a_model_that_is_not_here_yet_is_asked_for_steps_and_layers_it_has(bench, capsys):
  words = [f"--data={bench}", "--config=vbvr_wan22", "--keep-steps=49"]
  for command in (["vbvr", "generate", "--dry-run"], ["plan", "vbvr", "generate", "--on=cpu"]):
    assert cli.main([*command, *words, "--token-layers=40"]) == 2
    assert "--token-layers=40, wanted layers below 40" in capsys.readouterr().err
    assert cli.main([*command, *words, "--config.steps=49"]) == 2
    assert "--keep-steps=49, wanted steps below 49" in capsys.readouterr().err


def test_a_boundary_of_one_expert_is_refused_by_the_plan_and_the_command(bench, tmp_path, capsys):
  words, out = [f"--data={bench}", "--config=mini:boundary=0.5"], tmp_path / "videos"
  for command in (
    ["vbvr", "generate", "--dry-run"],
    ["vbvr", "generate", f"--out={out}"],
    ["plan", "vbvr", "generate", "--on=cpu"],
  ):
    assert cli.main([*command, *words]) == 2
    heard = capsys.readouterr()
    assert "boundary=0.5 of mini, which has one expert" in heard.err
    assert "denoise:" not in heard.err
  assert not out.exists()


def test_clips_that_are_not_there_are_refused_before_a_bar_begins(bench, tmp_path, capsys):
  out = tmp_path / "clips"
  assert call("baselines", f"--data={bench}", f"--out={out}", "--clips=static,foo") == 2
  err = capsys.readouterr().err
  assert "no clips 'foo'; there are: static" in err and "write:" not in err
  assert call("baselines", f"--data={bench}", f"--out={out}", "--clips=") == 2
  assert "--clips= has an empty place" in capsys.readouterr().err
  assert not out.exists()


def test_parts_share_the_work(bench):
  everything = jobs.units(samples.load(bench), WAN, jobs.Job(), 1)
  parts = [everything[i::3] for i in range(3)]
  keys = sorted(s.key for part in parts for unit in part for s in unit.samples)
  assert keys == [s.key for s in samples.load(bench).samples]


def test_reading_a_case_of_the_layout_still_gives_its_files(bench):
  cases = list(layout.read(bench / "In-Domain_50"))
  assert [case.index for case in cases] == [0, 1]
