"""`sample --fit` makes a first frame of a picture of any size."""

import numpy as np
import pytest

from jax_videoreason import framing, media, settings
from jax_videoreason.cli import sample

CHOSEN = settings.from_config({"checkpoint": "mini", "frames": 17, "height": 32, "width": 32})


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
  """40 x 70 pixels, its path and itself."""
  path = tmp_path_factory.mktemp("picture") / "wide.png"
  image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
  media.write_png(path, image)
  return str(path), image


def test_a_picture_of_the_size_is_taken_as_it_is(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  media.write_png(tmp_path / "right.png", image)
  for fit in sample.FITS:
    frame, chosen = sample.fitted(str(tmp_path / "right.png"), CHOSEN, fit)
    np.testing.assert_array_equal(frame, image)
    assert chosen == CHOSEN


def test_another_size_is_refused_with_the_ways_out(picture):
  with pytest.raises(
    ValueError, match="70 x 40 pixels, the config says 32 x 32: give --fit stretch"
  ):
    sample.fitted(picture[0], CHOSEN, "exact")


def test_stretch_and_cover(picture):
  path, image = picture
  frame, chosen = sample.fitted(path, CHOSEN, "stretch")
  np.testing.assert_array_equal(frame, media.resize(image, 32, 32, "bicubic"))
  assert chosen == CHOSEN
  frame, _ = sample.fitted(path, CHOSEN, "cover")
  np.testing.assert_array_equal(frame, framing.covered(image, 32, 32))


def test_area_takes_the_aspect_of_the_picture(picture):
  frame, chosen = sample.fitted(picture[0], CHOSEN, "area")
  assert frame.shape == (chosen.height, chosen.width, 3)
  assert chosen.height < 32 < chosen.width
  assert chosen.height * chosen.width <= 32 * 32
