"""Rotary tables and the rotation, against the definition by complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_videoreason import rope


def by_definition(grid, head_width, theta=10000.0):
  """e^(i p w) of each token and pair, complex128, token by token."""
  f, h, w = grid
  side = 2 * (head_width // 6)
  rows = []
  for position in [(a, b, c) for a in range(f) for b in range(h) for c in range(w)]:
    row = []
    for p, width in zip(position, (head_width - 2 * side, side, side), strict=True):
      row += [complex(np.cos(p / theta ** (2 * j / width)), np.sin(p / theta ** (2 * j / width)))
              for j in range(width // 2)]  # fmt: skip
    rows.append(row)
  return np.array(rows)


def test_a_head_of_128_is_dealt_out_as_44_42_42():
  assert rope.axis_widths(128) == (44, 42, 42)


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 5, 2), (21, 4, 3)])
@pytest.mark.parametrize("head_width", [12, 32, 128])
def test_tables_are_the_float64_values_rounded_once(grid, head_width):
  turn = by_definition(grid, head_width)
  cos, sin = rope.tables(grid, head_width)
  assert cos.dtype == sin.dtype == np.float32
  np.testing.assert_array_equal(cos, turn.real.astype(np.float32))
  np.testing.assert_array_equal(sin, turn.imag.astype(np.float32))


def test_rotation_is_multiplication_of_neighbouring_pairs():
  x = np.random.default_rng(0).standard_normal((2, 6, 3, 12), np.float32)
  turned = np.asarray(rope.rotate(jnp.asarray(x), *rope.tables((1, 2, 3), 12)))
  wanted = (x[..., 0::2] + 1j * x[..., 1::2]) * by_definition((1, 2, 3), 12)[None, :, None]
  # float32 products of numbers of order 1
  np.testing.assert_allclose(turned[..., 0::2], wanted.real, atol=5e-7)
  np.testing.assert_allclose(turned[..., 1::2], wanted.imag, atol=5e-7)


def test_the_first_token_does_not_turn():
  x = jax.random.normal(jax.random.key(0), (1, 6, 1, 12))
  np.testing.assert_array_equal(rope.rotate(x, *rope.tables((1, 2, 3), 12))[:, 0], x[:, 0])


@settings(max_examples=20, deadline=None)
@given(move=st.tuples(*(st.integers(0, 2),) * 3), seed=st.integers(0, 99))
def test_products_depend_on_the_distance_alone(move, seed):
  """q at p times k at p' is q at p + move times k at p' + move."""
  q, k = np.random.default_rng(seed).standard_normal((2, 1, 1, 1, 12), np.float32)
  cos, sin = (t.reshape(4, 4, 4, -1) for t in rope.tables((4, 4, 4), 12))

  def product(a, b):
    turned = [rope.rotate(x, cos[p][None], sin[p][None]) for x, p in ((q, a), (k, b))]
    return float(jnp.sum(turned[0] * turned[1]))

  a, b = (1, 0, 1), (0, 1, 1)
  moved = [tuple(p + m for p, m in zip(x, move, strict=True)) for x in (a, b)]
  assert product(a, b) == pytest.approx(product(*moved), abs=2e-5)


def test_bfloat16_is_rounded_once_after_the_rotation():
  x = jax.random.normal(jax.random.key(0), (1, 6, 1, 12)).astype(jnp.bfloat16)
  tables = rope.tables((1, 2, 3), 12)
  turned = rope.rotate(x, *tables)
  assert turned.dtype == jnp.bfloat16
  wide = rope.rotate(x.astype(jnp.float32), *tables)
  np.testing.assert_array_equal(turned, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("head_width", [4, 13])
def test_head_widths_that_cannot_turn_are_refused(head_width):
  with pytest.raises(ValueError, match=f"head width {head_width}, wanted an even number"):
    rope.tables((1, 1, 1), head_width)
