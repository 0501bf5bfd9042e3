"""Units on threads: each is computed and kept once; a failure loses nothing that was begun."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jax_videoreason import lanes

WAIT = 20  # seconds that nothing here takes, unless it would wait for ever


@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_unit_is_computed_once_and_what_it_made_kept(number):
  begun, kept = [], {}

  def compute(unit: int) -> int:
    begun.append(unit)
    return unit**2

  lanes.carry(range(30), compute, kept.__setitem__, lanes=number)
  assert sorted(begun) == list(range(30))
  assert kept == {unit: unit**2 for unit in range(30)}
  if number == 1:
    assert begun == list(range(30))


def test_without_units_nothing_is_done():
  for number in (1, 3):
    lanes.carry([], pytest.fail, pytest.fail, lanes=number)


def test_one_lane_computes_where_it_is_called_while_the_last_unit_is_kept():
  computing, threads = threading.Event(), []

  def compute(unit: int) -> int:
    threads.append(threading.get_ident())
    if unit == 1:
      computing.set()
    return unit

  def keep(unit: int, made: int) -> None:
    assert threading.get_ident() != threads[0]
    assert computing.wait(WAIT)

  lanes.carry(range(3), compute, keep)
  assert set(threads) == {threading.get_ident()}


def test_several_lanes_compute_side_by_side():
  together, kept = threading.Barrier(3, timeout=WAIT), []

  def compute(unit: int) -> int:
    together.wait()
    return unit

  lanes.carry(range(6), compute, lambda unit, made: kept.append(unit), lanes=3)
  assert sorted(kept) == list(range(6))


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["compute", "keep"])
def test_after_a_failure_no_unit_is_begun_and_those_that_were_are_kept(where, kind):
  others, failed, begun, kept = threading.Barrier(3, timeout=WAIT), threading.Event(), [], []

  def fail(unit: int, at: str) -> None:
    if unit == 2 and where == at:
      failed.set()
      raise kind("unit 2")

  def compute(unit: int) -> int:
    begun.append(unit)
    others.wait()  # 0, 1 and 2 are all begun
    fail(unit, "compute")
    if unit != 2:
      assert failed.wait(WAIT)
      time.sleep(0.5)  # for the failure to be told
    return unit

  def keep(unit: int, made: int) -> None:
    fail(unit, "keep")
    kept.append(unit)

  with pytest.raises(kind, match="unit 2"):
    lanes.carry(range(50), compute, keep, lanes=3)
  assert sorted(begun) == [0, 1, 2]
  assert sorted(kept) == [0, 1]


SCRIPT = """
import signal, sys, time
from jax_videoreason import lanes
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is deaf to it
def compute(unit):
  sys.stdout.write(f"computes {unit}\\n")
  time.sleep(float(sys.argv[1]))
  return unit
def keep(unit, made):
  time.sleep(float(sys.argv[2]))
  sys.stdout.write(f"kept {unit}\\n")
try:
  lanes.carry(range(50), compute, keep, lanes=int(sys.argv[3]))
except KeyboardInterrupt:
  print("interrupted")
"""


def interrupted(times: int, at: str, compute: float, keep: float, number: int) -> list[str]:
  """What such lanes say to have kept from the line `at` on, where they are interrupted so often."""
  words = [sys.executable, "-uc", SCRIPT, str(compute), str(keep), str(number)]
  process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
  assert process.stdout is not None
  try:
    while process.stdout.readline() != f"{at}\n":
      assert process.poll() is None
    for _ in range(times):
      process.send_signal(signal.SIGINT)
      time.sleep(0.2)
    said, _ = process.communicate(timeout=WAIT)
  finally:
    process.kill()
  assert process.returncode == 0
  return [line for line in said.splitlines() if not line.startswith("computes")]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("compute", "keep"), [(0.8, 0), (0, 0.8)])
def test_interrupted_it_keeps_what_was_begun_before_it_says_so(compute, keep, times):
  *kept, last = interrupted(times, "computes 1", compute, keep, 2)
  assert sorted(kept) == ["kept 0", "kept 1"]
  assert last == "interrupted"


def test_one_lane_that_is_interrupted_keeps_what_is_being_kept():
  assert interrupted(1, "computes 1", 0.3, 0.8, 1) == ["kept 0", "interrupted"]


def test_cores_are_those_that_the_process_may_use(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
  assert lanes.cores() == 3
  monkeypatch.delattr(os, "sched_getaffinity")
  monkeypatch.setattr(os, "cpu_count", lambda: None)
  assert lanes.cores() == 1
