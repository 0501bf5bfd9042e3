"""Places on an axis."""

from jax_videoreason.axes import spread


def test_spread_keeps_both_ends():
  assert spread(17, 9) == list(range(0, 17, 2))
  assert spread(3, 9) == [0, 1, 2]
  assert spread(81, 5) == [0, 20, 40, 60, 80]
