"""Latents to frames: by the VAE in equal batches, or by a small decoder for a quick look.

Frames are uint8: round(127.5 * (v + 1)) of v clipped to [-1, 1], to the nearest level, halves to
the even one. (diffusers rounds too; DiffSynth and the official code cut off, which is half a level
darker on average.)
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from jax_videoreason import sharding
from jax_videoreason.axes import Array, Params
from jax_videoreason.models.preview import of_ending
from jax_videoreason.pytrees import refuse_traced
from jax_videoreason.structs import LatentSpec, ModelBundle, Parts
from jax_videoreason.tiling import Tiling, join, named, places

PIXELS = 2**18  # pixels of video that are decoded at once; one latent frame of one run at the least
RUNS = "... f h w c -> (...) f h w c"  # leading axes of any number as one
Rows = np.ndarray | Sequence[np.ndarray]  # an array, or what would be one if it were stacked


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
  so memory does not grow with them but by the frames that come out; `decode_each` keeps none.
  chunk: latent frames at once, the same result; None = all where they are few pixels, else as many
  as fit.
  last: so many frames at the end alone, which are those of the whole to one level of 255, for a
    part of the work, but without chunks: a long large video takes several times their memory.
    None = all.
  tiles: decode each frame in overlapping tiles and join them as a stack does, "diffusers" or
    "diffsynth" with their sizes, or a `Tiling`; the result differs a little from the whole.
  mesh: runs and tiles of equal size are spread over those of its devices that are of this process,
    as many as there are of them; None = one device.
  ValueError for another rank or channel count, more `last` than there are frames, when the VAE is
  not loaded, or where jax traces the call: `bundle.parts.vae.apply({"params": bundle.vae}, latents,
  method="decode")` is what it may trace, R F H W C -> R frames height width 3 float32 in -1..1.
  """
  z = _checked(bundle, latents)
  return _together(bundle, z, last, _videos(bundle, z, chunk, last, tiles, mesh))


def decode_each(
  bundle: ModelBundle,
  latents: ArrayLike,
  *,
  chunk: int | None = None,
  last: int | None = None,
  tiles: str | Tiling | None = None,
  mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
  """The videos of `decode`, to the bit, one after the other: frames height width 3 each.

  They come in the order of the leading axes, and no more than a batch of them is held.
  """
  return _videos(bundle, _checked(bundle, latents), chunk, last, tiles, mesh)


def _videos(
  bundle: ModelBundle,
  z: np.ndarray,
  chunk: int | None,
  last: int | None,
  tiles: str | Tiling | None,
  mesh: Mesh | None,
) -> Iterator[np.ndarray]:
  """... F H W C -> frames height width 3 uint8 of each; what is refused is so at once."""
  _check_last(bundle, z, last)
  if bundle.vae is None or bundle.parts.vae is None:
    raise ValueError(
      f"the VAE of {bundle.card.name} is not loaded and latents are to be decoded: load it, "
      "parts=('dit', 'vae'), or use preview (from jax_videoreason.decode import preview)."
    )

  @functools.cache  # tiles of several sizes are decoded by turns
  def laid(along: Mesh) -> Params:
    return jax.device_put(bundle.vae, NamedSharding(along, PartitionSpec()))

  flat = rearrange(z, RUNS)
  if tiles is None:
    return _decoded(bundle, laid, chunk, last, mesh, True, flat)
  if isinstance(tiles, str):
    tiles = named(tiles, bundle.card.latents, bundle.parts.vae.config.fold)
  of_size = functools.partial(_decoded, bundle, laid, chunk, last, mesh, False)
  return _tiled(of_size, flat, tiles, bundle.card.latents.stride[1:])


def _tiled(
  decoded: Callable[[Rows], Iterator[np.ndarray]],
  flat: np.ndarray,
  tiling: Tiling,
  stride: tuple[int, int],
) -> Iterator[np.ndarray]:
  """R F H W C -> frames height width 3 uint8 of each run, joined on the host.

  decoded: tiles F H W C of one size -> frames height width 3 of each, by one executable. stride:
  pixels per latent cell.
  """
  where = places(tiling, *flat.shape[2:4])
  cut: dict[tuple[int, ...], list[np.ndarray]] = {}
  for run in flat:
    for row, column in itertools.chain.from_iterable(where):
      tile = run[:, row, column]
      cut.setdefault(tile.shape, []).append(tile)
  made = {shape: decoded(tiles) for shape, tiles in cut.items()}

  def tiles_of(run: np.ndarray) -> Iterator[Iterator[np.ndarray]]:
    """Batches hold tiles of several runs; a run takes its own as it is joined."""
    for line in where:
      yield (next(made[run[:, row, column].shape])[np.newaxis] for row, column in line)

  for run in flat:
    (video,) = join(tiling, where, tiles_of(run), stride)
    levels = (np.round(127.5 * (np.clip(frame, -1.0, 1.0) + 1.0)) for frame in video)
    yield np.stack([level.astype(np.uint8) for level in levels])


def _decoded(
  bundle: ModelBundle,
  laid: Callable[[Mesh], Params],
  chunk: int | None,
  last: int | None,
  mesh: Mesh | None,
  whole: bool,
  flat: Rows,
) -> Iterator[np.ndarray]:
  """R F H W C -> frames height width 3 of each: uint8, or float32 where more is to come.

  laid: the weights of the VAE on all devices of a mesh.
  """
  chunk, size = at_once(bundle.card.latents, flat[0].shape[:3], chunk, last)
  call = functools.partial(_decode, bundle.parts.vae, chunk, last, whole)
  if mesh is None:
    return _in_batches(functools.partial(call, bundle.vae), flat, size)
  along = sharding.side_by_side(mesh, len(flat))  # no device decodes what another one does
  seats, over = along.size, NamedSharding(along, PartitionSpec("run"))
  params = laid(along)
  most = seats * min(size, -(-len(flat) // seats))
  return _in_batches(lambda x: call(params, jax.device_put(x, over)), flat, most, of=seats)


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
  z = _checked(bundle, latents)
  return _together(bundle, z, last, _previews(bundle, z, last))


def preview_each(
  bundle: ModelBundle, latents: ArrayLike, *, last: int | None = None
) -> Iterator[np.ndarray]:
  """The videos of `preview` one after the other, as `decode_each` gives those of `decode`."""
  return _previews(bundle, _checked(bundle, latents), last)


def _previews(bundle: ModelBundle, z: np.ndarray, last: int | None) -> Iterator[np.ndarray]:
  """... F H W C -> frames height width 3 uint8 of each; what is refused is so at once."""
  _check_last(bundle, z, last)
  if bundle.parts.preview is None:
    raise ValueError(f"{bundle.card.name} has no preview: use jax_videoreason.decode.")
  if bundle.preview is None:
    raise ValueError(
      f"the preview of {bundle.card.name} is not loaded: load it, parts=('dit', 'preview')."
    )
  frames, height, width = _size(bundle, z, last)
  return _in_batches(
    functools.partial(_preview, bundle.parts.preview, last, bundle.preview),
    rearrange(z, RUNS),
    max(1, PIXELS // (frames * height * width)),
  )


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


def _checked(bundle: ModelBundle, latents: ArrayLike) -> np.ndarray:
  """Latents ... F H W C on the host; ValueError for another rank or channel count, or no run."""
  refuse_traced(
    "decoding to uint8 frames",
    'use bundle.parts.vae.apply({"params": bundle.vae}, latents, method="decode"), or '
    'bundle.parts.preview.apply({"params": bundle.preview}, latents), of R F H W C',
    (latents, bundle.vae, bundle.preview),
    jnp.zeros(()),  # under jit this is traced, whatever is given
  )
  z, channels = np.asarray(latents), bundle.card.latents.channels
  if z.ndim < 4 or z.shape[-1] != channels:
    raise ValueError(
      f"latents are {z.shape}, wanted ... F H W C with C = {channels} for {bundle.card.name}: "
      "give them as denoise returns them."
    )
  if 0 in z.shape[:-4]:
    raise ValueError(f"latents hold no run ({z.shape}): give one or more.")
  return z


def _check_last(bundle: ModelBundle, z: np.ndarray, last: int | None) -> None:
  frames, _, _ = _size(bundle, z)
  if last is not None and not 1 <= last <= frames:
    raise ValueError(f"last={last} of {frames} frames, wanted 1 to {frames}, or None for all.")


def _size(bundle: ModelBundle, z: np.ndarray, last: int | None = None) -> tuple[int, int, int]:
  """Frames, height and width of the videos of ... F H W C; last: as `decode` takes it."""
  spec, (frames, rows, columns) = bundle.card.latents, z.shape[-4:-1]
  return last or spec.frames(frames), rows * spec.stride[1], columns * spec.stride[2]


def _together(
  bundle: ModelBundle, z: np.ndarray, last: int | None, videos: Iterator[np.ndarray]
) -> np.ndarray:
  """The videos of ... F H W C as ... frames height width 3."""
  made = np.empty((*z.shape[:-4], *_size(bundle, z, last), 3), np.uint8)
  for place, video in zip(rearrange(made, RUNS), videos, strict=True):
    place[...] = video
  return made


def _in_batches(
  fn: Callable[[Array], Array], x: Rows, size: int, *, of: int = 1
) -> Iterator[np.ndarray]:
  """The rows of fn over x, in equal batches of at most `size`, the last filled up by its own last
  row."""
  size = rows_at_once(len(x), size, of=of)
  for start in range(0, len(x), size):
    part = list(x[start : start + size])
    filled = np.stack(part + part[-1:] * (size - len(part)))
    yield from np.asarray(fn(jnp.asarray(filled)))[: len(part)]
