"""Attention over all tokens: query blocks in plain XLA on CPU, cuDNN on GPU, splash on TPU.

`choose` says which, by device, dtype and sizes; `implementation=` overrides it. On a mesh whose
axes `fsdp` and `context` hold the tokens, each device keeps its queries, and keys and values reach
them by one of two routes: all are gathered, or blocks of them go round a ring. `choose_route` says
which, by their bytes; `by_route` overrides it. Splash is the Pallas kernel that ships with JAX.
"""

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import pack, rearrange, unpack
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_videoreason.axes import Array
from jax_videoreason.sharding import RULES, ambient, token_shards

Implementation = Literal["xla", "cudnn", "splash"]
Route = Literal["gather", "ring"]
IMPLEMENTATIONS = ("xla", "cudnn", "splash")
ROUTES = ("gather", "ring")

BLOCK_BYTES = 32 * 2**20  # scores of one query block in float32; what is below is computed at once
REFUSED_BYTES = 8 * 2**30  # scores of one sequence, above which an accelerator refuses plain XLA
GATHERED_BYTES = 4 * 2**30  # keys and values of a layer on one device, above which they go round
SPLASH_BLOCK = 512  # queries and keys of a tile
LANES = 128  # tokens and head width of splash are multiples of it
CUDNN_STEP, CUDNN_WIDEST = 8, 128  # head widths that cuDNN takes on every GPU with bfloat16
MASKED = -0.7 * float(np.finfo(np.float32).max)  # the score of a key that does not count; finite

# part of the key of every compiled program, so none is reused for another platform or route
_platform = jax.make_user_context(None)
_route = jax.make_user_context(None)


def compiling_for(platform: str) -> AbstractContextManager[Any]:
  """What is traced inside is for a "cpu", "gpu" or "tpu" that need not be here."""
  return _platform(platform)


def by_route(route: Route | None) -> AbstractContextManager[Any]:
  """What is traced inside moves keys and values by this route; None = `choose_route`."""
  if route is not None and route not in ROUTES:
    raise ValueError(f"route={route!r}, wanted 'gather' or 'ring'.")
  return _route(route)


def choose_route(platform: str, keys: Sequence[int], itemsize: int) -> Route:
  """How keys and values reach the queries of other devices; keys: (..., X, N, K), all of them.

  They are gathered where they take at most 4 GiB of a device, which is one collective a layer and
  the larger matmuls; above, they go round a ring, which holds two blocks of them, whatever X is.
  On a GPU they are always gathered: JAX hands cuDNN's sums out in bfloat16, too coarse to join
  blocks by.
  """
  gathered = 2 * math.prod(keys) * itemsize
  return "ring" if gathered > GATHERED_BYTES and platform != "gpu" else "gather"


def choose(platform: str, dtype: jnp.dtype, queries: Sequence[int], keys: int) -> Implementation:
  """The implementation for a platform; queries: (..., T, N, K), the shape of q. keys: X.

  For bfloat16 and float16, cuDNN on a GPU (heads of a multiple of 8, up to 128) and splash on a TPU
  (heads of a multiple of 128); query blocks in plain XLA elsewhere. On an accelerator the latter is
  refused with a ValueError when the scores of one sequence are over 8 GiB: cost and time there grow
  with T squared.
  """
  half = dtype in (jnp.bfloat16, jnp.float16)
  width = queries[-1]
  if platform == "gpu" and half and width % CUDNN_STEP == 0 and width <= CUDNN_WIDEST:
    return "cudnn"
  if platform == "tpu" and half and width % LANES == 0:
    return "splash"
  _check_plain(platform, queries, keys)
  return "xla"


def _scores(queries: Sequence[int], keys: int) -> int:
  """Bytes of all scores in float32."""
  return 4 * math.prod(queries[:-1]) * keys


def _check_plain(platform: str, queries: Sequence[int], keys: int) -> None:
  t, n, width = queries[-3:]
  scores = _scores((t, n, width), keys)
  if platform != "cpu" and scores > REFUSED_BYTES:
    on_gpu = f"a multiple of {CUDNN_STEP}, up to {CUDNN_WIDEST}"
    wanted = on_gpu if platform == "gpu" else f"a multiple of {LANES}"
    raise ValueError(
      f"plain attention over N={n} T={t} X={keys} has {scores / 1e9:.1f} GB of scores, the limit "
      f"on {platform} is {REFUSED_BYTES / 1e9:.1f} GB: use dtype='bfloat16' with heads of {wanted} "
      f"(here of {width}), or fewer tokens."
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
  shards = token_shards()
  # a kernel takes whole arrays: left to the compiler, each device would gather the runs of all
  if spread is None or ambient() is None or (shards == 1 and _platform_now() == "cpu"):
    return local(q, k, v)
  mine = PartitionSpec(None, "seed", RULES["t"], None, None)
  whole = mine if spread == "qkv" else PartitionSpec(None, "seed", None, None, None)

  def gathered(q: Array, k: Array, v: Array) -> Array:
    if spread == "q" or shards == 1:
      return local(q, k, v)
    everywhere = (*k.shape[:-3], k.shape[-3] * shards, *k.shape[-2:])
    route = _route.value or choose_route(_platform_now(), everywhere, k.dtype.itemsize)
    if route == "ring":
      return _ring(q, k, v, shards, implementation=implementation, keys=keys)
    k, v = (jax.lax.all_gather(a, RULES["t"], axis=2, tiled=True) for a in (k, v))
    return local(q, k, v)

  # a Pallas call says nothing of how it varies over the mesh
  return jax.shard_map(gathered, in_specs=(mine, whole, whole), out_specs=mine, check_vma=False)(
    q, k, v
  )


def weights(q: ArrayLike, k: ArrayLike, heads: int) -> Array:
  """How much each query attends to each key: q ... T D and k ... X D -> ... N T X float32.

  softmax(q k' / sqrt(K)) over the keys, D = N heads x K side by side, as the taps "attn_q/full" and
  "attn_k/full" hold them, or "cross_q/full" and `conditioning.cross_keys`. The other axes are the
  same, but that one side may lack the first: the keys of the prompts have no steps. A map has T X
  numbers for each head, which attention itself never holds: cut layers, steps and queries first
  (those of some tokens are q[..., tokens, :]). Sums over the keys of a frame, a region or a word
  say how much of the attention goes there. Cross-attention masks no key, so a row sums to 1 with
  the padding behind the prompt.
  ValueError: D or other axes do not agree, or D does not divide by heads.
  """
  q, k = (jnp.asarray(a) for a in (q, k))
  if q.shape[-1] != k.shape[-1] or q.shape[-1] % heads:
    raise ValueError(
      f"q is {q.shape} and k {k.shape}, wanted ... T D and ... X D with D a multiple of "
      f"heads={heads}."
    )
  fewer, more = sorted((q.shape[:-2], k.shape[:-2]), key=len)
  if more[len(more) - len(fewer) :] != fewer:
    raise ValueError(
      f"q is {q.shape} and k {k.shape}, wanted ... T D and ... X D with the same axes before them: "
      "take both of the same layers, branches and runs."
    )
  q, k = (rearrange(a.astype(jnp.float32), "... t (n k) -> ... n t k", n=heads) for a in (q, k))
  scores = jnp.einsum("...ntk,...nxk->...ntx", q, k, precision=jax.lax.Precision.HIGHEST)
  return jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)


def _platform_now() -> str:
  return _platform.value or jax.default_backend()


def _attend(
  q: Array, k: Array, v: Array, *, implementation: Implementation | None, keys: int | None
) -> Array:
  """`attend` on one device."""
  platform, x = _platform_now(), k.shape[-3]
  chosen = implementation or choose(platform, q.dtype, q.shape, x)
  count = None if keys is None or keys == x else keys
  if chosen == "cudnn":
    return _cudnn(q, k, v, count)
  if chosen == "splash":
    return _splash(q, k, v, count, sums=False, interpret=platform != "tpu")[0]
  _check_plain(platform, q.shape, x)
  return _plain(q, k, v, count, q.dtype)[0]


def _ring(
  q: Array,
  k: Array,
  v: Array,
  shards: int,
  *,
  implementation: Implementation | None,
  keys: int | None,
) -> Array:
  """`attend` over keys and values of which each of `shards` devices brings an equal block.

  Blocks go from device to device, and what a device made of those it saw is joined by the
  logarithms of their sums, in float32. So a device holds two blocks, the one it reads and the one
  that arrives. (The backward pass keeps every block; splash has none here.)
  """
  platform, x = _platform_now(), k.shape[-3]
  chosen = implementation or choose(platform, q.dtype, q.shape, x * shards)
  if chosen == "cudnn":
    raise ValueError(
      "route='ring' with cuDNN, whose sums come in bfloat16: use route='gather', or fewer tokens."
    )
  if chosen == "xla":
    _check_plain(platform, q.shape, x * shards)
  place = jax.lax.axis_index(RULES["t"])
  onward = [(i, (i + 1) % shards) for i in range(shards)]

  def hop(carry: tuple[Array, ...], number: Array) -> tuple[tuple[Array, ...], None]:
    k, v, out, total = carry
    arriving = [jax.lax.ppermute(a, RULES["t"], onward) for a in (k, v)]
    count = None
    if keys is not None and keys != x * shards:
      count = jnp.clip(keys - (place - number) % shards * x, 0, x)
    if chosen == "splash":
      part, own = _splash(q, k, v, count, sums=True, interpret=platform != "tpu")
    else:
      part, own = _plain(q, k, v, count, jnp.dtype(jnp.float32))
    joined = jnp.logaddexp(total, own)
    old, new = (jnp.exp(some - joined)[..., None] for some in (total, own))
    return (*arriving, old * out + new * part.astype(jnp.float32), joined), None

  nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], MASKED)
  (_, _, out, _), _ = jax.lax.scan(hop, (k, v, *nothing), jnp.arange(shards))
  return out.astype(q.dtype)


def _plain(
  q: Array, k: Array, v: Array, count: Array | int | None, dtype: jnp.dtype
) -> tuple[Array, Array]:
  """(attention in `dtype`, log of the sum of exp of the scores, ... T N); at once or in blocks."""
  scores = _scores(q.shape, k.shape[-3])
  if scores <= BLOCK_BYTES:
    return _dense(q, k, v, count, dtype)
  return _in_blocks(q, k, v, max(1, q.shape[-3] * BLOCK_BYTES // scores), count, dtype)


def _dense(
  q: Array, k: Array, v: Array, count: Array | int | None, dtype: jnp.dtype
) -> tuple[Array, Array]:
  """All scores at once."""
  scale = q.shape[-1] ** -0.5
  product = functools.partial(
    jnp.einsum, "...tnk,...xnk->...ntx", preferred_element_type=jnp.float32
  )
  # a scaled query of half precision would be rounded once more than the references round it
  scores = product(q * scale, k) if q.dtype == jnp.float32 else product(q, k) * scale
  if count is not None:
    scores = jnp.where(jnp.arange(k.shape[-3]) < count, scores, MASKED)
  most = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.exp(scores - most)
  total = weights.sum(axis=-1, keepdims=True)
  out = jnp.einsum(
    "...ntx,...xnk->...tnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  by_token = "... n t one -> ... t n one"
  made = (out / rearrange(total, by_token)).astype(dtype)
  return made, rearrange(most + jnp.log(total), by_token)[..., 0]


def _in_blocks(
  q: Array, k: Array, v: Array, block: int, count: Array | int | None, dtype: jnp.dtype
) -> tuple[Array, Array]:
  """The same, `block` queries at a time; scores are computed again in the backward pass."""
  t = q.shape[-3]
  blocks = -(-t // block)
  block = -(-t // blocks)
  padded = _pad_tokens(q, blocks * block)
  cut = rearrange(padded, "... (c t) n k -> c ... t n k", c=blocks)
  out, sums = jax.lax.map(jax.checkpoint(lambda part: _dense(part, k, v, count, dtype)), cut)
  out = rearrange(out, "c ... t n k -> ... (c t) n k")[..., :t, :, :]
  return out, rearrange(sums, "c ... t n -> ... (c t) n")[..., :t, :]


def _cudnn(q: Array, k: Array, v: Array, count: int | None) -> Array:
  (q, lead), (k, _), (v, _) = (pack([a], "* t n k") for a in (q, k, v))
  lengths = None if count is None else jnp.full(len(k), count, jnp.int32)
  out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
  return unpack(out, lead, "* t n k")[0]


def _splash(
  q: Array, k: Array, v: Array, count: Array | int | None, *, sums: bool, interpret: bool
) -> tuple[Array, Any]:
  """As `_plain`, in tiles of `SPLASH_BLOCK`; without `sums`, which cost memory, None is there.

  Tokens are padded to whole tiles, the keys that are no keys masked.
  """
  (t, n, width), x = q.shape[-3:], k.shape[-3]
  tile_q, tile_x = (min(SPLASH_BLOCK, -(-size // LANES) * LANES) for size in (t, x))
  whole_q, whole_x = -(-t // tile_q) * tile_q, -(-x // tile_x) * tile_x
  mask = splash.MultiHeadMask([splash.FullMask((whole_q, whole_x)) for _ in range(n)])
  kernel = splash.make_splash_mha_single_device(
    mask,
    block_sizes=splash.BlockSizes(block_q=tile_q, block_kv=tile_x, block_kv_compute=tile_x),
    save_residuals=sums,
    interpret=interpret,
  )
  ids = None
  if count is not None or x != whole_x:
    absent = jnp.arange(whole_x) >= (x if count is None else count)
    ids = splash.SegmentIds(q=jnp.zeros(whole_q, jnp.int32), kv=absent.astype(jnp.int32))
  q = _pad_tokens(q * width**-0.5, whole_q)
  k, v = _pad_tokens(k, whole_x), _pad_tokens(v, whole_x)

  (q, lead), (k, _), (v, _) = (
    pack([rearrange(a, "... t n k -> ... n t k")], "* n t k") for a in (q, k, v)
  )
  made: Any = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, ids)
  out, logs = (made[0], made[1][0]) if sums else (made, None)
  out = unpack(rearrange(out, "b n t k -> b t n k")[:, :t].astype(v.dtype), lead, "* t n k")[0]
  if logs is not None:
    logs = unpack(rearrange(logs, "b n t -> b t n")[:, :t], lead, "* t n")[0]
  return out, logs


def _pad_tokens(a: Array, size: int) -> Array:
  """(..., T, N, K) with zeros up to `size` tokens."""
  after = [(0, 0)] * (a.ndim - 3) + [(0, size - a.shape[-3]), (0, 0), (0, 0)]
  return jnp.pad(a, after)
