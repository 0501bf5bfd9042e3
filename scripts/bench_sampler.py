"""The sampler with the shipped model: beside diffusers' loop, and many seeds against one by one.

  python scripts/bench_sampler.py                   both questions, 25 steps
  python scripts/bench_sampler.py diffusers --pairs 20

One JSON line each. A ratio is the median over interleaved pairs in this process, with its 95%
bootstrap interval. `diffusers`: seconds of the loop over seconds of ours, on weights that
`videoreason convert mini --to diffusers` writes, the same noise, conditioning and Euler schedule
(above 1, ours is the faster one); `difference` is how far the two results are apart. `batch`:
seconds of the seeds in one batch over those of one after the other.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from bench_denoise import BARE, ask, pairs, say
from diffusers import WanTransformer3DModel
from einops import rearrange

from jax_videoreason import bundles, conditioning, load, runs, sampler, schedules, tasks
from jax_videoreason.convert import export
from jax_videoreason.schedules import Schedule
from jax_videoreason.structs import Conditioning, ModelBundle, Noise

GUIDANCE = 2.0  # of configs/mini.py
Problem = tuple[ModelBundle, Noise, Conditioning, Schedule]


def problem(seeds: int, steps: int) -> Problem:
  """One puzzle with so many seeds, as `videoreason sample` runs the shipped model."""
  case = tasks.load("pick", size=32).generate("id", 0)
  bundle = load("mini")
  first = np.stack([case.first_frame] * seeds)
  cond = conditioning.encode(bundle, [case.prompt] * seeds, first, frames=17)
  config = bundle.parts.dit.config
  schedule = schedules.build(
    steps=steps, guidance=GUIDANCE, numerics=config.numerics, freq_dim=config.freq_dim
  )
  noise = runs.make_noise(range(seeds), bundle.card.latents.shape(17, 32, 32))
  return bundle, noise, cond, schedule


def exported() -> WanTransformer3DModel:
  """The transformer of the shipped model, written by our command and read by diffusers."""
  with tempfile.TemporaryDirectory() as scratch:
    out = export.write(bundles.find("mini"), Path(scratch) / "mini")
    return WanTransformer3DModel.from_pretrained(out / "transformer").eval().float()


def reference(theirs: WanTransformer3DModel, given: Problem) -> np.ndarray:
  """Final latents R F H W C of the loop of diffusers' pipeline: a forward pass for each branch."""
  _, noise, cond, schedule = given
  latents = channels_first(sampler.start(noise, "euler").latents)
  rest = channels_first(np.concatenate([cond.known_mask, cond.known], axis=-1))
  texts = [torch.tensor(np.asarray(text)) for text in cond.text]
  sigma = [float(s) for s in schedule.sigma]
  for now, then in itertools.pairwise(sigma):
    time = torch.full((latents.shape[0],), 1000 * now)
    seen = torch.cat([latents, rest], dim=1)
    with torch.no_grad():
      prompt, negative = (theirs(seen, time, text, return_dict=False)[0] for text in texts)
    latents = latents + (negative + GUIDANCE * (prompt - negative)) * (then - now)
  return rearrange(latents.numpy(), "r c f h w -> r f h w c")


def channels_first(value: jax.Array | np.ndarray) -> torch.Tensor:
  return torch.tensor(rearrange(np.asarray(value), "r f h w c -> r c f h w"))


def measure_diffusers(options: argparse.Namespace) -> None:
  given = problem(1, options.steps)
  theirs = exported()
  torch.set_num_threads(options.threads)
  ours, wanted = np.asarray(sampler.denoise(*given, taps=BARE)[0]), reference(theirs, given)
  say(
    f"speed of a {options.steps}-step sample over diffusers' loop",
    wanted="at least 2",
    difference=float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)),
    threads=torch.get_num_threads(),
    **pairs(
      lambda: reference(theirs, given), lambda: sampler.denoise(*given, taps=BARE), options.pairs
    ),
  )


def measure_batch(options: argparse.Namespace) -> None:
  bundle, noise, cond, schedule = problem(options.seeds, options.steps)
  alone = [(runs.take(noise, [r]), runs.take(cond, [r])) for r in range(options.seeds)]
  row = pairs(
    lambda: sampler.denoise(bundle, noise, cond, schedule, taps=BARE),
    lambda: [sampler.denoise(bundle, *one, schedule, taps=BARE) for one in alone],
    options.pairs,
  )
  say(f"{options.seeds} seeds in one batch over one by one", wanted="at most 0.8", **row)


QUESTIONS = {"diffusers": measure_diffusers, "batch": measure_batch}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--pairs", type=int, default=10)
  parser.add_argument("--steps", type=int, default=25)
  parser.add_argument("--seeds", type=int, default=8)
  parser.add_argument("--threads", type=int, default=2, help="of torch")
  ask(parser, QUESTIONS)


if __name__ == "__main__":
  main()
