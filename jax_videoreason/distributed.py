"""Several processes that run one program: found by themselves on Cloud TPU, GKE and Slurm.

Elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say
it. Must come before anything asks for a device.
"""

import contextlib
import itertools
import math
import os
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_videoreason.axes import Array

HEARTBEAT_SECONDS = 20  # without a sign of life from a process, the others end
WORKER = (
  "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number"
)
NAMED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def wanted(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """The arguments of `jax.distributed.initialize` that the environment says; None = one process.

  {} = several, which JAX finds out itself. ValueError: only some of the three names are set.
  """
  there = [name for name in NAMED if environment.get(name)]
  if there and len(there) < len(NAMED):
    missing = " and ".join(name for name in NAMED if name not in there)
    raise ValueError(f"{there[0]} is set and {missing} is not: set all three, or none.")
  if there:
    address, count, number = (environment[name] for name in NAMED)
    if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
      raise ValueError(
        f"{NAMED[1]}={count} and {NAMED[2]}={number}, wanted whole numbers, the second below the "
        "first."
      )
    if int(count) == 1:
      return None
    return {
      "coordinator_address": address,
      "num_processes": int(count),
      "process_id": int(number),
    }
  tasks = environment.get("SLURM_NTASKS", "1")
  if "SLURM_STEP_NODELIST" in environment and tasks.isdigit() and int(tasks) > 1:  # by srun
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    one_a_node = environment.get("SLURM_STEP_NUM_NODES") == tasks
    if one_a_node and gpus.isdigit() and not environment.get("JAX_LOCAL_DEVICE_IDS"):
      # else JAX takes one device for each process
      return {"local_device_ids": list(range(int(gpus)))}
    return {}
  gke = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
  return {} if "," in gke or (not gke and _on_cloud_tpu_vm(environment)) else None


def _on_cloud_tpu_vm(environment: Mapping[str, str]) -> bool:
  """Whether JAX, when imported, found TPUs, and the server of the cloud numbers their hosts."""
  if environment.get("TPU_ML_PLATFORM") != "JAX" or environment.get("TPU_SKIP_MDS_QUERY"):
    return False
  request = urllib.request.Request(WORKER, headers={"Metadata-Flavor": "Google"})
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with direct.open(request, timeout=10):
      return True
  except OSError:
    return False


def initialize() -> tuple[int, int]:
  """Joins the other processes, if there are any; (number of this one, how many).

  Each waits up to five minutes for the last to start. Where one dies from then on, the others end
  with an error within about a minute.
  """
  arguments = wanted(os.environ)
  if arguments is not None and not jax.distributed.is_initialized():
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    _wait(
      lambda: jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **arguments)
    )
    meet("joined")  # connects them while none is ahead, for the reason that `introduce` gives
  return jax.process_index(), jax.process_count()


def meet(place: str) -> None:
  """Returns when every process has come to `place`."""
  if jax.process_count() > 1:
    _wait(lambda: multihost_utils.sync_global_devices(place))


def _wait(call: Callable[[], Any]) -> Any:
  """What `call`, which waits for other processes, returns; on a thread, so that Ctrl-C is heard."""
  made: Future[Any] = Future()

  def run() -> None:
    try:
      made.set_result(call())
    except BaseException as error:
      made.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  return made.result()


def leave(status: int) -> None:
  """Ends this process, which failed, at once: JAX would have it wait for all others first.

  They end with an error, as where a process dies. Does nothing where this one has joined none.
  """
  if not jax.distributed.is_initialized():
    return
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # closed, or on the disk that is full
      stream.flush()
  os._exit(status)


def told(*words: bool) -> list[bool]:
  """What process 0 says, on all: clocks differ, and what they see of a shared folder."""
  if jax.process_count() == 1:
    return list(words)
  said = _wait(lambda: multihost_utils.broadcast_one_to_all(np.array(words)))
  return [bool(word) for word in said]


def spans(mesh: Mesh | None) -> bool:
  """Whether devices of several processes make up a mesh."""
  return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def introduce(mesh: Mesh) -> None:
  """Connects the devices of a mesh over several processes, in every group its axes make.

  A group is connected by its first collective, and on a CPU a process that waits there longer than
  30 s for another gives up: so it is done where all have just met, not behind a compilation.
  """
  if not spans(mesh):
    return
  names = [name for name, size in mesh.shape.items() if size > 1]
  groups = [group for n in range(len(names)) for group in itertools.combinations(names, n + 1)]

  def sums(x: Array) -> list[Array]:
    return [jax.lax.psum(x, group) for group in groups]

  here = PartitionSpec(tuple(names))
  ones: Any = np.ones(math.prod(mesh.shape.values()), np.int32)
  ones = put(ones, mesh, here)
  apart = [PartitionSpec(tuple(n for n in names if n not in group)) for group in groups]
  spread = jax.shard_map(sums, mesh=mesh, in_specs=here, out_specs=apart)
  jax.block_until_ready(jax.jit(spread)(ones))


def put(x: Array, mesh: Mesh, spec: PartitionSpec) -> Array:
  """x, which every process holds whole, on a mesh; each keeps the parts of its devices."""
  place = NamedSharding(mesh, spec)
  if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or place.is_fully_addressable:
    return jax.device_put(x, place)
  # device_put takes no typed keys to the devices of another process
  data = jax.device_put(np.asarray(jax.random.key_data(x)), place)
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))


def fetch(tree: Any) -> Any:
  """The arrays of a tree in numpy, whole on every process; all of them must call it."""

  def whole(x: Array) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)

  return jax.tree.map(whole, tree)
