"""The Wan VAE: RGB video <-> latents. As Wan2.1 has it, 16 channels with a stride of 4x8x8.

`residual`, `fold` and `decoder_width` make it that of Wan2.2 (`wan22_vae`).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jax_videoreason.axes import Array
from jax_videoreason.models.vae_blocks import (
  CausalConv,
  ChannelNorm,
  Downsample,
  Middle,
  ResBlock,
  Upsample,
  average_down,
  fold,
  in_chunks,
  repeat_up,
  unfold,
)

# Per latent channel, from the official Wan2.1 VAE.
MEAN = (
  -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
  0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
  2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
  3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
  """Sizes of a Wan VAE; the defaults are those published for Wan2.1.

  stages: width of each stage as a multiple of base_width; height and width halve between stages.
  temporal: one flag per halving, from the pixels down: whether it halves the frames too.
  blocks: residual blocks per stage of the encoder; the decoder has one more.
  mean, std: normalisation of the latents, one number per latent channel.
  decoder_width: base_width of the decoder; None = that of the encoder.
  fold: so many pixels a side are channels of one cell before the first convolution.
  residual: a stage that resamples also adds its input, averaged down or repeated up.
  dtype: what the blocks compute in, "float32" or "bfloat16"; norms are float32 inside.
  """

  base_width: int = 96
  z_channels: int = 16
  stages: tuple[int, ...] = (1, 2, 4, 4)
  blocks: int = 2
  temporal: tuple[bool, ...] = (False, True, True)
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  decoder_width: int | None = None
  fold: int = 1
  residual: bool = False
  dtype: str = "float32"

  def __post_init__(self):
    if len(self.temporal) != len(self.stages) - 1:
      raise ValueError(
        f"temporal={self.temporal} has {len(self.temporal)} flags, wanted {len(self.stages) - 1}: "
        f"one per halving between the {len(self.stages)} stages."
      )
    for name, values in (("mean", self.mean), ("std", self.std)):
      if len(values) != self.z_channels:
        raise ValueError(
          f"{name} has {len(values)} numbers, wanted z_channels={self.z_channels}: "
          "give one per latent channel."
        )

  @property
  def stride(self) -> tuple[int, int, int]:
    """Pixels per latent cell: (frames, height, width)."""
    space = self.fold * 2 ** len(self.temporal)
    return 2 ** sum(self.temporal), space, space


class Encoder(nn.Module):
  """Video R frames height width 3 -> R F H W 2C, mean and log variance before `to_moments`."""

  config: WanVAEConfig

  @nn.compact
  def __call__(self, x: Array, first: bool = True) -> Array:
    c = self.config
    x = CausalConv(c.base_width, name="conv_in")(fold(x.astype(c.dtype), c.fold), first)
    for i, multiple in enumerate(c.stages):
      before, width, factor = x, c.base_width * multiple, (1, 1)
      for j in range(c.blocks):
        x = ResBlock(width, name=f"stage_{i}_block_{j}")(x, first)
      if i < len(c.temporal):
        x = Downsample(c.temporal[i], name=f"stage_{i}_down")(x, first)
        factor = (1 + c.temporal[i], 2)
      if c.residual:
        x = x + average_down(before, width, factor, first)
    x = Middle(name="middle")(x, first)
    x = nn.silu(ChannelNorm(name="norm_out")(x))
    x = CausalConv(2 * c.z_channels, name="conv_out")(x, first)
    return CausalConv(2 * c.z_channels, (1, 1, 1), name="to_moments")(x).astype(jnp.float32)


class Decoder(nn.Module):
  """Latents R F H W C, not normalised -> video R frames height width 3.

  last: only so many frames at the end are wanted; every block then sees no more of what comes
  before than decides them.
  """

  config: WanVAEConfig

  @nn.compact
  def __call__(self, x: Array, first: bool | None = True, last: int | None = None) -> Array:
    c = self.config
    base_width = c.decoder_width or c.base_width
    begin = [CausalConv(base_width * c.stages[-1], name="conv_in"), Middle(name="middle")]
    stages: list[list[Any]] = []
    for i, multiple in enumerate(reversed(c.stages)):
      width = base_width * multiple
      blocks: list[Any] = [
        ResBlock(width, name=f"stage_{i}_block_{j}") for j in range(c.blocks + 1)
      ]
      if i < len(c.temporal):
        inner = width if c.residual else width // 2
        blocks.append(Upsample(inner, c.temporal[-1 - i], name=f"stage_{i}_up"))
      stages.append(blocks)
    end = CausalConv(3 * c.fold**2, name="conv_out")

    reaches: dict[str | None, int] = {}  # frames of its input that matter, by the block
    if last is not None:
      wanted = last
      for block in reversed([*begin, *itertools.chain(*stages), end]):
        wanted = reaches[block.name] = block.reach(wanted)

    def through(block: Any, x: Array) -> Array:
      nonlocal first
      reach = reaches.get(block.name, x.shape[1])
      if reach < x.shape[1]:
        x, first = x[:, x.shape[1] - reach :], None
      return block(x, first)

    x = CausalConv(c.z_channels, (1, 1, 1), name="from_latents")(x.astype(c.dtype))
    for block in begin:
      x = through(block, x)
    for i, blocks in enumerate(stages):
      before = x
      for block in blocks:
        x = through(block, x)
      if c.residual and i < len(c.temporal):
        width, factor = base_width * c.stages[-1 - i], (1 + c.temporal[-1 - i], 2)
        if first is None:
          before = before[:, before.shape[1] - math.ceil(x.shape[1] / factor[0]) :]
        short = repeat_up(before, width, factor, first)
        x = x + short[:, short.shape[1] - x.shape[1] :]
    x = through(end, nn.silu(ChannelNorm(name="norm_out")(x)))
    x = x if last is None else x[:, max(0, x.shape[1] - last) :]
    return unfold(x, c.fold).astype(jnp.float32)


def decoder_bytes(
  config: WanVAEConfig, sizes: Sequence[int], chunk: int | None = None, last: int | None = None
) -> float:
  """What decoding takes beside weights and latents, by arithmetic; sizes: R F H W.

  The widest convolution with the input of its block, the frames that all blocks look back on where
  there are chunks, the video, and half of the kernels once more, in another order. Programs
  compiled for a CPU were seen to take that to within a fifth.
  """
  runs, total, high, wide = sizes
  frames = total if chunk is None else min(chunk, total)
  chunks = frames < total
  at_stages = _frames_at_stages(config, frames, chunks, last)
  cells, frames = runs * high * wide, at_stages[0]
  widths = [(config.decoder_width or config.base_width) * n for n in reversed(config.stages)]
  peak = back = kernels = 0.0

  def conv(before: int, after: int) -> float:
    nonlocal back, kernels
    back += 2 * before * cells * chunks
    kernels += 27 * before * after / 2
    stacked = 3 * min(before, after) * frames  # frames shifted against each other
    return cells * ((frames + 2) * before + stacked + after * frames)

  def block(before: int, after: int) -> float:
    return cells * before * frames + max(conv(before, after), conv(after, after))

  width = widths[0]
  peak = max(conv(config.z_channels, width), block(width, width), block(width, width))
  for i, after in enumerate(widths):
    resamples = i < len(config.temporal)
    beside = cells * width * frames if config.residual and resamples else 0
    for _ in range(config.blocks + 1):
      peak, width = max(peak, beside + block(width, after)), after
    if not resamples:
      continue
    if config.temporal[-1 - i]:
      back += 2 * width * cells * chunks
    frames = at_stages[i + 1]
    width = after if config.residual else after // 2
    kernels += 16 * after * width / 2
    made = cells * frames * 4 * width
    peak = max(peak, beside + cells * frames * after + (3 if config.residual else 2) * made)
    cells *= 4
  peak = max(peak, conv(width, 3 * config.fold**2))
  video = 3 * (last or 1 + config.stride[0] * (total - 1)) * cells * config.fold**2
  return jnp.dtype(config.dtype).itemsize * (peak + back + kernels) + 4.0 * video


def _frames_at_stages(
  config: WanVAEConfig, frames: int, goes_on: bool, last: int | None
) -> list[int]:
  """Frames that each stage of the decoder holds, of `frames` latent ones. goes_on: none of them is
  frame 0. last: as `decode` takes it."""
  found = [frames]
  for doubled in reversed(config.temporal):
    found.append(found[-1] if not doubled else 2 * found[-1] - (not goes_on))
  if last is None:
    return found
  wanted = last + 2
  for i in reversed(range(len(found))):
    wanted += 4 * (config.blocks + 1)
    found[i] = min(found[i], wanted)
    if i and config.temporal[-i]:
      wanted = -(-wanted // 2) + 2
  return found


class WanVAE(nn.Module):
  """vae.apply({"params": p}, x, method="encode" | "decode"), and the methods beside them.

  `chunk`: latent frames per piece; the result is the full sequence's, the activations are those
  of one piece. None = all frames at once. `last`: so many frames at the end alone, the same as of
  the whole, for less work; not in pieces. None = all.
  """

  config: WanVAEConfig

  def setup(self):
    self.encoder = Encoder(self.config)
    self.decoder = Decoder(self.config)

  def __call__(self, video: Array) -> Array:
    """Encodes and decodes; for init."""
    return self.decode(self.encode(video))

  def encode(self, video: Array, chunk: int | None = None) -> Array:
    """Video R frames height width 3 in [-1, 1] -> normalised latents R F H W C (the mode).

    frames = 1 + stride[0] * k; ValueError otherwise.
    """
    mean, _ = self.encode_moments(video, chunk)
    return (mean - self._row(self.config.mean)) * (1.0 / self._row(self.config.std))

  def decode(self, latents: Array, chunk: int | None = None, last: int | None = None) -> Array:
    """Normalised latents R F H W C -> video R frames height width 3, clipped to [-1, 1]."""
    return jnp.clip(self.decode_unclipped(latents, chunk, last), -1.0, 1.0)

  def decode_unclipped(
    self, latents: Array, chunk: int | None = None, last: int | None = None
  ) -> Array:
    """The same before it is clipped, as tiles are before they are joined."""
    self._check_latents(latents)
    values = latents * self._row(self.config.std) + self._row(self.config.mean)
    return self.decode_values(values, chunk, last)

  def encode_moments(self, video: Array, chunk: int | None = None) -> tuple[Array, Array]:
    """Mean and log variance of the latents, R F H W C each, not normalised."""
    step, high, wide = self.config.stride
    shape = video.shape
    if video.ndim != 5 or shape[-1] != 3:
      raise ValueError(f"video is {shape}, wanted R frames height width 3.")
    if (shape[1] - 1) % step or shape[2] % high or shape[3] % wide:
      raise ValueError(
        f"video has frames, height, width {shape[1:4]}, wanted 1 + {step}k frames and multiples "
        f"of {high} and {wide} pixels: crop or pad it."
      )
    if chunk is None:
      moments = self.encoder(video)
    else:
      first = 1 + step * _remainder((shape[1] - 1) // step, chunk)
      moments = in_chunks(self.encoder, video, first=first, size=step * chunk)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode_values(
    self, values: Array, chunk: int | None = None, last: int | None = None
  ) -> Array:
    """Latents R F H W C, not normalised -> video, not clipped (for training)."""
    self._check_latents(values)
    if last is not None and (chunk is not None or last < 1):
      raise ValueError(
        f"last={last} and chunk={chunk}, wanted 1 or more frames at the end, and chunk=None."
      )
    if chunk is None:
      return self.decoder(values, True, last)
    first = 1 + _remainder(values.shape[1] - 1, chunk)
    return in_chunks(self.decoder, values, first=first, size=chunk)

  @nn.nowrap
  def decoding_bytes(
    self, sizes: Sequence[int], chunk: int | None = None, last: int | None = None
  ) -> float:
    """What `decode` of R F H W takes beside weights and latents, by arithmetic."""
    return decoder_bytes(self.config, sizes, chunk, last)

  def _check_latents(self, latents: Array) -> None:
    channels = self.config.z_channels
    if latents.ndim != 5 or latents.shape[-1] != channels:
      raise ValueError(
        f"latents are {latents.shape}, wanted R F H W C with C = {channels}: give one axis of "
        f"runs, then frames, height, width, channels."
      )

  def _row(self, values: tuple[float, ...]) -> Array:
    return jnp.expand_dims(jnp.asarray(values, jnp.float32), (0, 1, 2, 3))


def _remainder(frames: int, chunk: int) -> int:
  if chunk < 1:
    raise ValueError(f"chunk={chunk} latent frames, wanted 1 or more (None = all at once).")
  return frames % chunk
