"""The training script: its stages in miniature, and what it refuses."""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_videoreason import bundles, checkpoint, cli, encoded, evaluate, fitting, tasks
from jax_videoreason.records import differences
from jax_videoreason.training import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "train_mini.py"


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("train_mini", SCRIPT)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def stages(script, monkeypatch) -> list[fitting.Stage]:
  """The stages that a call would train; the weights they begin with are taken for the result, and
  fresh ones are those that ship, which takes no compilation."""
  found = []
  ships = checkpoint.load("mini", parts=("dit", "text"))

  def fit(stage, params):
    found.append(stage)
    return SimpleNamespace(ema=params)

  monkeypatch.setattr(script, "fit", fit)
  fresh = {"dit": ships.params[0], "text": ships.text}
  monkeypatch.setattr(script, "begin_dit", lambda parts, shape: fresh)
  return found


@pytest.fixture
def call(script, monkeypatch, capsys):
  def run(*words):
    monkeypatch.setattr(sys, "argv", ["train_mini.py", *map(str, words)])
    code = script.main()
    return code, capsys.readouterr().err.strip()

  return run


@pytest.fixture(scope="module")
def begun(script, tmp_path_factory):
  """A folder as the stages vae and encode leave it, of the VAE and the words that ship, with random
  latents of 8 cases."""
  work = tmp_path_factory.mktemp("work")
  bundle = checkpoint.load("mini", parts=("vae", "text"))
  config = bundle.parts.vae.config
  described = {**script.VAE, "mean": config.mean, "std": config.std}
  (work / "vae_config.json").write_text(json.dumps(described))
  checkpoint.write_tree(work / "vae_frozen", jax.tree.map(np.asarray, bundle.vae))
  shutil.copy(bundle.card.tokenizer, work / "tokenizer.json")
  parts, vae = script.load_vae(work)
  cases = script.encoded_cases(work, 8, parts)
  cases.create(script.marks_of(parts, vae, work / "tokenizer.json"))
  rng = np.random.default_rng(0)
  for name, array in cases.open(write=True).items():
    array[:] = rng.integers(1, 9, array.shape) if name == "ids" else rng.normal(size=array.shape)
    array.flush()
  cases.finish(0)
  return work


DIT = ("--steps=2", "--cases=8", "--batch=2", "--score-every=0")


@pytest.fixture
def work(begun, tmp_path):
  return Path(shutil.copytree(begun, tmp_path / "work"))


@pytest.mark.slow
def test_dit_trains_from_the_shipped_weights_and_becomes_a_bundle(call, work, tmp_path):
  assert call("dit", "--work", work, "--init=mini", *DIT)[0] == 0
  (row,) = fitting.read_log(work / "dit.jsonl")
  assert row["step"] == 2 and np.isfinite(row["loss"])
  assert (work / "dit.png").is_file()
  assert call("bundle", "--work", work, "--out", tmp_path / "new")[0] == 0
  new, old = (bundles.describe(name) for name in (tmp_path / "new", "mini"))
  assert new.leaves["vae"] == old.leaves["vae"]
  assert new.leaves["dit_0"].keys() == old.leaves["dit_0"].keys()
  assert new.modules.dit.config == old.modules.dit.config


def test_training_cases_are_of_the_split_train_and_of_the_tasks_in_their_shares(
  script, monkeypatch
):
  def load(name, *, size, frames):
    return SimpleNamespace(generate=lambda split, number: (name, split, number))

  monkeypatch.setattr(script.tasks, "load", load)
  drawn = [script.case_of(number) for number in range(1000)]
  assert drawn == [script.case_of(number) for number in range(1000)]
  names = [name for name, _, _ in drawn]
  assert drawn == [(name, "train", number) for number, name in enumerate(names)]
  assert sum(script.SHARES.values()) == pytest.approx(1.0)
  for name, share in script.SHARES.items():
    assert abs(names.count(name) / 1000 - share) < 4 * (share * (1 - share) / 1000) ** 0.5
  even = [script.even_case_of(number) for number in range(2 * len(script.SHARES))]
  assert even == [(name, "train", number) for number, name in enumerate(2 * list(script.SHARES))]


def test_a_clip_is_encoded_whole_and_what_is_known_of_it_is_its_first_frame(
  script, begun, tmp_path, monkeypatch
):
  cases = encoded.Encoded(tmp_path, 3, (script.FRAMES, 8, 8, 3), script.TEXT_LENGTH)
  cases.create({})
  tokenizer = script.Tokenizer(begun / "tokenizer.json")
  worker = {
    "encode": lambda video: video[:, :, ::4, ::4],
    "cases": cases,
    "arrays": cases.open(write=True),
    "tokenizer": tokenizer,
  }
  monkeypatch.setattr(script, "_worker", worker)
  assert script.encode_shard(0) == 3
  found = cases.open()
  drawn = [script.case_of(number) for number in range(3)]
  video = np.stack([case.frames[:, ::4, ::4] for case in drawn]) / 127.5 - 1.0
  np.testing.assert_allclose(found["latents"], video, atol=1e-3)
  np.testing.assert_array_equal(found["known"][:, 0], found["latents"][:, 0])
  assert not found["known"][:, 1:].any()
  ids, _ = tokenizer.encode([case.prompt for case in drawn], script.TEXT_LENGTH)
  np.testing.assert_array_equal(found["ids"], ids)


def test_a_batch_of_the_dit_has_the_encoded_cases_and_the_empty_prompt(script, work):
  ids = np.load(work / "latents" / "ids.npy", mmap_mode="r+")
  ids[:, 20:] = 0
  ids.flush()
  parts, _ = script.load_vae(work)
  cases = script.encoded_cases(work, 8, parts)
  options = argparse.Namespace(work=work, cases=8, batch=3)
  batch_of = script.batches(options, cases, parts)
  for number in (0, 5):
    rows, batch = encoded.rows_of(number, 3, 8), batch_of(number)
    for name, stored in cases.open().items():
      np.testing.assert_array_equal(batch[name], stored[rows])
    np.testing.assert_array_equal(batch["mask"].sum(1), [20, 20, 20])
    assert batch["known_mask"].shape == (*batch["known"].shape[:-1], 4)
    assert batch["known_mask"][:, 0].all() and not batch["known_mask"][:, 1:].any()
    end = np.arange(script.TEXT_LENGTH)[None] == 0
    np.testing.assert_array_equal(batch["empty_ids"], end)  # </s>, then padding
    np.testing.assert_array_equal(batch["empty_mask"], end)


def test_the_vae_learns_from_pieces_of_clips_and_at_the_end_from_whole_ones(
  call, script, stages, tmp_path, monkeypatch
):
  # Frame t of clip c is 17 c + t everywhere.
  clips = np.arange(15 * 17, dtype=np.uint8).reshape(15, 17, 1, 1, 1)
  monkeypatch.setattr(script, "prepare_clips", lambda options: clips)
  monkeypatch.setattr(script, "freeze_vae", lambda *given: None)
  assert call("vae", "--work", tmp_path, "--init=mini", "--steps=40")[0] == 0
  (stage,) = stages
  first, seen = set(), set()
  for number in range(40):
    video = stage.batch_of(number)["video"]
    shape = (8, 9) if number < 32 else (4, 17)
    assert video.shape[:2] == shape and len(video) % stage.rows == 0
    frames = np.rint((video[..., 0, 0, 0] + 1.0) * 127.5).astype(int)
    clip, begins = np.divmod(frames[:, 0], 17)
    np.testing.assert_array_equal(frames, frames[:, :1] + np.arange(shape[1]))
    assert begins.max() + shape[1] <= 17
    first.update(begins.tolist())
    seen.update(clip.tolist())
  assert len(first) > 5 and len(seen) == 15


def test_a_continued_dit_gets_deeper_and_knows_its_words_by_their_new_numbers(
  script, work, monkeypatch
):
  ships = checkpoint.load("mini", parts=("dit", "text"))
  before = ships.text["token_embedding"]
  fresh = {"dit": None, "text": {**ships.text, "token_embedding": np.zeros_like(before)}}
  monkeypatch.setattr(
    script, "begin_dit", lambda parts, shape: jax.tree.map(jax.numpy.asarray, fresh)
  )
  described = json.loads((work / "tokenizer.json").read_text())
  old = described["model"]["vocab"]
  *words, _ = old
  # All words but the last move by one place, to which a new one comes.
  described["model"]["vocab"] = {"new": 0, **{word: old[word] + 1 for word in words}}
  (work / "tokenizer.json").write_text(json.dumps(described))
  parts, _ = script.load_vae(work)
  deeper = parts.dit.config.layers + 3
  dit = script.WanDiT(dataclasses.replace(parts.dit.config, layers=deeper))
  options = argparse.Namespace(work=work, init="mini", other_vae=True)
  grown = script.grown_from(options, dataclasses.replace(parts, dit=dit), (5, 8, 8, 16), None)
  assert len(grown["dit"]["blocks"]["modulation"]) == deeper
  embedding = np.asarray(grown["text"]["token_embedding"])
  np.testing.assert_array_equal(embedding[1 : len(old)], before[: len(old) - 1])
  assert not embedding[0].any() and not embedding[len(old) :].any()


def test_a_preview_learns_the_video_of_each_x0(script, tmp_path):
  # Step s and run r of shard n is 100 n + 32 s + r.
  def shard(number):
    named = 100 * number + np.arange(2 * script.SHARD_RUNS).reshape(2, script.SHARD_RUNS, 1)
    return {"latents": named.astype(np.float32), "video": named.astype(np.uint8)}

  options = argparse.Namespace(
    work=tmp_path, init=None, cases=64, batch=8, steps=2, learning_rate=1e-3, minutes=1.0
  )
  vars(options).update(score_steps=2, sample_shift=5.0, guidance=2.0)
  stage = script.preview_stage(options, SimpleNamespace(), [shard(0), shard(1)])
  seen = set()
  for number in range(100):
    batch = stage.batch_of(number)
    assert batch["latents"].shape == (8, 1)
    np.testing.assert_allclose(batch["video"], batch["latents"] / 127.5 - 1.0, atol=1e-6)
    seen.update(batch["latents"].ravel().tolist())
  assert len(seen) > 120  # of 128


@pytest.mark.parametrize("stage", ["dit", "experts"])
def test_a_bundle_of_another_vae_is_refused(call, work, tmp_path, stage):
  config = json.loads((work / "vae_config.json").read_text())
  config["mean"][0] += 1
  (work / "vae_config.json").write_text(json.dumps(config))
  code, said = call(stage, "--work", work, "--init=mini", "--out", tmp_path / "x", *DIT)
  assert code == 2
  assert f"the vae of {work} is not what the latents were made with: encode" in said
  assert not list(work.glob("*_state"))


@pytest.mark.parametrize("stage", ["dit", "experts"])
def test_a_bundle_whose_dit_saw_other_words_is_refused_unless_asked_for(
  call, script, work, tmp_path, stages, stage
):
  words = (work / "tokenizer.json").read_text()
  (work / "tokenizer.json").write_text(words + "\n")
  parts, vae = script.load_vae(work)
  marks = script.marks_of(parts, vae, work / "tokenizer.json")
  (work / "latents" / encoded.MADE_BY).write_text(json.dumps(marks))
  asked = (stage, "--work", work, "--init=mini", "--out", tmp_path / "x", *DIT)
  code, said = call(*asked)
  assert code == 2
  assert "the tokenizer of --init mini is not what the latents were made with" in said
  if stage == "dit":
    assert not stages
    assert call(*asked, "--other-vae")[0] == 0
  assert len(stages) == (1 if stage == "dit" else 0)


def test_the_dit_is_trained_as_is_asked(call, work, stages):
  asked = ("--learning-rate=0.002", "--shift=7", "--minutes=3", "--score-every=5")
  assert call("dit", "--work", work, *DIT, *asked)[0] == 0
  (stage,) = stages
  wanted = TrainSettings(steps=2, batch=2, learning_rate=0.002, shift=7.0)
  assert (stage.settings, stage.rows, stage.minutes, stage.every) == (wanted, 2, 3.0, 5)


def test_what_decides_the_result_is_compared_on_resume(call, work, stages):
  for words in (("--init=mini",), ()):
    assert call("dit", "--work", work, *words, *DIT)[0] == 0
  ours, fresh = (dict(stage.data) for stage in stages)
  assert ours.pop("init") == bundles.fingerprint("mini")
  assert fresh.pop("init") is None
  assert ours == fresh
  assert set(ours) == {"cases", "shares", "dit", "dtype", "text", "made_by"}
  assert ours["made_by"] == json.loads((work / "latents" / encoded.MADE_BY).read_text())


@pytest.mark.parametrize("stage", ["dit", pytest.param("experts", marks=pytest.mark.slow)])
def test_a_training_in_another_dtype_is_another_training(
  call, script, work, tmp_path, stages, monkeypatch, stage
):
  asked = (stage, "--work", work, "--init=mini", *DIT)
  assert call(*asked, "--out", tmp_path / "here")[0] == 0
  monkeypatch.setattr(script.training, "compute_dtype", lambda device: "bfloat16")
  assert call(*asked, "--out", tmp_path / "there")[0] == 0
  half = len(stages) // 2
  for here, there in zip(stages[:half], stages[half:], strict=True):
    said = list(differences(there.data, here.data))
    assert said == ["dtype='bfloat16' there and 'float32' here"]


@pytest.mark.slow
def test_experts_are_the_network_continued_above_and_below_a_sigma(call, work, stages, tmp_path):
  out = tmp_path / "experts"
  assert call("experts", "--work", work, "--init=mini", "--out", out, *DIT)[0] == 0
  high, low = (stage.settings for stage in stages)
  assert (high.high, low.low, high.low) == (1.0, 0.0, low.high)
  sigma = high.shift * high.low / (1 + (high.shift - 1) * high.low)
  assert sigma == pytest.approx(0.9)
  made, shared = bundles.describe(out), bundles.describe("mini")
  assert made.card.boundary == 0.9
  assert made.leaves["dit_0"] == made.leaves["dit_1"] == shared.leaves["dit_0"]
  assert made.folders["vae"].resolve() == shared.folders["vae"].resolve()


def test_watched_cases_are_none_that_an_evaluation_asks(script):
  flags, _ = cli.parse(importlib.import_module("jax_videoreason.cli.evaluate"), [])
  assert flags.cases == script.ASKED
  for name in script.SHARES:
    task = tasks.load(name, size=script.SIZE, frames=script.FRAMES)
    watched = script.watched_cases(task, 16)
    asked = evaluate.cases_of(task, "id", flags.cases, "both")
    assert len(watched) == 16
    for key in ("hash", "index"):
      assert not {c.metadata[key] for c in watched} & {c.metadata[key] for c in asked}
  assert script.WATCHED_FROM >= evaluate.TRIES * 2_000


def test_the_experts_compute_as_the_device_does(script, monkeypatch):
  config = bundles.describe("mini").modules.dit.config
  assert script.computing(config).config.dtype == "float32"
  monkeypatch.setattr(script.training, "compute_dtype", lambda device: "bfloat16")
  assert script.computing(config).config.dtype == "bfloat16"


def test_a_batch_of_more_cases_than_there_are_is_refused(call, work):
  code, said = call("dit", "--work", work, "--cases=8", "--batch=9")
  assert code == 2
  assert "--batch=9 of --cases=8: no case comes twice in an epoch, give at most --batch=8" in said


def test_another_number_of_cases_than_was_begun_is_refused_before_anything_is_encoded(call, work):
  code, said = call("encode", "--work", work, "--cases=600")
  assert code == 2
  assert "latents.npy holds (8, " in said and "give the same --cases, or another --work" in said


def test_a_preview_needs_a_bundle_and_runs_to_compare_with(call, work, tmp_path, capsys):
  with pytest.raises(SystemExit):
    call("preview", "--work", work, "--out", tmp_path / "x")
  assert "--init is needed: the bundle that is continued" in capsys.readouterr().err
  code, said = call("preview", "--work", work, "--init=mini", "--out", tmp_path / "x", "--cases=63")
  assert code == 2
  assert "--cases=63: the last 32 runs are kept to compare with, give at least --cases=64" in said
  assert not list(work.glob("x0_*"))


def test_a_network_begins_the_same_under_any_default_generator(script, monkeypatch):
  for name, value in {"width": 16, "ffn_width": 16, "heads": 1, "layers": 1}.items():
    monkeypatch.setitem(script.DIT, name, value)
  parts = script.make_parts(script.VAE)
  shape = script.latent_shape(parts)
  wanted = script.begin_dit(parts, shape)
  with jax.default_prng_impl("rbg"):
    jax.tree.map(np.testing.assert_array_equal, script.begin_dit(parts, shape), wanted)


def test_clips_of_another_number_are_refused(script, tmp_path):
  np.save(tmp_path / "clips.npy", np.zeros((3, 1), np.uint8))
  (tmp_path / "tokenizer.json").touch()
  options = argparse.Namespace(work=tmp_path, vae_cases=4)
  with pytest.raises(ValueError, match="holds 3 clips and --vae-cases=4: give the same"):
    script.prepare_clips(options)


TINY = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(SCRIPT.parent)!r}]
import train_mini
train_mini.DIT.update(width=32, ffn_width=32, heads=2, layers=1)
train_mini.SHARES = dict(maze=0.5, pick=0.5)
train_mini.SHARD_RUNS = 2
sys.argv[0] = "train_mini.py"
sys.exit(train_mini.main())
"""


def tiny(work: Path, *words: str, processes: int = 1) -> list[str]:
  """What each of the processes says that carry out a stage of a tiny network together."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  several = {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": str(processes),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
  }
  running = [
    subprocess.Popen(
      [sys.executable, "-c", TINY, words[0], "--work", str(work), *words[1:]],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env={**os.environ, **several, "JAX_PROCESS_ID": str(number)},
    )
    for number in range(processes)
  ]
  said = [process.communicate(timeout=600)[0] for process in running]
  assert [process.returncode for process in running] == [0] * processes, said
  return said


@pytest.mark.slow
def test_two_processes_carry_every_stage_out_to_a_bundle_of_two_experts(tmp_path):
  work, first, shown, experts = (tmp_path / n for n in ("work", "first", "shown", "experts"))
  two = {"processes": 2}
  once = ("--cases=4", "--batch=2", "--steps=2")
  tiny(work, "vae", "--steps=2", "--vae-cases=8", "--prompt-cases=4", "--workers=1", **two)
  tiny(work, "encode", "--cases=4", "--workers=1")
  watched = ("--score-every=2", "--score-cases=2", "--score-steps=1")
  tiny(work, "dit", *once, *watched, **two)
  assert [row["task"] for row in fitting.read_log(work / "dit.jsonl") if "task" in row] == [
    "maze",
    "pick",
  ]
  tiny(work, "bundle", "--out", str(first))
  steps = "--score-steps=2"
  (said,) = tiny(work, "preview", *once, steps, "--init", str(first), "--out", str(shown))
  assert json.loads(said.splitlines()[-1])["preview_explained"] < 1
  before, after = bundles.describe(first), bundles.describe(shown)
  assert before.modules.preview is None
  assert {**after.leaves, "preview": None} == {**before.leaves, "preview": None}
  lost, kept = sorted(work.glob("x0_*/video_*.npy"))
  lost.unlink()
  made = kept.stat().st_mtime_ns
  tiny(work, "preview", *once, steps, "--init", str(first), "--out", str(tmp_path / "again"))
  assert lost.exists() and kept.stat().st_mtime_ns == made
  assert bundles.describe(tmp_path / "again").leaves == after.leaves
  tiny(work, "experts", *once, "--init", str(shown), "--out", str(experts), **two)
  made, shared = checkpoint.load(experts), checkpoint.load(shown)
  assert made.card.boundary == 0.9
  high, low = (dit["head"]["kernel"] for dit in made.params)
  assert high.shape == low.shape == shared.params[0]["head"]["kernel"].shape
  assert not np.array_equal(high, low)
  assert bundles.describe(experts).folders["preview"].resolve() == (shown / "preview").resolve()
