"""What the terminal shows: lines, tables and bars, on process 0 only; no lower floor prints."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

WIDE = 400  # letters of a line in a file or a pipe, which have no edge to break words at


def speaks() -> bool:
  """Whether this process is the one that prints; alone, it is, and no device is asked for."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(text: str) -> None:
  """A line on standard output."""
  if speaks():
    Console(highlight=False, soft_wrap=True, emoji=False).print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
  """A table on standard output; numbers are set to the right, "-" stands for NaN. It is cut to the
  width of a terminal, or of COLUMNS, and is as wide as it has to be elsewhere."""
  if not speaks():
    return
  made = Table(title=title, title_justify="left")
  for number, name in enumerate(columns):
    is_number = all(isinstance(row[number], int | float) for row in rows)
    made.add_column(name, justify="right" if is_number else "left", overflow="fold")
  for row in rows:
    made.add_row(*map(_cell, row))
  screen = Console(highlight=False, emoji=False)
  if not screen.is_terminal and "COLUMNS" not in os.environ:
    screen.width = WIDE
  screen.print(made)


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return "-" if math.isnan(value) else f"{value:.2f}"
  return str(value)


@contextlib.contextmanager
def progress(total: int, title: str, unit: str, *, done: int = 0) -> Iterator[Callable[[int], Any]]:
  """Yields `advance(n)` of a bar on standard error; done: what was there before, at no cost."""
  with tqdm(total=total, initial=done, desc=title, unit=unit, disable=not speaks()) as bar:
    yield bar.update
