"""Records kept for validation depend on their indices, the seed and the share alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.mixture import HELD_OUT, Mixture, Stage
from phivision_jax.data.plan.plan import Plan, make_plan, plan_inputs
from phivision_jax.data.shuffle import sample
from phivision_jax.io.messages import first_difference
from tests.support.records import BARE_PROCESSOR, BareDataset

SHAPE = RowShape(12, 1, 8)


def dataset(n: int, tokens: int = 6) -> BareDataset:
    return BareDataset([tokens] * n, [[]] * n)


def mixture(names: str, share: float, **stage) -> Mixture:
    return Mixture(tuple((name, Path(name)) for name in names), (Stage(**stage),), held_out=share)


def examples_of(plan: Plan) -> set[tuple[int, int]]:
    return {(s, i) for row in plan.rows(0, plan.num_rows) for s, i in row.tolist()}


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(20, 150), min_size=1, max_size=3),
    share=st.floats(0.1, 0.6),
    seed=st.integers(0, 50),
    epochs=st.integers(1, 4),
    window=st.integers(3, 60),
    batch_rows=st.integers(1, 5),
    length=st.sampled_from([6, 12, 30]),
)
def test_held_out_partitions_records(sizes, share, seed, epochs, window, batch_rows, length):
    datasets, names = [dataset(n) for n in sizes], "abc"[: len(sizes)]
    mixed = mixture(names, share, epochs=epochs)
    settings = {"shape": RowShape(length, 1, 8), "seed": seed, "window": window, "batch_rows": batch_rows}
    held = examples_of(make_plan(datasets, mixed.validation(), BARE_PROCESSOR, **settings))
    trained = examples_of(make_plan(datasets, mixed, BARE_PROCESSOR, **settings))
    assert not held & trained
    assert held | trained == {(s, i) for s, n in enumerate(sizes) for i in range(n)}
    # They depend on indices, seed and share alone.
    assert held == {
        (s, i) for s, n in enumerate(sizes) for i in np.flatnonzero(sample(n, share, seed, HELD_OUT)).tolist()
    }
    other = mixture(names, share, weights=dict.fromkeys(names, 1.0), examples=300)
    assert held == examples_of(make_plan(datasets, other.validation(), BARE_PROCESSOR, SHAPE, seed=seed))


def test_validation_takes_each_record_once():
    datasets = [dataset(400), dataset(300)]
    mixed = mixture("ab", 0.1, epochs=5, repeat={"a": 3}, weights={"a": 0.9, "b": 0.1})
    plan = make_plan(datasets, mixed.validation(), BARE_PROCESSOR, SHAPE)
    assert len(plan.examples) == len(examples_of(plan)) == sum(sample(n, 0.1, 0, HELD_OUT).sum() for n in (400, 300))


def test_sample_grows_with_share():
    small, large = sample(100_000, 0.02, 3, HELD_OUT), sample(100_000, 0.05, 3, HELD_OUT)
    # Standard deviations are 44 and 69.
    assert small.sum() == pytest.approx(2000, abs=220) and large.sum() == pytest.approx(5000, abs=350)
    assert large[small].all()
    assert (sample(100_000, 0.02, 4, HELD_OUT) & small).sum() < 100
    assert np.array_equal(sample(1_500, 0.02, 3, HELD_OUT), small[:1_500])  # more records move none of the others
    assert not sample(100, 0.0, 0, HELD_OUT).any()


def test_eligible_keeps_records_when_others_are_added():
    mixed = mixture("a", 0.1)
    assert np.array_equal(mixed.eligible(50, 7), mixed.eligible(100, 7)[:50])
    assert np.array_equal(mixed.eligible(100, 7), ~mixed.validation().eligible(100, 7))
    assert not np.array_equal(mixed.eligible(100, 7), mixed.eligible(100, 8))


def test_sample_is_stable():
    assert np.flatnonzero(sample(200, 0.02, 0, HELD_OUT)).tolist() == FIRST


FIRST = [8, 9, 26, 90]


def test_sample_does_not_depend_on_block_size(monkeypatch):
    expected = sample(5_000, 0.3, 0, HELD_OUT)
    monkeypatch.setattr("phivision_jax.data.shuffle._BLOCK", 777)
    assert np.array_equal(sample(5_000, 0.3, 0, HELD_OUT), expected)


def test_replayed_source_is_held_out_and_not_validated_on():
    """It may be the very data that is trained on."""
    same = dataset(200)
    mixed = dataclasses.replace(Mixture.from_directories("mine").with_replay("mine", 0.5), held_out=0.2)
    held = examples_of(make_plan([same, same], mixed.validation(), BARE_PROCESSOR, SHAPE))
    trained = examples_of(make_plan([same, same], mixed, BARE_PROCESSOR, SHAPE))
    assert {s for s, _ in held} == {0} and {s for s, _ in trained} == {0, 1}
    assert not {i for _, i in held} & {i for _, i in trained}


def test_held_out_share_changes_plan():
    inputs = [plan_inputs([dataset(50)], mixture("a", share), BARE_PROCESSOR, SHAPE) for share in (0.0, 0.1, 0.2)]
    for now in inputs:
        for before in inputs:
            assert (first_difference(now, before) is None) == (now is before)
    assert first_difference(inputs[1], inputs[2]) == "held_out.share is 0.2 there, 0.1 here"
    plan = make_plan([dataset(50)], mixture("a", 0.1), BARE_PROCESSOR, SHAPE)
    assert plan.hash != make_plan([dataset(50)], mixture("a", 0.0), BARE_PROCESSOR, SHAPE).hash


def test_held_out_rejects_shares_that_leave_nothing():
    none = mixture("a", 0.001)
    with pytest.raises(ValueError, match=r"leaves none for validation: there are 50; hold out a larger share"):
        make_plan([dataset(50)], none.validation(), BARE_PROCESSOR, SHAPE)
    with pytest.raises(ValueError, match=r"leaves none for train: there are 3; hold out a smaller share"):
        make_plan([dataset(3)], mixture("a", 0.999), BARE_PROCESSOR, SHAPE)
    with pytest.raises(ValueError, match="no records are held out"):
        mixture("a", 0.0).validation()
    with pytest.raises(ValueError, match="from 0 to below 1, not 1"):
        mixture("a", 1)
