"""What converting costs: memory and time of `videoreason convert` on a synthetic checkpoint.

  python scripts/bench_convert.py                   0.5 GB
  python scripts/bench_convert.py --gigabytes 6     layers as wide as those of the 14B models

Prints one JSON line. The checkpoint has random float32 weights in four shards. Peak RSS is that of
the whole command; its limit is the largest tensor of the source in both dtypes plus 1.5 GB. Time is
set against `sha256sum SRC && cp -r SRC DST && sync` before and after it, on the same disk. `speed`
counts the whole command; `speed_started` leaves out what `--dry-run` takes (imports, headers).
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jax_videoreason.convert import engine, wan
from jax_videoreason.models.wan import WanConfig, abstract_params

SHARDS = 4
ALLOWED = 1.5e9  # bytes beside the tensor
TARGET_BYTES = {"fp32": 4, "bf16": 2}
SMALL = dict(width=1536, ffn_width=8960, heads=12)
LARGE = dict(width=5120, ffn_width=13824, heads=40)
WIDE_FROM = 4.0  # GB


def make(folder: Path, gigabytes: float) -> int:
  """A text-to-video transformer of about so much in the original layout; bytes of its largest."""
  sizes = LARGE if gigabytes >= WIDE_FROM else SMALL
  one, two = (_bytes(WanConfig(layers=n, **sizes)) for n in (1, 2))
  layers = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
  config = WanConfig(layers=layers, **sizes)
  tree = abstract_params(config)
  leaves = engine.leaves(tree)
  moves = engine.moves_back(wan.table("original"), tree)
  patch = dict(zip(("pf", "ph", "pw"), config.patch, strict=True))
  rng = np.random.default_rng(0)
  weights: dict[str, str] = {}
  largest, share = 0, math.ceil(len(moves) / SHARDS)
  for shard in range(SHARDS):
    name = f"diffusion_pytorch_model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
    made = {}
    for move in moves[shard * share : (shard + 1) * share]:
      shape = leaves[move.target].shape[0 if move.layer is None else 1 :]
      value = move.back(rng.random(shape, dtype=np.float32), **patch)
      made[move.source] = np.ascontiguousarray(value)
      weights[move.source] = name
      largest = max(largest, value.nbytes)
    save_file(made, folder / name)
  index = {"metadata": {}, "weight_map": weights}
  (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
  said = {"model_type": "t2v", "dim": config.width, "num_layers": layers, "num_heads": config.heads}
  (folder / "config.json").write_text(json.dumps(said))
  return largest


def copied(source: Path, to: Path) -> float:
  """Seconds of hashing, copying and syncing."""
  began = time.perf_counter()
  command = f"sha256sum {source}/* > {os.devnull} && cp -r {source} {to} && sync"
  subprocess.run(command, shell=True, check=True)
  spent = time.perf_counter() - began
  shutil.rmtree(to)
  return spent


def converted(*words: str) -> tuple[float, float]:
  """Seconds and peak RSS in bytes of one command; it must succeed."""
  began = time.perf_counter()
  command = [sys.executable, "-m", "jax_videoreason", "convert", *words]
  child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  _, status, used = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  if child.returncode:
    raise SystemExit(f"convert {' '.join(words)} ended with {child.returncode}.")
  scale = 1 if sys.platform == "darwin" else 1024
  return time.perf_counter() - began, used.ru_maxrss * scale


def measure(gigabytes: float, dtype: str, where: Path) -> dict[str, Any]:
  source, copy, out = where / "source", where / "copy", where / "out"
  source.mkdir()
  # In a process of its own: Linux counts the memory of whoever starts a command as the command's.
  with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
    largest = pool.submit(make, source, gigabytes).result()
  size = sum(file.stat().st_size for file in source.iterdir())
  subprocess.run(["sync"], check=True)
  start, _ = converted(str(source), "--parts=dit", "--dry-run")
  before = copied(source, copy)
  whole, rss = converted(str(source), "--parts=dit", f"--out={out}", f"--dtype={dtype}")
  shutil.rmtree(out)
  base = (before + copied(source, copy)) / 2
  return {
    "gigabytes": round(size / 1e9, 3),
    "shards": SHARDS,
    "dtype": f"fp32 to {dtype}",
    "peak_rss_mb": round(rss / 1e6),
    "largest_tensor_mb": round(largest / 1e6),
    "limit_mb": round((largest * (1 + TARGET_BYTES[dtype] / 4) + ALLOWED) / 1e6),
    "convert_s": round(whole, 2),
    "start_s": round(start, 2),
    "copy_s": round(base, 2),
    "speed": round(base / whole, 3),
    "speed_started": round(base / max(whole - start, 1e-9), 3),
    "cpus": os.cpu_count(),
    "machine": platform.machine(),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def _bytes(config: WanConfig) -> int:
  return 4 * sum(math.prod(leaf.shape) for leaf in engine.leaves(abstract_params(config)).values())


def main(words: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--gigabytes", type=float, default=0.5, help="size of the checkpoint")
  parser.add_argument("--dtype", choices=sorted(TARGET_BYTES), default="fp32")
  parser.add_argument("--dir", type=Path, help="a folder on the disk to measure")
  given = parser.parse_args(words)
  with tempfile.TemporaryDirectory(dir=given.dir) as where:
    print(json.dumps(measure(given.gigabytes, given.dtype, Path(where))))


if __name__ == "__main__":
  main()
