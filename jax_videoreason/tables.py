"""Tables on disk: rows with named columns as Parquet, which pandas, polars and DuckDB open."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jax_videoreason.folders import atomic
from jax_videoreason.records import damaged


def write(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows of one set of columns; a column holds numbers, texts or bools, None = missing."""
  table = pa.Table.from_pylist([dict(row) for row in rows])
  with atomic(path) as part:
    pq.write_table(table, part)


def read(path: str | Path) -> list[dict[str, Any]]:
  """The rows of a table; ValueError when it is missing or damaged."""
  try:
    return pq.read_table(path).to_pylist()
  except (OSError, pa.ArrowException) as error:
    raise damaged(Path(path)) from error


def frame(rows: Sequence[Mapping[str, Any]], otherwise: str) -> Any:
  """Rows as a pandas DataFrame; otherwise: where they are to be had where pandas is missing."""
  if importlib.util.find_spec("pandas") is None:
    raise ValueError(
      f"to_pandas needs pandas, which is not installed: pip install pandas, or use {otherwise}."
    )
  return importlib.import_module("pandas").DataFrame(rows)
