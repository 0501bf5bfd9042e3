"""Draws the report of a run, an evaluation, an experiment or a sweep again, with its pictures.

videoreason report runs/demo

Of a sweep, also one that was stopped or still works: what is done of it. Of the folder of `run
all`: every study's page, the table of claims and claims.md with its figures. Verdicts are taken
again from the stored arrays, with the regions that the run declared, and the numbers of an
evaluation from its rows.

A run that was denoised and could not be decoded gets its videos first: in --tiles, where whole
frames do not fit into memory.
"""

from pathlib import Path

from absl.flags import DEFINE_enum, DEFINE_string, FlagValues

from jax_videoreason import (
  cli,
  console,
  evaluation,
  gallery,
  pages,
  records,
  report,
  scorecard,
  store,
  sweep,
  tiling,
)
from jax_videoreason.cli.decoding import decode_run
from jax_videoreason.experiments import claims, judge_again

WORDS = 1


def define(flags: FlagValues) -> None:
  said = "whose tiles the VAE works in, of a run that is not decoded; None = the config's"
  DEFINE_enum("tiles", None, tiling.NAMES, said, flag_values=flags)
  said = "name or folder of the bundle that made such a run, instead of the config's"
  DEFINE_string("checkpoint", None, said, flag_values=flags)


def main(flags: FlagValues, words: list[str]) -> None:
  if not words:
    raise cli.UsageError("no folder given: videoreason report DIR, the --out of a run.")
  folder = Path(cli.typed_path(words[0], "DIR"))
  if (options := cli.given(flags)) and folder.is_dir() and not undecoded(folder):
    raise cli.UsageError(
      f"--{options[0]} is for a run that is not decoded, which {folder} is not: leave it out."
    )
  if any(folder.glob("*/result.json")) and not (folder / "result.json").exists():
    everything(folder)
    return
  kinds = {sweep.ASKED: gallery, evaluation.ASKED: scorecard, "arrays.zarr": pages}
  if (folder / evaluation.ASKED).exists():
    evaluation.again(folder)
  elif (folder / "result.json").exists():
    judge_again(folder)
  found = [draws for name, draws in kinds.items() if (folder / name).exists()]
  if not found:
    decode_run(folder, weights=flags.checkpoint, tiles=flags.tiles)
  (found[0] if found else report).render(folder)
  console.say(f"report: {(folder.resolve() / 'report.html').as_uri()}")


def undecoded(folder: Path) -> bool:
  """Whether it is the folder of a run whose videos are outstanding."""
  return (folder / "runs.json").exists() and store.open_run(folder).undecoded is not None


def everything(folder: Path) -> None:
  """Draws what `run all` left: the studies that have a result, and the table over them."""
  found = sorted(folder.glob("*/result.json"))
  for path in found:
    record = records.read_json(path)
    if not isinstance(record, dict) or not {"experiment", "axes"} <= record.keys():
      raise ValueError(
        f"{folder} is not the --out of one command, for {path.parent.name} in it is no study: give "
        "the folder of one (scores of VBVR-Bench are shown by `videoreason vbvr table`)."
      )
  for path in found:
    judge_again(path.parent)
    pages.render(path.parent)
  table = folder / "claims.json"
  was = records.read_json(table) if table.exists() else {}
  claims.write(folder, was.get("failed"), was.get("studies"))
  console.say(f"report: {pages.render_claims(folder).resolve().as_uri()}")
