"""A training: killed and resumed equals undisturbed, a NaN and other settings are told."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason import fitting
from jax_videoreason.training import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = TrainSettings(steps=8, batch=4, learning_rate=0.1, warmup=1)
PARAMS = {"slope": jnp.zeros(2)}


def batch_of(number):
  rng = np.random.default_rng(number)
  x = rng.normal(size=(4, 2)).astype(np.float32)
  return {"x": x, "y": x @ np.array([1.0, -2.0], np.float32), "bias": np.zeros(1, np.float32)}


def loss(params, batch, key):
  """A line with noise on its inputs, so that the key of the step counts too."""
  x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
  wrong = (x @ params["slope"] + batch["bias"] - batch["y"]) ** 2
  counts = jnp.array([3.0, 1.0, 0.0])
  bands = jnp.array([wrong[:3].mean(), wrong[3], 0.0])
  return jnp.mean(wrong), {"bands": bands, "band_counts": counts}


def stage(folder, **changes):
  folder.mkdir(exist_ok=True)
  given = {
    "name": "line",
    "folder": folder,
    "loss": loss,
    "settings": SETTINGS,
    "batch_of": batch_of,
    "seed": 0,
    "rows": 4,
    "data": {"cases": 10, "dit": {"layers": 12}},
    "save_seconds": 0.0,
    "look": 1,
  }
  return fitting.Stage(**(given | changes))


class Killed(Exception):
  pass


def killed_at(step):
  def batches(number):
    if number == step:
      raise Killed
    return batch_of(number)

  return batches


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("line") / "whole"
  return folder, fitting.fit(stage(folder), PARAMS)


def without_time(folder):
  clock = {"seconds", "per_second", "waited"}
  rows = fitting.read_log(folder / "line.jsonl")
  return [{key: row[key] for key in row.keys() - clock} for row in rows]


@pytest.mark.parametrize(
  ("kill", "save_seconds", "kept"), [(5, 0.0, 5), (3, 1e9, None), (0, 0.0, None)]
)
def test_a_killed_training_resumes_as_if_it_had_not_been(whole, tmp_path, kill, save_seconds, kept):
  begun = {"save_seconds": save_seconds, "batch_of": killed_at(kill)}
  with pytest.raises(Killed):
    fitting.fit(stage(tmp_path, **begun), PARAMS)
  asked = []

  def remembered(number):
    asked.append(number)
    return batch_of(number)

  again = fitting.fit(stage(tmp_path, batch_of=remembered), PARAMS)
  assert asked == list(range(kept or 0, 8))
  assert int(again.step) == 8
  jax.tree.map(np.testing.assert_array_equal, again, whole[1])
  assert without_time(tmp_path) == without_time(whole[0])


def test_every_step_draws_by_the_seed_of_the_training_and_its_number(tmp_path):
  def drawn(params, batch, key):
    return jax.random.normal(key) + 0.0 * params["slope"].sum(), {}

  fitting.fit(stage(tmp_path, loss=drawn, seed=3, save_seconds=1e9), PARAMS)
  keys = [jax.random.fold_in(jax.random.key(3), step) for step in range(8)]
  logged = [row["loss"] for row in fitting.read_log(tmp_path / "line.jsonl")]
  assert logged == pytest.approx([float(jax.random.normal(key)) for key in keys])


def test_a_finished_training_is_only_read(whole):
  before = (whole[0] / "line.jsonl").read_text()
  again = fitting.fit(stage(whole[0], batch_of=killed_at(8)), PARAMS)
  jax.tree.map(np.testing.assert_array_equal, again, whole[1])
  assert (whole[0] / "line.jsonl").read_text() == before


def test_a_line_of_the_log_that_a_kill_cut_short_is_left_out(whole, tmp_path):
  text = (whole[0] / "line.jsonl").read_text()
  (tmp_path / "log").write_text(text + '{"step": 9, "lo')
  assert fitting.read_log(tmp_path / "log") == fitting.read_log(whole[0] / "line.jsonl")


def test_devices_change_nothing_but_rounding(whole, tmp_path, monkeypatch):
  assert fitting.mesh_of(4).shape["seed"] == jax.device_count() == 4
  monkeypatch.setattr(fitting, "mesh_of", lambda rows: fitting.make_mesh())
  alone = fitting.fit(stage(tmp_path), PARAMS)
  np.testing.assert_allclose(alone.params["slope"], whole[1].params["slope"], rtol=1e-5)


@pytest.mark.parametrize(("rows", "count"), [(8, 4), (6, 2), (3, 1), (4, 4)])
def test_a_batch_lies_on_as_many_devices_as_divide_it(rows, count):
  mesh = fitting.mesh_of(rows)
  assert (mesh.size, mesh.shape["seed"]) == (4, count)
  batch = {"x": np.arange(rows, dtype=np.float32), "shared": np.ones(1, np.float32)}
  put = fitting.placed(lambda number: batch, 0, mesh)
  parts = [len(shard.data) for shard in put["x"].addressable_shards]
  assert parts == [rows // count] * 4
  assert put["shared"].is_fully_replicated
  np.testing.assert_array_equal(put["x"], batch["x"])


def poisoned(number):
  batch = batch_of(number)
  return batch if number < 3 else {**batch, "y": np.full(4, np.nan, np.float32)}


def test_a_loss_that_is_not_finite_ends_at_the_last_good_checkpoint(tmp_path):
  told = r"not finite at step 3; the last good checkpoint is 3 in .*line_state: give another"
  with pytest.raises(FloatingPointError, match=told):
    fitting.fit(stage(tmp_path, batch_of=poisoned), PARAMS)
  good = fitting.newest("line", tmp_path, PARAMS)
  assert int(good.step) == 3
  assert np.isfinite(good.params["slope"]).all()
  for look, kept in ((2, "the last good checkpoint is 2"), (8, "no checkpoint was kept")):
    bad = stage(tmp_path / str(look), batch_of=poisoned, look=look)
    with pytest.raises(FloatingPointError, match=f"at step 3; {kept}"):
      fitting.fit(bad, PARAMS)


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"data": {"cases": 12, "dit": {"layers": 12}}}, r"cases=10 there and 12 here"),
    ({"data": {"cases": 10, "dit": {"layers": 8}}}, r"dit.layers=12 there and 8 here"),
    ({"settings": TrainSettings(steps=8, batch=4, learning_rate=0.2, warmup=1)}, "learning_rate"),
    ({"seed": 1}, r"seed=0 there and 1 here"),
  ],
)
def test_a_state_of_other_settings_is_refused_by_name(whole, changes, told):
  with pytest.raises(ValueError, match=rf"{told}.*: give the same, or another --work"):
    fitting.fit(stage(whole[0], **changes), PARAMS)


def test_the_log_and_its_picture_get_losses_per_band_and_what_was_watched(tmp_path):
  shown, seen = [], []

  def watch(step, ema):
    seen.append((step, np.asarray(ema["slope"])))
    yield {"task": "maze", "score": step / 10}

  state = fitting.fit(
    stage(tmp_path, watch=watch, every=3, look=2), PARAMS, show=lambda rows: shown.append(rows)
  )
  rows = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
  assert shown[-1] == rows
  assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8]
  watched = [(row["step"], row["score"]) for row in rows if "task" in row]
  assert watched == [(4, 0.4), (6, 0.6), (8, 0.8)]
  np.testing.assert_array_equal(seen[-1][1], state.ema["slope"])
  for row in rows:
    if "loss" in row:
      a, b, none = row["bands"]
      assert none is None
      assert (3 * a + b) / 4 == pytest.approx(row["loss"], rel=1e-5)
      assert 0 <= row["waited"] <= 1 and row["per_second"] > 0


def test_a_training_killed_before_its_first_checkpoint_may_take_other_settings(whole, tmp_path):
  begun = stage(tmp_path, seed=1, batch_of=killed_at(3), save_seconds=1e9)
  with pytest.raises(Killed):
    fitting.fit(begun, PARAMS)
  again = fitting.fit(stage(tmp_path), PARAMS)
  jax.tree.map(np.testing.assert_array_equal, again, whole[1])
  assert json.loads(begun.record.read_text())["seed"] == 0


def test_minutes_end_a_training_with_a_checkpoint_that_goes_on(whole, tmp_path):
  early = fitting.fit(stage(tmp_path, minutes=0.0, look=2, save_seconds=1e9), PARAMS)
  assert int(early.step) == int(fitting.newest("line", tmp_path, PARAMS).step) == 2
  again = fitting.fit(stage(tmp_path), PARAMS)
  jax.tree.map(np.testing.assert_array_equal, again, whole[1])


def test_the_clock_decides_when_a_training_ends_and_what_it_keeps(tmp_path, monkeypatch):
  clock, told = [0.0], []
  monkeypatch.setattr(fitting, "time", SimpleNamespace(monotonic=lambda: clock[0]))

  def advance(steps):
    told.append(steps)
    clock[0] += 30.0 * steps

  def kept():
    return sorted(int(path.name) for path in (tmp_path / "line_state").iterdir())

  often = {"save_seconds": 50.0}  # every second step of 30 s
  early = fitting.fit(stage(tmp_path, minutes=2.9, **often), PARAMS, advance=advance)
  assert (int(early.step), kept()) == (6, [4, 6])
  fitting.fit(stage(tmp_path, look=2, **often), PARAMS, advance=advance)
  assert told == [0, 1, 1, 1, 1, 1, 1, 6, 2]
  assert kept() == [6, 8]
  rows = fitting.read_log(tmp_path / "line.jsonl")
  assert [row["seconds"] for row in rows] == [30, 60, 90, 120, 150, 180, 60]
  assert {row["per_second"] for row in rows} == {0.03}


def test_a_row_of_the_log_weighs_the_loss_of_a_band_by_the_cases_in_it():
  def step(loss, bands, counts):
    found = {"loss": loss, "finite": True, "bands": bands, "band_counts": counts}
    return jax.tree.map(np.asarray, found, is_leaf=lambda leaf: isinstance(leaf, list))

  row = fitting.means(
    [step(1.0, [2.0, 0.0, 0.0], [3, 0, 0]), step(2.0, [6.0, 5.0, 0.0], [1, 2, 0])]
  )
  assert row == {"loss": 1.5, "bands": [(3 * 2.0 + 6.0) / 4, 5.0, None]}


def test_the_newest_checkpoint_of_nothing_is_refused(tmp_path):
  with pytest.raises(ValueError, match="line_state holds no checkpoint: train the stage 'line'"):
    fitting.newest("line", tmp_path, PARAMS)


PROCESS = """
import pathlib, sys
import jax
sys.path[:0] = [{tests!r}, {root!r}]
from jax_videoreason import distributed
distributed.initialize()
import test_fitting as t
folder = pathlib.Path(sys.argv[1])
seen = []
watch = lambda step, ema: seen.append(step) or [{{"task": "maze", "score": float(len(ema))}}]
early = t.fitting.fit(t.stage(folder, watch=watch, minutes=0.0, look=3), t.PARAMS)
assert int(early.step) == 3
state = t.fitting.fit(t.stage(folder, watch=watch, look=2), t.PARAMS)
assert bool(seen) == (jax.process_index() == 0)
print(jax.process_count(), jax.device_count(), *state.params["slope"].tolist())
"""


@pytest.mark.slow
def test_two_processes_that_share_the_folder_train_as_one(whole, tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  code = PROCESS.format(tests=str(ROOT / "tests"), root=str(ROOT))
  several = {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PLATFORMS": "cpu",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code, str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env={**os.environ, **several, "JAX_PROCESS_ID": str(number), "XLA_FLAGS": ""},
    )
    for number in range(2)
  ]
  said = [process.communicate(timeout=300)[0] for process in processes]
  for process, text in zip(processes, said, strict=True):
    assert process.returncode == 0, text
    count, devices, *slope = text.splitlines()[-1].split()
    assert (count, devices) == ("2", "2")
    np.testing.assert_allclose(np.array(slope, float), whole[1].params["slope"], rtol=1e-5)
  rows = fitting.read_log(tmp_path / "line.jsonl")
  assert [row["step"] for row in rows if "loss" in row] == [3, 4, 6, 8]
