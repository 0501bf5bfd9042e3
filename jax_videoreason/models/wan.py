"""The Wan 2.1 and 2.2 diffusion transformer: text to video, image to video, TI2V."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from jax_videoreason import rope
from jax_videoreason.attention import attend
from jax_videoreason.axes import Array, Params
from jax_videoreason.edits import BY_LAYER, BlockEdits, spare_tokens
from jax_videoreason.models.common import (
  LayerNorm,
  Numerics,
  RMSNorm,
  modulate,
  numerics,
  patchify,
  site,
  unpatchify,
)
from jax_videoreason.sharding import constrain, token_shards
from jax_videoreason.structs import Conditioning, Sizes
from jax_videoreason.taps import SITES, TapAids, TapSpec, empty_buffers, layer_slots

xavier = nn.initializers.xavier_uniform()
EXACT = jax.lax.Precision.HIGHEST  # of the small products that may stay float32 in a bfloat16 model
At = Callable[[str, Array, dict[str, Array]], tuple[Array, dict[str, Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
  """Sizes of a WanDiT.

  in_channels: of what the patch embedding sees: out_channels, or with image_input="concat"
    2 * out_channels + 4 (latents, mask of 4, given latents).
  image_input: how given frames enter: not at all, concatenated (2.1, A14B), or written over the
    latents with t = 0 on their tokens (TI2V-5B).
  clip_width: width of the CLIP tokens (2.1 image to video); None = no image attention.
  numerics: "official", "diffusers" or "diffsynth"; dtype: the compute dtype of the matmuls.
  remat: compute the activations of a layer again in the backward pass: on a CPU this is
    faster than to store them, and it takes a fraction of the memory.
  """

  width: int
  ffn_width: int
  heads: int
  layers: int
  in_channels: int = 16
  out_channels: int = 16
  text_width: int = 4096
  freq_dim: int = 256
  patch: tuple[int, int, int] = (1, 2, 2)
  image_input: Literal["none", "concat", "overwrite"] = "none"
  clip_width: int | None = None
  theta: float = 10000.0
  epsilon: float = 1e-6
  numerics: str = "official"
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: bool = True

  def __post_init__(self):
    numerics(self.numerics)
    if self.width % self.heads:
      raise ValueError(f"width={self.width} does not divide by heads={self.heads}.")
    if self.image_input not in ("none", "concat", "overwrite"):
      raise ValueError(f"image_input={self.image_input!r}, wanted 'none', 'concat' or 'overwrite'.")
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"dtype={self.dtype!r}, wanted 'float32' or 'bfloat16'.")
    wanted = self.out_channels * (2 if self.image_input == "concat" else 1)
    wanted += 4 if self.image_input == "concat" else 0
    if self.in_channels != wanted:
      raise ValueError(
        f"in_channels={self.in_channels} with out_channels={self.out_channels} and "
        f"image_input={self.image_input!r}, wanted in_channels={wanted}."
      )

  @property
  def precision(self) -> Numerics:
    """Where float32 is kept."""
    return numerics(self.numerics)

  @property
  def compute(self) -> jnp.dtype:
    """The dtype of the matmuls."""
    return jnp.dtype(self.dtype)

  def kept(self, float32: bool) -> jnp.dtype:
    """float32 where the numerics keep it, the compute dtype elsewhere."""
    return jnp.dtype(jnp.float32) if float32 else self.compute


def _dense(width: int, dtype: jnp.dtype, name: str, init=xavier, precision=None) -> nn.Dense:
  return nn.Dense(width, dtype=dtype, kernel_init=init, precision=precision, name=name)


class MLP(nn.Module):
  """Dense, activation, Dense. precision: of the products; None = the backend's default."""

  hidden: int
  out: int
  dtype: jnp.dtype
  activation: Literal["gelu", "gelu_erf", "silu"] = "gelu"
  init_std: float | None = None
  precision: jax.lax.Precision | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    init = xavier if self.init_std is None else nn.initializers.normal(self.init_std)
    h = _dense(self.hidden, self.dtype, "up", init, self.precision)(x)
    h = h.astype(jnp.float32)
    if self.activation == "silu":
      h = nn.silu(h)
    else:
      h = nn.gelu(h, approximate=self.activation == "gelu")
    return _dense(self.out, self.dtype, "down", init, self.precision)(h)


def _norm(c: WanConfig, name: str) -> RMSNorm:
  """That of queries or keys."""
  places = c.precision
  return RMSNorm(c.epsilon, places.scale_before_rounding, c.kept(places.queries), name=name)


def _text_embed(c: WanConfig) -> MLP:
  """What brings the text to the width of the model, for all layers."""
  return MLP(c.width, c.width, c.compute, "gelu", 0.02, name="text_embed")


class SelfAttention(nn.Module):
  """G R T D -> G R T D, rotary positions on q and k.

  tokens: how many of T are no padding. at: acts at attn_q, attn_k and attn_v, as attention takes
  them, and at attn_heads, before the heads are joined.
  """

  config: WanConfig

  @nn.compact
  def __call__(
    self,
    x: Array,
    buffers: dict[str, Array],
    at: At,
    cos: np.ndarray,
    sin: np.ndarray,
    tokens: int,
  ) -> tuple[Array, dict[str, Array]]:
    c = self.config
    q = _norm(c, "norm_q")(_dense(c.width, c.compute, "q")(x))
    k = _norm(c, "norm_k")(_dense(c.width, c.compute, "k")(x))
    v = _dense(c.width, c.compute, "v")(x)
    q, k, v = (rearrange(a, "g r t (n k) -> g r t n k", n=c.heads) for a in (q, k, v))
    q, k = (rope.rotate(a, cos, sin).astype(c.compute) for a in (q, k))
    taken = []
    for name, heads in (("attn_q", q), ("attn_k", k), ("attn_v", v)):
      flat, buffers = at(name, rearrange(heads, "g r t n k -> g r t (n k)"), buffers)
      taken.append(rearrange(flat, "g r t (n k) -> g r t n k", n=c.heads))
    q, k, v = taken
    out = rearrange(attend(q, k, v, keys=tokens, spread="qkv"), "g r t n k -> g r t (n k)")
    out, buffers = at("attn_heads", out, buffers)
    return _dense(c.width, c.compute, "o")(out), buffers


def _normed(c: WanConfig, projection: str, tokens: Array) -> Array:
  """Queries ("q") or keys ("k", "k_clip") of cross-attention, as attention takes them: G R X D."""
  projected = _dense(c.width, c.compute, projection)(tokens)
  return _norm(c, f"norm_{projection}")(projected).astype(c.compute)


class TextKeys(nn.Module):
  """The keys that `CrossAttention` has of the text, G R X D, from those of its parameters."""

  config: WanConfig

  @nn.compact
  def __call__(self, text: Array) -> Array:
    return _normed(self.config, "k", text)


class CrossAttention(nn.Module):
  """Attends to the text, and with CLIP tokens to those by a second softmax, summed.

  at: acts at cross_q, the queries of both as attention takes them, and at cross_heads, after that
  sum and before the heads are joined.
  """

  config: WanConfig

  @nn.compact
  def __call__(
    self, x: Array, buffers: dict[str, Array], at: At, text: Array, clip: Array | None
  ) -> tuple[Array, dict[str, Array]]:
    c = self.config

    def heads(a):
      return rearrange(a, "g r x (n k) -> g r x n k", n=c.heads)

    def attended(tokens, suffix):
      k = _normed(c, f"k{suffix}", tokens)
      v = _dense(c.width, c.compute, f"v{suffix}")(tokens)
      return attend(q, heads(k), heads(v), spread="q")

    q, buffers = at("cross_q", _normed(c, "q", x), buffers)
    q = heads(q)
    out = attended(text, "")
    if clip is not None:
      out = out + attended(clip, "_clip")
    out = rearrange(out, "g r t n k -> g r t (n k)")
    out, buffers = at("cross_heads", out, buffers)
    return _dense(c.width, c.compute, "o")(out), buffers


def _by_token(rows: Array, given: Array | None) -> Array:
  """Rows (1 or R, 2, D) of t and of t = 0 -> the row of each token, to broadcast to G R T D."""
  at_t, at_zero = (rows[None, :, i, None] for i in range(2))
  return at_t if given is None else jnp.where(given[None, :, :, None], at_zero, at_t)


class WanBlock(nn.Module):
  """One layer: G R T D -> G R T D.

  modulation: (1 or R) 2 6 D, for t and for t = 0. given: R T bool, tokens of given frames (TI2V).
  tokens: how many of T are no padding. at: edits and records at each site, see `common.site`.
  """

  config: WanConfig

  @nn.compact
  def __call__(
    self,
    x: Array,
    buffers: dict[str, Array],
    at: At,
    *,
    modulation: Array,
    given: Array | None,
    text: Array,
    clip: Array | None,
    rotary: tuple[np.ndarray, np.ndarray],
    tokens: int,
  ) -> tuple[Array, dict[str, Array]]:
    c = self.config
    wide = c.kept(c.precision.modulation)
    own = self.param("modulation", nn.initializers.normal(c.width**-0.5), (6, c.width), jnp.float32)
    rows = modulation.astype(wide) + own[None, None].astype(wide)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
      _by_token(rows[:, :, i], given) for i in range(6)
    )

    x, buffers = at("resid_pre", x, buffers)
    before = x
    h = modulate(x, shift_a, scale_a, wide, c.epsilon).astype(c.compute)
    attended, buffers = SelfAttention(c, name="self_attn")(h, buffers, at, *rotary, tokens)
    attn_out = gate_a * attended.astype(wide)
    attn_out, buffers = at("attn_out", attn_out, buffers)
    x = (x + attn_out).astype(x.dtype)
    h = LayerNorm(c.epsilon, name="norm_cross")(x).astype(c.compute)
    cross_out, buffers = CrossAttention(c, name="cross_attn")(h, buffers, at, text, clip)
    cross_out, buffers = at("cross_out", cross_out, buffers)
    x = (x + cross_out).astype(x.dtype)
    h = modulate(x, shift_m, scale_m, wide, c.epsilon).astype(c.compute)
    mlp_out = gate_m * MLP(c.ffn_width, c.width, c.compute, name="mlp")(h).astype(wide)
    mlp_out, buffers = at("mlp_out", mlp_out, buffers)
    x = (x + mlp_out).astype(x.dtype)
    x, buffers = at("resid_post", constrain(x, "g r t d"), buffers)
    _, buffers = at("update", x - before, buffers)
    return x, buffers


class Head(nn.Module):
  """Makes the function G R T D -> G R T (pf ph pw C), a velocity by token, for one time.

  time: (1 or R) 2 D, the time embedding itself. The function is pure: the lens taps apply it to
  every layer under `lax.cond`.
  """

  config: WanConfig

  @nn.compact
  def __call__(self, time: Array, given: Array | None) -> Callable[[Array], Array]:
    c = self.config
    wide = c.kept(c.precision.modulation)
    dtype = c.kept(c.precision.head)
    out = int(np.prod(c.patch)) * c.out_channels
    own = self.param("modulation", nn.initializers.normal(c.width**-0.5), (2, c.width), jnp.float32)
    kernel = self.param("kernel", nn.initializers.zeros, (c.width, out), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (out,), jnp.float32)
    rows = time[:, :, None].astype(wide) + own[None, None].astype(wide)
    shift, scale = (_by_token(rows[:, :, i], given) for i in range(2))

    def velocity(x: Array) -> Array:
      h = modulate(x, shift, scale, wide, c.epsilon).astype(dtype)
      out = jnp.matmul(h, kernel.astype(dtype), precision=EXACT)
      return out + bias.astype(dtype)[None, None, None]

    return velocity


class WanDiT(nn.Module):
  """latents (R F H W C), time (2 freq_dim), conditioning -> velocity G R F H W C, float32; taps.

  time: sinusoids of t (row 0) and of t = 0 (row 1), `Schedule.time`; R 2 freq_dim gives every run
    its own t, as training wants.
  edits: one step's rows of an Intervention. taps: what to record, its steps are not looked at.
  slots: L int32, the row of the tap buffers each layer fills; None = as `taps.layers` says.
  Taps come back as `empty_buffers` lays them out: 'site/reduction' -> L' G' R ...
  """

  config: WanConfig

  @nn.compact
  def __call__(
    self,
    latents: Array,
    time: Array,
    cond: Conditioning,
    edits: BlockEdits | None = None,
    taps: TapSpec | None = None,
    slots: Array | None = None,
  ) -> tuple[Array, dict[str, Array]]:
    c = self.config
    (g, r), grid = cond.text.shape[:2], self.token_grid(latents)
    if r != latents.shape[0]:
      raise ValueError(f"text has R={r} runs, the latents have {latents.shape[0]}.")
    inputs, given = self.inputs(latents, cond)
    x = _dense(c.width, c.compute, "patch_embed")(patchify(inputs, c.patch))
    x = jnp.broadcast_to(x[None], (g, r, *x.shape[1:]))
    tokens = x.shape[2]
    spare = -tokens % token_shards()  # a mesh holds equal parts; no site, tap or mix sees the rest
    x = jnp.pad(x, ((0, 0), (0, 0), (0, spare), (0, 0)))
    x = constrain(x.astype(c.kept(c.precision.residual)), "g r t d")

    projected = c.kept(c.precision.time_projection)
    embed = MLP(
      c.width, c.width, c.kept(c.precision.time), "silu", 0.02, precision=EXACT, name="time_embed"
    )
    e = embed(time if time.ndim == 3 else time[None]).astype(projected)
    project = _dense(6 * c.width, projected, "time_project", precision=EXACT)
    modulation = project(nn.silu(e))
    head = Head(c, name="head")(e, given)
    inner = {
      "modulation": rearrange(modulation, "r row (six d) -> r row six d", six=6),
      "given": None if given is None else jnp.pad(given, ((0, 0), (0, spare))),
      "text": _text_embed(c)(cond.text),
      "clip": self.clip_tokens(cond, g),
      "rotary": tuple(
        np.pad(table, ((0, spare), (0, 0)))
        for table in rope.tables(grid, c.width // c.heads, c.theta)
      ),
      "tokens": tokens,
    }

    self.check_sites(edits)
    if edits is not None and spare:
      edits = spare_tokens(edits, r, tokens, spare)
    buffers, aids = {}, None
    if taps is not None and taps.sites:
      taps = dataclasses.replace(taps, steps=None)
      aids = TapAids(grid=grid, head=head, dtype=x.dtype, heads=c.heads)
      sizes = Sizes(S=1, R=r, G=g, L=c.layers, F=latents.shape[1], H=latents.shape[2],
                    W=latents.shape[3], C=c.out_channels, T=tokens, D=c.width,
                    N=c.heads, sites=SITES)  # fmt: skip
      buffers = empty_buffers(taps, sizes, aids)
      slots = jnp.asarray(layer_slots(taps, c.layers) if slots is None else slots)
    else:
      taps, slots = None, None
    by_layer = {} if edits is None else {
      name: rows for name in BY_LAYER
      if (rows := getattr(edits, name)) is not None
    }  # fmt: skip

    def layer(block, carry, scanned):
      rows, slot = scanned
      own = None if edits is None else dataclasses.replace(edits, **rows)
      at = functools.partial(site, edits=own, taps=taps, slot=slot, aids=aids, tokens=tokens)
      return block(*carry, at, **inner), None

    scan = nn.scan(
      # a scan keeps the two passes apart by itself, so common subexpressions need no barrier
      nn.remat(layer, prevent_cse=False) if c.remat else layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=c.layers,
    )
    (x, buffers), _ = scan(WanBlock(c, name="blocks"), (x, buffers), (by_layer, slots))
    velocity = head(x[:, :, :tokens]).astype(jnp.float32)
    return unpatchify(velocity, grid, c.patch), buffers

  @nn.nowrap  # it makes modules of its own
  def cross_keys(self, params: Params, text: Array, layers: Sequence[int]) -> Array:
    """G R X D_text -> the keys of the text in the cross-attention of `layers`, L' G R X D."""
    c = self.config
    embedded = _text_embed(c).apply({"params": params["text_embed"]}, text)

    def of_layer(layer: Array) -> Any:
      own = jax.tree.map(lambda leaf: leaf[layer], params["blocks"]["cross_attn"])
      return TextKeys(c).apply({"params": own}, embedded)

    return jax.lax.map(of_layer, jnp.asarray(layers))

  @staticmethod
  def check_sites(edits: BlockEdits | None) -> None:
    """ValueError when an edit names a site that the blocks do not have."""
    for name in () if edits is None else edits.sites:
      if name not in SITES:
        raise ValueError(f"no site {name!r} in WanDiT; it has: {', '.join(SITES)}.")

  def token_grid(self, latents: Array) -> tuple[int, int, int]:
    """(f, h, w); ValueError when the patch does not divide the latents."""
    c = self.config
    if latents.ndim != 5 or latents.shape[-1] != c.out_channels:
      raise ValueError(f"latents are {latents.shape}, wanted R F H W C with C={c.out_channels}.")
    _, f, h, w, _ = latents.shape
    if f % c.patch[0] or h % c.patch[1] or w % c.patch[2]:
      raise ValueError(f"latents of F H W = {(f, h, w)} do not divide into patches of {c.patch}.")
    return f // c.patch[0], h // c.patch[1], w // c.patch[2]

  def inputs(self, latents: Array, cond: Conditioning) -> tuple[Array, Array | None]:
    """What the patch embedding sees (R F H W C_in), and which tokens are given (R T bool)."""
    c = self.config
    if c.image_input == "none":
      return latents, None
    if cond.known is None or cond.known_mask is None:
      if c.image_input == "overwrite" and cond.known is None and cond.known_mask is None:
        return latents, None
      raise ValueError(
        f"image_input={c.image_input!r} needs known and known_mask in the conditioning."
      )
    if cond.known.shape != latents.shape:
      raise ValueError(
        f"known is R F H W C = {cond.known.shape}, wanted {latents.shape}: pad the given "
        "frame to all F latent frames (conditioning.encode does)."
      )
    mask = cond.known_mask.astype(latents.dtype)
    if c.image_input == "concat":
      return jnp.concatenate([latents, mask, cond.known.astype(latents.dtype)], -1), None
    cell = mask.min(axis=-1, keepdims=True) > 0
    pf, ph, pw = c.patch
    pattern = "r (f pf) (h ph) (w pw) one -> r (f h w one)"
    given = reduce(cell, pattern, "min", pf=pf, ph=ph, pw=pw)
    return jnp.where(cell, cond.known.astype(latents.dtype), latents), given

  def clip_tokens(self, cond: Conditioning, branches: int) -> Array | None:
    """Embedded CLIP tokens, G R X D; the branches share them."""
    c = self.config
    if c.clip_width is None:
      return None
    if cond.clip is None:
      raise ValueError(f"clip_width={c.clip_width} needs clip in the conditioning.")
    x = LayerNorm(1e-5, name="clip_norm")(cond.clip).astype(c.compute)
    x = MLP(c.clip_width, c.width, c.compute, "gelu_erf", name="clip_embed")(x)
    x = LayerNorm(1e-5, name="clip_norm_out")(x).astype(c.compute)
    return jnp.broadcast_to(x[None], (branches, *x.shape))


@functools.cache
def abstract_params(config: WanConfig) -> Params:
  """The parameter tree of a WanDiT as shapes and dtypes; nothing is allocated."""
  c = config

  def init() -> Params:
    latents = jnp.zeros((1, *c.patch, c.out_channels))
    cond = Conditioning(
      text=jnp.zeros((1, 1, 1, c.text_width)),
      known=latents if c.image_input != "none" else None,
      known_mask=jnp.zeros((1, *c.patch, 4)) if c.image_input != "none" else None,
      clip=None if c.clip_width is None else jnp.zeros((1, 1, c.clip_width)),
    )
    return WanDiT(c).init(jax.random.key(0), latents, jnp.zeros((2, c.freq_dim)), cond)["params"]

  return jax.eval_shape(init)
