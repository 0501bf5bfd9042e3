"""Prompts and first frames -> Conditioning: what the model is given beside the latents.

`cross_keys` is what cross-attention makes of its text.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from jax_videoreason import framing
from jax_videoreason.axes import Array, Params
from jax_videoreason.distributed import fetch
from jax_videoreason.structs import Conditioning, ModelBundle
from jax_videoreason.taps import TapSpec, asked
from jax_videoreason.tiling import Place, Tiling, join, named, places
from jax_videoreason.tokenizer import Tokenizer

# Prompts, pictures, and pixels of video, that are encoded at once.
PROMPTS = 8
PICTURES = 8
PIXELS = 2**18


def encode(
  bundle: ModelBundle,
  prompts: Sequence[str],
  first_frames: np.ndarray | None,
  *,
  frames: int,
  negative_prompt: str = "",
  guided: bool = True,
  last_frames: np.ndarray | None = None,
  tiles: str | Tiling | None = None,
  clip: Array | None = None,
) -> Conditioning:
  """The conditioning of R runs; R = len(prompts).

  first_frames: uint8 RGB, or float32 about -1..1, R height width 3, the given first pixel frame of
    each run; None for a model without image input, or to run TI2V from text alone. `framing` makes
    them of pictures of another size.
  last_frames: the same of the last pixel frame, for models that concatenate what is given.
  frames: pixel frames of the video, 1 + stride * k; the latents have F = 1 + k.
  negative_prompt: the text of branch 1, one for all runs. guided=False leaves that branch out.
  tiles: given frames are encoded in overlapping tiles and joined as a stack does ("diffusers",
    "diffsynth" with their sizes, or a `Tiling`); None = whole, as all but DiffSynth do.
  clip: R X D_clip, for a model with clip_width (Wan2.1 I2V); None = `image_tokens` of the first
    frames; `framing.shown_to_clip` says when those of the pictures they were made of are meant.

  Equal prompts and equal frames are encoded once. Text rows after the last token are zero. `known`
  are the normalised latents of the first frame followed by mid-grey frames (image_input "concat"),
  or of the first frame alone followed by zeros ("overwrite").
  ValueError when a part is not loaded, or the frames do not fit the model.
  """
  config = bundle.parts.dit.config
  if isinstance(prompts, str) or not len(prompts):
    raise ValueError(f"prompts={prompts!r}, wanted a list with one prompt per run.")
  if first_frames is not None:
    first_frames = _checked("first_frames", first_frames, len(prompts))
  grid = _grid(bundle, first_frames, frames)
  if last_frames is not None:
    last_frames = _checked("last_frames", last_frames, len(prompts))
    first = None if first_frames is None else first_frames.shape
    if first != last_frames.shape or frames == 1:
      raise ValueError(
        f"last_frames is {last_frames.shape} beside first_frames {first} in a video of {frames} "
        "frames, wanted first frames of the same shape and more than one frame."
      )
    if config.image_input != "concat":
      raise ValueError(f"{bundle.card.name} is given its first frame alone: last_frames=None.")
  if clip is not None and config.clip_width is None:
    raise ValueError(
      f"clip is {clip.shape} and {bundle.card.name} reads no image tokens: leave it out."
    )
  if isinstance(tiles, str):
    tiles = named(tiles, bundle.card.latents)
  text = _text(bundle, prompts, negative_prompt, guided)
  if first_frames is None:
    return Conditioning(text=text)
  if clip is None and config.clip_width is not None:
    clip = image_tokens(bundle, list(first_frames))
  return Conditioning(
    text=text,
    known=_known(bundle, first_frames, last_frames, frames, grid, tiles),
    known_mask=known_mask(len(prompts), grid, last=last_frames is not None),
    clip=clip,
  )


def reframed(
  bundle: ModelBundle,
  cond: Conditioning,
  first_frames: np.ndarray,
  *,
  frames: int,
  tiles: str | Tiling | None = None,
) -> Conditioning:
  """What `encode` would make of `cond` for a video of another length, or other tiles.

  Text and image tokens stay and the first frames are encoded anew, so only the VAE need be loaded.
  """
  first_frames = _checked("first_frames", first_frames, cond.text.shape[1])
  grid = _grid(bundle, first_frames, frames)
  tiles = named(tiles, bundle.card.latents) if isinstance(tiles, str) else tiles
  return dataclasses.replace(
    cond,
    known=_known(bundle, first_frames, None, frames, grid, tiles),
    known_mask=known_mask(len(first_frames), grid),
  )


def image_tokens(bundle: ModelBundle, images: Sequence[np.ndarray]) -> Array:
  """R X D: the CLIP tokens of pictures, height width 3, of any size, uint8 or float32 in -1..1.

  They are brought to the tower's size as the stack of the bundle's numerics does it. ValueError
  when the tower is not loaded.
  """
  if bundle.clip is None or bundle.parts.clip is None:
    raise ValueError(
      f"the image tower of {bundle.card.name} is not loaded and its DiT reads image tokens: load "
      "it, parts=('text', 'clip', 'vae')."
    )
  size = bundle.parts.clip.config.image
  first, place = _distinct(images)
  squares = framing.square((images[i] for i in first), size, bundle.card.numerics)
  tokens = _in_batches(
    functools.partial(_image_states, bundle.parts.clip, bundle.clip), (squares,), PICTURES
  )
  return tokens[place]


def cross_keys(
  bundle: ModelBundle,
  cond: Conditioning,
  *,
  layers: Any = None,
  branches: Any = (0,),
  expert: int | None = None,
) -> Array:
  """L' G' R X D: the keys of the prompts, as the heads of cross-attention take them at every step.

  layers, branches: as in a `TapSpec`, whose "cross_q/full" S' L' G' R T D is the other side of
    `attention.weights`. Branch 1 has the negative prompt.
  expert: 0 or 1, as `Schedule.which` says for each step; None = the only one there is.

  Key x is of token x of the prompt (`Tokenizer.pieces`). Behind the last token are keys of padding:
  the model attends to them like to the others. Image tokens (Wan2.1 I2V) have keys in a softmax of
  their own, which are not given.
  ValueError: layers, branches or an expert that do not exist or are not loaded, text of another
  model.
  """
  config = bundle.parts.dit.config
  if cond.text.ndim != 4 or cond.text.shape[-1] != config.text_width:
    raise ValueError(
      f"cond.text is {cond.text.shape}, wanted G R X D with D={config.text_width}: encode the "
      f"prompts with the text encoder of {bundle.card.name}."
    )
  spec = TapSpec(layers=layers, branches=branches)
  chosen = np.asarray(asked("branches", spec.branches, cond.text.shape[0]))
  return _cross_keys(
    bundle.parts.dit,
    _expert(bundle, expert),
    cond.text[chosen],
    asked("layers", spec.layers, config.layers),
  )


def _expert(bundle: ModelBundle, expert: int | None) -> Params:
  """The DiT weights of an expert; None = of a bundle that has one."""
  count, name = len(bundle.params), bundle.card.name
  if expert is None and count > 1:
    raise ValueError(
      f"{name} has {count} experts, each with keys of its own, and expert=None: give 0 or 1, as "
      "schedule.which says for the step."
    )
  number = 0 if expert is None else expert
  if number not in range(count) or not isinstance(number, int | np.integer):
    raise ValueError(f"expert={expert}: {name} has {count}, counted from 0: give one of them.")
  params = bundle.params[number]
  if params is None:
    part = "dit" if count == 1 else f"dit_{number}"
    raise ValueError(f"the DiT of {name} is not loaded: load it, parts=('{part}',).")
  return params


def known_mask(runs: int, grid: tuple[int, int, int], *, last: bool = False) -> Array:
  """R F H W 4 float32 of a given first frame: 1 in all four channels of latent frame 0, else 0.

  The four channels are the pixel frames of a latent frame; the first latent frame holds one pixel
  frame, which stands for all four. last: the last pixel frame is given too, channel 3 of the last
  latent frame. grid: (F, H, W).
  """
  given = jnp.zeros((grid[0], 4)).at[0].set(1.0)
  if last:
    given = given.at[-1, -1].set(1.0)
  return repeat(given, "f four -> r f h w four", r=runs, h=grid[1], w=grid[2])


def _grid(
  bundle: ModelBundle, first_frames: np.ndarray | None, frames: int
) -> tuple[int, int, int]:
  """(F, H, W) after all checks; H and W are one patch when no frame tells them."""
  image_input, spec = bundle.parts.dit.config.image_input, bundle.card.latents
  if first_frames is None:
    if image_input == "concat":
      raise ValueError(
        f"{bundle.card.name} continues a first frame and first_frames is None: give uint8 RGB "
        "frames, R height width 3 (media.read_image reads one), or --image."
      )
    return spec.grid(frames, spec.stride[1] * spec.patch[1], spec.stride[2] * spec.patch[2])
  if image_input == "none":
    raise ValueError(
      f"{bundle.card.name} takes text alone and first_frames is {np.shape(first_frames)}: pass "
      "first_frames=None, or choose an image-to-video model."
    )
  return spec.grid(frames, *first_frames.shape[1:3])


def _checked(name: str, frames: np.ndarray, runs: int) -> np.ndarray:
  frames = np.asarray(frames)
  right = frames.dtype in (np.uint8, np.float32)
  if not right or frames.ndim != 4 or frames.shape[-1] != 3:
    raise ValueError(
      f"{name} is {frames.dtype} {frames.shape}, wanted uint8 RGB, R height width 3 (or float32 "
      "in -1..1)."
    )
  if len(frames) != runs:
    raise ValueError(f"{len(frames)} {name} for {runs} prompts: give one per run.")
  return frames


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
  bundle: ModelBundle,
  first_frames: np.ndarray,
  last_frames: np.ndarray | None,
  frames: int,
  grid: tuple[int, int, int],
  tiling: Tiling | None,
) -> Array:
  """R F H W C."""
  if bundle.vae is None or bundle.parts.vae is None:
    raise ValueError(
      f"the VAE of {bundle.card.name} is not loaded and a first frame is to be encoded: load it, "
      "parts=('text', 'vae')."
    )
  given = first_frames[:, np.newaxis]
  if last_frames is not None:
    given = np.stack([first_frames, last_frames], axis=1)
  first, place = _distinct(given)
  unique = given[first]
  overwrite = bundle.parts.dit.config.image_input == "overwrite"
  encoded = 1 if overwrite else frames

  def latents_of(ends: np.ndarray) -> Array:
    pixels = encoded * ends.shape[2] * ends.shape[3]
    chunk = 1 if pixels > PIXELS else None
    call = functools.partial(_frame_latents, bundle.parts.vae, bundle.vae, encoded, chunk)
    return _in_batches(call, (ends,), max(1, PIXELS // pixels))

  if tiling is None:
    latents = latents_of(unique)
  else:
    _, high, wide = bundle.card.latents.stride
    where = places(tiling, *grid[1:])
    cut = [[_pixels(unique, place, high, wide) for place in line] for line in where]
    made = [[np.array(fetch(latents_of(tile))) for tile in line] for line in cut]
    latents = jnp.asarray(join(tiling, where, made, (1, 1)))
  absent = [(0, 0), (0, grid[0] - latents.shape[1]), (0, 0), (0, 0), (0, 0)]
  return jnp.pad(latents, absent)[place]


def _pixels(frames: np.ndarray, place: Place, high: int, wide: int) -> np.ndarray:
  """What a place of latent cells covers of frames R n height width 3."""
  rows, columns = place
  return frames[
    :, :, rows.start * high : rows.stop * high, columns.start * wide : columns.stop * wide
  ]


def _distinct(images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """(where each different image comes first, for every image the row of its like among these).

  By their digests: `np.unique` takes half a minute over the bytes of one large picture.
  """
  rows: dict[bytes, int] = {}
  place = np.array([rows.setdefault(_digest(image), len(rows)) for image in images])
  return np.unique(place, return_index=True)[1], place


def _digest(image: np.ndarray) -> bytes:
  said = f"{image.dtype} {image.shape} ".encode()
  return hashlib.sha256(said + np.ascontiguousarray(image).tobytes()).digest()


def _in_batches(function: Callable[..., Array], arrays: Sequence[np.ndarray], size: int) -> Array:
  """Rows of `arrays` through `function` in equal batches, so that one executable serves all.

  A batch is waited for before the next is begun: those under way hold their activations.
  """
  rows = len(arrays[0])
  size = min(size, rows)
  starts = range(0, rows, size)
  index = [np.minimum(np.arange(start, start + size), rows - 1) for start in starts]
  made = [jax.block_until_ready(function(*(a[batch] for a in arrays))) for batch in index]
  return jnp.concatenate(made)[:rows]


@functools.partial(jax.jit, static_argnums=0)
def _text_states(encoder: Any, params: Params, ids: Array, mask: Array) -> Array:
  states = encoder.apply({"params": params}, ids, mask)
  return jnp.where(rearrange(mask, "r x -> r x 1"), states, jnp.zeros((), states.dtype))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _cross_keys(dit: Any, params: Params, text: Array, layers: tuple[int, ...]) -> Array:
  return dit.cross_keys(params, text, layers)


@functools.partial(jax.jit, static_argnums=0)
def _image_states(tower: Any, params: Params, images: Array) -> Array:
  return tower.apply({"params": params}, images)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _frame_latents(vae: Any, params: Params, frames: int, chunk: int | None, given: Array) -> Array:
  """Frames R n height width 3, the first and perhaps the last -> normalised latents of a video.

  What lies between or after them is mid-grey.
  """
  ends = given if given.dtype == jnp.float32 else given.astype(jnp.float32) / 127.5 - 1.0
  grey = [(0, 0), (0, frames - given.shape[1]), (0, 0), (0, 0), (0, 0)]
  video = jnp.concatenate([jnp.pad(ends[:, :1], grey), ends[:, 1:]], axis=1)
  return vae.apply({"params": params}, video, chunk, method="encode")
