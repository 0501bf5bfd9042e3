"""What to keep of a run: sites and reductions, the buffers they fill, the bytes they need.

A site is a place of a block where a state G R T D is edited and tapped. resid_pre, resid_post: the
residual stream before and after the block. attn_out, cross_out, mlp_out: the three terms that are
added to it. attn_heads, cross_heads: what the heads of self- and cross-attention found, side by
side (D = N heads x K), before the output projection joins them. attn_q, attn_k, attn_v: queries,
keys and values as the heads of self-attention take them, after norm and rotary positions, side by
side too. cross_q: the queries of cross-attention, after their norm. Maps of attention (T T or T X)
are no sites: kernels do not hold them; `attention.weights` makes those of self-attention from what
is kept at attn_q and attn_k, those of cross-attention from cross_q and `conditioning.cross_keys`.
update, for taps alone: the sum of the three terms.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jax_videoreason.axes import Array
from jax_videoreason.pytrees import is_known, pytree, static
from jax_videoreason.reductions import REDUCTIONS, Inputs
from jax_videoreason.structs import Sizes

HEAD_SITES = ("attn_heads", "cross_heads", "attn_q", "attn_k", "attn_v", "cross_q")
SITES = ("resid_pre", "attn_out", "cross_out", "mlp_out", "resid_post", *HEAD_SITES)
TAP_SITES = (*SITES, "update")
ARRAYS = ("directions", "regions", "targets", "reference")  # of a TapSpec


@pytree
class TapSpec:
  """What to keep; None = all layers, all steps.

  sites, reduce: every reduction (`reductions.REDUCTIONS`) at every site; "site/reduction" is one at
  that site alone.
  steps: rows of the schedule passed. branches: of G; the paper records the branch with the prompt.
  layers, steps and branches are counted from 0 and increase; a number, an array, or a slice whose
  ends are counted so becomes a tuple, and lists of numbers in the place of arrays become arrays.
  solver: the solver's memory before every step, without which `state_at` restarts it.
  directions: P D for 'project'. regions: R P T weights for 'region_mean'. targets: R T P for
  'gram'.
  reference: R int32, the run each run is compared with, for 'cosine_to' and 'cka_to'.
  Errors: ValueError for a text where names are wanted, and for what is no index.
  """

  sites: tuple[str, ...] = static(default=())
  reduce: tuple[str, ...] = static(default=("norm",))
  latents: bool = static(default=True)
  x0: bool = static(default=True)
  solver: bool = static(default=False)
  layers: tuple[int, ...] | None = static(default=None)
  steps: tuple[int, ...] | None = static(default=None)
  branches: tuple[int, ...] = static(default=(0,))
  directions: Array | None = None
  regions: Array | None = None
  targets: Array | None = None
  reference: Array | None = None

  def __post_init__(self):
    fields: dict[str, Any] = {n: _names(n, getattr(self, n)) for n in ("sites", "reduce")}
    fields["branches"] = _indices("branches", self.branches)
    for name in ("layers", "steps"):
      given = getattr(self, name)
      fields[name] = None if given is None else _indices(name, given)
    for name in ARRAYS:
      fields[name] = _array(name, getattr(self, name))
    for name, value in fields.items():
      object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapAids:
  """What reductions need from the model.

  grid: tokens (f, h, w), f*h*w = T.
  head: G' R T D -> G' R T 4C for 'lens', G' = the branches asked for; a pure function of arrays,
  with no Linen module inside, for it is called under `lax.cond`. Only `record` calls it.
  dtype: of the model's hidden states, kept so by 'full' and 'region_mean'; every other buffer is
  float32. heads: N, for 'head_norm'.
  """

  grid: tuple[int, int, int]
  head: Callable[[Array], Array] | None = None
  dtype: DTypeLike = jnp.float32
  heads: int = 1


def reduced_at(spec: TapSpec, site: str) -> tuple[str, ...]:
  """The reductions that are kept at a site."""
  pairs = (name.rpartition("/") for name in spec.reduce)
  return tuple(reduction for own, _, reduction in pairs if own in ("", site))


def layer_slots(spec: TapSpec, layers: int) -> np.ndarray:
  """L int32: the row of the buffers that each layer writes; n, one past the last, where not asked.

  Errors: ValueError for a layer that does not exist.
  """
  return _slots(asked("layers", spec.layers, layers), layers)


def step_slots(spec: TapSpec, steps: int) -> np.ndarray:
  """S int32: the row of the trace that the taps of each step fill; n, one past the last, where not
  asked.

  spec.steps may be (): a piece of a schedule can hold none of the steps asked for.
  Errors: ValueError for steps that do not exist or do not increase.
  """
  return _slots(() if spec.steps == () else asked("steps", spec.steps, steps), steps)


def empty_buffers(spec: TapSpec, sizes: Sizes, aids: TapAids) -> dict[str, Array]:
  """'site/reduction' -> zeros L' G' R ... with one row per layer and branch asked for.

  Shapes come from `eval_shape` of the reductions. Errors: ValueError for a site, reduction, layer
  or branch that does not exist, and for an array of `spec` that is missing or of the wrong shape.
  """
  return {
    key: jnp.zeros(row.shape, row.dtype) for key, row in _buffer_shapes(spec, sizes, aids).items()
  }


def record(
  buffers: dict[str, Array],
  site: str,
  value: Array,
  spec: TapSpec,
  slot: Array | int,
  aids: TapAids,
) -> dict[str, Array]:
  """Buffers with row `slot` of every reduction at `site` written; unchanged where slot = n.

  value: G R T D, real tokens only. slot: int32 scalar of `layer_slots`. A reduction that costs more
  than a norm is computed only where its row is kept. A site that `spec` does not name costs
  nothing.
  """
  if site not in spec.sites:
    return buffers
  out = dict(buffers)
  for name in reduced_at(spec, site):
    key, reduction = f"{site}/{name}", REDUCTIONS[name]
    buffer = out[key]
    wanted = jnp.asarray(slot) < buffer.shape[0]

    def row(value: Array, buffer: Array = buffer, reduction=reduction) -> Array:
      seen = value
      if spec.branches != tuple(range(value.shape[0])):
        seen = value[np.asarray(spec.branches)]
      before = None
      if reduction.follows:
        last = jnp.maximum(jnp.asarray(slot) - 1, 0)
        # rows not yet written are zero, which a reduction takes as "no layer before"
        before = jax.lax.dynamic_index_in_dim(buffer, last, keepdims=False)
      return reduction.apply(seen, _inputs(spec, aids, before)).astype(buffer.dtype)

    if reduction.costly:
      rest = functools.partial(jnp.zeros, buffer.shape[1:], buffer.dtype)
      kept = jax.lax.cond(wanted, row, lambda _, rest=rest: rest(), value)
    else:
      kept = row(value)
    out[key] = buffer.at[slot].set(kept, mode="drop")
  return out


def tap_bytes(spec: TapSpec, sizes: Sizes, dtype: DTypeLike = jnp.float32) -> int:
  """Bytes of all tap buffers: steps, layers, branches asked for, all R runs, sites, reductions.

  dtype: of the model. The latents and x0 of the trace, 4*S*R*F*H*W*C bytes each, are not counted.
  """
  aids = TapAids(grid=(sizes.F, 1, sizes.T // sizes.F), dtype=dtype, heads=sizes.N)
  steps = len(asked("steps", spec.steps, sizes.S))
  rows = _buffer_shapes(spec, sizes, aids).values()
  return steps * sum(math.prod(row.shape) * row.dtype.itemsize for row in rows)


def check_batch(spec: TapSpec, sizes: Sizes, budget_gb: float, *, dtype: DTypeLike) -> None:
  """ValueError if the taps that a study takes of a batch need more than `budget_gb` 10^9 bytes."""
  need = tap_bytes(spec, sizes, dtype) / 1e9
  if need > budget_gb:
    raise ValueError(
      f"the taps of a batch of {sizes.R} runs need {need:.3g} GB, the budget is {budget_gb:g}: "
      f"give a smaller --config.batch, or --config.taps.budget_gb={math.ceil(need)}."
    )


def check_budget(
  spec: TapSpec, sizes: Sizes, budget: float, *, dtype: DTypeLike = jnp.float32
) -> None:
  """ValueError if the taps need more than `budget` bytes, with the bytes and a cheaper choice."""
  need = tap_bytes(spec, sizes, dtype)
  if need <= budget:
    return
  layers = asked("layers", spec.layers, sizes.L)
  steps = asked("steps", spec.steps, sizes.S)
  kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
  name = jnp.dtype(dtype).name
  shape = (
    f"S={len(steps)} L={len(layers)} G={len(spec.branches)} R={sizes.R} T={sizes.T} D={sizes.D}"
  )
  choices = [*_smaller_reduction(spec, sizes, dtype, budget)]
  cell = need / (len(layers) * len(steps))
  fit = int(budget // (cell * len(steps)))
  if fit >= 1:
    choices.append(f"layers={_spread(layers, min(fit, 5))}")
  elif budget >= cell:
    few = _spread(steps, min(int(budget // cell), 5))
    choices.append(f"layers=({layers[-1]},) with steps={few}")
  else:
    choices.append("fewer sites, runs or a smaller video")
  raise ValueError(
    f"taps need {_size(need)} ({shape}, {kind.get(name, name)}); the budget is {_size(budget)}. "
    f"Use {', or '.join(choices)}."
  )


def _smaller_reduction(spec: TapSpec, sizes: Sizes, dtype: DTypeLike, budget: float) -> list[str]:
  """The richest reduction among those of a few numbers per frame that fits, else the smallest."""
  regions = jax.ShapeDtypeStruct((sizes.R, sizes.F, sizes.T), jnp.float32)
  said = []
  for name, note in (("region_mean", ", a region per frame"), ("frame_norm", "")):
    smaller = dataclasses.replace(spec, reduce=(name,), regions=regions)
    bytes_ = tap_bytes(smaller, sizes, dtype)
    said = [f'reduce=("{name}",){note} ({_size(bytes_)})']
    if bytes_ <= budget:
      return said
  return said if spec.reduce != ("frame_norm",) else []


def _buffer_shapes(spec: TapSpec, sizes: Sizes, aids: TapAids) -> dict[str, jax.ShapeDtypeStruct]:
  _check(spec, sizes, aids)
  rows = len(asked("layers", spec.layers, sizes.L))
  dtype = jnp.dtype(aids.dtype)
  value = jax.ShapeDtypeStruct((len(spec.branches), sizes.R, sizes.T, sizes.D), dtype)
  # the head's output is a latent, cut into tokens, whatever the head is
  width = sizes.F * sizes.H * sizes.W * sizes.C // sizes.T

  def head(x: Array) -> Array:
    return jnp.zeros((*x.shape[:-1], width), jnp.float32)

  arrays = {
    name: jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
    for name in ARRAYS
    if (array := getattr(spec, name)) is not None
  }

  def shape(name: str) -> jax.ShapeDtypeStruct:
    def apply(value: Array, arrays: dict[str, Array]) -> Array:
      inputs = Inputs(frames=aids.grid[0], heads=aids.heads, head=head, **arrays)
      return REDUCTIONS[name].apply(value, inputs)

    row = jax.eval_shape(apply, value, arrays)
    kept = dtype if REDUCTIONS[name].state else jnp.dtype(jnp.float32)
    return jax.ShapeDtypeStruct((rows, *row.shape), kept)

  kept = [(site, name) for site in spec.sites for name in reduced_at(spec, site)]
  shapes = {name: shape(name) for name in {name for _, name in kept}}
  return {f"{site}/{name}": shapes[name] for site, name in kept}


def _inputs(spec: TapSpec, aids: TapAids, before: Array | None) -> Inputs:
  return Inputs(
    frames=aids.grid[0],
    heads=aids.heads,
    head=aids.head,
    before=before,
    **{name: getattr(spec, name) for name in ARRAYS},
  )


def _check(spec: TapSpec, sizes: Sizes, aids: TapAids) -> None:
  sites = (*(sizes.sites or SITES), "update")
  for site in spec.sites:
    if site not in sites:
      raise ValueError(f"no site '{site}' to tap; there are: {', '.join(sites)}.")
  for name in spec.reduce:
    own, slash, reduction = name.rpartition("/")
    if reduction not in REDUCTIONS:
      raise ValueError(f"no reduction '{reduction}'; there are: {', '.join(REDUCTIONS)}.")
    if slash and own not in sites:
      raise ValueError(f"reduce names '{name}', no site '{own}'; there are: {', '.join(sites)}.")
    if slash and own not in spec.sites and spec.sites:
      raise ValueError(f"reduce names '{name}' and sites={spec.sites} has no '{own}': add it.")
  for site in spec.sites:
    if not reduced_at(spec, site):
      raise ValueError(
        f"sites names '{site}' and reduce={spec.reduce} keeps nothing there: leave it out, or "
        "add a reduction of it."
      )
    for name in reduced_at(spec, site):
      heads = REDUCTIONS[name].heads
      if heads not in (None, site in HEAD_SITES):
        place = "attn_heads" if heads else "resid_post"
        raise ValueError(
          f"'{name}' means nothing at '{site}': name it where it does, as "
          f"reduce=('{place}/{name}',)."
        )
  for field, names in (
    ("sites", spec.sites),
    *(("reduce", reduced_at(spec, site)) for site in spec.sites or ("",)),
  ):
    if len(set(names)) != len(names):
      raise ValueError(f"{field}={getattr(spec, field)} names one twice: give each once.")
  asked("layers", spec.layers, sizes.L)
  asked("branches", spec.branches, sizes.G)
  if math.prod(aids.grid) != sizes.T:
    raise ValueError(
      f"token grid {aids.grid} has {math.prod(aids.grid)} tokens, wanted T={sizes.T}."
    )
  wanted = {
    "directions": ("P D", {1: sizes.D}),
    "regions": ("R P T", {0: sizes.R, 2: sizes.T}),
    "targets": ("R T P", {0: sizes.R, 1: sizes.T}),
    "reference": ("R", {0: sizes.R}),
  }
  for field, (letters, fixed) in wanted.items():
    array = getattr(spec, field)
    names_used = (name.rpartition("/")[2] for name in spec.reduce)
    users = [name for name in names_used if REDUCTIONS[name].needs == field]
    if array is None:
      if users and spec.sites:
        raise ValueError(f"'{users[0]}' needs {field} ({letters}), got None: set TapSpec.{field}.")
      continue
    names = letters.split()
    if len(array.shape) != len(names) or any(array.shape[i] != n for i, n in fixed.items()):
      sizes_wanted = ", ".join(str(fixed.get(i, names[i])) for i in range(len(names)))
      raise ValueError(f"{field} is {tuple(array.shape)}, wanted {letters} = ({sizes_wanted}).")
  reference = spec.reference
  if reference is not None and not isinstance(reference, Tracer):
    named = np.asarray(reference)
    if named.size and (named.min() < 0 or named.max() >= sizes.R):
      raise ValueError(f"reference={named.tolist()} names a run outside 0..{sizes.R - 1}.")


def _names(name: str, given: Any) -> tuple[str, ...]:
  if isinstance(given, str):
    raise ValueError(f"{name}='{given}', wanted a tuple: {name}=('{given}',).")
  names = tuple(given) if isinstance(given, Iterable) else (given,)
  if not all(isinstance(one, str) for one in names):
    raise ValueError(f"{name}={given!r}, wanted a tuple of names.")
  return names


def _indices(name: str, given: Any) -> tuple[int, ...]:
  """An index, indices or a slice as a tuple; how many there are is not known here."""
  if not is_known(given):
    raise ValueError(f"{name} is traced, and decides what the program holds: give plain numbers.")
  if isinstance(given, slice):
    ends = (0 if given.start is None else given.start, given.stop, given.step or 1)
    if given.step == 0 or not all(isinstance(end, int | np.integer) and end >= 0 for end in ends):
      raise ValueError(
        f"{name}={given}, wanted a slice i:j with ends counted from 0: {name}=range(i, j)."
      )
    given = range(*ends)
  index = _stacked(name, given)
  if index.ndim > 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
    raise ValueError(
      f"{name}={given!r}, wanted indices from 0 on, as (0, 2); of a mask, np.flatnonzero(mask)."
    )
  return tuple(index.ravel().tolist())


def _array(name: str, given: Any) -> Any:
  """A list of numbers or arrays as an array; anything else as it is."""
  kinds = (int, float, np.generic, np.ndarray, jax.Array)
  # jax puts what it likes into the fields of a pytree, so only numbers are taken for an array
  if isinstance(given, list) and all(isinstance(x, kinds) for x in jax.tree.leaves(given)):
    return _stacked(name, given, np if is_known(given) else jnp)
  return given


def _stacked(name: str, given: Any, space: Any = np) -> Any:
  try:
    return space.asarray(given)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{name}={given!r} makes no array: give rows of one length.") from error


def _slots(asked: tuple[int, ...], size: int) -> np.ndarray:
  slots = np.full(size, len(asked), np.int32)
  slots[list(asked)] = np.arange(len(asked), dtype=np.int32)
  return slots


def asked(name: str, given: tuple[int, ...] | None, size: int) -> tuple[int, ...]:
  """The indices asked for of the `size` there are; ValueError unless they exist and increase."""
  if given is None:
    return tuple(range(size))
  if not given:
    raise ValueError(f"{name}=() keeps nothing: name some of 0..{size - 1}, or leave sites empty.")
  for index in given:
    if not 0 <= index < size:
      raise ValueError(f"{name}={tuple(given)}: there is no {index}, only 0..{size - 1}.")
  if any(b <= a for a, b in itertools.pairwise(given)):
    raise ValueError(f"{name}={tuple(given)}, wanted increasing: use {tuple(sorted(set(given)))}.")
  return tuple(given)


def _spread(choices: tuple[int, ...], count: int) -> tuple[int, ...]:
  """`count` of the choices, evenly spaced, the last among them."""
  places = np.linspace(len(choices) - 1, 0, count).round().astype(int)
  return tuple(choices[i] for i in sorted(set(places.tolist())))


def _size(count: float) -> str:
  for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if count >= scale:
      return f"{count / scale:.1f} {unit}"
    if unit == "GB" and count >= 0.1 * scale:
      return f"{count / scale:.2f} {unit}"
  return f"{count:.0f} bytes"
