"""What decoding a video takes: one JSON line per case, with the peak memory that XLA reports.

  python scripts/bench_vae.py                            81 frames of 480 x 832, chunks of 1, 2, 4
  python scripts/bench_vae.py --tiles diffusers none     in tiles, and whole frames
  python scripts/bench_vae.py --vae wan22 --height 704 --width 1280 --frames 121
  python scripts/bench_vae.py --seconds                  runs it too, with random weights

Compiles for the device that is there; without --seconds nothing is allocated, so a laptop says what
a full decode would need. Memory is that of one call: of tiles, the largest one.
"""

import argparse
import json
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp

from jax_videoreason.models import FAMILIES
from jax_videoreason.models.variants import VARIANTS
from jax_videoreason.models.wan21_vae import WanVAE
from jax_videoreason.structs import LatentSpec
from jax_videoreason.tiling import NAMES, named, places

VAES = {"wan21": VARIANTS["wan21_t2v_1_3b"].vae, "wan22": VARIANTS["wan22_ti2v_5b"].vae}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--vae", choices=VAES, default="wan21")
  parser.add_argument("--frames", type=int, default=81)
  parser.add_argument("--height", type=int, default=480)
  parser.add_argument("--width", type=int, default=832)
  parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4])
  parser.add_argument("--tiles", choices=("none", *NAMES), nargs="+", default=["none"])
  parser.add_argument("--seconds", action="store_true")
  chosen = parser.parse_args()
  for tiles in chosen.tiles:
    for chunk in chosen.chunks:
      print(json.dumps(case(chosen, tiles, chunk)), flush=True)


def case(chosen: argparse.Namespace, tiles: str, chunk: int) -> dict[str, Any]:
  """One decode, measured."""
  config = VAES[chosen.vae]
  vae = WanVAE(config)
  spec = LatentSpec(channels=config.z_channels, stride=config.stride)
  f, h, w = spec.grid(chosen.frames, chosen.height, chosen.width)
  count = 1
  if tiles != "none":
    where = [place for line in places(named(tiles, spec, config.fold), h, w) for place in line]
    count = len(where)
    h, w = (max(place[axis].stop - place[axis].start for place in where) for axis in (0, 1))
  latents = jax.ShapeDtypeStruct((1, f, h, w, config.z_channels), jnp.float32)
  params = FAMILIES["wan21"].parts["vae"].abstract(config)
  call = jax.jit(lambda p, z: vae.apply({"params": p}, z, chunk, method="decode"))
  began = time.perf_counter()
  compiled = call.lower(params, latents).compile()
  compile_s = time.perf_counter() - began
  memory: Any = compiled.memory_analysis()
  sizes = {
    "weights": memory.argument_size_in_bytes,
    "working": memory.temp_size_in_bytes,
    "video": memory.output_size_in_bytes,
  }
  said = {
    "vae": chosen.vae,
    "video": [chosen.frames, chosen.height, chosen.width],
    "tiles": tiles,
    "calls": count,
    "latent_frames_at_once": chunk,
    **{f"{name}_gb": round(size / 1e9, 3) for name, size in sizes.items()},
    "peak_gb": round(sum(sizes.values()) / 1e9, 3),
    "compile_s": round(compile_s, 1),
  }
  if chosen.seconds:
    weights = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), params)
    z = jnp.zeros(latents.shape)
    jax.block_until_ready(compiled(weights, z))
    began = time.perf_counter()
    jax.block_until_ready(compiled(weights, z))
    said["seconds_a_call"] = round(time.perf_counter() - began, 3)
  device = jax.devices()[0]
  where_run = {"device": device.device_kind, "processor": platform.machine()}
  return {**said, **where_run, "python": platform.python_version(), "jax": jax.__version__}


if __name__ == "__main__":
  main()
