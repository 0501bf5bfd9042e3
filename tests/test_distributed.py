"""Which processes belong together, as the environment says it, and one model over two of them."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_videoreason import cli, distributed, media, open_run, store, tasks
from jax_videoreason.cli import sample
from jax_videoreason.structs import Trace
from jax_videoreason.taps import TapSpec

ALL = {
  "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "2",
}


def test_one_process_needs_nothing():
  assert distributed.wanted({}) is None
  assert distributed.wanted({"TPU_WORKER_HOSTNAMES": "localhost", "SLURM_NTASKS": "1"}) is None
  assert distributed.wanted({**ALL, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
  distributed.meet("anywhere")


def test_the_three_names_say_it_all():
  assert distributed.wanted(ALL) == {
    "coordinator_address": "10.0.0.1:1234",
    "num_processes": 4,
    "process_id": 2,
  }


@pytest.mark.parametrize(
  "environment", [{"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, {"SLURM_NTASKS": "2"}]
)
def test_jax_finds_them_on_cloud_tpu_and_slurm(environment):
  assert distributed.wanted(environment) == {}


@pytest.mark.parametrize("name", ALL)
def test_a_missing_name_is_told(name):
  with pytest.raises(ValueError, match=f"and {name} is not: set all three, or none"):
    distributed.wanted({key: value for key, value in ALL.items() if key != name})


def test_numbers_that_contradict_each_other_are_refused():
  with pytest.raises(ValueError, match="JAX_PROCESS_ID=4, wanted whole numbers, the second below"):
    distributed.wanted({**ALL, "JAX_PROCESS_ID": "4"})


def test_several_processes_want_a_mesh_of_all_devices():
  assert sample.mesh_of(None, 1) is None
  four = sample.mesh_of("fsdp=2,context=2", 2)
  assert four is not None
  assert four.size == jax.device_count() == 4
  for axes in (None, "fsdp=2"):
    with pytest.raises(ValueError, match=f"mesh={axes} for 2 processes with 4 devices in all"):
      sample.mesh_of(axes, 2)


def test_processes_write_one_trace_by_their_shares(tmp_path):
  rng = np.random.default_rng(0)
  spec = TapSpec(sites=("attn_out",), steps=(1, 2, 4))
  whole = Trace(
    sigma=np.linspace(1, 0.2, 5),
    finite=np.ones((5, 2), bool),
    latents=rng.normal(size=(5, 2, 1, 2, 2, 4)).astype(np.float32),
    x0=rng.normal(size=(5, 2, 1, 2, 2, 4)).astype(np.float32),
    taps={"attn_out/norm": rng.normal(size=(3, 3, 1, 2, 6)).astype(np.float32)},
  )
  with (
    store.create_trace(tmp_path, steps=5, runs=2, taps=spec, process=(0, 2)) as first,
    store.create_trace(tmp_path, steps=5, runs=2, taps=spec, process=(1, 2)) as second,
  ):
    second.write(whole)
    first.write(whole)
  store.write_runs(tmp_path, [{"seed": seed, "prompt": ""} for seed in range(2)])
  store.write_manifest(tmp_path, config={}, command=[], device="cpu")
  found = open_run(tmp_path)
  np.testing.assert_array_equal(found.sigma, whole.sigma)
  np.testing.assert_array_equal(found.finite, whole.finite)
  for stored, wanted in (
    (found.latents, whole.latents),
    (found.x0, whole.x0),
    (found.taps["attn_out/norm"], whole.taps["attn_out/norm"]),
  ):
    assert stored is not None
    np.testing.assert_array_equal(stored[:], wanted)


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def host(number: int, port: int, words: list[str]) -> subprocess.Popen:
  """One of two processes with two devices each, which stand in for two hosts."""
  environment = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(number),
  }
  command = [sys.executable, "-m", "jax_videoreason", *words]
  return subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh", "route"), [("fsdp=2,context=2", "gather"), ("seed=2,context=2", "ring")]
)
def test_one_model_over_two_processes_equals_one_process(mesh, route, tmp_path):
  values = cli.load_config("mini")
  task = tasks.load("maze", size=values.height, frames=values.frames)
  media.write_png(tmp_path / "first.png", task.generate("id", 0).first_frame)
  words = ["sample", "--config=mini:steps=3,piece=2,seeds=2", "--prompt=go"]
  words += [f"--image={tmp_path / 'first.png'}", "--config.taps.sites=('attn_out',)"]
  port, out = free_port(), tmp_path / "two"
  ours = [*words, f"--mesh={mesh}", f"--route={route}", f"--out={out}"]
  both = [host(number, port, ours) for number in range(2)]
  said = [process.communicate(timeout=900) for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  assert "report" in said[0][0]
  assert "report" not in said[1][0]  # only the first process speaks
  assert cli.main([*words, f"--out={tmp_path / 'one'}"]) == 0
  two, one = open_run(out), open_run(tmp_path / "one")
  two.verify()
  assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in one.path.iterdir())
  assert two.manifest["processes"] == 2
  for name in ("final_latents", "sigma", "finite"):
    np.testing.assert_allclose(getattr(two, name), getattr(one, name), atol=1e-5)
  for name in ("latents", "x0"):
    np.testing.assert_allclose(getattr(two, name)[:], getattr(one, name)[:], atol=1e-5)
  stored, wanted = (run.taps["attn_out/norm"][:] for run in (two, one))
  np.testing.assert_allclose(stored, wanted, rtol=1e-5)
