"""The studies that ship, by name, and what a new one needs."""

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_videoreason import own, store
from jax_videoreason.experiments import results
from jax_videoreason.experiments.base import perform, verdicts
from jax_videoreason.experiments.behaviours import behaviours
from jax_videoreason.experiments.chain_of_steps import chain_of_steps
from jax_videoreason.experiments.context import Chunks, Context, Setting
from jax_videoreason.experiments.controls import controls
from jax_videoreason.experiments.early import early
from jax_videoreason.experiments.ensemble import ensemble
from jax_videoreason.experiments.frames import frames
from jax_videoreason.experiments.layer_maps import layer_maps
from jax_videoreason.experiments.layer_swap import layer_swap
from jax_videoreason.experiments.noise import noise
from jax_videoreason.experiments.probes import probes
from jax_videoreason.experiments.results import Claim, Finding, Result
from jax_videoreason.experiments.study import Study, experiment, ships
from jax_videoreason.folders import MANIFEST
from jax_videoreason.records import damaged, rewriting, sums, write_json
from jax_videoreason.settings import nearest

EXPERIMENTS: dict[str, Study] = {
  study.name: study
  for study in (
    chain_of_steps,
    noise,
    layer_maps,
    layer_swap,
    ensemble,
    frames,
    probes,
    early,
    behaviours,
    controls,
  )
}


LATE = "declared after this run"


def find(name: str) -> Study:
  """A study that ships, or `module:function` of one elsewhere."""
  if name in EXPERIMENTS:
    return EXPERIMENTS[name]
  if ":" not in name:
    raise ValueError(f"no experiment {name!r}; {nearest(name, EXPERIMENTS)}")
  study = own.load(
    name,
    what="study",
    form="module:function",
    of="an @experiment",
    example="early_attention:early_attention",
  )
  if not isinstance(study, Study):
    raise ValueError(f"{name} is {type(study).__name__}, wanted a function under @experiment.")
  return study


def judge_again(folder: str | Path) -> None:
  """Takes the verdicts of a stored result anew, from its arrays and the claims it was run with.

  Nothing is computed by a model. What the run declared before its data (value, statistic, region)
  stays; where the claims of today differ, the row says so under "today". A claim that no longer
  ships keeps its verdict, as does a study, also one named like one that ships. Where something
  changed, "judged_again" of the record says when, and by which revision. A checksum that a call cut
  short left out of the manifest is put in.
  """
  folder = Path(folder)
  result, record = results.load(folder)
  study = EXPERIMENTS.get(record.get("experiment", ""))
  module = record.get("module")  # older results have none
  if study is None or (module is not None and not ships(module)):
    return
  if not {"claims", "control"} <= record.keys():
    raise damaged(folder / "result.json")
  today = {(claim.number, claim.says): claim for claim in study.claims}
  rows = []
  for row in record["claims"]:
    if row.get("today") == LATE:
      continue
    claim = today.pop((row["number"], row["says"]), None)
    if claim is None:
      rows.append({**row, "today": "no longer among the claims"})
      continue
    declared = as_declared(claim, row)
    (found,) = verdicts(dataclasses.replace(study, claims=(declared,)), result, record["control"])
    rows.append({**results.describe(found), "today": differences(declared, claim)})
  late = dataclasses.replace(study, claims=tuple(today.values()))
  rows += [
    {**results.describe(found), "today": LATE}
    for found in verdicts(late, result, record["control"])
  ]
  before = [{"today": None, "problems": row.get("cases"), **row} for row in record["claims"]]
  if rows != before:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    again = {"written": now, "revision": store.revision()}
    record = {**record, "claims": rows, "judged_again": again}
  if rows != before or ((folder / MANIFEST).is_file() and "result.json" not in sums(folder)):
    with rewriting(folder, "result.json"):
      write_json(folder / "result.json", record)


def as_declared(claim: Claim, row: Mapping[str, Any]) -> Claim:
  """The claim with the value, statistic and region of a row of result.json."""
  of = row.get("of", claim.of)
  return dataclasses.replace(
    claim,
    of=of if isinstance(of, str) else of[0] if len(of) == 1 else tuple(of),
    **{f: row[f] for f in ("statistic", "above", "below", "paper")},
  )


def differences(declared: Claim, today: Claim) -> str | None:
  """What a claim declares otherwise today, such as "declared today with above 0.1"; or None."""
  told = []
  for field in ("above", "below", "of", "statistic"):
    value = getattr(today, field)
    if value != getattr(declared, field):
      words = " and ".join(value) if isinstance(value, tuple) else value
      told.append(f"no {field}" if value is None else f"{field} {words}")
  return f"declared today with {', '.join(told)}" if told else None


__all__ = [
  "EXPERIMENTS",
  "Chunks",
  "Claim",
  "Context",
  "Finding",
  "Result",
  "Setting",
  "Study",
  "experiment",
  "find",
  "judge_again",
  "perform",
]
