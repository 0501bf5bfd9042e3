"""Runs as an axis: their noise, their place on a mesh, and batches denoised piece by piece."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_videoreason import attention, distributed, places, sampler, schedules, sharding
from jax_videoreason.axes import Array, Params
from jax_videoreason.interventions import Intervention
from jax_videoreason.pytrees import is_known, refuse_traced
from jax_videoreason.schedules import Schedule
from jax_videoreason.structs import Conditioning, ModelBundle, Noise, State, Trace, key_of
from jax_videoreason.taps import TapSpec, step_slots

STRIDE = 10_000  # seeds of a case
# The place of the R axis in the fields that have one; the first field is never None.
RUN_AXES: dict[type, dict[str, int]] = {
  Noise: {"keys": 0, "start": 0, "injected": 1},
  Conditioning: {"text": 1, "known": 0, "known_mask": 0, "clip": 0},
  State: {"latents": 0, "x0": 0, "solver": 0, "step": 0},
  Trace: {"finite": 1, "latents": 1, "x0": 1, "taps": 3, "solver": 1},
  Schedule: {"guidance": 1},
}

# What is told of a finished piece: its trace (numpy), its rows of the schedule, its runs.
OnPiece = Callable[[Trace, slice, slice], None]
# What is told of runs that are through: their state (numpy), and which they are.
OnState = Callable[[State, slice], None]
# Brings the params of a bundle in which the expert of this number is loaded and no other.
OneExpert = Callable[[int], tuple[Params | None, ...]]


def seed_of(index: int, seed: int) -> int:
  """The number of the noise of a case of a task and a seed: no two cases of a task share one.

  Cases of one index of different tasks do, so tasks are compared over the same noise.
  ValueError: a seed that would be another case's.
  """
  if not 0 <= seed < STRIDE:
    raise ValueError(
      f"seed {seed}, wanted one in 0..{STRIDE - 1}: the noise of case i and seed s is number i * "
      f"{STRIDE} + s, and no two cases of a task may share one."
    )
  return index * STRIDE + seed


def check_seeds(seeds: Sequence[int]) -> None:
  """Refuses seeds of cases, before anything is loaded, as `seed_of` does."""
  for seed in seeds:
    seed_of(0, seed)


def make_noise(seeds: Sequence[int], grid: tuple[int, int, int, int], start: Any = None) -> Noise:
  """The noise of R runs; grid is (F, H, W, C).

  Run r's key is fold_in(key_of(0), seeds[r]): its noise depends on no other run, nor on order,
  batch or device, and fewer frames get the first frames of the same noise.
  start: R F H W C noise to use instead (float, finite). Nothing may be traced; a Noise takes a
  traced start by `dataclasses.replace(noise, start=start)`.
  """
  refuse_traced(
    "make_noise",
    "make the noise before, from numbers, and give it a traced start by "
    "dataclasses.replace(noise, start=start)",
    (seeds, start),
  )
  if not jax.config.values["jax_threefry_partitionable"]:
    raise ValueError(
      "jax_threefry_partitionable is off, by which a seed is other noise: remove the setting."
    )
  seeds_array = np.asarray(seeds)
  if seeds_array.ndim != 1 or seeds_array.size == 0 or seeds_array.dtype.kind not in "iu":
    raise ValueError(f"seeds={seeds!r}, wanted a list of at least one whole number.")
  if seeds_array.min() < 0 or seeds_array.max() >= 2**32:
    raise ValueError(f"seeds={seeds!r}, wanted numbers in 0..{2**32 - 1}.")
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key_of(0), jnp.asarray(seeds_array, jnp.uint32))
  if start is not None:
    start = np.asarray(start)
    wanted = (len(seeds), *grid)
    if start.shape != wanted or start.dtype.kind != "f":
      raise ValueError(
        f"noise R F H W C is {start.dtype} {start.shape}, wanted floats of {wanted}: one "
        "array per seed, channels last."
      )
    bad = int(np.size(start) - np.count_nonzero(np.isfinite(start)))
    if bad:
      first = tuple(int(i) for i in np.argwhere(~np.isfinite(start))[0])
      raise ValueError(
        f"noise has {bad} values that are not finite, the first at {first}: draw it again."
      )
    start = jnp.asarray(start, jnp.float32)
  return Noise(keys=keys, start=start, grid=grid)


def take(tree: Any, runs: Any) -> Any:
  """The rows `runs` of the R axis of a Noise, a Conditioning, a State or a Trace.

  A Schedule is taken by its guidance; it stays as it is where that is the same for all runs.
  runs: a run or several, in any order and also twice (the R axis stays); a mask; a slice.
  Two copies of a run draw the same noise where an edit injects some. For branches that differ, take
  the State and the Conditioning, and give them a Noise of other seeds: make_noise([seed_of(...)]).
  ValueError: another kind (in an Intervention runs are related to each other), runs that are not
  there, and a mask that is traced.
  """
  if isinstance(tree, Schedule) and np.ndim(tree.guidance) < 2:
    return tree
  rows = runs if isinstance(runs, slice) else _indices(runs, _count(tree))

  def taken(x: Array, axis: int) -> Array:
    from_here = x if is_known(rows) else jnp.asarray(x)
    return from_here[(*[slice(None)] * axis, rows)]

  return _by_run(tree, taken)


def _indices(runs: Any, count: int) -> Any:
  """A run, several or a mask of `count` as an index array."""
  index = places.space_of(runs).asarray(runs)
  if index.dtype == bool:
    refuse_traced("take by a mask", "give the indices of the runs, which may be traced", index)
    if not index.any():
      raise ValueError(
        f"the mask runs={index.tolist()} takes no run, wanted one or several: mark them by True."
      )
    index = np.flatnonzero(places.selection("runs", index, count))
  return places.run_indices("runs", index, count)


def place(tree: Any, mesh: Mesh | None) -> Any:
  """A Noise, Conditioning or State with its R axis on the mesh axis `seed`; None = as it is.

  ValueError: a mesh whose axes are not Auto.
  """
  sharding.check_auto(mesh)
  if mesh is None:
    return tree

  def put(x: Array, axis: int) -> Array:
    return distributed.put(x, mesh, PartitionSpec(*([None] * axis), "seed"))

  return _by_run(tree, put)


def place_edit(edit: Intervention | None, mesh: Mesh | None) -> Intervention | None:
  """An edit everywhere on a mesh; None = as it is."""
  if mesh is None:
    return edit
  return jax.device_put(edit, NamedSharding(mesh, PartitionSpec()))


@contextlib.contextmanager
def over(mesh: Mesh | None, route: attention.Route | None = None) -> Iterator[None]:
  """`sampler.denoise` inside runs on the mesh and by the route, as `run` takes them.

  ValueError: a mesh whose axes are not Auto.
  """
  sharding.check_auto(mesh)
  with contextlib.ExitStack() as around:
    around.enter_context(attention.by_route(route))
    if mesh is not None:
      around.enter_context(jax.set_mesh(mesh))
    yield


def _by_run(tree: Any, change: Callable[[Array, int], Array]) -> Any:
  """`change(array, place of its R axis)` for the arrays of a tree that have one, as `RUN_AXES`."""
  axes = _axes(tree)

  def changed(path: Any, x: Array) -> Array:
    axis = axes.get(path[0].name)
    return x if axis is None else change(x, axis)

  return jax.tree_util.tree_map_with_path(changed, tree)


def _axes(tree: Any) -> dict[str, int]:
  """The row of `RUN_AXES`; ValueError: another kind."""
  if type(tree) not in RUN_AXES:
    kinds = ", ".join(kind.__name__ for kind in RUN_AXES)
    raise ValueError(
      f"runs of the kind {type(tree).__name__}, wanted one of {kinds}: give these one by one; an "
      "edit is made for the runs that there are."
    )
  return RUN_AXES[type(tree)]


def _count(tree: Any) -> int:
  """R of a Noise, Conditioning, State or Trace."""
  field, axis = next(iter(_axes(tree).items()))
  return getattr(tree, field).shape[axis]


def batches(runs: int, batch: int | None) -> list[np.ndarray]:
  """Run indices in batches of one shape; the last one is filled up by repeating its last run."""
  size = runs if batch is None else min(batch, runs)
  if size < 1:
    raise ValueError(f"batch={batch} for {runs} runs, wanted at least 1 of each.")
  return [np.minimum(np.arange(low, low + size), runs - 1) for low in range(0, runs, size)]


def computed(runs: int, batch: int | None, seats: int = 1) -> int:
  """How many runs `run` denoises for so many: with those that fill batches up, and in each the
  `seed` axis of the mesh, of size `seats`."""
  return sum(-(-len(group) // seats) * seats for group in batches(runs, batch))


def pieces(steps: int, piece: int | None) -> list[slice]:
  """The steps in pieces of one length, the largest divisor of `steps` that is at most `piece`."""
  size = (
    steps
    if piece is None
    else max(n for n in range(1, min(max(piece, 1), steps) + 1) if steps % n == 0)
  )
  return [slice(low, low + size) for low in range(0, steps, size)]


def run(
  bundle: ModelBundle,
  noise: Noise,
  cond: Conditioning,
  schedule: Schedule,
  edit: Intervention | None = None,
  taps: TapSpec | None = None,
  *,
  batch: int | None = None,
  piece: int | None = None,
  mesh: Mesh | None = None,
  on_piece: OnPiece | None = None,
  guidance: sampler.Guidance = "parallel",
  state: State | None = None,
  route: attention.Route | None = None,
  expert: OneExpert | None = None,
  on_state: OnState | None = None,
) -> np.ndarray:
  """Denoises R runs in equal batches, each piece by piece, and returns the final latents R F H W C.

  Each finished piece is handed to `on_piece` and let go, so memory holds one batch and one piece.
  One executable serves all. With a mesh, R is padded to a multiple of its `seed` axis, and tokens
  lie on `fsdp` and `context`; it may span the devices of several processes, all of which call this
  with the same arguments and get the same. guidance: as `sampler.denoise` takes it. route: how keys
  and values reach the queries of other devices; None = `attention.choose_route`.

  state: of all R runs before the first row of `schedule`, which may be a piece; None = the start of
  their noise. Where each batch stands after the last row is handed to `on_state`.

  `taps.steps` are rows of `schedule`; a piece of it brings those that lie inside, and compiles for
  their places in it.

  expert: asked where `bundle` holds no expert. The schedule is cut where it changes experts; each
  makes its steps of all runs, and is let go before the next one is brought.

  Raises ValueError where an edit or a tap relates runs of different batches, for a mesh whose axes
  are not Auto, and where jax traces the call, as for a gradient: `sampler.denoise` is what it may
  trace.
  """
  refuse_traced(
    "run",
    "call sampler.denoise, which takes the same bundle, noise, cond, schedule, edit and taps",
    (bundle, noise, cond, schedule, edit, taps, state),
    jnp.zeros(()),  # under jit this is traced, whatever is given
  )
  sampler.check_kinds(edit, taps)
  taps = TapSpec() if taps is None else taps
  total = noise.keys.shape[0]
  schedules.check(schedule, total)
  groups = batches(total, batch)
  by_run = (edit, taps.reference, taps.regions, taps.targets)
  fixed = any(value is not None for value in by_run)
  if fixed and len(groups) > 1:
    raise ValueError(
      f"edits and taps with an R axis need their {total} runs in one batch, batch={batch} makes "
      f"{len(groups)}: raise batch, or call run for each group of runs."
    )
  step_slots(taps, len(schedule))  # refuses steps that are not there
  sharding.check_auto(mesh)
  seats = 1 if mesh is None else mesh.shape["seed"]
  if fixed and total % seats:
    raise ValueError(
      f"edits and taps with an R axis leave no room to fill {total} runs up on a mesh with "
      f"seed={seats}: give a multiple of {seats} runs."
    )
  edit = place_edit(edit, mesh)
  bare = expert is not None and not any(params is not None for params in bundle.params)
  stretches = schedule.by_expert() if bare else [(None, slice(0, len(schedule)))]
  stand: list[State | None] = [None if state is None else take(state, group) for group in groups]
  for number, stretch in stretches:
    if expert is not None and number is not None:
      # the one before is let go first
      bundle = dataclasses.replace(bundle, params=(None,) * len(bundle.params))
      bundle = dataclasses.replace(bundle, params=expert(number))
    for index, group in enumerate(groups):
      count = len(np.unique(group))
      padded = np.resize(np.arange(len(group)), -(-len(group) // seats) * seats)
      own = take(schedule[stretch], group[padded])
      some_noise, some_cond = (place(take(t, group[padded]), mesh) for t in (noise, cond))
      sampler.check(bundle, some_noise, some_cond, own, edit)
      before = stand[index]
      if before is None:
        before = sampler.start(some_noise, schedule.solver)
      else:
        before = take(before, padded)
      here: State = place(before, mesh)  # else the first piece is a program of its own
      part = slice(int(group[0]), int(group[0]) + count)
      for rows in pieces(len(own), piece):
        at = slice(stretch.start + rows.start, stretch.start + rows.stop)
        with over(mesh, route):
          _, trace, here = sampler.denoise(
            bundle,
            some_noise,
            some_cond,
            own[rows],
            edit,
            _steps_of(taps, at),
            here,
            guidance=guidance,
          )
        if on_piece is not None:
          host = distributed.fetch(trace)
          on_piece(take(host, slice(count)), at, part)
      stand[index] = distributed.fetch(here)
      if on_state is not None and stretch.stop == len(schedule):
        on_state(take(stand[index], slice(count)), part)
  return np.concatenate(
    [s.latents[: len(np.unique(g))] for s, g in zip(stand, groups, strict=True) if s is not None]
  )


def pmap_runs(
  bundle: ModelBundle,
  noise: Noise,
  cond: Conditioning,
  schedule: Schedule,
  *,
  taps: TapSpec | None = None,
  devices: Sequence[Any] | None = None,
) -> tuple[np.ndarray, Trace]:
  """`sampler.denoise` by `jax.pmap`: weights on every device, runs dealt out evenly.

  R is padded to a multiple of the devices (None = all of this process) and the padding dropped.
  Returns the final latents R F H W C and the trace. `run` with a mesh does the same and more. A
  later call with arguments of the same shapes and the same card compiles nothing.
  ValueError for taps with an R axis: they are not dealt out.
  """
  taps = TapSpec() if taps is None else taps
  if any(value is not None for value in (taps.reference, taps.regions, taps.targets)):
    raise ValueError("taps with an R axis are not dealt out by pmap_runs: use run with a mesh.")
  chosen = jax.local_devices() if devices is None else list(devices)
  total = noise.keys.shape[0]
  schedules.check(schedule, total)
  each = -(-total // len(chosen))
  dealt = np.minimum(np.arange(each * len(chosen)), total - 1)
  rows = rearrange(dealt, "(device r) -> device r", r=each)
  parts = [tuple(take(tree, part) for tree in (noise, cond, schedule)) for part in rows]
  sampler.check(bundle, *parts[0])
  dealt_out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
  dit = dataclasses.replace(bundle, vae=None, text=None, clip=None, preview=None)
  final, trace = _spread(tuple(chosen))(dit, *dealt_out, taps)

  def joined(value: Any, axis: int) -> Any:
    """The device axis, which leads, and the axis of runs as one; without what was padded."""
    return np.concatenate(np.asarray(value), axis=axis).take(np.arange(total), axis=axis)

  whole = dataclasses.replace(_by_run(trace, joined), sigma=trace.sigma[0])
  return joined(final, 0), whole


@functools.cache
def _spread(devices: tuple[Any, ...]) -> Callable[..., tuple[Array, Trace]]:
  """`_denoise` by `jax.pmap`, whose programs last as long as what it returns."""
  return jax.pmap(_denoise, in_axes=(None, 0, 0, 0, None), devices=devices)


def _denoise(
  bundle: ModelBundle, noise: Noise, cond: Conditioning, schedule: Schedule, taps: TapSpec
) -> tuple[Array, Trace]:
  final, trace, _ = sampler.denoise(bundle, noise, cond, schedule, taps=taps)
  return final, trace


def _steps_of(taps: TapSpec, rows: slice) -> TapSpec:
  """`taps` of the whole schedule as rows of a piece of it."""
  if taps.steps is None:
    return taps
  inside = tuple(s - rows.start for s in taps.steps if rows.start <= s < rows.stop)
  return dataclasses.replace(taps, steps=inside)
