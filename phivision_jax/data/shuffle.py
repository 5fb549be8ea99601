"""The one source of randomness in the data engine.

NumPy promises the raw output of a bit generator and of SeedSequence for good, but not what ``Generator.permutation``
makes of it. A plan must come out the same on every machine and for years, so permutations sort raw output.
"""

from __future__ import annotations

import numpy as np


def permutation(n: int, seed: int, *purpose: int) -> np.ndarray:
    """[n] i64, a permutation of 0…n−1. ``purpose`` (any non-negative ints) keeps the uses of one seed apart."""
    sequence = np.random.SeedSequence(seed, spawn_key=purpose)
    return np.argsort(np.random.Philox(sequence).random_raw(n), kind="stable")
