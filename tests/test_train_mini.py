"""The training script: killed and resumed equals undisturbed, a NaN and other settings are told."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason.training import TrainSettings

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "train_mini.py"
SETTINGS = TrainSettings(steps=8, batch=4, learning_rate=0.1, warmup=1)
PARAMS = {"slope": jnp.zeros(2)}


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("train_mini", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def batch_of(number):
  rng = np.random.default_rng(number)
  x = rng.normal(size=(4, 2)).astype(np.float32)
  return {"x": x, "y": x @ np.array([1.0, -2.0], np.float32)}


def loss(params, batch, key):
  return jnp.mean((batch["x"] @ params["slope"] - batch["y"]) ** 2), {}


def plan(script, work, **changes):
  work.mkdir(exist_ok=True)
  given = {
    "stage": "line",
    "work": work,
    "loss": loss,
    "settings": SETTINGS,
    "batch_of": batch_of,
    "seed": 0,
    "rows": 4,
    "data": {"cases": 10},
    "save_seconds": 0.0,
  }
  return script.Plan(**(given | changes))


class Killed(Exception):
  pass


def test_a_killed_training_resumes_as_if_it_had_not_been(script, tmp_path):
  whole = script.fit(plan(script, tmp_path / "whole"), PARAMS)

  def killed_at_five(number):
    if number == 5:
      raise Killed
    return batch_of(number)

  with pytest.raises(Killed):
    script.fit(plan(script, tmp_path / "parts", batch_of=killed_at_five), PARAMS)
  again = script.fit(plan(script, tmp_path / "parts"), PARAMS)
  assert int(again.step) == 8
  np.testing.assert_array_equal(again.params["slope"], whole.params["slope"])
  np.testing.assert_array_equal(again.ema["slope"], whole.ema["slope"])
  assert json.loads((tmp_path / "whole" / "line.jsonl").read_text())["step"] == 8
  assert (tmp_path / "whole" / "line.png").exists()


def test_a_loss_that_is_not_finite_ends_at_the_last_good_checkpoint(script, tmp_path):
  def poisoned(number):
    batch = batch_of(number)
    return batch if number < 3 else {**batch, "y": np.full(4, np.nan, np.float32)}

  with pytest.raises(SystemExit, match="not finite at step 3; the last good checkpoint is 3 in"):
    script.fit(plan(script, tmp_path / "bad", batch_of=poisoned), PARAMS)


def test_a_state_of_other_settings_is_refused_by_name(script, tmp_path):
  script.fit(plan(script, tmp_path / "work"), PARAMS)
  with pytest.raises(SystemExit, match=r"trained with cases=10 \(now 12\): give the same"):
    script.fit(plan(script, tmp_path / "work", data={"cases": 12}), PARAMS)
