"""Pictures become first frames and squares as each stack makes them."""

import numpy as np
import pytest

from jax_videoreason import framing


def picture(height: int, width: int) -> np.ndarray:
  return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
  ("size", "area", "wanted"),
  [
    ((480, 832), 480 * 832, (464, 832)),  # the root of 480 squared falls short, there too
    ((720, 1280), 480 * 832, (464, 832)),
    ((1000, 1000), 720 * 1280, (960, 960)),
    ((832, 480), 720 * 1280, (1248, 720)),
  ],
)
def test_the_size_of_the_official_image_to_video(size, area, wanted):
  assert framing.area_size(*size, area=area) == wanted


@pytest.mark.parametrize(
  ("size", "wanted"),
  [((704, 1280), (704, 1280)), ((1280, 704), (1280, 704)), ((1000, 1000), (928, 960))],
)
def test_the_size_of_the_official_ti2v(size, wanted):
  assert framing.fitting_size(*size, area=704 * 1280) == wanted


@pytest.mark.parametrize("rule", [framing.area_size, framing.fitting_size])
def test_a_picture_that_is_too_long_is_refused(rule):
  with pytest.raises(ValueError, match="a picture of 9000 x 2 pixels keeps no"):
    rule(2, 9000, area=64 * 64)


@pytest.mark.parametrize("stack", framing.STACKS)
def test_a_picture_of_the_right_size_stays(stack):
  image = picture(6, 8)
  made = framing.stretched(image, 6, 8, stack)
  values = made if stack == "official" else made / 127.5 - 1
  np.testing.assert_allclose(values, image / 127.5 - 1, atol=1e-6)


def test_the_official_stack_neither_smooths_nor_clips():
  """An edge overshoots; a pattern of single pixels is seen or missed, where PIL makes it grey."""
  edge = np.zeros((8, 8, 3), np.uint8)
  edge[:, 4:] = 255
  assert framing.stretched(edge, 16, 16, "official").max() > 1.05
  stripes = np.zeros((8, 64, 3), np.uint8)
  stripes[:, ::8] = 255
  assert np.ptp(framing.stretched(stripes, 8, 21, "official")) > 1.0
  assert np.ptp(framing.stretched(stripes, 8, 21, "diffsynth") / 127.5) < 1.0


def test_covering_keeps_the_aspect_and_the_middle():
  image = np.zeros((20, 40, 3), np.uint8)
  image[:, 10:30] = 200
  made = framing.covered(image, 10, 10)
  assert made.shape == (10, 10, 3)
  np.testing.assert_allclose(made[:, 2:8], 200, atol=2)  # lanczos rings beside an edge


@pytest.mark.parametrize("stack", framing.STACKS)
def test_squares(stack):
  """Any number of pictures of any size, 0..1; only diffusers cuts the ends off."""
  image = np.zeros((10, 30, 3), np.uint8)
  image[:, 10:20] = 255
  made = framing.square([image, picture(9, 9)], 10, stack)
  assert (made.shape, made.dtype) == ((2, 10, 10, 3), np.float32)
  assert (made[0] > 0.5).mean() == pytest.approx(1.0 if stack == "diffusers" else 0.4)


def test_floats_and_bytes_are_the_same_picture():
  image = picture(9, 12)
  floats = image.astype(np.float32) / np.float32(127.5) - 1
  for stack in framing.STACKS:
    given, wanted = (framing.square([x], 7, stack) for x in (floats, image))
    np.testing.assert_allclose(given, wanted, atol=1e-5)


def test_an_unknown_stack_is_refused():
  with pytest.raises(ValueError, match="stack 'comfy', wanted one of official, diffusers"):
    framing.stretched(picture(4, 4), 4, 4, "comfy")
