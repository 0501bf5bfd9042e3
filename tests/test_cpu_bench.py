"""The benchmarks of DiT, sampler and VAE answer every question, here at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def rows_of(script: str, *words: str) -> list[dict]:
  """The lines of a benchmark that is run on a CPU."""
  done = subprocess.run(
    [sys.executable, SCRIPTS / script, *words],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
    timeout=500,
  )
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.torch
def test_the_dit_is_compared_with_diffusers():
  words = ("--tokens=1280", "--width=32", "--layers=1", "--heads=2", "--pairs=2")
  (row,) = rows_of("bench_dit.py", *words)
  assert row["question"] == "speed of WanDiT over diffusers, float32, 1280 tokens"
  assert row["difference"] < 1e-4
  assert row["pairs"] == 2 and row["ratio"] > 0


@pytest.mark.slow
@pytest.mark.torch
def test_the_sampler_is_compared_with_diffusers_and_seeds_with_each_other():
  loop, batch = rows_of("bench_sampler.py", "--pairs=2", "--steps=2", "--seeds=2")
  assert loop["question"] == "speed of a 2-step sample over diffusers' loop"
  assert loop["difference"] < 1e-3
  assert batch["question"] == "2 seeds in one batch over one by one"
  assert loop["ratio"] > 0 and batch["ratio"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("vae", "more"), [("wan21", ("--seconds",)), ("wan22", ())])
def test_decoding_is_measured_by_chunk_and_by_tile(vae, more):
  size = (f"--vae={vae}", "--frames=9", "--height=32", "--width=288")
  rows = rows_of("bench_vae.py", *size, "--chunks", "1", "2", "--tiles", "none", "diffusers", *more)
  asked = [(row["tiles"], row["latent_frames_at_once"]) for row in rows]
  assert asked == [("none", 1), ("none", 2), ("diffusers", 1), ("diffusers", 2)]
  assert [row["calls"] > 1 for row in rows] == [False, False, True, True]
  for row in rows:
    parts = [row[f"{name}_gb"] for name in ("weights", "working", "video")]
    assert min(parts) > 0 and row["peak_gb"] == pytest.approx(sum(parts), abs=0.002)
    assert ("seconds_a_call" in row) == bool(more)
