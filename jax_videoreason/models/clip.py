"""CLIP ViT-H/14, the image tower of Wan2.1 image to video, at any width.

Source: the `visual` part of open-clip's xlm-roberta-large-vit-huge-14, and transformers
`CLIPVisionModel`. Wan reads the tokens before the last layer, so that layer, the norm after it and
the projection to the text are not here.
"""

import dataclasses

import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from jax_videoreason.attention import attend
from jax_videoreason.axes import Array
from jax_videoreason.models.common import LayerNorm

# Of red, green and blue in 0..1, from OpenAI's CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
  """Sizes of the tower; the defaults are ViT-H/14.

  layers: those that are run, all but the last of the published ones. image, patch: pixels a side.
  dtype: of the computation, "float32" or "bfloat16"; norms and the softmax are float32 inside.
  """

  width: int = 1280
  ffn_width: int = 5120
  heads: int = 16
  layers: int = 31
  image: int = 224
  patch: int = 14
  epsilon: float = 1e-5
  dtype: str = "float32"

  def __post_init__(self):
    if self.image % self.patch:
      raise ValueError(f"image={self.image} pixels do not divide into patches of {self.patch}.")
    if self.width % self.heads:
      raise ValueError(f"width={self.width} does not divide by heads={self.heads}.")

  @property
  def tokens(self) -> int:
    """One for the whole image, one for each patch."""
    return 1 + (self.image // self.patch) ** 2


class Layer(nn.Module):
  """One layer, norms first: R X D -> R X D."""

  config: CLIPConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config

    def dense(width: int, name: str) -> nn.Dense:
      return nn.Dense(width, dtype=c.dtype, name=name)

    h = LayerNorm(c.epsilon, name="norm1")(x).astype(c.dtype)
    q, k, v = (
      rearrange(dense(c.width, name)(h), "r x (n k) -> r x n k", n=c.heads) for name in "qkv"
    )
    x = x + dense(c.width, "o")(rearrange(attend(q, k, v), "r x n k -> r x (n k)"))
    h = LayerNorm(c.epsilon, name="norm2")(x).astype(c.dtype)
    h = nn.gelu(dense(c.ffn_width, "up")(h), approximate=False)
    return x + dense(c.width, "down")(h)


class CLIPTower(nn.Module):
  """Images R height width 3 in 0..1 of the config's size -> tokens R X D, the whole image first."""

  config: CLIPConfig

  @nn.compact
  def __call__(self, images: Array) -> Array:
    c = self.config
    if images.shape[1:] != (c.image, c.image, 3):
      raise ValueError(
        f"images are {images.shape}, wanted R {c.image} {c.image} 3: framing.square makes them."
      )
    mean, std = (jnp.expand_dims(jnp.asarray(v, jnp.float32), (0, 1, 2)) for v in (MEAN, STD))
    pattern = "r (h p) (w q) c -> r (h w) (c p q)"
    patches = rearrange((images - mean) / std, pattern, p=c.patch, q=c.patch)
    x = nn.Dense(c.width, use_bias=False, dtype=c.dtype, name="patch_embed")(patches)
    small = nn.initializers.normal(c.width**-0.5)
    whole = self.param("whole", small, (c.width,))
    position = self.param("position", small, (c.tokens, c.width))
    whole = repeat(whole.astype(c.dtype), "d -> r 1 d", r=x.shape[0])
    x = jnp.concatenate([whole, x], axis=1) + position.astype(c.dtype)[None]
    x = LayerNorm(c.epsilon, name="norm_in")(x).astype(c.dtype)

    def layer(block: Layer, x: Array, _: None) -> tuple[Array, None]:
      return block(x), None

    scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers)
    x, _ = scan(Layer(c, name="blocks"), x, None)
    return x
