"""Changes to a run while it runs: an `Intervention`, a pytree of arrays over steps and layers.

First the nouns, then what the sampler and the model call, then the constructors: pure functions
from an Intervention to an Intervention, which compose. They stay in numpy while every value is
known, so that faults are found before anything runs; a traced step, layer, run or number works
too, without those checks. A second edit of one kind acts on the result of the first; the kinds act
in the order mix, gate, steer, whatever the order of the calls.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_videoreason.axes import Array
from jax_videoreason.pytrees import pytree, static
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import SITES

BLOCK_UPDATE = ("attn_out", "cross_out", "mlp_out")
ROOM = ("mix_latents", "noise", "mix_out", "mix", "gate", "steer", "tokens")
NOISE_MODES = ("replace", "add", "add_sigma", "renoise")
ENSEMBLES = {"resid": ("resid_post",), "update": BLOCK_UPDATE, "attn": ("attn_out",)}
Select = int | slice | Sequence[int] | ArrayLike | None


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
  tokens: S R T bool, which tokens any block edit touches; None = all.
  branches: G bool, which guidance branches; None = all.
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
  tokens: Array | None = None
  branches: Array | None = None
  sites: tuple[str, ...] = static(default=())
  out: str = static(default="x0")


@pytree
class BlockEdits:
  """The rows of an Intervention that act inside the blocks at one step.

  L leads mix, gate, steer and direction; `layer_edits` takes it away.
  mix: L R R; gate, steer: L R; direction: L D; tokens: R T bool; branches: G bool.
  """

  mix: Array | None = None
  gate: Array | None = None
  steer: Array | None = None
  direction: Array | None = None
  tokens: Array | None = None
  branches: Array | None = None
  sites: tuple[str, ...] = static(default=())


@pytree
class At:
  """Where an edit acts, made by `where`; None = everywhere.

  steps: S bool. layers: L bool. frames: F bool, latent frames. region: R T bool, tokens.
  branches: G bool.
  """

  steps: Array | None = None
  layers: Array | None = None
  frames: Array | None = None
  region: Array | None = None
  branches: Array | None = None
  sizes: Sizes = static()


# What the sampler and the model call


def step_edits(edit: Intervention, index: Array | int) -> BlockEdits | None:
  """The block edits of step `index` of the whole schedule; None where the structure has none."""
  if not edit.sites or (edit.mix is None and edit.gate is None and edit.steer is None):
    return None
  return BlockEdits(
    mix=_row(edit.mix, index),
    gate=_row(edit.gate, index),
    steer=_row(edit.steer, index),
    direction=None if edit.steer is None else edit.direction,
    tokens=_row(edit.tokens, index),
    branches=edit.branches,
    sites=edit.sites,
  )


def layer_edits(edits: BlockEdits, layer: Array | int) -> BlockEdits:
  """The edits of one layer, as a layer scan hands them on: mix R R; gate, steer R; direction D."""
  return dataclasses.replace(
    edits,
    mix=_row(edits.mix, layer),
    gate=_row(edits.gate, layer),
    steer=_row(edits.steer, layer),
    direction=_row(edits.direction, layer),
  )


def edit_site(value: Array, edits: BlockEdits | None, site: str) -> Array:
  """The value G R T D at `site` of one layer after its edits, in the order mix, gate, steer.

  edits: one layer's (no L axis). Cells that no edit touches keep their bits; a row of mix with a
  single 1 is gathered; only true averages are multiplied, in float32. Where nothing is active at
  this layer the value passes through one `cond`.
  """
  if edits is None or site not in edits.sites:
    return value
  active = [] if edits.mix is None else [jnp.any(edits.mix != _eye(edits.mix))]
  active += [] if edits.gate is None else [jnp.any(edits.gate != 1)]
  active += [] if edits.steer is None else [jnp.any(edits.steer != 0)]
  if not active:
    return value

  def apply(value: Array) -> Array:
    made = value
    if edits.mix is not None:
      made = _mix_rows(edits.mix, made, axis=1)
    if edits.gate is not None:
      gate = _over_runs(edits.gate)
      scaled = (gate * made.astype(jnp.float32)).astype(value.dtype)
      scaled = jnp.where(gate == 0, jnp.zeros_like(made), scaled)
      made = jnp.where(gate == 1, made, scaled)
    if edits.steer is not None and edits.direction is not None:
      gain = _over_runs(edits.steer)
      push = gain * rearrange(edits.direction.astype(jnp.float32), "d -> 1 1 1 d")
      steered = (made.astype(jnp.float32) + push).astype(value.dtype)
      made = jnp.where(gain == 0, made, steered)
    for mask, pattern in ((edits.tokens, "r t -> 1 r t 1"), (edits.branches, "g -> g 1 1 1")):
      if mask is not None:
        made = jnp.where(rearrange(mask, pattern), made, value)
    return made

  return jax.lax.cond(jnp.any(jnp.stack(active)), apply, lambda value: value, value)


def wants_noise(edit: Intervention, index: Array | int) -> Array:
  """bool scalar: does `edit` inject noise at step `index`? It is drawn under a cond on this."""
  if edit.noise_gain is None:
    return jnp.zeros((), bool)
  return jnp.any(_row(edit.noise_gain, index) != 0)


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
    mix = _row(edit.mix_latents, index)
    moved = jnp.any(mix != _eye(mix), axis=1)

    def mixed(pair: tuple[Array, Array], mix: Array = mix) -> tuple[Array, Array]:
      return _mix_rows(mix, pair[0], axis=0), _mix_rows(mix, pair[1], axis=0)

    latents, x0_before = jax.lax.cond(
      jnp.any(moved), mixed, lambda pair: pair, (latents, x0_before)
    )
    touched = touched | moved
  numbers = (edit.keep, edit.to_x0, edit.noise_gain)
  if any(number is not None for number in numbers):
    if edit.noise_gain is not None and noise is None:
      raise ValueError("edit_latents got noise=None, wanted R F H W C: the edit has noise_gain.")
    total = jnp.zeros_like(latents)
    changed = jnp.zeros((*latents.shape[:2], 1, 1, 1), bool)
    for number, term, still in zip(numbers, (latents, x0_before, noise), (1, 0, 0), strict=True):
      if number is not None:
        number = rearrange(_row(number, index), "r f -> r f 1 1 1")
        changed = changed | (number != still)
        total = total + jnp.where(number == 0, 0.0, number * term).astype(latents.dtype)
      elif still:
        total = latents
    latents = jnp.where(changed, total, latents)
    touched = touched | jnp.any(changed, axis=(1, 2, 3, 4))
  return latents, touched


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
  mix = _row(edit.mix_out, index)
  moved = jnp.any(mix != _eye(mix), axis=1)

  def apply(pair: tuple[Array, Array]) -> tuple[Array, Array]:
    x0, velocity = pair
    rows = rearrange(moved, "r -> r 1 1 1 1")
    if edit.out == "x0":
      mixed = _mix_rows(mix, x0, axis=0)
      rebuilt = ((latents - mixed) / sigma).astype(velocity.dtype)
      return mixed, jnp.where(rows, rebuilt, velocity)
    mixed = _mix_rows(mix, velocity, axis=0)
    return jnp.where(rows, (latents - sigma * mixed).astype(x0.dtype), x0), mixed

  return jax.lax.cond(jnp.any(moved), apply, lambda pair: pair, (x0, velocity))


def _row(array: Array | None, index: Array | int) -> Any:
  if array is None:
    return None
  return jax.lax.dynamic_index_in_dim(jnp.asarray(array), index, keepdims=False)


def _eye(mix: Array) -> Array:
  return jnp.eye(mix.shape[-1], dtype=jnp.float32)


def _over_runs(row: Array) -> Array:
  return rearrange(row.astype(jnp.float32), "r -> 1 r 1 1")


def _mix_rows(mix: Array, value: Array, axis: int) -> Array:
  """`value` with its run axis (0 or 1) read through the rows of mix R R.

  A row with a single 1 gathers, so it is exact and NaN of the runs it does not name stays away; a
  row of zeros is 0.
  """
  ones, zeros = mix == 1, mix == 0
  shape = [1] * value.ndim
  shape[axis] = mix.shape[0]
  empty = jnp.all(zeros, axis=1)
  exact = empty | ((ones.sum(axis=1) == 1) & jnp.all(ones | zeros, axis=1))
  source = jnp.where(exact & ~empty, jnp.argmax(ones, axis=1), jnp.arange(mix.shape[0]))
  taken = jnp.take(value, source, axis=axis, mode="clip")
  taken = jnp.where(jnp.reshape(empty, shape), jnp.zeros_like(taken), taken)

  def averaged(taken: Array) -> Array:
    letters = "rs,s...->r..." if axis == 0 else "rs,gs...->gr..."
    total = jnp.einsum(letters, mix, value.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(jnp.reshape(exact, shape), taken, total.astype(value.dtype))

  return jax.lax.cond(jnp.any(~exact), averaged, lambda taken: taken, taken)


# Constructors


def identity(
  sizes: Sizes, edits: Sequence[str] = (), sites: Sequence[str] = (), *, out: str = "x0"
) -> Intervention:
  """An Intervention without effect, with room for `edits` (of `ROOM`) at `sites`.

  Room is part of the compiled program: a sweep starts from an identity that has all it will need.
  "noise" is keep, to_x0 and noise_gain; "steer" brings its direction.
  Errors: ValueError for an edit or site that does not exist, or block edits without a site.
  """
  for name in edits:
    if name not in ROOM:
      raise ValueError(f"no edit '{name}' to make room for; there are: {', '.join(ROOM)}.")
  if out not in ("x0", "velocity"):
    raise ValueError(f"out='{out}', wanted 'x0' or 'velocity'.")
  inside = {"mix", "gate", "steer", "tokens"} & set(edits)
  if inside and not sites:
    raise ValueError(f"room for '{min(inside)}' needs a site: sites=({_sites(sizes)[1]!r},), say.")
  room: dict[str, Any] = {}
  for name in edits:
    room |= _room(name, sizes)
  return Intervention(sites=_known_sites(sizes, sites), out=out, **room)


def where(
  sizes: Sizes,
  *,
  steps: Select = None,
  layers: Select = None,
  frames: Select = None,
  region: ArrayLike | None = None,
  branches: Select = None,
) -> At:
  """Where an edit acts; None = everywhere.

  steps (of the whole schedule), layers, frames (latent) and branches (0 with the prompt): an
  index, indices, a slice, or a mask of their length. An index may be traced: all its values are
  one compilation. region: bool, which tokens, T or (f, h, w) for all runs alike, R T or
  (R, f, h, w) for each; it is cut with `frames`.
  Errors: ValueError for an index outside, a selection of nothing, or a mask of the wrong shape.
  """
  return At(
    steps=_select("steps", steps, sizes.S),
    layers=_select("layers", layers, sizes.L),
    frames=_select("frames", frames, sizes.F),
    region=None if region is None else _region(region, sizes),
    branches=_select("branches", branches, sizes.G),
    sizes=sizes,
  )


def noise_at(
  edit: Intervention,
  at: At,
  *,
  mode: str,
  gain: ArrayLike = 1.0,
  sigma: ArrayLike | None = None,
  runs: Select = None,
) -> Intervention:
  """Noise on the latents of some steps and latent frames, before the model sees them.

  mode: "replace" x <- noise; "add" x + gain*noise; "add_sigma" x + gain*sigma*noise;
  "renoise" (1-sigma)*x0_before + sigma*noise, which keeps the guess and stays on the noise level.
  x0_before is the guess of the step before; at the first step of a schedule it is 0 and sigma 1,
  so `renoise` is `replace`. gain: a number or one per step (S), for the two that add.
  sigma: S or S+1, `Schedule.sigma` of the whole schedule, for "add_sigma" and "renoise".
  Every edit of one step shares one draw of noise per run. Acts on steps and frames of `at` only.
  Errors: ValueError for an unknown mode, a sigma that is missing, a gain that has no meaning.
  """
  if mode not in NOISE_MODES:
    raise ValueError(f"no noise mode '{mode}'; there are: {', '.join(NOISE_MODES)}.")
  _refuse(at, "noise_at", "layers", "region", "branches")
  sizes = at.sizes
  if mode in ("replace", "renoise") and not (_known(gain) and np.all(np.asarray(gain) == 1)):
    raise ValueError(f"gain has no meaning for mode='{mode}': leave it out, or use mode='add'.")
  level = _per_step("gain", gain, sizes.S)
  if mode in ("add_sigma", "renoise"):
    level = level * _sigmas(sigma, sizes.S, f"mode='{mode}'")
  if mode == "replace":
    keep, to_x0, level = 0.0, 0.0, 1.0
  elif mode == "renoise":
    keep, to_x0 = 0.0, 1 - level
  else:
    keep, to_x0 = 1.0, 0.0
  mask = _mask(at.steps, sizes.S)[:, None, None] & _mask(at.frames, sizes.F)[None, None, :]
  mask = mask & _mask(_select("runs", runs, sizes.R), sizes.R)[None, :, None]
  return _affine(_with_room(edit, sizes, "noise"), mask, keep, to_x0, level)


def swap_runs(
  edit: Intervention, at: At, a: Select, b: Select, *, sites: Sequence[str] | None = None
) -> Intervention:
  """Runs a and b exchange what they hold at the sites. a, b: a run each, or runs pair by pair.

  A block sees only the stream, the text, the timestep and the positions. So if two runs share
  text and timestep, exchanging their *whole* residual stream makes all that follows the other
  run: the same result at every layer, to the last bit. A layer sweep says something only with
  a region or frames, with a site inside the block (`BLOCK_UPDATE`), or with different texts.

  Where runs carry different regions, each is written under its own. Twice the same swap is none.
  sites: None = those of `edit`. Errors: ValueError, as for `patch_runs`.
  """
  ones, others = _pairs("a", a, "b", b, at.sizes.R)
  space = _space(ones, others)
  target = space.concatenate([ones, others])
  if _known(target) and len(set(target.tolist())) != len(target):
    raise ValueError(f"a={a}, b={b} name a run twice: swap disjoint pairs.")
  return _gather(edit, at, space.concatenate([others, ones]), target, sites)


def patch_runs(
  edit: Intervention,
  at: At,
  *,
  source: Select,
  target: Select,
  sites: Sequence[str] | None = None,
) -> Intervention:
  """Runs `target` take what runs `source` hold at the sites, pair by pair or one source for all.

  The source is read at the same layer and step, so it must ride in the batch, and is what it was
  only if its own row is left alone. Where the whole stream is patched, see `swap_runs`.
  sites: None = those of `edit`.
  Errors: ValueError for runs that do not exist, a target named twice, no site, sites other than
  those of `edit`, and a second edit at the same step and run under another region.
  """
  read, written = _pairs("source", source, "target", target, at.sizes.R)
  if _known(written) and len(set(written.tolist())) != len(written):
    raise ValueError(f"target={target} names a run twice: give each target one source.")
  return _gather(edit, at, read, written, sites)


def ensemble_runs(
  edit: Intervention,
  at: At,
  runs: Sequence[Select],
  *,
  what: str = "update",
  weights: ArrayLike | str = "mean",
  keep: str = "first",
  amount: ArrayLike = 1.0,
  sigma: ArrayLike | None = None,
  out: str | None = None,
) -> Intervention:
  """Runs are averaged: the training-free ensemble and its variants (paper.md 6.4).

  runs: (a, b, c), a run each, or index arrays that are joined member by member.
  what: "resid" at resid_post; "update" at the three terms of the block; "attn" at attn_out;
  "out" the guess, x0 or velocity (`out`, None = that of `edit`); "latents" before the model.
  weights: "mean", or n or S n numbers that sum to 1 (`closeness_weights`). keep: "first" writes
  the first run of each group, "all" writes every one. amount: a in (1-a)*own + a*average.

  Averaged noise is too small by the length of the row of weights, 1/sqrt(n) for a mean; so
  "latents" goes back on the noise level with keep = 1/length, to_x0 = (1-keep)(1-sigma), where
  x0_before is averaged by the same row. It needs sigma (S or S+1, of the whole schedule).
  Whole residual streams averaged over runs that share text make these runs equal from there on,
  so a range of layers is its first layer: use "update", a region, or amount < 1.
  Errors: ValueError for fewer than two runs, a run named twice, weights that don't sum to 1, a
  place in `at` that `what` does not have, and latents that already carry noise edits.
  """
  known = (*ENSEMBLES, "out", "latents")
  if what not in known:
    raise ValueError(f"no ensemble of '{what}'; there are: {', '.join(known)}.")
  if keep not in ("first", "all"):
    raise ValueError(f"keep='{keep}', wanted 'first' or 'all'.")
  sizes = at.sizes
  rows, written = _ensemble_rows(sizes, runs, weights, keep, amount)
  steps = _mask(at.steps, sizes.S)[:, None] & written[None]
  if what in ENSEMBLES:
    edit = _with_sites(edit, sizes, ENSEMBLES[what])
    edit = _with_place(edit, at, written)
    mask = steps[:, None] & _mask(at.layers, sizes.L)[None, :, None]
    edit = _with_room(edit, sizes, "mix")
    return dataclasses.replace(edit, mix=_compose(edit.mix, mask, rows[:, None]))
  _refuse(at, f"an ensemble of {what}", "layers", "frames", "region", "branches")
  if what == "out":
    return _with_out(edit, sizes, out, steps, rows)
  edit = _with_room(_with_room(edit, sizes, "mix_latents"), sizes, "noise")
  noised = _noised(edit)
  if _known(noised, steps) and np.any(noised & steps):
    step, run = np.argwhere(np.asarray(noised) & np.asarray(steps))[0].tolist()
    raise ValueError(
      f"latents of run {run} at step {step} already have a noise edit, which acts after the "
      "average: call ensemble_runs first."
    )
  space = _space(rows)
  sharpen = 1 / space.sqrt((rows**2).sum(axis=-1))
  to_x0 = (1 - sharpen) * (1 - _sigmas(sigma, sizes.S, "what='latents'"))[:, None]
  edit = dataclasses.replace(edit, mix_latents=_compose(edit.mix_latents, steps, rows))
  mask = steps[..., None] & np.ones((1, 1, sizes.F), bool)
  return _affine(edit, mask, sharpen[..., None], to_x0[..., None], 0.0)


def closeness_weights(values: ArrayLike, temperature: ArrayLike = 1.0) -> Array:
  """n weights, softmax of -distance to the mean, for `ensemble_runs`. values: n ..., x0 say.

  Distances are divided by their mean, so the temperature has no unit; equal values get 1/n.
  """
  x = rearrange(jnp.asarray(values, jnp.float32), "n ... -> n (...)")
  distance = jnp.linalg.norm(x - x.mean(axis=0, keepdims=True), axis=1)
  scale = jnp.where(distance.mean() == 0, 1.0, distance.mean())
  return jax.nn.softmax(-distance / scale / temperature)


def ablate(
  edit: Intervention,
  at: At,
  *,
  runs: Select = None,
  gate: ArrayLike = 0.0,
  sites: Sequence[str] | None = None,
) -> Intervention:
  """Scales the value at the sites by `gate`: 0 removes it. runs: None = all; sites: as patch_runs.

  At attn_out, cross_out and mlp_out this is the term before it is added, x + gate*u. A gate of
  exactly 0 writes zeros, whatever stood there, and 1 leaves the bits.
  """
  sizes = at.sizes
  edit, mask = _inside(edit, at, _mask(_select("runs", runs, sizes.R), sizes.R), sites, "gate")
  return dataclasses.replace(edit, gate=_put(mask, edit.gate * _scalar("gate", gate), edit.gate))


def steer(
  edit: Intervention,
  at: At,
  direction: ArrayLike,
  *,
  gain: ArrayLike = 1.0,
  runs: Select = None,
  sites: Sequence[str] | None = None,
) -> Intervention:
  """Adds gain * direction to every token at the sites; gains of repeated calls add up.

  direction: D, or L D for one per layer; its length counts. runs: None = all; sites: as patch_runs.
  Errors: ValueError for another direction in a layer that already has a gain: a layer has one.
  """
  sizes = at.sizes
  edit, mask = _inside(edit, at, _mask(_select("runs", runs, sizes.R), sizes.R), sites, "steer")
  space = _space(direction, edit.direction, edit.steer, at.layers)
  wanted = space.asarray(direction, dtype=np.float32)
  if wanted.shape not in ((sizes.D,), (sizes.L, sizes.D)):
    raise ValueError(
      f"direction is {tuple(wanted.shape)}, wanted D = ({sizes.D},) or "
      f"L D = ({sizes.L}, {sizes.D})."
    )
  wanted = space.broadcast_to(wanted if wanted.ndim == 2 else wanted[None], (sizes.L, sizes.D))
  layers = _mask(at.layers, sizes.L)
  if _known(edit.steer, edit.direction, layers, wanted):
    used = np.any(np.asarray(edit.steer) != 0, axis=(0, 2)) & np.asarray(layers)
    other = np.any(np.asarray(edit.direction) != np.asarray(wanted), axis=1)
    if np.any(used & other):
      raise ValueError(
        f"layer {int(np.argmax(used & other))} already steers along another direction; a layer "
        "has one: add the directions first."
      )
  return dataclasses.replace(
    edit,
    steer=_put(mask, edit.steer + _scalar("gain", gain), edit.steer),
    direction=_put(layers[:, None], wanted, edit.direction),
  )


def check_edit(edit: Intervention, sizes: Sizes) -> None:
  """ValueError with every fault of an Intervention for a problem of these sizes.

  Shapes always; where values are known, also that rows of mixes sum to 1 (only `ablate`, which is
  a gate, takes something away), and that nothing is lost for want of a site or a partner field.
  """
  faults = []
  block = {"mix", "gate", "steer"}
  for field, letters in _LETTERS.items():
    value = getattr(edit, field)
    if value is None:
      continue
    wanted = tuple(getattr(sizes, letter) for letter in letters)
    if tuple(value.shape) != wanted:
      faults.append(f"{field} {' '.join(letters)} is {tuple(value.shape)}, wanted {wanted}.")
    elif field.startswith("mix") and _known(value):
      faults += _row_faults(field, value)
    if field in block and not edit.sites:
      faults.append(f"{field} has no site to act at: set sites, e.g. sites={BLOCK_UPDATE}.")
  if (edit.steer is None) != (edit.direction is None):
    faults.append("steer and direction come together: give both or neither.")
  if edit.out not in ("x0", "velocity"):
    faults.append(f"out='{edit.out}', wanted 'x0' or 'velocity'.")
  if faults:
    raise ValueError(" ".join(faults))
  _known_sites(sizes, edit.sites)


_LETTERS = {
  "mix_latents": "SRR",
  "keep": "SRF",
  "to_x0": "SRF",
  "noise_gain": "SRF",
  "mix_out": "SRR",
  "mix": "SLRR",
  "gate": "SLR",
  "steer": "SLR",
  "direction": "LD",
  "tokens": "SRT",
  "branches": "G",
}


def _space(*values: Any) -> Any:
  """numpy while all values are known, so that they can be checked; jax.numpy under a trace."""
  return np if _known(*values) else jnp


def _known(*values: Any) -> bool:
  for value in jax.tree.leaves(values):
    if isinstance(value, Tracer):
      return False
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
      return False
  return True


def _put(mask: Any, value: Any, old: Any) -> Any:
  """old with value where mask, float32."""
  space = _space(mask, value, old)
  return space.where(mask, value, old).astype(np.float32)


def _number(value: Any) -> Any:
  return _space(value).asarray(value, dtype=np.float32)


def _scalar(name: str, value: Any) -> Any:
  number = _number(value)
  if number.shape != ():
    raise ValueError(f"{name} is {tuple(number.shape)}, wanted one number.")
  return number


def _mask(selection: Any, size: int) -> Any:
  return np.ones(size, bool) if selection is None else selection


def _room(name: str, sizes: Sizes) -> dict[str, Any]:
  def of(field: str, value: float | bool) -> dict[str, Any]:
    shape = tuple(getattr(sizes, letter) for letter in _LETTERS[field])
    return {field: np.full(shape, value, bool if field == "tokens" else np.float32)}

  if name == "noise":
    return of("keep", 1) | of("to_x0", 0) | of("noise_gain", 0)
  if name == "steer":
    return of("steer", 0) | of("direction", 0)
  if name in ("gate", "tokens"):
    return of(name, 1)
  return {name: of(name, 0)[name] + np.eye(sizes.R, dtype=np.float32)}


def _with_room(edit: Intervention, sizes: Sizes, name: str) -> Intervention:
  """`edit` with every field of `name`; fields that are there are checked and left alone."""
  made = {}
  for field, value in _room(name, sizes).items():
    old = getattr(edit, field)
    if old is None:
      made[field] = value
    elif old.shape != value.shape:
      letters = " ".join(_LETTERS[field])
      raise ValueError(
        f"the edit has {field} {letters} = {tuple(old.shape)}, `at` is made for {value.shape}: "
        "make both from the same sizes."
      )
  return dataclasses.replace(edit, **made)


def _sites(sizes: Sizes) -> tuple[str, ...]:
  return sizes.sites or SITES


def _known_sites(sizes: Sizes, sites: Sequence[str]) -> tuple[str, ...]:
  if isinstance(sites, str):
    raise ValueError(f"sites='{sites}', wanted a tuple: sites=('{sites}',).")
  for site in sites:
    if site == "update":
      raise ValueError(f"the site 'update' is for taps alone; its terms are {BLOCK_UPDATE}.")
    if site not in _sites(sizes):
      raise ValueError(f"no site '{site}' to edit; there are: {', '.join(_sites(sizes))}.")
  return tuple(sites)


def _with_sites(edit: Intervention, sizes: Sizes, sites: Sequence[str] | None) -> Intervention:
  """`edit` with its sites set; an Intervention has one set of sites for all its block edits."""
  if sites is None:
    if not edit.sites:
      names = ", ".join(_sites(sizes))
      raise ValueError(f"the edit has no site: pass sites=(...), some of {names}.")
    return edit
  sites = _known_sites(sizes, sites)
  if not sites:
    raise ValueError(f"sites=() edits nothing: pass some of {', '.join(_sites(sizes))}.")
  if edit.sites and set(edit.sites) != set(sites):
    raise ValueError(
      f"the edit acts at {edit.sites}, this one at {sites}; an Intervention has one set of sites: "
      "start from an identity with room at these."
    )
  return edit if edit.sites else dataclasses.replace(edit, sites=sites)


def _select(name: str, which: Any, size: int) -> Any:
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
    index = _space(which).asarray(which)
  if index.dtype == bool:
    if index.shape != (size,):
      raise ValueError(f"the mask {name} is {tuple(index.shape)}, wanted ({size},).")
    return index
  if index.ndim > 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
    raise ValueError(f"{name}={which!r}, wanted indices 0..{last}, a slice or a mask of {size}.")
  if index.size == 0:
    raise ValueError(f"{name}={which!r} selects nothing: for no edit use identity(sizes, ...).")
  if _known(index) and (index.min() < 0 or index.max() > last):
    wrong = index.min() if index.min() < 0 else index.max()
    raise ValueError(f"{name}={wrong} does not exist: there are {size}, 0..{last}.")
  space = _space(index)
  return space.any(space.arange(size)[:, None] == space.reshape(index, (1, -1)), axis=1)


def _region(region: ArrayLike, sizes: Sizes) -> Any:
  """R T bool of a region in one of its four layouts."""
  space = _space(region)
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
  return space.broadcast_to(mask, (sizes.R, sizes.T))


def _tokens(at: At) -> Any:
  """R T bool: the tokens of the frames and the region of `at`; None = all."""
  mask, sizes = at.region, at.sizes
  if at.frames is not None:
    if sizes.T % sizes.F:
      raise ValueError(f"T={sizes.T} tokens are not F={sizes.F} equal frames: pass region instead.")
    space = _space(at.frames)
    tokens = space.repeat(at.frames, sizes.T // sizes.F)[None]
    tokens = space.broadcast_to(tokens, (sizes.R, sizes.T))
    mask = tokens if mask is None else mask & tokens
  return mask


def _refuse(at: At, who: str, *names: str) -> None:
  for name in names:
    if getattr(at, name) is not None:
      raise ValueError(f"{who} has no {name}: leave it out of where(...).")


def _per_step(name: str, value: ArrayLike, steps: int) -> Any:
  number = _number(value)
  if number.shape not in ((), (steps,)):
    raise ValueError(f"{name} is {tuple(number.shape)}, wanted a number or S = ({steps},).")
  return _space(number).broadcast_to(number, (steps,))


def _sigmas(sigma: ArrayLike | None, steps: int, who: str) -> Any:
  if sigma is None:
    raise ValueError(f"{who} needs sigma (S or S+1), got None: pass schedule.sigma.")
  number = _number(sigma)
  if number.shape not in ((steps,), (steps + 1,)):
    raise ValueError(
      f"sigma is {tuple(number.shape)}, wanted ({steps},) or ({steps + 1},): pass that of the "
      "whole schedule."
    )
  return number[:steps]


def _affine(edit: Intervention, mask: Any, keep: Any, to_x0: Any, gain: Any) -> Intervention:
  """x <- keep*x + to_x0*x0 + gain*noise after the edit's own three numbers, where mask S R F."""

  def shaped(value: Any) -> Any:
    return value[:, None, None] if np.ndim(value) == 1 else value

  keep, to_x0, gain = shaped(keep), shaped(to_x0), shaped(gain)
  return dataclasses.replace(
    edit,
    keep=_put(mask, keep * edit.keep, edit.keep),
    to_x0=_put(mask, keep * edit.to_x0 + to_x0, edit.to_x0),
    noise_gain=_put(mask, keep * edit.noise_gain + gain, edit.noise_gain),
  )


def _noised(edit: Intervention) -> Any:
  """S R bool: the runs whose latents the three numbers change."""
  return ((edit.keep != 1) | (edit.to_x0 != 0) | (edit.noise_gain != 0)).any(axis=2)


def _pairs(name_a: str, a: Any, name_b: str, b: Any, runs: int) -> tuple[Any, Any]:
  """Two index arrays of one length; a single run is paired with all."""
  indices = []
  for name, given in ((name_a, a), (name_b, b)):
    index = _space(given).asarray(given)
    if not np.issubdtype(index.dtype, np.integer) or index.ndim > 1 or index.size == 0:
      raise ValueError(f"{name}={given!r}, wanted a run or several of 0..{runs - 1}.")
    if _known(index) and (index.min() < 0 or index.max() >= runs):
      raise ValueError(f"{name}={index.tolist()}: the batch has the runs 0..{runs - 1}.")
    indices.append(_space(index).reshape(index, (-1,)))
  one, two = indices
  if one.shape == (1,):
    one = _space(one).broadcast_to(one, two.shape)
  if one.shape != two.shape:
    raise ValueError(f"{len(one)} {name_a} and {len(two)} {name_b}: give them pair by pair.")
  return one, two


def _gather(
  edit: Intervention, at: At, source: Any, target: Any, sites: Sequence[str] | None
) -> Intervention:
  """Rows `target` of mix become what rows `source` were."""
  runs = at.sizes.R
  if _known(source, target):
    read = np.arange(runs)
    read[target] = source
    written = np.isin(np.arange(runs), target)
  else:
    read = jnp.arange(runs).at[target].set(source)
    written = jnp.isin(jnp.arange(runs), target)
  edit, mask = _inside(edit, at, written, sites, "mix")
  old = _space(edit.mix, read).asarray(edit.mix)
  mix = _put(mask[..., None], _space(old, read).take(old, read, axis=2, mode="clip"), old)
  return dataclasses.replace(edit, mix=mix)


def _inside(
  edit: Intervention, at: At, written: Any, sites: Sequence[str] | None, name: str
) -> tuple[Intervention, Any]:
  """`edit` with room, sites, tokens and branches for a block edit, and its mask S L R."""
  sizes = at.sizes
  edit = _with_place(_with_sites(edit, sizes, sites), at, written)
  mask = _mask(at.steps, sizes.S)[:, None, None] & _mask(at.layers, sizes.L)[None, :, None]
  return _with_room(edit, sizes, name), mask & written[None, None, :]


def _with_place(edit: Intervention, at: At, written: Any) -> Intervention:
  """`edit` with the tokens and branches of `at`, refused where another edit holds them already."""
  sizes = at.sizes
  check_edit(edit, sizes)
  cells = _mask(at.steps, sizes.S)[:, None] & written[None, :]
  busy = _busy(edit, sizes)
  tokens = _tokens(at)
  if tokens is not None or edit.tokens is not None:
    edit = _with_room(edit, sizes, "tokens")
    wanted = np.ones((1, 1, 1), bool) if tokens is None else tokens[None]
    if _known(busy, cells, wanted, edit.tokens):
      clash = np.any(np.asarray(edit.tokens) != np.asarray(wanted), axis=2) & busy & cells
      if clash.any():
        step, run = np.argwhere(clash)[0].tolist()
        raise ValueError(
          f"run {run} at step {step} is already edited under another token mask; there is one per "
          "step and run: use the same frames and region, or another run."
        )
    space = _space(cells, wanted, edit.tokens)
    edit = dataclasses.replace(edit, tokens=space.where(cells[..., None], wanted, edit.tokens))
  if at.branches is not None or edit.branches is not None:
    old = _mask(edit.branches, sizes.G)
    wanted = _mask(at.branches, sizes.G)
    if _known(busy, old, wanted) and np.any(busy) and np.any(np.asarray(old) != np.asarray(wanted)):
      raise ValueError(
        f"the edit acts on branches {np.flatnonzero(old).tolist()}, this one on "
        f"{np.flatnonzero(wanted).tolist()}; an Intervention has one set: give both the same."
      )
    edit = dataclasses.replace(edit, branches=wanted)
  return edit


def _busy(edit: Intervention, sizes: Sizes) -> Any:
  """S R bool: where some layer already has a block edit."""
  space = _space(edit.mix, edit.gate, edit.steer)
  busy = space.zeros((sizes.S, sizes.R), bool)
  if edit.mix is not None:
    busy = busy | space.any(edit.mix != np.eye(sizes.R, dtype=np.float32)[None, None], axis=(1, 3))
  if edit.gate is not None:
    busy = busy | space.any(edit.gate != 1, axis=1)
  if edit.steer is not None:
    busy = busy | space.any(edit.steer != 0, axis=1)
  return busy


def _ensemble_rows(
  sizes: Sizes, runs: Sequence[Any], weights: Any, keep: str, amount: Any
) -> tuple[Any, np.ndarray]:
  """S R R rows of the average, own rows elsewhere, and R bool: which are written."""
  members = [np.reshape(np.asarray(run), (-1,)) for run in runs]
  if len(members) < 2:
    raise ValueError(f"an ensemble of {len(members)} runs, wanted two or more: runs=(a, b, ...).")
  if len({len(member) for member in members}) != 1:
    raise ValueError(f"runs have lengths {[len(m) for m in members]}: give them group by group.")
  groups = np.stack(members, axis=1)
  if not np.issubdtype(groups.dtype, np.integer) or groups.min() < 0 or groups.max() >= sizes.R:
    raise ValueError(f"runs={groups.T.tolist()}: the batch has the runs 0..{sizes.R - 1}.")
  if len(set(groups.ravel().tolist())) != groups.size:
    raise ValueError(f"runs={groups.T.tolist()} name a run twice: a run has one group.")
  n = groups.shape[1]
  if isinstance(weights, str):
    if weights != "mean":
      raise ValueError(f"weights='{weights}', wanted 'mean' or numbers (closeness_weights).")
    weights = np.full(n, 1 / n, np.float32)
  share = _number(weights)
  if share.shape not in ((n,), (sizes.S, n)):
    raise ValueError(f"weights are {tuple(share.shape)}, wanted n = ({n},) or ({sizes.S}, {n}).")
  if _known(share) and np.any(np.abs(share.sum(axis=-1) - 1) > 1e-4):
    raise ValueError(f"weights sum to {np.unique(share.sum(axis=-1)).tolist()}, wanted 1.")
  space = _space(share, amount)
  share = space.broadcast_to(share if share.ndim == 2 else share[None], (sizes.S, n))
  member = np.zeros((sizes.R, n, sizes.R), np.float32)
  written = np.zeros(sizes.R, bool)
  for group in groups:
    for row in group if keep == "all" else group[:1]:
      member[row, np.arange(n), group] = 1
      written[row] = True
  average = space.einsum("sn,rnk->srk", share, member)
  own = np.eye(sizes.R, dtype=np.float32)[None]
  part = _scalar("amount", amount)
  rows = space.where(written[None, :, None], (1 - part) * own + part * average, own)
  return rows.astype(np.float32), written


def _compose(mix: Any, mask: Any, rows: Any) -> Any:
  """`mix` ... R R with `rows` applied after it where mask ... R."""
  if _known(mix, mask, rows):
    made = np.matmul(rows, mix)
  else:
    made = jnp.matmul(rows, mix, precision=jax.lax.Precision.HIGHEST)
  made = _put(mask[..., None], made, mix)
  if _known(made) and (faults := _row_faults("mix", made)):
    raise ValueError(" ".join(faults))
  return made


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


def _with_out(
  edit: Intervention, sizes: Sizes, out: str | None, steps: Any, rows: Any
) -> Intervention:
  """`edit` with rows of `mix_out`; x0 and velocity can't both be averaged by one edit."""
  out = edit.out if out is None else out
  if out not in ("x0", "velocity"):
    raise ValueError(f"out='{out}', wanted 'x0' or 'velocity'.")
  if out != edit.out and edit.mix_out is not None:
    raise ValueError(
      f"the edit mixes {edit.out}, this one {out}: start from identity(..., out='{out}')."
    )
  edit = _with_room(dataclasses.replace(edit, out=out), sizes, "mix_out")
  return dataclasses.replace(edit, mix_out=_compose(edit.mix_out, steps, rows))
