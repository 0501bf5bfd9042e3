"""Frozen dataclasses that jax walks through: `@pytree`, with `static()` for what is structure.

Also nested dicts as flat ones, by paths such as "blocks/q/kernel", and whether leaves are known or
traced.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.core import Tracer

T = TypeVar("T")


def static(default: Any = dataclasses.MISSING) -> Any:
  """A field that is structure: hashable, part of the compilation key, never traced."""
  return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
  """Makes `cls` a frozen, keyword-only dataclass; its fields are leaves, except `static()` ones."""
  made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
  fields = dataclasses.fields(made)
  meta = tuple(f.name for f in fields if f.metadata.get("static"))
  data = tuple(f.name for f in fields if not f.metadata.get("static"))
  return jax.tree_util.register_dataclass(made, data_fields=data, meta_fields=meta)


def leaves(tree: Any) -> dict[str, Any]:
  """A nested dict as "blocks/q/kernel" -> leaf."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `leaves`."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *outer, name = path.split("/")
    node = tree
    for key in outer:
      node = node.setdefault(key, {})
    node[name] = leaf
  return tree


def is_known(*values: Any) -> bool:
  """Are all values here to be looked at: neither traced nor on other hosts?"""
  arrays = [leaf for leaf in jax.tree.leaves(values) if isinstance(leaf, jax.Array)]
  return not any(isinstance(leaf, Tracer) or not leaf.is_fully_addressable for leaf in arrays)


def refuse_traced(who: str, remedy: str, *values: Any) -> None:
  """ValueError where a value is traced; `who` works on the host, `remedy` is what to do instead."""
  if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
    raise ValueError(f"{who} works on the host and jax traces it (jit, grad, vmap): {remedy}.")
