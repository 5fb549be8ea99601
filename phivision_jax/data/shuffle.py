"""The one source of randomness in the data engine.

NumPy promises the raw output of a bit generator and of SeedSequence for good, but not what ``Generator.permutation``
makes of it. A plan must come out the same on every machine and for years, so permutations sort raw output and samples
compare it.
"""

from __future__ import annotations

import numpy as np


def permutation(n: int, seed: int, *purpose: int) -> np.ndarray:
    """[n] i64, a permutation of 0…n−1. ``purpose`` (any non-negative ints) keeps the uses of one seed apart."""
    return np.argsort(_bits(seed, purpose).random_raw(n), kind="stable")


def sample(n: int, share: float, seed: int, *purpose: int) -> np.ndarray:
    """[n] bool: about ``share`` (0 to below 1) of 0…n−1, each drawn by itself.

    Whether i is drawn depends on i, share and seed alone, not on n; and what a share draws, every larger one draws too.
    """
    bits, limit = _bits(seed, purpose), np.uint64(int(share * 2**64))
    drawn = np.empty(n, bool)
    for at in range(0, n, _AT_ONCE):  # 8 bytes of raw output for each byte of the result
        drawn[at : at + _AT_ONCE] = bits.random_raw(min(_AT_ONCE, n - at)) < limit
    return drawn


_AT_ONCE = 1 << 20


def _bits(seed: int, purpose: tuple[int, ...]) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=purpose))
