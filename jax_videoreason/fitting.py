"""Carries a training out: batches onto the devices, checkpoints, a log, a stop that loses nothing.

A stage leaves in its folder:

    STAGE_settings.json   what decides its result, written first; other settings are refused
    STAGE_state/          the newest two checkpoints, stock Orbax
    STAGE.jsonl           the log: a row per `LOOK` steps, and what `watch` gave

Several processes share the folder and the work: each feeds its own devices with its rows of every
batch, process 0 writes the log, and what its clock says decides for all.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_videoreason import distributed, training
from jax_videoreason.axes import Array, Params
from jax_videoreason.folders import atomic
from jax_videoreason.records import differences, plain, read_json, write_json
from jax_videoreason.sharding import make_mesh

LOOK = 50  # steps after which losses are looked at, a row is logged and the clock is read

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A training: where it writes, what it optimises, on which batches, how long.

  batch_of: step -> arrays by name; one of a single row is the same for all. It must depend on the
    step alone, or a resumed training would not be the undisturbed one.
  rows: divides the rows of every batch, which are spread over as many devices as divide it.
  data: whatever else decides the result, JSON, compared on resume.
  watch: called on process 0 with (step, moving average of the params) every `every` steps; gives
    rows for the log. minutes: the training ends early, with a checkpoint.
  """

  name: str
  folder: Path
  loss: Callable[[Any, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]
  settings: training.TrainSettings
  batch_of: Callable[[int], Mapping[str, np.ndarray]]
  rows: int
  seed: int
  data: Mapping[str, Any]
  minutes: float = math.inf
  save_seconds: float = 120.0
  watch: Callable[[int, Params], Iterable[Row]] | None = None
  every: int = 2_000
  look: int = LOOK

  @property
  def states(self) -> Path:
    return (self.folder / f"{self.name}_state").absolute()

  @property
  def record(self) -> Path:
    return self.folder / f"{self.name}_settings.json"

  @property
  def log(self) -> Path:
    return self.folder / f"{self.name}.jsonl"


def fit(
  stage: Stage,
  params: Params,
  *,
  advance: Callable[[int], Any] = lambda steps: None,
  show: Callable[[list[Row]], Any] = lambda rows: None,
) -> training.TrainState:
  """Trains from the newest checkpoint, or from `params`, and returns the state on the host.

  advance: told of steps as they are done, first of those done before. show: given all rows of the
  log, on process 0, whenever `watch` was called and at the end.

  Raises:
    ValueError: the folder holds a training of other settings; it names them.
    FloatingPointError: a loss that is not finite; the last good checkpoint is kept.
  """
  mesh = mesh_of(stage.rows)
  everywhere = NamedSharding(mesh, PartitionSpec())
  options = ocp.CheckpointManagerOptions(max_to_keep=2)
  with (
    ocp.CheckpointManager(stage.states, options=options) as manager,
    ThreadPoolExecutor(1) as reader,
  ):
    state = resumed(
      stage, manager, jax.device_put(training.begin(params, stage.settings), everywhere)
    )
    step = training.make_step(stage.loss, stage.settings, stage.seed)
    first, total = int(state.step), stage.settings.steps
    if first >= total:
      return jax.device_get(state)
    _trim(stage.log, first)
    advance(first)
    began = mark = time.monotonic()
    waited, recent = 0.0, []
    coming = reader.submit(placed, stage.batch_of, first, mesh)
    for number in range(first + 1, total + 1):
      before = time.monotonic()
      batch = coming.result()
      waited += time.monotonic() - before
      if number < total:
        coming = reader.submit(placed, stage.batch_of, number, mesh)
      state, metrics = step(state, batch)
      recent.append(metrics)
      if number % stage.look and number < total:
        continue  # the host runs ahead, so that the devices need not wait for it
      found = jax.device_get(recent)
      _check(found, number, manager, stage)
      advance(len(recent))
      now = time.monotonic()
      done, save = distributed.told(
        now - began > 60 * stage.minutes, now - mark > stage.save_seconds
      )
      last = done or number == total
      _write(
        stage.log,
        {
          "step": number,
          "seconds": round(now - began, 1),
          "per_second": round((number - first) / (now - began), 2),
          "waited": round(waited / (now - began), 3),
          **means(found),
        },
      )
      recent = []
      if save or last:
        manager.save(number, args=ocp.args.StandardSave(state))
        mark = now
      if stage.watch is not None and (number % stage.every < stage.look or last):
        watched = jax.device_get(state.ema)
        for row in stage.watch(number, watched) if jax.process_index() == 0 else ():
          _write(stage.log, {"step": number, **row})
        show_rows(stage.log, show)
      if last:
        break
  show_rows(stage.log, show)
  return jax.device_get(state)


def resumed(
  stage: Stage, manager: ocp.CheckpointManager, state: training.TrainState
) -> training.TrainState:
  """The newest checkpoint of the same training, or `state` where there is none."""
  asked = plain({**dataclasses.asdict(stage.settings), "seed": stage.seed, **stage.data})
  step = manager.latest_step()
  if step is None:
    if jax.process_index() == 0:
      write_json(stage.record, asked)
    return state
  differ = list(differences(read_json(stage.record), asked))
  if differ:
    raise ValueError(
      f"{manager.directory} was trained with other settings ({'; '.join(differ)}): give the same, "
      "or another --work."
    )
  return _restored(manager, step, state)


def _restored(
  manager: ocp.CheckpointManager, step: int, like: training.TrainState
) -> training.TrainState:
  state: Any = manager.restore(step, args=ocp.args.StandardRestore(like))
  return state


def newest(stage: str, folder: Path, params: Params) -> training.TrainState:
  """The newest checkpoint of a stage, which may still be running; params: of the same shapes.

  ValueError: there is none.
  """
  states = (folder / f"{stage}_state").absolute()
  step = None
  if states.is_dir():
    with ocp.CheckpointManager(states) as manager:
      step = manager.latest_step()
  if step is None:
    raise ValueError(f"{states} holds no checkpoint: train the stage {stage!r} first.")
  described = read_json(folder / f"{stage}_settings.json")
  names = {field.name for field in dataclasses.fields(training.TrainSettings)}
  settings = training.TrainSettings(**{k: v for k, v in described.items() if k in names})
  like = training.begin(params, settings)
  with ocp.CheckpointManager(states) as manager:
    return _restored(manager, step, like)


# Devices


def mesh_of(rows: int) -> Mesh:
  """All devices, as many of them on the axis `seed` as divide the rows; the others do the same."""
  count = math.gcd(rows, jax.device_count())
  return make_mesh(seed=count, fsdp=jax.device_count() // count)


def placed(
  batch_of: Callable[[int], Mapping[str, np.ndarray]], number: int, mesh: Mesh
) -> dict[str, Array]:
  """A batch on the devices: rows over `seed`, single rows everywhere; a process places its part."""

  def place(value: np.ndarray) -> Array:
    spec = PartitionSpec() if len(value) == 1 else PartitionSpec("seed")
    return jax.make_array_from_callback(
      value.shape, NamedSharding(mesh, spec), lambda part: value[part]
    )

  return {name: place(value) for name, value in batch_of(number).items()}


# The log


def means(metrics: Sequence[Mapping[str, Any]]) -> Row:
  """One row of several steps: means; the loss per sigma band weighted by the cases in it."""
  stacked = {key: np.stack([one[key] for one in metrics]) for key in metrics[0]}
  counts = stacked.pop("band_counts", None)
  bands = stacked.pop("bands", None)
  row = {key: value.mean(0).tolist() for key, value in stacked.items() if key != "finite"}
  if bands is not None and counts is not None:
    total = counts.sum(0)
    mean = (bands * counts).sum(0) / np.maximum(total, 1)
    row["bands"] = [float(m) if n else None for m, n in zip(mean, total, strict=True)]
  return row


def _check(
  metrics: Sequence[Mapping[str, Any]], number: int, manager: ocp.CheckpointManager, stage: Stage
) -> None:
  bad = [i for i, one in enumerate(metrics) if not one["finite"]]
  if not bad:
    return
  manager.wait_until_finished()
  good = manager.latest_step()
  kept = "no checkpoint was kept" if good is None else f"the last good checkpoint is {good}"
  raise FloatingPointError(
    f"{stage.name}: the loss is not finite at step {number - len(metrics) + bad[0]}; {kept} in "
    f"{stage.states}: give another --work and a lower --learning-rate."
  )


def _write(path: Path, row: Row) -> None:
  if jax.process_index() == 0:
    with path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[Row]:
  """The rows of a log; a last line that a kill cut short is left out."""
  text = path.read_text(encoding="utf-8") if path.exists() else ""
  return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _trim(path: Path, step: int) -> None:
  """Takes out of the log what was logged after the checkpoint: it is done again."""
  if jax.process_index() == 0 and path.exists():
    kept = [json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= step]
    with atomic(path) as part:
      part.write_text("".join(kept), encoding="utf-8")


def show_rows(path: Path, show: Callable[[list[Row]], Any]) -> None:
  if jax.process_index() == 0:
    show(read_log(path))
