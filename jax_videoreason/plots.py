"""Figures as files: film strips, curves, maps. The only importer of matplotlib.

Colours are those of Okabe and Ito, which stay apart for colour-blind eyes; lines carry their names.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange, repeat
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.transforms import ScaledTranslation

from jax_videoreason import media
from jax_videoreason.axes import spread

INK, MUTED, RULE = "#1f2328", "#6b7280", "#e3e6ea"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW = "#56B4E9", "#E69F00"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, INK)
LINES = ("-", "--", ":")  # the next one where the colours are used up
MARKERS = ("o", "s", "^", "D", "v")
FILLED = 3  # bands at most; more of them would be one patch, and are bars side by side
ASIDE = 1.5  # points between the bars of neighbours
HINTED = 1.05  # letters on whole pixels are wider than their outlines
PANELS = 4
NAME_GAP = 0.07  # between the names of lines, of the height of the axes


def film_strip(
  path: str | Path,
  frames: Iterable[np.ndarray],
  sigma: Sequence[float] | np.ndarray,
  *,
  steps: Sequence[int] | None = None,
  title: str = "",
  notes: Sequence[str] | None = None,
  cell: int = 64,
  columns: int = 9,
) -> None:
  """Draws x0 over a run: rows are denoising steps, columns frames of the video.

  frames: S frames height width 3 uint8, one step in memory. sigma: S. steps: the number of each
  row, None = 0..S-1. notes: a text at the end of each row, such as the answer read there.
  cell: pixels a cell has at least (small frames grow by a whole factor, large ones shrink to about
  twice that).
  columns: at most so many frames, evenly spread, the first and the last among them.
  """
  tiles, shown = [], []
  for clip in frames:
    shown = spread(len(clip), columns)
    tiles.append(scale(clip[shown], cell))
  tiles = np.stack(tiles)
  rows, _, height, width, _ = tiles.shape
  gap = 3
  tiles = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
  montage = rearrange(tiles, "s f h w c -> (s h) (f w) c")[:-gap, :-gap]
  tall, wide = montage.shape[:2]
  left, right = 108, 12 if notes is None else 24 + 7 * max(len(n) for n in notes)
  top, bottom = (64 if title else 40), 12
  columns_named = "frame of the predicted video (x0)"
  words = max(_width(columns_named, 8), _width(title, 10, "bold") - 96)
  right = max(right, int(np.ceil(words)) + 12 - wide)
  at = (left + wide + right, top + tall + bottom)
  figure = Figure(figsize=(at[0] / 100, at[1] / 100), facecolor="white")
  axes = figure.add_axes((left / at[0], bottom / at[1], wide / at[0], tall / at[1]))
  axes.imshow(montage, interpolation="nearest", aspect="auto", extent=(0, wide, tall, 0))
  axes.axis("off")
  middle = height / 2 + np.arange(rows) * (height + gap)
  for row, y in enumerate(middle):
    step = row if steps is None else steps[row]
    _write(axes, -54, y, f"{step}", ha="right", weight="bold", color=INK)
    _write(axes, -10, y, f"{sigma[row]:.2f}", ha="right")
    if notes is not None:
      _write(axes, wide + 12, y, notes[row], ha="left", color=INK)
  for column, frame in enumerate(shown):
    _write(axes, column * (width + gap) + width / 2, -10, f"{frame}", ha="center")
  _write(axes, -54, -10, "step", ha="right", weight="bold", color=INK)
  _write(axes, -10, -10, "sigma", ha="right")
  if title:
    _write(axes, -96, -44, title, ha="left", weight="bold", color=INK, fontsize=10)
  _write(axes, 0, -26, columns_named, ha="left")
  _save(figure, path, dpi=100)


def curves(
  path: str | Path,
  x: Sequence[float] | np.ndarray,
  series: Mapping[str, np.ndarray],
  *,
  x_name: str,
  y_name: str,
  title: str = "",
  falling: bool = False,
  top: float | None = None,
) -> None:
  """Draws each series over x, its name at its end.

  falling: x runs from high to low, as sigma does. top: the end of the y axis. A series of two axes
  (x, run) is drawn as its mean with the single runs behind it.
  """
  figure, axes = _panel(title, x_name, y_name)
  x = np.asarray(x, float)
  ends = []
  for number, (name, values) in enumerate(series.items()):
    colour, line, marker = _look(number)
    values = np.asarray(values, float)
    if values.ndim == 2:
      axes.plot(x, values, color=colour, linewidth=0.8, alpha=0.3)
      values = values.mean(1)
    axes.plot(x, values, color=colour, linestyle=line, linewidth=2, marker=marker, markersize=3)
    ends.append((float(x[-1]), float(values[-1]), name, colour, line))
  if falling:
    axes.invert_xaxis()
  low, high = axes.get_ylim()
  axes.set_ylim(min(0, low), high if top is None else top)
  _name_ends(axes, ends)
  _save(figure, path, dpi=120)


def bands(
  path: str | Path,
  series: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
  *,
  x_name: str,
  y_name: str,
  falling: bool = False,
) -> None:
  """Draws each series, (x, estimate, low, high), with its interval behind it: a band, or a bar at
  each point where there are more than `FILLED` series.

  falling: x runs from high to low, as sigma does. Points that are NaN leave a gap.
  """
  figure, axes = _panel("", x_name, y_name)
  ends = []
  for number, (name, (x, middle, low, high)) in enumerate(series.items()):
    colour, line, marker = _look(number)
    aside = ASIDE * (number - (len(series) - 1) / 2) if len(series) > FILLED else 0.0
    place = axes.transData + ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans)
    if len(series) > FILLED:
      axes.vlines(x, low, high, color=colour, alpha=0.45, linewidth=1, transform=place)
      axes.update_datalim([*zip(x, low, strict=True), *zip(x, high, strict=True)])
    else:
      axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    look: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker}
    axes.plot(x, middle, linewidth=2, markersize=3, transform=place, **look)
    known = np.flatnonzero(np.isfinite(middle))
    ends += [(float(x[i]), float(middle[i]), name, colour, line) for i in known[-1:]]
  if falling:
    axes.invert_xaxis()
  low, high = axes.get_ylim()
  axes.set_ylim(min(0.0, low), high)
  _name_ends(axes, ends)
  _save(figure, path, dpi=120)


def intervals(
  path: str | Path,
  rows: Mapping[str, tuple[float, float, float]],
  *,
  x_name: str,
) -> None:
  """Draws each row's (estimate, low, high) as a dot with its interval, names at the left."""
  figure, axes = _panel("", x_name, "")
  figure.set_size_inches(6.4, 1.0 + 0.24 * len(rows))
  places = np.arange(len(rows))
  for place, (middle, low, high) in zip(places, rows.values(), strict=True):
    axes.plot([low, high], [place, place], color=BLUE, linewidth=2, alpha=0.5)
    axes.plot([middle], [place], color=BLUE, marker="o", markersize=5)
  axes.axvline(0, color=MUTED, linewidth=0.8)
  axes.set_yticks(places, list(rows), parse_math=False)
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.grid(axis="y", visible=False)
  axes.grid(axis="x", color=RULE, linewidth=0.8)
  _save(figure, path, dpi=120)


def heat_maps(
  path: str | Path,
  panels: Mapping[str, np.ndarray],
  *,
  x_name: str,
  y_name: str,
  x: Sequence[Any],
  y: Sequence[Any],
  value_name: str,
  marked: Mapping[str, np.ndarray] | None = None,
) -> None:
  """Draws maps (rows y, columns x) side by side on one scale, `PANELS` to a row.

  value_name: what the colours are, beside their bar. marked: bool maps of the same shapes, cells
  that stand out and get a dot. Where values of both signs occur the scale is even about 0; NaN is
  left white.
  """
  values = [np.asarray(v, float) for v in panels.values()]
  finite = np.concatenate([v[np.isfinite(v)] for v in values] or [np.zeros(1)])
  low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
  signed = low < 0 < high
  if signed:
    low, high = -max(-low, high), max(-low, high)
  count = len(panels)
  wide, tall = min(4.2, 1.6 + 0.16 * len(x)), min(4.6, 1.3 + 0.16 * len(y))
  across = min(count, PANELS)
  down = -(-count // across)
  size = (wide * across + 0.9, (tall + 0.4) * down)
  figure = Figure(figsize=size, facecolor="white", layout="constrained")
  grid = figure.subplots(down, across, squeeze=False)
  each = list(grid.ravel())
  for empty in each[count:]:
    empty.set_axis_off()
  each = each[:count]
  picture = None
  for axes, (name, value) in zip(each, panels.items(), strict=True):
    colours = "RdBu_r" if signed else "viridis"
    picture = axes.imshow(value, aspect="auto", cmap=colours, vmin=low, vmax=high)
    if marked is not None and name in marked:
      rows, columns = np.nonzero(marked[name])
      axes.plot(columns, rows, linestyle="", marker="o", markersize=2.5, color=INK)
    axes.set_title(name, loc="left", fontsize=9, color=INK, parse_math=False)
    for ticks, labels, most in ((axes.set_xticks, x, 4), (axes.set_yticks, y, 7)):
      room = most if any("\n" in str(label) for label in labels) else 7
      shown = spread(len(labels), room)
      ticks(shown, [str(labels[i]) for i in shown])
    axes.tick_params(colors=MUTED, labelsize=7, length=2)
    axes.set_xlabel(x_name, color=INK, fontsize=8)
  for first in grid[:, 0]:
    first.set_ylabel(y_name, color=INK, fontsize=8)
  if picture is not None:
    bar = figure.colorbar(picture, ax=list(each), shrink=0.9)
    bar.ax.tick_params(labelsize=7, colors=MUTED)
    bar.ax.set_ylabel(value_name, color=INK, fontsize=8, parse_math=False)
  _save(figure, path, dpi=120)


def picture_grid(
  path: str | Path,
  pictures: np.ndarray,
  *,
  rows: Sequence[Any],
  columns: Sequence[Any],
  row_name: str,
  column_name: str,
  title: str = "",
  cell: int = 64,
  shared: bool = False,
) -> None:
  """Draws pictures in a grid: rows columns y x (each with its own grey scale, or all with one where
  `shared`) or rows columns y x 3 (colours, uint8)."""
  shown = np.asarray(pictures)
  if shown.shape[-1] != 3 or shown.dtype != np.uint8:
    over = None if shared else (-2, -1)
    low, high = (f(shown, axis=over, keepdims=True) for f in (np.min, np.max))
    grey = 255 * (shown - low) / np.where(high > low, high - low, 1.0)
    shown = repeat(grey.astype(np.uint8), "... y x -> ... y x c", c=3)
  tiles = scale(shown, cell)
  height, width, gap = *tiles.shape[2:4], 3
  tiles = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
  montage = rearrange(tiles, "r k y x c -> (r y) (k x) c")[:-gap, :-gap]
  tall, wide = montage.shape[:2]
  left, top, margin = 64, 60 if title else 40, 12
  words = max(_width(column_name, 8), _width(title, 10, "bold") + 8 - left)
  at = (left + max(wide, int(np.ceil(words))) + margin, top + tall + margin)
  figure = Figure(figsize=(at[0] / 100, at[1] / 100), facecolor="white")
  axes = figure.add_axes((left / at[0], margin / at[1], wide / at[0], tall / at[1]))
  axes.imshow(montage, interpolation="nearest", aspect="auto", extent=(0, wide, tall, 0))
  axes.axis("off")
  for row, name in enumerate(rows):
    _write(axes, -8, height / 2 + row * (height + gap), f"{name}", ha="right", color=INK)
  for column, name in enumerate(columns):
    _write(axes, column * (width + gap) + width / 2, -10, f"{name}", ha="center")
  _write(axes, -8, -10, row_name, ha="right", weight="bold", color=INK)
  _write(axes, 0, -26, column_name, ha="left")
  if title:
    _write(axes, 8 - left, -44, title, ha="left", weight="bold", color=INK, fontsize=10)
  _save(figure, path, dpi=100)


def bars(
  path: str | Path,
  names: Sequence[str],
  values: Sequence[float] | np.ndarray,
  *,
  x_name: str,
  title: str = "",
) -> None:
  """Draws a bar for each name, from the top down."""
  figure = Figure(figsize=(6.4, 1.1 + 0.22 * len(names)), facecolor="white", layout="constrained")
  axes = figure.add_subplot()
  places = np.arange(len(names))
  axes.barh(places, values, color=BLUE, height=0.7)
  axes.set_yticks(places, names, parse_math=False)
  axes.invert_yaxis()
  axes.set_title(title, loc="left", fontsize=10, weight="bold", color=INK, parse_math=False)
  axes.set_xlabel(x_name, color=INK, fontsize=9)
  axes.tick_params(colors=MUTED, labelsize=8, length=3)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  _save(figure, path, dpi=120)


def training_curves(
  path: str | Path,
  steps: Sequence[int] | np.ndarray,
  losses: Mapping[str, np.ndarray],
  scores: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
  """Losses of a training over its steps, logarithmic, with running means; below them, scores.

  losses: one number per step, NaN where there is none. scores: (step, score) of what was watched.
  """
  figure, panels = _panels(
    [("Training", "step", "loss"), ("Unseen cases", "step", "score")][: 2 if scores else 1]
  )
  steps = np.asarray(steps, float)
  ends = []
  for number, (name, values) in enumerate(losses.items()):
    colour = COLOURS[number % len(COLOURS)]
    there = np.isfinite(values)
    window = max(1, int(there.sum()) // 50)
    smooth = np.convolve(values[there], np.ones(window) / window, "valid")
    panels[0].plot(steps[there], values[there], color=colour, linewidth=0.6, alpha=0.3)
    panels[0].plot(steps[there][window - 1 :], smooth, color=colour, linewidth=2)
    ends.append((float(steps[there][-1]), float(smooth[-1]), name, colour, "-"))
  panels[0].set_yscale("log")
  _name_ends(panels[0], ends)
  if scores:
    ends = []
    for number, (name, points) in enumerate(scores.items()):
      colour = COLOURS[number % len(COLOURS)]
      at, values = zip(*points, strict=True)
      panels[1].plot(at, values, color=colour, linewidth=2, marker="o", markersize=3)
      ends.append((float(at[-1]), float(values[-1]), name, colour, "-"))
    panels[1].set_xlim(panels[0].get_xlim())
    panels[1].set_ylim(0, 1)
    _name_ends(panels[1], ends)
  _save(figure, path, dpi=120)


def scale(frames: np.ndarray, cell: int) -> np.ndarray:
  """Frames (... height width 3) whose shorter side has about `cell` pixels.

  Small ones grow by a whole factor with hard edges; large ones shrink.
  """
  short = min(frames.shape[-3:-1])
  if short >= cell:
    return media.shrink(frames, cell)
  k = -(-cell // short)
  return repeat(frames, "... h w c -> ... (h a) (w b) c", a=k, b=k)


def _save(figure: Figure, path: str | Path, dpi: int) -> None:
  """An RGB picture without alpha, which `media.read_image` takes again."""
  figure.set_dpi(dpi)
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  media.write_png(path, np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]))


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
  """Text at pixels of the montage; `$` is not mathematics."""
  axes.text(
    x,
    y,
    text,
    va="center",
    clip_on=False,
    parse_math=False,
    **{"fontsize": 8, "color": MUTED, **style},
  )


def _width(text: str, size: float, weight: str = "normal") -> float:
  """Pixels that a line of text takes in a montage, at most; `$` is not mathematics."""
  if not text:
    return 0.0
  drawn = TextPath((0, 0), text.replace("$", "S"), prop=FontProperties(size=size, weight=weight))
  return HINTED * float(drawn.get_extents().width) * 100 / 72


def _panel(title: str, x_name: str, y_name: str) -> tuple[Figure, Axes]:
  figure, (axes,) = _panels([(title, x_name, y_name)])
  return figure, axes


def _panels(titles: Sequence[tuple[str, str, str]]) -> tuple[Figure, list[Axes]]:
  """Panels one below the other, each with its title and the names of its axes."""
  figure = Figure(figsize=(6.4, 3.6 * len(titles)), facecolor="white", layout="constrained")
  panels = [figure.add_subplot(len(titles), 1, i + 1) for i in range(len(titles))]
  for axes, (title, x_name, y_name) in zip(panels, titles, strict=True):
    axes.set_title(title, loc="left", fontsize=10, weight="bold", color=INK)
    axes.set_xlabel(x_name, color=INK, fontsize=9)
    axes.set_ylabel(y_name, color=INK, fontsize=9)
    axes.tick_params(colors=MUTED, labelsize=8, length=3)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
      axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
      axes.spines[side].set_color(MUTED)
  return figure, panels


def _look(number: int) -> tuple[str, str, str]:
  """Colour, line and marker of a series."""
  line = LINES[number // len(COLOURS) % len(LINES)]
  return COLOURS[number % len(COLOURS)], line, MARKERS[number % len(MARKERS)]


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str, str]]) -> None:
  """Names beside the ends (x, y, name, colour, line) of lines.

  Moved apart where they would overlap; each then has a piece of its line before it.
  """
  low, high = axes.get_ylim()
  to_axes = axes.transScale.transform
  bottom, top = (to_axes((ends[0][0], y))[1] if ends else 0.0 for y in (low, high))
  ends = sorted(ends, key=lambda end: end[1:3])
  wanted = [(to_axes((x, y))[1] - bottom) / (top - bottom) for x, y, *_ in ends]
  places = apart(wanted, NAME_GAP)
  moved = not np.allclose(places, wanted, atol=NAME_GAP / 4)
  for (x, y, name, colour, line), place in zip(ends, places, strict=True):
    bare: dict[str, Any] = {"arrowstyle": "-", "color": colour, "shrinkA": 0, "shrinkB": 0}
    if moved:
      lead = {"xytext": (1.05, place), "textcoords": "axes fraction", "annotation_clip": False}
      axes.annotate("", xy=(x, y), arrowprops={**bare, "linewidth": 0.6}, **lead)
    key = {**bare, "linestyle": line, "linewidth": 2, "relpos": (0, 0.5), "shrinkA": 3}
    axes.annotate(
      name,
      xy=(1.05 if moved else 1.01, place),
      xytext=(1.12 if moved else 1.01, place),
      xycoords="axes fraction",
      arrowprops=key if moved else None,
      color=colour,
      fontsize=9,
      va="center",
      annotation_clip=False,
      parse_math=False,
    )


def apart(wanted: Sequence[float], gap: float) -> list[float]:
  """Rising places in 0..1 as near to the wanted ones, which rise, as a gap between them lets them.

  The gap shrinks where they would not have room.
  """
  gap = min(gap, 1 / max(len(wanted) - 1, 1))
  joined: list[tuple[float, int]] = []  # mean wanted place of neighbours that touch, and how many
  for number, place in enumerate(wanted):
    mean, count = place - number * gap, 1
    while joined and joined[-1][0] > mean:
      before, more = joined.pop()
      mean, count = (before * more + mean * count) / (more + count), more + count
    joined.append((mean, count))
  room = 1 - gap * (len(wanted) - 1)
  bases = [min(max(mean, 0.0), room) for mean, count in joined for _ in range(count)]
  return [base + number * gap for number, base in enumerate(bases)]
