"""Draws the report of a run, an evaluation or an experiment again: report.html and the film strips.

videoreason report runs/demo
"""

from pathlib import Path

from absl.flags import FlagValues

from jax_videoreason import cli, console, evaluate, pages, report, scorecard

WORDS = 1


def define(flags: FlagValues) -> None:
  """It has no options."""


def main(flags: FlagValues, words: list[str]) -> None:
  if not words:
    raise cli.UsageError("no folder given: videoreason report DIR, the --out of a run.")
  folder = Path(words[0])
  kinds = {evaluate.ASKED: scorecard, "arrays.zarr": pages}
  found = [draws for name, draws in kinds.items() if (folder / name).exists()]
  (found[0] if found else report).render(folder)
  console.say(f"report: {(folder.resolve() / 'report.html').as_uri()}")
