"""Intervals cover what they claim to, tests err as often as they claim to, maps as a whole."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest

from jax_videoreason import stats

DRAWS = 2_000


def covers(found: stats.Interval, truth: float) -> float:
  return float(((found.low <= truth) & (truth <= found.high)).mean())


@pytest.mark.parametrize("count", [8, 12, 40])
def test_the_interval_of_a_mean_covers_it_95_times_in_100(count):
  values = np.random.default_rng(count).normal(3.0, 2.0, size=(count, 3000))
  found = stats.bootstrap(values, seed=1, draws=DRAWS)
  assert 0.925 <= covers(found, 3.0) <= 0.965


def test_the_percentiles_of_a_mean_lie_out_by_t_and_by_what_resampling_lacks():
  x = np.random.default_rng(3).normal(size=10)
  found = stats.bootstrap(x, seed=0)
  weights = np.random.default_rng(0).multinomial(10, np.full(10, 0.1), size=stats.DRAWS) / 10
  tail = NormalDist().cdf(-2.2621571627 * np.sqrt(10 / 9))  # t of 9 degrees of freedom
  np.testing.assert_allclose([found.low, found.high], np.quantile(weights @ x, [tail, 1 - tail]))


def test_a_share_is_covered_near_the_edge_too():
  rng = np.random.default_rng(2)
  for truth in (0.5, 0.9, 1.0):
    hits = rng.random((20, 1500)) < truth
    assert covers(stats.share(hits, seed=3, draws=DRAWS), truth) >= 0.9


def test_twenty_of_twenty_successes_do_not_prove_a_share_of_one():
  found = stats.share(np.ones(20), seed=0)
  assert (found.estimate, found.high) == (1.0, 1.0)
  assert found.low == pytest.approx(0.025 ** (1 / 20))
  assert stats.share(np.zeros(20), seed=0).high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_the_interval_of_a_share_is_the_exact_one_and_grows_with_it():
  rows = np.arange(71)
  found = stats.share(rows[:70, None] < rows, seed=0, draws=DRAWS)  # k of 70 in column k
  assert found.high[1] == pytest.approx(0.077, abs=5e-4)
  assert found.low[1] == pytest.approx(1 - 0.975 ** (1 / 70))
  assert (np.diff(found.low) > 0).all()
  assert (np.diff(found.high) > 0).all()


def test_shares_of_seeds_get_no_less_than_the_exact_interval_of_their_mean():
  halves = np.r_[np.full(19, 0.0), 0.5]
  found = stats.share(halves, seed=0, draws=DRAWS)
  none, one = (stats.share(np.r_[np.zeros(19), last], seed=0, draws=DRAWS) for last in (0, 1))
  assert none.high < found.high < one.high
  steady = stats.share(np.full(20, 0.5), seed=0, draws=DRAWS)  # resampled, it has no width
  coins = stats.share(np.arange(20) % 2, seed=0, draws=DRAWS)
  assert (steady.low, steady.high) == (coins.low, coins.high)


def test_cases_off_the_commonest_one_are_counted():
  count, commonest = stats.moving([[0, 1], [0, 1], [2, 1], [0, 1], [0, 3]])
  assert (count, commonest.tolist()) == (2, [0, 1])


def test_fewer_cases_than_an_interval_needs_give_a_statement():
  found = stats.bootstrap(np.arange(3.0), seed=0)
  assert found.estimate == 1.0
  assert np.isnan(found.low)
  assert np.isnan(found.high)
  assert str(found) == "1.00 (3 cases: an interval needs at least 8)"


def test_equal_cases_give_a_statement_instead_of_an_interval_of_no_width():
  found = stats.bootstrap(np.full(30, 0.25), seed=0)
  assert str(found) == "0.25 (all 30 cases are equal: resampling shows no spread)"
  mixed = stats.bootstrap(np.stack([np.zeros(30), np.arange(30.0)], axis=1), seed=0, draws=DRAWS)
  assert np.isnan(mixed.low).tolist() == [True, False]
  assert "1 of 2 cells" in str(mixed.note)
  rows = np.tile([0.3, 3.0], (10, 1))  # ten tasks with the same sum and number
  ratio = stats.bootstrap(rows, seed=0, statistic=lambda x: x[..., 0].sum(1) / x[..., 1].sum(1))
  assert str(ratio) == "0.10 (all 10 cases are equal: resampling shows no spread)"


def test_groups_of_one_mean_are_equal_however_many_values_they_have():
  for value in (0.0, 0.1, 1.0):
    found = stats.bootstrap_groups([[value] * 3] + [[value]] * 8, seed=0, draws=DRAWS)
    assert str(found) == f"{value:.2f} (all 9 cases are equal: resampling shows no spread)"
  rounded = [[0.1, 0.2, -0.3], [0.2, 0.1, -0.3], [-0.3, 0.1, 0.2]] * 4  # 0 but for rounding
  assert np.isnan(stats.bootstrap_groups(rounded, seed=0, draws=DRAWS).low)
  few = stats.bootstrap_groups([[1.0, 1.0], [1.0]], seed=0, draws=DRAWS)
  assert few.note == "2 cases: an interval needs at least 8"


def test_groups_are_drawn_whole():
  groups = [[float(number)] * (1 + number % 2) for number in range(12)]
  found = stats.bootstrap_groups(groups, seed=0, draws=DRAWS)
  assert found.estimate == np.concatenate(groups).mean()
  one_each = stats.bootstrap([group[0] for group in groups], seed=0, draws=DRAWS)
  assert 0.8 < (found.high - found.low) / (one_each.high - one_each.low) < 1.4


def test_a_statistic_that_some_draws_lack_has_no_interval_and_says_so():
  rare = np.stack([np.eye(1, 9)[0], np.ones(9)], axis=-1)  # a draw without the first case: 0 / 0
  with np.errstate(invalid="ignore"):
    found = stats.bootstrap(rare, seed=0, statistic=lambda x: x[..., 0].sum(1) / x[..., 0].sum(1))
  assert str(found) == "1.00 (some draws of the cases have no number)"


def test_the_seed_decides_all():
  values = np.random.default_rng(0).normal(size=(30, 4))
  first, second = (stats.bootstrap(values, seed=7, draws=DRAWS) for _ in range(2))
  other = stats.bootstrap(values, seed=8, draws=DRAWS)
  assert np.array_equal(first.low, second.low)
  assert not np.array_equal(first.low, other.low)


def test_another_summary_than_the_mean_in_any_shape():
  values = np.random.default_rng(0).normal(size=(41, 2, 3))
  found = stats.bootstrap(values, seed=0, draws=500, statistic=lambda x: np.median(x, axis=1))
  assert found.estimate.shape == found.low.shape == (2, 3)
  assert np.array_equal(found.estimate, np.median(values, axis=0))
  assert (found.low <= found.estimate).all()
  assert (found.estimate <= found.high).all()


def test_many_cells_are_resampled_in_parts_with_the_same_result(monkeypatch):
  values = np.random.default_rng(0).normal(size=(20, 7))
  whole = stats.bootstrap(values, seed=0, draws=DRAWS), stats.max_statistic(values, seed=0)
  monkeypatch.setattr(stats, "CELLS", 2 * DRAWS)
  parts = stats.bootstrap(values, seed=0, draws=DRAWS), stats.max_statistic(values, seed=0)
  np.testing.assert_allclose(parts[0].low, whole[0].low, rtol=1e-12)
  np.testing.assert_array_equal(parts[1].p, whole[1].p)


def test_pairing_takes_out_what_cases_share():
  rng = np.random.default_rng(4)
  hard = rng.normal(0, 5, size=40)
  a, b = hard + 1 + rng.normal(0, 0.5, 40), hard + rng.normal(0, 0.5, 40)
  difference = stats.paired(a, b, seed=0, draws=DRAWS)
  assert difference.low > 0.5
  assert difference.high < 1.5
  assert stats.bootstrap(a, seed=0, draws=DRAWS).low < 0 < difference.low


@pytest.mark.parametrize(("count", "flips"), [(8, 2**8), (30, DRAWS + 1)])
def test_a_test_errs_5_times_in_100(count, flips):
  nothing = np.random.default_rng(count).normal(size=(count, 4000))
  found = stats.sign_flip(nothing, seed=0, draws=DRAWS)
  np.testing.assert_allclose(found.p * flips, np.round(found.p * flips), atol=1e-9)
  assert 0.03 <= found.significant.mean() <= 0.065
  assert stats.sign_flip(nothing[:, 0] + 2.0, seed=0).significant


def test_an_exact_p_value_is_counted_by_hand():
  found = stats.sign_flip(np.arange(1.0, 9.0), seed=0)
  assert found.p == 2 / 2**8  # all signs as they are, and all turned
  one_turned = stats.sign_flip(np.array([-1.0, 2, 3, 4, 5, 6, 7, 8]), seed=0)
  assert one_turned.p == 4 / 2**8


def test_a_drawn_p_value_counts_what_was_seen_among_the_flips():
  clear = np.random.default_rng(0).normal(size=30) + 2.0
  for test in (stats.sign_flip, stats.max_statistic):
    assert test(clear, seed=0, draws=2000).p == 1 / 2001


def test_a_map_without_effect_shows_a_cell_5_times_in_100():
  rng = np.random.default_rng(0)
  false = 0
  for trial in range(400):
    field = rng.normal(size=(16, 6, 5)) + rng.normal(size=(16, 1, 5))  # neighbours depend
    false += bool(stats.max_statistic(field, seed=trial, draws=400).significant.any())
  assert 0.025 <= false / 400 <= 0.08


def test_a_map_shows_the_cell_that_has_an_effect_and_no_other():
  field = np.random.default_rng(1).normal(size=(24, 8, 6))
  field[:, 2, 3] += 2.0
  found = stats.max_statistic(field, seed=0, draws=DRAWS)
  assert np.argwhere(found.significant).tolist() == [[2, 3]]
  single = stats.sign_flip(field, seed=0, draws=DRAWS)
  assert (found.p >= single.p - 1e-12).all()  # one rate for the map costs something everywhere
  assert np.array_equal(found.p <= 0.05, found.significant)


def test_the_p_value_of_a_cell_counts_the_flips_whose_largest_cell_is_as_far_from_0():
  field = np.random.default_rng(2).normal(size=(8, 3)) + np.array([0.0, 0.7, 1.4])
  signs = np.array(list(itertools.product((-1, 1), repeat=8)))
  root = np.sqrt((field**2).mean(0))
  largest = (np.abs(signs @ field / 8) / root).max(1)
  wanted = [(largest >= seen - 1e-9).mean() for seen in np.abs(field.mean(0)) / root]
  found = stats.max_statistic(field, seed=0)
  assert found.p.tolist() == wanted and wanted[2] < 0.05 < wanted[0]


def test_cells_that_are_zero_in_all_cases_are_not_significant():
  found = stats.max_statistic(np.zeros((12, 3)), seed=0, draws=DRAWS)
  assert found.p.tolist() == [1.0, 1.0, 1.0]
  assert not found.significant.any()


def test_too_few_cases_to_reject_anything_are_told_so():
  found = stats.sign_flip(np.ones(5), seed=0)
  assert np.isnan(found.p)
  assert not found.significant
  assert found.note == "5 cases: a test at 0.05 needs at least 6"
  assert stats.sign_flip(np.ones(6), seed=0).significant


@pytest.mark.parametrize(
  ("call", "told"),
  [
    (lambda: stats.bootstrap([1.0, np.nan], seed=0), r"1 of 2 values are not finite, .* \(1,\)"),
    (lambda: stats.bootstrap([], seed=0), "wanted N"),
    (lambda: stats.bootstrap(np.ones(9), seed=0, draws=10), "draws=10"),
    (lambda: stats.paired(np.ones(9), np.ones(8), seed=0), "the same case"),
    (lambda: stats.share([0.0, 2.0], seed=0), "wanted shares"),
  ],
)
def test_bad_input_is_told_in_one_sentence(call, told):
  with pytest.raises(ValueError, match=told):
    call()


def test_an_estimate_is_spelled_with_its_interval_where_there_is_one():
  found = {"estimate": 0.612, "low": 0.5, "high": 0.719}
  assert stats.spell(found) == "0.61 [0.50, 0.72]"
  assert stats.spell(found, digits=3) == "0.612 [0.500, 0.719]"
  assert stats.spell({**found, "low": None, "high": None}) == "0.61"
  assert stats.spell({**found, "estimate": None}) == stats.spell(None) == "-"


def test_samples_drawn_anew_within_their_tasks_do_not_change_the_tasks():
  steady = stats.bootstrap_within([[0.0] * 5, [1.0] * 5, [0.5] * 5], seed=0)
  assert steady.estimate == 0.5 and np.isnan(steady.low)
  assert steady.note == "no group has two values that differ: resampling shows no spread"
  rng = np.random.default_rng(0)
  means = np.linspace(-1, 1, 100)
  groups = [mean + 0.1 * rng.normal(size=5) for mean in means]
  found = stats.bootstrap_within(groups, seed=0)
  assert found.estimate == pytest.approx(np.mean(groups))
  spread = 0.1 / np.sqrt(500)  # of a mean of 500
  assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
  freely = stats.bootstrap(np.concatenate(groups), seed=0)
  assert freely.high - freely.low > 5 * (found.high - found.low)
  for few in ([[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0] * 5, [0.5]]):
    assert np.isnan(stats.bootstrap_within(few, seed=0).low)


def test_an_interval_within_groups_covers_the_mean_also_of_pairs():
  rng, hits = np.random.default_rng(1), 0
  for trial in range(200):
    found = stats.bootstrap_within(rng.normal(size=(30, 2)), seed=trial, draws=500)
    hits += found.low <= 0 <= found.high
  assert hits >= 180  # 95% of them are 190; without the widening about 165


@pytest.mark.parametrize(("groups", "size"), [(1, 8), (3, 4), (7, 2)])
def test_an_interval_within_groups_covers_the_mean_also_of_few(groups, size):
  rng, hits = np.random.default_rng(2), 0
  for trial in range(300):
    found = stats.bootstrap_within(rng.normal(size=(groups, size)), seed=trial, draws=500)
    hits += found.low <= 0 <= found.high
  assert hits >= 273  # 95% of them are 285, 91% are 273; by z instead of t about 265


def test_an_interval_within_one_group_is_that_of_its_mean():
  x = np.random.default_rng(3).normal(size=9)
  within, plain = stats.bootstrap_within([x], seed=0), stats.bootstrap(x, seed=0)
  assert within.low == pytest.approx(plain.low, abs=0.05)
  assert within.high == pytest.approx(plain.high, abs=0.05)


def test_an_interval_within_unlike_groups_has_the_freedom_of_their_spreads():
  """Of 3 and 7 values: their sums have variances of 21 and 21, of 2 and 6 degrees of freedom."""
  groups = [np.sqrt(7) * np.arange(-1, 2), np.sqrt(3) * np.repeat([-1, 0, 1], (3, 1, 3))]
  found = stats.bootstrap_within(groups, seed=0)
  rng = np.random.default_rng(0)
  drawn = sum(g[rng.integers(len(g), size=(stats.DRAWS, len(g)))].sum(1) for g in groups) / 10
  t = 2.4469118511  # of 6 degrees of freedom: (21 + 21)^2 / (21^2 / 2 + 21^2 / 6)
  tail = NormalDist().cdf(-t * np.sqrt(42 / 32))  # resampling knows 2 * 7 + 6 * 3 of the 42
  np.testing.assert_allclose([found.low, found.high], np.quantile(drawn, [tail, 1 - tail]))


def test_an_interval_of_shares_stays_among_shares():
  found = stats.bootstrap_within([[1.0, 1.0]] * 6 + [[1.0, 0.0]], seed=0)
  assert 0 <= found.low < found.estimate < found.high <= 1
  assert found.cases == 14


def test_groups_with_too_little_in_them_have_no_interval():
  found = stats.bootstrap_within([[0.0, 1.0]] * 6, seed=0)
  assert np.isnan(found.low) and found.estimate == 0.5
  assert found.note == "12 values in 6 groups: an interval needs 13"


@pytest.mark.parametrize(
  ("p", "said"), [(None, "-"), (0.0001, "<0.001"), (0.001, "0.001"), (0.25, "0.250")]
)
def test_a_p_value_is_never_said_to_be_zero(p, said):
  assert stats.chance(p) == said


def test_holm_counts_the_tests_that_are_left():
  nan = float("nan")
  np.testing.assert_allclose(
    stats.holm([0.04, 0.01, nan, 0.03, 0.5]), [0.09, 0.04, nan, 0.09, 0.5], equal_nan=True
  )
  np.testing.assert_array_equal(stats.holm([0.9, 0.8]), [1, 1])
  assert stats.holm([0.02]) == [0.02] and stats.holm([]).shape == (0,)


def test_holm_errs_in_5_percent_of_families():
  drawn = np.random.default_rng(0).random((4000, 7))  # p-values where nothing differs
  wrong = np.mean([stats.holm(p).min() <= stats.ERROR for p in drawn])
  assert 0.04 < wrong < 0.06
