"""What watching costs: one JSON line per question, each a side-by-side measurement in this process.

  python scripts/bench_denoise.py                   all questions, on the shipped model
  python scripts/bench_denoise.py trace taps        only some

A ratio is the median over interleaved pairs of (with / without), with the 95% bootstrap interval of
that median; order within a pair alternates. Nothing is timed before it is compiled and run once.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_videoreason import load, probes, runs, sampler, schedules
from jax_videoreason.decode import preview
from jax_videoreason.experiments import EXPERIMENTS
from jax_videoreason.interventions import identity
from jax_videoreason.models.wan import WanConfig, WanDiT
from jax_videoreason.structs import Card, Conditioning, LatentSpec, ModelBundle, Noise, Parts
from jax_videoreason.taps import HEAD_SITES, SITES, TapSpec, tap_bytes

BARE = TapSpec(latents=False, x0=False)
TRACED = TapSpec()
STREAM = tuple(site for site in SITES if site not in HEAD_SITES)
NORMS = TapSpec(sites=("resid_post",), reduce=("norm",))


def seconds(call: Callable[[], Any]) -> float:
  """What one call takes."""
  began = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - began


def median(values: np.ndarray) -> tuple[float, list[float]]:
  """The median and its 95% bootstrap interval."""
  draws = np.median(np.random.default_rng(0).choice(values, (2000, len(values))), axis=1)
  return float(np.median(values)), [float(end) for end in np.percentile(draws, [2.5, 97.5])]


def pairs(with_it: Callable[[], Any], without: Callable[[], Any], count: int) -> dict[str, Any]:
  """Median ratio of times over interleaved pairs, with its interval, and the medians in ms."""
  seconds(with_it), seconds(without)
  times = []
  for number in range(count):
    if number % 2:
      b = seconds(without)
      a = seconds(with_it)
    else:
      a = seconds(with_it)
      b = seconds(without)
    times.append((a, b))
  table = np.asarray(times)
  ratio, interval = median(table[:, 0] / table[:, 1])
  return {
    "ratio": round(ratio, 4),
    "interval": [round(end, 4) for end in interval],
    "pairs": count,
    "with_ms": round(1e3 * float(np.median(table[:, 0])), 2),
    "without_ms": round(1e3 * float(np.median(table[:, 1])), 2),
  }


def say(question: str, **row: Any) -> None:
  """One JSON line with the machine and the versions."""
  device = jax.devices()[0]
  where = {
    "device": device.device_kind,
    "processor": platform.machine(),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }
  print(json.dumps({"question": question, **row, **where}), flush=True)


def mini_problem(count: int, steps: int) -> tuple[ModelBundle, Noise, Conditioning, Any]:
  """Random conditioning of the shape of mini's: timings do not depend on the values."""
  bundle = load("mini", parts=("dit", "preview"))
  shape = bundle.card.latents.shape(17, 32, 32)
  config = bundle.parts.dit.config
  rng = np.random.default_rng(0)
  text = rng.normal(size=(2, count, bundle.card.text_length, config.text_width))
  cond = Conditioning(
    text=jnp.asarray(text, jnp.float32),
    known=jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32),
    known_mask=jnp.zeros((count, *shape[:-1], 4)).at[:, 0].set(1.0),
  )
  noise = runs.make_noise(range(count), shape)
  return bundle, noise, cond, schedules.build(steps=steps, freq_dim=config.freq_dim)


def measure_trace(options: argparse.Namespace) -> None:
  problem = mini_problem(options.runs, options.steps)
  row = pairs(
    lambda: sampler.denoise(*problem, taps=TRACED),
    lambda: sampler.denoise(*problem, taps=BARE),
    options.pairs,
  )
  say("latents and x0 of every step", wanted="upper end at most 1.05", **row)


def measure_taps(options: argparse.Namespace) -> None:
  problem = mini_problem(options.runs, options.steps)
  row = pairs(
    lambda: sampler.denoise(*problem, taps=NORMS),
    lambda: sampler.denoise(*problem, taps=TRACED),
    options.pairs,
  )
  say("token norms of every layer and step", wanted="at most 1.15", **row)


def measure_identity(options: argparse.Namespace) -> None:
  problem = mini_problem(options.runs, options.steps)
  sizes = sampler.sizes_of(*problem)
  edit = identity(sizes, edits=("mix", "gate", "steer"), sites=STREAM)
  row = pairs(
    lambda: sampler.denoise(*problem, edit=edit),
    lambda: sampler.denoise(*problem),
    options.pairs,
  )
  say("all sites but those of heads open with an identity", wanted="at most 1.05", **row)


def measure_maps(options: argparse.Namespace) -> None:
  """The taps of `run layer_maps`: time beside the run itself, and what memory they take."""
  problem = mini_problem(options.runs, options.steps)
  sizes = sampler.sizes_of(*problem)
  study = EXPERIMENTS["layer_maps"]
  taps = study.tapped(sizes, study.options)
  row = pairs(
    lambda: sampler.denoise(*problem, taps=taps),
    lambda: sampler.denoise(*problem, taps=TRACED),
    options.pairs,
  )
  memory = lowered(problem, taps).compile().memory_analysis()
  states = 4 * sizes.S * sizes.L * len(taps.sites) * sizes.G * sizes.R * sizes.T * sizes.D
  say(
    "the maps of layer_maps, all layers and steps",
    wanted="at most 1.15",
    **row,
    taps_mb=round(tap_bytes(taps, sizes) / 1e6, 1),
    peak_mb=round((memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6, 1),
    hidden_states_mb=round(states / 1e6, 1),
  )


def measure_probes(options: argparse.Namespace) -> None:
  """All probes of one target: 12 layers x 25 steps, 32 cases x 4 seeds, 512 features, 5 classes."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(300, 128, 512)).astype(np.float32)
  labels, cases = rng.integers(0, 5, 128), np.repeat(np.arange(32), 4)
  spent = [seconds(lambda: probes.crossed(features, labels, cases)) for _ in range(2)]
  say(
    "seconds of all probes of a target, 12 layers x 25 steps, in one call",
    wanted="under 60",
    first=round(spent[0], 1),
    again=round(spent[1], 1),
  )


def measure_run(options: argparse.Namespace) -> None:
  """Seconds per run of mini: 25 guided steps of 8 runs, and the x0 of every step as pictures."""
  count, steps = 8, 25
  bundle, *problem = mini_problem(count, steps)

  def call() -> Any:
    return preview(bundle, sampler.denoise(bundle, *problem)[1].x0)

  seconds(call)
  spent, interval = median(np.array([seconds(call) for _ in range(options.pairs)]) / count)
  say(
    f"seconds per run of mini, {steps} guided steps in a batch of {count}, with x0 previews",
    wanted="at most 1.0",
    seconds=round(spent, 3),
    interval=[round(end, 3) for end in interval],
    batches=options.pairs,
    cores=len(os.sched_getaffinity(0)),
  )


def abstract_problem(steps: int, layers: int) -> tuple[Any, ...]:
  """A 14B-wide image-to-video problem at 480x832, 81 frames, as shapes: nothing is allocated."""
  config = WanConfig(
    width=5120,
    ffn_width=13824,
    heads=40,
    layers=layers,
    in_channels=36,
    out_channels=16,
    image_input="concat",
    dtype="bfloat16",
  )
  spec = LatentSpec(channels=16, stride=(4, 8, 8))
  grid = spec.grid(81, 480, 832)
  dit = WanDiT(config)
  cells = jax.ShapeDtypeStruct((1, *grid, 16), jnp.float32)
  cond = Conditioning(
    text=jax.ShapeDtypeStruct((2, 1, 512, 4096), jnp.float32),
    known=cells,
    known_mask=jax.ShapeDtypeStruct((1, *grid, 4), jnp.float32),
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  row = jax.ShapeDtypeStruct((2, 256), jnp.float32)
  params = jax.eval_shape(dit.init, key, cells, row, cond)["params"]
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
  bundle = ModelBundle(
    params=(params,),
    parts=Parts(dit=dit),
    card=Card(name="14b", family="wan21", latents=spec, text_length=512),
  )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  return bundle, Noise(keys=keys, grid=(*grid, 16)), cond, schedules.build(steps=steps)


def lowered(problem: tuple[Any, ...], taps: TapSpec) -> Any:
  return jax.jit(sampler.denoise).lower(*problem, taps=taps)


def measure_cost(options: argparse.Namespace) -> None:
  """Bytes and FLOPs that XLA counts for one step of the loop, with and without the trace."""
  problem = abstract_problem(steps=50, layers=40)
  costs = [lowered(problem, taps).compile().cost_analysis() for taps in (TRACED, BARE)]
  ratio = {
    name: round(costs[0][key] / costs[1][key], 6)
    for name, key in (("flops", "flops"), ("bytes", "bytes accessed"))
  }
  say("14B shape, latents and x0 by cost analysis", wanted="at most 1.01", **ratio)


def compile_seconds(problem: tuple[Any, ...]) -> float:
  program = lowered(problem, NORMS)
  began = time.perf_counter()
  program.compile()
  return time.perf_counter() - began


def measure_compile(options: argparse.Namespace) -> None:
  """Compilation of the 14B shape: it must not grow with steps, and hardly with layers."""
  for name, wanted, long, short in (
    ("50 steps against 10", 1.15, (50, 40), (10, 40)),
    ("40 layers against 4", 1.3, (50, 40), (50, 4)),
  ):
    spent = []
    for _ in range(options.compiles):
      jax.clear_caches()
      a = compile_seconds(abstract_problem(*long))
      jax.clear_caches()
      spent.append((a, compile_seconds(abstract_problem(*short))))
    table = np.asarray(spent)
    say(
      f"compile time, {name}",
      wanted=f"at most {wanted}",
      ratio=round(float(np.median(table[:, 0] / table[:, 1])), 3),
      seconds=[round(float(s), 2) for s in np.median(table, axis=0)],
      pairs=options.compiles,
    )


def measure_start(options: argparse.Namespace) -> None:
  """Seconds of `import jax_videoreason` and of `videoreason --help`, medians of five."""
  root = Path(__file__).resolve().parent.parent
  for name, wanted, words in (
    ("import", 3.0, ["-c", "import jax_videoreason"]),
    ("--help", 1.5, ["-m", "jax_videoreason", "--help"]),
  ):
    spent = []
    for _ in range(5):
      began = time.perf_counter()
      subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=root)
      spent.append(time.perf_counter() - began)
    say(f"seconds of {name}", wanted=f"under {wanted}", seconds=round(float(np.median(spent)), 3))


QUESTIONS = {
  "run": measure_run,
  "trace": measure_trace,
  "taps": measure_taps,
  "identity": measure_identity,
  "maps": measure_maps,
  "probes": measure_probes,
  "cost": measure_cost,
  "compile": measure_compile,
  "start": measure_start,
}


def ask(parser: argparse.ArgumentParser, known: Mapping[str, Callable[..., None]]) -> None:
  """Measures the questions that the command line names, all where it names none."""
  parser.add_argument("questions", nargs="*", default=list(known), metavar="QUESTION")
  options = parser.parse_args()
  for name in options.questions:
    if name not in known:
      parser.error(f"no question {name!r}; there are: {', '.join(known)}.")
    known[name](options)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--pairs", type=int, default=30)
  parser.add_argument("--compiles", type=int, default=3, help="pairs of compilations")
  parser.add_argument("--runs", type=int, default=4)
  parser.add_argument("--steps", type=int, default=10)
  ask(parser, QUESTIONS)


if __name__ == "__main__":
  main()
