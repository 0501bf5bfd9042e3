"""Which processes belong together, as the environment says it, and one model over two of them."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import helpers
from jax_videoreason import cli, distributed, media, open_run, store, tasks
from jax_videoreason.cli import sample
from jax_videoreason.structs import Trace
from jax_videoreason.taps import TapSpec

ROOT = Path(__file__).resolve().parent.parent
ALL = {
  "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "2",
}


STEP = {"SLURM_STEP_NODELIST": "a[1-2]"}  # what srun sets and a job has not


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
  "environment",
  [
    {"TPU_WORKER_HOSTNAMES": "a,b,c,d"},
    {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"},
    {**STEP, "SLURM_NTASKS": "2"},
    {**STEP, "SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
  ],
)
def test_jax_finds_them_on_gke_and_slurm(environment):
  assert distributed.wanted(environment) == {}


class Metadata(http.server.BaseHTTPRequestHandler):
  """The server of a cloud that numbers the hosts of a slice."""

  def do_GET(self) -> None:
    known = self.path == "/agent-worker-number" and self.headers["Metadata-Flavor"] == "Google"
    self.send_response(200 if known else 404)
    self.end_headers()

  def log_message(self, *_) -> None:
    """Says nothing."""


def test_jax_finds_them_on_a_cloud_tpu_vm(monkeypatch):
  chips = {"TPU_ML_PLATFORM": "JAX"}  # as JAX says when it is imported there
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(distributed, "WORKER", f"{where}/agent-worker-number")
    assert distributed.wanted(chips) == {}
    assert distributed.wanted({}) is None
    assert distributed.wanted({**chips, "TPU_SKIP_MDS_QUERY": "1"}) is None
    assert distributed.wanted({**chips, "TPU_WORKER_HOSTNAMES": "localhost"}) is None
    monkeypatch.setattr(distributed, "WORKER", f"{where}/nothing")  # of a machine that is no slice
    assert distributed.wanted(chips) is None
    server.shutdown()
  assert distributed.wanted(chips) is None  # no server answers


def test_one_process_of_a_slurm_node_takes_all_its_gpus():
  node = {**STEP, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
  assert distributed.wanted(node) == {"local_device_ids": [0, 1, 2, 3]}
  assert distributed.wanted({**node, "JAX_LOCAL_DEVICE_IDS": "0,1"}) == {}


def test_a_slurm_job_without_srun_is_one_process():
  assert distributed.wanted({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) is None


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


def named(number: int, port: int) -> dict[str, str]:
  return {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(number),
  }


def slurm(number: int, port: int) -> dict[str, str]:
  """What srun sets for one of two tasks on two nodes."""
  return {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(number),
    "SLURM_LOCALID": "0",
    "JAX_COORDINATOR_PORT": str(port),  # else it follows from the job
  }


# A process of a job in the background is deaf to Ctrl-C from the start.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = f"import runpy; {HEARS}; runpy.run_module('jax_videoreason', run_name='__main__')"


def host(said: dict[str, str], words: list[str], code: str = COMMAND) -> subprocess.Popen:
  """One of two processes with two devices each, which stand in for two hosts."""
  environment = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
    **said,
  }
  return subprocess.Popen(
    [sys.executable, "-c", code, *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  )


def question(folder: Path) -> list[str]:
  """The words that ask about a maze, of which the first frame is written there."""
  values = cli.load_config("mini")
  task = tasks.load("maze", size=values.height, frames=values.frames)
  media.write_png(folder / "first.png", task.generate("id", 0).first_frame)
  return ["--prompt=go", f"--image={folder / 'first.png'}"]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh", "route", "found"),
  [("fsdp=2,context=2", "gather", named), ("seed=2,context=2", "ring", slurm)],
)
def test_one_model_over_two_processes_equals_one_process(mesh, route, found, tmp_path):
  words = ["sample", "--config=mini:steps=3,piece=2,seeds=2", "--config.taps.sites=('attn_out',)"]
  words += question(tmp_path)
  port, out = helpers.free_port(), tmp_path / "two"
  ours = [*words, f"--mesh={mesh}", f"--route={route}", f"--out={out}"]
  both = [host(found(number, port), ours) for number in range(2)]
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
    np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-5, atol=1e-5)
  for name in ("latents", "x0"):
    np.testing.assert_allclose(getattr(two, name)[:], getattr(one, name)[:], rtol=1e-5, atol=1e-5)
  stored, wanted = (run.taps["attn_out/norm"][:] for run in (two, one))
  np.testing.assert_allclose(stored, wanted, rtol=1e-5)


FAULTS = {
  # the process at fault: its status, what it says
  "out": (0, 2, "is not empty (it has mine.txt)"),
  "interrupt": (0, 130, "interrupted."),
  "terminate": (1, -signal.SIGTERM, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_where_one_process_fails_all_end_soon_and_it_says_why(fault, tmp_path):
  out = tmp_path / "out"
  words = ["sample", "--config=mini:steps=400", "--mesh=fsdp=2,context=2", f"--out={out}"]
  words += question(tmp_path)
  out.mkdir()
  if fault == "out":
    (out / "mine.txt").touch()  # the first process alone looks at the folder
  number, status, said = FAULTS[fault]
  port = helpers.free_port()
  both = [host(named(number, port), words) for number in range(2)]
  while fault != "out" and not list(out.rglob("zarr.json")):
    assert both[0].poll() is None, both[0].communicate()
    time.sleep(0.1)
  if fault == "interrupt":
    both[number].send_signal(signal.SIGINT)
  if fault == "terminate":
    both[number].send_signal(signal.SIGTERM)
  ended(both, number, status, said)
  if fault == "out":
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


NO_ROOM = """
from jax_videoreason.cli import decoding
def decode(*args, **options):
  raise MemoryError
decoding.decode = decode
"""


@pytest.mark.slow
def test_where_the_first_process_can_not_decode_all_end_and_the_run_stays(tmp_path):
  out = tmp_path / "out"
  words = ["sample", "--config=mini:steps=2,seeds=1", "--mesh=fsdp=2,context=2", f"--out={out}"]
  words += question(tmp_path)
  port = helpers.free_port()
  both = [host(named(number, port), words, NO_ROOM + COMMAND) for number in range(2)]
  ended(both, 0, 2, f"`videoreason report {out} --tiles=diffusers` goes on in tiles")
  open_run(out).verify()
  assert cli.main(["report", str(out)]) == 0
  assert open_run(out).undecoded is None


def ended(both: list[subprocess.Popen], number: int, status: int, said: str) -> None:
  """One has ended so, and within a minute the other, which tells of it."""
  errors = both[number].communicate(timeout=120)[1]
  began = time.monotonic()
  others = both[1 - number].communicate(timeout=120)[1]
  assert time.monotonic() - began < 60
  assert both[number].returncode == status, errors
  assert said in errors
  assert both[1 - number].returncode != 0
  assert any(told in others for told in ("another task died", "If another one has ended")), others


WAITING = """
import sys, time
from jax_videoreason import cli, distributed
from jax_videoreason.cli import tasks
def main(flags, words):
  distributed.initialize()
  print("joined", flush=True)
  {act}
tasks.main = main
sys.exit(cli.main(["tasks", "export"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("act", "status", "said"),
  [
    ("distributed.meet('somewhere')", 130, "videoreason: interrupted."),
    ("raise SystemExit(3)", 1, "SystemExit: 3"),
  ],
)
def test_a_process_that_waits_hears_ctrl_c_and_one_that_leaves_holds_nobody(act, status, said):
  port, environments = helpers.free_port(), []
  for number in range(2):
    environments.append({**os.environ, "JAX_PLATFORMS": "cpu", **named(number, port)})
  both = [
    subprocess.Popen(
      [sys.executable, "-c", HEARS + WAITING.format(act=does)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for does, environment in zip(("time.sleep(200)", act), environments, strict=True)
  ]
  assert both[1].stdout is not None
  # On the same stream the library that connects CPUs prints, from threads, pieces of lines.
  assert any("joined" in line for line in iter(both[1].stdout.readline, ""))
  if status == 130:
    time.sleep(2)
    both[1].send_signal(signal.SIGINT)
  ended(both, 1, status, said)


PODS = ROOT / "scripts" / "pod"


@pytest.mark.parametrize("script", sorted(PODS.glob("*.sh")), ids=lambda path: path.name)
def test_the_shell_understands_the_scripts(script):
  assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.slow
def test_two_processes_stand_in_for_two_hosts(tmp_path):
  command = tmp_path / "videoreason"
  command.write_text(f'#!/bin/sh\nexec {sys.executable} -m jax_videoreason "$@"\n')
  command.chmod(0o755)
  words = ["sample", "--config=mini:steps=2", "--mesh=fsdp=2,context=2", *question(tmp_path)]
  environment = {
    **os.environ,
    "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    "PORT": str(helpers.free_port()),
  }
  for status in (0, 2):  # the second time the folder is not empty
    done = subprocess.run(
      [PODS / "two_hosts.sh", *words, f"--out={tmp_path / 'out'}"],
      env=environment,
      capture_output=True,
      text=True,
      check=False,
      timeout=300,
    )
    assert done.returncode == status, done.stderr
  assert "is not empty" in done.stderr
  assert open_run(tmp_path / "out").manifest["processes"] == 2
