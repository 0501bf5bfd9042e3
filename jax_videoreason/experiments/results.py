"""What an experiment claims and what it found: named arrays, intervals, verdicts, on disk."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_videoreason import arrays, stats
from jax_videoreason.folders import expect
from jax_videoreason.records import damaged, plain, read_json, vouched, write_json
from jax_videoreason.stats import SEED

FORMAT = 3  # raised where what a study keeps means something else than before
VERDICTS = ("holds", "does not hold", "can't tell", "not run here")
REPEATS = ("case", "seed")
CELL = 48  # pixels of the shorter side of a picture in a figure, at least
NAME = re.compile(r"\w[\w-]*")  # of a value, which names a folder and a figure
TAKEN = ("file", "allow_pickle")  # np.savez has them
FOUND = ("estimate", "low", "high", "verdict", "cases", "problems", "needed", "note")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """What is declared before data: a statistic, and the region of it in which the claim holds.

  says: the claim in a sentence. of: the value it is about, one number per case, such as "drop" or
  "drop[arm=step,mode=renoise]"; several are handed to `by` side by side. statistic: what is
  computed, in words, with its unit. above, below: the smallest effect of interest: the claim holds
  where the whole 95% interval lies above `above` and below `below`. by: another summary than the
  mean over problems, (draws N ...) -> (draws). share: the value (or what `by`
  makes of it) is a rate in 0..1. exact: the value
  is one number by construction, so problems that are all equal are an interval of no width.
  number: of the claim in the paper's list; None = a claim of others. paper: what the paper found.
  """

  says: str
  of: str | tuple[str, ...]
  statistic: str
  above: float | None = None
  below: float | None = None
  by: Callable[[np.ndarray], np.ndarray] | None = None
  share: bool = False
  exact: bool = False
  number: int | None = None
  paper: str = ""

  def __post_init__(self):
    if self.above is None and self.below is None:
      raise ValueError(f"claim {self.says!r} has no smallest effect of interest: give above=.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """A claim beside the data: estimate, 95% interval, verdict (of `VERDICTS`).

  cases: how many have a number. problems: how many these are of, on which the interval rests.
  needed: problems that would settle a "can't tell"; None where no number would.
  """

  claim: Claim
  estimate: float
  low: float
  high: float
  verdict: str
  cases: int
  problems: int
  needed: int | None = None
  note: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """Arrays with named axes.

  values: name -> array. axes: name -> its axes; what an experiment returns has "run", which
  becomes "case" and "seed", or "case" where its seeds are one; or () for a number.
  points: axis -> a label for each place: numbers or texts.
  titles: name -> what it is, with its unit, for the figures. notes: what a reader must know.
  signed: values as likely above 0 as below it where there is no effect (drops, gains,
  selectivity): their maps are tested for cells that differ from 0.
  problem_of: the problem of each case; cases of one problem (another picture or wording of it) are
  not independent. Empty where each case is one of its own.
  """

  values: Mapping[str, np.ndarray]
  axes: Mapping[str, tuple[str, ...]]
  points: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  titles: Mapping[str, str] = dataclasses.field(default_factory=dict)
  notes: Sequence[str] = ()
  signed: Sequence[str] = ()
  problem_of: Sequence[str] = ()

  def __post_init__(self):
    for name, value in self.values.items():
      axes = self.axes.get(name)
      if axes is None or len(axes) != np.ndim(value):
        raise ValueError(f"value {name!r} is {np.shape(value)} and has the axes {axes}.")
      for axis, size in zip(axes, np.shape(value), strict=True):
        if axis in self.points and len(self.points[axis]) != size:
          raise ValueError(
            f"value {name!r}: axis {axis!r} has {size} places and {len(self.points[axis])} labels."
          )
        if axis == "case" and len(self.problem_of) not in (0, size):
          raise ValueError(
            f"value {name!r} has {size} cases and problem_of {len(self.problem_of)}, wanted one "
            "for each case: give problem_of= of these cases."
          )

  def has(self, of: str) -> bool:
    """Whether there is a value "name" with all places of "name[axis=label,...]"."""
    name, places = _parts(of)
    return name in self.values and all(
      axis in self.axes[name] and label in map(str, self.points.get(axis, ()))
      for axis, label in places
    )

  def per_case(self, of: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N ..., the axes after N) of "name" or "name[axis=label,...]": seeds averaged, case first."""
    name, places = _parts(of)
    if name not in self.values:
      raise ValueError(f"no value {of!r}; there are: {', '.join(self.values)}.")
    value, axes = np.asarray(self.values[name], float), list(self.axes[name])
    for axis, label in places:
      labels = [str(point) for point in self.points.get(axis, ())]
      if axis not in axes or label not in labels:
        raise ValueError(f"{of}: axis {axis!r} has no place {label!r}; it has: {labels}.")
      value = np.take(value, labels.index(label), axis=axes.index(axis))
      axes.remove(axis)
    if "seed" in axes:
      value = known_mean(value, axes.index("seed"))
      axes.remove("seed")
    if "case" not in axes:
      raise ValueError(f"{of} has no axis 'case' to resample, only {axes}.")
    value = np.moveaxis(value, axes.index("case"), 0)
    axes.remove("case")
    return value, tuple(axes)

  def per_problem(self, of: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """As `per_case`, a row per problem: the mean over those of its cases that have a number."""
    value, axes = self.per_case(of)
    return mean_by(value, self.problems(len(value))), axes

  def problems(self, cases: int) -> np.ndarray:
    """N: the problem of each of so many cases."""
    return np.asarray(self.problem_of if len(self.problem_of) else range(cases))


def interval(result: Result, of: str) -> tuple[stats.Interval, tuple[str, ...]]:
  """The mean over problems of every cell of a value, with its interval; and its axes."""
  value, axes = result.per_case(of)
  good = np.asarray(np.isfinite(value).reshape(len(value), -1).all(1))
  if not good.any():
    raise ValueError(f"{of}: no case has finite numbers.")
  return stats.bootstrap(mean_by(value[good], result.problems(len(good))[good]), seed=SEED), axes


def judge(claim: Claim, result: Result) -> Finding:
  """Holds the claim against the data: by a bootstrap over problems, or as a share, exactly."""
  names = (claim.of,) if isinstance(claim.of, str) else claim.of
  none = float("nan")
  nothing = Finding(
    claim=claim, estimate=none, low=none, high=none, verdict="can't tell", cases=0, problems=0
  )
  absent = [name for name in names if not result.has(name)]
  if absent:
    note = f"this model or these options have no {', '.join(absent)}"
    return dataclasses.replace(nothing, verdict="not run here", note=note)
  columns = [result.per_case(name)[0] for name in names]
  values = columns[0] if len(columns) == 1 else np.stack(columns, axis=-1)
  good = np.asarray(np.isfinite(values).reshape(len(values), -1).all(1))
  lost = f"{int((~good).sum())} of {len(good)} cases have no number" if not good.all() else None
  if not good.any():
    return dataclasses.replace(nothing, note=lost)
  cases = int(good.sum())
  values = mean_by(values[good], result.problems(len(good))[good])
  count = len(values)
  if claim.share and claim.by is None:
    found = stats.share(values, seed=SEED)
  else:
    found = stats.bootstrap(values, seed=SEED, statistic=claim.by)
  if np.ndim(found.estimate):
    raise ValueError(f"claim {claim.says!r}: {claim.of} is a map, wanted one number per case.")
  estimate, low, high = (float(x) for x in (found.estimate, found.low, found.high))
  moved, commonest = stats.moving(values)
  own, few = found.note, False
  if count >= stats.LEAST:
    if claim.exact and moved == 0:
      low, high, own = estimate, estimate, None
    elif claim.share and claim.by is not None:
      bounds = stats.binomial(estimate, count)
      low, high, own = float(np.fmin(low, bounds[0])), float(np.fmax(high, bounds[1])), None
    elif not claim.share and not claim.exact:
      few = 0 < moved < stats.LEAST_MOVING
  floor = -np.inf if claim.above is None else claim.above
  ceiling = np.inf if claim.below is None else claim.below
  needed = None
  if few:
    verdict = "can't tell"
    own = f"only {moved} of {count} cases differ from {_in_short(commonest)}"
    needed = int(np.ceil(count * stats.LEAST_MOVING / moved))
  elif low > floor and high < ceiling:
    verdict = "holds"
  elif high < floor or low > ceiling:
    verdict = "does not hold"
  else:
    verdict = "can't tell"
  if verdict == "can't tell" and np.isfinite(low):
    end = min((floor, ceiling), key=lambda end: abs(estimate - end))
    half = high - estimate if end > estimate else estimate - low
    if end != estimate:
      wanted = count * (half / (end - estimate)) ** 2
      needed = max(int(np.ceil(wanted)), count, needed or 0) + (not few)
  several = None
  if count < cases:
    several = f"{cases} cases are of {count} problems"
    own = own and own.replace("case", "problem")  # which is what was resampled
  return Finding(
    claim=claim,
    estimate=estimate,
    low=low,
    high=high,
    verdict=verdict,
    cases=cases,
    problems=count,
    needed=needed,
    note="; ".join(text for text in (own, several, lost) if text) or None,
  )


def _in_short(case: np.ndarray) -> str:
  """The numbers of a case, such as "0" or "(0, 0.5)"; of a map only that it is one."""
  said = [f"{number:g}" for number in np.ravel(case)]
  if len(said) > 4:
    return "one and the same map"
  return said[0] if len(said) == 1 else f"({', '.join(said)})"


def _parts(of: str) -> tuple[str, list[tuple[str, str]]]:
  """The name and the places (axis, label) of "name[axis=label,...]"."""
  name, _, inside = of.removesuffix("]").partition("[")
  places = [part.partition("=") for part in inside.split(",") if part]
  return name, [(axis, label) for axis, _, label in places]


def known_mean(value: np.ndarray, axis: int) -> np.ndarray:
  """The mean of what is a number; NaN where nothing is."""
  known = np.isfinite(value)
  count = known.sum(axis)
  return np.where(count > 0, np.where(known, value, 0.0).sum(axis) / np.maximum(count, 1), np.nan)


def mean_by(value: np.ndarray, groups: Sequence[Any] | np.ndarray) -> np.ndarray:
  """(M ...): the mean of what is a number over the rows N ... of each group, in the order of their
  first rows."""
  of = np.asarray(groups)

  def mean(rows: np.ndarray) -> np.ndarray:
    least, most = np.fmin.reduce(rows), np.fmax.reduce(rows)
    # a mean of equal numbers may differ in its last bit, and would count as one that moved
    return np.where((least == most) & np.isfinite(least), least, known_mean(rows, 0))

  return np.stack([mean(value[of == group]) for group in dict.fromkeys(of.tolist())])


def join(batches: Sequence[Result], seeds: int, counts: Sequence[int]) -> Result:
  """The results of all batches as one: "run" becomes case and seed, cases are joined.

  counts: cases of each batch that are no filling. A value without runs is that of the first batch.
  """
  values, axes = {}, {}
  for name, names in batches[0].axes.items():
    if "case" in names:
      at = names.index("case")
      parts = [
        np.take(np.asarray(batch.values[name]), np.arange(count), axis=at)
        for batch, count in zip(batches, counts, strict=True)
      ]
      values[name], axes[name] = np.concatenate(parts, axis=at), names
      continue
    if "run" not in names:
      values[name], axes[name] = batches[0].values[name], names
      continue
    at = names.index("run")
    parts = []
    for batch, count in zip(batches, counts, strict=True):
      value = np.asarray(batch.values[name])
      shape = (*value.shape[:at], -1, seeds, *value.shape[at + 1 :])
      parts.append(np.take(value.reshape(shape), np.arange(count), axis=at))
    values[name] = np.concatenate(parts, axis=at)
    axes[name] = (*names[:at], *REPEATS, *names[at + 1 :])
  notes = list(dict.fromkeys(note for batch in batches for note in batch.notes))
  return dataclasses.replace(batches[0], values=values, axes=axes, notes=notes)


def check_values(of: str, result: Result, *, texts: bool = False) -> None:
  """ValueError for a value that `save` can't keep, or whose axes can't be told apart.

  of: the study, for the sentence. texts: whether values may also be texts, which is so before
  `finish` makes numbers of them.
  """
  for name, value in result.values.items():
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in TAKEN:
      raise ValueError(
        f"{of}: a value can't be named {name!r}: choose another name of letters, digits, _ and -."
      )
    kind = np.asarray(value).dtype
    if kind.hasobject if texts else not is_storable(kind):
      wanted = "bool, numbers or texts" if texts else "bool or real numbers"
      raise ValueError(
        f"{of}: value {name!r} has dtype {kind}, wanted {wanted}; texts can be labels in points=."
      )
    axes = tuple(result.axes[name])
    become = [part for axis in axes for part in (REPEATS if axis == "run" else (axis,))]
    if len(set(become)) < len(become):
      raise ValueError(
        f"{of}: value {name!r} has the axes {axes}, wanted each once; 'run' becomes 'case' and "
        "'seed'."
      )


def is_storable(dtype: np.dtype) -> bool:
  """Whether an array on disk can have this dtype."""
  return dtype.name == "bfloat16" or (dtype.kind in "biuf" and dtype.itemsize <= 8)


def save(folder: str | Path, result: Result, record: Mapping[str, Any]) -> None:
  """Writes `arrays.zarr` and, last, `result.json` with the labels of the axes and `record`."""
  folder = Path(folder)
  for name, value in result.values.items():
    arrays.put(folder / "arrays.zarr", name, result.axes[name], value)
  write_json(
    folder / "result.json",
    plain(
      {
        **record,
        "points": result.points,
        "titles": result.titles,
        "notes": list(result.notes),
        "signed": list(result.signed),
        "problem_of": list(result.problem_of),
        "axes": {name: list(axes) for name, axes in result.axes.items()},
      }
    ),
  )


def open_study(folder: str | Path) -> tuple[Result, dict[str, Any]]:
  """(arrays with named axes, all of `result.json`) of the --out of `videoreason run NAME`.

  Raises:
    ValueError: the folder is no finished study, or a file of it is missing or damaged.
  """
  expect(folder, "study")
  if not (Path(folder) / "result.json").is_file():
    raise ValueError(
      f"{folder} has no result.json, so it is no finished study: give the --out of "
      "`videoreason run NAME`."
    )
  return load(folder)


def load(folder: str | Path) -> tuple[Result, dict[str, Any]]:
  """(the arrays, all of `result.json`) of a folder that an experiment left.

  ValueError: it is none, or a file of it is missing or damaged.
  """
  folder = Path(folder)
  path, root = vouched(folder, "result.json"), folder / "arrays.zarr"
  record = read_json(path)
  if not isinstance(record, dict):
    raise damaged(path)
  lacking = [key for key in ("axes", "points", "titles", "notes") if key not in record]
  if lacking:
    raise ValueError(
      f"{path} has no {lacking[0]!r}, so it is damaged or not of a study: give the --out of "
      "`videoreason run NAME`, or run it again."
    )
  stored = arrays.open_group(root)
  for name, axes in record["axes"].items():
    if name not in stored or stored[name].axes != tuple(axes):
      raise damaged(root / name)
  result = Result(
    values={name: np.asarray(stored[name][...]) for name in record["axes"]},
    axes={name: tuple(stored[name].axes) for name in record["axes"]},
    points=record["points"],
    titles=record["titles"],
    notes=record["notes"],
    signed=record.get("signed", ()),
    problem_of=record.get("problem_of", ()),  # older results have none
  )
  return result, record


def describe(finding: Finding) -> dict[str, Any]:
  """A finding as JSON can say it."""
  claim = finding.claim
  return plain(
    {
      "number": claim.number,
      "says": claim.says,
      "of": [claim.of] if isinstance(claim.of, str) else list(claim.of),
      "statistic": claim.statistic,
      "paper": claim.paper,
      "above": claim.above,
      "below": claim.below,
      **{f: getattr(finding, f) for f in FOUND},
    }
  )
