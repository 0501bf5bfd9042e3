"""From a picture of any size to what a model is shown, by the rules of each reference stack.

The official code resizes in floats without smoothing, so values may leave -1..1 and nothing is
rounded; the others resize 8-bit pictures with PIL, smoothed when they shrink.
"""

import math
from collections.abc import Iterable

import numpy as np
from einops import rearrange

from jax_videoreason import media

STACKS = ("official", "diffusers", "diffsynth")
SHARPNESS = -0.75  # of the cubic kernel, as PyTorch has it


def area_size(
  height: int, width: int, *, area: int, stride: int = 8, patch: int = 2
) -> tuple[int, int]:
  """(height, width) of at most about `area` pixels with the aspect of a picture, in whole patches.

  The rule of the official image to video, in latent cells: each side is rounded down by itself.
  """
  aspect = height / width
  unit = stride * patch
  high, wide = (
    int(math.sqrt(pixels) // stride // patch) * unit for pixels in (area * aspect, area / aspect)
  )
  if not high or not wide:
    raise ValueError(
      f"a picture of {width} x {height} pixels keeps no patch of {unit} in an area of {area}: crop "
      "it, or allow a larger area."
    )
  return high, wide


def fitting_size(height: int, width: int, *, area: int, unit: int = 32) -> tuple[int, int]:
  """(height, width), multiples of `unit` within `area`, whose aspect is nearest to a picture's.

  The rule of the official TI2V-5B, which then covers that size and crops.
  """
  ratio = width / height
  across = math.sqrt(area * ratio)

  def completed(side: float) -> tuple[int, int]:
    first = int(side // unit * unit)
    return first, int(area / first // unit * unit) if first else 0

  (wide, other_high), (high, other_wide) = completed(across), completed(area / across)
  sizes = [(high, other_wide), (other_high, wide)]
  if not all(all(size) for size in sizes):
    raise ValueError(
      f"a picture of {width} x {height} pixels keeps no side of {unit} in an area of {area}: "
      "crop it, or allow a larger area."
    )

  def off(size: tuple[int, int]) -> float:
    made = size[1] / size[0]
    return max(ratio / made, made / ratio)

  return min(sizes, key=off)


def stretched(image: np.ndarray, height: int, width: int, stack: str) -> np.ndarray:
  """The first frame of a picture uint8 RGB, height width 3, as image to video of a stack makes it.

  Sides are scaled apart. "official": float32 about -1..1; the others uint8.
  """
  _check(stack)
  if stack == "official":
    return bicubic(image.astype(np.float32) / np.float32(127.5) - 1, height, width)
  method = "lanczos" if stack == "diffusers" else "bicubic"
  return media.resize(image, height, width, method)


def covered(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """uint8 RGB scaled until it covers a size, and its middle cut out; as official TI2V-5B does."""
  scale = max(width / image.shape[1], height / image.shape[0])
  large = media.resize(
    image, round(image.shape[0] * scale), round(image.shape[1] * scale), "lanczos"
  )
  return _middle(large, height, width)


def shown_to_clip(picture: np.ndarray, first_frame: np.ndarray, stack: str) -> np.ndarray:
  """What the image tower of a stack is given: the picture as it was, or the first frame of it."""
  _check(stack)
  return first_frame if stack == "diffsynth" else picture


def square(images: Iterable[np.ndarray], size: int, stack: str) -> np.ndarray:
  """Pictures height width 3 of any size -> R size size 3 float32 in 0..1, for the CLIP tower.

  images: uint8, or float32 in -1..1. "official" and "diffsynth" ignore the aspect; "diffusers"
  scales the shorter side and cuts the middle out. `shown_to_clip` says which picture.
  """
  _check(stack)
  made = []
  for image in images:
    if stack == "diffusers":
      whole = as_bytes(image)
      high, wide = whole.shape[:2]
      short = min(high, wide)
      whole = media.resize(whole, size * high // short, size * wide // short, "bicubic")
      made.append(_middle(whole, size, size).astype(np.float32) / 255)
    else:
      values = image if image.dtype == np.float32 else image.astype(np.float32) / 127.5 - 1
      made.append(bicubic(values, size, size) * 0.5 + 0.5)
  return np.stack(made).astype(np.float32)


def as_bytes(image: np.ndarray) -> np.ndarray:
  """uint8 of a picture uint8 or float32 about -1..1."""
  if image.dtype == np.uint8:
    return image
  return np.round(127.5 * (np.clip(image, -1, 1) + 1)).astype(np.uint8)


def bicubic(values: np.ndarray, height: int, width: int) -> np.ndarray:
  """Float height width C at another size; cubic, not smoothed, edges repeated (PyTorch's way)."""
  rows, columns = _weights(values.shape[0], height), _weights(values.shape[1], width)
  tall = rows @ rearrange(values, "h w c -> h (w c)").astype(np.float64)
  tall = rearrange(tall, "h (w c) -> w (h c)", c=values.shape[2])
  made = columns @ tall
  return rearrange(made, "w (h c) -> h w c", h=height).astype(np.float32)


def _weights(before: int, after: int) -> np.ndarray:
  """after x before: what each new row takes from the old ones."""
  centre = (np.arange(after) + 0.5) * before / after - 0.5
  base = np.floor(centre)
  made = np.zeros((after, before))
  for step in range(-1, 3):
    distance = np.abs(centre - base - step)
    near = ((SHARPNESS + 2) * distance - (SHARPNESS + 3)) * distance**2 + 1
    far = SHARPNESS * (((distance - 5) * distance + 8) * distance - 4)
    taken = np.clip(base + step, 0, before - 1).astype(int)
    np.add.at(made, (np.arange(after), taken), np.where(distance <= 1, near, far))
  return made


def _middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
  top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
  return image[top : top + height, left : left + width]


def _check(stack: str) -> None:
  if stack not in STACKS:
    raise ValueError(f"stack {stack!r}, wanted one of {', '.join(STACKS)}.")
