"""`vbvr generate` by several processes, commands and devices: shared work, and what stops it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import helpers
from jax_videoreason import bundles, checkpoint, cli, folders, media, settings
from jax_videoreason.structs import ModelBundle, Trace
from jax_videoreason.vbvr import generate, jobs, samples, videos

STEPS = "--config.steps=2"
SETTINGS = settings.from_config(
  {"checkpoint": "mini", "frames": 17, "height": 32, "width": 32, "steps": 2, "batch": 1}
)


def call(*words) -> int:
  return cli.main(["vbvr", *map(str, words)])


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> Path:
  """Five cases of one task of ours."""
  return helpers.export_cases(tmp_path_factory.mktemp("hosts") / "cases", "pick", 5)


@pytest.fixture
def stubs(monkeypatch) -> dict[str, list]:
  """What generate loads and makes is noted; videos are stills, made without a model."""
  noted = {"loads": [], "made": []}

  def make(folder, bundle, chosen, job, unit, *_):
    for sample in unit.samples:
      noted["made"].append(sample.index)
      videos.put(folder, sample, np.stack([sample.first()] * sample.frames))

  monkeypatch.setattr(generate, "encode", lambda chosen, some, mesh: [None] * len(some))
  monkeypatch.setattr(generate, "load", lambda chosen, mesh, experts: noted["loads"].append(1))
  monkeypatch.setattr(generate, "make", make)
  return noted


def test_processes_share_the_units_and_load_together(cases, stubs, tmp_path, monkeypatch):
  monkeypatch.setattr(generate, "ROUND_BYTES", 1)  # a round for every unit
  data, places = samples.load(cases), []
  shares = []
  for number in range(2):
    stubs["loads"].clear(), stubs["made"].clear()
    generate.generate(tmp_path, SETTINGS, data, jobs.Job(), process=(number, 2), meet=places.append)
    shares.append((list(stubs["made"]), len(stubs["loads"])))
  # of five units; the process with less to do loads as often, for loading is a meeting
  assert shares == [([0, 2, 4], 3), ([1, 3], 3)]
  assert places == ["begun", "done", "finished"] * 2
  assert not (tmp_path / "mini" / "manifest.json").exists()  # the second process writes none


def test_the_first_process_writes_the_manifest_when_all_is_there(cases, stubs, tmp_path):
  data = samples.load(cases)
  others = {"done": lambda: generate.generate(tmp_path, SETTINGS, data, jobs.Job(), process=(1, 2))}
  generate.generate(
    tmp_path,
    SETTINGS,
    data,
    jobs.Job(),
    process=(0, 2),
    meet=lambda place: others.pop(place, lambda: None)(),
  )
  manifest = json.loads((tmp_path / "mini" / "manifest.json").read_text())
  assert manifest["processes"] == 2 and manifest["seed"] == 1


def test_the_manifest_is_of_the_call_that_made_videos(cases, stubs, tmp_path):
  data, manifest = samples.load(cases), tmp_path / "mini" / "manifest.json"

  def told(word, **more):
    generate.generate(tmp_path, SETTINGS, data, jobs.Job(**more), command=[word])
    return json.loads(manifest.read_text())["command"]

  assert told("first") == ["first"]
  before = manifest.read_bytes()
  assert told("nothing") == ["first"] and manifest.read_bytes() == before
  assert told("part", part=(1, 2)) == ["first"]
  videos.place(tmp_path / "mini", data.samples[0]).unlink()
  assert told("other part", part=(0, 2)) == ["other part"]
  manifest.write_text("{")
  assert videos.made_by(tmp_path / "mini") is None
  assert told("again") == ["again"]

  def stopped(place):
    if place == "done":
      raise KeyboardInterrupt

  videos.place(tmp_path / "mini", data.samples[0]).unlink()
  with pytest.raises(KeyboardInterrupt):
    generate.generate(tmp_path, SETTINGS, data, jobs.Job(), meet=stopped)
  assert not manifest.exists()  # it would tell of the call before
  assert told("after") == ["after"]


def test_a_second_command_in_the_same_folder_is_refused(cases, stubs, tmp_path, capsys):
  with folders.held(tmp_path / "mini"):
    assert call("generate", f"--data={cases}", STEPS, f"--out={tmp_path}") == 2
    assert f"another command works in {tmp_path / 'mini'}" in capsys.readouterr().err
    # parts are several commands on purpose
    assert call("generate", f"--data={cases}", STEPS, f"--out={tmp_path}", "--part=2/2") == 0
  assert call("generate", f"--data={cases}", STEPS, f"--out={tmp_path}", "--part=1/2") == 0
  assert sorted(stubs["made"]) == [0, 1, 2, 3, 4]


def test_redo_never_removes_the_videos_of_other_parts(cases, stubs, tmp_path, capsys):
  words = [f"--data={cases}", STEPS, f"--out={tmp_path}", "--part=1/2"]
  assert call("generate", *words) == 0
  assert call("generate", *words, "--redo") == 2
  assert "--redo would remove the videos of the other parts than 1/2" in capsys.readouterr().err


def test_steps_asked_for_later_are_made_later(cases, stubs, tmp_path):
  words = [f"--data={cases}", STEPS, f"--out={tmp_path}"]
  assert call("generate", *words) == 0
  stubs["made"].clear()
  assert call("generate", *words) == 0 and stubs["made"] == []
  assert call("generate", *words, "--keep-steps=1") == 0
  assert sorted(stubs["made"]) == [0, 1, 2, 3, 4]


def test_guesses_are_written_and_read_as_they_come_and_let_go(cases, tmp_path, monkeypatch):
  card, mini = bundles.describe("mini").card, bundles.describe("mini").modules
  bundle = ModelBundle(params=(None,), parts=mini, card=card)
  chosen = dataclasses.replace(SETTINGS, steps=10)
  job = jobs.Job(steps=(2, 9))
  unit = jobs.units(samples.load(cases), card.latents, job, 1)[0]
  (sample,) = unit.samples

  def denoised(bundle, noise, *rest, on_piece, **more):
    x0 = np.zeros((10, 1, *noise.grid), np.float32)
    on_piece(
      Trace(sigma=np.ones(10), finite=np.ones((10, 1), bool), x0=x0, taps={}),
      slice(0, 10),
      slice(0, 1),
    )
    return x0[-1]

  def decoded(bundle, latents, **more):
    shape = (sample.frames, 32, 32, 3)
    return helpers.passing(np.full(shape, 20 * step, np.uint8) for step in range(len(latents)))

  monkeypatch.setattr(generate.runs, "run", denoised)
  monkeypatch.setattr(generate, "decode", lambda *_, **more: np.stack([*decoded(bundle, [0])]))
  monkeypatch.setattr(generate, "decode_each", decoded)
  told = []
  rest = (None, None, "parallel", None, told.append)
  generate.make(tmp_path, bundle, chosen, job, unit, *rest)
  assert told == [10]
  record = videos.record_of(tmp_path, sample)
  assert record is not None and len(record["answers"]["answer"]) == 10
  kept = [step for step in range(10) if generate.step_file(tmp_path, sample, step).is_file()]
  assert kept == [2, 9]
  shown = media.read_mp4(generate.step_file(tmp_path, sample, 9))[0]
  assert np.abs(shown.astype(int) - 180).max() <= 6


# The real command


def two(cases: Path, out: Path, number: int, port: int) -> subprocess.Popen:
  """One of two processes; each sample is a unit."""
  environment = {
    **os.environ,
    "XLA_FLAGS": "",
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(number),
  }
  words = ["vbvr", "generate", f"--data={cases}", STEPS, "--config.batch=1", f"--out={out}"]
  return subprocess.Popen(
    [sys.executable, "-m", "jax_videoreason", *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  )


@pytest.fixture(scope="session")
def alone(cases, tmp_path_factory) -> Path:
  """The videos of one process on one device, all in one batch, with maps of the tokens."""
  out = tmp_path_factory.mktemp("alone")
  words = [f"--data={cases}", STEPS, "--keep-steps=1", "--token-layers=0,11", f"--out={out}"]
  assert call("generate", *words) == 0
  return out / "mini"


def same(folder: Path, wanted: Path, cases: Path) -> None:
  """Both have all videos: the same answers at every step, pixels within what batches change."""
  for sample in samples.load(cases).samples:
    ours, theirs = (videos.record_of(place, sample) for place in (folder, wanted))
    assert ours is not None and theirs is not None
    assert ours["answers"]["answer"] == theirs["answers"]["answer"]
    of = [media.read_mp4(videos.place(place, sample))[0].astype(int) for place in (folder, wanted)]
    assert np.abs(of[0] - of[1]).mean() < 0.5


@pytest.mark.slow
def test_two_processes_make_the_videos_of_one(cases, alone, tmp_path):
  port = helpers.free_port()
  both = [two(cases, tmp_path, number, port) for number in range(2)]
  said = [process.communicate(timeout=400) for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  same(tmp_path / "mini", alone, cases)
  assert json.loads((tmp_path / "mini" / "manifest.json").read_text())["processes"] == 2
  assert "videos:" in said[0][0] and "videos:" not in said[1][0]  # only the first process speaks


@pytest.mark.slow
def test_when_a_process_dies_the_other_ends_soon_and_the_restart_goes_on(cases, alone, tmp_path):
  port = helpers.free_port()
  first, second = (two(cases, tmp_path, number, port) for number in range(2))
  while not (tmp_path / "mini" / "generation.json").exists():
    assert first.poll() is None
    time.sleep(0.1)
  second.send_signal(signal.SIGKILL)
  second.communicate()
  began = time.monotonic()
  _, said = first.communicate(timeout=200)
  assert time.monotonic() - began < 120
  assert first.returncode != 0 and said.strip()
  assert not (tmp_path / "mini" / "manifest.json").exists()
  words = [f"--data={cases}", STEPS, "--config.batch=1", f"--out={tmp_path}"]
  assert call("generate", *words) == 0
  same(tmp_path / "mini", alone, cases)


@pytest.fixture
def few(cases, tmp_path) -> Path:
  """Two of the cases."""
  for number in range(2):
    place = f"pick/{number:05d}"
    shutil.copytree(cases / place, tmp_path / "few" / place)
  return tmp_path / "few"


@pytest.mark.slow
def test_devices_of_a_mesh_make_the_videos_of_one(few, alone, tmp_path):
  words = [f"--data={few}", STEPS, f"--out={tmp_path / 'mesh'}", "--mesh=fsdp=2,context=2"]
  assert call("generate", *words) == 0
  same(tmp_path / "mesh" / "mini", alone, few)


@pytest.mark.slow
def test_an_ensemble_on_a_mesh_is_that_of_one_device(few, tmp_path):
  words = [f"--data={few}", STEPS, "--ensemble=paper"]
  assert call("generate", *words, f"--out={tmp_path / 'mesh'}", "--mesh=fsdp=2,context=2") == 0
  assert call("generate", *words, f"--out={tmp_path / 'one'}") == 0
  same(*(tmp_path / name / "mini-ensemble" for name in ("mesh", "one")), few)


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", ["none", "paper"])
def test_less_memory_at_once_makes_the_same_videos(few, ensemble, tmp_path, monkeypatch):
  loaded = []
  bring = checkpoint.load

  def load(*args, parts=None, **more):
    loaded.extend(part for part in parts if part.startswith("dit"))
    return bring(*args, parts=parts, **more)

  words = [f"--data={few}", "--config=mini_experts", "--config.steps=3", f"--ensemble={ensemble}"]
  assert call("generate", *words, f"--out={tmp_path / 'all'}") == 0
  monkeypatch.setattr(checkpoint, "load", load)
  less = ["--experts=1", "--sequential", f"--out={tmp_path / 'less'}"]
  assert call("generate", *words, *less) == 0
  # the ensemble's first step asks for the high noise expert too
  assert loaded == ["dit_0"] * (ensemble == "paper") + ["dit_0", "dit_1"]
  (one,), (other,) = ((tmp_path / name).glob("mini_experts*") for name in ("less", "all"))
  same(one, other, few)


def test_one_expert_at_a_time_is_refused_to_several_processes(cases, stubs, tmp_path):
  data = samples.load(cases)
  two = dataclasses.replace(SETTINGS, checkpoint="mini_experts")
  with pytest.raises(ValueError, match=r"--experts=1 with 2 processes, .* share the data out by"):
    generate.generate(tmp_path, two, data, jobs.Job(), process=(0, 2), experts=1)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_maps_of_the_tokens_lie_beside_the_videos(alone):
  place = alone / "feature_maps" / "id" / "pick" / "00000"
  assert (place / "tokens.npz").is_file()
  assert (place / "step_0001" / "L11_pca.png").is_file()
  assert (alone / "steps" / "id" / "pick" / "00000" / "step_001.mp4").is_file()


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--token-layers=0"], "give --keep-steps too"),
    (["--keep-steps=1", "--token-layers=0,12"], "--token-layers=0,12, wanted layers below 12"),
    (["--mesh=wide=2"], "'wide=2', wanted axes of seed, fsdp, context"),
    (["--mesh=fsdp=64"], "takes 64 devices"),
    (["--mesh=seed=2", "--ensemble=paper"], "give a --mesh of fsdp and context"),
  ],
)
def test_what_cannot_be_made_is_refused(cases, tmp_path, capsys, words, said):
  assert call("generate", f"--data={cases}", STEPS, f"--out={tmp_path}", *words) == 2
  assert said in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
