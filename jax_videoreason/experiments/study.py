"""Declaring a study: one decorated function, what it claims before data, and what it costs."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jax_videoreason import own
from jax_videoreason.experiments.results import Claim, Result
from jax_videoreason.records import plain
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import TapSpec
from jax_videoreason.tasks import Case, Task

LIMITS = "Limits: "
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

ROLES: dict[str, Callable[[Task, Case], Case]] = {
  "case": lambda task, case: case,
  "counterpart": lambda task, case: counterpart(task, case),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """An experiment; made by `experiment`. Its text is the docstring of its function.

  question: the first paragraph. method, limits: the others; limits begins with "Limits:".
  options: the keyword arguments and what they are when nothing is said.
  """

  name: str
  run: Callable[..., Result]
  question: str
  method: str
  limits: str
  claims: tuple[Claim, ...]
  tasks: tuple[str, ...]
  roles: tuple[str, ...]
  zero: tuple[str, ...]
  cost: Callable[..., float]
  taps: Callable[..., TapSpec]
  finish: Callable[..., Result] | None
  least: Mapping[str, int]
  options: Mapping[str, Any]

  @property
  def module(self) -> str:
    """Where its function was written; empty where nobody knows, as of a text that is executed."""
    return self.run.__module__ or ""

  @property
  def shipped(self) -> bool:
    return ships(self.module)

  def source(self) -> dict[str, str] | None:
    """`own.source` of a study that does not ship; None = it ships."""
    return None if self.shipped else own.source(self.run)

  def trajectories(
    self, sizes: Sizes, options: Mapping[str, Any], *, switch: bool = False
  ) -> float:
    """Whole trajectories per batch, by the declared cost and the options that it asks for.

    switch: whether the model has two experts.
    """
    return self.cost(sizes, **_asked(self.cost, {**options, "switch": switch}))

  def evaluations(
    self, sizes: Sizes, options: Mapping[str, Any], batches: int, *, switch: bool = False
  ) -> int:
    """Network evaluations of so many batches, by the declared cost; without the control."""
    each = self.trajectories(sizes, options, switch=switch)
    return round(sizes.S * sizes.R * sizes.G * batches * each)

  def check(self, options: Mapping[str, Any]) -> None:
    """ValueError for an option that is unknown, no JSON, empty, or has a number below its least."""
    unknown = sorted(options.keys() - self.options.keys())
    if unknown:
      known = ", ".join(self.options) or "none"
      raise ValueError(f"{self.name} has no option {unknown[0]!r}; its options: {known}.")
    for name, value in {**self.options, **options}.items():
      try:
        plain(value)
      except ValueError as error:
        raise ValueError(
          f"{self.name}: option {name}={value!r} can't be kept as JSON, wanted numbers, texts, "
          "lists or dicts."
        ) from error
    for name, least in self.least.items():
      value = options.get(name, self.options[name])
      each = value if isinstance(value, tuple | list) else [value]
      if not each or any(number < least for number in each):
        raise ValueError(f"{self.name}: {name}={value!r}, wanted {least} or more, not empty.")

  def tapped(self, sizes: Sizes, options: Mapping[str, Any]) -> TapSpec:
    """The largest taps of a batch."""
    return self.taps(sizes, **_asked(self.taps, options))


def ships(module: str) -> bool:
  """Whether a module is one of those beside this one."""
  return module.rpartition(".")[0] == __package__


def _asked(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
  """The options that a function takes."""
  wanted = inspect.signature(function).parameters.values()
  if any(p.kind is p.VAR_KEYWORD for p in wanted):
    return dict(options)
  return {p.name: options[p.name] for p in wanted if p.name in options}


def experiment(
  *,
  tasks: str | Sequence[str],
  claims: Sequence[Claim] = (),
  runs: Sequence[str] = ("case",),
  zero: Sequence[str] = (),
  cost: Callable[..., float] = lambda sizes: 1,
  taps: Callable[..., TapSpec] = lambda sizes: TapSpec(),
  finish: Callable[..., Result] | None = None,
  least: Mapping[str, int] | None = None,
) -> Callable[[Callable[..., Result]], Study]:
  """Makes a Study of a function (ctx, *, options...) -> Result, called once per batch of cases.

  tasks: whose cases it looks at. claims: what is declared before data. runs: what rides together
  for each case and seed, "case" or ("counterpart", "case"). zero: values that the identity control
  must leave at exactly 0. cost: (sizes, options...) -> whole trajectories per batch; an
  option `switch` is whether the model has two experts.
  taps: (sizes, options...) -> the largest taps of a batch, for plans.
  finish: (result of all cases, options...) -> Result, for what needs all of them, such as probes.
  least: option -> the smallest number that it, or any entry of it, may be.

  ValueError: a role that is none; an argument that is no option, or an option without default.
  """
  _check_roles(runs)

  def make(function: Callable[..., Result]) -> Study:
    paragraphs = [" ".join(p.split()) for p in (inspect.getdoc(function) or "").split("\n\n")]
    limits = [p.removeprefix(LIMITS) for p in paragraphs if p.startswith(LIMITS)]
    limits = [text[:1].upper() + text[1:] for text in limits]
    rest = [p for p in paragraphs if not p.startswith(LIMITS)]
    signature = inspect.signature(function).parameters.values()
    _check_signature(function.__name__, signature)
    return Study(
      name=function.__name__,
      run=function,
      question=rest[0] if rest else "",
      method="\n".join(rest[1:]),
      limits="\n".join(limits),
      claims=tuple(claims),
      tasks=(tasks,) if isinstance(tasks, str) else tuple(tasks),
      roles=tuple(runs),
      zero=tuple(zero),
      cost=cost,
      taps=taps,
      finish=finish,
      least=least or {},
      options={p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY},
    )

  return make


def _check_roles(runs: Sequence[str]) -> None:
  """ValueError for runs= that is empty, a text, or names a role that is not there or twice."""
  if isinstance(runs, str) or not runs or set(runs) - ROLES.keys() or len(set(runs)) < len(runs):
    raise ValueError(f"runs={runs!r}, wanted some of {tuple(ROLES)}, each once.")


def _check_signature(name: str, signature: Collection[inspect.Parameter]) -> None:
  """ValueError where a function can't be called with ctx and its options alone."""
  if not any(p.kind in (*POSITIONAL, inspect.Parameter.VAR_POSITIONAL) for p in signature):
    raise ValueError(f"{name} takes no ctx, wanted it as the first argument, as in (ctx, *, k=1).")
  _, *more = [p.name for p in signature if p.kind in POSITIONAL] or [None]
  if more:
    raise ValueError(
      f"{name}: argument {more[0]!r} is no option, wanted keyword-only ones, after *, as in "
      f"(ctx, *, {more[0]}=1)."
    )
  for p in signature:
    if p.kind is p.KEYWORD_ONLY and p.default is p.empty:
      raise ValueError(f"{name}: option {p.name!r} has no default: give one, as in {p.name}=1.")


def counterpart(task: Task, case: Case) -> Case:
  """The same picture with its objects exchanged."""
  make = getattr(task, "counterpart", None)
  if make is None:
    raise ValueError(f"cases of {task.name} have no counterpart: use task 'pick'.")
  return make(case)
