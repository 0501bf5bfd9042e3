"""Units on threads: each is computed and kept once; a failure loses nothing that was begun."""

import os
import threading
import time

import pytest

from jax_videoreason import lanes

WAIT = 20  # seconds that nothing here takes, unless it would wait for ever


@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_unit_is_begun_in_order_and_what_it_made_kept(number):
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


def test_several_lanes_compute_side_by_side_once_the_first_unit_is_kept():
  together, kept = threading.Barrier(3, timeout=WAIT), []

  def compute(unit: int) -> int:
    assert unit == 0 or 0 in kept
    if unit > 0:
      together.wait()
    return unit

  lanes.carry(range(7), compute, lambda unit, made: kept.append(unit), lanes=3)
  assert sorted(kept) == list(range(7))


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
    if unit > 0:
      others.wait()  # 1, 2 and 3 are all begun
      fail(unit, "compute")
      if unit != 2:
        assert failed.wait(WAIT)
        time.sleep(0.1)  # for the failure to be told
    return unit

  def keep(unit: int, made: int) -> None:
    fail(unit, "keep")
    kept.append(unit)

  with pytest.raises(kind, match="unit 2"):
    lanes.carry(range(50), compute, keep, lanes=3)
  assert sorted(begun) == [0, 1, 2, 3]
  assert sorted(kept) == [0, 1, 3]


def test_cores_are_those_that_the_process_may_use(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
  assert lanes.cores() == 3
  monkeypatch.delattr(os, "sched_getaffinity")
  monkeypatch.setattr(os, "cpu_count", lambda: None)
  assert lanes.cores() == 1
