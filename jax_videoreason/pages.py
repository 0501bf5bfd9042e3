"""A result folder as one page: question, verdicts, figures by the names of the axes, method.

One numeric axis is drawn as curves with intervals, two as heat maps, pictures as film strips;
what has no axis but case and seed stands in a table. Axes with texts for labels become lines,
panels and figures.
"""

import itertools
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason import plots, stats
from jax_videoreason.axes import spread
from jax_videoreason.experiments import claims, results
from jax_videoreason.experiments.results import Result
from jax_videoreason.folders import atomic, disk
from jax_videoreason.records import read_json, read_mapping, vouched, write_json
from jax_videoreason.report import flat, inline, write_page

# Axes of the figures whose name is not that of the axis; those along the steps also show sigma.
ALONG_STEPS = {
  "step": "step",
  "injected": "step of the noise",
  "observed": "step observed",
  "lens_step": "step",
  "probed": "step",
}
NAMES = {
  "latent_frame": "latent frame",
  "edited": "edited steps",
  "place": "place, share of the steps",
  "rank": "channel, by variance",
}
# The value that says where the places of an axis were, line by line; its labels are of the first.
PLACED = {"place": "place_at"}
MOST_COLUMNS = 9  # frames of a film strip
MOST_ROWS = 12  # steps of a film strip or of token maps
NAME_WIDTH = 34  # letters of a line beside an axis
# What the table of claims shows of each study; of another study its first figures.
SHOWN = {
  "chain_of_steps": ("strip-0", "right", "entropy"),
  "noise": ("step_drop", "sensitivity", "cka_x0"),
  "layer_maps": ("contrast", "lens_agrees", "cka_last"),
  "layer_swap": ("flip", "pull_first"),
  "ensemble": ("gain",),
  "frames": ("drop",),
  "probes": ("perception", "reasoning", "selectivity"),
  "early": ("success", "early_readout"),
  "behaviours": ("score", "memory_selectivity"),
  "controls": ("sensitivity",),
}
SHOWN_FIGURES = 3
TITLES = "titles.json"  # beside the figures of a study: name of the file -> title
ON_ONE_SCALE = ("norm_map_over_median",)


def render(folder: str | Path) -> Path:
  """Draws the page and the figures of a result folder again; returns the path of report.html."""
  folder = Path(folder)
  result, record = results.load(folder)
  manifest = read_mapping(folder / "manifest.json")
  figures = folder / "figures"
  with disk(figures):
    figures.mkdir(exist_ok=True)
  drawn = [made for name in result.values for made in draw(figures, result, name)]
  write_json(figures / TITLES, {figure["path"].name: figure["title"] for figure in drawn})
  return write_page(
    folder / "report.html",
    "result.html.j2",
    record=record,
    manifest=manifest,
    settings=flat(manifest["config"]),
    figures=[{**figure, "src": inline(figure["path"].read_bytes())} for figure in drawn],
    numbers=numbers(result),
    tasks=tasks_of(result),
    claims=[said({**claim, "seeds": record["seeds"]}) for claim in record["claims"]],
  )


def said(claim: Mapping[str, Any]) -> dict[str, Any]:
  """A claim of result.json with the words that tables show."""
  return {
    **claim,
    "region": claims.region_of(claim),
    "ours": "" if claim["estimate"] is None else stats.spell(claim),
    "n": claims.count_of(claim),
    "today": claim.get("today"),
    "settling": f"{claim['cases']} cases; {claims.settling(claim)}" if claim["needed"] else None,
    "kind": claim["verdict"].replace(" ", "-").replace("'", ""),
  }


def free_axes(result: Result, name: str) -> tuple[list[str], list[str]]:
  """(axes with numbers, axes with texts) of a value, beside case and seed."""
  rest = [axis for axis in result.axes[name] if axis not in results.REPEATS]
  texts = [a for a in rest if any(isinstance(p, str) for p in result.points.get(a, ()))]
  return [a for a in rest if a not in texts], texts


def averaged(result: Result, name: str, order: Sequence[str]) -> np.ndarray:
  """Problem first (a single one where the value has no cases), then the axes in `order`."""
  if "case" in result.axes[name]:
    value, axes = result.per_problem(name)
  else:
    value, axes = np.asarray(result.values[name])[None], result.axes[name]
  return np.transpose(value, [0, *(1 + axes.index(axis) for axis in order)])


def draw(folder: Path, result: Result, name: str) -> list[dict[str, Any]]:
  """The figures of one value: their path and title."""
  axes = result.axes[name]
  title = result.titles.get(name, name)
  if axes[-2:] == ("y", "x") or axes[-3:] == ("y", "x", "rgb"):
    return maps_of_tokens(folder, result, name, title)
  if "rgb" in axes:
    return strips(folder, result, name, title)
  if name in PLACED.values():
    return []
  numeric, texts = free_axes(result, name)
  if not numeric and texts and "case" in axes:
    return list(compared(folder, result, name, texts, title))
  if not 1 <= len(numeric) <= 2:
    return []
  value = averaged(result, name, [*texts, *numeric])
  made = []
  outer, inner = texts[:-1], texts[-1:]
  for places in itertools.product(*(range(len(result.points[a])) for a in outer)):
    part = value[(slice(None), *places)]
    labels = [str(result.points[a][p]) for a, p in zip(outer, places, strict=True)]
    path = folder / f"{'-'.join([name, *labels]).replace('/', '_')}.png"
    full = ", ".join([title, *labels])
    names = [str(p) for p in result.points[inner[0]]] if inner else [""]
    rows = [part[:, i] for i in range(len(names))] if inner else [part]
    if np.isfinite(value).any():
      series = dict(zip(names, rows, strict=True))
      if len(numeric) == 1:
        at = placed(result, name, [*texts, *numeric])
        curve(path, result, series, numeric, full, at=None if at is None else at[places])
      else:
        heat(path, result, series, numeric, full, signed=name in result.signed)
      made.append({"path": path, "title": full, "wide": len(numeric) == 2 and len(names) > 1})
  return made


def compared(
  folder: Path, result: Result, name: str, texts: Sequence[str], title: str
) -> Iterator[dict[str, Any]]:
  """A dot with its interval for every place of a value whose axes are texts, two places or more."""
  value = averaged(result, name, texts)
  labels = [[str(point) for point in result.points[axis]] for axis in texts]
  column = value.reshape(len(value), -1)
  names = [
    ", ".join(f"{axis} {label}" if label.isdigit() else label for axis, label in places)
    for places in (zip(texts, row, strict=True) for row in itertools.product(*labels))
  ]
  if len(names) < 2 or not np.isfinite(column).any():
    return
  path = folder / f"{name}.png"
  middle, low, high = by_place(column)
  rows = {n: (middle[i], low[i], high[i]) for i, n in enumerate(names) if np.isfinite(middle[i])}
  plots.intervals(path, rows, x_name=title)
  yield {"path": path, "title": title, "wide": False}


def labels_of(result: Result, axis: str, size: int) -> list[Any]:
  return list(result.points.get(axis, range(size)))


def has_sigma(result: Result, axis: str) -> bool:
  return axis in ALONG_STEPS and "sigma" in result.points


def named(result: Result, axis: str) -> str:
  """The name of an axis, as the figures show it."""
  name = ALONG_STEPS.get(axis) or NAMES.get(axis) or axis
  return f"{name} (sigma)" if has_sigma(result, axis) else name


def ticks(result: Result, axis: str, size: int, join: str) -> list[str]:
  """The labels of an axis; steps with their sigma."""
  labels = labels_of(result, axis, size)
  if not has_sigma(result, axis):
    return [str(label) for label in labels]
  return [f"{step}{join}({result.points['sigma'][int(step)]:.2f})" for step in labels]


def placed(result: Result, name: str, order: Sequence[str]) -> np.ndarray | None:
  """Where the places of a value were, the axes in `order`; None where their labels say it."""
  at = PLACED.get(order[-1], "")
  if at not in result.values or set(result.axes[at]) != set(result.axes[name]):
    return None
  return results.known_mean(averaged(result, at, order), 0)


def curve(
  path: Path,
  result: Result,
  rows: Mapping[str, np.ndarray],
  axes: Sequence[str],
  title: str,
  *,
  at: np.ndarray | None = None,
) -> None:
  """Curves over one axis, along the steps against sigma; at: the places of each curve, None = the
  labels of the axis. A place that is repeated is drawn once."""
  axis = axes[0]
  x: Any = labels_of(result, axis, next(iter(rows.values())).shape[1])
  along = has_sigma(result, axis)
  if along:
    x = [result.points["sigma"][int(step)] for step in x]
  lines = {}
  for number, (name, value) in enumerate(rows.items()):
    where = np.asarray(x if at is None else at[number], float)
    kept = np.unique(where, return_index=True)[1] if axis in PLACED else slice(None)
    lines[name] = (where[kept], *by_place(value[:, kept]))
  plots.bands(
    path,
    lines,
    x_name="sigma" if along else named(result, axis),
    y_name=textwrap.fill(title, NAME_WIDTH),
    falling=along,
  )


def by_place(value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(estimate, low, high) at every place of N P, over the problems that have a number there."""
  found = []
  for column in value.T:
    good = column[np.isfinite(column)]
    if not good.size:
      found.append((np.nan, np.nan, np.nan))
      continue
    interval = stats.bootstrap(good, seed=stats.SEED, draws=2000)
    found.append((float(interval.estimate), float(interval.low), float(interval.high)))
  estimate, low, high = np.array(found).T
  return estimate, low, high


def heat(
  path: Path,
  result: Result,
  rows: Mapping[str, np.ndarray],
  axes: Sequence[str],
  title: str,
  *,
  signed: bool,
) -> None:
  """Mean maps, the first numeric axis downward; signed: with dots where they differ from 0."""
  shape = next(iter(rows.values())).shape[1:]
  y, x = (
    ticks(result, axis, size, join)
    for axis, size, join in zip(axes, shape, (" ", "\n"), strict=True)
  )
  means = {name: results.known_mean(value, 0) for name, value in rows.items()}
  marked = {name: standing_out(value) for name, value in rows.items()} if signed else None
  y_name, x_name = (named(result, axis) for axis in axes)
  plots.heat_maps(
    path,
    means,
    x=x,
    y=y,
    x_name=x_name,
    y_name=y_name,
    value_name=textwrap.fill(title, NAME_WIDTH),
    marked=marked,
  )


def standing_out(value: np.ndarray) -> np.ndarray:
  """Cells of a map N ... that differ from 0, by `stats.max_statistic` over the whole map.

  Problems without any number are left out. No cell stands out where fewer than `stats.LEAST` are
  left, or where they have numbers at different cells.
  """
  known = np.isfinite(value)
  some = known.reshape(len(value), -1).any(1)
  value, known = value[some], known[some]
  if len(value) < stats.LEAST or not (known == known[:1]).all():
    return np.zeros(value.shape[1:], bool)
  return stats.max_statistic(np.nan_to_num(value), seed=stats.SEED).significant


def strips(folder: Path, result: Result, name: str, title: str) -> list[dict[str, Any]]:
  """One film strip per place of the first axis: rows steps, `MOST_ROWS` at most, columns frames."""
  made = []
  for number, frames in enumerate(result.values[name]):
    path = folder / f"{name}-{number}.png"
    steps = labels_of(result, "step", len(frames))
    shown = spread(len(frames), MOST_ROWS)
    label = [title, *map(str, result.points.get("strip", ())[number : number + 1])]
    if len(shown) < len(steps):
      label.append(f"{len(shown)} of {len(steps)} steps")
    sigma = [result.points["sigma"][steps[i]] for i in shown]
    plots.film_strip(
      path,
      np.asarray(frames, np.uint8)[shown],
      sigma,
      steps=[steps[i] for i in shown],
      title=", ".join(label),
      columns=MOST_COLUMNS,
      cell=results.CELL,
    )
    made.append({"path": path, "title": ", ".join(label), "wide": True})
  return made


def maps_of_tokens(folder: Path, result: Result, name: str, title: str) -> list[dict[str, Any]]:
  """A grid of token maps: rows and columns are the two axes before y and x."""
  row, column = result.axes[name][:2]
  pictures = np.asarray(result.values[name])
  rows, columns = (
    labels_of(result, a, n) for a, n in zip((row, column), pictures.shape, strict=False)
  )
  path = folder / f"{name}.png"
  shown = spread(len(rows), MOST_ROWS)
  plots.picture_grid(
    path,
    pictures[shown],
    rows=[rows[i] for i in shown],
    columns=columns,
    row_name=named(result, row),
    column_name=named(result, column),
    title=title,
    shared=name in ON_ONE_SCALE,
  )
  return [{"path": path, "title": title, "wide": True}]


def tasks_of(result: Result) -> list[str]:
  """The tasks of the cases, each once."""
  return list(dict.fromkeys(str(case).split()[0] for case in result.points.get("case", ())))


def numbers(result: Result) -> list[dict[str, Any]]:
  """Rows of the table: every value without a numeric axis, over all problems and per task."""
  rows = []
  tasks = tasks_of(result)
  of_case = [str(case).split()[0] for case in result.points.get("case", ())]
  task = np.array(list(dict(zip(result.problems(len(of_case)), of_case, strict=False)).values()))
  for name in result.values:
    numeric, texts = free_axes(result, name)
    if numeric or "case" not in result.axes[name]:
      continue
    value = averaged(result, name, texts)
    for places in itertools.product(*(range(len(result.points[a])) for a in texts)):
      column = value[(slice(None), *places)]
      labels = [str(result.points[a][p]) for a, p in zip(texts, places, strict=True)]
      rows.append(
        {
          "title": ", ".join([result.titles.get(name, name), *labels]),
          "all": in_words(column),
          "tasks": [in_words(column[task == one]) for one in tasks],
        }
      )
  return rows


def in_words(column: np.ndarray) -> str:
  """Such as "0.61 [0.50, 0.72]", with the number of problems where it is not that of all N, or too
  small for an interval; column: N, NaN where a problem has no number."""
  good = column[np.isfinite(column)]
  if not good.size:
    return ""
  found = stats.bootstrap(good, seed=stats.SEED, draws=2000)
  said = str(found) if np.isfinite(found.low) else f"{float(found.estimate):.2f}"
  return said + (f" (n={good.size})" if good.size < max(len(column), stats.LEAST) else "")


def render_claims(out: str | Path) -> Path:
  """Draws report.html and claims.md, with figures/, of claims.json; returns the path of the page.

  claims.md and figures/ are made to be copied into a repository as they are.
  """
  out = Path(out)
  table = read_json(out / "claims.json")
  figures = out / "figures"
  with disk(figures):
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir()
  studies = [study_of(out / name / "result.json", figures) for name in table["studies"]]
  page = write_page(
    out / "report.html",
    "claims.html.j2",
    claims=[said(claim) for claim in table["claims"]],
    model=table["model"],
    made=how_made(studies),
    studies=[
      {**s, "figures": [{**f, "src": inline(f["path"].read_bytes())} for f in s["figures"]]}
      for s in studies
    ],
  )
  with atomic(out / "claims.md") as part:
    part.write_text(document(table, studies), encoding="utf-8")
  return page


def study_of(path: Path, figures: Path) -> dict[str, Any]:
  """What the table of claims shows of a result.json; its chosen figures are copied to `figures`."""
  record = read_json(vouched(path.parent, path.name))
  manifest = read_mapping(path.parent / "manifest.json")
  drawn = path.parent / "figures"
  titles = read_json(drawn / TITLES) if (drawn / TITLES).is_file() else {}  # older pages have none
  wanted = SHOWN.get(record["experiment"], tuple(record["axes"]))
  found = []
  for name in wanted:
    own = sorted(p for p in drawn.glob("*.png") if p.stem == name or p.stem.startswith(f"{name}-"))
    found += own[:1]
  shown = []
  for figure in found[:SHOWN_FIGURES]:
    copy = figures / f"{path.parent.name}-{figure.name.replace(' ', '_')}"
    shutil.copyfile(figure, copy)
    of_value = record["titles"].get(figure.stem.partition("-")[0], figure.stem)
    shown.append({"path": copy, "title": titles.get(figure.name, of_value)})
  return {
    "name": path.parent.name,
    "record": record,
    "manifest": manifest,
    "page": f"{path.parent.name}/report.html",
    "figures": shown,
    "asked": asked_of(record),
  }


def asked_of(record: Mapping[str, Any]) -> str:
  """Such as "84 cases of 78 problems x 1 seed, 20 steps"."""
  cases, problems, seeds = (record.get(name) for name in ("cases", "problems", "seeds"))
  of = f" of {problems} problems" if problems not in (None, cases) else ""
  return f"{cases} cases{of} x {seeds} seed{'s' if seeds != 1 else ''}, {record['steps']} steps"


def how_made(studies: Sequence[Mapping[str, Any]]) -> str:
  """Command, dates, device, network evaluations and time of all studies, in a sentence."""
  manifests = [study["manifest"] for study in studies]
  if not manifests:
    return "No study has a result."
  words = dict.fromkeys(" ".join(manifest["command"]) for manifest in manifests)
  days = sorted({manifest["written"][:10] for manifest in manifests})
  when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
  work = sum(s["record"]["evaluations"] + s["record"]["reused"] for s in studies)
  seconds = sum(s["record"]["seconds"] for s in studies)
  return (
    f"Made by `{'`, `'.join(words)}` on {when} ({manifests[0]['device']}, "
    f"jax_videoreason {manifests[0]['versions']['jax_videoreason']}): {work:,} network "
    f"evaluations, {seconds / 60:.0f} minutes."
  )


def document(table: Mapping[str, Any], studies: Sequence[Mapping[str, Any]]) -> str:
  """The table of claims as Markdown, with the figures beside it."""
  lines = [
    f"# Claims about how video models reason, held against {table['model']}",
    "",
    how_made(studies),
    "",
    *claims.READING,
    "",
    claims.markdown(table["claims"]).rstrip(),
  ]
  for study in studies:
    record = study["record"]
    lines += ["", f"## {study['name']}", "", f"**{record['question']}** {record['method']}", ""]
    lines += [f"*Limits.* {record['limits']}", ""] if record["limits"] else []
    lines += [f"{study['asked'][0].upper()}{study['asked'][1:]}.", ""]
    lines += [f"- {note}" for note in (*record["notes"], *record["broken"])]
    lines += [""] if record["notes"] or record["broken"] else []
    for figure in study["figures"]:
      lines += [f"![{figure['title']}](figures/{figure['path'].name})", "", figure["title"], ""]
  return "\n".join(lines).rstrip() + "\n"
