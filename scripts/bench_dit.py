"""The DiT forward beside diffusers' on the same weights in this process; one JSON line per case.

  python scripts/bench_dit.py                              1,280 and 5,120 tokens, float32
  python scripts/bench_dit.py --tokens 5120 --pairs 20

A ratio is the median over interleaved pairs of (diffusers / ours), with its 95% bootstrap interval:
above 1, ours is the faster one. The first line says how far the two results are apart.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from bench_denoise import pairs, say
from diffusers import WanTransformer3DModel

from jax_videoreason import schedules
from jax_videoreason.convert import engine, wan
from jax_videoreason.models.wan import WanConfig, WanDiT
from jax_videoreason.structs import Conditioning

GRIDS = {1280: (5, 32, 32), 5120: (5, 64, 64), 32760: (21, 60, 104)}  # latent F H W by tokens
TEXT = (512, 256)  # words, width


def both(width: int, layers: int, heads: int) -> tuple[Any, WanDiT, Any]:
  """diffusers' model with random weights, ours, and the same weights for it."""
  torch.manual_seed(0)
  theirs = WanTransformer3DModel(
    num_attention_heads=heads,
    attention_head_dim=width // heads,
    in_channels=16,
    out_channels=16,
    text_dim=TEXT[1],
    ffn_dim=4 * width,
    num_layers=layers,
  ).eval()
  ours = WanDiT(
    WanConfig(
      width=width,
      ffn_width=4 * width,
      heads=heads,
      layers=layers,
      text_width=TEXT[1],
      numerics="diffusers",
    )
  )
  latents, text = jnp.zeros((1, 1, 2, 2, 16)), jnp.zeros((1, 1, *TEXT))
  shapes = jax.eval_shape(
    ours.init, jax.random.key(0), latents, jnp.zeros((2, 256)), Conditioning(text=text)
  )["params"]
  state = {name: value.numpy() for name, value in theirs.state_dict().items()}
  return theirs, ours, engine.fill(state, wan.table("diffusers"), shapes)


def measure(tokens: int, options: argparse.Namespace) -> None:
  theirs, ours, params = both(options.width, options.layers, options.heads)
  rng = np.random.default_rng(0)
  latents = rng.normal(size=(1, *GRIDS[tokens], 16)).astype(np.float32)
  text = rng.normal(size=(1, 1, *TEXT)).astype(np.float32)
  time = schedules.sinusoid(np.array([500.0, 0.0]), 256, "diffusers")
  cond = Conditioning(text=jnp.asarray(text))
  forward = jax.jit(lambda params, x: ours.apply({"params": params}, x, time, cond)[0])
  x = torch.from_numpy(latents).permute(0, 4, 1, 2, 3).contiguous()
  words, t = torch.from_numpy(text[0]), torch.tensor([500.0])

  def reference() -> np.ndarray:
    with torch.no_grad():
      return theirs(x, t, words, return_dict=False)[0].numpy()

  said = np.asarray(forward(params, latents))[0].transpose(0, 4, 1, 2, 3)
  row = pairs(reference, lambda: forward(params, latents), options.pairs)
  say(
    f"speed of WanDiT over diffusers, float32, {tokens} tokens",
    wanted="at least 0.9",
    difference=float(np.linalg.norm(said - reference()) / np.linalg.norm(said)),
    width=options.width,
    layers=options.layers,
    threads=torch.get_num_threads(),
    **row,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, nargs="+", choices=GRIDS, default=[1280, 5120])
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--heads", type=int, default=4)
  parser.add_argument("--pairs", type=int, default=20)
  options = parser.parse_args()
  for tokens in options.tokens:
    measure(tokens, options)


if __name__ == "__main__":
  main()
