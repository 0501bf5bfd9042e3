"""The sampler compiles for Cloud TPU slices, and fits on them, without a TPU.

libtpu takes a lock, so one process compiles at a time; run without -n.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [
  pytest.mark.pods,
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra pods)"
  ),
]

CODE = """
import dataclasses, json, sys
from jax_videoreason import cli, plan, settings, sharding
config, on, mesh, steps = sys.argv[1:]
values = cli.load_config(config).to_dict()
values["steps"] = int(steps)
chosen = settings.from_config(values)
problem = plan.Problem(model=plan.model(chosen.checkpoint), chosen=chosen, runs=1)
made = plan.make(problem, plan.target(on), sharding.axes_of(mesh) if mesh else None)
said = dataclasses.asdict(made)
said.pop("target")
print(json.dumps({**said, "fits": made.fits, "tokens": problem.sizes.T}))
"""


def planned(config: str, on: str, mesh: str = "", steps: int = 50) -> dict:
  """The plan of one run, from a process of its own: libtpu must not see this one's devices."""
  done = subprocess.run(
    [sys.executable, "-c", CODE, config, on, mesh, str(steps)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  ("on", "mesh"),
  [
    ("v5p:2x2x4", "fsdp=4,context=4"),
    ("v5e:4x8", "fsdp=8,context=4"),
    ("v6e:4x8", "fsdp=8,context=4"),
  ],
)
def test_a14b_at_480p_with_guidance_and_a_full_trace_fits(on, mesh):
  found = planned("wan22_i2v_a14b:480p", on, mesh)
  assert found["tokens"] == 32_760  # which 16 and 32 devices cannot share evenly
  assert found["compiled"]
  assert found["fits"]
  assert found["compile_seconds"] < 180
  assert found["collectives"]["all-gather"] > 0


@pytest.mark.timeout(900)
def test_a14b_at_720p_fits_on_64_chips():
  found = planned("wan22_i2v_a14b:720p", "v5p:4x4x4", "fsdp=16,context=4")
  assert found["tokens"] == 75_600
  assert found["fits"]


@pytest.mark.timeout(900)
def test_fifty_steps_compile_as_fast_as_ten():
  ten, fifty = (planned("wan22_i2v_a14b:480p", "v5p:2x2x4", "", n) for n in (10, 50))
  assert fifty["compile_seconds"] < 1.1 * ten["compile_seconds"] + 5
