"""Hidden state to something small: what a tap keeps of a value G R T D at one layer.

All arithmetic is float32 whatever the dtype of the model. Rows of runs never touch each other,
except in `cosine_to` and `cka_to`, which read the run named by `reference`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from jax_videoreason.axes import Array

PCA_COLUMNS, PCA_ITERATIONS = 8, 4
CKA_WIDTH, GRAM_WIDTH = 128, 256
TOP_CHANNELS = 6

einsum = functools.partial(
  jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """What the reductions read beside the value; None = not given.

  frames: token frames f. heads: N. directions: P D. regions: R P T. targets: R T P. reference: R
  int32. head: G R T D -> G R T 4C. before: G R ..., the row that the last recorded layer left, None
  at the first.
  """

  frames: int
  heads: int = 1
  directions: Array | None = None
  regions: Array | None = None
  targets: Array | None = None
  reference: Array | None = None
  head: Callable[[Array], Array] | None = None
  before: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction:
  """apply: (value G R T D, Inputs) -> G R ...

  needs: the field of Inputs without which it can't work. costly: more than a norm, so it is
  computed only where it is kept.
  state: a hidden state, kept in the dtype of the model; all others are float32. follows: reads
  `Inputs.before`. heads: True = only of what the heads of attention found, which lie side by side
  there; False = of everything else; None = of both.
  """

  apply: Callable[[Array, Inputs], Array]
  needs: str = ""
  costly: bool = True
  state: bool = False
  follows: bool = False
  heads: bool | None = None


@functools.lru_cache(maxsize=32)
def signs(rows: int, columns: int) -> np.ndarray:
  """Fixed random signs, rows x columns int8, the same on every machine (PCG64, seed 0)."""
  bits = np.random.default_rng(0).integers(0, 2, size=(rows, columns), dtype=np.int8)
  return 2 * bits - 1


def squeeze(value: Array, width: int) -> Array:
  """... D -> ... width by a fixed random projection; D <= width is only cast to float32.

  Inner products are kept on average.
  """
  d = value.shape[-1]
  if d <= width:
    return value.astype(jnp.float32)
  matrix = jnp.asarray(signs(d, width), jnp.float32) / np.sqrt(width).astype(np.float32)
  return einsum("...d,dk->...k", value, matrix)


def norm(value: Array, inputs: Inputs) -> Array:
  """G R T: length of each token over D."""
  del inputs
  return jnp.sqrt(reduce(jnp.square(value.astype(jnp.float32)), "g r t d -> g r t", "sum"))


def frame_norm(value: Array, inputs: Inputs) -> Array:
  """G R f: length of each latent frame over its tokens and channels."""
  square = jnp.square(value.astype(jnp.float32))
  return jnp.sqrt(reduce(square, "g r (f t) d -> g r f", "sum", f=inputs.frames))


def head_norm(value: Array, inputs: Inputs) -> Array:
  """G R f N: length of each head in each latent frame, over its tokens and channels."""
  square = jnp.square(value.astype(jnp.float32))
  heads = {"f": inputs.frames, "n": inputs.heads}
  return jnp.sqrt(reduce(square, "g r (f t) (n k) -> g r f n", "sum", **heads))


def channel_moments(value: Array, inputs: Inputs) -> Array:
  """G R 2 D: mean and variance of each channel over the tokens."""
  del inputs
  x = value.astype(jnp.float32)
  return jnp.stack([x.mean(axis=2), x.var(axis=2)], axis=2)


def top_channels(value: Array, inputs: Inputs) -> Array:
  """G R (T + 1) K: the K = 6 channels that vary most over the tokens, their numbers after them."""
  del inputs
  count = min(TOP_CHANNELS, value.shape[-1])
  _, chosen = jax.lax.top_k(value.astype(jnp.float32).var(axis=2), count)
  chosen = rearrange(chosen, "g r k -> g r 1 k")
  kept = jnp.take_along_axis(value, chosen, axis=3)
  return jnp.concatenate([kept.astype(jnp.float32), chosen.astype(jnp.float32)], axis=2)


def region_mean(value: Array, inputs: Inputs) -> Array:
  """G R P D: mean over the tokens of each region, by its weights; 0 for a region without weight."""
  weights = _given(inputs.regions).astype(jnp.float32)
  total = reduce(weights, "r p t -> r p 1", "sum")
  weights = jnp.where(total == 0, 0.0, weights / jnp.where(total == 0, 1.0, total))
  return einsum("rpt,grtd->grpd", weights, value)


def project(value: Array, inputs: Inputs) -> Array:
  """G R T P: inner product of each token with each direction (not normalised)."""
  return einsum("grtd,pd->grtp", value, _given(inputs.directions))


def gram(value: Array, inputs: Inputs) -> Array:
  """G R K (K + P): X'X beside X'y of the tokens X, K = min(D, 256), y the targets.

  They add up over batches into a ridge probe; a target that is 1 everywhere gives the sums that an
  intercept needs.
  """
  x = squeeze(value, GRAM_WIDTH)
  xx = einsum("grtk,grtj->grkj", x, x)
  xy = einsum("grtk,rtp->grkp", x, _given(inputs.targets))
  return jnp.concatenate([xx, xy], axis=-1)


def pca3(value: Array, inputs: Inputs) -> Array:
  """G R T 3: each token on the three main axes of its run, largest variance first.

  Four subspace iterations on eight columns. They start from the components of the layer recorded
  before, which are close. The largest loading of each axis is positive.
  """
  g, r, t, d = value.shape
  columns = min(PCA_COLUMNS, t, d)
  start = jnp.broadcast_to(
    jnp.asarray(signs(t, columns), jnp.float32)[None, None], (g, r, t, columns)
  )
  if inputs.before is not None:
    known = min(columns, 3)
    before = inputs.before[..., :known]
    usable = jnp.any(before != 0, axis=(2, 3), keepdims=True)
    started = jnp.concatenate([before, start[..., known:]], axis=-1)
    start = jnp.where(usable, started, start)
  mean = value.astype(jnp.float32).mean(axis=2)

  def axes_of(scores: Array) -> Array:
    centred = einsum("grtd,grtk->grdk", value, scores) - einsum(
      "grd,grk->grdk", mean, scores.sum(axis=2)
    )
    return jnp.linalg.qr(centred)[0]

  def scores_of(axes: Array) -> Array:
    shift = rearrange(einsum("grd,grdk->grk", mean, axes), "g r k -> g r 1 k")
    return einsum("grtd,grdk->grtk", value, axes) - shift

  axes = axes_of(start)
  for _ in range(PCA_ITERATIONS - 1):
    axes = axes_of(scores_of(axes))
  scores = scores_of(axes)
  _, turn = jnp.linalg.eigh(einsum("grtk,grtj->grkj", scores, scores))
  turn = turn[..., ::-1][..., :3]
  loadings = einsum("grdk,grkj->grdj", axes, turn)
  largest = jnp.take_along_axis(
    loadings, jnp.argmax(jnp.abs(loadings), axis=2, keepdims=True), axis=2
  )
  found = einsum("grtk,grkj->grtj", scores, turn) * jnp.where(largest < 0, -1.0, 1.0)
  return jnp.pad(found, ((0, 0), (0, 0), (0, 0), (0, 3 - found.shape[-1])))


def cosine_to(value: Array, inputs: Inputs) -> Array:
  """G R T: cosine of each token with that of the reference run; 0 where one of them is 0."""
  x = value.astype(jnp.float32)
  other = jnp.take(x, _given(inputs.reference), axis=1, mode="clip")
  lengths = norm(x, inputs) * norm(other, inputs)
  inner = reduce(x * other, "g r t d -> g r t", "sum")
  return jnp.where(lengths == 0, 0.0, inner / jnp.where(lengths == 0, 1.0, lengths))


def cka_to(value: Array, inputs: Inputs) -> Array:
  """G R in 0..1: linear CKA of the tokens with the reference run's, after projection to 128
  columns.

  ||Y'X||^2 / (||X'X|| ||Y'Y||) in Frobenius norms, columns centred over tokens; 0 for constant
  tokens.
  """
  x = squeeze(value, CKA_WIDTH)
  x = x - x.mean(axis=2, keepdims=True)
  other = jnp.take(x, _given(inputs.reference), axis=1, mode="clip")
  cross = jnp.square(einsum("grtk,grtj->grkj", x, other)).sum(axis=(2, 3))
  own = jnp.linalg.norm(einsum("grtk,grtj->grkj", x, x), axis=(2, 3))
  size = own * jnp.take(own, _given(inputs.reference), axis=1, mode="clip")
  return jnp.where(size == 0, 0.0, cross / jnp.where(size == 0, 1.0, size))


def lens(value: Array, inputs: Inputs) -> Array:
  """G R T 4C: the model's own output head at this place, a velocity per token."""
  if inputs.head is None:
    raise ValueError(
      "'lens' got no output head, wanted a function G R T D -> G R T 4C: set TapAids.head."
    )
  return inputs.head(value).astype(jnp.float32)


def full(value: Array, inputs: Inputs) -> Array:
  """G R T D: the value itself."""
  del inputs
  return value


REDUCTIONS: dict[str, Reduction] = {
  "norm": Reduction(apply=norm, costly=False),
  "frame_norm": Reduction(apply=frame_norm, costly=False),
  "head_norm": Reduction(apply=head_norm, costly=False, heads=True),
  "channel_moments": Reduction(apply=channel_moments),
  "top_channels": Reduction(apply=top_channels),
  "region_mean": Reduction(apply=region_mean, needs="regions", state=True),
  "project": Reduction(apply=project, needs="directions"),
  "gram": Reduction(apply=gram, needs="targets"),
  "pca3": Reduction(apply=pca3, follows=True),
  "cosine_to": Reduction(apply=cosine_to, needs="reference"),
  "cka_to": Reduction(apply=cka_to, needs="reference"),
  "lens": Reduction(apply=lens, heads=False),
  "full": Reduction(apply=full, state=True),
}


def _given(array: Array | None) -> Array:
  if array is None:
    raise ValueError("a reduction got None for an array it needs: see Reduction.needs.")
  return array
