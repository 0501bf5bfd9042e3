"""A made-up run folder: mazes that a pretended model solves step by step, after a wrong start."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from jax_videoreason import answers, store, tasks
from jax_videoreason.structs import Trace

SITES = ("attn_out/norm", "resid_post/norm")


def sigmas(steps: int, shift: float = 5.0) -> np.ndarray:
  s = np.linspace(1, 1 / steps, steps)
  return (shift * s / (1 + (shift - 1) * s)).astype(np.float32)


def guesses(task: Any, case: Any, sigma: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """S frames height width 3 uint8: a wrong answer, a blend, then the truth, under noise that fades.

  In one run of four the wrong answer stays. Where there is none the first frame stands for it.
  """
  wrong = task.wrong_answers(case.metadata)
  truth = case.frames.astype(np.float32)
  other = np.broadcast_to(case.first_frame, truth.shape)
  if wrong:
    other = task.render(case.metadata, wrong[int(rng.integers(len(wrong)))])
  turn, stays = rng.uniform(0.7, 0.97), rng.random() < 0.25
  rows = []
  for s in sigma:
    share = 0.15 if stays and s < turn else np.clip(0.5 + (turn - s) * 9, 0, 1)
    noise = rng.normal(0, 25 * max(0.0, float(s) - 0.6), truth.shape)
    rows.append(np.clip((1 - share) * other + share * truth + noise, 0, 255))
  return np.stack(rows).round().astype(np.uint8)


def piece(rng: np.random.Generator, sigma: np.ndarray, runs: int, layers: int = 3) -> Trace:
  """A trace of the right shapes: F H W C = 2 4 4 4, T = 8."""
  steps = len(sigma)
  noise, clean = rng.normal(size=(2, runs, 2, 4, 4, 4)).astype(np.float32)
  level = rearrange(sigma, "s -> s 1 1 1 1 1")
  return Trace(
    sigma=sigma,
    finite=np.ones((steps, runs), bool),
    latents=(1 - level) * clean + level * noise,
    x0=(1 - level**3) * clean,
    taps={s: rng.normal(size=(steps, layers, 1, runs, 8)).astype(np.float32) for s in SITES},
  )


def make(
  out: Path,
  *,
  cases: tuple[tuple[str, int], ...] = (("maze", 0), ("maze", 1)),
  seeds: int = 2,
  steps: int = 6,
  known: bool = True,
  prompt: str | None = None,
  broken: tuple[int, int] | None = None,
  readable: Sequence[int] | None = None,
  redo: bool = False,
) -> Path:
  """Writes a run folder. known: the runs belong to tasks. broken: (step, run), not finite.

  readable: for each step 1 = the truth, 0 = grey.
  """
  rng = np.random.default_rng(0)
  sigma = sigmas(steps)
  every, frames, truth = [], [], []
  for name, index in cases:
    task = tasks.load(name, size=32, frames=17)
    case = task.generate("id", index)
    for seed in range(seeds):
      every.append((task, case, seed))
      frames.append(guesses(task, case, sigma, rng))
      truth.append(case.first_frame)
      if readable is not None:
        frames[-1] = np.stack([case.frames if yes else case.frames * 0 + 128 for yes in readable])
  x0 = rearrange(np.stack(frames), "r s f h w c -> s r f h w c")
  trace = piece(rng, sigma, len(every))
  if broken is not None:
    trace.finite[broken[0] :, broken[1]] = False
    trace.x0[broken[0] :, broken[1]] = np.nan
  runs = [
    {
      "case": f"{case.task} {case.split} {case.index}",
      "task": case.task,
      "split": case.split,
      "index": case.index,
      "seed": seed,
      "prompt": case.prompt if prompt is None else prompt,
      "metadata": case.metadata,
    }
    if known
    else {"seed": seed, "prompt": case.prompt if prompt is None else prompt}
    for _, case, seed in every
  ]
  with store.run_folder(out, redo=redo) as folder:
    with store.create_trace(folder, steps=steps, runs=len(every)) as writer:
      writer.write(trace)
      writer.write_frames(x0)
    store.write_final_latents(folder, trace.x0[-1])
    store.write_runs(folder, runs)
    store.write_videos(folder, x0[-1])
    store.write_first_frames(folder, np.stack(truth))
    if known:
      read = answers.read_steps(
        [task for task, _, _ in every], [case.metadata for _, case, _ in every], x0, sigma
      )
      store.write_answers(folder, read)
    store.write_manifest(
      folder,
      config={"steps": steps, "shift": 5.0, "guidance": 5.0, "seeds": list(range(seeds))},
      command=["videoreason", "demo", "--out", "runs/demo"],
      device="cpu",
      model="mini",
    )
  return out
