"""Latents to frames: by the VAE in equal batches, or by a linear map for a quick look.

Frames are uint8: round(127.5 * (v + 1)) of v clipped to [-1, 1], to the nearest level, halves to
the even one. (diffusers rounds too; DiffSynth and the official code cut off, which is half a level
darker on average.)
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import pack, rearrange, reduce, repeat, unpack
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from jax_videoreason.axes import Array, Params
from jax_videoreason.structs import ModelBundle
from jax_videoreason.tiling import Tiling, join, named, places

PIXELS = 2**18  # pixels of video that are decoded at once; one latent frame of one run at the least
RUNS = "* f h w c"  # leading axes of any number, joined and parted by einops
ROWS = 2**14  # latent cells per batch of `fit_preview`


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
    part of the work and without chunks; None = all.
  tiles: decode each frame in overlapping tiles and join them as a stack does, "diffusers" or
    "diffsynth" with their sizes, or a `Tiling`; the result differs a little from the whole.
  mesh: runs and tiles of equal size are spread over all its devices.
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
  step, high, wide = bundle.card.latents.stride
  area = flat.shape[2] * high * flat.shape[3] * wide
  frames = bundle.card.latents.frames(flat.shape[1])
  if chunk is None and last is None and frames * area > PIXELS:
    chunk = max(1, PIXELS // (step * area))
  at_once = frames if chunk is None else min(frames, 1 + step * chunk)
  size = max(1, PIXELS // (at_once * area))
  call = functools.partial(_decode, bundle.parts.vae, chunk, last, whole, bundle.vae)
  if mesh is None:
    return _in_batches(call, flat, size)
  over = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  rows = -(-len(flat) // mesh.size)
  padded = np.concatenate([flat, np.repeat(flat[-1:], rows * mesh.size - len(flat), axis=0)])
  spread = _in_batches(
    lambda x: call(jax.device_put(x, over)), padded, mesh.size * min(size, rows), of=mesh.size
  )
  return spread[: len(flat)]


def preview(bundle: ModelBundle, latents: ArrayLike, *, last: int | None = None) -> np.ndarray:
  """Normalised latents ... F H W C -> uint8 frames ... frames height width 3, by `bundle.preview`.

  Each latent cell with its 26 neighbours is mapped linearly to the block of pixels it stands for.
  last: so many frames at the end alone; None = all.
  ValueError for another rank or channel count, more `last` than there are frames, or when the model
  has no preview.
  """
  flat, lead = _runs(bundle, latents)
  _check_last(bundle, flat, last)
  if bundle.preview is None:
    raise ValueError(
      f"{bundle.card.name} has no preview: fit one (decode.fit_preview), or use decode.decode."
    )
  frames = bundle.card.latents.frames(flat.shape[1])
  area = flat.shape[2] * flat.shape[3] * bundle.card.latents.stride[1] ** 2
  seen = _in_batches(
    functools.partial(_preview, bundle.card.latents.stride, last, bundle.preview),
    flat,
    max(1, PIXELS // (frames * area)),
  )
  return unpack(seen, lead, RUNS)[0]


def fit_preview(latents: ArrayLike, frames: ArrayLike, *, ridge: float = 1e-4) -> Params:
  """The linear map of `preview`, by least squares in float64.

  latents: N F H W C, normalised. frames: N frames height width 3 uint8, what they stand for; both
  may be memory-mapped, they are read in batches. ridge: weight of the kernel's squares beside the
  mean squared error in [-1, 1].

  Returns {"first", "rest"} -> {"kernel" (27 C, pixels), "bias" (pixels)}, float32: the first latent
  frame stands for one pixel frame, a later one for stride[0] of them. Neighbours outside
  the latents are zero.
  """
  z, video = np.asanyarray(latents), np.asanyarray(frames)
  _check_pair(z, video, ridge)
  (runs, f, h, w, _), (_, pixel_frames, height, width, _) = z.shape, video.shape
  step, high, wide = (pixel_frames - 1) // (f - 1), height // h, width // w
  sums: dict[str, Any] = {"first": 0.0, "rest": 0.0}
  batch = max(1, ROWS // (f * h * w))
  for start in range(0, runs, batch):
    cells = np.asarray(_neighbours(jnp.asarray(z[start : start + batch], jnp.float32)))
    target = np.asarray(video[start : start + batch], np.float64) / 127.5 - 1.0
    for name, x, y in (
      ("first", cells[:, :1], _blocks(target[:, :1], 1, high, wide)),
      ("rest", cells[:, 1:], _blocks(target[:, 1:], step, high, wide)),
    ):
      rows = rearrange(x, "r f h w k -> (r f h w) k").astype(np.float64)
      rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
      joined = np.concatenate([rows, rearrange(y, "r f h w p -> (r f h w) p")], axis=1)
      sums[name] = sums[name] + rows.T @ joined
  cells_of = {"first": runs * h * w, "rest": runs * (f - 1) * h * w}
  return {name: _solve(sums[name] / cells_of[name], ridge) for name in ("first", "rest")}


def preview_agreement(
  bundle: ModelBundle, latents: ArrayLike, read: Callable[[np.ndarray, int], Hashable]
) -> float:
  """The share of runs for which `read(frames, run)` says the same of the preview as of the VAE.

  latents: R F H W C, normalised. read: frames (frames height width 3 uint8) and the number of the
  run -> answer.
  """
  pairs = zip(preview(bundle, latents), decode(bundle, latents), strict=True)
  return float(np.mean([read(quick, i) == read(true, i) for i, (quick, true) in enumerate(pairs)]))


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
def _preview(
  stride: tuple[int, int, int], last: int | None, params: Params, latents: Array
) -> Array:
  """R frames height width 3 uint8."""
  step, high, wide = stride
  total = latents.shape[1]
  seen = total if last is None else min(total, -(-last // step))  # latent frames of `last`
  from_ = max(0, total - seen - 1)  # and the one before, as their neighbour
  cells = _neighbours(latents[:, from_:])[:, total - seen - from_ :]

  def pixels(name: str, x: Array, frames: int) -> Array:
    y = x @ params[name]["kernel"] + jnp.expand_dims(params[name]["bias"], (0, 1, 2, 3))
    return rearrange(y, "r f h w (t a b c) -> r (f t) (h a) (w b) c", t=frames, a=high, b=wide, c=3)

  if seen < total:
    video = pixels("rest", cells, step)
  else:
    first, rest = pixels("first", cells[:, :1], 1), pixels("rest", cells[:, 1:], step)
    video = jnp.concatenate([first, rest], axis=1)
  return _to_uint8(video if last is None else video[:, video.shape[1] - last :])


def _to_uint8(video: Array) -> Array:
  """The rounding rule above."""
  return jnp.round(127.5 * (jnp.clip(video, -1.0, 1.0) + 1.0)).astype(jnp.uint8)


@jax.jit
def _neighbours(latents: Array) -> Array:
  """R F H W C -> R F H W 27C: each cell with those around it in time and space, zero outside."""
  f, h, w = latents.shape[1:4]
  padded = jnp.pad(latents, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
  around = [(t, a, b) for t in range(3) for a in range(3) for b in range(3)]
  return jnp.concatenate(
    [padded[:, t : t + f, a : a + h, b : b + w] for t, a, b in around], axis=-1
  )


def _blocks(video: np.ndarray, step: int, high: int, wide: int) -> np.ndarray:
  """The pixels that each latent cell stands for, on the last axis."""
  return rearrange(video, "r (f t) (h a) (w b) c -> r f h w (t a b c)", t=step, a=high, b=wide)


def _solve(moments: np.ndarray, ridge: float) -> dict[str, np.ndarray]:
  """Kernel and bias from mean(x' [x, y]), where the last column of x is one."""
  width = len(moments)
  penalty = np.diag([ridge] * (width - 1) + [0.0])
  found = np.linalg.solve(moments[:, :width] + penalty, moments[:, width:])
  return {"kernel": found[:-1].astype(np.float32), "bias": found[-1].astype(np.float32)}


def _check_pair(latents: np.ndarray, frames: np.ndarray, ridge: float) -> None:
  if latents.ndim != 5 or frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
    raise ValueError(
      f"latents are {latents.shape} and frames {frames.dtype} {frames.shape}, wanted N F H W C and "
      "uint8 N frames height width 3."
    )
  (runs, f, h, w, _), (clips, pixel_frames, height, width, _) = latents.shape, frames.shape
  if runs != clips or f < 2 or (pixel_frames - 1) % (f - 1) or height % h or width % w:
    raise ValueError(
      f"latents are {latents.shape} and frames {frames.shape}: wanted as many clips as latents, "
      "two latent frames or more, 1 + stride * (F - 1) pixel frames and whole pixels per cell."
    )
  if not ridge > 0:
    raise ValueError(f"ridge={ridge}, wanted more than 0: cells at the edge have no neighbours.")


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
  """fn over axis 0 in equal batches of at most `size`, the last filled up by its own last row.

  Batches are multiples of `of`, and down to half of `size` where the last one is fuller so.
  """
  if not len(x):
    raise ValueError(f"latents hold no run ({x.shape}): give one or more.")
  most = min(size, -(-len(x) // of) * of)
  size = min(range(most, (most - 1) // 2, -of), key=lambda rows: -len(x) % rows)
  parts = []
  for start in range(0, len(x), size):
    part = x[start : start + size]
    filled = np.concatenate([part, repeat(part[-1], "f h w c -> r f h w c", r=size - len(part))])
    parts.append(np.asarray(fn(jnp.asarray(filled)))[: len(part)])
  return np.concatenate(parts)
