"""Frozen dataclasses that jax walks through: `@pytree`, with `static()` for what is structure."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

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
