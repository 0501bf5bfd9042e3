"""Settings of a run: frozen dataclasses made from a plain mapping, all faults in one message."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from jax_videoreason import schedules, tiling
from jax_videoreason.reductions import REDUCTIONS
from jax_videoreason.schedules import GRIDS, Schedule
from jax_videoreason.solvers import SOLVERS
from jax_videoreason.structs import Card, Parts
from jax_videoreason.taps import TAP_SITES, TapSpec

SEEDS, MOST_SEEDS = 2**32, 10**6  # a seed is below; as many are counted at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapSettings:
  """What to keep besides latents and x0: `sites` x `reduce`; None = all layers, all steps.

  budget_gb: what the taps of all runs may need, in 10^9 bytes.
  """

  sites: tuple[str, ...] = ()
  reduce: tuple[str, ...] = ("norm",)
  layers: tuple[int, ...] | None = None
  steps: tuple[int, ...] | None = None
  branches: tuple[int, ...] = (0,)
  budget_gb: float = 8.0

  def spec(self) -> TapSpec:
    return TapSpec(
      sites=self.sites,
      reduce=self.reduce,
      layers=self.layers,
      steps=self.steps,
      branches=self.branches,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
  """One set of runs: which model, which video, which schedule, what is kept.

  checkpoint: name or folder of a bundle.
  guidance: one scale, (high, low) for two experts, or one per step.
  boundary: sigma at which the second expert takes over (two experts alone); None = the bundle's
    own.
  seeds: the seed numbers; a whole number n in the mapping stands for 0..n-1.
  frames, height, width: pixels.
  tiles: whose overlapping tiles the VAE works in (`tiling.NAMES`), None = whole frames.
  batch: runs denoised together, None = all. piece: steps between two writes to disk.
  """

  checkpoint: str
  frames: int
  height: int
  width: int
  steps: int = 50
  shift: float = 5.0
  guidance: tuple[float, ...] = (5.0,)
  boundary: float | None = None
  solver: str = "euler"
  grid: str = "diffsynth"
  seeds: tuple[int, ...] = (0,)
  negative_prompt: str = ""
  tiles: str | None = None
  batch: int | None = None
  piece: int = 10
  taps: TapSettings = TapSettings()

  @property
  def guided(self) -> bool:
    """Whether the branch without the prompt has to be computed."""
    return any(scale != 1.0 for scale in self.guidance)


def from_config(config: Mapping[str, Any]) -> SampleSettings:
  """The settings that a plain mapping says (of a configuration, or of a manifest).

  Raises:
    ValueError: names every unknown key with the nearest known one, and every value that can't be.
  """
  faults: list[str] = []
  config = dict(config)
  nested = config.pop("taps", {})
  taps = _read(TapSettings, _TAPS, nested, "taps.", faults) or TapSettings()
  sample = _read(SampleSettings, _SAMPLE, config, "", faults)
  if faults or sample is None:
    _refuse(faults)
  return dataclasses.replace(sample, taps=taps)


def schedule(chosen: SampleSettings, card: Card, parts: Parts) -> Schedule:
  """The schedule of the settings, with the own boundary and numerics of the model.

  ValueError: as `boundary_of` says; a number that makes no schedule.
  """
  return schedules.build(
    steps=chosen.steps,
    shift=chosen.shift,
    guidance=chosen.guidance[0] if len(chosen.guidance) == 1 else chosen.guidance,
    boundary=boundary_of(chosen, card),
    solver=chosen.solver,
    grid=chosen.grid,
    numerics=card.numerics,
    freq_dim=parts.dit.config.freq_dim,
  )


def boundary_of(chosen: SampleSettings, card: Card) -> float | None:
  """The sigma at which the second expert takes over; None = the model has one expert.

  ValueError: a boundary is given for such a model.
  """
  if chosen.boundary is not None and card.boundary is None:
    raise ValueError(
      f"boundary={chosen.boundary} of {card.name}, which has one expert, wanted None: leave it "
      "out, or give --config.boundary=None where the config has one."
    )
  return card.boundary if chosen.boundary is None else chosen.boundary


def nearest(name: str, known: Iterable[str]) -> str:
  """'did you mean ...' where a known name is near, else the list of all."""
  known = sorted(known)
  close = difflib.get_close_matches(name.lower(), known, n=1)
  return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}."


def _refuse(faults: list[str]) -> NoReturn:
  count = f"{len(faults)} faults. " if len(faults) > 1 else ""
  raise ValueError(f"configuration: {count}{' '.join(faults)}")


def _read(
  cls: type, kinds: Mapping[str, Callable[[Any], Any]], given: Any, prefix: str, faults: list[str]
) -> Any:
  if not isinstance(given, Mapping):
    faults.append(f"{prefix.rstrip('.')}={given!r}, wanted a mapping of {', '.join(kinds)}.")
    return None
  before = len(faults)
  values = {}
  for key, value in given.items():
    if key not in kinds:
      faults.append(f"no key '{prefix}{key}'; {nearest(key, kinds)}")
      continue
    try:
      values[key] = kinds[key](value)
    except ValueError as error:
      faults.append(f"{prefix}{key}={value!r}, wanted {error}.")
  for field in dataclasses.fields(cls):
    needed = field.default is dataclasses.MISSING
    if needed and field.name not in given:
      faults.append(f"'{prefix}{field.name}' is missing.")
  return cls(**values) if len(faults) == before else None


def _whole(least: int) -> Callable[[Any], int]:
  def read(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
      raise ValueError("a whole number")
    if value < least:
      raise ValueError(f"at least {least}")
    return int(value)

  return read


def _number(value: Any) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise ValueError("a finite number")
  return float(value)


def _positive(value: Any) -> float:
  if _number(value) <= 0:
    raise ValueError("a number above 0")
  return float(value)


def _share(value: Any) -> float:
  if not 0 <= _number(value) <= 1:
    raise ValueError("a sigma in 0..1")
  return float(value)


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise ValueError("a text")
  return value


def _optional(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
  return lambda value: None if value is None else kind(value)


def _tuple_of(kind: Callable[[Any], Any], least: int = 0) -> Callable[[Any], tuple[Any, ...]]:
  def read(value: Any) -> tuple[Any, ...]:
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(items) < least:
      raise ValueError(f"at least {least} of them")
    return tuple(kind(item) for item in items)

  return read


def _one_of(known: Iterable[str]) -> Callable[[Any], str]:
  known = tuple(known)

  def read(value: Any) -> str:
    if value not in known:
      raise ValueError(f"one of {', '.join(known)}")
    return value

  return read


def _reduction(value: Any) -> str:
  site, slash, name = str(value).rpartition("/")
  if name not in REDUCTIONS or (slash and site not in TAP_SITES):
    raise ValueError(
      f"one of {', '.join(REDUCTIONS)}, or SITE/ and one of them for that site alone, SITE of "
      f"{', '.join(TAP_SITES)}"
    )
  return value


def _seeds(value: Any) -> tuple[int, ...]:
  if isinstance(value, list | tuple):
    seeds = _tuple_of(_whole(0), least=1)(value)
    if len(set(seeds)) < len(seeds):
      raise ValueError("different numbers: a seed twice is one run twice")
    if max(seeds) >= SEEDS:
      raise ValueError(f"numbers below {SEEDS}")
    return seeds
  count = _whole(1)(value)
  if count > MOST_SEEDS:
    raise ValueError(
      f"at most {MOST_SEEDS}, for it is a count; seeds themselves stand in brackets, as (7,)"
    )
  return tuple(range(count))


_TAPS: dict[str, Callable[[Any], Any]] = {
  "sites": _tuple_of(_one_of(TAP_SITES)),
  "reduce": _tuple_of(_reduction, least=1),
  "layers": _optional(_tuple_of(_whole(0), least=1)),
  "steps": _optional(_tuple_of(_whole(0), least=1)),
  "branches": _tuple_of(_whole(0), least=1),
  "budget_gb": _positive,
}
_SAMPLE: dict[str, Callable[[Any], Any]] = {
  "checkpoint": _text,
  "frames": _whole(1),
  "height": _whole(1),
  "width": _whole(1),
  "steps": _whole(1),
  "shift": _positive,
  "guidance": _tuple_of(_number, least=1),
  "boundary": _optional(_share),
  "solver": _one_of(SOLVERS),
  "grid": _one_of(GRIDS),
  "seeds": _seeds,
  "negative_prompt": _text,
  "tiles": _optional(_one_of(tiling.NAMES)),
  "batch": _optional(_whole(1)),
  "piece": _whole(1),
}
