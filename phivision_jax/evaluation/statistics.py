"""Confidence intervals, smallest detectable differences and paired tests for scores of clustered items.

Items of one cluster (several questions on one image) are not independent. Everything here follows Miller, "Adding Error
Bars to Evals" (arXiv 2411.00640): a score is the mean of a sample of questions, its standard error is computed from the
sums of the residuals of each cluster, and two models are compared by their differences on the same items.

    se² = G/(G−1) · Σ_g (Σ_{i in g} r_i)² / n²        n items, G clusters, r_i = value_i − mean

G/(G−1) is the small-sample correction of the estimator called CR1 (Cameron and Miller, "A Practitioner's Guide to
Cluster-Robust Inference", 2015); quantiles are those of Student's t with G−1 degrees of freedom. With one item in each
cluster se² is the sample variance / n.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, ndtri, stdtrit

CONFIDENCE = 0.95
"""Coverage of every interval."""
ALPHA, POWER = 0.05, 0.8
"""Smallest detectable differences are those that a two-sided test at this level finds with this probability."""
EXACT_CLUSTERS = 13
"""Up to so many clusters with a difference, all 2ᴳ sign flips are enumerated; beyond, ``FLIPS`` are sampled."""
FLIPS = 9_999
"""Sampled sign flips: p values below 1/10,000 cannot be resolved."""
JACKKNIFE = 100
"""Most groups of clusters that the jackknife deletes in turn."""
_MOST_SIGNS = 2_000_000
"""Random numbers in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over items and its uncertainty, all in the unit of the values."""

    mean: float
    low: float
    high: float
    """The interval [low, high] has ``CONFIDENCE``."""
    se: float
    """Standard error that respects clusters; infinite for fewer than two clusters."""
    n: int
    clusters: int


@dataclasses.dataclass(frozen=True)
class Paired:
    """The comparison of two runs, a and b, on the same items; differences are b − a."""

    difference: Estimate
    p: float
    """Two-sided p value of the sign-flip test by cluster."""
    only_a: int
    """Items on which a scores higher."""
    only_b: int
    """Items on which b scores higher."""
    equal: int
    mcnemar_p: float
    """Exact two-sided p value of McNemar's test, which takes items for independent."""


def cluster_numbers(clusters: Sequence[Hashable]) -> np.ndarray:
    """[n] int: the number of each item's cluster, from 0 in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


def mean_estimate(values: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """The mean with a cluster-robust t interval (see the module's formula).

    Args:
      values: [n] of any real unit.
      clusters: [n] names.

    Raises:
      ValueError: without values.
    """
    sample, number = np.asarray(values, float), cluster_numbers(clusters)
    n, groups, mean, se = _standard_error(sample, number)
    half = float(stdtrit(max(groups - 1, 1), (1 + CONFIDENCE) / 2)) * se
    return Estimate(mean, mean - half, mean + half, se, n, groups)


def proportion_estimate(values: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """The mean of values in [0, 1], with Wilson's score interval at the effective number of items.

    The effective number is mean · (1 − mean) / se²: how many independent items would be as informative (Kish's design
    effect; Dean and Pagano, "Evaluating Confidence Interval Methods for Binomial Proportions in Clustered Surveys",
    2015, compare such intervals). Unlike the t interval it stays in [0, 1], and has a width where all items are equal:
    the effective number is then that of the clusters.

    Raises:
      ValueError: without values.
    """
    sample, number = np.asarray(values, float), cluster_numbers(clusters)
    n, groups, mean, se = _standard_error(sample, number)
    if groups < 2:
        return Estimate(mean, 0.0, 1.0, se, n, groups)
    effective = mean * (1 - mean) / se**2 if se > 1e-12 else float(groups)
    t = float(stdtrit(groups - 1, (1 + CONFIDENCE) / 2))
    centre = (mean + t**2 / (2 * effective)) / (1 + t**2 / effective)
    half = t / (1 + t**2 / effective) * (mean * (1 - mean) / effective + t**2 / (4 * effective**2)) ** 0.5
    low, high = max(min(centre - half, mean), 0.0), min(max(centre + half, mean), 1.0)  # where rounding errs
    return Estimate(mean, low, high, se, n, groups)


def _standard_error(sample: np.ndarray, number: np.ndarray) -> tuple[int, int, float, float]:
    """(items, clusters, mean, cluster-robust standard error of the mean)."""
    if not len(sample):
        raise ValueError("a mean needs at least one value")
    mean = float(sample.mean())
    sums = np.bincount(number, sample - mean)
    groups = len(sums)
    se = float(np.sqrt(groups / (groups - 1) * (sums**2).sum())) / len(sample) if groups > 1 else float("inf")
    return len(sample), groups, mean, se


def jackknife_estimate(
    statistic: Callable[[np.ndarray], float], clusters: Sequence[Hashable], seed: int = 0
) -> Estimate:
    """A statistic that is no mean of the items, with the t interval of a jackknife that deletes clusters.

    Clusters are distributed over K ≤ ``JACKKNIFE`` groups at random, and θ_k is the statistic without group k:
    se² = (K−1)/K · Σ_k (θ_k − θ̄)² (Kott, "The Delete-a-Group Jackknife", 2001). A bootstrap would repeat items, which
    statistics of groups of items do not expect. The spread of a statistic that is the same without any group, as of
    items that are all wrong, is unknown: its interval and se are infinite, as those of fewer than two clusters.

    Args:
      statistic: maps positions of items to a number.
      clusters: [n] names.
      seed: of the distribution.

    Raises:
      ValueError: without items.
    """
    number = cluster_numbers(clusters)
    if not len(number):
        raise ValueError("a statistic needs at least one item")
    value, count = statistic(np.arange(len(number))), int(number.max()) + 1
    unknown = Estimate(value, float("-inf"), float("inf"), float("inf"), len(number), count)
    if count < 2:
        return unknown
    groups = min(count, JACKKNIFE)
    group_of = np.random.default_rng(seed).permutation(count) % groups
    without = [statistic(np.flatnonzero(group_of[number] != k)) for k in range(groups)]
    se = ((groups - 1) ** 2 / groups * float(np.var(without, ddof=1))) ** 0.5
    half = float(stdtrit(groups - 1, (1 + CONFIDENCE) / 2)) * se
    return Estimate(value, value - half, value + half, se, len(number), count) if se > 1e-12 else unknown


def smallest_difference(se: float, clusters: int) -> float:
    """The smallest true difference that a test at level ``ALPHA`` finds with probability ``POWER``, in the unit of se.

    (t_{1−α/2} + z_power) · se, the formula of Miller's section on power.

    Args:
      se: standard error of the difference: √(se_a² + se_b²) for two independent samples, or that of the paired
        differences.
      clusters: number of clusters that it was computed from.
    """
    return float(stdtrit(max(clusters - 1, 1), 1 - ALPHA / 2) + ndtri(POWER)) * se


def unpaired_difference(score: Estimate) -> float:
    """The smallest difference to another sample of this size and spread, see ``smallest_difference``."""
    return smallest_difference(2**0.5 * score.se, score.clusters)


def paired_difference(score: Estimate, discordant: float) -> float:
    """The smallest difference of means of 0 and 1 on the same items, before a second run exists.

    Args:
      score: of the first run, a mean of values in [0, 1]; differences are assumed to have its design effect.
      discordant: assumed share of items on which the runs differ.
    """
    variance = score.mean * (1 - score.mean)
    design_effect = score.se**2 * score.n / variance if variance > 1e-12 else score.n / score.clusters
    return smallest_difference((discordant * design_effect / score.n) ** 0.5, score.clusters)


def paired_test(a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable], seed: int = 0) -> Paired:
    """Compare two runs item by item.

    The p value is that of a sign-flip permutation test: if both runs were equally good, each cluster's sum of
    differences would have either sign with the same probability. It assumes no distribution and respects clusters.

    Args:
      a: [n] scores of one run.
      b: [n] scores of the other run on the same items.
      clusters: [n] names.
      seed: of the sampled flips.

    Raises:
      ValueError: without items.
    """
    differences = np.asarray(b, float) - np.asarray(a, float)
    difference, sums = mean_estimate(differences, clusters), np.bincount(cluster_numbers(clusters), differences)
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    equal = difference.n - only_a - only_b
    return Paired(difference, sign_flip_p(sums, seed), only_a, only_b, equal, mcnemar_p(only_a, only_b))


def sign_flip_p(sums: np.ndarray, seed: int = 0) -> float:
    """The share of sign flips of these sums whose total is at least as far from 0 as the observed total."""
    flipped = sums[np.abs(sums) > 1e-12]
    observed = abs(flipped.sum()) - 1e-9
    if not len(flipped):
        return 1.0
    if len(flipped) <= EXACT_CLUSTERS:
        signs = (np.arange(2 ** len(flipped))[:, None] >> np.arange(len(flipped)) & 1) * 2 - 1
        return float((np.abs(signs @ flipped) >= observed).mean())
    # The number of positive signs among equal sums is binomial; scores of 0 and 1 have few distinct sums.
    sizes, counts = np.unique(np.abs(flipped).round(9), return_counts=True)
    random, exceeding, rows = np.random.default_rng(seed), 0, max(_MOST_SIGNS // len(sizes), 1)
    for first in range(0, FLIPS, rows):
        positive = random.binomial(counts, 0.5, (min(rows, FLIPS - first), len(sizes)))
        exceeding += int((np.abs((2 * positive - counts) @ sizes) >= observed).sum())
    return (1 + exceeding) / (1 + FLIPS)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """The exact two-sided p value of McNemar's test: discordant items are fair coins if both runs are equally good."""
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5))) if only_a + only_b else 1.0
