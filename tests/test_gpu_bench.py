"""The benchmark for GPUs answers every question, here on the shipped model's shape on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_gpu.py"


@pytest.fixture(scope="module")
def script():
  sys.path.insert(0, str(SCRIPT.parent))
  spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  sys.path.remove(str(SCRIPT.parent))
  return module


@pytest.mark.parametrize(
  ("config", "tokens", "experts"),
  [("wan22_i2v_a14b:480p", 32_760, 2), ("wan22_ti2v_5b", 27_280, 1)],
)
def test_the_published_shapes_are_cut_to_the_layers_asked_for(script, config, tokens, experts):
  problem, flops = script.shape_of(config, 4)
  assert (problem.sizes.T, problem.sizes.L, len(problem.experts)) == (tokens, 4, experts)
  assert problem.model.parts.dit.config.dtype == "bfloat16"
  _, twice = script.shape_of(config, 8)
  assert twice == pytest.approx(2 * flops)


@pytest.mark.slow
@pytest.mark.torch
def test_every_question_is_answered():
  words = [sys.executable, str(SCRIPT), "--config=mini", "--layers=2", "--square=256"]
  done = subprocess.run(
    [*words, "--repeats=2"],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [row["question"] for row in rows] == [
    "matrix rate",
    "matmuls of a block",
    "attention of a block",
    "a stack of blocks",
    "a step with guidance",
    "speed of a stack of blocks over diffusers",
  ]
  for row in rows[1:4]:
    assert row["share"] == pytest.approx(row["tflops"] / rows[0]["tflops"], rel=0.2, abs=0.02)
    assert row["tokens"] == 80
  assert rows[4]["ms"] > 0
  assert rows[5]["attention"] not in rows[5]["refused"]
