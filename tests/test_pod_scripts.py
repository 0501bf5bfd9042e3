"""The manifest of a GKE JobSet, held to what the package asks of it."""

import math
import re
from pathlib import Path

import pytest
import yaml

from jax_videoreason import cli, distributed
from jax_videoreason.cli import sweep

ROOT = Path(__file__).resolve().parent.parent
CHIPS = 4  # of a v5p host


@pytest.fixture(scope="module")
def job() -> dict:
  """The one job of the set."""
  found = yaml.safe_load((ROOT / "scripts" / "pod" / "jobset.yaml").read_text())
  assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert found["spec"]["failurePolicy"]["maxRestarts"] > 0  # a sweep goes on where it stopped
  (replicated,) = found["spec"]["replicatedJobs"]
  assert replicated["replicas"] == 1  # one slice
  return replicated["template"]["spec"]


@pytest.fixture(scope="module")
def pod(job) -> dict:
  return job["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod) -> dict:
  (one,) = pod["containers"]
  return one


def test_a_process_runs_on_every_host_of_the_slice(job, pod, container):
  chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
  assert container["resources"]["limits"] == {"google.com/tpu": CHIPS}
  assert job["parallelism"] == job["completions"] == chips // CHIPS
  head = (ROOT / "scripts" / "pod" / "jobset.yaml").read_text().partition("apiVersion")[0]
  assert re.findall(r"\d+(?= chips| hosts)", head) == [f"{chips}", f"{chips // CHIPS}"]


def test_one_process_that_fails_ends_the_job_and_the_set_starts_all_again(job, pod):
  assert job["backoffLimit"] == 0
  assert pod["restartPolicy"] == "Never"
  assert pod["shareProcessNamespace"] is True


def test_the_command_is_one_that_is_understood(container):
  name, command, *words = container["command"]
  assert (name, command) == ("videoreason", "sweep")
  flags, left = cli.parse(sweep, words)
  assert left == []
  mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
  assert any(Path(flags.out).is_relative_to(place) for place in mounts)
  weights = Path(container["workingDir"]) / cli.resolved(flags)["checkpoint"]
  assert any(weights.is_relative_to(place) for place in mounts)


def test_every_mounted_folder_is_a_volume(pod, container):
  mounted = {mount["name"] for mount in container["volumeMounts"]}
  assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_nothing_stands_in_the_way_of_finding_the_other_hosts(job, pod, container):
  """GKE says the hosts to a pod that asks for the chips of a slice, unless it says otherwise."""
  assert "cloud.google.com/gke-tpu-accelerator" in pod["nodeSelector"]
  own = {variable["name"]: variable.get("value", "") for variable in container.get("env", ())}
  assert not own.keys() & {*distributed.NAMED, "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"}
  hosts = ",".join(f"videoreason-hosts-0-{n}.videoreason" for n in range(job["completions"]))
  assert distributed.wanted({**own, "TPU_WORKER_HOSTNAMES": hosts, "TPU_WORKER_ID": "1"}) == {}
