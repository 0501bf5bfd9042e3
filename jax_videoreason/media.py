"""PNG, MP4 and resizing of uint8 RGB; the only importer of av and of PIL.

Files are made in memory and written by `folders.atomic`: a full disk leaves the old file or none.
"""

import io
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from einops import reduce, repeat
from PIL import Image, ImageOps

from jax_videoreason.folders import atomic, local

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# Modes that become RGB without loss: grey and black-and-white are repeated, a palette is looked up.
LOSSLESS = ("RGB", "L", "1", "P")
SMALLEST = 64
BT709 = 1
METHODS = {
  "nearest": Image.Resampling.NEAREST,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}


def read_image(path: str | Path) -> np.ndarray:
  """A still image as uint8 RGB, height width 3, turned upright as its EXIF tag says.

  8-bit grey, black-and-white and palette images become RGB, which loses nothing.
  ValueError: the file is missing or no PNG, JPEG, WebP or BMP image; it has transparency, 16 bits
  per channel, several frames, or another colour model (CMYK): turning those into RGB is a choice.
  """
  try:
    data = local(path).read_bytes()
  except OSError as error:
    raise ValueError(f"image {path} cannot be read ({error.strerror}): check the path.") from error
  return image_of(data, path)


def image_of(data: bytes, path: str | Path) -> np.ndarray:
  """`read_image` of the bytes of a file; path: what an error calls it."""
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      image.load()
  except Image.DecompressionBombError as error:
    raise ValueError(f"image {path} has too many pixels ({error}): make it smaller.") from error
  except Exception as error:  # damaged files raise many types, from OSError to SyntaxError
    raise ValueError(
      f"image {path} is damaged or not an image: give a whole PNG, JPEG, WebP or BMP file."
    ) from error
  deep = data.startswith(b"\x89PNG") and data[24] == 16  # PIL reads 16-bit RGB as 8-bit in silence
  if deep or image.mode.startswith("I"):
    raise ValueError(f"image {path} has 16 bits per channel, wanted 8: convert it to 8-bit RGB.")
  if image.has_transparency_data:
    raise ValueError(
      f"image {path} has transparency (mode {image.mode}), wanted opaque RGB: put it on a "
      "background and save it without alpha."
    )
  if image.mode not in LOSSLESS:
    raise ValueError(f"image {path} has mode {image.mode}, wanted RGB: save it as RGB.")
  if getattr(image, "n_frames", 1) > 1:
    raise ValueError(f"image {path} is animated, wanted one frame: save its first frame.")
  return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def png(image: np.ndarray) -> bytes:
  """uint8 RGB, height width 3, as a PNG file, without loss."""
  _check("image", image, "height width 3", 3)
  file = io.BytesIO()
  Image.fromarray(np.ascontiguousarray(image)).save(file, format="PNG")
  return file.getvalue()


def write_png(path: str | Path, image: np.ndarray) -> None:
  """Writes the `png` of an image; OSError when the disk refuses."""
  data = png(image)
  with atomic(path) as part:
    part.write_bytes(data)


def mp4_scale(height: int, width: int) -> int:
  """The factor by which `write_mp4` repeats pixels: the least that makes even sides of 64 or more.

  H.264 with shared chroma needs even sides, and small videos would smear over their own blocks.
  """
  factor = max(-(-SMALLEST // height), -(-SMALLEST // width))
  odd = height % 2 or width % 2
  return factor + factor % 2 if odd else factor


def write_mp4(path: str | Path, frames: np.ndarray, fps: float | Fraction = 16) -> None:
  """Writes frames, uint8 RGB, F height width 3 (F pixel frames), as H.264 in yuv420p.

  Every player opens it, at the price of chroma shared by 2x2 pixels: read back, flat colours are
  within a few levels of 255. Videos with an odd side, or one under 64 pixels, are enlarged by
  repeating each pixel `mp4_scale` times; all others keep their size.
  ValueError when the frames are not such an array; OSError when the disk refuses.
  """
  _check("frames", frames, "frames height width 3", 4)
  rate = Fraction(fps).limit_denominator(1001)
  if rate <= 0:
    raise ValueError(f"fps={fps}, wanted a positive number of frames per second.")
  factor = mp4_scale(*frames.shape[1:3])
  file = io.BytesIO()
  with av.open(file, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
    stream.height, stream.width = factor * frames.shape[1], factor * frames.shape[2]
    stream.pix_fmt = "yuv420p"
    # Untagged colours are read as BT.601 by some players and as BT.709 by others.
    coder = stream.codec_context
    coder.colorspace = coder.color_primaries = coder.color_trc = BT709
    coder.color_range = ColorRange.MPEG
    coder.thread_count = 1  # several encode the same frames differently on a busy machine
    for frame in frames:
      large = repeat(frame, "h w rgb -> (h y) (w x) rgb", y=factor, x=factor)
      picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(large), format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
      )
      container.mux(stream.encode(picture))
    container.mux(stream.encode(None))
  with atomic(path) as part:
    part.write_bytes(file.getvalue())


def read_mp4(path: str | Path) -> tuple[np.ndarray, float]:
  """Frames, uint8 RGB, F height width 3, and frames per second.

  ValueError: the file is missing, damaged, or holds no video.
  """
  try:
    data = local(path).read_bytes()
  except OSError as error:
    raise ValueError(f"video {path} cannot be read ({error.strerror}): check the path.") from error
  try:
    with av.open(io.BytesIO(data), "r") as container:
      stream = container.streams.video[0]
      frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
      rate = stream.average_rate
  except (FFmpegError, IndexError) as error:
    raise ValueError(f"video {path} is damaged or not a video: give a whole MP4 file.") from error
  if not frames or rate is None:
    raise ValueError(f"video {path} holds no frames: give a whole MP4 file.")
  return np.stack(frames), float(rate)


def measure_mp4(path: str | Path) -> tuple[int, int, int]:
  """(frames, height, width) of a video without decoding it: its packets are counted.

  ValueError: the file is missing, damaged, or holds no video.
  """
  try:
    with av.open(str(path), "r") as container:
      stream = container.streams.video[0]
      count = sum(packet.size > 0 for packet in container.demux(stream))
      height, width = stream.height, stream.width
  except (OSError, IndexError) as error:  # the errors of av are OSErrors where a file is missing
    raise ValueError(f"video {path} is missing or damaged: give a whole MP4 file.") from error
  except FFmpegError as error:
    raise ValueError(f"video {path} is damaged or not a video: give a whole MP4 file.") from error
  if not count:
    raise ValueError(f"video {path} holds no frames: give a whole MP4 file.")
  return count, height, width


def resize(
  image: np.ndarray,
  height: int,
  width: int,
  method: Literal["nearest", "bicubic", "lanczos"] = "bicubic",
) -> np.ndarray:
  """uint8 RGB, height width 3, at another size; sides are scaled apart, nothing is cropped.

  nearest: the pixel under each centre. bicubic, lanczos: PIL's, smoothed when they shrink, as
  DiffSynth and diffusers prepare first frames (`framing` has the rules).
  """
  _check("image", image, "height width 3", 3)
  if method not in METHODS:
    raise ValueError(f"method={method!r}, wanted one of: {', '.join(METHODS)}.")
  if height < 1 or width < 1:
    raise ValueError(f"size {width} x {height} pixels, wanted at least 1 x 1.")
  whole = Image.fromarray(np.ascontiguousarray(image))
  return np.asarray(whole.resize((width, height), METHODS[method]))


def shrink(frames: np.ndarray, cell: int) -> np.ndarray:
  """Frames (... height width 3) averaged down by the whole factor that leaves `cell` or more."""
  height, width = frames.shape[-3:-1]
  k = max(1, min(height, width) // cell)
  if k == 1:
    return frames
  cut = frames[..., : height // k * k, : width // k * k, :]
  mean = reduce(cut.astype(np.float32), "... (h a) (w b) c -> ... h w c", "mean", a=k, b=k)
  return mean.round().astype(np.uint8)


def _check(name: str, array: np.ndarray, axes: str, rank: int) -> None:
  """ValueError unless uint8 RGB of this rank, with something in it."""
  if array.dtype != np.uint8 or array.ndim != rank or array.shape[-1] != 3 or not array.size:
    raise ValueError(f"{name} is {array.dtype} {array.shape}, wanted uint8 RGB, {axes}.")
