"""Where an edit acts (`At`, made by `where`), and the selections and numbers it is given.

All of it stays in numpy while every value is known, so that faults are found before anything runs;
a traced step, layer, run or number works too, without those checks.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import ArrayLike

from jax_videoreason.axes import Array
from jax_videoreason.pytrees import is_known, pytree, static
from jax_videoreason.structs import Sizes

Select = int | slice | Sequence[int] | ArrayLike | None
NOTHING = "selects nothing: for no edit use identity(sizes, ...)."


@pytree
class At:
  """Where an edit acts, made by `where`; None = everywhere.

  steps: S bool. layers: L bool. frames: F bool, latent frames. region: R T bool, tokens.
  heads: N bool. branches: G bool. increase: whether steps and layers were named in that order,
  each once.
  """

  steps: Array | None = None
  layers: Array | None = None
  frames: Array | None = None
  region: Array | None = None
  heads: Array | None = None
  branches: Array | None = None
  sizes: Sizes = static()
  increase: bool = static(default=True)


def where(
  sizes: Sizes,
  *,
  steps: Select = None,
  layers: Select = None,
  frames: Select = None,
  region: ArrayLike | None = None,
  heads: Select = None,
  branches: Select = None,
) -> At:
  """Where an edit acts; None = everywhere.

  steps (of the whole schedule), layers, frames (latent), heads (at `taps.HEAD_SITES`
  alone) and branches (0 with the prompt): an index, indices, a slice, or a mask of their length.
  An index may be traced: all its values are one compilation. region: bool, which tokens, T or
  (f, h, w) for all runs alike, R T or (R, f, h, w) for each, of which some may be empty; it is cut
  with `frames`.
  Errors: ValueError for an index outside, a selection of nothing, or a mask of the wrong shape.
  """
  return At(
    steps=selection("steps", steps, sizes.S),
    layers=selection("layers", layers, sizes.L),
    frames=selection("frames", frames, sizes.F),
    region=None if region is None else _region(region, sizes),
    heads=selection("heads", heads, sizes.N),
    branches=selection("branches", branches, sizes.G),
    sizes=sizes,
    increase=_increase(steps) and _increase(layers),
  )


def _increase(which: Select) -> bool:
  """Are the indices of a selection in order, each once?"""
  if which is None or not is_known(which):
    return True
  if isinstance(which, slice):
    return which.step is None or which.step > 0
  index = np.asarray(which).ravel()
  return index.dtype == bool or bool(np.all(np.diff(index) > 0))


def depth(layers: int, low: float = 0.5, high: float = 0.75) -> slice:
  """The layers between two shares of the depth, one at the least; as they are, 20 to 29 of 40."""
  first = round(low * layers)
  return slice(first, max(round(high * layers), first + 1))


def token_mask(at: At) -> Any:
  """R T bool: the tokens of the frames and the region of `at`; None = all."""
  mask, sizes = at.region, at.sizes
  if at.frames is not None:
    if sizes.T % sizes.F:
      raise ValueError(f"T={sizes.T} tokens are not F={sizes.F} equal frames: pass region instead.")
    space = space_of(at.frames)
    tokens = space.repeat(at.frames, sizes.T // sizes.F)[None]
    tokens = space.broadcast_to(tokens, (sizes.R, sizes.T))
    mask = tokens if mask is None else mask & tokens
  return mask


def refuse(at: At, who: str, *names: str) -> None:
  """ValueError where `at` is narrowed along one of `names`."""
  for name in names:
    if getattr(at, name) is not None:
      raise ValueError(f"{who} has no {name}: leave it out of where(...).")


def run_indices(name: str, given: Any, runs: int) -> Any:
  """A run or several, as an index array."""
  index = space_of(given).asarray(given)
  if not np.issubdtype(index.dtype, np.integer) or index.ndim > 1 or index.size == 0:
    raise ValueError(f"{name}={given!r}, wanted a run or several of 0..{runs - 1}.")
  if is_known(index) and (index.min() < 0 or index.max() >= runs):
    raise ValueError(f"{name}={index.tolist()}: the batch has the runs 0..{runs - 1}.")
  return space_of(index).reshape(index, (-1,))


def pairs(name_a: str, a: Any, name_b: str, b: Any, runs: int) -> tuple[Any, Any]:
  """Two index arrays of one length; a single run is paired with all."""
  one, two = run_indices(name_a, a, runs), run_indices(name_b, b, runs)
  if one.shape == (1,):
    one = space_of(one).broadcast_to(one, two.shape)
  if one.shape != two.shape:
    raise ValueError(f"{len(one)} {name_a} and {len(two)} {name_b}: give them pair by pair.")
  return one, two


def full_mask(selected: Any, size: int) -> Any:
  """A selection with None, everything, written out."""
  return np.ones(size, bool) if selected is None else selected


def to_number(value: Any) -> Any:
  """float32, in numpy where the value is known."""
  return space_of(value).asarray(value, dtype=np.float32)


def to_scalar(name: str, value: Any) -> Any:
  """One float32 number."""
  number = to_number(value)
  if number.shape != ():
    raise ValueError(f"{name} is {tuple(number.shape)}, wanted one number.")
  return number


def per_step(gain: ArrayLike, steps: int) -> Any:
  """The gain of each of S steps; one number is the same at every step."""
  number = to_number(gain)
  if number.shape not in ((), (steps,)):
    raise ValueError(f"gain is {tuple(number.shape)}, wanted a number or S = ({steps},).")
  return space_of(number).broadcast_to(number, (steps,))


def sigmas(sigma: ArrayLike | None, steps: int, who: str) -> Any:
  """S noise levels, without the last of S+1."""
  if sigma is None:
    raise ValueError(f"{who} needs sigma (S or S+1), got None: pass schedule.sigma.")
  number = to_number(sigma)
  if number.shape not in ((steps,), (steps + 1,)):
    raise ValueError(
      f"sigma is {tuple(number.shape)}, wanted ({steps},) or ({steps + 1},): pass that of the "
      "whole schedule."
    )
  return number[:steps]


def selection(name: str, which: Any, size: int) -> Any:
  """A mask of `size`, or None for everything."""
  if which is None:
    return None
  last = size - 1
  if isinstance(which, slice):
    for end in (which.start, which.stop):
      if end is not None and not -size <= end <= size:
        raise ValueError(f"{name}={which.start}:{which.stop} leaves 0..{last}: cut it to {size}.")
    index: Any = np.arange(size)[which]
  else:
    index = space_of(which).asarray(which)
  if index.dtype == bool:
    if index.shape != (size,):
      raise ValueError(f"the mask {name} is {tuple(index.shape)}, wanted ({size},).")
    if is_known(index) and not index.any():
      raise ValueError(f"the mask {name} {NOTHING}")
    return index
  if index.ndim > 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
    raise ValueError(f"{name}={which!r}, wanted indices 0..{last}, a slice or a mask of {size}.")
  if index.size == 0:
    raise ValueError(f"{name}={which!r} {NOTHING}")
  if is_known(index) and (index.min() < 0 or index.max() > last):
    wrong = index.min() if index.min() < 0 else index.max()
    raise ValueError(f"{name}={wrong} does not exist: there are {size}, 0..{last}.")
  space = space_of(index)
  return space.any(space.arange(size)[:, None] == space.reshape(index, (1, -1)), axis=1)


def _region(region: ArrayLike, sizes: Sizes) -> Any:
  """R T bool of a region in one of its four layouts."""
  space = space_of(region)
  mask = space.asarray(region)
  if mask.dtype != bool:
    raise ValueError(f"region is {mask.dtype}, wanted bool: threshold it first.")
  if mask.ndim in (3, 4):
    mask = rearrange(mask, "... f h w -> ... (f h w)")
  if mask.ndim == 1:
    mask = mask[None]
  if mask.ndim != 2 or mask.shape[-1] != sizes.T or mask.shape[0] not in (1, sizes.R):
    raise ValueError(
      f"region is {tuple(np.shape(region))}, wanted T = ({sizes.T},) or R T = "
      f"({sizes.R}, {sizes.T}), or (f, h, w) in place of T."
    )
  if is_known(mask) and not mask.any():
    raise ValueError(f"region {NOTHING}")
  return space.broadcast_to(mask, (sizes.R, sizes.T))


def space_of(*values: Any) -> Any:
  """numpy while all values are known, so that they can be checked; jax.numpy under a trace."""
  return np if is_known(*values) else jnp
