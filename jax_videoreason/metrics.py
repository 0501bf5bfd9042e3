"""How far apart, how alike, how far pulled: numbers over latents, x0 and frames."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jax_videoreason.axes import Array

CELLS = (-4, -3, -2, -1)
Values = Array | np.ndarray


def distance(a: Values, b: Values) -> Array:
  """Root mean square difference over the last four axes: latents F H W C, frames (frames h w 3).

  Frames in uint8 are compared on the scale 0..1.
  """
  a, b = (x / 255 if x.dtype == jnp.uint8 else x for x in (jnp.asarray(a), jnp.asarray(b)))
  return jnp.sqrt(jnp.mean((a - b) ** 2, axis=CELLS))


def change(x0: Values) -> Array:
  """S-1 ...: how far x0 (S ... F H W C) moves from step to step, over the size of the last."""
  size = jnp.sqrt(jnp.mean(jnp.square(x0[-1:]), axis=CELLS))
  return distance(x0[1:], x0[:-1]) / size


def agreement(x0: Values, final: Values | None = None) -> Array:
  """S ...: cosine between x0 (S ... F H W C) and `final` (... F H W C, None = the last x0).

  NaN where one is 0.
  """
  last = (x0[-1] if final is None else final)[None]
  dot = jnp.sum(x0 * last, axis=CELLS)
  return dot / jnp.sqrt(jnp.sum(x0**2, axis=CELLS) * jnp.sum(last**2, axis=CELLS))


def pull(x: Values, *, own: Values, other: Values) -> Array:
  """How far x (... F H W C) went from `own` to `other`: 0 = unmoved, 1 = became the other.

  The share of the line own -> other that x has gone, by projection; NaN where the two are equal.
  """
  line = other - own
  return jnp.sum((x - own) * line, axis=CELLS) / jnp.sum(line**2, axis=CELLS)


def cka(x: Values, y: Values) -> Array:
  """Linear CKA in 0..1 of two states F H W C: rows are positions, columns channels, centred.

  NaN where one is constant over the positions.
  """
  x, y = (rearrange(z, "... f h w c -> ... (f h w) c") for z in (x, y))
  x, y = (z - z.mean(-2, keepdims=True) for z in (x, y))

  def inner(a: Values, b: Values) -> Array:
    product = jnp.einsum("...tc,...td->...cd", a, b, precision="highest")
    return jnp.sum(product**2, axis=(-2, -1))

  return inner(x, y) / jnp.sqrt(inner(x, x) * inner(y, y))
