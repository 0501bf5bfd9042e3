"""A run folder as one page, report.html: opens offline, pictures and short videos inside."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jax_videoreason import media, metrics, plots
from jax_videoreason.arrays import StoredArray
from jax_videoreason.axes import spread
from jax_videoreason.folders import atomic, disk
from jax_videoreason.store import Run, open_run
from jax_videoreason.structs import AnswerTrace

SHEET_BYTES = 6 << 20  # all sprite sheets of a page, as PNG
VIDEO_BYTES = 1 << 20  # a longer video is linked, not inlined
MOST_RUNS = 24  # runs shown in full
SHEET_COLUMNS = (33, 17, 9, 5)  # frames a sheet shows: the first that fits SHEET_BYTES
SPLITS = {
  "train": "training case",
  "id": "unseen case",
  "ood": "case beyond the training range",
  "heldout": "task never trained, case",
}
SHEET_CELL = 64  # pixels of the shorter side, at most about twice that


def render(folder: str | Path) -> Path:
  """Draws a run folder again from what is on disk; returns the path of report.html.

  Writes report.html, x0_<run>.png and figures/*.png, each whole or not at all.

  Raises:
    ValueError: the folder is no run, or is damaged. OSError: it can't be written.
  """
  run = open_run(folder)
  change = None if run.x0 is None else changes(run.x0)
  draw_strips(run)
  draw_figures(run, change)
  return write_page(run.path / "report.html", "report.html.j2", **contents(run, change))


def write_page(path: Path, template: str, /, **shown: Any) -> Path:
  """Writes a template filled with what is shown, every text escaped; returns the path."""
  templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  page = templates.get_template(template).render(**shown)
  with atomic(path) as part:
    part.write_text(page, encoding="utf-8")
  return path


def changes(x0: StoredArray) -> np.ndarray:
  """S-1 R: `metrics.change`, reading two steps at a time."""
  last = x0[-1]
  pairs = itertools.pairwise(range(len(x0)))
  rows = [metrics.change(np.stack([x0[a], x0[b], last]))[0] for a, b in pairs]
  return np.asarray(rows).reshape(len(rows), x0.shape[1])


def draw_strips(run: Run) -> None:
  """Writes x0_<run>.png, where x0 was decoded."""
  if run.frames is None:
    return
  frames, steps = run.frames, run.frames.steps
  for r, said in enumerate(run.runs):
    words = readings(run, r)
    plots.film_strip(
      run.path / f"x0_{r}.png",
      (frames[row, r] for row in range(len(frames))),
      run.sigma[steps],
      steps=steps,
      title=f"{title_of(run, r)}, seed {said['seed']}",
      notes=[words[step] for step in steps] if words else None,
    )


def draw_figures(run: Run, change: np.ndarray | None) -> None:
  """Writes figures/change.png and figures/answers.png."""
  figures = run.path / "figures"
  with disk(figures):
    figures.mkdir(exist_ok=True)
  sound = run.finite.all(0)
  if change is not None and len(change) and sound.any():
    plots.curves(
      figures / "change.png",
      run.sigma[1:],
      {"mean": change[:, sound]},
      x_name="sigma",
      y_name="change of x0, share of the last x0",
      title="How far the guess moves at each step",
      falling=True,
    )
  if run.answers is not None:
    plots.curves(
      figures / "answers.png",
      run.answers.sigma,
      {"right": run.answers.early},
      x_name="sigma",
      y_name="share of runs",
      title="Runs whose x0 already shows a right answer",
      falling=True,
      top=1.02,
    )


def contents(run: Run, change: np.ndarray | None) -> dict[str, Any]:
  """Everything the template shows, as plain values."""
  total = len(run.sigma)
  full = range(min(len(run.runs), MOST_RUNS))
  sheets, columns = sprite_sheets(run, full)
  shown = [] if run.frames is None else run.frames.steps
  tops = boxes(run, change)
  cards = [card(run, r, change, tops, r in full) for r in range(len(run.runs))]
  share = None
  if run.answers is not None:
    share = curve(run.answers.early[rows_at(run.answers.steps, total)], total, top=1.0)
  return {
    "name": run.name,
    "model": str(run.manifest.get("model") or ""),
    "cases": [list(group) for group in grouped(cards)],
    "total": total,
    "sigma": [float(s) for s in run.sigma],
    "ticks": spread(total, 6),
    "seeds": sorted({str(said["seed"]) for said in run.runs}),
    "sheets": sheets,
    "columns": columns,
    "rows": len(shown),
    "shape": (1, 1) if run.frames is None else run.frames.shape[3:5],
    "summary": None if run.answers is None else summary(run.answers),
    "share": share,
    "manifest": run.manifest,
    "settings": flat(run.manifest["config"]),
    "data": {
      "sigma": [round(float(s), 4) for s in run.sigma],
      "row": rows_at(shown, total).tolist() if shown else [],
      "shown": shown,
      "words": [c["words"] for c in cards],
    },
  }


def boxes(run: Run, change: np.ndarray | None) -> dict[str, float]:
  """Up to where the curves of all runs are drawn: of the change of x0, and of the entropy in bits,
  one at least, as of two answers alike."""
  moved = 0.0 if change is None else largest(change)
  return {
    "change": upward(moved),
    "bits": 1.0 if run.answers is None else max(1.0, largest(run.answers.entropy)),
  }


def largest(values: np.ndarray) -> float:
  """The largest finite value, at least 0."""
  return float(np.max(values, initial=0.0, where=np.isfinite(values)))


def upward(value: float) -> float:
  """The next number of one digit, such as 0.2 for 0.19; 1 for 0."""
  if value <= 0:
    return 1.0
  power = int(np.floor(np.log10(value)))
  unit = 10.0**power
  digit = np.ceil(round(value / unit, 9))  # 0.07 / 0.01 is a little above 7
  return round(float(digit * unit), -power)


def card(
  run: Run, r: int, change: np.ndarray | None, tops: Mapping[str, float], full: bool
) -> dict[str, Any]:
  """What the page says of run `r`; pictures only where it is shown in full. tops: `boxes`."""
  said, total = run.runs[r], len(run.sigma)
  broken = np.flatnonzero(~run.finite[:, r])
  video = run.video(r) if full else None
  first = run.first(r) if full else None
  moved = None if change is None else np.concatenate([[np.nan], change[:, r]])
  answers = run.answers if run.answers is not None and run.answers.task[r] else None
  facts = {
    "number": r,
    "title": title_of(run, r),
    "prompt": said["prompt"],
    "seed": said["seed"],
    "edit": said.get("edit"),
    "rights": (said.get("metadata") or {}).get("answers"),
    "full": full,
    "broken": int(broken[0]) if len(broken) else None,
    "first": None if first is None else inline(first.read_bytes()),
    "video": None if video is None else source(video),
    "change": None if moved is None else curve(moved, total, tops["change"]),
    "words": readings(run, r),
    "answer": None,
    "unsure": None,
  }
  if answers is None:
    return facts
  at = rows_at(answers.steps, total)
  kinds = [kind(answers, i, r) for i in at]
  settled, hit = int(answers.commitment[r]), int(answers.first_hit[r])
  return facts | {
    "answer": show(answers.answer[-1, r]),
    "kinds": kinds,
    "segments": segments([(show(answers.answer[i, r]), k) for i, k in zip(at, kinds, strict=True)]),
    "score": float(answers.score[-1, r]),
    "settled": None if settled < 0 else int(answers.steps[settled]),
    "hit": None if hit < 0 else int(answers.steps[hit]),
    "flips": int(answers.flips[r]),
    "lost": lost(kinds),
    "unsure": curve(answers.entropy[at, r], total, tops["bits"]),
  }


def source(video: Path) -> str:
  """What a page plays: the name of a file beside it, or a short one itself."""
  if video.stat().st_size > VIDEO_BYTES:
    return video.name
  return inline(video.read_bytes(), "video/mp4")


def title_of(run: Run, r: int) -> str:
  """The case of a run in words, such as "Sort bars, unseen case 3"."""
  said = run.runs[r]
  if said.get("task") is None:
    return str(said.get("case") or "Own prompt")
  return f"{title_of_task(said['task'])}, {SPLITS[said['split']]} {said['index']}"


def title_of_task(name: str) -> str:
  """Such as "Sort bars"; module:Class as it is."""
  return name if ":" in name else name.replace("_", " ").capitalize()


def readings(run: Run, r: int) -> list[str]:
  """Per step of the schedule what is read there, such as "RRDD, right"; empty without a task."""
  answers = run.answers
  if answers is None or answers.task[r] is None:
    return []
  said = []
  for i in rows_at(answers.steps, len(run.sigma)):
    answer = answers.answer[i, r]
    said.append("unreadable" if answer is None else f"{answer}, {kind(answers, i, r)}")
  return said


def kind(answers: AnswerTrace, row: int, r: int) -> str:
  if answers.answer[row, r] is None:
    return "none"
  return "right" if answers.right[row, r] else "wrong"


def lost(kinds: Sequence[str]) -> int | None:
  """The step from which on nothing can be read; None where the last step can be."""
  readable = [step for step, what in enumerate(kinds) if what != "none"]
  first = readable[-1] + 1 if readable else 0
  return first if first < len(kinds) else None


def show(answer: Any) -> str:
  return "unreadable" if answer is None else str(answer)


def rows_at(steps: Sequence[int] | np.ndarray, total: int) -> np.ndarray:
  """For each of `total` steps the row that shows it: the last of `steps` not after it."""
  rows = np.searchsorted(np.asarray(steps), np.arange(total), side="right") - 1
  return np.maximum(rows, 0)


def grouped(cards: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
  """Cards of one case together, in the order of their first runs."""
  groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for item in cards:
    groups.setdefault((item["title"], item["prompt"]), []).append(item)
  return list(groups.values())


def segments(readings: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
  """Equal neighbours joined: start, length, text, kind."""
  joined, start = [], 0
  for (text, what), group in itertools.groupby(readings):
    length = len(list(group))
    joined.append({"start": start, "length": length, "text": text, "kind": what})
    start += length
  return joined


def curve(values: np.ndarray, total: int, top: float) -> dict[str, Any] | None:
  """A line from 0 to `top` in a box of 100 x 100, a column per step, with gaps where a value is
  missing."""
  good = np.isfinite(values)
  if not good.any():
    return None
  peak = int(np.nanargmax(np.where(good, values, -np.inf)))
  lines = []
  for is_good, group in itertools.groupby(range(total), key=lambda s: bool(good[s])):
    if is_good:
      points = [((s + 0.5) / total * 100, 97 - 92 * values[s] / top) for s in group]
      lines.append(" ".join(f"{x:.2f},{y:.1f}" for x, y in points))
  ends = {"top": float(values[peak]), "last": float(values[good][-1])}
  return {"lines": lines, "peak": peak, "box": top, **ends}


def summary(answers: AnswerTrace) -> dict[str, Any] | None:
  """The outcome over all runs that belong to a task."""
  known = np.array([name is not None for name in answers.task])
  if not known.any():
    return None
  unread = known & np.array([answer is None for answer in answers.answer[-1]])
  readable = np.array([[a is not None for a in row] for row in answers.answer]).any(axis=0)
  settled = answers.commitment[known & (answers.commitment >= 0)]
  middle = None if not len(settled) else int(answers.steps[int(np.median(settled))])
  return {
    "runs": int(known.sum()),
    "right": int(answers.right[-1, known].sum()),
    "unread": int(unread.sum()),
    "lost": int((unread & readable).sum()),
    "settled": middle,
    "changed": int((answers.flips[known] > 0).sum()),
    "mended": int((answers.to_right[known] > 0).sum()),
  }


def sprite_sheets(run: Run, shown: Sequence[int]) -> tuple[dict[int, str], list[int]]:
  """PNG of each run as data URI, rows steps and columns frames; and which frames those are."""
  if run.frames is None:
    return {}, []
  sheets: dict[int, str] = {}
  columns: list[int] = []
  for most in SHEET_COLUMNS:
    columns = spread(run.frames.shape[2], most)
    sheets, size = {}, 0
    for r in shown:
      rows = (run.frames[row, r][columns] for row in range(len(run.frames)))
      tiles = np.stack([media.shrink(frames, SHEET_CELL) for frames in rows])
      picture = media.png(rearrange(tiles, "s f h w c -> (s h) (f w) c"))
      size += len(picture)
      if size > SHEET_BYTES and most != SHEET_COLUMNS[-1]:
        break
      sheets[r] = inline(picture)
    else:
      return sheets, columns
  return sheets, columns


def inline(data: bytes, kind: str = "image/png") -> str:
  """The bytes of a file as a data URI."""
  return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def flat(config: Any, prefix: str = "") -> list[tuple[str, str]]:
  """Nested settings as rows of (dotted name, value)."""
  if not isinstance(config, dict):
    return [(prefix, str(config))]
  rows = (flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in config.items())
  return list(itertools.chain.from_iterable(rows))
