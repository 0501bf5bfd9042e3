"""The manifest of a GKE JobSet, held to what the package asks of it; a bucket to try it on."""

import errno
import math
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The file system without a kernel above it, with folders of at most one file renamed."""

  class FuseOSError(OSError):
    def __init__(self, code):
      super().__init__(code, os.strerror(code))

  fuse = SimpleNamespace(Operations=object, FuseOSError=FuseOSError)
  monkeypatch.setitem(sys.modules, "mfusepy", fuse)
  script = runpy.run_path(str(ROOT / "scripts" / "pod" / "bucket.py"))
  (tmp_path / "store").mkdir()
  return script["Bucket"](tmp_path / "store", 1)


def put(bucket, path, content):
  opened = bucket.create(path, 0o644)
  bucket.write(path, content, 0, opened)
  return opened


def test_a_bucket_holds_whole_files_from_their_close_on(bucket):
  opened = put(bucket, "/file", b"content")
  assert (bucket.store / "file").read_bytes() == b""
  bucket.flush("/file", opened)
  bucket.release("/file", opened)
  assert (bucket.store / "file").read_bytes() == b"content"
  assert bucket.getattr("/file")["st_size"] == 7
  again = bucket.open("/file", os.O_WRONLY | os.O_APPEND)
  bucket.write("/file", b" more", 7, again)
  bucket.rename("/file", "/other")
  bucket.flush("/other", again)
  bucket.release("/other", again)
  read = bucket.open("/other", os.O_RDONLY)
  assert bucket.read("/other", 100, 0, read) == b"content more"
  with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
    bucket.getattr("/file")


def test_a_bucket_renames_a_folder_of_few_files_alone(bucket):
  bucket.mkdir("/a", 0o755)
  bucket.mkdir("/a/deep", 0o755)
  bucket.rename("/a", "/b")
  assert sorted(bucket.readdir("/", None)) == [".", "..", "b"]
  opened = put(bucket, "/b/deep/file", b"content")
  bucket.flush("/b/deep/file", opened)
  assert sorted(bucket.readdir("/b", None)) == [".", "..", "deep"]
  with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
    bucket.rename("/b", "/c")
  with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
    bucket.rmdir("/b/deep")
  bucket.unlink("/b/deep/file")
  bucket.rmdir("/b/deep")
  assert sorted(bucket.readdir("/b", None)) == [".", ".."]
