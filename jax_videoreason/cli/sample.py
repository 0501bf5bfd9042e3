"""From a first frame and a prompt to a video, a trace of every denoising step and a report.

  videoreason sample --image FRAME.png --prompt "..." --out runs/mine
  videoreason sample --config mini:steps=50 --seeds 0,1,2 --image ... --prompt ... --out ...
  videoreason sample --from runs/mine/trace.zarr --step 12 \\
    --intervene noise_at:mode=add_sigma,gain=0.5 --out runs/branch

Leaves manifest.json, runs.json, final_latents.npy, trace.zarr, video_<run>.mp4, x0_<run>.png and
report.html; jax_videoreason.open_run(DIR) reads them. The image has the size that the config says,
or --fit makes it so: `stretch` scales its sides apart, `cover` scales and cuts its middle out,
`area` takes the size of the video from its aspect, with as many pixels as the config has.

Of large videos x0 is decoded at eight steps, or at those of --keep-steps 0,10,20 and the last.
Where decoding fails, by want of memory say, all that was denoised stays in the folder, and
`videoreason report DIR` makes what is outstanding (--tiles diffusers takes less memory).

--from takes up a stored run before --step, as its own manifest says, with the same weights unless
--checkpoint names others, and leaves a whole run folder again; the edit (noise_at, ablate,
ensemble_runs) acts at that step, or where its keys say (steps=12:15,frames=2,layers=4:8; of
ablate:sites=attn_heads also heads=3). Exact for Euler; another solver restarts there.

One model may need many devices: --mesh fsdp=2,context=2 lays weights and tokens on them. Started
once on every host (docs/pods.md), the mesh spans the devices of all, and one folder comes of it.
--sequential computes one guidance branch after the other; --experts 1 keeps one expert of a
two-expert model in memory, and reads the other where the schedule changes to it.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl.flags import DEFINE_enum, DEFINE_integer, DEFINE_list, DEFINE_string, FlagValues
from jax.sharding import Mesh

from jax_videoreason import (
  branching,
  bundles,
  checkpoint,
  cli,
  console,
  distributed,
  factors,
  folders,
  framing,
  media,
  prepare,
  report,
  runs,
  sampler,
  settings,
  sharding,
  store,
  tasks,
)
from jax_videoreason.attention import Route
from jax_videoreason.axes import spread
from jax_videoreason.branching import Branch
from jax_videoreason.cli.decoding import decode_run
from jax_videoreason.settings import SampleSettings
from jax_videoreason.structs import ModelBundle
from jax_videoreason.taps import check_budget

# what a stored run has already been asked
ASKED = ("image", "prompt", "seeds", "noise", "fit", cli.CONFIG)
FITS = ("exact", "stretch", "cover", "area")
# Pixels of x0 that are decoded for the report; a model too large for that shows fewer steps, but
# so many.
SHOWN_PIXELS = 1 << 26
SHOWN_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """What a video is asked: prompt, first frame if any, the case if any.

  first_frame: height width 3, uint8 or float32 about -1..1. shown: the picture, of any size, that
  an image tower is shown; None = the first frame.
  """

  prompt: str
  first_frame: np.ndarray | None = None
  shown: np.ndarray | None = None
  case: tasks.Case | None = None


def define(flags: FlagValues) -> None:
  cli.define_config(flags, "mini")
  cli.define_out(flags)
  DEFINE_string(
    "image", None, "the first frame, an RGB picture of the config's size", flag_values=flags
  )
  DEFINE_enum("fit", "exact", FITS, "what is done with one of another size", flag_values=flags)
  DEFINE_string("prompt", None, "what should happen; may be empty", flag_values=flags)
  DEFINE_string("seeds", None, "seed numbers, as 0,1,2; instead of the config's", flag_values=flags)
  DEFINE_string("mesh", None, "all devices, as seed=2,fsdp=4,context=2", flag_values=flags)
  cli.define_route(flags)
  cli.define_room(flags)
  said = "steps whose x0 is decoded besides the last; without it all, or some of a large video"
  DEFINE_list("keep-steps", [], said, flag_values=flags)
  DEFINE_string("noise", None, "R F H W C .npy to start from, one row a seed", flag_values=flags)

  DEFINE_string("from", None, "a stored run (or its trace.zarr) to take up", flag_values=flags)
  DEFINE_integer("step", None, "the step before which it is taken up", flag_values=flags)
  said = (
    "what is edited then, as noise_at:mode=add_sigma,gain=0.5; several sites are joined by +, as "
    "ablate:sites=attn_out+mlp_out"
  )
  DEFINE_string("intervene", None, said, flag_values=flags)


def told(_: Sequence[str]) -> str:
  return (
    "Edits of --intervene, each with what it may take; steps, layers, frames and heads are an\n"
    f"index or from:to:\n{factors.edits_told()}"
  )


def main(flags: FlagValues, words: list[str]) -> None:
  mesh = mesh_of(flags.mesh, distributed.initialize()[1])
  if flags["from"].value is not None:
    branch_off(flags, mesh)
    return
  if flags.step is not None or flags.intervene is not None:
    raise cli.UsageError("--step and --intervene belong to --from: give the stored run.")
  cli.required(flags, "prompt", "out")
  config = cli.resolved(flags)
  if flags.seeds is not None:
    config["seeds"] = seed_numbers(flags.seeds)
  chosen = settings.from_config(config)
  found = bundles.describe(chosen.checkpoint)
  cli.check_experts(flags, found.experts)
  settings.boundary_of(chosen, found.card)
  keep = steps_of(flags, chosen)
  noise = None if flags.noise is None else read_noise(flags.noise)
  image = shown = None
  if flags.image is not None:
    image, shown, chosen = fitted(flags.image, chosen, flags.fit)
  question = Question(prompt=flags.prompt, first_frame=image, shown=shown)
  with store.run_folder(flags.out, redo=flags.redo, first=console.speaks()) as folder:
    bundle = record(folder, chosen, [question], noise=noise, keep=keep, mesh=mesh, **way(flags))
  decode_run(flags.out, bundle, mesh=mesh)
  finish(flags.out)


def mesh_of(axes: str | None, processes: int) -> Mesh | None:
  """The mesh that --mesh says; None = one device.

  ValueError: several processes without one, or one that leaves devices of some out.
  """
  if axes is None and processes == 1:
    return None
  there = jax.device_count()
  sizes = None if axes is None else sharding.axes_of(axes)
  if sizes is None or (processes > 1 and math.prod(sizes.values()) != there):
    raise ValueError(
      f"--mesh={axes} for {processes} processes with {there} devices in all, wanted a mesh of all "
      f"of them, as --mesh fsdp={there}."
    )
  mesh = sharding.make_mesh(sizes["seed"], sizes["fsdp"], sizes["context"])
  distributed.introduce(mesh)
  return mesh


def branch_off(flags: FlagValues, mesh: Mesh | None) -> None:
  """Takes up a stored run and writes the branch as a run folder of its own."""
  cli.required(flags, "step", "out")
  given = [name for name in cli.given(flags) if name.partition(".")[0] in ASKED]
  if given:
    raise cli.UsageError(f"--{given[0]} has no meaning with --from: the stored run has been asked.")
  branch = branching.take_up(
    str(flags["from"].value), flags.step, flags.intervene, weights=flags.checkpoint
  )
  cli.check_experts(flags, bundles.describe(branch.chosen.checkpoint).experts)
  keep = steps_of(flags, branch.chosen)
  folders.spare(Path(flags.out), [branch.run.path])
  if branch.chosen.solver != "euler":
    warnings.warn(
      f"{branch.chosen.solver} forgets its past at step {branch.step}: without an edit the branch "
      "is close to the stored run, not equal.",
      stacklevel=2,
    )
  with store.run_folder(flags.out, redo=flags.redo, first=console.speaks()) as folder:
    bundle = record(
      folder,
      branch.chosen,
      questions_of(branch),
      branch=branch,
      keep=keep,
      mesh=mesh,
      **way(flags),
    )
  decode_run(flags.out, bundle, mesh=mesh)
  finish(flags.out)


def way(flags: FlagValues) -> dict[str, Any]:
  """How it is denoised, as `record` takes it; none of it changes a number beyond rounding."""
  return {
    "route": flags.route,
    "guidance": "sequential" if flags.sequential else "parallel",
    "experts": flags.experts,
  }


def questions_of(branch: Branch) -> list[Question]:
  """What the runs of a stored folder were asked, once for all seeds."""
  run, asked = branch.run, []
  for number in range(0, len(run.runs), len(branch.chosen.seeds)):
    first_frame, shown = run.given(number)
    asked.append(
      Question(
        prompt=run.runs[number]["prompt"],
        first_frame=first_frame,
        shown=first_frame if shown is None else shown,
        case=branch.case(number),
      )
    )
  return asked


def seed_numbers(text: str) -> list[int]:
  """The numbers of "0,1,2"."""
  try:
    return [int(word) for word in text.split(",")]
  except ValueError as error:
    raise cli.UsageError(f"--seeds={text}, wanted whole numbers as 0,1,2.") from error


def steps_of(flags: FlagValues, chosen: SampleSettings) -> list[int]:
  """The steps of --keep-steps."""
  words = flags["keep-steps"].value or []
  steps = cli.numbers("keep-steps", words)
  if any(step >= chosen.steps for step in steps):
    raise cli.UsageError(f"--keep-steps={','.join(words)}, wanted steps below {chosen.steps}.")
  return steps


def read_noise(path: str) -> np.ndarray:
  """An array from a .npy file; its shape is checked when the noise is made."""
  try:
    array = np.load(path, allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(f"{path} is no .npy array of numbers: write it by numpy.save.") from error
  if not isinstance(array, np.ndarray):
    raise ValueError(f"{path} holds several arrays: write the one of the noise by numpy.save.")
  return array


def fitted(
  path: str, chosen: SampleSettings, fit: str
) -> tuple[np.ndarray, np.ndarray, SampleSettings]:
  """First frame and what an image tower is shown, of a picture; the settings with the video's size.

  fit: one of `FITS`. Filters and sizes are those of the stack that the bundle's numerics name, and
  so is the first frame: uint8, or float32 about -1..1 (`framing.stretched`).
  """
  picture = media.read_image(path)
  height, width = picture.shape[:2]
  if (height, width) == (chosen.height, chosen.width):
    return picture, picture, chosen
  if fit == "exact":
    raise ValueError(
      f"{path} is {width} x {height} pixels, the config says {chosen.width} x {chosen.height}: "
      f"give --fit stretch, cover or area, or --config.width={width} --config.height={height}."
    )
  bundle = checkpoint.load(chosen.checkpoint, parts=())
  covers = fit == "cover"
  if fit == "area":
    stride, patch = bundle.card.latents.stride[1], bundle.card.latents.patch[1]
    pixels = chosen.height * chosen.width
    covers = bundle.parts.dit.config.image_input == "overwrite"
    if covers:
      size = framing.fitting_size(height, width, area=pixels, unit=stride * patch)
    else:
      size = framing.area_size(height, width, area=pixels, stride=stride, patch=patch)
    chosen = dataclasses.replace(chosen, height=size[0], width=size[1])
  stack = bundle.card.numerics
  if covers:
    frame = framing.covered(picture, chosen.height, chosen.width)
  else:
    frame = framing.stretched(picture, chosen.height, chosen.width, stack)
  return frame, framing.shown_to_clip(picture, frame, stack), chosen


def record(
  folder: Path,
  chosen: SampleSettings,
  questions: Sequence[Question],
  *,
  noise: np.ndarray | None = None,
  branch: Branch | None = None,
  keep: Sequence[int] = (),
  mesh: Mesh | None = None,
  route: Route | None = None,
  guidance: sampler.Guidance = "parallel",
  experts: int | None = None,
) -> ModelBundle:
  """Asks every question with every seed and writes a run folder, but what `decode_run` makes.

  Runs are question by question, seeds inside. noise: R F H W C to start from, None = drawn. branch:
  the stored run whose steps before `branch.step` are taken over. keep: the steps whose x0 is to be
  decoded, with the last one; () = `shown_steps`.
  mesh, route, guidance: as `runs.run` takes them. Where the mesh spans several processes, all call
  this with one folder: each writes its share of the trace, the first one what comes after.
  experts: of the model that may be resident at once, None = all.
  Returns the bundle without its DiT, for the VAE's sake.
  """
  began = time.monotonic()
  seeds = list(chosen.seeds)
  of_run = [question for question in questions for _ in seeds]
  given = [([q.prompt for q in of_run], first_frames(of_run))]
  shown = [q.shown for q in of_run if q.shown is not None]
  bundle, (cond,) = prepare.encode(
    chosen, given, mesh=mesh, shown=[shown] if shown else None, experts=experts
  )
  card = bundle.card
  shape = card.latents.shape(chosen.frames, chosen.height, chosen.width)
  schedule = settings.schedule(chosen, bundle.card, bundle.parts)
  start = runs.make_noise(seeds * len(questions), shape, noise)
  spec = chosen.taps.spec()
  sizes = sampler.sizes_of(bundle, start, cond, schedule)
  check_budget(spec, sizes, chosen.taps.budget_gb * 1e9, dtype=bundle.parts.dit.config.dtype)

  finite = np.ones((chosen.steps, len(of_run)), bool)
  begin, state, edit, rest = 0, None, None, spec
  if branch is not None:
    begin, state = branch.step, branch.state(schedule)
    edit = branch.edit
    steps = None if spec.steps is None else tuple(s - begin for s in spec.steps if s >= begin)
    rest = dataclasses.replace(spec, steps=steps)
  batch = chosen.batch if edit is None else None
  made = runs.computed(sizes.R, batch, 1 if mesh is None else mesh.shape["seed"])
  process = jax.process_index(), jax.process_count()
  size = {"steps": chosen.steps, "runs": len(of_run)}
  with store.create_trace(folder, **size, taps=spec, process=process) as writer:
    distributed.meet("trace begun")
    if branch is not None and begin:
      writer.write(branch.prefix(spec, begin))
      finite[:begin] = branch.run.finite[:begin]
    count = (chosen.steps - begin) * len(of_run)
    with console.progress(count, "denoise", "step") as advance:

      def on_piece(trace: Any, piece: slice, part: slice) -> None:
        steps = slice(begin + piece.start, begin + piece.stop)
        writer.write(trace, at_step=steps.start, at_run=part.start)
        finite[steps, part] = trace.finite
        advance((steps.stop - steps.start) * (part.stop - part.start))

      final = runs.run(
        bundle,
        start,
        cond,
        schedule[begin:],
        edit,
        rest,
        batch=batch,
        piece=chosen.piece,
        mesh=mesh,
        route=route,
        guidance=guidance,
        expert=prepare.one_expert(chosen, mesh),
        on_piece=on_piece,
        state=state,
      )
    bundle = dataclasses.replace(bundle, params=(None,) * len(bundle.params))
    distributed.meet("trace written")
  if process[0] > 0:
    return bundle
  warn_broken(finite)
  store.write_final_latents(folder, final)
  pictures = first_pictures(of_run)
  if pictures is not None:
    store.write_first_frames(folder, pictures)
  for number, question in enumerate(of_run):
    store.write_given(folder, number, question.first_frame, question.shown)
  store.write_runs(
    folder, [describe(q, s) for q, s in zip(of_run, seeds * len(questions), strict=True)]
  )
  store.write_manifest(
    folder,
    config=dataclasses.asdict(chosen),
    command=cli.typed(),
    device=jax.devices()[0].device_kind,
    mesh=None if mesh is None else dict(mesh.shape),
    processes=process[1],
    model=card.name,
    sources=dict(card.sources),
    weights=bundles.fingerprint(chosen.checkpoint),
    seconds=round(time.monotonic() - began, 1),
    evaluations=(chosen.steps - begin) * made * sizes.G,
    undecoded=shown_steps(chosen, len(of_run), keep),
    **({} if branch is None else {"branch": branch.told()}),
  )
  return bundle


def first_frames(questions: Sequence[Question]) -> np.ndarray | None:
  """R height width 3, None where there are none."""
  frames = [q.first_frame for q in questions if q.first_frame is not None]
  return np.stack(frames) if frames else None


def first_pictures(questions: Sequence[Question]) -> np.ndarray | None:
  """The same to be looked at, uint8."""
  frames = first_frames(questions)
  return None if frames is None else framing.as_bytes(frames)


def warn_broken(finite: np.ndarray) -> None:
  """Warns of runs with numbers that are not finite; finite is S R."""
  for run in np.flatnonzero(~finite.all(0)):
    step = int(np.argmin(finite[:, run]))
    warnings.warn(
      f"run {run} is not finite from step {step} on: its video and answers mean nothing.",
      stacklevel=2,
    )


def shown_steps(chosen: SampleSettings, count: int, keep: Sequence[int] = ()) -> list[int]:
  """The steps of which x0 is decoded for `count` runs: those to keep, and always the last.

  Without any to keep: all, or as many as `SHOWN_PIXELS` allows, at least `SHOWN_STEPS`.
  """
  last = chosen.steps - 1
  pixels = count * chosen.frames * chosen.height * chosen.width
  most = min(chosen.steps, max(SHOWN_STEPS, SHOWN_PIXELS // pixels))
  return sorted({*(keep or spread(chosen.steps, most)), last})


def describe(question: Question, seed: int) -> Mapping[str, Any]:
  """The entry of a run in runs.json."""
  if question.case is None:
    return {"seed": seed, "prompt": question.prompt}
  case = question.case
  return {
    "case": f"{case.task} {case.split} {case.index}",
    "task": case.task,
    "split": case.split,
    "index": case.index,
    "seed": seed,
    "prompt": case.prompt,
    "metadata": case.metadata,
  }


def finish(out: str) -> None:
  """Draws the report of the run that now lies in `out` and says where to look; one process does.

  Raises:
    ValueError: it could not be drawn; what was computed stays.
  """
  if not console.speaks():
    return
  place = Path(out).resolve()
  try:
    page = report.render(place)
  except (ValueError, OSError) as error:
    raise ValueError(
      f"the run is whole in {out}, its report could not be drawn ({error}): when that is mended, "
      f"`videoreason report {out}` draws it."
    ) from error
  console.say(f"report: {page.as_uri()}")
  console.say(f"in Python: jax_videoreason.open_run({str(place)!r})")
