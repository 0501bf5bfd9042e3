"""What an `Intervention` is, and what the sampler and the model do with it.

It is a pytree of arrays over the steps and layers of a run. Within one step the kinds act in the
order mix, gate, steer, added.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from jax_videoreason.axes import Array
from jax_videoreason.derivatives import Numbers, by_formula
from jax_videoreason.pytrees import is_known, pytree, static
from jax_videoreason.sharding import over_runs, whole
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import HEAD_SITES, SITES

CELLS = "r f h w c"
BLOCK_UPDATE = ("attn_out", "cross_out", "mlp_out")
ACTING = ("mix", "gate", "steer", "added")  # inside the blocks
OUTS = ("x0", "velocity")  # what `mix_out` acts on
BY_LAYER = ("mix", "gate", "steer", "direction", "heads", "added_at")
STILL = {"keep": 1, "to_x0": 0, "noise_gain": 0}  # what changes nothing
LETTERS = {
  "mix_latents": "SRR",
  "keep": "SRF",
  "to_x0": "SRF",
  "noise_gain": "SRF",
  "mix_out": "SRR",
  "mix": "SLRR",
  "gate": "SLR",
  "steer": "SLR",
  "direction": "LD",
  "added_at": "SL",
  "tokens": "SRT",
  "heads": "SLRN",
  "branches": "G",
}


@pytree
class Intervention:
  """Every array may be None = not in the program (static structure).

  S counts the steps of the whole schedule.
  mix_latents: S R R, row r is written from the columns it names; first of all, before keep.
  keep, to_x0, noise_gain: S R F, x <- keep*x + to_x0*x0_before + noise_gain*noise.
  mix_out: S R R on the model's guess (`out`); v is rebuilt for the rows touched.
  mix: S L R R inside the blocks, at every site in `sites`.
  gate: S L R scales the value at the site; 0 = ablate.
  steer: S L R gain of `direction` (L D).
  added: K G R T D, added where added_at S L (int32) names one of the K; -1 = nothing.
  tokens: S R T bool, which tokens any block edit touches; None = all.
  heads: S L R N bool, which heads, at `HEAD_SITES` alone; None = all.
  branches: G bool, which guidance branches; None = all.

  A number that changes nothing (a gate of 1, a gain of 0, a row of mix with a single 1) keeps the
  bits of what it stands at; the derivative by it is that of the formula all the same, as
  attribution patching takes it, and so are higher ones. By a noise_gain of 0 only where
  `Noise.injected` gives the noise: in a step where no run has a gain none is drawn. That a
  multistep solver restarts after an edit of the latents has no derivative. In a derivative NaN of
  one run reaches all where there is room for a mix: leave out runs that are not finite.
  """

  mix_latents: Array | None = None
  keep: Array | None = None
  to_x0: Array | None = None
  noise_gain: Array | None = None
  mix_out: Array | None = None
  mix: Array | None = None
  gate: Array | None = None
  steer: Array | None = None
  direction: Array | None = None
  added: Array | None = None
  added_at: Array | None = None
  tokens: Array | None = None
  heads: Array | None = None
  branches: Array | None = None
  sites: tuple[str, ...] = static(default=())
  out: str = static(default="x0")


@pytree
class BlockEdits:
  """The rows of an Intervention that act inside the blocks at one step.

  L leads the fields of `BY_LAYER`; `layer_edits` takes it away.
  mix: L R R; gate, steer: L R; direction: L D; heads: L R N bool; added: K G R T D; added_at: L
  int32; tokens: R T bool; branches: G bool.
  """

  mix: Array | None = None
  gate: Array | None = None
  steer: Array | None = None
  direction: Array | None = None
  heads: Array | None = None
  added: Array | None = None
  added_at: Array | None = None
  tokens: Array | None = None
  branches: Array | None = None
  sites: tuple[str, ...] = static(default=())


def check_edit(edit: Intervention, sizes: Sizes) -> None:
  """ValueError with every fault of an Intervention for a problem of these sizes.

  Shapes always; where values are known, also that rows of mixes sum to 1 (only `ablate`, which is
  a gate, takes something away), and that nothing is lost for want of a site or a partner field.
  """
  faults = []
  for field, letters in LETTERS.items():
    value = getattr(edit, field)
    if value is None:
      continue
    wanted = tuple(getattr(sizes, letter) for letter in letters)
    if tuple(value.shape) != wanted:
      faults.append(f"{field} {' '.join(letters)} is {tuple(value.shape)}, wanted {wanted}.")
    elif field.startswith("mix") and is_known(value):
      faults += _row_faults(field, value)
    if field in ("mix", "gate", "steer", "added_at") and not edit.sites:
      faults.append(f"{field} has no site to act at: set sites, e.g. sites={BLOCK_UPDATE}.")
  faults += _added_faults(edit, sizes)
  if (edit.steer is None) != (edit.direction is None):
    faults.append("steer and direction come together: give both or neither.")
  if edit.out not in OUTS:
    faults.append(f"out='{edit.out}', wanted 'x0' or 'velocity'.")
  if edit.heads is not None:
    faults += head_faults(edit.sites)
  if faults:
    raise ValueError(" ".join(faults))
  known_sites(sizes, edit.sites)


def _added_faults(edit: Intervention, sizes: Sizes) -> list[str]:
  if edit.added is None and edit.added_at is None:
    return []
  if edit.added is None or edit.added_at is None:
    return ["added and added_at come together: give both or neither."]
  shape, wanted = tuple(edit.added.shape), (sizes.G, sizes.R, sizes.T, sizes.D)
  if len(shape) != 5 or shape[1:] != wanted:
    return [f"added K G R T D is {shape}, wanted K and {wanted}."]
  if not np.issubdtype(edit.added_at.dtype, np.integer):
    return [f"added_at is {edit.added_at.dtype}, wanted int32."]
  if is_known(edit.added_at) and (last := np.asarray(edit.added_at).max()) >= shape[0]:
    return [f"added_at names {last}, wanted -1 or one of the {shape[0]} of added."]
  return []


def head_faults(sites: Sequence[str]) -> list[str]:
  """What is wrong with naming heads at `sites`."""
  joined = [site for site in sites if site not in HEAD_SITES]
  if not joined:
    return []
  return [
    f"heads are named and there are none at {', '.join(joined)}: edit at {', '.join(HEAD_SITES)} "
    "alone, or leave heads out."
  ]


def known_sites(sizes: Sizes, sites: Sequence[str]) -> tuple[str, ...]:
  """`sites` as a tuple; ValueError for one that is no place for an edit."""
  if isinstance(sites, str):
    raise ValueError(f"sites='{sites}', wanted a tuple: sites=('{sites}',).")
  for site in sites:
    if site == "update":
      raise ValueError(f"the site 'update' is for taps alone; its terms are {BLOCK_UPDATE}.")
    if site not in site_names(sizes):
      raise ValueError(f"no site '{site}' to edit; there are: {', '.join(site_names(sizes))}.")
  return tuple(sites)


def site_names(sizes: Sizes) -> tuple[str, ...]:
  """The sites of the model, of every model where `sizes` does not say."""
  return sizes.sites or SITES


def _row_faults(field: str, mix: Any) -> list[str]:
  sums = np.asarray(mix).sum(axis=-1)
  wrong = np.argwhere(~(np.abs(sums - 1) <= 1e-4))
  if not len(wrong):
    return []
  place = tuple(wrong[0].tolist())
  names = ", ".join(f"{n} {i}" for n, i in zip(("step", "layer"), place[:-1], strict=False))
  return [
    f"{field} at {names}: row {place[-1]} sums to {sums[place]:.4g}, wanted 1: to take something "
    "away use ablate."
  ]


def step_edits(edit: Intervention, index: Array | int) -> BlockEdits | None:
  """The block edits of step `index` of the whole schedule; None where the structure has none."""
  if not edit.sites or all(getattr(edit, name) is None for name in ACTING):
    return None
  return BlockEdits(
    mix=_row(edit.mix, index),
    gate=_row(edit.gate, index),
    steer=_row(edit.steer, index),
    direction=None if edit.steer is None else edit.direction,
    heads=_row(edit.heads, index),
    added=edit.added,
    added_at=_row(edit.added_at, index),
    tokens=_row(edit.tokens, index),
    branches=edit.branches,
    sites=edit.sites,
  )


def layer_edits(edits: BlockEdits, layer: Array | int) -> BlockEdits:
  """The edits of one layer, as a layer scan hands them on: mix R R; gate, steer R; direction D;
  heads R N; added_at a number."""
  return dataclasses.replace(edits, **{n: _row(getattr(edits, n), layer) for n in BY_LAYER})


def spare_tokens(edits: BlockEdits, runs: int, tokens: int, spare: int) -> BlockEdits:
  """The same for `spare` more tokens, which fill the T real ones up and which no edit touches."""
  touched = jnp.ones((runs, tokens), bool) if edits.tokens is None else edits.tokens
  added = edits.added
  return dataclasses.replace(
    edits,
    tokens=jnp.pad(touched, ((0, 0), (0, spare))),
    added=None if added is None else jnp.pad(added, ((0, 0), (0, 0), (0, 0), (0, spare), (0, 0))),
  )


def edit_site(value: Array, edits: BlockEdits | None, site: str) -> Array:
  """The value G R T D at `site` of one layer after its edits, in the order mix, gate, steer,
  added.

  edits: one layer's (no L axis). Cells that no edit touches keep their bits; a row of mix with a
  single 1 is gathered; only true averages are multiplied, in float32. Where nothing is active at
  this layer the value passes through one `cond`.
  """
  if edits is None or site not in edits.sites:
    return value
  if all(getattr(edits, name) is None for name in ACTING):
    return value
  numbers = {name: getattr(edits, name) for name in (*ACTING, "direction")}
  where = {name: getattr(edits, name) for name in ("tokens", "heads", "branches", "added_at")}
  return _site(numbers, value, where)


def _site_formula(numbers: Numbers, value: Array, where: Mapping[str, Any]) -> Array:
  """What `_site` computes, for every number alike."""
  mix, gate, steer, added = (numbers[name] for name in ACTING)
  made = (value if mix is None else _average(mix, value, "g r t d")).astype(jnp.float32)
  if gate is not None:
    made = _over_runs(gate) * made
  if steer is not None:
    made = made + _over_runs(steer) * _over_tokens(numbers["direction"])
  if added is not None:
    made = made + jnp.where(where["added_at"] >= 0, _row(added, where["added_at"]), 0.0)
  return _masked(made.astype(value.dtype), value, where)


@by_formula(_site_formula)
def _site(numbers: Numbers, value: Array, where: Mapping[str, Any]) -> Array:
  mix, gate, steer, added = (numbers[name] for name in ACTING)
  row = where["added_at"]
  active = [] if mix is None else [jnp.any(whole(mix) != _eye(mix))]
  active += [] if gate is None else [jnp.any(whole(gate) != 1)]
  active += [] if steer is None else [jnp.any(whole(steer) != 0)]
  active += [] if added is None else [row >= 0]

  def apply(value: Array) -> Array:
    made = value if mix is None else _mix_rows(mix, value, "g r t d")
    if gate is not None:
      factor = _over_runs(gate)
      scaled = (factor * made.astype(jnp.float32)).astype(value.dtype)
      scaled = jnp.where(factor == 0, jnp.zeros_like(made), scaled)
      made = jnp.where(factor == 1, made, scaled)
    if steer is not None:
      gain = _over_runs(steer)
      push = gain * _over_tokens(numbers["direction"])
      steered = (made.astype(jnp.float32) + push).astype(value.dtype)
      made = jnp.where(gain == 0, made, steered)
    if added is not None:
      more = _row(added, row)
      total = (made.astype(jnp.float32) + more).astype(value.dtype)
      made = jnp.where((row >= 0) & (more != 0), total, made)
    return _masked(made, value, where)

  return jax.lax.cond(jnp.any(jnp.stack(active)), apply, lambda value: value, value)


def _masked(made: Array, value: Array, where: Mapping[str, Any]) -> Array:
  """`made` where tokens R T, heads R N and branches G say so, `value` G R T D elsewhere.

  None = everywhere.
  """
  heads = where["heads"]
  if heads is not None:
    heads = repeat(heads, "r n -> r (n k)", k=value.shape[-1] // heads.shape[-1])
  for mask, pattern in (
    (where["tokens"], "r t -> 1 r t 1"),
    (heads, "r d -> 1 r 1 d"),
    (where["branches"], "g -> g 1 1 1"),
  ):
    if mask is not None:
      made = jnp.where(rearrange(mask, pattern), made, value)
  return made


def wants_noise(edit: Intervention, index: Array | int) -> Array:
  """bool scalar: does `edit` inject noise at step `index`? It is drawn under a cond on this."""
  if edit.noise_gain is None:
    return jnp.zeros((), bool)
  return jnp.any(_row(whole(edit.noise_gain), index) != 0)


def edit_latents(
  edit: Intervention,
  index: Array | int,
  latents: Array,
  x0_before: Array,
  noise: Array | None = None,
) -> tuple[Array, Array]:
  """(latents R F H W C after the edits of step `index`, R bool: the runs that were touched).

  First `mix_latents`, which mixes x0_before by the same rows; then x <- keep*x + to_x0*x0_before +
  noise_gain*noise per run and latent frame. A term whose number is 0 is left out, so `replace` is
  the noise itself whatever stood there.

  x0_before: the guess of the step before (`State.x0`, 0 before the first): the guess of this step
  needs the forward pass that the edit precedes. Under Euler they differ by sigma_i (v_{i-1} - v_i).
  noise: R F H W C, may be None without `noise` room. A multistep solver restarts the touched runs.
  """
  touched = jnp.zeros(latents.shape[0], bool)
  if edit.mix_latents is not None:
    mix = _row(whole(edit.mix_latents), index)
    latents, x0_before = _mixed(mix, (latents, x0_before), None)
    touched = touched | _moved(mix)
  if edit.noise_gain is not None and noise is None:
    raise ValueError("edit_latents got noise=None, wanted R F H W C: the edit has noise_gain.")
  rows = {name: _row(getattr(edit, name), index) for name in STILL}
  if any(row is not None for row in rows.values()):
    numbers = {n: None if r is None else rearrange(r, "r f -> r f 1 1 1") for n, r in rows.items()}
    latents = _combined(numbers, {"keep": latents, "to_x0": x0_before, "noise_gain": noise}, None)
    touched = touched | jnp.any(_changed(numbers), axis=(1, 2, 3, 4))
  return latents, touched


def _moved(mix: Array) -> Array:
  """R bool: the runs that rows R R write anew."""
  return jnp.any(mix != _eye(mix), axis=1)


def _mixed_formula(mix: Array, pair: tuple[Array, Array], _: None) -> tuple[Array, Array]:
  return _average(mix, pair[0], CELLS), _average(mix, pair[1], CELLS)


@by_formula(_mixed_formula)
def _mixed(mix: Array, pair: tuple[Array, Array], _: None) -> tuple[Array, Array]:
  """Latents and guess, R F H W C each, read through rows R R."""

  def apply(pair: tuple[Array, Array]) -> tuple[Array, Array]:
    return _mix_rows(mix, pair[0], CELLS), _mix_rows(mix, pair[1], CELLS)

  return jax.lax.cond(jnp.any(_moved(mix)), apply, lambda pair: pair, pair)


def _changed(numbers: Numbers) -> Array:
  """R F 1 1 1 bool: the frames whose numbers are not neutral."""
  said = [number != STILL[name] for name, number in numbers.items() if number is not None]
  return functools.reduce(jnp.logical_or, said)


def _combined_formula(numbers: Numbers, terms: Mapping[str, Any], _: None) -> Array:
  latents = terms["keep"]
  total = latents if numbers["keep"] is None else jnp.zeros_like(latents)
  for name, number in numbers.items():
    if number is not None:
      total = total + (number * terms[name]).astype(latents.dtype)
  return total


@by_formula(_combined_formula)
def _combined(numbers: Numbers, terms: Mapping[str, Any], _: None) -> Array:
  """keep*x + to_x0*x0_before + noise_gain*noise R F H W C; numbers R F 1 1 1, None = neutral."""
  latents = terms["keep"]
  total = latents if numbers["keep"] is None else jnp.zeros_like(latents)
  for name, number in numbers.items():
    if number is not None:
      term = jnp.where(number == 0, 0.0, number * terms[name])
      total = total + term.astype(latents.dtype)
  return jnp.where(_changed(numbers), total, latents)


def edit_output(
  edit: Intervention,
  index: Array | int,
  x0: Array,
  velocity: Array,
  latents: Array,
  sigma: Array | float,
) -> tuple[Array, Array]:
  """(x0, velocity), R F H W C each, after `mix_out` of step `index`.

  out = "x0": x0 is mixed and the velocity of touched rows rebuilt as (latents - x0) / sigma, each
  run with its own noise; out = "velocity": the velocity is mixed and x0 rebuilt as latents - sigma
  * velocity. Other rows keep their bits.
  """
  if edit.mix_out is None:
    return x0, velocity
  mix = _row(whole(edit.mix_out), index)
  return _MIXED[edit.out](mix, (x0, velocity, latents, jnp.asarray(sigma)), None)


Outputs: TypeAlias = tuple[Array, Array, Array, Array]  # x0, velocity, latents, sigma


def _mixer(out: str) -> Callable[[Array, Outputs, None], tuple[Array, Array]]:
  """What reads one of x0 and velocity through rows R R and rebuilds the other where they move."""

  def both(mixed: Array, outputs: Outputs) -> tuple[Array, Array]:
    x0, velocity, latents, sigma = outputs
    if out == "x0":
      return mixed, ((latents - mixed) / sigma).astype(velocity.dtype)
    return (latents - sigma * mixed).astype(x0.dtype), mixed

  place = OUTS.index(out)

  def formula(mix: Array, outputs: Outputs, _: None) -> tuple[Array, Array]:
    return both(_average(mix, outputs[place], CELLS), outputs)

  @by_formula(formula)
  def mixed(mix: Array, outputs: Outputs, _: None) -> tuple[Array, Array]:
    moved = _moved(mix)

    def apply(outputs: Outputs) -> tuple[Array, Array]:
      x0, velocity = both(_mix_rows(mix, outputs[place], CELLS), outputs)
      touched = rearrange(moved, "r -> r 1 1 1 1")
      return jnp.where(touched, x0, outputs[0]), jnp.where(touched, velocity, outputs[1])

    return jax.lax.cond(jnp.any(moved), apply, lambda outputs: outputs[:2], outputs)

  return mixed


_MIXED = {out: _mixer(out) for out in OUTS}


def _row(array: Array | None, index: Array | int) -> Any:
  if array is None:
    return None
  return jax.lax.dynamic_index_in_dim(jnp.asarray(array), index, keepdims=False)


def _eye(mix: Array) -> Array:
  return jnp.eye(mix.shape[-1], dtype=jnp.float32)


def _over_runs(row: Array) -> Array:
  return rearrange(row.astype(jnp.float32), "r -> 1 r 1 1")


def _over_tokens(direction: Array) -> Array:
  return rearrange(direction.astype(jnp.float32), "d -> 1 1 1 d")


def _average(mix: Array, value: Array, letters: str) -> Array:
  """`value`, whose axes are `letters`, with every row of mix R R multiplied."""

  def rows(everyone: Array, mine: Callable[[Array], Array]) -> Array:
    return _weighted(mine(mix), everyone, letters)

  return over_runs(rows, value, letters)


def _weighted(mix: Array, everyone: Array, letters: str) -> Array:
  """Rows of mix times all runs, in float32, in the dtype of these."""
  pattern = "rs,s...->r..." if letters.split().index("r") == 0 else "rs,gs...->gr..."
  total = jnp.einsum(
    pattern, mix, everyone.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
  )
  return total.astype(everyone.dtype)


def _mix_rows(mix: Array, value: Array, letters: str) -> Array:
  """`value`, whose axes are `letters`, with its runs read through the rows of mix R R.

  A row with a single 1 gathers, so it is exact and NaN of the runs it does not name stays away; a
  row of zeros is 0. Where runs lie on several devices, these exchange `value` along `seed` alone.
  """
  mix, axis = whole(mix), letters.split().index("r")
  ones, zeros = mix == 1, mix == 0
  empty = jnp.all(zeros, axis=1)
  exact = empty | ((ones.sum(axis=1) == 1) & jnp.all(ones | zeros, axis=1))
  source = jnp.where(exact & ~empty, jnp.argmax(ones, axis=1), jnp.arange(mix.shape[0]))

  def rows(everyone: Array, mine: Callable[[Array], Array]) -> Array:
    """The rows of this device from all R runs; `mine` takes them out of an array by row."""

    def shaped(flags: Array) -> Array:
      return jnp.expand_dims(mine(flags), [i for i in range(value.ndim) if i != axis])

    taken = jnp.take(everyone, mine(source), axis=axis, mode="clip")
    taken = jnp.where(shaped(empty), jnp.zeros_like(taken), taken)

    def averaged(taken: Array) -> Array:
      return jnp.where(shaped(exact), taken, _weighted(mine(mix), everyone, letters))

    return jax.lax.cond(jnp.any(~exact), averaged, lambda taken: taken, taken)

  return over_runs(rows, value, letters)
