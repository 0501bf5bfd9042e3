"""Attention over all tokens: query blocks in plain XLA on CPU, cuDNN on GPU, splash on TPU.

`choose` says which, by device, dtype and sizes; `implementation=` overrides it. On a mesh whose
axes `fsdp` and `context` hold the tokens, each device keeps its queries and gathers all keys and
values. Splash is the Pallas kernel that ships with JAX.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from jax_videoreason.axes import Array
from jax_videoreason.sharding import RULES, ambient, token_shards

Implementation = Literal["xla", "cudnn", "splash"]
IMPLEMENTATIONS = ("xla", "cudnn", "splash")

BLOCK_BYTES = 32 * 2**20  # scores of one query block in float32; what is below is computed at once
REFUSED_BYTES = 8 * 2**30  # scores of the whole call, above which an accelerator refuses plain XLA
SPLASH_BLOCK = 512  # queries and keys of a tile
LANES = 128  # tokens and head width of splash are multiples of it

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """What is traced inside is for a "cpu", "gpu" or "tpu" that need not be here."""
  token = _platform.set(platform)
  try:
    yield
  finally:
    _platform.reset(token)


def choose(platform: str, dtype: jnp.dtype, queries: Sequence[int], keys: int) -> Implementation:
  """The implementation for a platform; queries: (..., T, N, K), the shape of q. keys: X.

  cuDNN on a GPU and splash on a TPU for bfloat16 and float16 (splash: heads of a multiple of 128),
  query blocks in plain XLA elsewhere. On an accelerator the latter is refused with a ValueError
  when the scores are over 8 GiB: cost and time there grow with T squared.
  """
  half = dtype in (jnp.bfloat16, jnp.float16)
  if platform == "gpu" and half:
    return "cudnn"
  if platform == "tpu" and half and queries[-1] % LANES == 0:
    return "splash"
  _check_plain(platform, queries, keys)
  return "xla"


def _scores(queries: Sequence[int], keys: int) -> int:
  """Bytes of all scores in float32."""
  return 4 * math.prod(queries[:-1]) * keys


def _check_plain(platform: str, queries: Sequence[int], keys: int) -> None:
  scores, (t, n, width) = _scores(queries, keys), queries[-3:]
  if platform != "cpu" and scores > REFUSED_BYTES:
    raise ValueError(
      f"plain attention over N={n} T={t} X={keys} has {scores / 1e9:.1f} GB of scores, the limit "
      f"on {platform} is {REFUSED_BYTES / 1e9:.1f} GB: use dtype='bfloat16' (on a TPU with heads "
      f"of a multiple of {LANES}, here {width}), or fewer tokens or runs."
    )


def attend(
  q: Array,
  k: Array,
  v: Array,
  *,
  implementation: Implementation | None = None,
  keys: int | None = None,
  spread: Literal["q", "qkv"] | None = None,
) -> Array:
  """softmax(q k' / sqrt(K)) v with q (..., T, N, K) and k, v (..., X, N, K) -> (..., T, N, K).

  The softmax is in float32. implementation: None = `choose`. keys: only the first so many keys
  count; None = all. spread: whose token axis lies on the mesh, where there is one; the leading axes
  are then (G, R).
  """
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    wanted = ", ".join(repr(name) for name in IMPLEMENTATIONS)
    raise ValueError(f"attention implementation {implementation!r}, wanted one of {wanted}.")
  local = functools.partial(_attend, implementation=implementation, keys=keys)
  on_tpu = (_platform.get() or jax.default_backend()) == "tpu"
  if spread is None or ambient() is None or not (token_shards() > 1 or on_tpu):
    return local(q, k, v)
  mine = PartitionSpec(None, "seed", RULES["t"], None, None)
  whole = mine if spread == "qkv" else PartitionSpec(None, "seed", None, None, None)

  def gathered(q: Array, k: Array, v: Array) -> Array:
    if spread == "qkv":
      k, v = (jax.lax.all_gather(a, RULES["t"], axis=2, tiled=True) for a in (k, v))
    return local(q, k, v)

  # a Pallas call says nothing of how it varies over the mesh
  return jax.shard_map(gathered, in_specs=(mine, whole, whole), out_specs=mine, check_vma=False)(
    q, k, v
  )


def _attend(
  q: Array, k: Array, v: Array, *, implementation: Implementation | None, keys: int | None
) -> Array:
  """`attend` on one device."""
  platform = _platform.get() or jax.default_backend()
  t, x = q.shape[-3], k.shape[-3]
  chosen = implementation or choose(platform, q.dtype, q.shape, x)
  count = None if keys is None or keys == x else keys
  if chosen == "cudnn":
    return _cudnn(q, k, v, count)
  if chosen == "splash":
    return _splash(q, k, v, x if count is None else count, interpret=platform != "tpu")
  _check_plain(platform, q.shape, x)
  scores = _scores(q.shape, x)
  if scores <= BLOCK_BYTES:
    return _dense(q, k, v, count)
  return _in_blocks(q, k, v, max(1, t * BLOCK_BYTES // scores), count)


def _dense(q: Array, k: Array, v: Array, count: int | None) -> Array:
  """All scores at once."""
  scores = jnp.einsum(
    "...tnk,...xnk->...ntx", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
  )
  if count is not None:
    scores = jnp.where(jnp.arange(k.shape[-3]) < count, scores, -jnp.inf)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  total = rearrange(weights.sum(axis=-1), "... n t -> ... t n 1")
  out = jnp.einsum(
    "...ntx,...xnk->...tnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  return (out / total).astype(q.dtype)


def _in_blocks(q: Array, k: Array, v: Array, block: int, count: int | None) -> Array:
  """The same, `block` queries at a time; scores are computed again in the backward pass."""
  t = q.shape[-3]
  blocks = -(-t // block)
  block = -(-t // blocks)
  padded = _pad_tokens(q, blocks * block)
  cut = rearrange(padded, "... (c t) n k -> c ... t n k", c=blocks)
  out = jax.lax.map(jax.checkpoint(lambda part: _dense(part, k, v, count)), cut)
  return rearrange(out, "c ... t n k -> ... (c t) n k")[..., :t, :, :]


def _cudnn(q: Array, k: Array, v: Array, count: int | None) -> Array:
  lead = q.shape[:-3]
  q, k, v = (a.reshape((-1, *a.shape[-3:])) for a in (q, k, v))
  lengths = None if count is None else jnp.full(len(k), count, jnp.int32)
  out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
  return out.reshape((*lead, *out.shape[1:]))


def _splash(q: Array, k: Array, v: Array, count: int, *, interpret: bool) -> Array:
  """Tiles of `SPLASH_BLOCK`; tokens are padded to whole tiles, the keys that are no keys masked."""
  lead, (t, n, width), x = q.shape[:-3], q.shape[-3:], k.shape[-3]
  tile_q, tile_x = (min(SPLASH_BLOCK, -(-size // LANES) * LANES) for size in (t, x))
  whole_q, whole_x = -(-t // tile_q) * tile_q, -(-x // tile_x) * tile_x
  mask = splash.MultiHeadMask([splash.FullMask((whole_q, whole_x)) for _ in range(n)])
  kernel = splash.make_splash_mha_single_device(
    mask,
    block_sizes=splash.BlockSizes(block_q=tile_q, block_kv=tile_x, block_kv_compute=tile_x),
    interpret=interpret,
  )
  ids = None
  if count != whole_x:
    ids = splash.SegmentIds(
      q=jnp.zeros(whole_q, jnp.int32), kv=(jnp.arange(whole_x) >= count).astype(jnp.int32)
    )
  q = _pad_tokens(q * width**-0.5, whole_q)
  k, v = _pad_tokens(k, whole_x), _pad_tokens(v, whole_x)

  def heads_first(a: Array) -> Array:
    return rearrange(a.reshape((-1, *a.shape[-3:])), "b t n k -> b n t k")

  out: Any = jax.vmap(kernel, in_axes=(0, 0, 0, None))(*map(heads_first, (q, k, v)), ids)
  out = rearrange(out, "b n t k -> b t n k")[:, :t].astype(v.dtype)
  return out.reshape((*lead, t, n, width))


def _pad_tokens(a: Array, size: int) -> Array:
  """(..., T, N, K) with zeros up to `size` tokens."""
  after = [(0, 0)] * (a.ndim - 3) + [(0, size - a.shape[-3]), (0, 0), (0, 0)]
  return jnp.pad(a, after)
