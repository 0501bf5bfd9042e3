"""Latents to frames: by the VAE in equal batches, or by a small decoder for a quick look.

Frames are uint8: round(127.5 * (v + 1)) of v clipped to [-1, 1], to the nearest level, halves to
the even one. (diffusers rounds too; DiffSynth and the official code cut off, which is half a level
darker on average.)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import pack, reduce, repeat, unpack
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from jax_videoreason import sharding
from jax_videoreason.axes import Array, Params
from jax_videoreason.models.preview import of_ending
from jax_videoreason.structs import LatentSpec, ModelBundle, Parts
from jax_videoreason.tiling import Tiling, join, named, places

PIXELS = 2**18  # pixels of video that are decoded at once; one latent frame of one run at the least
RUNS = "* f h w c"  # leading axes of any number, joined and parted by einops


def decode(
  bundle: ModelBundle,
  latents: ArrayLike,
  *,
  chunk: int | None = None,
  last: int | None = None,
  tiles: str | Tiling | None = None,
  mesh: Mesh | None = None,
) -> np.ndarray:
  """Normalised latents ... F H W C -> uint8 frames ... frames height width 3, by the VAE.

  Leading axes are free (S R for the x0 of all steps): they are decoded in batches of equal size,
  so memory does not grow with them. chunk: latent frames at once, the same result; None = all
  where they are few pixels, else as many as fit.
  last: so many frames at the end alone, which are those of the whole to one level of 255, for a
    part of the work, but without chunks: a long large video takes several times their memory.
    None = all.
  tiles: decode each frame in overlapping tiles and join them as a stack does, "diffusers" or
    "diffsynth" with their sizes, or a `Tiling`; the result differs a little from the whole.
  mesh: runs and tiles of equal size are spread over those of its devices that are of this process,
    as many as there are of them; None = one device.
  ValueError for another rank or channel count, more `last` than there are frames, or when the VAE
  is not loaded.
  """
  flat, lead = _runs(bundle, latents)
  _check_last(bundle, flat, last)
  if bundle.vae is None or bundle.parts.vae is None:
    raise ValueError(
      f"the VAE of {bundle.card.name} is not loaded and latents are to be decoded: load it, "
      "parts=('dit', 'vae'), or use decode.preview."
    )
  if tiles is None:
    decoded = _decoded(bundle, flat, chunk, last, mesh)
  else:
    if isinstance(tiles, str):
      tiles = named(tiles, bundle.card.latents, bundle.parts.vae.config.fold)
    decoded = _tiled(bundle, flat, chunk, last, mesh, tiles)
  return unpack(decoded, lead, RUNS)[0]


def _tiled(
  bundle: ModelBundle,
  flat: np.ndarray,
  chunk: int | None,
  last: int | None,
  mesh: Mesh | None,
  tiling: Tiling,
) -> np.ndarray:
  """R F H W C -> R frames height width 3 uint8, joined on the host."""
  where = places(tiling, *flat.shape[2:4])
  cut = [[flat[:, :, row, column] for row, column in line] for line in where]
  shapes = sorted({tile.shape for line in cut for tile in line}, reverse=True)
  made: list[list[Any]] = [[None] * len(line) for line in cut]
  for shape in shapes:  # tiles of one size are decoded together, by one executable
    at = [(i, j) for i, line in enumerate(cut) for j, t in enumerate(line) if t.shape == shape]
    stacked = np.concatenate([cut[i][j] for i, j in at])
    decoded = _decoded(bundle, stacked, chunk, last, mesh, whole=False)
    for (i, j), tile in zip(at, np.split(decoded, len(at)), strict=True):
      made[i][j] = tile
  joined = join(tiling, where, made, bundle.card.latents.stride[1:])
  return np.round(127.5 * (np.clip(joined, -1.0, 1.0) + 1.0)).astype(np.uint8)


def _decoded(
  bundle: ModelBundle,
  flat: np.ndarray,
  chunk: int | None,
  last: int | None,
  mesh: Mesh | None,
  whole: bool = True,
) -> np.ndarray:
  """R F H W C -> R frames height width 3 in batches: uint8, or float32 where more is to come."""
  chunk, size = at_once(bundle.card.latents, flat.shape[1:4], chunk, last)
  if mesh is None:
    call = functools.partial(_decode, bundle.parts.vae, chunk, last, whole, bundle.vae)
    return _in_batches(call, flat, size)
  along = sharding.side_by_side(mesh, len(flat))  # no device decodes what another one does
  seats, over = along.size, NamedSharding(along, PartitionSpec("run"))
  params = jax.device_put(bundle.vae, NamedSharding(along, PartitionSpec()))
  call = functools.partial(_decode, bundle.parts.vae, chunk, last, whole, params)
  rows = -(-len(flat) // seats)
  padded = np.concatenate([flat, np.repeat(flat[-1:], rows * seats - len(flat), axis=0)])
  spread = _in_batches(
    lambda x: call(jax.device_put(x, over)), padded, seats * min(size, rows), of=seats
  )
  return spread[: len(flat)]


def at_once(
  spec: LatentSpec, grid: Sequence[int], chunk: int | None = None, last: int | None = None
) -> tuple[int | None, int]:
  """(latent frames, runs) of F H W that a device decodes at once; None = all frames.

  chunk, last: as `decode` takes them.
  """
  step, high, wide = spec.stride
  area, frames = grid[1] * high * grid[2] * wide, spec.frames(grid[0])
  if chunk is None and last is None and frames * area > PIXELS:
    chunk = max(1, PIXELS // (step * area))
  held = frames if chunk is None else min(frames, 1 + step * chunk)
  return chunk, max(1, PIXELS // (held * area))


def decoding_bytes(
  parts: Parts,
  spec: LatentSpec,
  sizes: Sequence[int],
  tiles: str | Tiling | None = None,
  last: int | None = None,
) -> float:
  """Bytes that `decode` of R F H W takes on one device beside the weights, by arithmetic."""
  runs, frames, high, wide = sizes
  each = 1  # of a colour of a pixel, as it comes out
  if tiles is not None:
    tiling = named(tiles, spec, parts.vae.config.fold) if isinstance(tiles, str) else tiles
    where = places(tiling, high, wide)
    runs, each = runs * sum(map(len, where)), 4
    high, wide = min(tiling.size[0], high), min(tiling.size[1], wide)
  chunk, most = at_once(spec, (frames, high, wide), last=last)
  runs = min(runs, most)
  pixels = (last or spec.frames(frames)) * high * spec.stride[1] * wide * spec.stride[2]
  inside = parts.vae.decoding_bytes((runs, frames, high, wide), chunk, last)
  return inside + 3.0 * each * runs * pixels


def preview(bundle: ModelBundle, latents: ArrayLike, *, last: int | None = None) -> np.ndarray:
  """Normalised latents ... F H W C -> uint8 frames ... frames height width 3, by the preview.

  The preview is a small decoder (`models.preview`) that learnt from the VAE: BENCHMARKS.md says how
  often it shows the same answer, and in what time. last: so many frames at the end alone; None =
  all.
  ValueError for another rank or channel count, more `last` than there are frames, or when the model
  has no preview or it is not loaded.
  """
  flat, lead = _runs(bundle, latents)
  _check_last(bundle, flat, last)
  if bundle.parts.preview is None:
    raise ValueError(f"{bundle.card.name} has no preview: use decode.decode.")
  if bundle.preview is None:
    raise ValueError(
      f"the preview of {bundle.card.name} is not loaded: load it, parts=('dit', 'preview')."
    )
  frames = last or bundle.card.latents.frames(flat.shape[1])
  _, high, wide = bundle.card.latents.stride
  area = flat.shape[2] * high * flat.shape[3] * wide
  seen = _in_batches(
    functools.partial(_preview, bundle.parts.preview, last, bundle.preview),
    flat,
    max(1, PIXELS // (frames * area)),
  )
  return unpack(seen, lead, RUNS)[0]


def rows_at_once(count: int, most: int, *, of: int = 1) -> int:
  """The size of equal batches of `count` rows: at most `most` and a multiple of `of`, down to half
  of that where the last one is fuller so."""
  most = min(most, -(-count // of) * of)
  return min(range(most, (most - 1) // 2, -of), key=lambda rows: -count % rows)


def preview_explained(bundle: ModelBundle, latents: ArrayLike) -> float:
  """1 - squared difference of preview and VAE / squared deviation of the VAE's frames from their
  mean colour: 1 = equal frames, 0 = no better than one flat colour. latents: ... F H W C."""
  true = decode(bundle, latents).astype(np.float64)
  wrong = preview(bundle, latents).astype(np.float64) - true
  deviation = true - reduce(true, "... c -> c", "mean")
  spread = float(np.sum(deviation**2))
  if spread == 0.0:
    raise ValueError("the VAE decodes these latents to one flat colour: give latents of videos.")
  return 1.0 - float(np.sum(wrong**2)) / spread


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _decode(
  vae: Any, chunk: int | None, last: int | None, whole: bool, params: Params, latents: Array
) -> Array:
  """R frames height width 3: uint8, or of a tile float32 that is not clipped."""
  method = "decode" if whole else "decode_unclipped"
  video = vae.apply({"params": params}, latents, chunk, last, method=method)
  return _to_uint8(video) if whole else video


@functools.partial(jax.jit, static_argnums=(0, 1))
def _preview(module: Any, last: int | None, params: Params, latents: Array) -> Array:
  """R frames height width 3 uint8."""
  total, step = latents.shape[1], module.config.stride[0]
  needed = total if last is None else module.reach(-(-last // step))
  first = True if needed >= total else None
  if last is not None and last < step:
    module, params = of_ending(module, params, last)
  video = module.apply({"params": params}, latents[:, max(0, total - needed) :], first)
  return _to_uint8(video if last is None else video[:, video.shape[1] - last :])


def _to_uint8(video: Array) -> Array:
  """The rounding rule above."""
  return jnp.round(127.5 * (jnp.clip(video, -1.0, 1.0) + 1.0)).astype(jnp.uint8)


def _runs(bundle: ModelBundle, latents: ArrayLike) -> tuple[np.ndarray, list[Any]]:
  """(latents N F H W C, the shape of the leading axes as einops.unpack takes it)."""
  z, channels = np.asarray(latents), bundle.card.latents.channels
  if z.ndim < 4 or z.shape[-1] != channels:
    raise ValueError(
      f"latents are {z.shape}, wanted ... F H W C with C = {channels} for {bundle.card.name}: "
      "give them as denoise returns them."
    )
  return pack([z], RUNS)


def _check_last(bundle: ModelBundle, flat: np.ndarray, last: int | None) -> None:
  frames = bundle.card.latents.frames(flat.shape[1])
  if last is not None and not 1 <= last <= frames:
    raise ValueError(f"last={last} of {frames} frames, wanted 1 to {frames}, or None for all.")


def _in_batches(
  fn: Callable[[Array], Array], x: np.ndarray, size: int, *, of: int = 1
) -> np.ndarray:
  """fn over axis 0 in equal batches of at most `size`, the last filled up by its own last row."""
  if not len(x):
    raise ValueError(f"latents hold no run ({x.shape}): give one or more.")
  size, parts = rows_at_once(len(x), size, of=of), []
  for start in range(0, len(x), size):
    part = x[start : start + size]
    filled = np.concatenate([part, repeat(part[-1], "f h w c -> r f h w c", r=size - len(part))])
    parts.append(np.asarray(fn(jnp.asarray(filled)))[: len(part)])
  return np.concatenate(parts)
