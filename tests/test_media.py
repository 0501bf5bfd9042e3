"""Images and videos come back as they were written, and bad ones are named."""

import errno
import os
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jax_videoreason import media

COLOURS = np.asarray(
  [
    [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [255, 255, 0],
    [128, 64, 200], [30, 160, 90],
  ],
  np.uint8,
)  # fmt: skip


def picture(height=6, width=10):
  return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stripes(count, height, width):
  """Vertical stripes of flat colours, and a square that moves over them."""
  frames = np.zeros((count, height, width, 3), np.uint8)
  frames[:] = COLOURS[np.arange(width) * 8 // width]
  side = height // 4
  for i in range(count):
    frames[i, side : 2 * side, i * 2 : i * 2 + side] = (255, 128, 0)
  return frames


def test_png_is_exact(tmp_path):
  media.write_png(tmp_path / "a.png", picture())
  np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), picture())


def test_a_view_that_is_not_contiguous_is_written(tmp_path):
  media.write_png(tmp_path / "a.png", picture()[:, ::-2])
  np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), picture()[:, ::-2])


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_modes_without_loss_become_rgb(tmp_path, mode):
  grey = Image.fromarray(np.repeat(picture()[..., :1], 3, -1))
  wanted = grey.convert(mode)
  wanted.save(tmp_path / "a.png")
  made = media.read_image(tmp_path / "a.png")
  np.testing.assert_array_equal(made, np.asarray(wanted.convert("RGB")))


def test_jpeg_is_turned_upright(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # rotate by 90 degrees
  Image.fromarray(picture(8, 16)).save(tmp_path / "a.jpg", exif=exif)
  assert media.read_image(tmp_path / "a.jpg").shape == (16, 8, 3)


def sixteen_bit_rgb(path):
  """PIL cannot write one."""

  def chunk(name, data):
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

  header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
  pixels = zlib.compress(b"\0" + bytes([1, 2, 3, 4, 5, 6]))
  path.write_bytes(
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
  )


BAD_IMAGES = {
  "alpha": (lambda p: Image.new("RGBA", (4, 4)).save(p), "has transparency .mode RGBA"),
  "grey alpha": (lambda p: Image.new("LA", (4, 4)).save(p), "has transparency"),
  "transparent palette": (
    lambda p: Image.new("P", (4, 4)).save(p, transparency=0), "has transparency .mode P"),
  "16 bit grey": (lambda p: Image.new("I;16", (4, 4)).save(p), "16 bits per channel"),
  "16 bit rgb": (sixteen_bit_rgb, "16 bits per channel"),
  "cmyk": (lambda p: Image.new("CMYK", (4, 4)).save(p, format="JPEG"), "mode CMYK"),
  "animated": (
    lambda p: Image.new("RGB", (4, 4)).save(
      p, save_all=True, append_images=[Image.new("RGB", (4, 4), 1)]), "is animated"),
  "huge": (lambda p: Image.new("1", (20_000, 10_000)).save(p), "too many pixels"),
  "text": (lambda p: p.write_text("hello"), "damaged or not an image"),
  "empty": (lambda p: p.write_bytes(b""), "damaged or not an image"),
  "missing": (lambda p: None, "cannot be read .No such file"),
  "folder": (lambda p: p.mkdir(), "cannot be read .Is a directory"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_one_sentence(tmp_path, kind):
  make, message = BAD_IMAGES[kind]
  make(tmp_path / "a.png")
  with pytest.raises(ValueError, match=f"image .*a.png .*{message}"):
    media.read_image(tmp_path / "a.png")


def test_half_a_file_is_damaged(tmp_path):
  media.write_png(tmp_path / "a.png", picture(60, 60))
  data = (tmp_path / "a.png").read_bytes()
  (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match="damaged"):
    media.read_image(tmp_path / "a.png")


@pytest.mark.parametrize(("size", "fps"), [((64, 64), 16), ((66, 128), 24), ((128, 96), 7.5)])
def test_mp4_keeps_size_count_rate_and_colours(tmp_path, size, fps):
  frames = stripes(9, *size)
  media.write_mp4(tmp_path / "a.mp4", frames, fps=fps)
  back, rate = media.read_mp4(tmp_path / "a.mp4")
  assert back.shape == frames.shape and rate == fps
  error = np.abs(back.astype(int) - frames)
  assert error.mean() <= 6
  middles = (np.arange(8) * 2 + 1) * size[1] // 16
  assert error[:, size[0] * 3 // 4 :, middles].max() <= 12


def test_mp4_is_what_every_player_opens(tmp_path):
  media.write_mp4(tmp_path / "a.mp4", stripes(2, 64, 64))
  with av.open(tmp_path / "a.mp4") as container:
    coder = container.streams.video[0].codec_context
    assert (coder.name, coder.pix_fmt, int(coder.colorspace)) == ("h264", "yuv420p", media.BT709)


@pytest.mark.parametrize("count", [1, 2])
def test_the_shortest_videos(tmp_path, count):
  media.write_mp4(tmp_path / "a.mp4", stripes(count, 64, 64))
  back, rate = media.read_mp4(tmp_path / "a.mp4")
  assert back.shape == (count, 64, 64, 3) and rate == 16


@pytest.mark.parametrize(
  ("size", "factor"),
  [((64, 64), 1), ((480, 832), 1), ((32, 32), 2), ((32, 80), 2), ((65, 80), 2), ((20, 30), 4),
   ((21, 30), 4), ((5, 64), 14)],
)  # fmt: skip
def test_small_and_odd_videos_are_enlarged_by_a_whole_factor(tmp_path, size, factor):
  assert media.mp4_scale(*size) == factor
  frames = stripes(2, *size)
  media.write_mp4(tmp_path / "a.mp4", frames)
  back, _ = media.read_mp4(tmp_path / "a.mp4")
  assert back.shape == (2, factor * size[0], factor * size[1], 3)
  small = back[:, factor // 2 :: factor, factor // 2 :: factor]
  assert np.abs(small.astype(int) - frames).mean() <= 6


@pytest.mark.parametrize("content", [None, b"", b"hello", b"\0\0\0\x18ftypmp42"])
def test_a_bad_video_is_one_sentence(tmp_path, content):
  if content is not None:
    (tmp_path / "a.mp4").write_bytes(content)
  with pytest.raises(ValueError, match=r"video .*a.mp4 (cannot be read|is damaged|holds no)"):
    media.read_mp4(tmp_path / "a.mp4")


@pytest.mark.parametrize(
  "frames", [np.zeros((2, 64, 64, 3)), np.zeros((2, 64, 64), np.uint8),
             np.zeros((2, 64, 64, 4), np.uint8), np.zeros((0, 64, 64, 3), np.uint8)],
)  # fmt: skip
def test_other_arrays_are_refused(tmp_path, frames):
  with pytest.raises(ValueError, match=r"frames is \w+ \(.*\), wanted uint8 RGB, frames height"):
    media.write_mp4(tmp_path / "a.mp4", frames)
  with pytest.raises(ValueError, match=r"image is \w+ \(.*\), wanted uint8 RGB, height width 3"):
    media.write_png(tmp_path / "a.png", frames)
  assert not list(tmp_path.iterdir())


def test_no_frames_per_second_are_refused(tmp_path):
  with pytest.raises(ValueError, match="fps=0, wanted a positive"):
    media.write_mp4(tmp_path / "a.mp4", stripes(1, 64, 64), fps=0)


def full_disk_write(self, data):
  with self.open("wb") as file:
    file.write(data[:10])
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", ["png", "mp4"])
@pytest.mark.parametrize("old", [None, b"what was there"])
def test_a_full_disk_leaves_the_old_file_or_none(tmp_path, monkeypatch, kind, old):
  file = tmp_path / f"a.{kind}"
  if old is not None:
    file.write_bytes(old)
  monkeypatch.setattr(Path, "write_bytes", full_disk_write)
  with pytest.raises(OSError, match=rf"a.{kind} could not be written \(No space left on device\)"):
    if kind == "png":
      media.write_png(file, picture())
    else:
      media.write_mp4(file, stripes(1, 64, 64))
  assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else [file.name])
  assert old is None or file.read_bytes() == old


def test_a_missing_folder_and_a_folder_in_the_way_are_one_sentence(tmp_path):
  with pytest.raises(OSError, match=r"could not be written \(No such file or directory\)"):
    media.write_png(tmp_path / "no" / "a.png", picture())
  (tmp_path / "a.png").mkdir()
  with pytest.raises(OSError, match="could not be written"):
    media.write_png(tmp_path / "a.png", picture())
  assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_nearest_repeats_and_picks():
  image = picture()
  large = media.resize(image, 18, 30, "nearest")
  np.testing.assert_array_equal(large, image.repeat(3, 0).repeat(3, 1))
  np.testing.assert_array_equal(media.resize(large, 6, 10, "nearest"), image)


def test_bicubic_keeps_flat_colours_and_follows_a_ramp():
  flat = np.full((8, 12, 3), (10, 200, 77), np.uint8)
  np.testing.assert_array_equal(
    media.resize(flat, 5, 31), np.broadcast_to(flat[:1, :1], (5, 31, 3))
  )
  ramp = np.broadcast_to((np.arange(64) * 4).astype(np.uint8)[None, :, None], (8, 64, 3))
  half = media.resize(np.asarray(ramp), 8, 32).astype(int)
  np.testing.assert_allclose(half[0, 2:-2, 0], np.arange(2, 30) * 8 + 2, atol=1)


def test_resize_refuses_unknown_methods_and_sizes():
  with pytest.raises(ValueError, match="method='area', wanted one of: nearest, bicubic"):
    media.resize(picture(), 4, 4, "area")
  with pytest.raises(ValueError, match="size 0 x 4 pixels"):
    media.resize(picture(), 4, 0)


def test_one_thread_encodes_so_that_the_same_frames_make_the_same_file(tmp_path):
  media.write_mp4(tmp_path / "a.mp4", stripes(5, 64, 64))
  assert b" threads=1 " in (tmp_path / "a.mp4").read_bytes()  # x264 notes its options
