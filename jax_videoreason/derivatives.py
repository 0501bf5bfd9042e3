"""Functions that go by shortcuts, with the derivatives of the formula that the shortcuts spare."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Numbers: TypeAlias = Any  # a pytree of floats
Values: TypeAlias = Any  # another one
Rest: TypeAlias = Any  # a pytree of anything


def by_formula(formula: Callable[[Numbers, Values, Rest], Any]) -> Callable[..., Any]:
  """Decorates f(numbers, values, rest), which equals the formula but for bits.

  Derivatives by `numbers` are those of `formula`, by `values` those of f itself; a program without
  derivatives does not hold the formula. What f leaves out where a number is neutral, as a factor
  of 1 or a term of 0, has a slope there all the same.
  """

  def decorate(f: Callable[[Numbers, Values, Rest], Any]) -> Callable[..., Any]:
    shortened = jax.custom_jvp(f)

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
      numbers, values, rest = primals
      made, slopes = _slopes(lambda v: f(numbers, v, rest), values, tangents[1])
      _, more = _slopes(lambda n: formula(n, values, rest), numbers, tangents[0])
      return made, jax.tree.map(jnp.add, slopes, more)

    shortened.defjvp(rule, symbolic_zeros=True)
    return shortened

  return decorate


def _slopes(f: Callable[[Any], Any], at: Any, along: Any) -> tuple[Any, Any]:
  """(f(at), its derivative along `along`); what has no tangent stays out of the derivative."""
  leaves, tree = jax.tree.flatten(at)
  tangents = jax.tree.leaves(along, is_leaf=lambda t: isinstance(t, SymbolicZero))
  live = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

  def of_live(*moved: Any) -> Any:
    whole = list(leaves)
    for i, leaf in zip(live, moved, strict=True):
      whole[i] = leaf
    return f(jax.tree.unflatten(tree, whole))

  if not live:
    made = f(at)
    return made, jax.tree.map(jnp.zeros_like, made)
  return jax.jvp(of_live, [leaves[i] for i in live], [tangents[i] for i in live])
