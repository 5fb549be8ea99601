"""The one source of randomness in the data engine.

NumPy guarantees the raw output of a bit generator and of SeedSequence forever, but not the results of
``Generator.permutation``. A plan must be the same on every machine and for years, so permutations sort raw output and
samples compare it.
"""

import numpy as np

_BLOCK = 1 << 20


def permutation(n: int, seed: int, *purpose: int) -> np.ndarray:
    """[n] i64, a permutation of 0…n−1. ``purpose`` (any non-negative ints) separates the uses of one seed."""
    return np.argsort(_bits(seed, purpose).random_raw(n), kind="stable")


def sample(n: int, share: float, seed: int, *purpose: int) -> np.ndarray:
    """[n] bool: about ``share`` (0 to below 1) of 0…n−1, each sampled independently.

    The decision about i depends on i, share and seed alone, not on n, and a larger share samples a superset.
    """
    bits, limit = _bits(seed, purpose), np.uint64(int(share * 2**64))
    sampled = np.empty(n, bool)
    for start in range(0, n, _BLOCK):  # raw output takes 8 bytes per byte of the result
        sampled[start : start + _BLOCK] = bits.random_raw(min(_BLOCK, n - start)) < limit
    return sampled


def _bits(seed: int, purpose: tuple[int, ...]) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=purpose))
