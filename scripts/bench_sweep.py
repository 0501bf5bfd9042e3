"""What a sweep costs beside the bare sampler: one JSON line a question.

  python scripts/bench_sweep.py                               128 runs, 3 pairs, all questions
  python scripts/bench_sweep.py --config seeds_mini --pairs 1    all 1,024 runs
  python scripts/bench_sweep.py whole --config seeds_mini:cases=2,reader=preview
  python scripts/bench_sweep.py parts

`whole`: `throughput` is seconds of the bare sampler (the same runs, batches as large as a unit,
nothing kept, decoded or written) over seconds of the whole sweep: encoding, decoding, scoring,
writing, table and manifest. Median over interleaved pairs in this process, with its 95% bootstrap
interval; compiled before. `of_videos`: beside a bare sampler that then decodes its final videos,
computed: the same times (1 + `decode_s` / seconds of the bare sampler), where `decode_s` is what
that takes (of one unit, the median of three, for each unit). `steady`: `throughput` from the end of
the first unit of every lane to the end of the last, without what a sweep does once; in CPU seconds,
which other work on the machine hardly moves. `reader`: what showed x0 at every step. `compute_s`
and `read_s`: of the units of the last sweep, of all lanes. `lanes`: units that it computes side by
side; the bare sampler makes one batch after the other. `side_by_side`: how much faster it is in
as many lanes, over up to 8 a lane and as many pairs. `extra_mb`: peak memory during the sweeps
beyond that of the bare sampler (Linux).

`parts`: CPU seconds of one run of the bare sampler, of reading its answers at every step by each
reader, and of decoding and scoring its final video; the least of two, over as many runs as a unit
has, spread over all tasks.

`readers`: of the answers at every step that the VAE shows, how many the preview shows too, and
to how many it shows another one (`contradicted`).
"""

import argparse
import contextlib
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_denoise import BARE, ask, pairs, say, seconds

from jax_videoreason import baselines, cli, factors, lanes, product, runs, settings, sweep
from jax_videoreason.decode import decode
from jax_videoreason.records import read_json

WARM = "cases=1"  # of each task; of the same width as what is measured


def multiplied(name: str) -> factors.Product:
  config = cli.load_config(name).to_dict()
  own = {key: config.pop(key) for key in factors.KEYS}
  return factors.multiply(settings.from_config(config), factors.varied(own))


def sampled(bench: product.Bench, asked: Sequence[tuple[int, int]]) -> np.ndarray:
  """R F H W C of runs (number of the case, seed), sampled together; nothing else is kept."""
  of, spec = bench.product, bench.bundle.card.latents
  chosen = of.chosen
  noise = runs.make_noise(
    [runs.seed_of(of.cases[case].index, seed) for case, seed in asked],
    spec.shape(chosen.frames, chosen.height, chosen.width),
  )
  cond = runs.take(bench.cond, np.array([case for case, _ in asked]))
  return runs.run(bench.bundle, noise, cond, bench.schedule, taps=BARE)


def in_lanes(bench: product.Bench, units: range, number: int) -> None:
  """The bare sampler over some units, in so many lanes."""

  def compute(unit: int) -> np.ndarray:
    return sampled(bench, bench.product.runs_in(unit))

  lanes.carry(units, compute, lambda unit, final: None, lanes=number)


def peak(call: Callable[[], Any], seen: list[float]) -> None:
  """Calls, and adds the peak memory of this process meanwhile, in MB."""
  if sys.platform == "linux":
    Path("/proc/self/clear_refs").write_text("5")
  call()
  if sys.platform == "linux":
    lines = Path("/proc/self/status").read_text().splitlines()
    seen.append(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024)


def cpu(call: Callable[[], Any], count: int) -> float:
  """CPU seconds of a call, the least of two after one that compiles, for each of `count`."""
  taken = []
  for _ in range(3):
    began = time.process_time()
    jax.block_until_ready(call())
    taken.append(time.process_time() - began)
  return round(min(taken[1:]) / count, 4)


def spread(of: factors.Product) -> list[tuple[int, int]]:
  """As many runs as a unit has, evenly over all cases and seeds."""
  seeds = of.chosen.seeds
  some = np.linspace(0, len(of.cases) * len(seeds) - 1, of.width).round().astype(int)
  return [(int(n) // len(seeds), seeds[n % len(seeds)]) for n in some]


def measure_readers(options: argparse.Namespace) -> None:
  of = multiplied(options.config)
  bench = product.ready(of)
  read: dict[str, list[np.ndarray]] = {by: [] for by in factors.READERS}
  names: list[str] = []
  for unit in range(of.units):
    x0 = product.compute(bench, unit).x0
    cases = [of.cases[case] for case, _ in of.runs_in(unit)]
    names += [case.task for case in cases]
    for by, parts in read.items():
      parts.append(product.answers_at(bench, cases, x0, by))
  whole = {by: np.concatenate(parts, 1) for by, parts in read.items()}
  for name in of.tasks:
    vae, preview = (whole[by][:, np.array(names) == name] for by in ("vae", "preview"))
    readable, shown = (said != None for said in (vae, preview))  # noqa: E711, of every element
    say(
      "what the preview shows of what the VAE shows",
      task=name,
      runs=vae.shape[1],
      answers=vae.size,
      readable_by_vae=round(float(readable.mean()), 3),
      the_same=round(float((vae == preview).mean()), 3),
      the_same_of_readable=round(float((vae == preview)[readable].mean()), 3)
      if readable.any()
      else None,
      contradicted=round(float((readable & shown & (vae != preview)).mean()), 3),
    )


def measure_parts(options: argparse.Namespace) -> None:
  of = multiplied(options.config)
  bench, asked = product.ready(of), spread(of)
  cases = [of.cases[case] for case, _ in asked]
  made = product.sample(bench, asked, {"edit": "none"})

  def score() -> None:
    videos = decode(bench.bundle, made.final, tiles=of.chosen.tiles)
    for case, video in zip(cases, videos, strict=True):
      baselines.mark(of.tasks[case.task], video, case.metadata)

  def answers(by: str) -> float:
    return cpu(lambda: product.answers_at(bench, cases, made.x0, by), of.width)

  say(
    "CPU seconds of a run",
    sampler=cpu(lambda: sampled(bench, asked), of.width),
    **{f"steps_by_{by}": answers(by) for by in factors.READERS},
    final=cpu(score, of.width),
    steps=of.chosen.steps,
    tasks=list(of.tasks),
  )


def measure_whole(options: argparse.Namespace) -> None:
  of = multiplied(options.config)
  name, colon, rest = options.config.partition(":")
  small = multiplied(f"{name}:{rest},{WARM}" if colon else f"{name}:{WARM}")
  if of.units < 2:
    raise SystemExit(f"one unit of {of.width} runs, wanted two or more: give more cases.")
  if small.width != of.width:
    raise SystemExit(f"units of {of.width} runs, with {WARM} of {small.width}: give more seeds.")
  rounds = [small, *[of] * options.pairs]  # the first one compiles and is not counted
  plain, swept = iter(rounds), iter(rounds)
  memory: tuple[list[float], list[float]] = [], []
  with tempfile.TemporaryDirectory() as scratch:
    out = Path(scratch) / "sweep"
    bench = product.ready(of)
    number = product.lanes_for(of, None)
    sweep_cpu: list[float] = []  # seconds a run, after the first unit of every lane

    def whole(round_: factors.Product) -> None:
      shutil.rmtree(out, ignore_errors=True)
      ends: list[float] = []
      product.perform(
        out,
        round_,
        mesh=None,
        progress=lambda _: contextlib.nullcontext(lambda runs: ends.append(time.process_time())),
      )
      if len(ends) > number:
        spent = ends[-1] - ends[number - 1]
        sweep_cpu.append(spent / (round_.width * (len(ends) - number)))

    bare_cpu: list[float] = []  # seconds a run

    def bare(round_: factors.Product) -> None:
      began = time.process_time()
      for unit in range(round_.units):
        sampled(dataclasses.replace(bench, product=round_), round_.runs_in(unit))
      bare_cpu.append((time.process_time() - began) / (round_.units * round_.width))

    row = pairs(
      lambda: peak(lambda: bare(next(plain)), memory[0]),
      lambda: peak(lambda: whole(next(swept)), memory[1]),
      options.pairs,
    )
    took = [read_json(path)["seconds"] for path in sorted((out / sweep.UNITS).glob("*.json"))]
  some = range(min(of.units, 8 * number))
  beside = None
  if number > 1:
    beside = pairs(
      lambda: in_lanes(bench, some, 1), lambda: in_lanes(bench, some, number), options.pairs
    )
  ratio, final = row.pop("ratio"), sampled(bench, of.runs_in(0))
  shown = [seconds(lambda: decode(bench.bundle, final, tiles=of.chosen.tiles)) for _ in range(3)]
  decode_s = of.units * float(np.median(shown))
  say(
    "throughput of a sweep over the bare sampler",
    wanted="at least 0.9, at most 300 MB",
    runs=of.units * of.width,
    unit=of.width,
    throughput=ratio,
    **row,
    of_videos=round(ratio * (1 + 1e3 * decode_s / row["with_ms"]), 4),
    steady=round(float(np.median(bare_cpu[1:]) / np.median(sweep_cpu[-options.pairs :])), 4),
    reader=of.varied.reader,
    decode_s=round(decode_s, 1),
    compute_s=round(sum(s["compute"] for s in took), 1),
    read_s=round(sum(s["read"] for s in took), 1),
    lanes=number,
    side_by_side=beside and beside["ratio"],
    extra_mb=round(max(memory[1][1:]) - max(memory[0][1:])) if memory[0] else None,
  )


QUESTIONS = {"whole": measure_whole, "parts": measure_parts, "readers": measure_readers}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="seeds_mini:cases=2")
  parser.add_argument("--pairs", type=int, default=3)
  ask(parser, QUESTIONS)


if __name__ == "__main__":
  main()
