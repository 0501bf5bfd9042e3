"""A sweep on disk: nothing is lost and nothing doubled, whatever happens to the process."""

import contextlib
import dataclasses
import errno
import fcntl
import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jax_videoreason import arrays, folders, open_sweep, records, sweep, tables
from jax_videoreason.cli.sweep import show
from jax_videoreason.sweep import Part, Work

ROOT = Path(__file__).resolve().parent.parent
UNITS, WIDTH = 6, 4
MANIFEST = {"config": {}, "command": ["me"], "device": "cpu"}
ASKED = {"steps": 5, "edits": {"none": {"edit": "none"}}, "units": UNITS, "width": WIDTH}


def value_of(unit: int) -> np.ndarray:
  return np.random.default_rng(unit).normal(size=(WIDTH, 5, 50)).astype(np.float32)


def part_of(unit: int, value: np.ndarray) -> Part:
  rows = [
    {
      "run": unit * WIDTH + r,
      "score": float(value[r].mean()),
      "answers": [None, str(r)],
      "broken_at": None,
    }
    for r in range(WIDTH)
  ]
  return Part(
    rows=rows,
    arrays={
      "latents": (("run", "step", "channel"), value),
      "taps/norm": (("step", "run"), value.mean(2).T),
    },
  )


def work(compute=value_of, read=part_of, lanes: int = 1) -> Work:
  return Work(
    units=UNITS, width=WIDTH, compute=compute, read=read, lanes=lanes, devices={"count": 1}
  )


def carry_out(folder: Path, asked=ASKED, made: Work | None = None, **options) -> list[int]:
  """The whole of a sweep; returns the units that were computed."""
  done = []
  made = work() if made is None else made

  def compute(unit: int):
    done.append(unit)
    return made.compute(unit)

  counted = dataclasses.replace(made, compute=compute)
  with folders.held(folder):
    sweep.begin(folder, asked, **options)
    sweep.carry_out(folder, counted, sweep.faults(folder))
    sweep.finish(folder, **MANIFEST)
  return done


@pytest.fixture
def whole(tmp_path) -> Path:
  folder = tmp_path / "whole"
  assert carry_out(folder) == list(range(UNITS))
  return folder


def table(folder: Path) -> bytes:
  return (folder / "table.parquet").read_bytes()


def latents(folder: Path) -> np.ndarray:
  return open_sweep(folder).of("latents")


def the_same(folder: Path, wanted: Path) -> None:
  assert table(folder) == table(wanted)
  np.testing.assert_array_equal(latents(folder), latents(wanted))


# What it leaves


def test_a_row_per_run_and_arrays_beside_it(whole):
  found = open_sweep(whole)
  assert found.finished
  assert found.column("run").tolist() == list(range(UNITS * WIDTH))
  assert found.rows == tables.read(whole / "table.parquet")
  wanted = np.concatenate([value_of(unit) for unit in range(UNITS)])
  np.testing.assert_array_equal(found.of("latents"), wanted)
  np.testing.assert_array_equal(found.of("latents", [7, 2]), wanted[[7, 2]])
  np.testing.assert_array_equal(found.of("taps/norm", 3), wanted.mean(2).T[:, [3]])
  assert found.column("score").dtype == np.float64
  assert found.column("answers")[1] == [None, "1"]


def test_a_sweep_opened_by_a_relative_path_stays_itself_in_another_folder(
  whole, tmp_path, monkeypatch
):
  monkeypatch.chdir(whole.parent)
  found = open_sweep(whole.name)
  monkeypatch.chdir(tmp_path)
  assert found.path == whole.resolve()
  np.testing.assert_array_equal(found.of("latents"), latents(whole))


def test_runs_are_chosen_by_a_filter(whole):
  found = open_sweep(whole)
  wanted = np.concatenate([value_of(unit) for unit in range(UNITS)])
  high = found.column("score") > 0
  assert 0 < high.sum() < len(high)
  for chosen in (high, high.tolist(), found.runs[high]):
    np.testing.assert_array_equal(found.of("latents", chosen), wanted[high])


def test_a_filter_that_finds_nothing_gives_no_runs(whole):
  found = open_sweep(whole)
  mask = found.column("score") > 1e9
  for none in ([], (), np.array([]), mask, found.runs[mask]):
    for name, shape in (("latents", (0, 5, 50)), ("taps/norm", (5, 0))):
      values = found.of(name, none)
      assert values.shape == shape
      assert values.dtype == np.float32


def test_a_sweep_without_rows_has_integers_for_runs(whole):
  found = dataclasses.replace(open_sweep(whole), rows=[])
  assert found.runs.shape == found.column("run").shape == (0,)
  assert found.runs.dtype == open_sweep(whole).runs.dtype == int
  assert found.of("latents").shape == found.of("latents", found.runs).shape == (0, 5, 50)
  assert found.of("latents", found.column("score") > 0).shape == (0, 5, 50)


def test_a_wrong_name_is_answered_with_the_right_ones(whole):
  with pytest.raises(ValueError, match="no column 'scores'; there are: run, score"):
    open_sweep(whole).column("scores")
  with pytest.raises(ValueError, match="no array 'x0'; there are: latents, taps/norm"):
    open_sweep(whole).of("x0")
  with pytest.raises(ValueError, match=r"has no sweep\.json, so it is no sweep"):
    open_sweep(whole.parent)


def test_pandas_reads_it_where_it_is_installed(whole):
  if importlib.util.find_spec("pandas") is None:
    with pytest.raises(ValueError, match=r"pip install pandas, or use \.rows"):
      open_sweep(whole).to_pandas()
  else:
    assert len(open_sweep(whole).to_pandas()) == UNITS * WIDTH


def test_the_manifest_names_what_is_there(whole):
  made = json.loads((whole / "manifest.json").read_text())
  assert set(made["files"]) == {path.name for path in whole.iterdir()} - {"manifest.json"}
  assert made["layout_of_unit"] == [0] * UNITS
  assert [json.loads(layout) for layout in made["layouts"]] == [{"count": 1}]


def test_a_finished_sweep_is_only_read(whole):
  before = (whole / "manifest.json").read_bytes()
  assert carry_out(whole) == []
  assert (whole / "manifest.json").read_bytes() == before


def test_an_unfinished_sweep_can_be_looked_at(tmp_path):
  with contextlib.suppress(KeyboardInterrupt):
    carry_out(tmp_path, made=work(compute=stopping(3)))
  found = open_sweep(tmp_path)
  assert not found.finished
  assert found.column("run").tolist() == list(range(3 * WIDTH))
  np.testing.assert_array_equal(found.of("latents", [4]), value_of(1)[:1])


def stopping(at: int):
  def compute(unit: int) -> np.ndarray:
    if unit == at:
      raise KeyboardInterrupt
    return value_of(unit)

  return compute


# Stop and go on


@pytest.mark.parametrize("lanes", [2, 5])
def test_units_side_by_side_leave_the_same(whole, tmp_path, lanes):
  other, done = tmp_path / "other", 0
  together = threading.Barrier(2, timeout=20)

  def compute(unit: int) -> np.ndarray:
    together.wait()  # two have something to write at once
    return value_of(unit)

  def advance(runs: int) -> None:
    nonlocal done
    before = done
    time.sleep(0.01)
    done = before + runs

  made = work(compute=compute, lanes=lanes)
  with folders.held(other):
    sweep.begin(other, ASKED)
    sweep.carry_out(other, made, sweep.faults(other), advance=advance)
    sweep.finish(other, **MANIFEST)
  assert done == WIDTH * UNITS
  the_same(other, whole)
  assert carry_out(other) == []


@pytest.mark.parametrize(("left", "lanes", "wanted"), [(4, 1, 32.0), (4, 2, 20.0), (3, 2, 20.0)])
def test_the_time_that_is_left_is_that_of_units_side_by_side(whole, left, lanes, wanted):
  for number in range(UNITS):
    path = whole / "units" / f"{number:05}.json"
    unit = json.loads(path.read_text())
    path.write_text(json.dumps({**unit, "seconds": {"compute": 8.0, "read": 2.0}, "lanes": lanes}))
  for number in range(left):
    (whole / "units" / f"{number:05}.json").unlink()
  assert sweep.status(whole).seconds == wanted


def test_stopped_with_units_side_by_side_it_goes_on_with_what_is_left(whole, tmp_path):
  other = tmp_path / "other"
  with pytest.raises(KeyboardInterrupt):
    carry_out(other, made=work(compute=stopping(3), lanes=3))
  left = carry_out(other)
  assert 3 in left
  assert not {0, 1, 2} & set(left)
  the_same(other, whole)


@pytest.mark.parametrize("at", range(UNITS))
def test_interrupted_it_goes_on_with_what_is_left(whole, tmp_path, at):
  other = tmp_path / "other"
  with pytest.raises(KeyboardInterrupt):
    carry_out(other, made=work(compute=stopping(at)))
  assert carry_out(other) == list(range(at, UNITS))
  the_same(other, whole)


def test_what_cannot_be_read_stops_it_and_keeps_what_is_done(whole, tmp_path):
  def read(unit: int, value: np.ndarray) -> Part:
    if unit == 2:
      raise OSError("the reader broke")
    return part_of(unit, value)

  other = tmp_path / "other"
  with pytest.raises(OSError, match="the reader broke"):
    carry_out(other, made=work(read=read))
  assert carry_out(other)[0] == 2
  the_same(other, whole)


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import test_sweep as t
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
def slow(unit):
  time.sleep(pause)
  return t.value_of(unit)
print("ready", flush=True)
t.carry_out(folder, made=t.work(compute=slow))
"""


def start(folder: Path, pause: float, **options) -> subprocess.Popen:
  code = SCRIPT.format(tests=str(ROOT / "tests"), root=str(ROOT))
  process = subprocess.Popen(
    [sys.executable, "-c", code, str(folder), str(pause)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "ready\n"
  return process


def killed(folder: Path, moments: int, seed: int) -> int:
  """Kills a sweep at random moments until that many are used up; how often it was in the midst."""
  drawn, hit = random.Random(seed), 0
  for _ in range(moments):
    process = start(folder, 0.06)  # from the start it takes longer than any moment drawn
    time.sleep(drawn.uniform(0, 0.35))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hit += process.returncode == -signal.SIGKILL
  return hit


def test_killed_at_random_moments_it_ends_with_the_same_table(whole, tmp_path):
  assert killed(tmp_path / "killed", 3, seed=0) > 0
  carry_out(tmp_path / "killed")
  the_same(tmp_path / "killed", whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_with_the_same_table(whole, tmp_path):
  hit = 0
  for number in range(10):
    folder = tmp_path / str(number)
    hit += killed(folder, 2, seed=number + 1)
    carry_out(folder)
    the_same(folder, whole)
  assert hit >= 10


# Damage


def chunk_of(folder: Path, name: str, unit: int) -> Path:
  """The file of the chunk that a unit wrote."""
  at = arrays.open_group(folder / "results.zarr")[name].axes.index("run")
  axes = len(arrays.open_group(folder / "results.zarr")[name].axes)
  parts = [str(unit) if i == at else "0" for i in range(axes)]
  return folder / "results.zarr" / name / "c" / "/".join(parts)


@pytest.mark.parametrize("name", ["latents", "taps/norm"])
def test_a_truncated_chunk_is_recorded_and_done_again(whole, tmp_path, name):
  before, values = table(whole), latents(whole)
  path = chunk_of(whole, name, 2)
  os.truncate(path, path.stat().st_size // 2)
  assert carry_out(whole) == [2]
  assert table(whole) == before
  np.testing.assert_array_equal(latents(whole), values)
  events = sweep.status(whole).events
  assert events == [{"unit": 2, "event": f"a chunk of {name} is missing or damaged; done again"}]


@pytest.mark.parametrize("text", ['{"unit": 4, "rows": [', '{"unit": 4, "rows": [1, 2, 3, 4]}'])
def test_a_damaged_row_file_is_recorded_and_done_again(whole, text):
  before = table(whole)
  (whole / "units" / "00004.json").write_text(text)
  assert carry_out(whole) == [4]
  assert table(whole) == before
  assert sweep.status(whole).events == [{"unit": 4, "event": "00004.json is damaged; done again"}]


def test_a_number_that_was_changed_by_hand_is_no_result(whole):
  before, path = table(whole), whole / "units" / "00004.json"
  said = json.loads(path.read_text())
  said["rows"][1]["score"] += 0.1
  path.write_text(json.dumps(said))
  found = sweep.status(whole)
  assert (found.finished, found.left) == (False, [4])
  assert found.damaged == {4: "00004.json is damaged"}
  assert carry_out(whole) == [4]
  assert table(whole) == before


def test_units_of_an_earlier_version_are_whole_without_a_sum(whole):
  before = table(whole)
  for path in (whole / "units").iterdir():
    said = json.loads(path.read_text())
    del said["sum"]
    path.write_text(json.dumps(said))
  assert sweep.status(whole).finished
  assert carry_out(whole) == []
  assert table(whole) == before


def test_a_unit_of_a_sweep_that_was_replaced_is_none_of_this_one(whole):
  path = whole / "units" / "00002.json"
  late = path.read_bytes()
  with folders.held(whole):
    sweep.begin(whole, {**ASKED, "steps": 10}, redo=True)
    path.write_bytes(late)  # by a process that outlived the one that held the folder
  assert carry_out(whole, {**ASKED, "steps": 10}) == list(range(UNITS))
  assert sweep.status(whole).events == [
    {"unit": 2, "event": "00002.json is of another sweep; done again"}
  ]


def test_a_lost_unit_makes_another_table(whole):
  def nearly(unit: int) -> np.ndarray:
    assert not open_sweep(whole).finished  # while it is done again
    return value_of(unit) + 1e-3  # as on another number of devices

  (whole / "units" / "00004.json").unlink()
  assert carry_out(whole, made=work(compute=nearly)) == [4]
  found = open_sweep(whole)
  assert found.column("score")[16] == pytest.approx(float(found.of("latents", 16).mean()))
  assert found.column("score")[16] == pytest.approx(float(value_of(4)[0].mean()) + 1e-3)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"node_type": "array"}'])
def test_a_lost_description_of_an_array_costs_all_units(whole, text):
  before = table(whole)
  (whole / "results.zarr" / "latents" / "zarr.json").write_text(text)
  assert carry_out(whole) == list(range(UNITS))
  assert table(whole) == before
  assert "All units are done again" in sweep.status(whole).events[0]["event"]


def flip(path: Path, at: int) -> None:
  """Turns one bit of a byte over."""
  whole = bytearray(path.read_bytes())
  whole[at] ^= 1
  path.write_bytes(whole)


def turned(raw: bytes) -> Iterator[bytes]:
  """The bytes with one bit turned over, for each."""
  for at in range(len(raw)):
    for bit in range(8):
      yield raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


def test_no_bit_of_the_description_of_an_array_can_turn_into_other_numbers(whole):
  path, wanted = whole / "results.zarr/latents/zarr.json", open_sweep(whole).arrays["latents"]
  numbers = wanted[...]
  others = [
    path.read_bytes().replace(b'"little"', b'"big"'),
    path.read_bytes().replace(b'"float32"', b'"int32"'),
  ]
  for text in [*turned(path.read_bytes()), *others]:
    path.write_bytes(text)
    try:
      found = open_sweep(whole).arrays["latents"]
      read = found[...]
    except ValueError as error:
      assert "missing or damaged" in str(error)
      continue
    assert (found.axes, found.steps) == (wanted.axes, wanted.steps)
    assert read.dtype == numbers.dtype
    np.testing.assert_array_equal(read, numbers)


def test_a_sweep_that_an_earlier_version_began_goes_on(whole):
  before, wanted = table(whole), latents(whole)
  for name in ("latents", "taps/norm"):  # they had no checksum
    path = whole / "results.zarr" / name / "zarr.json"
    meta = records.read_json(path)
    del meta["attributes"]["sum"]
    records.write_json(path, meta)
  (whole / "units" / "00002.json").unlink()
  assert carry_out(whole) == [2]
  assert table(whole) == before
  np.testing.assert_array_equal(latents(whole), wanted)


def test_no_bit_of_the_table_can_turn_into_another_number(whole):
  before = table(whole)
  for at in range(0, len(before), len(before) // 60):
    flip(whole / "table.parquet", at)
    with pytest.raises(ValueError, match="missing or damaged"):
      open_sweep(whole)
    (whole / "table.parquet").write_bytes(before)
  assert open_sweep(whole).finished


def test_a_table_that_is_not_what_was_written_is_named_and_written_again(whole, capsys):
  before = table(whole)
  flip(whole / "table.parquet", len(before) // 3)
  with pytest.raises(ValueError, match=r"table\.parquet or .* missing or damaged: the same"):
    open_sweep(whole)
  found = sweep.status(whole)
  assert (found.finished, found.done, found.left) == (False, UNITS, [])
  show(whole)
  assert "damaged; the same command writes it again" in capsys.readouterr().out
  assert carry_out(whole) == []
  assert table(whole) == before
  found = sweep.status(whole)
  assert (found.finished, found.table) == (True, "")
  assert found.events == [{"unit": None, "event": f"{sweep.DAMAGED}; written again"}]


@pytest.mark.parametrize("name", ["table.parquet", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_what_was_written_last_is_written_again_from_the_units(whole, name, damage):
  before = table(whole)
  damage(whole / name)
  assert carry_out(whole) == []
  assert table(whole) == before
  assert open_sweep(whole).finished


def test_a_line_of_the_events_that_was_cut_short_stops_nothing(whole):
  (whole / "events.jsonl").write_text('{"unit": 3, "event": "the first"}\n{"unit": 2, "eve')
  (whole / "units" / "00004.json").unlink()
  (whole / "units" / "00001.json").write_text("{")
  assert carry_out(whole) == [1, 4]
  assert open_sweep(whole).events == sweep.status(whole).events
  assert sweep.status(whole).events == [
    {"unit": 3, "event": "the first"},
    {"unit": None, "event": "a line of events.jsonl is damaged"},
    {"unit": 1, "event": "00001.json is damaged; done again"},
  ]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"units": 6, "width": "4"}', "{"])
def test_what_was_asked_is_never_guessed(whole, text):
  before = table(whole)
  (whole / "sweep.json").write_text(text)
  for look in (sweep.status, open_sweep, carry_out):
    with pytest.raises(ValueError, match=r"sweep\.json is damaged, .* give --redo"):
      look(whole)
  assert table(whole) == before
  assert carry_out(whole, redo=True) == list(range(UNITS))


@pytest.mark.parametrize("redo", [False, True])
def test_a_folder_that_lost_what_was_asked_is_left_alone(whole, redo):
  before = table(whole)
  (whole / "sweep.json").unlink()
  with pytest.raises(ValueError, match=r"has .*no sweep\.json, .*: choose another --out\."):
    carry_out(whole, redo=redo)
  assert table(whole) == before


def test_stopped_before_its_first_folder_it_goes_on(whole, tmp_path, monkeypatch):
  made, real = tmp_path / "early", Path.mkdir

  def stopped(path, *arguments, **options):
    if path.name == "units":
      raise KeyboardInterrupt
    real(path, *arguments, **options)

  monkeypatch.setattr(Path, "mkdir", stopped)
  with pytest.raises(KeyboardInterrupt):
    carry_out(made)
  monkeypatch.undo()
  assert carry_out(made) == list(range(UNITS))
  the_same(made, whole)


def test_a_disk_without_room_stops_it_and_the_rest_comes_later(whole, tmp_path):
  def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))

  folder = tmp_path / "full"
  process = start(folder, 0.0, preexec_fn=limit)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 1
  assert "could not be written (File too large): free some space" in said
  assert "What is done stays: the same command goes on." in said
  assert not (folder / "table.parquet").exists()
  carry_out(folder)
  the_same(folder, whole)


# Two at once, another config, another clock


def test_the_second_of_two_sweeps_in_one_folder_is_refused(whole, tmp_path):
  folder = tmp_path / "both"
  process = start(folder, 0.3)
  while not (folder / "units").exists():
    time.sleep(0.01)
  with pytest.raises(ValueError, match=r"another command works in .*both: wait for it"):
    carry_out(folder)
  assert sweep.status(folder).working
  assert process.wait(timeout=60) == 0
  process.communicate()
  assert not sweep.status(folder).working
  the_same(folder, whole)


def test_who_looks_keeps_nobody_out(whole):
  (whole / "lock").touch()
  with (whole / "lock").open() as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN)).start()
    assert carry_out(whole) == []


def test_a_lock_that_is_removed_while_it_is_opened_holds_nothing(tmp_path, monkeypatch):
  real, calls = fcntl.flock, []

  def flock(*arguments):
    if not calls:
      (tmp_path / "lock").unlink()  # who held it ends just now
    calls.append(arguments)
    real(*arguments)

  monkeypatch.setattr(fcntl, "flock", flock)
  with folders.held(tmp_path):
    assert len(calls) == 2
    with pytest.raises(ValueError, match="another command works in"), folders.held(tmp_path):
      pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", flock)
  said = rf"{tmp_path} can't be held .*\(No locks available\): choose an --out on a file system"
  with pytest.raises(OSError, match=said):
    carry_out(tmp_path)
  (tmp_path / folders.LOCK).write_text("")
  assert not folders.is_held(tmp_path)
  (tmp_path / folders.LOCK).unlink()
  (tmp_path / folders.LOCK).mkdir()  # what can't be opened is not taken for free
  with pytest.raises(OSError, match="Is a directory"):
    folders.is_held(tmp_path)


def test_another_config_is_refused_and_the_keys_are_named(whole):
  other = {**ASKED, "steps": 10, "edits": {"none": {"edit": "none"}, "more": {"edit": "ablate"}}}
  with pytest.raises(ValueError) as refused:
    carry_out(whole, other)
  said = str(refused.value)
  assert "steps=5 there and 10 here" in said
  assert "edits.more=None there and {'edit': 'ablate'} here" in said
  assert "give --redo to replace it" in said
  assert carry_out(whole, {**ASKED, "steps": 10}, redo=True) == list(range(UNITS))


def test_a_folder_with_something_else_is_left_alone(tmp_path):
  (tmp_path / "mine.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"is not empty \(it has mine.txt\)"):
    carry_out(tmp_path)
  with pytest.raises(ValueError, match="is a file, wanted a folder"):
    carry_out(tmp_path / "mine.txt")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt"]
  carry_out(tmp_path, redo=True)
  assert (tmp_path / "mine.txt").read_text() == "mine"


def test_redo_removes_no_units_that_no_sweep_made(tmp_path):
  (tmp_path / "units").mkdir()
  (tmp_path / "units" / "mine.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"has units and no sweep\.json"):
    carry_out(tmp_path, redo=True)
  assert (tmp_path / "units" / "mine.txt").read_text() == "mine"


def test_a_clock_that_is_set_back_changes_nothing(whole, tmp_path, monkeypatch):
  folder = tmp_path / "clock"
  with pytest.raises(KeyboardInterrupt):
    carry_out(folder, made=work(compute=stopping(3)))
  for path in folder.rglob("*"):
    os.utime(path, (4e9, 4e9))  # written in the future
  monkeypatch.setattr(time, "time", lambda: 0.0)
  left = sweep.status(folder).seconds
  assert left is not None
  assert left >= 0
  assert carry_out(folder) == [3, 4, 5]
  the_same(folder, whole)


# Looking


def test_status_says_how_far_it_is(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    carry_out(tmp_path, made=work(compute=stopping(2)))
  for unit in range(2):
    path = tmp_path / "units" / f"{unit:05}.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "seconds": {"compute": 2.0, "read": 3.0}}))
  found = sweep.status(tmp_path)
  assert (found.done, found.units, found.finished, found.working) == (2, UNITS, False, False)
  assert found.left == [2, 3, 4, 5]
  assert found.seconds == 3.0 * len(found.left)  # the slower of the two that overlap


def test_looking_writes_nothing(whole):
  before = sorted(whole.rglob("*"))
  assert not sweep.status(whole).working
  assert open_sweep(whole).finished
  assert sorted(whole.rglob("*")) == before


def test_units_are_shared_between_processes(whole, tmp_path):
  folder = tmp_path / "two"
  with folders.held(folder):
    sweep.begin(folder, ASKED)
    sweep.carry_out(folder, work(), dict.fromkeys((0, 2, 4), ""))
    with pytest.raises(ValueError, match=r"is not whole \(of its units, 1, 3, 5 lacking"):
      sweep.finish(folder, **MANIFEST)
    sweep.carry_out(folder, work(), dict.fromkeys((1, 3, 5), ""))
    sweep.finish(folder, **MANIFEST)
  the_same(folder, whole)
