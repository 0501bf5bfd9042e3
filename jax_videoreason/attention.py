"""Attention over all tokens, chosen by device: query blocks in plain XLA on CPU, cuDNN on GPU."""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from jax_videoreason.axes import Array

Implementation = Literal["xla", "cudnn"]

BLOCK_BYTES = 32 * 2**20  # scores of one query block in float32; what is below is computed at once
REFUSED_BYTES = 8 * 2**30  # scores of the whole call, above which an accelerator refuses plain XLA


def attend(q: Array, k: Array, v: Array, *, implementation: Implementation | None = None) -> Array:
  """softmax(q k' / sqrt(K)) v with q (B, T, N, K) and k, v (B, X, N, K) -> (B, T, N, K).

  The softmax is in float32. implementation None: cuDNN on a GPU for bfloat16 and float16, query
  blocks in plain XLA elsewhere. On an accelerator the latter is refused with a ValueError
  when the scores of the call are over 8 GiB: cost and time there grow with T squared.
  """
  backend = jax.default_backend()
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  chosen = implementation or ("cudnn" if backend == "gpu" and half else "xla")
  if chosen == "cudnn":
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  if chosen != "xla":
    raise ValueError(f"attention implementation {chosen!r}, wanted 'xla' or 'cudnn'.")
  (b, t, n, _), x = q.shape, k.shape[1]
  scores = 4 * b * n * t * x
  if backend != "cpu" and scores > REFUSED_BYTES:
    raise ValueError(
      f"plain attention over B={b} N={n} T={t} X={x} has {scores / 1e9:.1f} GB of scores, "
      f"the limit on {backend} is {REFUSED_BYTES / 1e9:.1f} GB: use dtype='bfloat16' on a "
      "GPU, or fewer tokens or runs."
    )
  if scores <= BLOCK_BYTES:
    return _dense(q, k, v)
  return _in_blocks(q, k, v, max(1, t * BLOCK_BYTES // scores))


def _dense(q: Array, k: Array, v: Array) -> Array:
  """All scores at once."""
  scores = jnp.einsum(
    "btnk,bxnk->bntx", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
  )
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  total = rearrange(weights.sum(axis=-1), "b n t -> b t n 1")
  out = jnp.einsum(
    "bntx,bxnk->btnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  return (out / total).astype(q.dtype)


def _in_blocks(q: Array, k: Array, v: Array, block: int) -> Array:
  """The same, `block` queries at a time; scores are computed again in the backward pass."""
  t = q.shape[1]
  blocks = -(-t // block)
  block = -(-t // blocks)
  padded = jnp.pad(q, ((0, 0), (0, blocks * block - t), (0, 0), (0, 0)))
  cut = rearrange(padded, "b (c t) n k -> c b t n k", c=blocks)
  out = jax.lax.map(jax.checkpoint(lambda part: _dense(part, k, v)), cut)
  return rearrange(out, "c b t n k -> b (c t) n k")[:, :t]
