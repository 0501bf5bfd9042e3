"""UMT5, the text encoder of Wan, at any width.

Source: Wan2.1 `t5.py` and transformers `UMT5EncoderModel`. Unlike T5, every layer owns its relative
position bias. There are no biases in the matrices and no 1/sqrt(K) in the attention: the initial
scale of the queries stands for it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from jax_videoreason.axes import Array
from jax_videoreason.models.common import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Config:
  """Sizes of the encoder; the defaults are UMT5-XXL. heads * head_width may differ from width.

  dtype: of the computation, "float32" or "bfloat16"; norms and the softmax are float32 inside.
  """

  vocab: int = 256384
  width: int = 4096
  head_width: int = 64
  heads: int = 64
  ffn_width: int = 10240
  layers: int = 24
  buckets: int = 32
  max_distance: int = 128
  dtype: str = "bfloat16"


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
  """X X int32: the bias bucket of (query, key).

  Half of the buckets is for keys after the query; in each half the first half counts single
  tokens and the rest grows with the logarithm up to max_distance (in float32, as torch does).
  """
  position = np.arange(length)
  relative = position[np.newaxis, :] - position[:, np.newaxis]
  half = buckets // 2
  exact = half // 2
  distance = np.abs(relative)
  ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
  growth = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
  far = np.minimum(exact + growth.astype(np.int32), half - 1)
  bucket = np.where(distance < exact, distance, far) + np.where(relative > 0, half, 0)
  return bucket.astype(np.int32)


def _dense(config: UMT5Config, width: int, variance: float, name: str) -> nn.Dense:
  """A matrix without bias; variance is that of an entry times its fan-in."""
  init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
  return nn.Dense(width, use_bias=False, dtype=config.dtype, kernel_init=init, name=name)


class Attention(nn.Module):
  """Self-attention with an additive bias: x R X D, bias N X X, mask R X -> R X D."""

  config: UMT5Config

  @nn.compact
  def __call__(self, x: Array, bias: Array, mask: Array) -> Array:
    c = self.config
    inner = c.heads * c.head_width
    q = _dense(c, inner, 1.0 / c.head_width, "q")(x)
    k = _dense(c, inner, 1.0, "k")(x)
    v = _dense(c, inner, 1.0, "v")(x)
    q, k, v = (rearrange(a, "r x (n k) -> r n x k", n=c.heads) for a in (q, k, v))
    scores = jnp.einsum("rnxk,rnyk->rnxy", q, k, preferred_element_type=jnp.float32)
    scores = scores + jnp.broadcast_to(rearrange(bias, "n x y -> 1 n x y"), scores.shape)
    seen = jnp.broadcast_to(rearrange(mask, "r y -> r 1 1 y"), scores.shape)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("rnxy,rnyk->rnxk", weights, v)
    return _dense(c, c.width, 1.0, "o")(rearrange(out, "r n x k -> r x (n k)"))


class FeedForward(nn.Module):
  """fc2(fc1(x) * gelu_tanh(gate(x)))."""

  config: UMT5Config

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    gate = jax.nn.gelu(_dense(c, c.ffn_width, 1.0, "gate")(x), approximate=True)
    return _dense(c, c.width, 1.0, "fc2")(gate * _dense(c, c.ffn_width, 1.0, "fc1")(x))


class Layer(nn.Module):
  """One layer: x R X D, buckets X X, mask R X -> R X D."""

  config: UMT5Config

  @nn.compact
  def __call__(self, x: Array, buckets: np.ndarray, mask: Array) -> Array:
    c = self.config
    small = nn.initializers.normal(c.width**-0.5)
    table = self.param("relative_bias", small, (c.buckets, c.heads))
    bias = rearrange(table.astype(jnp.float32)[buckets], "x y n -> n x y")
    x = x + Attention(c, name="attn")(RMSNorm(name="norm1")(x), bias, mask)
    return x + FeedForward(c, name="ffn")(RMSNorm(name="norm2")(x))


class UMT5Encoder(nn.Module):
  """Token ids -> text states; weights of the layers are stacked on L under "blocks"."""

  config: UMT5Config

  @nn.compact
  def __call__(self, ids: Array, mask: Array) -> Array:
    """ids R X int32, mask R X bool (True = a token, not padding) -> R X D.

    Padding is not attended to; its own rows hold numbers without meaning. An id outside of the
    vocabulary gives NaN (`Tokenizer.encode` cannot make one for its own model).
    """
    c = self.config
    embedding = self.param("token_embedding", nn.initializers.normal(1.0), (c.vocab, c.width))
    x = jnp.take(embedding, ids, axis=0).astype(c.dtype)
    buckets = distance_buckets(ids.shape[1], c.buckets, c.max_distance)

    def layer(block: Layer, x: Array, _: None) -> tuple[Array, None]:
      return block(x, buckets, mask), None

    scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers)
    x, _ = scan(Layer(c, name="blocks"), x, None)
    return RMSNorm(name="norm")(x)
