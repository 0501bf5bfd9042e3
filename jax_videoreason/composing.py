"""An edit laid over the edits that are there: room, sites, place, and rows after rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_videoreason.edits import (
  LETTERS,
  Intervention,
  check_edit,
  head_faults,
  known_sites,
  site_names,
)
from jax_videoreason.places import At, Select, full_mask, selection, space_of, token_mask
from jax_videoreason.pytrees import is_known
from jax_videoreason.structs import Sizes

MASKS = {"tokens": "the same frames and region", "heads": "the same heads"}


def room_of(name: str, sizes: Sizes) -> dict[str, Any]:
  """The fields of the edit `name`, filled with what changes nothing."""

  def of(field: str, value: float | bool) -> dict[str, Any]:
    shape = tuple(getattr(sizes, letter) for letter in LETTERS[field])
    return {field: np.full(shape, value, bool if field in MASKS else np.float32)}

  if name == "noise":
    return of("keep", 1) | of("to_x0", 0) | of("noise_gain", 0)
  if name == "steer":
    return of("steer", 0) | of("direction", 0)
  if name in ("gate", *MASKS):
    return of(name, 1)
  return {name: of(name, 0)[name] + np.eye(sizes.R, dtype=np.float32)}


def with_room(edit: Intervention, sizes: Sizes, name: str) -> Intervention:
  """`edit` with every field of `name`; fields that are there are left alone."""
  made = room_of(name, sizes).items()
  return dataclasses.replace(edit, **{f: v for f, v in made if getattr(edit, f) is None})


def with_sites(edit: Intervention, sizes: Sizes, sites: Sequence[str] | None) -> Intervention:
  """`edit` with its sites set; an Intervention has one set of sites for all its block edits."""
  if sites is None:
    if not edit.sites:
      names = ", ".join(site_names(sizes))
      raise ValueError(f"the edit has no site: pass sites=(...), some of {names}.")
    return edit
  sites = known_sites(sizes, sites)
  if not sites:
    raise ValueError(f"sites=() edits nothing: pass some of {', '.join(site_names(sizes))}.")
  if edit.sites and set(edit.sites) != set(sites):
    raise ValueError(
      f"the edit acts at {edit.sites}, this one at {sites}; an Intervention has one set of sites: "
      "start from an identity with room at these."
    )
  return edit if edit.sites else dataclasses.replace(edit, sites=sites)


def with_place(edit: Intervention, at: At, written: Any) -> Intervention:
  """`edit` with the tokens, heads and branches of `at`, refused where another edit holds them."""
  sizes = at.sizes
  check_edit(edit, sizes)
  if at.heads is not None and (faults := head_faults(edit.sites)):
    raise ValueError(faults[0])
  cells = full_mask(at.steps, sizes.S)[:, None] & written[None, :]
  deep = cells[:, None] & full_mask(at.layers, sizes.L)[None, :, None]
  busy = _busy(edit, sizes)
  tokens = token_mask(at)
  tokens = tokens if tokens is None else tokens[None]
  heads = at.heads if at.heads is None else at.heads[None, None, None]
  edit = _with_mask(edit, sizes, "tokens", tokens, cells, busy.any(axis=1))
  edit = _with_mask(edit, sizes, "heads", heads, deep, busy)
  if at.branches is not None or edit.branches is not None:
    old = full_mask(edit.branches, sizes.G)
    wanted = full_mask(at.branches, sizes.G)
    other = is_known(busy, old, wanted) and np.any(np.asarray(old) != np.asarray(wanted))
    if other and np.any(busy):
      raise ValueError(
        f"the edit acts on branches {np.flatnonzero(old).tolist()}, this one on "
        f"{np.flatnonzero(wanted).tolist()}; an Intervention has one set: give both the same."
      )
    edit = dataclasses.replace(edit, branches=wanted)
  return edit


def _with_mask(
  edit: Intervention, sizes: Sizes, name: str, wanted: Any, cells: Any, busy: Any
) -> Intervention:
  """`edit` with the mask `name`, of `MASKS`, set to `wanted` in `cells`; None = everything.

  Where `cells` are busy another mask is refused.
  """
  if wanted is None and getattr(edit, name) is None:
    return edit
  edit = with_room(edit, sizes, name)
  old = getattr(edit, name)
  wanted = np.ones((1,) * old.ndim, bool) if wanted is None else wanted
  if is_known(busy, cells, wanted, old):
    clash = np.any(np.asarray(old) != np.asarray(wanted), axis=-1) & busy & cells
    if clash.any():
      step, *layer, run = np.argwhere(clash)[0].tolist()
      place = f"run {run} at step {step}" + "".join(f", layer {number}" for number in layer)
      each = "step, layer and run" if layer else "step and run"
      raise ValueError(
        f"{place} is already edited under another {name[:-1]} mask; there is one per {each}: use "
        f"{MASKS[name]}, or another run."
      )
  space = space_of(cells, wanted, old)
  return dataclasses.replace(edit, **{name: space.where(cells[..., None], wanted, old)})


def inside(
  edit: Intervention, at: At, runs: Select, sites: Sequence[str] | None, name: str
) -> tuple[Intervention, Any]:
  """`edit` with room, sites and masks for a block edit of `runs`, and where it acts, S L R."""
  sizes = at.sizes
  written = full_mask(selection("runs", runs, sizes.R), sizes.R)
  edit = with_place(with_sites(edit, sizes, sites), at, written)
  mask = full_mask(at.steps, sizes.S)[:, None, None] & full_mask(at.layers, sizes.L)[None, :, None]
  return with_room(edit, sizes, name), mask & written[None, None, :]


def affine(edit: Intervention, mask: Any, keep: Any, to_x0: Any, gain: Any) -> Intervention:
  """x <- keep*x + to_x0*x0 + gain*noise after the edit's own three numbers, where mask S R F."""

  def shaped(value: Any) -> Any:
    return value[:, None, None] if np.ndim(value) == 1 else value

  keep, to_x0, gain = shaped(keep), shaped(to_x0), shaped(gain)
  return dataclasses.replace(
    edit,
    keep=put(mask, keep * edit.keep, edit.keep),
    to_x0=put(mask, keep * edit.to_x0 + to_x0, edit.to_x0),
    noise_gain=put(mask, keep * edit.noise_gain + gain, edit.noise_gain),
  )


def compose(mix: Any, mask: Any, rows: Any) -> Any:
  """`mix` ... R R with `rows` applied after it where mask ... R."""
  if is_known(mix, mask, rows):
    made = np.matmul(rows, mix)
  else:
    made = jnp.matmul(rows, mix, precision=jax.lax.Precision.HIGHEST)
  return put(mask[..., None], made, mix)


def put(mask: Any, value: Any, old: Any) -> Any:
  """old with value where mask, float32."""
  space = space_of(mask, value, old)
  return space.where(mask, value, old).astype(np.float32)


def _busy(edit: Intervention, sizes: Sizes) -> Any:
  """S L R bool: what already has a block edit."""
  space = space_of(edit.mix, edit.gate, edit.steer, edit.added, edit.added_at)
  busy = space.zeros((sizes.S, sizes.L, sizes.R), bool)
  if edit.mix is not None:
    busy = busy | space.any(edit.mix != np.eye(sizes.R, dtype=np.float32)[None, None], axis=3)
  if edit.gate is not None:
    busy = busy | (edit.gate != 1)
  if edit.steer is not None:
    busy = busy | (edit.steer != 0)
  if edit.added is not None:
    held = space.any(space.asarray(edit.added) != 0, axis=(1, 3, 4))
    row = space.asarray(edit.added_at)
    busy = busy | ((row >= 0)[..., None] & space.take(held, space.maximum(row, 0), axis=0))
  return busy
