"""A result folder as one page: question, verdicts, figures by the names of the axes, method.

One numeric axis is drawn as curves with intervals, two as heat maps, pictures as film strips;
what has no axis but case and seed stands in a table. Axes with texts for labels become lines,
panels and figures.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason import plots, stats
from jax_videoreason.experiments import results
from jax_videoreason.experiments.results import Result
from jax_videoreason.folders import atomic, disk, read_json
from jax_videoreason.report import environment, flat, inline

ALONG_STEPS = ("step", "injected", "observed")
MOST_COLUMNS = 9  # frames of a film strip
SHOWN_FIGURES = 4  # of each study on the page of all claims


def render(folder: str | Path) -> Path:
  """Draws the page and the figures of a result folder again; returns the path of report.html."""
  folder = Path(folder)
  result, record = results.load(folder)
  manifest = read_json(folder / "manifest.json")
  figures = folder / "figures"
  with disk(figures):
    figures.mkdir(exist_ok=True)
  effects = set(record["control"] or ())
  drawn = [made for name in result.values for made in draw(figures, result, name, name in effects)]
  page = (
    environment()
    .get_template("result.html.j2")
    .render(
      record=record,
      manifest=manifest,
      settings=flat(manifest["config"]),
      figures=[{**figure, "src": inline(figure["path"], "image/png")} for figure in drawn],
      numbers=numbers(result),
      tasks=tasks_of(result),
      claims=[said(claim) for claim in record["claims"]],
    )
  )
  path = folder / "report.html"
  with atomic(path) as part:
    part.write_text(page, encoding="utf-8")
  return path


def said(claim: Mapping[str, Any]) -> dict[str, Any]:
  """A claim of result.json with the words that tables show."""
  bounds = [f"above {claim['above']:g}" if claim["above"] is not None else ""]
  bounds += [f"below {claim['below']:g}" if claim["below"] is not None else ""]
  estimate, low, high = claim["estimate"], claim["low"], claim["high"]
  ours = "no number" if estimate is None else f"{estimate:.2f}"
  ours += "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
  return {
    **claim,
    "region": " and ".join(filter(None, bounds)),
    "ours": ours,
    "kind": claim["verdict"].replace(" ", "-").replace("'", ""),
  }


def free_axes(result: Result, name: str) -> tuple[list[str], list[str]]:
  """(axes with numbers, axes with texts) of a value, beside case and seed."""
  rest = [axis for axis in result.axes[name] if axis not in results.REPEATS]
  texts = [a for a in rest if any(isinstance(p, str) for p in result.points.get(a, ()))]
  return [a for a in rest if a not in texts], texts


def averaged(result: Result, name: str, order: Sequence[str]) -> np.ndarray:
  """Case first (a single one where the value has no cases), then the axes in `order`."""
  if "case" in result.axes[name]:
    value, axes = result.per_case(name)
  else:
    value, axes = np.asarray(result.values[name])[None], result.axes[name]
  return np.transpose(value, [0, *(1 + axes.index(axis) for axis in order)])


def draw(folder: Path, result: Result, name: str, is_effect: bool) -> list[dict[str, Any]]:
  """The figures of one value: their path and title. is_effect: 0 is what no edit would give."""
  axes = result.axes[name]
  title = result.titles.get(name, name)
  if axes[-2:] == ("y", "x") or axes[-3:] == ("y", "x", "rgb"):
    return maps_of_tokens(folder, result, name, title)
  if "rgb" in axes:
    return strips(folder, result, name, title)
  numeric, texts = free_axes(result, name)
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
        curve(path, result, series, numeric)
      else:
        heat(path, result, series, numeric, is_effect)
      made.append({"path": path, "title": full, "wide": len(numeric) == 2 and len(names) > 1})
  return made


def labels_of(result: Result, axis: str, size: int) -> list[Any]:
  return list(result.points.get(axis, range(size)))


def curve(path: Path, result: Result, rows: Mapping[str, np.ndarray], axes: Sequence[str]) -> None:
  """Curves over one axis, along the steps against sigma."""
  axis = axes[0]
  x: Any = labels_of(result, axis, next(iter(rows.values())).shape[1])
  along = axis in ALONG_STEPS and "sigma" in result.points
  if along:
    x = [result.points["sigma"][int(step)] for step in x]
  plots.bands(
    path,
    np.asarray(x, float),
    {name: by_place(value) for name, value in rows.items()},
    x_name="sigma" if along else axis,
    y_name="",
    falling=along,
  )


def by_place(value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(estimate, low, high) at every place of N P, over the cases that have a number there."""
  found = []
  for column in value.T:
    good = column[np.isfinite(column)]
    if not good.size:
      found.append((np.nan, np.nan, np.nan))
      continue
    interval = stats.bootstrap(good, seed=results.SEED, draws=2000)
    found.append((float(interval.estimate), float(interval.low), float(interval.high)))
  estimate, low, high = np.array(found).T
  return estimate, low, high


def heat(
  path: Path,
  result: Result,
  rows: Mapping[str, np.ndarray],
  axes: Sequence[str],
  is_effect: bool,
) -> None:
  """Mean maps, the first numeric axis downward."""
  shape = next(iter(rows.values())).shape[1:]
  y, x = (labels_of(result, axis, size) for axis, size in zip(axes, shape, strict=True))
  means = {}
  for name, value in rows.items():
    known = np.isfinite(value)
    count = np.maximum(known.sum(0), 1)
    means[name] = np.where(known.any(0), np.where(known, value, 0).sum(0) / count, np.nan)
  marked = None
  cases = next(iter(rows.values()))
  if is_effect and len(cases) >= stats.LEAST and all(is_whole(v) for v in rows.values()):
    seed = results.SEED
    marked = {
      n: stats.max_statistic(np.nan_to_num(v), seed=seed).significant for n, v in rows.items()
    }
  plots.heat_maps(path, means, x=x, y=y, x_name=axes[1], y_name=axes[0], marked=marked)


def is_whole(value: np.ndarray) -> bool:
  """Whether every case has a number at the same cells."""
  known = np.isfinite(value)
  return bool((known == known[:1]).all())


def strips(folder: Path, result: Result, name: str, title: str) -> list[dict[str, Any]]:
  """One film strip per place of the first axis: rows steps, columns frames."""
  made = []
  for number, frames in enumerate(result.values[name]):
    path = folder / f"{name}-{number}.png"
    label = ", ".join([title, *[str(p) for p in result.points.get("strip", ())][number:][:1]])
    steps = labels_of(result, "step", len(frames))
    shown = plots.spread(len(frames), 12)
    sigma = [result.points["sigma"][steps[i]] for i in shown]
    plots.film_strip(
      path,
      np.asarray(frames, np.uint8)[shown],
      sigma,
      steps=[steps[i] for i in shown],
      columns=MOST_COLUMNS,
      cell=48,
    )
    made.append({"path": path, "title": label, "wide": True})
  return made


def maps_of_tokens(folder: Path, result: Result, name: str, title: str) -> list[dict[str, Any]]:
  """A grid of token maps: rows and columns are the two axes before y and x."""
  row, column = result.axes[name][:2]
  pictures = np.asarray(result.values[name])
  rows, columns = (
    labels_of(result, a, n) for a, n in zip((row, column), pictures.shape, strict=False)
  )
  path = folder / f"{name}.png"
  shown = plots.spread(len(rows), 12)
  plots.picture_grid(
    path,
    pictures[shown],
    rows=[rows[i] for i in shown],
    columns=columns,
    row_name=row,
    column_name=column,
  )
  return [{"path": path, "title": title, "wide": True}]


def tasks_of(result: Result) -> list[str]:
  """The tasks of the cases, each once."""
  return list(dict.fromkeys(str(case).split()[0] for case in result.points.get("case", ())))


def numbers(result: Result) -> list[dict[str, Any]]:
  """Rows of the table: every value without a numeric axis, over all cases and per task."""
  rows = []
  tasks = tasks_of(result)
  of_case = np.array([str(case).split()[0] for case in result.points.get("case", ())])
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
          "tasks": [in_words(column[of_case == task]) for task in tasks],
        }
      )
  return rows


def in_words(column: np.ndarray) -> str:
  """Such as "0.61 [0.50, 0.72]"; too few cases for an interval give the mean and their number."""
  good = column[np.isfinite(column)]
  if not good.size:
    return ""
  found = stats.bootstrap(good, seed=results.SEED, draws=2000)
  if np.isfinite(found.low):
    return str(found)
  return f"{float(found.estimate):.2f}" + (f" (n={good.size})" if good.size < stats.LEAST else "")


def render_claims(out: str | Path) -> Path:
  """Draws the page of claims.json, with the first figures of every study; returns its path."""
  out = Path(out)
  table = read_json(out / "claims.json")
  studies = []
  for path in sorted(out.glob("*/result.json")):
    record = read_json(path)
    figures = [
      figure
      for name in record["axes"]
      for figure in sorted((path.parent / "figures").glob(f"{name}*.png"))[:1]
    ][:SHOWN_FIGURES]
    studies.append(
      {
        "name": record["experiment"],
        "question": record["question"],
        "page": f"{path.parent.name}/report.html",
        "figures": [inline(figure, "image/png") for figure in figures],
      }
    )
  page = (
    environment()
    .get_template("claims.html.j2")
    .render(
      claims=[said(claim) for claim in table["claims"]], model=table["model"], studies=studies
    )
  )
  path = out / "report.html"
  with atomic(path) as part:
    part.write_text(page, encoding="utf-8")
  return path
