"""Changes to a run while it runs: the constructors of an `Intervention`.

They are pure functions from an Intervention to an Intervention, and they compose: a second edit of
one kind acts on the result of the first, and the kinds act in the order mix, gate, steer, add,
whatever the order of the calls.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import ArrayLike

from jax_videoreason.axes import Array
from jax_videoreason.composing import (
  affine,
  compose,
  inside,
  put,
  with_place,
  with_room,
  with_sites,
)
from jax_videoreason.edits import BLOCK_UPDATE, Intervention, check_edit, known_sites, site_names
from jax_videoreason.places import (
  At,
  Select,
  depth,
  full_mask,
  pairs,
  per_step,
  refuse,
  run_indices,
  selection,
  sigmas,
  space_of,
  to_number,
  to_scalar,
  where,
)
from jax_videoreason.pytrees import is_known
from jax_videoreason.structs import Sizes
from jax_videoreason.taps import HEAD_SITES

__all__ = [
  "ENSEMBLES",
  "NOISE_MODES",
  "ROOM",
  "At",
  "Intervention",
  "ablate",
  "add",
  "closeness_weights",
  "depth",
  "ensemble_runs",
  "identity",
  "noise_at",
  "patch_runs",
  "steer",
  "swap_runs",
  "where",
]

ROOM = ("mix_latents", "noise", "mix_out", "mix", "gate", "steer", "tokens", "heads")
NOISE_MODES = ("replace", "add", "add_sigma", "renoise")
ENSEMBLES = {"resid": ("resid_post",), "update": BLOCK_UPDATE, "attn": ("attn_out",)}


def identity(
  sizes: Sizes, edits: Sequence[str] = (), sites: Sequence[str] = (), *, out: str = "x0"
) -> Intervention:
  """An Intervention without effect, with room for `edits` (of `ROOM`) at `sites`.

  Room is part of the compiled program: a sweep starts from an identity that has all it will need.
  Room for `add` is `add(..., 0.0)` at the places that it will need.
  "noise" is keep, to_x0 and noise_gain; "steer" brings its direction.
  Errors: ValueError for an edit or site that does not exist, or block edits without a site.
  """
  for name in edits:
    if name not in ROOM:
      raise ValueError(f"no edit '{name}' to make room for; there are: {', '.join(ROOM)}.")
  blocks = {"mix", "gate", "steer", "tokens", "heads"} & set(edits)
  if blocks and not sites:
    site = HEAD_SITES[0] if "heads" in blocks else site_names(sizes)[1]
    raise ValueError(f"room for '{min(blocks)}' needs a site: sites=({site!r},), say.")
  edit = Intervention(sites=known_sites(sizes, sites), out=out)
  for name in edits:
    edit = with_room(edit, sizes, name)
  check_edit(edit, sizes)
  return edit


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
  Every edit of one step shares one draw of noise per run, which the key of the run and the step
  decide: copies of a run draw the same, unless their Noise is made of other seeds (`runs.take`).
  Acts on steps and frames of `at` only.
  Errors: ValueError for an unknown mode, a sigma that is missing, a gain that has no meaning.
  """
  if mode not in NOISE_MODES:
    raise ValueError(f"no noise mode '{mode}'; there are: {', '.join(NOISE_MODES)}.")
  refuse(at, "noise_at", "layers", "region", "heads", "branches")
  sizes = at.sizes
  if mode in ("replace", "renoise") and not (is_known(gain) and np.all(np.asarray(gain) == 1)):
    raise ValueError(f"gain has no meaning for mode='{mode}': leave it out, or use mode='add'.")
  level = per_step(gain, sizes.S)
  if mode in ("add_sigma", "renoise"):
    level = level * sigmas(sigma, sizes.S, f"mode='{mode}'")
  if mode == "replace":
    keep, to_x0, level = 0.0, 0.0, 1.0
  elif mode == "renoise":
    keep, to_x0 = 0.0, 1 - level
  else:
    keep, to_x0 = 1.0, 0.0
  mask = full_mask(at.steps, sizes.S)[:, None, None] & full_mask(at.frames, sizes.F)[None, None, :]
  mask = mask & full_mask(selection("runs", runs, sizes.R), sizes.R)[None, :, None]
  check_edit(edit, sizes)
  return affine(with_room(edit, sizes, "noise"), mask, keep, to_x0, level)


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
  ones, others = pairs("a", a, "b", b, at.sizes.R)
  space = space_of(ones, others)
  target = space.concatenate([ones, others])
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
  read, written = pairs("source", source, "target", target, at.sizes.R)
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
  """Runs are averaged: the training-free ensemble and its variants (arXiv 2603.16870, section 6).

  runs: (a, b, c), a run each, or index arrays that are joined member by member.
  what: "resid" at resid_post; "update" at the three terms of the block; "attn" at attn_out;
  "out" the guess, x0 or velocity (`out`, None = that of `edit`); "latents" before the model.
  weights: "mean", or numbers that sum to 1 over the n runs of a group, as n, S n or S N n with a
  row for each of N groups (`closeness_weights`). keep: "first" writes the first run of each group,
  "all" writes every one. amount: a in (1-a)*own + a*average.

  Averaged noise is too small by the length of the row of weights, 1/sqrt(n) for a mean; so
  "latents" goes back on the noise level with keep = 1/length, to_x0 = (1-keep)(1-sigma), where
  x0_before is averaged by the same row. It needs sigma (S or S+1, of the whole schedule).
  Whole residual streams averaged over runs that share text make these runs equal from there on,
  so a range of layers is its first layer: use "update", a region, or amount < 1.
  Errors: ValueError for fewer than two runs, a run named twice, weights that don't sum to 1, a
  place in `at` that `what` does not have, and latents that already carry noise edits.
  """
  whats = (*ENSEMBLES, "out", "latents")
  if what not in whats:
    raise ValueError(f"no ensemble of '{what}'; there are: {', '.join(whats)}.")
  if keep not in ("first", "all"):
    raise ValueError(f"keep='{keep}', wanted 'first' or 'all'.")
  sizes = at.sizes
  rows, written = _ensemble_rows(sizes, runs, weights, keep, amount)
  steps = full_mask(at.steps, sizes.S)[:, None] & written[None]
  if what in ENSEMBLES:
    edit = with_sites(edit, sizes, ENSEMBLES[what])
    edit = with_place(edit, at, written)
    mask = steps[:, None] & full_mask(at.layers, sizes.L)[None, :, None]
    edit = with_room(edit, sizes, "mix")
    return dataclasses.replace(edit, mix=compose(edit.mix, mask, rows[:, None]))
  refuse(at, f"an ensemble of {what}", "layers", "frames", "region", "heads", "branches")
  if what == "out":
    return _with_out(edit, sizes, out, steps, rows)
  check_edit(edit, sizes)
  edit = with_room(with_room(edit, sizes, "mix_latents"), sizes, "noise")
  noised = _noised(edit)
  if is_known(noised, steps) and np.any(noised & steps):
    step, run = np.argwhere(np.asarray(noised) & np.asarray(steps))[0].tolist()
    raise ValueError(
      f"latents of run {run} at step {step} already have a noise edit, which acts after the "
      "average: call ensemble_runs first."
    )
  space = space_of(rows)
  sharpen = 1 / space.sqrt((rows**2).sum(axis=-1))
  to_x0 = (1 - sharpen) * (1 - sigmas(sigma, sizes.S, "what='latents'"))[:, None]
  edit = dataclasses.replace(edit, mix_latents=compose(edit.mix_latents, steps, rows))
  mask = steps[..., None] & np.ones((1, 1, sizes.F), bool)
  return affine(edit, mask, sharpen[..., None], to_x0[..., None], 0.0)


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

  At attn_out, cross_out and mlp_out this is the term before it is added, x + gate*u; at attn_heads
  and cross_heads what the heads found, to which the output projection adds its bias. At attn_v a
  gate of 0 for some tokens lets none take anything from them and leaves the attention as it is;
  at attn_q, attn_k or cross_q it makes their scores 0, which is no mask. A gate of exactly 0 writes
  zeros, whatever stood there, and 1 leaves the bits.
  """
  edit, mask = inside(edit, at, runs, sites, "gate")
  return dataclasses.replace(edit, gate=put(mask, edit.gate * to_scalar("gate", gate), edit.gate))


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
  edit, mask = inside(edit, at, runs, sites, "steer")
  space = space_of(direction, edit.direction, edit.steer, at.layers)
  wanted = space.asarray(direction, dtype=np.float32)
  if wanted.shape not in ((sizes.D,), (sizes.L, sizes.D)):
    raise ValueError(
      f"direction is {tuple(wanted.shape)}, wanted D = ({sizes.D},) or "
      f"L D = ({sizes.L}, {sizes.D})."
    )
  wanted = space.broadcast_to(wanted if wanted.ndim == 2 else wanted[None], (sizes.L, sizes.D))
  layers = full_mask(at.layers, sizes.L)
  if is_known(edit.steer, edit.direction, layers, wanted):
    used = np.any(np.asarray(edit.steer) != 0, axis=(0, 2)) & np.asarray(layers)
    other = np.any(np.asarray(edit.direction) != np.asarray(wanted), axis=1)
    if np.any(used & other):
      raise ValueError(
        f"layer {int(np.argmax(used & other))} already steers along another direction; a layer "
        "has one: add the directions first."
      )
  return dataclasses.replace(
    edit,
    steer=put(mask, edit.steer + to_scalar("gain", gain), edit.steer),
    direction=put(layers[:, None], wanted, edit.direction),
  )


def add(
  edit: Intervention,
  at: At,
  values: ArrayLike,
  *,
  runs: Select = None,
  sites: Sequence[str] | None = None,
) -> Intervention:
  """Adds values to what stands at the sites, such as a `full` tap kept them; calls add up.

  values: S' L' G R T D of the steps and layers asked for, or what broadcasts to that; those of
  other runs than `runs` (None = all) are left out. Every device holds them. sites: as patch_runs.
  Where `ablate` takes away what stands there, the values stand there alone: a patch from another
  step or layer, or from a stored run. A tap keeps the branch with the prompt unless its `branches`
  say more: such values go to `where(..., branches=0)`. The derivative by values of 0 is that by the
  hidden state, summed over the sites.
  Errors: ValueError for values of another shape or of one branch where several are asked for, for
  several steps or layers that `at` does not name in order, and for places that are traced.
  """
  sizes = at.sizes
  steps, layers = full_mask(at.steps, sizes.S), full_mask(at.layers, sizes.L)
  if not is_known(steps, layers):
    raise ValueError("add got traced steps or layers, which decide what is held: give plain ones.")
  if not is_known(edit.added_at):
    raise ValueError(
      "add got an edit that is traced and holds values: add them before the edit is traced."
    )
  written = full_mask(selection("runs", runs, sizes.R), sizes.R)
  edit = with_place(with_sites(edit, sizes, sites), at, written)
  shape = (int(steps.sum()), int(layers.sum()), sizes.G, sizes.R, sizes.T, sizes.D)
  space = space_of(values, written, edit.added)
  given = space.asarray(values, dtype=np.float32)
  pairs_of_sizes = zip(given.shape[::-1], shape[::-1], strict=False)
  if given.ndim > 6 or any(n not in (1, m) for n, m in pairs_of_sizes):
    raise ValueError(
      f"values are {tuple(given.shape)}, wanted S' L' G R T D = {shape} or what broadcasts to it."
    )
  lead = (1,) * (6 - given.ndim) + tuple(given.shape)
  if not at.increase and max(lead[:2]) > 1:
    raise ValueError(
      "values of several steps or layers, which `where` names out of order: name each once, "
      "increasing, and give the values in that order."
    )
  if given.ndim == 6 and lead[2] < sizes.G and int(full_mask(at.branches, sizes.G).sum()) > 1:
    raise ValueError(
      f"values of one branch for all {sizes.G}: name its own by where(branches=0), or tap all, "
      f"TapSpec(branches={tuple(range(sizes.G))})."
    )
  runs_of = rearrange(written, "r -> 1 1 1 r 1 1")
  given = space.where(runs_of, space.broadcast_to(space.reshape(given, lead), shape), 0.0)
  given = rearrange(given, "s l ... -> (s l) ...")
  rows = np.full((sizes.S, sizes.L), -1, np.int32) if edit.added_at is None else edit.added_at
  rows, place = np.array(rows, np.int32), np.ix_(np.flatnonzero(steps), np.flatnonzero(layers))
  held = 0 if edit.added is None else edit.added.shape[0]
  asked = rows[place].ravel()
  fresh = asked < 0
  asked[fresh] = held + np.arange(fresh.sum())
  rows[place] = asked.reshape(rows[place].shape)
  before = [] if edit.added is None else [edit.added]
  total = space.concatenate([*before, space.zeros((int(fresh.sum()), *shape[2:]), np.float32)])
  own = np.full(total.shape[0], -1)
  own[asked] = np.arange(len(asked))
  more = space.take(given, np.maximum(own, 0), axis=0)
  total = total + space.where(rearrange(own >= 0, "k -> k 1 1 1 1"), more, 0.0)
  return dataclasses.replace(edit, added=total.astype(np.float32), added_at=rows)


def _gather(
  edit: Intervention, at: At, source: Any, target: Any, sites: Sequence[str] | None
) -> Intervention:
  """Rows `target` of mix become what rows `source` were."""
  if is_known(target) and len(set(target.tolist())) != len(target):
    raise ValueError(f"runs {target.tolist()} name a run twice: give each one source.")
  runs = at.sizes.R
  if is_known(source, target):
    read = np.arange(runs)
    read[target] = source
    written = np.isin(np.arange(runs), target)
  else:
    read = jnp.arange(runs).at[target].set(source)
    written = jnp.isin(jnp.arange(runs), target)
  edit, mask = inside(edit, at, written, sites, "mix")
  old = space_of(edit.mix, read).asarray(edit.mix)
  mix = put(mask[..., None], space_of(old, read).take(old, read, axis=2, mode="clip"), old)
  return dataclasses.replace(edit, mix=mix)


def _ensemble_rows(
  sizes: Sizes, runs: Sequence[Any], weights: Any, keep: str, amount: Any
) -> tuple[Any, np.ndarray]:
  """S R R rows of the average, own rows elsewhere, and R bool: which are written."""
  members = [run_indices("runs", run, sizes.R) for run in runs]
  if len(members) < 2:
    raise ValueError(f"an ensemble of {len(members)} runs, wanted two or more: runs=(a, b, ...).")
  if len({len(member) for member in members}) != 1:
    raise ValueError(f"runs have lengths {[len(m) for m in members]}: give them group by group.")
  groups = np.stack(members, axis=1)
  if len(set(groups.ravel().tolist())) != groups.size:
    raise ValueError(f"runs={groups.T.tolist()} name a run twice: a run has one group.")
  n = groups.shape[1]
  if isinstance(weights, str):
    if weights != "mean":
      raise ValueError(f"weights='{weights}', wanted 'mean' or numbers (closeness_weights).")
    weights = np.full(n, 1 / n, np.float32)
  share = to_number(weights)
  whole = (sizes.S, len(groups), n)
  if share.shape not in ((n,), (sizes.S, n), whole):
    raise ValueError(
      f"weights are {tuple(share.shape)}, wanted n = ({n},), ({sizes.S}, {n}) or {whole}."
    )
  if is_known(share) and np.any(np.abs(share.sum(axis=-1) - 1) > 1e-4):
    raise ValueError(f"weights sum to {np.unique(share.sum(axis=-1)).tolist()}, wanted 1.")
  space = space_of(share, amount)
  if share.ndim < 3:
    share = rearrange(share, "n -> 1 1 n" if share.ndim == 1 else "s n -> s 1 n")
  share = space.broadcast_to(share, whole)
  member = np.zeros((sizes.R, len(groups), n, sizes.R), np.float32)
  written = np.zeros(sizes.R, bool)
  for number, group in enumerate(groups):
    for row in group if keep == "all" else group[:1]:
      member[row, number, np.arange(n), group] = 1
      written[row] = True
  average = space.einsum("smn,rmnk->srk", share, member)
  own = np.eye(sizes.R, dtype=np.float32)[None]
  part = to_scalar("amount", amount)
  rows = space.where(written[None, :, None], (1 - part) * own + part * average, own)
  return rows.astype(np.float32), written


def _noised(edit: Intervention) -> Any:
  """S R bool: the runs whose latents the three numbers change."""
  return ((edit.keep != 1) | (edit.to_x0 != 0) | (edit.noise_gain != 0)).any(axis=2)


def _with_out(
  edit: Intervention, sizes: Sizes, out: str | None, steps: Any, rows: Any
) -> Intervention:
  """`edit` with rows of `mix_out`; x0 and velocity can't both be averaged by one edit."""
  out = edit.out if out is None else out
  if out != edit.out and edit.mix_out is not None:
    raise ValueError(
      f"the edit mixes {edit.out}, this one {out}: start from identity(..., out='{out}')."
    )
  edit = dataclasses.replace(edit, out=out)
  check_edit(edit, sizes)
  edit = with_room(edit, sizes, "mix_out")
  return dataclasses.replace(edit, mix_out=compose(edit.mix_out, steps, rows))
