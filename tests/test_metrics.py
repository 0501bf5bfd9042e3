"""Distances, agreement, pull and CKA against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_videoreason import metrics

SHAPE = (3, 4, 5, 6)


def draw(*lead, seed=0):
  values = np.random.default_rng(seed).normal(size=(*lead, *SHAPE))
  return jnp.asarray(values, jnp.float32)


def test_distance_is_the_root_mean_square():
  a, b = draw(2), draw(2, seed=1)
  want = [np.sqrt(np.mean((np.asarray(a[i]) - np.asarray(b[i])) ** 2)) for i in range(2)]
  np.testing.assert_allclose(metrics.distance(a, b), want, rtol=1e-6)


def test_distance_of_pictures_is_on_the_scale_of_one():
  black, white = (np.full((2, 8, 8, 3), v, np.uint8) for v in (0, 255))
  assert metrics.distance(black, white) == pytest.approx(1)


def test_change_is_relative_to_the_final_guess():
  final = draw(2)
  x0 = jnp.stack([0 * final, 0.5 * final, final])
  np.testing.assert_allclose(metrics.change(x0), np.full((2, 2), 0.5), rtol=1e-6)


def test_agreement_is_a_cosine():
  final = draw(2)
  x0 = jnp.stack([-final, 3 * final, final])
  np.testing.assert_allclose(metrics.agreement(x0), [[-1, -1], [1, 1], [1, 1]], rtol=1e-5)


@pytest.mark.parametrize("share", (0.0, 0.25, 1.0))
def test_pull_is_the_share_of_the_way(share):
  own, other = draw(2), draw(2, seed=1)
  got = metrics.pull(own + share * (other - own), own=own, other=other)
  np.testing.assert_allclose(got, np.full(2, share), atol=1e-6)


def test_pull_does_not_see_what_is_across_the_line():
  own, other = jnp.zeros(SHAPE), jnp.zeros(SHAPE).at[0].set(1.0)
  assert metrics.pull(own.at[1].set(7.0), own=own, other=other) == 0


def test_cka_knows_rotations_and_scales_but_not_noise():
  x = draw()
  turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
  same = 3 * jnp.einsum("fhwc,cd->fhwd", x, jnp.asarray(turn, jnp.float32)) + 1
  assert metrics.cka(x, same) == pytest.approx(1, abs=1e-5)
  assert metrics.cka(x, draw(seed=3)) < 0.5


def test_what_has_no_direction_has_no_agreement_and_no_cka():
  x, flat = draw(), np.ones_like(draw())
  assert np.isnan(metrics.agreement(x[None], np.zeros_like(x))).all()
  assert np.isnan(metrics.cka(x, flat)).all()
  assert np.isnan(metrics.cka(flat, x)).all()
