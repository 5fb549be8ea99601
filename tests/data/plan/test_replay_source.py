"""Replay: a share of the examples from one source, and everything else as without it."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phivision_jax.batch import RowShape
from phivision_jax.data.plan.example_order import Pool, order_examples
from phivision_jax.data.plan.mixture import Mixture, Stage
from phivision_jax.data.plan.plan import make_plan, plan_inputs
from phivision_jax.data.records import MODES
from phivision_jax.io.messages import first_difference
from tests.support.records import BARE_PROCESSOR, BareDataset, join_pools

SHAPE = RowShape(12, 1, 8)
THINK = MODES.index("think")


def pool(n: int, think: int = 0, tokens: int = 10) -> Pool:
    modes = np.full(n, MODES.index("nothink"))
    modes[:think] = THINK
    return Pool(np.zeros(n, np.int64), np.full(n, tokens), modes, np.zeros(n, np.int64))


def examples_of(pools: list[Pool], stage: Stage) -> list[tuple[int, int]]:
    pool, records = join_pools(pools)
    order, _ = order_examples(pool, [f"s{i}" for i in range(len(pools))], stage, 0)
    return list(zip(pool.sources[order].tolist(), records[order].tolist(), strict=True))


def test_replay_by_hand():
    """A share of 1/4 is due at 1/2·4 = 2, 6, 10, …, the others at 2/3, 2, 10/3, …: one among any four."""
    examples = examples_of([pool(9), pool(50, tokens=70)], Stage(replay={"s1": 0.25}))
    assert len(examples) == 12 and [s for s, _ in examples].count(1) == 3
    for first in range(0, 12, 4):
        assert [s for s, _ in examples[first : first + 4]].count(1) == 1
    assert sorted(i for s, i in examples if s == 0) == list(range(9))  # a complete pass over the others


@given(
    own=st.integers(1, 60),
    other=st.integers(1, 60),
    share=st.floats(0.01, 0.9),
    epochs=st.integers(1, 4),
)
def test_replay_share_holds(own, other, share, epochs):
    examples = examples_of([pool(own), pool(other)], Stage(replay={"s1": share}, epochs=epochs))
    counts = collections.Counter(s for s, _ in examples)
    assert counts[1] == pytest.approx(share * len(examples), abs=1)
    assert abs(counts[0] - epochs * own) <= 1
    times = collections.Counter(i for s, i in examples if s == 0)
    assert max(times.values()) - min(times.get(i, 0) for i in range(own)) <= 1
    again = collections.Counter(i for s, i in examples if s == 1)
    assert len(again) == min(other, counts[1])  # replayed records do not repeat before all have come either


def test_replay_leaves_other_shares():
    """20 % reasoning of sources a and b at 3 : 1, beside a tenth of c, which thinks throughout."""
    pools = [pool(200, think=50), pool(200, think=50), pool(200, think=200)]
    stage = Stage(weights={"s0": 3, "s1": 1}, reasoning_share=0.2, replay={"s2": 0.1}, examples=1000)
    examples = examples_of(pools, stage)
    own = [(s, i) for s, i in examples if s != 2]
    assert len(own) == 900 and [s for s, _ in own].count(0) == pytest.approx(675, abs=2)
    assert sum(pools[s].modes[i] == THINK for s, i in own) == pytest.approx(180, abs=1)
    # The same examples as without replay, in the same order.
    alone = Stage(weights={"s0": 3, "s1": 1}, reasoning_share=0.2, examples=900, sources=("s0", "s1"))
    assert own == examples_of(pools, alone)


def test_chosen_excludes_replayed():
    assert Stage(replay={"b": 0.5}).chosen(["a", "b"]) == [0]
    assert Stage().chosen(["a", "b"]) == [0, 1]
    with pytest.raises(ValueError, match="'b' is replayed; leave it out"):
        Stage(replay={"b": 0.5}, weights={"a": 1, "b": 1}).chosen(["a", "b"])
    with pytest.raises(ValueError, match="replay names 'c'; the sources are a, b"):
        Stage(replay={"c": 0.5}).chosen(["a", "b"])
    with pytest.raises(ValueError, match="add up to less than 1"):
        Stage(replay={"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="replay of 'a' must be a share above 0"):
        Stage(replay={"a": 0.0})


def test_plan_with_replay():
    datasets = [BareDataset([6] * 90, [[]] * 90), BareDataset([6] * 500, [[]] * 500)]
    mixture = Mixture.from_directories("mine", epochs=2).with_replay("base", 0.1)
    assert mixture.names == ("mine", "replay/base")
    plan = make_plan(datasets, mixture, BARE_PROCESSOR, SHAPE)
    pairs = np.concatenate(plan.rows(0, plan.num_rows))
    assert len(pairs) == 200 and (pairs[:, 0] == 1).sum() == 20
    assert collections.Counter(pairs[pairs[:, 0] == 0, 1].tolist()) == dict.fromkeys(range(90), 2)
    assert "replay/base                    20 examples  10.00%" in plan.summary()
    assert "requested 10.00% of examples" in plan.summary()
    without = plan_inputs(datasets[:1], Mixture.from_directories("mine", epochs=2), BARE_PROCESSOR, SHAPE)
    assert first_difference(without, plan.inputs) and first_difference(plan.inputs, without)


def test_with_replay_scales_existing_replay():
    sources = tuple((name, Path(name)) for name in ("a", "b"))
    mixture = Mixture(sources, (Stage("one", replay={"b": 0.5}), Stage("two"))).with_replay("base", 0.2)
    assert dict(mixture.stages[0].replay) == {"b": pytest.approx(0.4), "replay/base": 0.2}
    assert dict(mixture.stages[1].replay) == {"replay/base": 0.2}


def test_read_replay(tmp_path):
    (tmp_path / "mix.toml").write_text(
        'replay = { base = 0.1 }\n[[sources]]\npath = "mine"\n[[sources]]\npath = "base"\n'
    )
    (stage,) = Mixture.read(tmp_path / "mix.toml").stages
    assert stage.replay == {"base": 0.1} and stage.chosen(["mine", "base"]) == [0]
