"""How sure: bootstrap intervals over cases, paired differences, permutation tests with one error
rate for a whole map.

The first axis N of every array is the case (a problem). Seeds, frames or other repeats of a case
are averaged before: they are not independent. Every other axis is carried along, a map [S L] as a
single number. All random numbers come from the explicit `seed`, and one resampling serves all
cells, so what cells have in common stays.

Intervals are of 95%, tests err in 5%.

Sources: Clopper and Pearson 1934 (the exact interval of a share); Hesterberg 2015, The American
Statistician 69(4) (the percentile interval widened for few cases); Westfall and Young 1993 (the
maximum statistic); Phipson and Smyth 2010 (no p-value of 0); Holm 1979 (several tests);
Satterthwaite 1946 (degrees of freedom of a sum of variances).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import ArrayLike
from scipy.special import betaincinv, stdtrit

SEED = 0  # of every resampling
LEVEL = 0.95  # of intervals
ERROR = 0.05  # of tests
LEAST = 8  # cases an interval needs: with fewer, resampling knows too little of the spread
LEAST_MOVING = 6  # of them off the commonest value: what so few show may be missing by chance
DRAWS = 10_000
CELLS = 2**24  # numbers held at once while resampling
NORMAL = NormalDist()

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Interval:
  """An estimate with its interval; all three of the shape of one case.

  low and high are NaN where no interval can be given, and `note` says why. cases: N.
  """

  estimate: np.ndarray
  low: np.ndarray
  high: np.ndarray
  cases: int
  note: str | None = None

  def __str__(self) -> str:
    """Such as "0.61 [0.50, 0.72]", or with the note where there is no interval; scalars only."""
    if np.ndim(self.estimate):
      return f"intervals of {np.shape(self.estimate)}, {self.cases} cases"
    if not np.isfinite(self.low):
      return f"{float(self.estimate):.2f} ({self.note})"
    return spell({name: float(getattr(self, name)) for name in ("estimate", "low", "high")})


def spell(found: Mapping[str, Any] | None, digits: int = 2) -> str:
  """Such as "0.61 [0.50, 0.72]", of estimate, low and high, None where there is none."""
  if found is None or found["estimate"] is None:
    return "-"
  if found["low"] is None or found["high"] is None:
    return f"{found['estimate']:.{digits}f}"
  return f"{found['estimate']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def chance(p: float | None) -> str:
  """A p-value; never "0.000"."""
  if p is None:
    return "-"
  return f"{p:.3f}" if p >= 0.001 else "<0.001"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Test:
  """Two-sided p-values of "the mean is 0", of the shape of one case.

  p is NaN where so few cases can't reject at all (`note` says so). significant: p <= ERROR.
  """

  __test__ = False  # not a test class of pytest

  estimate: np.ndarray
  p: np.ndarray
  significant: np.ndarray
  cases: int
  note: str | None = None


def bootstrap_within(groups: Sequence[ArrayLike], *, seed: int, draws: int = DRAWS) -> Interval:
  """The mean over all values; its percentile interval draws each group anew by itself.

  groups: the values of each. n values spread less about their own mean than about that of all, and
  few say little of their spread: the percentiles lie further out, by t instead of z, its degrees of
  freedom after Welch and Satterthwaite. A note stands instead of an interval for a group of one
  value, for fewer than LEAST - 1 values more than groups, and where no group has two that differ.
  `cases` of the interval is the number of values.

  Raises ValueError for values that are not finite, or too few draws.
  """
  each = [_cases(group) for group in groups]
  _check(draws)
  total = sum(len(group) for group in each)
  estimate = np.asarray(sum(group.sum() for group in each) / total)
  found = functools.partial(Interval, estimate=estimate, cases=total)
  note = None
  if all(np.ptp(group) == 0 for group in each):
    note = "no group has two values that differ: resampling shows no spread"
  elif min(len(group) for group in each) == 1:
    note = "a group has one value, whose spread is not known"
  elif total - len(each) < LEAST - 1:
    note = f"{total} values in {len(each)} groups: an interval needs {LEAST - 1 + len(each)}"
  if note is not None:
    return found(low=np.asarray(np.nan), high=np.asarray(np.nan), note=note)
  rng = np.random.default_rng(seed)
  drawn = sum(g[rng.integers(len(g), size=(draws, len(g)))].sum(1) for g in each) / total
  resampled = np.array([np.square(group - group.mean()).sum() for group in each])
  freedom = np.array([len(group) - 1 for group in each])
  wanted = resampled * (freedom + 1) / freedom  # of the sums of groups, as resampled
  t = stdtrit(wanted.sum() ** 2 / (wanted**2 / freedom).sum(), (1 + LEVEL) / 2)
  tail = NORMAL.cdf(float(-t * np.sqrt(wanted.sum() / resampled.sum())))
  low, high = np.quantile(drawn, [tail, 1 - tail])
  return found(low=low, high=high, note=None)


def bootstrap(
  values: ArrayLike,
  *,
  seed: int,
  draws: int = DRAWS,
  statistic: Statistic | None = None,
) -> Interval:
  """The mean over cases with its percentile interval: cases are drawn with replacement.

  values: N ..., a row per case, finite. statistic: another summary than the mean,
  (draws N ...) -> (draws ...), over axis 1.

  Fewer than LEAST cases, or cases that are all equal, give a note instead of an interval.

  Raises ValueError for values that are not finite, or too few draws.
  """
  x = _cases(values)
  _check(draws)
  of = statistic or _mean
  count, shape = len(x), x.shape[1:]
  estimate = np.asarray(of(x[None])[0])
  blank = np.full(estimate.shape, np.nan)
  if count < LEAST:
    note = f"{_number(count)}: an interval needs at least {LEAST}"
    return Interval(estimate=estimate, low=blank, high=blank, cases=count, note=note)
  rng = np.random.default_rng(seed)
  if statistic is None:
    flat = x.reshape(count, -1)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
    low, high = blank.reshape(-1).copy(), blank.reshape(-1).copy()
    for cells in _chunks(flat.shape[1], draws):
      low[cells], high[cells] = _bounds(weights @ flat[:, cells], count)
    low, high = low.reshape(shape), high.reshape(shape)
  else:
    rows = rng.integers(count, size=(draws, count))
    at_once = max(1, CELLS // max(1, x.size))
    drawn = np.concatenate([of(x[rows[i : i + at_once]]) for i in range(0, draws, at_once)])
    low, high = _bounds(drawn.reshape(draws, -1), count)
    low, high = low.reshape(estimate.shape), high.reshape(estimate.shape)
  still = (x == x[:1]).all(0) if statistic is None else np.full(estimate.shape, (x == x[:1]).all())
  note = None
  if still.any():
    low, high = np.where(still, np.nan, low), np.where(still, np.nan, high)
    where = "" if still.ndim == 0 else f" in {int(still.sum())} of {still.size} cells"
    note = f"all {count} cases are equal{where}: resampling shows no spread"
  elif not np.isfinite(low).all():
    note = "some draws of the cases have no number"
  return Interval(estimate=estimate, low=low, high=high, cases=count, note=note)


def bootstrap_groups(
  groups: Sequence[Sequence[float]], *, seed: int, draws: int = DRAWS
) -> Interval:
  """The mean over the values of all groups; its percentile interval draws whole groups anew.

  As `bootstrap` otherwise, with groups as cases: those of one mean are equal, however many values
  each has.
  """
  sums = np.array([(sum(values), len(values)) for values in groups], np.float64)
  means = sums[:, 0] / sums[:, 1]
  if np.allclose(means, means[0], rtol=1e-12, atol=1e-12):  # sums of other lengths round otherwise
    return bootstrap(np.full(len(means), means[0]), seed=seed, draws=draws)

  def ratio(drawn: np.ndarray) -> np.ndarray:
    total = drawn.sum(1)
    return total[..., 0] / total[..., 1]

  return bootstrap(sums, seed=seed, draws=draws, statistic=ratio)


def share(hits: ArrayLike, *, seed: int, draws: int = DRAWS) -> Interval:
  """The share of cases that succeed, with its exact binomial interval.

  hits: N ..., 0 or 1 (bool), or the share of a case's seeds in 0..1. A cell with such shares gets
  the wider of the exact interval, of its mean among N cases, and `bootstrap`.
  """
  x = _cases(hits)
  if x.min() < 0 or x.max() > 1:
    raise ValueError(f"hits run from {x.min():g} to {x.max():g}, wanted shares in 0..1.")
  found = bootstrap(x, seed=seed, draws=draws)
  if found.cases < LEAST:
    return found
  low, high = binomial(found.estimate, found.cases)
  whole = ((x == 0) | (x == 1)).all(0)
  low = np.where(whole, low, np.fmin(low, found.low))
  high = np.where(whole, high, np.fmax(high, found.high))
  return dataclasses.replace(found, low=low, high=high, note=None)


def binomial(estimate: ArrayLike, cases: int) -> tuple[np.ndarray, np.ndarray]:
  """The exact interval (Clopper and Pearson) of shares among so many cases: (low, high).

  Both grow with the share. A share of a broken number of cases gets the interval between those of
  its neighbours: a mean of shares spreads no more than one of zeros and ones.
  """
  hits = np.asarray(estimate, np.float64) * cases
  near = np.round(hits)
  hits = np.clip(np.where(np.abs(hits - near) < 1e-9 * cases, near, hits), 0, cases)
  tail = (1 - LEVEL) / 2
  some, lacking = hits > 0, hits < cases
  low = betaincinv(np.where(some, hits, 1), cases - np.where(some, hits, 1) + 1, tail)
  high = betaincinv(np.where(lacking, hits, 0) + 1, cases - np.where(lacking, hits, 0), 1 - tail)
  return np.where(some, low, 0.0), np.where(lacking, high, 1.0)


def moving(values: ArrayLike) -> tuple[int, np.ndarray]:
  """(how many cases differ from the commonest case, that case); values: N ..."""
  x = _cases(values)
  rows, counts = np.unique(x.reshape(len(x), -1), axis=0, return_counts=True)
  most = int(counts.argmax())
  return len(x) - int(counts[most]), rows[most].reshape(x.shape[1:])


def paired(a: ArrayLike, b: ArrayLike, *, seed: int, draws: int = DRAWS) -> Interval:
  """The mean of a - b with its interval; row i of both is the same case.

  a, b: N ..., of one shape. As `bootstrap` otherwise.
  """
  return bootstrap(_differences(a, b), seed=seed, draws=draws)


def sign_flip(differences: ArrayLike, *, seed: int, draws: int = DRAWS) -> Test:
  """Paired permutation test: if nothing differs, each case's difference is as likely as its
  negative.

  differences: N ..., a - b of each case. Every cell is a test of its own; for a map that is looked
  at as a whole use `max_statistic`. Exact while 2^N <= draws.
  """
  return _permute(differences, seed, draws, whole_map=False)


def max_statistic(differences: ArrayLike, *, seed: int, draws: int = DRAWS) -> Test:
  """Which cells of a map differ from 0, with one error rate for the whole map.

  differences: N ..., such as N S L. A cell's statistic is |mean| / root mean square over cases (a
  monotone function of |t|); its p-value is the share of sign flips under which the largest
  statistic of the *whole map* is as large, so the chance of any false cell is at most ERROR.
  Flips are of whole cases: cells may depend on each other in any way.
  """
  return _permute(differences, seed, draws, whole_map=True)


def holm(p: ArrayLike) -> np.ndarray:
  """N: p-values of N tests corrected for their number, so that where nothing differs the chance of
  any below ERROR is at most ERROR, however the tests depend on each other.

  NaN, of a test that can't reject, stays and does not count.
  """
  x = np.asarray(p, np.float64)
  known = np.flatnonzero(np.isfinite(x))
  order = known[np.argsort(x[known], kind="stable")]
  found = np.full(x.shape, np.nan)
  steps = x[order] * np.arange(len(order), 0, -1)
  found[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
  return found


def _permute(differences: ArrayLike, seed: int, draws: int, *, whole_map: bool) -> Test:
  x = _cases(differences)
  _check(draws)
  count, shape = len(x), x.shape[1:]
  estimate = x.mean(0)
  exact = 2**count <= draws
  if 2.0 ** (1 - count) > ERROR:
    needs = int(np.ceil(1 - np.log2(ERROR)))
    return Test(
      estimate=estimate,
      p=np.full(shape, np.nan),
      significant=np.zeros(shape, bool),
      cases=count,
      note=f"{_number(count)}: a test at {ERROR:g} needs at least {needs}",
    )
  flat = x.reshape(count, -1)
  length = np.sqrt((flat**2).sum(0))
  unit = flat / np.where(length > 0, length, 1.0) / np.sqrt(count)
  seen = np.abs(unit.sum(0))
  if exact:
    codes = np.arange(2**count)
    signs = 1.0 - 2.0 * (
      rearrange(codes, "d -> d 1") >> rearrange(np.arange(count), "n -> 1 n") & 1
    )
  else:
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, count))
  slack = 1e-9  # equal sums in another order
  largest, above = np.zeros(len(signs)), np.zeros(flat.shape[1])
  for cells in _chunks(flat.shape[1], len(signs)):
    drawn = np.abs(signs @ unit[:, cells])
    largest = np.maximum(largest, drawn.max(1, initial=0.0))
    above[cells] = (drawn >= rearrange(seen[cells], "m -> 1 m") - slack).sum(0)
  if whole_map:
    rank = np.searchsorted(np.sort(largest), seen - slack, side="left")
    above = (len(largest) - rank).astype(float)
  p = above / len(signs) if exact else (above + 1) / (len(signs) + 1)
  p = p.reshape(shape)
  return Test(estimate=estimate, p=p, significant=p <= ERROR, cases=count)


def _mean(rows: np.ndarray) -> np.ndarray:
  return rows.mean(1)


def _bounds(drawn: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Low and high (M,) of the summaries drawn (D, M) from so many cases."""
  # Plain percentiles are too narrow for few cases: they have z for t, and n for n - 1.
  z = float(stdtrit(count - 1, (1 + LEVEL) / 2) * np.sqrt(count / (count - 1)))
  tail = NORMAL.cdf(-z)
  low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
  return low, high


def _cases(values: ArrayLike) -> np.ndarray:
  x = np.asarray(values, np.float64)
  if x.ndim == 0 or len(x) == 0:
    raise ValueError(f"values are {x.shape}, wanted N ... with a row for each of N >= 1 cases.")
  bad = int(x.size - np.count_nonzero(np.isfinite(x)))
  if bad:
    first = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
    raise ValueError(
      f"{bad} of {x.size} values are not finite, the first at {first}: leave those cases out and "
      "say how many."
    )
  return x


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
  first, second = _cases(a), _cases(b)
  if first.shape != second.shape:
    raise ValueError(
      f"a is {first.shape} and b {second.shape}, wanted one shape: row i of both is the same case."
    )
  return first - second


def _check(draws: int) -> None:
  if draws < 100:
    raise ValueError(f"draws={draws}, wanted 100 or more: {DRAWS} is usual.")


def _chunks(cells: int, rows: int) -> list[slice]:
  size = max(1, CELLS // rows)
  return [slice(low, low + size) for low in range(0, cells, size)]


def _number(count: int) -> str:
  return "1 case" if count == 1 else f"{count} cases"
