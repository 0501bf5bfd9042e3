"""Units of work on threads: one at a time, kept beside the next, or several side by side."""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

U = TypeVar("U")
T = TypeVar("T")


def cores() -> int:
  """CPU cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def carry(
  units: Iterable[U],
  compute: Callable[[U], T],
  keep: Callable[[U, T], None],
  *,
  lanes: int = 1,
) -> None:
  """`keep(unit, compute(unit))` for every unit; they are begun in their order.

  lanes: 1, as a device wants it: units are computed on the thread that calls, and each is kept on
  another one while the next is computed. More, for the cores of a CPU: in every lane a thread
  computes a unit, keeps it and takes the next, so that several are computed, and several kept, at
  once; the first unit is done before, and what it compiles is there for all.

  Where a unit fails, or the caller is interrupted, no more are begun; those that are kept or in
  other lanes are carried through, and the failure is raised.
  """
  if lanes == 1:
    _overlapped(units, compute, keep)
  else:
    _side_by_side(iter(units), compute, keep, lanes)


def _overlapped(
  units: Iterable[U], compute: Callable[[U], T], keep: Callable[[U, T], None]
) -> None:
  keeping: Future[None] | None = None
  with ThreadPoolExecutor(1) as pool:
    for unit in units:
      made = compute(unit)
      if keeping is not None:
        keeping.result()
      keeping = pool.submit(keep, unit, made)
    if keeping is not None:
      keeping.result()


def _side_by_side(
  units: Iterator[U], compute: Callable[[U], T], keep: Callable[[U, T], None], lanes: int
) -> None:
  taking, stopped = threading.Lock(), threading.Event()

  def begun() -> list[U]:
    with taking:
      return [] if stopped.is_set() else list(itertools.islice(units, 1))

  def lane() -> None:
    try:
      while some := begun():
        keep(some[0], compute(some[0]))
    except BaseException:
      stopped.set()
      raise

  for unit in begun():
    keep(unit, compute(unit))
  with ThreadPoolExecutor(lanes) as pool:
    beside = [pool.submit(lane) for _ in range(lanes - 1)]
    try:
      lane()
      for future in beside:
        future.result()
    finally:
      stopped.set()
