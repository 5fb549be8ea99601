from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phivision_jax.data.shuffle import permutation


@given(n=st.integers(0, 300), seed=st.integers(0, 2**40), purpose=st.lists(st.integers(0, 2**33), max_size=3))
def test_permutation_is_one(n, seed, purpose):
    assert sorted(permutation(n, seed, *purpose)) == list(range(n))


def test_permutation_is_the_same_everywhere():
    # Plans must be the same for years: these numbers may never change.
    assert permutation(8, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(8, 1, 0, 5).tolist() == [7, 4, 2, 0, 6, 3, 1, 5]


def test_permutation_purposes_differ():
    found = [tuple(permutation(50, *key)) for key in [(3,), (3, 0), (3, 0, 0), (3, 1, 0), (3, 0, 1), (4, 0, 0)]]
    assert len(set(found)) == len(found)
    assert np.array_equal(permutation(50, 3, 0, 1), permutation(50, 3, 0, 1))
