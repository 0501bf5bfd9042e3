"""A sweep on disk: work units fixed at the start, each whole or not there, resumed after any stop.

    sweep.json         what was asked, written first: a call that asks the same goes on here
    lock               held by the process that works here, while it lives
    units/00003.json   a finished unit: a row per run, names of its arrays, seconds, lanes, devices
    results.zarr/      arrays with an axis `run`, one chunk per unit
    events.jsonl       what was done again, and why
    table.parquet      a row per run    manifest.json    both written last

A unit is a number of consecutive runs. What it computes is a function that is given; its arrays
are written before its row file, so a unit with a row file is whole. No decision depends on the time
of day.
"""

import contextlib
import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason import arrays, lanes, store, tables
from jax_videoreason.arrays import StoredArray
from jax_videoreason.folders import (
  MANIFEST,
  PART,
  disk,
  expect,
  held,
  is_held,
  names_in,
  refuse_other,
  remove,
  replaceable,
)
from jax_videoreason.records import (
  checksum,
  differences,
  digest,
  plain,
  read_json,
  vouched,
  write_json,
)

ASKED, UNITS, ARRAYS, EVENTS, TABLE, PAGE = (
  "sweep.json",
  "units",
  "results.zarr",
  "events.jsonl",
  "table.parquet",
  "report.html",
)
OWNED = (ASKED, UNITS, ARRAYS, EVENTS, TABLE, MANIFEST, PAGE)
SAID = {"of", "unit", "rows", "arrays", "seconds", "devices"}  # by a row file
DAMAGED = f"{TABLE} or {MANIFEST} is missing or damaged"
RUN = "run"

Row = dict[str, Any]
Advance = Callable[[int], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """What a unit found. rows: one per run, JSON. arrays: name -> (axes, one of them `run`; value).

  notes: what is to be remembered as an event, such as a run that is not finite.
  """

  rows: list[Row]
  arrays: Mapping[str, tuple[tuple[str, ...], np.ndarray]]
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What is to be done: units 0..units-1 of `width` runs each.

  compute: unit -> anything. read: (unit, that) -> Part, on another thread while the next unit is
  computed. lanes: as `lanes.carry` takes them; of more than one, several threads call both.
  devices: said of every unit that is done here.
  """

  units: int
  width: int
  compute: Callable[[int], Any]
  read: Callable[[int, Any], Part]
  lanes: int = 1
  devices: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Doing


def share(
  folders: Sequence[str | Path],
  process: tuple[int, int],
  meet: Callable[[str], Any],
  *,
  begin: Callable[[], Any],
  do: Callable[[], Any],
  finish: Callable[[], Any],
) -> None:
  """What several processes of one command do together in some folders.

  The first one, process = (0, count), holds the folders, begins them, and finishes them when all
  have done their share. meet: returns when every process has come to that place.
  """
  first = process[0] == 0
  with contextlib.ExitStack() as stack:
    if first:
      for folder in folders:
        stack.enter_context(held(folder))
      begin()
    meet("begun")
    do()
    meet("done")
    if first:
      finish()
    meet("finished")


def begin(folder: str | Path, asked: Mapping[str, Any], *, redo: bool = False) -> None:
  """Makes a held folder ready: new, or begun by a call that asked the same.

  asked: all that the numbers depend on, JSON, with `units` and `width`.
  ValueError: it holds something else, or what was asked otherwise; it names the keys.
  """
  folder, asked = Path(folder), plain(asked)
  refuse_other(folder, "sweep")
  with disk(folder):
    there = sorted(names_in(folder))
    if redo:
      for name in replaceable(there, OWNED, marks=[ASKED], what="sweep", folder=folder):
        remove(folder / name)
      there = []
  if ASKED in there:
    other = list(differences(_asked(folder), asked))
    if other:
      raise ValueError(
        f"{folder} holds another sweep ({'; '.join(other)}): choose another --out, or give --redo "
        "to replace it."
      )
  elif foreign := [name for name in there if not name.startswith(PART)]:
    raise ValueError(
      f"{folder} is not empty (it has {foreign[0]}) and has no {ASKED}, so nobody knows what was "
      "asked there: choose another --out."
    )
  with _kept(folder):
    if ASKED not in there:
      write_json(folder / ASKED, asked)
    (folder / UNITS).mkdir(exist_ok=True)
    for left in [*folder.glob(f"{PART}*"), *(folder / UNITS).glob(f"{PART}*")]:
      remove(left)
  if (folder / ARRAYS).exists():
    try:
      arrays.open_group(folder / ARRAYS)
    except ValueError as error:  # without the description of an array no chunk of it can be read
      _note(folder, f"{error} All units are done again.")
      remove(folder / ARRAYS)


def carry_out(
  folder: str | Path,
  work: Work,
  left: Mapping[int, str],
  *,
  advance: Advance = lambda runs: None,
) -> None:
  """Does the units that are left, in order; where one was damaged, an event says so.

  left: unit -> what is wrong, as `faults` says it. advance: told of runs as they are done.

  OSError: the disk refuses; what is done stays.
  """
  folder = Path(folder)
  of = checksum(folder / ASKED)  # now: nobody's units are taken for those of a sweep begun later
  if left:
    remove(folder / MANIFEST)  # the table no longer says what the units do
  for unit, said in left.items():
    if said:
      _note(folder, f"{said}; done again", unit)
      remove(_path(folder, unit))
  number, writing = max(1, min(work.lanes, len(left))), threading.Lock()

  def compute(unit: int) -> tuple[Any, float]:
    began = time.monotonic()
    return work.compute(unit), time.monotonic() - began

  def keep(unit: int, made: tuple[Any, float]) -> None:
    began = time.monotonic()
    part = work.read(unit, made[0])
    seconds = {"compute": made[1], "read": time.monotonic() - began}
    with writing:
      _write(folder, of, work, unit, part, {"seconds": seconds, "lanes": number})
      advance(work.width)

  lanes.carry(left, compute, keep, lanes=number)


def _write(
  folder: Path, of: str, work: Work, unit: int, part: Part, how: Mapping[str, Any]
) -> None:
  """Writes what was read of a unit: arrays, then the row file, with how it was made.

  of: checksum of `ASKED`.
  """
  if len(part.rows) != work.width:
    raise ValueError(f"unit {unit} brings {len(part.rows)} rows, wanted {work.width}.")
  runs = slice(unit * work.width, (unit + 1) * work.width)
  with _kept(folder):
    for name, (axes, value) in part.arrays.items():
      at = axes.index(RUN)
      size = list(np.shape(value))
      where = tuple(runs if i == at else slice(None) for i in range(len(size)))
      whole = [work.units * work.width if i == at else n for i, n in enumerate(size)]
      arrays.put(folder / ARRAYS, name, axes, value, shape=whole, where=where, chunk=size)
    for said in part.notes:
      _note(folder, said, unit)
    rows = plain(part.rows)
    found = {
      "of": of,
      "unit": unit,
      "rows": rows,
      "sum": digest(rows),
      "arrays": sorted(part.arrays),
      **how,
      "devices": work.devices,
    }
    write_json(_path(folder, unit), plain(found))


def finish(folder: str | Path, **manifest: Any) -> None:
  """Writes table and manifest of a sweep, unless they are there; all units must be whole.

  manifest: as `store.write_manifest` takes it.

  ValueError: units are lacking or damaged; it names them.
  """
  folder = Path(folder)
  asked = _asked(folder)
  for place in (folder, folder / UNITS):  # has a network file system look what others just did
    list(place.iterdir())
  found = _read_units(folder)
  parts = [part for part in found.values() if not isinstance(part, str)]
  lacking = [str(unit) for unit, part in found.items() if isinstance(part, str)]
  if lacking:
    raise ValueError(
      f"{folder} is not whole (of its units, {', '.join(lacking)} lacking or damaged): the same "
      "command goes on."
    )
  if (folder / MANIFEST).exists():
    try:
      _table(folder)
      return
    except ValueError:
      _note(folder, f"{DAMAGED}; written again")
  layouts = [json.dumps(part["devices"], sort_keys=True) for part in parts]
  distinct = sorted(set(layouts))
  with _kept(folder):
    remove(folder / MANIFEST)
    tables.write(folder / TABLE, [row for part in parts for row in part["rows"]])
    store.write_manifest(
      folder,
      units=asked["units"],
      width=asked["width"],
      layouts=distinct,
      layout_of_unit=[distinct.index(layout) for layout in layouts],
      **manifest,
    )


def _table(folder: Path) -> list[Row]:
  """The rows of a finished sweep; ValueError where they are not what its manifest says."""
  try:
    return tables.read(vouched(folder, TABLE))
  except ValueError as error:
    raise ValueError(
      f"{folder}: {DAMAGED}: the same `videoreason sweep` writes it again, or copy the folder "
      "again."
    ) from error


def faults(folder: str | Path, units: Iterable[int] | None = None) -> dict[int, str]:
  """The units that are not whole, and what is wrong with them; "" = nothing is there.

  units: those to look at, None = all.
  """
  folder = Path(folder)
  root = folder / ARRAYS
  said: dict[int, str] = {}
  found = arrays.open_group(root) if root.exists() else {}
  width = _asked(folder)["width"]
  for unit, part in _read_units(folder, units).items():
    if isinstance(part, str):
      said[unit] = part
      continue
    runs = slice(unit * width, (unit + 1) * width)
    for name in part["arrays"]:
      array = found.get(name)
      if array is None:
        said[unit] = f"array {name} is missing or damaged"
        continue
      at = array.axes.index(RUN)
      try:
        array[tuple(runs if i == at else slice(None) for i in range(len(array.axes)))]
      except ValueError:
        said[unit] = f"a chunk of {name} is missing or damaged"
  return said


def _read_units(folder: Path, units: Iterable[int] | None = None) -> dict[int, Row | str]:
  """The row files of some units, None = of all, or what is wrong with them."""
  asked, of = _asked(folder), checksum(folder / ASKED)
  some = range(asked["units"]) if units is None else units
  return {unit: _read_unit(folder, unit, asked["width"], of) for unit in some}


def _read_unit(folder: Path, unit: int, width: int, of: str) -> Row | str:
  path = _path(folder, unit)
  if not path.exists():
    return ""
  try:
    part = read_json(path)
    whole = part["unit"] == unit and len(part["rows"]) == width and part.keys() >= SAID
    whole = whole and part.get("sum") in (None, digest(part["rows"]))  # None: of earlier versions
  except (ValueError, KeyError, TypeError):
    whole = False
  if not whole:
    return f"{path.name} is damaged"
  return part if part["of"] == of else f"{path.name} is of another sweep"


def _path(folder: Path, unit: int) -> Path:
  return folder / UNITS / f"{unit:05}.json"


def _note(folder: Path, said: str, unit: int | None = None) -> None:
  """Keeps what happened, to a unit or to the whole sweep, as an event."""
  path = folder / EVENTS
  line = json.dumps({"unit": unit, "event": said}) + "\n"
  with _kept(folder), path.open("ab+") as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      if file.read(1) != b"\n":  # the one before was cut short
        line = "\n" + line
    file.write(line.encode())


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[None]:
  """What is said of a disk that refuses, with what a sweep does about it."""
  try:
    with disk(folder):
      yield
  except OSError as error:
    raise OSError(f"{error} What is done stays: the same command goes on.") from error


# Looking


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
  """How far a sweep is. left: the units that are not done. seconds: of one process for these; None
  = nothing to judge by.

  damaged: what is wrong with the row files of some of them; arrays are not read. table: what is
  wrong with the table of a sweep whose units are whole, "" = nothing. broken: rows of runs that are
  not finite. events: {"unit", "event"}, what was done again.
  """

  working: bool
  finished: bool
  units: int
  left: list[int]
  damaged: dict[int, str]
  table: str
  width: int
  seconds: float | None
  broken: list[Row]
  events: list[Row]

  @property
  def done(self) -> int:
    return self.units - len(self.left)


def status(folder: str | Path) -> Status:
  """How far the sweep in a folder is, asked from any process. ValueError: it is no sweep."""
  folder = Path(folder)
  asked = _asked(folder)
  units, width = asked["units"], asked["width"]
  found = _read_units(folder)
  parts = [part for part in found.values() if not isinstance(part, str)]
  left = {unit: part for unit, part in found.items() if isinstance(part, str)}
  each = [_seconds(part) for part in parts]
  beside = parts[-1].get("lanes", 1) if parts else 1  # of the last one: other machines had others
  working = is_held(folder)
  ended = (folder / MANIFEST).exists() and not left
  table = ""
  if ended and not working:  # who works may be writing it just now
    try:
      _table(folder)
    except ValueError:
      table = DAMAGED
  return Status(
    working=working,
    finished=ended and not table,
    units=units,
    left=list(left),
    damaged={unit: said for unit, said in left.items() if said},
    table=table,
    width=width,
    seconds=float(np.median(each)) * math.ceil(len(left) / beside) if each else None,
    broken=[row for p in parts for row in p["rows"] if row.get("broken_at") is not None],
    events=_events(folder),
  )


def _seconds(part: Row) -> float:
  """What a unit took: by itself it is read while the next is computed, side by side after it."""
  compute, read = part["seconds"]["compute"], part["seconds"]["read"]
  return max(compute, read) if part.get("lanes", 1) == 1 else compute + read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """A sweep on disk; made by `open_sweep`.

  rows: one per run, in the order of the runs; of the finished units where it is not done yet.
  runs: the place of each row on the axis `run` of the arrays. arrays: by name, read when indexed.
  """

  path: Path
  asked: dict[str, Any]
  finished: bool
  rows: list[Row]
  arrays: dict[str, StoredArray]
  events: list[Row]

  @property
  def runs(self) -> np.ndarray:
    return self.column(RUN)

  def column(self, name: str) -> np.ndarray:
    """A column of the table; lists, texts and what is missing come as objects, runs as integers."""
    if self.rows and name not in self.rows[0]:
      raise ValueError(f"no column {name!r}; there are: {', '.join(self.rows[0])}.")
    values = [row[name] for row in self.rows]
    plain_numbers = all(isinstance(v, bool | int | float) for v in values)
    if plain_numbers:
      return np.array(values, int if name == RUN else None)
    made = np.empty(len(values), object)
    made[:] = values
    return made

  def of(self, name: str, runs: Any = None) -> np.ndarray:
    """The array `name` of some runs, by their numbers and in that order, or by a mask over the axis
    `run`; None = of all."""
    if name not in self.arrays:
      raise ValueError(f"no array {name!r}; there are: {', '.join(self.arrays)}.")
    array = self.arrays[name]
    at = array.axes.index(RUN)
    wanted = self.runs if runs is None else np.atleast_1d(runs)
    wanted = wanted if wanted.size else wanted.astype(int)
    return array[tuple(wanted if i == at else slice(None) for i in range(len(array.axes)))]

  def to_pandas(self) -> Any:
    """The table as a pandas DataFrame."""
    return tables.frame(self.rows, otherwise=".rows")


def open_sweep(folder: str | Path) -> Sweep:
  """Opens the folder of a sweep, finished or not.

  Raises:
    ValueError: the folder is no sweep, or a file of it is damaged.
  """
  folder = Path(folder)
  asked = _asked(folder)
  finished = (folder / MANIFEST).exists()
  if finished:
    rows = _table(folder)
  else:
    parts = _read_units(folder)
    rows = [row for part in parts.values() if not isinstance(part, str) for row in part["rows"]]
  root = folder / ARRAYS
  return Sweep(
    path=folder.resolve(),
    asked=asked,
    finished=finished,
    rows=rows,
    arrays=arrays.open_group(root) if root.exists() else {},
    events=_events(folder),
  )


def _asked(folder: Path) -> dict[str, Any]:
  expect(folder, "sweep")
  if not (folder / ASKED).is_file():
    raise ValueError(f"{folder} has no {ASKED}, so it is no sweep: give the --out of a sweep.")
  try:
    asked = read_json(folder / ASKED)
  except ValueError:
    asked = None
  if not isinstance(asked, dict) or not all(
    isinstance(asked.get(key), int) for key in ("units", "width")
  ):
    raise ValueError(
      f"{folder / ASKED} is damaged, so nobody knows what was asked here: choose another --out, or "
      "give --redo to do it again."
    )
  return asked


def _events(folder: Path) -> list[Row]:
  path = folder / EVENTS
  if not path.exists():
    return []
  found = []
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    try:
      event = json.loads(line)
      found.append({"unit": event["unit"], "event": event["event"]})
    except (ValueError, KeyError, TypeError):
      found.append({"unit": None, "event": f"a line of {EVENTS} is damaged"})
  return found
