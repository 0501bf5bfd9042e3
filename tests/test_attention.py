"""Attention at once and in query blocks, its memory, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason import attention
from jax_videoreason.attention import attend


def draw(t=37, x=23, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((2, t, 3, 8), (2, x, 3, 8), (2, x, 3, 8))
  return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def by_definition(q, k, v):
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  scores = np.einsum("btnk,bxnk->bntx", q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum("bntx,bxnk->btnk", weights / weights.sum(-1, keepdims=True), v)


@pytest.fixture(
  params=[pytest.param(None, marks=pytest.mark.slow), 4 * 2 * 3 * 23 * 10, 1],
  ids=["at once", "10 queries", "1 query"],
)
def blocks(request, monkeypatch):
  """Bytes of scores in a block: all of them, or few enough to need 4 uneven or 37 blocks."""
  if request.param is not None:
    monkeypatch.setattr(attention, "BLOCK_BYTES", request.param)


def test_values(blocks):
  q, k, v = draw()
  out = attend(q, k, v)
  assert out.shape == q.shape
  # sums of 23 products in float32
  np.testing.assert_allclose(out, by_definition(q, k, v), atol=2e-6)


def test_gradients_do_not_depend_on_the_blocks(blocks):
  q, k, v = draw()
  ours = jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v))), argnums=(0, 1, 2))(q, k, v)
  plain = jax.grad(
    lambda q, k, v: jnp.sum(jnp.sin(jax.nn.dot_product_attention(q, k, v))), argnums=(0, 1, 2)
  )(q, k, v)
  for a, b in zip(ours, plain, strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_scores_of_any_size_are_safe(blocks):
  q, k, v = draw()
  out = attend(q * 1e4, k, v)
  assert bool(jnp.isfinite(out).all())
  np.testing.assert_allclose(out, by_definition(q * 1e4, k, v), atol=1e-4)


def test_bfloat16_keeps_its_softmax_in_float32():
  q, k, v = draw(x=2000, dtype=jnp.bfloat16)
  out = attend(q * 0, k, jnp.ones_like(v))
  assert out.dtype == jnp.bfloat16
  # 2000 equal weights: a bfloat16 sum would stop growing at 256
  np.testing.assert_array_equal(out, jnp.ones_like(out))


def test_a_bfloat16_query_is_not_rounded_once_more_by_its_scale():
  wide = [jax.random.normal(key, (1, 64, 1, 128)) for key in jax.random.split(jax.random.key(1), 3)]
  q, k, v = (a.astype(jnp.bfloat16) for a in (2 * wide[0], 2 * wide[1], wide[2]))
  off = jnp.linalg.norm(attend(q, k, v).astype(jnp.float32) - by_definition(q, k, v))
  # rounding weights and output leaves 2e-3; a rounded query 4e-3
  assert off < 2.8e-3 * np.linalg.norm(by_definition(q, k, v))


def test_memory_does_not_grow_with_the_square_of_the_tokens():
  def temporary(t):
    shape = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
    compiled = jax.jit(attend).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert 4 * 16384**2 == 2**30
  assert temporary(16384) < 4 * attention.BLOCK_BYTES


def test_an_accelerator_refuses_plain_attention_over_many_tokens(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  shape = jax.ShapeDtypeStruct((1, 32760, 40, 128), jnp.float32)
  with pytest.raises(ValueError, match=r"T=32760 X=32760 has 171\.7 GB of scores.*bfloat16"):
    jax.eval_shape(attend, shape, shape, shape)
  jax.eval_shape(attend, *(jax.ShapeDtypeStruct((1, 1280, 4, 128), jnp.float32),) * 3)


def test_many_short_sequences_are_no_long_one(monkeypatch):
  """The VAE attends within each frame: 21 frames of 720p at once have 17 GB of scores together."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  frames = jax.ShapeDtypeStruct((21, 14400, 1, 384), jnp.float32)
  jax.eval_shape(attend, frames, frames, frames)


def test_unknown_implementations_are_refused():
  with pytest.raises(ValueError, match="'flash', wanted one of 'xla', 'cudnn', 'splash'"):
    attend(*draw(), implementation="flash")
