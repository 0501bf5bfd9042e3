"""Three-dimensional rotary positions: host tables in float64, the rotation in float32."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from jax_videoreason.axes import Array


def axis_widths(head_width: int) -> tuple[int, int, int]:
  """Features of a head that turn with the frame, the row and the column: 44, 42, 42 of 128."""
  if head_width < 6 or head_width % 2:
    raise ValueError(f"head width {head_width}, wanted an even number of at least 6.")
  side = 2 * (head_width // 6)
  return head_width - 2 * side, side, side


def tables(
  grid_tokens: tuple[int, int, int], head_width: int, theta: float = 10000.0
) -> tuple[np.ndarray, np.ndarray]:
  """cos and sin, float32 of shape (T, K/2), built in float64.

  The pairs of a head are dealt out as frame | row | column, each axis with frequencies
  theta^(-2j/width) of its own width; positions count from 0.
  """
  angles = []
  positions = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in grid_tokens), indexing="ij")
  for position, width in zip(positions, axis_widths(head_width), strict=True):
    frequency = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    angles.append(rearrange(position, "f h w -> (f h w) 1") * frequency[None])
  turn = np.concatenate(angles, axis=1)
  return np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)


def rotate(x: Array, cos: Array | np.ndarray, sin: Array | np.ndarray) -> Array:
  """Turns neighbouring features (x[2j], x[2j+1]) of x (... T N K) by the tables (T, K/2).

  Computed in float32, returned in the dtype of x.
  """
  lead = (1,) * (x.ndim - 3)
  sign = np.tile(np.asarray([-1.0, 1.0], np.float32), x.shape[-1] // 2)
  wide_cos = repeat(jnp.asarray(cos), "t k -> t 1 (k two)", two=2)
  wide_sin = repeat(jnp.asarray(sin), "t k -> t 1 (k two)", two=2) * sign[None, None]
  full = x.astype(jnp.float32)
  pairs = rearrange(full, "... (k two) -> ... k two", two=2)
  swapped = rearrange(pairs[..., ::-1], "... k two -> ... (k two)")
  turned = full * wide_cos.reshape(lead + wide_cos.shape)
  turned = turned + swapped * wide_sin.reshape(lead + wide_sin.shape)
  return turned.astype(x.dtype)
