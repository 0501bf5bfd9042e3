"""The tensors of the Wan2.1 and Wan2.2 VAEs in the original and in the diffusers naming."""

import re
from collections.abc import Iterator
from typing import Literal

from jax_videoreason.models.wan21_vae import WanVAEConfig

from .engine import Row

Naming = Literal["original", "diffusers"]

CONV = "o i t h w -> t h w i o"
SPACE = "o i h w -> 1 h w i o"
DENSE = "o i 1 1 -> i o"

Part = tuple[str, str, str, str]  # original, diffusers, ours, pattern of the weight
Parts = tuple[Part, ...]

# A norm has a gamma; all others have a bias too.
TOP: Parts = (
  ("conv1", "quant_conv", "encoder/to_moments", CONV),
  ("conv2", "post_quant_conv", "decoder/from_latents", CONV),
)
SIDE: Parts = (  # under encoder. and decoder.
  ("conv1", "conv_in", "conv_in", CONV),
  ("head.0", "norm_out", "norm_out", "gamma"),
  ("head.2", "conv_out", "conv_out", CONV),
)
RES: Parts = (
  ("residual.0", "norm1", "norm_0", "gamma"),
  ("residual.2", "conv1", "conv_0", CONV),
  ("residual.3", "norm2", "norm_1", "gamma"),
  ("residual.6", "conv2", "conv_1", CONV),
)
SHORTCUT: Parts = (("shortcut", "conv_shortcut", "shortcut", CONV),)
ATTENTION: Parts = (
  ("norm", "norm", "norm", "frame gamma"),
  ("to_qkv", "to_qkv", "qkv", DENSE),
  ("proj", "proj", "out", DENSE),
)
RESAMPLE: Parts = (("resample.1", "resample.1", "space", SPACE),)
TIME: Parts = (("time_conv", "time_conv", "time_conv", CONV),)
GAMMA = {"gamma": "c 1 1 1 -> c", "frame gamma": "c 1 1 -> c"}


def table(config: WanVAEConfig, naming: Naming) -> tuple[Row, ...]:
  """The rows of a naming for `engine.moves`: one per tensor, since both number the blocks."""
  if naming not in ("original", "diffusers"):
    raise ValueError(f"naming {naming!r}, wanted 'original' or 'diffusers'.")
  rows: list[Row] = []
  for old, new, ours, pattern in _parts(config):
    key = re.escape(old if naming == "original" else new)
    if pattern in GAMMA:
      rows.append((rf"{key}\.gamma", f"{ours}/scale", GAMMA[pattern]))
    else:
      rows.append((rf"{key}\.weight", f"{ours}/kernel", pattern))
      rows.append((rf"{key}\.bias", f"{ours}/bias", "o -> o"))
  return tuple(rows)


def _parts(config: WanVAEConfig) -> Iterator[Part]:
  """Every convolution, dense layer and norm with its names from the root."""
  yield from TOP
  for side in ("encoder", "decoder"):
    yield from _under(f"{side}.", f"{side}.", f"{side}/", SIDE)
    for old, new, ours, parts in (
      ("0", "resnets.0", "block_0", RES),
      ("1", "attentions.0", "attention", ATTENTION),
      ("2", "resnets.1", "block_1", RES),
    ):
      names = (f"{side}.middle.{old}.", f"{side}.mid_block.{new}.", f"{side}/middle/{ours}/")
      yield from _under(*names, parts)
  yield from _encoder_stages(config)
  yield from _decoder_stages(config)


def _encoder_stages(config: WanVAEConfig) -> Iterator[Part]:
  number, before = 0, 1
  for i, multiple in enumerate(config.stages):
    blocks: list[tuple[str, Parts]] = [(f"block_{j}", RES) for j in range(config.blocks)]
    if multiple != before:
      blocks[0] = ("block_0", RES + SHORTCUT)
    if i < len(config.temporal):
      blocks.append(("down", RESAMPLE + TIME if config.temporal[i] else RESAMPLE))
    for j, (ours, parts) in enumerate(blocks):
      old, new = f"encoder.downsamples.{number}.", f"encoder.down_blocks.{number}."
      if config.residual:  # blocks are numbered by stage, and inside it
        old = f"encoder.downsamples.{i}.downsamples.{j}."
        new = f"encoder.down_blocks.{i}.{'downsampler' if ours == 'down' else f'resnets.{j}'}."
      yield from _under(old, new, f"encoder/stage_{i}_{ours}/", parts)
      number += 1
    before = multiple


def _decoder_stages(config: WanVAEConfig) -> Iterator[Part]:
  base_width = config.decoder_width or config.base_width
  number, before = 0, base_width * config.stages[-1]
  for i, multiple in enumerate(reversed(config.stages)):
    width = base_width * multiple
    blocks: list[tuple[str, str, Parts]] = [
      (f"block_{j}", f"resnets.{j}", RES) for j in range(config.blocks + 1)
    ]
    if width != before:
      blocks[0] = ("block_0", "resnets.0", RES + SHORTCUT)
    if i < len(config.temporal):
      up = "upsampler" if config.residual else "upsamplers.0"
      blocks.append(("up", up, RESAMPLE + TIME if config.temporal[-1 - i] else RESAMPLE))
    for j, (ours, new, parts) in enumerate(blocks):
      old = f"decoder.upsamples.{number}."
      if config.residual:
        old = f"decoder.upsamples.{i}.upsamples.{j}."
      yield from _under(old, f"decoder.up_blocks.{i}.{new}.", f"decoder/stage_{i}_{ours}/", parts)
      number += 1
    before = width if config.residual else width // 2


def _under(old: str, new: str, ours: str, parts: Parts) -> Iterator[Part]:
  for a, b, c, pattern in parts:
    yield old + a, new + b, ours + c, pattern
