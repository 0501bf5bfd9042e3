"""Functions that go by shortcuts, with the derivatives of the formula that the shortcuts spare."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.custom_derivatives import SymbolicZero

Numbers: TypeAlias = Any  # a pytree of floats
Values: TypeAlias = Any  # another one
Rest: TypeAlias = Any  # a pytree of anything


def by_formula(formula: Callable[[Numbers, Values, Rest], Any]) -> Callable[..., Any]:
  """Decorates f(numbers, values, rest), which equals the formula but for bits.

  Derivatives of every order are those of the formula, and a program without derivatives does not
  hold it. What f leaves out where a number is neutral, as a factor of 1 or a term of 0, has a slope
  there all the same.
  """

  def decorate(f: Callable[[Numbers, Values, Rest], Any]) -> Callable[..., Any]:
    shortened = jax.custom_jvp(f)

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
      numbers, values, rest = primals
      slopes = _slopes(lambda at: formula(at[0], at[1], rest), (numbers, values), tangents[:2])
      return shortened(numbers, values, rest), slopes

    shortened.defjvp(rule, symbolic_zeros=True)
    return shortened

  return decorate


def _slopes(f: Callable[[Any], Any], at: Any, along: Any) -> Any:
  """The derivative of f along `along`; what has no tangent stays out of it."""
  leaves, tree = jax.tree.flatten(at)
  tangents = jax.tree.leaves(along, is_leaf=lambda t: isinstance(t, SymbolicZero))
  live = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

  def of_live(*moved: Any) -> Any:
    whole = list(leaves)
    for i, leaf in zip(live, moved, strict=True):
      whole[i] = leaf
    return f(jax.tree.unflatten(tree, whole))

  return jax.jvp(of_live, [leaves[i] for i in live], [tangents[i] for i in live])[1]
