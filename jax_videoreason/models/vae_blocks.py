"""Blocks of the causal video VAEs; one definition serves the full sequence and chunks of it.

Video inside the blocks is R F H W C with any height, width and channels. Every block takes
`first`: True, its input begins at latent frame 0; False, it goes on where the last call ended;
None, it holds frames from the middle of a video, and the output lacks those that look back on what
the input lacks. `reach(n)`: how many frames at the end of the input decide the last n of the
output. A block that looks back keeps the frames it needs in the variable collection "stream", and
does so only when that collection is mutable; so the full sequence is the same call as a first
chunk, without memory. Source: the official Wan VAE, whose streaming equals this full-sequence form.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn

from jax_videoreason.attention import attend
from jax_videoreason.axes import Array

STREAM = "stream"


def conv_of_frames(
  x: Array, kernel: Array, stride: tuple[int, int], pad: Sequence[tuple[int, int]]
) -> Array:
  """R F H W C, kernel h w C out: each frame by itself, `pad` zeros around its rows and columns."""
  y = jax.lax.conv_general_dilated(
    rearrange(x, "r f h w c -> (r f) h w c"),
    kernel,
    window_strides=stride,
    padding=pad,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return rearrange(y, "(r f) h w c -> r f h w c", r=x.shape[0])


class CausalConv(nn.Module):
  """Convolution (frames, height, width) that sees no later frame.

  kernel: taps per axis. stride: (frames, space). pad: zeros before and after, height and width.
  lead: zero frames before frame 0; without them the first output needs a full window.
  Parameters: kernel (kt, kh, kw, in, out), bias (out,).
  """

  features: int
  kernel: tuple[int, int, int] = (3, 3, 3)
  stride: tuple[int, int] = (1, 1)
  pad: tuple[int, int] | None = None
  lead: bool = True

  def reach(self, frames: int) -> int:
    return self.stride[0] * (frames - 1) + self.kernel[0]

  @nn.compact
  def __call__(self, x: Array, first: bool | None = True) -> Array:
    kt = self.kernel[0]
    shape = (*self.kernel, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(x.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)

    step = self.stride[0]
    kept = kt - step
    if kept > 0 and first is not None:
      if not first:
        x = jnp.concatenate([self.get_variable(STREAM, "frames"), x], axis=1)
      elif self.lead:
        x = jnp.pad(x, ((0, 0), (kept, 0), (0, 0), (0, 0), (0, 0)))
      if self.is_mutable_collection(STREAM) and not self.is_initializing():
        self.put_variable(STREAM, "frames", x[:, x.shape[1] - kept :])

    # XLA's 3-D convolution is slow on CPU. Shifted frames stacked on the channels make it 2-D,
    # several times faster forward and backward; the narrower side, input or output, is stacked.
    count = (x.shape[1] - kt) // step + 1

    def shifted(x: Array, t: int) -> Array:
      return x[:, t : t + step * count : step][:, :count]

    def space(x: Array, kernel: Array) -> Array:
      around = [self.pad or (k // 2, k // 2) for k in self.kernel[1:]]
      return conv_of_frames(x, kernel, (self.stride[1], self.stride[1]), around)

    if step == 1 and self.features < x.shape[-1]:
      y = space(x, rearrange(kernel, "t h w i o -> h w i (t o)"))
      y = rearrange(y, "r f h w (t c) -> t r f h w c", t=kt)
      y = sum(shifted(y[t], t) for t in range(1, kt)) + shifted(y[0], 0)
    else:
      x = jnp.concatenate([shifted(x, t) for t in range(kt)], axis=-1)
      y = space(x, rearrange(kernel, "t h w i o -> h w (t i) o"))
    return y + jnp.expand_dims(bias, (0, 1, 2, 3))


class DoubledConv(nn.Module):
  """Each frame with every pixel repeated 2 x 2, then a convolution of 3 x 3 taps with zeros around.

  Two of three taps in a row fall on one pixel of the input. So 2 x 2 taps over the corners of the
  input's pixels give the 2 x 2 pixels of the output around each corner: the same but for rounding,
  with 4/9 of the products and without the repeated pixels. Taps are added in float32 and rounded
  once to the type of the input.
  Parameters: kernel (1, 3, 3, in, out), bias (out,).
  """

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (1, 3, 3, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
    taps = rearrange(kernel.astype(jnp.float32), "1 h w i o -> h w i o")
    taps = _of_corners(rearrange(_of_corners(taps), "a h w i o -> w a h i o"))
    taps = rearrange(taps, "b w a h i o -> h w i (a b o)").astype(x.dtype)
    y = conv_of_frames(x, taps, (1, 1), [(1, 1), (1, 1)])
    y = rearrange(y, "r f h w (a b c) -> r f (h a) (w b) c", a=2, b=2)
    return y[:, :, 1:-1, 1:-1] + jnp.expand_dims(bias, (0, 1, 2, 3))


def _of_corners(taps: Array) -> Array:
  """3 ... over pixels that come twice -> 2 2 ...: for the pixel before and after a corner of the
  input's pixels, the taps on the input's pixel before and after it."""
  before = jnp.stack([taps[0] + taps[1], taps[2]])
  after = jnp.stack([taps[0], taps[1] + taps[2]])
  return jnp.stack([before, after])


class ChannelNorm(nn.Module):
  """x / max(|x|, 1e-12) * sqrt(C) * scale over the channels, in float32."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,)).astype(jnp.float32)
    wide = x.astype(jnp.float32)
    squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
    # rsqrt of the clamped square: the same value, and a gradient that is finite at zero.
    wide = wide * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
    return (wide * jnp.expand_dims(scale * channels**0.5, (0, 1, 2, 3))).astype(x.dtype)


class ResBlock(nn.Module):
  """norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1x1 where widths differ)."""

  features: int

  def reach(self, frames: int) -> int:
    return frames + 4

  @nn.compact
  def __call__(self, x: Array, first: bool | None = True) -> Array:
    y = nn.silu(ChannelNorm(name="norm_0")(x))
    y = CausalConv(self.features, name="conv_0")(y, first)
    y = nn.silu(ChannelNorm(name="norm_1")(y))
    y = CausalConv(self.features, name="conv_1")(y, first)
    if x.shape[-1] != self.features:
      x = CausalConv(self.features, (1, 1, 1), name="shortcut")(x)
    return x[:, x.shape[1] - y.shape[1] :] + y


class FrameAttention(nn.Module):
  """One attention head over the cells of each frame, plus the input."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    runs, _, height, _, channels = x.shape
    y = ChannelNorm(name="norm")(x)
    y = nn.Dense(3 * channels, dtype=x.dtype, name="qkv")(y)
    q, k, v = rearrange(y, "r f h w (n k) -> n (r f) (h w) 1 k", n=3)
    # Plain XLA: this one head is wider than cuDNN's kernels take (384 at the published size).
    y = attend(q, k, v, implementation="xla")
    y = rearrange(y, "(r f) (h w) 1 k -> r f h w k", r=runs, h=height)
    return x + nn.Dense(channels, dtype=x.dtype, name="out")(y)


class Middle(nn.Module):
  """ResBlock, FrameAttention, ResBlock at one width."""

  def reach(self, frames: int) -> int:
    return frames + 8

  @nn.compact
  def __call__(self, x: Array, first: bool | None = True) -> Array:
    x = ResBlock(x.shape[-1], name="block_0")(x, first)
    x = FrameAttention(name="attention")(x)
    return ResBlock(x.shape[-1], name="block_1")(x, first)


class Downsample(nn.Module):
  """Halves height and width; with `time`, 2 frames become 1. Frame 0 stays a frame of its own."""

  time: bool

  @nn.compact
  def __call__(self, x: Array, first: bool = True) -> Array:
    channels = x.shape[-1]
    x = CausalConv(channels, (1, 3, 3), stride=(1, 2), pad=(0, 1), name="space")(x)
    if not self.time:
      return x
    y = CausalConv(channels, (3, 1, 1), stride=(2, 1), lead=False, name="time_conv")(x, first)
    return jnp.concatenate([x[:, :1], y], axis=1) if first else y


class Upsample(nn.Module):
  """Doubles height and width; with `time`, every frame but frame 0 becomes 2."""

  features: int
  time: bool

  def reach(self, frames: int) -> int:
    return -(-frames // 2) + 2 if self.time else frames

  @nn.compact
  def __call__(self, x: Array, first: bool | None = True) -> Array:
    if self.time:
      conv = CausalConv(2 * x.shape[-1], (3, 1, 1), name="time_conv")
      # Frame 0 passes by, and what follows does not see it either (zeros instead).
      y = conv(x[:, 1:] if first else x, first)
      y = rearrange(y, "r f h w (n c) -> r (f n) h w c", n=2)
      x = jnp.concatenate([x[:, :1], y], axis=1) if first else y
    return DoubledConv(self.features, name="space")(x)


def fold(x: Array, size: int) -> Array:
  """R F (H size) (W size) C -> R F H W (C size size), columns of a cell slower than its rows."""
  return rearrange(x, "r f (h a) (w b) c -> r f h w (c b a)", a=size, b=size)


def unfold(x: Array, size: int) -> Array:
  """The inverse of `fold`."""
  return rearrange(x, "r f h w (c b a) -> r f (h a) (w b) c", a=size, b=size)


def average_down(x: Array, features: int, factor: tuple[int, int], first: bool = True) -> Array:
  """R F H W C -> R F/t H/s W/s features, (t, s) = factor: each feature averages neighbours.

  The neighbours of a cell, ordered (C, t, s, s), are cut into `features` groups of equal size.
  Frame 0 stands alone, with zero frames before it.
  """
  time, space = factor
  if first:
    x = jnp.pad(x, ((0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)))
  pattern = "r (f t) (h a) (w b) c -> r f h w (c t a b)"
  x = rearrange(x, pattern, t=time, a=space, b=space)
  return reduce(x, "r f h w (o n) -> r f h w o", "mean", o=features)


def repeat_up(x: Array, features: int, factor: tuple[int, int], first: bool | None = True) -> Array:
  """R F H W C -> R (F t) (H s) (W s) features, (t, s) = factor: channels become neighbours.

  Channels, repeated to as many as are needed, are ordered (features, t, s, s). Frame 0 becomes one.
  """
  time, space = factor
  times = features * time * space * space // x.shape[-1]
  x = repeat(x, "r f h w c -> r f h w (c n)", n=times)
  pattern = "r f h w (o t a b) -> r (f t) (h a) (w b) o"
  x = rearrange(x, pattern, o=features, t=time, a=space, b=space)
  return x[:, time - 1 :] if first else x


def in_chunks(module: nn.Module, x: Array, *, first: int, size: int) -> Array:
  """`module(x, True)` over axis 1 in pieces: `first` frames, then `size` at a time in a scan.

  module: bound, called as module(x, first: bool); its frames in minus `first` are a multiple of
  `size`. Memory holds one piece and the frames the blocks look back on.
  """
  free, variables = module.unbind()

  def piece(memory: Any, x: Array, first: bool) -> tuple[Any, Array]:
    y, memory = free.apply({**variables, **memory}, x, first, mutable=[STREAM])
    return memory, y

  memory, head = piece({}, x[:, :first], True)
  if x.shape[1] == first:
    return head
  pieces = rearrange(x[:, first:], "r (n f) h w c -> n r f h w c", f=size)
  _, tail = jax.lax.scan(lambda memory, x: piece(memory, x, False), memory, pieces)
  return jnp.concatenate([head, rearrange(tail, "n r f h w c -> r (n f) h w c")], axis=1)
