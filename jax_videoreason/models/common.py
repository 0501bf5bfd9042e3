"""What the families share: precision by stack, norms, adaptive modulation, patches, sites."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jax_videoreason.axes import Array
from jax_videoreason.edits import BlockEdits, edit_site
from jax_videoreason.taps import TapAids, TapSpec, record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numerics:
  """Where a reference stack computes in float32 although its matmuls are in the compute dtype.

  Every field names one place; False = the compute dtype. With a float32 compute dtype all
  presets are the same function.
  queries: q and k from the weight of their norm, through the rotary positions, to the attention.
  scale_before_rounding: q/k norms multiply by their weight before they round (torch.nn.RMSNorm).
  """

  residual: bool
  time: bool
  time_projection: bool
  modulation: bool
  head: bool
  queries: bool
  scale_before_rounding: bool


NUMERICS = {
    "official": Numerics(
        residual=True, time=True, time_projection=True, modulation=True, head=True,
        queries=True, scale_before_rounding=False,
    ),
    "diffusers": Numerics(
        residual=False, time=True, time_projection=False, modulation=True, head=False,
        queries=False, scale_before_rounding=True,
    ),
    "diffsynth": Numerics(
        residual=False, time=False, time_projection=False, modulation=False, head=False,
        queries=False, scale_before_rounding=False,
    ),
}  # fmt: skip


def numerics(name: str) -> Numerics:
  """The preset of a stack; ValueError lists them."""
  if name not in NUMERICS:
    raise ValueError(f"numerics {name!r}, wanted one of {', '.join(NUMERICS)}.")
  return NUMERICS[name]


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis; the statistics are float32.

  scale_before_rounding: the product is taken in float32, too, and rounded to the dtype of x;
  otherwise x / rms(x) is. scaled: the dtype of the product then; None = that of x.
  """

  epsilon: float = 1e-6
  scale_before_rounding: bool = False
  scaled: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    full = x.astype(jnp.float32)
    unit = full * jax.lax.rsqrt(jnp.mean(full * full, axis=-1, keepdims=True) + self.epsilon)
    if self.scale_before_rounding:
      return (unit * scale).astype(x.dtype)
    dtype = self.scaled or x.dtype
    return unit.astype(x.dtype).astype(dtype) * scale.astype(dtype)


def standardize(x: Array, epsilon: float) -> Array:
  """Layer norm without parameters over the last axis, in float32."""
  full = x.astype(jnp.float32)
  mean = full.mean(axis=-1, keepdims=True)
  centred = full - mean
  return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)


class LayerNorm(nn.Module):
  """Layer norm with scale and bias over the last axis, computed and returned in float32."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    lead = (1,) * (x.ndim - 1)
    unit = standardize(x, self.epsilon)
    return unit * scale.reshape(lead + scale.shape) + bias.reshape(lead + bias.shape)


def modulate(x: Array, shift: Array, scale: Array, dtype: jnp.dtype, epsilon: float) -> Array:
  """standardize(x, epsilon) * (1 + scale) + shift, with the product and the sum in `dtype`."""
  unit = standardize(x, epsilon).astype(dtype)
  return unit * (1 + scale.astype(dtype)) + shift.astype(dtype)


def patchify(latents: Array, patch: tuple[int, int, int]) -> Array:
  """R F H W C -> R T (C pf ph pw): the channel is the slowest inside a patch."""
  pf, ph, pw = patch
  pattern = "r (f pf) (h ph) (w pw) c -> r (f h w) (c pf ph pw)"
  return rearrange(latents, pattern, pf=pf, ph=ph, pw=pw)


def unpatchify(tokens: Array, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Array:
  """G R T (pf ph pw C) -> G R F H W C: the channel is the fastest inside a patch."""
  (f, h, w), (pf, ph, pw) = grid, patch
  pattern = "g r (f h w) (pf ph pw c) -> g r (f pf) (h ph) (w pw) c"
  return rearrange(tokens, pattern, f=f, h=h, w=w, pf=pf, ph=ph, pw=pw)


def site(
  name: str,
  value: Array,
  buffers: dict[str, Array],
  *,
  edits: BlockEdits | None,
  taps: TapSpec | None,
  slot: Array | None,
  aids: TapAids | None,
  tokens: int,
) -> tuple[Array, dict[str, Array]]:
  """One place of a layer: the value G R T D edited, then recorded.

  edits: those of this layer (no L axis). slot: the row of the tap buffers that this layer fills.
  tokens: how many of T are no padding: taps do not see the others, and `edits.tokens` names none.
  A site that neither names leaves no trace in the program.
  """
  value = edit_site(value, edits, name)
  if taps is not None and name in taps.sites:
    if slot is None or aids is None:
      raise ValueError(f"tapping {name!r} needs the slot of the layer and TapAids.")
    real = value if tokens == value.shape[2] else value[:, :, :tokens]
    buffers = record(buffers, name, real, taps, slot, aids)
  return value, buffers
