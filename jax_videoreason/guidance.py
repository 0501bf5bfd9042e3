"""Classifier-free guidance: how the branches of the G axis become one velocity."""

import jax.numpy as jnp
from einops import rearrange

from jax_videoreason.axes import Array


def combine(velocity: Array, scale: Array) -> Array:
  """G R F H W C -> R F H W C: v1 + scale * (v0 - v1); with G = 1 the branch itself.

  scale: one number, or one per run (R).

  Branch 0 has the prompt, branch 1 the negative prompt (Ho & Salimans 2022; Wan's sample loop).
  """
  if velocity.shape[0] == 1:
    return velocity[0]
  if jnp.ndim(scale):
    scale = rearrange(scale, "r -> r 1 1 1 1")
  with_prompt, without = velocity
  return without + scale * (with_prompt - without)
