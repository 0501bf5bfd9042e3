"""A small convolutional decoder that stands in for the VAE where each step of many runs is shown.

A frame of the video is made of its latent frame and the two before it, as a causal VAE's are; it is
learnt from what the VAE decodes (`training.preview_loss`). The idea is that of TAESD and its video
kin (madebyollin/taehv): a distilled decoder of few channels.
"""

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from jax_videoreason.axes import Array, Params
from jax_videoreason.models.vae_blocks import CausalConv

PLANE = (1, 3, 3)  # taps of a convolution that sees one frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreviewConfig:
  """stride: of the VAE, frames height width. width: channels inside. blocks: residual ones."""

  stride: tuple[int, int, int]
  z_channels: int
  width: int = 64
  blocks: int = 2


class PreviewDecoder(nn.Module):
  """Latents to video at the resolution of the latents; channels become pixels at the end.

  A 3x3x3 convolution gives a first video and `width` channels; residual blocks (ReLU, 3x3, ReLU,
  3x3) and a 3x3 convolution turn the channels into what is added to that video. It computes in
  float32. Parameters: `enter`, `block_{i}_{0,1}`, `leave`.
  """

  config: PreviewConfig

  def reach(self, frames: int) -> int:
    """How many latent frames at the end decide what the last `frames` of them show."""
    return frames + 2

  @nn.compact
  def __call__(self, latents: Array, first: bool | None = True) -> Array:
    """R F H W C, normalised -> R frames height width 3, about -1..1, not clipped.

    first: True, the latents begin at frame 0, which stands for one frame of the video; None, they
    are from the middle, and the first two are only looked back on.
    """
    c = self.config
    step, high, wide = c.stride
    pixels = step * high * wide * 3
    x = CausalConv(c.width + pixels, name="enter")(latents.astype(jnp.float32), first)
    x, video = jnp.split(x, [c.width], axis=-1)
    for i in range(c.blocks):
      y = CausalConv(c.width, PLANE, name=f"block_{i}_0")(nn.relu(x))
      x = x + CausalConv(c.width, PLANE, name=f"block_{i}_1")(nn.relu(y))
    video = video + CausalConv(pixels, PLANE, name="leave")(nn.relu(x))
    pattern = "r f h w (t a b c) -> r (f t) (h a) (w b) c"
    video = rearrange(video, pattern, t=step, a=high, b=wide, c=3)
    return video[:, step - 1 :] if first else video


def of_ending(
  decoder: PreviewDecoder, params: Params, frames: int
) -> tuple[PreviewDecoder, Params]:
  """Decoder and parameters that make of each latent frame its last `frames` frames alone.

  frames: 1 to those of a latent frame, stride[0].
  """
  _, high, wide = decoder.config.stride
  made = frames * high * wide * 3
  narrowed = dict(params)
  for name, before in (("enter", decoder.config.width), ("leave", 0)):
    narrowed[name] = {
      part: jnp.concatenate([value[..., :before], value[..., -made:]], axis=-1)
      for part, value in params[name].items()
    }
  config = dataclasses.replace(decoder.config, stride=(frames, high, wide))
  return PreviewDecoder(config), narrowed
