"""Figures come out whole, at the right size, with the pixels of the frames in them."""

import numpy as np
import pytest

from jax_videoreason import media, plots


def test_film_strip_shows_each_step_as_a_row_and_keeps_pixels(tmp_path):
  frames = np.zeros((4, 17, 32, 32, 3), np.uint8)
  colours = np.random.default_rng(0).integers(0, 200, (4, 17, 3))
  frames[:] = colours[:, :, None, None]
  path = tmp_path / "x0_0.png"
  plots.film_strip(path, frames, [1.0, 0.9, 0.5, 0.1], title="maze", notes=["a $x$", "b", "", "c"])
  picture = media.read_image(path)
  cell = 64 + 3
  for row in range(4):
    for column, frame in enumerate(range(0, 17, 2)):
      y, x = 64 + row * cell + 32, 108 + column * cell + 32
      assert np.abs(picture[y, x].astype(int) - colours[row, frame]).max() <= 2


def test_a_strip_of_one_frame_is_as_wide_as_its_texts(tmp_path):
  """Nothing of a text is cut at the right edge."""
  title = "Select largest, case beyond the training range 12 for $x$, seed 1203"
  path = tmp_path / "x0_0.png"
  plots.film_strip(path, np.zeros((2, 1, 32, 32, 3), np.uint8), [1.0, 0.1], title=title)
  picture = media.read_image(path)
  assert (picture[:, -8:] == 255).all()
  assert (picture[:40, 108 + 64 + 12 :] < 255).any()  # the texts go on beside the frame
  plots.film_strip(path, np.zeros((2, 1, 32, 32, 3), np.uint8), [1.0, 0.1])
  assert (media.read_image(path)[:, -8:] == 255).all()
  names = {"rows": [0], "columns": [0], "row_name": "step", "column_name": "latent frame"}
  plots.picture_grid(path, np.zeros((1, 1, 4, 4)), **names, title=title)
  picture = media.read_image(path)
  assert (picture[:, -8:] == 255).all() and (picture[:30, 64 + 64 + 12 :] < 255).any()


@pytest.mark.parametrize(("height", "width"), ((32, 32), (64, 96), (480, 832), (50, 33)))
def test_cells_have_about_the_wanted_size(height, width):
  scaled = plots.scale(np.zeros((1, height, width, 3), np.uint8), 64)
  assert 64 <= min(scaled.shape[1:3]) < 128


def test_growing_keeps_hard_edges_and_shrinking_averages():
  dots = np.array([[[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]]], np.uint8)
  grown = plots.scale(dots, 4)
  assert set(np.unique(grown)) == {0, 255} and grown.shape == (1, 4, 4, 3)
  np.testing.assert_array_equal(media.shrink(dots, 1), np.full((1, 1, 1, 3), 128))


def test_more_lines_than_colours_differ_in_style_and_all_are_named(tmp_path, monkeypatch):
  drawn = {}

  def kept(figure, path, dpi):
    drawn["axes"] = figure.axes[0]
    save(figure, path, dpi)

  save = plots._save
  monkeypatch.setattr(plots, "_save", kept)
  x = np.linspace(0.1, 0.9, 9)
  names = [f"setting {i}" for i in range(11)]
  lines = {
    n: (x, *(np.exp(-x) + 0.001 * i + end for end in (0, -0.1, 0.1))) for i, n in enumerate(names)
  }
  plots.bands(tmp_path / "a.png", lines, x_name="place", y_name="move")
  axes = drawn["axes"]
  looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
  assert len(looks) == len(axes.lines) == 11
  boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
  assert sorted(text.get_text() for text in axes.texts if text.get_text()) == sorted(names)
  assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def figure_of(monkeypatch, draw):
  """The figure that `draw` would save."""
  kept = []
  monkeypatch.setattr(plots, "_save", lambda figure, path, dpi: kept.append(figure))
  draw()
  return kept[0]


@pytest.mark.parametrize("count", [3, 7])
def test_many_lines_have_bars_side_by_side_and_no_bands_that_hide_each_other(monkeypatch, count):
  x = np.linspace(0.1, 0.9, 9)
  lines = {f"line {i}": (x, x, x - 0.1, x + 0.1) for i in range(count)}
  figure = figure_of(monkeypatch, lambda: plots.bands("a", lines, x_name="x", y_name="y"))
  (axes,) = figure.axes
  many = count > plots.FILLED
  kinds = {type(drawn).__name__ for drawn in axes.collections}
  assert kinds == {"LineCollection"} if many else "LineCollection" not in kinds
  at = {float(line.get_transform().transform((0.5, 0.5))[0]) for line in axes.lines}
  assert len(at) == (count if many else 1)
  assert len({line.get_color() for line in axes.lines}) == count
  assert axes.get_ylim()[1] >= 1.0


def test_the_colours_of_maps_have_a_name(monkeypatch):
  draw = lambda: plots.heat_maps(  # noqa: E731
    "a", {"": np.eye(3)}, x=range(3), y=range(3), x_name="x", y_name="y", value_name="drop of $"
  )
  assert "drop of $" in [axes.get_ylabel() for axes in figure_of(monkeypatch, draw).axes]


def test_names_are_moved_apart_by_no_more_than_they_must():
  assert plots.apart([], 0.1) == []
  assert plots.apart([0.2, 0.5], 0.1) == [0.2, 0.5]
  np.testing.assert_allclose(plots.apart([0.5, 0.5, 0.5, 0.9], 0.1), [0.4, 0.5, 0.6, 0.9])
  np.testing.assert_allclose(plots.apart([0.0, 0.0, 0.98, 1.0], 0.1), [0.0, 0.1, 0.9, 1.0])
  np.testing.assert_allclose(plots.apart([0.5] * 21, 0.1), np.arange(21) / 20)


def test_curves_and_training_curves(tmp_path):
  sigma = np.linspace(1, 0.1, 10)
  runs = np.random.default_rng(0).random((10, 3))
  plots.curves(
    tmp_path / "a.png",
    sigma,
    {"right": runs[:, 0], "mean $ of runs": runs},
    x_name="sigma",
    y_name="share",
    falling=True,
  )
  loss = 1 / np.arange(1, 101)
  losses = {"loss": loss, "a band": np.where(loss > 0.05, loss, np.nan)}
  plots.training_curves(tmp_path / "b.png", range(1, 101), losses, {})
  plots.training_curves(
    tmp_path / "c.png", range(1, 101), losses, {"maze": [(50, 0.1), (100, 0.8)]}
  )
  pictures = [media.read_image(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
  assert all(p.shape[0] > 300 and len(np.unique(p)) > 20 for p in pictures)
  assert pictures[2].shape[0] == 2 * pictures[1].shape[0]  # scores have a panel of their own
