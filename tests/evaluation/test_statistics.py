"""Statistics by hand arithmetic, against SciPy, and in simulated repeats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from phivision_jax.evaluation import statistics
from tests.support.paired_runs import Case, sample_differences, simulate


def test_mean_of_independent_items_is_the_t_interval_of_scipy():
    values = np.random.default_rng(0).normal(3, 2, 40)
    found = statistics.mean_estimate(values, range(40))
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)
    assert found.se == pytest.approx(scipy.stats.sem(values)) and (found.n, found.clusters) == (40, 40)


def test_standard_error_of_clusters_by_hand():
    """Values 1 1 | 0 0 | 1 0: mean 1/2, sums of residuals 1, −1, 0, so se² = 3/2 · 2 / 36 = 1/12."""
    found = statistics.mean_estimate([1, 1, 0, 0, 1, 0], list("aabbcc"))
    assert (found.mean, found.clusters, found.n) == (0.5, 3, 6) and found.se == pytest.approx((1 / 12) ** 0.5)
    assert found.high - found.mean == pytest.approx(4.302652729911275 * found.se)  # t of 2 degrees of freedom


def test_copies_of_items_in_a_cluster_add_no_certainty():
    values = np.random.default_rng(1).integers(0, 2, 60)
    once = statistics.proportion_estimate(values, range(60))
    tripled = statistics.proportion_estimate(np.repeat(values, 3), np.repeat(np.arange(60), 3).tolist())
    assert (tripled.low, tripled.high) == pytest.approx((once.low, once.high)) and tripled.n == 180


def test_proportion_interval_by_hand():
    """8 of 10: se² = 0.16/10 · 10/9, so 9 effective items, and Wilson's interval at t = 2.262 with n = 9."""
    found, t = statistics.proportion_estimate([1] * 8 + [0] * 2, range(10)), 2.2621571628540993
    centre, scale = 0.8 + t**2 / 18, 1 + t**2 / 9
    half = t * math.sqrt(0.16 / 9 + t**2 / (4 * 81))
    assert found.low == pytest.approx((centre - half) / scale) and found.high == pytest.approx((centre + half) / scale)


@pytest.mark.parametrize("value", [0, 1])
def test_proportion_of_equal_values_has_an_interval(value):
    found = statistics.proportion_estimate([value] * 50, range(50))
    assert (found.low, found.high)[value] == value and 0.05 < found.high - found.low < 0.1


def test_proportion_of_one_cluster_is_unknown():
    found = statistics.proportion_estimate([1, 0, 1], ["a"] * 3)
    assert (found.low, found.high) == (0, 1) and found.se == math.inf


@pytest.mark.parametrize("estimate", [statistics.mean_estimate, statistics.proportion_estimate])
def test_no_values_are_an_error(estimate):
    with pytest.raises(ValueError, match="at least one"):
        estimate([], [])


def test_interval_covers_the_true_share_of_correlated_items():
    """Clusters of 4 equal items, true share 0.7: 279 of 300 intervals contain it, of naive ones fewer."""
    random, covered, naive = np.random.default_rng(2), 0, 0
    for _ in range(300):
        values = np.repeat(random.random(100) < 0.7, 4)
        ours = statistics.proportion_estimate(values, np.repeat(np.arange(100), 4).tolist())
        independent = statistics.proportion_estimate(values, range(400))
        covered, naive = covered + (ours.low <= 0.7 <= ours.high), naive + (independent.low <= 0.7 <= independent.high)
    assert covered >= 279 and naive < 240, (covered, naive)


def test_jackknife_of_a_mean_is_its_cluster_robust_error():
    random = np.random.default_rng(3)
    values, clusters = random.random(240), np.repeat(np.arange(80), 3).tolist()
    ours = statistics.mean_estimate(values, clusters)
    found = statistics.jackknife_estimate(lambda chosen: float(values[chosen].mean()), clusters)
    assert (found.low, found.se, found.high) == pytest.approx((ours.low, ours.se, ours.high))


def test_jackknife_of_many_clusters_deletes_groups():
    values, calls = np.random.default_rng(4).random(3000), []
    found = statistics.jackknife_estimate(lambda chosen: calls.append(1) or float(values[chosen].mean()), range(3000))
    assert found.se == pytest.approx(statistics.mean_estimate(values, range(3000)).se, rel=0.2) and len(calls) == 101


@pytest.mark.parametrize("clusters", ["aaaa", "abcd"])
def test_jackknife_of_a_statistic_without_spread_is_unknown(clusters):
    found = statistics.jackknife_estimate(lambda chosen: 5.0, clusters)
    assert (found.mean, found.low, found.high, found.se) == (5, -math.inf, math.inf, math.inf)


def test_smallest_difference_by_hand():
    """1,000 items of which the runs differ on 16 %: (1.962 + 0.842) · √(0.16 / 1000) = 3.55 points."""
    assert statistics.smallest_difference((0.16 / 1000) ** 0.5, 1000) == pytest.approx(0.03547, abs=1e-5)
    score = statistics.proportion_estimate([1, 0] * 500, range(1000))
    assert statistics.unpaired_difference(score) == pytest.approx(2.8039 * (2 * 0.25 / 999) ** 0.5, rel=1e-4)
    assert statistics.paired_difference(score, 0.16) == pytest.approx(0.03547 * (1000 / 999) ** 0.5, abs=1e-5)


def test_smallest_difference_is_found_in_four_of_five_repeats():
    random, items = np.random.default_rng(4), 1000
    difference = statistics.smallest_difference((0.15 / items) ** 0.5, items)
    found = []
    for _ in range(300):
        sampled = sample_differences(Case(difference, 1, 0.0), random, items)
        found.append(abs(sampled.mean()) > 1.96 * sampled.std() / items**0.5)
    assert 0.74 < np.mean(found) < 0.86


def test_paired_test_counts_by_hand():
    """Sums of clusters 2, 1, −1: of 8 sign flips, 6 have a total at least as far from 0 as 2."""
    found = statistics.paired_test([0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0], list("aabbcc"))
    assert (found.only_a, found.only_b, found.equal) == (1, 3, 2) and found.difference.mean == pytest.approx(1 / 3)
    assert found.p == 6 / 8 and found.mcnemar_p == pytest.approx(2 * 5 / 16)


def test_sampled_sign_flips_agree_with_mcnemar_on_independent_items():
    sums = np.array([1.0] * 30 + [-1.0] * 14)
    assert statistics.sign_flip_p(sums) == pytest.approx(statistics.mcnemar_p(14, 30), abs=0.006)
    assert statistics.sign_flip_p(sums * 0.37) == statistics.sign_flip_p(sums)


def test_equal_runs_do_not_differ():
    found = statistics.paired_test([0, 1, 1], [0, 1, 1], "abc")
    assert (found.p, found.mcnemar_p, found.equal) == (1, 1, 3) and found.difference.high == 0


@pytest.mark.parametrize("cluster_size, correlation", [(1, 0.0), (5, 0.25)])
def test_paired_test_finds_a_difference_and_no_other(cluster_size, correlation):
    """The committed simulation (``benchmarks/paired_test.py``) with fewer repeats."""
    planted = simulate(Case(0.05, cluster_size, correlation), 60, 4000, 0.01)
    none = simulate(Case(0.0, cluster_size, correlation), 300, 2000, 0.01, seed=1)
    assert planted.clustered >= 0.95 and none.clustered <= 0.02, (planted, none)
    assert (none.mcnemar > 0.03) == (cluster_size > 1)
