"""The table of all claims: what was said, what was found, what can't be asked of a small model."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jax_videoreason import costs, plan, stats
from jax_videoreason.records import read_json, vouched, write_json
from jax_videoreason.vbvr import jobs

CARD = "gpu:141GB"  # for which the cost of what is not run here is said
NOT_HERE: tuple[dict[str, Any], ...] = (
  {
    "number": 1,
    "says": "VBVR-Wan2.2 scores .685 on VBVR-Bench",
    "paper": ".685",
    "ensemble": jobs.NONE,
  },
  {
    "number": 10,
    "says": "the training-free ensemble of three seeds raises it to .716",
    "paper": ".716",
    "ensemble": jobs.PAPER,
  },
)
READING = (
  "A claim *holds* where the whole 95% interval of our measure lies within its region (the",
  "smallest effect of interest, declared before the data), *does not hold* where it lies outside;",
  "otherwise the data *can't tell*, and the number of cases (of problems, where cases share some)",
  "that would settle it is given where there is one. Column n: problems with a number x seeds of",
  "each case, which are averaged. Intervals are taken over problems: of shares the exact binomial",
  "one (Clopper and Pearson), or the bootstrap's where it is wider, of all else a bootstrap. What",
  "needs other weights is *not run here*: a small model's number is never set beside the paper's",
  "score.",
)
OLDER = "its folder holds an older result, which this call did not ask for"
BLANK = {
  "above": None,
  "below": None,
  "estimate": None,
  "low": None,
  "high": None,
  "cases": 0,
  "problems": 0,
  "needed": None,
  "experiment": None,
  "seeds": None,
}


def write(
  out: str | Path,
  failed: Mapping[str, str] | None = None,
  asked: Collection[str] | None = None,
) -> list[dict[str, Any]]:
  """Writes claims.json over the results in `out`'s folders; returns the rows.

  failed: name of a study -> why it has no result. asked: the studies that belong to the table,
  None = all; an older result of another, or of one that failed, is *not run here*. What one study
  could not ask and another could, such as of a model without an expert switch, stands there once.

  ValueError: a result is missing or damaged.
  """
  out, failed = Path(out), dict(failed or {})
  there = sorted(path.parent.name for path in out.glob("*/result.json"))
  shown = [name for name in there if name not in failed and (asked is None or name in asked)]
  records = {name: read_json(vouched(out / name, "result.json")) for name in shown}
  rows = [
    {**claim, "experiment": name, "seeds": record.get("seeds")}
    for name, record in records.items()
    for claim in record["claims"]
  ]
  rows += [not_here(**row) for row in NOT_HERE]
  older = {name: OLDER for name in there if name not in shown and name not in failed}
  for name, reason in {**failed, **older}.items():
    lost = {"number": None, "says": f"the claims of {name}", "paper": "", "statistic": ""}
    rows.append({**BLANK, **lost, "verdict": "not run here", "note": reason})
  ran = {(row["number"], row["says"]) for row in rows if row["verdict"] != "not run here"}
  rows = [
    row
    for row in rows
    if row["verdict"] != "not run here" or (row["number"], row["says"]) not in ran
  ]
  rows.sort(key=lambda row: (row["number"] is None, row["number"] or 0))
  model = next((record["model"] for record in records.values()), None)
  write_json(
    out / "claims.json", {"model": model, "claims": rows, "failed": failed, "studies": shown}
  )
  return rows


def not_here(*, ensemble: str, **row: Any) -> dict[str, Any]:
  """The row of a claim that needs the benchmark and the 14B weights: its command and its cost."""
  command = "videoreason vbvr generate --data VBVR-Bench --config vbvr_wan22 --out videos"
  if ensemble != jobs.NONE:
    command += f" --ensemble {ensemble}"
  works = jobs.official(ensemble)
  most = costs.totals(works, plan.target(CARD))
  note = f"needs the 14B weights and VBVR-Bench: {command}, then vbvr score; at most {most}"
  statistic = f"mean score over {sum(work.videos for work in works):.0f} videos"
  return {**BLANK, "verdict": "not run here", **row, "statistic": statistic, "note": note}


def markdown(rows: list[dict[str, Any]]) -> str:
  """The table for a document."""
  head = ("#", "claim", "paper", "measured as", "holds if", "ours", "n", "verdict", "study")
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for row in rows:
    ours = "" if row["estimate"] is None else stats.spell(row)
    verdict = f"**{row['verdict']}**"
    if row["needed"]:
      verdict += f" ({settling(row)})"
    said = "; ".join(filter(None, (row["note"], row.get("today"))))
    if said:
      verdict += f": {said}"
    region = region_of(row)
    cells = (row["number"] or "", row["says"], row["paper"], row["statistic"], region, ours)
    cells = (*cells, count_of(row), verdict, row["experiment"] or "")
    lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
  return "\n".join(lines) + "\n"


def count_of(row: Mapping[str, Any]) -> str:
  """Such as "74 x 2": problems with a number, and seeds of each case; empty where there is none."""
  problems = row.get("problems", row["cases"])  # older results have none
  if not problems:
    return ""
  return f"{problems} x {row['seeds']}" if row.get("seeds") else str(problems)


def settling(row: Mapping[str, Any]) -> str:
  """Such as "about 40 cases would settle it"; problems where cases share some."""
  shared = row.get("problems", row["cases"]) != row["cases"]  # older results have none
  return f"about {row['needed']:,} {'problems' if shared else 'cases'} would settle it"


def region_of(row: Mapping[str, Any]) -> str:
  """Such as "above 0.5"."""
  bounds = [f"above {row['above']:g}" if row["above"] is not None else ""]
  bounds += [f"below {row['below']:g}" if row["below"] is not None else ""]
  return " and ".join(filter(None, bounds))
