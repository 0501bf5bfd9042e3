"""Tiles cover a video, join without seams, and are what each stack's loop makes of them."""

import numpy as np
import pytest

from jax_videoreason import tiling
from jax_videoreason.structs import LatentSpec
from jax_videoreason.tiling import Tiling

SPEC = LatentSpec(channels=16, stride=(4, 8, 8))
SMALL = {rule: Tiling(size=(4, 5), stride=(3, 4), rule=rule) for rule in tiling.NAMES}


def test_the_sizes_of_the_stacks():
  theirs = tiling.named("diffusers", SPEC)
  assert (theirs.size, theirs.stride, theirs.fold) == ((32, 32), (24, 24), 1)
  large = tiling.named("diffusers", LatentSpec(channels=48, stride=(4, 16, 16)), 2)
  assert (large.size, large.stride, large.fold) == ((16, 16), (12, 12), 2)
  assert tiling.named("diffsynth", SPEC).size == (30, 52)
  with pytest.raises(ValueError, match="no tiling 'comfy'; there are: diffusers, diffsynth"):
    tiling.named("comfy", SPEC)


@pytest.mark.parametrize(
  ("rule", "rows", "columns"),
  [
    ("diffusers", [(0, 32), (24, 56), (48, 60)],
     [(0, 32), (24, 56), (48, 80), (72, 104), (96, 104)]),
    ("diffsynth", [(0, 30), (15, 45), (30, 60)], [(0, 52), (26, 78), (52, 104)]),
  ],
)  # fmt: skip
def test_where_tiles_of_480p_lie(rule, rows, columns):
  where = tiling.places(tiling.named(rule, SPEC), 60, 104)
  assert [(line[0][0].start, line[0][0].stop) for line in where] == rows
  assert [(cut.start, cut.stop) for _, cut in where[0]] == columns


@pytest.mark.parametrize("rule", tiling.NAMES)
def test_a_small_video_is_one_tile(rule):
  assert tiling.places(SMALL[rule], 4, 5) == [[(slice(0, 4), slice(0, 5))]]


def cut(video, where, stride):
  (high, wide) = stride
  return [
    [
      video[:, :, r.start * high : r.stop * high, c.start * wide : c.stop * wide].copy()
      for r, c in line
    ]
    for line in where
  ]


@pytest.mark.parametrize("rule", tiling.NAMES)
@pytest.mark.parametrize("size", [(4, 5), (7, 9), (10, 13), (4, 20), (11, 6)])
def test_tiles_that_agree_join_to_the_video_they_were_cut_from(rule, size):
  high, wide = size
  video = np.random.default_rng(0).normal(size=(2, 3, 2 * high, 3 * wide, 3)).astype(np.float32)
  where = tiling.places(SMALL[rule], high, wide)
  joined = tiling.join(SMALL[rule], where, cut(video, where, (2, 3)), (2, 3))
  np.testing.assert_allclose(joined, video, atol=1e-6)


def test_diffusers_ramps_from_the_tile_before():
  """The first pixel of an overlap is the old tile's; the last but one step is still a mix."""
  where = tiling.places(SMALL["diffusers"], 4, 9)
  tiles = [[np.full((1, 1, 8, 2 * (c.stop - c.start), 1), i, np.float32)
            for i, (_, c) in enumerate(line)] for line in where]  # fmt: skip
  joined = tiling.join(SMALL["diffusers"], where, tiles, (2, 2))[0, 0, 0, :, 0]
  np.testing.assert_allclose(joined, [0] * 8 + [0, 0.5] + [1] * 6 + [1, 1.5])


def test_diffusers_mixes_folded_pixels_together():
  folded = Tiling(size=(4, 4), stride=(2, 2), rule="diffusers", fold=2)
  where = tiling.places(folded, 4, 6)
  tiles = [[np.full((1, 1, 8, 2 * (c.stop - c.start), 1), i, np.float32)
            for i, (_, c) in enumerate(line)] for line in where]  # fmt: skip
  joined = tiling.join(folded, where, tiles, (2, 2))[0, 0, 0, :, 0]
  np.testing.assert_allclose(joined[4:8], [0, 0, 0.5, 0.5])


def test_diffsynth_weighs_both_neighbours():
  where = tiling.places(SMALL["diffsynth"], 4, 9)
  tiles = [[np.full((1, 1, 8, 2 * (c.stop - c.start), 1), i, np.float32)
            for i, (_, c) in enumerate(line)] for line in where]  # fmt: skip
  joined = tiling.join(SMALL["diffsynth"], where, tiles, (2, 2))[0, 0, 0, :, 0]
  np.testing.assert_allclose(joined, [0] * 8 + [1 / 3, 2 / 3] + [1] * 8, atol=1e-6)


@pytest.mark.parametrize("stride", [(0, 1), (1, 5)])
def test_impossible_tiles_are_refused(stride):
  with pytest.raises(ValueError, match="wanted strides of at least 1 and at most the size"):
    Tiling(size=(4, 4), stride=stride, rule="diffusers")
  with pytest.raises(ValueError, match="tiling rule 'seams'"):
    Tiling(size=(4, 4), stride=(2, 2), rule="seams")  # type: ignore
