"""The one mesh and its rules: which letter of an array, and which axis of a leaf, lies where."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jax_videoreason.axes import Array

MESH_AXES = ("seed", "fsdp", "context")
SMALL = 2**16  # numbers; a smaller leaf is replicated
RULES: dict[str, str | tuple[str, ...]] = {"r": "seed", "t": ("fsdp", "context")}


def make_mesh(
  seed: int = 1, fsdp: int = 1, context: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh of seed * fsdp * context devices, by default the first ones there are.

  ValueError when the devices are too few, or when those given are not exactly that many.
  """
  wanted = seed * fsdp * context
  found = jax.devices() if devices is None else list(devices)
  if len(found) < wanted or (devices is not None and len(found) != wanted):
    raise ValueError(
      f"a mesh of seed={seed} fsdp={fsdp} context={context} takes {wanted} devices, "
      f"there are {len(found)}: lower a size."
    )
  grid = np.asarray(found[:wanted]).reshape(seed, fsdp, context)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_auto(mesh: Mesh | AbstractMesh | None) -> None:
  """ValueError where XLA may not choose how arrays lie on a mesh, as on one of `jax.make_mesh`."""
  if mesh is None or all(kind == AxisType.Auto for kind in mesh.axis_types):
    return
  found = ", ".join(
    f"{name}={kind.name}" for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
  )
  known = {name: size for name, size in mesh.shape.items() if name in MESH_AXES}
  sizes = ", ".join(f"{name}={size}" for name, size in (known or {"seed": mesh.size}).items())
  raise ValueError(
    f"the axes of the mesh are {found}, wanted Auto ones of {', '.join(MESH_AXES)}: make it by "
    f"sharding.make_mesh({sizes})."
  )


def axes_of(text: str) -> dict[str, int]:
  """The sizes of "seed=2,fsdp=4,context=2"; an axis that is not named is 1."""
  sizes: dict[str, int] = {name: 1 for name in MESH_AXES}
  for part in text.split(","):
    name, _, number = part.partition("=")
    if name not in sizes or not number.isdigit() or int(number) < 1:
      raise ValueError(
        f"mesh={text}: {part!r}, wanted axes of {', '.join(sizes)}, as seed=2,fsdp=4,context=2."
      )
    sizes[name] = int(number)
  return sizes


def mesh_here(text: str | None) -> Mesh | None:
  """The mesh of "fsdp=2,context=2" over the first devices of this process; None = of no text."""
  if text is None:
    return None
  sizes = axes_of(text)
  return make_mesh(**sizes, devices=jax.local_devices()[: math.prod(sizes.values())])


def side_by_side(mesh: Mesh, most: int | None = None) -> Mesh:
  """The devices of a mesh that are of this process, `most` of them, along one axis `run`."""
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  return Mesh(np.asarray(own[:most]), "run", axis_types=(AxisType.Auto,))


def spec(letters: str) -> PartitionSpec:
  """The partition of an array whose axes are `letters`, e.g. "g r t d"."""
  return PartitionSpec(*(RULES.get(letter) for letter in letters.split()))


def partition(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """How a leaf is stored on the mesh: the axis of `shared_axis` over `fsdp`."""
  shared = shared_axis(path, shape, mesh.shape["fsdp"])
  if shared is None:
    return PartitionSpec()
  return PartitionSpec(*("fsdp" if axis == shared else None for axis in range(len(shape))))


def shared_axis(path: str, shape: Sequence[int], shares: int) -> int | None:
  """The axis along which a leaf is stored in shares: its longest that divides, if it is large.

  The L axis of a stacked leaf stays whole, for a layer is gathered at a time. None = it lies whole
  on every device.
  """
  axes = range(1 if "blocks" in path.split("/") else 0, len(shape))
  fitting = [axis for axis in axes if shape[axis] % shares == 0]
  if shares == 1 or len(axes) < 2 or int(np.prod(shape)) < SMALL or not fitting:
    return None
  return max(fitting, key=lambda axis: shape[axis])


def ambient() -> AbstractMesh | None:
  """The mesh of `jax.set_mesh`; None without one, and inside pmap, whose mesh has other axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if set(MESH_AXES) <= set(mesh.axis_names) else None


def token_shards() -> int:
  """Into how many equal parts the ambient mesh cuts the tokens; 1 without a mesh."""
  mesh = ambient()
  return 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["context"]


def whole(x: Array) -> Array:
  """x on every device of the ambient mesh: what all look at alike, none has to ask another for."""
  return constrain(x, " ".join("." * x.ndim))


def constrain(x: Array, letters: str) -> Array:
  """Places x by its letters on the ambient mesh (`jax.set_mesh`); without one, x as it is."""
  if ambient() is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(letters))


def over_runs(
  rows: Callable[[Array, Callable[[Array], Array]], Array], x: Array, letters: str
) -> Array:
  """`rows(x of all runs, mine)` on each device, for its own runs; letters: the axes of x.

  mine: the rows of this device of any array that leads with R. The one collective is a gather of x
  along `seed`; what lies on other axes of the mesh stays there. ValueError: R does not divide.
  """
  mesh = ambient()
  axis = letters.split().index("r")
  runs, seats = x.shape[axis], 1 if mesh is None else mesh.shape["seed"]
  if seats == 1:
    return rows(x, lambda values: values)
  if runs % seats:
    raise ValueError(f"a mix of {runs} runs on a mesh with seed={seats}: give a multiple of it.")

  def local(own: Array) -> Array:
    count = own.shape[axis]
    first = jax.lax.axis_index("seed") * count
    everyone = jax.lax.all_gather(own, "seed", axis=axis, tiled=True)
    return rows(everyone, lambda values: jax.lax.dynamic_slice_in_dim(values, first, count))

  return jax.shard_map(local, in_specs=spec(letters), out_specs=spec(letters))(x)
