"""What a sweep costs beside the bare sampler: one JSON line.

  python scripts/bench_sweep.py                               64 runs, 3 pairs
  python scripts/bench_sweep.py --config seeds_mini --pairs 1    all 1,024 runs
  python scripts/bench_sweep.py --config seeds_mini:cases=1,reader=preview

`throughput` is seconds of the bare sampler (the same runs, batches as large as a unit, nothing
kept, decoded or written) over seconds of the whole sweep: encoding, settling the readers, decoding,
scoring, writing, table and manifest. Median over interleaved pairs in this process, with its 95%
bootstrap interval; compiled before. `readers`: how answers at every step were read. `compute_s` and
`read_s`: of the units of the last sweep, which overlap. `extra_mb`: peak memory during the sweeps
beyond that of the bare sampler (Linux).
"""

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_denoise import BARE, pairs, say

from jax_videoreason import cli, evaluate, factors, product, runs, settings, sweep
from jax_videoreason.folders import read_json

WARM = "cases=1"  # of each task; of the same width as what is measured


def multiplied(name: str) -> factors.Product:
  config = cli.load_config(name).to_dict()
  own = {key: config.pop(key) for key in factors.KEYS}
  return factors.multiply(settings.from_config(config), factors.varied(own))


def bare(bench: product.Bench) -> None:
  """All runs of a product through the sampler, a unit at a time."""
  of = bench.product
  spec, chosen = bench.bundle.card.latents, of.chosen
  grid = (*spec.grid(chosen.frames, chosen.height, chosen.width), spec.channels)
  for unit in range(of.units):
    asked = of.runs_in(unit)
    seeds = [of.cases[case].index * evaluate.STRIDE + seed for case, seed in asked]
    cond = runs.take(bench.cond, np.array([case for case, _ in asked]))
    runs.run(bench.bundle, runs.make_noise(seeds, grid), cond, bench.schedule, taps=BARE)


def peak(call: Callable[[], Any], seen: list[float]) -> None:
  """Calls, and adds the peak memory of this process meanwhile, in MB."""
  if sys.platform == "linux":
    Path("/proc/self/clear_refs").write_text("5")
  call()
  if sys.platform == "linux":
    lines = Path("/proc/self/status").read_text().splitlines()
    seen.append(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  of = multiplied(options.config)
  name, colon, rest = options.config.partition(":")
  small = multiplied(f"{name}:{rest},{WARM}" if colon else f"{name}:{WARM}")
  if small.width != of.width:
    raise SystemExit(f"units of {of.width} runs, with {WARM} of {small.width}: give more seeds.")
  rounds = [small, *[of] * options.pairs]  # the first one compiles and is not counted
  plain, swept = iter(rounds), iter(rounds)
  memory: tuple[list[float], list[float]] = [], []
  with tempfile.TemporaryDirectory() as scratch:
    out = Path(scratch) / "sweep"
    bench = product.ready(of)

    def whole(round_: factors.Product) -> None:
      shutil.rmtree(out, ignore_errors=True)
      product.perform(out, round_, devices=jax.local_devices()[:1])

    row = pairs(
      lambda: peak(lambda: bare(dataclasses.replace(bench, product=next(plain))), memory[0]),
      lambda: peak(lambda: whole(next(swept)), memory[1]),
      options.pairs,
    )
    readers = {task: said["by"] for task, said in read_json(out / sweep.SETTLED).items()}
    seconds = [read_json(path)["seconds"] for path in sorted((out / sweep.UNITS).glob("*.json"))]
  return {
    "runs": of.units * of.width,
    "unit": of.width,
    "throughput": row.pop("ratio"),
    **row,
    "readers": readers,
    "compute_s": round(sum(s["compute"] for s in seconds), 1),
    "read_s": round(sum(s["read"] for s in seconds), 1),
    "extra_mb": round(max(memory[1][1:]) - max(memory[0][1:])) if memory[0] else None,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="seeds_mini:cases=1")
  parser.add_argument("--pairs", type=int, default=3)
  options = parser.parse_args()
  said = measure(options)
  say("throughput of a sweep over the bare sampler", wanted="at least 0.9, 300 MB", **said)


if __name__ == "__main__":
  main()
