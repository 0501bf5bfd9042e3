"""Draws the report of a run folder again: report.html and the film strips.

videoreason report runs/demo
"""

from pathlib import Path

from absl.flags import FlagValues

from jax_videoreason import cli, console, report

WORDS = 1


def define(flags: FlagValues) -> None:
  """It has no options."""


def main(flags: FlagValues, words: list[str]) -> None:
  if not words:
    raise cli.UsageError("no folder given: videoreason report DIR, the --out of a run.")
  folder = Path(words[0])
  report.render(folder)
  console.say(f"report: {(folder.resolve() / 'report.html').as_uri()}")
