"""Denoising: one jitted `lax.scan` over a schedule or a piece of it, with edits and taps inside.

One step, in order: edit the latents and re-impose known cells; the model of this step, with block
edits, then taps; guidance; x0 = x - sigma*v and `mix_out`; the solver; a row of the trace.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jax_videoreason import schedules
from jax_videoreason.axes import Array, Params
from jax_videoreason.edits import (
  CELLS,
  BlockEdits,
  Intervention,
  check_edit,
  edit_latents,
  edit_output,
  step_edits,
  wants_noise,
)
from jax_videoreason.guidance import combine
from jax_videoreason.places import space_of
from jax_videoreason.pytrees import is_known
from jax_videoreason.schedules import HOLD, Schedule
from jax_videoreason.sharding import ambient, check_auto, constrain
from jax_videoreason.solvers import SOLVERS
from jax_videoreason.structs import Conditioning, ModelBundle, Noise, Sizes, State, Trace
from jax_videoreason.taps import SITES, TapSpec, asked, layer_slots, step_slots

Guidance = Literal["parallel", "sequential"]
ANY_STEP = np.int32(-1)  # of a State that may stand before any step


def sizes_of(bundle: ModelBundle, noise: Noise, cond: Conditioning, schedule: Schedule) -> Sizes:
  """The plain sizes of a call of `denoise`; S is the length of the whole schedule."""
  f, h, w, c = noise.grid
  tf, th, tw = bundle.card.latents.tokens((f, h, w))
  config = bundle.parts.dit.config
  return Sizes(
    S=schedule.total,
    R=noise.keys.shape[0],
    G=cond.text.shape[0],
    L=config.layers,
    F=f,
    H=h,
    W=w,
    C=c,
    T=tf * th * tw,
    D=config.width,
    N=config.heads,
    sites=SITES,
  )


def start(noise: Noise, solver: str) -> State:
  """The state before a first step, whichever that is: float32 latents, x0 = 0, an empty memory."""
  latents = noise.start
  if latents is None:
    latents = _draw(noise, jnp.zeros((), jnp.int32))
  latents = latents.astype(jnp.float32)
  step: Any = np.full(latents.shape[0], ANY_STEP)
  x0, memory = jnp.zeros_like(latents), SOLVERS[solver].init(latents)
  return State(latents=latents, x0=x0, solver=memory, step=step)


def state_at(trace: Trace, schedule: Schedule, step: int) -> State:
  """The state that a stored trajectory had before row `step` of the trace.

  Exact where the trace has the solver's memory (`TapSpec.solver`) or the solver has none, as Euler;
  else a multistep solver restarts there. Edits of that step are in the latents already (and not in
  the memory), and row 0 has no guess before it: x0 = 0, the truth only at the start of a whole
  schedule. To go on from other latents: `moved`.
  """
  if trace.latents is None or trace.x0 is None:
    raise ValueError(
      "state_at needs a trace with latents and x0: run with TapSpec(latents=True, x0=True)."
    )
  rows = trace.latents.shape[0]
  if not 0 <= step < rows:
    raise ValueError(f"step {step} is not in the trace; it has the steps 0..{rows - 1}.")
  latents = jnp.asarray(trace.latents[step])
  x0 = jnp.asarray(trace.x0[step - 1]) if step else jnp.zeros_like(latents)
  memory = {name: jnp.asarray(rows[step]) for name, rows in trace.solver.items()}
  return State(
    latents=latents,
    x0=x0,
    solver=memory or SOLVERS[schedule.solver].init(latents),
    step=_step_of(trace, schedule, step),
  )


def _step_of(trace: Trace, schedule: Schedule, row: int) -> Any:
  """R: the step that is `row` of a trace, where the schedule has the sigma of the trace there."""
  runs = trace.finite.shape[1]
  if row >= len(schedule):
    return np.full(runs, ANY_STEP)
  space = space_of(trace.sigma, schedule.sigma, schedule.index)
  of_trace, sigma, index = (
    space.asarray(rows)[row] for rows in (trace.sigma, schedule.sigma, schedule.index)
  )
  return space.full(runs, space.where(of_trace == sigma, index, ANY_STEP), np.int32)


def moved(state: State, latents: Array, schedule: Schedule) -> State:
  """`state` with other latents R F H W C, and the solver of `schedule` without a past in all runs.

  A multistep solver makes its sample of what it remembers: with its old memory, the change would be
  gone after a step. An edit of the latents restarts the runs that it touches in the same way. x0,
  the guess of the step before, stays.
  """
  latents = jnp.asarray(latents)
  if latents.shape != state.latents.shape:
    raise ValueError(
      f"latents R F H W C are {latents.shape}, wanted {state.latents.shape}: give those of all "
      "runs of the state."
    )
  latents = latents.astype(state.latents.dtype)
  memory = SOLVERS[schedule.solver].init(latents)
  return dataclasses.replace(state, latents=latents, solver=memory)


def denoise(
  bundle: ModelBundle,
  noise: Noise,
  cond: Conditioning,
  schedule: Schedule,
  edit: Intervention | None = None,
  taps: TapSpec | None = None,
  state: State | None = None,
  *,
  guidance: Guidance = "parallel",
  remat: bool = False,
) -> tuple[Array, Trace, State]:
  """Denoises R runs over a schedule or a piece of it.

  Returns the latents after the last step (R F H W C, float32), the trace of the steps, and the
  state from which the next piece continues. Pieces handed on by `state` equal the whole; between
  two of them `moved` puts in other latents. Seeds, guidance, sigmas, boundary and every value of an
  intervention are data: only shapes, the solver, the edited sites, the fields in use and the static
  half of `taps` compile anew. `edit` and `noise.injected` keep the rows of the whole schedule.

  guidance: "sequential" computes one guidance branch after the other, with half the activations.
  remat: a derivative in reverse (`jax.grad`) keeps the state before every step and computes the
    step again, so memory holds the activations of one step, not of all; values are the same.

  Raises:
    ValueError: shapes that contradict each other, a schedule that calls an expert that is not
      loaded, a state that is known to stand before another step, or an `edit` or `taps` of another
      kind.
  """
  check_kinds(edit, taps)
  check_auto(ambient())
  taps = TapSpec() if taps is None else taps
  check(bundle, noise, cond, schedule, edit, state)
  if guidance not in ("parallel", "sequential"):
    raise ValueError(f"guidance={guidance!r}, wanted 'parallel' or 'sequential'.")
  bare = None if state is None else dataclasses.replace(state, step=None)
  latents, trace, after = _trajectory(
    bundle.parts.dit, bundle.params, noise, cond, schedule, edit, taps, bare, guidance, remat
  )
  # beside the program: known at once, so that `check` of the next piece waits for no step
  return latents, trace, dataclasses.replace(after, step=_step_after(schedule, len(latents)))


def _step_after(schedule: Schedule, runs: int) -> Any:
  """R: the step that comes next; any, where the last one is held and so might be made later."""
  space = space_of(schedule.index, schedule.which)
  following = space.asarray(schedule.index)[-1] + 1
  if schedule.which is not None:
    following = space.where(space.asarray(schedule.which)[-1] == HOLD, ANY_STEP, following)
  return space.full(runs, following, np.int32)


def _wrong_step(state: State, schedule: Schedule) -> str | None:
  """What is wrong with where a state stands; None = nothing, or it is not known.

  Where the first steps are held, it may stand before any of them or the first one that is made.
  """
  if state.step is None or not is_known(state.step, schedule.index, schedule.which):
    return None
  index, which = np.asarray(schedule.index), schedule.which
  made = index if which is None else index[np.asarray(which) != HOLD]
  if not made.size:
    return None
  stands = np.asarray(state.step)
  wrong = stands[(stands != ANY_STEP) & ((stands < index[0]) | (stands > made[0]))]
  if not wrong.size:
    return None
  left = wrong[0] < schedule.total
  return (
    f"the state stands {f'before step {wrong[0]}' if left else 'after the last step'}, wanted "
    f"before step {made[0]}, with which the schedule goes on: "
    + (f"continue with schedule[{wrong[0]}:] of the whole one, or " if left else "")
    + "say that it may stand anywhere by dataclasses.replace(state, step=None)."
  )


def check_kinds(edit: Any, taps: Any) -> None:
  """ValueError unless `edit` is an Intervention or None, and `taps` a TapSpec or None."""
  for name, given, kind in (("edit", edit, Intervention), ("taps", taps, TapSpec)):
    if given is not None and not isinstance(given, kind):
      raise ValueError(
        f"{name} is of the kind {type(given).__name__}, wanted one {kind.__name__} or None: give "
        "both by name, edit=..., taps=...; edits compose into one."
      )


def check(
  bundle: ModelBundle,
  noise: Noise,
  cond: Conditioning,
  schedule: Schedule,
  edit: Intervention | None = None,
  state: State | None = None,
) -> None:
  """Raises a ValueError with the faults of the arguments of `denoise`; runs nothing."""
  f, h, w, c = noise.grid
  runs = noise.keys.shape[0]
  schedules.check(schedule, runs)
  cells = (runs, f, h, w, c)
  config = bundle.parts.dit.config
  faults = []

  def wanted(name: str, array: Array | None, shape: tuple[int, ...], remedy: str) -> None:
    if array is not None and tuple(array.shape) != shape:
      faults.append(f"{name} is {tuple(array.shape)}, wanted {shape}: {remedy}")

  if not jnp.issubdtype(noise.keys.dtype, jax.dtypes.prng_key):
    faults.append("noise.keys are raw integers, wanted typed keys: make them by runs.make_noise.")
  wanted("noise.start R F H W C", noise.start, cells, "give noise for every run, channels last.")
  wanted(
    "noise.injected S R F H W C",
    noise.injected,
    (schedule.total, *cells),
    "give a row for every step of the whole schedule.",
  )
  if c != config.out_channels:
    faults.append(
      f"the noise has {c} channels, the model {config.out_channels}: take the model's latent grid."
    )
  if cond.text.ndim != 4 or cond.text.shape[0] not in (1, 2) or cond.text.shape[1] != runs:
    faults.append(
      f"cond.text G R X D is {tuple(cond.text.shape)}, wanted G = 1 or 2 and R = {runs}: "
      "encode a prompt for every run."
    )
  elif cond.text.shape[-1] != config.text_width:
    faults.append(
      f"cond.text is {cond.text.shape[-1]} wide, the model reads {config.text_width}: encode the "
      "prompts with the text encoder of this bundle."
    )
  if schedule.time.shape[-1] != config.freq_dim:
    faults.append(
      f"schedule.time is {schedule.time.shape[-1]} wide, the model reads {config.freq_dim}: build "
      f"the schedule with freq_dim={config.freq_dim}."
    )
  if config.image_input == "none" and cond.known is not None:
    faults.append("this model takes no first frame and cond.known is given: leave it out.")
  if config.image_input == "concat" and (cond.known is None or cond.known_mask is None):
    faults.append(
      "this model takes a first frame and cond.known is None: give conditioning.encode the frames."
    )
  wanted(
    "known R F H W C",
    cond.known,
    cells,
    "pad the given frame to all F latent frames (conditioning.encode does).",
  )
  wanted(
    "known_mask R F H W 4", cond.known_mask, (*cells[:-1], 4), "conditioning.known_mask makes it."
  )
  if state is not None:
    wanted("state.latents R F H W C", state.latents, cells, "continue with the same runs.")
    memory = jax.eval_shape(SOLVERS[schedule.solver].init, state.latents)
    if state.solver.keys() != memory.keys():
      faults.append(
        f"state remembers {sorted(state.solver)}, solver {schedule.solver!r} wants "
        f"{sorted(memory)}: continue with the solver that began, or take state_at of its trace."
      )
    faults += [fault for fault in [_wrong_step(state, schedule)] if fault is not None]
  if not any(params is not None for params in bundle.params):
    faults.append("no expert of the DiT is loaded: load(..., parts=('dit', ...)).")
  which = schedule.which
  if which is None:
    if bundle.params[0] is None or len(bundle.params) != 1:
      faults.append(
        f"the schedule names no expert and the model has {len(bundle.params)}: "
        "build the schedule with the model's boundary."
      )
  elif not isinstance(which, jax.core.Tracer):
    for expert in sorted({int(e) for e in np.asarray(which)} - {HOLD}):
      if expert >= len(bundle.params) or bundle.params[expert] is None:
        faults.append(
          f"the schedule calls expert {expert}, which is not loaded: load it, or hold its steps "
          "with schedule.only(i, j)."
        )
  if faults:
    raise ValueError(" ".join(faults))
  if edit is not None:
    check_edit(edit, sizes_of(bundle, noise, cond, schedule))


def _trajectory(
  dit: Any,
  experts: tuple[Params | None, ...],
  noise: Noise,
  cond: Conditioning,
  schedule: Schedule,
  edit: Intervention | None,
  taps: TapSpec,
  state: State | None,
  guidance: Guidance,
  remat: bool,
) -> tuple[Array, Trace, State]:
  solver = SOLVERS[schedule.solver]
  if state is None:
    state = dataclasses.replace(start(noise, schedule.solver), step=None)
  known = known_cells(dit.config.image_input, cond)
  steps = len(schedule)
  slots = jnp.asarray(layer_slots(taps, dit.config.layers))
  asked = len(taps.layers) if taps.layers is not None else dit.config.layers
  step_slot = step_slots(taps, steps)
  asked_steps = len(taps.steps) if taps.steps is not None else steps

  noisy = None
  if edit is not None:  # looked at before the loop, where every device still holds all runs
    noisy = jax.vmap(functools.partial(wants_noise, edit))(jnp.arange(schedule.total))

  def model(latents: Array, row: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
    edits = None if edit is None else step_edits(edit, row["index"])
    wanted = jnp.where(row["slot"] < asked_steps, slots, asked)
    tap_arguments = (taps, wanted) if taps.sites else (None, None)

    def call(params: Any) -> tuple[Array, dict[str, Array]]:
      if guidance == "sequential":
        return _one_by_one(dit, params, latents, row["time"], cond, edits, *tap_arguments)
      return dit.apply({"params": params}, latents, row["time"], cond, edits, *tap_arguments)

    if schedule.which is None:
      return call(experts[0])
    loaded = [expert for expert, params in enumerate(experts) if params is not None]
    result = jax.eval_shape(call, experts[loaded[0]])

    def filled(value: float) -> Any:
      return lambda: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), result)

    branches: list[Any] = [lambda expert=expert: call(experts[expert]) for expert in loaded]
    # Where `which` is traced, `check` cannot refuse an expert that is not loaded: NaN says so.
    branches += [filled(0.0), filled(jnp.nan)]
    branch_of = np.full(HOLD + 1, len(loaded) + 1, np.int32)
    branch_of[[*loaded, HOLD]] = np.arange(len(loaded) + 1)
    return jax.lax.switch(jnp.asarray(branch_of)[row["which"]], branches)

  def step(carry: tuple[State, dict[str, Array]], row: dict[str, Any]) -> Any:
    before, kept = carry
    held = False if schedule.which is None else row["which"] == HOLD
    latents = before.latents
    touched = jnp.zeros(latents.shape[0], bool)
    if edit is not None:
      injected = _injected(noise, edit, noisy, row["index"], latents)
      latents, touched = edit_latents(edit, row["index"], latents, before.x0, injected)
    latents = constrain(impose(known, latents), CELLS)
    velocity, tapped = model(latents, row)
    velocity = constrain(combine(velocity, row["guidance"]), CELLS)
    x0 = latents - row["sigma"] * velocity
    if edit is not None:
      x0, velocity = edit_output(edit, row["index"], x0, velocity, latents, row["sigma"])
    x0 = constrain(impose(known, x0), CELLS)
    after, memory = solver.step(before.solver, latents, velocity, x0, row, touched)
    state = State(latents=impose(known, after), x0=x0, solver=memory)
    if schedule.which is not None:
      state = jax.tree.map(lambda old, new: jnp.where(held, old, new), before, state)
      latents = jnp.where(held, before.latents, latents)
    if asked_steps:  # a piece may hold none of the steps asked for
      kept = {
        name: buffer.at[row["slot"]].set(tapped[name], mode="drop") for name, buffer in kept.items()
      }
    finite = jnp.all(jnp.isfinite(latents) & jnp.isfinite(state.x0), axis=(1, 2, 3, 4))
    seen = (latents if taps.latents else None, state.x0 if taps.x0 else None)
    return (state, kept), (finite, *seen, before.solver if taps.solver else {})

  rows: dict[str, Any] = {
    "sigma": schedule.sigma[:-1],
    "sigma_next": schedule.sigma[1:],
    "time": schedule.time,
    "guidance": schedule.guidance,
    "index": schedule.index,
    "slot": jnp.asarray(step_slot),
    **schedule.coef,
  }
  if schedule.which is not None:
    rows["which"] = schedule.which
  kept: dict[str, Array] = {}
  if taps.sites:
    first = jax.tree.map(lambda x: x[0], rows)
    _, shapes = jax.eval_shape(model, state.latents, first)
    kept = {n: jnp.zeros((asked_steps, *s.shape), s.dtype) for n, s in shapes.items()}
  # a loop keeps the two passes apart by itself
  body = jax.checkpoint(step, prevent_cse=False) if remat else step
  (state, kept), (finite, latents, x0, memory) = jax.lax.scan(body, (state, kept), rows)
  trace = Trace(
    sigma=schedule.sigma[:-1], finite=finite, latents=latents, x0=x0, taps=kept, solver=memory
  )
  return state.latents, trace, state


_trajectory = jax.jit(_trajectory, static_argnames=("dit", "guidance", "remat"))


def _one_by_one(
  dit: Any,
  params: Any,
  latents: Array,
  time: Array,
  cond: Conditioning,
  edits: BlockEdits | None,
  taps: TapSpec | None,
  slots: Array | None,
) -> tuple[Array, dict[str, Array]]:
  """What the model says of all guidance branches, one after the other."""
  alone = None if taps is None else dataclasses.replace(taps, branches=(0,))
  kept = None if taps is None else asked("branches", taps.branches, cond.text.shape[0])

  def branch(own: tuple[Array | None, ...]) -> tuple[Array, dict[str, Array]]:
    text, touched, added = (None if a is None else a[None] for a in own)
    added = None if added is None else rearrange(added, "g k ... -> k g ...")
    mine = edits if edits is None else dataclasses.replace(edits, branches=touched, added=added)
    said = dataclasses.replace(cond, text=text)
    return dit.apply({"params": params}, latents, time, said, mine, alone, slots)

  touched = None if edits is None else edits.branches
  added = None if edits is None else edits.added
  added = None if added is None else rearrange(added, "k g ... -> g k ...")
  velocity, tapped = jax.lax.map(branch, (cond.text, touched, added))
  if kept is None:
    return velocity[:, 0], tapped
  return velocity[:, 0], {
    name: rearrange(value, "g l 1 ... -> l g ...")[:, np.asarray(kept)]
    for name, value in tapped.items()
  }


def _draw(noise: Noise, stream: Array) -> Array:
  """R F H W C standard normals from stream `stream` of each key, however runs are batched."""

  def of_run(key: Array) -> Array:
    return jax.random.normal(jax.random.fold_in(key, stream), noise.grid, jnp.float32)

  return jax.vmap(of_run)(noise.keys)


def _injected(
  noise: Noise, edit: Intervention, noisy: Array | None, index: Array, latents: Array
) -> Array:
  """The noise that `edit` injects at step `index`; zeros, and nothing drawn, where it has none.

  noisy: S bool, `wants_noise` of every step.
  """
  if edit.noise_gain is None or noisy is None:
    return jnp.zeros_like(latents)
  if noise.injected is not None:
    return noise.injected[index].astype(latents.dtype)
  return jax.lax.cond(
    noisy[index], lambda: _draw(noise, index + 1), lambda: jnp.zeros_like(latents)
  )


def known_cells(image_input: str, cond: Conditioning) -> tuple[Array, Array] | None:
  """(R F H W 1 bool, R F H W C): cells that a model with given tokens (TI2V-5B) holds fixed."""
  if image_input != "overwrite" or cond.known is None or cond.known_mask is None:
    return None
  return jnp.all(cond.known_mask > 0, axis=-1, keepdims=True), cond.known


def impose(known: tuple[Array, Array] | None, latents: Array) -> Array:
  """R F H W C with the cells of `known_cells` in their place; None = all as they are."""
  if known is None:
    return latents
  mask, values = known
  return jnp.where(mask, values.astype(latents.dtype), latents)
