"""Simulated differences of two evaluation runs on the same items, which are independent or in clusters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from phivision_jax.evaluation.statistics import paired_test

DISCORDANT = 0.15
"""Share of items on which the runs differ."""


class Case(NamedTuple):
    """A simulated comparison."""

    difference: float
    """True difference of the scores, b − a."""
    cluster_size: int
    correlation: float
    """ρ of two items of a cluster."""


class Rates(NamedTuple):
    """Shares of repeats in which each test reports a difference."""

    mcnemar: float
    clustered: float
    se: float
    """Mean standard error of the difference."""


def sample_differences(case: Case, random: np.random.Generator, items: int) -> np.ndarray:
    """[items] of −1, 0 and 1: b − a on each item, clusters one after the other.

    An item has the outcome of its cluster with probability √ρ, and its own outcome otherwise.
    """
    shares = [(DISCORDANT - case.difference) / 2, 1 - DISCORDANT, (DISCORDANT + case.difference) / 2]
    own = random.choice([-1, 0, 1], items, p=shares)
    shared = np.repeat(random.choice([-1, 0, 1], -(-items // case.cluster_size), p=shares), case.cluster_size)[:items]
    return np.where(random.random(items) < case.correlation**0.5, shared, own)


def simulate(case: Case, repeats: int, items: int, level: float, seed: int = 0) -> Rates:
    """Ask both tests for a difference at p < ``level`` in each repeat."""
    random, clusters = np.random.default_rng(seed), (np.arange(items) // case.cluster_size).tolist()
    found = [
        paired_test(np.zeros(items), sample_differences(case, random, items), clusters, seed=repeat)
        for repeat in range(repeats)
    ]
    mcnemar, clustered = (
        np.mean([p < level for p in ps]) for ps in ([f.mcnemar_p for f in found], [f.p for f in found])
    )
    return Rates(float(mcnemar), float(clustered), float(np.mean([f.difference.se for f in found])))
