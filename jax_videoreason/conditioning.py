"""Prompts and first frames -> Conditioning: what the model is given beside the latents."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from jax_videoreason.axes import Array, Params
from jax_videoreason.structs import Conditioning, ModelBundle
from jax_videoreason.tokenizer import Tokenizer

# Prompts, and pixels of video, that are encoded at once.
PROMPTS = 8
PIXELS = 2**21


def encode(
  bundle: ModelBundle,
  prompts: Sequence[str],
  first_frames: np.ndarray | None,
  *,
  frames: int,
  negative_prompt: str = "",
  guided: bool = True,
  clip: Array | None = None,
) -> Conditioning:
  """The conditioning of R runs; R = len(prompts).

  first_frames: uint8 RGB, R height width 3, the given first pixel frame of each run; None for a
    model without image input, or to run TI2V from text alone.
  frames: pixel frames of the video, 1 + stride * k; the latents have F = 1 + k.
  negative_prompt: the text of branch 1, one for all runs. guided=False leaves that branch out.
  clip: R X D_clip tokens of the first frames, for a model with clip_width (Wan2.1 I2V).

  Equal prompts and equal frames are encoded once. Text rows after the last token are zero. `known`
  are the normalised latents of the first frame followed by mid-grey frames (image_input "concat"),
  or of the first frame alone followed by zeros ("overwrite").
  ValueError when a part is not loaded, or the frames do not fit the model.
  """
  config = bundle.parts.dit.config
  if isinstance(prompts, str) or not len(prompts):
    raise ValueError(f"prompts={prompts!r}, wanted a list with one prompt per run.")
  grid = _grid(bundle, first_frames, frames, len(prompts))
  if (clip is None) != (config.clip_width is None):
    raise ValueError(
      f"clip is {'missing' if clip is None else f'{clip.shape}'} and the model has "
      f"clip_width={config.clip_width}: clip, R X D_clip, is for a Wan2.1 image model alone, which "
      "cannot run without it."
    )
  text = _text(bundle, prompts, negative_prompt, guided)
  if first_frames is None:
    return Conditioning(text=text, clip=clip)
  return Conditioning(
    text=text,
    known=_known(bundle, first_frames, frames, grid),
    known_mask=known_mask(len(prompts), grid),
    clip=clip,
  )


def known_mask(runs: int, grid: tuple[int, int, int]) -> Array:
  """R F H W 4 float32 of a given first frame: 1 in all four channels of latent frame 0, else 0.

  The four channels are the pixel frames of a latent frame; the first latent frame holds one pixel
  frame, which stands for all four. grid: (F, H, W).
  """
  given = (jnp.arange(grid[0]) == 0).astype(jnp.float32)
  return repeat(given, "f -> r f h w four", r=runs, h=grid[1], w=grid[2], four=4)


def _grid(
  bundle: ModelBundle, first_frames: np.ndarray | None, frames: int, runs: int
) -> tuple[int, int, int]:
  """(F, H, W) after all checks; H and W are one patch when no frame tells them."""
  image_input, spec = bundle.parts.dit.config.image_input, bundle.card.latents
  if first_frames is None:
    if image_input == "concat":
      raise ValueError(
        f"{bundle.card.name} continues a first frame and first_frames is None: give uint8 RGB "
        "frames, R height width 3 (media.read_image reads one)."
      )
    return spec.grid(frames, spec.stride[1] * spec.patch[1], spec.stride[2] * spec.patch[2])
  if image_input == "none":
    raise ValueError(
      f"{bundle.card.name} takes text alone and first_frames is {np.shape(first_frames)}: pass "
      "first_frames=None, or choose an image-to-video model."
    )
  first_frames = np.asarray(first_frames)
  if first_frames.dtype != np.uint8 or first_frames.ndim != 4 or first_frames.shape[-1] != 3:
    raise ValueError(
      f"first_frames is {first_frames.dtype} {first_frames.shape}, wanted uint8 RGB, "
      "R height width 3."
    )
  if len(first_frames) != runs:
    raise ValueError(f"{len(first_frames)} first frames for {runs} prompts: give one per run.")
  return spec.grid(frames, *first_frames.shape[1:3])


def _text(bundle: ModelBundle, prompts: Sequence[str], negative: str, guided: bool) -> Array:
  """G R X D."""
  if bundle.text is None or bundle.parts.text is None:
    raise ValueError(
      f"the text encoder of {bundle.card.name} is not loaded: load it, parts=('text', 'vae')."
    )
  tokenizer = Tokenizer(bundle.card.tokenizer)
  if tokenizer.vocab > bundle.parts.text.config.vocab:
    raise ValueError(
      f"tokenizer {bundle.card.tokenizer!r} has {tokenizer.vocab} ids, the text encoder "
      f"{bundle.parts.text.config.vocab}: use the tokenizer.json that belongs to it."
    )
  rows = list(dict.fromkeys([*prompts, negative] if guided else prompts))
  states = _in_batches(
    functools.partial(_text_states, bundle.parts.text, bundle.text),
    tokenizer.encode(rows, bundle.card.text_length),
    PROMPTS,
  )
  place = {prompt: row for row, prompt in enumerate(rows)}
  runs = [place[prompt] for prompt in prompts]
  branches = [runs, [place[negative]] * len(runs)] if guided else [runs]
  return states[np.asarray(branches)]


def _known(
  bundle: ModelBundle, first_frames: np.ndarray, frames: int, grid: tuple[int, int, int]
) -> Array:
  """R F H W C."""
  if bundle.vae is None or bundle.parts.vae is None:
    raise ValueError(
      f"the VAE of {bundle.card.name} is not loaded and a first frame is to be encoded: load it, "
      "parts=('text', 'vae')."
    )
  unique, place = np.unique(np.asarray(first_frames), axis=0, return_inverse=True)
  overwrite = bundle.parts.dit.config.image_input == "overwrite"
  encoded = 1 if overwrite else frames
  pixels = encoded * unique.shape[1] * unique.shape[2]
  latents = _in_batches(
    functools.partial(
      _frame_latents, bundle.parts.vae, bundle.vae, encoded, 1 if pixels > PIXELS else None
    ),
    (unique,),
    max(1, PIXELS // pixels),
  )
  absent = [(0, 0), (0, grid[0] - latents.shape[1]), (0, 0), (0, 0), (0, 0)]
  return jnp.pad(latents, absent)[rearrange(place, "... -> (...)")]


def _in_batches(function: Callable[..., Array], arrays: Sequence[np.ndarray], size: int) -> Array:
  """Rows of `arrays` through `function` in equal batches, so that one executable serves all."""
  rows = len(arrays[0])
  size = min(size, rows)
  starts = range(0, rows, size)
  index = [np.minimum(np.arange(start, start + size), rows - 1) for start in starts]
  return jnp.concatenate([function(*(a[batch] for a in arrays)) for batch in index])[:rows]


@functools.partial(jax.jit, static_argnums=0)
def _text_states(encoder: Any, params: Params, ids: Array, mask: Array) -> Array:
  states = encoder.apply({"params": params}, ids, mask)
  return jnp.where(rearrange(mask, "r x -> r x 1"), states, jnp.zeros((), states.dtype))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _frame_latents(vae: Any, params: Params, frames: int, chunk: int | None, image: Array) -> Array:
  """uint8 R height width 3 -> normalised latents of the image and frames - 1 mid-grey frames."""
  first = rearrange(image, "r height width rgb -> r 1 height width rgb").astype(jnp.float32)
  video = jnp.pad(first / 127.5 - 1.0, [(0, 0), (0, frames - 1), (0, 0), (0, 0), (0, 0)])
  return vae.apply({"params": params}, video, chunk, method="encode")
