"""Units of work on threads: one at a time, kept beside the next, or several side by side."""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

U = TypeVar("U")
T = TypeVar("T")

HEARS = 0.5  # seconds of a wait: an interrupt that comes as it begins is heard when it ends


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
  once. Settings of jax that hold for a thread, by its context managers, hold in none of them.

  Where a unit fails or the caller is interrupted, no more are begun; those being kept, and those in
  other lanes, are carried through before the failure is raised. Units of several lanes are to be
  small: an interrupt of that wait is not heard.
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
  taking = threading.Lock()
  started, stopped = threading.Event(), threading.Event()

  def begun() -> list[U]:
    with taking:
      return [] if stopped.is_set() else list(itertools.islice(units, 1))

  def lane() -> None:
    started.wait()
    try:
      while some := begun():
        keep(some[0], compute(some[0]))
    except BaseException:
      stopped.set()
      raise

  pool, futures = ThreadPoolExecutor(lanes), []
  try:
    futures = [pool.submit(lane) for _ in range(lanes)]
    started.set()  # not before: of what is begun while they are submitted nobody could wait for all
    for future in futures:
      while not future.done():
        wait([future], timeout=HEARS)
      future.result()
  finally:
    stopped.set()
    started.set()
    _ended(futures)
    pool.shutdown(wait=False)


def _ended(futures: Sequence[Future[None]]) -> None:
  """Returns when no lane works any more: what they write to is let go afterwards."""
  while True:
    try:
      wait(futures)
    except KeyboardInterrupt:
      continue
    return
